"""What the guards of a step and the checksums of a save cost: `python tests/faults/cost.py step` or `save`.

Runs of one code differ by a tenth from each other on a shared computer, so that nothing here compares runs. Copies of
one model take the same step in turn, each with other guards, within seconds of each other; who has which guards goes
round, so that no copy's place in memory tells; and what is compared is the processor's time of one step with that of
the same step. One kind of guards is there twice: what the two differ by is what this cannot tell apart.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))
from shared.helpers import arguments, optimizer_of

import hf_so2
from hf_so2 import files
from hf_so2.distributed import local
from hf_so2.optim import optimizer as pipeline
from hf_so2.optim.whole import WholeStep
from hf_so2.training import checkpoints, manifest

VOCABULARY, TOKENS = 2048, (8, 128)


def model_of(width: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=width,
            intermediate_size=width * 8 // 3,
            num_hidden_layers=4,
            num_attention_heads=width // 64,
            num_key_value_heads=width // 64,
            max_position_embeddings=256,
            tie_word_embeddings=False,
        )
    )


@contextlib.contextmanager
def unwatched(self: WholeStep, step: int) -> Iterator[None]:
    yield


def look_for_finite_ones(gradients: Sequence[Tensor], limits: Sequence[float]) -> bool:
    """As it was before the guards."""
    extremes = [x.to(torch.float64) for part in map(local, gradients) for x in torch.aminmax(part)]
    return bool(torch.isfinite(torch.stack(extremes)).all())


def gradients_alone(groups: Any, *_: Any) -> tuple[list[Tensor], list[float]]:
    return [p.grad for group in groups for p in group["params"] if p.grad is not None], []


Patch = pytest.MonkeyPatch


def without_watch(patch: Patch) -> None:
    patch.setattr(WholeStep, "making", unwatched)


def with_the_old_look(patch: Patch) -> None:
    patch.setattr(pipeline, "are_in_range", look_for_finite_ones)
    patch.setattr(pipeline, "gradients_and_limits", gradients_alone)


def as_before(patch: Patch) -> None:
    without_watch(patch)
    with_the_old_look(patch)


def without_look(patch: Patch) -> None:
    patch.setattr(pipeline, "are_in_range", lambda *_: True)
    patch.setattr(pipeline, "gradients_and_limits", lambda *_: ((), ()))


GUARDS: dict[str, Callable[[Patch], None]] = {
    "before": as_before,
    "before, again": as_before,
    "now": lambda patch: None,
    "now, without the watch over a whole step": without_watch,
    "now, with the look of before": with_the_old_look,
    "now, with no look at gradients": without_look,
}


def steps(name: str, rounds: int, width: int, warm: int) -> None:
    """Seconds of the processor: of `step`, and of all that a step takes, with forward and backward pass."""
    models = [model_of(width) for _ in GUARDS]
    optimizers = [hf_so2.build_optimizer(name, model, lr=1e-4) for model in models]
    generator = torch.Generator().manual_seed(0)
    seconds: dict[str, list[float]] = {guards: [] for guards in GUARDS}
    whole: list[float] = []
    for number in range(warm + rounds):
        tokens = torch.randint(VOCABULARY, TOKENS, generator=generator)
        order = random.Random(number).sample(range(len(models)), len(models))
        for place in order:
            guards = list(GUARDS)[(place + number) % len(GUARDS)]
            model, optimizer = models[place], optimizers[place]
            begun = time.process_time()
            model(input_ids=tokens, labels=tokens).loss.backward()
            with pytest.MonkeyPatch.context() as patch:
                GUARDS[guards](patch)
                stepped = time.process_time()
                optimizer.step()
                ended = time.process_time()
            optimizer.zero_grad()
            if number >= warm:
                seconds[guards].append(ended - stepped)
                whole.append(ended - begun)
    assert all(optimizer.steps == warm + rounds for optimizer in optimizers)
    ends = [dict(model.state_dict()) for model in models]
    assert all(torch.equal(end[key], ends[0][key]) for end in ends for key in end)
    step, all_of_it = np.median(seconds["before"]), float(np.median(whole))
    print(f"{name}: a step of training takes {1e3 * all_of_it:.1f} ms, {1e3 * step:.2f} ms of them in `step`")
    compare(seconds, {"step of training": all_of_it, "`step`": float(step)})


def compare(seconds: dict[str, list[float]], parts: dict[str, float]) -> None:
    """Print what each takes more than the first, in percent, with an interval that holds the truth 19 times of 20."""
    first, *others = seconds
    for name in others:
        differences = np.array(seconds[name]) - np.array(seconds[first])
        low, high = interval(differences)
        middle = float(np.median(differences))
        shares = [
            f"{100 * middle / whole:+.2f} % [{100 * low / whole:+.2f}, {100 * high / whole:+.2f}] of a {part}"
            for part, whole in parts.items()
        ]
        print(f"  {name}: {1e3 * middle:+.3f} ms, {', '.join(shares)}")


def interval(values: np.ndarray, draws: int = 4000) -> tuple[float, float]:
    """Of the median, by drawing the pairs again."""
    chance = np.random.default_rng(0)
    medians = np.median(chance.choice(values, (draws, len(values))), axis=1)
    low, high = np.percentile(medians, [2.5, 97.5])
    return float(low), float(high)


def sizes_alone(folder: Path, ranks: int) -> None:
    """The manifest as it was before checksums."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in paths:
        with path.open("rb+") as file:
            os.fsync(file.fileno())
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}
    content = json.dumps({"world_size": ranks, "bytes": sizes}, indent=2)
    files.write_whole(folder / manifest.MANIFEST, lambda file: file.write(content.encode()))


def sealed_as_before(patch: Patch) -> None:
    patch.setattr(checkpoints, "write_manifest", sizes_alone)
    patch.setattr("hf_so2.training.resumable.write_state", lambda path, write: write(str(path)))


def without_digest(patch: Patch) -> None:
    patch.setattr(manifest, "checksum", lambda path: "0" * 32)


SEALS: dict[str, Callable[[Patch], None]] = {
    "before": sealed_as_before,
    "before, again": sealed_as_before,
    "now": lambda patch: None,
    "now, without reading what was written": without_digest,
}


def saves(name: str, rounds: int, width: int, folder: Path) -> None:
    """Saves of one Trainer, by the clock on the wall and by the processor's."""
    tokens = torch.randint(VOCABULARY, TOKENS, generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    given = {"per_device_train_batch_size": len(rows), "optim": name, "max_steps": 2, "learning_rate": 1e-4}
    trainer = hf_so2.SecondOrderTrainer(model=model_of(width), args=arguments(folder, **given), train_dataset=rows)
    trainer.train()
    assert optimizer_of(trainer).steps == 2
    wall: dict[str, list[float]] = {seal: [] for seal in SEALS}
    processor: dict[str, list[float]] = {seal: [] for seal in SEALS}
    for number in range(rounds + 2):
        for seal in random.Random(number).sample(list(SEALS), len(SEALS)):
            os.sync()
            with pytest.MonkeyPatch.context() as patch:
                SEALS[seal](patch)
                begun, used = time.perf_counter(), time.process_time()
                trainer._save_checkpoint(trainer.model, None)
                taken = time.perf_counter() - begun, time.process_time() - used
            if number >= 2:
                wall[seal].append(taken[0])
                processor[seal].append(taken[1])
    written = [path for path in (folder / "checkpoint-2").rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in written) / 1e6
    digests = [digested(written) for _ in range(rounds)]
    middle = float(np.median(wall["before"]))
    print(f"{name}: a checkpoint of {size:.1f} MB, saved in {1e3 * middle:.1f} ms by the clock")
    print(f"  all of it read and digested: {1e3 * float(np.median(digests)):.2f} ms")
    compare(wall, {"save": middle})
    middle = float(np.median(processor["before"]))
    print(f"  and by the processor's time, {1e3 * middle:.1f} ms:")
    compare(processor, {"save": middle})


def digested(paths: Sequence[Path]) -> float:
    begun = time.perf_counter()
    for path in paths:
        files.checksum(path)
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("step", "save"))
    parser.add_argument("--optim", default="kfac,muon,adamw")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--folder", type=Path, help="where checkpoints go; a temporary one by default")
    given = parser.parse_args()
    torch.set_num_threads(1)
    for name in given.optim.split(","):
        if given.what == "step":
            steps(name, given.rounds, given.width, warm=12)
            continue
        with tempfile.TemporaryDirectory(dir=given.folder) as folder:
            saves(name, given.rounds, given.width, Path(folder))


if __name__ == "__main__":
    main()
