"""Prints a page: every setting of the optimizers, and what each method makes of it when it is left out.

hf-so2 settings-table > settings.md
"""

from __future__ import annotations

from dataclasses import fields

from hf_so2 import cli
from hf_so2.methods.resolution import INSTEAD, parts_in_use
from hf_so2.methods.settings import Settings
from hf_so2.methods.table import METHODS

HEAD = """# Settings

Keywords of `hf_so2.build_optimizer`, fields of `hf_so2.SecondOrderTrainingArguments` and flags of every command, by the
same name (`lr` is `learning_rate` there). All of them are given at the base width; μP scales them from there. The K-FAC
family is `kfac`, `ekfac`, `tkfac`, `tekfac` and `foof`, the Shampoo family `shampoo`, `soap` and `kl_shampoo`; all of
these and `muon` have curvature. Where a default differs by method, the second table has it. A setting that the chosen
method would ignore is refused, and so is one that asks for what the model does not have. Printed by
`hf-so2 settings-table`.
"""


def shown(value: object) -> str:
    return "none" if value is None else f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def settings_rows() -> list[list[str]]:
    """Name, default, what needs it, meaning."""
    rows = [["setting", "default", "for", "meaning"]]
    for entry in fields(Settings):
        needs = INSTEAD.get(entry.metadata["needs"], "all")
        rows.append([f"`{entry.name}`", shown(entry.default), needs, entry.metadata["help"]])
    return rows


def method_rows() -> list[list[str]]:
    """Where a method's own defaults differ from those above."""
    own = [entry for entry in fields(Settings) if any(entry.name in m.defaults for m in METHODS.values())]
    rows = [["method", *(f"`{entry.name}`" for entry in own)]]
    for method in METHODS.values():
        resolved = method.settings({})
        parts = parts_in_use(method.uses, resolved) | {""}
        cells = [shown(getattr(resolved, e.name)) if e.metadata["needs"] in parts else "-" for e in own]
        rows.append([f"`{method.name}`", *cells])
    return rows


def table(rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def page() -> str:
    """The whole page."""
    return "\n".join([HEAD, table(settings_rows()), "", "## Defaults by method", "", table(method_rows())])


def main() -> None:
    """Prints the page."""
    cli.OneLineParser(description=__doc__, formatter_class=cli.AsWritten).parse_args()
    print(page())
