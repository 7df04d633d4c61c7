"""The oldest versions that the tests were run with, checked before anything else is imported."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping

from packaging.version import Version

# As in setup.cfg. transformers: the first whose configurations are dataclasses that can be built on the meta device.
OLDEST = {"accelerate": "1.10", "datasets": "4.0", "torch": "2.13", "transformers": "5.5.4"}


def require_versions(oldest: Mapping[str, str] = OLDEST) -> None:
    """Checks what is installed.

    Raises:
        ImportError: a package is missing or too old; the message is one line.
    """
    for name, version in oldest.items():
        try:
            installed = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            raise ImportError(f"{name}=None: is not installed; hf_so2 needs {version} or newer") from None
        if Version(installed) < Version(version):
            raise ImportError(f"{name}={installed}: is too old; hf_so2 needs {version} or newer")
