"""The residual branches of a model, read off the graph that autograd keeps of one forward pass.

A sum of activations is residual when one of its terms, the *stream*, is an ancestor of all others: `h + F(h)`. What
lies between the stream and another term is a *branch*, and a residual sum inside a branch of another is not counted.
Sums that feed nothing but another sum are read as one, so that parallel branches `h + F(h) + G(h)` are two branches of
one sum.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from hf_so2.mup.running import run_on_example

Node = Any  # torch.autograd.graph.Node
Term = tuple[int, int]
"""Which addition of a forward pass, and which of its two terms."""

_ADDS = {torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__, Tensor.add_}
_IN_PLACE = {Tensor.__iadd__, Tensor.add_}
# Operations that hand the stream on as it is, or times a number, if they are of one tensor.
_SAME = (
    "Clone",
    "View",
    "UnsafeView",
    "Reshape",
    "Transpose",
    "Permute",
    "ToCopy",
    "Alias",
    "Unsqueeze",
    "Squeeze",
    "Mul",
)


@dataclass
class Addition:
    """One sum of two tensors of one shape: its terms, and the nodes of the graph of them and of the sum."""

    terms: tuple[Tensor, Tensor]
    nodes: tuple[Node, Node]
    result: Node = None


class Additions(TorchFunctionMode):
    """Follows the additions of a forward pass in their order.

    Args:
        factors: what to multiply single terms with, before they are added.
        keep: whether to keep the terms and nodes.
    """

    def __init__(self, factors: dict[Term, float] | None = None, *, keep: bool = True) -> None:
        super().__init__()
        self.found: list[Addition] = []
        self._factors, self._keep, self._count = factors or {}, keep, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        terms = args[:2]
        if func not in _ADDS or len(terms) < 2 or not all(isinstance(t, Tensor) for t in terms):
            return func(*args, **kwargs)
        if terms[0].shape != terms[1].shape or not all(t.is_floating_point() for t in terms):
            return func(*args, **kwargs)
        call, self._count = self._count, self._count + 1
        factors = [self._factors.get((call, side), 1.0) for side in (0, 1)]
        if factors != [1.0, 1.0]:
            first = terms[0].mul_(factors[0]) if func in _IN_PLACE else terms[0] * factors[0]
            args = (first, terms[1] * factors[1], *args[2:])
        if not self._keep:
            return func(*args, **kwargs)
        # A copy outlives an addition in place; it hangs on the same node.
        addition = Addition((terms[0].clone(), terms[1].clone()), (terms[0].grad_fn, terms[1].grad_fn))
        result = func(*args, **kwargs)
        addition.result = result.grad_fn
        self.found.append(addition)
        return result


@dataclass
class Branch:
    """One branch of one residual sum.

    Args:
        term: where it is added.
        output: the branch's value, with its graph.
        groups: the parameters of the last operations that have any, one set an operation, the last operation first.
        inside: all parameters between the stream and the sum.
    """

    term: Term
    output: Tensor
    groups: list[list[nn.Parameter]]
    inside: list[nn.Parameter] = field(repr=False)


def residual_sums(model: PreTrainedModel) -> list[list[Branch]]:
    """The branches of each residual sum of a model, by one forward pass on a few tokens.

    Raises:
        ConfigurationError: the model does not run on its main input alone.
    """
    with Additions() as trace:
        logits = run_on_example(model, grad=True)
    graph = _Graph(logits.grad_fn)
    sums = [found for found in graph.sums(trace.found) if found is not None]
    interiors = [graph.between([node for _, node in terms], stream) for terms, stream, _ in sums]
    nested = {id(node) for interior, (_, stream, _) in zip(interiors, sums, strict=True) for node in interior}
    results = []
    for (terms, stream, result), interior in zip(sums, interiors, strict=True):
        if id(result) in nested:
            continue
        inside = list(dict.fromkeys(p for node in interior if (p := _parameter(node)) is not None))
        if not inside:  # arithmetic, such as the polynomial of an activation function
            continue
        on_way = {id(node) for node in graph.leading_to(stream)}
        results.append(
            [
                Branch(term, trace.found[term[0]].terms[term[1]], graph.last_parameters(node, stream, on_way), inside)
                for term, node in terms
            ]
        )
    return results


def _parameter(node: Node) -> nn.Parameter | None:
    return getattr(node, "variable", None)


class _Graph:
    """Autograd's graph behind one tensor. Nodes are held, so that their identity lasts."""

    def __init__(self, root: Node) -> None:
        self._nodes: list[Node] = []
        self._parents: dict[int, list[Node]] = {}
        self._users: Counter[int] = Counter()
        waiting, seen = [root], {id(root)}
        while waiting:
            node = waiting.pop()
            self._nodes.append(node)
            self._parents[id(node)] = [parent for parent, _ in node.next_functions if parent is not None]
            for parent in self._parents[id(node)]:
                self._users[id(parent)] += 1
                if id(parent) not in seen:
                    seen.add(id(parent))
                    waiting.append(parent)
        self._children: dict[int, list[Node]] = {id(node): [] for node in self._nodes}
        for node in self._nodes:
            for parent in self._parents[id(node)]:
                self._children[id(parent)].append(node)

    def sums(self, additions: Sequence[Addition]) -> Iterator[tuple[list[tuple[Term, Node]], Node, Node] | None]:
        """`(branch terms with their nodes, stream, result)` of every residual sum."""
        by_result = {
            id(a.result): (index, a)
            for index, a in enumerate(additions)
            if id(a.result) in self._parents and all(id(node) in self._parents for node in a.nodes)
        }
        absorbed = {
            id(node)
            for _, addition in by_result.values()
            for node in addition.nodes
            if id(node) in by_result and self._users[id(node)] == 1
        }

        def terms_of(index: int, addition: Addition) -> Iterator[tuple[Term, Node]]:
            for side, node in enumerate(addition.nodes):
                if id(node) in absorbed:
                    yield from terms_of(*by_result[id(node)])
                else:
                    yield (index, side), node

        for index, addition in by_result.values():
            if id(addition.result) not in absorbed:
                yield self._residual(list(terms_of(index, addition)), addition.result)

    def _residual(
        self, terms: list[tuple[Term, Node]], result: Node
    ) -> tuple[list[tuple[Term, Node]], Node, Node] | None:
        for stream_term, node in terms:
            others = [(term, other) for term, other in terms if term != stream_term]
            for stream in self._same_as(node):
                above = [other is not stream and self._is_above(stream, other) for _, other in others]
                if any(above) and all(
                    is_above or self._is_constant(other) for is_above, (_, other) in zip(above, others, strict=True)
                ):
                    return others, stream, result
        return None

    def _same_as(self, node: Node) -> Iterator[Node]:
        yield node
        while node.name().startswith(_SAME) and len(self._parents[id(node)]) == 1:
            node = self._parents[id(node)][0]
            yield node

    def _is_above(self, stream: Node, node: Node) -> bool:
        return any(found is stream for found in self._walk([node], self._parents))

    def _is_constant(self, node: Node) -> bool:
        """Whether it is made of parameters alone, such as a bias that is added; tokens are looked up."""
        return not any(found.name().startswith("Embedding") for found in self._walk([node], self._parents))

    def between(self, terms: Sequence[Node], stream: Node) -> list[Node]:
        """The nodes above the terms, without the stream and what is reached through it only."""
        return [node for node in self._walk(terms, self._parents, stop=stream) if node is not stream]

    def leading_to(self, stream: Node) -> list[Node]:
        """All nodes that depend on the stream, itself included."""
        return self._walk([stream], self._children)

    def last_parameters(self, node: Node, stream: Node, on_way: set[int]) -> list[list[nn.Parameter]]:
        """The parameters of the last operations of a branch, followed up to the first that has any on every path."""
        if id(node) not in on_way:
            return [[p for n in self._walk([node], self._parents) if (p := _parameter(n)) is not None]]
        groups: list[list[nn.Parameter]] = []
        waiting, seen = [node], {id(node)}
        while waiting:
            current = waiting.pop(0)
            if current is stream:
                continue
            aside = [parent for parent in self._parents[id(current)] if id(parent) not in on_way]
            found = [p for n in self._walk(aside, self._parents) if (p := _parameter(n)) is not None]
            if found:
                groups.append(list(dict.fromkeys(found)))
            if found and not current.name().startswith(
                "AddBackward"
            ):  # a bias that is added leaves the weight to be found
                continue
            for parent in self._parents[id(current)]:
                if id(parent) in on_way and id(parent) not in seen:
                    seen.add(id(parent))
                    waiting.append(parent)
        return groups

    @staticmethod
    def _walk(start: Sequence[Node], edges: dict[int, list[Node]], stop: Node = None) -> list[Node]:
        found, waiting, seen = [], list(start), {id(node) for node in start}
        while waiting:
            node = waiting.pop()
            found.append(node)
            if node is stop:
                continue
            for following in edges.get(id(node), ()):
                if id(following) not in seen:
                    seen.add(id(following))
                    waiting.append(following)
        return found
