"""Every file of examples/ runs as it is, in a folder of its own, and its loss falls."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_the_example_trains(name: str, tmp_path: Path) -> None:
    for package in ("trl", "peft"):
        if re.search(rf"^import {package}$", (EXAMPLES / name).read_text("utf-8"), re.MULTILINE):
            pytest.importorskip(package, reason=f"needs {package}")
    environment = os.environ | {"CI": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(EXAMPLES / name)]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    losses = [float(text) for text in re.findall(r"\bloss'?:? '?(\d+\.\d+)", done.stdout)]
    assert losses[-1] < 0.9 * losses[0], done.stdout


@pytest.mark.slow
def test_the_notebook_runs_and_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its cells in order, as a kernel runs them; every figure that a cell ends with has curves."""
    monkeypatch.chdir(tmp_path)
    notebook = json.loads((EXAMPLES / "compare.ipynb").read_text("utf-8"))
    known: dict[str, Any] = {}
    figures = 0
    for cell in notebook["cells"]:
        if cell["cell_type"] != "code":
            continue
        assert cell["outputs"] == [], "outputs are not kept in the repository"
        exec("".join(cell["source"]), known)
        if cell["source"][-1] == "figure":
            figures += 1
            assert all(axes.lines for axes in known["figure"].axes)
            known["figure"].savefig(tmp_path / f"{figures}.png")
    assert figures == 2
    for name, values in known["curves"].items():
        assert values[-1] < 0.8 * values[0], name
