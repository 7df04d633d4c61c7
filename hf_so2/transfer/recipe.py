"""`recipe.yaml`: all that a wide run takes over from its proxies, written for a person to read and edit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from transformers import AutoConfig

from hf_so2.data import DataArguments
from hf_so2.errors import ConfigurationError
from hf_so2.models import ModelArguments, parse_overrides
from hf_so2.mup.widths import DEPTH_FIELDS, text_width
from hf_so2.spelling import did_you_mean
from hf_so2.training.argument_fields import BASE_FIELDS
from hf_so2.training.arguments import SecondOrderTrainingArguments

VERSION = 1
"""Of the format: raised when a recipe of today could be misread."""

# Flags that say where a run happens and what is written down about it, not how the model is trained.
_ELSEWHERE = (
    "output_dir cache_dir report_to run_name project trackio_space_id use_cpu disable_tqdm remove_unused_columns"
    " do_train do_eval do_predict per_device_eval_batch_size resume_from_checkpoint"
    " restore_callback_states_from_checkpoint load_best_model_at_end metric_for_best_model greater_is_better"
    " prediction_loss_only include_for_metrics batch_eval_metrics ignore_data_skip width depth model_name_or_path"
).split()
_NO_BASE_DEPTH = "settings follow the depth only with a mup_base_depth, that of the proxies"
_ELSEWHERE_PREFIXES = (
    "logging_",
    "log_",
    "save_",
    "eval_",
    "hub_",
    "push_to_hub",
    "dataloader_",
    "ddp_",
    "skip_memory",
)


def shapes_training(flag: str) -> bool:
    """Whether a flag changes what is trained, and so belongs into a recipe."""
    return flag not in _ELSEWHERE and not flag.startswith(_ELSEWHERE_PREFIXES)


@dataclass(frozen=True)
class Recipe:
    """What a sweep found and what it was found on. The sections of the file are the fields, in this order.

    Args:
        transfer: `confirmed`, `verdict` (a sentence), `losses` (of the setting, by width of the proxies, nats per
            token); `depth_losses` where they differ in depth, too, and `exponents` of the best rate over width and
            depth with their intervals, `[value, low, high]`.
        optimizer: `optim` and its settings, as flags.
        base: `mup_base_width`, with `mup_base_depth` if the family has a number of layers, or `mup_base_config`; empty
            without μP.
        model: `model_type` and, for models from scratch, the other flags of `ModelArguments`.
        data: flags of `DataArguments`.
        training: the other flags.
        source: where the recipe comes from; not used.
    """

    transfer: Mapping[str, Any]
    optimizer: Mapping[str, Any]
    base: Mapping[str, Any]
    model: Mapping[str, Any]
    data: Mapping[str, Any]
    training: Mapping[str, Any]
    source: Mapping[str, Any] = field(default_factory=dict)

    @property
    def losses(self) -> dict[int, float]:
        """Loss by the width of the proxies."""
        return dict(self.transfer["losses"])

    @property
    def tuned_at(self) -> str:
        """The proxies' sizes in words."""
        widths = " and ".join(str(width) for width in sorted(self.losses))
        depths = " and ".join(str(depth) for depth in sorted(self.transfer.get("depth_losses", {})))
        return f"width {widths}" + (f", depth {depths}" if depths else "")

    def settings(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The recipe as flags, without the model's where `given` flags name a checkpoint, and without the μP base
        where they give another.
        """
        model = {} if "model_name_or_path" in given else self.model
        base = {} if not given.keys().isdisjoint(BASE_FIELDS) else self.base
        flags = {**model, **self.data, **self.training, **self.optimizer, **base}
        return {name: value for name, value in flags.items() if name != "model_type" or "config_overrides" in model}

    def overrides(self, given: Mapping[str, Any]) -> Iterator[str]:
        """One line for each flag of the command line that makes the run differ from the recipe."""
        for name, value in given.items():
            known = self.settings({}).get(name, "its default")
            value = getattr(value, "value", value)
            if shapes_training(name) and value != known:
                yield f"{name}: {value} (recipe: {known})"

    def other_depth(self, given: Mapping[str, Any]) -> str:
        """A warning if the flags change the number of layers, but the settings do not follow it; empty if not.

        A base that is a width alone, as in recipes of earlier versions, is as deep as the model.
        """
        flags = self.settings(given) | dict(given)
        if "mup_base_width" not in flags or "mup_base_depth" in flags:
            return ""
        if given.get("depth") is not None:
            return f"depth is {given['depth']}: {_NO_BASE_DEPTH}"
        if "config_overrides" not in given:
            return ""
        own, asked = (parse_overrides(flags.get("config_overrides")) for flags in (self.model, given))
        changed = [
            f"{name} is {asked.get(name, 'its default')}, {own.get(name, 'its default')} on the proxies"
            for name in sorted(DEPTH_FIELDS & (own.keys() | asked.keys()))
            if asked.get(name) != own.get(name)
        ]
        if not changed:
            return ""
        return f"{', '.join(changed)}: {_NO_BASE_DEPTH}"

    def check(self, path: str, given: Mapping[str, Any]) -> None:
        """Refuses a model that the recipe was not made for.

        Args:
            path: of the recipe, for messages.
            given: the flags of the command line.

        Raises:
            ConfigurationError: another family, a width below the narrowest proxy's, or no model to train.
        """
        family, narrowest = self.model["model_type"], min(self.losses, default=0)
        checkpoint, width = given.get("model_name_or_path"), given.get("width")
        if checkpoint is not None:
            try:
                config = AutoConfig.from_pretrained(checkpoint)
            except (OSError, ValueError) as error:
                reason = str(error).splitlines()[0]
                raise ConfigurationError("model_name_or_path", checkpoint, f"cannot be loaded: {reason}") from None
            self._require_family("model_name_or_path", checkpoint, config.model_type)
            self._require_width("model_name_or_path", checkpoint, text_width(config), narrowest)
            return
        if "config_overrides" not in self.model:
            raise ConfigurationError("recipe", path, "is for fine-tuning: give --model_name_or_path")
        self._require_family("model_type", given.get("model_type", family), given.get("model_type", family))
        if width is not None:
            self._require_width("width", width, width, narrowest)

    def _require_family(self, flag: str, value: object, family: str) -> None:
        expected = self.model["model_type"]
        if family != expected:
            is_other = "" if value == family else f"is of the family {family}; "
            raise ConfigurationError(flag, value, f"{is_other}must be of the recipe's model family, {expected}")

    def _require_width(self, flag: str, value: object, width: int, narrowest: int) -> None:
        if width < narrowest:
            raise ConfigurationError(flag, value, f"must be at least as wide as the recipe's proxy, {narrowest}")


_COMMENTS = {
    "transfer": "What the proxies said: validation losses of this setting by width, in nats per token.",
    "optimizer": "Searched on the proxies, or held at these values there.",
    "base": "The model at which the settings above hold as they stand; in a wider one they are scaled from it (μP).",
    "model": "The family, and the model from scratch before --width and --depth scale it.",
    "data": "What to train and evaluate on.",
    "training": "Batch, length and schedule; the batch size is for one process and is divided among several.",
    "source": "Where this comes from; for you, not read.",
}
# What a wide run cannot do without, section by section.
_REQUIRED = {
    "transfer": ("confirmed", "verdict", "losses"),
    "optimizer": ("optim", "learning_rate"),
    "model": ("model_type",),
    "training": ("per_device_train_batch_size", "gradient_accumulation_steps"),
}


def write_recipe(recipe: Recipe, path: Path) -> None:
    """Writes the file whole or not at all."""
    confirmed = (
        "" if recipe.transfer["confirmed"] else "# NOT CONFIRMED, see below: train wide with it at your own risk.\n"
    )
    command = "--width 512" if "config_overrides" in recipe.model else "--model_name_or_path CHECKPOINT"
    parts = [
        "# Settings found on small models for training a wide one:\n"
        f"#     accelerate launch -m hf_so2 train --recipe {path} {command}\n"
        "# Flags behind these override what is written here, and the run reports them as overrides.\n"
        f"{confirmed}recipe: {VERSION}  # version of the format\n"
    ]
    for entry in fields(Recipe):
        section = dict(getattr(recipe, entry.name))
        if section:
            text = yaml.safe_dump({entry.name: section}, sort_keys=False, allow_unicode=True, width=100)
            parts.append(f"# {_COMMENTS[entry.name]}\n{text}")
    partial = path.with_suffix(".partial")
    partial.write_text("\n".join(parts), encoding="utf-8")
    partial.replace(path)


def read_recipe(name: str) -> Recipe:
    """Reads and checks a file that :func:`write_recipe` wrote and a person may have edited.

    Raises:
        ConfigurationError: the file is missing or no recipe, of another version, lacks something or has unknown keys.
    """
    path = Path(name)
    if not path.is_file():
        raise ConfigurationError("recipe", name, "must be an existing file")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigurationError("recipe", name, f"cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict) or "recipe" not in content:
        raise ConfigurationError("recipe", name, "must be a recipe.yaml that `hf-so2 sweep` wrote")
    version = content.pop("recipe")
    if version != VERSION:
        raise ConfigurationError("recipe", version, f"is another version of the format; must be {VERSION} in {name}")
    sections = {entry.name for entry in fields(Recipe)}
    _refuse_unknown(name, "", content, sections)
    for section in sections:
        content.setdefault(section, {})
        if not isinstance(content[section], dict):
            raise ConfigurationError("recipe", name, f"must hold a mapping in its section {section}")
        for key in _REQUIRED.get(section, ()):
            if key not in content[section]:
                raise ConfigurationError("recipe", name, f"lacks {section}.{key}")
    for section, known in _known_flags().items():
        _refuse_unknown(name, f"{section}.", content[section], known)
    return Recipe(**content)


def _refuse_unknown(name: str, prefix: str, content: Mapping[str, Any], known: set[str]) -> None:
    for key in content:
        if key not in known:
            hint = did_you_mean(str(key), known)
            raise ConfigurationError("recipe", name, f"has the unknown key {prefix}{key}{hint}")


def _known_flags() -> dict[str, set[str]]:
    training = {entry.name for entry in fields(SecondOrderTrainingArguments) if entry.init}
    return {
        "transfer": {*_REQUIRED["transfer"], "depth_losses", "exponents"},
        "optimizer": training,
        "base": set(BASE_FIELDS),
        "model": {entry.name for entry in fields(ModelArguments)},
        "data": {entry.name for entry in fields(DataArguments)},
        "training": training,
    }
