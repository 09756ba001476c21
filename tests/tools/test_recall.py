"""Recall of pairs: the task is what it says; known models have known scores."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import tools.recall
from common import one_line
from common_models import Oracle
from config import cli
from data.loader import Loader
from model import ModelConfig
from tools.recall import (KEYS, VALUES, RecallConfig, as_markdown, pairs_accuracy, pairs_sequence,
                          recall, write_pairs)
from train import FitConfig


def key_of(pair: int) -> int:
    return (pair - KEYS) // VALUES


def remember(row):
    """The pair with the last token's key, if it is a question and the pair was told."""
    told = [p for p in row if KEYS <= p < 256 and row[-1] < KEYS and key_of(p) == row[-1]]
    return told[0] if told else 0


def forget(row):
    """The same without the first two pairs."""
    return remember(row[:1] + row[3:])


def guess(row):
    """The first value, whatever was told."""
    return KEYS + VALUES * row[-1] if row[-1] < KEYS else 0


@pytest.mark.parametrize("n", [1, 5, KEYS])
def test_every_key_of_a_sequence_is_told_once_and_asked_once_and_its_answer_is_what_was_told(n):
    tokens, mask = pairs_sequence(n, np.random.default_rng(n))
    told, asked, answers = tokens[1 : n + 1], tokens[n + 1 :: 2], tokens[n + 2 :: 2]
    assert len(tokens) == len(mask) == 3 * n + 1 and tokens[0] == 256 and max(tokens[1:]) < 256
    assert sorted(asked) == sorted(map(key_of, told)) and len(set(asked)) == n and max(asked) < KEYS
    assert sorted(answers) == sorted(told) and list(map(key_of, answers)) == asked
    assert [i for i, m in enumerate(mask) if m] == list(range(n + 2, 3 * n + 1, 2))


def test_a_model_that_remembers_has_all_right_and_one_that_guesses_a_seventh():
    assert pairs_accuracy(Oracle(remember), 8, 100) == 1
    assert abs(pairs_accuracy(Oracle(guess), 8, 100) - 1 / VALUES) < 0.05
    assert pairs_accuracy(Oracle(forget), 8, 100) == 1 - 2 / 8


def test_the_written_folder_is_one_that_every_loader_reads(tmp_path):
    cfg = RecallConfig(pairs="2,5", examples=50, asked=10)
    write_pairs(tmp_path, cfg)
    for half, n in (("train", 50), ("val", 64)):
        loader = Loader(tmp_path, half, 5, cfg.model.block_size)
        assert loader.kind == "supervised" and loader.n == n
        right, targets = 0, 0
        for batch in loader.windows():
            rows = batch.x.tolist()
            answers = torch.tensor([[remember(row[: i + 1]) for i in range(len(row))] for row in rows])
            right, targets = right + ((answers == batch.y) * batch.mask).sum(), targets + batch.mask.sum()
        assert right == targets > 0
    train, val = (Loader(tmp_path, half, 5, 96).tokens.tolist() for half in ("train", "val"))
    assert train != val


def test_the_script_trains_distils_asks_and_writes_its_report(tmp_path, capsys):
    flags = ["--out", tmp_path, "--pairs", "2,4", "--examples", 40, "--asked", 8, "--mixers", "all first:1",
             "--model.n_embd", 24, "--model.n_head", 2]        # rwkv_head_size stays 32, which no student has
    for stage in ("teacher_fit", "align", "match"):
        flags += [f"--{stage}.max_steps=2", f"--{stage}.batch_size=4"]
    tools.recall.main([str(x) for x in flags])
    report = json.loads((tmp_path / "recall.json").read_text())
    models = report["models"]
    assert list(models) == ["teacher", "all", "first:1"]
    assert [m["mixers"] for m in models.values()] == ["aa", "rr", "ra"]
    assert report["pairs"] == [2, 4]
    assert all(len(m["accuracy"]) == len(m["bytes"]) == 2 for m in models.values())
    assert models["all"]["bytes"][0] == models["all"]["bytes"][1] < models["teacher"]["bytes"][1]
    text = as_markdown(report)
    assert (tmp_path / "recall.md").read_text(encoding="utf-8") == text and text in capsys.readouterr().out
    assert (tmp_path / "recall.png").read_bytes().startswith(b"\x89PNG")


def test_one_that_was_interrupted_goes_on_and_ends_as_one_that_was_not(tmp_path, monkeypatch, capsys):
    """With the flag that the line after Ctrl-C names; nothing is done twice."""
    def interrupted(cfg):
        if cfg.student.mixer == "first:1":
            raise KeyboardInterrupt
        return real(cfg)

    out = tmp_path / "a"
    flags = ["--out", out, "--pairs", 2, "--examples", 40, "--asked", 8, "--mixers", "all first:1",
             "--model.n_embd", 16, "--model.n_head", 2]
    for stage in ("teacher_fit", "align", "match"):
        flags += [f"--{stage}.max_steps=2", f"--{stage}.batch_size=4"]
    flags = [str(x) for x in flags]
    cfg = cli(RecallConfig, flags)
    whole, real = recall(replace(cfg, out=str(tmp_path / "b"))), tools.recall.distill
    recall(replace(cfg, seed=1, mixers="first:1"))         # an earlier one in its place, with another teacher
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tools.recall, "distill", interrupted)
        recall(cfg)
    done = [cfg.folders[name] / "model.safetensors" for name in ("teacher", "all")]
    before, _ = [file.read_bytes() for file in done], capsys.readouterr()
    tools.recall.main([*flags, "--resume"])
    assert json.loads((out / "recall.json").read_text()) == whole
    assert capsys.readouterr().out.count("no step is left") == 1           # of the teacher
    assert [file.read_bytes() for file in done] == before


def test_data_that_a_killed_process_was_writing_are_written_again(tmp_path, monkeypatch):
    def killed(*args):
        raise KeyboardInterrupt

    cfg = RecallConfig(pairs="2", examples=8, asked=4)
    write_pairs(tmp_path / "whole", cfg)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tools.recall, "pairs_sequence", killed)
        write_pairs(tmp_path / "data", cfg)
    assert tools.recall.is_recall(tmp_path / "data" / "meta.json")        # so that the place is ours
    write_pairs(tmp_path / "data", cfg)
    whole, data = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
                   for name in ("whole", "data"))
    assert data == whole


def test_bad_input_ends_in_one_clear_line():
    """Before the first step of training."""
    for change, words in (({"pairs": "0"}, "from 1 to 32"), ({"pairs": "33"}, "from 1 to 32"),
                          ({"pairs": "x"}, "from 1"), ({"pairs": "9" * 5000}, "from 1"),
                          ({"mixers": ""}, "mixers is empty"),
                          ({"model": ModelConfig(n_layer=2, block_size=16)}, "block_size"),
                          ({"mixers": "most"}, "first:K"), ({"mixers": "a"}, "replaces no layer"),
                          ({"model": ModelConfig(mixer="r")}, "the teacher is all attention, so omit it"),
                          ({"align": FitConfig(bptt_chunk=4)}, "align.bptt_chunk"),
                          ({"examples": 0}, "at least 1"),
                          ({"asked": 0}, "at least 1"), ({"seed": -1}, "at least 0")):
        with pytest.raises(ValueError, match=words) as e:
            RecallConfig(**change)
        one_line(e.value)


def test_another_runs_teacher_and_data_are_not_replaced(tmp_path):
    """A folder is recall's where its data say so."""
    meta = tmp_path / "data" / "meta.json"
    for name in ("data", "teacher", "all"):
        (tmp_path / name).mkdir()
        for text in (None, "{", '{"source": "book.txt"}'):
            if text and name == "data":
                meta.write_text(text)
            with pytest.raises(ValueError, match="exists, and this command did not write it") as e:
                tools.recall.main(["--out", str(tmp_path), "--mixers", "all"])
            one_line(e.value)
        assert (tmp_path / name).is_dir() and meta.exists() == (name == "data")
        meta.unlink(missing_ok=True)
        (tmp_path / name).rmdir()
    meta.parent.mkdir()
    meta.write_text('{"source": "recall.py"}')
    assert tools.recall.is_recall(meta)
