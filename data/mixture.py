"""Several data folders at once, each with its share of the rows: see `shares.py`.

Which of its rows a part gives is its own matter: one after the other, in the order of
`loader.py`. Like a Loader, a mixture is a pure function of (seed, step, rank). Parts
differ in epochs: a small one with a large share is read again and again, and the log
says how often.

What it is not: shares that change while training, or streams (`lib/streams.py`).
"""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from data.loader import Batch, Loader, stack
from data.shares import Turns, is_mixture, parts_of

ALIKE = ("kind", "tokenizer", "vocab_size", "dtype", "format")


def open_split(data: str | Path, split: str, *how, **more) -> Loader:
    """The loader of a data folder, or of a mixture of several."""
    return (Mixture if is_mixture(data) else Loader)(data, split, *how, **more)


class Mixture(Loader):
    """A Loader whose rows come from several folders.

    Raises ValueError, with the remedy, where the folders do not go together, or where
    one of them has less than it is to give to one step.
    """

    def __init__(self, data: str | Path, split: str, batch_size: int, block_size: int, seed: int = 0,
                 rank: int = 0, world_size: int = 1, accum: int = 1):
        shares = parts_of(data)
        how = (split, batch_size, block_size, seed, rank, world_size, accum)
        self.data, self.names, self.turns = data, list(shares), Turns(list(shares.values()))
        self.loaders = [Loader(name, *how, share) for name, share in shares.items()]
        first = self.loaders[0]
        for other in self.loaders[1:]:
            for key in ALIKE:
                if first.meta.get(key) != other.meta.get(key):
                    raise ValueError(f"{first.folder} and {other.folder} do not mix: {key} is "
                                     f"{first.meta.get(key)} and {other.meta.get(key)}; prepare them alike")
        framed = [loader for loader in self.loaders if "frames" in loader.meta]     # of before: not there
        for other in framed[1:]:
            if framed[0].meta["frames"] != other.meta["frames"]:
                raise ValueError(f"{framed[0].folder} and {other.folder} do not mix: their chat templates "
                                 "(or what opens or ends a text) differ; prepare them with one --tokenizer")
        self.folder, self.meta, self.split = first.folder, first.meta, split
        self.kind, self.vocab_size = first.kind, first.vocab_size
        self.B, self.T, self.W, self.accum = batch_size, block_size, world_size, accum
        self.seed, self.rank = seed, rank

    @property
    def parts(self) -> list[Loader]:
        return self.loaders

    @property
    def tokens(self) -> np.ndarray:
        raise ValueError(f"{self.data} is a mixture: name one folder")

    def counts(self) -> np.ndarray:
        """How often each token is to be learnt, every part weighted by its share."""
        counts = [part.counts() for part in self.parts]
        total = sum(int(count.sum()) for count in counts)
        weights = [float(share) * total / count.sum() for share, count in zip(self.turns.shares, counts)]
        return sum(weight * count for weight, count in zip(weights, counts))

    def step(self, i: int) -> tuple[list[Batch], int]:
        """This rank's `accum` micro-batches of step `i`, and its number of targets.

        A step may hold an example twice where the part's epoch ends within it.
        """
        G = self.W * self.B
        rows = [(self.parts[p], *self.parts[p].row(c))
                for p, c in islice(self.turns.after(i * self.accum * G), self.accum * G)]
        targets = len(rows) if self.kind == "preference" else sum(n for *_, n in rows)
        return [self._stack(rows[at : at + G]) for at in range(0, len(rows), G)], targets

    def windows(self, max_tokens: int | None = None) -> Iterator[Batch]:
        """This rank's rows of the split: each part's in order, once, in their shares,
        until a part has no more.

        So the mean over them is the loss of what is trained, however large the parts'
        held-out halves are.
        """
        spans, G = [part.spans() for part in self.parts], self.W * self.B
        rows, total = [], 0
        for p, c in self.turns.after(0):
            starts, stops, n_targets = spans[p]
            if c == len(starts) or max_tokens is not None and total and total + n_targets[c] > max_tokens:
                break
            total += int(n_targets[c])
            rows.append((self.parts[p], starts[c], stops[c], n_targets[c]))
            if len(rows) == G:
                yield self._stack(rows)
                rows = []
        if rows:
            nothing = np.zeros_like(rows[0][1])
            yield self._stack(rows + [(self.parts[0], nothing, nothing, 0)] * (G - len(rows)))

    def _stack(self, rows: list[tuple]) -> Batch:
        """This rank's share of a micro-batch of (part, starts, stops, targets)."""
        width = max(int((stops - starts).max()) for _, starts, stops, _ in rows)
        mine = rows[self.rank * self.B : (self.rank + 1) * self.B]
        texts = range(len(mine[0][1]))                # 2 for preferences: all chosen, then all rejected
        return stack([(part, starts[i], stops[i]) for i in texts for part, starts, stops, _ in mine], width)

    # The log

    def seen(self, step: int) -> dict[str, float]:
        """How often the rows of each part were given before `step`."""
        counts = self.turns.before(step * self.accum * self.W * self.B)
        return {name: round(count / part.n, 4) for name, count, part in zip(self.names, counts, self.parts)}

    def introduction(self) -> list[str]:
        lines, rows = [], self.accum * self.W * self.B
        for name, share, part in zip(self.names, self.turns.shares, self.parts):
            steps = float(part.n / (share * rows))
            lines.append(f"{name}: {float(share):.2%} of the rows; {len(part.column):,} tokens, read once in "
                         f"{steps:,.1f} steps")
        return lines
