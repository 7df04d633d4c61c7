"""Statistics take turns, too: who is due when, what is computed for it, and that training follows that rule."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from shared.helpers import BOTH_ENDS, in_float64, llama, tied_llama
from shared.kfac_reference import Reference
from torch import Tensor, nn

import hf_so2
from hf_so2.layers.sums import Captured, Readers
from hf_so2.weights.schedule import EARLY_STEPS, block_of, layer_turns

COSTS = st.dictionaries(st.text("abc.0123", min_size=1, max_size=6), st.floats(0, 1e18), max_size=40)

# Of `chain()`, whose layers cost 9³ + 7³, 6³ + 9³ and 5³ + 6³: by interval of statistics and of refreshes, the turns of
# both, worked out by hand.
TURNS = {
    (1, 10): ([0, 0, 0], [0, 4, 8]),
    (5, 10): ([0, 2, 4], [0, 2, 4]),
    (10, 10): ([0, 4, 8], [0, 4, 8]),
    (3, 10): ([0, 1, 2], [0, 4, 8]),
    (4, 2): ([0, 1, 3], [0, 0, 1]),
}


def chain() -> nn.Module:
    torch.manual_seed(0)
    sizes = itertools.pairwise((7, 9, 6, 5))
    layers = [layer for i, o in sizes for layer in (nn.Linear(i, o, bias=False), nn.Tanh())]
    return nn.Sequential(*layers[:-1]).double()


def loss_of(net: nn.Module, step: int) -> Tensor:
    """Of 24 rows."""
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(24, 7, generator=generator).double()
    return nn.functional.cross_entropy(net(inputs), torch.randint(0, 5, (24,), generator=generator))


def due_steps(turn: int, every: int, last: int) -> list[int]:
    return [step for step in range(1, last + 1) if step in (1, 2, 4, 7) or (step - turn) % every == 0]


def refresh_steps(turn: int, every: int, last: int) -> set[int]:
    """As above until step 7. Then `turn + k * every`, where steps before the interval is reached lie on an exponential
    curve through that step, with the same slope there."""
    reached = every / math.log(1.5)
    marks = [turn + k * every for k in range(-20 * every, last)]
    steps = [mark if mark >= reached else math.ceil(reached * math.exp(mark / reached - 1)) for mark in marks]
    return {step for step in due_steps(turn, every, last) if step <= 7} | {step for step in steps if step > 7}


def spied(optimizer: hf_so2.SecondOrderOptimizer) -> dict[str, list[int]]:
    """By name of a weight (and its end): at which steps its tokens are captured from now on."""
    assert optimizer.curvature is not None
    steps: dict[str, list[int]] = {}
    summation = optimizer.curvature.capture.summation
    total = summation.sum

    def counting(readers: Readers, into: Captured) -> None:
        for name in readers.gradients:
            steps.setdefault(name, []).append(optimizer.steps + 1)
        total(readers, into)

    summation.sum = counting  # type: ignore[method-assign]
    return steps


@given(costs=COSTS, every=st.integers(1, 12), times=st.integers(1, 5))
def test_statistics_are_taken_at_every_refresh_and_evenly_between(
    costs: dict[str, float], every: int, times: int
) -> None:
    refresh_every = every * times
    found, refreshes = layer_turns(costs, every, refresh_every)
    assert list(found) == list(refreshes) == list(costs)
    for name, turn in found.items():
        steps = [step for step in range(1, 200) if step % every == turn]
        assert {after - before for before, after in itertools.pairwise(steps)} == {every}
        assert {step for step in range(1, 200) if step % refresh_every == refreshes[name]} <= set(steps)


@given(costs=COSTS, every=st.integers(1, 30), refresh_every=st.integers(1, 30))
def test_no_step_has_much_more_than_its_share(costs: dict[str, float], every: int, refresh_every: int) -> None:
    blocks: Counter[str] = Counter()
    for name, cost in costs.items():
        blocks[block_of(name)] += cost
    work: tuple[Counter[int], Counter[int]] = (Counter(), Counter())
    for counted, found, interval in zip(
        work, layer_turns(costs, every, refresh_every), (every, refresh_every), strict=True
    ):
        for name, turn in found.items():
            assert 0 <= turn < interval
            counted[turn] += costs[name]
    of_statistics, of_refreshes = (max(counted.values(), default=0) for counted in work)
    total, largest = sum(costs.values()), max(blocks.values(), default=0)
    assert of_statistics <= (total / every + largest) * (1 + 1e-9)
    rounds = refresh_every // every if refresh_every % every == 0 else 1
    bound = of_statistics / rounds if rounds > 1 or every == refresh_every else total / refresh_every
    assert of_refreshes <= (bound + max(costs.values(), default=0)) * (1 + 1e-9)


@given(every=st.integers(1, 7), times=st.integers(1, 4), data=st.data())
def test_layers_of_a_block_have_one_turn_of_statistics(every: int, times: int, data: st.DataObject) -> None:
    names = [f"model.layers.{i}.{part}.weight" for i in range(5) for part in ("self_attn.q_proj", "self_attn.v_proj")]
    costs = {name: data.draw(st.floats(1, 1e6)) for name in data.draw(st.permutations(names))}
    found, _ = layer_turns(costs, every, every * times)
    assert all(len({found[name] for name in pair}) == 1 for pair in zip(names[::2], names[1::2], strict=True))


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("model.layers.11.self_attn.q_proj.weight", "model.layers.11"),
        ("model.layers.2.self_attn.q_proj.lora_A.default.weight", "model.layers.2"),
        ("encoder.block.1.layer.0.SelfAttention.k.weight", "encoder.block.1.layer.0"),
        ("model.layers.0.mlp.experts.7.up_proj.weight", "model.layers.0.mlp.experts.7"),
        ("model.layers.0.mlp.experts.up_proj[7]", "model.layers.0"),
        ("attention.query.weight", "attention"),
        ("0.weight", "0"),
        ("weight", ""),
    ],
)
def test_the_block_of_a_weight(name: str, block: str) -> None:
    assert block_of(name) == block


@pytest.mark.parametrize("name", ["kfac", "shampoo"])
@pytest.mark.parametrize(("every", "refresh_every"), TURNS)
def test_layers_update_when_it_is_their_turn(name: str, every: int, refresh_every: int) -> None:
    net = chain()
    optimizer = hf_so2.build_optimizer(name, net, factor_update_steps=every, preconditioner_update_steps=refresh_every)
    assert optimizer.curvature is not None
    layers = list(optimizer.curvature.layers.values())
    captured = spied(optimizer)
    updated: list[list[int]] = [[] for _ in layers]
    for step in range(1, 33):
        before = [layer.updates for layer in layers]
        loss_of(net, step).backward()
        optimizer.step()
        optimizer.zero_grad()
        for index, layer in enumerate(layers):
            updated[index] += [step] * (layer.updates - before[index])
    expected = [due_steps(turn, every, 32) for turn in TURNS[every, refresh_every][0]]
    assert updated == expected
    if name == "kfac":
        assert [captured[layer.name] for layer in layers] == expected


@pytest.mark.parametrize(("every", "refresh_every"), TURNS)
def test_training_is_that_of_a_plain_reference(every: int, refresh_every: int) -> None:
    """Own hooks, NumPy's factors and inverses, and a schedule worked out by hand."""
    net, rate, seen = chain(), 0.1, {}
    layers = [module for module in net if isinstance(module, nn.Linear)]
    for index, module in enumerate(layers):

        def keep(_: nn.Module, args: tuple[Tensor, ...], output: Tensor, index: int = index) -> None:
            output.register_hook(lambda delta: seen.update({index: (args[0].detach().numpy(), 24 * delta.numpy())}))

        module.register_forward_hook(keep)
    optimizer = hf_so2.build_optimizer(
        "kfac", net, lr=rate, momentum=0.0, norm_control="none", damping=0.01,
        factor_update_steps=every, preconditioner_update_steps=refresh_every,
    )  # fmt: skip
    references = [Reference("kfac", beta=0.95) for _ in layers]
    for step in range(1, 25):
        loss_of(net, step).backward()
        expected = []
        for index, (module, reference) in enumerate(zip(layers, references, strict=True)):
            taken, refreshed = (turn[index] for turn in TURNS[every, refresh_every])
            if step in due_steps(taken, every, step):
                reference.update(seen[index])
            if step in refresh_steps(refreshed, refresh_every, step):
                reference.refresh()
            gradient = module.weight.grad.numpy()
            expected.append(module.weight.detach().numpy() - rate * reference.precondition(gradient, "trace", 0.01))
        optimizer.step()
        optimizer.zero_grad()
        for module, weight in zip(layers, expected, strict=True):
            np.testing.assert_allclose(module.weight.detach().numpy(), weight, rtol=1e-9, atol=1e-11)


def test_what_is_announced_off_a_layers_turn_does_not_count_at_its_turn() -> None:
    ends = []
    for always in (True, False):
        net = nn.Linear(7, 5, bias=False).double()
        with torch.no_grad():
            net.weight.fill_(0.1)
        optimizer = hf_so2.build_optimizer("kfac", net, factor_update_steps=3)
        for step in range(1, 11):
            assert optimizer.capturing == (step in EARLY_STEPS or step % 3 == 0)
            if always or optimizer.capturing:
                optimizer.announce(24, 1 / 24)
            loss_of(net, step).backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append(net.weight.detach())
    assert torch.equal(*ends)


def test_both_ends_of_a_tied_weight_have_one_turn() -> None:
    model = tied_llama()
    optimizer = hf_so2.build_optimizer("kfac", model, factor_update_steps=5, preconditioner_update_steps=5, **BOTH_ENDS)
    captured = spied(optimizer)
    tokens = torch.arange(16).view(2, 8)
    for _ in range(23):
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    ends = [steps for name, steps in captured.items() if name.startswith("model.embed_tokens.weight")]
    assert len(ends) == 2
    assert ends[0] == ends[1]
    late = {name: [step for step in steps if step > 13] for name, steps in captured.items()}
    assert {len(steps) for steps in late.values()} == {2}
    assert len({tuple(steps) for steps in late.values()}) > 1


def test_a_layer_that_is_first_used_late_is_captured_when_its_turn_comes() -> None:
    torch.manual_seed(0)
    model = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(2))
    optimizer = hf_so2.build_optimizer("kfac", model, factor_update_steps=5)
    assert optimizer.curvature is not None
    layer, steps = optimizer.curvature.layers["1.weight"], []
    for step in range(1, 44):
        before = layer.updates, layer.refreshes
        for used in model if step >= 13 else model[:1]:
            used(torch.randn(6, 4)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        steps += [(step, layer.refreshes - before[1])] if layer.updates > before[0] else []
    # Until step 24 refreshes grow apart, and come between two updates, too.
    assert steps == [(17, 1), (22, 0), (27, 0), (32, 1), (37, 0), (42, 1)]


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputed_layers_keep_their_turns(use_reentrant: bool) -> None:
    runs = []
    for checkpointed in (False, True):
        model = in_float64(llama()).train()
        if checkpointed:
            model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        optimizer = hf_so2.build_optimizer("kfac", model, factor_update_steps=3, preconditioner_update_steps=6)
        captured = spied(optimizer)
        generator = torch.Generator().manual_seed(0)
        for _ in range(13):
            tokens = torch.randint(1, 32, (8, 7), generator=generator)
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        runs.append((captured, list(model.parameters())))
    assert runs[0][0] == runs[1][0]
    for plain, other in zip(runs[0][1], runs[1][1], strict=True):
        torch.testing.assert_close(other, plain, rtol=1e-9, atol=1e-11)
