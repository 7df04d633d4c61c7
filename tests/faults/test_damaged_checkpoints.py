"""Damaged, foreign and hostile files in checkpoints: refused in one line before anything is loaded, or passed over."""

from __future__ import annotations

import collections
import errno
import json
import pickle
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from shared.helpers import arguments, assert_same_parameters, llama, optimizer_of, token_rows, trained

import hf_so2
from hf_so2.training import checkpoints, manifest

sys.path.insert(0, str(Path(__file__).parent))
from damage import KINDS, damage

RUN = {"max_steps": 4, "per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 2}
FEW, ALL = 24, 400


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> hf_so2.SecondOrderTrainer:
    return trained(llama(), token_rows(24), tmp_path_factory.mktemp("whole"), **RUN)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The last checkpoint of a run with other data and another rate: every name is the same, few contents are."""
    folder = tmp_path_factory.mktemp("other")
    trained(llama(), token_rows(24, seed=1), folder, learning_rate=0.02, **RUN)
    return folder / "checkpoint-4"


@pytest.fixture
def output(whole: hf_so2.SecondOrderTrainer, tmp_path: Path) -> Path:
    return shutil.copytree(whole.args.output_dir, tmp_path / "output")


def without_checksums(folder: Path) -> None:
    """As an earlier version wrote it."""
    content = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({key: content[key] for key in ("world_size", "bytes")}))


def refuse_and_pass_over(whole: Any, other: Path, tmp_path: Path, count: int) -> None:
    outcomes: collections.Counter[str] = collections.Counter()
    for seed in range(count):
        chance, kind = random.Random(seed), KINDS[seed % len(KINDS)]
        folder = shutil.copytree(whole.args.output_dir, tmp_path / str(seed))
        name = damage(folder / "checkpoint-4", kind, chance, other)
        with pytest.raises(hf_so2.ConfigurationError) as caught:
            checkpoints.to_resume(folder / "checkpoint-4", folder)
        message = str(caught.value)
        assert "\n" not in message
        assert name in message or name == "manifest.json", (seed, kind, name, message)
        assert checkpoints.to_resume("last", folder) == str(folder / "checkpoint-2"), (seed, kind, name)
        outcomes[kind] += 1
        shutil.rmtree(folder)
    print(f"\n{sum(outcomes.values())} damaged checkpoints refused and passed over: {dict(outcomes)}")


def test_a_damaged_checkpoint_is_refused_and_passed_over(whole: Any, other: Path, tmp_path: Path) -> None:
    refuse_and_pass_over(whole, other, tmp_path, FEW)


@pytest.mark.slow
def test_many_damaged_checkpoints(whole: Any, other: Path, tmp_path: Path) -> None:
    refuse_and_pass_over(whole, other, tmp_path, ALL)


def test_a_flipped_bit_is_passed_over_and_the_run_ends_as_without_it(whole: Any, output: Path) -> None:
    path = output / "checkpoint-4" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content)
    resumed = trained(llama(), token_rows(24), output, resume="last", **RUN)
    assert_same_parameters(resumed.model, whole.model)


def test_every_file_has_a_checksum(output: Path) -> None:
    folder = output / "checkpoint-4"
    content = json.loads((folder / "manifest.json").read_text())
    assert set(content["xxh3_128"]) == {path.name for path in folder.iterdir()} - {"manifest.json"}


def test_a_checkpoint_without_checksums_is_loaded_with_a_note(
    whole: Any, output: Path, caplog: pytest.LogCaptureFixture
) -> None:
    without_checksums(output / "checkpoint-2")
    resumed = trained(llama(), token_rows(24), output, resume=str(output / "checkpoint-2"), **RUN)
    assert_same_parameters(resumed.model, whole.model)
    (message,) = [r.getMessage() for r in caplog.records if r.name.startswith("hf_so2")]
    assert "checkpoint-2 has no checksums" in message


UNREADABLE = [
    "model.safetensors",
    "config.json",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "curvature-0-of-1.pt",
]


@pytest.mark.parametrize("name", UNREADABLE)
@pytest.mark.parametrize("how", ["garbled", "hostile"])
def test_what_checksums_do_not_cover_is_still_refused_in_one_line_and_never_run(
    name: str, how: str, output: Path, tmp_path: Path
) -> None:
    """Of an earlier version, without checksums; a hostile pickle would make a folder if it were run."""
    folder, made = output / "checkpoint-2", tmp_path / "made"
    payload = pickle.dumps(Hostile(made))
    size = (folder / name).stat().st_size
    content = payload if how == "hostile" else random.Random(0).randbytes(size)
    (folder / name).write_bytes(content)
    manifest_file = folder / "manifest.json"
    without_checksums(folder)
    listed = json.loads(manifest_file.read_text())
    listed["bytes"][name] = len(content)
    manifest_file.write_text(json.dumps(listed))
    with pytest.raises(hf_so2.ConfigurationError, match=r"^resume_from_checkpoint=.*") as caught:
        trained(llama(), token_rows(24), output, resume=str(folder), **RUN)
    assert "\n" not in str(caught.value)
    assert not made.exists()


class Hostile:
    """Runs code when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        import os

        return os.mkdir, (self.path,)


@pytest.mark.parametrize(
    "content", ["[]", "null", "1", '{"bytes": 3}', "[" * 100_000, '{"world_size": 1, "bytes": []}']
)
def test_a_manifest_of_another_shape_is_damaged(content: str, output: Path) -> None:
    (output / "checkpoint-4" / "manifest.json").write_text(content)
    assert "manifest.json is" in str(checkpoints.fault_of(output / "checkpoint-4"))


@pytest.mark.parametrize("content", ["[]", "null", "{}x", '{"unknown": 3}', "[" * 100_000])
def test_a_state_of_another_shape_is_damaged(content: str, output: Path) -> None:
    without_checksums(output / "checkpoint-4")
    (output / "checkpoint-4" / "trainer_state.json").write_text(content)
    assert "trainer_state.json is" in str(checkpoints.fault_of(output / "checkpoint-4"))


SAVES: dict[str, tuple[Any, str]] = {
    "the model": (hf_so2.SecondOrderTrainer, "save_model"),
    "the optimizer": (torch, "save"),
    "a whole file": (checkpoints, "write_whole"),
    "the manifest": (manifest, "write_whole"),
    "the state": (manifest, "write_state"),
}


@pytest.mark.parametrize("place", SAVES)
def test_a_full_disk_ends_in_one_line_and_leaves_the_checkpoint_before(
    place: str, whole: Any, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(output / "checkpoint-4")
    owner, name = SAVES[place]
    owner = sys.modules["hf_so2.training.resumable"] if place == "the state" else owner

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(owner, name, full)
    with pytest.raises(hf_so2.ConfigurationError, match=r"^output_dir=.*No space left on device") as caught:
        trained(llama(), token_rows(24), output, resume=str(output / "checkpoint-2"), **RUN)
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    assert checkpoints.to_resume("last", output) == str(output / "checkpoint-2")
    resumed = trained(llama(), token_rows(24), output, resume="last", **RUN)
    assert_same_parameters(resumed.model, whole.model)
    assert optimizer_of(resumed).steps == 4


def test_nothing_is_written_over_the_trainers_own_way_of_saving_its_state(tmp_path: Path) -> None:
    trainer = hf_so2.SecondOrderTrainer(model=llama(), args=arguments(tmp_path, **RUN), train_dataset=token_rows(24))
    trainer.train()
    assert "save_to_json" not in vars(trainer.state)
