"""Data: corpora, the tokenizer and packing into blocks. :func:`load_corpus` does all of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from hf_so2.data.cache import cache_directory
from hf_so2.data.corpora import DataArguments, load_documents
from hf_so2.data.packing import collate_blocks, pack_documents
from hf_so2.data.tokenizer import checkpoint_tokenizer, corpus_tokenizer
from hf_so2.errors import ConfigurationError
from hf_so2.folders import require_folder

__all__ = ["Corpus", "DataArguments", "collate_blocks", "load_corpus"]


@dataclass(frozen=True)
class Corpus:
    """Blocks to train and to evaluate on (``input_ids``, int32 ``[max_seq_length]``), and their tokenizer."""

    train: Dataset
    evaluation: Dataset
    tokenizer: PreTrainedTokenizerBase

    def for_trainer(self) -> dict[str, Any]:
        """The Trainer's arguments for these data, by name."""
        return {"train_dataset": self.train, "eval_dataset": self.evaluation, "data_collator": collate_blocks}


def load_corpus(arguments: DataArguments, model_name_or_path: str | None = None) -> Corpus:
    """Documents, tokenizer and blocks as ``arguments`` ask for them.

    Everything expensive is cached; in a run of several processes call it under
    ``TrainingArguments.main_process_first`` so that the main process builds the caches and the others read
    them.

    Args:
        arguments: the source, the block size and the limits.
        model_name_or_path: a checkpoint whose own tokenizer is used; None trains one on the training
            documents.

    Raises:
        ConfigurationError: anything that keeps the corpus from being loaded, or that leaves it empty.
    """
    require_folder("cache_dir", cache_directory(arguments.cache_dir))
    documents, held_out = load_documents(arguments)
    if model_name_or_path is None:
        tokenizer: PreTrainedTokenizerBase = corpus_tokenizer(documents, arguments.vocab_size, arguments.cache_dir)
    else:
        tokenizer = checkpoint_tokenizer(model_name_or_path, arguments.cache_dir)
    train = pack_documents(documents, tokenizer, arguments.max_seq_length, arguments.cache_dir)
    evaluation = pack_documents(held_out, tokenizer, arguments.max_seq_length, arguments.cache_dir)
    for blocks, part in ((train, "training"), (evaluation, "evaluation")):
        if len(blocks) == 0:
            raise ConfigurationError(
                "max_seq_length",
                arguments.max_seq_length,
                f"must be smaller: the {part} data do not fill a single block",
            )
    return Corpus(
        train=_first(train, arguments.max_train_samples),
        evaluation=_first(evaluation, arguments.max_eval_samples),
        tokenizer=tokenizer,
    )


def _first(blocks: Dataset, limit: int | None) -> Dataset:
    return blocks if limit is None else blocks.select(range(min(limit, len(blocks))))
