"""What apply_mup did, one row per parameter pattern."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from hf_so2.errors import ConfigurationError

from . import rules
from .roles import Shape, pattern_of
from .rules import ParameterWidth

logger = logging.getLogger(__name__)

_COLUMNS = {
    "lr_adam": lambda width: rules.learning_rate_multiplier(rules.ADAM, width),
    "lr_sgd": lambda width: rules.learning_rate_multiplier(rules.SGD, width),
    "lr_spectral": lambda width: rules.learning_rate_multiplier(rules.SPECTRAL, width),
    "damping_A": lambda width: rules.damping_multiplier("rho_A", width),
    "damping_B": lambda width: rules.damping_multiplier("rho_B", width),
}


class MupReport(Mapping[str, ParameterWidth]):
    """Role and width ratios by parameter name, with the multipliers that follow from them. Printing it gives the table.

    Args:
        widths: by parameter name.
        shapes: by parameter name.
        base_width: hidden size of the base model, 0 for a model from outside transformers.
        width: hidden size of the model, likewise.
        base_depth: number of layers of the base model, 0 where it is the model's own.
        depth: number of layers of the model, likewise.
        pretrained: the weights came from a checkpoint, so nothing was re-initialised.
        notes: what was done beside rescaling initial weights, one sentence each.
    """

    def __init__(
        self,
        widths: Mapping[str, ParameterWidth],
        shapes: Mapping[str, Shape],
        *,
        base_width: int,
        width: int,
        base_depth: int = 0,
        depth: int = 0,
        pretrained: bool = False,
        notes: Sequence[str] = (),
    ) -> None:
        self._widths, self._shapes = dict(widths), dict(shapes)
        self.base_width, self.width, self.pretrained, self.notes = base_width, width, pretrained, tuple(notes)
        self.base_depth, self.depth = base_depth, depth

    def warn_of_another_base(self, width: int | None, depth: int | None = None) -> None:
        """Warn if a base was given that is not the one the model was scaled from. The model's own counts.

        Args:
            width: hidden size of the base that was given; None for no base.
            depth: its number of layers; None where it was not said.
        """
        own = [(self.base_width, width, "width"), (self.base_depth, depth, "depth")]
        other = [f"{kind} {given}, not {mine}" for mine, given, kind in own if mine and given and given != mine]
        if other:
            logger.warning("the μP base is not used: the model is scaled from another: %s", ", ".join(other))

    def __getitem__(self, name: str) -> ParameterWidth:
        return self._widths[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._widths)

    def __len__(self) -> int:
        return len(self._widths)

    def rows(self) -> list[dict[str, Any]]:
        """One row per pattern of names with equal shape and width.

        Returns:
            Dictionaries with `pattern`, `count`, `shape`, `role`, `tied`, `m_in`, `m_out`, `depth` (its growth, inside
            a residual branch), `init` (factor on the initial standard deviation of the base model), `lr_adam`,
            `lr_sgd`, `lr_spectral` and `damping_A`, `damping_B`.
        """
        groups: dict[tuple[str, Shape, ParameterWidth], int] = defaultdict(int)
        for name, width in self.items():
            groups[pattern_of(name), self._shapes[name], width] += 1
        return [
            {
                "pattern": pattern,
                "count": count,
                "shape": list(shape),
                "role": width.role,
                "tied": width.tied,
                "m_in": width.m_in,
                "m_out": width.m_out,
                "depth": width.depth,
                "init": 1.0 if self.pretrained else rules.init_multiplier(width),
                **{column: multiplier(width) for column, multiplier in _COLUMNS.items()},
            }
            for (pattern, shape, width), count in groups.items()
        ]

    def __str__(self) -> str:
        rows = self.rows()
        for row in rows:
            row["role"] += " (tied)" if row.pop("tied") else ""
        cells = [list(rows[0])] + [[_cell(value) for value in row.values()] for row in rows] if rows else []
        lengths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        table = ["  ".join(text.ljust(length) for text, length in zip(line, lengths, strict=True)) for line in cells]
        weights = "pretrained weights, not rescaled" if self.pretrained else "initial weights rescaled"
        depths = f"base depth {self.base_depth}, depth {self.depth}, " if self.depth else ""
        title = f"μP: base width {self.base_width}, width {self.width}, {depths}{weights}"
        return "\n".join(line.rstrip() for line in [title, *table, *self.notes])

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-ready values: the record's fields and the table's `rows`."""
        names = {
            name: {"width": _pack(width), "shape": list(self._shapes[name])} for name, width in self._widths.items()
        }
        return {**self._header(), "rows": self.rows(), "parameters": names}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MupReport:
        """The report that `to_dict` described."""
        parameters = values["parameters"]
        return cls(
            {name: _unpack(entry["width"]) for name, entry in parameters.items()},
            {name: tuple(entry["shape"]) for name, entry in parameters.items()},
            **_header_of(values),
        )

    def record(self) -> dict[str, Any]:
        """A short form for the model's configuration: widths by pattern, by name where a pattern has several."""
        by_pattern = defaultdict(list)
        for name, width in self._widths.items():
            by_pattern[pattern_of(name)].append((name, width))
        parameters = {}
        for pattern, members in by_pattern.items():
            uniform = len({width for _, width in members}) == 1
            parameters.update({pattern: _pack(members[0][1])} if uniform else {n: _pack(w) for n, w in members})
        return {**self._header(), "parameters": parameters}

    @classmethod
    def from_record(cls, record: Mapping[str, Any], shapes: Mapping[str, Shape]) -> MupReport:
        """The report of a model with parameters of these names and shapes, from its record.

        Raises:
            ConfigurationError: the record does not know one of the parameters.
        """
        parameters = record["parameters"]
        widths = {}
        for name in shapes:
            packed = parameters.get(name, parameters.get(pattern_of(name)))
            if packed is None:
                raise ConfigurationError("so2_mup", name, "parameter is not in the muP record of the configuration")
            widths[name] = _unpack(packed)
        return cls(widths, shapes, **_header_of(record))

    def _header(self) -> dict[str, Any]:
        return {
            "base_width": self.base_width,
            "width": self.width,
            **({"base_depth": self.base_depth, "depth": self.depth} if self.depth else {}),
            "pretrained": self.pretrained,
            "notes": list(self.notes),
        }


def _header_of(values: Mapping[str, Any]) -> dict[str, Any]:
    names = ("base_width", "width", "base_depth", "depth", "pretrained", "notes")
    return {name: values[name] for name in names if name in values}


def _pack(width: ParameterWidth) -> list[Any]:
    packed = [width.role, width.m_in, width.m_out, width.tied, width.scale_in, width.scale_out]
    # A record of a model as deep as its base reads as it did before there was a depth.
    return packed if width.depth == 1 else [*packed, width.depth]


def _unpack(values: Iterable[Any]) -> ParameterWidth:
    return ParameterWidth(*values)


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "x".join(map(str, value)) if isinstance(value, list) else str(value)
