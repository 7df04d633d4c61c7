"""TEKFAC (arXiv 2011.13609) with TKFAC (2011.10741) and EKFAC (1806.03884): nearer to the Fisher, and faster?

Two parts. The first trains a small network and measures at several times how far each approximation is from the dense
Fisher block of every layer. The second trains an MLP and a small ViT with each method, all tuned with the same number
of trials, and compares losses after the same number of steps and after the same time.
"""

from __future__ import annotations

from hf_so2.papers.report import Findings
from hf_so2.papers.tekfac import errors
from hf_so2.papers.tekfac.figure import draw
from hf_so2.papers.tekfac.race import GROUNDS, claims_of
from hf_so2.papers.workers import each


def tekfac(workers: int) -> Findings:
    """All claims of the three papers."""
    measured = each(errors.measure, errors.SEEDS, workers)
    races = {ground.name: ground.contest().hold(workers) for ground in GROUNDS}
    tables = {
        "errors": measured,
        "relations": errors.relations(measured),
        "races": {name: race.tables for name, race in races.items()},
    }
    of_races = [claim for ground in GROUNDS for claim in claims_of(ground, races[ground.name])]
    return Findings((*errors.claims_of(measured), *of_races), tables, lambda path: draw(measured, races, path))
