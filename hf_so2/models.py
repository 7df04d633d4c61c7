"""Causal language models from flags: from scratch by type, overrides, width and depth, or from a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Literal

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from hf_so2.errors import ConfigurationError
from hf_so2.mup import scale_depth, scale_width
from hf_so2.mup.widths import REFUSALS
from hf_so2.spelling import did_you_mean

logger = logging.get_logger(__name__)

# Entries of every config that say what it is, not how the model is built.
IDENTITY_FIELDS = {"model_type", "architectures", "transformers_version", "_name_or_path"}


@dataclass
class ModelArguments:
    """Which model to train: a new one of ``model_type``, or the checkpoint ``model_name_or_path``."""

    _argument_group_name = "model"

    model_name_or_path: str | None = field(default=None, metadata={"help": "checkpoint to start from"})
    model_type: str | None = field(
        default=None, metadata={"help": "type of a model from scratch, such as llama or gpt2"}
    )
    config_overrides: dict | str | None = field(
        default=None,
        metadata={"help": "its config, as hidden_size=128,num_hidden_layers=4 or as JSON; a mapping in YAML"},
    )
    width: int | None = field(
        default=None,
        metadata={"help": "scale the model from scratch to this hidden size, heads and MLP along with it"},
    )
    depth: int | None = field(
        default=None, metadata={"help": "scale the model from scratch to this number of layers, lists of kinds with it"}
    )
    head: Literal["count", "size"] = field(
        default="count", metadata={"help": "what grows with --width: the number of heads or their size"}
    )

    def __post_init__(self) -> None:
        if self.model_name_or_path is None and self.model_type is None:
            raise ConfigurationError("model_type", None, "must be given, or model_name_or_path for a checkpoint")
        for name in ("width", "depth"):
            size = getattr(self, name)
            if self.model_name_or_path is not None and size is not None:
                raise ConfigurationError(name, size, "must be left out with model_name_or_path, which has its own")
            if size is not None and size < 1:  # before any data are prepared
                raise ConfigurationError(name, size, "must be a positive number")


def build_model_and_config(
    arguments: ModelArguments, tokenizer: PreTrainedTokenizerBase, *, seed: int, cache_dir: str | None = None
) -> tuple[PreTrainedModel, PreTrainedConfig]:
    """The model that ``arguments`` describe, in float32 on the CPU, and its config.

    Args:
        arguments: the model's flags.
        tokenizer: gives the size of the vocabulary and the special tokens of a model from scratch.
        seed: of the initialization; equal seeds give bit-equal parameters.
        cache_dir: where checkpoints of the Hub are cached.

    Raises:
        ConfigurationError: unknown model type or override, values that make no model, a width that does not
            divide into heads, a depth that the family cannot have, a checkpoint that cannot be loaded or does not fit
            the tokenizer.
    """
    if arguments.model_name_or_path is not None:
        model = _load_checkpoint(arguments, cache_dir)
        _require_vocabulary(model, tokenizer, "model_name_or_path", arguments.model_name_or_path)
        return model, model.config
    config = build_config(arguments, tokenizer)
    set_seed(seed)
    try:
        model = AutoModelForCausalLM.from_config(config)
    except torch.OutOfMemoryError:
        raise
    except REFUSALS as error:
        raise ConfigurationError("config_overrides", arguments.config_overrides, _one_line(error)) from error
    _require_vocabulary(model, tokenizer, "config_overrides", arguments.config_overrides)
    return model, model.config


def build_config(arguments: ModelArguments, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    """The config of a model from scratch; see :func:`build_model_and_config`."""
    model_type = arguments.model_type
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        hint = did_you_mean(str(model_type), MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
        raise ConfigurationError("model_type", model_type, f"must be a causal language model of transformers{hint}")
    overrides = parse_overrides(arguments.config_overrides)
    defaults = AutoConfig.for_model(model_type)
    known = (set(defaults.to_dict()) | set(defaults.attribute_map)) - IDENTITY_FIELDS
    for name in overrides:
        if name not in known:
            raise ConfigurationError(
                "config_overrides",
                name,
                f"must name a field of {type(defaults).__name__}{did_you_mean(name, known)}",
            )
    from_tokenizer = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    settings = {name: value for name, value in from_tokenizer.items() if name in known} | overrides
    try:
        config = AutoConfig.for_model(model_type, **settings)
        config.to_dict()  # a value that a checkpoint could not hold is refused here, not when the first one is saved
    except REFUSALS as error:
        raise ConfigurationError("config_overrides", arguments.config_overrides, _one_line(error)) from error
    _require_whole_heads(config)
    if arguments.depth is not None:
        config = scale_depth(config, arguments.depth)
    if arguments.width is None:
        return config
    return scale_width(config, width=arguments.width, head=arguments.head)


class Vocabulary(SimpleNamespace):
    """Stands in for a tokenizer where only the size of its vocabulary is asked for."""

    def __init__(self, size: int) -> None:
        super().__init__(bos_token_id=0, eos_token_id=1, pad_token_id=None)
        self.size = size

    def __len__(self) -> int:
        return self.size


def parse_overrides(overrides: Mapping[str, Any] | str | None) -> dict[str, Any]:
    """Config fields from a mapping, a JSON object or ``name=value,name=value``; values are JSON where they can be.

    Raises:
        ConfigurationError: the text is none of these.
    """
    if not overrides:
        return {}
    if isinstance(overrides, str) and overrides.lstrip().startswith("{"):
        try:
            overrides = json.loads(overrides)
        except json.JSONDecodeError as error:
            raise ConfigurationError("config_overrides", overrides, f"must be valid JSON: {error}") from error
    if not isinstance(overrides, str):
        # YAML reads 2e-2, without a point, as text.
        return {name: _value(value) if isinstance(value, str) else value for name, value in overrides.items()}
    parsed = {}
    for assignment in overrides.split(","):
        name, equals, value = assignment.partition("=")
        if not equals or not name.strip():
            raise ConfigurationError("config_overrides", overrides, "must read name=value,name=value")
        parsed[name.strip()] = _value(value.strip())
    return parsed


def require_positions(config: PreTrainedConfig, length: int, name: str = "max_seq_length") -> None:
    """Refuses sequences longer than the model's positions: learned ones would fail in the middle of a run.

    Raises:
        ConfigurationError: ``length``, given by the flag ``name``, exceeds ``max_position_embeddings``.
    """
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and length > positions:
        raise ConfigurationError(name, length, f"must be at most the model's {positions} positions")


def _load_checkpoint(arguments: ModelArguments, cache_dir: str | None) -> PreTrainedModel:
    if arguments.model_type is not None or arguments.config_overrides is not None:
        logger.warning("model_type and config_overrides are not used: the checkpoint has its own config.")
    try:
        # Parameters stay float32 whatever the checkpoint is stored in: --bf16 computes by autocast.
        return AutoModelForCausalLM.from_pretrained(
            arguments.model_name_or_path, dtype=torch.float32, cache_dir=cache_dir
        )
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            "model_name_or_path", arguments.model_name_or_path, f"cannot be loaded: {_one_line(error)}"
        ) from error


def _require_whole_heads(config: PreTrainedConfig) -> None:
    """Refuses a width that does not divide into heads: some families notice only in the forward pass."""
    hidden, heads, groups, size = (
        getattr(config, name, None)
        for name in ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    )
    if isinstance(hidden, int) and isinstance(heads, int) and size is None and (heads < 1 or hidden % heads):
        raise ConfigurationError("hidden_size", hidden, f"must be a multiple of the {heads} attention heads")
    if isinstance(heads, int) and isinstance(groups, int) and (groups < 1 or heads % groups):
        raise ConfigurationError("num_key_value_heads", groups, f"must divide the {heads} attention heads")


def _require_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str, value: object) -> None:
    rows = model.get_input_embeddings().weight.shape[0]
    if rows < len(tokenizer):
        raise ConfigurationError(name, value, f"must embed the tokenizer's {len(tokenizer)} tokens, not only {rows}")


def _value(text: str) -> Any:
    """A JSON value; ``True``, ``False`` and ``None`` as in Python too; otherwise the text itself."""
    try:
        return json.loads({"True": "true", "False": "false", "None": "null"}.get(text, text))
    except json.JSONDecodeError:
        return text


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
