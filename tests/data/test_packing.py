"""Packing: every token once, in order, in blocks of one length; cached under a key of all that decides the result."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from hf_so2.data.packing import BlockPacker, collate_blocks, pack_documents
from hf_so2.data.tokenizer import corpus_tokenizer

TEXTS = ["def f(x):\n    return x\n", "", "größer als 1 — ∇W\n", "import os\n" * 30, "a"]


@pytest.fixture
def tokenizer(tmp_path: Path) -> PreTrainedTokenizerFast:
    return corpus_tokenizer(Dataset.from_dict({"text": TEXTS}), 300, str(tmp_path / "tokenizer"))


@given(
    calls=st.lists(st.lists(st.lists(st.integers(0, 99), max_size=9), max_size=5), max_size=6),
    block_size=st.integers(1, 7),
)
def test_blocks_are_the_stream_but_for_its_unfinished_end(calls: list[list[list[int]]], block_size: int) -> None:
    packer = BlockPacker(block_size)
    blocks = [packer(sequences) for sequences in calls]
    stream = [token for sequences in calls for sequence in sequences for token in sequence]
    packed = np.concatenate([np.empty(0, np.int32), *(block.ravel() for block in blocks)])
    assert packed.tolist() + packer.carry.tolist() == stream
    assert len(packer.carry) < block_size
    assert all(block.shape[1:] == (block_size,) and block.dtype == np.int32 for block in blocks)


def test_the_blocks_decode_to_the_documents_joined_by_eos(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    packed = pack_documents(Dataset.from_dict({"text": TEXTS}), tokenizer, 1, str(tmp_path))
    expected = "".join(text + tokenizer.eos_token for text in TEXTS if text)
    assert tokenizer.decode([row["input_ids"][0] for row in packed]) == expected


def test_the_stream_runs_on_over_map_batches(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    documents = Dataset.from_dict({"text": [f"x{index}" for index in range(250)]})  # three batches of map
    single = pack_documents(documents, tokenizer, 1, str(tmp_path))
    blocks = pack_documents(documents, tokenizer, 7, str(tmp_path))
    tokens = [row["input_ids"][0] for row in single]
    assert len(blocks) == len(tokens) // 7
    assert [token for row in blocks for token in row["input_ids"]] == tokens[: 7 * len(blocks)]


def test_blocks_are_reused_until_text_tokenizer_or_size_changes(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    def files() -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in (tmp_path / "packed").glob("*.arrow")}

    documents = Dataset.from_dict({"text": TEXTS})
    pack_documents(documents, tokenizer, 4, str(tmp_path))
    first = files()
    pack_documents(Dataset.from_dict({"text": list(TEXTS)}), tokenizer, 4, str(tmp_path))
    assert files() == first
    pack_documents(documents, tokenizer, 5, str(tmp_path))
    assert len(files()) == 2
    pack_documents(Dataset.from_dict({"text": [*TEXTS, "more"]}), tokenizer, 4, str(tmp_path))
    assert len(files()) == 3
    smaller = corpus_tokenizer(documents, 270, str(tmp_path))
    pack_documents(documents, smaller, 4, str(tmp_path))
    assert len(files()) == 4


def test_an_interruption_leaves_no_blocks_behind(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails_on_the_second_batch(packer: BlockPacker, sequences: list[list[int]]) -> np.ndarray:
        if packer.carry.size:
            raise KeyboardInterrupt
        packer.carry = np.ones(1, np.int32)
        return np.ones((3, packer.block_size), np.int32)

    monkeypatch.setattr(BlockPacker, "__call__", fails_on_the_second_batch)
    with pytest.raises(KeyboardInterrupt):
        pack_documents(Dataset.from_dict({"text": ["x"] * 150}), tokenizer, 4, str(tmp_path))
    assert list((tmp_path / "packed").iterdir()) == []


def test_a_batch_has_every_token_as_input_and_label() -> None:
    batch = collate_blocks([{"input_ids": [1, 2, 3]}, {"input_ids": [4, 5, 6]}])
    expected = torch.tensor([[1, 2, 3], [4, 5, 6]])
    assert batch["input_ids"].dtype == torch.long
    assert torch.equal(batch["input_ids"], expected)
    assert torch.equal(batch["labels"], expected)
    assert batch["labels"].data_ptr() != batch["input_ids"].data_ptr()
