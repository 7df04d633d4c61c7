"""Forward hooks that leave a model free: to be copied, saved whole and trained by another optimizer."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from hf_so2.layers.adapters import LINEAR, Adapter

if TYPE_CHECKING:
    from hf_so2.layers.capture import Capture


class ForwardHook:
    """Tells a capture of the calls of one module; register it with `with_kwargs=True`.

    A model does not keep the capture alive by it. Copies of the hook, made with copies of the model (an average of its
    weights, a reference, a saved file), tell nobody: what those see is not what the optimizer trains on.

    Args:
        capture: whom to tell; None for nobody.
        name: of the weight.
        adapter: how the module stores it.
    """

    def __init__(self, capture: Capture | None = None, name: str = "", adapter: Adapter = LINEAR) -> None:
        self._capture = None if capture is None else weakref.ref(capture)
        self._name, self._adapter = name, adapter

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor) -> None:
        capture = None if self._capture is None else self._capture()
        if capture is not None:
            # Of one input, by position or by whatever name the module has for it.
            capture.called(self._name, self._adapter, args[0] if args else next(iter(kwargs.values())), output)

    def __reduce__(self) -> tuple[type[ForwardHook], tuple[()]]:
        return ForwardHook, ()
