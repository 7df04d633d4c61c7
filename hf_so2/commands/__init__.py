"""`hf-so2 COMMAND …`, the same functions as the programs of `scripts/`, for those who have no clone."""

from __future__ import annotations

import importlib
import sys

from hf_so2 import cli
from hf_so2.spelling import did_you_mean

COMMANDS = {"train": "Train a causal language model with a second-order (or any other) optimizer."}

_USAGE = "usage: hf-so2 COMMAND [SETTINGS.yaml] [--flag value ...]\n\n{}\n\n`hf-so2 COMMAND --help` lists its flags."


def run(name: str) -> None:
    """Ends the process with the exit code of a command, which reads the flags in `sys.argv[1:]`."""
    command = importlib.import_module(f"{__name__}.{name}")
    sys.modules["__main__"].__doc__ = command.__doc__  # what its help shows, whoever started it
    sys.exit(cli.main(command.main))


def main() -> None:
    """The console's `hf-so2`: a command's name, then its own arguments."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_USAGE.format("\n".join(f"  {name:12} {text}" for name, text in COMMANDS.items())))
        sys.exit(0 if arguments else cli.USAGE_ERROR)
    name = arguments[0]
    if name not in COMMANDS:
        known = f"must be one of {', '.join(COMMANDS)}{did_you_mean(name, COMMANDS)}"
        print(f"error: command={name!r}: {known}", file=sys.stderr)
        sys.exit(cli.USAGE_ERROR)
    sys.argv[:2] = [f"{sys.argv[0]} {name}"]
    run(name)
