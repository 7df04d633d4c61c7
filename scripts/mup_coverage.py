"""The clone's own door to `hf-so2 mup-coverage`."""

import sys

from hf_so2 import cli
from hf_so2.commands import mup_coverage
from hf_so2.commands.mup_coverage import main

__doc__ = mup_coverage.__doc__  # what --help shows

if __name__ == "__main__":
    sys.exit(cli.main(main))
