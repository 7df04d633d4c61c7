"""The clone's own door to `hf-so2 train`."""

import sys

from hf_so2 import cli
from hf_so2.commands import train
from hf_so2.commands.train import main

__doc__ = train.__doc__  # what --help shows

if __name__ == "__main__":
    sys.exit(cli.main(main))
