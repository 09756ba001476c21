"""Where text comes from: every source is a stream of `Example`s, of one of three kinds.

    text         (text,)                        a document
    supervised   (prompt, response), or the messages of a conversation
    preference   (prompt, chosen, rejected)

The default source needs no download, for every Python has a book in it:
`pydoc_data.topics`, the language manual, and the docstrings of the standard library,
read with `ast` (nothing is imported). About 2 MB of English; the exact text depends on
the Python version. Others: tiny Shakespeare, a URL, .txt/.md/.jsonl files (or .gz of
these), folders of them.
"""

import ast
import gzip
import http.client
import json
import shutil
import sysconfig
import tempfile
import urllib.parse
import urllib.request
import zlib
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

KINDS = {
    "text": ("text",),
    "supervised": ("prompt", "response"),
    "preference": ("prompt", "chosen", "rejected"),
}
ROLES = ("system", "user", "assistant")  # {"messages": [{"role": "user", "content": "..."}, ...]}
SUFFIXES = (".txt", ".md", ".jsonl")
FUNCTION = ast.FunctionDef | ast.AsyncFunctionDef
DOCUMENT = 4096  # characters: running text is cut into documents of about this length
SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"


class Example(NamedTuple):
    key: str                        # the same key goes to the same half of the train/val split
    texts: tuple[str, ...]          # one text, the fields of the kind in KINDS' order, or messages
    roles: tuple[str, ...] = ()     # of a conversation: who says each of the messages

    @property
    def kind(self) -> str:
        return "supervised" if self.roles else list(KINDS)[len(self.texts) - 1]


def read(source: str, whole: bool = False) -> Iterator[Example]:
    """Every example of `source`, all of one kind. `whole` keeps each text file as one
    document, not cut up.

    Raises ValueError, always with the file and place, for what can't be found,
    downloaded, decoded or understood.
    """
    if source == "pydoc":
        return _pydoc()
    if source == "pydoc-sft":
        return _pydoc_sft()
    if source == "pydoc-dpo":
        return _pydoc_dpo()
    if source == "shakespeare":
        source = SHAKESPEARE
    if source.startswith(("http://", "https://")):
        return _url(source, whole)
    return _path(Path(source), whole)


# ------------------------------------------------------------------------------------------
# Python's own documentation

def _pydoc() -> Iterator[Example]:
    """The manual's topics; then a document per module and per class.

    A module's has its own docstring and its functions'.
    """
    for topic in _topics():
        yield from (Example(text, (text,)) for text in _cut(topic.splitlines(keepends=True), DOCUMENT))
    for place, entries in _docstrings():
        page = "\n\n".join([f"# {place}", *(signature + doc for signature, doc in entries)])
        yield from (Example(place, (text,)) for text in _cut(page.splitlines(keepends=True), DOCUMENT))


def _pydoc_sft() -> Iterator[Example]:
    """Where a function lives and its signature → its docstring."""
    for place, entries in _docstrings():
        for signature, doc in entries:
            if signature.startswith(("def ", "async def ")):
                yield Example(place, (f"# {place}\n{signature}", doc))


def _pydoc_dpo() -> Iterator[Example]:
    """The same prompts, with two answers.

    Chosen is the function's own docstring, rejected that of the next function in its
    place.
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
    """(place, [(signature, docstring), ...]) for the documented standard library, each
    docstring once.

    A place is a module, with its own docstring (signature "") and its functions', or a
    class, with its methods'. It is also the key of the split: the docstrings of one
    class repeat each other, so they stay in one half.
    """
    skip = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip",
            "site-packages", "dist-packages"}
    root, seen = Path(sysconfig.get_path("stdlib")), set()
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if skip.intersection(parts):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # some distributions keep templates there that aren't Python
            continue
        module = ".".join(parts).removesuffix(".__init__")
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
# Files, folders and URLs

def _url(url: str, whole: bool) -> Iterator[Example]:
    name = Path(urllib.parse.urlsplit(url).path).name
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / (name if _is_known(name) else f"{name}.txt")
        try:
            with urllib.request.urlopen(url, timeout=30) as response, open(path, "wb") as file:
                shutil.copyfileobj(response, file)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise ValueError(f"cannot download {url} ({error}): fetch the file yourself "
                             "and give its path") from None
        yield from _path(path, whole)


def _path(path: Path, whole: bool) -> Iterator[Example]:
    """A file, or every file with a known suffix below a folder, in order of name."""
    if not path.exists():
        names = "pydoc, pydoc-sft, pydoc-dpo, shakespeare"
        raise ValueError(f"no source {str(path)!r}: use {names}, a URL, a file or a folder")
    known = "/".join(SUFFIXES) + ", or .gz of these"
    if path.is_file() and not _is_known(path.name):
        raise ValueError(f"{path} is not a {known}: rename or convert it")
    inside = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    files = [p for p in inside if _is_known(p.name)]
    if not files:
        raise ValueError(f"the folder {path} holds no {known}")
    # A small text is cut finer, so that something is left for the validation half.
    size = max(1, min(DOCUMENT, sum(p.stat().st_size for p in files) // 20))
    kind = ""
    for file in files:
        if file.name.removesuffix(".gz").endswith(".jsonl"):
            examples = _jsonl(file)
        else:
            texts = ["".join(_lines(file))] if whole else _cut(_lines(file), size)
            examples = ((file.name, Example(text, (text,))) for text in texts)
        for place, example in examples:
            kind = kind or example.kind
            if example.kind != kind:
                raise ValueError(f"{place} is {example.kind} data, but what came before it is {kind} data: "
                                 "prepare them as separate data sets")
            yield example


def _is_known(name: str) -> bool:
    return name.removesuffix(".gz").endswith(SUFFIXES)


def _jsonl(path: Path) -> Iterator[tuple[str, Example]]:
    """("file, line n", example) for each line that isn't blank.

    Fields beyond those of the kind are ignored.
    """
    for number, line in enumerate(_lines(path), 1):
        place = f"{path}, line {number}"
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{place} is not JSON ({error}): each line must be one JSON object") from None
        fields = record if isinstance(record, dict) else {}
        if "messages" in fields:
            yield place, _conversation(fields["messages"], place)
            continue
        fitting = [names for names in KINDS.values() if fields.keys() >= set(names)]
        if not fitting:
            choices = " or ".join("{" + ", ".join(names) + "}" for names in [*KINDS.values(), ("messages",)])
            raise ValueError(f"{place} has the fields {sorted(fields)}, but needs {choices}")
        kind = fitting[-1]
        for name in kind:
            if not isinstance(fields[name], str):
                raise ValueError(f"{place}: field {name!r} is {type(fields[name]).__name__}, "
                                 "but must be a string")
        yield place, Example(fields[kind[0]], tuple(fields[name] for name in kind))


def _conversation(messages: object, place: str) -> Example:
    """An example whose key is the first question.

    So a conversation and a prompt that ask the same are in the same half.
    """
    if not isinstance(messages, list) or not all(map(_is_message, messages)):
        raise ValueError(f"{place}: messages must be a list of {{role, content}} with the roles "
                         f"{', '.join(ROLES)} and strings as content")
    texts = tuple(message["content"] for message in messages)
    roles = tuple(message["role"] for message in messages)
    if "assistant" not in roles or "system" in roles[1:]:
        raise ValueError(f"{place} has the roles {', '.join(roles) or 'of no message'}: at least one "
                         "assistant is needed, and system may only come first")
    return Example(texts[roles.index("user") if "user" in roles else 0], texts, roles)


def _is_message(message: object) -> bool:
    if not isinstance(message, dict):
        return False
    return message.get("role") in ROLES and isinstance(message.get("content"), str)


def _lines(path: Path) -> Iterator[str]:
    """The file's lines with "\\n" at their ends, without a byte-order mark.

    A .gz file is unzipped.
    """
    offset = 0
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            for raw in file:
                line = raw.decode("utf-8").replace("\r\n", "\n")
                yield line if offset else line.removeprefix("\ufeff")
                offset += len(raw)
    except UnicodeDecodeError as error:
        at = offset + error.start
        raise ValueError(f"{path} is not UTF-8 at byte {at}: convert it, "
                         "for example with iconv -t utf-8") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is a damaged .gz file ({error}): fetch it again") from None


def _cut(lines: Iterable[str], size: int) -> Iterator[str]:
    """Running text as documents of `size` to 2·`size` characters (the last may be
    shorter).

    The cut is after the first blank line that makes a document long enough; failing
    that after a line, failing that anywhere. Newlines around a document are dropped.
    """
    document = ""
    for part in (line[i : i + size] for line in lines for i in range(0, len(line), size)):
        if document and len(document) + len(part) > 2 * size:
            yield document.strip("\n")
            document = ""
        document += part
        if len(document) >= size and not part.strip():
            yield document.strip("\n")
            document = ""
    yield document.strip("\n")
