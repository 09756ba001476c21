"""Prepared data: what is split stays apart, and what is stored comes back."""

import hashlib
import subprocess
import sys

import pytest
import tiktoken

import data.prepare
from common import REPO
from common_data import documents, examples, preference, small_library, text_file, write_jsonl  # noqa: F401
from data.loader import Loader
from data.prepare import prepare
from data.tokenizer import END


# ------------------------------------------------------------------------------------------
# The split

def test_no_document_is_in_both_halves(tmp_path, small_library):
    meta = prepare("pydoc", tmp_path / "out")
    train, val = (documents(tmp_path / "out", half) for half in ("train", "val"))
    assert len(set(train)) == len(train) and len(set(val)) == len(val) and not set(train) & set(val)
    assert meta["documents"] == {"train": len(train), "val": len(val)}
    assert 0.05 < meta["tokens"]["val"] / sum(meta["tokens"].values()) < 0.2


def test_every_document_is_kept_as_often_as_it_comes_in_one_half_in_hash_order(tmp_path):
    texts = [f"document {i}\n\nwith two paragraphs " for i in range(200)]
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts + texts[:50]])
    prepare(source, tmp_path / "out")
    halves = [documents(tmp_path / "out", half) for half in ("train", "val")]
    assert sorted(halves[0] + halves[1]) == sorted(texts + texts[:50]) and not set(halves[0]) & set(halves[1])
    for half in halves:
        digests = [hashlib.sha256(text.encode()).digest() for text in half]
        assert digests == sorted(digests)


def test_a_document_keeps_its_half_when_the_source_grows(tmp_path):
    few = [{"text": f"document {i}"} for i in range(100)]
    more = [{"text": f"other {i}"} for i in range(100)] + few
    prepare(write_jsonl(tmp_path / "few.jsonl", few), tmp_path / "few")
    prepare(write_jsonl(tmp_path / "more.jsonl", more), tmp_path / "more")
    for half in ("train", "val"):
        assert set(documents(tmp_path / "few", half)) <= set(documents(tmp_path / "more", half))


def test_preparing_twice_gives_the_same_bytes(tmp_path, small_library):
    for name in ("one", "two"):
        prepare("pydoc-sft", tmp_path / name)
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()


def test_the_tail_split_is_nanogpts(tmp_path):
    text = "".join(f"line {i} of one long play\n\n" for i in range(2000))
    (tmp_path / "play.txt").write_text(text)
    prepare(tmp_path / "play.txt", tmp_path / "out", split="tail")
    cut = int(len(text) * 0.9)
    assert documents(tmp_path / "out", "train") == [text[:cut]]
    assert documents(tmp_path / "out", "val") == [text[cut:]]


def test_the_tail_split_of_pairs_takes_the_last_ones(tmp_path):
    records = [{"prompt": str(i), "response": "r"} for i in range(20)]
    prepare(write_jsonl(tmp_path / "a.jsonl", records), tmp_path / "out", split="tail")
    assert [prompt for prompt, _ in examples(tmp_path / "out", "val")] == ["18", "19"]


@pytest.mark.parametrize("text", ["hello world\n" * 400, "one paragraph\n\n" * 1000, "a" * 300, "ab",
                                  "漢字\n\n"])
def test_text_that_repeats_itself_is_cut_in_two_and_none_is_lost(tmp_path, text):
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    assert prepare(tmp_path / "a.txt", tmp_path / "out")["split"] == "tail"
    (train,), (val,) = (documents(tmp_path / "out", half) for half in ("train", "val"))
    assert train + val == text and len(train) == max(1, int(len(text) * 0.9))


def test_a_few_documents_still_fill_both_halves_and_share_none(tmp_path):
    for n in range(2, 40):
        source = write_jsonl(tmp_path / f"{n}.jsonl", [{"prompt": f"{i}", "response": "r"} for i in range(n)])
        prepare(source, tmp_path / f"{n}")
        train, val = (examples(tmp_path / f"{n}", half) for half in ("train", "val"))
        assert train and val and len(set(train + val)) == n


@pytest.mark.parametrize("size", [5, 30, 300, 5_000, 50_000])
@pytest.mark.parametrize("unit", ["word and ", "a line\n", "a paragraph\n\n", "漢"])
def test_text_without_documents_still_fills_both_halves(tmp_path, size, unit):
    text = "".join(f"{i}{unit}" for i in range(size // len(unit) + 1))[:size]
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    meta = prepare(tmp_path / "a.txt", tmp_path / "out")
    texts = documents(tmp_path / "out", "train") + documents(tmp_path / "out", "val")
    assert min(meta["documents"].values()) >= 1
    assert max(map(len, texts)) <= 2 * 4096 or meta["split"] == "tail"
    assert sum(len(t.replace("\n", "")) for t in texts) == len(text.replace("\n", ""))


# ------------------------------------------------------------------------------------------
# Kinds

def test_loss_mask_covers_exactly_response_and_end(tmp_path):
    pairs = {(f"Ask {i}🙂 ", f"Ans\n{i}") for i in range(60)} | {("", "no prompt"), ("no response", "")}
    source = write_jsonl(tmp_path / "a.jsonl", [{"prompt": p, "response": r, "id": 7} for p, r in pairs])
    meta = prepare(source, tmp_path / "out")
    stored = examples(tmp_path / "out", "train") + examples(tmp_path / "out", "val")
    assert meta["kind"] == "supervised" and len(stored) == len(pairs) and set(stored) == pairs


def test_one_prompt_is_never_in_both_halves(tmp_path):
    records = [{"prompt": f"p{i % 40}", "response": f"r{i}"} for i in range(400)]
    prepare(write_jsonl(tmp_path / "a.jsonl", records), tmp_path / "out")
    train, val = ({prompt for prompt, _ in examples(tmp_path / "out", half)} for half in ("train", "val"))
    assert len(train) + len(val) == 40


def test_preferences_are_stored_chosen_then_rejected(tmp_path, preference):
    stored = examples(preference, "train") + examples(preference, "val")
    assert len(stored) == 160
    for (prompt, chosen), (same, rejected) in zip(stored[::2], stored[1::2]):
        assert prompt == same and chosen == prompt.replace("q", "good ")[:-2] and rejected.startswith("bad")


def test_a_large_vocabulary_is_stored_in_32_bits(tmp_path, monkeypatch):
    ranks = {bytes([i]): i for i in range(256)}
    big = tiktoken.Encoding("big", pat_str="(?s:.)", mergeable_ranks=ranks, special_tokens={END: 70_000})
    monkeypatch.setattr(data.prepare, "get_tokenizer", lambda name: big)
    (tmp_path / "a.txt").write_text("text " * 100)
    assert prepare(tmp_path / "a.txt", tmp_path / "out")["dtype"] == "uint32"
    assert Loader(tmp_path / "out", "train", 2, 8).tokens[-1] == 70_000


# ------------------------------------------------------------------------------------------
# The folder

def test_a_prepared_folder_is_replaced_only_when_told(tmp_path, text_file):
    prepare(text_file, tmp_path / "out")
    before = (tmp_path / "out" / "train.bin").read_bytes()
    text_file.write_text("other words\n\n" * 100)
    with pytest.raises(ValueError, match="--overwrite"):
        prepare(text_file, tmp_path / "out")
    assert (tmp_path / "out" / "train.bin").read_bytes() == before
    prepare(text_file, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "train.bin").read_bytes() != before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.txt", "out"]


@pytest.mark.parametrize("how", [["-m", "data.prepare"], ["data/prepare.py"]])
def test_the_script_runs_both_ways(tmp_path, text_file, how):
    root = REPO
    command = [sys.executable, *how, str(text_file), "--out", str(tmp_path / "out"), "--val-fraction", "0.3"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0 and "train" in done.stdout and not done.stderr
