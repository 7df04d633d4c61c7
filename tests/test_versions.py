"""Versions that are too old are refused in one line, and setup.cfg, the check and the constraints claim the same."""

from __future__ import annotations

import configparser
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hf_so2.versions import OLDEST, require_versions

ROOT = Path(__file__).parents[1]


def claims() -> dict[str, str]:
    setup = configparser.ConfigParser(interpolation=None)
    setup.read(ROOT / "setup.cfg")
    return dict(line.split(">=") for line in setup["options"]["install_requires"].split())


def test_setup_claims_what_is_checked() -> None:
    assert claims() == OLDEST


@pytest.mark.skipif(not (ROOT / ".ci").is_dir(), reason="needs a clone")
def test_the_oldest_run_is_with_the_oldest_that_are_claimed() -> None:
    script = [sys.executable, str(ROOT / ".ci" / "floors"), "papers"]
    printed = subprocess.run(script, capture_output=True, text=True, check=True).stdout.split()
    assert dict(line.split("==") for line in printed) == {**claims(), "joblib": "1.3", "scikit-learn": "1.5"}


@pytest.mark.skipif(not (ROOT / ".ci").is_dir(), reason="needs a clone")
def test_the_version_is_the_same_everywhere() -> None:
    setup = configparser.ConfigParser(interpolation=None)
    setup.read(ROOT / "setup.cfg")
    version = setup["metadata"]["version"]
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text("utf-8")
    assert f"\n## {version} - " in (ROOT / "CHANGELOG.md").read_text("utf-8")
    assert set(re.findall(r"hf_so2-([\d.]+)-py3", (ROOT / "docs" / "guide.md").read_text("utf-8"))) == {version}


def test_installed_ones_pass() -> None:
    require_versions()


@pytest.mark.parametrize(
    ("oldest", "message"),
    [
        ({"torch": "99.0"}, r"^torch=\S+: is too old; hf_so2 needs 99\.0 or newer$"),
        ({"no_such_package": "1.0"}, r"^no_such_package=None: is not installed; hf_so2 needs 1\.0 or newer$"),
    ],
)
def test_old_and_missing_ones_are_refused(oldest: dict[str, str], message: str) -> None:
    with pytest.raises(ImportError, match=message):
        require_versions(oldest)


@pytest.fixture
def old_metadata(tmp_path: Path) -> dict[str, str]:
    """An environment in which datasets says that it is of version 3.9: what is found first on the path counts."""
    info = tmp_path / "datasets-3.9.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: datasets\nVersion: 3.9\n", "utf-8")
    paths = [str(tmp_path), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)}


LINE = "datasets=3.9: is too old; hf_so2 needs 4.0 or newer"


@pytest.mark.parametrize("command", [["-m", "hf_so2", "train"], ["-m", "hf_so2.commands", "config"]])
def test_a_command_refuses_them_in_one_line(command: list[str], old_metadata: dict[str, str]) -> None:
    done = subprocess.run([sys.executable, *command], env=old_metadata, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"error: {LINE}\n")


def test_the_console_script_refuses_them_in_one_line(tmp_path: Path, old_metadata: dict[str, str]) -> None:
    script = tmp_path / "hf-so2"
    script.write_text("import sys\nfrom hf_so2.commands import main\nsys.exit(main())\n", "utf-8")
    done = subprocess.run([sys.executable, script], env=old_metadata, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"error: {LINE}\n")


@pytest.mark.skipif(not (ROOT / "scripts").is_dir(), reason="needs a clone")
@pytest.mark.parametrize("script", sorted((ROOT / "scripts").glob("*.py")), ids=lambda path: path.stem)
def test_a_script_of_the_clone_refuses_them_in_one_line(script: Path, old_metadata: dict[str, str]) -> None:
    done = subprocess.run([sys.executable, script], env=old_metadata, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"error: {LINE}\n")


def test_an_import_refuses_them_with_an_import_error(old_metadata: dict[str, str]) -> None:
    command = [sys.executable, "-c", "import hf_so2"]
    done = subprocess.run(command, env=old_metadata, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"ImportError: {LINE}"
