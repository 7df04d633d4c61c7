"""One training run for any number of ranks: what the tests of several processes compare with one process.

A rank sees its share of every global batch, in two micro-batches where there are rows enough; rows have padding and
prompts of random length, and every third batch is short, so that no two ranks see as many rows or tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from shared.helpers import BOTH_ENDS, gpt2, in_float64, llama, mixtral, relative_error, token_rows
from torch import Tensor, nn

import hf_so2

T = TypeVar("T")

STEPS = 10

# How far ranks may end from one process, relative to the norm of all parameters.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
# Where one process with its rows in another order ends farther from itself than that, ranks may end as far, times this.
OF_ONE_PROCESS = 10

# More tokens than dimensions: round-off in the null space of a factor would be magnified as much as damping allows.
ROWS, ROWS_OF_A_SHORT_BATCH, LENGTH = 12, 7, 12


@dataclass(frozen=True)
class Case:
    """One run.

    Args:
        name: the optimizer's.
        fraction: its `gradient_worker_fraction`; of no meaning to a first-order method.
        dtype: of model and statistics.
        settings: the others.
        tied: whether embedding and head are one weight.
        family: `llama`; the same with `odd` sizes, which no number of ranks divides; `gpt2`, whose weights are stored
            transposed and have biases; or `mixtral`, with experts that some ranks have no tokens for.
    """

    name: str
    fraction: float = 1.0
    dtype: torch.dtype = torch.float64
    settings: tuple[tuple[str, Any], ...] = ()
    tied: bool = False
    family: str = "llama"

    def __str__(self) -> str:
        return f"{self.name} {self.fraction} {self.dtype} {dict(self.settings)}{' tied' * self.tied} {self.family}"

    @property
    def magnifies_round_off(self) -> bool:
        """Whether one process does not reproduce itself to the tolerance when its sums are made in another order.

        SOAP's update depends on each vector of its eigenbases. Of the attention output's first gradient, the singular
        values reach down to 7e-6 of the largest, squares of them are 5e-9 apart, and so vectors are known to 1e-8 at
        best. Without that weight, ranks reach the tolerance. Muon rounds to bfloat16, whose numbers are 4e-3 apart.
        """
        name, skipped = self.name.removesuffix("_mup"), dict(self.settings).get("skip_modules")
        return (name == "soap" and not skipped) or (name == "muon" and self.dtype == torch.float32)

    def is_first_order(self) -> bool:
        return self.name.removesuffix("_mup") in ("adamw", "sgd")


# Where momentum, norm control, damping or the form of the factors meet the sharing of work.
SPLIT = {"split_heads": True}
SETTINGS: list[tuple[str, dict[str, Any]]] = [
    ("kfac", {"momentum_order": "after", "norm_control": "graft_adam", "nesterov": True}),
    ("kfac", {"norm_control": "kl_clip", "adaptive_damping": True}),
    ("ekfac", {**BOTH_ENDS, "head_output_factor": "diagonal"}),
    ("tekfac", {"factor_update_steps": 2, "norm_control": "graft_sgd"}),
    ("kfac", {"factor_update_steps": 2, "preconditioner_update_steps": 4}),
    ("shampoo", {"block_size": 10, "norm_control": "kl_clip"}),
    ("soap", {"max_preconditioner_dim": 16, "precondition_head": True}),
    ("soap", {"skip_modules": ("o_proj",)}),
    ("soap_mup", {"skip_modules": ("o_proj",)}),
    ("kl_shampoo", SPLIT),
]

BIASES_AND_CLIP = (("precondition_biases", True), ("norm_control", "kl_clip"))


def sharded_cases(fractions: Sequence[float] = ()) -> list[Case]:
    """Runs with parameters of which every rank has a part.

    Args:
        fractions: besides a few, every optimizer with each of these fractions of ranks that hold its curvature, and
            other settings.
    """
    few = [
        Case("kfac", 0.0, settings=tuple(BOTH_ENDS.items()), tied=True, family="odd"),
        Case("kfac", 1.0, settings=BIASES_AND_CLIP, family="gpt2"),
        Case("shampoo", 1.0, family="odd"),
        Case("muon", 0.0, family="odd"),
        Case("muon", 1.0, settings=tuple(SPLIT.items())),
        Case("shampoo", 0.0, settings=tuple(SPLIT.items()), family="gpt2"),
        Case("kl_shampoo", 1.0, family="mixtral"),
        Case("kfac", 0.0, settings=(("expert_method", "shampoo"),), family="mixtral"),
        Case("adamw", family="odd"),
        Case("sgd", family="odd"),
    ]
    if not fractions:
        return few
    several = [Case(name, fraction, family="odd") for name in hf_so2.OPTIMIZERS for fraction in fractions]
    others = [
        Case(name, fractions[0], settings=tuple(settings.items()), family="odd")
        for name, settings in SETTINGS
        if not settings.get("adaptive_damping")
    ]
    others += [Case("kfac", fractions[0], settings=BIASES_AND_CLIP, family="gpt2")]
    others += [Case("shampoo", fraction, settings=tuple(SPLIT.items()), family="gpt2") for fraction in fractions]
    others += [
        Case("muon", fraction, settings=(("norm_control", "kl_clip"),), family="mixtral") for fraction in fractions
    ]
    others += [Case("kfac", fractions[0], torch.float32, family="odd")]
    once = [case for case in several if case.fraction == fractions[0] or not case.is_first_order()]
    return list(dict.fromkeys([*few, *once, *others]))


INTERRUPTED = Case("kfac", 0.0, settings=tuple(SETTINGS[0][1].items()))
"""The run that is also stopped half way and resumed."""


def model_for(case: Case) -> nn.Module:
    """One layer, 16 wide; twice that for μP, whose base is 16 wide."""
    width = 32 if case.name.endswith("_mup") else 16
    if case.family == "gpt2":
        model: nn.Module = gpt2(width, n_layer=1)
    elif case.family == "mixtral":
        model = mixtral(width, num_local_experts=5, num_experts_per_tok=1)
    else:
        odd = {"vocab_size": 97, "intermediate_size": 97} if case.family == "odd" else {}
        model = llama(width, num_hidden_layers=1, tie_word_embeddings=case.tied, **odd)
    if case.dtype == torch.float64:
        in_float64(model)
    return model


def optimizer_for(case: Case, model: nn.Module) -> hf_so2.SecondOrderOptimizer:
    settings = {"factor_update_steps": 1, "preconditioner_update_steps": 3, **dict(case.settings)}
    if case.name.removesuffix("_mup") == "muon" or case.is_first_order():
        del settings["factor_update_steps"], settings["preconditioner_update_steps"]
    if not case.is_first_order():
        settings["gradient_worker_fraction"] = case.fraction
    if case.name.endswith("_mup"):
        settings["base_config"] = model_for(replace(case, name="kfac")).config
    return hf_so2.build_optimizer(case.name, model, **settings)


def batch(step: int) -> list[dict[str, Tensor]]:
    rows = token_rows(ROWS if step % 3 else ROWS_OF_A_SHORT_BATCH, LENGTH, padded=True, seed=step)
    assert any((row["labels"] == -100).any() for row in rows)
    return rows


def counted(rows: list[dict[str, Tensor]]) -> int:
    return sum(int((row["labels"][1:] != -100).sum()) for row in rows)


def loss_sum(model: nn.Module, rows: list[dict[str, Tensor]]) -> Tensor:
    """Of all tokens that have a label."""
    inputs, mask, labels = (torch.stack([row[k] for row in rows]) for k in ("input_ids", "attention_mask", "labels"))
    logits = model(input_ids=inputs, attention_mask=mask).logits[:, :-1]
    return nn.functional.cross_entropy(
        logits.reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1), ignore_index=-100, reduction="sum"
    )


def train(
    case: Case,
    rank: int = 0,
    ranks: int = 1,
    *,
    wrap: Callable[[nn.Module], nn.Module] = lambda model: model,
    shard: Callable[[nn.Module], None] | None = None,
    steps: range = range(STEPS),
    resume: Mapping[str, Any] | None = None,
    load: Callable[[nn.Module, hf_so2.SecondOrderOptimizer], None] = lambda model, optimizer: None,
    order: Callable[[list[T]], list[T]] = lambda rows: rows,
) -> tuple[nn.Module, hf_so2.SecondOrderOptimizer]:
    """Train on this rank's share of every batch.

    Args:
        wrap: makes the model one that averages gradients over ranks.
        shard: applies `fully_shard` to the model instead, before its optimizer is built.
        resume: `model` and `optimizer` states to go on from.
        load: restores a saved state by itself.
        order: of the rows of every batch.
    """
    model = model_for(case)
    if shard is not None:
        shard(model)
    optimizer = optimizer_for(case, model)
    if resume is not None:
        model.load_state_dict(resume["model"])
        optimizer.load_state_dict(resume["optimizer"])
    load(model, optimizer)
    wrapped = wrap(model)
    for step in steps:
        rows = order(batch(step))
        mine = rows[rank::ranks]
        # Under FSDP2 every rank has to run the model as often as the others.
        together = shard is not None and len(rows) // ranks < 2
        half = len(mine) if together else (len(mine) + 1) // 2
        micro_batches = [part for part in (mine[:half], mine[half:]) if part]
        scale = ranks / counted(rows)
        for index, part in enumerate(micro_batches):
            mask = torch.stack([row["attention_mask"] for row in part])
            optimizer.announce(counted(part), scale, mask)
            if optimizer.wants_loss:
                optimizer.reevaluate_with(lambda part=part, scale=scale: loss_sum(model, part).detach() * scale)
            is_last = index == len(micro_batches) - 1
            if shard is not None:
                model.set_requires_gradient_sync(is_last)
            with contextlib.nullcontext() if is_last or wrapped is model else wrapped.no_sync():
                (loss_sum(wrapped, part) * scale).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def parameters(model: nn.Module) -> Tensor:
    """All of them in one vector; of sharded ones the wholes."""
    wholes = [getattr(p, "full_tensor", lambda p=p: p)() for p in model.parameters()]
    return torch.cat([whole.detach().reshape(-1) for whole in wholes])


def cases(*, all_of_them: bool) -> list[Case]:
    """Every optimizer, with its curvature on every rank and on one, and other settings besides.

    Args:
        all_of_them: also half-way, μP's names everywhere, and every name in float32.
    """
    found = []
    for name in hf_so2.OPTIMIZERS:
        is_plain = not name.endswith("_mup")
        found.append(Case(name, 0.0))
        if not Case(name).is_first_order():
            found += [Case(name, 1.0)] if is_plain or all_of_them else []
            found += [Case(name, 0.5)] if all_of_them else []
        if (is_plain and all_of_them) or name == "kfac":
            found.append(Case(name, 0.0, torch.float32))
    found.append(Case("kfac", 0.0, settings=tuple(BOTH_ENDS.items()), tied=True))
    found += [Case("kl_shampoo", fraction, family="mixtral") for fraction in (0.0, 1.0)]
    found.append(Case("kfac_mup", 0.0, settings=(("expert_method", "shampoo"),), family="mixtral"))
    return found + [Case(name, 0.0, settings=tuple(settings.items())) for name, settings in SETTINGS]


def check_ends(of: Sequence[Case], ends: Sequence[Mapping[str, Tensor]]) -> None:
    """Ranks end bit-equal to each other, and one process ends there too.

    Args:
        of: the runs.
        ends: for every rank its parameters in the end, by `str` of the case.
    """
    alone: dict[Case, tuple[Tensor, float]] = {}
    for case in of:
        # In one process there is nothing to be spread.
        reference = replace(case, fraction=1.0)
        if reference not in alone:
            alone[reference] = in_one_process(reference)
        expected, tolerance = alone[reference]
        first, *others = (end[str(case)] for end in ends)
        assert all(torch.equal(other, first) for other in others), case
        assert relative_error(first, expected) < tolerance, case


def in_one_process(case: Case) -> tuple[Tensor, float]:
    """Where it ends, and how far from there ranks may end."""
    end = parameters(train(case)[0])
    if not case.magnifies_round_off:
        return end, TOLERANCE[case.dtype]
    others = [parameters(train(case, order=order)[0]) for order in (backwards, rotated)]
    apart = max(float(relative_error(other, end)) for other in others)
    return end, max(TOLERANCE[case.dtype], OF_ONE_PROCESS * apart)


def backwards(rows: list[T]) -> list[T]:
    return rows[::-1]


def rotated(rows: list[T]) -> list[T]:
    return rows[3:] + rows[:3]
