"""Data files and caches with other bytes in them, drawn from seeds; and what every odd input has to end in."""

from __future__ import annotations

import contextlib
import io
import json
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import datasets

import hf_so2
from hf_so2.data import DataArguments, load_corpus


def one_line(error: BaseException) -> None:
    text = str(error)
    assert text.strip(), repr(error)
    assert "\n" not in text.strip(), repr(error)


def reads(read: Callable[[], Any]) -> bool:
    """Whether it is read; an assertion fails, or another error goes through, where it is refused in another way."""
    said, met = io.StringIO(), None
    try:
        with contextlib.redirect_stderr(said):
            read()
    except (hf_so2.ConfigurationError, SystemExit) as error:
        met = error
    if isinstance(met, SystemExit):  # what a script answers to a mistake in its flags
        assert met.code == 2
        (line,) = [line for line in said.getvalue().splitlines() if line.startswith("error: ")]
        assert len(line) > len("error: ")
    elif met is not None:
        one_line(met)
        assert met.field, met
        assert met.allowed, met
    return met is None


def changed(content: bytes, chance: random.Random) -> bytes:
    """Some bytes are other ones, or the end is missing."""
    if chance.random() < 0.2:
        return content[: chance.randrange(len(content))]
    if chance.random() < 0.1:
        return chance.randbytes(len(content))
    new = bytearray(content)
    for _ in range(chance.choice([1, 1, 4, 64])):
        new[chance.randrange(len(new))] = chance.randrange(256)
    return bytes(new)


ROWS = [{"text": f"words {number} of a text that is long enough for a few blocks"} for number in range(30)]


@cache
def data_files() -> dict[str, bytes]:
    """By their endings."""
    table = datasets.Dataset.from_list(ROWS)
    parquet = io.BytesIO()
    table.to_parquet(parquet)
    lines = "\n".join(map(json.dumps, ROWS))
    return {
        "txt": lines.encode(),
        "jsonl": lines.encode(),
        "json": json.dumps(ROWS).encode(),
        "parquet": parquet.getvalue(),
    }


def data_file(chance: random.Random, folder: Path) -> bool:
    """A file to train on."""
    ending = chance.choice(sorted(data_files()))
    path = folder / f"train.{ending}"
    path.write_bytes(changed(data_files()[ending], chance))
    return reads(lambda: load(path, folder / "cache"))


def data_cache(chance: random.Random, folder: Path) -> bool:
    """What an earlier run has left for this one."""
    path, cache_dir = folder / "train.jsonl", folder / "cache"
    path.write_bytes(data_files()["jsonl"])
    before = load(path, cache_dir)
    files = sorted(
        file for part in ("packed", "tokenizers") for file in (cache_dir / part).rglob("*") if file.is_file()
    )
    hit = chance.choice(files)
    hit.write_bytes(changed(hit.read_bytes(), chance))
    found: list[Any] = []
    was_read = reads(lambda: found.append(load(path, cache_dir)))
    assert not was_read or found[0] == before, (hit.parent.name, "other data, without a word")
    return was_read


def load(path: Path, cache_dir: Path) -> list[list[int]]:
    arguments = DataArguments(
        train_file=str(path), cache_dir=str(cache_dir), vocab_size=300, max_seq_length=8, validation_split_percentage=20
    )
    corpus = load_corpus(arguments)
    return [*corpus.train["input_ids"], *corpus.evaluation["input_ids"]]
