"""Prepare data: a source of text → `data/NAME/`, token files to be mapped into memory.

    python -m data.prepare [SOURCE] [--out data/NAME] [--tokenizer bytes]
                           [--val_fraction 0.1] [--split hash] [--column text]
                           [--overwrite]

SOURCE is pydoc, pydoc-sft, pydoc-dpo, pysource, shakespeare, a URL, or a .txt/.md/
.jsonl(.gz, .zst) or .parquet file, a folder of them, or a pipe: `sources.py`. Batches:
`loader.py`.

TOKENIZER is bytes, one of tiktoken's names, world (or its vocabulary's file), or the
folder of a model whose own tokenizer is to be used.

The folder, for each half in (train, val):

    {half}.bin       tokens; uint16, or uint32 above 65,536 tokens. Each document is
                     followed by <|endoftext|>
    {half}.mask.bin  uint8 per token, 1 where a token is to be learnt  } supervised and
    {half}.idx.bin   int64 start of each example, and the end: n + 1   } preference only
    meta.json        kind, tokenizer, vocabulary, dtype, source, counts, digests
    tokenizer.json   the tokenizer itself, where a name does not say it all

Where the tokenizer has a chat template, prompts and answers, or the messages of a
conversation, are put into it, and every answer is learnt with the token that stops it
("format": "chat" in meta.json). Elsewhere ("plain") an example is <|endoftext|> prompt
answer <|endoftext|>, learnt from the answer on, and longer conversations are refused.
Preference data store chosen i as example 2i and rejected i as example 2i + 1.

Split: by the SHA-256 of the document (the prompt; for docstrings, the module or class),
so it has its half for life, however the rest of the source changes, and can't be in
both. Within a half the order is by hash too, that is, shuffled. `--split tail` keeps
the source's order and takes its end for validation, as nanoGPT does; so does a source
that has too few different documents for chance.

The folder is written under a temporary name and then renamed: it is there complete, or
not at all (`folder.py`). What of the source is left out is counted in "left_out".
"""

import errno
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Literal, NamedTuple

if not __package__:  # run as `python data/prepare.py`: make the repository importable
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from config import cli, run, settings
import numpy as np
import tiktoken
import tyro
from tqdm import tqdm

from data.chat import Turns, encode_turns
from data.folder import HALVES, publish, recover, require_replaceable, seal, staging_folder
from data.records import Example
from data.shares import is_mixture, parts_of
from data.sources import MOST_KINDS, PYTHON, fetch, read
from data.tokenizer import get_tokenizer, opening, save_tokenizer

# sources that need no file; the last one is a download
EMBEDDED = ("pydoc", "pydoc-sft", "pydoc-dpo", "pysource", "shakespeare")
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
Assigned = tuple[bool, bytes | int, Example]         # in val?, rank in the order within the half
Record = tuple[bytes | int, list[tuple[int, int]]]   # rank, (start, stop) of each stored row


class Job(NamedTuple):
    """What is to be tokenized, and where to."""

    source: str
    path: Path | None        # where `fetch` found it
    val_fraction: float
    enc: tiktoken.Encoding
    folder: Path
    dtype: np.dtype
    left_out: Counter
    sources: dict[str, Counter]   # documents and tokens of each file or folder in the folder that is read
    column: str | None            # of records, the field that is the text


# ------------------------------------------------------------------------------------------
# The folder

def prepare(source: str | Path, out: str | Path, tokenizer: str = "bytes", val_fraction: float = 0.1,
            overwrite: bool = False, split: str = "hash", column: str | None = None) -> dict:
    """Tokenize `source` into the folder `out` and return its meta.json.

    Raises ValueError for an unusable source, tokenizer or fraction, and if `out` exists
    (`overwrite` replaces a prepared data set, never a folder with anything else in it).
    """
    source, out = _checked(str(source), out, val_fraction, split)
    names = {source, tokenizer} - {*EMBEDDED, "bytes", ""}
    sources = [Path(os.path.realpath(name)) for name in names if os.path.exists(name)]
    recover(out)
    require_replaceable(out, overwrite, sources)
    enc = get_tokenizer(tokenizer)
    dtype = np.dtype(np.uint16 if enc.n_vocab <= 2**16 else np.uint32)
    try:
        with staging_folder(out) as staging:
            path = fetch(source, staging)
            job = Job(source, path, val_fraction, enc, staging, dtype, Counter(), {}, column)
            meta = _write_folder(job, split)
            require_replaceable(out, overwrite, sources)     # it may have changed meanwhile
            publish(staging, out)
    except MemoryError:
        raise ValueError(f"{source} needs more memory than there is: --split tail, or a text that repeats "
                         "itself, is held in memory whole; give it in parts") from None
    except OSError as error:
        remedy = "free some space" if error.errno in FULL else "check the path and its permissions"
        raise ValueError(f"{error.filename or out.parent}: {error.strerror or error}: {remedy}, or choose "
                         "another --out; what was there is as it was") from None
    return meta


def _checked(source: str, out: str | Path, val_fraction: float, split: str) -> tuple[str, Path]:
    """The source, and the folder that `out` is, itself or as a link.

    Raises ValueError for values that can't be.
    """
    for name, value in (("the source", source), ("--out", str(out))):
        if not value.strip():
            raise ValueError(f"{name} is empty: name it, or omit it")
    if not 0 < val_fraction < 1:
        raise ValueError(f"val_fraction is {val_fraction}, but must be between 0 and 1: try 0.1")
    if split not in ("hash", "tail"):
        raise ValueError(f"split is {split!r}: choose hash or tail")
    return source, Path(os.path.realpath(out))


def _write_folder(job: Job, split: str) -> dict:
    """Tokenize into the folder of `job` and return its meta.json."""
    halves, kind = _tokenize(job, split)
    different = {rank for half in halves for rank, _ in half}
    if split == "hash" and (not all(halves) or len(different) * job.val_fraction < 1):
        split = "tail"  # too few different documents to leave it to chance
        job.left_out.clear()
        job.sources.clear()
        halves, kind = _tokenize(job, split)
    if not all(halves):
        amount = "too little" if any(halves) else "no"
        raise ValueError(f"{job.source} has {amount} text for two halves: give it more")
    counts = {name: _write(half, kind, job, name) for name, half in zip(HALVES, halves)}
    meta = {
        "kind": kind,
        "tokenizer": job.enc.name,
        "vocab_size": job.enc.n_vocab,
        "dtype": job.dtype.name,
        "source": _with_version(job.source),
        "split": split,
        "val_fraction": float(job.val_fraction),
        "documents": {name: len(half) for name, half in zip(HALVES, halves)},
        "tokens": counts,
    }
    if kind != "text":
        meta["format"] = "chat" if getattr(job.enc, "chat", None) else "plain"
    if job.sources:
        meta["sources"] = {name: dict(counts) for name, counts in job.sources.items()}
    if left_out := {name: n for name, n in sorted(job.left_out.items()) if n}:
        meta["left_out"] = left_out
    for spool in job.folder.glob("spool.*"):
        spool.unlink()
    (job.folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
    save_tokenizer(job.enc, job.folder)
    seal(job.folder)
    return meta


def _with_version(source: str) -> str:
    """Python's own texts differ from version to version."""
    return f"{source} of Python {sys.version.split()[0]}" if source in PYTHON else source


def ensure_prepared(folder: str | Path, tokenizer: str = "bytes") -> None:
    """Prepare an embedded source (or tiny Shakespeare) whose folder is missing; of a
    mixture, each part.

    Raises ValueError for any other folder that is missing.
    """
    if is_mixture(folder):
        for part in parts_of(folder):
            ensure_prepared(part, tokenizer)
        return
    if not str(folder).strip():
        raise ValueError("the data folder's name is empty: name it")
    folder = Path(folder)
    recover(Path(os.path.realpath(folder)))
    if folder.exists():
        return
    if folder.name not in EMBEDDED:
        raise ValueError(f"no data at {folder}: run python -m data.prepare SOURCE --out {folder}")
    print(f"{folder} is missing: preparing it", flush=True)
    prepare(folder.name, folder, tokenizer)


# ------------------------------------------------------------------------------------------
# Which half

def _by_hash(examples: Iterable[Example], job: Job) -> Iterator[Assigned]:
    """By the hash of the key; ranked by the hash of the texts."""
    for example in examples:
        position = int.from_bytes(_digest(example.key)[:8], "big") / 2**64  # uniform in [0, 1)
        yield position < job.val_fraction, _digest("\0".join(example.texts)), example


def _by_tail(examples: Iterable[Example], job: Job) -> Iterator[Assigned]:
    """The last `job.val_fraction` of the examples, or of a text's characters.

    There the document is cut in two. Needs the source in memory. A document that comes
    again is dropped, for it might be in both halves.
    """
    examples = list(examples)
    unique = list({(example.texts, example.roles): example for example in examples}.values())
    job.left_out["documents that come again"] = len(examples) - len(unique)
    sizes = [len(example.texts[0]) if example.kind == "text" else 1 for example in unique]
    left = min(max(1, int(sum(sizes) * (1 - job.val_fraction))), sum(sizes) - 1)   # for train
    for i, (size, example) in enumerate(zip(sizes, unique)):
        if 0 < left < size:
            text = example.texts[0]
            yield False, i, example._replace(texts=(text[:left],))
            example = example._replace(texts=(text[left:],))
        yield left < size, i, example
        left = max(0, left - size)


def _digest(text: str) -> bytes:
    return sha256(text.encode("utf-8", "surrogatepass")).digest()


# ------------------------------------------------------------------------------------------
# Tokens

def _encode(example: Example, enc: tiktoken.Encoding) -> list[tuple[list[int], bytes]]:
    """(tokens, mask of the learnt ones) of each row that an example is stored as.

    A text has no mask.
    """
    if example.kind == "text":
        # where no token of its own opens one, a document's end is the start of the next
        start = opening(enc) if opening(enc) != [enc.eot_token] else []
        return [(start + enc.encode_ordinary(example.texts[0]) + [enc.eot_token], b"")]
    if example.kind == "preference" and example.roles:
        *before, chosen, rejected = zip(example.roles, example.texts)
        rows = [_row([*before, ("assistant", answer)], enc) for _, answer in (chosen, rejected)]
        return [(ids, _last_answer(mask)) for ids, mask in rows]
    if example.roles:
        return [_row(list(zip(example.roles, example.texts)), enc)]
    prompt, *answers = example.texts
    return [_row([("user", prompt), ("assistant", answer)], enc) for answer in answers]


def _row(turns: Turns, enc: tiktoken.Encoding) -> tuple[list[int], bytes]:
    """A conversation up to its last learnt token, and its mask."""
    if getattr(enc, "chat", None):
        ids, learnt = encode_turns(enc, turns)
        mask = bytes(learnt).rstrip(b"\0")
        return ids[: len(mask)], mask
    if [role for role, _ in turns] != ["user", "assistant"]:
        roles = ", ".join(role for role, _ in turns)
        raise ValueError(f"a conversation of {roles} needs a chat template, which the tokenizer {enc.name} "
                         "does not have: use --tokenizer with the folder of a model that has one, "
                         "or records of one prompt and one response")
    prompt, answer = (enc.encode_ordinary(text) for _, text in turns)
    prompt, answer = opening(enc) + prompt, [*answer, enc.eot_token]
    return prompt + answer, bytes(len(prompt)) + b"\1" * len(answer)


def _last_answer(mask: bytes) -> bytes:
    """Of the answers that are learnt, the last."""
    start = mask.rindex(0) + 1
    return bytes(start) + mask[start:]


def _tokenize(job: Job, split: str) -> tuple[tuple[list[Record], list[Record]], str]:
    """Write all tokens and masks to spool files in the source's order.

    Returns where each half's examples are there, and their kind. Only these records are
    held in memory, so with the hash split a corpus may be larger than memory.
    """
    examples = read(job.source, job.path, split == "tail", job.left_out, job.column)
    assigned = (_by_hash if split == "hash" else _by_tail)(examples, job)
    halves: tuple[list[Record], list[Record]] = [], []
    position, kind = 0, "text"
    quiet = None if sys.stderr else True   # None: where it is no terminal
    with open(job.folder / "spool.bin", "wb") as file, open(job.folder / "spool.mask", "wb") as masks:
        for in_val, rank, example in tqdm(assigned, job.source, unit=" documents", disable=quiet):
            kind, rows = example.kind, []
            for ids, mask in _encode(example, job.enc):
                file.write(np.array(ids, job.dtype).tobytes())
                masks.write(mask)
                rows.append((position, position + len(ids)))
                position += len(ids)
            halves[in_val].append((rank, rows))
            _count(job.sources, example.origin, sum(stop - start for start, stop in rows))
    return halves, kind


def _count(sources: dict[str, Counter], origin: str, tokens: int) -> None:
    """One more document; beyond MOST_KINDS of them, sources are counted together."""
    if origin:
        name = origin if origin in sources or len(sources) < MOST_KINDS else "further ones"
        sources.setdefault(name, Counter()).update(documents=1, tokens=tokens)


def _write(half: list[Record], kind: str, job: Job, name: str) -> int:
    """Write one half's files in the order of rank; return its number of tokens."""
    rows = [row for _, rows in sorted(half) for row in rows]
    lengths = [stop - start for start, stop in rows]
    _copy_rows(job.folder / "spool.bin", job.dtype, rows, job.folder / f"{name}.bin")
    if kind != "text":
        _copy_rows(job.folder / "spool.mask", np.dtype(np.uint8), rows, job.folder / f"{name}.mask.bin")
        index = np.cumsum([0, *lengths], dtype=np.int64)
        (job.folder / f"{name}.idx.bin").write_bytes(index.tobytes())
    return sum(lengths)


def _copy_rows(spool: Path, dtype: np.dtype, rows: list[tuple[int, int]], path: Path) -> None:
    values = np.memmap(spool, dtype, "r")
    with open(path, "wb") as file:
        for start, stop in rows:
            file.write(values[start:stop].tobytes())


# ------------------------------------------------------------------------------------------
# The command

@settings
class PrepareConfig:
    source: tyro.conf.Positional[str] = "pydoc"   # what to read: see sources.py
    out: str | None = None                 # folder to write; None: data/ and the source's name
    tokenizer: str = "bytes"               # or gpt2, another of tiktoken's names, world, a model's folder
    val_fraction: float = 0.1              # of the documents, for the validation half
    split: Literal["hash", "tail"] = "hash"    # by document; or the source's end
    column: str | None = None              # of .jsonl and .parquet, the field that is the text
    overwrite: bool = False                # replace an already prepared folder


def default_out(source: str) -> Path:
    name = Path(source.rstrip("/")).name.split(".")[0]
    if not name and source.strip():
        raise ValueError(f"{source!r} gives the data set no name: name its folder, --out data/NAME")
    return Path("data") / name


def main(argv: list[str] | None = None) -> None:
    cfg = cli(PrepareConfig, argv)
    out = default_out(cfg.source) if cfg.out is None else cfg.out
    try:
        meta = prepare(cfg.source, out, cfg.tokenizer, cfg.val_fraction, cfg.overwrite, cfg.split,
                       cfg.column)
    except KeyboardInterrupt:
        print(f"interrupted: nothing half-made is left; run it again to make {out}", file=sys.stderr)
        raise KeyboardInterrupt("said") from None
    counts = ", ".join(f"{half} {meta['tokens'][half]:,} tokens in {meta['documents'][half]:,} documents"
                       for half in HALVES)
    print(f"{out}: {meta['kind']}, {counts}; tokenizer {meta['tokenizer']}")
    if left_out := meta.get("left_out"):
        most = Counter(left_out).most_common(12)
        more = [f"{len(left_out) - len(most)} further kinds"] if len(left_out) > len(most) else []
        print("left out: " + ", ".join([*(f"{n:,} {name}" for name, n in most), *more]))


if __name__ == "__main__":
    run(main)
