"""The tokenizer: a byte-level BPE trained once on the corpus, or the checkpoint's own."""

from __future__ import annotations

from collections.abc import Iterator

from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hf_so2.data.cache import cache_directory, cache_key, documents_digest, is_sound, seal, write_atomically
from hf_so2.errors import ConfigurationError

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|pad|>"
# A vocabulary is settled long before; more text would cost minutes and change nothing.
TRAINING_CHARACTERS = 50_000_000


def corpus_tokenizer(documents: Dataset, vocab_size: int, cache_dir: str | None = None) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of ``vocab_size`` entries, trained on ``documents`` unless it was before.

    The trained tokenizer is cached under a key of the documents' content and the size. ``bos`` and ``eos``
    are the same token, as in GPT-2; padding has its own, so that masking it never masks the end of a
    document. A corpus too small for ``vocab_size`` merges yields fewer entries: ``len(tokenizer)`` is the
    size that counts.

    Args:
        documents: data set with the column ``text``.
        vocab_size: entries, the 256 bytes and 2 special tokens included.
        cache_dir: see :func:`hf_so2.data.cache.cache_directory`.

    Raises:
        ConfigurationError: ``vocab_size`` has no room for the bytes and the special tokens.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    smallest = len(alphabet) + 2
    if vocab_size < smallest:
        raise ConfigurationError(
            "vocab_size", vocab_size, f"must be at least {smallest}: all bytes and 2 special tokens"
        )
    key = cache_key("byte-level-bpe", vocab_size, documents_digest(documents))
    path = cache_directory(cache_dir) / "tokenizers" / f"{key}.json"
    if not is_sound(path):
        trained = Tokenizer(models.BPE())
        trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trained.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT, PADDING],
            initial_alphabet=sorted(alphabet),
            show_progress=False,
        )
        trained.train_from_iterator(_beginning(documents), trainer)
        write_atomically(path, trained.to_str())
        seal(path)
    return PreTrainedTokenizerFast(
        tokenizer_file=str(path), bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=PADDING
    )


def checkpoint_tokenizer(model_name_or_path: str, cache_dir: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to a checkpoint; one without an end-of-text token cannot join documents.

    Raises:
        ConfigurationError: the checkpoint has no tokenizer, or that has no ``eos`` token.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_name_or_path, cache_dir=cache_dir)
    except (ImportError, OSError, ValueError) as error:  # the first: a package that this tokenizer needs is missing
        reason = str(error).strip().splitlines()[0]
        allowed = f"must hold a tokenizer: {reason}"
        raise ConfigurationError("model_name_or_path", model_name_or_path, allowed) from error
    if tokenizer.eos_token_id is None:
        raise ConfigurationError("model_name_or_path", model_name_or_path, "must have a tokenizer with an eos token")
    return tokenizer


def _beginning(documents: Dataset) -> Iterator[str]:
    """Texts until there are :data:`TRAINING_CHARACTERS` of them."""
    remaining = TRAINING_CHARACTERS
    for text in documents["text"]:
        if text:
            yield text[:remaining]
            remaining -= len(text)
        if remaining <= 0:
            return
