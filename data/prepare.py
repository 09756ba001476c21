"""Prepare data: a source of text (`sources.py`) → `data/NAME/`, token files that `loader.py` maps into memory.

    python -m data.prepare [SOURCE] [--out data/NAME] [--tokenizer bytes] [--val_fraction 0.1] [--split hash]
                           [--overwrite]

The folder, for each half in (train, val):

    {half}.bin        tokens; uint16, or uint32 above 65,536 tokens. Each document is followed by <|endoftext|>
    {half}.mask.bin   uint8 per token, 1 where a token is to be learnt        } supervised and preference data only,
    {half}.idx.bin    int64 start of each example, and the end: n + 1         } an example = <|endoftext|> prompt answer
    meta.json         kind, tokenizer, vocabulary, dtype, source, counts      } <|endoftext|>, learnt from the answer on

Preference data store chosen i as example 2i and rejected i as example 2i + 1.

Split: by the SHA-256 of the document (the prompt; for docstrings, the module or class), so it has its half for life,
however the rest of the source changes, and can't be in both. Within a half the order is by hash too, that is, shuffled.
`--split tail` keeps the source's order and takes its end for validation, as nanoGPT does; so does a source that has too
few different documents for chance.

The folder is written under a temporary name and then renamed: it is there complete, or not at all.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from hashlib import sha256
from pathlib import Path

import numpy as np
import tiktoken
from tqdm import tqdm

if not __package__:  # run as `python data/prepare.py`: make the repository importable
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from data.sources import KINDS, Example, read
from data.tokenizer import get_tokenizer, save_tokenizer

HALVES = ("train", "val")
EMBEDDED = ("pydoc", "pydoc-sft", "pydoc-dpo", "shakespeare")  # sources that need no file; the last one is a download
Assigned = tuple[bool, bytes | int, tuple[str, ...]]  # in val?, rank in the order within the half, texts
Record = tuple[bytes | int, list[tuple[int, int, int]]]  # rank, (start, stop, first learnt token) of each stored row


def prepare(
    source: str | Path,
    out: str | Path,
    tokenizer: str = "bytes",
    val_fraction: float = 0.1,
    overwrite: bool = False,
    split: str = "hash",
) -> dict:
    """Tokenize `source` into the folder `out` and return its meta.json.

    Raises ValueError for an unusable source, tokenizer or fraction, and if `out` exists (`overwrite` replaces a
    prepared data set, but never a folder with anything else in it).
    """
    source, out = str(source), Path(out)
    if not 0 < val_fraction < 1:
        raise ValueError(f"val_fraction is {val_fraction}, but must be between 0 and 1: try 0.1")
    if split not in ("hash", "tail"):
        raise ValueError(f"split is {split!r}: choose hash or tail")
    _require_replaceable(out, overwrite)
    enc = get_tokenizer(tokenizer)
    dtype = np.dtype(np.uint16 if enc.n_vocab <= 2**16 else np.uint32)
    staging = out.with_name(f".{out.name}.{os.getpid()}.partial")
    staging.mkdir(parents=True)
    try:
        halves, kind = _tokenize(source, split, val_fraction, enc, staging / "spool.bin", dtype)
        different = {rank for half in halves for rank, _ in half}
        if split == "hash" and (not all(halves) or len(different) * val_fraction < 1):
            split = "tail"  # too few different documents to leave it to chance
            halves, kind = _tokenize(source, split, val_fraction, enc, staging / "spool.bin", dtype)
        if not all(halves):
            raise ValueError(f"{source} has {'too little' if any(halves) else 'no'} text for two halves: give it more")
        meta = {
            "kind": kind,
            "tokenizer": enc.name,
            "vocab_size": enc.n_vocab,
            "dtype": dtype.name,
            "source": f"{source} of Python {sys.version.split()[0]}" if source.startswith("pydoc") else source,
            "split": split,
            "val_fraction": val_fraction,
            "documents": {name: len(half) for name, half in zip(HALVES, halves)},
            "tokens": {name: _write(half, kind, staging, name, dtype) for name, half in zip(HALVES, halves)},
        }
        (staging / "spool.bin").unlink()
        (staging / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
        save_tokenizer(enc, staging)
        if out.exists():
            old = out.with_name(f".{out.name}.{os.getpid()}.old")
            out.rename(old)
            staging.rename(out)
            shutil.rmtree(old)
        else:
            staging.rename(out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return meta


def ensure_prepared(folder: str | Path) -> None:
    """Prepare an embedded source (or tiny Shakespeare) whose folder is missing; any other missing folder is an error."""
    folder = Path(folder)
    if folder.exists():
        return
    if folder.name not in EMBEDDED:
        raise ValueError(f"no data at {folder}: run python -m data.prepare SOURCE --out {folder}")
    print(f"{folder} is missing: preparing it", flush=True)
    prepare(folder.name, folder)


def _require_replaceable(out: Path, overwrite: bool) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    ours = {"meta.json"} | {f"{half}{end}.bin" for half in HALVES for end in ("", ".mask", ".idx")}
    names = {p.name for p in out.iterdir()} if out.is_dir() else set()
    if "meta.json" not in names or names - ours:
        other = sorted(names - ours)[:1] or ["no meta.json"]
        raise ValueError(f"{out} exists and is not (only) a prepared data set ({other[0]}): choose another --out")
    if not overwrite:
        raise ValueError(f"{out} is already prepared: pass --overwrite to replace it, or choose another --out")


def _by_hash(examples: Iterable[Example], val_fraction: float) -> Iterator[Assigned]:
    for key, texts in examples:
        position = int.from_bytes(_digest(key)[:8], "big") / 2**64  # uniform in [0, 1)
        yield position < val_fraction, _digest("\0".join(texts)), texts


def _by_tail(examples: Iterable[Example], val_fraction: float) -> Iterator[Assigned]:
    """The last `val_fraction` of the characters of a text, cutting the document there in two; else of the examples.

    Needs the source in memory. A document that comes again is dropped, for it might be in both halves.
    """
    unique = list(dict.fromkeys(texts for _, texts in examples))
    sizes = [len(texts[0]) if len(texts) == 1 else 1 for texts in unique]
    left = min(max(1, int(sum(sizes) * (1 - val_fraction))), sum(sizes) - 1)  # for train
    for i, (size, texts) in enumerate(zip(sizes, unique)):
        if 0 < left < size:
            yield False, i, (texts[0][:left],)
            texts = (texts[0][left:],)
        yield left < size, i, texts
        left = max(0, left - size)


def _digest(text: str) -> bytes:
    return sha256(text.encode("utf-8", "surrogatepass")).digest()


def _encode(texts: tuple[str, ...], enc: tiktoken.Encoding) -> list[tuple[list[int], int]]:
    """(tokens, position of the first learnt token) of each row that an example is stored as."""
    end = [enc.eot_token]
    ids = [enc.encode_ordinary(text) for text in texts]
    if len(ids) == 1:
        return [(ids[0] + end, 0)]
    prompt, *answers = ids
    return [(end + prompt + answer + end, 1 + len(prompt)) for answer in answers]


def _tokenize(
    source: str, split: str, val_fraction: float, enc: tiktoken.Encoding, spool: Path, dtype: np.dtype
) -> tuple[tuple[list[Record], list[Record]], str]:
    """Write all tokens to `spool` in the source's order; return where each half's examples are in it, and the kind.

    Only these records are held in memory, so with the hash split a corpus may be larger than memory.
    """
    examples = (e for e in read(source, whole=split == "tail") if "".join(e.texts).strip())
    assigned = (_by_hash if split == "hash" else _by_tail)(examples, val_fraction)
    halves: tuple[list[Record], list[Record]] = [], []
    position, kind = 0, "text"
    with open(spool, "wb") as file:
        for in_val, rank, texts in tqdm(assigned, source, unit=" documents", disable=None):
            kind, rows = list(KINDS)[len(texts) - 1], []
            for ids, first in _encode(texts, enc):
                file.write(np.array(ids, dtype).tobytes())
                rows.append((position, position + len(ids), first))
                position += len(ids)
            halves[in_val].append((rank, rows))
    return halves, kind


def _write(half: list[Record], kind: str, folder: Path, name: str, dtype: np.dtype) -> int:
    """Write one half's files in the order of rank; return its number of tokens."""
    tokens = np.memmap(folder / "spool.bin", dtype, "r")
    rows = [row for _, rows in sorted(half) for row in rows]
    lengths = [stop - start for start, stop, _ in rows]
    with open(folder / f"{name}.bin", "wb") as file:
        for start, stop, _ in rows:
            file.write(tokens[start:stop].tobytes())
    if kind != "text":
        np.cumsum([0, *lengths], dtype=np.int64).tofile(folder / f"{name}.idx.bin")
        with open(folder / f"{name}.mask.bin", "wb") as file:
            for length, (_, _, first) in zip(lengths, rows):
                file.write(bytes(first) + b"\1" * (length - first))
    return sum(lengths)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "source",
        nargs="?",
        default="pydoc",
        help="pydoc (default), pydoc-sft, pydoc-dpo, shakespeare, a URL, or a .txt/.md/.jsonl(.gz) file or folder",
    )
    parser.add_argument("--out", help="folder to write (default: data/ and the source's name)")
    parser.add_argument("--tokenizer", default="bytes", help="bytes (default), gpt2, or another of tiktoken's names")
    parser.add_argument("--val_fraction", "--val-fraction", type=float, default=0.1)
    parser.add_argument("--split", default="hash", help="hash (default): by document; tail: the source's end is val")
    parser.add_argument("--overwrite", action="store_true", help="replace an already prepared folder")
    args = parser.parse_args(argv)
    out = args.out or Path("data") / Path(args.source.rstrip("/")).name.split(".")[0]
    try:
        meta = prepare(args.source, out, args.tokenizer, args.val_fraction, args.overwrite, args.split)
    except (ValueError, OSError) as error:
        print(f"data.prepare: {error}", file=sys.stderr)
        return 1
    counts = ", ".join(f"{h} {meta['tokens'][h]:,} tokens in {meta['documents'][h]:,} documents" for h in HALVES)
    print(f"{out}: {meta['kind']}, {counts}; tokenizer {meta['tokenizer']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
