"""Facts about a backward pass: whether it trains, what the caller has announced, and how many rows have a loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge


@dataclass
class Announcement:
    """What a caller knows about the gradients of a micro-batch.

    Args:
        tokens: number of its rows that have a loss; None to count them.
        gradient_scale: c, if backward gives c times the gradient of a row's own loss.
        is_mean: whether backward also divides by the number of rows of this micro-batch.
        is_new: whether its backward pass is still to come.
    """

    tokens: int | Tensor | None
    gradient_scale: float | Tensor
    is_mean: bool
    is_new: bool = True


@dataclass
class Backward:
    """One backward pass.

    Args:
        task: autograd's number of this backward pass.
        announced: what the caller has announced, if anything.
        loss_rows: number of rows of the model's predictions that have had a gradient so far; None if it has reached no
            prediction.
        trains: whether it has added to the gradient of a preconditioned weight.
    """

    task: int
    announced: Announcement | None
    loss_rows: int | Tensor | None = None
    trains: bool = False

    def scale(self, own_rows: int | Tensor) -> Tensor | None:
        """The factor c on its gradients, 0-dim float64; None if nothing was announced.

        Args:
            own_rows: number of rows of the layer, used if there are no rows of predictions.
        """
        if self.announced is None:
            return None
        c = torch.as_tensor(self.announced.gradient_scale, dtype=torch.float64)
        if not self.announced.is_mean:
            return c
        rows = own_rows if self.loss_rows is None else self.loss_rows
        rows = torch.as_tensor(rows, dtype=torch.float64).clamp(min=1)
        return c.to(rows.device) / rows


def accumulator_of(weight: Tensor | None) -> Node | None:
    """The node that adds to `weight.grad`, or None if no backward pass does.

    It is None inside `torch.func`, for a frozen weight, and for a tensor that a caller computed in place of the weight
    (`functional_call`).
    """
    if weight is None or not weight.requires_grad or not weight.is_leaf or in_transform():
        return None
    return get_gradient_edge(weight).node


def written_to(output: Tensor) -> Tensor:
    """The tensor that a module has computed, (rows, fan_out). A `Linear` returns a view of it.

    Later code may write into the view: Wav2Vec2 writes zeros, or the vector of a masked frame. This removes the view's
    own history from the graph. The gradient of the tensor returned here excludes the entries that were overwritten.
    """
    base = output._base
    if base is None or not base.requires_grad or not (base.is_contiguous() and output.is_contiguous()):
        return output
    return base if base.shape == (output.numel() // output.shape[-1], output.shape[-1]) else output


def will_run(accumulator: Node) -> bool | None:
    """Whether the backward pass in progress adds to the gradient of a weight.

    `torch.autograd.grad` does not, nor does `backward(inputs=…)` of other tensors.

    Returns:
        None if the gradient of the weight goes to the caller of `torch.autograd.grad`, who may use it or not.
    """
    try:
        return bool(torch._C._will_engine_execute_node(accumulator))
    except RuntimeError:
        return None


def in_transform() -> bool:
    """Whether this is a call inside `torch.func.grad`, `vmap` or similar, or one that is being traced."""
    return bool(torch._C._are_functorch_transforms_active()) or torch.jit.is_tracing()


def current_task() -> int:
    """Autograd's number of the backward pass in progress."""
    return int(torch._C._current_graph_task_id())


def edge_of_predictions(logits: Tensor) -> GradientEdge:
    """The graph edge at which the gradient of these predictions arrives, even if a wrapper has cast them."""
    edge = get_gradient_edge(logits)
    while edge.node.name().startswith("ToCopyBackward"):
        node, number = edge.node.next_functions[0]
        if node is None:
            break
        edge = GradientEdge(node, number)
    return edge


def tell_of_gradient(logits: Tensor, tell: Callable[[Tensor | None], object]) -> None:
    """Call `tell` when the gradient of these predictions arrives, or with None if the loss does not depend on them."""
    edge = edge_of_predictions(logits)
    # The hook keeps the number alone. A hook with its own node would keep the whole graph until garbage collection.
    number = edge.output_nr
    edge.node.register_prehook(lambda gradients: tell(gradients[number]))


def logits_in(output: Any) -> Any:
    """The logits of an output with several parts; else the whole output."""
    return output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)


def predictions_in(output: Any) -> Tensor | None:
    """The logits in a model's output, (rows, classes) or (batch, sequence, classes), or None."""
    logits = logits_in(output)
    is_table = isinstance(logits, Tensor) and logits.ndim in (2, 3) and logits.is_floating_point()
    return logits if is_table else None


def heads_of(model: nn.Module) -> list[nn.Module]:
    """The modules whose outputs are the model's predictions, if the model names them."""
    return with_trained_copies(_named(model, "get_output_embeddings"))


def decoder_of(model: nn.Module) -> nn.Module | None:
    """The module whose output the head reads, if the model names one other than itself."""
    decoder = _named(model, "get_decoder")
    return decoder if decoder is not model else None


def _named(model: nn.Module, getter: str) -> nn.Module | None:
    """A part that the model names; None if it has no such part or does not name it."""
    try:
        found = getattr(model, getter)()
    except (AttributeError, NotImplementedError):
        return None
    return found if isinstance(found, nn.Module) else None


def hidden_in(output: Any) -> Tensor | None:
    """The head's input in a decoder's output, (batch, sequence, features), or None."""
    if isinstance(output, tuple) and output:
        output = output[0]
    hidden = output.get("last_hidden_state") if isinstance(output, Mapping) else output
    return hidden if isinstance(hidden, Tensor) and hidden.is_floating_point() else None


def with_trained_copies(module: nn.Module | None) -> list[nn.Module]:
    """A module, and, if PEFT's `modules_to_save` has wrapped it, the copies that are trained in its place."""
    copies = getattr(module, "modules_to_save", None)
    found = [module, *(copies.values() if isinstance(copies, nn.ModuleDict) else ())]
    return [part for part in found if isinstance(part, nn.Module)]
