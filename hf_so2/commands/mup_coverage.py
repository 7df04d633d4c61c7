"""Which models of the installed transformers can be put into muP, family by family.

    hf-so2 mup-coverage --markdown docs/measurements/mup_coverage.md --json out/mup_coverage.json
    hf-so2 mup-coverage --task masked-lm sequence-classification

Every type of AutoModelForCausalLM, or of the Auto class of each `--task`, is built tiny, scaled to twice its width,
classified, patched, trained for one step with adamw_mup, saved and loaded again by plain transformers, and once more
twice as deep. A stage that fails must do so by a named refusal; anything else counts as a crash. Takes a few minutes on
one core. Exit code 1 when anything crashed.
"""

from __future__ import annotations

import json
import logging
import warnings
from dataclasses import asdict
from pathlib import Path

from hf_so2 import cli
from hf_so2.errors import ConfigurationError

from .coverage import TASKS, Page, examine, markdown


def main() -> int:
    """Examines the types asked for and writes what was found; 1 when one crashed."""
    parser = cli.OneLineParser(description=__doc__, formatter_class=cli.AsWritten)
    parser.add_argument("types", nargs="*", help="model types; all by default")
    parser.add_argument("--task", choices=list(TASKS), default="causal-lm", help="what the models are for")
    parser.add_argument("--markdown", type=Path, help="page to write")
    parser.add_argument("--json", type=Path, help="file to write")
    arguments = parser.parse_args()
    task = TASKS[arguments.task]
    unknown = sorted(set(arguments.types) - set(task.types))
    if unknown:
        raise ConfigurationError("types", unknown, f"must be {task.what} of transformers")
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    families = []
    for model_type in arguments.types or task.types:
        family = examine(task, model_type)
        families.append(family)
        print(f"{family.model_type:24} {family.outcome:12} {family.reason or '; '.join(family.notes)}", flush=True)
    command = "hf-so2 mup-coverage" + (f" --task {task.name}" if task.name != "causal-lm" else "")
    text = markdown(Page(task, families, f"{command} --markdown {arguments.markdown or 'PAGE'}"))
    for path, content in (
        (arguments.markdown, text),
        (arguments.json, json.dumps([asdict(f) for f in families], indent=1)),
    ):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content, encoding="utf-8")
    print("\n".join(text.splitlines()[5:10]))
    return 1 if any(family.outcome == "crash" for family in families) else 0
