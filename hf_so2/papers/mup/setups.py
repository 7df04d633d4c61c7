"""What is run over the width: networks, and methods under the standard parametrization and under μP."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from hf_so2 import optim
from hf_so2.papers.data import BLOCK, BYTES, CLASSES, Examples, digits, text
from hf_so2.papers.models import Classifier, llama, mlp
from hf_so2.papers.training import INTERVALS, Ranges, optimizer_step, train

LAYERS = 4  # of the MLP
BASE_SEED = 7_000
TAIL = 8  # steps at the end over which losses are averaged


@dataclass(frozen=True)
class Network:
    """A network of any width.

    Args:
        name: in claims and figures.
        described: its sizes.
        build: of a width and a seed.
        examples: what it is trained on.
        classes: that each prediction chooses from.
        base: the width on which everything is tuned, the first of `widths`.
        widths: that are trained.
        steps: of a run.
        batch: examples in a step.
        seeds: how many.
        tuning_seeds: of the trials at the base width.
        reach: of the grids over the tuned value, in powers of 2 to either side.
    """

    name: str
    described: str
    build: Callable[[int, int], nn.Module]
    examples: Callable[[], Examples]
    classes: int
    widths: tuple[int, ...]
    steps: int
    batch: int
    seeds: int
    tuning_seeds: tuple[int, ...]
    reach: int

    @property
    def base(self) -> int:
        """The width that everything is tuned at."""
        return self.widths[0]

    @property
    def grid(self) -> range:
        """Steps of a grid, powers of 2."""
        return range(-self.reach, self.reach + 1)


MLP = Network("MLP", "MLP 64-M-M-M-10 on the digits", lambda width, seed: mlp(width, LAYERS, seed), digits, CLASSES,
              (32, 128, 256), 40, 128, seeds=6, tuning_seeds=(100, 101, 102, 103), reach=4)  # fmt: skip
LLAMA = Network("Llama", f"Llama of width M, 2 layers, {BLOCK} bytes of text in a sequence",
                lambda width, seed: llama(width, 2, seed), text, BYTES, (32, 128), 60, 8, seeds=4, tuning_seeds=(100,),
                reach=3)  # fmt: skip


@dataclass(frozen=True)
class Setup:
    """A method as it is run at every width.

    Args:
        method: `kfac` or `shampoo`.
        norm_control: `none` is the paper's, `spectral` this package's default.
        mup: whether the width scales initialisation and rates; else all stay as at the base width.
        damping_rule: see `hf_so2.damping`: `trace` is the paper's rescaled damping; left out, it is that under μP, and
            `constant` under the standard parametrization, where nothing knows of the width.
    """

    method: str
    norm_control: str = "none"
    mup: bool = True
    damping_rule: str = ""

    @property
    def rule(self) -> str:
        """The damping's rule."""
        return self.damping_rule or ("trace" if self.mup else "constant")

    @property
    def ranges(self) -> Ranges:
        """Of the trials at the base width; what is good beyond them is followed."""
        rates = (2.0**-8, 1.0) if self.norm_control == "spectral" else (2.0**-6, 4.0)
        return {"learning_rate": rates, "damping": (1e-3, 1.0) if self.rule == "trace" else (1e-7, 10.0)}

    def __str__(self) -> str:
        name = {"kfac": "K-FAC", "shampoo": "Shampoo"}[self.method]
        control = ", spectral control" if self.norm_control == "spectral" else ""
        rule = f", {self.damping_rule} damping" if self.damping_rule else ""
        return f"{name}{control}{rule}, {'μP' if self.mup else 'SP'}"

    def build(self, network: Network, width: int, seed: int, values: Mapping[str, float]) -> tuple[nn.Module, Any]:
        """The model and its optimizer, `values` being the learning rate and the damping."""
        model = network.build(width, seed)
        inner = model.model if isinstance(model, Classifier) else model
        base: dict[str, Any] = {}
        if self.mup:
            # Another draw of the base: μP reads the law of its standard deviations, not the values.
            other = network.build(network.base, BASE_SEED)
            base = {"base_config": other.model.config if isinstance(other, Classifier) else other}
        optimizer = optim.build_optimizer(
            self.method + "_mup" * self.mup,
            inner,
            lr=values["learning_rate"],
            damping=values["damping"],
            damping_rule=self.rule,
            norm_control=self.norm_control,
            fallback_warmup_steps=1,  # rates are constant here, and so is this one
            **INTERVALS,
            **base,
        )
        return model, optimizer

    def score(self, network: Network, width: int, seed: int, values: Mapping[str, float]) -> float:
        """log10 of the loss (nats), averaged over the last steps.

        A run that ends worse than guessing, or diverges, counts as guessing: it has learnt as little.
        """
        model, optimizer = self.build(network, width, seed, values)
        run = train(
            model, optimizer_step(optimizer), network.examples(), steps=network.steps, batch=network.batch, seed=seed,
            looks=range(network.steps - TAIL + 1, network.steps),
        )  # fmt: skip
        return min(run.tail(TAIL), math.log10(math.log(network.classes)))


METHODS = ("kfac", "shampoo")
PAPER = tuple(Setup(method, "none", mup) for method in METHODS for mup in (True, False))
OURS = tuple(Setup(method, "spectral") for method in METHODS)
