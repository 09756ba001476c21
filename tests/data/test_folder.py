"""Data folders: a digest for every MiB, one name for one whole data set."""

import json
import os

import numpy as np
import pytest

import data.folder
from common_data import documents, numbered, supervised, text_file  # noqa: F401
from data.folder import BLOCK, Column, exchange, read_data_meta, recover, seal, staging_folder
from data.loader import Loader
from data.prepare import ensure_prepared, prepare


def large(folder, n: int = 3 * BLOCK // 2 + 5):
    """A sealed folder whose train.bin has three full blocks and a part of one."""
    numbered(folder, 10)
    np.resize(np.arange(50_000, dtype=np.uint16), n).tofile(folder / "train.bin")
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(meta | {"tokens": {"train": n, "val": 50}}))
    seal(folder)
    return folder


def flip(path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_a_block_is_checked_when_it_is_first_read_and_only_then(tmp_path, monkeypatch):
    folder = large(tmp_path / "d")
    checked = []
    monkeypatch.setattr(Column, "_check", lambda self, i, block, first: (
        checked.append((i, len(block), first)), self.checked.__setitem__(i, True)))
    n, meta = 3 * BLOCK // 2 + 5, read_data_meta(folder)
    column = Column(folder / "train.bin", np.dtype(np.uint16), n, 60_000, meta)
    half = BLOCK // 2
    assert column.read(half - 1, half + 1).tolist() == [(half - 1) % 50_000, half % 50_000]
    column.read(0, 10)
    assert checked == [(0, half, 0), (1, half, half)]
    column.whole()
    assert checked[2:] == [(2, half, 2 * half), (3, 5, 3 * half)]


def test_opening_reads_no_more_than_it_must(tmp_path):
    """Damage in a block that nobody reads is not looked for; once read, it is named."""
    folder = large(tmp_path / "d")
    flip(folder / "train.bin", 2 * BLOCK + 77)
    loader = Loader(folder, "train", 1, 16)
    starts = np.array([[0], [BLOCK]])
    assert loader._batch(starts[:1], starts[:1] + 17).x.shape == (1, 16)
    with pytest.raises(ValueError, match=f"train.bin.*bytes {2 * BLOCK} to {3 * BLOCK - 1} do not fit"):
        loader._batch(starts[1:], starts[1:] + 17)
    with pytest.raises(ValueError, match="train.bin"):
        loader.tokens


def test_a_folder_of_before_opens_without_digests(supervised):
    expected = Loader(supervised, "train", 2, 32).step(0)[0][0]
    meta = json.loads((supervised / "meta.json").read_text())
    assert meta.pop("digest") and set(meta.pop("blocks")) == {
        f"{half}{part}.bin" for half in ("train", "val") for part in ("", ".mask", ".idx")}
    (supervised / "meta.json").write_text(json.dumps(meta))
    batch = Loader(supervised, "train", 2, 32).step(0)[0][0]
    assert (batch.x == expected.x).all() and (batch.mask == expected.mask).all()


# ------------------------------------------------------------------------------------------
# One name

def test_two_names_are_exchanged_in_one_step_or_not_at_all(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    if exchange(tmp_path / "a", tmp_path / "b"):
        assert (tmp_path / "a" / "b").exists() and (tmp_path / "b" / "a").exists()
    assert not exchange(tmp_path / "a", tmp_path / "none") and (tmp_path / "a").exists()


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_link_stays_a_link_and_its_folder_is_replaced(tmp_path, text_file, monkeypatch, can_exchange):
    if not can_exchange:
        monkeypatch.setattr(data.folder, "exchange", lambda a, b: False)
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "set")       # dangling at first
    for words in ("some", "other"):
        text_file.write_text(f"{words} words\n\n" * 100)
        prepare(text_file, tmp_path / "out", overwrite=True)
        assert (tmp_path / "out").is_symlink() and words in documents(tmp_path / "out", "train")[0]
        assert [path.name for path in (tmp_path / "disk").iterdir()] == ["set"]


def test_what_an_ended_process_left_is_swept_and_what_a_living_one_writes_is_not(tmp_path, text_file):
    (tmp_path / ".out.7.partial").mkdir()
    (tmp_path / ".out.7.partial" / "spool.bin").touch()
    (tmp_path / ".other.7.old").mkdir()
    (tmp_path / ".mine.7.partial").mkdir()
    (tmp_path / ".mine.7.partial" / "thesis.txt").touch()
    with staging_folder(tmp_path / "more") as living:
        (living / "spool.bin").touch()
        prepare(text_file, tmp_path / "out")
        names = [".mine.7.partial", f".more.{os.getpid()}.partial", "a.txt", "out"]
        assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert not living.exists()


@pytest.mark.parametrize("look", [
    lambda out: Loader(out, "train", 1, 8),
    lambda out: ensure_prepared(out),
    lambda out: recover(out),
])
def test_who_looks_after_a_kill_between_two_renames_finds_the_old_one(tmp_path, text_file, look):
    prepare(text_file, tmp_path / "out")
    before = (tmp_path / "out" / "train.bin").read_bytes()
    (tmp_path / "out").rename(tmp_path / ".out.7.old")
    look(tmp_path / "out")
    assert (tmp_path / "out" / "train.bin").read_bytes() == before


def test_where_the_second_rename_fails_the_first_is_taken_back(tmp_path, text_file, monkeypatch):
    prepare(text_file, tmp_path / "out")
    monkeypatch.setattr(data.folder, "exchange", lambda a, b: False)
    with pytest.raises(FileNotFoundError):
        data.folder.publish(tmp_path / "nothing", tmp_path / "out")
    assert Loader(tmp_path / "out", "train", 1, 8).n
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "out"]
