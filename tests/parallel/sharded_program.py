"""One rank of `test_sharded.py`: trains every case under FSDP2, and through the Trainer, and saves where each ended."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

sys.path.insert(0, str(Path(__file__).parents[1]))
from shared import sharded_trainer
from shared.helpers import relative_error
from shared.ranks import Case, parameters, sharded_cases, train

import hf_so2
from hf_so2.distributed import GridCommunicator, gather_objects, local, split_of
from hf_so2.parallel import sharing
from hf_so2.parallel.sharded_state import load_state, share_of_state


def shard(model: nn.Module) -> None:
    """By block; with four ranks as two replicas of two shards."""
    ranks = dist.get_world_size()
    shape, names = ((ranks,), ("shard",)) if ranks < 4 else ((2, ranks // 2), ("replicate", "shard"))
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    inner = getattr(model, "model", None) or getattr(model, "transformer", None)
    blocks = getattr(inner, "layers", None) or getattr(inner, "h", None) or list(model)[-1:]
    for module in (*blocks, model):
        fully_shard(module, mesh=mesh)


def uneven() -> nn.Module:
    """A weight of 97 rows, and one of a single row, of which only the first rank has anything."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 97), nn.Tanh(), nn.Linear(97, 1)).double()


def loss(model: nn.Module) -> Tensor:
    inputs = torch.randn(64, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return model(inputs).square().mean()


def steps_of(model: nn.Module, **settings: object) -> hf_so2.SecondOrderOptimizer:
    """Every rank sees the same rows."""
    optimizer = hf_so2.build_optimizer("kfac", model, precondition_biases=True, norm_control="kl_clip", **settings)
    for _ in range(3):
        optimizer.observe_next_step()
        loss(model).backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def check_empty_shards(rank: int) -> None:
    plain = uneven()
    expected = steps_of(plain, preconditioner_update_steps=1).telemetry()
    for fraction in (0.0, 1.0):
        model = uneven()
        shard(model)
        optimizer = steps_of(model, preconditioner_update_steps=1, gradient_worker_fraction=fraction)
        assert (local(model[2].weight).numel() == 0) == (rank % 2 == 1)
        assert relative_error(parameters(model), parameters(plain)) < 1e-12
        found = optimizer.telemetry()
        for key in ("curvature/other/update_rms", "curvature/kl_clip_factor"):
            assert abs(found[key] / expected[key] - 1) < 1e-12


def check_that_all_skip_what_one_finds_not_finite(rank: int) -> None:
    for name in ("kfac", "adamw"):
        model = uneven()
        shard(model)
        optimizer = hf_so2.build_optimizer(name, model)
        before = parameters(model)
        loss(model).backward()
        if rank == 1:
            local(model[0].weight.grad.detach())[-1, -1] = torch.nan
        optimizer.step()
        assert (optimizer.skipped_steps, optimizer.steps) == (1, 0)
        assert torch.equal(parameters(model), before)


def check_what_ranks_hold(ranks: int) -> None:
    """Whole gradients of one layer at a time and where it is held; of all else, state included, this rank's part.

    What is sent: parts of the gradient to whom has the statistics, of its average to who preconditions, and of what
    comes of that to everybody.
    """
    sent: list[int] = []
    exchange = dist.all_to_all_single

    def counted(incoming: Tensor, outgoing: Tensor, *sizes: list[int]) -> None:
        sent.append(outgoing.numel())
        exchange(incoming, outgoing, *sizes)

    sizes: list[list[int]] = []
    gather = GridCommunicator.gather_to_holders

    def watched(self: GridCommunicator, parts: list) -> list[Tensor | None]:
        found = gather(self, parts)
        sizes.append([whole.numel() for whole in found if whole is not None])
        held = [whole is not None for whole in found]
        assert held == [self.grid.column_of(part.owner) == self.grid.column_of(self.rank) for part in parts]
        return found

    model = nn.Sequential(*(nn.Linear(12, 12, bias=False) for _ in range(8)))
    shard(model)
    optimizer = hf_so2.build_optimizer("shampoo", model, gradient_worker_fraction=0.0, preconditioner_update_steps=1)
    with (
        mock.patch.object(GridCommunicator, "gather_to_holders", watched),
        mock.patch.object(sharing, "BUCKET_BYTES", 1),
        mock.patch.object(dist, "all_to_all_single", counted),
    ):
        for _ in range(2):
            model(torch.randn(4, 12)).square().sum().backward()
            optimizer.step()
    assert {tuple(found) for found in sizes} == {(144,)}
    # A replica that the owner is not in sends nothing, and gets its parts.
    assert ranks > 2 or sum(sent) == 2 * 3 * 8 * 144 / ranks
    parts = 2 if ranks >= 4 else ranks
    state = [tensor for held in optimizer.state.values() for tensor in held.values() if tensor.ndim]
    assert state
    assert all(local(tensor.detach()).numel() == 144 // parts for tensor in state)


class Experts(nn.Module):
    """Four of them; `forward` makes the gradient of each a random matrix."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up_proj = nn.Parameter(torch.randn(4, 6, 5, dtype=torch.float64))

    def forward(self, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return (self.up_proj * torch.randn(4, 6, 5, generator=generator, dtype=torch.float64)).sum()


def check_that_experts_stay_at_home(ranks: int) -> None:
    """With one holder for each, the rank that has an expert preconditions it, and sends nothing."""
    sent: list[int] = []
    exchange = dist.all_to_all_single

    def counted(incoming: Tensor, outgoing: Tensor, arriving: list[int], leaving: list[int]) -> None:
        sent.append(sum(size for receiver, size in enumerate(leaving) if receiver != dist.get_rank()))
        exchange(incoming, outgoing, arriving, leaving)

    model, alone = (nn.Sequential(Experts()) for _ in range(2))
    shard(model)
    optimizers = [
        hf_so2.build_optimizer("shampoo", each, preconditioner_update_steps=2, gradient_worker_fraction=0.0)
        for each in (model, alone)
    ]
    with mock.patch.object(dist, "all_to_all_single", counted):
        for seed in range(3):
            model(seed).backward()
            optimizers[0].step()
            optimizers[0].zero_grad()
    for seed in range(3):
        alone(seed).backward()
        optimizers[1].step()
        optimizers[1].zero_grad()
    assert relative_error(parameters(model), parameters(alone)) < 1e-10
    assert sent
    assert ranks > 2 or not any(sent)
    held = [layer.name for layer in optimizers[0].curvature.layers.values() if layer.held]
    assert len(held) == 4 // ranks


@torch.no_grad()
def load(
    weights: dict[str, Tensor], saved: dict, curvature: dict, model: nn.Module, optimizer: hf_so2.SecondOrderOptimizer
) -> None:
    for name, parameter in model.named_parameters():
        local(parameter).copy_(split_of(parameter).part(weights[name], dist.get_rank()))
    load_state(optimizer, saved)
    optimizer.load_curvature_state_dict(curvature)


def check_that_a_resumed_run_goes_on(rank: int, ranks: int) -> None:
    """Bit for bit, from whole tensors: experts, and heads of which every rank has a part."""
    heads = (("split_heads", True),)
    for case in (Case("soap", 0.0, family="mixtral"), Case("shampoo", 1.0, settings=heads, family="gpt2")):
        straight, _ = train(case, rank, ranks, shard=shard, steps=range(5))
        stopped, optimizer = train(case, rank, ranks, shard=shard, steps=range(3))
        saved = share_of_state(optimizer, 0, 1) if rank == 0 else share_of_state(optimizer, 1, 1)
        saved, curvature = gather_objects(saved)[0], optimizer.curvature_state_dict()
        weights = {name: parameter.full_tensor() for name, parameter in stopped.named_parameters()}

        resumed, _ = train(
            case, rank, ranks, shard=shard, steps=range(3, 5), load=partial(load, weights, saved, curvature)
        )
        assert torch.equal(parameters(resumed), parameters(straight)), case


def main(output: Path, fractions: list[float]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    ends = {str(case): parameters(train(case, rank, ranks, shard=shard)[0]) for case in sharded_cases(fractions)}
    check_empty_shards(rank)
    check_that_all_skip_what_one_finds_not_finite(rank)
    check_what_ranks_hold(ranks)
    check_that_experts_stay_at_home(ranks)
    check_that_a_resumed_run_goes_on(rank, ranks)
    runs = {}
    for name, changes in list(sharded_trainer.SCENARIOS.items())[: None if fractions else 1]:
        trainer = sharded_trainer.train(output / name, ranks, **changes)
        resumed = sharded_trainer.train(
            output / "resumed", ranks, resume=str(output / name / "checkpoint-8"), **changes
        )
        runs[name] = {
            "parameters": sharded_trainer.wholes(trainer),
            "log": sharded_trainer.losses_and_curvature(trainer),
            "resumed": sharded_trainer.wholes(resumed),
        }
    torch.save({"ends": ends, "runs": runs}, output / f"rank-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), [float(fraction) for fraction in sys.argv[2:]])
