"""Time and memory of every optimizer's training step beside AdamW's, and beside those of installed packages.

    hf-so2 benchmark --output_dir out/benchmark
    hf-so2 benchmark --optim kfac foof --tokens 8192 --rounds 9
    hf-so2 benchmark --optim kfac --scaling 128 256 512 1024          # how the cost grows with the width

A Llama of the given size trains on random tokens. In every round each optimizer makes a few steps, in turn and in
shuffled order, and its time is divided by AdamW's of the same round. Prints tables (milliseconds, medians over rounds;
operations, and the share of the machine's rate that they run at) and leaves benchmark.json and benchmark.png in
--output_dir. Peers: heavyball, pytorch-optimizer and asdfghjkl, where they are installed.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_so2.benchmark.contestants import BASELINE, Contestant, baseline, ours, parse_variant, seeded_llama, theirs
from hf_so2.benchmark.flops import product_rate
from hf_so2.benchmark.peers import PEERS
from hf_so2.benchmark.phases import PHASES
from hf_so2.benchmark.plots import plot_benchmark, plot_growth
from hf_so2.benchmark.ratios import fitted_exponent
from hf_so2.benchmark.report import against_peers, growth_table, peer_table, table, to_dict, work_table
from hf_so2.benchmark.rounds import Measurement, measure
from hf_so2.cli import parse, require_device
from hf_so2.errors import ConfigurationError
from hf_so2.folders import require_folder
from hf_so2.methods.table import parse_name
from hf_so2.optim import OPTIMIZERS
from hf_so2.spelling import did_you_mean
from hf_so2.weights import stacks
from hf_so2.weights.schedule import regular_from

INSTALLED = [peer.name for peer in PEERS if peer.installed]


@dataclass
class BenchmarkArguments:
    """What to measure."""

    output_dir: str = field(default="out/benchmark", metadata={"help": "where benchmark.json and the PNG go"})
    optim: list[str] = field(
        default_factory=lambda: [name for name in OPTIMIZERS if not name.endswith("_mup")],
        metadata={
            "help": "optimizers of ours, without μP, which changes no step's cost; name:setting=value,... for another"
            " setting than the defaults"
        },
    )
    peers: list[str] = field(
        default_factory=lambda: list(INSTALLED), metadata={"help": "peers, or none; by default all that are installed"}
    )
    hidden_size: int = field(default=256, metadata={"help": "of the Llama"})
    intermediate_size: int | None = field(default=None, metadata={"help": "of its MLP; four times the hidden size"})
    num_hidden_layers: int = field(default=4, metadata={"help": "its depth"})
    num_attention_heads: int = field(default=4, metadata={"help": "of equal size; must divide the hidden size"})
    vocab_size: int = field(default=2048, metadata={"help": "of its vocabulary"})
    tokens: int = field(default=1024, metadata={"help": "tokens per step, a multiple of the sequence length"})
    sequence_length: int = field(default=128, metadata={"help": "tokens per sequence"})
    interval: int | None = field(
        default=None,
        metadata={"help": "steps between refreshes of preconditioners; left out, as by default, a peer's as ours"},
    )
    rounds: int = field(default=5, metadata={"help": "how often every optimizer has its turn"})
    steps: int = field(default=20, metadata={"help": "steps of a turn, a multiple of the interval"})
    scaling: list[int] = field(
        default_factory=list, metadata={"help": "hidden sizes to measure one after the other, with fitted exponents"}
    )
    device: str = field(
        default="cuda" if torch.cuda.is_available() else "cpu", metadata={"help": "where to train: cpu or cuda"}
    )
    bf16: bool = field(default=False, metadata={"help": "bfloat16 in forward and backward passes, by autocast"})
    stacks: bool = field(
        default=True, metadata={"help": "layers of one shape as one stack, on a GPU; --no_stacks measures without"}
    )
    seed: int = field(default=0, metadata={"help": "of the models, the tokens and the order"})

    def __post_init__(self) -> None:
        for variant in self.optim:
            name, settings = parse_variant(variant)
            if name not in OPTIMIZERS or name.endswith("_mup"):
                hint = did_you_mean(name.removesuffix("_mup"), (known for known in OPTIMIZERS if "_mup" not in known))
                raise ConfigurationError("optim", name, f"must be an optimizer of ours, without _mup{hint}")
            parse_name(name)[0].settings(settings)
        if self.peers == ["none"]:
            self.peers = []
        for name in self.peers:
            if name not in INSTALLED:
                raise ConfigurationError("peers", name, f"must be one of those installed: {', '.join(INSTALLED)}")
        sizes = (
            "num_attention_heads",
            "num_hidden_layers",
            "vocab_size",
            "sequence_length",
            "rounds",
            "steps",
            "hidden_size",
        )
        for name in sizes:
            if getattr(self, name) < 1:
                raise ConfigurationError(name, getattr(self, name), "must be at least 1")
        if self.interval is not None and self.interval < 1:
            raise ConfigurationError("interval", self.interval, "must be at least 1")
        if self.tokens < 1 or self.tokens % self.sequence_length:
            raise ConfigurationError("tokens", self.tokens, "must be a multiple of sequence_length")
        for interval in self.intervals:
            if self.steps % interval:
                raise ConfigurationError("steps", self.steps, f"must be a multiple of interval, which is {interval}")
        for width in self.widths:
            if width < 1 or width % (2 * self.num_attention_heads):
                raise ConfigurationError("hidden_size", width, "must divide into heads of even size")
        if len(self.scaling) == 1:
            raise ConfigurationError("scaling", self.scaling, "must be two sizes or more")
        require_device("device", self.device)

    @property
    def intervals(self) -> list[int]:
        """The steps between refreshes that occur, without those that a variant sets for itself."""
        if self.interval is not None:
            return [self.interval]
        methods = [parse_name(parse_variant(text)[0])[0] for text in self.optim]
        return sorted({m.settings({}).preconditioner_update_steps for m in methods if "statistics" in m.uses})

    @property
    def warm_up(self) -> int:
        """Steps before the first that is timed: refreshes are regular by then."""
        return max([self.steps, *(math.ceil(regular_from(interval)) for interval in self.intervals)])

    @property
    def widths(self) -> list[int]:
        """The hidden sizes to measure."""
        return self.scaling or [self.hidden_size]


def main() -> None:
    """Measures, prints the table, saves it."""
    (arguments,) = parse((BenchmarkArguments,))
    output = Path(arguments.output_dir)
    require_folder("output_dir", output)
    output.mkdir(parents=True, exist_ok=True)
    if not arguments.stacks:
        stacks.STACK_BYTES = 0
    rate = product_rate(torch.device(arguments.device))
    machine = f"{_machine(arguments.device)}, products at {rate / 1e9:.0f} GFLOP/s"
    report: dict[str, Any] = {"settings": vars(arguments), "machine": machine, "product_rate": rate, "widths": {}}
    results: dict[int, list[Measurement]] = {}
    for width in arguments.widths:
        results[width] = benchmark(arguments, width)
        title = f"Llama, hidden {width}, {arguments.num_hidden_layers} layers, {arguments.tokens} tokens a step"
        print(f"\n{title}; {machine}\n\n{table(results[width], BASELINE)}\n", flush=True)
        print(
            f"GFLOP a step, and the share of the rate of products\n\n{work_table(results[width], rate)}\n", flush=True
        )
        pairs = against_peers(results[width], {peer.name: peer.method for peer in PEERS})
        if rows := peer_table(pairs):
            print(f"against peers of the same method\n\n{rows}\n", flush=True)
        report["widths"][width] = to_dict(results[width], BASELINE)
        for name, figures in report["widths"][width].items():
            figures["ratio_to_peers"] = {peer: vars(found[name]) for peer, found in pairs.items() if name in found}
        # After every width, so that an interrupted run leaves what it has.
        (output / "benchmark.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        plot_benchmark(results[width], BASELINE, output / _figure(width, arguments), title)
    if arguments.scaling:
        report["exponents"] = exponents = _exponents(results, lambda m: m.percentile(50), Measurement.phase)
        report["flop_exponents"] = counted = _exponents(
            results, lambda m: sum(m.flops.values()), lambda m, phase: m.flops.get(phase, 0.0)
        )
        print(f"exponents of the hidden size (those of the operations)\n\n{growth_table(exponents, counted)}")
        (output / "benchmark.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        seconds = {name: {width: _of(name, ms).percentile(50) for width, ms in results.items()} for name in exponents}
        plot_growth(seconds, {name: row["whole step"] for name, row in exponents.items()}, output / "growth.png")


def benchmark(arguments: BenchmarkArguments, width: int) -> list[Measurement]:
    """All optimizers on a Llama of hidden size `width`."""
    device = torch.device(arguments.device)

    def model() -> nn.Module:
        return seeded_llama(
            arguments.seed,
            hidden_size=width,
            intermediate_size=arguments.intermediate_size or 4 * width,
            num_hidden_layers=arguments.num_hidden_layers,
            num_attention_heads=arguments.num_attention_heads,
            vocab_size=arguments.vocab_size,
            max_position_embeddings=arguments.sequence_length,
        ).to(device)

    generator = torch.Generator().manual_seed(arguments.seed)
    shape = (arguments.tokens // arguments.sequence_length, arguments.sequence_length)

    def tokens() -> Tensor:
        return torch.randint(arguments.vocab_size, shape, generator=generator).to(device)

    builders: list[Callable[[], Contestant]] = [partial(baseline, model)]
    builders += [partial(ours, name, model, arguments.interval) for name in arguments.optim]
    chosen = [peer for peer in PEERS if peer.name in arguments.peers]
    builders += [partial(theirs, peer, model, arguments.interval) for peer in chosen]
    if arguments.bf16:
        builders = [lambda build=build: replace(build(), autocast=torch.bfloat16) for build in builders]  # type: ignore[misc]
    return measure(
        builders,
        tokens,
        device,
        rounds=arguments.rounds,
        steps=arguments.steps,
        warm_up=arguments.warm_up,
        seed=arguments.seed,
        report=lambda line: print(line, file=sys.stderr, flush=True),
    )


def _exponents(
    results: dict[int, list[Measurement]],
    whole: Callable[[Measurement], float],
    part: Callable[[Measurement, str], float],
) -> dict[str, dict[str, float]]:
    """Of the hidden size, in a whole step and in each phase, by optimizer."""
    exponents = {}
    for name in [m.name for m in next(iter(results.values()))]:
        by_width = {width: _of(name, measurements) for width, measurements in results.items()}
        row = {phase: fitted_exponent({width: part(m, phase) for width, m in by_width.items()}) for phase in PHASES}
        exponents[name] = {"whole step": fitted_exponent({width: whole(m) for width, m in by_width.items()}), **row}
    return exponents


def _of(name: str, measurements: list[Measurement]) -> Measurement:
    return next(m for m in measurements if m.name == name)


def _figure(width: int, arguments: BenchmarkArguments) -> str:
    return f"benchmark_{width}.png" if arguments.scaling else "benchmark.png"


def _machine(device: str) -> str:
    if torch.device(device).type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    return f"CPU, {torch.get_num_threads()} threads, torch {torch.__version__}"
