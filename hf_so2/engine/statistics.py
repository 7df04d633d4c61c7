"""From captured sums to new preconditioners: normalise, sum over ranks, average, refresh."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_so2.curvature import GradientBlock, State
from hf_so2.damping import Damping
from hf_so2.engine.means import means
from hf_so2.errors import TrainingDivergedError
from hf_so2.layers import Capture, SampledCapture
from hf_so2.layers.plan import RowPlan
from hf_so2.layers.sums import Source
from hf_so2.linalg import matmul_precision, trace
from hf_so2.parallel.sharing import Sharing
from hf_so2.weights.ends import End, ends_of
from hf_so2.weights.layer import COUNTERS, Layer
from hf_so2.weights.schedule import due, layer_turns, refresh_due
from hf_so2.weights.stacks import observe_stack, refresh_stack, stacks

logger = logging.getLogger(__name__)

# A layer whose factors cannot be decomposed keeps its last preconditioner. If it never recovers, there is a bug or the
# run has diverged. To continue would hide this.
MAX_FAILURES_IN_A_ROW = 10


class Curvature:
    """The statistics and preconditioners of all layers of a model.

    Args:
        model: the model. Its predictions are counted.
        layers: the preconditioned weights; every rank must list the same ones in the same order.
        fisher: `empirical` or `mc`: the source of the gradients in token statistics.
        weight_sharing: `expand` or `reduce`.
        precision: precision of the products, see `hf_so2.linalg.matmul_precision`.
        token_sketch: number of tokens that are folded into one row of the statistics; None for as many as a factor
            allows.
        gradient_worker_fraction: the fraction of ranks that hold a layer.
        refresh_steps: steps between refreshes of a layer. The refreshes of all layers are spread over these steps, so
            that every step has about the same work.
        statistics_steps: steps between updates of a layer's statistics. These updates are spread in the same way. With
            sampled labels (`mc`) all layers are updated at the same step, since one backward pass serves all of them.

    Attributes:
        sharing: which ranks hold which layer.
        layers_of: the layers of each parameter, by the parameter's name: one layer, or the matrices of a stack.
        weight_of_bias: for each preconditioned bias, the name of the weight that has it as a column.
        dropped_statistics: how many times a layer's statistics were left out because they were not finite.
        failed_refreshes: how many times a layer kept its last preconditioner because a new one could not be computed.
        damping_factor: the factor of adaptive damping. It multiplies the strength of every layer's damping.
        adapted_at: the step at which adaptive damping was measured last.
        refresh_seconds: how long the refreshes took on this rank, in seconds, at the last step that had any. Includes
            the wait for other ranks.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[Layer],
        fisher: str = "empirical",
        weight_sharing: str = "expand",
        precision: str = "highest",
        token_sketch: int | None = 1,
        *,
        gradient_worker_fraction: float = 1.0,
        refresh_steps: int = 1,
        statistics_steps: int = 1,
    ) -> None:
        self.layers = {layer.name: layer for layer in layers}
        self.layers_of: dict[str, list[Layer]] = {}
        for layer in layers:
            self.layers_of.setdefault(layer.parameter, []).append(layer)
        self._precision = precision
        self.weight_of_bias = {layer.bias: layer.name for layer in layers if layer.bias}
        self.dropped_statistics = 0
        self.failed_refreshes = 0
        self.refresh_seconds = 0.0
        self.damping_factor, self.adapted_at = 1.0, 0
        self.sharing = Sharing(layers, gradient_worker_fraction, refresh_steps)
        self._refresh_steps, self._statistics_steps = refresh_steps, statistics_steps
        costs = {layer.name: layer.block.refresh_flops(layer.shape) for layer in layers}
        self._statistics_turns, self._turns = layer_turns(costs, statistics_steps, refresh_steps)
        if fisher == "mc":
            self._statistics_turns = dict.fromkeys(costs, 0)
        self._ends: dict[str, End] = {}
        self._of_gradients: dict[str, GradientBlock] = {}
        self._outer: dict[str, set[str]] = {layer.name: set() for layer in layers}
        for layer in layers:
            if isinstance(layer.block, GradientBlock):
                self._of_gradients[layer.name] = layer.block
                self._outer[layer.name] = {"L", "R"}
            else:
                for end in ends_of(layer):
                    self._ends[end.name] = end
                    self._outer[layer.name] |= {end.prefix + key for key in end.sums_of_outer_products}
        self.capture = (SampledCapture if fisher == "mc" else Capture)(
            model, {name: self._source(end) for name, end in self._ends.items()}, weight_sharing, token_sketch
        )

    def preconditions(self, name: str) -> bool:
        """Whether the weight of this name has a preconditioner by now. For a bias: whether its weight has one."""
        layers = self.layers_of.get(self.weight_of_bias.get(name, name), ())
        return any(layer.refreshes > 0 for layer in layers)

    def _source(self, end: End) -> Source:
        def observe(inputs: Tensor, gradients: Tensor, known: State, plan: RowPlan) -> State:
            with matmul_precision(self._precision):
                return end.observe(inputs, gradients, known, plan)

        return Source(end.modules, end.adapter, observe, end.gradient_degrees, end.statistics_dtype)

    def prepare(self, step: int) -> None:
        """Set what the coming forward passes capture: the layers whose statistics are due at this step."""
        self.capture.summation.step = step
        self.capture.summation.rows = {name: end.layer.rows for name, end in self._ends.items()}
        self.capture.due = frozenset(
            name for name, end in self._ends.items() if self._takes_statistics(end.layer, step)
        )

    def _takes_statistics(self, layer: Layer, step: int) -> bool:
        return due(step, self._statistics_steps, self._statistics_turns[layer.name])

    def update(self, weights: Mapping[str, Tensor], step: int) -> None:
        """Update the running averages that are due.

        They take what all ranks have captured since the last step, and the gradients of this step.

        Args:
            weights: by layer name, the parameters that have a gradient. The gradients are averages over ranks.
            step: number of the step, counted from 1.
        """
        for layer in self.layers.values():
            layer.rotated = None
        chosen = {name for name, layer in self.layers.items() if self._takes_statistics(layer, step)}
        if not chosen:
            self.capture.discard()
            return
        self.sharing.settle()
        ends = {name: end for name, end in self._ends.items() if end.layer.name in chosen}
        observations = means(ends, self.capture.take(by_hand=bool(weights)), self.sharing)
        of_gradients = [self.layers[name] for name in self._of_gradients if name in chosen and name in weights]
        for together in stacks(self.sharing.whole_gradients(of_gradients, weights), lambda pair: pair[0]):
            with matmul_precision(self._precision):
                found = observe_stack(together)
            for (layer, _), observation in zip(together, found, strict=True):
                observations[layer.name] = observation
                layer.rotated = observation.pop("rotated", None)
        dropped = self._not_finite(observations)
        for name, observation in observations.items():
            layer = self.layers[name]
            if dropped[name]:
                self.dropped_statistics += 1
                logger.warning("%s: the statistics of this step are not finite and were left out", name)
                continue
            if layer.held:
                layer.block.update(layer.state, observation)
            layer.updates += 1

    def refresh(self, step: int) -> None:
        """Rebuild the preconditioners that are due, of layers that have statistics.

        Each rank refreshes the layers that it owns and sends the results to the others.

        Args:
            step: number of the step, counted from 1.

        Raises:
            TrainingDivergedError: a layer has failed `MAX_FAILURES_IN_A_ROW` times in a row. Every rank raises it.
        """
        chosen = [layer for layer in self.layers.values() if layer.updates and self._is_due(layer, step)]
        if not chosen:
            return
        started = time.perf_counter()
        self.sharing.settle()
        owned = [layer for layer in chosen if layer.owned]
        errors = {name: error for layers in stacks(owned, lambda x: x) for name, error in self._refresh(layers).items()}
        failed = self.sharing.on_any_rank({layer.name: errors.get(layer.name) is not None for layer in chosen})
        self.sharing.send_preconditioners(layer for layer in chosen if not failed[layer.name])
        for layer in chosen:
            self._count(layer, errors.get(layer.name) or "on another rank" if failed[layer.name] else None)
        self.refresh_seconds = time.perf_counter() - started

    def _is_due(self, layer: Layer, step: int) -> bool:
        # A layer that gets its first tokens late (an idle expert) does not wait for its turn.
        is_new = not (layer.refreshes or layer.failures)
        return is_new or refresh_due(step, self._refresh_steps, self._turns[layer.name])

    def damping_of(self, layer: Layer) -> Damping:
        """The current damping of a layer, with the adaptive factor."""
        return layer.damping.scaled(self.damping_factor)

    def _refresh(self, layers: Sequence[Layer]) -> dict[str, str | None]:
        return refresh_stack(layers, self.damping_of(layers[0]))

    def _count(self, layer: Layer, error: str | None) -> None:
        if error is None:
            layer.failures = 0
            layer.rotated = None
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

    def _not_finite(self, observations: Mapping[str, State]) -> dict[str, bool]:
        """By layer, whether the observation has a number that is not finite on a rank that holds the layer."""
        held = {name: observation for name, observation in observations.items() if self.layers[name].held}
        totals = [self._total(name, observation) for name, observation in held.items()]
        finite = dict(zip(held, torch.isfinite(torch.stack(totals)).tolist() if totals else [], strict=True))
        flags = {name: not finite.get(name, True) for name in observations}
        return self.sharing.on_any_rank(flags) if self.sharing.is_spread else flags

    def _total(self, name: str, observation: State) -> Tensor:
        """A number, 0-dim, that is not finite if an entry of these statistics is not, or if their sum overflows."""
        # The diagonal of a sum of outer products bounds all its entries, and is much smaller.
        outer = self._outer[name]
        parts = [
            # Where a weight is cut into blocks, the name of the block comes first.
            trace(x) if x.ndim == 2 and key.rpartition("/")[2] in outer else x.sum()
            for key, x in observation.items()
        ]
        return torch.stack(parts).sum() if parts else torch.zeros(())

    def state_dict(self) -> dict[str, Any]:
        """The state by layer name, as tensors and plain numbers only; loads with `torch.load(weights_only=True)`.

        It is the same on every rank and loads at any number of ranks. If layers are spread over ranks this is a
        collective: every rank has to call it, and gets all tensors in host memory.
        """
        states = self.sharing.complete_states()
        overflows = self.sharing.from_all({x.name: int(x.overflows) for x in self.layers.values() if x.held})
        counters = {
            name: {key: int(getattr(layer, key)) for key in COUNTERS if key != "overflows"}
            for name, layer in self.layers.items()
        }
        return {
            "dropped_statistics": self.dropped_statistics,
            "failed_refreshes": self.failed_refreshes,
            "damping_factor": self.damping_factor,
            "adapted_at": self.adapted_at,
            "layers": {
                name: {**counters[name], "overflows": overflows[name], "state": states[name]} for name in self.layers
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned. Each rank takes what it holds.

        Raises:
            ValueError: the saved layers are not those of this model, or were saved by another method.
        """
        self.sharing.settle()
        saved = state["layers"]
        if saved.keys() != self.layers.keys():
            odd = sorted(saved.keys() ^ self.layers.keys())
            hint = "; split_heads must be as it was" if any("head " in name for name in odd) else ""
            raise ValueError(f"the saved curvature is of other layers than the model's: {', '.join(odd[:5])}{hint}")
        for name, entry in saved.items():
            layer = self.layers[name]
            layer.load_state(entry["state"])
            for key in COUNTERS:
                setattr(layer, key, int(entry.get(key, 0)))  # older states lack some
        self.dropped_statistics = int(state["dropped_statistics"])
        self.failed_refreshes = int(state["failed_refreshes"])
        self.damping_factor, self.adapted_at = float(state["damping_factor"]), int(state["adapted_at"])
        self.capture.discard()
