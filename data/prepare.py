"""Prepare data: a source of text → `data/NAME/`, token files to be mapped into memory.

    python -m data.prepare [SOURCE] [--out data/NAME] [--tokenizer bytes]
                           [--val_fraction 0.1] [--split hash] [--column text]
                           [--workers 1] [--resume] [--overwrite]

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
"frames" is a checksum of what stands around them: folders that differ in it do not mix.
Preference data store chosen i as example 2i and rejected i as example 2i + 1.

Split: by the SHA-256 of the document (the prompt; for docstrings, the module or class),
so it has its half for life, however the rest of the source changes, and can't be in
both. Within a half the order is by hash too, that is, shuffled. `--split tail` keeps
the source's order and takes its end for validation, as nanoGPT does; so does a source
that has too few different documents for chance.

The folder is written under a temporary name and then renamed: it is there complete, or
not at all (`folder.py`). What of the source is left out is counted in "left_out".
Tokens come by one process or several (`encode.py`) and wait on disk until all are there
(`spool.py`), from where --resume goes on after a kill.
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

from config import at_least, cli, run, settings
import numpy as np
import tiktoken
import tyro
from tqdm import tqdm

from data.encode import encode_all
from data.folder import (HALVES, how_to_make, leftovers, publish, recover, require_replaceable, seal,
                         staging_folder)
from data.records import Example
from data.shares import is_mixture, parts_of
from data.sources import MOST_KINDS, PYTHON, How, fetch, read, total_bytes
from data.spool import Spool
from data.tokenizer import frames_of, get_tokenizer, save_tokenizer

# sources that need no file; the last one is a download
EMBEDDED = ("pydoc", "pydoc-sft", "pydoc-dpo", "pysource", "shakespeare")
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
Assigned = tuple[bool, int, Example]   # in val?, rank in the order within the half


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
    tokenizer: str                # as `get_tokenizer` knows it
    workers: int


# ------------------------------------------------------------------------------------------
# The folder

def prepare(source: str | Path, out: str | Path, tokenizer: str = "bytes", val_fraction: float = 0.1,
            overwrite: bool = False, split: str = "hash", column: str | None = None, workers: int = 1,
            resume: bool = False) -> dict:
    """Tokenize `source` into the folder `out` and return its meta.json.

    `resume` goes on with what a process that was killed left of the same.

    Raises ValueError for an unusable source, tokenizer or fraction, and if `out` exists
    (`overwrite` replaces a prepared data set, never a folder with anything else in it).
    """
    source, out = _checked(str(source), out, val_fraction, split)
    names = {source, tokenizer} - {*EMBEDDED, "bytes", ""}
    sources = [Path(os.path.realpath(name)) for name in names if os.path.exists(name)]
    if workers < 1:
        raise ValueError(f"workers is {workers}, but must be at least 1")
    recover(out, sweep=not resume)
    require_replaceable(out, overwrite, sources)
    enc = get_tokenizer(tokenizer)
    dtype = np.dtype(np.uint16 if enc.n_vocab <= 2**16 else np.uint32)
    try:
        with staging_folder(out, resume) as staging:
            path = fetch(source, staging)
            job = Job(source, path, val_fraction, enc, staging, dtype, Counter(), {}, column, tokenizer,
                      workers)
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
    spool, kind = _tokenize(job, split)
    orders = [spool.order(in_val) for in_val in (False, True)]
    if split == "hash" and (not all(map(len, orders)) or spool.n_different() * job.val_fraction < 1):
        split = "tail"  # too few different documents to leave it to chance
        spool, kind = _tokenize(job, split)
        orders = [spool.order(in_val) for in_val in (False, True)]
    if not all(map(len, orders)):
        amount = "too little" if spool.done else "no"
        raise ValueError(f"{job.source} has {amount} text for two halves: give it more")
    counts = {name: spool.write(order, name, kind != "text") for name, order in zip(HALVES, orders)}
    meta = {
        "kind": kind,
        "tokenizer": job.enc.name,
        "vocab_size": job.enc.n_vocab,
        "dtype": job.dtype.name,
        "source": _with_version(job.source),
        "split": split,
        "val_fraction": float(job.val_fraction),
        "documents": {name: len(order) for name, order in zip(HALVES, orders)},
        "tokens": counts,
    }
    if kind != "text":
        meta["format"] = "chat" if getattr(job.enc, "chat", None) else "plain"
        meta["frames"] = frames_of(job.enc)
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
        raise ValueError(f"no data at {folder}: run {how_to_make(folder)}")
    print(f"{folder} is missing: preparing it", flush=True)
    prepare(folder.name, folder, tokenizer)


# ------------------------------------------------------------------------------------------
# Which half

def _by_hash(examples: Iterable[Example], job: Job) -> Iterator[Assigned]:
    """By the hash of the key; ranked by the hash of the texts."""
    for example in examples:
        position = int.from_bytes(_digest(example.key)[:8], "big") / 2**64  # uniform in [0, 1)
        rank = int.from_bytes(_digest("\0".join(example.texts))[:8], "big")
        yield position < job.val_fraction, rank, example


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

class _Changed(Exception):
    """The source, or what was left, is not what it was when the process was killed."""


def _tokenize(job: Job, split: str) -> tuple[Spool, str]:
    """Tokenize all of the source; returns where it is, and its kind.

    Nothing of it is held in memory, so with the hash split a corpus may be larger.
    """
    values = {"source": job.source, "tokenizer": job.enc.name, "frames": frames_of(job.enc), "split": split,
              "column": job.column, "val_fraction": job.val_fraction, "version": sys.version}
    spool = Spool(job.folder, job.dtype, values)
    if spool.done and split == "tail":
        spool.clear()
    if spool.done:
        print(f"{job.source}: going on after {spool.done:,} documents", file=sys.stderr)
    try:
        return spool, _fill(spool, job, split)
    except _Changed:
        print(f"{job.source} has changed, or what was left is damaged: beginning anew", file=sys.stderr)
        spool.clear()
        return spool, _fill(spool, job, split)
    finally:
        spool.finish()


def _fill(spool: Spool, job: Job, split: str) -> str:
    job.left_out.clear()
    job.sources.clear()
    quiet = None if sys.stderr else True   # None: where it is no terminal
    total = total_bytes(job.path) if job.path else None
    with tqdm(total=total, desc=job.source, unit="B", unit_scale=True, disable=quiet) as bar:
        examples = read(job.source, job.path, How(split == "tail", job.left_out, job.column, bar.update))
        assigned = (_by_hash if split == "hash" else _by_tail)(examples, job)
        kind = _skip(spool, assigned, job)
        for batch, rows in encode_all(assigned, job.enc, job.tokenizer, job.dtype, job.workers):
            kind = batch[-1][-1].kind
            for (*_, example), tokens in zip(batch, spool.add(batch, rows)):
                _count(job.sources, example.origin, tokens)
    return kind


def _skip(spool: Spool, assigned: Iterator[Assigned], job: Job) -> str:
    """Read what is tokenized already; _Changed is raised where it is something else."""
    kind = "text"
    for record in spool.resumed:
        found = next(assigned, None)
        if found is None or not spool.has(record, *found):
            raise _Changed
        example = found[-1]
        kind = example.kind
        _count(job.sources, example.origin, int(record["stop"] - record["start"]))
    return kind


def _count(sources: dict[str, Counter], origin: str, tokens: int) -> None:
    """One more document; beyond MOST_KINDS of them, sources are counted together."""
    if origin:
        name = origin if origin in sources or len(sources) < MOST_KINDS else "further ones"
        sources.setdefault(name, Counter()).update(documents=1, tokens=tokens)


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
    workers: int = at_least(1, 1)          # processes that tokenize
    resume: bool = False                   # go on with what a killed process left
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
                       cfg.column, cfg.workers, cfg.resume)
    except KeyboardInterrupt:
        line = f"nothing half-made is left; run it again to make {out}"
        if cfg.resume and leftovers(Path(os.path.realpath(out))):
            line = f"what is tokenized waits beside {out}; --resume goes on with it"
        print(f"interrupted: {line}", file=sys.stderr)
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
