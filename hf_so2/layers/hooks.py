"""Forward hooks that leave a model free: to be copied, saved whole and trained by another optimizer."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

from torch import nn


class Hook:
    """Tells a capture of the calls of one module; register it with `with_kwargs=True`.

    A model does not keep the capture alive by it. Copies of the hook, made with copies of the model (an average of its
    weights, a reference, a saved file), tell nobody: what those see is not what the optimizer trains on.

    Args:
        capture: whom to tell; None for nobody.
        event: the name of the method that is called with `about`, the module, its arguments and, after a call, its
            output.
        about: what it is told besides.
    """

    def __init__(self, capture: object | None = None, event: str = "", *about: Any) -> None:
        self._capture = None if capture is None else weakref.ref(capture)
        self._event, self._about = event, about

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], *output: Any) -> None:
        capture = None if self._capture is None else self._capture()
        if capture is not None:
            getattr(capture, self._event)(*self._about, module, args, kwargs, *output)

    def __reduce__(self) -> tuple[type[Hook], tuple[()]]:
        return Hook, ()
