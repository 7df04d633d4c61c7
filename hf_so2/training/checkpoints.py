"""A checkpoint's curvature, and how to tell a complete checkpoint from a torn one.

The Trainer writes the files of a checkpoint one after the other into their final folder, the state of the run last. A
process that dies in between leaves a folder that looks like a checkpoint. This module writes a manifest with sizes and
checksums just before the last file. A checkpoint is complete if its state can be read and its files match the manifest.
"""

from __future__ import annotations

import logging
import os
import pickle
import shutil
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_so2.distributed import assign, gather_objects, world
from hf_so2.errors import ConfigurationError
from hf_so2.files import write_whole
from hf_so2.training.manifest import (
    MANIFEST,
    STATE,
    fault_of_contents,
    fault_of_sizes,
    has_checksums,
    read_json,
    write_manifest,
)

logger = logging.getLogger(__name__)

CURVATURE_FILES = "curvature-*-of-*.pt"
# The errors from reading a damaged, foreign or hostile file.
DAMAGE = (
    pickle.UnpicklingError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    OSError,
    OverflowError,
    RecursionError,
    RuntimeError,
    TypeError,
    ValueError,
)
OPTIMIZER_FILES = "optimizer-*-of-*.pt"  # of sharded parameters


def to_resume(wanted: str | os.PathLike[str] | bool | None, output_dir: str | os.PathLike[str]) -> str | None:
    """The folder that `resume_from_checkpoint` means. It is checked to be complete.

    Args:
        wanted: a checkpoint's folder; True, "true" or "last" for the newest complete one in `output_dir`; None or False
            for none. Torn checkpoints are skipped with one warning.
        output_dir: the folder in which the run saves.

    Raises:
        ConfigurationError: the folder is no checkpoint or a torn one, or there is no complete one.
    """
    if wanted is None or wanted is False:
        return None
    if str(wanted).lower() in ("true", "last"):
        return _newest_complete(str(wanted), Path(output_dir))
    folder = Path(str(wanted))
    if not any(gather_objects(folder.is_dir())):
        raise ConfigurationError("resume_from_checkpoint", str(wanted), "must be the folder of a checkpoint, or `last`")
    fault = _agreed_fault(folder)
    if fault is not None:
        raise ConfigurationError(
            "resume_from_checkpoint", str(wanted), f"is not a complete checkpoint: {fault}; `last` finds one that is"
        )
    _note_on_checksums(folder)
    return str(wanted)


def _newest_complete(wanted: str, output_dir: Path) -> str:
    mine = {path.name for path in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.is_dir()}
    # The list is the same on every rank: all ranks check the folders together.
    found = [output_dir / name for name in set().union(*gather_objects(mine))]
    torn: list[str] = []
    for folder in sorted((p for p in found if _step(p).isdecimal()), key=lambda path: int(_step(path)), reverse=True):
        fault = _agreed_fault(folder)
        if fault is None:
            if torn and world()[0] == 0:
                logger.warning("torn checkpoints are passed over (%s): resuming from %s", "; ".join(torn), folder)
            _note_on_checksums(folder)
            return str(folder)
        torn.append(f"{folder.name}: {fault}")
    of_those = f" ({'; '.join(torn)})" if torn else ""
    raise ConfigurationError(
        "resume_from_checkpoint", wanted, f"finds no complete checkpoint in {output_dir}{of_those}"
    )


def _note_on_checksums(folder: Path) -> None:
    if (folder / MANIFEST).is_file() and not has_checksums(folder) and world()[0] == 0:
        logger.warning(
            "%s has no checksums, as one of an earlier version: only the sizes of its files were checked", folder
        )


def _step(checkpoint: Path) -> str:
    return checkpoint.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")


def fault_of(folder: Path) -> str | None:
    """What is wrong with a checkpoint, from a crash, a disk or a person; None for a complete one. Reads every file.

    A checkpoint without a manifest (of transformers' own Trainer, or `save_only_model`) is judged by its last file
    alone. If the manifest has no checksums, the checkpoint is judged by sizes.
    """
    return _fault_of_names(folder) or fault_of_contents(folder)


def _fault_of_names(folder: Path) -> str | None:
    if not (folder / STATE).is_file():
        return f"{STATE} is missing"
    if not (folder / MANIFEST).is_file():
        fault = f"{MANIFEST} is missing" if any(folder.glob(CURVATURE_FILES)) else None
    else:
        fault = fault_of_sizes(folder)
    return fault or (None if _is_state(folder / STATE) else f"{STATE} is cut short or damaged")


def _is_state(path: Path) -> bool:
    try:
        TrainerState.load_from_json(str(path))
    except (TypeError, ValueError, AttributeError, RecursionError):
        return False
    return True


def _agreed_fault(folder: Path) -> str | None:
    """`fault_of`, with the same result on all ranks. Together they read every file once per machine. A collective."""
    fault = _fault_of_names(folder)
    if fault is None:
        fault = fault_of_contents(folder, _share_of_machine if world()[1] > 1 else list)
    return next((found for found in gather_objects(fault) if found is not None), None)


def _share_of_machine(names: Sequence[str]) -> Sequence[str]:
    """The names that this process checks. Each machine checks all names, since it may have its own disk."""
    return names[int(os.environ.get("LOCAL_RANK", 0)) :: int(os.environ.get("LOCAL_WORLD_SIZE", 1))]


def clear(folder: Path) -> None:
    """Delete a folder before a checkpoint is written to it. A checkpoint must not mix the files of two saves."""
    if folder.is_dir():
        shutil.rmtree(folder)


def seal(folder: Path, ranks: int, parts: int) -> None:
    """Write the manifest, after every process has written its own files. All files are on the disk before it.

    Args:
        folder: the checkpoint, without its `trainer_state.json`.
        ranks: number of processes that train.
        parts: number of files of its curvature; 0 if it has none.

    Raises:
        ConfigurationError: files of other processes are not in this folder.
    """
    for rank in range(parts):
        if not (folder / part_file(CURVATURE_FILES, rank, parts)).is_file():
            raise ConfigurationError(
                "output_dir", str(folder), f"must be one folder for all {ranks} processes, or set save_on_each_node"
            )
    write_manifest(folder, ranks)


def world_size_of(folder: Path) -> int | None:
    """Number of processes that saved a complete checkpoint; None if it has no manifest."""
    path = folder / MANIFEST
    return int((read_json(path) or {})["world_size"]) if path.is_file() else None


def is_sharded(folder: Path) -> bool:
    """Whether it was saved under FSDP. Only FSDP can then resume from it. This is the Trainer's own rule."""
    return any(folder.glob("pytorch_model_fsdp*"))


def part_file(pattern: str, part: int, parts: int) -> str:
    """The name of one of several files."""
    return pattern.replace("*", "{}").format(part, parts)


def write_curvature(folder: Path, state: Mapping[str, Any], part: int, parts: int) -> None:
    """Write one of several parts of the curvature. All parts have about the same size.

    Args:
        folder: the checkpoint.
        state: `SecondOrderOptimizer.curvature_state_dict()`. Each part has other layers.
        part: index of the part to write.
        parts: number of parts.
    """
    layers = state["curvature"].get("layers", {})
    taken_by = assign({name: _bytes(layer["state"]) for name, layer in layers.items()}, parts)
    mine = {name: layer for name, layer in layers.items() if taken_by[name] == part}
    write_part(folder, CURVATURE_FILES, {**state, "curvature": state["curvature"] | {"layers": mine}}, part, parts)


def write_part(folder: Path, pattern: str, content: Mapping[str, Any], part: int, parts: int) -> None:
    """Write one of several files."""
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / part_file(pattern, part, parts), lambda file: torch.save(content, file))


def _bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def read_curvature(folder: Path) -> dict[str, Any] | None:
    """The result of `curvature_state_dict`, put together from its parts; None if the folder has no curvature."""
    read = _read_parts(folder, CURVATURE_FILES)
    for other in read[1:]:
        read[0]["curvature"]["layers"] |= other["curvature"]["layers"]
    return read[0] if read else None


def read_sharded_optimizer(folder: Path) -> dict[str, Any] | None:
    """The state from all shares of `hf_so2.parallel.sharded_state`; None if the folder has no shares."""
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
    # The files are memory-mapped: every rank opens all of them, and copies only what it keeps.
    with readable(folder):
        return [torch.load(path, map_location="cpu", weights_only=True, mmap=True) for path in paths]


@contextmanager
def readable(folder: Path) -> Iterator[None]:
    """A context for loading. A damaged or foreign file gives an error of one line.

    Checksums find damage. But not every checkpoint has them, and not every file was written by this package. A file
    with content that `weights_only` refuses to run gives the same error.

    Raises:
        ConfigurationError: a file cannot be read.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (*DAMAGE, SafetensorError) as error:
        if isinstance(error, ConfigurationError):
            raise
        reason = (str(error).splitlines() or [""])[0][:200]
        allowed = f"cannot be read: {type(error).__name__}: {reason}"
        raise ConfigurationError("resume_from_checkpoint", str(folder), allowed) from error


@contextmanager
def writable(folder: Path) -> Iterator[None]:
    """A context for saving. A full or missing disk gives a one-line error. The torn checkpoint is skipped later.

    Raises:
        ConfigurationError: a file cannot be written.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _is_of_torchs_writer(error):
            raise
        reason = (str(error).splitlines() or [""])[0][:200]
        allowed = f"cannot be written to: {reason}; the checkpoint before this one is complete"
        raise ConfigurationError("output_dir", str(folder), allowed) from error


def _is_of_torchs_writer(error: RuntimeError) -> bool:
    """Whether torch's file writer raised the error.

    Its errors have no class of their own. Their text depends on the place where the disk is found to be full. So the
    traceback decides.
    """
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return bool(frames) and frames[-1].f_globals.get("__name__") == "torch.serialization"
