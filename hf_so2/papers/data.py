"""What the experiments train on, without a download: scikit-learn's handwritten digits and the embedded corpus."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_so2.data.corpora import standard_library_sources
from hf_so2.errors import ConfigurationError

PIXELS, CLASSES = 64, 10
TRAINING = 1347  # of 1,797: three quarters
BYTES, BLOCK = 256, 64  # of the text: the vocabulary, and bytes in an example
HELD_OUT = 64  # blocks of text
TEXT = 1_000_000  # bytes to train on: no run here reads them all


@dataclass(frozen=True)
class Examples:
    """Inputs and labels, split at random but always alike.

    Args:
        inputs: (N, ...) to train on.
        labels: (N, ...), integers, one for each prediction that an input asks for.
        test_inputs: (M, ...), held out.
        test_labels: (M, ...).
        judged_on_tests: whether losses are of the held-out examples; else of all those trained on.
    """

    inputs: Tensor
    labels: Tensor
    test_inputs: Tensor
    test_labels: Tensor
    judged_on_tests: bool = False

    @property
    def judged(self) -> tuple[Tensor, Tensor]:
        """The examples that losses are of, labels flattened."""
        pair = (self.test_inputs, self.test_labels) if self.judged_on_tests else (self.inputs, self.labels)
        return pair[0], pair[1].flatten()

    def batches(self, steps: int, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """`steps` batches of `size` examples, drawn with replacement, labels flattened."""
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            chosen = torch.randint(len(self.inputs), (size,), generator=generator)
            yield self.inputs[chosen], self.labels[chosen].flatten()


def require_extra() -> None:
    """Refuses to start without scikit-learn, which the core package does not need.

    Raises:
        ConfigurationError: it is not installed.
    """
    if importlib.util.find_spec("sklearn") is None:
        raise ConfigurationError("scikit-learn", None, "is needed here; install it by: pip install 'hf_so2[papers]'")


@functools.cache
def digits(dtype: torch.dtype = torch.float32) -> Examples:
    """1,797 images of 8 x 8 pixels in [0, 1], as rows of 64, and which digit each one is.

    Raises:
        ConfigurationError: scikit-learn is not installed.
    """
    require_extra()
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    x, y = torch.as_tensor(images, dtype=dtype)[order] / 16, torch.as_tensor(labels)[order].long()
    return Examples(x[:TRAINING], y[:TRAINING], x[TRAINING:], y[TRAINING:])


@functools.cache
def text() -> Examples:
    """Blocks of 64 bytes of Python's standard library, each labelled by the byte that follows; losses are held out."""
    documents = [source.encode() for source in standard_library_sources()]
    held_out, trained_on = b"".join(documents[::10]), b"".join(d for n, d in enumerate(documents) if n % 10)

    def blocks(source: bytes, length: int) -> tuple[Tensor, Tensor]:
        values = torch.frombuffer(bytearray(source[: length + 1]), dtype=torch.uint8).long()
        return values[:-1].view(-1, BLOCK), values[1:].view(-1, BLOCK)

    inputs, labels = blocks(trained_on, TEXT // BLOCK * BLOCK)
    # Test blocks are spread over all held-out documents, which differ much.
    tests, test_labels = (
        every[:: len(every) // HELD_OUT][:HELD_OUT] for every in blocks(held_out, (len(held_out) - 1) // BLOCK * BLOCK)
    )
    return Examples(inputs, labels, tests, test_labels, judged_on_tests=True)
