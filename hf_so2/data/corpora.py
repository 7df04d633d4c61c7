"""Documents to train and to evaluate on: the embedded corpus, local files or the Hub.

Whatever the source, the result is a pair of data sets with the single column ``text``, one document per row.
"""

from __future__ import annotations

import glob
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from huggingface_hub.errors import OfflineModeIsEnabled

from hf_so2.data.cache import cache_directory
from hf_so2.errors import ConfigurationError

SPLIT_SEED = 0  # not the training seed: every run, whatever its seed, is judged on the same held-out documents
LOADERS = {".txt": "text", ".md": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
# What reading a file raises that is not what its name says.
DAMAGE = (DatasetGenerationError, OSError, RuntimeError, LookupError, TypeError, ValueError)
# Folders inside the standard library's that hold tests, or packages that do not belong to it.
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


@dataclass
class DataArguments:
    """What to train on. With no source given, the embedded corpus: Python's own standard library."""

    _argument_group_name = "data"

    dataset_name: str | None = field(
        default=None, metadata={"help": "a data set of the Hub (or a folder that datasets can load)"}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "its configuration"})
    train_file: str | None = field(
        default=None,
        metadata={"help": "a text, JSON (lines) or Parquet file, or a pattern such as 'corpus/*.txt'"},
    )
    validation_file: str | None = field(
        default=None, metadata={"help": "the same for evaluation; without it, whole documents are held out"}
    )
    text_column: str = field(default="text", metadata={"help": "the column that holds the text"})
    validation_split_percentage: int = field(
        default=5,
        metadata={"help": "percentage of the documents held out when the source has no validation split"},
    )
    max_seq_length: int = field(
        default=128, metadata={"help": "tokens in a training example; documents are joined and cut into these"}
    )
    vocab_size: int = field(
        default=2048, metadata={"help": "size of the byte-level BPE vocabulary trained on the corpus"}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "use only so many training blocks"})
    max_eval_samples: int | None = field(default=None, metadata={"help": "use only so many evaluation blocks"})
    cache_dir: str | None = field(
        default=None, metadata={"help": "folder for prepared data; hf_so2 in Hugging Face's cache by default"}
    )

    def __post_init__(self) -> None:
        if self.train_file is not None and self.dataset_name is not None:
            raise ConfigurationError("train_file", self.train_file, "must not be combined with dataset_name")
        if self.validation_file is not None and self.train_file is None:
            raise ConfigurationError("validation_file", self.validation_file, "needs train_file as well")
        if self.dataset_config_name is not None and self.dataset_name is None:
            raise ConfigurationError("dataset_config_name", self.dataset_config_name, "needs dataset_name as well")
        if not 0 < self.validation_split_percentage < 100:
            raise ConfigurationError(
                "validation_split_percentage", self.validation_split_percentage, "must lie between 1 and 99"
            )
        if self.max_seq_length < 2:
            raise ConfigurationError("max_seq_length", self.max_seq_length, "must be at least 2 tokens")
        for name in ("max_train_samples", "max_eval_samples"):
            limit = getattr(self, name)
            if limit is not None and limit < 1:
                raise ConfigurationError(name, limit, "must be at least 1, or left out for all")

    @property
    def source(self) -> str:
        """Where the documents come from, for messages."""
        return self.dataset_name or self.train_file or "the Python standard library"


def load_documents(arguments: DataArguments) -> tuple[Dataset, Dataset]:
    """Documents for training and for evaluation, each with the single column ``text``.

    Raises:
        ConfigurationError: a file or data set does not exist or cannot be read, the text column is missing,
            or there is no text in it.
    """
    evaluation: Dataset | None = None
    if arguments.dataset_name is not None:
        train, evaluation = _load_from_hub(arguments)
    elif arguments.train_file is not None:
        train = _load_files("train_file", arguments.train_file, arguments)
        if arguments.validation_file is not None:
            evaluation = _load_files("validation_file", arguments.validation_file, arguments)
    else:
        train = Dataset.from_dict({"text": list(standard_library_sources())})
    return (train, evaluation) if evaluation is not None else split_documents(train, arguments)


def standard_library_sources() -> Iterator[str]:
    """The sources of the running Python's standard library without its tests, in the order of their paths."""
    root = Path(sysconfig.get_path("stdlib"))
    relative = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    chosen = [name for name in relative if SKIPPED_FOLDERS.isdisjoint(name.split("/"))]
    if not chosen:
        raise ConfigurationError(
            "train_file", None, f"must be given, since this Python keeps no sources of its library in {root}"
        )
    for name in chosen:
        yield (root / name).read_text(encoding="utf-8", errors="replace")


def split_documents(documents: Dataset, arguments: DataArguments) -> tuple[Dataset, Dataset]:
    """Holds out ``validation_split_percentage`` of the documents (at least one), always the same ones.

    A document, which is a file in the embedded corpus and in text files, is never divided, so that no
    evaluation text continues a training text. Only a corpus of a single document is cut, at a line break near
    its end.

    Raises:
        ConfigurationError: there is only one document, of a single line.
    """
    fraction = arguments.validation_split_percentage / 100
    if len(documents) > 1:
        held_out = max(1, round(len(documents) * fraction))
        parts = documents.train_test_split(test_size=min(held_out, len(documents) - 1), seed=SPLIT_SEED)
        return parts["train"], parts["test"]
    lines = documents[0]["text"].splitlines(keepends=True)
    if len(lines) < 2:
        raise ConfigurationError(
            "validation_file",
            None,
            f"must be given, since {arguments.source} holds nothing that could be held out",
        )
    cut = len(lines) - max(1, round(len(lines) * fraction))
    before, after = "".join(lines[:cut]), "".join(lines[cut:])
    return Dataset.from_dict({"text": [before]}), Dataset.from_dict({"text": [after]})


def _load_files(name: str, pattern: str, arguments: DataArguments) -> Dataset:
    """Loads the files that match ``pattern``; a text file is one document, a JSON or Parquet row is one."""
    path = Path(pattern).expanduser()
    candidates = [path] if path.exists() else [Path(match) for match in sorted(glob.glob(str(path)))]
    paths = [candidate for candidate in candidates if candidate.is_file()]
    if not paths:
        raise ConfigurationError(name, pattern, "must be an existing file, or a pattern that matches some")
    extensions = {path.suffix.lower() for path in paths}
    loaders = {LOADERS.get(extension) for extension in extensions}
    if None in loaders or len(loaders) > 1:
        raise ConfigurationError(name, pattern, f"must end in one of {', '.join(LOADERS)}, all files of one kind")
    filled = [path for path in paths if path.stat().st_size]
    if not filled:
        raise ConfigurationError(name, pattern, "must not be empty")
    (loader,) = loaders
    options: dict[str, Any] = {"sample_by": "document"} if loader == "text" else {}
    try:
        documents = load_dataset(
            loader,
            data_files={"train": [str(path.resolve()) for path in filled]},
            split="train",
            cache_dir=_datasets_cache(arguments),
            **options,
        )
    except DAMAGE as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise ConfigurationError(name, pattern, f"cannot be read as {loader}: {reason}") from error
    return _text_only(documents, "text" if loader == "text" else arguments.text_column, name, pattern)


def _load_from_hub(arguments: DataArguments) -> tuple[Dataset, Dataset | None]:
    """The train split and, where there is one, the validation split."""
    name = arguments.dataset_name
    try:
        splits = load_dataset(name, arguments.dataset_config_name, cache_dir=_datasets_cache(arguments))
    except (DatasetNotFoundError, OfflineModeIsEnabled, ConnectionError, FileNotFoundError) as error:
        raise ConfigurationError("dataset_name", name, f"cannot be loaded: {str(error).splitlines()[0]}") from error
    except ValueError as error:  # datasets' answer to a configuration that is unknown or was left out
        raise ConfigurationError(
            "dataset_config_name", arguments.dataset_config_name, " ".join(str(error).split())
        ) from error
    if "train" not in splits:
        raise ConfigurationError("dataset_name", name, f"must have a train split, but has only {sorted(splits)}")
    column = arguments.text_column
    train = _text_only(splits["train"], column, "dataset_name", name)
    if "validation" not in splits:
        return train, None
    return train, _text_only(splits["validation"], column, "dataset_name", name)


def _datasets_cache(arguments: DataArguments) -> str | None:
    return None if arguments.cache_dir is None else str(cache_directory(arguments.cache_dir) / "datasets")


def _text_only(documents: Dataset, column: str, source_field: str, source: str | None) -> Dataset:
    """Renames ``column`` to ``text``, drops the others and refuses a data set without any text."""
    if len(documents) == 0:
        raise ConfigurationError(source_field, source, "must not be empty")
    if column not in documents.column_names:
        raise ConfigurationError("text_column", column, f"must be one of the columns {documents.column_names}")
    documents = documents.select_columns([column])
    if column != "text":
        documents = documents.rename_column(column, "text")
    kind = getattr(documents.features["text"], "dtype", None)
    if kind not in ("string", "large_string", "null"):
        raise ConfigurationError("text_column", column, f"must hold strings, not {kind}")
    try:
        for column_of_table in documents.data.columns:
            column_of_table.validate(full=True)  # Parquet's strings can be anything; reading them would fail later
    except ValueError as error:
        raise ConfigurationError(source_field, source, f"must hold UTF-8: {' '.join(str(error).split())}") from None
    if not any(text and not text.isspace() for text in documents["text"]):
        raise ConfigurationError(source_field, source, "must hold some text")
    return documents
