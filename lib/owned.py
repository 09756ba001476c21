"""Where results go: a program replaces what it can see is its own, and nothing else.

It finds out before it works for hours, and makes sure that it can write there.
"""

import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path


def check_place(files: Sequence[Path], is_own: Callable[[Path], bool], flag: str) -> None:
    """Make the folders of `files`, which are to be written later; the first of them
    tells whose they are.

    Raises ValueError where one exists and the first is not our own, and OSError where
    nothing can be written.
    """
    taken = next(filter(os.path.lexists, files), None)
    if taken and not (files[0].is_file() and is_own(files[0])):
        raise ValueError(f"{flag}: {taken} exists, and this command did not write it: choose another name, "
                         "or move it away")
    for folder in {file.parent for file in files}:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass


def contents(file: Path, most: int = 2**28) -> dict:
    """The JSON object in a file; what is none, or has more bytes, is an empty one."""
    try:
        values = json.loads(file.read_bytes()) if file.stat().st_size <= most else None
    except (ValueError, RecursionError, OSError):
        return {}
    return values if isinstance(values, dict) else {}
