"""A script's process: streams that hold, signals that end it, one line for an error.

A script imports `config` before torch: from then on Ctrl-C is one line and no
traceback. `run` does the same, and more, for the script's main.
"""

import contextlib
import errno
import io
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

# SIGHUP: the terminal is gone. Windows does not have it
ENDINGS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


# ------------------------------------------------------------------------------------------
# Signals

def leave(*_) -> None:
    """Ctrl-C where nothing is to be saved: during imports, and at the very end."""
    with contextlib.suppress(OSError):
        os.write(2, b"interrupted\n")
    os._exit(130)


def is_script() -> bool:
    """Whether this process is one of our scripts, and not a notebook or a test."""
    file = getattr(sys.modules["__main__"], "__file__", None) or "."
    return Path(__file__).resolve().parent.parent in Path(file).resolve().parents[:2]


if is_script() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, leave)

# GNU's OpenMP reads this when torch is imported. A thread that waits for another spins
# first, by default for 300,000 turns, then sleeps; beside another process that makes
# steps many times as long. With 1,000 turns a step takes 6 % longer on a quiet machine,
# and on a busy one about 1.5 times as long as with one thread (docs/log.md)
if is_script() and "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def interrupt(*_) -> None:
    raise KeyboardInterrupt


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """In the block Ctrl-C, SIGTERM and SIGHUP raise KeyboardInterrupt, but for those
    that are ignored, as SIGHUP is with nohup.
    """
    heard = [s for s in ENDINGS if signal.getsignal(s) is not signal.SIG_IGN]
    before = {s: signal.signal(s, interrupt) for s in heard}
    try:
        yield
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


# ------------------------------------------------------------------------------------------
# Streams

class Lasting(io.FileIO):
    """A standard stream that outlives its reader: what cannot be written is dropped.

    The reasons go to `lost`.
    """

    def __init__(self, fd: int, lost: list[OSError]):
        super().__init__(fd, "w", closefd=False)
        self.lost = lost

    def write(self, data) -> int | None:
        try:
            return super().write(data)
        except OSError as e:
            self.lost.append(e)
            return memoryview(data).nbytes


def hold_streams(output: bool = False) -> list[OSError]:
    """Give stdin, stdout and stderr a place where they are closed, and let none fail.

    What is no character of the terminal's encoding becomes a question mark. Returns the
    list that will have the reasons for what could not be written. With `output`, stdout
    may still fail.
    """
    lost: list[OSError] = []
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)   # takes the lowest number: this one
    if sys.stdin is None:
        sys.stdin = open(0, closefd=False)
    for name, fd in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is not getattr(sys, f"__{name}__"):
            continue                                                   # a test's, or a notebook's
        if stream and output and name == "stdout":
            stream.reconfigure(errors="replace")
        else:
            setattr(sys, name, lasting(fd, stream, lost))
    return lost


def lasting(fd: int, before: io.TextIOWrapper | None, lost: list[OSError]) -> io.TextIOWrapper:
    """A stream that cannot fail, in place of `before`: None where that was closed."""
    raw = Lasting(fd, lost)
    if before is None:
        return io.TextIOWrapper(io.BufferedWriter(raw), "utf-8", "replace")
    with contextlib.suppress(OSError):
        before.flush()
    buffer = raw if before.write_through else io.BufferedWriter(raw)           # python -u has no buffer
    return io.TextIOWrapper(buffer, before.encoding, "replace" if fd == 1 else before.errors,
                            line_buffering=before.line_buffering, write_through=before.write_through)


def hush(reason: OSError | None = None) -> None:
    """Nobody reads stdout any more: send further output, and Python's flush, elsewhere.

    A reason other than a reader who left is said.
    """
    with contextlib.suppress(OSError):                                 # a test's stdout has no number
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if reason and not isinstance(reason, BrokenPipeError):
        print(f"the output ends here: {system_words(reason)}", file=sys.stderr)


# ------------------------------------------------------------------------------------------
# The end

REMEDIES = {
    errno.ENOENT: "check the path",
    errno.EACCES: "check who may read and write it, or choose another place",
    errno.EPERM: "check who may read and write it, or choose another place",
    errno.EROFS: "choose another place",
    errno.EEXIST: "something else has that name, perhaps a link to nowhere; move it away, or choose another",
    errno.ENOTDIR: "a part of the path is a file; check it",
    errno.EISDIR: "name a file",
    errno.ENOSPC: "free some disk space, or choose another place",
    errno.EDQUOT: "free some disk space, or choose another place",
    errno.EFBIG: "free some disk space, or choose another place",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "its links go in a circle",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENOMEM: "give the process more memory, or take a smaller model",
    errno.EIO: "check the disk or the terminal",
}
NO_MEMORY = "out of memory|not enough memory|t allocate memory|ALLOC_FAILED|size calculation overflowed"


def system_words(e: OSError) -> str:
    """The file, what the system says about it, and a remedy where one is general."""
    if e.errno is None or e.strerror is None:
        return str(e)
    files = " -> ".join(str(name)[:300] for name in (e.filename, e.filename2) if name is not None)
    remedy = REMEDIES.get(e.errno)
    return (f"{files}: " if files else "") + e.strerror + (f": {remedy}" if remedy else "")


def explain(e: BaseException) -> str | None:
    """What a user, the disk or the machine got wrong; None for a fault of ours."""
    kind, text = type(e).__name__, " ".join(str(e).split())
    if isinstance(e, OSError):
        return " ".join(system_words(e).split())
    if isinstance(e, ValueError):
        return text or kind
    if isinstance(e, MemoryError) or isinstance(e, RuntimeError) and re.search(NO_MEMORY, text):
        return (f"not enough memory ({text[:200] or kind}): read less at once (--batch_size, --block_size, "
                "--num_samples), or take a smaller model")
    if isinstance(e, RecursionError):
        return "something that was read is nested too deep: it is damaged, or not meant for this"
    if isinstance(e, OverflowError):
        return f"a number is beyond all bounds ({text[:200]}): check the settings"
    if kind == "PanicException":                          # of a library in Rust: a BaseException
        return f"a library gave up ({text[:200]}): check what it was to read"
    return None


def run(main: Callable[[], object], output: bool = False) -> None:
    """Run a script's main; what a user or the machine got wrong ends in one line on
    stderr and status 1.

    Nothing is lost because nobody reads what is printed, unless it is the script's
    purpose (`output`): then it ends as its reader does, without a word.
    """
    lost, name = hold_streams(output), Path(sys.argv[0]).name
    try:
        with interruptible():
            main()
            sys.stdout.flush()
    except KeyboardInterrupt as e:
        if not e.args:                                     # else train.fit has said what it saved
            print("interrupted; what was saved stays, and --resume goes on from there "
                  "where the script has it", file=sys.stderr)
        sys.exit(130)
    except BaseException as e:
        line = explain(e)
        if line is None:
            raise
        if output and isinstance(e, OSError):
            hush()                                         # else Python's own flush would fail again
        if not (output and isinstance(e, BrokenPipeError)):
            sys.exit(f"{name}: {line}")
    for reason in lost:
        if reason.errno not in (errno.EPIPE, errno.EIO):   # a reader who left, a terminal that is gone
            sys.exit(f"{name}: what it printed could not be written, {system_words(reason)}")
