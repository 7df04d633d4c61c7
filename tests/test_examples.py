"""Every file of examples/ runs as it is, in a folder of its own, and its loss falls."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

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
