"""Ways to damage a file, or to swap one for another, with seeds."""

from __future__ import annotations

import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

KINDS = ("flipped", "truncated", "emptied", "missing", "swapped", "foreign", "garbled", "padded")
OF_SEVERAL_RANKS = (*KINDS, "exchanged")


def any_file(path: Path) -> bool:
    return True


def is_of_a_rank(path: Path) -> bool:
    return re.search(r"-\d-of-\d|rng_state_\d|__\d_\d", path.name) is not None


def damage(
    folder: Path, kind: str, chance: random.Random, other: Path, among: Callable[[Path], bool] = any_file
) -> str:
    """Do harm to one file of a checkpoint; its name.

    Args:
        folder: the checkpoint.
        kind: one of `KINDS`, or of `OF_SEVERAL_RANKS` where the checkpoint is.
        chance: decides where.
        other: an undamaged checkpoint of another run, to take files from.
        among: which files.
    """
    path = chance.choice([path for path in contents(folder) if among(path) and path.stat().st_size > 1])
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
        taken = [p for p in contents(other) if among(p) and differs(p, folder / p.relative_to(other))]
        source = chance.choice(taken)
        path = folder / source.relative_to(other)
        shutil.copy(source, path)
    elif kind == "exchanged":  # each of two ranks has what is the other's
        pairs = [(path, path.with_name(twin(path.name))) for path in contents(folder)]
        path, second = chance.choice([(first, second) for first, second in pairs if differs(first, second)])
        content = path.read_bytes()
        path.write_bytes(second.read_bytes())
        second.write_bytes(content)
    elif kind == "foreign":  # a file that loading would take for its own
        path = folder / chance.choice(["curvature-0-of-3.pt", "optimizer-0-of-1.pt", "pytorch_model.bin", "scaler.pt"])
        shutil.copy(min(other.glob("optimizer*")), path)
    elif kind == "garbled":  # as long as it was
        path.write_bytes(chance.randbytes(size))
    else:
        with path.open("ab") as file:
            file.write(chance.randbytes(chance.randrange(1, 100)))
    return path.relative_to(folder).as_posix()


def twin(name: str) -> str:
    """The second rank's file to that of the first."""
    return re.sub(r"(curvature-|optimizer-|rng_state_|__)0(?=-of-|\.pth|_)", r"\g<1>1", name)


def contents(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def differs(first: Path, second: Path) -> bool:
    return not second.is_file() or first.read_bytes() != second.read_bytes()
