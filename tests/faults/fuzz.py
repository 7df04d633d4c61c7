"""Inputs that nobody would type, drawn from seeds: each is read, or refused in one line that says what is allowed."""

from __future__ import annotations

import collections
import contextlib
import json
import random
import shutil
import sqlite3
from collections.abc import Callable
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import datasets
from fuzz_data import changed, data_cache, data_file, reads
from transformers import PreTrainedTokenizerFast

import hf_so2
from hf_so2 import cli
from hf_so2.data import DataArguments
from hf_so2.models import ModelArguments, build_config, build_model_and_config
from hf_so2.training.arguments import SecondOrderTrainingArguments
from hf_so2.transfer.grid import GridStore
from hf_so2.transfer.space import parse_grid, parse_ranges
from hf_so2.transfer.store import SweepStore

TYPES = (ModelArguments, DataArguments, SecondOrderTrainingArguments)

VALUES = [
    *(
        "",
        " ",
        "0",
        "1",
        "-1",
        "3",
        "64",
        "1e-3",
        "-0.5",
        "0.5",
        "1e400",
        "nan",
        "inf",
        "1e-400",
        "99999999999999999999",
    ),
    *(
        "true",
        "no",
        "None",
        "null",
        "[]",
        "{}",
        "{",
        "[1]",
        '{"a": 1}',
        '{"a": {"b": []}}',
        "a=b",
        "a=",
        "=",
        ",",
        "a,b",
    ),
    *(
        "kfac_mup",
        "kfac",
        "adamw_torch",
        "sgd",
        "spectral",
        "steps",
        "epoch",
        "linear",
        "llama",
        "gpt2",
        "cosine",
        "empirical",
    ),
    *("é", "\u0000", "'", '"', "../..", "/dev/null", "$(touch made)", "!!python/name:os.system", "%s", "--", "x" * 300),
    *(
        "(",
        "[",
        "damping=1",
        "damping=x",
        "momentum=0.5,",
        "q_proj=0.1",
        "(=1",
        "q_proj=trace:0.1",
        "q_proj=x:1",
        "1:2",
    ),
]
LIKELY = ["1", "2", "0.5", "true", "1e-3"]
# What a run would do with these is not asked here: they reach for other machines or programs, or make folders.
NOT_DRAWN = {"push_to_hub", "hub_token", "deepspeed", "fsdp", "fsdp_config", "trackio_space_id", "torch_compile"}


@cache
def field_names() -> list[str]:
    return sorted({entry.name for kind in TYPES for entry in fields(kind) if entry.init} - NOT_DRAWN)


def flags(chance: random.Random, folder: Path) -> bool:
    """Some flags of the training script, and the settings that follow from them."""
    given = [f"--output_dir={folder}", "--use_cpu=true", "--model_type=llama", "--report_to=none"]
    for _ in range(chance.randrange(1, 4)):
        name, value = chance.choice(field_names()), chance.choice(chance.choice([VALUES, LIKELY]))
        given += [f"--{name}={value}"] if chance.random() < 0.7 else [f"--{name}", value]

    def read() -> None:
        *_, training = cli.parse(TYPES, given)
        if training.is_ours(training.optim):
            training.optimizer_settings()

    return reads(read)


def settings_file(chance: random.Random, folder: Path) -> bool:
    """The same in a file, with values of other types."""
    content: dict[Any, Any] = {"output_dir": str(folder), "use_cpu": True, "model_type": "llama", "report_to": "none"}
    for _ in range(chance.randrange(1, 4)):
        likely = chance.random() < 0.5
        content[chance.choice(field_names())] = chance.choice([1, 2, 0.5, True]) if likely else value_of_json(chance, 2)
    path = folder / "settings.json"
    path.write_text(json.dumps(content))
    return reads(lambda: cli.parse(TYPES, [str(path)]))


def value_of_json(chance: random.Random, depth: int) -> Any:
    kind = chance.randrange(8 if depth else 6)
    if kind == 6:
        return [value_of_json(chance, depth - 1) for _ in range(chance.randrange(3))]
    if kind == 7:
        return {chance.choice(VALUES): value_of_json(chance, depth - 1) for _ in range(chance.randrange(3))}
    return [
        None,
        True,
        False,
        chance.choice([0, -1, 1, 7, 10**30]),
        chance.choice([0.5, -1e300]),
        chance.choice(VALUES),
    ][kind]


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    from hf_so2.data.tokenizer import corpus_tokenizer

    return corpus_tokenizer(datasets.Dataset.from_dict({"text": ["a b c"]}), 300)


FAMILIES = ["llama", "gpt2", "opt", "gpt_neox", "qwen2", "mistral", "mixtral", "gemma", "phi", "bloom"]
SIZES = [0, 1, 2, 3, 8, 16, 64, -1, -8, 2.5, True, None, "x", "16", [8], {"a": 1}, [], ""]
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


@cache
def config_names(family: str) -> list[str]:
    from transformers import AutoConfig

    config = AutoConfig.for_model(family)
    return sorted(set(config.to_dict()) | set(config.attribute_map))


def model(chance: random.Random, folder: Path) -> bool:
    """Config overrides of a model from scratch, and its width."""
    family = chance.choice(VALUES) if chance.random() < 0.05 else chance.choice(FAMILIES)
    names = config_names(family) if family in FAMILIES else ["hidden_size"]
    overrides: Any = dict(SMALL) if family in FAMILIES and chance.random() < 0.7 else {}
    for _ in range(chance.randrange(1, 4)):
        # A name that nobody knows is refused at once.
        field = chance.choice(VALUES) if chance.random() < 0.05 else chance.choice([*names, *SMALL])
        overrides[field] = chance.choice([*SIZES, chance.choice(VALUES)])
    how = chance.randrange(6)
    if how == 0:
        overrides = json.dumps(overrides)
    elif how == 1:
        overrides = ",".join(f"{name}={value}" for name, value in overrides.items())
    elif how == 2 and chance.random() < 0.2:
        overrides = chance.choice(VALUES)
    width = chance.choice([None, None, None, 0, -1, 1, 7, 32, 64])

    def read() -> None:
        arguments = ModelArguments(model_type=family, config_overrides=overrides, width=width)
        config = build_config(arguments, tokenizer())
        if _is_small(config):
            build_model_and_config(arguments, tokenizer(), seed=0)

    return reads(read)


def _is_small(config: Any) -> bool:
    """Nobody wants to wait for the models of all defaults, nor for what they take to be made."""
    numbers = [value for value in config.to_dict().values() if isinstance(value, int) and not isinstance(value, bool)]
    layers = getattr(config, "num_hidden_layers", None)
    return (
        max(numbers, default=0) < 200_000
        and layers in (0, 1)
        and getattr(config, "hidden_size", 99) in (1, 2, 8, 16, 32)
    )


def optimizer(chance: random.Random, folder: Path) -> bool:
    """Settings of an optimizer in one string, axes of a grid and of a search, and μP's base."""
    names = [*hf_so2.methods.settings.SETTING_NAMES, "learning_rate", "x"]
    how = chance.randrange(4)
    texts = [
        f"{chance.choice(names)}{chance.choice(['=', '=', '=', '', ':'])}{chance.choice(VALUES)}" for _ in range(2)
    ]
    if how == 1:
        return reads(lambda: parse_grid(texts))
    if how == 2:
        return reads(lambda: parse_ranges([text.replace(",", ":") for text in texts]))
    base = value_of_json(chance, 2) if how == 3 else None
    name = chance.choice(list(hf_so2.OPTIMIZERS))

    def read() -> None:
        text = None if how == 3 else ",".join(texts)
        args = SecondOrderTrainingArguments(
            output_dir=str(folder), optim=name, use_cpu=True, report_to="none", optim_args=text, mup_base_config=base
        )
        args.optimizer_settings()
        if how == 3:
            args.base_config(build_config(ModelArguments(model_type="llama", config_overrides=SMALL), tokenizer()))

    return reads(read)


def sweep_store(chance: random.Random, folder: Path) -> bool:
    """One value of the sweep's data base is another one."""
    path = folder / "sweep.db"
    shutil.copy(made_store(), path)
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        filled = [name for name in tables if connection.execute(f"SELECT COUNT(*) FROM {name}").fetchone()[0]]
        table = chance.choice(filled)
        columns = [row[1] for row in connection.execute(f"PRAGMA table_info({table})")]
        rows = [row[0] for row in connection.execute(f"SELECT rowid FROM {table}")]
        change = chance.choice(
            [None, -1, 0, 2, 10**12, 0.5, "", "x", "{", "[]", "null", '{"a": 1}', "[1, 2]", b"\x80\x04N."]
        )
        with contextlib.suppress(sqlite3.IntegrityError):
            statement = f"UPDATE {table} SET {chance.choice(columns)} = ? WHERE rowid = ?"
            connection.execute(statement, (change, chance.choice(rows)))
    return reads(lambda: use_store(folder))


@cache
def made_store() -> Path:
    import tempfile

    folder = Path(tempfile.mkdtemp())
    store = SweepStore(folder)
    try:
        store.open("kfac", 64, {"max_steps": 3})
        store.queue("kfac", 64, [({"learning_rate": 0.1}, 0), ({"learning_rate": 0.2}, 0), (None, 1)])
        study = store.studies["kfac", 64]
        for value in (3.0, 2.0):
            trial = study.ask()
            trial.suggest_float("learning_rate", 0.01, 1.0, log=True)
            study.tell(trial, value)
    finally:
        store.close()
    return folder / "sweep.db"


def use_store(folder: Path) -> None:
    store = SweepStore(folder)
    try:
        store.open("kfac", 64, {"max_steps": 3})
        store.queue("kfac", 64, [({"learning_rate": 0.1}, 0), ({"learning_rate": 0.4}, 0)])
        store.waiting("kfac", 64)
        store.trials("kfac", 64)
    finally:
        store.close()


def grid_store(chance: random.Random, folder: Path) -> bool:
    path = folder / "runs.jsonl"
    whole = json.dumps({"settings": "a.yaml", "flags": {"lr": "1"}, "metrics": {"eval_loss": 2.0}})
    path.write_bytes(changed(f"{whole}\n{whole}\n".encode(), chance))
    return reads(lambda: GridStore(path).find("a.yaml", {"lr": "1"}))


TARGETS: dict[str, Callable[[random.Random, Path], bool]] = {
    target.__name__: target
    for target in (flags, settings_file, model, optimizer, sweep_store, grid_store, data_file, data_cache)
}


def fuzz(name: str, seeds: range, folder: Path) -> collections.Counter[str]:
    outcomes: collections.Counter[str] = collections.Counter()
    for seed in seeds:
        (place := folder / f"{name}-{seed}").mkdir()
        outcomes["read" if TARGETS[name](random.Random(f"{name} {seed}"), place) else "refused"] += 1
        shutil.rmtree(place)
    return outcomes
