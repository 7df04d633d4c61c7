"""The selection of preconditioned layers, the layout of their weights, and the capture of their activations."""

from hf_so2.layers.adapters import Adapter, adapter_for
from hf_so2.layers.capture import Capture
from hf_so2.layers.rows import WEIGHT_SHARING
from hf_so2.layers.sampling import SampledCapture
from hf_so2.layers.selection import Treatment, select

__all__ = ["WEIGHT_SHARING", "Adapter", "Capture", "SampledCapture", "Treatment", "adapter_for", "select"]
