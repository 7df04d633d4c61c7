"""Puts the claims of the papers that the methods come from to the test, on small networks and handwritten digits.

    hf-so2 papers tekfac            # or foof, mup-transfer, all; minutes on two cores
    hf-so2 papers all --output_dir out/papers --workers 2

Prints a sentence for each claim (it holds here, does not hold, or is not decided by so few runs) and leaves NAME.json,
with every sample and interval, NAME.md and NAME.png in --output_dir. Exit code 0 when all claims hold, 1 when one does
not, 4 when none fails but one is not decided, 2 for a user's mistake (one line, no traceback). Needs scikit-learn:
pip install 'hf_so2[papers]'.
"""

from __future__ import annotations

from pathlib import Path

from hf_so2 import cli
from hf_so2.errors import ConfigurationError
from hf_so2.folders import require_folder
from hf_so2.papers.data import require_extra

NAMES = ("mup-transfer", "foof", "tekfac")


def main() -> int:
    """Carries out one experiment, or all of them."""
    parser = cli.OneLineParser(description=__doc__, formatter_class=cli.AsWritten)
    parser.add_argument("name", choices=[*NAMES, "all"], help="which paper")
    parser.add_argument("--output_dir", default="out/papers", help="where tables and figures go")
    parser.add_argument("--workers", type=int, help="training runs side by side; every core by default")
    args = parser.parse_args()
    if args.workers is not None and args.workers < 1:
        raise ConfigurationError("workers", args.workers, "must be at least 1")
    require_folder("output_dir", args.output_dir)
    require_extra()
    # What needs scikit-learn (and its SciPy and joblib) is imported only now that they are known to be there.
    from joblib import cpu_count

    from hf_so2.papers import experiments
    from hf_so2.papers.report import carry_out
    from hf_so2.papers.verdict import exit_code

    chosen = NAMES if args.name == "all" else (args.name,)
    workers = args.workers or cpu_count()
    known, folder = experiments(), Path(args.output_dir)
    return exit_code([claim for name in chosen for claim in carry_out(name, known[name], folder, workers)])
