"""The coordinate check: level in every layer in muP, far from level in the standard parametrization."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from hf_so2 import ConfigurationError, cli
from hf_so2.mup.coord_check import CoordinateCheck
from hf_so2.transfer.coordinates import coordinate_check

ROOT = Path(__file__).parent.parent.parent
WIDTHS, SEEDS, STEPS = (32, 64, 128, 256), 3, (1, 8)
LLAMA = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
HIDDEN = {
    *(f"model.layers.*.self_attn.{name}_proj" for name in "qkvo"),
    *(f"model.layers.*.mlp.{name}_proj" for name in ("gate", "up", "down")),
}


def checked(optim: str) -> CoordinateCheck:
    return coordinate_check(
        LlamaConfig(**LLAMA), optim, WIDTHS, seeds=SEEDS, steps=STEPS, batch_size=8, sequence_length=32
    )


@pytest.mark.parametrize("optim", ["kfac_mup", "adamw_mup"])
def test_mup_changes_every_layer_alike_at_every_width(optim: str) -> None:
    check = checked(optim)
    assert {layer for layer, role in check.layers().items() if role == "hidden"} == HIDDEN
    slopes = {layer: check.slope("hidden", "activation", layer=layer) for layer in HIDDEN}
    slopes["lm_head"] = check.slope("output", "update")
    assert all(abs(slope) <= 0.1 for slope in slopes.values()), slopes
    assert check.passed


def test_adamw_in_the_standard_parametrization_grows_with_the_width() -> None:
    check = checked("adamw")
    slopes = {layer: check.slope("hidden", "activation", layer=layer) for layer in HIDDEN}
    assert all(slope > 0.4 for slope in slopes.values()), slopes
    assert check.slope("hidden", "activation") > 0.4
    assert not check.passed


@pytest.mark.parametrize(
    "settings", [{"fisher": "mc"}, {"adaptive_damping": True, "norm_control": "kl_clip"}], ids=["sampled", "adaptive"]
)
def test_optimizers_that_have_to_be_told_of_every_batch_are(settings: dict[str, Any]) -> None:
    sizes: dict[str, Any] = {"seeds": 1, "steps": (2,), "batch_size": 2, "sequence_length": 8}
    check = coordinate_check(LlamaConfig(**LLAMA), "kfac_mup", (32, 64), **sizes, **settings)
    assert {m.width for m in check.measurements if m.activation > 0} == {32, 64}


def run_script(monkeypatch: pytest.MonkeyPatch, *flags: str) -> int:
    specification = importlib.util.spec_from_file_location("coord_check_script", ROOT / "scripts" / "coord_check.py")
    assert specification is not None
    assert specification.loader is not None
    script = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, "coord_check_script", script)
    specification.loader.exec_module(script)
    monkeypatch.setattr(sys, "argv", ["coord_check.py", *flags])
    return cli.main(script.main)


def flags(output_dir: Path, optim: str, *widths: str) -> list[str]:
    fields = ",".join(f"{name}={value}" for name, value in LLAMA.items() if name != "vocab_size")
    model = [f"--config_overrides={fields}", "--model_type=llama", "--vocab_size=300", "--use_cpu"]
    size = ["--seeds=2", "--steps", "1", "8", "--batch_size=8", "--sequence_length=32", "--widths", *widths]
    return [f"--output_dir={output_dir}", f"--optim={optim}", *model, *size]


@pytest.mark.parametrize(("optim", "code"), [("adamw_mup", 0), ("adamw", 1)])
def test_script_leaves_its_measurements_and_tells_the_verdict(
    optim: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_script(monkeypatch, *flags(tmp_path, optim, "32", "64", "128")) == code
    report = json.loads((tmp_path / "coord_check.json").read_text(encoding="utf-8"))
    assert report["passed"] is (code == 0)
    assert report["widths"] == [32, 64, 128]
    assert report["steps"] == [1, 8]
    assert {m["width"] for m in report["measurements"]} == {32, 64, 128}
    assert (abs(report["slopes"]["hidden"]["activation"]["8"]) <= report["tolerance"]) is (code == 0)
    assert (tmp_path / "coord_check.png").read_bytes().startswith(b"\x89PNG")
    assert ("passed" if code == 0 else "failed") in capsys.readouterr().out.splitlines()[-1]


def test_script_refuses_an_impossible_width_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output_dir = tmp_path / "out"
    assert run_script(monkeypatch, *flags(output_dir, "adamw_mup", "32", "50")) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "width=50" in lines[0]
    assert not output_dir.exists()


@pytest.mark.parametrize(
    ("widths", "changes"), [((32,), {}), ((32, 32), {}), ((32, 64), {"seeds": 0}), ((32, 64), {"steps": [0]})]
)
def test_what_cannot_be_fitted_is_refused(widths: tuple[int, ...], changes: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError):
        coordinate_check(LlamaConfig(**LLAMA), "adamw_mup", widths, **changes)
