"""Files that are whole or not there at all, and what is in them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import IO

import xxhash

CHUNK = 1 << 20


def checksum(path: Path) -> str:
    """128 bits in hexadecimal."""
    digest, chunk = xxhash.xxh3_128(), memoryview(bytearray(CHUNK))  # fresh memory would take as long as the reading
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(chunk):
            digest.update(chunk[:size])
    return digest.hexdigest()


def write_whole(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """A file of that name is there with all of its content, or not at all."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
