"""Several gloo ranks: work is shared, results are equal to those of one process, and a failure is everybody's."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import hf_so2
from hf_so2.engine.statistics import MAX_FAILURES_IN_A_ROW
from hf_so2.errors import TrainingDivergedError
from hf_so2.linalg import DecompositionError
from hf_so2.weights.layer import Layer

ROWS, RANKS = 24, 2


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 6), nn.GELU(), nn.Linear(6, 5)).double()


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(ROWS, 7, generator=generator).double(), torch.randint(0, 5, (ROWS,), generator=generator)


def train(name: str, net: nn.Module, rank: int, ranks: int) -> tuple[list[torch.Tensor], int]:
    """Three steps on this rank's share of each batch; the parameters, and how many layers were refreshed here."""
    optimizer = hf_so2.build_optimizer(name, net, lr=0.1)
    assert optimizer.curvature is not None
    refreshed = 0
    inner = optimizer.curvature._refresh

    def counting(layers: Sequence[Layer]) -> dict[str, str | None]:
        nonlocal refreshed
        refreshed += len(layers)
        return inner(layers)

    optimizer.curvature._refresh = counting  # type: ignore[method-assign]
    wrapped = nn.parallel.DistributedDataParallel(net) if ranks > 1 else net
    for step in range(3):
        inputs, labels = (part[rank::ranks] for part in batch(step))
        nn.functional.cross_entropy(wrapped(inputs), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [parameter.detach() for parameter in net.parameters()], refreshed


def work(rank: int, port: int, folder: str, name: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    assert dist.get_world_size() == RANKS
    try:
        torch.save(train(name, model(), rank, RANKS), Path(folder, f"{rank}.pt"))
        if name == "kfac":
            fail_on_one_rank(rank)
    finally:
        dist.destroy_process_group()


def fail_on_one_rank(rank: int) -> None:
    """A decomposition that fails where it is owned stops every rank, at the same step."""
    optimizer = hf_so2.build_optimizer("kfac", net := model(), lr=0.1, preconditioner_update_steps=1)
    assert optimizer.curvature is not None

    def failing(layers: Sequence[Layer]) -> dict[str, str | None]:
        error = str(DecompositionError("made to fail"))
        return {layer.name: error if layer.name == "0.weight" else None for layer in layers}

    optimizer.curvature._refresh = failing  # type: ignore[method-assign]
    for step in range(MAX_FAILURES_IN_A_ROW):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(batch(step)[0]), batch(step)[1]).backward()
        if step < MAX_FAILURES_IN_A_ROW - 1:
            optimizer.step()
    with pytest.raises(TrainingDivergedError, match=r"0\.weight"):
        optimizer.step()


@pytest.mark.parametrize("name", ["kfac", pytest.param("tekfac", marks=pytest.mark.slow)])
def test_ranks_share_refreshes_and_equal_one_process(name: str, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.start_processes(work, args=(port, str(tmp_path), name), nprocs=RANKS, start_method="spawn")
    alone, refreshed_alone = train(name, model(), 0, 1)
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]
    # Refreshes at steps 1 and 2 of three layers.
    assert refreshed_alone == 6
    assert sum(refreshed for _, refreshed in results) == 6
    assert all(refreshed > 0 for _, refreshed in results)
    for mine, other, reference in zip(results[0][0], results[1][0], alone, strict=True):
        assert torch.equal(mine, other)
        torch.testing.assert_close(mine, reference, rtol=1e-9, atol=1e-11)
