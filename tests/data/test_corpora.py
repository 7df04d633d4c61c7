"""Sources of documents: the embedded corpus, files of every kind, the split, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from hf_so2.data import DataArguments, load_corpus
from hf_so2.data.corpora import load_documents, split_documents, standard_library_sources
from hf_so2.errors import ConfigurationError

TEXTS = [f"document {index}\nwith two lines\n" for index in range(40)]


def arguments(tmp_path: Path, **given: Any) -> DataArguments:
    return DataArguments(cache_dir=str(tmp_path / "cache"), **given)


def write(path: Path, texts: list[str], column: str = "text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        Dataset.from_dict({column: texts, "other": list(range(len(texts)))}).to_parquet(str(path))
    elif path.suffix == ".json":
        path.write_text(json.dumps([{column: text} for text in texts]), encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({column: text}) + "\n" for text in texts), encoding="utf-8")
    else:
        path.write_text("".join(texts), encoding="utf-8")
    return path


def test_the_embedded_corpus_is_large_ordered_and_free_of_tests() -> None:
    sources = list(standard_library_sources())
    assert len(sources) > 300
    assert sum(map(len, sources)) > 5_000_000
    assert sources == list(standard_library_sources())
    assert not any("class Test_TestCase(" in text for text in sources)  # only unittest's own tests define it


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
def test_rows_are_documents(suffix: str, tmp_path: Path) -> None:
    file = write(tmp_path / f"train{suffix}", TEXTS, column="content")
    train, evaluation = load_documents(arguments(tmp_path, train_file=str(file), text_column="content"))
    assert train.column_names == evaluation.column_names == ["text"]
    assert sorted([*train["text"], *evaluation["text"]]) == sorted(TEXTS)
    assert len(evaluation) == 2  # 5 % of 40


def test_text_files_are_documents_and_a_validation_file_is_used_as_it_is(tmp_path: Path) -> None:
    for index, text in enumerate(TEXTS):
        write(tmp_path / "texts" / f"{index:02}.txt", [text])
    given = arguments(tmp_path, train_file=str(tmp_path / "texts" / "*.txt"))
    train, evaluation = load_documents(given)
    assert set(train["text"]).isdisjoint(evaluation["text"])
    assert set(train["text"]) | set(evaluation["text"]) == set(TEXTS)
    validation = write(tmp_path / "validation.jsonl", ["held", "out"])
    train, evaluation = load_documents(
        arguments(tmp_path, train_file=given.train_file, validation_file=str(validation))
    )
    assert list(train["text"]) == TEXTS
    assert list(evaluation["text"]) == ["held", "out"]


def test_the_split_is_by_document_and_always_the_same() -> None:
    documents = Dataset.from_dict({"text": TEXTS})
    train, evaluation = split_documents(documents, DataArguments(validation_split_percentage=10))
    again = split_documents(documents, DataArguments(validation_split_percentage=10))
    assert len(evaluation) == 4
    assert set(train["text"]).isdisjoint(evaluation["text"])
    assert list(again[0]["text"]) == list(train["text"])
    assert list(again[1]["text"]) == list(evaluation["text"])


def test_a_single_document_is_cut_at_a_line_near_its_end() -> None:
    lines = [f"line {index}\n" for index in range(100)]
    train, evaluation = split_documents(Dataset.from_dict({"text": ["".join(lines)]}), DataArguments())
    assert train[0]["text"] == "".join(lines[:95])
    assert evaluation[0]["text"] == "".join(lines[95:])
    with pytest.raises(ConfigurationError, match="validation_file=None: must be given"):
        split_documents(Dataset.from_dict({"text": ["one line"]}), DataArguments())


def test_limits_and_a_corpus_from_end_to_end(tmp_path: Path) -> None:
    file = write(tmp_path / "train.jsonl", TEXTS)
    corpus = load_corpus(
        arguments(tmp_path, train_file=str(file), vocab_size=300, max_seq_length=8, max_train_samples=5)
    )
    assert len(corpus.train) == 5
    assert len(corpus.evaluation) > 1
    assert len(corpus.train[0]["input_ids"]) == 8
    assert max(max(row["input_ids"]) for row in corpus.train) < len(corpus.tokenizer)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, r"train_file=.*must be an existing file"),
        ("empty.txt", b"", r"train_file=.*must not be empty"),
        ("blank.txt", b" \n\n", r"train_file=.*must hold some text"),
        ("rows.csv", b"text\nx\n", r"train_file=.*must end in one of"),
        ("broken.jsonl", b'{"text": "x"}\n{"text"', r"train_file=.*cannot be read as json"),
        ("column.jsonl", b'{"content": "x"}\n', "text_column='text': must be one of the columns"),
        ("numbers.jsonl", b'{"text": 1}\n', "text_column='text': must hold strings"),
        ("nulls.jsonl", b'{"text": null}\n', r"train_file=.*must hold some text"),
    ],
)
def test_unusable_files_are_refused(name: str, content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigurationError, match=message):
        load_documents(arguments(tmp_path, train_file=str(tmp_path / name)))


def test_an_unknown_hub_data_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="dataset_name='nobody/nothing': cannot be loaded"):
        load_documents(arguments(tmp_path, dataset_name="nobody/nothing"))


def test_a_corpus_smaller_than_a_block_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "small.txt", ["a\n", "b\n"])
    with pytest.raises(ConfigurationError, match="max_seq_length=128: must be smaller: the training data"):
        load_corpus(arguments(tmp_path, train_file=str(file), vocab_size=300))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"train_file": "a", "dataset_name": "b"}, "must not be combined with dataset_name"),
        ({"validation_file": "a"}, "needs train_file"),
        ({"dataset_config_name": "a"}, "needs dataset_name"),
        ({"max_seq_length": 1}, "at least 2"),
        ({"max_eval_samples": 0}, "at least 1"),
        ({"validation_split_percentage": 100}, "between 1 and 99"),
    ],
)
def test_contradicting_settings_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        DataArguments(**given)
