"""The coordinate check: does one step of training change every layer's outputs by the same amount at every width?

In muP the change of each pre-activation since initialisation neither grows nor vanishes with the width, in every layer
and after every step (Yang et al. 2022, arXiv 2203.03466, appendix D.1). The change is measured as its root mean square
over a fixed batch, and fitted as a power of the width. For the head the change of the weights alone is read, `dW x`: in
muP at small widths the logits' own change still falls with the width through `W0 dh`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeAlias

import torch

from .rules import Role

Quantity: TypeAlias = Literal["activation", "update"]

# What has to stay level: the whole change where the width is on both sides, the weights' share of it in the head.
JUDGED: Mapping[Role, Quantity] = {"hidden": "activation", "output": "update"}


@dataclass(frozen=True)
class Measurement:
    """The change of one kind of layer in one run.

    Args:
        width: hidden size.
        seed: of weights and data.
        step: optimizer steps taken.
        layer: module name with layer indices as `*`.
        role: of its weight; `output` for a tied head.
        activation: root mean square of the change of its output since step 0, over the batch and the layers of this
            name.
        update: the same of `(W - W0) x` with the present input `x`; None where it cannot be computed (experts).
    """

    width: int
    seed: int
    step: int
    layer: str
    role: Role
    activation: float
    update: float | None


@dataclass(frozen=True)
class CoordinateCheck:
    """Measurements over widths, the exponents fitted to them and the verdict. Printing it gives a table.

    Args:
        optim: the optimizer's name.
        widths: hidden sizes.
        seeds: how many runs each width had.
        steps: after how many steps was measured.
        tolerance: how far an exponent may be from 0.
        measurements: all of them.
    """

    optim: str
    widths: tuple[int, ...]
    seeds: int
    steps: tuple[int, ...]
    tolerance: float
    measurements: tuple[Measurement, ...] = field(repr=False)

    def curve(self, role: Role, quantity: Quantity, step: int, layer: str | None = None) -> dict[int, float]:
        """Geometric mean over layers and seeds by width; NaN where training diverged, empty where nothing was
        measured."""
        logs: dict[int, list[float]] = defaultdict(list)
        for m in self.measurements:
            value = getattr(m, quantity)
            if m.role == role and m.step == step and (layer is None or m.layer == layer) and value is not None:
                logs[m.width].append(math.log(value) if value > 0 else math.nan)
        return {width: math.exp(sum(values) / len(values)) for width, values in sorted(logs.items())}

    def slope(self, role: Role, quantity: Quantity, step: int | None = None, layer: str | None = None) -> float:
        """The exponent of the width in `curve`, by least squares on logarithms; at the last step by default."""
        curve = self.curve(role, quantity, self.steps[-1] if step is None else step, layer)
        x = torch.tensor([math.log(width) for width in curve], dtype=torch.float64)
        y = torch.tensor([math.log(value) for value in curve.values()], dtype=torch.float64)
        if len(curve) < 2:
            return math.nan
        x = x - x.mean()
        return float((x * y).sum() / (x * x).sum())

    def layers(self) -> dict[str, Role]:
        """The kinds of layers that were measured, with their roles."""
        return {m.layer: m.role for m in self.measurements}

    @property
    def passed(self) -> bool:
        """Whether each judged role's exponent at the last step is within the tolerance."""
        present = set(self.layers().values())
        return all(
            abs(self.slope(role, quantity)) <= self.tolerance for role, quantity in JUDGED.items() if role in present
        )

    def __str__(self) -> str:
        span = f"{self.widths[0]}-{self.widths[-1]}"
        title = f"{self.optim}: exponents of the change against width {span}, {self.seeds} seeds"
        rows = [["role", "change of", *(f"step {step}" for step in self.steps), ""]]
        for role in ("input", "hidden", "output"):
            for quantity in ("activation", "update"):
                slopes = [self.slope(role, quantity, step) for step in self.steps]
                judged = JUDGED.get(role) == quantity and role in self.layers().values()
                if all(math.isnan(slope) for slope in slopes) and not judged:
                    continue
                verdict = (
                    ("ok" if abs(slopes[-1]) <= self.tolerance else f"beyond ±{self.tolerance:g}") if judged else ""
                )
                rows.append([role, quantity, *(f"{slope:+.3f}" for slope in slopes), verdict])
        lengths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        table = ["  ".join(cell.ljust(n) for cell, n in zip(row, lengths, strict=True)).rstrip() for row in rows]
        return "\n".join([title, *table])

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: settings, verdict, exponents by role, quantity and step, exponents by layer, and the
        measurements."""
        roles = sorted(set(self.layers().values()))
        quantities: tuple[Quantity, ...] = ("activation", "update")
        return {
            "optim": self.optim,
            "widths": list(self.widths),
            "seeds": self.seeds,
            "steps": list(self.steps),
            "tolerance": self.tolerance,
            "passed": self.passed,
            "slopes": {
                role: {q: {str(step): _finite(self.slope(role, q, step)) for step in self.steps} for q in quantities}
                for role in roles
            },
            "layer_slopes": {
                layer: {"role": role, **{q: _finite(self.slope(role, q, layer=layer)) for q in quantities}}
                for layer, role in self.layers().items()
            },
            "measurements": [asdict(m) for m in self.measurements],
        }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
