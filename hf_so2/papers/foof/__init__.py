"""Gradient descent on neurons (arXiv 2201.12250): is K-FAC second-order, and why is it good?

Three parts, all on the digits. Update directions of one and the same batch, compared by their angles. Training along
each of them, tuned alike. And the package's own K-FAC and FOOF on an MLP and a small ViT, tuned alike, after the same
steps and the same time.
"""

from __future__ import annotations

from hf_so2.papers.foof import runs
from hf_so2.papers.foof.claims import claims_of
from hf_so2.papers.foof.figure import draw
from hf_so2.papers.report import Findings
from hf_so2.papers.workers import each


def foof(workers: int) -> Findings:
    """All claims of the paper."""
    races = {name: contest.hold(workers) for name, contest in runs.CONTESTS.items()}
    kfac = races["one batch"].best["K-FAC"]
    angles = each(lambda seed: runs.angles_of(seed, kfac), runs.SEEDS, workers)
    tables = {"cosines": angles, "races": {name: race.tables for name, race in races.items()}}
    return Findings(claims_of(races, angles), tables, lambda path: draw(races, angles, path))
