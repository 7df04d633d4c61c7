"""An optimum on the edge of what was tried decides nothing."""

from __future__ import annotations

import math

import pytest

from hf_so2.papers import mup_claims
from hf_so2.papers.verdict import Outcome
from hf_so2.papers.widths import best_value


def test_a_best_value_on_an_edge_is_no_number() -> None:
    inside = {0.25: 1.0, 0.5: 0.2, 1.0: 0.3, 2.0: 1.5}
    assert 0.25 < best_value(inside) < 1.0
    assert math.isnan(best_value({value: -score for value, score in inside.items()} | {2.0: -9.0}))
    assert math.isnan(best_value(dict.fromkeys(inside, math.inf)))


def test_and_leaves_a_claim_of_transfer_undecided() -> None:
    shifts = mup_claims.shifts({32: [0.5, 0.5, 0.5], 256: [0.5, 0.5, math.nan]})
    (first, second) = mup_claims.within("shift", shifts, 1.0)
    assert first.outcome is second.outcome is Outcome.UNDECIDED
    assert mup_claims.within("shift", [0.1, 0.0, 0.05], 1.0)[0].outcome is Outcome.HOLDS
    assert mup_claims.within("shift", [2.1, 2.0, 2.05], 1.0)[0].outcome is Outcome.FAILS
    assert mup_claims.within("shift", [-2.1, -2.0, -2.05], 1.0)[0].outcome is Outcome.FAILS
    assert math.isnan(mup_claims.within("shift", [0.1, math.nan, 0.0], 1.0)[0].mean)


def test_a_shift_beyond_a_step_holds_only_if_it_is_measured() -> None:
    assert mup_claims.shifts({32: [1.0], 64: [2.0], 128: [8.0]}) == [pytest.approx(3.0)]
