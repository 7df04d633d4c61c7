"""The clone's own door to `hf-so2 grid`."""

import sys

from hf_so2 import cli
from hf_so2.commands import grid
from hf_so2.commands.grid import main

__doc__ = grid.__doc__  # what --help shows

if __name__ == "__main__":
    sys.exit(cli.main(main))
