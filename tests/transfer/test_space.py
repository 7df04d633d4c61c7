"""Grids and ranges as a user writes them."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_so2.errors import ConfigurationError
from hf_so2.transfer.space import Space, default_grid, parse_grid, parse_ranges


def test_grids_and_ranges_are_read() -> None:
    assert parse_grid(["learning_rate=0.2,0.1", "weight_decay=0,0.1"]) == {
        "learning_rate": (0.1, 0.2),
        "weight_decay": (0.0, 0.1),
    }
    assert parse_ranges(["damping=1e-4:1e-2"]) == {"damping": (1e-4, 1e-2)}


@pytest.mark.parametrize(
    ("parse", "text", "message"),
    [
        (parse_grid, ["learning_rat=0.1"], "did you mean 'learning_rate'"),
        (parse_grid, ["learning_rate"], "must be name=value"),
        (parse_grid, ["learning_rate=high"], "'high'"),
        (parse_grid, ["learning_rate=inf"], "'inf'"),
        (parse_grid, ["damping=1", "damping=2"], "only once"),
        (parse_ranges, ["learning_rate=0.1"], "lowest:highest"),
        (parse_ranges, ["learning_rate=0:0.1"], "positive"),
        (parse_ranges, ["learning_rate=0.2:0.1"], "larger"),
        (parse_ranges, ["momentum=0.8:0.9"], "must name one of"),
    ],
)
def test_mistakes_name_what_is_allowed(parse: object, text: list[str], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        parse(text)  # type: ignore[operator]


@given(st.integers(1, 9), st.floats(1e-4, 1.0))
def test_the_default_grid_is_a_factor_of_2_around_the_default(count: int, center: float) -> None:
    values = default_grid(center, count)["learning_rate"]
    assert len(values) == count
    assert values[(count - 1) // 2] == pytest.approx(center, rel=1e-5)
    for low, high in itertools.pairwise(values):
        assert high / low == pytest.approx(2, rel=1e-4)


def test_every_point_once_and_the_middle_first() -> None:
    points = Space(grid={"learning_rate": (1.0, 2.0, 4.0), "damping": (0.1, 0.2)}).points()
    assert len(points) == 6
    assert len({tuple(point.items()) for point in points}) == 6
    assert points[0] == {"learning_rate": 2.0, "damping": 0.1}
    assert points[-1]["learning_rate"] != 2.0


def test_an_extension_goes_on_at_the_grids_own_ratio() -> None:
    space = Space(grid={"learning_rate": (0.01, 0.03), "damping": (1e-3,)})
    assert space.extended([("learning_rate", "high")]).grid["learning_rate"] == (0.01, 0.03, 0.09)
    assert space.extended([("learning_rate", "low")]).grid["learning_rate"][0] == pytest.approx(0.01 / 3, rel=1e-5)
    assert space.extended([("damping", "high")]).grid["damping"] == (1e-3, 2e-3)
    assert space.covering([{"learning_rate": 0.09, "damping": 1e-3}]).grid["learning_rate"] == (0.01, 0.03, 0.09)
