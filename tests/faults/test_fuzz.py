"""Thousands of odd flags, settings, configs, stores, data files and caches: read, or refused in one line."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.constants
import pyarrow
import pyarrow.parquet
import pytest
import yaml

import hf_so2
from hf_so2 import cli
from hf_so2.models import ModelArguments, build_config
from hf_so2.transfer.grid import GridStore

sys.path.insert(0, str(Path(__file__).parent))
import fuzz
from fuzz_data import data_files, load, reads

FEW = 4
MANY = {
    "flags": 3000,
    "settings_file": 2500,
    "model": 2500,
    "optimizer": 1500,
    "sweep_store": 600,
    "grid_store": 600,
    "data_file": 800,
    "data_cache": 500,
}


@pytest.fixture(autouse=True)
def _quiet_and_alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A name that is no folder is otherwise looked for on other machines."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    logging.disable(logging.CRITICAL)
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("target", fuzz.TARGETS)
def test_a_few_odd_inputs(target: str, tmp_path: Path) -> None:
    fuzz.fuzz(target, range(FEW), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("target", fuzz.TARGETS)
def test_many_odd_inputs(target: str, tmp_path: Path) -> None:
    outcomes = fuzz.fuzz(target, range(MANY[target]), tmp_path)
    print(f"\n{target}: {outcomes.total()} inputs, {dict(outcomes)}")
    assert outcomes["read"]
    assert not Path("made").exists()


# What the many have found, one by one.


def test_a_damaged_cache_of_blocks_or_of_the_tokenizer_is_made_anew(tmp_path: Path) -> None:
    """One flipped bit of either would train on other tokens, without a word."""
    path, cache = tmp_path / "train.jsonl", tmp_path / "cache"
    path.write_bytes(data_files()["jsonl"])
    before = load(path, cache)
    for kind, ending in (("packed", "arrow"), ("tokenizers", "json")):
        for file in (cache / kind).glob(f"*.{ending}"):
            whole = file.read_bytes()
            file.write_bytes(whole[:-20] + bytes([whole[-20] ^ 4]) + whole[-19:])
            assert load(path, cache) == before
            assert file.read_bytes() == whole


@pytest.mark.parametrize("ending", ["txt", "jsonl", "parquet"])
def test_a_file_that_is_not_what_its_name_says_is_refused(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"train.{ending}"
    path.write_bytes(b"\xff\xfe{]PAR1" * 50)
    assert not reads(lambda: load(path, tmp_path / "cache"))


def test_parquet_whose_strings_are_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "train.parquet"
    texts = pyarrow.array([b"words of a text", b"words \xff of a text"]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path)
    with pytest.raises(hf_so2.ConfigurationError, match=r"train_file=.*UTF"):
        load(path, tmp_path / "cache")


def test_a_store_of_runs_that_holds_bytes_is_refused(tmp_path: Path) -> None:
    (tmp_path / "runs.jsonl").write_bytes(b"\xff\xff\n")
    with pytest.raises(hf_so2.ConfigurationError, match="line 1"):
        GridStore(tmp_path / "runs.jsonl")


ODD_CONFIGS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"rope_parameters": 8}),
    ("qwen2", {"layer_types": [8]}),
    ("llama", {"dtype": "x"}),
]


@pytest.mark.parametrize(("family", "overrides"), ODD_CONFIGS)
def test_a_config_that_a_family_has_not_thought_of_is_refused(family: str, overrides: dict[str, Any]) -> None:
    arguments = ModelArguments(model_type=family, config_overrides=overrides)
    assert not reads(lambda: build_config(arguments, fuzz.tokenizer()))


def test_a_flag_that_transformers_stumbles_over_is_named(tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(yaml.safe_dump({"output_dir": str(tmp_path), "model_type": "llama", "accelerator_config": "0.5"}))
    with pytest.raises(hf_so2.ConfigurationError, match=r"^accelerator_config='0.5': cannot be used: .*No such file"):
        cli.parse(fuzz.TYPES, [str(path)])
