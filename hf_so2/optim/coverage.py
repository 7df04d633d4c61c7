"""The coverage table: what happens to every parameter of a model, and why."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace

from hf_so2.damping import Damping
from hf_so2.distributed import world
from hf_so2.mup import ParameterWidth
from hf_so2.mup.roles import pattern_of

logger = logging.getLogger(__name__)

UNCAPTURED = "no input was captured: its module is not called, or was compiled before the optimizer was built"


@dataclass(frozen=True)
class Coverage:
    """One parameter: its update rule, the reason, and its hyperparameters with width multipliers applied."""

    name: str
    shape: tuple[int, ...]
    algorithm: str
    reason: str
    width: ParameterWidth | None = None
    lr: float = 0.0
    weight_decay: float = 0.0
    damping: Damping | None = None

    @property
    def pattern(self) -> str:
        """The name with layer numbers replaced, so that equal layers share a row."""
        return pattern_of(self.name)


@dataclass(frozen=True)
class CoverageReport:
    """Every parameter of a model, trainable or not.

    Args:
        optim: the optimizer's name.
        parameters: one entry each, in the model's order.
    """

    optim: str
    parameters: Sequence[Coverage]

    def moved_to_fallback(self, names: Collection[str]) -> CoverageReport:
        """The same report with `names` listed under the fallback because nothing was captured for them."""
        moved = [
            replace(p, algorithm="adamw", reason=UNCAPTURED, damping=None) if p.name in names else p
            for p in self.parameters
        ]
        return CoverageReport(self.optim, moved)

    def rows(self) -> list[list[str]]:
        """Cells of the table, header first. Equal parameters with the same pattern share a row."""
        groups: dict[tuple[object, ...], list[Coverage]] = {}
        for p in self.parameters:
            key = (p.pattern, p.shape, p.algorithm, p.reason, p.width, p.lr, p.weight_decay, p.damping)
            groups.setdefault(key, []).append(p)
        header = [
            "parameter",
            "count",
            "shape",
            "updated by",
            "lr",
            "decay",
            "damping",
            "role",
            "m_in",
            "m_out",
            "why",
        ]
        return [header] + [_row(alike[0], len(alike)) for alike in groups.values()]

    def summary(self) -> str:
        """One line: the share of the weights that each algorithm updates."""
        sizes: dict[str, int] = {}
        for p in self.parameters:
            size = 1
            for dim in p.shape:
                size *= dim
            sizes[p.algorithm] = sizes.get(p.algorithm, 0) + size
        total = sum(sizes.values())
        shares = ", ".join(f"{name} {size:,} ({size / total:.0%})" for name, size in sizes.items())
        return f"{self.optim}: {total:,} weights: {shares}"

    def __str__(self) -> str:
        rows = self.rows()
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines.insert(1, "-" * max(len(line) for line in lines))
        return "\n".join([self.summary(), "", *lines])


def warn_of_uncaptured(names: Iterable[str]) -> None:
    """Warn that the fallback updates weights that were chosen for preconditioning. The table names all of them."""
    found = list(names)
    if found and world()[0] == 0:
        logger.warning(
            "%d weights chosen for preconditioning are left to AdamW, among them %s: %s",
            len(found),
            found[0],
            UNCAPTURED,
        )


def _row(p: Coverage, count: int) -> list[str]:
    width, damping = p.width, p.damping
    return [
        p.pattern,
        str(count),
        "x".join(map(str, p.shape)),
        p.algorithm,
        f"{p.lr:.4g}",
        f"{p.weight_decay:.4g}",
        _spelled(damping) if damping else "-",
        width.role if width else "-",
        f"{width.m_in:g}" if width else "-",
        f"{width.m_out:g}" if width else "-",
        p.reason,
    ]


def _spelled(damping: Damping) -> str:
    own = f"{damping.rule} {damping.epsilon:.3g}"
    return f"{own}, head {_spelled(damping.head)}" if damping.head else own
