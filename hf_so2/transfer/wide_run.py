"""A training run by a recipe: what it takes over, what flags override, how it compares with the forecast."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hf_so2 import cli
from hf_so2.errors import ConfigurationError
from hf_so2.training.arguments import SecondOrderTrainingArguments
from hf_so2.transfer.recipe import Recipe, read_recipe
from hf_so2.transfer.reporting.verdict import predicted_loss


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


def comparison(recipe: Recipe, width: int, loss: float) -> str:
    """The wide run's loss beside what the proxies let expect."""
    widest = max(recipe.losses, default=0)
    if not widest:
        return ""
    line = f"eval_loss {loss:.4f} at width {width}; the proxy of width {widest} had {recipe.losses[widest]:.4f}"
    bounds = predicted_loss(recipe.losses, width) if width > widest else None
    return line if bounds is None else f"{line}, predicted were {bounds[0]:.3f} to {bounds[1]:.3f}"
