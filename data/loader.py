"""Batches from a prepared folder (`prepare.py`): a pure function of (seed, step, rank),
so it has no position to save.

To resume a run at step i is to ask for step i. The *global* micro-batch has
world_size · batch_size rows; rank r takes rows [r·B, (r+1)·B). So W processes with
batch B see exactly what one process with batch W·B sees.

Text is cut by a grid: each epoch lays n blocks of T tokens over the split, shifted by
the epoch's own offset (every offset comes once before any comes again), and visits them
in an order of its own. A step that ends one epoch starts the next. Examples
(supervised, preference) come in an order of each epoch's own, in whole global batches;
the few left over differ from epoch to epoch.

A loader may be one part of a mixture (`mixture.py`), which asks it for single rows.

B batch, T time = block_size, W world_size, n blocks or examples in the split.
"""

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from data.folder import Column, damaged, read_data_meta, read_index


@dataclass(frozen=True)
class Batch:
    x: torch.Tensor     # (B, T) int64 inputs
    y: torch.Tensor     # (B, T) int64 targets: y[:, t] is the token after x[:, t]
    mask: torch.Tensor  # (B, T) float32, 1 where the target counts in the loss

    def to(self, device: torch.device | str) -> "Batch":
        return Batch(self.x.to(device), self.y.to(device), self.mask.to(device))

    def split(self, chunk: int | None) -> list["Batch"]:
        """The same rows in pieces of `chunk` tokens, the last one perhaps shorter.

        None: in one piece.
        """
        if not chunk:
            return [self]
        return [Batch(*piece) for piece in zip(*(z.split(chunk, 1) for z in (self.x, self.y, self.mask)))]


class Loader:
    """One rank's share of a split. Preference batches are (2B, T): the B chosen first,
    then the B rejected.

    Raises ValueError, with the remedy, for a missing or damaged folder, for sizes that
    aren't positive, and when one step needs more than the split has (for train at once,
    for another split not before `step` is called, so that `windows` can evaluate on
    whatever there is). `share`: of the rows of a step, how many come from here.
    """

    def __init__(self, folder: str | Path, split: str, batch_size: int, block_size: int, seed: int = 0,
                 rank: int = 0, world_size: int = 1, accum: int = 1, share: Fraction = Fraction(1)):
        sizes = (("batch_size", batch_size, 1), ("block_size", block_size, 1), ("seed", seed, 0),
                 ("world_size", world_size, 1), ("accum", accum, 1))
        for name, value, limit in sizes:
            if value < limit:
                raise ValueError(f"{name} is {value}, but must be at least {limit}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank}, but must be in [0, world_size = {world_size})")
        self.folder, self.split, self.path = Path(folder), split, Path(folder) / f"{split}.bin"
        self.B, self.T, self.W, self.accum = batch_size, block_size, world_size, accum
        self.seed, self.rank, self.share = seed, rank, share
        self.permutation = lru_cache(maxsize=4)(_permutation)   # of an epoch or two, and the offsets
        self.meta = read_data_meta(folder)
        self.kind, self.vocab_size = self.meta["kind"], self.meta["vocab_size"]
        if split not in self.meta["tokens"]:
            raise damaged(self.folder / "meta.json", f"it has no tokens of {split!r}")
        dtype, n_tokens = np.dtype(self.meta["dtype"]), self.meta["tokens"][split]
        self.column = Column(self.path, dtype, n_tokens, self.vocab_size, self.meta)
        if n_tokens < 2:
            raise damaged(self.path, f"{n_tokens} tokens, but at least 2 are needed")
        # a document ends with <|endoftext|>, an example with what stops it: either pads
        self.end = int(self.column.read(n_tokens - 1, n_tokens)[0])
        if self.kind == "text":
            self.learnt = None
            self.n = max(1, (n_tokens - self.T) // self.T)              # blocks in the grid
            self.n_offsets = min(self.T, n_tokens - self.n * self.T)    # ≤ 0 where no block fits
        else:
            mask = Column(self.folder / f"{split}.mask.bin", np.dtype(np.uint8), n_tokens, 2, self.meta)
            self.learnt = mask.whole()
            self._find_examples(rows=2 if self.kind == "preference" else 1)
        if split == "train":
            self._require_enough()

    @property
    def parts(self) -> list["Loader"]:
        """A loader for each folder that is read."""
        return [self]

    @property
    def tokens(self) -> np.ndarray:
        """All tokens of the split, checked: the file is read to its end."""
        return self.column.whole()

    def counts(self) -> np.ndarray:
        """How often each token of the vocabulary is to be learnt in the split."""
        tokens, counts = self.tokens, 0
        for i in range(0, len(tokens), 2**22):
            part = slice(i, i + 2**22)
            learnt = tokens[part] if self.learnt is None else tokens[part][self.learnt[part] > 0]
            counts = counts + np.bincount(learnt, minlength=self.vocab_size)
        return counts

    # Batches

    def step(self, i: int) -> tuple[list[Batch], int]:
        """This rank's `accum` micro-batches of step `i`, and its number of targets.

        That number is the sum of the masks over all ranks and micro-batches (for
        preferences, the number of pairs), so that a summed loss divided by it is an
        exact mean. Examples are padded to the longest row in the global micro-batch:
        every rank's shapes are equal.
        """
        self._require_enough()
        G = self.W * self.B  # rows of a global micro-batch
        if self.kind == "text":
            starts = self._starts(i).reshape(self.accum, G, 1)
            return [self._batch(rows, rows + self.T + 1) for rows in starts], self.accum * G * self.T
        epoch, within = divmod(i, self.n // (self.accum * G))
        order = self.permutation(self.n, self.seed, 1 + epoch)[within * self.accum * G :][: self.accum * G]
        batches = [self._batch(self.starts[ids], self.stops[ids]) for ids in order.reshape(self.accum, G)]
        return batches, len(order) if self.kind == "preference" else int(self.n_targets[order].sum())

    def windows(self, max_tokens: int | None = None) -> Iterator[Batch]:
        """This rank's share of the split, in order, once: T-token windows, or examples.

        Every rank yields the same number of batches of the same shapes; where rows run
        out they are masked wholly. `max_tokens` limits the number of targets over all
        ranks (but at least one row is given).
        """
        starts, stops, n_targets = self.spans()
        if max_tokens is not None:
            n = max(1, np.searchsorted(np.cumsum(n_targets), max_tokens, side="right"))
            starts, stops = starts[:n], stops[:n]
        G = self.W * self.B
        for at in range(0, len(starts), G):
            missing = ((0, G - len(starts[at : at + G])), (0, 0))
            yield self._batch(np.pad(starts[at : at + G], missing), np.pad(stops[at : at + G], missing))

    def spans(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of the rows of `windows`: starts and stops (n, k), and their targets (n,).

        k = 2 for preferences, else 1.
        """
        if self.kind != "text":
            return self.starts, self.stops, self.n_targets
        starts = np.arange(0, len(self.column) - 1, self.T, dtype=np.int64)[:, None]
        stops = np.minimum(starts + self.T + 1, len(self.column))
        return starts, stops, (stops - starts - 1)[:, 0]

    def row(self, j: int) -> tuple[np.ndarray, np.ndarray, int]:
        """Of the j-th row that training takes from here: starts and stops (k,), and its
        number of targets.
        """
        epoch, within = divmod(j, self.n)
        if self.kind == "text":
            start = np.array([self._crop(epoch, within)])
            return start, start + self.T + 1, self.T
        i = self.permutation(self.n, self.seed, 1 + epoch)[within]
        return self.starts[i], self.stops[i], int(self.n_targets[i])

    def _starts(self, i: int) -> np.ndarray:
        """Where the rows of step i start in a text: (accum · W · B,)."""
        rows = self.accum * self.W * self.B
        return np.array([self._crop(*divmod(j, self.n)) for j in range(i * rows, (i + 1) * rows)])

    def _crop(self, epoch: int, j: int) -> int:
        """Where crop `j` of `epoch` starts: offset + T · block."""
        offset = self.permutation(self.n_offsets, self.seed, 0)[epoch % self.n_offsets]
        return int(offset + self.T * self.permutation(self.n, self.seed, 1 + epoch)[j])

    def _batch(self, starts: np.ndarray, stops: np.ndarray) -> Batch:
        """This rank's rows of a global micro-batch of spans tokens[start:stop].

        starts, stops: (W·B, k), k = 2 for preferences, else 1.
        """
        mine = slice(self.rank * self.B, (self.rank + 1) * self.B)
        # all chosen, then all rejected
        spans = zip(starts[mine].T.reshape(-1), stops[mine].T.reshape(-1))
        return stack([(self, start, stop) for start, stop in spans], int((stops - starts).max()))

    # States that go on from step to step. Here there are none: each row begins anew.
    # lib/streams.py has the loader whose rows continue those of the step before.

    def carried(self, i: int) -> list:
        """The states that the micro-batches of step i go on from; None begins anew."""
        return [None] * self.accum

    def carry(self, micro: int, state) -> None:
        """Note the state that follows micro-batch `micro`. This loader forgets it."""

    def state_dict(self) -> list | None:
        """What a checkpoint has to keep for `load_state_dict`; None: nothing."""
        return None

    def load_state_dict(self, states: list | None, step: int, where: str) -> None:
        """Go on at `step` with the states of a checkpoint, which `where` names.

        Raises ValueError where it carries the states of other rows than this loader's.
        """
        require_rows(states, [], where)

    # What a mixture tells of its parts. Here there is nothing to be told.

    def seen(self, step: int) -> dict[str, float]:
        """How often each part was read before `step`, in epochs."""
        return {}

    def introduction(self) -> list[str]:
        """A line for each part: its share."""
        return []

    # The folder

    def _find_examples(self, rows: int) -> None:
        """Sets starts, stops: (n, rows) int64, the examples cut to T + 1 tokens.

        Those that then teach nothing are left out.
        """
        path = self.folder / f"{self.split}.idx.bin"
        index = read_index(path, len(self.column), rows, self.meta)
        starts, stops = index[:-1], np.minimum(index[1:], index[:-1] + self.T + 1)
        # Sums of the mask over [start + 1, stop): the first token of a row is no
        # target. reduceat wants no end index.
        bounds = np.stack([starts + 1, stops], axis=1).reshape(-1)
        inside = np.append(self.learnt, np.uint8(0))
        n_targets = np.add.reduceat(inside, bounds, dtype=np.int64)[::2].reshape(-1, rows)
        useful = (n_targets > 0).all(axis=1)
        if not useful.any():
            raise ValueError(f"no example in {path} has a target within block_size {self.T}: "
                             "use a larger block_size")
        self.starts, self.stops = starts.reshape(-1, rows)[useful], stops.reshape(-1, rows)[useful]
        self.n_targets = n_targets[useful].sum(axis=1)
        self.n = len(self.starts)
        n_cut = int((np.diff(index) > self.T + 1).reshape(-1, rows)[useful].any(axis=1).sum())
        if self.rank == 0:
            _say_left_out(str(path), len(useful), n_cut, len(useful) - self.n, self.T)

    def different_rows(self) -> int:
        """How many rows there are of which no two are the same."""
        return self.n * self.n_offsets if self.kind == "text" else self.n

    def _require_enough(self) -> None:
        """Rows of one step must differ: within a rank, and between ranks."""
        if self.kind == "text" and len(self.column) < self.T + 1:
            raise ValueError(f"{self.path} has {len(self.column)} tokens, but one crop of "
                             f"block_size {self.T} needs {self.T + 1}: use a block_size of at most "
                             f"{len(self.column) - 1}, or more data")
        present, needed = self.different_rows(), math.ceil(self.share * self.W * self.B * self.accum)
        if present < needed:
            part = "" if self.share == 1 else f" · its share {float(self.share):.3g}"
            raise ValueError(f"{self.path} has {present} different rows, but one step takes {needed} "
                             f"(batch_size {self.B} · world_size {self.W} · accum {self.accum}{part}): "
                             "use a smaller batch_size, or more data")


def stack(spans: list[tuple[Loader, int, int]], width: int) -> Batch:
    """Rows of `width` tokens, the last of them only a target: of each loader
    tokens[start:stop], then its end, masked.
    """
    row = np.empty((len(spans), width), np.int64)
    mask = np.zeros((len(spans), width), np.float32)
    for r, (loader, start, stop) in enumerate(spans):
        row[r, stop - start :] = loader.end
        row[r, : stop - start] = loader.column.read(start, stop)
        mask[r, : stop - start] = 1 if loader.learnt is None else loader.learnt[start:stop]
    row, mask = torch.from_numpy(row), torch.from_numpy(mask)
    return Batch(row[:, :-1].contiguous(), row[:, 1:].contiguous(), mask[:, 1:].contiguous())


def require_rows(states: list | None, expected: list[int], where: str) -> None:
    """Raises ValueError unless `states` have the `expected` rows of the micro-batches.

    Each state is (position, layers), layers nested tuples of tensors with a row for
    each text of all processes.
    """
    present = [len(_first_tensor(layers)) for _, layers in states or []]
    if present != expected:
        raise ValueError(f"{where} carries the state of {sum(present)} texts in {len(present)} "
                         f"micro-batches, these settings of {sum(expected)} in {len(expected)}: resume "
                         "with the bptt_truncate, batch_size, accum and processes that it was started with")


def _first_tensor(tree) -> torch.Tensor | None:
    """In nested tuples."""
    if isinstance(tree, torch.Tensor):
        return tree
    parts = tree if isinstance(tree, tuple | list) else ()
    return next((t for t in map(_first_tensor, parts) if t is not None), None)


def _permutation(n: int, seed: int, stream: int) -> np.ndarray:
    """Stream 0 orders the offsets, stream 1 + e the blocks or examples of epoch e."""
    return np.random.default_rng([seed, stream]).permutation(n)


@lru_cache(maxsize=64)  # once in a process
def _say_left_out(path: str, n: int, cut: int, without: int, T: int) -> None:
    """On stderr, if there is something to be said."""
    if cut:
        print(f"{path}: {cut} of {n} examples are longer than block_size = {T} and are cut before their end",
              file=sys.stderr)
    if without:
        print(f"{path}: {without} of {n} examples are left out: they have nothing to learn within "
              f"block_size = {T}", file=sys.stderr)
