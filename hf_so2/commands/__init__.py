"""`hf-so2 COMMAND …`; the programs of `scripts/` are doors to the same functions."""

from __future__ import annotations

import importlib
import sys

from hf_so2 import cli
from hf_so2.spelling import did_you_mean

COMMANDS = {
    "train": "Train a causal language model with a second-order (or any other) optimizer.",
    "sweep": "Tune on small proxies and say whether the result holds for a wide model.",
    "coord-check": "Check that training changes every layer alike at every width.",
    "grid": "Train every combination of some flags and print a table of losses.",
    "benchmark": "Time and memory of every optimizer's step beside AdamW's.",
    "equal-time": "Loss of every optimizer after the seconds that AdamW needs.",
    "device-check": "Compare training on a GPU with training in float64, and count what waits for it.",
    "config": "List the settings that come with the package, or print one of them.",
    "settings-table": "Print every setting of the optimizers with its defaults.",
    "mup-coverage": "Try which causal language models of transformers can be put into muP.",
    "scaling": "Print what each optimizer costs a rank, from 100M to 70B parameters.",
    "papers": "Try the claims of the methods' papers on handwritten digits.",
}

_USAGE = """usage: hf-so2 COMMAND [SETTINGS] [--flag value ...]

{}

`hf-so2 COMMAND --help` lists its flags. SETTINGS is a YAML or JSON file, or a name of `hf-so2 config`.
With several processes: `accelerate launch -m hf_so2 train ...`."""


def run(name: str) -> None:
    """Ends the process with the exit code of a command, which reads the flags in `sys.argv[1:]`."""
    command = importlib.import_module(f"{__name__}.{name.replace('-', '_')}")
    sys.modules["__main__"].__doc__ = command.__doc__  # what its help shows, whoever started it
    sys.exit(cli.main(command.main))


def main() -> None:
    """The console's `hf-so2`: a command's name, then its own arguments."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_USAGE.format("\n".join(f"  {name:16} {text}" for name, text in COMMANDS.items())))
        sys.exit(0 if arguments else cli.USAGE_ERROR)
    name = arguments[0]
    if name not in COMMANDS:
        known = f"must be one of {', '.join(COMMANDS)}{did_you_mean(name, COMMANDS)}"
        print(f"error: command={name!r}: {known}", file=sys.stderr)
        sys.exit(cli.USAGE_ERROR)
    sys.argv[:2] = [f"{cli.PROGRAM} {name}"]
    run(name)
