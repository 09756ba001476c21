"""Texts go on from step to step: the state is kept, not the gradient (bptt_truncate).

Row r of a step begins where row r of the step before ended. The carried states belong
to the checkpoint, as plain tuples of all processes' rows, so a resumed run is the same.
"""

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from data.loader import Loader, require_rows
from data.mixture import open_split
from data.shares import is_mixture
from lib.states import tree_map
from model import State


def open_loader(folder: str, half: str, fit, T: int, seed: int, rank: int, world: int) -> Loader:
    """A half of a data folder, or of a mixture, for the loop `fit` (a FitConfig), whose
    training text may go on step by step.
    """
    how = (half, fit.batch_size, T, seed, rank, world, fit.accum)
    if not fit.bptt_truncate or half != "train":
        return open_split(folder, *how)
    if is_mixture(folder):
        raise ValueError(f"{folder} is a mixture, whose rows do not go on from step to step: streams "
                         "(bptt_truncate) are for one folder")
    return StreamLoader(folder, *how)


class StreamLoader(Loader):
    """A Loader of text: rows go on where the last step ended, until all begin anew."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.kind != "text":
            raise ValueError(
                f"{self.folder} holds {self.kind} examples, which do not go on from step to step: "
                "streams (bptt_truncate) are for text"
            )
        self.states: list[State | None] = [None] * self.accum

    def carried(self, i: int) -> list[State | None]:
        """The state that each micro-batch of step i goes on from; None where the
        streams begin anew.
        """
        if self.begins(i):
            self.states = [None] * self.accum
        return self.states

    def carry(self, micro: int, state: State) -> None:
        self.states[micro] = state

    def begins(self, i: int) -> bool:
        """Whether the streams start anew with step i."""
        return i % self.length == 0

    @property
    def length(self) -> int:
        """Of a stream, in steps."""
        return self.n // (self.accum * self.W * self.B)

    def _starts(self, i: int) -> np.ndarray:
        """Where the rows of step i start: (accum * W * B,).

        The blocks left over differ between epochs.
        """
        rows = self.accum * self.W * self.B
        epoch, within = divmod(i, self.length)
        offset = self.permutation(self.n_offsets, self.seed, 0)[epoch % self.n_offsets]
        skipped = self.permutation(self.n - rows * self.length + 1, self.seed, 1 + epoch)[0]
        order = self.permutation(rows, self.seed, 1 + epoch)
        return offset + self.T * (skipped + self.length * order + within)

    def different_rows(self) -> int:
        return self.n

    def state_dict(self) -> list[tuple]:
        """For each micro-batch (position, layers), the rows of all processes.

        Every process must call it.
        """
        return pack([state for state in self.states if state])

    def load_state_dict(self, states: list[tuple] | None, step: int, where: str) -> None:
        if step:
            require_rows(states, [self.W * self.B] * self.accum, where)
        self.states = unpack(states, self.B, self.rank) if states else [None] * self.accum


def pack(states: list[State]) -> list[tuple]:
    """Each as (position, layers) on the CPU, the rows of all processes concatenated."""
    def rows(x: Tensor) -> Tensor:
        parts = [x]
        if dist.is_initialized():
            parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
            dist.all_gather(parts, x.contiguous())
        return torch.cat(parts).cpu()

    return [(state.position, tree_map(rows, state.layers)) for state in states]


def unpack(packed: list[tuple], B: int, rank: int) -> list[State]:
    """This process's B rows of each."""
    mine = slice(rank * B, (rank + 1) * B)
    return [State(position, tree_map(lambda x: x[mine], layers)) for position, layers in packed]
