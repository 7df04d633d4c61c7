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

from .coverage import TASKS, Family, examine, markdown


def main() -> int:
    """Examines the types asked for and writes what was found; 1 when one crashed."""
    parser = cli.OneLineParser(description=__doc__, formatter_class=cli.AsWritten)
    parser.add_argument("types", nargs="*", help="model types; all by default")
    parser.add_argument("--task", choices=list(TASKS), nargs="+", default=["causal-lm"], help="what the models are for")
    parser.add_argument("--markdown", type=Path, help="page to write")
    parser.add_argument("--json", type=Path, help="file to write")
    arguments = parser.parse_args()
    tasks = [TASKS[name] for name in arguments.task]
    unknown = sorted(set(arguments.types) - {model_type for task in tasks for model_type in task.types})
    if unknown:
        raise ConfigurationError(
            "types", unknown, f"must be {' or '.join(task.what for task in tasks)} of transformers"
        )
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    found: dict[str, list[Family]] = {}
    texts = []
    for task in tasks:
        families = found.setdefault(task.name, [])
        for model_type in task.types:
            if arguments.types and model_type not in arguments.types:
                continue
            family = examine(task, model_type)
            families.append(family)
            print(f"{family.model_type:24} {family.outcome:12} {family.reason or '; '.join(family.notes)}", flush=True)
        command = "hf-so2 mup-coverage" + (f" --task {task.name}" if task.name != "causal-lm" else "")
        texts.append(markdown(task, families, f"{command} --markdown {arguments.markdown or 'PAGE'}"))
        print("\n".join(texts[-1].splitlines()[5:10]))
    # Of one task alone as a list, which the file was before there were several.
    rows = {name: [asdict(family) for family in families] for name, families in found.items()}
    content = json.dumps(rows if len(tasks) > 1 else next(iter(rows.values())), indent=1)
    for path, text in ((arguments.markdown, "\n".join(texts)), (arguments.json, content)):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    return 1 if any(family.outcome == "crash" for families in found.values() for family in families) else 0
