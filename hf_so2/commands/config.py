"""Lists the settings that come with the package, or prints one of them.

    hf-so2 config                                   # the names
    hf-so2 config quickstart > settings.yaml        # a copy of your own, for `hf-so2 train settings.yaml`
    hf-so2 config accelerate/fsdp > fsdp.yaml       # for `accelerate launch --config_file fsdp.yaml`

Those without a folder can be given by name to every command that reads settings: `hf-so2 train quickstart`.
"""

from __future__ import annotations

from hf_so2 import cli
from hf_so2.errors import ConfigurationError
from hf_so2.spelling import did_you_mean


def main() -> None:
    """The names, or the file behind one."""
    parser = cli.OneLineParser(description=__doc__, formatter_class=cli.AsWritten)
    parser.add_argument("name", nargs="?", help="which one to print")
    name = parser.parse_args().name
    known = cli.packaged_settings()
    if name is None:
        for known_name, path in known.items():
            first = path.read_text(encoding="utf-8").partition("\n")[0]
            print(f"{known_name:28} {first.lstrip('# ')}")
    elif name in known:
        print(known[name].read_text(encoding="utf-8"), end="")
    else:
        raise ConfigurationError("name", name, f"must be one of {', '.join(known)}{did_you_mean(name, known)}")
