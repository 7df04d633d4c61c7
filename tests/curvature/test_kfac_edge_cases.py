"""Zero states, deficient and vanishing factors, the ends of float32, and every damping rule under every method."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shared.dense_fisher import METHODS, dense_preconditioner, eye, relative
from shared.helpers import llama, numpy_damping
from shared.kfac_reference import BLOCKS, CORRECTED, Reference, Rows, feed, fresh_state, random_rows

import hf_so2
from hf_so2.curvature import KFAC
from hf_so2.damping import RULES, Damping
from hf_so2.linalg import DecompositionError
from hf_so2.mup import apply_mup

SEEDS = st.integers(0, 2**31 - 1)
SHAPE = (4, 5)


def preconditioned(name: str, rows: Rows, gradient: np.ndarray, damping: Damping, beta: float = 0.9) -> np.ndarray:
    """The first step from a zero state."""
    block = BLOCKS[name](beta)
    state = fresh_state(block, gradient.shape)
    feed(block, state, rows)
    block.refresh(state, damping)
    return block.precondition(state, torch.from_numpy(gradient)).numpy()


@pytest.mark.parametrize("name", METHODS)
def test_state_starts_at_zero(name: str) -> None:
    state = fresh_state(BLOCKS[name](0.9), SHAPE)
    assert all(not value.any() for value in state.values())
    assert ("B" in state) == (name != "foof")


@pytest.mark.parametrize("name", METHODS)
@given(seed=SEEDS, shape=st.tuples(st.integers(1, 8), st.integers(1, 8)), count=st.integers(1, 4))
@settings(max_examples=25)
def test_first_step_with_fewer_rows_than_dimensions(name: str, seed: int, shape: tuple[int, int], count: int) -> None:
    """EKFAC's first step is K-FAC's without a split of the damping; both are the dense solve."""
    rng = np.random.default_rng(seed)
    rows, gradient = random_rows(rng, count, shape), rng.normal(size=shape)
    reference = Reference(name, 0.9)
    reference.update(rows)
    reference.refresh()
    expected = reference.precondition(gradient, "trace", 1e-3)
    assert relative(preconditioned(name, rows, gradient, Damping("trace", 1e-3)), expected) < 1e-8


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("zero", ["h", "delta", "both"])
@pytest.mark.parametrize("name", METHODS)
def test_a_zero_factor_is_damped_into_the_identity(name: str, zero: str, rule: str) -> None:
    """A side without information leaves its side of the gradient alone, except that one block has one damping."""
    rng = np.random.default_rng(0)
    h, delta = random_rows(rng, 30, SHAPE)
    h, delta = (h * 0 if zero in ("h", "both") else h), (delta * 0 if zero in ("delta", "both") else delta)
    gradient = rng.normal(size=SHAPE)
    actual = preconditioned(name, (h, delta), gradient, Damping(rule, 1e-2))
    if name in ("kfac", "foof"):
        a, b = h.T @ h / 30, delta.T @ delta / 30 if name == "kfac" else np.ones((1, 1))
        rho_a, rho_b = numpy_damping(rule, 1e-2, a, b)
        right = np.linalg.inv(a + rho_a * eye(a)) if a.any() else eye(a)
        left = np.linalg.inv(b + rho_b * eye(b)) if b.any() and name == "kfac" else np.eye(SHAPE[0])
        assert relative(actual, left @ gradient @ right) < 1e-10
    else:  # their statistics are products of h and δ: all of them vanish
        assert relative(actual, gradient) < 1e-12


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", METHODS)
@given(seed=SEEDS, shape=st.tuples(st.integers(1, 4), st.integers(1, 4)), epsilon=st.floats(1e-3, 1.0))
@settings(max_examples=6)
def test_damping_rules_of_every_method_equal_numpy(
    name: str, rule: str, seed: int, shape: tuple[int, int], epsilon: float
) -> None:
    """ρ is read off the inverse of the dense preconditioner. Where S is what is damped, its rule looks at S."""
    rng = np.random.default_rng(seed)
    rows = random_rows(rng, 30, shape)
    block, reference = BLOCKS[name](0.9), Reference(name, 0.9)
    state = fresh_state(block, shape)
    feed(block, state, rows)
    block.refresh(state, Damping(rule, epsilon))
    reference.update(rows)
    b, a = reference.factors
    if name in CORRECTED:
        s = np.outer(np.linalg.eigvalsh(b), np.linalg.eigvalsh(a))
        rho = (
            epsilon * {"trace": s.sum(), "trace_mean": s.mean(), "spectral": s.max(), "pi": 1.0, "constant": 1.0}[rule]
        )
        damped = np.kron(b, a) + rho * np.eye(s.size)
    else:
        rho_a, rho_b = numpy_damping(rule, epsilon, a, b if name != "foof" else np.ones((1, 1)))
        damped = np.kron(eye(b) if name == "foof" else b + rho_b * eye(b), a + rho_a * eye(a))
    actual = np.linalg.inv(dense_preconditioner(block, state, shape))
    assert relative(actual, damped) < 1e-9


# The exponents of m_in and m_out under `constant`, from the table of the theory; TKFAC adds √λ to both factors.
CONSTANT_DAMPING = {
    "kfac": {"A": (1.0, 0.0), "B": (0.0, -1.0)},
    "foof": {"A": (1.0, 0.0)},
    "tkfac": {"A": (0.5, -0.5), "B": (0.5, -0.5)},
    "ekfac": {"S": (1.0, -1.0)},
    "tekfac": {"S": (1.0, -1.0)},
}


@pytest.mark.parametrize("name", METHODS)
def test_constant_damping_follows_the_width(name: str) -> None:
    model = llama(64, num_attention_heads=8, num_key_value_heads=4)
    apply_mup(model, llama(16).config)
    optimizer = hf_so2.build_optimizer(f"{name}_mup", model, damping=0.01, damping_rule="constant")
    ones = torch.ones(3, 3)
    for layer in optimizer.curvature.layers.values():  # every one of them is hidden: both dimensions grow fourfold
        rho_a, rho_b = layer.damping(ones, ones)
        actual = {"A": rho_a, "B": rho_b, "S": layer.damping.single(ones)}
        for key, (power_in, power_out) in CONSTANT_DAMPING[name].items():
            assert float(actual[key]) == pytest.approx(0.01 * 4.0 ** (power_in + power_out), rel=1e-6)


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.95, 0.999])
@pytest.mark.parametrize("name", METHODS)
def test_the_average_of_equal_observations_is_the_observation(name: str, beta: float) -> None:
    """After any number of updates, from the first on; S, which starts from a seed, after its first update at β = 0."""
    rng = np.random.default_rng(0)
    rows, gradient = random_rows(rng, 30, SHAPE), rng.normal(size=SHAPE)
    expected = Reference(name, 0.0)
    expected.update(rows)
    block = BLOCKS[name](beta)
    state = fresh_state(block, SHAPE)
    for _ in range(12):
        feed(block, state, rows)
        for key, value in expected.averages.items():
            if key in state:
                assert relative(state[key] / state["weight"], value) < 1e-12
    if name not in CORRECTED:
        block.refresh(state, Damping("trace", 1e-3))
        expected.refresh()
        actual = block.precondition(state, torch.from_numpy(gradient))
        assert relative(actual, expected.precondition(gradient, "trace", 1e-3)) < 1e-9


@pytest.mark.parametrize("name", METHODS)
def test_beta_zero_forgets_everything(name: str) -> None:
    rng = np.random.default_rng(0)
    block = BLOCKS[name](0.0)
    old, new = (random_rows(rng, 30, SHAPE) for _ in range(2))
    results = []
    for history in ([old, new, new], [new, new, new]):
        state = fresh_state(block, SHAPE)
        for rows in history:
            feed(block, state, rows)
            block.refresh(state, Damping("trace", 1e-3))
        results.append(dense_preconditioner(block, state, SHAPE))
    assert relative(*results) < 1e-9


@pytest.mark.parametrize("rule", ["trace", "trace_mean", "spectral"])
@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("name", METHODS)
def test_updates_scale_as_the_formulas_say(name: str, scale: float, rule: str) -> None:
    """`δ → cδ` makes A stay and B, τ, S c² times as large, so that `P(cG)` is `P(G)/c`, or `c P(G)` without a B."""
    rng = np.random.default_rng(0)
    h, delta = random_rows(rng, 30, SHAPE)
    gradient = rng.normal(size=SHAPE)
    plain = preconditioned(name, (h, delta), gradient, Damping(rule, 1e-3))
    scaled = preconditioned(name, (h, delta * scale), gradient * scale, Damping(rule, 1e-3))
    assert relative(scaled, plain * scale if name == "foof" else plain / scale) < 1e-8


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("power", [-30, -24, -22, -20, -18, -15, -10, 10, 15, 18, 20, 30])
@pytest.mark.parametrize("name", [*METHODS, "square root"])
def test_the_ends_of_float32_give_a_finite_update_or_an_error(name: str, power: int, rule: str) -> None:
    """Few rows, little damping: a failed refresh must say so, and must leave the last preconditioner untouched."""
    rng = np.random.default_rng(0)
    block = KFAC(0.5, 0.5, 0.5) if name == "square root" else BLOCKS[name](0.5)
    state = fresh_state(block, SHAPE, torch.float32)
    gradient = torch.from_numpy(rng.normal(size=SHAPE)).float() * 10.0**power
    for _ in range(3):
        h, delta = random_rows(rng, 3, SHAPE)
        feed(block, state, (h, delta * 10.0**power))
        before = {key: value.clone() for key, value in state.items()}
        try:
            block.refresh(state, Damping(rule, 1e-5))
        except DecompositionError:
            assert all(torch.equal(state[key].nan_to_num(), before[key].nan_to_num()) for key in state)
            continue
        assert torch.isfinite(block.precondition(state, gradient)).all()


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_refresh_that_fails_leaves_the_state_as_it_was(name: str, bad: float) -> None:
    block = BLOCKS[name](0.5)
    state = fresh_state(block, SHAPE)
    feed(block, state, random_rows(np.random.default_rng(0), 30, SHAPE))
    block.refresh(state, Damping("trace", 1e-3))
    for key in ("A", "B"):
        if key not in state:
            continue
        broken = {other: value.clone() for other, value in state.items()}
        broken[key][0, 0] = bad
        before = {other: value.clone() for other, value in broken.items()}
        for rule in RULES:
            with pytest.raises(DecompositionError):
                block.refresh(broken, Damping(rule, 1e-3))
            assert all(torch.equal(broken[k].nan_to_num(), before[k].nan_to_num()) for k in broken)


@pytest.mark.parametrize("name", METHODS)
def test_what_a_refresh_writes_is_what_it_says_it_writes(name: str) -> None:
    """A rank that did not refresh gets exactly these from the one that did."""
    rng = np.random.default_rng(0)
    block = BLOCKS[name](0.5)
    state = fresh_state(block, SHAPE)
    for _ in range(2):
        feed(block, state, random_rows(rng, 30, SHAPE))
        before = {key: value.clone() for key, value in state.items()}
        block.refresh(state, Damping("trace", 1e-3))
        changed = {key for key in state if not torch.equal(state[key], before[key])}
        assert changed == set(block.refreshed)


@pytest.mark.parametrize("name", METHODS)
def test_a_layer_that_saw_no_row_is_left_to_the_fallback_until_it_does(name: str) -> None:
    class Experts(torch.nn.Module):
        """The second expert is idle unless it is called by name."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = (torch.nn.Linear(5, 4, bias=False) for _ in range(2))

        def forward(self, inputs: Any, *, both: bool) -> Any:
            rest = self.second(inputs if both else inputs[:0]).sum()
            return self.first(inputs).square().sum() + rest

    torch.manual_seed(0)
    model, inputs = Experts().double(), torch.randn(20, 5, dtype=torch.float64)
    optimizer = hf_so2.build_optimizer(name, model)
    for step, both in enumerate((False, True, False, True)):
        (model(inputs, both=both) / 20).backward()
        before = {key: value.clone() for key, value in optimizer.curvature.layers["second.weight"].state.items()}
        optimizer.step()
        optimizer.zero_grad()
        layer = optimizer.curvature.layers["second.weight"]
        assert (layer.refreshes > 0) == (step > 0)
        assert all(torch.isfinite(p).all() for p in model.parameters())
        if not both:
            assert all(torch.equal(layer.state[key], before[key]) for key in ("weight", "A"))
