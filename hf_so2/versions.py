"""The oldest versions that the package was run with, checked before anything else is imported."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Mapping
from pathlib import Path

from packaging.version import Version

# As in setup.cfg, which `tests/test_versions.py` compares; `.ci/versions oldest` runs with exactly these.
# transformers: the first whose configurations are dataclasses that can be built on the meta device.
OLDEST = {
    "accelerate": "1.10",
    "datasets": "4.0",
    "evaluate": "0.4.3",
    "filelock": "3.13",
    "huggingface_hub": "1.5",
    "Jinja2": "3.1",
    "matplotlib": "3.8.4",
    "numpy": "2.0",
    "optuna": "4.0",
    "packaging": "20.9",
    "PyYAML": "6.0",
    "safetensors": "0.4.3",
    "SQLAlchemy": "1.4.41",
    "tokenizers": "0.22.1",
    "torch": "2.13",
    "transformers": "5.5.4",
    "xxhash": "3.2",
}


def require_versions(oldest: Mapping[str, str] = OLDEST) -> None:
    """Checks what is installed.

    Raises:
        ImportError: a package is missing or too old; the message is one line. Where a command of ours is being
            started, that line is printed in place of a traceback, and the process ends with exit code 2.
    """
    try:
        _require(oldest)
    except ImportError as error:
        if not _is_command(sys.argv[0], sys.orig_argv):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _require(oldest: Mapping[str, str]) -> None:
    for name, version in oldest.items():
        try:
            installed = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            raise ImportError(f"{name}=None: is not installed; hf_so2 needs {version} or newer") from None
        if Version(installed) < Version(version):
            raise ImportError(f"{name}={installed}: is too old; hf_so2 needs {version} or newer")


def _is_command(program: str, command_line: list[str]) -> bool:
    """`hf-so2 …`, a clone's `scripts/….py`, or `python -m hf_so2 …`: its program is `-m` until the module is found."""
    runs_module = program == "-m" and any(word.split(".")[0] == "hf_so2" for word in command_line)
    is_script = Path(program).resolve().parent == Path(__file__).resolve().parents[1] / "scripts"
    return Path(program).stem == "hf-so2" or is_script or runs_module
