"""Where prepared data are kept, and the keys that say whether they are still right."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

from datasets import Dataset
from huggingface_hub.constants import HF_HOME

from hf_so2.files import checksum

# Part of every key: raise it when the tokenizer's training or the packing changes, and old caches are no
# longer found.
FORMAT_VERSION = 1


def cache_directory(cache_dir: str | None) -> Path:
    """The folder for tokenizers and packed blocks: ``cache_dir``, or ``hf_so2`` in Hugging Face's cache."""
    return Path(cache_dir).expanduser() if cache_dir else Path(HF_HOME) / "hf_so2"


def cache_key(*parts: object) -> str:
    """A short hexadecimal key of ``parts`` (by their ``str``) and of this module's format version."""
    described = "\x1f".join(str(part) for part in (FORMAT_VERSION, *parts))
    return hashlib.sha256(described.encode()).hexdigest()[:24]


def is_sound(path: Path) -> bool:
    """Whether a file is there and is what :func:`seal` saw; what is not is to be made anew.

    A cache is read by nobody but the next run, so that a flipped bit would go unseen: other tokens would be trained on.
    """
    seal_file = _seal_of(path)
    return path.is_file() and seal_file.is_file() and seal_file.read_bytes() == checksum(path).encode()


def seal(path: Path) -> None:
    """Write down beside a file what is in it."""
    write_atomically(_seal_of(path), checksum(path))


def _seal_of(path: Path) -> Path:
    return path.with_name(path.name + ".xxh3_128")


def write_atomically(path: Path, content: str) -> None:
    """Writes so that another process sees the whole file or none, and an interruption leaves none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".writing-") as folder:
        unfinished = Path(folder) / path.name
        unfinished.write_text(content, encoding="utf-8")
        os.replace(unfinished, path)


def documents_digest(documents: Dataset) -> str:
    """SHA-256 of the column ``text``, document by document and in order, wherever the documents came from."""
    digest = hashlib.sha256()
    for batch in documents.iter(batch_size=1000):
        for text in batch["text"]:
            encoded = (text or "").encode("utf-8", "surrogatepass")
            digest.update(len(encoded).to_bytes(8, "little"))  # or moving text between documents would go unseen
            digest.update(encoded)
    return digest.hexdigest()
