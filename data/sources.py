"""Where text comes from: every source is a stream of `Example`s, of one of three kinds.

    text         (text,)                        a document
    supervised   (prompt, response), or the messages of a conversation
    preference   (prompt, chosen, rejected)

The default source needs no download, for every Python has a book in it:
`pydoc_data.topics`, the language manual, and the docstrings of the standard library,
read with `ast` (nothing is imported). About 2 MB of English; the exact text depends on
the Python version. `pysource` are the library's source files, some 11 MB. Others: tiny
Shakespeare, a URL, .txt/.md/.jsonl files (or .gz or .zst of these), .parquet
(`packed.py`), folders of them, pipes. What a line of .jsonl may be is in `records.py`.
"""

import ast
import codecs
import errno
import http.client
import os
import re
import select
import shutil
import stat
import sysconfig
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from data import strict_json
from data.packed import MAGIC, PACKED, has_columns, open_counted, open_packed, rows_of
from data.records import Example, read_record

SUFFIXES = (".txt", ".md", ".jsonl")
KNOWN = (*(suffix + end for suffix in SUFFIXES for end in ("", *PACKED)), ".zst", ".parquet")
FUNCTION = ast.FunctionDef | ast.AsyncFunctionDef
DOCUMENT = 4096  # characters: running text is cut into documents of about this length
SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"


# bytes that are read at once; and of a line of .jsonl, the most
CHUNK, LONGEST = 2**20, 2**26
# a packed file unpacks to at most so many times its size, if to more than a little
RATIO, LITTLE = 200, 2**23
MOST_KINDS = 100  # of what is left out
PYTHON = ("pydoc", "pydoc-sft", "pydoc-dpo", "pysource")
MARKS = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32", codecs.BOM_UTF16_LE: "utf-16",
         codecs.BOM_UTF16_BE: "utf-16"}


def fetch(source: str, folder: Path) -> Path | None:
    """Where the text of `source` lies; None for Python's own.

    What can be read only once, a download or a pipe, is first written into `folder`.
    Raises ValueError, always with its name, for what can't be found or downloaded.
    """
    if source in PYTHON:
        return None
    if source == "shakespeare":
        source = SHAKESPEARE
    if source.startswith(("http://", "https://")):
        return _download(source, folder)
    if match := re.match(r"[a-z][a-z0-9+.]*://", source):
        raise ValueError(f"{source}: nothing is fetched from {match[0]}, only from http:// and https://: "
                         "copy it into a folder here, and name that")
    path = Path(source)
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        names = ", ".join([*PYTHON, "shakespeare"])
        raise ValueError(f"no source {source!r}: use {names}, a URL, a file or a folder") from None
    except OSError as error:
        raise _unreadable(source, error) from None
    if stat.S_ISFIFO(mode) or _is_descriptor(path) and stat.S_ISREG(mode):
        return _spool(path, folder)
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        kind = "a socket" if stat.S_ISSOCK(mode) else "a device"
        raise ValueError(f"{source} is {kind}: use a file, a folder or a pipe")
    return path


class How(NamedTuple):
    """How files are read."""

    whole: bool                                          # each text file is one document, not cut up
    left_out: Counter                                    # where what is not read is counted
    column: str | None = None                            # the field of records that is the text
    progress: Callable[[int], object] = int                # told of bytes that were read


def read(source: str, path: Path | None, how: How) -> Iterator[Example]:
    """Every example of `source`, which `fetch` found at `path`, all of one kind.

    Raises ValueError, always with the file and place, for what
    can't be decoded or understood.
    """
    if path is None:
        if how.column is not None:
            raise ValueError(f"--column is for records, .jsonl or .parquet: {source} has none")
        return {"pydoc": _pydoc, "pydoc-sft": _pydoc_sft, "pydoc-dpo": _pydoc_dpo,
                "pysource": _pysource}[source]()
    return _path(source, path, how)


# ------------------------------------------------------------------------------------------
# Python's own documentation

def _pydoc() -> Iterator[Example]:
    """The manual's topics; then a document per module and per class.

    A module's has its own docstring and its functions'.
    """
    for topic in _topics():
        yield from _documents(topic)
    for place, entries in _docstrings():
        page = "\n\n".join([f"# {place}", *(signature + doc for signature, doc in entries)])
        yield from _documents(page, place)


def _documents(text: str, key: str | None = None) -> Iterator[Example]:
    """The key of a document, unless it is given, is the document."""
    for part in _cut(text.splitlines(keepends=True), DOCUMENT):
        if part.strip():
            yield Example(key or part, (part,))


def _pydoc_sft() -> Iterator[Example]:
    """Where a function lives and its signature → its docstring."""
    for place, entries in _docstrings():
        for signature, doc in entries:
            if signature.startswith(("def ", "async def ")):
                yield Example(place, (f"# {place}\n{signature}", doc))


def _pydoc_dpo() -> Iterator[Example]:
    """The same prompts, with two answers.

    Chosen is the function's own docstring, rejected that of the next one in its place.
    """
    for place, group in groupby(_pydoc_sft(), key=lambda example: example.key):
        pairs = [example.texts for example in group]
        if len(pairs) > 1:  # every docstring comes once, so with two or more the next one differs
            for (prompt, chosen), (_, rejected) in zip(pairs, pairs[1:] + pairs[:1]):
                yield Example(place, (prompt, chosen, rejected))


def _topics() -> Iterator[str]:
    """The manual's topics without those that are sections of a longer one.

    "if" is also a part of "compound".
    """
    from pydoc_data.topics import topics

    seen: set[str] = set()
    for text in sorted(topics.values(), key=len, reverse=True):
        paragraphs = [" ".join(p.split()) for p in text.split("\n\n")]
        if sum(len(p) for p in paragraphs if p in seen) < 0.5 * sum(map(len, paragraphs)):
            yield text
        seen.update(paragraphs)


def _docstrings() -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """(place, [(signature, docstring), ...]) of the documented stdlib, each just once.

    A place is a module, with its own docstring (signature "") and its functions', or a
    class, with its methods'. It is also the key of the split: the docstrings of one
    class repeat each other, so they stay in one half.
    """
    seen = set()
    for module, _, tree in _modules():
        functions = [node for node in tree.body if isinstance(node, FUNCTION)]
        classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
        places = [(module, [tree, *functions])]
        places += [(f"{module}.{node.name}", [node]) for node in classes]
        for place, nodes in places:
            entries = []
            for signature, doc in (entry for node in nodes for entry in _described(node)):
                if doc not in seen:
                    seen.add(doc)
                    entries.append((signature, doc))
            if entries:
                yield place, entries


def _pysource() -> Iterator[Example]:
    """The modules' source; a module that is cut into several documents has one half."""
    for module, code, _ in _modules():
        yield from _documents(f"# {module}\n{code.decode(errors='replace')}", module)


def _modules() -> Iterator[tuple[str, bytes, ast.Module]]:
    """(name, source, tree) of the library's modules, but for tests and the like."""
    skip = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip",
            "site-packages", "dist-packages"}
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if skip.intersection(parts):
            continue
        code = path.read_bytes()
        try:
            tree = ast.parse(code)
        except (SyntaxError, ValueError):  # some distributions keep templates there that aren't Python
            continue
        yield ".".join(parts).removesuffix(".__init__"), code, tree


def _described(node: ast.AST) -> Iterator[tuple[str, str]]:
    """(signature line, docstring) of a module, function or class.

    And of what is defined in a class.
    """
    signature = ""
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        signature = f"class {node.name}({bases}):\n" if bases else f"class {node.name}:\n"
    elif isinstance(node, FUNCTION):
        keyword = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
        returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
        signature = f"{keyword} {node.name}({ast.unparse(node.args)}){returns}:\n"
    if doc := (ast.get_docstring(node) or "").strip():  # dedented, as inspect.cleandoc does
        yield signature, doc
    if isinstance(node, ast.ClassDef):
        for child in node.body:
            if isinstance(child, ast.ClassDef | FUNCTION):
                yield from _described(child)


# ------------------------------------------------------------------------------------------
# What can be read only once

def _download(url: str, folder: Path) -> Path:
    name = Path(urllib.parse.urlsplit(url).path).name
    path = folder / "spool.source"
    try:
        with urllib.request.urlopen(url, timeout=30) as response, open(path, "wb") as file:
            shutil.copyfileobj(response, file)
            if missing := getattr(response, "length", None):    # copyfileobj ends without a word
                raise OSError(f"it broke off, {missing:,} bytes before its end")
    except (OSError, http.client.HTTPException, ValueError) as error:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise ValueError(f"cannot download {url} ({error}): fetch the file yourself "
                         "and give its path") from None
    return _with_suffix(path, name, url)


def _is_descriptor(path: Path) -> bool:
    """/dev/stdin and the like, behind which there may be a file."""
    return re.fullmatch(r"/dev/(stdin|fd/\d+)|/proc/\w+/fd/\d+", str(path)) is not None


def _spool(path: Path, folder: Path) -> Path:
    """Write what a pipe gives into a file."""
    copy = folder / "spool.source"
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError as error:
        raise _unreadable(path, error) from None
    with open(descriptor, "rb", buffering=0) as pipe, open(copy, "wb") as file:
        try:
            start = pipe.read(1)    # None: there is a writer, but nothing from it yet
        except OSError as error:
            raise _unreadable(path, error) from None
        if start == b"":
            raise ValueError(f"{path} is empty: if it is a pipe, start first what writes to it")
        select.select([pipe], [], [])
        os.set_blocking(descriptor, True)
        file.write(start or b"")
        shutil.copyfileobj(pipe, file)
    return _with_suffix(copy, path.name, str(path))


def _with_suffix(copy: Path, name: str, source: str) -> Path:
    """Rename the copy of a source to have the suffix of `name`, or else of what it
    holds: by its first bytes and, unpacked, its first line.
    """
    if suffix := _suffix(name):
        return copy.rename(f"{copy}{suffix}")
    with open(copy, "rb") as file:
        start = file.read(4)
    packed = next((end for mark, end in MAGIC.items() if start.startswith(mark)), "")
    found = copy.rename(f"{copy}{packed}")
    if has_columns(found):
        return found
    return found.rename(f"{copy}{'.jsonl' if _begins_with_record(found, source) else '.txt'}{packed}")


def _begins_with_record(path: Path, name: str) -> bool:
    """Whether the first line that isn't blank is a JSON object, as in .jsonl."""
    line = ""
    for part in _text(_raw(path, name, "readline"), name):
        if not line and not part.strip():
            continue
        line += part
        if line.endswith("\n") or len(line) > LONGEST:
            break
    try:
        return len(line) <= LONGEST and isinstance(strict_json.loads(line, finite=False), dict)
    except ValueError:
        return False


# ------------------------------------------------------------------------------------------
# Files and folders

def total_bytes(path: Path) -> int:
    """Of all files that are read for this one or this folder, as they are on disk."""
    files = _files(path, Counter()) if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if _suffix(file.name))


def _path(source: str, path: Path, how: How) -> Iterator[Example]:
    """A file, or every file with a known suffix below a folder, in order of name."""
    known = "/".join(SUFFIXES) + ", .gz or .zst of these, or .parquet"
    is_folder = path.is_dir()
    if not is_folder and not _suffix(path.name):
        raise ValueError(f"{path} is not a {known}: rename or convert it")
    files = [file for file in _files(path, how.left_out) if _suffix(file.name)] if is_folder else [path]
    if not files:
        raise ValueError(f"the folder {path} holds no {known}")
    if how.column is not None and not any(_has_records(file, str(file)) for file in files):
        raise ValueError(f"--column is for records, .jsonl or .parquet: {path} has none")
    # A small text is cut finer, so that something is left for the validation half.
    size = max(1, min(DOCUMENT, _total_size(files, 20 * DOCUMENT) // 20))
    kind = ""
    for file in files:
        name = str(file) if is_folder else source
        origin = file.relative_to(path).parts[0] if is_folder else ""
        is_empty = True
        for place, example in _examples(file, name, size, how):
            is_empty, kind = False, kind or example.kind
            if example.kind != kind:
                raise ValueError(f"{place} is {example.kind} data, but what came before it is {kind} data: "
                                 "prepare them as separate data sets")
            yield example._replace(origin=origin)
        how.left_out["empty files"] += is_empty


def _examples(file: Path, name: str, size: int, how: How) -> Iterator[tuple[str, Example]]:
    """(place, example), without those of nothing but space."""
    if _has_records(file, name):
        records = _parquet if has_columns(file) else _jsonl
        for place, example in records(file, name, how):
            if "".join(example.texts).strip():
                yield place, example
            else:
                how.left_out["blank records"] += 1
        return
    text = _text(_raw(file, name, "read", how.progress), name)
    for document in ["".join(text)] if how.whole else _cut(text, size):
        if document.strip():
            yield name, Example(document, (document,))


def _files(folder: Path, left_out: Counter) -> list[Path]:
    """All files below a folder, not through links to folders, which may lead back."""
    files = []

    def refuse(error: OSError):
        raise _unreadable(error.filename, error)

    try:
        for root, folders, names in os.walk(folder, onerror=refuse):
            left_out["links to folders"] += sum(os.path.islink(os.path.join(root, name)) for name in folders)
            files += [Path(root, name) for name in names]
    except RecursionError:
        raise ValueError(f"{folder} holds folders in folders without end: choose one of them") from None
    for file in files:
        if not file.is_file():
            left_out["links to nothing, pipes and the like"] += 1
        elif not _suffix(file.name):
            kind = f"files of the kind {file.suffix[:40]}" if file.suffix else "files without a suffix"
            _count(left_out, kind)
    return sorted(file for file in files if file.is_file())


def _suffix(name: str) -> str:
    """.txt, .jsonl.gz ..., in small letters; nothing for other kinds of files."""
    name = name.lower()
    return next((end for end in KNOWN if name.endswith(end)), "")


def _has_records(path: Path, name: str) -> bool:
    """Whether it is no running text; what a plain .zst holds is shown by its first
    line.
    """
    suffix = _suffix(path.name)
    if suffix == ".zst":
        return _begins_with_record(path, name)
    return ".jsonl" in suffix or has_columns(path)


def _total_size(files: list[Path], enough: int) -> int:
    """Bytes of the files, unpacked; no more is read than shows that it is `enough`."""
    total = 0
    for path in files:
        packed = path.name.lower().endswith(PACKED)
        for size in map(len, _raw(path, str(path), "read")) if packed else [path.stat().st_size]:
            total += size
            if total >= enough:
                return total
    return total


def _parquet(path: Path, name: str, how: How) -> Iterator[tuple[str, Example]]:
    """("file, row n", example) for each row that has something in it."""
    rows = rows_of(path, name, how.column, partial(_count, how.left_out), how.progress)
    for number, fields in enumerate(rows, 1):
        place = f"{name}, row {number}"
        if None in fields.values() and "text" in fields:
            how.left_out["blank records"] += 1
        else:
            yield place, read_record(fields, place)[0]


def _jsonl(path: Path, name: str, how: How) -> Iterator[tuple[str, Example]]:
    """("file, line n", example) for each line that isn't blank."""
    line, number = "", 0
    for part in _text(_raw(path, name, "readline", how.progress), name):
        line += part
        place = f"{name}, line {number + 1}"
        if len(line) > LONGEST:
            raise ValueError(f"{place} has more than {LONGEST:,} characters: each line must be one record")
        if not line.endswith("\n"):
            continue    # there is more of it
        number += 1
        if line.strip():
            yield place, _record(line, place, how.left_out, how.column)
        else:
            how.left_out["blank lines"] += 1
        line = ""
    if line.strip():
        place = f"{name}, line {number + 1}"
        yield place, _record(line, place, how.left_out, how.column)


def _record(line: str, place: str, left_out: Counter, column: str | None) -> Example:
    try:
        record = strict_json.loads(line, finite=False)
    except ValueError as error:
        raise ValueError(f"{place} is not JSON ({error}): each line must be one JSON object") from None
    fields = record if isinstance(record, dict) else {}
    if column is not None and column not in fields:
        raise ValueError(f"{place} has no field {column!r}: --column must be one of "
                         f"{', '.join(fields)[:200]}")
    example, unread = read_record(fields if column is None else {"text": fields[column]}, place)
    for name in unread if column is None else fields.keys() - {column}:
        _count(left_out, f"fields {name[:40]!r}")
    return example


def _count(left_out: Counter, what: str) -> None:
    """One more of a kind; beyond MOST_KINDS of them, of no kind of its own."""
    left_out[what if what in left_out or len(left_out) < MOST_KINDS else "of further kinds"] += 1


def _text(parts: Iterable[bytes], name: str) -> Iterator[str]:
    """A file's text, part by part, with "\n" at the ends of its lines and without a
    byte-order mark.
    """
    decoder, offset, held = codecs.getincrementaldecoder("utf-8")(), 0, ""
    for raw in parts:
        pending = len(decoder.getstate()[0])
        try:
            text = held + decoder.decode(raw)
        except UnicodeDecodeError as error:
            raise _not_utf8(name, raw if not offset else b"", offset - pending + error.start) from None
        if b"\0" in raw:
            raise ValueError(f"{name} has a NUL byte at byte {offset + raw.index(0)}: it is no text, or in "
                             "another encoding; convert it, for example with iconv -f utf-16 -t utf-8")
        if not offset:
            text = text.removeprefix("\ufeff")
        held = "\r" if text.endswith("\r") else ""     # "\r\n" may lie across two parts
        yield text.removesuffix(held).replace("\r\n", "\n")
        offset += len(raw)
    if decoder.getstate()[0]:
        raise _not_utf8(name, b"", offset - len(decoder.getstate()[0]))
    if held:
        yield held


def _raw(path: Path, name: str, method: str, progress: Callable[[int], object] = int) -> Iterator[bytes]:
    """The file's bytes, unpacked, in parts of up to CHUNK, by "read" or "readline"."""
    is_packed, size = path.name.lower().endswith(PACKED), 0
    try:
        limit = max(LITTLE, RATIO * path.stat().st_size) if is_packed else float("inf")
        with open_packed(path, name, progress) if is_packed else open_counted(path, progress) as file:
            while raw := getattr(file, method)(CHUNK):
                size += len(raw)
                if size > limit:
                    raise ValueError(f"{name} unpacks to more than {RATIO} times its size, as no text does: "
                                     "if it is one, unpack it yourself")
                yield raw
    except OSError as error:
        raise _unreadable(name, error) from None


def _unreadable(name: str | Path, error: OSError) -> ValueError:
    return ValueError(f"{name} can't be read ({error.strerror or error}): check the path and its permissions")


def _not_utf8(name: str, start: bytes, at: int) -> ValueError:
    encoding = next((encoding for mark, encoding in MARKS.items() if start.startswith(mark)), "")
    hint = f", but {encoding.upper()}" if encoding else ""
    return ValueError(f"{name} is not UTF-8 at byte {at}{hint}: convert it, "
                      f"for example with iconv -f {encoding or 'latin1'} -t utf-8")


def _cut(parts: Iterable[str], size: int) -> Iterator[str]:
    """Text, in whatever parts it comes, as documents of `size` to 2·`size` characters
    (the last may be shorter).

    The cut is after the first blank line that makes a document long enough; failing
    that after a line, failing that anywhere. Newlines around a document are dropped.
    """
    text, start = "", 0
    for part in parts:
        text, start = text[start:] + part, 0
        while len(text) - start > 3 * size:          # no cut depends on more
            end = _end(text, start, size)
            yield text[start:end].strip("\n")
            start = end
    while start < len(text):
        end = _end(text, start, size)
        yield text[start:end].strip("\n")
        start = end


def _end(text: str, start: int, size: int) -> int:
    """Where the document that begins at `start` ends.

    Lines are taken one after the other, longer ones `size` characters at a time.
    """
    at = max(start, text.rfind("\n", start, start + size - 1) + 1)      # before it, no cut can be
    while at < len(text):
        line = text.find("\n", at, at + size) + 1
        end = line or min(at + size, len(text))
        if at > start and end - start > 2 * size:
            return at
        if end - start >= size and not text[at:end].strip():
            return end
        at = end
    return at
