"""Mixtures: shares to within a row, and batches that step and seed alone decide."""

import json
import re
import signal
from collections import Counter
from fractions import Fraction
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from common import TINY, assert_same_run, metrics, newest, one_line, start, tiny  # noqa: F401   (fixture)
from common_bpe import CHATML, save, train as train_bpe
from common_data import numbered, preference, rows, supervised, write_jsonl  # noqa: F401   (fixtures)
from common_train import job, teacher, wait_for  # noqa: F401   (fixtures)
from data.loader import Loader
from data.mixture import Mixture, open_split
from data.prepare import prepare
from data.shares import Turns, folders_of, is_mixture, parts_of
from distill import distill
from lib.report import unigram_loss
from lib.runs import checkpoints
from tools import evaluate, passkey
from train import main

SHARES = [["0.7", "0.3"], ["1", "1", "1"], ["5", "3", "2", "0.01"], ["0.999", "0.001"], ["1"]]


def text(folder: Path, first: int, n: int, n_val: int = 90) -> Path:
    """Whose tokens are first, first + 1, ...; the held-out text's the same."""
    folder.mkdir()
    for half, size in (("train", n), ("val", n_val)):
        np.arange(first, first + size, dtype=np.uint16).tofile(folder / f"{half}.bin")
    meta = {"kind": "text", "tokenizer": "bytes", "dtype": "uint16", "vocab_size": 60000,
            "tokens": {"train": n, "val": n_val}}
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


@pytest.fixture
def mixed(tmp_path) -> str:
    """Of tokens below 10,000, seven in ten, and of those above."""
    return f"{text(tmp_path / 'a', 0, 1000)}:0.7,{text(tmp_path / 'b', 10000, 400)}:0.3"


def tokens(loader: Loader, steps: range) -> list[list[list[int]]]:
    return [[batch.x.tolist() for batch in loader.step(i)[0]] for i in steps]


# ------------------------------------------------------------------------------------------
# Whose turn it is

@pytest.mark.parametrize("shares", SHARES, ids=" ".join)
def test_any_number_of_rows_has_the_shares_to_within_a_row_and_any_place_can_be_asked_for(shares):
    total = sum(map(Fraction, shares))
    turns = Turns([Fraction(share) / total for share in shares])
    given = Counter()
    for k, (part, c) in enumerate(islice(turns.after(0), 2500)):
        assert turns.before(k) == [given[i] for i in range(len(shares))]
        assert all(abs(given[i] - share * k) <= 1 for i, share in enumerate(turns.shares))
        assert c == given[part]
        given[part] += 1
    assert list(islice(turns.after(1000), 50)) == list(islice(turns.after(0), 1050))[1000:]


def test_the_place_of_a_row_far_away_takes_no_longer():
    turns = Turns([Fraction(7, 10), Fraction(299, 1000), Fraction(1, 1000)])
    counts = turns.before(10**15 + 1)
    assert sum(counts) == 10**15 + 1 and abs(counts[2] - 10**12) <= 1


# ------------------------------------------------------------------------------------------
# Batches

def test_a_steps_rows_are_the_parts_own_in_their_order(mixed):
    mixture = Mixture(mixed, "train", 5, 16, seed=3, accum=2)
    parts = [Loader(folder, "train", 1, 16, seed=3) for folder in folders_of(mixed)]
    starts = [int(row[0]) for step in tokens(mixture, range(50)) for batch in step for row in batch]
    for part, low in zip(parts, (0, 10000)):
        own = [start for start in starts if low <= start < low + 10000]
        assert own == [int(part.step(i)[0][0].x[0, 0]) for i in range(len(own))]
    assert sum(start < 10000 for start in starts) == 350
    batch = mixture.step(7)[0][1]
    assert torch.equal(batch.y, batch.x + 1) and batch.mask.all() and mixture.step(7)[1] == 160


def test_step_and_seed_alone_decide(mixed):
    one, again, other = (Mixture(mixed, "train", 4, 16, seed=seed) for seed in (1, 1, 2))
    expected = tokens(one, range(30))
    assert [tokens(again, range(i, i + 1))[0] for i in (20, 3, 29)] == [expected[i] for i in (20, 3, 29)]
    assert tokens(other, range(30)) != expected


@pytest.mark.parametrize("kind", ["text", "supervised", "preference"])
def test_two_ranks_see_the_rows_of_one_process(tmp_path, request, mixed, kind):
    data = mixed
    if kind != "text":
        folder = request.getfixturevalue(kind)
        source = tmp_path / ("pairs.jsonl" if kind == "supervised" else "choices.jsonl")
        records = [json.loads(line) for line in source.read_text().splitlines()[::2]]
        prepare(write_jsonl(tmp_path / "more.jsonl", records), tmp_path / "more")
        data = f"{folder}:2,{tmp_path / 'more'}:1"
    one = Mixture(data, "train", 6, 16, seed=3)
    accumulated = Mixture(data, "train", 3, 16, seed=3, accum=2)
    two = [Mixture(data, "train", 3, 16, seed=3, rank=r, world_size=2) for r in range(2)]
    for i in range(20):
        (whole,), n = one.step(i)
        halves = [loader.step(i) for loader in two]
        assert {n, accumulated.step(i)[1], *(count for _, count in halves)} == {n}
        assert n == (6 if kind == "preference" else float(whole.mask.sum()))
        got = [row for (batch,), _ in halves for row in rows(batch)]
        pieces = [row for batch in accumulated.step(i)[0] for row in rows(batch)]
        assert sorted(got) == sorted(pieces) == sorted(rows(whole)) and len(got) == len(whole.x)
        if kind == "preference":                # chosen, then rejected, of every rank
            chosen = [batch.x[:3] for (batch,), _ in halves]
            assert torch.equal(torch.cat(chosen), whole.x[:6])


@pytest.mark.parametrize("world", [1, 2, 3])
def test_held_out_rows_come_in_their_shares_each_once_until_a_part_has_no_more(mixed, world):
    ranks = [list(Mixture(mixed, "val", 2, 8, rank=r, world_size=world).windows()) for r in range(world)]
    shapes = [[batch.x.shape for batch in batches] for batches in ranks]
    assert all(shape == shapes[0] for shape in shapes)
    targets = [int(t) for batches in ranks for b in batches for t in b.y[b.mask.bool()]]
    ours = sum(target < 10000 for target in targets)
    assert len(set(targets)) == len(targets) and ours == 89         # all that the first part has
    assert abs((len(targets) - ours) / len(targets) - 0.3) < 0.04
    few = [b for r in range(world)
           for b in Mixture(mixed, "val", 2, 8, rank=r, world_size=world).windows(50)]
    assert sum(float(b.mask.sum()) for b in few) == 48


def test_frequencies_of_tokens_are_weighted_by_the_shares(mixed):
    counts = Mixture(mixed, "train", 1, 8).counts()
    assert counts[:10000].sum() == pytest.approx(0.7 * 1400) and counts.sum() == pytest.approx(1400)
    assert np.isfinite(unigram_loss(*(Mixture(mixed, half, 1, 8) for half in ("train", "val"))))


# ------------------------------------------------------------------------------------------
# What --data says

def test_a_folder_is_a_folder_whatever_its_name(tmp_path):
    for name in ("a:0.5", "a,b", "a:1,b:1"):
        folder = numbered(tmp_path / name, 100)
        assert not is_mixture(folder) and folders_of(folder) == [str(folder)]
        assert type(open_split(folder, "train", 1, 8)) is Loader
    assert not is_mixture("data/none") and not is_mixture("s3://bucket/a") and is_mixture("data/none:1")


def test_names_may_hold_commas_and_colons(tmp_path):
    assert parts_of("x,y:z:0.5,b:1.5") == {"x,y:z": Fraction(1, 4), "b": Fraction(3, 4)}


@pytest.mark.parametrize("data, says", [
    ("a:0.7,b", "lacks shares"), ("a,b", "lacks shares"), ("a:x,b:1", "share of a is 'x'"),
    ("a:-1,b:1", "share of a is '-1'"), ("a:0,b:1", "share of a is '0'"), ("a:nan,b:1", "'nan'"),
    ("a:1e9,b:1", "'1e9'"), ("a:,b:1", "share of a is ''"), (":1,b:1", "without a name"),
    ("a:1,a:2", "twice"), ("a:1,./a:2", "twice"), ("a:1,none:1", "no data at none"),
    ("a:1,sft:1", "kind is text and supervised"), ("a:1,words:1", "vocab_size is 60000 and 501"),
    ("a:1,other:1", "tokenizer is bytes and gpt2"), ("a:1,tiny:1", "tiny/train.bin has 20 tokens"),
    ("a:1,b:1,few:1", "few/train.bin has 9 different rows, but one step takes 14 .*share 0.333"),
])
def test_what_does_not_mix_is_refused_in_one_line(tmp_path, monkeypatch, supervised, data, says):
    monkeypatch.chdir(tmp_path)
    for name, n in (("a", 500), ("b", 500), ("words", 500), ("other", 500), ("tiny", 20), ("few", 41)):
        text(tmp_path / name, 0, n)
    for name, key, value in (("words", "vocab_size", 501), ("other", "tokenizer", "gpt2")):
        path = tmp_path / name / "meta.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(ValueError, match=says) as error:
        main(["--data", data, "--out", "out", "--device", "cpu", "--batch_size", "40", *TINY,
              "--block_size", "32"])
    one_line(error.value)
    assert not Path("out").exists()


def test_two_chat_templates_of_one_vocabulary_do_not_mix_but_a_folder_of_before_mixes(tmp_path):
    records = [{"prompt": f"{i}?", "response": "yes"} for i in range(60)]
    source, original = write_jsonl(tmp_path / "a.jsonl", records), train_bpe(text="a book " * 99)
    for name, template in (("one", CHATML), ("two", CHATML.replace("Be kind.", "Obey."))):
        model = save(original, tmp_path / f"{name}-model", chat_template=template)
        prepare(source, tmp_path / name, str(model))
    data = f"{tmp_path / 'one'}:1,{tmp_path / 'two'}:1"
    with pytest.raises(ValueError, match="one and .*two do not mix: their chat templates") as error:
        Mixture(data, "train", 2, 512)
    one_line(error.value)
    path = tmp_path / "two" / "meta.json"
    meta = json.loads(path.read_text())
    path.write_text(json.dumps({key: meta[key] for key in meta if key not in ("frames", "blocks", "digest")}))
    assert len(Mixture(data, "train", 2, 512).parts) == 2


# ------------------------------------------------------------------------------------------
# Runs

def flags(tiny, more: Path) -> list[str]:
    return ["--data", f"{tiny.text}:0.7,{more}:0.3", *TINY, "--mixer", "r", "--device", "cpu",
            "--batch_size", "3", "--schedule", "constant", "--eval_tokens", "200", "--save_every", "10",
            "--log_every", "5"]


@pytest.fixture(scope="module")
def more(tmp_path_factory) -> Path:
    """A second text."""
    folder = tmp_path_factory.mktemp("more")
    (folder / "more.txt").write_text("\n\n".join(f"{i} times {i} is {i * i}." for i in range(400)))
    prepare(folder / "more.txt", folder / "more")
    return folder / "more"


def test_a_run_over_a_mixture_killed_by_sigkill_resumes_to_what_it_would_have_been(tiny, more, tmp_path,
                                                                                   capsys):
    """It could go on for ever; both others end midway after its last checkpoint."""
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    process = start("train.py", *flags(tiny, more), "--max_steps", "1000000", "--out", broken)
    wait_for(lambda: any(int(p.name[5:]) >= 20 for p in checkpoints(broken)), process)
    process.kill()
    err = process.communicate()[1]
    assert process.returncode == -signal.SIGKILL, err                     # it was still running
    end = ["--max_steps", str(int(newest(broken).name[5:]) + 15)]
    main([*flags(tiny, more), *end, "--out", str(broken), "--resume"])
    main([*flags(tiny, more), *end, "--out", str(whole)])
    assert_same_run(broken, whole)
    said = capsys.readouterr().out
    assert f"{tiny.text}: 70.00% of the rows; " in said
    assert re.search(rf"{more} was read \d+\.\d\d times", said)
    row = metrics(whole)[-1]
    n = Loader(more, "train", 1, 16).n
    assert row["epochs"][str(more)] == pytest.approx(round(0.3 * 3 * row["step"]) / n, abs=1 / n)


def test_a_run_over_other_data_or_shares_is_not_resumed_nor_what_it_reads_replaced(tiny, more, tmp_path):
    args = [*flags(tiny, more), "--out", str(tmp_path / "out")]
    main([*args, "--max_steps", "1"])
    other = tmp_path / "other"
    other.symlink_to(tiny.text)
    same = f"{other}:7,{more}:3"                                          # in other words
    main([*args, "--max_steps", "2", "--resume", "--data", same])
    for data in (f"{tiny.text}:0.6,{more}:0.4", tiny.text, f"{more}:0.7,{tiny.text}:0.3"):
        with pytest.raises(ValueError, match="was started with") as error:
            main([*args, "--max_steps", "3", "--resume", "--data", data])
        one_line(error.value)
    with pytest.raises(ValueError, match="is read by this run and would be replaced"):
        main([*flags(tiny, more), "--out", str(more), "--overwrite"])
    with pytest.raises(ValueError, match="streams .bptt_truncate. are for one folder") as error:
        main([*flags(tiny, more), "--out", str(tmp_path / "s"), "--bptt_truncate"])
    one_line(error.value)


def test_a_distillation_reads_mixtures_in_all_its_stages_and_passkey_refuses_one(job, tiny, more, tmp_path):
    data, answers = f"{tiny.text}:0.7,{more}:0.3", f"{tiny.sft}:1,{more.parent / 'sft'}:1"
    pairs = [{"prompt": f"{i}: ", "response": str(i * i)} for i in range(60)]
    prepare(write_jsonl(more.parent / "sft.jsonl", pairs), more.parent / "sft")
    cfg = job("out", data=data, finish_data=answers)
    report = distill(cfg)
    assert [row["name"] for row in report["stages"]] == ["start", "align", "match", "finish"]
    for stage, parts in (("match", data), ("finish", answers)):
        assert list(metrics(tmp_path / "out" / stage)[-1]["epochs"]) == folders_of(parts)
    evaluate.main(["--teacher", cfg.teacher, "--data", data, "--student", "None", "--device", "cpu"])
    with pytest.raises(ValueError, match="is a mixture: .* read one folder") as error:
        passkey.main(["--teacher", cfg.teacher, "--data", data, "--student", "None", "--longest", "2"])
    one_line(error.value)
