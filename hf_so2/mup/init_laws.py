"""How a family's own initial weights depend on the width.

Most families draw every matrix with one standard deviation, some divide by the square root of fan_in. The table of
`rules` speaks of the standard deviation relative to the base model's, so what the family does already must not be done
twice. The scale of each random draw is read by running the family's own initialisation on the meta device, where
nothing is drawn: only the arguments of the random operations are recorded. That costs no memory and no randomness, and
is exact.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PretrainedConfig, PreTrainedModel, initialization

from hf_so2.errors import ConfigurationError
from hf_so2.orientation import weight_norms

from .roles import layer_pattern_of
from .rules import ParameterWidth
from .widths import rebuild

_FACTORS = {"aten::mul_": 1, "aten::mul": 1, "aten::div_": -1, "aten::div": -1}


class InitRecorder(TorchDispatchMode):
    """Follows the scale of tensors through random draws and the arithmetic that initialisers do on them.

    A scale is the standard deviation up to a constant that depends on the kind of the distribution only; it is None
    where the values are constants or were computed in a way that is not followed.
    """

    def __init__(self) -> None:
        super().__init__()
        # Tensors are known by their storage, which views share and a parameter keeps; the storage is held so that its
        # identity is not given to another.
        self._scales: dict[int, tuple[float | None, torch.UntypedStorage]] = {}

    def scale(self, tensor: torch.Tensor) -> float | None:
        return self._scales.get(tensor.untyped_storage()._cdata, (None, None))[0]

    def _set(self, tensor: torch.Tensor, scale: float | None) -> None:
        storage = tensor.untyped_storage()
        if tensor.numel() * tensor.element_size() * 2 > storage.nbytes():  # not a padding row or another small part
            self._scales[storage._cdata] = (scale, storage)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not args or not isinstance(args[0], torch.Tensor):
            return result
        target, name, values = args[0], func._schema.name, args[1:]
        number = next((float(v) for v in values if isinstance(v, (int, float)) and not isinstance(v, bool)), None)
        if name == "aten::normal_":
            self._set(target, float(values[1]) if len(values) > 1 else 1.0)
        elif name == "aten::uniform_":
            low, high = values if len(values) == 2 else (0.0, 1.0)
            self._set(target, (high - low) / math.sqrt(12))
        elif name == "aten::erfinv_":
            self._set(target, 1.0)  # of a uniform draw: the second half of a truncated normal
        elif name in ("aten::fill_", "aten::zero_"):
            self._set(target, None)
        elif name == "aten::copy_":
            self._set(target, self.scale(values[0]))
        elif name in _FACTORS and number is not None and (scale := self.scale(target)) is not None:
            self._set(result, scale * number ** _FACTORS[name])
        return result


def _trunc_normal_(
    tensor: torch.Tensor, mean: float = 0.0, std: float = 1.0, a: float = -2.0, b: float = 2.0, generator: Any = None
) -> torch.Tensor:
    """Stands in for `torch.nn.init.trunc_normal_`, which draws nothing on the meta device; bounds go with the std."""
    with torch.no_grad():
        return tensor.normal_(mean, std)


def _orthogonal_(tensor: torch.Tensor, gain: float = 1.0, generator: Any = None) -> torch.Tensor:
    """The same for `torch.nn.init.orthogonal_`: the entries of an orthogonal matrix by its longer side."""
    rows = tensor.shape[0]
    with torch.no_grad():
        return tensor.normal_(0.0, gain * max(rows, tensor.numel() // rows) ** -0.5)


@contextmanager
def _drawing_on_meta() -> Iterator[None]:
    stand_ins = {"trunc_normal_": _trunc_normal_, "orthogonal_": _orthogonal_}
    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict(initialization.TORCH_INIT_FUNCTIONS, stand_ins))
        for name, function in stand_ins.items():
            stack.enter_context(mock.patch.object(nn.init, name, function))
        yield


def init_scales(model_class: type[PreTrainedModel], config: PretrainedConfig) -> dict[str, float | None]:
    """The scale of each parameter's random initial values by name; None where they are not random."""
    with (
        torch.random.fork_rng(devices=[]),
        _drawing_on_meta(),
        InitRecorder() as recorder,
        torch.device("meta"),
        initialization.meta_device_safe_creation_ops(),
    ):
        model = model_class(rebuild(config, {}))
        parameters = dict(model.named_parameters())
        _untie(model)
        # The constructor leaves this out on the meta device.
        model.initialize_weights()
    return {name: recorder.scale(parameter) for name, parameter in parameters.items()}


def _untie(model: nn.Module) -> None:
    """Gives heads a weight of their own: a tied one is drawn as the embedding's, whatever the head's law (Funnel)."""
    looked_up = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for module in model.modules():
        for local, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) in looked_up and not isinstance(module, nn.Embedding):
                setattr(module, local, nn.Parameter(torch.empty_like(parameter)))


def natural_growth(
    model: nn.Module, base: PretrainedConfig | nn.Module, widths: Mapping[str, ParameterWidth]
) -> dict[str, float]:
    """The ratio of each parameter's initial standard deviation to the base's, before muP, by the model's names.

    Args:
        model: the model, fresh.
        base: its base configuration (only the family's code is asked) or, for a model from outside transformers, the
            base module, whose own initial weights are compared with the model's. A module's vectors are taken as they
            are.
        widths: growth of each parameter's dimensions.

    Raises:
        ConfigurationError: a base module is on the meta device, or its weights follow no power of the width.
    """
    if isinstance(base, PretrainedConfig):
        assert isinstance(model, PreTrainedModel)
        scales = init_scales(type(model), model.config)
        base_scales = init_scales(type(model), base)
        # Some families also divide by the depth. A layer that the base does not have is compared with one that it has.
        by_pattern = {layer_pattern_of(name): scale for name, scale in reversed(base_scales.items())}
        pairs = {
            name: (own, base_scales.get(name, by_pattern.get(layer_pattern_of(name)))) for name, own in scales.items()
        }
        growth = {name: own / of_base if own and of_base else 1.0 for name, (own, of_base) in pairs.items()}
        for direction, gain in weight_norms(model).items():  # a fresh gain is the length of its direction
            width = widths[direction]
            growth[gain] = growth[direction] * math.sqrt(width.m_in * width.m_out)
            # Of which lengths it is, other dimensions that grow included.
            growth[gain] /= math.sqrt(widths[gain].m_out * widths[gain].m_in)
        return growth
    base_weights = dict(base.named_parameters())
    if any(weight.is_meta for weight in base_weights.values()):
        raise ConfigurationError("base_config", "a module on the meta device", "must hold its initial weights")
    return {
        name: _power_law(name, weight, base_weights[name], widths[name])
        for name, weight in model.named_parameters()
        if weight.ndim > 1 and name in base_weights
    }


def _power_law(name: str, weight: torch.Tensor, base_weight: torch.Tensor, width: ParameterWidth) -> float:
    """The power of the width that two random draws' standard deviations differ by, free of their sampling error."""
    own, of_base = (float(tensor.detach().double().square().mean().sqrt()) for tensor in (weight, base_weight))
    if own == 0 or of_base == 0:
        return 1.0
    measured = math.log(own / of_base)
    laws = [
        (power_in, power_out, power_in * math.log(width.m_in) + power_out * math.log(width.m_out))
        for power_in, power_out in ((0, 0), (-0.5, 0), (0, -0.5), (-0.25, -0.25), (-1, 0))
    ]
    power_in, power_out, nearest = min(laws, key=lambda law: abs(law[2] - measured))
    sampling_error = math.sqrt(0.5 / weight.numel() + 0.5 / base_weight.numel())
    if abs(nearest - measured) > 5 * sampling_error:
        raise ConfigurationError(
            "base_config",
            name,
            f"is initialised {own / of_base:.3g} times as large in the model, no power of its width",
        )
    return width.m_in**power_in * width.m_out**power_out
