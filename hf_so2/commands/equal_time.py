"""Loss at equal time: every optimizer trains for the seconds that a baseline needs for its steps.

    hf-so2 equal-time quickstart --optim kfac_mup kl_shampoo_mup muon_mup --steps 200 --tune 2
    hf-so2 equal-time quickstart --optim kl_shampoo_mup --steps 200 --set per_device_train_batch_size=64 --shares 1 0.6

First the steps of all optimizers are timed, in turn, on the model and batch of the settings: that says how many steps
of each fit into the baseline's seconds. Then each trains for so many steps, with a schedule of that length, through
`hf-so2 train`. With --tune 2 both learning rates are doubled or halved, one at a time, as long as the loss falls by
more than --tolerance. With --shares 0.6 the best rates are tried in 0.6 of the seconds as well.

A setting of one optimizer stands behind a colon: `--optim kfac_mup:learning_rate=0.1,preconditioner_update_steps=50`.
Leaves equal_time.json, equal_time.md and equal_time.png in --output_dir, and its runs in runs.jsonl, where a repeated
command finds them.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, set_seed

from hf_so2 import cli
from hf_so2.benchmark.contestants import Contestant, ours, parse_variant
from hf_so2.benchmark.plots import plot_equal_time
from hf_so2.benchmark.rounds import Pace, paces
from hf_so2.data import DataArguments
from hf_so2.errors import ConfigurationError
from hf_so2.folders import require_folder
from hf_so2.methods.table import MUP_SUFFIX, parse_name
from hf_so2.models import ModelArguments, Vocabulary, build_config
from hf_so2.training.arguments import SecondOrderTrainingArguments
from hf_so2.transfer.descent import Ladder, descend, values_at
from hf_so2.transfer.grid import TRAIN, GridStore, parse_axis, run_grid, validation_loss

RATES = ("learning_rate", "fallback_learning_rate")
# The Trainer's names of what `build_optimizer` calls otherwise.
TRAINER_NAMES = {"lr": "learning_rate"}


@dataclass
class Entry:
    """What came of one optimizer.

    Args:
        name: as it was given.
        pace: a step's time over the baseline's, mean of the second half of the timed steps.
        rates: the two learning rates of the runs below.
        steps: by share of the baseline's seconds.
        losses: by share, one for each seed; None where training diverged.
    """

    name: str
    pace: float
    rates: Mapping[str, str]
    steps: Mapping[str, int]
    losses: Mapping[str, Sequence[float | None]]


def main() -> None:
    """Times, trains, prints the table and saves it."""
    args = _arguments()
    output = Path(args.output_dir)
    require_folder("output_dir", output)
    flags = dict(parse_axis(text) for text in args.set)
    fixed = {name: ",".join(values) for name, values in flags.items()}
    model, data, training = cli.build(types := _types(), cli.read_flags(types, _argv(args.settings, fixed)))
    if model.model_name_or_path is not None:
        allowed = "must be left out: models from scratch are timed and trained"
        raise ConfigurationError("model_name_or_path", model.model_name_or_path, allowed)
    names = [args.baseline, *(name for name in args.optim if name != args.baseline)]
    for name in names:
        parse_name(parse_variant(name)[0])
    config = build_config(model, Vocabulary(data.vocab_size))
    measured = _paces(names, config, data, training, args.timing_steps)
    output.mkdir(parents=True, exist_ok=True)
    store, entries = GridStore(output / "runs.jsonl"), []
    for name in names:
        entries.append(_entry(name, measured, args, fixed, store))
        # After every optimizer, so that an interrupted run leaves what it has.
        _save(entries, args, output)
    print((output / "equal_time.md").read_text(encoding="utf-8"))


def _types() -> tuple[type, ...]:
    return ModelArguments, DataArguments, SecondOrderTrainingArguments


def _argv(settings: str, flags: Mapping[str, str]) -> list[str]:
    return [settings, *(f"--{name}={value}" for name, value in flags.items())]


def _arguments() -> argparse.Namespace:
    parser = cli.OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", help="YAML or JSON file, or a name of `hf-so2 config`")
    parser.add_argument("--optim", nargs="+", required=True, help="optimizers, as name or name:setting=value,...")
    parser.add_argument("--baseline", default="adamw_mup", help="whose seconds count")
    parser.add_argument("--steps", type=int, default=200, help="of the baseline")
    parser.add_argument("--shares", type=float, nargs="+", default=[1.0], help="of the baseline's seconds")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="rates are tuned with the first")
    parser.add_argument("--tune", type=float, help="factor between rates; left out, rates stay as they are")
    parser.add_argument("--tolerance", type=float, default=0.01, help="nats that a move of --tune has to gain")
    parser.add_argument("--set", action="append", default=[], help="flag=value of all runs (any number of times)")
    parser.add_argument("--timing_steps", type=int, default=80, help="steps of each optimizer that are timed")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, after the timing")
    parser.add_argument("--output_dir", default="out/equal_time")
    args = parser.parse_args()
    if cli.settings_path(args.settings) is None:
        raise ConfigurationError("settings", args.settings, "must be an existing YAML or JSON file")
    for name, least in (("steps", 1), ("timing_steps", 2), ("jobs", 1)):
        if getattr(args, name) < least:
            raise ConfigurationError(name, getattr(args, name), f"must be at least {least}")
    if not all(0 < share < math.inf for share in args.shares):
        raise ConfigurationError("shares", args.shares, "must be numbers above 0")
    if args.tune is not None and not 1 < args.tune < math.inf:
        raise ConfigurationError("tune", args.tune, "must be above 1")
    return args


def _paces(
    names: Sequence[str],
    config: PreTrainedConfig,
    data: DataArguments,
    training: SecondOrderTrainingArguments,
    steps: int,
) -> dict[str, Pace]:
    device, generator = training.device, torch.Generator().manual_seed(training.seed)
    shape = (training.per_device_train_batch_size * training.gradient_accumulation_steps, data.max_seq_length)

    def model() -> nn.Module:
        set_seed(training.seed)
        return AutoModelForCausalLM.from_config(config).to(device).train()

    def tokens() -> Tensor:
        return torch.randint(data.vocab_size, shape, generator=generator).to(device)

    # Without μP, which changes no step's cost.
    builders = {name: partial(_contestant, name, model, training) for name in names}
    print(f"timing {steps} steps of each of {len(names)} optimizers", file=sys.stderr, flush=True)
    return paces(builders, tokens, device, steps=steps, seed=training.seed)


def _contestant(variant: str, model: Callable[[], nn.Module], training: SecondOrderTrainingArguments) -> Contestant:
    name, colon, rest = variant.partition(":")
    kept = [part for part in rest.split(",") if part and part.partition("=")[0] not in RATES]
    plain = name.removesuffix(MUP_SUFFIX) + (colon + ",".join(kept) if kept else "")
    autocast = torch.bfloat16 if training.bf16 else None
    contestant = ours(plain, model, None)
    contestant.gradients, contestant.autocast = partial(_accumulated, training), autocast
    return contestant


def _accumulated(training: SecondOrderTrainingArguments, model: nn.Module, tokens: Tensor) -> Tensor:
    loss, parts = tokens.new_zeros((), dtype=torch.float32), training.gradient_accumulation_steps
    for micro_batch in tokens.chunk(parts):
        part = model(input_ids=micro_batch, labels=micro_batch).loss / parts
        part.backward()
        loss = loss + part.detach()
    return loss


def _entry(
    name: str, measured: Mapping[str, Pace], args: argparse.Namespace, fixed: Mapping[str, str], store: GridStore
) -> Entry:
    optim, given = parse_variant(name)
    own = {TRAINER_NAMES.get(key, key): str(value) for key, value in given.items()}
    seconds = measured[args.baseline].time_of(args.steps)
    steps = {f"{share:g}": measured[name].steps_in(seconds * share) for share in args.shares}

    def losses(runs: Sequence[Mapping[str, str]]) -> list[float]:
        grid = [{"optim": optim, **fixed, **own, **run} for run in runs]
        return [validation_loss(run) for run in run_grid(TRAIN, args.settings, grid, store, args.jobs)]

    longest = max(steps, key=float)
    rates: dict[str, str] = {}
    if args.tune is not None:
        ladders = {rate: Ladder(start, args.tune) for rate, start in _starts(optim, own).items()}
        plan = {"max_steps": str(steps[longest]), "seed": str(args.seeds[0])}
        best = descend(
            tuple(ladders), lambda ps: losses([{**plan, **values_at(ladders, p)} for p in ps]), args.tolerance
        )
        rates = values_at(ladders, best)
    found = {
        share: losses([{"max_steps": str(count), "seed": str(seed), **rates} for seed in args.seeds])
        for share, count in steps.items()
    }
    kept = {share: [x if math.isfinite(x) else None for x in values] for share, values in found.items()}
    entry = Entry(name, measured[name].later / measured[args.baseline].later, rates, steps, kept)
    print(f"{name}: {entry.pace:.2f} of {args.baseline}'s step, {entry.steps} steps, {entry.losses}", file=sys.stderr)
    return entry


def _starts(optim: str, own: Mapping[str, str]) -> dict[str, float]:
    """Where the search for both rates begins: what was given, or the defaults."""
    method, _ = parse_name(optim)
    defaults = method.settings({})
    lr = float(own.get("learning_rate", defaults.lr))
    return dict(zip(RATES, (lr, float(own.get(RATES[1], defaults.fallback_learning_rate or lr))), strict=True))


def _save(entries: Sequence[Entry], args: argparse.Namespace, output: Path) -> None:
    report = {
        "settings": vars(args),
        "machine": f"{torch.get_num_threads()} threads, torch {torch.__version__}",
        "optimizers": [asdict(entry) for entry in entries],
    }
    (output / "equal_time.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (output / "equal_time.md").write_text(table(entries) + "\n", encoding="utf-8")
    losses = {entry.name: {share: _mean(values) for share, values in entry.losses.items()} for entry in entries}
    plot_equal_time(losses, args.baseline, output / "equal_time.png")


def table(entries: Sequence[Entry]) -> str:
    """Markdown: a row for each optimizer, the baseline first."""
    shares = list(entries[0].losses)
    heads = ["optimizer", "step", *(f"steps in {share}" for share in shares), *(f"loss at {share}" for share in shares)]
    rows = [
        [
            f"`{entry.name}`",
            f"{entry.pace:.2f}",
            *(str(entry.steps[share]) for share in shares),
            *(_shown(entry.losses[share]) for share in shares),
            *(entry.rates.get(rate, "") for rate in RATES),
        ]
        for entry in entries
    ]
    lines = [[*heads, *RATES], ["---"] * (len(heads) + len(RATES)), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _mean(losses: Sequence[float | None]) -> float:
    return sum(math.inf if loss is None else loss for loss in losses) / len(losses)


def _shown(losses: Sequence[float | None]) -> str:
    if len(losses) == 1:
        return "diverged" if losses[0] is None else f"{losses[0]:.3f}"
    each: list[Any] = ["diverged" if loss is None else f"{loss:.3f}" for loss in losses]
    return f"{_mean(losses):.3f} ({' · '.join(each)})"
