"""Optimizers of other packages, measured where they are installed; none of them is needed."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch.optim import Optimizer

Build = Callable[[Sequence[torch.nn.Parameter], float, int], Optimizer]


@dataclass(frozen=True)
class Peer:
    """One optimizer of another package.

    Args:
        name: for the table and for `--peers`.
        package: the module it is imported from.
        build: maps matrices, a learning rate and the steps between refreshes of preconditioners to the optimizer.
        method: the method of ours that it should be compared with; empty where there is none.
    """

    name: str
    package: str
    build: Build
    method: str = ""

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
)
"""All that there is an adapter for, installed or not."""
