"""The clone's own door to `hf-so2 scaling`."""

import sys

from hf_so2 import cli
from hf_so2.commands import scaling
from hf_so2.commands.scaling import main

__doc__ = scaling.__doc__  # what --help shows

if __name__ == "__main__":
    sys.exit(cli.main(main))
