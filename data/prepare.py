"""Prepare data: a source of text → `data/NAME/`, token files to be mapped into memory.

    python -m data.prepare [SOURCE] [--out data/NAME] [--tokenizer bytes]
                           [--val_fraction 0.1] [--split hash] [--overwrite]

The sources are in `sources.py`; `loader.py` makes batches of the folder.

TOKENIZER is bytes, one of tiktoken's names, or the folder of a model whose own
tokenizer is to be used.

The folder, for each half in (train, val):

    {half}.bin       tokens; uint16, or uint32 above 65,536 tokens. Each document is
                     followed by <|endoftext|>
    {half}.mask.bin  uint8 per token, 1 where a token is to be learnt  } supervised and
    {half}.idx.bin   int64 start of each example, and the end: n + 1   } preference only
    meta.json        kind, tokenizer, vocabulary, dtype, source, counts
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
not at all.
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

from data.chat import Turns, encode_turns
from data.sources import Example, read
from data.tokenizer import get_tokenizer, opening, save_tokenizer

HALVES = ("train", "val")
# sources that need no file; the last one is a download
EMBEDDED = ("pydoc", "pydoc-sft", "pydoc-dpo", "shakespeare")
Assigned = tuple[bool, bytes | int, Example]         # in val?, rank in the order within the half
Record = tuple[bytes | int, list[tuple[int, int]]]   # rank, (start, stop) of each stored row


# ------------------------------------------------------------------------------------------
# The folder

def prepare(source: str | Path, out: str | Path, tokenizer: str = "bytes", val_fraction: float = 0.1,
            overwrite: bool = False, split: str = "hash") -> dict:
    """Tokenize `source` into the folder `out` and return its meta.json.

    Raises ValueError for an unusable source, tokenizer or fraction, and if `out` exists
    (`overwrite` replaces a prepared data set, but never a folder with anything else in
    it).
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
        halves, kind = _tokenize(source, split, val_fraction, enc, staging, dtype)
        different = {rank for half in halves for rank, _ in half}
        if split == "hash" and (not all(halves) or len(different) * val_fraction < 1):
            split = "tail"  # too few different documents to leave it to chance
            halves, kind = _tokenize(source, split, val_fraction, enc, staging, dtype)
        if not all(halves):
            amount = "too little" if any(halves) else "no"
            raise ValueError(f"{source} has {amount} text for two halves: give it more")
        meta = {
            "kind": kind,
            "tokenizer": enc.name,
            "vocab_size": enc.n_vocab,
            "dtype": dtype.name,
            "source": _with_version(source),
            "split": split,
            "val_fraction": val_fraction,
            "documents": {name: len(half) for name, half in zip(HALVES, halves)},
            "tokens": {name: _write(half, kind, staging, name, dtype) for name, half in zip(HALVES, halves)},
        }
        if kind != "text":
            meta["format"] = "chat" if getattr(enc, "chat", None) else "plain"
        for spool in staging.glob("spool.*"):
            spool.unlink()
        (staging / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
        save_tokenizer(enc, staging)
        _publish(staging, out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return meta


def _with_version(source: str) -> str:
    """Python's own texts differ from version to version."""
    return f"{source} of Python {sys.version.split()[0]}" if source.startswith("pydoc") else source


def _publish(staging: Path, out: Path) -> None:
    """Give the finished folder its name, in place of one that has it."""
    old = out.with_name(f".{out.name}.{os.getpid()}.old")
    if out.exists():
        out.rename(old)
    staging.rename(out)
    if old.exists():
        shutil.rmtree(old)


def ensure_prepared(folder: str | Path, tokenizer: str = "bytes") -> None:
    """Prepare an embedded source (or tiny Shakespeare) whose folder is missing.

    Raises ValueError for any other folder that is missing.
    """
    folder = Path(folder)
    if folder.exists():
        return
    if folder.name not in EMBEDDED:
        raise ValueError(f"no data at {folder}: run python -m data.prepare SOURCE --out {folder}")
    print(f"{folder} is missing: preparing it", flush=True)
    prepare(folder.name, folder, tokenizer)


def _require_replaceable(out: Path, overwrite: bool) -> None:
    """Raises ValueError where something stands that may not be replaced."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    data = {f"{half}{end}.bin" for half in HALVES for end in ("", ".mask", ".idx")}
    names = {p.name for p in out.iterdir()} if out.is_dir() else set()
    foreign = names - data - {"meta.json", "tokenizer.json"}
    if "meta.json" not in names or foreign:
        reason = min(foreign, default="no meta.json")
        raise ValueError(f"{out} exists and is not (only) a prepared data set ({reason}): "
                         "choose another --out")
    if not overwrite:
        raise ValueError(f"{out} is already prepared: pass --overwrite to replace it, "
                         "or choose another --out")


# ------------------------------------------------------------------------------------------
# Which half

def _by_hash(examples: Iterable[Example], val_fraction: float) -> Iterator[Assigned]:
    """By the hash of the key; ranked by the hash of the texts."""
    for example in examples:
        position = int.from_bytes(_digest(example.key)[:8], "big") / 2**64  # uniform in [0, 1)
        yield position < val_fraction, _digest("\0".join(example.texts)), example


def _by_tail(examples: Iterable[Example], val_fraction: float) -> Iterator[Assigned]:
    """The last `val_fraction` of the examples, or of a text's characters.

    There the document is cut in two. Needs the source in memory. A document that comes
    again is dropped, for it might be in both halves.
    """
    unique = list({(example.texts, example.roles): example for example in examples}.values())
    sizes = [len(example.texts[0]) if example.kind == "text" else 1 for example in unique]
    left = min(max(1, int(sum(sizes) * (1 - val_fraction))), sum(sizes) - 1)   # for train
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
        # where no token of its own opens one, the end of one document is the start of
        # the next
        start = opening(enc) if opening(enc) != [enc.eot_token] else []
        return [(start + enc.encode_ordinary(example.texts[0]) + [enc.eot_token], b"")]
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


def _tokenize(source: str, split: str, val_fraction: float, enc: tiktoken.Encoding, folder: Path,
              dtype: np.dtype) -> tuple[tuple[list[Record], list[Record]], str]:
    """Write all tokens and masks to spool files in the source's order.

    Returns where each half's examples are there, and their kind. Only these records are
    held in memory, so with the hash split a corpus may be larger than memory.
    """
    examples = (e for e in read(source, whole=split == "tail") if "".join(e.texts).strip())
    assigned = (_by_hash if split == "hash" else _by_tail)(examples, val_fraction)
    halves: tuple[list[Record], list[Record]] = [], []
    position, kind = 0, "text"
    with open(folder / "spool.bin", "wb") as file, open(folder / "spool.mask", "wb") as masks:
        for in_val, rank, example in tqdm(assigned, source, unit=" documents", disable=None):
            kind, rows = example.kind, []
            for ids, mask in _encode(example, enc):
                file.write(np.array(ids, dtype).tobytes())
                masks.write(mask)
                rows.append((position, position + len(ids)))
                position += len(ids)
            halves[in_val].append((rank, rows))
    return halves, kind


def _write(half: list[Record], kind: str, folder: Path, name: str, dtype: np.dtype) -> int:
    """Write one half's files in the order of rank; return its number of tokens."""
    rows = [row for _, rows in sorted(half) for row in rows]
    lengths = [stop - start for start, stop in rows]
    _copy_rows(folder / "spool.bin", dtype, rows, folder / f"{name}.bin")
    if kind != "text":
        _copy_rows(folder / "spool.mask", np.dtype(np.uint8), rows, folder / f"{name}.mask.bin")
        np.cumsum([0, *lengths], dtype=np.int64).tofile(folder / f"{name}.idx.bin")
    return sum(lengths)


def _copy_rows(spool: Path, dtype: np.dtype, rows: list[tuple[int, int]], path: Path) -> None:
    values = np.memmap(spool, dtype, "r")
    with open(path, "wb") as file:
        for start, stop in rows:
            file.write(values[start:stop].tobytes())


# ------------------------------------------------------------------------------------------
# The command

def read_flags(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?", default="pydoc",
                        help="pydoc (default), pydoc-sft, pydoc-dpo, shakespeare, a URL, "
                             "or a .txt/.md/.jsonl(.gz) file or folder")
    parser.add_argument("--out", help="folder to write (default: data/ and the source's name)")
    parser.add_argument("--tokenizer", default="bytes",
                        help="bytes (default), gpt2 or another of tiktoken's names, or a model's folder")
    parser.add_argument("--val_fraction", "--val-fraction", type=float, default=0.1)
    parser.add_argument("--split", default="hash",
                        help="hash (default): by document; tail: the source's end is val")
    parser.add_argument("--overwrite", action="store_true", help="replace an already prepared folder")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = read_flags(argv)
    out = args.out or Path("data") / Path(args.source.rstrip("/")).name.split(".")[0]
    try:
        meta = prepare(args.source, out, args.tokenizer, args.val_fraction, args.overwrite, args.split)
    except (ValueError, OSError) as error:
        print(f"data.prepare: {error}", file=sys.stderr)
        return 1
    counts = ", ".join(f"{half} {meta['tokens'][half]:,} tokens in {meta['documents'][half]:,} documents"
                       for half in HALVES)
    print(f"{out}: {meta['kind']}, {counts}; tokenizer {meta['tokenizer']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
