"""Versions that are too old are refused in one line, and setup.cfg claims the same ones."""

from __future__ import annotations

import configparser
from pathlib import Path

import pytest

from hf_so2.versions import OLDEST, require_versions


def test_setup_claims_what_is_checked() -> None:
    setup = configparser.ConfigParser()
    setup.read(Path(__file__).parents[1] / "setup.cfg")
    claims = dict(line.split(">=") for line in setup["options"]["install_requires"].split())
    assert {name: claims[name] for name in OLDEST} == OLDEST


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
