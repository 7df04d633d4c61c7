"""The clone's own door to `hf-so2 papers`."""

import sys

from hf_so2 import cli
from hf_so2.commands import papers
from hf_so2.commands.papers import main

__doc__ = papers.__doc__  # what --help shows

if __name__ == "__main__":
    sys.exit(cli.main(main))
