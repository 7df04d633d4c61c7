"""The fields that this package adds to the arguments of a Trainer."""

from __future__ import annotations

from dataclasses import field, fields, make_dataclass
from typing import Any, get_type_hints

from transformers import TrainingArguments
from transformers.training_args import OptimizerNames
from transformers.utils import ExplicitEnum

from hf_so2.errors import ConfigurationError
from hf_so2.methods.settings import LIST_SETTINGS, Settings
from hf_so2.methods.table import OPTIMIZERS

# A superset of transformers' own enum. argparse, JSON and Optuna use the type of the field to check and cast values.
OptimizerName: Any = ExplicitEnum(
    "OptimizerName",
    {
        **{entry.name: entry.value for entry in OptimizerNames},
        **{f"SO2_{name.upper()}": name for name in OPTIMIZERS},
    },
    module=__name__,
)

# Fields that the Trainer already has. For them too, None means "the method's default".
TRAINER_FIELDS = {"lr": "learning_rate", "weight_decay": "weight_decay"} | {
    name: name for name in ("adam_beta1", "adam_beta2", "adam_epsilon")
}

# The fields that say at which model the settings of a `_mup` optimizer hold as they stand.
BASE_FIELDS = ("mup_base_width", "mup_base_depth", "mup_base_config")

_OTHER_FIELDS: dict[str, tuple[Any, Any, str]] = {
    "optim": (OptimizerName, "kfac_mup", "The optimizer: a name of hf_so2.OPTIMIZERS or of transformers."),
    "learning_rate": (float | None, None, "Peak learning rate, at the base width. Default: the method's own."),
    "adam_beta1": (float | None, None, "First beta of AdamW. Default: the method's own."),
    "adam_beta2": (float | None, None, "Second beta of AdamW. Default: the method's own."),
    "adam_epsilon": (float | None, None, "Epsilon of AdamW. Default: the method's own."),
    "mup_base_width": (
        int | None,
        None,
        "Width (hidden size) at which the settings of a _mup optimizer were tuned.",
    ),
    "mup_base_depth": (
        int | None,
        None,
        "Number of layers at which they were tuned, beside mup_base_width. Default: as many as the model has.",
    ),
    "mup_base_config": (
        dict[str, Any] | str | None,
        None,
        "Instead of mup_base_width: directory or JSON file of the base model's config. Its depth counts, too.",
    ),
    "curvature_log": (
        str,
        "role",
        "What the log of training steps says of curvature: none, role (damping, trace, condition number and size of"
        " updates for attention, mlp, ...) or layer (of every layer).",
    ),
}


def _own_fields() -> list[tuple[str, Any, Any]]:
    hints = get_type_hints(Settings)
    own = []
    for entry in fields(Settings):
        if entry.name not in TRAINER_FIELDS:
            # argparse expands % in help texts. Its parser can read lists.
            kind = list[str] if entry.name in LIST_SETTINGS else hints[entry.name]
            text = entry.metadata["help"].replace("%", "%%") + " Default: the method's own."
            own.append((entry.name, kind | None, field(default=None, metadata={"help": text})))
    for name, (kind, default, text) in _OTHER_FIELDS.items():
        own.append((name, kind, field(default=default, metadata={"help": text})))
    return own


def with_own_fields(base: type) -> Any:
    """A dataclass derived from `base`, a kind of `TrainingArguments`, with our fields added.

    Raises:
        ConfigurationError: one of our fields has another meaning in `base`.
    """
    known = {entry.name for entry in fields(TrainingArguments)}
    own = _own_fields()
    for name in {entry[0] for entry in own} - known:
        if name in {entry.name for entry in fields(base)}:
            raise ConfigurationError("arguments", base.__name__, f"must not have a field {name} of its own")
    return make_dataclass(f"_{base.__name__}WithOwnFields", own, bases=(base,))
