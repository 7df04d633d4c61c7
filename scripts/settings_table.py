"""The clone's own door to `hf-so2 settings-table`."""

import sys

from hf_so2 import cli
from hf_so2.commands import settings_table
from hf_so2.commands.settings_table import main

__doc__ = settings_table.__doc__  # what --help shows

if __name__ == "__main__":
    sys.exit(cli.main(main))
