"""Selects the weights that get second-order updates, and states why the others do not."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from hf_so2.errors import ConfigurationError
from hf_so2.layers.adapters import LINEAR, Adapter, adapter_for
from hf_so2.layers.backward import heads_of, with_trained_copies
from hf_so2.layers.parts import Head, is_stack, projections
from hf_so2.orientation import Orientation, orientations


@dataclass(frozen=True)
class Treatment:
    """The decision for one parameter.

    Args:
        preconditioned: whether the curvature method updates it; otherwise the fallback does.
        reason: one phrase for the coverage table.
        modules: the modules whose calls use a preconditioned weight; for a tied weight, those that use it as an
            embedding.
        head: the modules that use a tied weight as the output head.
        adapter: how the modules store the weight.
        is_head: whether it is the output head, with one output per entry of a vocabulary.
        is_hidden: whether it is a matrix (or several) of a hidden layer, whichever algorithm updates it.
        partner: for a weight, the name of the bias that is preconditioned with it; for this bias, the weight's name.
        is_added: whether it is added to the activations at every token: a bias, or an embedding of positions.
        count: number of matrices in a stack along the first dimension, such as a layer's experts; 0 for one matrix.
        heads: the attention heads of which each is a matrix of its own; empty if the weight is one matrix.
    """

    preconditioned: bool
    reason: str
    modules: tuple[nn.Module, ...] = ()
    adapter: Adapter = LINEAR
    is_head: bool = False
    is_hidden: bool = False
    partner: str | None = None
    head: tuple[nn.Module, ...] = ()
    is_added: bool = False
    count: int = 0
    heads: tuple[Head, ...] = ()


@dataclass(frozen=True)
class Extent:
    """What is preconditioned besides the weights of hidden layers.

    Args:
        embeddings: whether the token embedding is.
        head: whether the output head is.
        biases: whether the biases of all preconditioned weights are.
        not_tied: why a weight that is tied between embedding and head is not preconditioned although both are on; empty
            if it is.
        not_stacked: why a stack of matrices, such as a layer's experts, is not preconditioned; empty if it is.
        one_sided_stacks: as `one_sided` of `select`, for stacks.
        split_heads: whether each head of a query, key or value projection is a matrix of its own.
    """

    embeddings: bool = False
    head: bool = False
    biases: bool = False
    not_tied: str = ""
    not_stacked: str = ""
    one_sided_stacks: bool = False
    split_heads: bool = False


def select(
    model: nn.Module,
    skip_modules: Sequence[str] = (),
    max_dim: float = math.inf,
    extent: Extent = Extent(),
    *,
    one_sided: bool = False,
) -> dict[str, Treatment]:
    """Decide for every trainable parameter, by its name in `model.named_parameters()`.

    The weights of `Linear` and `Conv1D` modules and stacks of matrices (experts) are preconditioned. Exceptions are the
    output head, weights tied to an embedding, weights matched by `skip_modules`, and weights with a dimension above
    `max_dim`. `extent` can add more.

    Args:
        model: any module. The head is the one that `get_output_embeddings()` names, and the token embedding the one
            that `get_input_embeddings()` names, if the model has these methods.
        skip_modules: regular expressions, searched for in qualified module names, as in PEFT's `exclude_modules`.
        max_dim: the largest fan_in or fan_out that gets a full factor.
        extent: what is preconditioned besides hidden layers.
        one_sided: whether a weight with one dimension above `max_dim` is preconditioned on the other side alone.

    Raises:
        ConfigurationError: a pattern is no regular expression, or matches no module that could be preconditioned, or
            the model has nothing of a kind that `extent` asks for.
    """
    users = _modules_by_weight(model)
    layouts = orientations(model)
    heads = set(heads_of(model))
    tokens = _token_embeddings(model)
    split = projections(model) if extent.split_heads else {}
    patterns = [_compiled(pattern) for pattern in skip_modules]
    candidates = [
        name
        for uses in users.values()
        for name, module in uses
        if adapter_for(module) and (extent.embeddings or not isinstance(module, nn.Embedding))
    ]
    stacks = {
        own: users[id(p)]
        for own, p in model.named_parameters()
        if is_stack(own, layouts[own], [module for _, module in users[id(p)]])
    }
    candidates += [name for uses in stacks.values() for name, _ in uses]
    for pattern in patterns:
        if not any(pattern.search(name) for name in candidates):
            raise ConfigurationError(
                "skip_modules", pattern.pattern, "must match a Linear or Conv1D module, or experts, of the model"
            )

    def decide(own_name: str, parameter: nn.Parameter) -> Treatment:
        uses = users.get(id(parameter), [])
        modules = tuple(module for _, module in uses)
        if not parameter.numel():
            return Treatment(False, "empty")
        if parameter.ndim < 2:
            kind = "a vector: norm gain or bias" if parameter.ndim else "a scalar"
            return Treatment(False, kind, is_added="bias" in own_name.rpartition(".")[2])
        is_embedding = any(isinstance(module, nn.Embedding) for module in modules)
        is_head = any(module in heads for module in modules)
        if is_embedding and (reason := _why_not(modules, tokens, heads, extent)):
            return Treatment(False, reason, is_added=not tokens.intersection(modules))
        # From here on, a weight of an embedding that other modules use too is also the head.
        embeddings = tuple(module for module in modules if isinstance(module, nn.Embedding))
        owners = embeddings or modules
        adapters = {adapter_for(module) for module in owners}
        adapter = next(iter(adapters), None)
        is_hidden = not (is_embedding or is_head)
        matched = [p.pattern for p in patterns if any(p.search(name) for name, _ in uses)]
        if own_name in stacks:
            return _of_stack(parameter, layouts[own_name], modules, matched, max_dim, extent)
        if adapter is None or len(adapters) > 1:
            reason = f"{parameter.ndim}-D weight of {_kind(modules)}, which no curvature method covers"
            return Treatment(False, reason, is_hidden=is_hidden)
        if is_head and not extent.head:
            return Treatment(False, "the output head")
        if matched:
            return Treatment(False, f"skip_modules {matched[0]!r}", is_hidden=is_hidden)
        # The first dimension of an embedding and of a head is the vocabulary. No full factor has this size.
        full: tuple[int, ...] = parameter.shape[1:] if is_embedding or is_head else parameter.shape
        projection = split.get(modules[0]) if len(modules) == 1 else None
        parts = projection.heads if projection else ()
        if parts:
            full = (parts[0].stop - parts[0].start, parameter.shape[0 if adapter.transposed else 1])
        size = min(full) if one_sided else max(full)
        if size > max_dim:
            reason = f"a dimension of {size} is above max_preconditioner_dim {max_dim}"
            return Treatment(False, reason, is_hidden=is_hidden)
        tied_head = tuple(module for module in modules if module not in owners)
        return Treatment(
            True,
            f"weight of {_kind(modules)}" + (f", {projection.reason}" if projection else ""),
            owners,
            adapter,
            is_head and not is_embedding,
            is_hidden,
            head=tied_head,
            heads=parts,
        )

    # The table gives a reason for a part that cannot be preconditioned. It cannot for a part that the model lacks.
    trained = {module for p in model.parameters() if p.requires_grad and p.ndim > 1 for _, module in users[id(p)]}
    if extent.embeddings and not any(isinstance(module, nn.Embedding) for module in trained & tokens):
        raise _missing("precondition_embeddings", "a token embedding that is trained")
    if extent.head and not heads & trained:
        raise _missing("precondition_head", "an output head that get_output_embeddings() names and that is trained")
    treatments = {name: decide(name, p) for name, p in model.named_parameters() if p.requires_grad}
    if extent.split_heads and not any(treatment.heads for treatment in treatments.values()):
        raise _missing("split_heads", "trained query, key or value projections with a known number of heads")
    return _with_biases(model, treatments) if extent.biases else treatments


def _of_stack(
    parameter: nn.Parameter,
    layout: Orientation,
    modules: tuple[nn.Module, ...],
    skipped_by: Sequence[str],
    max_dim: float,
    extent: Extent,
) -> Treatment:
    count, *dims = parameter.shape
    size = min(dims) if extent.one_sided_stacks else max(dims)
    if skipped_by:
        reason = f"skip_modules {skipped_by[0]!r}"
    elif size > max_dim:
        reason = f"a dimension of {size} is above max_preconditioner_dim {max_dim}"
    else:
        reason = extent.not_stacked
    if reason:
        return Treatment(False, reason, is_hidden=True)
    adapter = Adapter(transposed=layout.fan_out > layout.fan_in)
    reason = f"{count} matrices of {_kind(modules)}, each by its own gradient"
    return Treatment(True, reason, modules, adapter, is_hidden=True, count=count)


def _missing(setting: str, part: str) -> ConfigurationError:
    return ConfigurationError(setting, True, f"has no effect on this model; it needs {part}")


def _token_embeddings(model: nn.Module) -> set[nn.Module]:
    """The embeddings that look up tokens: the one that the model names, or all embeddings if it names none.

    Other embeddings (positions, token types) are often looked up once for a whole batch. Their output gradients are
    then sums over examples.
    """
    try:
        named = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return {module for module in model.modules() if isinstance(module, nn.Embedding)}
    return set(with_trained_copies(named))


def _why_not(modules: Sequence[nn.Module], tokens: set[nn.Module], heads: set[nn.Module], extent: Extent) -> str | None:
    """Why the weight of an embedding is not preconditioned, or None."""
    if len(modules) > 1 and (reason := _why_not_tied(modules, heads, extent)) is not None:
        return f"tied to the embedding{reason and ': '}{reason}"
    if not extent.embeddings:
        return "an embedding"
    embedding = next(module for module in modules if isinstance(module, nn.Embedding))
    if embedding not in tokens:
        return "an embedding of something else than tokens"
    if adapter_for(embedding) is None:
        return f"weight of {_kind([embedding])}, which does more than look up a row"
    return None


def _why_not_tied(modules: Sequence[nn.Module], heads: set[nn.Module], extent: Extent) -> str | None:
    """The same for a weight that other modules use too; empty if the settings do not ask for it."""
    if not (extent.embeddings and extent.head):
        asked = extent.embeddings or extent.head
        return "needs both precondition_embeddings and precondition_head" if asked else ""
    ends, others = ([m for m in modules if (m in heads) == is_head] for is_head in (True, False))
    are_two = len(ends) == len(others) == 1
    if not are_two or not isinstance(ends[0], nn.Linear) or not isinstance(others[0], nn.Embedding):
        return "its modules are more than one token embedding and the Linear that is the output head"
    return extent.not_tied or None


def _with_biases(model: nn.Module, treatments: dict[str, Treatment]) -> dict[str, Treatment]:
    """The same treatments, with the bias of every preconditioned weight added, if a single module uses both.

    Raises:
        ConfigurationError: there is no such bias.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    paired = dict(treatments)
    for name, treatment in treatments.items():
        bias = getattr(treatment.modules[0], "bias", None) if len(treatment.modules) == 1 else None
        partner = names.get(id(bias))
        if partner in treatments:
            adapter = replace(treatment.adapter, has_bias=True)
            paired[name] = replace(treatment, adapter=adapter, partner=partner)
            reason = f"bias of {_kind(treatment.modules)}, a column of its weight"
            paired[partner] = Treatment(True, reason, treatment.modules, adapter, partner=name, is_added=True)
    if paired == treatments:
        raise _missing("precondition_biases", "a preconditioned weight with a bias that is trained")
    return paired


def _modules_by_weight(model: nn.Module) -> dict[int, list[tuple[str, nn.Module]]]:
    """For every parameter (by identity): the modules that hold it directly, tied ones included."""
    users: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            users.setdefault(id(parameter), []).append((name, module))
    return users


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ConfigurationError("skip_modules", pattern, f"must be a regular expression ({error})") from None


def _kind(modules: Sequence[nn.Module]) -> str:
    return " and ".join(sorted({type(module).__name__ for module in modules}))
