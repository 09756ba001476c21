"""The data package: what is split stays apart, what is stored comes back, what is stepped through comes once."""

import gzip
import hashlib
import io
import json
import re
import subprocess
import sys
import sysconfig
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import torch

import data.prepare
from data.loader import Batch, Loader
from data.prepare import main, prepare
from data.tokenizer import END, get_tokenizer, load_tokenizer, save_tokenizer

BYTES = get_tokenizer("bytes")
EOT = BYTES.eot_token


# --- helpers --------------------------------------------------------------------------------------


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


def examples(folder: Path, half: str) -> list[tuple[str, str]]:
    """(prompt, response) of each stored row, where the response is what the mask covers, decoded."""
    tokens, mask = np.fromfile(folder / f"{half}.bin", np.uint16), np.fromfile(folder / f"{half}.mask.bin", np.uint8)
    index = np.fromfile(folder / f"{half}.idx.bin", np.int64)
    rows = []
    for a, b in zip(index[:-1], index[1:]):
        row, learnt = tokens[a:b], mask[a:b].astype(bool)
        assert row[0] == EOT and row[-1] == EOT and learnt[-1] and not learnt[0]
        rows.append((BYTES.decode(row[~learnt][1:].tolist()), BYTES.decode(row[learnt][:-1].tolist())))
    return rows


def write_jsonl(path: Path, records: list) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def numbered(folder: Path, n_train: int, n_val: int = 50) -> Path:
    """A text data set whose token at position i is i, so that a crop shows where it was taken."""
    folder.mkdir()
    np.arange(n_train, dtype=np.uint16).tofile(folder / "train.bin")
    np.arange(n_val, dtype=np.uint16).tofile(folder / "val.bin")
    meta = {"kind": "text", "dtype": "uint16", "vocab_size": 60000, "tokens": {"train": n_train, "val": n_val}}
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
    records = [{"prompt": f"q{i}: ", "chosen": f"good {i}", "rejected": "bad" * (i % 5 + 1)} for i in range(80)]
    prepare(write_jsonl(tmp_path / "choices.jsonl", records), tmp_path / "dpo")
    return tmp_path / "dpo"


def rows(batch: Batch) -> list[tuple]:
    """Each row as (inputs and final target where anything counts, learnt targets), padding taken off."""
    out = []
    for x, y, mask in zip(batch.x.tolist(), batch.y.tolist(), batch.mask.tolist()):
        if any(mask):
            last = max(t for t, m in enumerate(mask) if m)
            out.append((*x[: last + 1], y[last]))
    return out


# --- tokenizer ------------------------------------------------------------------------------------


def test_bytes_ids_are_byte_values_and_any_bytes_round_trip():
    text = "naïve 🙂 \x00\r\n\t 漢字"
    assert BYTES.encode_ordinary(text) == list(text.encode()) and BYTES.decode(list(text.encode())) == text
    every = np.random.default_rng(0).integers(0, 256, 1000).tolist() + list(range(256))
    assert BYTES.decode_bytes(every) == bytes(every)
    assert (BYTES.n_vocab, EOT, BYTES.decode([EOT])) == (257, 256, END)


def test_a_special_token_spelt_in_text_is_only_text(tmp_path):
    assert BYTES.encode_ordinary(END) == list(END.encode())
    prepare(write_jsonl(tmp_path / "a.jsonl", [{"text": f"{END}{i}"} for i in range(40)]), tmp_path / "out")
    assert all(text.startswith(END) for text in documents(tmp_path / "out", "train"))


def test_an_unknown_tokenizer_is_answered_with_the_choices():
    with pytest.raises(ValueError, match="'gpt9'.*bytes, gpt2"):
        get_tokenizer("gpt9")


def test_gpt2_offline_names_the_cache_folder_in_one_line(monkeypatch):
    def offline(name):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(ValueError, match="TIKTOKEN_CACHE_DIR.*--tokenizer bytes") as error:
        get_tokenizer("gpt2")
    assert "\n" not in str(error.value)


def test_a_folder_remembers_its_tokenizer_and_what_else_its_meta_said(tmp_path):
    (tmp_path / "meta.json").write_text('{"kind": "text"}')
    save_tokenizer(BYTES, tmp_path)
    assert load_tokenizer(tmp_path).name == "bytes"
    assert json.loads((tmp_path / "meta.json").read_text()) == {"kind": "text", "tokenizer": "bytes"}


@pytest.mark.parametrize("content", [None, "{", "[]", "{}", '{"tokenizer": 3}', b"\xff"])
def test_a_missing_or_damaged_meta_is_one_clear_line(tmp_path, content):
    if content is not None:
        (tmp_path / "meta.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match="meta.json") as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


# --- prepare: the split ---------------------------------------------------------------------------


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
    assert (documents(tmp_path / "out", "train"), documents(tmp_path / "out", "val")) == ([text[:cut]], [text[cut:]])


def test_the_tail_split_of_pairs_takes_the_last_ones(tmp_path):
    records = [{"prompt": str(i), "response": "r"} for i in range(20)]
    prepare(write_jsonl(tmp_path / "a.jsonl", records), tmp_path / "out", split="tail")
    assert [prompt for prompt, _ in examples(tmp_path / "out", "val")] == ["18", "19"]


@pytest.mark.parametrize("text", ["hello world\n" * 400, "one paragraph\n\n" * 1000, "a" * 300, "ab", "漢字\n\n"])
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
    kept = documents(tmp_path / "out", "train") + documents(tmp_path / "out", "val")
    assert min(meta["documents"].values()) >= 1
    assert max(map(len, kept)) <= 2 * 4096 or meta["split"] == "tail"
    assert sum(len(t.replace("\n", "")) for t in kept) == len(text.replace("\n", ""))


# --- prepare: kinds -------------------------------------------------------------------------------


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


def test_pydoc_rejects_another_functions_docstring(tmp_path, small_library):
    prepare("pydoc-dpo", tmp_path / "dpo")
    prepare("pydoc-sft", tmp_path / "sft")
    for half in ("train", "val"):
        pairs, stored = set(examples(tmp_path / "sft", half)), examples(tmp_path / "dpo", half)
        responses = {response for _, response in pairs}
        assert stored and set(stored[::2]) <= pairs
        assert all(no in responses and no != yes for (_, yes), (_, no) in zip(stored[::2], stored[1::2]))


def test_a_docstring_to_be_predicted_is_not_in_the_text_trained_on(tmp_path, small_library):
    prepare("pydoc", tmp_path / "text")
    prepare("pydoc-sft", tmp_path / "sft")
    train = "\n\n".join(documents(tmp_path / "text", "train"))
    pairs = examples(tmp_path / "sft", "val")
    assert pairs and not [response for _, response in pairs if len(response) > 40 and response in train]
    assert all(re.match(r"# [\w.]+\n(async )?def \w+\(.*\n$", prompt) for prompt, _ in pairs)


def test_a_large_vocabulary_is_stored_in_32_bits(tmp_path, monkeypatch):
    ranks = {bytes([i]): i for i in range(256)}
    big = tiktoken.Encoding("big", pat_str="(?s:.)", mergeable_ranks=ranks, special_tokens={END: 70_000})
    monkeypatch.setattr(data.prepare, "get_tokenizer", lambda name: big)
    (tmp_path / "a.txt").write_text("text " * 100)
    assert prepare(tmp_path / "a.txt", tmp_path / "out")["dtype"] == "uint32"
    assert Loader(tmp_path / "out", "train", 2, 8).tokens[-1] == 70_000


# --- prepare: sources -----------------------------------------------------------------------------


def test_zipped_marked_and_crlf_files_read_like_the_plain_file(tmp_path):
    text = "".join(f"paragraph {i}\n\n" for i in range(100))
    raw = text.encode()
    (tmp_path / "plain.md").write_bytes(raw)
    (tmp_path / "dos.txt").write_bytes(b"\xef\xbb\xbf" + raw.replace(b"\n", b"\r\n"))
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep" / "er" / "a.jsonl.gz").write_bytes(gzip.compress(json.dumps({"text": text}).encode()))
    (tmp_path / "deep" / "b.txt.gz").write_bytes(gzip.compress(b"second document"))
    (tmp_path / "deep" / "ignored.png").write_bytes(b"\xff")
    for name in ("plain.md", "dos.txt"):
        prepare(tmp_path / name, tmp_path / "out" / name, split="tail")
    assert documents(tmp_path / "out" / "plain.md", "train") == documents(tmp_path / "out" / "dos.txt", "train")
    prepare(tmp_path / "deep", tmp_path / "out" / "deep")
    both = documents(tmp_path / "out" / "deep", "train") + documents(tmp_path / "out" / "deep", "val")
    assert "".join(both) == "second document" + text  # two documents are too few for chance: the tail is cut off


def test_a_url_is_fetched_and_a_failure_says_to_pass_a_path(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: io.BytesIO(b"to be or not to be\n\n" * 30))
    assert main(["https://example.org/play", "--out", str(tmp_path / "a")]) == 0

    def refuse(url, timeout):
        raise OSError("name not resolved")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    assert main(["shakespeare", "--out", str(tmp_path / "b")]) == 1
    error = capsys.readouterr().err.strip()
    assert "tinyshakespeare" in error and "give its path" in error and "\n" not in error


@pytest.mark.parametrize(
    "line, complaint",
    [
        ("{bad", "not JSON"),
        ("[1]", "fields"),
        ('{"prompt": "p"}', r"\['prompt'\].*prompt, response"),
        ('{"text": 5}', "'text' is int"),
        ('{"prompt": "p", "response": null}', "'response' is NoneType"),
        ('{"prompt": "p", "response": "r"}', "supervised data, but what came before it is text"),
    ],
)
def test_a_bad_json_line_is_named_by_its_number(tmp_path, line, complaint):
    (tmp_path / "a.jsonl").write_text(f'{{"text": "one"}}\n\n{line}\n')
    with pytest.raises(ValueError, match=f"a.jsonl, line 3.*{complaint}"):
        prepare(tmp_path / "a.jsonl", tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl"]


def test_a_file_that_is_not_utf8_is_named_with_the_byte(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"abc\ndef\xe9 ghi\n")
    with pytest.raises(ValueError, match="a.txt is not UTF-8 at byte 7.*iconv"):
        prepare(tmp_path / "a.txt", tmp_path / "out")


@pytest.mark.parametrize(
    "name, content, complaint",
    [
        ("a.txt", b"", "no text"),
        ("a.txt", b"\n \n", "no text"),
        ("a.jsonl", b'{"prompt": "alone", "response": "r"}', "too little"),
        ("a.txt", b"a", "too little"),
        ("a.txt.gz", gzip.compress(b"text " * 999, mtime=0)[:-20], "damaged .gz"),
        ("a.txt.gz", b"not zipped", "damaged .gz"),
        ("a.pdf", b"%PDF", "rename or convert"),
        ("folder/a.pdf", b"%PDF", "holds no .txt"),
    ],
)
def test_an_unusable_source_is_one_clear_line_and_leaves_nothing(tmp_path, capsys, name, content, complaint):
    (tmp_path / "in" / name).parent.mkdir(parents=True)
    (tmp_path / "in" / name).write_bytes(content)
    source = tmp_path / "in" / name.split("/")[0]
    assert main([str(source), "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err.strip()
    assert complaint in error and "\n" not in error and [p.name for p in tmp_path.iterdir()] == ["in"]


def test_lone_surrogates_in_json_do_not_stop_it(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": f"\ud800 {i}"} for i in range(30)])
    assert sum(prepare(source, tmp_path / "out")["documents"].values()) == 30


# --- prepare: the folder --------------------------------------------------------------------------


@pytest.fixture
def text_file(tmp_path) -> Path:
    (tmp_path / "a.txt").write_text("some words and\n\n" * 100)
    return tmp_path / "a.txt"


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


@pytest.mark.parametrize("names", [["thesis.txt"], ["train.bin"], ["meta.json", "model.safetensors"]])
def test_a_folder_with_other_things_is_never_destroyed(tmp_path, text_file, names):
    (tmp_path / "out").mkdir()
    for name in names:
        (tmp_path / "out" / name).write_text("precious")
    with pytest.raises(ValueError, match="choose another --out"):
        prepare(text_file, tmp_path / "out", overwrite=True)
    assert [(tmp_path / "out" / name).read_text() for name in names] == ["precious"] * len(names)


@pytest.mark.parametrize("before", [False, True])
def test_a_broken_off_run_changes_nothing(tmp_path, text_file, monkeypatch, before):
    if before:
        prepare(text_file, tmp_path / "out")
    files = sorted(tmp_path.rglob("*"))

    def killed(*args):
        assert (tmp_path / "out").exists() == before  # nothing under the final name while it is being written
        raise KeyboardInterrupt

    monkeypatch.setattr(data.prepare, "save_tokenizer", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare(text_file, tmp_path / "out", overwrite=True)
    assert sorted(tmp_path.rglob("*")) == files


def test_a_full_disk_is_one_clear_line(tmp_path, text_file, monkeypatch, capsys):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(data.prepare, "_write", full)
    assert main([str(text_file), "--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err == "data.prepare: [Errno 28] No space left on device\n"


@pytest.mark.parametrize("how", [["-m", "data.prepare"], ["data/prepare.py"]])
def test_the_script_runs_both_ways(tmp_path, text_file, how):
    root = Path(__file__).parent.parent
    command = [sys.executable, *how, str(text_file), "--out", str(tmp_path / "out"), "--val-fraction", "0.3"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0 and "train" in done.stdout and not done.stderr


@pytest.mark.parametrize("bad", [{"val_fraction": 0}, {"val_fraction": 1.5}, {"split": "middle"}])
def test_impossible_settings_are_refused(tmp_path, text_file, bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        prepare(text_file, tmp_path / "out", **bad)


# --- loader: text ---------------------------------------------------------------------------------


def starts(loader: Loader, steps: range) -> list[int]:
    """Where the crops of these steps start, in order."""
    return [int(start) for i in steps for batch in loader.step(i)[0] for start in batch.x[:, 0]]


def test_targets_are_the_next_tokens(tmp_path):
    batch = Loader(numbered(tmp_path / "d", 1000), "train", 4, 16).step(5)[0][0]
    assert batch.x.shape == batch.y.shape == batch.mask.shape == (4, 16)
    assert (batch.x.dtype, batch.y.dtype, batch.mask.dtype) == (torch.int64, torch.int64, torch.float32)
    assert torch.equal(batch.x, batch.x[:, :1] + torch.arange(16)) and torch.equal(batch.y, batch.x + 1)
    assert batch.mask.all()


@pytest.mark.parametrize("length, T", [(1000, 16), (17, 16), (33, 16), (31, 16), (100, 1), (2, 1)])
def test_an_epoch_visits_every_block_once(tmp_path, length, T):
    loader = Loader(numbered(tmp_path / "d", length), "train", 1, T)
    n = loader.n
    for epoch in range(3):
        visited = sorted(starts(loader, range(epoch * n, (epoch + 1) * n)))
        assert visited == list(range(visited[0], visited[0] + n * T, T))


def test_every_offset_of_the_grid_comes_once_before_any_comes_again(tmp_path):
    loader = Loader(numbered(tmp_path / "d", 50), "train", 1, 8)
    crops = starts(loader, range(loader.n * loader.n_offsets))
    assert sorted(crops) == list(range(loader.n * 8))  # every crop that there is, once


def test_two_ranks_never_share_a_crop(tmp_path):
    folder = numbered(tmp_path / "d", 1000)
    ranks = [Loader(folder, "train", 3, 16, rank=r, world_size=2, accum=2) for r in range(2)]
    steps = range(ranks[0].n // 12)  # a whole epoch
    crops = [start for loader in ranks for start in starts(loader, steps)]
    assert len(set(crops)) == len(crops)
    for i in range(100):  # and within every step, one that ends an epoch too
        crops = starts(ranks[0], range(i, i + 1)) + starts(ranks[1], range(i, i + 1))
        assert len(set(crops)) == 12


@pytest.mark.parametrize("kind", ["text", "supervised", "preference"])
def test_two_ranks_see_the_rows_of_one_process_with_the_doubled_batch(tmp_path, request, kind):
    folder = numbered(tmp_path / "d", 500) if kind == "text" else request.getfixturevalue(kind)
    one = Loader(folder, "train", 6, 16, seed=3, accum=2)
    two = [Loader(folder, "train", 3, 16, seed=3, rank=r, world_size=2, accum=2) for r in range(2)]
    for i in range(20):
        whole, n = one.step(i)
        parts = [loader.step(i) for loader in two]
        assert [count for _, count in parts] == [n, n]
        if kind != "preference":
            assert n == sum(float(batch.mask.sum()) for batch in whole)
        for micro, batch in enumerate(whole):
            for name in ("x", "y", "mask"):
                halves = [getattr(part[micro], name) for part, _ in parts]
                if kind == "preference":  # (2B, T): chosen, then rejected
                    halves = [half.unflatten(0, (2, 3)) for half in halves]
                    assert torch.equal(torch.cat(halves, 1).flatten(0, 1), getattr(batch, name))
                else:
                    assert torch.equal(torch.cat(halves), getattr(batch, name))


def test_resuming_is_asking_for_the_next_step(tmp_path):
    folder = numbered(tmp_path / "d", 1000)
    straight, resumed, other = (Loader(folder, "train", 4, 16, seed=s) for s in (1, 1, 2))
    expected = [starts(straight, range(i, i + 1)) for i in range(40)]
    assert [starts(resumed, range(i, i + 1)) for i in range(25, 40)] == expected[25:]
    assert [starts(other, range(i, i + 1)) for i in range(40)] != expected


# --- loader: examples -----------------------------------------------------------------------------


def test_an_epoch_visits_every_example_at_most_once_and_all_that_fill_batches(supervised):
    loader = Loader(supervised, "train", 4, 64)
    for epoch in range(2):
        per_epoch = loader.n // 4
        seen = [row for i in range(per_epoch) for row in rows(loader.step(epoch * per_epoch + i)[0][0])]
        assert len(set(seen)) == len(seen) == per_epoch * 4 > loader.n - 4


def test_batches_of_examples_learn_exactly_the_responses(supervised):
    loader = Loader(supervised, "train", 4, 64)
    pairs = dict(examples(supervised, "train"))
    for i in range(10):
        batch = loader.step(i)[0][0]
        for x, y, mask in zip(batch.x, batch.y, batch.mask.bool()):
            learnt = y[mask].tolist()
            prompt = BYTES.decode(x[1 : int(mask.nonzero()[0]) + 1].tolist())
            assert learnt[-1] == EOT and BYTES.decode(learnt[:-1]) == pairs[prompt]
            assert (x[int(mask.nonzero()[-1]) + 1 :] == EOT).all()  # padding


def test_rows_are_padded_to_the_longest_and_no_further(supervised):
    batch = Loader(supervised, "train", 4, 64).step(0)[0][0]
    assert max(len(row) for row in rows(batch)) == batch.x.shape[1] + 1


def test_long_examples_are_cut_on_the_right_and_those_without_targets_left_out(tmp_path):
    records = [{"prompt": "p" * i, "response": "response"} for i in range(40)]
    prepare(write_jsonl(tmp_path / "a.jsonl", records), tmp_path / "out")
    loader = Loader(tmp_path / "out", "train", 1, 10)
    stored = [p for p, _ in examples(tmp_path / "out", "train")]
    assert loader.n == sum(len(p) < 10 for p in stored)  # <|endoftext|> + prompt + one token fit into 10 + 1
    for i in range(loader.n):
        batch = loader.step(i)[0][0]
        assert batch.x.shape[1] <= 10 and batch.mask.sum() > 0
    with pytest.raises(ValueError, match="no example .* block_size 1"):
        write_jsonl(tmp_path / "b.jsonl", records[5:])
        prepare(tmp_path / "b.jsonl", tmp_path / "long")
        Loader(tmp_path / "long", "train", 1, 1)


def test_preference_batches_hold_the_chosen_first(preference):
    loader = Loader(preference, "train", 3, 64)
    for i in range(8):
        (batch,), n = loader.step(i)
        texts = [BYTES.decode(y[m].tolist()[:-1]) for y, m in zip(batch.y, batch.mask.bool())]
        assert n == 3 and batch.x.shape[0] == 6
        assert all(t.startswith("good") for t in texts[:3]) and all(t.startswith("bad") for t in texts[3:])


# --- loader: evaluation ---------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("kind", ["text", "supervised", "preference"])
def test_windows_give_the_whole_split_once_over_ranks_of_equal_shapes(tmp_path, request, kind, world):
    folder = numbered(tmp_path / "d", 100, 77) if kind == "text" else request.getfixturevalue(kind)
    split = "val" if kind == "text" else "train"
    ranks = [list(Loader(folder, split, 2, 16, rank=r, world_size=world).windows()) for r in range(world)]
    shapes = [[batch.x.shape for batch in batches] for batches in ranks]
    assert all(s == shapes[0] for s in shapes)
    got = [row for batches in ranks for batch in batches for row in rows(batch)]
    if kind == "text":
        targets = [int(t) for bs in ranks for b in bs for t in b.y[b.mask.bool()]]
        assert sorted(targets) == list(range(1, 77))
    else:
        tokens, index = (np.fromfile(folder / f"train{end}.bin", t) for end, t in (("", np.uint16), (".idx", np.int64)))
        cut = [tuple(tokens[a:b][:17].tolist()) for a, b in zip(index[:-1], index[1:])]
        assert sorted(got) == sorted(cut)


def test_max_tokens_limits_the_evaluation_over_all_ranks(tmp_path, supervised):
    folder = numbered(tmp_path / "d", 100, 1000)
    for limit, expected in ((100, 96), (96, 96), (95, 80), (1, 16), (10**9, 999)):
        ranks = [Loader(folder, "val", 2, 16, rank=r, world_size=2).windows(limit) for r in range(2)]
        assert sum(float(b.mask.sum()) for batches in ranks for b in batches) == expected
    total = sum(float(b.mask.sum()) for b in Loader(supervised, "train", 2, 64).windows(100))
    assert 85 < total <= 100


def test_a_validation_half_smaller_than_a_block_can_still_be_evaluated(tmp_path):
    loader = Loader(numbered(tmp_path / "d", 1000, 10), "val", 8, 64)
    assert sum(float(b.mask.sum()) for b in loader.windows()) == 9
    with pytest.raises(ValueError, match="block_size of at most 9"):
        loader.step(0)


# --- loader: refusals -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, complaint",
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"block_size": -3}, "block_size is -3"),
        ({"accum": 0}, "accum is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"rank": 2, "world_size": 2}, "rank is 2"),
        ({"block_size": 100}, "block_size of at most 99"),
        ({"batch_size": 89, "world_size": 9}, "801 .*smaller batch_size"),
        ({"split": "test"}, "meta.json.*'test'"),
    ],
)
def test_impossible_loaders_are_refused_with_the_remedy(tmp_path, settings, complaint):
    folder = numbered(tmp_path / "d", 100)
    with pytest.raises(ValueError, match=complaint):
        Loader(folder, **{"split": "train", "batch_size": 1, "block_size": 8, **settings})


def test_fewer_examples_than_a_global_batch_are_refused(supervised):
    n = Loader(supervised, "train", 1, 64).n
    with pytest.raises(ValueError, match=f"{n} different rows, but one step takes 100"):
        Loader(supervised, "train", 25, 64, world_size=2, accum=2)


def test_a_token_outside_the_vocabulary_is_named(tmp_path):
    folder = numbered(tmp_path / "d", 301)
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({**meta, "vocab_size": 257}))
    with pytest.raises(ValueError, match="token 300 outside the vocabulary of 257 in .*train.bin.*data.prepare"):
        list(Loader(folder, "train", 1, 300).windows())


@pytest.mark.parametrize("name", ["meta.json", "train.bin", "train.mask.bin", "train.idx.bin"])
@pytest.mark.parametrize("damage", [None, b"", b"\0", b"{}\n"])
def test_a_damaged_folder_is_named_with_the_command_that_mends_it(supervised, name, damage):
    path = supervised / name
    path.unlink() if damage is None else path.write_bytes(path.read_bytes()[:-3] if damage == b"\0" else damage)
    with pytest.raises(ValueError, match=f"{name}.*python -m data.prepare") as error:
        Loader(supervised, "train", 2, 32)
    assert "\n" not in str(error.value)
