"""The clone's own door to `hf-so2 sweep`."""

import sys

from hf_so2 import cli
from hf_so2.commands import sweep
from hf_so2.commands.sweep import main

__doc__ = sweep.__doc__  # what --help shows

if __name__ == "__main__":
    sys.exit(cli.main(main))
