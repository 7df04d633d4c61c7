"""docs/scaling.md is what its command prints."""

from __future__ import annotations

from pathlib import Path

from hf_so2.commands.scaling import page


def test_the_page_is_up_to_date() -> None:
    root = Path(__file__).parents[2]
    assert (root / "docs" / "scaling.md").read_text("utf-8") == page() + "\n", "hf-so2 scaling > docs/scaling.md"
