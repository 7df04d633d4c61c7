"""Ways to damage a file, or to swap one for another, with seeds."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

KINDS = ("flipped", "truncated", "emptied", "missing", "swapped", "foreign", "garbled", "padded")


def damage(folder: Path, kind: str, chance: random.Random, other: Path) -> str:
    """Do harm to one file of a checkpoint; its name.

    Args:
        folder: the checkpoint.
        kind: one of `KINDS`.
        chance: decides where.
        other: an undamaged checkpoint of another run, to take files from.
    """
    path = chance.choice(sorted(path for path in folder.iterdir() if path.is_file() and path.stat().st_size > 1))
    size = path.stat().st_size
    if kind == "flipped":
        content = bytearray(path.read_bytes())
        content[chance.randrange(size)] ^= 1 << chance.randrange(8)
        path.write_bytes(content)
    elif kind == "truncated":
        os.truncate(path, chance.randrange(1, size))
    elif kind == "emptied":
        os.truncate(path, 0)
    elif kind == "missing":
        path.unlink()
    elif kind == "swapped":  # the file of that name of another run
        path = folder / chance.choice(sorted(p.name for p in other.iterdir() if differs(p, folder / p.name)))
        shutil.copy(other / path.name, path)
    elif kind == "foreign":  # a file that loading would take for its own
        path = folder / chance.choice(["curvature-0-of-3.pt", "optimizer-0-of-1.pt", "pytorch_model.bin", "scaler.pt"])
        shutil.copy(other / "optimizer.pt", path)
    elif kind == "garbled":  # as long as it was
        path.write_bytes(chance.randbytes(size))
    else:
        with path.open("ab") as file:
            file.write(chance.randbytes(chance.randrange(1, 100)))
    return path.name


def differs(first: Path, second: Path) -> bool:
    return not second.is_file() or first.read_bytes() != second.read_bytes()
