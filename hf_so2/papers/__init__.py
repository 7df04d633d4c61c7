"""The claims of the papers that the methods come from, put to the test on small networks: `hf-so2 papers`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hf_so2.papers.report import Experiment


def experiments() -> dict[str, Experiment]:
    """Every experiment by its name on the command line."""
    from hf_so2.papers.foof import foof
    from hf_so2.papers.mup import mup_transfer
    from hf_so2.papers.tekfac import tekfac

    return {"mup-transfer": mup_transfer, "foof": foof, "tekfac": tekfac}
