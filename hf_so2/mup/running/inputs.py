"""Small inputs that a model of any family runs on: tokens, pixels, spectrograms or waveforms.

What a family wants besides its main input (decoder tokens, a sentence's end, patches that are cut already) is tried,
not looked up: `example_inputs` yields forms from the simplest to the most demanding.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

Inputs: TypeAlias = dict[str, Any]

TOKENS = 16
_WAVEFORM = 4000
_FRAMES = 64
_LARGEST_IMAGE = 64
_BINS = ("num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim", "input_dim", "n_mels")


def example_inputs(model: PreTrainedModel, batch: int = 1) -> Iterator[Inputs]:
    """Yields arguments of the model's `forward`, the simplest first; a model runs on at least one of them or on none.

    Args:
        model: on any device, where the inputs will be.
        batch: number of examples. A single one has the tokens 3, 4, 5, …; several are drawn, always the same.
    """
    main = model.main_input_name
    parameters = inspect.signature(model.forward).parameters
    if main not in parameters and "input_ids" in parameters:
        main = "input_ids"
    generator = torch.Generator().manual_seed(0)
    for inputs in _forms(model, main, batch, generator):
        for complete in _with_decoder(model, inputs, parameters, batch):
            quiet = {"use_cache": False} if "use_cache" in parameters else {}
            device = next(model.parameters()).device
            yield {k: v.to(device) if isinstance(v, Tensor) else v for k, v in complete.items()} | quiet


def _forms(model: PreTrainedModel, main: str, batch: int, generator: torch.Generator) -> Iterator[Inputs]:
    config = model.config
    if main == "inputs" and "Speech" in type(model).__name__:
        yield {main: torch.randn(batch, _WAVEFORM, generator=generator)}
    elif main == "input_ids" or (main == "inputs" and not _is_image_model(model)):
        for length in (TOKENS, 2 * TOKENS, 8 * TOKENS):
            tokens = _tokens(config, batch, length)
            yield {main: tokens}
            end = _found(config, "eos_token_id")
            if isinstance(end, int):
                yield {main: torch.cat([tokens[:, :-1], torch.full((batch, 1), end)], dim=1)}
            separator = _found(config, "sep_token_id")
            if isinstance(separator, int):  # question, two separators, context
                parted = tokens.masked_fill(tokens == separator, separator + 1)
                parted[:, [4, 5, -1]] = separator
                yield {main: parted}
    elif main in ("pixel_values", "inputs"):
        channels, height, width = _image(config)
        pixels = torch.randn(batch, channels, height, width, generator=generator)
        yield {main: pixels}
        yield {main: pixels, "input_ids": _tokens(config, batch, TOKENS)}
        patch = _found(config, "patch_size") or 16
        if isinstance(patch, int):  # cut into patches already
            side = 4
            yield {
                main: torch.randn(batch, side * side, channels * patch * patch, generator=generator),
                "pixel_attention_mask": torch.ones(batch, side * side, dtype=torch.long),
                "spatial_shapes": torch.tensor([[side, side]] * batch),
            }
    elif main == "input_values":
        yield {main: torch.randn(batch, _WAVEFORM, generator=generator)}
        yield from _spectrograms(config, main, batch, generator)
        yield {main: torch.randn(batch, 1, _WAVEFORM, generator=generator)}
    elif main == "input_features":
        yield from _spectrograms(config, main, batch, generator)
    else:
        yield {main: _tokens(config, batch, TOKENS)}


def _with_decoder(model: PreTrainedModel, inputs: Inputs, parameters: Any, batch: int) -> Iterator[Inputs]:
    """The same with tokens for the decoder, where there is one; some make them from the encoder's themselves."""
    if "decoder_input_ids" not in parameters:
        yield inputs
        return
    tokens = next((value for value in inputs.values() if value.dtype == torch.long), None)
    yield inputs | {"decoder_input_ids": _tokens(model.config, batch, TOKENS) if tokens is None else tokens}
    yield inputs
    bins = _found(model.config, "num_mel_bins")
    if "decoder_input_values" in parameters and bins:
        yield inputs | {"decoder_input_values": torch.zeros(batch, TOKENS, bins)}


def _spectrograms(config: PretrainedConfig, main: str, batch: int, generator: torch.Generator) -> Iterator[Inputs]:
    bins = next((found for name in _BINS if (found := _found(config, name))), 16)
    positions, length = _found(config, "max_source_positions"), _found(config, "max_length")
    # Whisper takes all of its positions, two frames each; AST an image of a fixed length.
    lengths = [_FRAMES, *([2 * positions] if positions else []), *([length] if length else [])]
    for frames in dict.fromkeys(lengths):
        yield {main: torch.randn(batch, frames, bins, generator=generator)}
        yield {main: torch.randn(batch, bins, frames, generator=generator)}


def _tokens(config: PretrainedConfig, batch: int, length: int) -> Tensor:
    vocabulary = _found(config.get_text_config(decoder=True), "vocab_size") or _found(config, "vocab_size")
    vocabulary = vocabulary or min(_found(config, n) or 128 for n in ("src_vocab_size", "tgt_vocab_size"))
    if batch == 1:
        return torch.arange(3, 3 + length).remainder(vocabulary)[None]
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, vocabulary - 3, (batch, length), generator=generator)


def _is_image_model(model: PreTrainedModel) -> bool:
    return "Image" in type(model).__name__


def _image(config: PretrainedConfig) -> tuple[int, int, int]:
    channels, size = _found(config, "num_channels") or 3, _found(config, "image_size") or _LARGEST_IMAGE
    height, width = size[:2] if isinstance(size, (list, tuple)) else (size, size)
    return channels, height, width


def _found(config: PretrainedConfig, name: str) -> Any:
    """The field of a configuration or of one inside it."""
    value = getattr(config, name, None)
    if value is not None:
        return value
    nested = [inner for inner in vars(config).values() if isinstance(inner, PretrainedConfig)]
    return next((found for inner in nested if (found := _found(inner, name)) is not None), None)
