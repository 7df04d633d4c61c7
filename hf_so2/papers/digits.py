"""Handwritten digits that come with scikit-learn, and networks for them: nothing is downloaded."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_so2.errors import ConfigurationError

PIXELS, CLASSES = 64, 10
TRAINING = 1347  # of 1,797: three quarters


def require_extra() -> None:
    """Refuses to start without scikit-learn, which the core package does not need.

    Raises:
        ConfigurationError: it is not installed.
    """
    if importlib.util.find_spec("sklearn") is None:
        raise ConfigurationError("scikit-learn", None, "is needed here; install it by: pip install 'hf_so2[papers]'")


@dataclass(frozen=True)
class Digits:
    """Images and labels, split at random but always alike.

    Args:
        images: (1347, 64), in [0, 1].
        labels: (1347,), integers.
        test_images: (450, 64).
        test_labels: (450,).
    """

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    @classmethod
    def load(cls, dtype: torch.dtype = torch.float32) -> Digits:
        """The data set, 1,797 images of 8 x 8 pixels.

        Raises:
            ConfigurationError: scikit-learn is not installed.
        """
        require_extra()
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        x, y = torch.as_tensor(images, dtype=dtype)[order] / 16, torch.as_tensor(labels)[order].long()
        return cls(x[:TRAINING], y[:TRAINING], x[TRAINING:], y[TRAINING:])

    def batches(self, steps: int, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """`steps` batches of `size` examples, drawn with replacement."""
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            chosen = torch.randint(TRAINING, (size,), generator=generator)
            yield self.images[chosen], self.labels[chosen]


def mlp(width: int, layers: int, seed: int, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Linear layers without biases and ReLUs between, He's initialisation, torch's global generator left alone.

    Without biases every parameter is in a Kronecker block, and nothing is left to a first-order fallback.
    """
    sizes = [PIXELS, *[width] * (layers - 1), CLASSES]
    generator = torch.Generator().manual_seed(seed)
    modules: list[nn.Module] = []
    for index, (fan_in, fan_out) in enumerate(itertools.pairwise(sizes)):
        linear = nn.Linear(fan_in, fan_out, bias=False, dtype=dtype)
        with torch.no_grad():
            gain = 1 if index == layers - 1 else 2
            linear.weight.normal_(0.0, (gain / fan_in) ** 0.5, generator=generator)
        modules += [linear, nn.ReLU()]
    return nn.Sequential(*modules[:-1])
