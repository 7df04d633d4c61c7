"""The coverage page: a summary and one row a family."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import transformers

from .stages import MULTIPLIER, STAGES, Family
from .tasks import Task


def markdown(task: Task, families: Sequence[Family], command: str) -> str:
    """The table of one task and its summary as a page.

    Args:
        task: what the models are for.
        families: what was found.
        command: what it was found with.
    """
    counts = {stage: sum(stage in family.passed for family in families) for stage in STAGES}
    outcomes = Counter(family.outcome for family in families)
    lines = [
        f"# Coverage of muP over {task.what}",
        "",
        f"transformers {transformers.__version__}, {len(families)} types, each tiny and {MULTIPLIER} times as wide",
        f"as its base. Made by `{command}`.",
        "",
        "| " + " | ".join(STAGES) + " |",
        "|" + "---|" * len(STAGES),
        "| " + " | ".join(str(counts[stage]) for stage in STAGES) + " |",
        "",
        f"Passed everything: {outcomes['ok']}. Refused by name: {outcomes['refused']}. Not possible in transformers "
        f"itself: {outcomes['transformers']}. Crashed: {outcomes['crash']}.",
        f"Twice as deep as well: {sum(family.depth == 'yes' for family in families)}.",
        "",
        "*built*: transformers builds the tiny configuration. *scales*: `scale_width` doubles it. *classifies*: every",
        "parameter has a role, and some are hidden. *patches*: `apply_mup`. *initialises*: the measured standard",
        "deviations are the base's times the table's factor. *trains*: one step of adamw_mup, finite. *reloads*: plain",
        "transformers computes the same logits. *depth*: patched, trained and reloaded at twice the depth, or why not.",
        "",
        "| type | reached | roles | beside rescaling, or why it ended | depth |",
        "|---|---|---|---|---|",
    ]
    for family in families:
        reached = (
            "all"
            if family.outcome == "ok"
            else f"{family.passed[-1] if family.passed else 'nothing'} ({family.outcome})"
        )
        roles = ", ".join(f"{count} {role}" for role, count in sorted(family.roles.items()))
        remark = (family.reason or "; ".join(family.notes)).replace("|", "\\|")
        depth = family.depth.replace("|", "\\|")
        lines.append(f"| {family.model_type} | {reached} | {roles} | {remark} | {depth} |")
    return "\n".join(lines) + "\n"
