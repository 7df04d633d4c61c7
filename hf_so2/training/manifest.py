"""The manifest of a checkpoint: the names, sizes and checksums of its files.

Sizes detect what a killed process left. Checksums detect what a disk or a person has changed since. Neither is a
signature: anyone who can write to the folder can write the manifest.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xxhash

from hf_so2.files import checksum, write_whole

MANIFEST = "manifest.json"
STATE = "trainer_state.json"

CHECKSUMS = "xxh3_128"
SELF = "xxh3_128_of_this"

SYNCED_TOGETHER = 4

# The files that loading finds by name. None of these may be in the folder unless the manifest lists it.
LOADED = (
    "curvature-*",
    "optimizer*",
    "scheduler.pt",
    "rng_state*",
    "model*.safetensors*",
    "pytorch_model*",
    "adapter_*",
    "scaler.pt",
)


def write_manifest(folder: Path, ranks: int) -> None:
    """Write the manifest of all files that are in the folder by now. All of them are on the disk before it.

    Args:
        folder: the checkpoint, without its `trainer_state.json`.
        ranks: number of processes that train.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    names = [path.relative_to(folder).as_posix() for path in paths]
    with _synced(paths):
        checksums = {name: checksum(path) for name, path in zip(names, paths, strict=True)}
    sizes = {name: path.stat().st_size for name, path in zip(names, paths, strict=True)}
    _write(folder, {"world_size": ranks, "bytes": sizes, CHECKSUMS: checksums})


@contextmanager
def _synced(paths: Sequence[Path]) -> Iterator[None]:
    """A context after which the files are on the disk.

    Writing to the disk takes time, in which the processor can read the files that are still in memory. It takes less
    time if the files are written together.
    """
    with ThreadPoolExecutor(max_workers=SYNCED_TOGETHER) as pool:
        synced = pool.map(_sync, paths)
        yield
        list(synced)


def _sync(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def write_state(path: Path, write: Callable[[str], object]) -> None:
    """Write the last file of a checkpoint. Its presence shows that all other files are there.

    Its checksum is added to the manifest, if there is one, just before the file gets its name. The manifest itself is
    written earlier, when callbacks can still change the content of this file.

    Args:
        path: `trainer_state.json`.
        write: a function that writes the file to a given path.
    """
    partial = path.with_name(path.name + ".partial")
    write(str(partial))
    with _synced([partial]):
        manifest = read_json(path.with_name(MANIFEST))
        if manifest is not None:
            del manifest[SELF]
            manifest[CHECKSUMS][STATE] = checksum(partial)
            _write(path.parent, manifest)
    partial.replace(path)


def _write(folder: Path, content: dict[str, Any]) -> None:
    text = json.dumps({**content, SELF: _digest_of(content)}, indent=2)
    write_whole(folder / MANIFEST, lambda file: file.write(text.encode()))


def _digest_of(content: dict[str, Any]) -> str:
    return xxhash.xxh3_128(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None if there is no file, or it has no JSON object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, FileNotFoundError):
        return None
    return content if isinstance(content, dict) else None


def has_checksums(folder: Path) -> bool:
    """Whether the manifest has checksums. A checkpoint of an earlier version has none."""
    return CHECKSUMS in (read_json(folder / MANIFEST) or {})


def fault_of_sizes(folder: Path) -> str | None:
    """What is wrong with the manifest itself, or with names and sizes of the files that it lists; None if nothing."""
    manifest = read_json(folder / MANIFEST)
    if manifest is None:
        return f"{MANIFEST} is cut short or damaged"
    own = manifest.pop(SELF, None)
    # A manifest of an earlier version has two keys and no checksums.
    known = {"world_size", "bytes"} if own is None else {"world_size", "bytes", CHECKSUMS}
    if own is not None and STATE not in manifest.get(CHECKSUMS, {}):
        return f"{MANIFEST} is not finished or damaged"
    if manifest.keys() != known or (own is not None and own != _digest_of(manifest)) or not _is_sound(manifest):
        return f"{MANIFEST} is damaged"
    for name, size in manifest["bytes"].items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} of {size} bytes"
    unknown = [path.name for pattern in LOADED for path in folder.glob(pattern) if path.is_file()]
    unknown = sorted(name for name in unknown if name not in manifest["bytes"])
    return f"{unknown[0]} is not of this checkpoint" if unknown else None


def _is_sound(manifest: dict[str, Any]) -> bool:
    sizes, ranks = manifest["bytes"], manifest["world_size"]
    return isinstance(ranks, int) and isinstance(sizes, dict) and all(isinstance(size, int) for size in sizes.values())


def fault_of_contents(folder: Path, share: Callable[[Sequence[str]], Sequence[str]] = list) -> str | None:
    """A message for the first file whose content is not what was saved; None if all are right, or without checksums.

    Args:
        folder: the checkpoint, with correct names and sizes.
        share: a function from all names to those that this process checks.
    """
    checksums = (read_json(folder / MANIFEST) or {}).get(CHECKSUMS, {})
    for name in share(sorted(checksums)):
        if checksum(folder / name) != checksums[name]:
            return f"{name} is damaged: its checksum is another one"
    return None
