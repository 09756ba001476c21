"""Packed files: bytes out of .gz and .zst, rows out of .parquet, a little at a time.

.zst needs the package zstandard, .parquet needs pyarrow: pip install -e '.[files]'.
"""

import contextlib
import gzip
import io
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from data.records import FORMS, read_names

PACKED = (".gz", ".zst")
MAGIC = {b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst", b"PAR1": ".parquet"}    # how such files begin
BITE = 4096          # packed bytes that are unpacked at once: of a bomb, up to 128 MB
TEXT = re.compile(r"(dictionary<values=)?(large_string|string|string_view)(, .*)?")    # types of columns
ROWS = 256           # rows that are in memory at once
WINDOW = 2**31       # bytes that `zstd --long=31` looks back


class _Counted(io.FileIO):
    """A file that tells how many bytes were read."""

    def __init__(self, path: Path, progress: Callable[[int], object]):
        super().__init__(path)
        self.progress = progress

    def readinto(self, buffer) -> int:
        n = super().readinto(buffer)
        self.progress(n)
        return n


def open_counted(path: Path, progress: Callable[[int], object]) -> BinaryIO:
    return io.BufferedReader(_Counted(path, progress), 2**17)


def has_columns(path: Path) -> bool:
    return path.name.lower().endswith(".parquet")


@contextlib.contextmanager
def open_packed(path: Path, name: str, progress: Callable[[int], object]) -> Iterator[BinaryIO]:
    """The bytes of a .gz or .zst file.

    Raises ValueError, which calls it `name`, where it is damaged or cut short.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(_named_errors(name, path.suffix.lower()))
        file = stack.enter_context(open_counted(path, progress))
        if path.name.lower().endswith(".gz"):
            yield stack.enter_context(gzip.open(file))
        else:
            yield io.BufferedReader(_Zst(file, _import("zstandard", name)), 2**20)


class _Zst(io.RawIOBase):
    """Frames one after the other. The package's own reader ends without a word where
    the file does.
    """

    def __init__(self, file: BinaryIO, zstandard):
        self.file, self.open_frame = file, zstandard.ZstdDecompressor(max_window_size=WINDOW).decompressobj
        self.frame, self.packed, self.rest = None, b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self.rest:
            self.packed = self.packed or self.file.read(BITE)
            if not self.packed:
                if self.frame:
                    raise EOFError("it ends too early")
                return 0
            self.frame = self.frame or self.open_frame()
            self.rest = memoryview(self.frame.decompress(self.packed))
            self.packed = self.frame.unused_data
            if self.frame.eof:
                self.frame = None
        n = min(len(buffer), len(self.rest))
        buffer[:n], self.rest = self.rest[:n], self.rest[n:]
        return n


def rows_of(path: Path, name: str, column: str | None, unread: Callable[[str], None],
            progress: Callable[[int], object]) -> Iterator[dict]:
    """The rows of a .parquet file as records of `records.py`.

    They have the columns that those have; else {text} of `column`, or of the only
    column of texts. `unread` is told of each other one. Raises ValueError, which calls
    the file `name`, where it is damaged, or has none of these.
    """
    parquet = _import("pyarrow.parquet", name)
    with _named_errors(name, ".parquet"), open_counted(path, progress) as source:
        file = parquet.ParquetFile(source)
        columns = file.schema_arrow.names
        form = next((form for form in FORMS if {*columns} >= form), None)
        text = _only_text(file.schema_arrow, name) if column is None and not form else column
        read = {text} if text is not None else read_names(form)
        names = [other for other in columns if other in read]
        if not names:
            raise ValueError(f"{name} has no column {text!r}: --column must be one of "
                             f"{', '.join(columns)[:200]}")
        for other in columns:
            if other not in names:
                unread(f"columns {other[:40]!r}")
        for batch in file.iter_batches(ROWS, columns=names):
            for row in batch.to_pylist():
                yield row if text is None else {"text": row[text]}


def _only_text(schema, name: str) -> str:
    texts = [field.name for field in schema if TEXT.fullmatch(str(field.type))]
    if len(texts) != 1:
        raise ValueError(f"{name} has {len(texts)} columns of texts, of {', '.join(schema.names)[:200]}: "
                         "name the one to be read, --column NAME")
    return texts[0]


def _import(module: str, name: str):
    """A package that only some need."""
    package = module.partition(".")[0]
    try:
        return __import__(module, fromlist=["*"])
    except ImportError:
        raise ValueError(f"{name} needs the package {package}: pip install {package}, or unpack the file "
                         "yourself") from None


@contextlib.contextmanager
def _named_errors(name: str, kind: str) -> Iterator[None]:
    """Makes a ValueError with `name` of what the packages raise for a damaged file."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile, UnicodeDecodeError) as error:
        raise _damaged(name, kind, error) from None
    except Exception as error:
        if type(error).__module__.partition(".")[0] in ("zstandard", "pyarrow") or _is_arrows(error):
            raise _damaged(name, kind, error) from None
        raise


def _is_arrows(error: Exception) -> bool:
    """pyarrow gives some of its complaints the type OSError, without a number."""
    return type(error) is OSError and error.errno is None


def _damaged(name: str, kind: str, error: Exception) -> ValueError:
    reason = str(error).partition("\n")[0][:200]
    return ValueError(f"{name} is a damaged {kind} file ({reason}): fetch it again")
