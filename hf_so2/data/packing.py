"""Documents to token blocks of one length: no padding, no masked position, every token a training example."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features, Value
from datasets import Sequence as SequenceFeature
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hf_so2.data.cache import cache_directory, cache_key, documents_digest, is_sound, seal

TOKEN = np.int32


class BlockPacker:
    """Cuts a stream of token sequences into blocks, carrying the unfinished block from one call to the next.

    Args:
        block_size: tokens in a block.
    """

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.carry: NDArray[np.int32] = np.empty(0, TOKEN)

    def __call__(self, sequences: Sequence[Sequence[int]]) -> NDArray[np.int32]:
        """All blocks that are complete by now: int32 ``[blocks, block_size]``, possibly none."""
        stream = np.concatenate([self.carry, *(np.asarray(sequence, TOKEN) for sequence in sequences)])
        complete = len(stream) - len(stream) % self.block_size
        self.carry = stream[complete:]
        return stream[:complete].reshape(-1, self.block_size)


def pack_documents(
    documents: Dataset, tokenizer: PreTrainedTokenizerBase, block_size: int, cache_dir: str | None = None
) -> Dataset:
    """Tokenizes ``documents``, ends each with ``eos`` and cuts the joined stream into blocks.

    The stream runs on over document and batch boundaries, so nothing is lost or repeated but the last,
    incomplete block (fewer than ``block_size`` tokens of the whole corpus). The blocks are cached as an Arrow
    file under a key of the texts, the tokenizer and the block size, written by ``datasets`` under a temporary
    name first; one that is damaged is made anew.

    Args:
        documents: data set with the column ``text``; empty documents are skipped.
        tokenizer: a fast tokenizer with an ``eos`` token.
        block_size: tokens in a block.
        cache_dir: see :func:`hf_so2.data.cache.cache_directory`.

    Returns:
        Data set with the column ``input_ids``, int32 ``[blocks, block_size]``.
    """
    packer = BlockPacker(block_size)

    def tokenize_and_pack(batch: Mapping[str, list[str | None]]) -> dict[str, Any]:
        texts = [text for text in batch["text"] if text]
        encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        return {"input_ids": packer([[*tokens, tokenizer.eos_token_id] for tokens in encoded] if texts else [])}

    key = cache_key("blocks", block_size, _tokenizer_description(tokenizer), documents_digest(documents))
    folder = cache_directory(cache_dir) / "packed"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{key}.arrow"
    was_sound = is_sound(path)
    if not was_sound:
        path.unlink(missing_ok=True)
    blocks = documents.map(
        tokenize_and_pack,
        batched=True,
        batch_size=100,
        remove_columns=documents.column_names,
        features=Features({"input_ids": SequenceFeature(Value("int32"), length=block_size)}),
        cache_file_name=str(path),
        new_fingerprint=key,  # the packer has state, so its own hash would say nothing
        desc=f"Tokenizing into blocks of {block_size}",
    )
    if not was_sound and path.is_file():
        seal(path)
    return blocks


def collate_blocks(examples: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, Tensor]:
    """A batch for a causal language model: ``input_ids`` and equal ``labels``, int64 ``[batch, block_size]``.

    The models shift the labels themselves.
    """
    input_ids = torch.tensor([example["input_ids"] for example in examples], dtype=torch.long)
    return {"input_ids": input_ids, "labels": input_ids.clone()}


def _tokenizer_description(tokenizer: PreTrainedTokenizerBase) -> str:
    """All that decides which tokens a text becomes."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    described = backend.to_str() if backend is not None else f"{tokenizer.name_or_path} {sorted(tokenizer.get_vocab())}"
    return f"{described} {tokenizer.eos_token_id}"
