"""A checkpoint's curvature, and how to tell a complete checkpoint from a torn one.

The Trainer writes the files of a checkpoint one after the other into the folder that they stay in, the state of the run
last. A process that dies on the way leaves a folder that looks like a checkpoint. Here a manifest with the sizes of all
other files comes just before that last one; a checkpoint is complete when its state can be read and its manifest holds.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_so2.distributed import assign, world
from hf_so2.errors import ConfigurationError

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
STATE = "trainer_state.json"
CURVATURE_FILES = "curvature-*-of-*.pt"
OPTIMIZER_FILES = "optimizer-*-of-*.pt"  # of sharded parameters


def to_resume(wanted: str | os.PathLike[str] | bool | None, output_dir: str | os.PathLike[str]) -> str | None:
    """The folder that `resume_from_checkpoint` means, known to be complete.

    Args:
        wanted: a checkpoint's folder; True, "true" or "last" for the newest complete one in `output_dir`, where torn
            ones are passed over with one warning; None or False for none.
        output_dir: where the run saves.

    Raises:
        ConfigurationError: the folder is no checkpoint or a torn one, or there is no complete one.
    """
    if wanted is None or wanted is False:
        return None
    if str(wanted).lower() in ("true", "last"):
        return _newest_complete(str(wanted), Path(output_dir))
    folder = Path(str(wanted))
    if not folder.is_dir():
        raise ConfigurationError("resume_from_checkpoint", str(wanted), "must be the folder of a checkpoint, or `last`")
    fault = fault_of(folder)
    if fault is not None:
        raise ConfigurationError(
            "resume_from_checkpoint", str(wanted), f"is not a complete checkpoint: {fault}; `last` finds one that is"
        )
    return str(wanted)


def _newest_complete(wanted: str, output_dir: Path) -> str:
    found = [
        path for path in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.is_dir() and _step(path).isdecimal()
    ]
    torn: list[str] = []
    for folder in sorted(found, key=lambda path: int(_step(path)), reverse=True):
        fault = fault_of(folder)
        if fault is None:
            if torn and world()[0] == 0:
                logger.warning("torn checkpoints are passed over (%s): resuming from %s", "; ".join(torn), folder)
            return str(folder)
        torn.append(f"{folder.name}: {fault}")
    of_those = f" ({'; '.join(torn)})" if torn else ""
    raise ConfigurationError(
        "resume_from_checkpoint", wanted, f"finds no complete checkpoint in {output_dir}{of_those}"
    )


def _step(checkpoint: Path) -> str:
    return checkpoint.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")


def fault_of(folder: Path) -> str | None:
    """What a crash, or somebody, has left undone in a checkpoint; None for a complete one.

    A checkpoint without a manifest (of transformers' own Trainer, or `save_only_model`) is judged by its last file
    alone.
    """
    if not (folder / STATE).is_file():
        return f"{STATE} is missing"
    if _read_json(folder / STATE) is None:
        return f"{STATE} is cut short"
    if not (folder / MANIFEST).is_file():
        return f"{MANIFEST} is missing" if any(folder.glob(CURVATURE_FILES)) else None
    manifest = _read_json(folder / MANIFEST)
    if manifest is None:
        return f"{MANIFEST} is cut short"
    for name, size in manifest["bytes"].items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} of {size} bytes"
    return None


def _read_json(path: Path) -> Any:
    """None where it is cut short: neither file holds `null`."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None


def clear(folder: Path) -> None:
    """Make room for a checkpoint, so that none is ever made of the files of two saves."""
    if folder.is_dir():
        shutil.rmtree(folder)


def seal(folder: Path, ranks: int, parts: int) -> None:
    """Write the manifest, once every process has written what is its own; all is on the disk by then.

    Args:
        folder: the checkpoint, without its `trainer_state.json`.
        ranks: the number of processes that train.
        parts: the number of files that its curvature is in; 0 where it has none.

    Raises:
        ConfigurationError: files of other processes are not in this folder.
    """
    for rank in range(parts):
        if not (folder / part_file(CURVATURE_FILES, rank, parts)).is_file():
            raise ConfigurationError(
                "output_dir", str(folder), f"must be one folder for all {ranks} processes, or set save_on_each_node"
            )
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files:
        with path.open("rb+") as file:
            os.fsync(file.fileno())
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    content = json.dumps({"world_size": ranks, "bytes": sizes}, indent=2)
    _write_whole(folder / MANIFEST, lambda file: file.write(content.encode()))


def world_size_of(folder: Path) -> int | None:
    """How many processes saved a complete checkpoint; None where it has no manifest."""
    path = folder / MANIFEST
    return int(_read_json(path)["world_size"]) if path.is_file() else None


def is_sharded(folder: Path) -> bool:
    """Whether it was saved under FSDP, and so can be gone on from with FSDP alone: the Trainer's own rule."""
    return any(folder.glob("pytorch_model_fsdp*"))


def part_file(pattern: str, part: int, parts: int) -> str:
    """The name of one of several files."""
    return pattern.replace("*", "{}").format(part, parts)


def write_curvature(folder: Path, state: Mapping[str, Any], part: int, parts: int) -> None:
    """Write one of several parts of the curvature, about as large as the others.

    Args:
        folder: the checkpoint.
        state: `SecondOrderOptimizer.curvature_state_dict()`, of which every part takes other layers.
        part: which one to write.
        parts: how many there are.
    """
    layers = state["curvature"].get("layers", {})
    taken_by = assign({name: _bytes(layer["state"]) for name, layer in layers.items()}, parts)
    mine = {name: layer for name, layer in layers.items() if taken_by[name] == part}
    write_part(folder, CURVATURE_FILES, {**state, "curvature": state["curvature"] | {"layers": mine}}, part, parts)


def write_part(folder: Path, pattern: str, content: Mapping[str, Any], part: int, parts: int) -> None:
    """Write one of several files."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_whole(folder / part_file(pattern, part, parts), lambda file: torch.save(content, file))


def _bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def read_curvature(folder: Path) -> dict[str, Any] | None:
    """What `curvature_state_dict` returned, put together again; None where the folder holds no curvature."""
    read = _read_parts(folder, CURVATURE_FILES)
    for other in read[1:]:
        read[0]["curvature"]["layers"] |= other["curvature"]["layers"]
    return read[0] if read else None


def read_sharded_optimizer(folder: Path) -> dict[str, Any] | None:
    """What all shares of `hf_so2.optim.sharded_state` hold together; None where the folder has none."""
    read = _read_parts(folder, OPTIMIZER_FILES)
    for other in read[1:]:
        read[0]["state"] |= other["state"]
    return read[0] if read else None


def _read_parts(folder: Path, pattern: str) -> list[dict[str, Any]]:
    found = next(folder.glob(pattern), None)
    if found is None:
        return []
    parts = int(found.stem.rpartition("-")[2])
    paths = [folder / part_file(pattern, part, parts) for part in range(parts)]
    # Mapped, not read: every rank opens all of them, and copies what it keeps.
    return [torch.load(path, map_location="cpu", weights_only=True, mmap=True) for path in paths]


def _write_whole(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """A file of that name is there with all of its content, or not at all."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
