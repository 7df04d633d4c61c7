"""A training run by a recipe: what it takes over, what flags override, how it compares with the forecast."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hf_so2 import cli
from hf_so2.data import DataArguments
from hf_so2.errors import ConfigurationError
from hf_so2.training.arguments import SecondOrderTrainingArguments
from hf_so2.transfer.recipe import Recipe, read_recipe
from hf_so2.transfer.reporting.verdict import predicted_loss
from hf_so2.transfer.runner import TYPES

LONGER = 1.05  # times as long: epochs are rounded to steps
KNOWN = (
    "the rate was not tuned for that and is not corrected; in one small model K-FAC's best rate fell with the steps"
    " (exponent -0.29 [-0.56, -0.08]), AdamW's and what a larger batch does were not decided"
    " (docs/measurements/length.md)"
)


@dataclass
class RecipeArguments:
    """Where the settings come from."""

    _argument_group_name = "recipe"

    recipe: str | None = field(
        default=None, metadata={"help": "recipe.yaml of `hf-so2 sweep`: settings, which flags override"}
    )


def read_flags_and_recipe(
    types: Sequence[type], argv: Sequence[str] | None = None
) -> tuple[dict[str, Any], Recipe | None, list[str]]:
    """The flags of a training run, with those of a recipe below those of the command line.

    Returns:
        All flags, the recipe if there is one, and lines that tell the user what was taken over and overridden.

    Raises:
        ConfigurationError: as `hf_so2.transfer.recipe.read_recipe` and `Recipe.check`.
    """
    given = cli.read_flags((RecipeArguments, *types), argv)
    path = given.pop("recipe", None)
    if path is None:
        return given, None, []
    recipe = read_recipe(path)
    recipe.check(path, given)
    taken = cli.read_flags(types, [], recipe.settings(given))
    lines = [f"recipe {path}: {recipe.optimizer['optim']}, tuned at {recipe.tuned_at}"]
    if not recipe.transfer["confirmed"]:
        lines.append(f"beware: {recipe.transfer['verdict']}")
    if warning := recipe.other_depth(given):
        lines.append(f"beware: {warning}")
    lines += [f"override: {line}" for line in recipe.overrides(given)]
    return taken | given, recipe, lines


def share_batch(args: SecondOrderTrainingArguments, recipe: Recipe, lines: Sequence[str]) -> None:
    """Divides the recipe's batch among the processes, so that every step sees as many sequences as on the proxies.

    Raises:
        ConfigurationError: it cannot be divided evenly.
    """
    processes = args.world_size
    if processes == 1 or any("batch_size:" in line or "accumulation_steps:" in line for line in lines):
        return
    size = args.per_device_train_batch_size
    if size % processes:
        raise ConfigurationError(
            "per_device_train_batch_size",
            size,
            f"cannot be divided among {processes} processes; give it, and gradient_accumulation_steps, yourself",
        )
    args.per_device_train_batch_size = size // processes


@dataclass(frozen=True)
class Extent:
    """How much a run trains on.

    Args:
        steps: of the optimizer; None where that is not known.
        tokens: in a step, of all processes together.
    """

    steps: int | None
    tokens: int


def extents(
    recipe: Recipe, args: SecondOrderTrainingArguments, data: DataArguments, blocks: int
) -> tuple[Extent, Extent]:
    """Of the proxies, and of the run.

    Args:
        recipe: of the proxies, which ran in one process each.
        args: of the run.
        data: of the run.
        blocks: its training sequences; the proxies had as many if no flag of the data was changed.
    """
    known = cli.read_flags(TYPES, [], recipe.settings({}))  # as numbers, whatever a person wrote
    size = known["per_device_train_batch_size"] * known["gradient_accumulation_steps"]
    own = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    length = known.get("max_seq_length", DataArguments.max_seq_length)
    same_data = all(getattr(data, name) == known[name] for name in recipe.data)
    steps = _steps(known.get("max_steps", -1), known.get("num_train_epochs"), size, blocks if same_data else None)
    return (
        Extent(steps, size * length),
        Extent(_steps(args.max_steps, args.num_train_epochs, own, blocks), own * data.max_seq_length),
    )


def _steps(max_steps: int, epochs: float | None, size: int, blocks: int | None) -> int | None:
    if max_steps > 0 or epochs is None or blocks is None:
        return max_steps if max_steps > 0 else None
    return math.ceil(epochs * math.ceil(blocks / size))


def beyond_proxies(proxies: Extent, run: Extent) -> str:
    """A warning of a run that is longer or has a larger batch than what its rate was tuned on; empty if neither."""
    more = []
    if proxies.steps and run.steps and run.steps > LONGER * proxies.steps:
        more.append(f"{run.steps / proxies.steps:.3g} times the proxies' steps ({run.steps}, {proxies.steps} there)")
    if run.tokens > LONGER * proxies.tokens:
        more.append(f"{run.tokens / proxies.tokens:.3g} times their tokens a step ({run.tokens}, {proxies.tokens})")
    return f"{' and '.join(more)}: {KNOWN}" if more else ""


def comparison(recipe: Recipe, width: int, loss: float) -> str:
    """The wide run's loss beside what the proxies let expect."""
    widest = max(recipe.losses, default=0)
    if not widest:
        return ""
    line = f"eval_loss {loss:.4f} at width {width}; the proxy of width {widest} had {recipe.losses[widest]:.4f}"
    bounds = predicted_loss(recipe.losses, width) if width > widest else None
    return line if bounds is None else f"{line}, predicted were {bounds[0]:.3f} to {bounds[1]:.3f}"
