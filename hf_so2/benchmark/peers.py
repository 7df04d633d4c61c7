"""Optimizers of other packages, measured where they are installed; none of them is needed."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hf_so2.methods.table import METHODS

Build = Callable[[Sequence[torch.nn.Parameter], float, int], Optimizer]
Gradients = Callable[[nn.Module, Tensor], Tensor]


@dataclass(frozen=True)
class Peer:
    """One optimizer of another package.

    Args:
        name: for the table and for `--peers`.
        package: the module it is imported from.
        build: maps matrices, a learning rate and the steps between refreshes of preconditioners to the optimizer.
        method: the method of ours that it should be compared with; empty where there is none.
        gradients: of a package that preconditions gradients as it computes them: maps a model, the names of the
            weights and the steps between refreshes to a function of the model and tokens, which returns the loss.
    """

    name: str
    package: str
    build: Build
    method: str = ""
    gradients: Callable[[nn.Module, Collection[str], int], Gradients] | None = None

    @property
    def installed(self) -> bool:
        """Whether its package can be imported."""
        return find_spec(self.package) is not None


def _muon(parameters: Sequence[torch.nn.Parameter], lr: float, interval: int) -> Optimizer:
    return torch.optim.Muon(parameters, lr=lr)


def _heavyball(name: str) -> Build:
    def build(parameters: Sequence[torch.nn.Parameter], lr: float, interval: int) -> Optimizer:
        heavyball: Any = importlib.import_module("heavyball")
        # Compiling takes minutes, and ours are measured as they come, too.
        heavyball.utils.compile_mode = None
        optimizer: Optimizer = getattr(heavyball, name)(
            parameters, lr=lr, precondition_frequency=interval, use_precond_schedule=False, max_precond_dim=8192
        )
        return optimizer

    return build


def _pytorch_optimizer(name: str, interval_name: str, **settings: Any) -> Build:
    def build(parameters: Sequence[torch.nn.Parameter], lr: float, interval: int) -> Optimizer:
        package: Any = importlib.import_module("pytorch_optimizer")
        optimizer: Optimizer = getattr(package, name)(parameters, lr=lr, **{interval_name: interval}, **settings)
        return optimizer

    return build


def _sgd(parameters: Sequence[torch.nn.Parameter], lr: float, interval: int) -> Optimizer:
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9)


def _asdfghjkl_kfac(model: nn.Module, weights: Collection[str], interval: int) -> Gradients:
    """Its K-FAC, with factors as often as in ours."""
    package: Any = importlib.import_module("asdl")
    if not torch.cuda.is_available():
        # It marks ranges for CUDA's profiler, which a build without CUDA refuses to do.
        torch.cuda.nvtx.range_push = lambda msg: 0
        torch.cuda.nvtx.range_pop = lambda: 0
    left_out = [module for name, module in model.named_modules() if f"{name}.weight" not in weights]
    config = package.PreconditioningConfig(
        preconditioner_upd_interval=interval,
        curvature_upd_interval=min(METHODS["kfac"].settings({}).factor_update_steps, interval),
        damping=1e-3,
        ema_decay=0.05,
        ignore_modules=left_out,
    )
    maker = package.KfacGradientMaker(model, config, fisher_type="fisher_emp")

    def gradients(model: nn.Module, tokens: Tensor) -> Tensor:
        config.data_size = len(tokens)
        output = maker.setup_model_call(model, input_ids=tokens, labels=tokens)
        maker.setup_logits_repr(output["logits"])
        maker.setup_loss_repr(output["loss"])
        loss: Tensor = maker.forward_and_backward()[1]
        return loss.detach()

    return gradients


PEERS = (
    Peer("torch.Muon", "torch", _muon, "muon"),
    Peer("heavyball.SOAP", "heavyball", _heavyball("SOAP"), "soap"),
    Peer("heavyball.KLShampoo", "heavyball", _heavyball("KLShampoo"), "kl_shampoo"),
    Peer("pytorch_optimizer.SOAP", "pytorch_optimizer", _pytorch_optimizer("SOAP", "precondition_frequency"), "soap"),
    Peer(
        "pytorch_optimizer.ScalableShampoo",
        "pytorch_optimizer",
        # By default it cuts weights into blocks of 512, and small ones into vectors.
        _pytorch_optimizer(
            "ScalableShampoo",
            "preconditioning_compute_steps",
            start_preconditioning_step=1,
            block_size=8192,
            shape_interpretation=False,
        ),
        "shampoo",
    ),
    # Installed as asdfghjkl.
    Peer("asdfghjkl.KFAC", "asdl", _sgd, "kfac", _asdfghjkl_kfac),
)
"""All that there is an adapter for, installed or not."""
