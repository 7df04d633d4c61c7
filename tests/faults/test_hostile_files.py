"""Recipes, settings files, sweep stores and names that somebody made to do harm, or that a disk garbled."""

from __future__ import annotations

import ast
import random
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import hf_so2
from hf_so2 import cli
from hf_so2.data import DataArguments
from hf_so2.models import ModelArguments
from hf_so2.training.arguments import SecondOrderTrainingArguments
from hf_so2.transfer.recipe import Recipe, read_recipe, write_recipe
from hf_so2.transfer.reporting.report import SweepResult, write_report
from hf_so2.transfer.reporting.verdict import judge
from hf_so2.transfer.store import SweepStore
from hf_so2.transfer.trials import Trial

TYPES = (ModelArguments, DataArguments, SecondOrderTrainingArguments)
PACKAGE = Path(hf_so2.__file__).parent
RECIPE = Recipe(
    transfer={"confirmed": True, "verdict": "It transfers.", "losses": {64: 3.2, 128: 3.1}},
    optimizer={"optim": "kfac_mup", "learning_rate": 0.12, "damping": 1e-05},
    base={"mup_base_width": 64},
    model={"model_type": "llama", "config_overrides": {"hidden_size": 64}},
    data={"max_seq_length": 64, "vocab_size": 300},
    training={"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "seed": 3},
    source={"command": "python scripts/sweep.py"},
)
TAGS = ["!!python/object/apply:os.mkdir [{0}]", "!!python/object/new:os.mkdir [{0}]", "!!python/name:os.system"]


def one_line(error: BaseException) -> None:
    assert "\n" not in str(error).strip(), error


@pytest.mark.parametrize("tag", TAGS)
def test_a_python_tag_in_a_recipe_or_a_settings_file_is_never_run(tag: str, tmp_path: Path) -> None:
    made, path = tmp_path / "made", tmp_path / "recipe.yaml"
    path.write_text(f"recipe: {tag.format(made)}\n")
    for read in (lambda: read_recipe(str(path)), lambda: cli.parse(TYPES, [str(path)])):
        with pytest.raises(hf_so2.ConfigurationError, match="cannot be read") as caught:
            read()
        one_line(caught.value)
    assert not made.exists()


SCALARS = [None, True, -1, 0, 1e400, float("nan"), "", "x" * 50, 10**30, "\x00", "é"]
VALUES: list[Any] = [*SCALARS, [], [1], {}, {"a": [{}]}]


def garbled(text: str, chance: random.Random) -> bytes:
    """A recipe with a value, a key or a byte changed."""
    how = chance.randrange(3)
    if how == 0:
        content = bytearray(text.encode())
        for _ in range(chance.randrange(1, 4)):
            content[chance.randrange(len(content))] = chance.randrange(256)
        return bytes(content)
    content = yaml.safe_load(text)
    section = chance.choice([content, *(value for value in content.values() if isinstance(value, dict))])
    key = chance.choice(list(section))
    if how == 1:
        section[key] = chance.choice(VALUES)
    else:
        section[chance.choice([*SCALARS[:7], "unknown", 3.5])] = section.pop(key)
    return yaml.safe_dump(content).encode()


def read_garbled(count: int, path: Path, text: str, read: Any) -> None:
    refused, codes = 0, {2}
    for seed in range(count):
        path.write_bytes(garbled(text, random.Random(seed)))
        try:
            read()
        except hf_so2.ConfigurationError as error:
            one_line(error)
            refused += 1
        except SystemExit as error:  # what the parser answers, after one line
            refused += 1
            codes.add(error.code)
    print(f"\n{count} garbled files, {refused} refused, the others read")
    assert codes == {2}
    assert 0 < refused < count


def garbled_recipes(count: int, folder: Path) -> None:
    path = folder / "recipe.yaml"
    write_recipe(RECIPE, path)
    read_garbled(count, path, path.read_text(encoding="utf-8"), lambda: read_recipe(str(path)))


def garbled_settings(count: int, folder: Path) -> None:
    path = folder / "settings.yaml"
    settings = {"output_dir": str(folder), **RECIPE.optimizer, **RECIPE.base, **RECIPE.data, **RECIPE.training}
    text = yaml.safe_dump({**settings, "use_cpu": True, "model_type": "llama"})
    read_garbled(count, path, text, lambda: cli.parse(TYPES, [str(path)]))


def test_garbled_recipes_are_refused_in_one_line(tmp_path: Path) -> None:
    garbled_recipes(150, tmp_path)


def test_garbled_settings_are_refused_in_one_line(tmp_path: Path) -> None:
    garbled_settings(40, tmp_path)


@pytest.mark.slow
def test_many_garbled_recipes(tmp_path: Path) -> None:
    garbled_recipes(9000, tmp_path)


@pytest.mark.slow
def test_many_garbled_settings(tmp_path: Path) -> None:
    garbled_settings(1000, tmp_path)


def use_store(folder: Path) -> None:
    store = SweepStore(folder)
    try:
        store.open("kfac", 64, {"max_steps": 3})
        store.queue("kfac", 64, [({"learning_rate": 0.1}, 0)])
        store.waiting("kfac", 64)
        store.trials("kfac", 64)
    finally:
        store.close()


def damaged_stores(count: int, folder: Path) -> None:
    use_store(folder)
    path = folder / "sweep.db"
    whole = path.read_bytes()
    refused = 0
    for seed in range(count):
        chance = random.Random(seed)
        if seed % 2:
            content = bytearray(whole)
            start = chance.randrange(len(whole) - 200)
            content[start : start + 200] = chance.randbytes(200)
        else:
            content = bytearray(whole[: chance.randrange(1, len(whole))])
        path.write_bytes(content)
        try:
            use_store(folder)
        except hf_so2.ConfigurationError as error:
            one_line(error)
            refused += 1
    print(f"\n{count} damaged sweep stores, {refused} refused, in the others nothing that is read was hit")
    assert refused


def test_a_damaged_sweep_store_is_refused_in_one_line(tmp_path: Path) -> None:
    damaged_stores(12, tmp_path)


@pytest.mark.slow
def test_many_damaged_sweep_stores(tmp_path: Path) -> None:
    damaged_stores(200, tmp_path)


def test_the_report_escapes_every_string(tmp_path: Path) -> None:
    evil = "<script>alert('x')</script>"
    trials = [Trial(evil, width, {"learning_rate": rate}, 0, 3.0) for width in (32, 64) for rate in (0.1, 0.2, 0.4)]
    result = SweepResult(trials, judge(trials, [32, 64]), sampled=False)
    source = {"command": evil, "date": evil, "versions": {evil: evil}}
    write_report({evil: result}, tmp_path, source=source, recipe=evil, check=None)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 5


def calls(tree: ast.AST, name: str) -> list[ast.Call]:
    """Calls of a function or method of this name."""
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [node for node in found if name == getattr(node.func, "attr", getattr(node.func, "id", None))]


def test_the_package_has_no_way_to_run_what_it_loads() -> None:
    """Nothing unpickles, evaluates or executes; torch loads weights only, YAML is safe, nothing trusts remote code."""
    for path in sorted([*PACKAGE.rglob("*.py"), *(PACKAGE.parent / "scripts").glob("*.py")]):
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
        for node in calls(tree, "load"):
            owner = getattr(getattr(node.func, "value", None), "id", "")
            assert owner not in ("pickle", "yaml", "marshal", "dill", "joblib"), (path, node.lineno)
            if owner == "torch":
                given = {keyword.arg: keyword.value for keyword in node.keywords}
                assert ast.literal_eval(given["weights_only"]) is True, (path, node.lineno)
        for name in ("loads", "unsafe_load", "full_load"):
            for node in calls(tree, name):
                assert getattr(getattr(node.func, "value", None), "id", "") == "json", (path, node.lineno)
        for node in [*calls(tree, "exec"), *calls(tree, "eval")]:
            assert not isinstance(node.func, ast.Name), (path, node.lineno)  # `model.eval()` is another one
        assert not re.search(r"trust_remote_code\s*=\s*True|autoescape\s*=\s*False|mktemp\(|0o777", text), path
