"""Which folders --data names, with which shares, and whose turn it is to give a row.

    --data data/a:0.7,data/b:0.3

Which part a row comes from is fixed by its number alone: the row goes to the part that
is furthest behind its share (the method of Sainte-Laguë, by which parliaments share out
their seats: the least (2 c + 1) / share, c the rows that the part has had). So after
any number of rows each part has had its share of them to within a row, or with many
parts two, and the count before row k can be written down without the rows before it.
"""

import math
import os
import re
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

PART = re.compile(r"(.*?):([^:,]*)(?:,|$)")          # folder:share, folder:share, ...
SHARE = re.compile(r"\d{0,9}\.?\d{1,9}|\d{1,9}\.")   # a number without sign and exponent


# ------------------------------------------------------------------------------------------
# What --data says

def is_mixture(data: str | Path) -> bool:
    """Whether it names folders with shares; what exists is one folder, whatever it is
    called.
    """
    data = str(data)
    return not os.path.exists(data) and ("," in data or bool(SHARE.fullmatch(data.rpartition(":")[2])))


def folders_of(data: str | Path) -> list[str]:
    """The folders that it names, one or several."""
    return [name for name, _ in PART.findall(str(data))] if is_mixture(data) else [str(data)]


def parts_of(data: str | Path) -> dict[str, Fraction]:
    """The shares of a mixture's folders, together 1.

    Raises ValueError for what is no mixture.
    """
    parts, example = PART.findall(str(data)), "data/a:0.7,data/b:0.3"
    if "".join(f"{name}:{share}," for name, share in parts) != f"{str(data).removesuffix(',')},":
        raise ValueError(f"{data} is no folder, and as a mixture it lacks shares: give each folder one, "
                         f"{example}")
    shares: dict[str, Fraction] = {}
    for name, share in parts:
        if not name.strip() or not SHARE.fullmatch(share) or not Fraction(share):
            raise ValueError(f"the share of {name or 'a folder without a name'} is {share!r}, but must be a "
                             f"positive number without an exponent, as in {example}")
        shares[name] = Fraction(share)
    if len({os.path.realpath(name) for name in shares}) < len(parts):
        raise ValueError(f"{data} names a folder twice: name it once, with the sum of its shares")
    return {name: share / sum(shares.values()) for name, share in shares.items()}


# ------------------------------------------------------------------------------------------
# Whose turn it is

class Turns:
    """The endless order in which parts give rows, by their shares."""

    def __init__(self, shares: list[Fraction]):
        self.shares = shares
        # 1 / share, in whole numbers, so that equal is equal
        unit = math.lcm(*(share.numerator for share in shares))
        self.paces = [int(unit / share) for share in shares]

    def before(self, k: int) -> list[int]:
        """How many of the first k rows each part gives."""
        early = max(0, k - len(self.shares))           # rounding to the nearest is off by less than that
        counts = [math.floor(share * early + Fraction(1, 2)) for share in self.shares]
        for _ in range(k - sum(counts)):
            counts[self._next(counts)] += 1
        return counts

    def after(self, k: int) -> Iterator[tuple[int, int]]:
        """(part, its number in the part) of row k and of all that follow."""
        counts = self.before(k)
        while True:
            part = self._next(counts)
            yield part, counts[part]
            counts[part] += 1

    def _next(self, counts: list[int]) -> int:
        return min(range(len(counts)), key=lambda i: (2 * counts[i] + 1) * self.paces[i])
