"""The clone's own door to `hf-so2 coord-check`."""

import sys

from hf_so2 import cli
from hf_so2.commands import coord_check
from hf_so2.commands.coord_check import main

__doc__ = coord_check.__doc__  # what --help shows

if __name__ == "__main__":
    sys.exit(cli.main(main))
