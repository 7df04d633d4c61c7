"""The clone's own door to `hf-so2 benchmark`."""

import sys

from hf_so2 import cli
from hf_so2.commands import benchmark
from hf_so2.commands.benchmark import main

__doc__ = benchmark.__doc__  # what --help shows

if __name__ == "__main__":
    sys.exit(cli.main(main))
