"""What the documentation says can be done: its snippets run, its commands are taken, its links and tests exist."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from shared.helpers import llama, token_rows
from shared.trl_trainers import completions, tokenizer
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import hf_so2
from hf_so2 import commands
from hf_so2.methods import table

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
SLUG = re.compile(r"[^\w\- ]")
# What .ci/run and the user's shell do; nothing of ours reads these lines.
TOOLS = {"pip", "pytest", "ruff", "mypy", "mkdocs"}


@dataclass(frozen=True)
class Snippet:
    page: Path
    line: int
    language: str
    text: str

    @property
    def name(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def snippets(page: Path) -> Iterator[Snippet]:
    for found in re.finditer(r"^```(\w*)\n(.*?)^```$", page.read_text("utf-8"), re.MULTILINE | re.DOTALL):
        line = page.read_text("utf-8")[: found.start()].count("\n") + 1
        yield Snippet(page, line, found[1], textwrap.dedent(found[2]))


SNIPPETS = [snippet for page in PAGES for snippet in snippets(page)]


def shell_lines() -> Iterator[tuple[str, list[str]]]:
    """(where, words) of every command, also of those that are joined by &&; without comments and redirections."""
    for snippet in SNIPPETS:
        if snippet.language != "bash" and not snippet.text.startswith("python "):
            continue
        for line in snippet.text.replace("\\\n", " ").splitlines():
            words: list[str] = []
            for word in [*shlex.split(line, comments=True), "&&"]:
                if word != "&&":
                    words.append(word)
                    continue
                if words:
                    yield snippet.name, words[: words.index(">")] if ">" in words else words
                words = []


def command_of(words: list[str]) -> list[str] | None:
    """A command line as arguments of `hf-so2`; None for other programs."""
    if words[:2] == ["accelerate", "launch"]:
        words = ["python", *words[2:]]
        while words[1].startswith("--"):
            del words[1:3]
    if words[0] == "hf-so2":
        return words[1:]
    if words[:3] == ["python", "-m", "hf_so2"]:
        return words[3:]
    if words[0] == "python" and words[1].startswith("scripts/"):
        return [Path(words[1]).stem.replace("_", "-"), *words[2:]]
    return None


COMMANDS = [(where, words) for where, words in shell_lines() if command_of(words) is not None]
OTHERS = [(where, words) for where, words in shell_lines() if command_of(words) is None]


@pytest.mark.parametrize(("where", "words"), COMMANDS, ids=[f"{w}-{i}" for i, (w, _) in enumerate(COMMANDS)])
def test_a_command_takes_the_flags_that_a_page_gives_it(
    where: str, words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One more flag, which no command knows, is all that each complains about."""
    arguments = command_of(words) or []
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["hf-so2", *arguments, "--no_such_flag"])
    monkeypatch.setattr(sys.modules["__main__"], "__doc__", None)
    if arguments == ["--help"]:
        monkeypatch.setattr(sys, "argv", ["hf-so2", *arguments])
    with pytest.raises(SystemExit) as ended:
        commands.main()
    if arguments == ["--help"]:
        assert not ended.value.code
        return
    assert ended.value.code == 2, where
    error = capsys.readouterr().err.strip()
    assert error.count("\n") == 0
    assert re.fullmatch(r"error: (unknown argument '|unrecognized arguments: )--no_such_flag.*", error), error


# What makes a command of the guide short; its own flags come before, and these win.
SHORT = {
    "train": "--max_steps 4 --logging_steps 1 --max_eval_samples 8 --use_cpu true --per_device_train_batch_size 2",
    "sweep": "--max_steps 4 --trials 2 --max_eval_samples 8 --use_cpu true",
    "coord-check": "--widths 64 128 --seeds 1 --steps 1 2 --use_cpu true",
}
GUIDE = [(where, words) for where, words in COMMANDS if where.startswith("docs/guide.md")]


@pytest.mark.slow
def test_the_guides_commands_run_in_order(tmp_path: Path) -> None:
    """In one folder, each on what those before have left; on a small corpus and for a few steps."""
    lines = [f"def f{index}(x):\n    return x * {index} + {index % 7}\n" for index in range(3000)]
    (tmp_path / "corpus.txt").write_text("\n".join(lines), "utf-8")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    for where, words in GUIDE:
        arguments = command_of(words) or []
        resumed = "--resume_from_checkpoint" in arguments
        more = shlex.split(SHORT.get(arguments[0], "")) + (["--max_steps", "6"] if resumed else [])
        if arguments[0] in ("train", "sweep") and "--recipe" not in arguments:
            more += ["--train_file", "corpus.txt", "--vocab_size", "300", "--cache_dir", "cache"]
        done = subprocess.run(
            [sys.executable, "-m", "hf_so2", *arguments, *more],
            cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=400, check=False
        )  # fmt: skip
        # A sweep and a check say 1 where so few steps do not show what they look for.
        allowed = {0, 1} if arguments[0] in ("sweep", "coord-check") else {0}
        assert done.returncode in allowed, (where, words, done.stderr)
        assert "Traceback" not in done.stderr, done.stderr
    for name in ("out/quickstart/README.md", "out/sweep/report.html", "out/wide/curvature.png"):
        assert (tmp_path / name).is_file()
    assert "| recipe | recipe out/sweep/recipe.yaml" in (tmp_path / "out/wide/README.md").read_text("utf-8")


def test_other_programs_are_files_of_ours_or_tools() -> None:
    assert OTHERS
    for where, words in OTHERS:
        program = words[1] if words[0] == "python" else words[0]
        assert program in TOOLS or (ROOT / program).is_file(), (where, words)


class Loss:
    """Computed when it is differentiated, as the page has it behind the optimizer."""

    def __init__(self, model: Any, batch: Any) -> None:
        self.model, self.batch = model, batch

    def backward(self) -> None:
        self.model(**self.batch).loss.backward()


def names(folder: Path) -> dict[str, Any]:
    """What a reader of a page has at hand: a small model of width 64, saved with its tokenizer, and data."""
    llama(64).save_pretrained(folder / "checkpoint")
    tokenizer().save_pretrained(folder / "checkpoint")
    rows = token_rows(8)
    loader = [{name: torch.stack([row[name] for row in rows]) for name in ("input_ids", "labels")}] * 2
    model = AutoModelForCausalLM.from_pretrained(folder / "checkpoint")
    return {
        "hf_so2": hf_so2,
        "torch": torch,
        "AutoModelForCausalLM": AutoModelForCausalLM,
        "model": model,
        "tokenizer": tokenizer(),
        "train": rows,
        "data": completions(16),
        "loader": loader,
        "loss": Loss(model, loader[0]),
        "small_config": llama(32).config,
        "base_config": llama(64, num_hidden_layers=1).config,
    }


PYTHON = [snippet for snippet in SNIPPETS if snippet.language == "python"]


@pytest.mark.parametrize(
    "snippet",
    [
        pytest.param(snippet, id=snippet.name, marks=[pytest.mark.slow] if "coordinate_check" in snippet.text else [])
        for snippet in PYTHON
    ],
)
def test_a_snippet_runs(snippet: Snippet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CI", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    known = names(tmp_path)
    text = snippet.text.replace("widths=[64, 128, 256, 512]", "widths=[64, 128]")  # a minute less
    if "trl" in text:
        known |= {"trl": pytest.importorskip("trl", reason="needs trl"), "train": known["data"]}
        text = text.replace('output_dir="out"', 'output_dir="out", use_cpu=True, bf16=False')  # as docs/trl.md says
    if "import hf_so2, peft" in text:
        pytest.importorskip("peft", reason="needs peft")
    if "Accelerator" in text:
        from accelerate import Accelerator

        tokens = torch.stack([row["input_ids"] for row in known["train"]])
        known |= {"Accelerator": Accelerator, "loader": DataLoader(tokens, batch_size=2)}
    if "apply_mup" in text:
        known["model"] = LlamaForCausalLM(hf_so2.scale_width(known["base_config"], width=128))
    before = {name: p.detach().clone() for name, p in known["model"].named_parameters()}
    exec(compile(text, snippet.name, "exec"), known)
    if "trainer = " in text and ".train()" not in text:
        known["trainer"].train()
    trained = SimpleNamespace(**known).model
    # Adapters are put into the model itself; those on the output side begin at zero.
    after = {name.replace(".base_layer", ""): p for name, p in trained.named_parameters() if "lora_A" not in name}
    assert any(not torch.equal(p, before.get(name, torch.zeros_like(p))) for name, p in after.items())


def test_the_method_of_the_page_on_adding_one_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    """The file and the row as they are printed, put where they belong."""
    file, row = (snippet.text for snippet in snippets(ROOT / "docs" / "add_method.md") if snippet.language == "py")
    module = ModuleType("hf_so2.curvature.row_scaling")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(file, "row_scaling.py", "exec"), vars(module))
    method = eval(row, vars(table) | {"RowScaling": module.RowScaling})
    monkeypatch.setitem(table.METHODS, method.name, method)
    monkeypatch.setattr(table, "OPTIMIZERS", (*table.OPTIMIZERS, method.name, f"{method.name}_mup"))
    model, row_of = llama(64), token_rows(4)
    batch = {name: torch.stack([row[name] for row in row_of]) for name in ("input_ids", "labels")}
    optimizer = hf_so2.build_optimizer("row_scaling_mup", model, base_config=llama(32).config)
    losses = []
    for _ in range(8):
        losses.append(model(**batch).loss)
        losses[-1].backward()
        gradient = model.model.layers[0].mlp.up_proj.weight.grad.double()
        optimizer.step()
        optimizer.zero_grad()
        if len(losses) == 1:
            state = optimizer.curvature.layers["model.layers.0.mlp.up_proj.weight"].state
            expected = gradient / gradient.square().mean(1, keepdim=True).sqrt()
            torch.testing.assert_close((state["scale"] * gradient).double(), expected, rtol=1e-5, atol=0)
    assert losses[-1] < 0.8 * losses[0]


def headings(page: Path) -> set[str]:
    """The anchors of a page, as both GitHub and mkdocs make them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {SLUG.sub("", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_links_of_a_page_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://|mailto:", target):
            continue
        name, _, anchor = target.partition("#")
        linked = (page.parent / name).resolve() if name else page
        assert linked.exists(), target
        assert not anchor or anchor in headings(linked), target


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_no_heading_begins_with_a_digit(page: Path) -> None:
    """The site's script looks anchors up as CSS selectors; it would fail and leave tables and menus without style."""
    if page.is_relative_to(ROOT / "docs"):
        assert [anchor for anchor in headings(page) if anchor[:1].isdigit()] == []


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_files_that_a_page_names_exist(page: Path) -> None:
    for name in re.findall(
        r"`((?:docs|tests|scripts|examples|configs|hf_so2)/[\w./-]+\.\w+)`", page.read_text("utf-8")
    ):
        assert (ROOT / name).exists(), name


def features() -> list[list[str]]:
    page = (ROOT / "docs" / "features.md").read_text("utf-8")
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ")]
    assert rows[0] == ["feature", "seen", "test"]
    return rows[1:]


def test_every_feature_has_its_tests() -> None:
    rows = features()
    assert len(rows) >= 24
    assert len({row[0] for row in rows}) == len(rows)
    for row in rows:
        assert len(row) == 3, row
        tests = re.findall(r"`([^`]+\.py)`", row[2])
        assert tests, row
        assert re.sub(r"`[^`]+`|, ", "", row[2]) == "", row
        for name in tests:
            path = ROOT / name if "/" in name else ROOT / "tests" / "training" / name
            assert path.is_file(), row
            assert "\ndef test_" in path.read_text("utf-8"), row


def test_every_flag_of_the_features_test_is_a_row() -> None:
    """A flag is named by its own name or by one of these words of its row."""
    words = {
        "train_sampling_strategy": "grouping by length",
        "dataloader_num_workers": "workers",
        "dataloader_drop_last": "last batch",
        "neftune_noise_alpha": "NEFTune",
        "lr_scheduler_kwargs": "schedules",
        "include_num_input_tokens_seen": "input tokens",
        "load_best_model_at_end": "best model",
        "torch_compile": "torch_compile",
        "label_smoothing_factor": "label smoothing",
    }
    path = ROOT / "tests" / "training" / "test_features.py"
    spec = importlib.util.spec_from_file_location("features_under_test", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (mark,) = (mark for mark in module.test_the_flag_works.pytestmark if mark.name == "parametrize")
    flags = {name for changes in mark.args[1] for name in changes}
    shown = " ".join(row[0] for row in features())
    assert words.keys() <= flags
    for flag, word in words.items():
        assert word in shown, flag
