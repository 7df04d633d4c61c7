"""Blocks of a matrix that is too large to precondition as a whole. Each block has its own preconditioner."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_so2.curvature.base import GradientBlock, State
from hf_so2.curvature.parts import costs
from hf_so2.curvature.parts.spectrum import quantity_of
from hf_so2.damping import Damping
from hf_so2.linalg.block_diagonal import parts_of


@dataclass(frozen=True)
class Blocked(GradientBlock):
    """A method that sees gradients, applied to each block of a grid over the matrix (Anil et al. 2020,
    arXiv 2002.09018, section 3).

    A dimension n above `size` is cut into `⌈n / size⌉` parts. Their lengths differ by at most one: a small leftover
    part would have factors of mere noise. A dimension up to `size` is not cut. A single block equals `block` itself.

    The damping of each block depends on its own factors. Blocks of orthogonal updates do not form an orthogonal update,
    so norm control has to set the size of the whole.

    State: the state of every block under `<row>.<column>/<name>`, and `weight`, which all blocks share.

    Args:
        block: the method. It must observe gradients only: a K-FAC factor belongs to a row or a column of the grid, not
            to a block.
        size: the largest dimension of a block, ≥ 1.
        shape: (fan_out, fan_in) of the matrix.
    """

    block: GradientBlock
    size: int
    shape: tuple[int, int]

    def __post_init__(self) -> None:
        for name in ("building_steps", "corrects_momentum"):
            object.__setattr__(self, name, getattr(self.block, name))

    @property
    def parts(self) -> list[tuple[int, int]]:
        """(fan_out, fan_in) of every block of the matrix."""
        return [(part.shape[0], part.shape[1]) for _, part in self._cut(torch.empty(self.shape, device="meta"))]

    def states(self, state: State) -> Iterator[State]:
        """The state of every block, under the block's own names."""
        return (_of(state, prefix) for prefix in self._prefixes())

    def init_state(self, shape: tuple[int, int], device: torch.device, dtype: torch.dtype) -> State:
        state = {"weight": torch.zeros((), device=device, dtype=dtype)}
        for prefix, part in self._cut(torch.empty(shape, device="meta")):
            own = self.block.init_state((part.shape[0], part.shape[1]), device, dtype)
            state |= {prefix + name: value for name, value in own.items()}
        return state

    def observe_gradient(self, state: State, gradient: Tensor) -> State:
        return {
            prefix + name: value
            for prefix, part in self._cut(gradient)
            for name, value in self.block.observe_gradient(_of(state, prefix), part).items()
        }

    def update(self, state: State, observation: State) -> None:
        for prefix in self._prefixes():
            self.block.update(_of(state, prefix), _of(observation, prefix))
        state["weight"].copy_(state[f"{next(self._prefixes())}weight"])

    def refresh(self, state: State, damping: Damping) -> None:
        # All blocks are computed before any is stored: if the last one fails, the first ones must stay old too.
        fresh: State = {}
        for prefix in self._prefixes():
            own = _of(state, prefix)
            own |= {name: own[name].clone() for name in self.block.refreshed}
            self.block.refresh(own, damping)
            fresh |= {prefix + name: own[name] for name in self.block.refreshed}
        for name, value in fresh.items():
            state[name].copy_(value)

    @property
    def refreshed(self) -> list[str]:
        return [prefix + name for prefix in self._prefixes() for name in self.block.refreshed]

    def precondition(self, state: State, gradient: Tensor) -> Tensor:
        rows = []
        for _, row in itertools.groupby(self._cut(gradient), key=lambda entry: entry[0].split(".")[0]):
            parts = [self.block.precondition(_of(state, prefix), part) for prefix, part in row]
            rows.append(torch.cat(parts, dim=-1))
        return torch.cat(rows, dim=-2)

    def _prefixes(self) -> Iterator[str]:
        rows, columns = (range(parts_of(length, self.size)) for length in self.shape)
        return (f"{row}.{column}/" for row in rows for column in columns)

    def _cut(self, matrix: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The blocks of a matrix with their prefixes, in the order of rows of blocks."""
        down, across = (parts_of(length, self.size) for length in self.shape)
        rows = torch.tensor_split(matrix, down, dim=-2)
        parts = (part for row in rows for part in torch.tensor_split(row, across, dim=-1))
        return zip(self._prefixes(), parts, strict=True)

    def spectra(self, state: State, damping: Damping) -> dict[str, Tensor]:
        """The sum of the blocks' traces, their largest condition number, and their mean ρ."""
        parts = [self.block.spectra(own, damping) for own in self.states(state)]
        of_parts: dict[str, Callable[[Tensor], Tensor]] = {"trace": torch.sum, "condition": torch.amax}
        found = {name: torch.stack([part[name] for part in parts]) for name in parts[0]}
        return {name: of_parts.get(quantity_of(name), torch.mean)(values) for name, values in found.items()}

    def refresh_flops(self, shape: costs.Shape) -> float:
        return sum(self.block.refresh_flops(part) for part in self.parts)

    def precondition_flops(self, shape: costs.Shape) -> float:
        return sum(self.block.precondition_flops(part) for part in self.parts)

    def statistics_flops(self, shape: costs.Shape, tokens: int) -> float:
        return sum(self.block.statistics_flops(part, tokens) for part in self.parts)


def _of(state: State, prefix: str) -> State:
    """The tensors of one block, under the block's own names. They share memory with `state`."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
