"""What apply_mup did, one row per parameter pattern."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from . import rules
from .roles import pattern_of
from .rules import ParameterWidth


class MupReport(Mapping[str, ParameterWidth]):
    """Role and width ratios by parameter name, with the multipliers that follow from them.

    Args:
        widths: by parameter name.
        shapes: by parameter name.
        base_width: hidden size of the base model.
        width: hidden size of the model.
        pretrained: the weights came from a checkpoint, so nothing was re-initialised.
    """

    def __init__(
        self,
        widths: Mapping[str, ParameterWidth],
        shapes: Mapping[str, tuple[int, ...]],
        *,
        base_width: int,
        width: int,
        pretrained: bool = False,
    ) -> None:
        self._widths, self._shapes = dict(widths), dict(shapes)
        self.base_width, self.width, self.pretrained = base_width, width, pretrained

    def __getitem__(self, name: str) -> ParameterWidth:
        return self._widths[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._widths)

    def __len__(self) -> int:
        return len(self._widths)

    def rows(self) -> list[dict[str, Any]]:
        """One row per pattern and width: counts, shape, role, ratios and multipliers."""
        keys = {name: (pattern_of(name), self._shapes[name], width) for name, width in self.items()}
        rows = []
        for (pattern, shape, width), count in Counter(keys.values()).items():
            rows.append(
                {
                    "pattern": pattern,
                    "count": count,
                    "shape": list(shape),
                    "role": width.role,
                    "tied": width.tied,
                    "m_in": width.m_in,
                    "m_out": width.m_out,
                    "init": rules.init_multiplier(width),
                    "lr_adam": rules.learning_rate_multiplier(rules.ADAM, width),
                    "lr_sgd": rules.learning_rate_multiplier(rules.SGD, width),
                    "lr_spectral": rules.learning_rate_multiplier(rules.SPECTRAL, width),
                    "damping_A": rules.damping_multiplier("rho_A", width),
                    "damping_B": rules.damping_multiplier("rho_B", width),
                }
            )
        return rows

    def __str__(self) -> str:
        rows = self.rows()
        header = list(rows[0]) if rows else []
        cells = [header] + [[_cell(value) for value in row.values()] for row in rows]
        lengths = [max(len(line[i]) for line in cells) for i in range(len(header))]
        return "\n".join("  ".join(text.ljust(n) for text, n in zip(line, lengths, strict=True)).rstrip() for line in cells)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready record, from which `from_dict` and the model's parameter names give the report back."""
        return {
            "base_width": self.base_width,
            "width": self.width,
            "pretrained": self.pretrained,
            "rows": self.rows(),
            "names": {
                name: [w.role, w.m_in, w.m_out, w.tied, w.scale_in, w.scale_out, list(self._shapes[name])]
                for name, w in self.items()
            },
        }

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> MupReport:
        """The report that `to_dict` recorded."""
        names = record["names"]
        return cls(
            {name: ParameterWidth(*entry[:6]) for name, entry in names.items()},
            {name: tuple(entry[6]) for name, entry in names.items()},
            base_width=record["base_width"],
            width=record["width"],
            pretrained=record["pretrained"],
        )


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "x".join(map(str, value)) if isinstance(value, list) else str(value)
