"""Workers and killed preparations: the same bytes, whoever tokenizes and whenever."""

import errno
import gzip
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet as parquet
import pytest
import zstandard

from common import REPO, one_line
from common_bpe import model_folder  # noqa: F401   (fixture)
from common_data import BYTES, text_file, write_jsonl  # noqa: F401   (fixture)
from data import encode
from data.folder import recover
from data.prepare import ensure_prepared, prepare
from data.records import Example
from data.sources import How, read, total_bytes
from data.spool import Spool


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def corpus(tmp_path) -> Path:
    """A folder of texts, of which some come again."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    texts = [f"Text number {i} of 300, {'and more ' * (i % 50)}漢" for i in range(300)]
    write_jsonl(folder / "a.jsonl", [{"text": text} for text in texts[:200]])
    write_jsonl(folder / "b.jsonl", [{"text": text, "n": 1} for text in texts[150:]])
    return folder


# ------------------------------------------------------------------------------------------
# Workers

@pytest.mark.parametrize("split", ["hash", "tail"])
def test_two_workers_write_the_bytes_of_one_process(tmp_path, monkeypatch, corpus, split):
    monkeypatch.setattr(encode, "BATCH", 1000)
    metas = [prepare(corpus, tmp_path / f"out{n}", split=split, workers=n) for n in (1, 2)]
    assert metas[0] == metas[1] and metas[0]["sources"]["a.jsonl"]["documents"] > 100
    assert contents(tmp_path / "out1") == contents(tmp_path / "out2")


def test_two_workers_write_the_conversations_of_one_process(tmp_path, monkeypatch, model_folder):
    monkeypatch.setattr(encode, "BATCH", 500)
    choices = [{"prompt": f"{i}? ", "chosen": f"{i}! " * (i % 7 + 1), "rejected": "no"} for i in range(120)]
    source = write_jsonl(tmp_path / "a.jsonl", choices)
    for n in (1, 2):
        prepare(source, tmp_path / f"out{n}", str(model_folder), workers=n)
    assert contents(tmp_path / "out1") == contents(tmp_path / "out2")
    assert {"train.mask.bin", "train.idx.bin", "tokenizer.json"} <= contents(tmp_path / "out1").keys()


def test_workers_are_given_only_a_few_batches_ahead(monkeypatch):
    monkeypatch.setattr(encode, "BATCH", 100)
    given = []

    def source():
        for i in range(2000):
            given.append(i)
            yield i, Example("", (f"{i:050}",))

    done = 0
    for batch, rows in encode.encode_all(source(), BYTES, "bytes", np.dtype(np.uint16), 2):
        assert [i for i, _ in batch] == [done, done + 1] and rows.lengths == [(51,), (51,)]
        done += 2
        assert len(given) <= done + 2 * 3                     # a batch with each worker, one read
    assert done == 2000


def test_what_goes_wrong_in_a_worker_is_one_line_and_leaves_nothing(tmp_path):
    talk = {"messages": [{"role": role, "content": "x"} for role in ("user", "assistant") * 2]}
    source = write_jsonl(tmp_path / "a.jsonl", [talk] * 3)
    with pytest.raises(ValueError, match="needs a chat template") as error:
        prepare(source, tmp_path / "out", workers=2)
    one_line(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]
    with pytest.raises(ValueError, match="workers is 0"):
        prepare(source, tmp_path / "out", workers=0)


@pytest.mark.parametrize("length, batch", [(30_000_000, encode.BATCH), (encode.BATCH, encode.BATCH), (10, 1)],
                         ids=["while it works", "while it answers", "while it waits"])
def test_a_worker_that_is_killed_is_one_line_at_any_moment(monkeypatch, length, batch):
    """An answer that is longer than a pipe holds may end in the middle."""
    monkeypatch.setattr(encode, "BATCH", batch)

    def source():
        for i in range(100):
            yield i, Example("", ("x" * length,))
            if i == 3:
                time.sleep(1)
                os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)

    with pytest.raises(ValueError, match="a worker was killed.*fewer --workers") as error:
        list(encode.encode_all(source(), BYTES, "bytes", np.dtype(np.uint16), 2))
    one_line(error.value)
    assert not multiprocessing.active_children()


def test_a_worker_never_hears_ctrl_c_not_even_while_it_starts():
    worker = encode.Worker("bytes", np.dtype(np.uint16))
    for _ in range(2):
        os.kill(worker.process.pid, signal.SIGINT)
        worker.give([Example("", ("xy",))])
        assert worker.take().lengths == [(3,)]
    worker.end()


# ------------------------------------------------------------------------------------------
# Killed and resumed

DIES = """
import os, signal, sys
import data.encode, data.spool
from data.prepare import prepare
add = data.spool.Spool.add
def add_some(spool, *batch):
    if spool.done > 100:
        masked = spool.files[1].tell() > 0
        for file in spool.files[: 1 + masked]:            # it was about to write more
            file.write(b"half")
            file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    return add(spool, *batch)
if __name__ == "__main__":
    data.spool.Spool.add, data.encode.BATCH = add_some, 1000
    prepare(sys.argv[1], sys.argv[2], workers=int(sys.argv[3]), tokenizer=sys.argv[4])
"""


def kill_midway(tmp_path: Path, source: Path, workers: int = 1, tokenizer: str = "bytes") -> Path:
    """A process that prepares `source` is killed; returns what it left. Its workers end
    too, or their output would stay open.
    """
    (tmp_path / "dies.py").write_text(DIES)
    command = [sys.executable, tmp_path / "dies.py", source, tmp_path / "out", str(workers), tokenizer]
    env = {"PYTHONPATH": str(REPO)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=env)
    said, _ = process.communicate()
    assert process.returncode == -signal.SIGKILL, said
    left, = tmp_path.glob(".out.*.partial")
    return left


@pytest.mark.parametrize("kind, workers", [("text", 1), ("text", 2), ("supervised", 1)])
def test_a_killed_preparation_goes_on_where_it_was_to_the_same_bytes(tmp_path, monkeypatch, corpus, capsys,
                                                                     kind, workers):
    if kind == "supervised":
        pairs = [{"prompt": f"{i}? ", "response": "x" * (i % 60), "more": 1} for i in range(300)]
        corpus = write_jsonl(tmp_path / "pairs.jsonl", pairs)
    expected = prepare(corpus, tmp_path / "whole")
    left = kill_midway(tmp_path, corpus, workers)
    ensure_prepared(tmp_path / "whole")                       # who only looks sweeps nothing of it
    prepare(corpus, tmp_path / "other")
    encoded, encode_batch = [], encode.encode_batch

    def counted(examples, *how):
        encoded.extend(examples)
        return encode_batch(examples, *how)

    monkeypatch.setattr(encode, "encode_batch", counted)
    assert prepare(corpus, tmp_path / "out", resume=True) == expected
    done = sum(expected["documents"].values()) - len(encoded)
    assert 100 < done and f"going on after {done} documents" in capsys.readouterr().err
    assert contents(tmp_path / "out") == contents(tmp_path / "whole") and not left.exists()


@pytest.mark.parametrize("change", ["source", "shorter source", "settings", "damage"])
def test_what_a_killed_preparation_left_of_something_else_is_not_taken_up(tmp_path, corpus, capsys, change):
    left = kill_midway(tmp_path, corpus)
    how = {}
    if change == "source":
        write_jsonl(corpus / "a.jsonl", [{"text": f"another {i}"} for i in range(200)])
    elif change == "shorter source":
        (corpus / "b.jsonl").unlink()
        lines = (corpus / "a.jsonl").read_text().splitlines(keepends=True)
        (corpus / "a.jsonl").write_text("".join(lines[:50]))
    elif change == "settings":
        how = {"val_fraction": 0.3}
    else:
        (left / "spool.bin").write_bytes(b"")
    prepare(corpus, tmp_path / "out", resume=True, **how)
    assert ("beginning anew" in capsys.readouterr().err) == ("source" in change)
    prepare(corpus, tmp_path / "whole", **how)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole") and not left.exists()


@pytest.mark.parametrize("name, kind", [
    ("spool.bin", "text"), ("spool.rows", "text"), ("spool.bin", "supervised"), ("spool.mask", "supervised"),
    ("spool.mask, empty", "supervised"),
])
def test_a_damaged_byte_of_what_was_left_gives_no_other_folder(tmp_path, corpus, name, kind):
    if kind == "supervised":
        pairs = [{"prompt": f"{i}? ", "response": "x" * (i % 60)} for i in range(300)]
        corpus = write_jsonl(tmp_path / "pairs.jsonl", pairs)
    left = kill_midway(tmp_path, corpus)
    path = left / name.removesuffix(", empty")
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(b"" if "empty" in name else raw)
    prepare(corpus, tmp_path / "out", resume=True)
    prepare(corpus, tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_texts_that_others_say_now_are_not_taken_up(tmp_path, model_folder):
    def write(second: str) -> Path:
        turns = [[("user", f"{i}?"), (second, "and?"), ("assistant", "x" * 30)] for i in range(300)]
        return write_jsonl(tmp_path / "a.jsonl", [{"messages": [dict(zip(("role", "content"), turn))
                                                                for turn in talk]} for talk in turns])

    kill_midway(tmp_path, write("user"), tokenizer=str(model_folder))
    for name in ("out", "whole"):
        prepare(write("assistant"), tmp_path / name, str(model_folder), resume=name == "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_what_was_tokenized_with_another_chat_template_is_not_taken_up(tmp_path, model_folder):
    """Both models have one vocabulary, so their tokenizers have one name."""
    pairs = [{"prompt": f"{i}? ", "response": "x" * (i % 60)} for i in range(300)]
    source = write_jsonl(tmp_path / "a.jsonl", pairs)
    kill_midway(tmp_path, source, tokenizer=str(model_folder))
    other = shutil.copytree(model_folder / "hf", tmp_path / "other")
    config = (other / "tokenizer_config.json").read_text()
    (other / "tokenizer_config.json").write_text(config.replace("Be kind.", "Obey."))
    for name in ("out", "whole"):
        prepare(source, tmp_path / name, str(other), resume=name == "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_without_resume_what_a_killed_preparation_left_is_removed(tmp_path, corpus):
    left = kill_midway(tmp_path, corpus)
    recover(tmp_path / "out")
    assert left.exists()                                      # who only looks leaves it
    prepare(corpus, tmp_path / "out")
    prepare(corpus, tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert not list(tmp_path.glob(".*.partial"))


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "no space"), KeyboardInterrupt()], ids=repr)
def test_a_resume_that_fails_loses_nothing_of_what_was_left(tmp_path, monkeypatch, corpus, capsys, failure):
    kill_midway(tmp_path, corpus)
    add = Spool.add

    def add_some(spool, *batch):
        if spool.done > 200:
            raise failure
        return add(spool, *batch)

    with monkeypatch.context() as patch, pytest.raises((ValueError, KeyboardInterrupt)):
        patch.setattr(encode, "BATCH", 1000)
        patch.setattr(Spool, "add", add_some)
        prepare(corpus, tmp_path / "out", resume=True)
    capsys.readouterr()
    prepare(corpus, tmp_path / "out", resume=True)
    done, = re.findall(r"going on after (\d+) documents", capsys.readouterr().err)
    prepare(corpus, tmp_path / "whole")
    assert int(done) > 200 and contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert not list(tmp_path.glob(".*.partial"))


def test_with_nothing_to_go_on_with_resume_begins(tmp_path, text_file):
    prepare(text_file, tmp_path / "out", resume=True)
    prepare(text_file, tmp_path / "same")
    assert contents(tmp_path / "out") == contents(tmp_path / "same")


# ------------------------------------------------------------------------------------------
# Progress

def test_progress_is_in_bytes_of_the_files_as_they_are_on_disk(tmp_path):
    raw = b"".join(b'{"text": "line %d"}\n' % i for i in range(8_000))
    (tmp_path / "a.txt").write_bytes(raw)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(raw))
    (tmp_path / "c.jsonl.zst").write_bytes(zstandard.compress(raw))
    (tmp_path / "e.png").write_bytes(b"not read")
    told = []
    assert sum(1 for _ in read("x", tmp_path, How(False, Counter(), None, told.append))) > 16_000
    size = sum(path.stat().st_size for path in tmp_path.glob("[a-c].*"))
    assert len(told) > 4 and sum(told) == total_bytes(tmp_path) == size
    path = tmp_path / "d.parquet"
    parquet.write_table(pyarrow.table({"text": [f"{i} {i * i}" for i in range(8_000)]}), path)
    told.clear()
    assert sum(1 for _ in read("x", path, How(False, Counter(), None, told.append))) == 8_000
    assert sum(told) >= total_bytes(path) == path.stat().st_size      # its end is read twice
