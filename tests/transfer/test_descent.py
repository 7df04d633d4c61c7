"""Coordinate descent: it ends where no neighbour is better, wherever it starts, and asks for nothing twice over."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_so2.errors import ConfigurationError
from hf_so2.transfer.descent import Ladder, Position, descend, parse_ladder, values_at

NAMES = ("x", "y", "z")
CENTRES = st.tuples(*[st.integers(-4, 4)] * 3)


@given(CENTRES, st.integers(-2, 2))
def test_it_finds_the_minimum_of_a_tilted_bowl(centre: tuple[int, int, int], tilt: int) -> None:
    asked: list[Position] = []

    def losses_of(positions: Sequence[Position]) -> list[float]:
        asked.extend(positions)
        offsets = [[p[name] - c for name, c in zip(NAMES, centre, strict=True)] for p in positions]
        return [3.0 * x * x + 3.0 * y * y + z * z + tilt * x * y for x, y, z in offsets]

    best = descend(NAMES, losses_of)
    (lowest,) = losses_of([best])
    for name in NAMES:
        for step in (-1, 1):
            neighbour = {**best, name: best[name] + step}
            assert neighbour in asked
            assert losses_of([neighbour])[0] >= lowest


@given(st.floats(0, 1))
def test_a_gain_within_the_tolerance_is_no_reason_to_move(tolerance: float) -> None:
    slope = 0.5
    walked = descend(("x",), lambda positions: [slope * min(abs(p["x"] - 3), 9) for p in positions], tolerance)
    assert walked["x"] == (3 if tolerance < slope else 0)


def test_a_neighbour_that_diverges_is_passed_by_and_a_start_that_does_is_refused() -> None:
    assert descend(("x",), lambda ps: [math.inf if p["x"] > 0 else abs(p["x"] + 1.0) for p in ps]) == {"x": -1}
    with pytest.raises(ConfigurationError, match="diverged at the start"):
        descend(("x",), lambda positions: [math.inf for _ in positions])


def test_a_ladder_gives_the_same_text_for_the_same_rung() -> None:
    name, ladder = parse_ladder("learning_rate=0.06*2")
    assert (name, [ladder.value(rung) for rung in (-1, 0, 1)]) == ("learning_rate", ["0.03", "0.06", "0.12"])
    assert values_at({"damping": Ladder(1e-3, 10)}, {"damping": -2}) == {"damping": "1e-05"}


@pytest.mark.parametrize(
    "text", ["x", "x=1", "x=1*", "=1*2", "x=0*2", "x=1*1", "x=-1*2", "x=a*2", "x=1*inf", "x=nan*2"]
)
def test_a_ladder_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match=r"name=start\*factor"):
        parse_ladder(text)
