"""`SecondOrderTrainingArguments`: the fields of `transformers.TrainingArguments`, with our optimizers and settings."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any, get_type_hints

import torch
from transformers import AutoConfig, PretrainedConfig, TrainingArguments, get_scheduler
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from transformers.training_args import OptimizerNames
from transformers.utils import logging

from hf_so2.errors import ConfigurationError
from hf_so2.methods.resolution import parts_in_use, resolve
from hf_so2.methods.settings import LIST_SETTINGS, SETTING_NAMES, Settings
from hf_so2.methods.table import MUP_SUFFIX, OPTIMIZERS, parse_name
from hf_so2.mup import scale_depth, scale_width
from hf_so2.mup.widths import REFUSALS
from hf_so2.optim.telemetry import LEVELS
from hf_so2.spelling import did_you_mean
from hf_so2.training.argument_checks import check_own_fields
from hf_so2.training.argument_fields import TRAINER_FIELDS, OptimizerName, with_own_fields

logger = logging.get_logger(__name__)

_LONGEST_REASON = 300  # characters; transformers lists all its families

# The type checker does not read transformers, so any base will do for it. At run time the base differs by class.
_Arguments: Any = TrainingArguments if TYPE_CHECKING else object


class SecondOrderArgumentsMixin(_Arguments):
    """The behaviour of our fields. It comes before the class of arguments that has them (`with_own_fields`).

    Raises:
        ConfigurationError: see :class:`SecondOrderTrainingArguments`.
    """

    if TYPE_CHECKING:  # declared otherwise, they would hide the types of the dataclass's fields from argparse
        optim: Any = "kfac_mup"
        mup_base_config: Any
    _argument_group_name = "training, from transformers, and the optimizer's settings behind it"

    def __post_init__(self) -> None:
        if self.curvature_log not in ("none", *LEVELS):
            raise ConfigurationError("curvature_log", self.curvature_log, f"must be one of none, {', '.join(LEVELS)}")
        if isinstance(self.mup_base_config, PretrainedConfig):
            self.mup_base_config = self.mup_base_config.to_dict()
        if isinstance(self.mup_base_config, str) and self.mup_base_config.startswith("{"):
            self.mup_base_config = _parsed("mup_base_config", self.mup_base_config)  # a mapping in a settings file
        for given in _written_mappings(self):
            _parsed(given, getattr(self, given))  # transformers' own error names neither the field nor the value
        name = _known_optimizer(self.optim)
        check_own_fields(self)
        self._fill_trainer_fields(name)
        if self.is_ours(name):
            _refuse_unsupported_launchers(name, self)
            if self.adaptive_damping and self.max_grad_norm:
                allowed = "needs max_grad_norm=0: a clipped gradient does not predict how the loss changes"
                raise ConfigurationError("adaptive_damping", True, allowed)
        self._with_transformers_optimizer(super().__post_init__)
        self.optim = OptimizerName(name)
        self._check_base(name)
        _check_scheduler(self)
        _check_integrations(self.report_to)

    @staticmethod
    def is_ours(name: str) -> bool:
        """Whether `name` is an optimizer of this package rather than of transformers."""
        return str(getattr(name, "value", name)) in OPTIMIZERS

    def optimizer_settings(self) -> Settings:
        """The settings from the current fields. A hyperparameter search changes these after construction.

        Raises:
            ConfigurationError: as the class.
        """
        name = _known_optimizer(self.optim)
        method, _ = parse_name(name)
        given = {setting: getattr(self, TRAINER_FIELDS.get(setting, setting)) for setting in SETTING_NAMES}
        given |= _parsed_optim_args(self.optim_args)
        try:
            return method.settings(given)
        except ConfigurationError as error:
            flag = TRAINER_FIELDS.get(error.field, error.field)
            raise ConfigurationError(flag, error.value, error.allowed) from None

    def optimizer_flags(self) -> dict[str, Any]:
        """`optim`, and each of its settings that has an effect, by the name of its field; defaults are written out.

        Raises:
            ConfigurationError: as the class.
        """
        name, settings = _known_optimizer(self.optim), self.optimizer_settings()
        parts = parts_in_use(parse_name(name)[0].uses, settings)
        flags: dict[str, Any] = {"optim": name}
        for entry in fields(Settings):
            value, needs = getattr(settings, entry.name), entry.metadata["needs"]
            if value is not None and (not needs or needs in parts):
                is_list = entry.name in LIST_SETTINGS
                flags[TRAINER_FIELDS.get(entry.name, entry.name)] = list(value) if is_list else value
        return flags

    def base_config(self, config: PretrainedConfig) -> PretrainedConfig | None:
        """The config at whose width the settings were tuned, for a model of `config`; None if no base was given.

        Raises:
            ConfigurationError: the family of `config` cannot be scaled to this width, or the file cannot be read.
        """
        if self.mup_base_width is not None:
            field = "mup_base_width"
            try:
                base = scale_width(config, width=self.mup_base_width)
                field = "mup_base_depth"
                return base if self.mup_base_depth is None else scale_depth(base, self.mup_base_depth)
            except ConfigurationError as error:
                raise ConfigurationError(field, getattr(self, field), error.allowed) from None
        given = self.mup_base_config
        if given is None:
            return None
        if not isinstance(given, dict | str | os.PathLike):
            raise ConfigurationError("mup_base_config", given, "must be a directory, a file or a mapping")
        try:
            return AutoConfig.for_model(**given) if isinstance(given, dict) else AutoConfig.from_pretrained(given)
        except (OSError, *REFUSALS) as error:
            reason = " ".join(str(error).splitlines()[:2])[:_LONGEST_REASON]
            raise ConfigurationError("mup_base_config", given, f"must be a readable model config ({reason})") from None

    def set_optimizer(self, name: str = "kfac_mup", *args: Any, **kwargs: Any) -> SecondOrderArgumentsMixin:
        """As in transformers. It also takes our names."""
        known = _known_optimizer(name)
        super().set_optimizer("adamw_torch", *args, **kwargs)
        self.optim = OptimizerName(known)
        return self

    def _with_transformers_optimizer(self, call: Any) -> None:
        """Run `call` with `optim` set to a name that transformers' own enum knows."""
        chosen = self.optim
        if self.is_ours(chosen):
            self.optim = OptimizerNames.ADAMW_TORCH
        else:
            self.optim = str(getattr(chosen, "value", chosen))
        call()
        self.optim = chosen

    def _fill_trainer_fields(self, name: str) -> None:
        if self.is_ours(name):
            settings = self.optimizer_settings()
            for ours, theirs in TRAINER_FIELDS.items():
                setattr(self, theirs, getattr(settings, ours))
            return
        theirs_by_default = _defaults_behind(type(self))
        for field_name in TRAINER_FIELDS.values():
            if getattr(self, field_name) is None:
                setattr(self, field_name, theirs_by_default[field_name])
        for own in fields(Settings):
            value = getattr(self, own.name, None)
            if own.name not in TRAINER_FIELDS and value is not None:
                raise ConfigurationError(own.name, value, f"has no effect on transformers' optimizer {name}")

    def _check_base(self, name: str) -> None:
        for field in ("mup_base_width", "mup_base_depth"):
            size = getattr(self, field)
            if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
                raise ConfigurationError(field, size, "must be a whole number of at least 1")
        if self.mup_base_depth is not None and self.mup_base_width is None:
            allowed = "needs mup_base_width; a mup_base_config has its own number of layers"
            raise ConfigurationError("mup_base_depth", self.mup_base_depth, allowed)
        if self.mup_base_width is not None and self.mup_base_config is not None:
            raise ConfigurationError(
                "mup_base_config", self.mup_base_config, "excludes mup_base_width; give one of them"
            )
        base_given = self.mup_base_width is not None or self.mup_base_config is not None
        if base_given and not name.endswith(MUP_SUFFIX):
            logger.warning("the μP base is not used: optim=%s is in the standard parametrization", name)


_OwnFields: Any = with_own_fields(TrainingArguments)


class SecondOrderTrainingArguments(SecondOrderArgumentsMixin, _OwnFields):
    """`transformers.TrainingArguments` plus every field of `hf_so2.optim.Settings` and the μP base.

    `optim` takes every name of transformers and of `hf_so2.OPTIMIZERS`. A setting of None means the method's default.
    `optim_args="damping=0.01,momentum=0.95"` overrides the fields. For the arguments of another Trainer see
    `hf_so2.second_order_arguments`.

    Raises:
        ConfigurationError: an unknown optimizer, a value out of range, a setting that the optimizer would ignore, or a
            launcher that is not supported (DeepSpeed).
    """


def _defaults_behind(kind: type) -> dict[str, Any]:
    """The defaults of the class of arguments to which our fields were added."""
    behind = next(c for c in kind.__mro__ if is_dataclass(c) and not {"mup_base_width"} & {f.name for f in fields(c)})
    return {entry.name: entry.default for entry in fields(behind)}


def _known_optimizer(name: Any) -> str:
    text = str(getattr(name, "value", name))
    if text not in {entry.value for entry in OptimizerNames}:
        parse_name(text)
    return text


def _refuse_unsupported_launchers(name: str, args: SecondOrderArgumentsMixin) -> None:
    if args.deepspeed or os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() in ("1", "true"):
        raise ConfigurationError("deepspeed", args.deepspeed or True, f"is not supported with optim={name}; use DDP")


def _written_mappings(args: SecondOrderArgumentsMixin) -> list[str]:
    """The fields whose text transformers will read as JSON."""
    values = {name: getattr(args, name, None) for name in TrainingArguments._VALID_DICT_FIELDS}
    return [name for name, value in values.items() if isinstance(value, str) and value.startswith("{")]


def _parsed(name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigurationError(name, text, f"must be valid JSON: {error}") from None


def _check_scheduler(args: SecondOrderArgumentsMixin) -> None:
    """Build the schedule once, to check it. The Trainer builds it again when it has the model and the data."""
    stand_in = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=args.learning_rate or 1.0)
    try:
        get_scheduler(
            args.lr_scheduler_type, stand_in, 1, 2, scheduler_specific_kwargs=dict(args.lr_scheduler_kwargs or {})
        )
    except (TypeError, ValueError) as error:
        name = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
        raise ConfigurationError(
            "lr_scheduler_kwargs", args.lr_scheduler_kwargs, f"must suit lr_scheduler_type={name}: {error}"
        ) from None


def _check_integrations(names: Sequence[str]) -> None:
    installed = get_available_reporting_integrations()
    for name in names:
        if name not in installed:
            fault = "is not installed; " if name in INTEGRATION_TO_CALLBACK else ""
            known = ["none", "all", *installed]
            hint = did_you_mean(name, [*known, *INTEGRATION_TO_CALLBACK])
            raise ConfigurationError(
                "report_to", name, f"{fault}must be one of {', '.join(known)}{hint if not fault else ''}"
            )


def _parsed_optim_args(text: str | None) -> dict[str, Any]:
    """`"damping=0.01,momentum=0.95"` as settings of the right types."""
    if not isinstance(text, str | None):
        raise ConfigurationError("optim_args", text, "must be a text of name=value pairs with commas between them")
    hints = get_type_hints(Settings)
    parsed: dict[str, Any] = {}
    for item in (text or "").split(","):
        if not item.strip():
            continue
        name, separator, value = (part.strip() for part in item.partition("="))
        if not separator:
            raise ConfigurationError("optim_args", text, "must be name=value pairs with commas between them")
        if name not in hints:
            resolve("", frozenset(), {}, {name: value}, learning_rate="lr")
            name = "lr"
        parsed[name] = _cast(name, value, hints[name])
    return parsed


def _cast(name: str, value: str, hint: Any) -> Any:
    if hint is str:
        return value
    if name in LIST_SETTINGS:
        return tuple(value.split(";"))
    if hint is bool:
        # The settings refuse any other value.
        return {"true": True, "false": False}.get(value.lower(), value)
    kind = int if "int" in str(hint) else float
    try:
        return kind(value)
    except ValueError:
        raise ConfigurationError(name, value, f"must be a number ({kind.__name__})") from None
