"""The proxies of a sweep: flags of the small models, and the recipe for the wide one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from hf_so2 import cli
from hf_so2.data import DataArguments, load_corpus
from hf_so2.errors import ConfigurationError
from hf_so2.methods.table import MUP_SUFFIX
from hf_so2.models import ModelArguments, build_config, parse_overrides, require_positions
from hf_so2.mup.depth.configs import scale_depth, text_depth
from hf_so2.mup.widths import RECORD_FIELD, text_width
from hf_so2.training.argument_fields import BASE_FIELDS
from hf_so2.training.arguments import SecondOrderTrainingArguments
from hf_so2.transfer.recipe import Recipe, shapes_training
from hf_so2.transfer.runner import TYPES
from hf_so2.transfer.space import Params, Space
from hf_so2.transfer.trials import Size

# What a recipe says even where nobody asked for it: a later default must not change the run.
_SPELLED_OUT = (
    "per_device_train_batch_size gradient_accumulation_steps lr_scheduler_type warmup_steps max_grad_norm seed"
).split()
_SPELLED_OUT_DATA = ("max_seq_length", "vocab_size", "validation_split_percentage")


@dataclass(frozen=True)
class Proxy:
    """A small model to tune on.

    Args:
        width: its hidden size.
        config: of the model.
        flags: of its training runs, by name.
        depth: its number of layers; None where depths were not asked for.
    """

    width: int
    config: PretrainedConfig
    flags: Mapping[str, Any] = field(repr=False)
    depth: int | None = None

    @property
    def size(self) -> Size:
        """What its study is called by; without the depth where a sweep over widths alone has the same proxy."""
        return self.width if self.depth is None or "depth" not in self.flags else (self.width, self.depth)

    def __str__(self) -> str:
        return f"width {self.width}" + ("" if self.depth is None else f" depth {self.depth}")

    @property
    def optim(self) -> str:
        """The optimizer's name."""
        return str(_plain(self.flags.get("optim", SecondOrderTrainingArguments.optim)))

    def arguments(self, **changes: Any) -> tuple[ModelArguments, DataArguments, SecondOrderTrainingArguments]:
        """The flags as a training run reads them, some of them changed."""
        model, data, training = cli.build(TYPES, {**self.flags, **changes})
        return model, data, training


def proxies_of(
    flags: Mapping[str, Any], widths: Sequence[int], checkpoints: Sequence[str], depths: Sequence[int] = ()
) -> list[Proxy]:
    """The proxies, narrow ones first and shallow ones of one width, with the μP base at the first unless a smaller one
    was given.

    Also prepares the data, once for all trials.

    Args:
        flags: of the training runs.
        widths: hidden sizes of models from scratch; or
        checkpoints: models to fine-tune.
        depths: numbers of layers of models from scratch, each at every width; as in the config if left out.

    Raises:
        ConfigurationError: models that cannot be built, data that cannot be loaded, or two proxies of one size.
    """
    if bool(widths) == bool(checkpoints):
        raise ConfigurationError("widths", list(widths), "must be given, or checkpoints to fine-tune, not both")
    if depths and checkpoints:
        raise ConfigurationError("depths", list(depths), "must be left out with checkpoints, which have their own")
    if len(set(depths)) < len(depths) or min(depths, default=1) < 1:
        raise ConfigurationError("depths", list(depths), "must be different numbers of layers")
    choices: list[dict[str, Any]] = [{"width": width} for width in widths]
    choices += [{"model_name_or_path": name} for name in checkpoints]
    proxies: list[Proxy] = []
    for choice in choices:
        own = {name: value for name, value in flags.items() if not checkpoints or name not in _MODEL_FLAGS} | choice
        (model,) = cli.build((ModelArguments,), own)
        (data,) = cli.build((DataArguments,), own)
        tokenizer = load_corpus(data, model.model_name_or_path).tokenizer
        config = build_config(model, tokenizer) if widths else AutoConfig.from_pretrained(model.model_name_or_path)
        require_positions(config, data.max_seq_length)
        proxies.append(Proxy(text_width(config), config, own))
    proxies.sort(key=lambda proxy: proxy.width)
    found = [proxy.width for proxy in proxies]
    if len(set(found)) < len(found):
        raise ConfigurationError("checkpoints" if checkpoints else "widths", found, "must be of different widths")
    base = _base_flags(flags, proxies[0], bool(checkpoints))
    proxies = [Proxy(p.width, p.config, _without_base(p.flags) | base) for p in proxies]
    given_base = flags.get("mup_base_depth")
    if depths and given_base is not None and given_base > min(depths):
        print(f"μP base: {min(depths)} layers, the shallowest proxy's, since {given_base} are more", flush=True)
    return [deep for proxy in proxies for deep in _of_depths(proxy, depths, given_base)] or proxies


def _of_depths(proxy: Proxy, depths: Sequence[int], given_base: int | None) -> Iterator[Proxy]:
    """A proxy in each of the depths; the μP base is as deep as the shallowest unless a shallower one was given."""
    own = text_depth(proxy.config) if depths else 0
    base = min([*depths, *([] if given_base is None else [given_base])], default=0)
    for depth in sorted(depths):
        flags = dict(proxy.flags)
        if "mup_base_width" in flags:
            flags["mup_base_depth"] = base
        if depth == own == base:
            # The flags of a sweep over widths alone, whose trials count.
            if given_base is None:
                flags.pop("mup_base_depth", None)
        elif depth != own or "mup_base_width" in flags:
            flags["depth"] = depth
        yield Proxy(proxy.width, scale_depth(proxy.config, depth) if depth != own else proxy.config, flags, depth)


def standard_parametrization(proxies: Sequence[Proxy], optim: str) -> list[Proxy]:
    """The same proxies under the optimizer without μP."""
    plain = optim.removesuffix(MUP_SUFFIX)
    return [Proxy(p.width, p.config, {**_without_base(p.flags), "optim": plain}, p.depth) for p in proxies]


_MODEL_FLAGS = tuple(entry.name for entry in fields(ModelArguments))


def _without_base(flags: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in flags.items() if name not in BASE_FIELDS}


def _base_flags(flags: Mapping[str, Any], narrowest: Proxy, finetuning: bool) -> dict[str, Any]:
    """The μP base: what was given where the narrowest proxy can be relative to it, else that proxy itself."""
    if not narrowest.optim.endswith(MUP_SUFFIX):
        return {}
    if "mup_base_config" in flags:
        return {"mup_base_config": flags["mup_base_config"]}
    width = flags.get("mup_base_width")
    if width is not None and width <= narrowest.width:
        return {name: flags[name] for name in ("mup_base_width", "mup_base_depth") if flags.get(name) is not None}
    if width is not None:
        print(f"μP base: width {narrowest.width}, the narrowest proxy, since {width} is wider than it", flush=True)
    depth = flags.get("mup_base_depth")
    if not finetuning:
        return {"mup_base_width": narrowest.width} | ({} if depth is None else {"mup_base_depth": depth})
    if depth is not None:
        raise ConfigurationError("mup_base_depth", depth, "needs mup_base_width with checkpoints, no wider than any")
    record = getattr(narrowest.config, RECORD_FIELD, None)
    if record is not None:  # pretrained with μP: its rates are relative to that base
        return {"mup_base_width": record["base_width"]}
    return {"mup_base_config": narrowest.config.to_diff_dict()}


def shared_settings(proxy: Proxy, space: Space) -> dict[str, Any]:
    """Everything that shapes the trials of a proxy but what is searched, as JSON can hold it."""
    return {
        name: _plain(value) for name, value in proxy.flags.items() if shapes_training(name) and name not in space.names
    } | {
        "search": f"{'grid' if space.grid else 'ranges'} of {', '.join(sorted(space.names))}",
        "model_name_or_path": proxy.flags.get("model_name_or_path"),
    }


def make_recipe(proxy: Proxy, params: Params, transfer: Mapping[str, Any], source: Mapping[str, Any]) -> Recipe:
    """The recipe of the best setting.

    Args:
        proxy: the widest and deepest one.
        params: the searched flags' best values.
        transfer: the section of that name.
        source: the section of that name.
    """
    model, data, args = proxy.arguments(**params)
    optimizer = _optimizer_flags(args)
    model_section: dict[str, Any] = {"model_type": proxy.config.model_type}
    if model.model_name_or_path is None:
        model_section |= {"config_overrides": parse_overrides(model.config_overrides), "head": model.head}
    names = [name for name in proxy.flags if shapes_training(name) and name not in (*optimizer, "optim_args")]
    training = {entry.name for entry in fields(SecondOrderTrainingArguments)} - set(BASE_FIELDS)
    base = {name: _plain(proxy.flags[name]) for name in BASE_FIELDS if name in proxy.flags}
    if "mup_base_width" in base and model.model_name_or_path is None:
        base = _base_depth(proxy.config) | base
    spelled_out = [*_SPELLED_OUT, "max_steps" if args.max_steps > 0 else "num_train_epochs"]
    return Recipe(
        transfer=transfer,
        optimizer=optimizer,
        base=base,
        model=model_section,
        data={e.name: getattr(data, e.name) for e in fields(DataArguments) if e.name in (*names, *_SPELLED_OUT_DATA)},
        training={
            name: _plain(getattr(args, name)) for name in dict.fromkeys([*spelled_out, *names]) if name in training
        },
        source=source,
    )


def _base_depth(config: PretrainedConfig) -> dict[str, int]:
    """The proxies' number of layers as a flag; empty for a family that has none."""
    try:
        return {"mup_base_depth": text_depth(config)}
    except ConfigurationError:
        return {}


def _optimizer_flags(args: SecondOrderTrainingArguments) -> dict[str, Any]:
    """`optim` and all its settings, defaults spelled out; `optim_args` is dissolved into them."""
    if not args.is_ours(args.optim):
        return {"optim": _plain(args.optim), "learning_rate": args.learning_rate, "weight_decay": args.weight_decay}
    return {name: value for name, value in args.optimizer_flags().items() if value != []}


def _plain(value: Any) -> Any:
    """As YAML and JSON can hold it."""
    return getattr(value, "value", value)
