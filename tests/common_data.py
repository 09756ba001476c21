"""What the tests of data/ share: small sources, and what a prepared folder holds."""

import json
import os
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from data.loader import Batch
from data.prepare import prepare
from data.tokenizer import get_tokenizer

BYTES = get_tokenizer("bytes")
EOT = BYTES.eot_token


def write_jsonl(path: Path, records: list) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def documents(folder: Path, half: str) -> list[str]:
    """The texts of a prepared half, cut apart at <|endoftext|>."""
    tokens = np.fromfile(folder / f"{half}.bin", np.uint16).tolist()
    assert tokens[-1] == EOT
    return [BYTES.decode(part) for part in split_list(tokens, EOT)]


def split_list(tokens: list[int], separator: int) -> list[list[int]]:
    parts: list[list[int]] = [[]]
    for token in tokens:
        parts.append([]) if token == separator else parts[-1].append(token)
    return parts[:-1]


def stored(folder: Path, half: str = "train") -> list[tuple[list[int], list[int]]]:
    """(tokens, mask) of each stored row."""
    tokens = np.fromfile(folder / f"{half}.bin", np.uint16).tolist()
    mask = np.fromfile(folder / f"{half}.mask.bin", np.uint8).tolist()
    index = np.fromfile(folder / f"{half}.idx.bin", np.int64)
    return [(tokens[a:b], mask[a:b]) for a, b in zip(index[:-1], index[1:])]


def examples(folder: Path, half: str) -> list[tuple[str, str]]:
    """(prompt, response) of each stored row; the response is what the mask covers."""
    pairs = []
    for tokens, mask in stored(folder, half):
        row, learnt = np.array(tokens), np.array(mask, bool)
        assert row[0] == EOT and row[-1] == EOT and learnt[-1] and not learnt[0]
        pairs.append((BYTES.decode(row[~learnt][1:].tolist()), BYTES.decode(row[learnt][:-1].tolist())))
    return pairs


def rows(batch: Batch) -> list[tuple]:
    """The inputs and the final target of each row where anything counts, not padded."""
    out = []
    for x, y, mask in zip(batch.x.tolist(), batch.y.tolist(), batch.mask.tolist()):
        if any(mask):
            last = max(t for t, m in enumerate(mask) if m)
            out.append((*x[: last + 1], y[last]))
    return out


def numbered(folder: Path, n_train: int, n_val: int = 50) -> Path:
    """A text whose token at position i is i, so a crop shows where it was taken."""
    folder.mkdir()
    np.arange(n_train, dtype=np.uint16).tofile(folder / "train.bin")
    np.arange(n_val, dtype=np.uint16).tofile(folder / "val.bin")
    counts = {"train": n_train, "val": n_val}
    meta = {"kind": "text", "dtype": "uint16", "vocab_size": 60000, "tokens": counts}
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


@pytest.fixture
def small_library(monkeypatch):
    """The pydoc sources with one package for the whole library: fast."""
    stdlib = sysconfig.get_path("stdlib")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: f"{stdlib}/asyncio")


@pytest.fixture
def supervised(tmp_path) -> Path:
    records = [{"prompt": f"{i} is ", "response": "x" * (1 + i % 7) + str(i)} for i in range(80)]
    prepare(write_jsonl(tmp_path / "pairs.jsonl", records), tmp_path / "sft")
    return tmp_path / "sft"


@pytest.fixture
def preference(tmp_path) -> Path:
    records = [{"prompt": f"q{i}: ", "chosen": f"good {i}", "rejected": "bad" * (i % 5 + 1)}
               for i in range(80)]
    prepare(write_jsonl(tmp_path / "choices.jsonl", records), tmp_path / "dpo")
    return tmp_path / "dpo"


@pytest.fixture
def text_file(tmp_path) -> Path:
    (tmp_path / "a.txt").write_text("some words and\n\n" * 100)
    return tmp_path / "a.txt"


def die_amid_an_answer(pipe, *_) -> None:
    """A worker that is killed. A process that is spawned finds it here."""
    pipe.recv()
    os.write(pipe.fileno(), (1000).to_bytes(4, "big") + b"the rest does not come")
    os._exit(9)
