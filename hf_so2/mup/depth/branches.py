"""Which weights can carry a factor on a family's residual branches: found on its base model, and proved there.

A branch is linear in its last weights, so that they can carry the factor: a projection with its bias, the stacks of all
experts, or the gain of a norm that ends the branch. Candidates come from the graph, linearity is tested by Euler's
theorem (`<W, d/dW>` of the branch gives the branch), and the whole is proved by logits: with the weights multiplied the
model must compute what it computes with every branch multiplied where it is added.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from hf_so2.errors import ConfigurationError
from hf_so2.mup.roles import layer_pattern_of
from hf_so2.mup.rules import ParameterWidth, Role
from hf_so2.mup.running import run_on_example
from hf_so2.mup.widths import rebuild

from .graph import Additions, Branch, Term, residual_sums

_PROOF = 0.5
"""The factor that the proof is made with."""
_MOST_GROUPS = 6
"""How many last operations of a branch are looked at."""


@dataclass(frozen=True)
class Branches:
    """The residual branches of a family, by patterns of parameter names.

    Args:
        carriers: what can carry a factor on the branches' outputs, with what the module adds to it before using it (1
            for Gemma's kind of norm).
        inside: everything inside of a branch.
    """

    carriers: Mapping[str, float]
    inside: frozenset[str]


def fold_branches(model: nn.Module, branches: Branches, factor: float) -> None:
    """Multiplies the outputs of all residual branches by `factor`, in their carriers."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            offset = branches.carriers.get(layer_pattern_of(name))
            if offset == 0:
                parameter.mul_(factor)
            elif offset is not None:
                parameter.copy_((parameter + offset) * factor - offset)


def make_probe(model_class: type[PreTrainedModel], config: PretrainedConfig) -> PreTrainedModel:
    """A small model whose branches all matter: nothing is zero as it may be in a fresh one."""
    config = rebuild(config, {})
    config._attn_implementation = "eager"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        probe = model_class(config).to(torch.float32).requires_grad_()
        with torch.no_grad():
            for parameter in probe.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return probe


def find_branches(probe: PreTrainedModel, widths: Mapping[str, ParameterWidth]) -> tuple[Branches, list[Term]]:
    """The family's branches, and where the forward pass of the probe adds them.

    Args:
        probe: see `make_probe`.
        widths: of the model's parameters, for their roles.

    Raises:
        ConfigurationError: the model does not run on its main input alone, or a branch has no weight that can carry a
            factor, or there is no branch.
    """
    roles: dict[str, Role] = {layer_pattern_of(name): width.role for name, width in widths.items()}
    names = {id(parameter): name for name, parameter in probe.named_parameters()}
    sums = residual_sums(probe)
    carriers: dict[str, float] = {}
    for branch in (branch for sum_ in sums for branch in sum_):
        found = _carriers(branch, names, roles)
        if found is None:
            last = ", ".join(names[id(p)] for group in branch.groups for p in group) or "no weight"
            raise refusal(probe, f"{last}, where a residual branch ends, cannot carry a factor")
        carriers |= {layer_pattern_of(names[id(p)]): found[1] for p in found[0]}
    if not carriers:
        raise refusal(probe, "no residual branch is found")
    # What several layers share, such as a bias of positions or a block that is used again, sums up over the depth.
    uses = Counter(id(p) for sum_ in sums for p in sum_[0].inside)
    inside = {layer_pattern_of(names[id(p)]) for sum_ in sums for p in sum_[0].inside if uses[id(p)] == 1}
    terms = [branch.term for sum_ in sums for branch in sum_]
    _prove_complete(probe, terms, roles)
    return Branches(carriers, frozenset(inside | carriers.keys())), terms


def _prove_complete(probe: PreTrainedModel, terms: list[Term], roles: Mapping[str, Role]) -> None:
    """Raise unless all projections of all layers are without effect where the branches that were found are zero."""
    with Additions(dict.fromkeys(terms, 0.0), keep=False):
        logits = run_on_example(probe, grad=True)
    layers = {
        name: parameter
        for name, parameter in probe.named_parameters()
        if layer_pattern_of(name) != name and roles.get(layer_pattern_of(name)) == "hidden"
    }
    gradients = torch.autograd.grad(logits.square().sum(), list(layers.values()), allow_unused=True)
    for name, gradient in zip(layers, gradients, strict=True):
        if gradient is not None and bool(gradient.any()):
            raise refusal(probe, f"{name} acts on the stream otherwise than by a residual branch")


def with_factor(probe: PreTrainedModel, terms: list[Term], factor: float) -> Tensor:
    """The logits with every branch multiplied where it is added."""
    with Additions(dict.fromkeys(terms, factor), keep=False):
        return run_on_example(probe)


def prove(wanted: Tensor, plain: Tensor, got: Tensor, probe: PreTrainedModel) -> None:
    """Raise unless `got` is what was `wanted`, as seen by how much it differs from `plain`."""
    change = float((wanted - plain).abs().max())
    if not (change > 0 and float((got - wanted).abs().max()) < 0.01 * change):
        raise refusal(probe, "the last weights of its residual branches cannot carry a factor")


def prove_fold(probe: PreTrainedModel, branches: Branches, terms: list[Term]) -> None:
    """Raise unless folding a factor into the carriers does what multiplying the branches does; changes the probe."""
    plain, wanted = run_on_example(probe), with_factor(probe, terms, _PROOF)
    fold_branches(probe, branches, _PROOF)
    prove(wanted, plain, run_on_example(probe), probe)


def refusal(model: PreTrainedModel, reason: str) -> ConfigurationError:
    """What a family that cannot be scaled in depth is answered; the Trainer puts its own value in place of the name."""
    allowed = f"must be as deep as the model, {type(model).__name__}: {reason}"
    return ConfigurationError("base_config", model.config.model_type, allowed)


def _carriers(
    branch: Branch, names: Mapping[int, str], roles: Mapping[str, Role]
) -> tuple[list[nn.Parameter], float] | None:
    """The largest set of last parameters that the branch is linear in, and what is added to them before use."""
    groups: dict[frozenset[str], list[nn.Parameter]] = {}
    for group in branch.groups:  # all experts of a layer are one
        groups.setdefault(frozenset(layer_pattern_of(names[id(p)]) for p in group), []).extend(group)
    members = list(groups.values())[:_MOST_GROUPS]
    for size in range(len(members), 0, -1):
        for chosen in itertools.combinations(members, size):
            candidate = list(dict.fromkeys(p for group in chosen for p in group))
            kinds = {roles.get(layer_pattern_of(names[id(p)]), "scalar") for p in candidate}
            if kinds & {"scalar", "output"}:  # routers and gates are what a branch is not linear in
                continue
            for offset in (0.0, 1.0) if kinds == {"vector"} else (0.0,):
                if _is_linear_in(branch.output, candidate, offset):
                    return candidate, offset
    return None


def _is_linear_in(output: Tensor, parameters: list[nn.Parameter], offset: float) -> bool:
    """Whether the output is homogeneous of degree 1 in all parameters together, along its own direction."""
    gradients = torch.autograd.grad(output, parameters, output.detach(), allow_unused=True, retain_graph=True)
    pairs = [(p.detach() + offset, g) for p, g in zip(parameters, gradients, strict=True) if g is not None]
    size = float(output.detach().double().square().sum())
    along = sum(float((p.double() * g.double()).sum()) for p, g in pairs)
    return size > 0 and abs(along - size) < 1e-4 * size


def layer_prefixes(names: Iterator[str]) -> dict[str, set[str]]:
    """The layers that parameters, by name or pattern, belong to: `model.layers.*` -> `{model.layers.0, ...}`."""
    found: dict[str, set[str]] = {}
    for name in names:
        steps = name.split(".")
        index = next((i for i, step in enumerate(steps) if step.isdigit() or step == "*"), None)
        if index is not None:
            found.setdefault(".".join([*steps[:index], "*"]), set()).add(".".join(steps[: index + 1]))
    return found
