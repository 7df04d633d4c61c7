"""Forward hooks that do not restrict a model: it can be copied, saved whole and trained by another optimizer."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

from torch import nn


class Hook:
    """Reports the calls of one module to a capture. Register it with `with_kwargs=True`.

    The hook does not keep the capture alive. Copies of a model (an average of its weights, a reference, a saved file)
    have copies of the hook. These report nothing, since the optimizer does not train on the data that a copy sees.

    Args:
        capture: the capture to report to, or None.
        event: the name of the method that is called with `about`, the module, its arguments and, after a call, its
            output.
        about: additional arguments of this method.
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
