"""Factors that a family puts between a stored weight and its layer, from its own configuration.

Granite, Cohere, MiniCPM and Falcon-H1 have multipliers of their own, Gemma and others multiply embeddings by the square
root of the width. Where such a factor differs between base and model, the table of `rules` must hold for its product
with the weight, so the ratio goes into `ParameterWidth.scale_in` or `scale_out`: nothing is applied twice, and nothing
of the family's own is undone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from hf_so2.errors import ConfigurationError
from hf_so2.orientation import orientations, weight_norms


@dataclass(frozen=True)
class NativeFactor:
    """One factor of one group of families.

    Args:
        families: `model_type` of the language model's configuration, as a regular expression.
        parameters: names of the weights concerned, as a regular expression to search for; `EMBEDDING` and `HEAD` stand
            for the model's input and output embeddings.
        value: the factor, from the configuration.
        on_input: the factor multiplies the layer's input; otherwise its output.
    """

    families: str
    parameters: str
    value: Callable[[Any], float]
    on_input: bool = False


EMBEDDING, HEAD = "<embedding>", "<head>"
_GRANITE = "granite.*"
_FALCON = "falcon_h1"
_T5 = "t5|umt5|longt5|switch_transformers|pop2piano|udop"


def _scales_decoder(config: Any) -> bool:
    return bool(getattr(config, "scale_decoder_outputs", config.tie_word_embeddings))


NATIVE_FACTORS = (
    # The square root of the width on embeddings, where it is not an attribute of the embedding module.
    NativeFactor("afmoe", EMBEDDING, lambda c: c.hidden_size**0.5 if c.mup_enabled else 1.0),
    NativeFactor("big_bird", EMBEDDING, lambda c: c.hidden_size**0.5 if c.rescale_embeddings else 1.0),
    NativeFactor("ctrl|recurrent_gemma", EMBEDDING, lambda c: c.hidden_size**0.5),
    NativeFactor("musicgen.*", EMBEDDING, lambda c: c.hidden_size**0.5 if c.scale_embedding else 1.0),
    # Multipliers of the family's own.
    NativeFactor(f"{_GRANITE}|hyperclovax|{_FALCON}", EMBEDDING, lambda c: c.embedding_multiplier),
    NativeFactor(_GRANITE, HEAD, lambda c: 1.0 / c.logits_scaling),
    NativeFactor("hyperclovax", HEAD, lambda c: c.logits_scaling),
    NativeFactor("cohere.*", HEAD, lambda c: 1.0 if c.logit_scale is None else c.logit_scale),
    # T5 scales what its head is fed where the head is tied, and where its own config says so.
    NativeFactor(_T5, HEAD, lambda c: c.d_model**-0.5 if _scales_decoder(c) else 1.0, on_input=True),
    NativeFactor("minicpm3", HEAD, lambda c: 1.0 / c.logits_scaling, on_input=True),
    NativeFactor("inkling_text", HEAD, lambda c: 1.0 / c.logits_mup_width_multiplier, on_input=True),
    NativeFactor("inkling2_text", r"_input\.query$|\.query$", lambda c: c.hidden_size**-0.5),
    NativeFactor(_FALCON, HEAD, lambda c: c.lm_head_multiplier),
    NativeFactor(_FALCON, r"self_attn\.[qkv]_proj\.weight$", lambda c: c.attention_in_multiplier, on_input=True),
    NativeFactor(_FALCON, r"self_attn\.k_proj\.weight$", lambda c: c.key_multiplier),
    NativeFactor(_FALCON, r"self_attn\.o_proj\.weight$", lambda c: c.attention_out_multiplier),
    NativeFactor(_FALCON, r"feed_forward\.gate_proj\.weight$", lambda c: c.mlp_multipliers[0]),
    NativeFactor(_FALCON, r"feed_forward\.down_proj\.weight$", lambda c: c.mlp_multipliers[1]),
    NativeFactor(_FALCON, r"mamba\.in_proj\.weight$", lambda c: c.ssm_in_multiplier, on_input=True),
    NativeFactor(_FALCON, r"mamba\.out_proj\.weight$", lambda c: c.ssm_out_multiplier),
    # Projections of normalised activations, divided by a power of the width.
    NativeFactor("gemma3n.*", r"altup\.modality_router\.weight$", lambda c: 1.0 / c.hidden_size, on_input=True),
    NativeFactor("gemma3n.*|gemma4.*", r"per_layer_model_projection\.weight$", lambda c: c.hidden_size**-0.5),
    NativeFactor("gemma4.*", r"router\.proj\.weight$", lambda c: c.hidden_size**-0.5, on_input=True),
)


def native_factors(model: nn.Module) -> dict[str, tuple[float, float]]:
    """`(factor on the input, factor on the output)` by parameter name, for parameters that have one.

    Args:
        model: a transformers model, on any device; other modules have no native factors.
    """
    factors: dict[str, tuple[float, float]] = {}
    if not isinstance(model, PreTrainedModel):
        return factors

    def multiply(name: str, on_input: float, on_output: float) -> None:
        before = factors.get(name, (1.0, 1.0))
        factors[name] = (before[0] * on_input, before[1] * on_output)

    names = {id(parameter): name for name, parameter in model.named_parameters()}
    # Several embedding modules may share one matrix.
    embedding_modules = {id(m.weight): m for m in model.modules() if isinstance(m, nn.Embedding)}
    for module in embedding_modules.values():
        # BART's and Gemma's embedding classes hold their factor as a number.
        scale = getattr(module, "scalar_embed_scale", getattr(module, "embed_scale", None))
        if isinstance(scale, (int, float)):
            multiply(names[id(module.weight)], 1.0, float(scale))
    for direction, gain in weight_norms(model).items():
        # What a gain of weight normalization multiplies: a unit vector, whose entries shrink with its length.
        weight, scale = model.get_parameter(direction), model.get_parameter(gain)
        fan_in = math.prod(weight.shape[i] for i in orientations(model)[direction].fan_in)
        multiply(gain, 1.0, math.sqrt(fan_in * scale.numel() / weight.numel()))
    text = model.config.get_text_config(decoder=True)
    embeddings, heads = (_weights(_named(model, f"get_{end}_embeddings")) for end in ("input", "output"))
    # A tied head's factor belongs to the logits, not to the matrix: see `logits_factor`.
    untied = [weight for weight in heads if all(weight is not embedding for embedding in embeddings)]
    stand_ins = {EMBEDDING: embeddings, HEAD: untied}
    for native in NATIVE_FACTORS:
        if not re.fullmatch(native.families, text.model_type):
            continue
        if native.parameters in stand_ins:
            found = [names[id(weight)] for weight in stand_ins[native.parameters]]
        else:
            found = [name for name in names.values() if re.search(native.parameters, name)]
        for name in found:
            value = _value(native, text)
            multiply(name, *((value, 1.0) if native.on_input else (1.0, value)))
    return factors


def _value(native: NativeFactor, config: Any) -> float:
    """The factor; 1 where a family of a similar name (Cohere's speech recognizer) has no field for it."""
    try:
        return float(native.value(config))
    except AttributeError:
        return 1.0


def _named(model: nn.Module, getter: str) -> nn.Module | nn.Parameter | None:
    """What a model names as its embedding or head; None where it has none or does not say (CLIP, Wav2Vec2)."""
    try:
        found: nn.Module | nn.Parameter | None = getattr(model, getter)()
    except (AttributeError, NotImplementedError):
        return None
    return found


def _weights(layer: nn.Module | nn.Parameter | None) -> list[nn.Parameter]:
    """The matrices of an embedding or a head, of which a model may have several."""
    if isinstance(layer, nn.Parameter):  # the Perceiver's latents
        return [layer]
    found = [] if layer is None else [getattr(module, "weight", None) for module in layer.modules()]
    return [weight for weight in found if isinstance(weight, nn.Parameter)]


def logits_factor(config: PretrainedConfig) -> float:
    """The family's own factor on the logits."""
    text = config.get_text_config(decoder=True)
    factor = 1.0
    for native in NATIVE_FACTORS:
        if native.parameters == HEAD and re.fullmatch(native.families, text.model_type):
            factor *= _value(native, text)
    return factor


def check_comparable(config: PretrainedConfig, base: PretrainedConfig) -> None:
    """Refuses factors whose difference between base and model cannot be attributed to whole weights.

    Raises:
        ConfigurationError: Falcon-H1's per-segment multipliers differ.
    """
    text, base_text = config.get_text_config(decoder=True), base.get_text_config(decoder=True)
    segments, base_segments = (getattr(c, "ssm_multipliers", None) for c in (text, base_text))
    if segments != base_segments:
        raise ConfigurationError("ssm_multipliers", segments, f"must equal the base's, {base_segments!r}")
