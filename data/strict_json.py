"""JSON from outside: whatever is wrong with it is one ValueError."""

import json
from pathlib import Path

MOST = 2**28  # bytes of a file


def loads(text: str, finite: bool = True) -> object:
    """The value of a JSON text.

    Raises ValueError for what is no JSON, for nesting without end and a key that comes
    twice, and with `finite` for NaN and Infinity, which JSON does not have.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse if finite else None)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read(path: Path) -> object:
    """The value in a file.

    Raises ValueError as `loads`, for other encodings than UTF-8 and for what is no
    file; OSError for what can't be read.
    """
    if path.exists() and not path.is_file():
        raise ValueError("it is no file")
    if path.stat().st_size > MOST:
        raise ValueError(f"it is larger than {MOST} bytes")
    return loads(path.read_bytes().decode("utf-8"))


def _unique(pairs: list[tuple[str, object]]) -> dict:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} comes twice")
    return fields


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")
