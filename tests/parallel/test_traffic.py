"""Bytes that collectives are given, memory and refreshes of every rank, against formulas; on ranks that are made up.

torch's own fake process group stands for the other ranks: collectives return at once and leave tensors as they are.
Formulas are written out here for a weight of shape (m, n), with t(n) = n(n+1)/2 for a triangle.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from shared.helpers import llama
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.flop_counter import FlopCounterMode

import hf_so2
from hf_so2.benchmark.scaling import Llama, load
from hf_so2.curvature import GradientBlock
from hf_so2.weights import costs
from hf_so2.weights.layer import Layer

SHAPES = [(12, 10), (12, 12), (8, 12), (8, 8), (6, 8), (10, 6), (10, 10), (7, 10)]
STEPS = 10


def t(n: int) -> int:
    return n * (n + 1) // 2


# Numbers per layer: sums over ranks, results of a refresh, state, and what of that every rank keeps.
FORMULAS: dict[str, dict[str, Callable[[int, int], int]]] = {
    "kfac": {
        "sums": lambda m, n: t(m) + t(n),
        "results": lambda m, n: t(m) + t(n),
        "state": lambda m, n: 2 * (m * m + n * n) + 1,
        "everywhere": lambda m, n: 0,
    },
    "foof": {
        "sums": lambda m, n: t(n),
        "results": lambda m, n: t(n),
        "state": lambda m, n: 2 * n * n + 1,
        "everywhere": lambda m, n: 0,
    },
    "ekfac": {
        "sums": lambda m, n: t(m) + t(n) + m * n,
        "results": lambda m, n: m * m + n * n + m + n + m * n + 1,
        "state": lambda m, n: 2 * (m * m + n * n) + m + n + m * n + 2,
        "everywhere": lambda m, n: m * m + n * n,
    },
    "shampoo": {
        "sums": lambda m, n: 0,
        "results": lambda m, n: t(m) + t(n),
        "state": lambda m, n: 2 * (m * m + n * n) + 1,
        "everywhere": lambda m, n: 0,
    },
    # Its momentum among them, which turns with the bases.
    "soap": {
        "sums": lambda m, n: 0,
        "results": lambda m, n: m * m + n * n + m + n + 2 * m * n + 1,
        "state": lambda m, n: 2 * (m * m + n * n) + m + n + 2 * m * n + 3,
        "everywhere": lambda m, n: 0,
    },
    "muon": {
        "sums": lambda m, n: 0,
        "results": lambda m, n: 0,
        "state": lambda m, n: 1,
        "everywhere": lambda m, n: 0,
    },
}


def chain() -> nn.Module:
    torch.manual_seed(0)
    # Linear(n, m) has a weight of shape (m, n); what a layer puts out has to fit the next one's input.
    return nn.ModuleList([nn.Linear(n, m, bias=False) for m, n in SHAPES])


def backward(model: nn.Module) -> None:
    for layer in model:
        layer(torch.randn(16, layer.in_features)).square().mean().backward()


@contextmanager
def pretending(rank: int, ranks: int) -> Iterator[Counter[str]]:
    """Be one of several ranks that do not exist; counts what collectives are given, in bytes by kind and dtype."""
    sent: Counter[str] = Counter()

    def counted(name: str, inner: Callable[..., Any]) -> Callable[..., Any]:
        def collective(tensor: Tensor, **options: Any) -> Any:
            sent[f"{name} {tensor.dtype}"] += tensor.nbytes
            return inner(tensor, **options)

        return collective

    dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
    try:
        names = ("all_reduce", "reduce", "broadcast")
        with mock.patch.multiple(dist, **{name: counted(name, getattr(dist, name)) for name in names}):
            yield sent
    finally:
        dist.destroy_process_group()


def state_bytes(layer: Layer) -> int:
    return sum(tensor.nbytes for tensor in layer.state.values() if not tensor.is_meta)


def trained(name: str, fraction: float) -> hf_so2.SecondOrderOptimizer:
    intervals = {} if name == "muon" else {"factor_update_steps": 1, "preconditioner_update_steps": 10}
    settings = {"norm_control": "none", "gradient_worker_fraction": fraction, **intervals}
    optimizer = hf_so2.build_optimizer(name, model := chain(), **settings)
    for _ in range(STEPS):
        optimizer.zero_grad()
        backward(model)
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("fraction", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("name", FORMULAS)
def test_bytes_of_collectives_and_of_state(name: str, fraction: float) -> None:
    ranks = 4
    workers = {1.0: 4, 0.5: 2, 0.0: 1}[fraction]
    formula = {key: lambda shape, f=f: f(*shape) for key, f in FORMULAS[name].items()}
    for rank in range(ranks):
        with pretending(rank, ranks) as sent:
            layers = list(trained(name, fraction).curvature.layers.values())
        # All layers at steps 1, 2, 4 and 7, and each at steps of its own, which may be one of these.
        assert {layer.refreshes for layer in layers} <= {4, 5, 6}
        assert {layer.updates for layer in layers} == {STEPS}
        held = [layer for layer in layers if layer.held]
        assert [layer.shape for layer in layers] == SHAPES

        expected: Counter[str] = Counter()
        sums, results, everywhere = (formula[key] for key in ("sums", "results", "everywhere"))
        if workers < ranks:
            # Every rank's sums go to those that hold the layer, along the rows; updates come back the same way.
            expected["reduce torch.float32"] = 4 * sum(layer.updates * sums(layer.shape) for layer in layers)
            moved = STEPS - 1 if name == "soap" else STEPS  # its first step only builds the basis
            expected["broadcast torch.float32"] = 4 * moved * sum(m * n for m, n in SHAPES)
            expected["broadcast torch.float32"] += 4 * sum(
                layer.refreshes * everywhere(layer.shape) for layer in layers
            )
        if workers > 1:
            # Down the column, among those that hold it.
            expected["all_reduce torch.float32"] = 4 * sum(layer.updates * sums(layer.shape) for layer in held)
            spared = everywhere if workers < ranks else lambda shape: 0
            down = sum(layer.refreshes * (results(layer.shape) - spared(layer.shape)) for layer in held)
            expected["broadcast torch.float32"] += 4 * down
        tokens = name in ("kfac", "foof", "ekfac")
        flags = 1 if workers < ranks else 0
        expected["all_reduce torch.int64"] = 8 * sum(layer.updates for layer in layers) * (2 * tokens + flags)
        expected["all_reduce torch.int64"] += 8 * sum(layer.refreshes for layer in layers)
        assert +sent == +expected

        for layer in layers:
            kept = formula["state" if layer.held else "everywhere"](layer.shape)
            assert state_bytes(layer) == 4 * kept, layer.name
            # The cost model of docs/scaling.md counts the same.
            assert costs.state_numbers(layer.block, layer.shape) == formula["state"](layer.shape)
            assert costs.observed_numbers(layer.block, layer.shape) == everywhere(layer.shape)
            assert costs.statistics_sent(layer.block, layer.shape) == sums(layer.shape)
            assert costs.preconditioner_sent(layer.block, layer.shape) == results(layer.shape)


def test_one_process_sends_nothing() -> None:
    with mock.patch.multiple(dist, all_reduce=mock.DEFAULT, broadcast=mock.DEFAULT, reduce=mock.DEFAULT) as collectives:
        trained("ekfac", 0.0)
    assert not any(collective.called for collective in collectives.values())


@pytest.mark.parametrize("name", ["kfac", "shampoo"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_refreshes_and_state_fall_with_the_number_of_ranks(name: str, ranks: int) -> None:
    """Within the largest layer's share of an even split, at the far end of the knob."""
    shares: list[tuple[float, int]] = []
    alone = sum(m**3 + n**3 for m, n in SHAPES)
    for rank in range(ranks):
        with pretending(rank, ranks):
            layers = trained(name, 0.0).curvature.layers.values()
        refreshed = sum(m**3 + n**3 for layer in layers if layer.owned for m, n in [layer.shape])
        shares.append((refreshed, sum(state_bytes(layer) for layer in layers)))
    assert sum(work for work, _ in shares) == alone
    assert sum(kept for _, kept in shares) == 4 * sum(FORMULAS[name]["state"](*shape) for shape in SHAPES)
    for index, whole in enumerate((alone, sum(kept for _, kept in shares))):
        assert max(share[index] for share in shares) <= 1.35 * whole / ranks


def test_a_process_group_may_start_after_the_optimizer_and_must_not_change_then() -> None:
    optimizer = hf_so2.build_optimizer("kfac", model := chain(), gradient_worker_fraction=0.0)
    backward(model)
    with pretending(1, 2):
        optimizer.step()
        held = [layer.held for layer in optimizer.curvature.layers.values()]
        assert any(held)
        assert not all(held)
    backward(model)
    with pretending(0, 4), pytest.raises(hf_so2.ConfigurationError, match="2 ranks, which have become 4"):
        optimizer.step()


@pytest.mark.parametrize("name", ["kfac", "foof", "ekfac", "shampoo", "soap", "kl_shampoo", "muon"])
@pytest.mark.parametrize("settings", [{}, {"block_size": 5}, {"max_preconditioner_dim": 10}])
def test_flops_of_preconditioning_are_those_that_torch_counts(name: str, settings: dict[str, Any]) -> None:
    if name in ("kfac", "foof", "ekfac", "muon") and settings:
        settings = {}
    for layer in hf_so2.build_optimizer(name, chain(), **settings).curvature.layers.values():
        state = {key: torch.ones_like(value) for key, value in layer.blank_state().items()}
        with FlopCounterMode(display=False) as counter:
            layer.block.precondition(state, torch.ones(layer.shape))
        assert layer.block.precondition_flops(layer.shape) == counter.get_total_flops()


@pytest.mark.parametrize(
    ("name", "settings"),
    [(name, {}) for name in ("kfac", "foof", "ekfac", "tekfac", "shampoo", "soap", "kl_shampoo", "muon")]
    + [("shampoo", {"block_size": 5})]
    + [(name, {"max_preconditioner_dim": 10}) for name in ("soap", "kl_shampoo")],
)
def test_flops_of_statistics_are_those_that_torch_counts(name: str, settings: dict[str, Any]) -> None:
    tokens = 11
    for layer in hf_so2.build_optimizer(name, chain(), **settings).curvature.layers.values():
        fan_out, fan_in = layer.shape
        with FlopCounterMode(display=False) as counter:
            if isinstance(layer.block, GradientBlock):
                layer.block.observe_gradient(layer.state, torch.ones(layer.shape))
            else:
                layer.block.observe(layer.state, torch.ones(tokens, fan_in), torch.ones(tokens, fan_out))
        assert layer.block.statistics_flops(layer.shape, tokens) == counter.get_total_flops()


def test_flops_of_a_refresh_go_by_what_is_decomposed() -> None:
    """Sides that are left alone cost nothing, and blocks less than the whole: counted in full, FOOF of a GPT-2 had one
    of two ranks do nearly all.
    """

    def flops(name: str, shape: tuple[int, int], **settings: Any) -> float:
        model = nn.Sequential(nn.Linear(shape[1], shape[0], bias=False))
        (layer,) = hf_so2.build_optimizer(name, model, **settings).curvature.layers.values()
        return layer.block.refresh_flops(layer.shape)

    m, n = 9, 7
    assert flops("kfac", (m, n)) == m**3 + n**3
    assert flops("kfac", (m, n), exponent_a=0.5) == m**3 + 11 * n**3
    assert flops("foof", (m, n)) == n**3
    assert flops("ekfac", (m, n)) == 11 * (m**3 + n**3) + 2 * m * n * (m + n)
    assert flops("shampoo", (m, n)) == 11 * (m**3 + n**3)
    assert flops("shampoo", (m, n), max_preconditioner_dim=8) == 11 * n**3
    assert flops("shampoo", (m, n), block_size=5) == 11 * (2 * (5**3 + 4**3) + 2 * (4**3 + 3**3))
    power_step = 0.1 * 9 + 0.9 * (2 + 8 / 3) + 2
    # The momentum and the second moment turn with the bases.
    assert flops("soap", (m, n)) == pytest.approx(power_step * (m**3 + n**3) + 4 * m * n * (m + n))
    assert flops("muon", (m, n)) == 0


@pytest.mark.parametrize(("name", "fraction"), [("kfac", 1.0), ("kfac", 0.0), ("ekfac", 0.0), ("soap", 0.0)])
def test_the_cost_model_is_right_about_a_model_that_runs_here(name: str, fraction: float) -> None:
    """The steps between two refreshes, once refreshes are regular, on each of four ranks."""
    config = llama(32, num_hidden_layers=1).config
    model = Llama("tiny", 32, config.num_hidden_layers, config.intermediate_size, 16)
    expected = load(name, model, 4, fraction)
    kept, refreshed, given = [], [], []
    for rank in range(4):
        with pretending(rank, 4) as sent:
            net = llama(32, num_hidden_layers=1)
            optimizer = hf_so2.build_optimizer(name, net, norm_control="none", gradient_worker_fraction=fraction)
            every = optimizer.settings.preconditioner_update_steps
            for step in range(4 * every):
                if step == 3 * every:
                    sent.clear()
                net(input_ids=torch.arange(8).view(1, 8), labels=torch.arange(8).view(1, 8)).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        layers = optimizer.curvature.layers.values()
        kept.append(sum(state_bytes(layer) for layer in layers))
        refreshed.append(sum(x.block.refresh_flops(x.shape) for x in layers if x.owned))
        given.append(sum(size for kind, size in sent.items() if kind.endswith("float32")))
    assert max(kept) == expected.state_bytes
    assert max(refreshed) / every == pytest.approx(expected.refresh_flops)
    assert max(given) / every == pytest.approx(expected.sent_bytes)
