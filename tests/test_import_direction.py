"""Arrows point one way: linalg ← damping ← curvature ← weights ← parallel ← engine ← methods ← optim ← training ←
scripts; leaves know none of them.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "hf_so2"

# What each part may import of the others. Every part may also import itself and the plain helpers.
HELPERS = {"errors", "files", "folders", "orientation", "spelling"}
LEAVES = {"layers", "mup", "distributed", "data", "metrics"}
BLOCKS = {"linalg", "damping", "curvature"}
STEP = {*BLOCKS, "layers", "distributed", "weights", "parallel", "engine"}
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "files": set(),
    "folders": set(),
    "spelling": set(),
    "orientation": set(),
    "natural_gradient": set(),
    "versions": set(),
    "linalg": set(),
    "damping": {"linalg"},
    "curvature": {"linalg", "damping"},
    "layers": set(),
    "mup": set(),
    "distributed": set(),
    "data": set(),
    "metrics": set(),
    "weights": {*BLOCKS, "layers", "distributed"},
    "parallel": {*BLOCKS, "layers", "distributed", "weights"},
    "engine": {*STEP, "mup"},
    "methods": {*BLOCKS, "layers", "mup", "engine"},
    "optim": {*STEP, "mup", "methods"},
    "training": {*LEAVES, "parallel", "engine", "methods", "optim"},
    # The command line's own parts: used by commands only.
    "cli": set(),
    "models": {"mup", "cli"},
    "benchmark": {*STEP, "methods", "optim"},
    "papers": {*BLOCKS, "data", "optim", "natural_gradient"},
    "transfer": {*LEAVES, "training", "methods", "optim", "cli", "models"},
    "commands": {
        *LEAVES,
        "weights",
        "training",
        "methods",
        "optim",
        "cli",
        "models",
        "transfer",
        "benchmark",
        "papers",
    },
    "__main__": {"commands"},
}


def part_of(path: Path) -> str:
    relative = path.relative_to(PACKAGE).with_suffix("").parts
    two_deep = ".".join(relative[:2])
    return two_deep if two_deep in ALLOWED else relative[0]


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name below hf_so2) of every import, those inside functions and relative ones included."""
    package = ("hf_so2", *path.relative_to(PACKAGE).parent.parts)
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            prefix = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*prefix, *([node.module] if node.module else [])])
            names = [f"{module}.{alias.name}" for alias in node.names]
        for name in names:
            if name == "hf_so2" or name.startswith("hf_so2."):
                yield node.lineno, name.removeprefix("hf_so2").lstrip(".")


def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def known_part(name: str) -> str:
    parts = name.split(".")
    two_deep = ".".join(parts[:2])
    return two_deep if two_deep in ALLOWED else parts[0]


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_arrow_points_back(path: Path) -> None:
    part = part_of(path)
    assert part in ALLOWED, f"{part} is new: say in this test what it may import"
    own = {part, part.split(".")[0]}
    back = [
        f"line {line} imports {name or 'hf_so2 itself'}"
        for line, name in imported(path)
        if not name or known_part(name) not in own | HELPERS | ALLOWED[part]
    ]
    assert not back, f"{part} may import {sorted(ALLOWED[part]) or 'nothing'}: {back}"


def test_the_allowed_arrows_have_no_cycle() -> None:
    """The table itself must point one way, or the test above proves nothing."""
    done: set[str] = set()
    remaining = dict(ALLOWED)
    while remaining:
        free = [part for part, needs in remaining.items() if needs - {part} <= done]
        assert free, f"a cycle among {sorted(remaining)}"
        done.update(free)
        for part in free:
            del remaining[part]


def test_no_file_imports_itself_by_way_of_others() -> None:
    """Imports for types count, too: a reader follows them."""
    files = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in modules()}
    arrows = {
        name: {part for _, line in imported(path) if (part := file_of(line, files))} for name, path in files.items()
    }
    while arrows:
        free = {name for name, needs in arrows.items() if not (needs & arrows.keys() - {name})}
        assert free, f"a circle among {sorted(arrows)}"
        arrows = {name: needs for name, needs in arrows.items() if name not in free}


def file_of(dotted: str, files: dict[str, Path]) -> str | None:
    """The file that a dotted name is in: itself, or what it is a name of."""
    parts = dotted.split(".")
    names = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
    found = (name + suffix for name in names for suffix in ("", ".__init__") if name + suffix in files)
    return next(found, None)


@pytest.mark.parametrize("path", [*modules(), PACKAGE / "__init__.py"], ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_file_is_longer_than_a_reader_takes_in(path: Path) -> None:
    assert len(path.read_text("utf-8").splitlines()) <= 300


def test_no_folder_is_a_heap() -> None:
    folders = {path.parent for path in modules()}
    counts = {
        folder: sum(path.stem not in ("__init__", "__main__") for path in folder.glob("*.py")) for folder in folders
    }
    assert {str(folder.relative_to(PACKAGE)): count for folder, count in counts.items() if count > 12} == {}


@pytest.mark.parametrize("part", ["linalg", "damping", "curvature"])
def test_curvature_knows_nothing_of_processes_trainer_or_models(part: str) -> None:
    """A block sees tensors and a damping value."""
    forbidden = ("transformers", "accelerate", "torch.distributed", "datasets")
    paths = [PACKAGE / f"{part}.py"] if part == "damping" else sorted((PACKAGE / part).glob("*.py"))
    assert paths
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [name for name in names if name.startswith(forbidden)], path


def test_collectives_are_in_one_file() -> None:
    """Only the communicator imports torch.distributed, beside what asks how tensors are sharded."""
    users = {
        str(path.relative_to(PACKAGE))
        for path in modules()
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if (isinstance(node, ast.Import) and any(a.name.startswith("torch.distributed") for a in node.names))
        or (isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch.distributed"))
    }
    assert users <= {"distributed/communicator.py", "distributed/shards.py", "cli.py"}
