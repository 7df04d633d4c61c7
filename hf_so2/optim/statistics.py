"""From captured sums to fresh preconditioners: normalise, add up over ranks, average, refresh."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hf_so2.curvature import CurvatureBlock, GradientBlock, State
from hf_so2.damping import Damping
from hf_so2.distributed import assign, send_from_owners, sum_over_ranks, world
from hf_so2.errors import TrainingDivergedError
from hf_so2.layers import Adapter, Capture, SampledCapture
from hf_so2.layers.capture import LayerSums
from hf_so2.linalg import DecompositionError, matmul_precision
from hf_so2.optim.ends import End, ends_of

logger = logging.getLogger(__name__)

# A layer whose factors cannot be decomposed keeps its last preconditioner; one that never recovers is a bug or a
# diverged run, and going on would hide it.
MAX_FAILURES_IN_A_ROW = 10

# What a layer counts and a checkpoint keeps.
COUNTERS = ("updates", "refreshes", "failures", "steps", "overflows")

# How a block calls what it gets from decomposing a factor.
DECOMPOSED = ("_root", "_basis")


@dataclass
class Layer:
    """A preconditioned weight.

    Args:
        name: qualified name of the parameter.
        shape: (fan_out, fan_in), the column of its bias included.
        block: its curvature method.
        modules: the modules whose calls use it.
        adapter: how they store it.
        damping: rule, strength and width multipliers.
        device: where the statistics live.
        dtype: float32, or float64 for a float64 weight.
        bias: the parameter that is the last column of the matrix.
        head: of a tied weight, the modules that use it as an output head; `modules` are its embeddings.
        state: the block's tensors.
        updates: how often its statistics have been updated.
        refreshes: how many preconditioners have been built; until the first, the weight is in the fallback.
        failures: how many refreshes in a row have failed.
        steps: how many second-order updates its weight has had.
        overflows: how many of them were left at zero because the preconditioned gradient was not finite.
    """

    name: str
    shape: tuple[int, int]
    block: CurvatureBlock
    modules: Sequence[nn.Module]
    adapter: Adapter
    damping: Damping
    device: torch.device
    dtype: torch.dtype
    bias: str | None = None
    head: Sequence[nn.Module] = ()
    state: State = field(default_factory=dict)
    updates: int = 0
    refreshes: int = 0
    failures: int = 0
    steps: int = 0
    overflows: int | Tensor = 0

    @property
    def building(self) -> bool:
        """Whether the block still builds what its first update needs (SOAP's first basis): nothing moves until then."""
        return self.updates <= self.block.building_steps

    @property
    def refresh_cost(self) -> int:
        """What a refresh costs relative to other layers' ones: a factor is decomposed at cubic cost."""
        found = (self.state[name] for name in self.block.refreshed if name.endswith(DECOMPOSED))
        return sum(len(matrix) ** 3 for matrix in found if matrix.ndim == 2)

    def move_to(self, device: torch.device) -> None:
        """Follow a model that was moved after its optimizer had been built."""
        if self.device != device:
            self.device = device
            self.state = {name: tensor.to(device) for name, tensor in self.state.items()}


class Curvature:
    """The statistics and preconditioners of all layers of a model.

    Args:
        layers: the preconditioned weights; every rank must list the same ones in the same order.
        fisher: `empirical` or `mc`: where the gradients of token statistics come from.
        weight_sharing: `expand` or `reduce`.
        precision: of the products, see `hf_so2.linalg.matmul_precision`.
        token_stride: statistics of tokens are of one in so many.

    Attributes:
        weight_of_bias: the name of the weight that each preconditioned bias is a column of.
        dropped_statistics: how many times a layer's statistics were not finite and were left out.
        failed_refreshes: how many times a layer kept its last preconditioner because a new one could not be computed.
        damping_factor: what adaptive damping multiplies the strength of every layer's damping by.
        adapted_at: the step at which it did so last.
        refresh_seconds: how long the last refresh of all layers took here, waiting for other ranks included.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        fisher: str = "empirical",
        weight_sharing: str = "expand",
        precision: str = "highest",
        token_stride: int = 1,
    ) -> None:
        self.layers = {layer.name: layer for layer in layers}
        self._precision = precision
        self.weight_of_bias = {layer.bias: layer.name for layer in layers if layer.bias}
        self.dropped_statistics = 0
        self.failed_refreshes = 0
        self.refresh_seconds = 0.0
        self.damping_factor, self.adapted_at = 1.0, 0
        for layer in layers:
            layer.state = layer.block.init_state(layer.shape, layer.device, layer.dtype)
        self._ends: dict[str, End] = {}
        self._of_gradients: dict[str, GradientBlock] = {}
        for layer in layers:
            if isinstance(layer.block, GradientBlock):
                self._of_gradients[layer.name] = layer.block
            else:
                self._ends |= {end.name: end for end in ends_of(layer)}
        self.capture = (SampledCapture if fisher == "mc" else Capture)(
            {name: (end.modules, end.adapter) for name, end in self._ends.items()},
            {name: self._observer(end) for name, end in self._ends.items()},
            {name: end.of_inputs for name, end in self._ends.items()},
            {name: end.layer.dtype for name, end in self._ends.items()},
            weight_sharing,
            token_stride,
        )

    @property
    def sees_tokens(self) -> bool:
        """Whether any layer needs the inputs and output gradients of its tokens."""
        return bool(self._ends)

    def _observer(self, end: End) -> Callable[[Tensor, Tensor, State], State]:
        def observe(inputs: Tensor, gradients: Tensor, known: State) -> State:
            with matmul_precision(self._precision):
                return end.observe(inputs, gradients, known)

        return observe

    def update(self, gradients: Mapping[str, Tensor]) -> None:
        """Move the running averages by what was captured since the last step, on all ranks, and by its gradients.

        Args:
            gradients: by name of the parameter, (fan_out, fan_in), the same on all ranks; of those that have one.
        """
        observations = self._means(*self.capture.take())
        for name, block in self._of_gradients.items():
            if name in gradients:
                layer = self.layers[name]
                with matmul_precision(self._precision):
                    observations[name] = block.observe_gradient(layer.state, gradients[name].to(layer.dtype))
        finite = _are_finite(list(observations.values()))
        for (name, observation), good in zip(observations.items(), finite, strict=True):
            layer = self.layers[name]
            if good:
                layer.block.update(layer.state, observation)
                layer.updates += 1
            else:
                self.dropped_statistics += 1
                logger.warning("%s: the statistics of this step are not finite and were left out", name)

    def refresh(self) -> None:
        """Rebuild every preconditioner that has statistics; each rank does its share and the results are sent round.

        Raises:
            TrainingDivergedError: a layer has failed `MAX_FAILURES_IN_A_ROW` times in a row; on every rank alike.
        """
        started = time.perf_counter()
        due = [layer for layer in self.layers.values() if layer.updates]
        rank, ranks = world()
        owners = assign({layer.name: layer.refresh_cost for layer in due}, ranks)
        errors = {layer.name: self._refresh(layer) for layer in due if owners[layer.name] == rank}
        failed = torch.tensor([errors.get(layer.name) is not None for layer in due], dtype=torch.int64)
        if due:
            failed = failed.to(due[0].device)
            sum_over_ranks([failed])
        send_from_owners([(layer.state[k], owners[layer.name]) for layer in due for k in layer.block.refreshed])
        for layer, has_failed in zip(due, failed.tolist(), strict=True):
            self._count(layer, errors.get(layer.name) or "on another rank" if has_failed else None)
        self.refresh_seconds = time.perf_counter() - started

    def damping_of(self, layer: Layer) -> Damping:
        """The damping of a layer as it stands, adaptive factor included."""
        return layer.damping.scaled(self.damping_factor)

    def _refresh(self, layer: Layer) -> str | None:
        """Rebuild one preconditioner; what went wrong, if anything did."""
        try:
            layer.block.refresh(layer.state, self.damping_of(layer))
        except DecompositionError as error:
            return str(error)
        return None

    def _count(self, layer: Layer, error: str | None) -> None:
        if error is None:
            layer.failures = 0
            layer.refreshes += 1
            return
        self.failed_refreshes += 1
        layer.failures += 1
        logger.warning("%s: refresh failed, the last preconditioner stays: %s", layer.name, error)
        if layer.failures >= MAX_FAILURES_IN_A_ROW:
            raise TrainingDivergedError(
                f"{layer.name}: its factors could not be decomposed {layer.failures} times in a row ({error});"
                f" raise damping (now {self.damping_of(layer).epsilon}) or lower the learning rate"
            )

    def _means(self, captured: Mapping[str, LayerSums], tokens: int | Tensor | None) -> dict[str, State]:
        """Means over the global step, for every layer that saw a row on any rank; of a tied one, for each such end.

        A loss that is a mean over N tokens hands out `δ/N`. Whoever announces tokens also announces that factor, and
        the capture has undone it already; otherwise N is the number of positions that the layer saw.
        """
        packed: dict[str, tuple[State, Tensor, Tensor]] = {}
        for name, end in self._ends.items():
            layer = end.layer
            seen = captured.get(name) or LayerSums()
            # Clones: `tokens` is one number for all layers, and the in-place sum would add it up once per layer.
            rows = torch.as_tensor(seen.rows, device=layer.device, dtype=torch.int64).clone()
            count = seen.positions if tokens is None else tokens
            count = torch.as_tensor(count, device=layer.device, dtype=torch.int64).clone()
            sums = seen.sums or end.no_rows()
            if tokens is None:
                for key, statistic in end.block.statistics.items():
                    if statistic.gradient_degree:
                        sums[key].mul_(count**statistic.gradient_degree)
            packed[name] = sums, rows, count
        sum_over_ranks([t for sums, rows, count in packed.values() for t in (*sums.values(), rows, count)])
        means: dict[str, State] = {}
        for name, (sums, rows, count) in packed.items():
            if bool(rows > 0):
                divisors = {"rows": rows, "tokens": count.clamp(min=1)}
                end = self._ends[name]
                means.setdefault(end.layer.name, {}).update(
                    (end.prefix + key, sums[key].div_(divisors[s.per])) for key, s in end.block.statistics.items()
                )
        return means

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain numbers only, keyed by layer name; loads with `torch.load(weights_only=True)`."""
        return {
            "dropped_statistics": self.dropped_statistics,
            "failed_refreshes": self.failed_refreshes,
            "damping_factor": self.damping_factor,
            "adapted_at": self.adapted_at,
            "layers": {
                name: {**{key: int(getattr(layer, key)) for key in COUNTERS}, "state": dict(layer.state)}
                for name, layer in self.layers.items()
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            ValueError: the saved layers are not those of this model, or were saved by another method.
        """
        saved = state["layers"]
        if saved.keys() != self.layers.keys():
            odd = sorted(saved.keys() ^ self.layers.keys())
            raise ValueError(f"the saved curvature is of other layers than the model's: {', '.join(odd[:5])}")
        for name, entry in saved.items():
            layer = self.layers[name]
            for key, expected in layer.block.init_state(layer.shape, torch.device("meta"), layer.dtype).items():
                shape = entry["state"][key].shape if key in entry["state"] else None
                if shape != expected.shape:
                    raise ValueError(f"{name}: saved {key} has shape {shape}, expected {expected.shape}")
            layer.state = {key: value.to(layer.device, layer.dtype, copy=True) for key, value in entry["state"].items()}
            for key in COUNTERS:
                setattr(layer, key, int(entry[key]))
        self.dropped_statistics = int(state["dropped_statistics"])
        self.failed_refreshes = int(state["failed_refreshes"])
        self.damping_factor, self.adapted_at = float(state["damping_factor"]), int(state["adapted_at"])
        self.capture.discard()


def _are_finite(observations: Sequence[State]) -> list[bool]:
    """One answer per observation, with one transfer to the host for all of them."""
    if not observations:
        return []
    totals = [torch.stack([value.sum() for value in o.values()]).sum() if o else torch.zeros(()) for o in observations]
    flags: list[bool] = torch.isfinite(torch.stack(totals)).tolist()
    return flags
