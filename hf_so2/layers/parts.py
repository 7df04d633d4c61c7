"""Weights that hold several matrices: stacks of experts, and projections to attention heads."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from hf_so2.layers.adapters import adapter_for
from hf_so2.orientation import Orientation

# Mixtral's `experts.down_proj`, Granite's `GraniteMoeParallelExperts.weight` and their like.
EXPERT = re.compile(r"[Ee]xpert")

# Projections of one kind, by the name that an attention module gives them.
_SEPARATE = {
    **dict.fromkeys(("q_proj", "query", "query_proj", "q_lin", "q", "q_attn", "q_b_proj", "wq"), "q"),
    **dict.fromkeys(("k_proj", "key", "key_proj", "k_lin", "k", "wk"), "k"),
    **dict.fromkeys(("v_proj", "value", "value_proj", "v_lin", "v", "wv"), "v"),
}
# One weight for queries, keys and values. The layout is a matter of code: it is known for these classes only.
_FUSED = ("qkv_proj", "query_key_value", "c_attn", "Wqkv", "qkv", "in_proj_qkv", "kv_b_proj")
# All queries, then all keys, then all values.
_KIND_BY_KIND = frozenset(
    """GPT2Attention DecisionTransformerGPT2Attention ImageGPTAttention Phi3Attention Phi4MultimodalAttention
    MptAttention ModernBertAttention DbrxAttention""".split()
)
# For one key head after another: its queries, then the key, then the value.
_GROUP_BY_GROUP = frozenset(
    """GPTNeoXAttention BloomAttention FalconAttention FalconFlashAttention2 PersimmonAttention
    GPTBigCodeAttention""".split()
)
_SIZES = ("qk_head_dim", "head_dim", "attention_head_size", "head_size", "key_value_proj_dim")
_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head")
_KEY_COUNTS = ("num_key_value_heads", "num_kv_heads", "kv_heads")


@dataclass(frozen=True)
class Head:
    """The outputs of a projection that are one head's query, key or value.

    Args:
        label: its name in the projection: `head 3`, or `q head 3` in one of several kinds.
        start: its first output.
        stop: the output after its last one.
    """

    label: str
    start: int
    stop: int


@dataclass(frozen=True)
class Projection:
    """A projection to queries, keys or values.

    Args:
        heads: its heads, in the order of its outputs; none if it is to be left whole.
        reason: what it consists of, or why it is left whole.
    """

    heads: tuple[Head, ...]
    reason: str


def projections(model: nn.Module) -> dict[nn.Module, Projection]:
    """The projections to queries, keys and values of the model's attention modules.

    A projection is found by its name in a module that knows the size of a head. Its heads are known if their number is
    that of the module or of its configuration.
    """
    found = {}
    for attention in model.modules():
        for name, child in attention.named_children():
            adapter = adapter_for(child) if name in _SEPARATE or name in _FUSED else None
            size, weight = _number(attention, _SIZES), getattr(child, "weight", None)
            if adapter is not None and not adapter.one_hot and size is not None and isinstance(weight, nn.Parameter):
                found[child] = _projection(attention, name, weight.shape[1 if adapter.transposed else 0], size)
    return found


def _projection(attention: nn.Module, name: str, outputs: int, size: int) -> Projection:
    count = _number(attention, _COUNTS)
    keys = _number(attention, _KEY_COUNTS) or count
    kind, class_name = _SEPARATE.get(name), type(attention).__name__
    if kind is None and class_name not in _KIND_BY_KIND | _GROUP_BY_GROUP:
        return Projection((), f"whole: the layout of heads in {class_name}.{name} is not known")
    if count is None or keys is None:
        return Projection((), f"whole: {class_name} does not say how many heads it has")
    of_kinds = {"q": count, "k": keys, "v": keys}
    if kind is not None:
        order = [kind] * of_kinds[kind]
    elif class_name in _GROUP_BY_GROUP:
        order = [*"q" * (count // keys), "k", "v"] * keys
    else:
        # GPT-2's cross-attention has the queries in another weight.
        order = [kind for kind in ("kv" if "q_attn" in attention._modules else "qkv") for _ in range(of_kinds[kind])]
    if len(order) * size != outputs:
        return Projection((), f"whole: {outputs} outputs are not {len(order)} heads of {size}")
    told = ", ".join(f"{order.count(kind)} {kind}" for kind in "qkv" if kind in order)
    if len(order) == 1:
        return Projection((), "whole: it has a single head")
    return Projection(tuple(_heads(order, size, fused=kind is None)), f"by head: {told} of {size}")


def _heads(order: Sequence[str], size: int, *, fused: bool) -> Iterator[Head]:
    for position, kind in enumerate(order):
        label = f"{kind} head" if fused else "head"
        yield Head(f"{label} {order[:position].count(kind)}", position * size, (position + 1) * size)


def _number(attention: nn.Module, names: Sequence[str]) -> int | None:
    """The first of these attributes that is a number: the module's own, else its configuration's."""
    owners = (attention, getattr(attention, "config", None))
    values = (getattr(owner, name, None) for owner in owners for name in names)
    return next((value for value in values if isinstance(value, int) and not isinstance(value, bool)), None)


def is_stack(name: str, layout: Orientation, modules: Sequence[nn.Module]) -> bool:
    """Whether a parameter holds the matrices of several experts, one after the other along its first dimension.

    Other weights have three dimensions, too (convolutions, tables of positions). The shape does not tell them apart, so
    the name of the parameter or of its module's class has to.
    """
    is_named = any(EXPERT.search(text) for text in (name, *(type(module).__name__ for module in modules)))
    return is_named and layout.batch == (0,) and len(layout.fan_out) == len(layout.fan_in) == 1
