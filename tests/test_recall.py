"""Recall of pairs: the task is what it says, its score agrees with models whose answers are known, bad input ends in one line."""

import json

import numpy as np
import pytest
import torch

import recall
from common import one_line
from data.loader import Loader
from model import ModelConfig
from recall import KEYS, VALUES, RecallConfig, as_markdown, pairs_accuracy, pairs_sequence, write_pairs
from test_evaluate import Oracle


def remember(row):
    """The pair with the last token's key, if it is a question and the pair was told."""
    told = [p for p in row if KEYS <= p < 256 and row[-1] < KEYS and (p - KEYS) // VALUES == row[-1]]
    return told[0] if told else 0


@pytest.mark.parametrize("n", [1, 5, KEYS])
def test_every_key_of_a_sequence_is_told_once_and_asked_once_and_its_answer_is_what_was_told(n):
    tokens, mask = pairs_sequence(n, np.random.default_rng(n))
    told, asked, answers = tokens[1 : n + 1], tokens[n + 1 :: 2], tokens[n + 2 :: 2]
    assert len(tokens) == len(mask) == 3 * n + 1 and tokens[0] == 256 and max(tokens[1:]) < 256
    assert sorted(asked) == sorted((p - KEYS) // VALUES for p in told) and len(set(asked)) == n and max(asked) < KEYS
    assert sorted(answers) == sorted(told) and [(p - KEYS) // VALUES for p in answers] == asked
    assert [i for i, m in enumerate(mask) if m] == list(range(n + 2, 3 * n + 1, 2))


def test_a_model_that_remembers_has_all_right_and_one_that_guesses_a_seventh():
    assert pairs_accuracy(Oracle(remember), 8, 100) == 1
    assert abs(pairs_accuracy(Oracle(lambda row: KEYS + VALUES * row[-1] if row[-1] < KEYS else 0), 8, 100) - 1 / VALUES) < 0.05
    forgets = lambda row: remember(row[:1] + row[3:])  # noqa: E731   the first two pairs
    assert pairs_accuracy(Oracle(forgets), 8, 100) == 1 - 2 / 8


def test_the_written_folder_is_one_that_every_loader_reads(tmp_path):
    cfg = RecallConfig(pairs="2,5", examples=50, asked=10)
    write_pairs(tmp_path, cfg)
    for half, n in (("train", 50), ("val", 64)):
        loader = Loader(tmp_path, half, 5, cfg.model.block_size)
        assert loader.kind == "supervised" and loader.n == n
        batches = list(loader.windows())
        right = sum(((torch.tensor([[remember(row[: i + 1]) for i in range(len(row))] for row in b.x.tolist()]) == b.y) * b.mask).sum() for b in batches)
        assert right == sum(b.mask.sum() for b in batches) > 0
    assert Loader(tmp_path, "train", 5, 96).tokens.tolist() != Loader(tmp_path, "val", 5, 96).tokens.tolist()


def test_the_script_trains_distils_asks_and_writes_its_report(tmp_path, capsys):
    flags = ["--out", tmp_path, "--pairs", "2,4", "--examples", 40, "--asked", 8, "--mixers", "all first:1", "--model.n_embd", 32, "--model.n_head", 2]
    flags += [f"--{stage}.{key}={value}" for stage in ("teacher_fit", "align", "distil") for key, value in (("max_steps", 2), ("batch_size", 4))]
    recall.main([str(x) for x in flags])
    report = json.loads((tmp_path / "recall.json").read_text())
    assert list(report["models"]) == ["teacher", "all", "first:1"] and [m["mixers"] for m in report["models"].values()] == ["aa", "rr", "ra"]
    assert report["pairs"] == [2, 4] and all(len(m["accuracy"]) == len(m["bytes"]) == 2 for m in report["models"].values())
    assert report["models"]["all"]["bytes"][0] == report["models"]["all"]["bytes"][1] < report["models"]["teacher"]["bytes"][1]
    assert (tmp_path / "recall.md").read_text() == as_markdown(report) and as_markdown(report) in capsys.readouterr().out
    assert (tmp_path / "recall.png").read_bytes().startswith(b"\x89PNG")


def test_bad_input_ends_in_one_clear_line():
    for change, says in (({"pairs": "0"}, "from 1 to 32"), ({"pairs": "33"}, "from 1 to 32"), ({"pairs": "x"}, "from 1"),
                         ({"model": ModelConfig(n_layer=2, block_size=16)}, "block_size"), ({"mixers": "most"}, "first:K"),
                         ({"examples": 0}, "at least 1"), ({"asked": 0}, "at least 1"), ({"seed": -1}, "at least 0")):
        with pytest.raises(ValueError, match=says) as e:
            RecallConfig(**change)
        one_line(e.value)
