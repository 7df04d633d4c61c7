"""Folders that the user names, looked at before hours of work end in one that cannot be written to."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from hf_so2.errors import ConfigurationError


def require_folder(field: str, value: str | os.PathLike[str]) -> None:
    """Refuses a folder that can neither be written to nor made; it makes none.

    Args:
        field: the flag that names it.
        value: its path.

    Raises:
        ConfigurationError: the path is that of a file or leads through one, or nothing can be written there.
    """
    path = Path(value).expanduser().absolute()
    existing = next(folder for folder in (path, *path.parents) if os.path.lexists(folder))
    if not existing.is_dir():
        raise ConfigurationError(field, str(value), f"must be a folder, and {existing} is none")
    try:
        # Permissions alone do not tell: root passes, and a read-only or special file system refuses all the same.
        with tempfile.TemporaryDirectory(dir=existing):
            pass
    except OSError as error:
        raise ConfigurationError(field, str(value), f"cannot be written to: {error.strerror}") from None


def new_folders(path: Path) -> list[Path]:
    """The folder and those above it that are not there yet, the innermost first."""
    return [folder for folder in (path, *path.parents) if not folder.exists()]


def remove_empty(folders: list[Path]) -> None:
    """Remove what was made of :func:`new_folders` and has stayed empty."""
    for folder in folders:
        if not folder.is_dir() or any(folder.iterdir()):
            return
        folder.rmdir()
