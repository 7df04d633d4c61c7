"""What the commands share: settings from a file and flags, one clear line for a user's mistake.

A first argument that ends in ``.yaml``, ``.yml`` or ``.json`` is read as flags written down: every entry becomes the
flag of that name (``null`` or an empty list: no flag, so the default holds), and flags on the command line follow and
so override it. One parser therefore checks both. The files in ``hf_so2/configs`` can be given by name: ``quickstart``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from transformers import HfArgumentParser

from hf_so2.errors import ConfigurationError, TrainingDivergedError
from hf_so2.spelling import did_you_mean

PROGRAM = "hf-so2"
USAGE_ERROR = 2
DIVERGED = 3
# What transformers' arguments raise beside ValueError for values that they look into or compare: files, names, types.
UNFORESEEN = (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError, TypeError)
SETTINGS_SUFFIXES = (".yaml", ".yml", ".json")
PACKAGED = Path(__file__).parent / "configs"


def main(function: Callable[[], int | None]) -> int:
    """Runs a script's body, turning a user's mistake into one line and an exit code: ``sys.exit(main(run))``.

    Returns:
        What ``function`` returned (None counts as 0), 2 after a :class:`ConfigurationError`, 3 after a
        :class:`TrainingDivergedError`. Any other exception is a defect and keeps its traceback.
    """
    try:
        code = function() or 0
    except ConfigurationError as error:
        _print_error(error)
        code = USAGE_ERROR
    except TrainingDivergedError as error:
        _print_error(error)
        code = DIVERGED
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return code


def parse(dataclass_types: Iterable[type], argv: Sequence[str] | None = None) -> tuple[Any, ...]:
    """Builds one instance of each dataclass from a settings file and flags, as HfArgumentParser reads them.

    Args:
        dataclass_types: dataclasses whose fields are the flags.
        argv: arguments without the program's name; those of this process by default.

    Raises:
        SystemExit: with code 2 after one line on standard error, for an unknown flag, an illegal value or
            settings that a dataclass refuses; with code 0 after ``--help``.
        ConfigurationError: the settings file is missing, unreadable or names an unknown setting, or a
            dataclass refuses its settings that way.
    """
    types = tuple(dataclass_types)
    return build(types, read_flags(types, argv))


def read_flags(
    dataclass_types: Iterable[type],
    argv: Sequence[str] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The flags that were given, by the name of their fields, as values of the right types; see :func:`parse`.

    Args:
        dataclass_types: as for :func:`parse`.
        argv: as for :func:`parse`.
        settings: flags written down, which those of ``argv`` override.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = _Parser(
        dataclass_types,
        allow_abbrev=False,
        usage="%(prog)s [SETTINGS.yaml] [--flag value ...]",
        description=sys.modules["__main__"].__doc__,
        formatter_class=_HelpFormatter,
    )
    if not {"-h", "--help"}.isdisjoint(arguments):  # while the parser knows the defaults
        parser.print_help()
        raise SystemExit(0)
    written = _flags(settings, parser) if settings else []
    if arguments and _names_settings(arguments[0]):
        written += _flags(_read_settings(arguments.pop(0)), parser)
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    namespace, unknown = parser.parse_known_args(written + arguments)
    if unknown:
        flag = unknown[0].partition("=")[0]
        hint = did_you_mean(flag.replace("-", "_").lstrip("_"), parser.flags)
        if not flag.startswith("-"):
            known = [name for name in packaged_settings() if "/" not in name]
            hint = "; a settings file must be the first one" if _names_settings(flag) else did_you_mean(flag, known)
        parser.error(f"unknown argument {unknown[0]!r}{hint}")
    return vars(namespace)


def build(dataclass_types: Iterable[type], flags: Mapping[str, Any]) -> tuple[Any, ...]:
    """One instance of each dataclass from the flags that :func:`read_flags` found; see :func:`parse`."""
    built = []
    for dataclass_type in dataclass_types:
        names = {field.name for field in dataclasses.fields(dataclass_type) if field.init}
        given = {name: value for name, value in flags.items() if name in names}
        try:
            built.append(dataclass_type(**given))
        except ConfigurationError:
            raise
        except ValueError as error:  # what transformers' arguments raise for settings that contradict each other
            _print_error(error)
            raise SystemExit(USAGE_ERROR) from error
        except UNFORESEEN as error:
            name = _at_fault(dataclass_type, given, error)
            raise ConfigurationError(name, given.get(name), f"cannot be used: {_reason(error)}") from error
    return tuple(built)


def _at_fault(dataclass_type: type, given: Mapping[str, Any], error: Exception) -> str:
    """The first flag that with those before it ends in this error: one that nobody foresaw does not name it."""
    before: dict[str, Any] = {}
    for name, value in given.items():
        before[name] = value
        try:
            dataclass_type(**before)
        except (ValueError, *UNFORESEEN) as other:
            if _reason(other) == _reason(error):
                return name
    return dataclass_type.__name__


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def require_device(field: str, name: str) -> None:
    """Refuses what is no device of this machine.

    Raises:
        ConfigurationError: it is none.
    """
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ConfigurationError(field, name, "must be a device of this machine") from error


def packaged_settings() -> dict[str, Path]:
    """The files that come with the package, by name: `quickstart`, `accelerate/fsdp`, ..."""
    paths = {path.relative_to(PACKAGED).with_suffix("").as_posix(): path for path in PACKAGED.rglob("*.yaml")}
    return {name: paths[name] for name in sorted(paths, key=lambda name: ("/" in name, name))}


def settings_path(name: str) -> Path | None:
    """The file that `name` says, in the package where there is no such file here; None where there is none at all."""
    return Path(name) if Path(name).is_file() else packaged_settings().get(name)


def command_line() -> str:
    """What was typed to start this process, to be typed again."""
    program, *arguments = sys.argv
    return f"{program if program.startswith(PROGRAM) else f'python {shlex.quote(program)}'} {shlex.join(arguments)}"


def _names_settings(argument: str) -> bool:
    return argument.lower().endswith(SETTINGS_SUFFIXES) or (argument in packaged_settings() and "/" not in argument)


AsWritten = argparse.RawDescriptionHelpFormatter
"""For a command's docstring as its help."""


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The script's description as it was written, and the defaults of flags."""


class _OneLineErrors:
    """Answers a usage error in one line instead of pages of usage."""

    def error(self, message: str) -> NoReturn:
        _print_error(message)
        raise SystemExit(USAGE_ERROR)


class OneLineParser(_OneLineErrors, argparse.ArgumentParser):
    """argparse's own parser with errors like those of the other commands."""


class _Parser(_OneLineErrors, HfArgumentParser):
    """The flags of some dataclasses; one with a `_argument_group_name` has a heading of its own in the help."""

    @property
    def flags(self) -> dict[str, argparse.Action]:
        """Every flag's action by the name of its field."""
        return {action.dest: action for action in self._actions if not isinstance(action, argparse._StoreFalseAction)}

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        # argparse lists all choices without a word on the closest one; there are some sixty optimizer names.
        if action.choices is None:
            return
        choices = [str(getattr(choice, "value", choice)) for choice in action.choices]
        if str(getattr(value, "value", value)) not in choices:
            raise ConfigurationError(
                action.dest, value, f"must be one of {', '.join(choices)}{did_you_mean(str(value), choices)}"
            )


def _read_settings(name: str) -> Mapping[str, Any]:
    path = settings_path(name)
    if path is None:
        raise ConfigurationError("settings file", name, "must be an existing YAML or JSON file")
    try:
        text = path.read_text(encoding="utf-8")
        settings = json.loads(text) if path.suffix.lower() == ".json" else yaml.safe_load(text)
    except (yaml.YAMLError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError("settings file", name, f"cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(settings, Mapping):
        raise ConfigurationError("settings file", name, "must hold a mapping of settings")
    return settings


def _flags(settings: Mapping[str, Any], parser: _Parser) -> list[str]:
    """The settings as command-line arguments."""
    actions = parser.flags
    flags: list[str] = []
    for name, value in settings.items():
        if name not in actions:
            raise ConfigurationError("setting", name, f"must be a known setting{did_you_mean(str(name), actions)}")
        choices = actions[name].choices or ()
        if value is None or value == []:
            continue
        if isinstance(value, list):
            if actions[name].nargs not in ("+", "*"):
                raise ConfigurationError(name, value, "must be one value, not a list")
            flags += [f"--{name}", *map(str, value)]
        elif isinstance(value, Mapping):
            flags.append(f"--{name}={json.dumps(value)}")
        elif value is False and "no" in choices:  # YAML reads an unquoted `no` as a boolean
            flags.append(f"--{name}=no")
        else:
            flags.append(f"--{name}={value}")
    return flags


def _print_error(error: object) -> None:
    """One line on standard error, from the main process only: the others of the run meet the same mistake."""
    if os.environ.get("RANK", "0") == "0":
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
