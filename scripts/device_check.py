"""The clone's own door to `hf-so2 device-check`."""

import sys

from hf_so2 import cli
from hf_so2.commands import device_check
from hf_so2.commands.device_check import main

__doc__ = device_check.__doc__  # what --help shows

if __name__ == "__main__":
    sys.exit(cli.main(main))
