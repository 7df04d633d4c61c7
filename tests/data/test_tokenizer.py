"""The trained tokenizer: loses nothing, is trained once, and the same everywhere."""

from __future__ import annotations

from pathlib import Path

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from hf_so2.data.tokenizer import checkpoint_tokenizer, corpus_tokenizer
from hf_so2.errors import ConfigurationError

DOCUMENTS = Dataset.from_dict({"text": ["for i in range(10):\n    print(i)\n" * 5, "return None\n" * 5, None]})


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


@given(text=st.text(st.characters(exclude_categories=("Cs",))))
def test_every_text_survives_encoding_and_decoding(text: str, cache: str) -> None:
    tokenizer = corpus_tokenizer(DOCUMENTS, 280, cache)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_special_tokens_and_size(cache: str) -> None:
    tokenizer = corpus_tokenizer(DOCUMENTS, 280, cache)
    assert len(tokenizer) == 280
    assert tokenizer.eos_token_id == tokenizer.bos_token_id
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)


def test_training_again_gives_the_same_file_and_a_second_call_none(tmp_path: Path) -> None:
    trained = []
    for folder in ("one", "two"):
        corpus_tokenizer(DOCUMENTS, 280, str(tmp_path / folder))
        (path,) = (tmp_path / folder / "tokenizers").glob("*.json")
        trained.append(path.read_bytes())
    assert trained[0] == trained[1]
    written = path.stat().st_mtime_ns
    corpus_tokenizer(DOCUMENTS, 280, str(tmp_path / "two"))
    assert [file.stat().st_mtime_ns for file in path.parent.glob("*.json")] == [written]


def test_a_saved_tokenizer_is_a_checkpoint_s_own(cache: str, tmp_path: Path) -> None:
    tokenizer = corpus_tokenizer(DOCUMENTS, 280, cache)
    tokenizer.save_pretrained(tmp_path)
    loaded = checkpoint_tokenizer(str(tmp_path))
    assert loaded.get_vocab() == AutoTokenizer.from_pretrained(tmp_path).get_vocab() == tokenizer.get_vocab()
    assert loaded.eos_token_id == tokenizer.eos_token_id


def test_no_room_for_the_bytes_is_refused(cache: str) -> None:
    with pytest.raises(ConfigurationError, match="vocab_size=100: must be at least 258"):
        corpus_tokenizer(DOCUMENTS, 100, cache)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"model_name_or_path=.*must hold a tokenizer"):
        checkpoint_tokenizer(str(tmp_path))
