"""A folder that is written beside its place, and put there in one step.

Beside OUT stands .OUT.PROCESS.partial until it is whole; data.folder.publish gives it
the name, and what stood there is .OUT.PROCESS.old until it is gone.
"""

import contextlib
import glob
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from data.foreign import brief


@contextlib.contextmanager
def written(out: str) -> Iterator[None]:
    """What the system says while `out` is written, in one line with the remedy."""
    try:
        yield
    except OSError as e:
        raise ValueError(f"{out} can't be written ({e.strerror or brief(e)}); what was there is kept: "
                         "make room, or choose another --out") from None


def sweep_up(out: Path) -> None:
    """Remove what an import that was killed has left beside `out`, or put it back."""
    for folder in out.parent.glob(f".{glob.escape(out.name)}.*"):
        process, _, kind = folder.name.removeprefix(f".{out.name}.").partition(".")
        if kind not in ("partial", "old") or not process.isdecimal() or is_running(int(process)):
            continue
        if kind == "old" and not out.exists():
            os.rename(folder, out)
        shutil.rmtree(folder, ignore_errors=True)


def is_running(process: int) -> bool:
    """Whether another process has this number."""
    try:
        os.kill(process, 0)
    except PermissionError:
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return process != os.getpid()
