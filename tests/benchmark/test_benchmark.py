"""What the benchmark computes from what it measures, and one tiny measurement from the command line."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from shared.helpers import llama

from hf_so2.benchmark import peers, stopwatch
from hf_so2.benchmark.contestants import BASELINE, baseline, ours, theirs
from hf_so2.benchmark.flops import FlopCounter, product_rate
from hf_so2.benchmark.memory import peak_bytes, tensor_bytes
from hf_so2.benchmark.phases import PHASES
from hf_so2.benchmark.ratios import fitted_exponent, paired_ratios
from hf_so2.benchmark.report import against_peers, peer_table, table, to_dict
from hf_so2.benchmark.rounds import Measurement
from hf_so2.benchmark.stopwatch import Stopwatch
from hf_so2.commands.benchmark import BenchmarkArguments
from hf_so2.optim import OPTIMIZERS, SecondOrderOptimizer

SCRIPT = Path(__file__).parents[2] / "scripts" / "benchmark.py"
CPU = torch.device("cpu")


@given(
    ratio=st.floats(0.1, 10),
    baseline=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=9),
)
def test_a_slow_round_leaves_the_ratio_alone(ratio: float, baseline: list[float]) -> None:
    spread = paired_ratios([ratio * seconds for seconds in baseline], baseline)
    assert (spread.lower, spread.median, spread.upper) == pytest.approx((ratio,) * 3)


def test_quartiles_of_the_ratios() -> None:
    spread = paired_ratios([1.0, 4.0, 9.0, 16.0, 25.0], [1.0, 2.0, 3.0, 4.0, 5.0])
    assert (spread.lower, spread.median, spread.upper) == (2.0, 3.0, 4.0)
    assert str(spread) == "3.00 [2.00, 4.00]"


@pytest.mark.parametrize(("own", "other"), [([], []), ([1.0], [1.0, 2.0])])
def test_pairs_must_be_pairs(own: list[float], other: list[float]) -> None:
    with pytest.raises(ValueError, match=r"pair|argument"):
        paired_ratios(own, other)


@given(exponent=st.floats(-2, 4), factor=st.floats(1e-6, 1e6))
def test_a_power_law_has_its_exponent(exponent: float, factor: float) -> None:
    assert fitted_exponent({size: factor * size**exponent for size in (128, 256, 1024)}) == pytest.approx(
        exponent, abs=1e-9
    )


def test_a_phase_that_takes_no_time_has_no_exponent() -> None:
    assert np.isnan(fitted_exponent({128: 0.0, 256: 1.0}))
    with pytest.raises(ValueError, match="two sizes"):
        fitted_exponent({128: 1.0})


def test_nested_phases_are_not_counted_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 3.0, 4.0, 7.0, 10.0, 20.0, 21.5])
    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: next(clock))
    watch = Stopwatch(CPU)
    with watch.span("outer"):
        with watch.span("inner"):
            pass
        inner = watch.around("inner", lambda value: value + 1)
        assert inner(1) == 2
    with watch.span("outer"):
        pass
    assert watch.take() == {"outer": 10.0 - 2.0 - 3.0 + 1.5, "inner": 5.0}
    assert watch.take() == {}


def test_bytes_of_nested_tensors_count_shared_storage_once() -> None:
    tensor = torch.zeros(10, 3)
    other = torch.zeros(7, dtype=torch.float64)
    tree: dict[str, Any] = {"a": [tensor, (tensor[2:], tensor.mT)], "b": {"c": 3, "d": "text"}, "e": torch.zeros(0)}
    tree["object"] = SimpleNamespace(back=tree, tensor=other)
    assert tensor_bytes(tree) == 10 * 3 * 4 + 7 * 8


def test_peak_of_allocations() -> None:
    """Two megabytes at a time, though three are allocated in all and one is left."""

    def work() -> torch.Tensor:
        first = torch.zeros(2**18)
        second = first + 1
        del first
        return second * 2

    result, peak = peak_bytes(work, CPU)
    assert result.sum() == 2 * 2**18
    assert 2 * 2**20 <= peak < 2 * 2**20 + 2**12


def test_operations_of_matrix_algebra_by_phase() -> None:
    """In closed form, on what torch counts itself and on what it does not."""
    wide, tall = torch.randn(6, 9), torch.randn(9, 6)
    square = tall.mT @ tall + torch.eye(6)
    triangle = torch.linalg.cholesky(square)

    def work(counter: Stopwatch) -> None:
        with counter.span("products"):
            wide @ tall
            with counter.span("inverse"):
                torch.cholesky_inverse(torch.linalg.cholesky_ex(square).L)
            torch.addmm(square, wide, tall)
        with counter.span("eigen"):
            torch.linalg.eigh(square)
        with counter.span("orthogonal"):
            torch.linalg.qr(torch.stack([tall, tall]))
        with counter.span("triangular"):
            torch.linalg.solve_triangular(triangle, wide, upper=False)

    assert FlopCounter().count(work) == {
        "products": 2 * 2 * 6 * 9 * 6,
        "inverse": 6**3,
        "eigen": 9 * 6**3,
        "orthogonal": 2 * 2 * (2 * 9 * 6**2 - 2 / 3 * 6**3),  # R, then as much again for Q
        "triangular": 6 * 6 * 9,
    }


def test_a_step_of_kfac_does_what_the_cost_model_says() -> None:
    """But for A of keys, values and `up`, which is summed for queries and `gate` already."""
    contestant = ours("kfac:norm_control=none", lambda: llama().train(), interval=1)
    (optimizer,) = contestant.optimizers
    assert isinstance(optimizer, SecondOrderOptimizer)
    contestant.step(torch.randint(0, 32, (2, 8)), Stopwatch(CPU))
    counted = FlopCounter().count(lambda counter: contestant.step(torch.randint(0, 32, (2, 8)), counter))
    layers = optimizer.curvature.layers.values() if optimizer.curvature else []
    shared = [layer for layer in layers if layer.name.split(".")[-2] in ("k_proj", "v_proj", "up_proj")]
    again = sum(2 * 16 * layer.shape[1] ** 2 for layer in shared)
    assert counted["capture"] == sum(x.block.statistics_flops(x.shape, 16) for x in layers) - again
    assert counted["refresh"] == pytest.approx(sum(x.block.refresh_flops(x.shape) for x in layers), rel=1e-4)
    assert counted["precondition"] == sum(x.block.precondition_flops(x.shape) for x in layers)
    assert counted["average"] == 0


def test_the_rate_of_products_is_one() -> None:
    assert 1e8 < product_rate(CPU) < 1e15


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if not name.endswith("_mup")])
def test_every_optimizer_can_be_measured(name: str) -> None:
    contestant, watch = ours(name, lambda: llama().train(), interval=3), Stopwatch(CPU)
    for _ in range(3):
        contestant.step(torch.randint(0, 32, (2, 8)), watch)
    phases = watch.take()
    assert phases.keys() <= set(PHASES)
    assert {"forward+backward", "apply"} <= phases.keys()
    if name == "kfac":
        assert phases.keys() == set(PHASES)
        assert all(seconds > 0 for seconds in phases.values())
    assert all(p.grad is None for p in contestant.model.parameters())


def test_a_variant_has_other_settings_and_a_name_of_its_own() -> None:
    contestant = ours("kfac:beta2=0.5,norm_control=none", lambda: llama().train(), interval=3)
    assert contestant.name == "kfac:beta2=0.5,norm_control=none"
    (optimizer,) = contestant.optimizers
    assert isinstance(optimizer, SecondOrderOptimizer)
    assert (optimizer.settings.beta2, optimizer.settings.norm_control) == (0.5, "none")
    assert optimizer.settings.preconditioner_update_steps == 3


def test_the_state_of_adamw_is_two_floats_per_parameter() -> None:
    contestant = baseline(lambda: llama().train())
    contestant.step(torch.randint(0, 32, (2, 8)), Stopwatch(CPU))
    scalars = sum(4 for _ in contestant.model.parameters())  # a step counter each
    weights = sum(p.numel() for p in contestant.model.parameters())
    assert contestant.state_bytes_per_parameter() == pytest.approx(8 + scalars / weights)


def test_a_peer_gets_what_ours_precondition_and_adamw_the_rest() -> None:
    muon = next(peer for peer in peers.PEERS if peer.name == "torch.Muon")
    contestant = theirs(muon, lambda: llama().train(), interval=10)
    matrices, rest = ([p for g in o.param_groups for p in g["params"]] for o in contestant.optimizers)
    assert len(matrices) == 14
    assert {id(p) for p in matrices + rest} == {id(p) for p in contestant.model.parameters()}
    assert len(matrices + rest) == len(list(contestant.model.parameters()))


def test_peers_that_are_not_installed_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "find_spec", lambda name: object() if name == "torch" else None)
    assert [peer.name for peer in peers.PEERS if peer.installed] == ["torch.Muon"]


def test_a_diverged_contestant_is_not_measured() -> None:
    contestant = baseline(lambda: llama().train())
    with torch.no_grad():
        next(contestant.model.parameters()).fill_(float("nan"))
    with pytest.raises(FloatingPointError, match=BASELINE):
        contestant.step(torch.randint(0, 32, (2, 8)), Stopwatch(CPU))


def test_the_report_compares_within_rounds() -> None:
    def measured(name: str, rounds: list[list[float]]) -> Measurement:
        return Measurement(name, 2**20, 8.0, rounds, [{"apply": sum(steps) / len(steps)} for steps in rounds])

    slow = measured("slow", [[2.0, 4.0], [20.0, 40.0]])
    measurements = [slow, measured(BASELINE, [[1.0, 2.0], [10.0, 20.0]])]
    assert to_dict(measurements, BASELINE)["slow"]["ratio"] == {"median": 2.0, "lower": 2.0, "upper": 2.0}
    rows = table(measurements, BASELINE).splitlines()
    assert rows[2].startswith(f"| {BASELINE}")
    assert "2.00 [2.00, 2.00]" in rows[3]
    assert slow.phase("apply") == 16.5
    assert slow.phase("capture") == 0.0


def test_peers_are_compared_with_their_own_method_within_rounds() -> None:
    times = {
        "soap": [[2.0], [30.0]],
        "soap:beta2=0.9": [[4.0], [40.0]],
        "kfac": [[1.0], [1.0]],
        "p.SOAP": [[4.0], [40.0]],
    }
    measurements = [Measurement(name, 1, 1.0, rounds, [{}, {}]) for name, rounds in times.items()]
    found = against_peers(measurements, {"p.SOAP": "soap", "q.SOAP": "soap"})
    assert found.keys() == {"p.SOAP"}
    assert {name: spread.median for name, spread in found["p.SOAP"].items()} == {"soap": 0.625, "soap:beta2=0.9": 1.0}
    assert peer_table(found).splitlines()[2].split() == "| soap | p.SOAP | 0.62 [0.56, 0.69] |".split()
    assert peer_table({}) == ""


@pytest.mark.parametrize(
    ("optim", "warm_up"), [(["muon"], 20), (["adamw", "sgd"], 20), (["muon", "kfac"], 25), (["kfac", "soap"], 50)]
)
def test_steps_are_timed_once_refreshes_are_regular(optim: list[str], warm_up: int) -> None:
    """They are from 10 / log 1.5 = 24.7 and 20 / log 1.5 = 49.3 on; some methods have none."""
    assert BenchmarkArguments(optim=optim, peers=["none"], device="cpu").warm_up == warm_up


def test_the_command_line(tmp_path: Path) -> None:
    size = "--num_hidden_layers 1 --num_attention_heads 2 --vocab_size 32 --tokens 16 --sequence_length 8"
    turns = "--interval 1 --steps 1 --rounds 2 --device cpu --peers torch.Muon --optim kfac"
    flags = [*size.split(), *turns.split(), "--scaling", "8", "16", "--output_dir", str(tmp_path)]
    done = subprocess.run([sys.executable, SCRIPT, *flags], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads((tmp_path / "benchmark.json").read_text("utf-8"))
    assert report["widths"].keys() == {"8", "16"}
    for figures in report["widths"].values():
        assert figures.keys() == {BASELINE, "kfac", "torch.Muon"}
        assert figures[BASELINE]["ratio"] == {"median": 1.0, "lower": 1.0, "upper": 1.0}
        assert figures["kfac"]["phase_seconds"].keys() == figures["kfac"]["phase_flops"].keys() == set(PHASES)
        assert figures["kfac"]["ratio_to_peers"] == {}  # Muon's peer, not K-FAC's
    assert report["exponents"].keys() == report["flop_exponents"].keys() == {BASELINE, "kfac", "torch.Muon"}
    assert {path.name for path in tmp_path.glob("*.png")} == {"benchmark_8.png", "benchmark_16.png", "growth.png"}
    assert done.stdout.count("| torch.Muon") == 5


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--optim kfca", "optim='kfca'"),
        ("--optim kfac_mup", "without _mup"),
        ("--optim kfac:beta2", "must be a name, or name:setting=value"),
        ("--optim kfac:beta2=2", "beta2=2: must be a number in [0, 1)"),
        ("--peers heavybal.SOAP", "those installed: torch.Muon"),
        ("--tokens 100 --sequence_length 64", "tokens=100: must be a multiple of sequence_length"),
        ("--interval 10 --steps 15", "steps=15: must be a multiple of interval"),
        ("--rounds 0", "rounds=0: must be at least 1"),
        ("--hidden_size 36", "hidden_size=36: must divide into heads of even size"),
        ("--scaling 64", "must be two sizes or more"),
        ("--device gpu", "device='gpu'"),
    ],
)
def test_a_mistake_is_one_line_and_code_2(
    flags: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *flags.split()])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
