"""What is known of a backward pass: whether it trains, what was announced of it, how many rows have a loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge


@dataclass
class Announcement:
    """What a caller knows of the gradients of a micro-batch.

    Args:
        tokens: how many rows of it have a loss; None where they are counted.
        gradient_scale: c, where backward hands out c times the gradient of a row's own loss.
        is_mean: whether backward divides by the number of rows of this micro-batch besides.
        is_new: whether no backward pass has been made of it yet.
    """

    tokens: int | Tensor | None
    gradient_scale: float | Tensor
    is_mean: bool
    is_new: bool = True


@dataclass
class Backward:
    """One backward pass.

    Args:
        task: autograd's number of it.
        announced: what was said of it beforehand, if anything.
        loss_rows: how many rows of the model's predictions had a gradient, as far as it has come; None where no
            prediction was met.
        trains: whether it has added to the gradient of a preconditioned weight.
    """

    task: int
    announced: Announcement | None
    loss_rows: int | Tensor | None = None
    trains: bool = False

    def scale(self, own_rows: int | Tensor) -> Tensor | None:
        """c of the gradients that it hands out, 0-dim float64; None where nobody has said.

        Args:
            own_rows: of the layer that asks, in place of rows of predictions where there are none.
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
    """The node that adds to `weight.grad`; None where no backward pass does, as inside `torch.func`, of a frozen weight
    and of one that a caller computed in its place (`functional_call`).
    """
    if weight is None or not weight.requires_grad or not weight.is_leaf or in_transform():
        return None
    return get_gradient_edge(weight).node


def written_to(output: Tensor) -> Tensor:
    """The tensor that a module has computed, (rows, fan_out), behind the view of it that a `Linear` returns.

    What comes next may write into the view (Wav2Vec2 writes zeros, or what stands for a masked frame), which takes the
    view's own history out of the graph. Gradients of what is returned here leave out what was written over.
    """
    base = output._base
    if base is None or not base.requires_grad or not (base.is_contiguous() and output.is_contiguous()):
        return output
    return base if base.shape == (output.numel() // output.shape[-1], output.shape[-1]) else output


def will_run(accumulator: Node) -> bool | None:
    """Whether the backward pass in progress adds to the gradient of a weight.

    `torch.autograd.grad` does not, nor does `backward(inputs=…)` of other tensors.

    Returns:
        None where the gradient of the weight is handed to the caller of `torch.autograd.grad`, who may use it or not.
    """
    try:
        return bool(torch._C._will_engine_execute_node(accumulator))
    except RuntimeError:
        return None


def in_transform() -> bool:
    """Whether this is a call inside `torch.func.grad`, `vmap` and their like, or one that is being recorded."""
    return bool(torch._C._are_functorch_transforms_active()) or torch.jit.is_tracing()


def current_task() -> int:
    """Autograd's number of the backward pass in progress."""
    return int(torch._C._current_graph_task_id())


def edge_of_predictions(logits: Tensor) -> GradientEdge:
    """Where the gradient of these predictions arrives, whether or not a wrapper has cast what the model returned."""
    edge = get_gradient_edge(logits)
    while edge.node.name().startswith("ToCopyBackward"):
        node, number = edge.node.next_functions[0]
        if node is None:
            break
        edge = GradientEdge(node, number)
    return edge


def tell_of_gradient(logits: Tensor, tell: Callable[[Tensor | None], object]) -> None:
    """Call `tell` with the gradient of these predictions, or None where the loss goes round them, when it arrives."""
    edge = edge_of_predictions(logits)
    # The number alone: a hook that holds its own node keeps the whole graph until Python looks for cycles.
    number = edge.output_nr
    edge.node.register_prehook(lambda gradients: tell(gradients[number]))


def logits_in(output: Any) -> Any:
    """What a model that returns more than one thing calls its logits; else all that it returns."""
    return output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)


def predictions_in(output: Any) -> Tensor | None:
    """The logits, (rows, classes) or (batch, sequence, classes), in what a model returns, if they are there."""
    logits = logits_in(output)
    is_table = isinstance(logits, Tensor) and logits.ndim in (2, 3) and logits.is_floating_point()
    return logits if is_table else None


def heads_of(model: nn.Module) -> list[nn.Module]:
    """The modules whose outputs are the model's predictions, where it names them."""
    return with_trained_copies(_named(model, "get_output_embeddings"))


def decoder_of(model: nn.Module) -> nn.Module | None:
    """The module whose output the head reads, where the model names one that is not itself."""
    decoder = _named(model, "get_decoder")
    return decoder if decoder is not model else None


def _named(model: nn.Module, getter: str) -> nn.Module | None:
    """What a model names as a part; None where it has no such part or does not say."""
    try:
        found = getattr(model, getter)()
    except (AttributeError, NotImplementedError):
        return None
    return found if isinstance(found, nn.Module) else None


def hidden_in(output: Any) -> Tensor | None:
    """What the head reads, (batch, sequence, features), in what a decoder returns, if it is there."""
    if isinstance(output, tuple) and output:
        output = output[0]
    hidden = output.get("last_hidden_state") if isinstance(output, Mapping) else output
    return hidden if isinstance(hidden, Tensor) and hidden.is_floating_point() else None


def with_trained_copies(module: nn.Module | None) -> list[nn.Module]:
    """A module, and what PEFT's `modules_to_save` trains in its place where it has been wrapped for that."""
    copies = getattr(module, "modules_to_save", None)
    found = [module, *(copies.values() if isinstance(copies, nn.ModuleDict) else ())]
    return [part for part in found if isinstance(part, nn.Module)]
