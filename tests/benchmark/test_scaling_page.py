"""docs/scaling.md is what its script prints."""

from __future__ import annotations

import runpy
from pathlib import Path


def test_the_page_is_up_to_date() -> None:
    root = Path(__file__).parents[2]
    page = runpy.run_path(str(root / "scripts" / "scaling.py"))["page"]()
    assert (root / "docs" / "scaling.md").read_text("utf-8") == page + "\n", (
        "python scripts/scaling.py > docs/scaling.md"
    )
