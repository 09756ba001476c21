"""A prepared data folder: what its meta.json may say, how damage is seen, and how the
folder gets its name.

meta.json of `prepare.py` has a digest of each MiB of every other file ("blocks": CRC-32
in hex, one after the other), and one of itself ("digest", the last line). A block is
checked when it is first read, so that opening takes no longer for a large folder.
Folders of before have neither; of them, as of all, the values must be in their range.
"""

import contextlib
import ctypes
import fcntl
import glob
import json
import os
import re
import shutil
import zlib
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from shlex import quote

import numpy as np

from data import strict_json

HALVES = ("train", "val")
NUMBERS = tuple(f"{half}{part}.bin" for half in HALVES for part in ("", ".mask", ".idx"))
FILES = {*NUMBERS, "meta.json", "tokenizer.json"}
SPOOLS = re.compile(r"spool\.(bin|mask|rows|json|source.*)")
LEFTOVER = re.compile(r"\.(.+)\.\d+\.(partial|old)")
RESUMABLE = "spool.json"   # what a killed process left has it: see spool.py
BLOCK = 2**20  # bytes that have one digest


# ------------------------------------------------------------------------------------------
# meta.json

def read_meta(folder: str | Path) -> dict:
    """`folder/meta.json`, of a data or a model folder, as a dict.

    Raises ValueError if it is missing or is not a JSON object.
    """
    path = Path(folder) / "meta.json"
    remedy = f"make the folder again (data: {how_to_make(folder)} --overwrite)"
    try:
        meta = strict_json.read(path)
    except (FileNotFoundError, NotADirectoryError):
        names = {file.name for file in path.parent.iterdir()} if path.parent.is_dir() else set()
        if path.parent.is_file() or names and names.isdisjoint({*FILES, "config.json"}):
            remedy = f"prepare {folder} first, {how_to_make('data/NAME', str(folder))}, and name that folder"
        elif path.parent.is_dir():
            remedy = f"restore it, or move {folder} away and make it again (data: {how_to_make(folder)})"
        raise ValueError(f"{path} does not exist: {remedy}") from None
    except ValueError as error:  # bad JSON and bad UTF-8 alike
        raise ValueError(f"{path} is damaged ({error}): {remedy}") from None
    if not isinstance(meta, dict):
        raise ValueError(f"{path} is damaged (not a JSON object): {remedy}")
    return meta


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**60


def _are_counts(value: object) -> bool:
    return isinstance(value, dict) and all(map(_is_count, value.values()))


def _are_counts_of_each(value: object) -> bool:
    return isinstance(value, dict) and all(map(_are_counts, value.values()))


def _is_text(value: object) -> bool:
    return isinstance(value, str)


RULES = {  # of each field: is it right? what it must be
    "kind": (("text", "supervised", "preference").__contains__, "text, supervised or preference"),
    "tokenizer": (_is_text, "a tokenizer's name"),
    "vocab_size": (lambda value: _is_count(value) and 0 < value <= 2**32, "a number from 1 to 2^32"),
    "dtype": (("uint16", "uint32").__contains__, "uint16 or uint32"),
    "source": (_is_text, "a text"),
    "split": (("hash", "tail").__contains__, "hash or tail"),
    "val_fraction": (lambda value: type(value) is float and 0 < value < 1, "between 0 and 1"),
    "documents": (_are_counts, "a number for each half"),
    "tokens": (_are_counts, "a number for each half"),
    "sources": (_are_counts_of_each, "numbers for each source"),
    "format": (("chat", "plain").__contains__, "chat or plain"),
    "frames": (_is_text, "a checksum"),
    "blocks": (lambda value: isinstance(value, dict) and all(map(_is_text, value.values())),
               "the digests of each file"),
    "digest": (_is_text, "a digest"),
}
NEEDED = ("kind", "vocab_size", "dtype", "tokens")


def read_data_meta(folder: str | Path) -> dict:
    """`folder/meta.json` of a data folder, every field of the type and in the range
    that it must have.

    Raises ValueError, which names the file and the field.
    """
    path = Path(folder) / "meta.json"
    if not path.parent.exists():
        recover(Path(os.path.realpath(folder)))
    if (path.parent / "config.json").exists() and not (path.parent / "train.bin").exists():
        raise ValueError(f"{folder} is a model folder, not data: name a folder that data.prepare made")
    meta = read_meta(folder)
    for name, (is_right, rule) in RULES.items():
        if name not in meta and name in NEEDED:
            raise damaged(path, f"it has no {name!r}")
        if name in meta and (isinstance(meta[name], list) or not is_right(meta[name])):
            raise damaged(path, f"{name} is {_short(meta[name])}, but must be {rule}")
    if ("blocks" in meta or "digest" in meta) and meta.get("digest") != digest_of(meta):
        raise damaged(path, "it does not fit its own digest; if you have edited it, remove its "
                            'lines "blocks" and "digest"')
    return meta


def _short(value: object) -> str:
    return repr(value)[:100] if isinstance(value, str | int | float) else f"a {type(value).__name__}"


def digest_of(meta: dict) -> str:
    """SHA-256 of everything in a meta.json but itself."""
    rest = {key: value for key, value in meta.items() if key != "digest"}
    return sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def seal(folder: Path) -> None:
    """Write the digests of a finished folder into its meta.json."""
    meta = read_meta(folder)
    meta["blocks"] = digests(folder)
    meta["digest"] = digest_of(meta)
    (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")


def digests(folder: Path) -> dict[str, str]:
    """Of every file of a data folder but its meta.json."""
    names = sorted(path.name for path in folder.iterdir() if path.name in FILES - {"meta.json"})
    return {name: "".join(_block_digests(folder / name)) for name in names}


def _block_digests(path: Path) -> Iterator[str]:
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            yield _block_digest(block)


def _block_digest(block: bytes | memoryview) -> str:
    return f"{zlib.crc32(block):08x}"


def require_whole(path: Path, meta: dict) -> None:
    """Raises ValueError where a small file does not fit its digests in meta.json."""
    digests = _listed_digests(path, -(-path.stat().st_size // BLOCK), meta)
    if digests not in ("", "".join(_block_digests(path))):
        raise damaged(path, "it does not fit its digest in meta.json")


def damaged(path: Path, what: str) -> ValueError:
    return ValueError(f"{path} is missing or damaged ({what}): run {how_to_make(path.parent)} --overwrite")


def how_to_make(folder: str | Path, source: str = "SOURCE") -> str:
    """The command that prepares a data folder, as a shell takes it."""
    return f"python -m data.prepare {quote(source)} --out {quote(str(folder))}"


# ------------------------------------------------------------------------------------------
# Files of numbers

class Column:
    """A file of numbers, mapped into memory, each MiB checked when it is first read.

    `limit`: all numbers must be below. Raises ValueError, with file and place, for
    what is damaged.
    """

    def __init__(self, path: Path, dtype: np.dtype, n: int, limit: int, meta: dict):
        size = path.stat().st_size if path.is_file() else 0
        if size != n * dtype.itemsize or not size:
            raise damaged(path, f"{size} bytes, but meta.json says {n} numbers of {dtype.itemsize} bytes")
        self.path, self.limit = path, limit
        self.values = np.memmap(path, dtype, "r")
        self.digests = _listed_digests(path, -(-size // BLOCK), meta)
        self.checked = np.zeros(-(-size // BLOCK), bool)

    def __len__(self) -> int:
        return len(self.values)

    def read(self, start: int, stop: int) -> np.ndarray:
        """values[start:stop]"""
        per_block = BLOCK // self.values.itemsize
        for i in range(start // per_block, -(-stop // per_block)):
            if not self.checked[i]:
                self._check(i, self.values[i * per_block : (i + 1) * per_block], i * per_block)
        return self.values[start:stop]

    def whole(self) -> np.ndarray:
        return self.read(0, len(self.values))

    def _check(self, i: int, block: np.ndarray, first: int) -> None:
        if self.digests and _block_digest(memoryview(block).cast("B")) != self.digests[8 * i : 8 * i + 8]:
            raise damaged(self.path, f"bytes {i * BLOCK} to {i * BLOCK + block.nbytes - 1} do not fit their "
                                     "digest in meta.json")
        if block.max() >= self.limit:
            at = int(block.argmax())
            raise ValueError(self._out_of_range(int(block[at]), first + at))
        self.checked[i] = True

    def _out_of_range(self, value: int, at: int) -> str:
        what = f"token {value} outside the vocabulary of {self.limit}"
        if self.path.name.endswith(".mask.bin"):
            what = f"{value}, which is neither 0 nor 1,"
        return (f"{what} in {self.path} at position {at}: prepare again with "
                f"{how_to_make(self.path.parent)} --overwrite")


def read_index(path: Path, n_tokens: int, rows: int, meta: dict) -> np.ndarray:
    """Where examples start, and the end: n + 1 numbers; `rows` examples go together."""
    size = path.stat().st_size if path.is_file() else 0
    index = np.fromfile(path, np.int64) if size and size % 8 == 0 else np.zeros(0, np.int64)
    if len(index) < 2 or (len(index) - 1) % rows:
        raise damaged(path, f"{size} bytes, or doesn't fit the tokens")
    require_whole(path, meta)
    outside = (index < 0) | (index > n_tokens)
    wrong = outside if outside.any() else np.append(index[:1] != 0, np.diff(index) < 2)
    if not wrong.any():
        wrong[-1] = index[-1] != n_tokens
    if wrong.any():
        at = int(wrong.argmax())
        raise damaged(path, f"number {at} is {index[at]}, which doesn't fit the tokens: examples of two or "
                            f"more, one after the other, from 0 to {n_tokens}")
    return index


def _listed_digests(path: Path, n_blocks: int, meta: dict) -> str:
    """Those in meta.json; of a folder of before, an empty text."""
    digests = meta["blocks"].get(path.name, "none") if "blocks" in meta else ""
    if len(digests) not in (0, 8 * n_blocks):
        raise damaged(path, "meta.json has no digests of it, or of another size")
    return digests


# ------------------------------------------------------------------------------------------
# Its name: the folder is there whole, or not at all

def require_replaceable(out: Path, overwrite: bool, sources: list[Path]) -> None:
    """Raises ValueError where something stands that may not be replaced: what is not a
    data set and nothing else, or what is read.
    """
    for source in sources:
        if source == out or out in source.parents:
            raise ValueError(f"{out} is, or holds, what is to be read ({source}): choose another --out")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    reason = _foreign(out)
    if reason:
        raise ValueError(f"{out} exists and is not (only) a prepared data set ({reason}): "
                         "choose another --out")
    if not overwrite:
        raise ValueError(f"{out} is already prepared: pass --overwrite to replace it, "
                         "or choose another --out")


def _foreign(folder: Path) -> str:
    """What shows that this is no data folder; of one of ours, even damaged, nothing."""
    if not folder.is_dir():
        return "a file"
    names = {path.name for path in folder.iterdir() if path.is_file()}
    others = {path.name for path in folder.iterdir()} - (names & FILES)
    if others:
        return min(others)
    if "meta.json" not in names:
        return "no meta.json"
    with contextlib.suppress(ValueError):
        return "" if "tokens" in read_meta(folder) else "meta.json is of something else"
    return "" if names & {"train.bin", "val.bin"} else "meta.json is of something else"


@contextlib.contextmanager
def staging_folder(out: Path, resume: bool = False) -> Iterator[Path]:
    """A new folder beside `out`, which is removed in the end unless it was renamed; to
    `resume`, what a process that was killed left there, which then stays for the next.

    It is locked as long as we live: a folder like it without a lock is a leftover.
    """
    staging = out.with_name(f".{out.name}.{os.getpid()}.partial")
    made = [parent for parent in out.parents if not parent.exists()]
    try:
        with contextlib.ExitStack() as stack:
            left = leftovers(out) if resume else []
            left.sort(key=lambda path: path != staging)                     # a name that we need first
            if free := next((path for path in left if stack.enter_context(_locked(path))), None):
                free.rename(staging)
            else:
                staging.mkdir(parents=True)
                stack.enter_context(_locked(staging))
            yield staging
    finally:
        if not (resume and (staging / RESUMABLE).exists()):
            shutil.rmtree(staging, ignore_errors=True)
        with contextlib.suppress(OSError):      # not empty: the data set is in it
            for parent in made:
                parent.rmdir()


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Whether we have the folder's lock, which ends with the process."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        yield False
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        locked = True
    except OSError:
        locked = False
    try:
        yield locked
    finally:
        os.close(descriptor)


def publish(staging: Path, out: Path) -> None:
    """Give the finished folder its name, in place of one that has it.

    Where the system can exchange two names, that is one step, and `staging` is what
    stood there. Elsewhere there are two, and whoever looks next finds it (`recover`).
    """
    if not out.exists():
        staging.rename(out)
        return
    if exchange(staging, out):
        return
    old = out.with_name(f".{out.name}.{os.getpid()}.old")
    with _locked(out):
        out.rename(old)
        try:
            staging.rename(out)
        except OSError:
            old.rename(out)
            raise
    shutil.rmtree(old, ignore_errors=True)


def exchange(a: Path, b: Path) -> bool:
    """Give two paths each other's name, in one step; False where the system can't."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2   # Linux
    except AttributeError:
        return False
    here, exchange_names = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename(here, os.fsencode(a), here, os.fsencode(b), exchange_names) == 0


def leftovers(out: Path) -> list[Path]:
    """What a process that prepares `out` has left, or is at work in."""
    found = sorted(out.parent.glob(f".{glob.escape(out.name)}.*.partial"))
    return [path for path in found if (path / RESUMABLE).exists()]


def recover(out: Path, sweep: bool = False) -> None:
    """Where a process ended between two renames, give back the name; and sweep up what
    ended processes left beside `out`.

    What --resume could go on with stays, unless it is of `out` and to be swept.
    """
    neighbours = sorted(out.parent.iterdir()) if out.parent.is_dir() else []
    for path in neighbours:
        match = LEFTOVER.fullmatch(path.name)
        if match and path.is_dir() and not path.is_symlink():
            with contextlib.suppress(OSError), _locked(path) as is_free:
                home = path.with_name(match[1])
                if is_free and match[2] == "old" and not home.exists() and not _foreign(path):
                    path.rename(home)
                elif (path / RESUMABLE).exists() and not (sweep and match[1] == out.name):
                    continue
                elif is_free and all(_is_ours(file) for file in path.iterdir()):
                    shutil.rmtree(path)


def _is_ours(path: Path) -> bool:
    known = path.name in FILES or SPOOLS.fullmatch(path.name)
    return bool(known) and path.is_file()
