"""The clone's own door to `hf-so2 equal-time`."""

import sys

from hf_so2 import cli
from hf_so2.commands import equal_time
from hf_so2.commands.equal_time import main

__doc__ = equal_time.__doc__  # what --help shows

if __name__ == "__main__":
    sys.exit(cli.main(main))
