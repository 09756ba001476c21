"""What `prepare.py` has tokenized so far, on disk, in the order of the source.

    spool.bin    tokens of every example, one after the other
    spool.mask   their masks, of examples that have one
    spool.rows   a RECORD for each example: its half, its rank there, and where it is
    spool.json   what it is made of, for a process that goes on with it

Nothing is held in memory until all is there; then some 30 bytes an example, to put each
half in order. Of a process that was killed, what has its records is taken up again,
each example where it is the source's and its bytes are those that were written.
"""

import json
import os
from pathlib import Path
from zlib import crc32

import numpy as np

from data import strict_json
from data.encode import Rows
from data.records import Example

RECORD = np.dtype([("in_val", "u1"), ("rank", "<u8"), ("start", "<i8"), ("middle", "<i8"), ("stop", "<i8"),
                   ("check", "<u4")])
MANY = 2**16   # records that are read at once
NAMES = ("spool.bin", "spool.mask", "spool.rows")


class Spool:
    """`done`: how many examples it has. `values` say what it is made of."""

    def __init__(self, folder: Path, dtype: np.dtype, values: dict):
        self.folder, self.dtype, self.values = folder, dtype, values
        self.paths = [folder / name for name in NAMES]
        self.done, self.position = self._whole() if self._is_ours() else (0, 0)
        self._cut()

    def _is_ours(self) -> bool:
        """Whether a process that was killed left one made of the same."""
        try:
            return strict_json.read(self.folder / "spool.json") == self.values and all(
                path.exists() for path in self.paths)
        except (ValueError, OSError):
            return False

    def _whole(self) -> tuple[int, int]:
        """How many examples there are, and their tokens, which were written before."""
        tokens, masks, rows = (path.stat().st_size for path in self.paths)
        n = rows // RECORD.itemsize
        stop = int(self._records(n)["stop"][-1]) if n else 0
        is_there = 0 <= stop * self.dtype.itemsize <= tokens and (not masks or masks >= stop)
        return (n, stop) if is_there else (0, 0)

    def _cut(self) -> None:
        """Leave what is whole, and write on from there."""
        self.files = [open(path, "a+b") for path in self.paths]
        tokens, masks, rows = self.files
        tokens.truncate(self.position * self.dtype.itemsize)
        masks.truncate(min(self.position, self.paths[1].stat().st_size))
        rows.truncate(self.done * RECORD.itemsize)
        self.resumed = self._records(self.done)
        (self.folder / "spool.json").write_text(json.dumps(self.values), encoding="utf-8")

    def clear(self) -> None:
        """Begin anew."""
        self.close()
        self.done = self.position = 0
        self._cut()

    def close(self) -> None:
        for file in self.files:
            file.close()

    def add(self, assigned: list[tuple], rows: Rows) -> list[int]:
        """A batch of (in val?, rank, ...) and their rows; returns each one's tokens."""
        records, first = [], self.position
        for (in_val, rank, example), lengths in zip(assigned, rows.lengths):
            place = (self.position, self.position + lengths[0], self.position + sum(lengths))
            within = slice(self.position - first, place[-1] - first)
            tokens = rows.tokens[within.start * self.dtype.itemsize : within.stop * self.dtype.itemsize]
            records.append((in_val, rank, *place, _check(place, example, tokens, rows.mask[within])))
            self.position = place[-1]
        parts = (rows.tokens, rows.mask, np.array(records, RECORD).tobytes())
        for file, part in zip(self.files, parts):      # the records last: what they name is there
            file.write(part)
            file.flush()
        self.done += len(records)
        return [sum(lengths) for lengths in rows.lengths]

    def has(self, record: np.void, in_val: bool, rank: int, example: Example) -> bool:
        """Whether a record is of this example, and its bytes are as they were left."""
        place = tuple(int(record[name]) for name in ("start", "middle", "stop"))
        is_same = (in_val, rank) == (record["in_val"], record["rank"])
        if not is_same or not 0 <= place[0] <= place[2] <= self.position:
            return False
        kinds = zip(self.files, (self.dtype.itemsize, 1))
        tokens, mask = (os.pread(file.fileno(), (place[2] - place[0]) * size, place[0] * size)
                        for file, size in kinds)
        return record["check"] == _check(place, example, tokens, b"" if example.kind == "text" else mask)

    def _records(self, n: int) -> np.ndarray:
        return np.memmap(self.paths[2], RECORD, "r", shape=n) if n else np.zeros(0, RECORD)

    # When all is there

    def finish(self) -> None:
        """All is there: nothing more is added."""
        self.close()
        self.records = self._records(self.done)

    def n_different(self) -> int:
        return len(np.unique(self.records["rank"]))

    def order(self, in_val: bool) -> np.ndarray:
        """Which examples a half has, by rank; of the same rank, as they came."""
        chosen = np.flatnonzero(self.records["in_val"] == in_val)
        return chosen[np.argsort(self.records["rank"][chosen], kind="stable")]

    def write(self, order: np.ndarray, name: str, masked: bool) -> int:
        """Write a half's files in this order; returns its number of tokens."""
        lengths = []
        for at in range(0, len(order), MANY):
            records = self.records[order[at : at + MANY]]
            ends = np.stack([records["start"], records["middle"], records["stop"]], 1)
            lengths.append(np.diff(ends).reshape(-1))
        lengths = np.concatenate(lengths)
        self._copy("spool.bin", self.dtype, order, f"{name}.bin")
        if masked:
            self._copy("spool.mask", np.dtype(np.uint8), order, f"{name}.mask.bin")
            lengths = lengths[lengths > 0]             # 0: there is no second row
            index = np.cumsum(np.append(0, lengths), dtype=np.int64)
            index.tofile(self.folder / f"{name}.idx.bin")
        return int(lengths.sum())

    def _copy(self, spool: str, dtype: np.dtype, order: np.ndarray, name: str) -> None:
        size = dtype.itemsize
        with open(self.folder / spool, "rb") as source, open(self.folder / name, "wb") as file:
            for at in range(0, len(order), MANY):
                records = self.records[order[at : at + MANY]]
                for start, stop in zip(records["start"].tolist(), records["stop"].tolist()):
                    source.seek(start * size)
                    file.write(source.read((stop - start) * size))


def _check(place: tuple[int, ...], example: Example, tokens: bytes, mask: bytes) -> int:
    """Of an example's place, kind and bytes; the rank is of its texts alone."""
    return crc32(mask, crc32(tokens, crc32(f"{place} {example.kind} {example.roles}".encode())))
