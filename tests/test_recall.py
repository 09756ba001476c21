"""Recall and length: the tasks are what they say, their scores agree with models whose answers are known, bad input ends in one line."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import recall
from common import T, one_line, tiny, tiny_model  # noqa: F401
from data.loader import Loader
from data.tokenizer import get_tokenizer
from evaluate import compare
from model import ModelConfig, State, save_model
from recall import KEYS, VALUES, RecallConfig, lengths, pairs_accuracy, pairs_sequence, passkey, passkey_scores, run_length, write_pairs
from train import FitConfig

QUICK = FitConfig(max_steps=2, batch_size=4, save_every=None, eval_every=None)


class Oracle(torch.nn.Module):
    """Answers by a rule of all tokens so far: rule(list of ids) -> the next one. Its state is the list itself."""

    def __init__(self, rule):
        super().__init__()
        self.rule, self.head, self.one = rule, lambda x: x, torch.nn.Parameter(torch.zeros(1))

    def hidden(self, tokens, state=None):
        before = state.layers if state else [[] for _ in tokens]
        whole = [b + row for b, row in zip(before, tokens.tolist())]
        n = tokens.shape[1]
        best = torch.tensor([[self.rule(row[: len(row) - n + i + 1]) for i in range(n)] for row in whole])
        return 30.0 * torch.nn.functional.one_hot(best, 257), State(len(whole[0]), whole)

    forward = __call__ = hidden


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


def test_passkey_of_a_model_that_reads_it_is_exact_at_every_depth_and_free_only_where_told():
    enc, text = get_tokenizer("bytes"), np.full(5000, ord("x"), np.uint16)

    def rule(row):  # the digits behind "key is ", at their first place
        said = bytes(b for b in row if b < 256).decode()
        key = said.split("The pass key is ")[1][:5] if said.count("The pass key is ") > 1 else "#####"
        return ord((key + "....")[len(said.rpartition("The pass key is ")[2]) % 5])

    rows = passkey(Oracle(rule), enc, text, 300, 3, 4, 0)
    assert [row["depth"] for row in rows] == [0, 0.5, 1] and all(row["T"] == 300 and row["exact"] == 1 and row["nats"] < 1e-3 for row in rows)
    assert all(row["nats_without"] > 20 for row in rows)
    for bad, says in ((100, "no room"), (9000, "held-out text has 5000")):
        with pytest.raises(ValueError, match=says) as e:
            passkey(Oracle(rule), enc, text, bad, 3, 4, 0)
        one_line(e.value)


def test_every_passkey_text_has_the_length_it_says_with_the_key_at_its_depth(monkeypatch):
    enc, text, seen = get_tokenizer("bytes"), np.full(5000, ord("x"), np.uint16), []
    monkeypatch.setattr(recall, "passkey_scores", lambda model, *texts: seen.append(texts) or [{"exact": 0.0, "nats": 1.0}] * len(texts[0]))
    passkey(None, enc, text, 400, 3, 2, 0)
    assert all(len(p) + len(a) == 400 for prompts, answers in seen for p, a in zip(prompts, answers))
    for (prompts, answers), depth in zip(seen[1:], (0, 0.5, 1)):
        said = bytes(prompts[0][1:]).decode()
        before, _, after = said.partition(" The pass key is " + bytes(answers[0]).decode())
        assert before.count("x") == len(before) and after.rstrip().endswith("The pass key is") and abs(len(before) - depth * said.count("x" * 1)) <= 4
    assert "pass key is" in bytes(seen[0][0][0][1:]).decode() and bytes(seen[0][1][0]).decode() not in bytes(seen[0][0][0][1:]).decode()


@pytest.mark.parametrize("mixer", ["a", "r", "ra"])
def test_scores_read_in_pieces_are_those_of_one_pass(mixer):
    model = tiny_model(mixer=mixer).eval()
    rows = torch.randint(0, 256, (3, 606)).tolist()
    for prompts, answers in (([r[:600] for r in rows], [r[600:] for r in rows]), ([r[: 580 + i] for i, r in enumerate(rows)], [r[600:] for r in rows])):
        for prompt, answer, score in zip(prompts, answers, passkey_scores(model, prompts, answers)):
            logp = model(torch.tensor([prompt + answer]))[0][0, len(prompt) - 1 : -1].log_softmax(-1)
            assert score["nats"] == pytest.approx(-logp.gather(1, torch.tensor(answer)[:, None]).mean().item(), rel=1e-4)
            assert score["exact"] == float(logp.argmax(-1).tolist() == answer)


def test_loss_by_stretch_is_evaluates_loss_by_position(tiny):
    models = {"teacher": tiny_model(1).eval(), "student": tiny_model(mixer="r").eval()}
    result = run_length(RecallConfig(tasks="length", data=tiny.text, lengths=8, max_tokens=1024), models, T)
    assert result["T"] == T and all(len(losses) == 8 for losses in result["models"].values())
    whole = compare(*models.values(), Loader(tiny.text, "val", 1, 8 * T), 1024)["by_position"]
    for name, losses in result["models"].items():
        assert losses == pytest.approx(torch.tensor(whole[name]).view(8, T).mean(1).tolist(), rel=1e-4)


def test_lengths_double_and_attention_ends_at_its_learned_positions():
    assert [lengths(tiny_model(), 16, most) for most in (1, 3, 8)] == [[16], [16, 32], [16, 32, 64, 128]]
    assert lengths(tiny_model(positions="learned"), 16, 8) == [16] and len(lengths(tiny_model(positions="learned", mixer="r"), 16, 8)) == 4


def test_the_script_trains_distils_asks_and_writes_its_report(tiny, tmp_path, capsys):
    for name, mixer in (("teacher", "a"), ("student", "r")):
        save_model(tiny_model(mixer=mixer, block_size=128), tmp_path / name, {"tokenizer": "bytes"})
    out = tmp_path / "out"
    flags = ["--teacher", tmp_path / "teacher", "--student", tmp_path / "student", "--data", tiny.text, "--out", out, "--lengths", 2, "--depths", 2,
             "--repeat", 2,
             "--max_tokens", 300, "--pairs", "2,4", "--examples", 40, "--asked", 8, "--mixers", "all first:1", "--model.n_embd", 32, "--model.n_head", 2]
    flags += [f"--{stage}.{key}={value}" for stage in ("teacher_fit", "align", "distil") for key, value in (("max_steps", 2), ("batch_size", 4))]
    recall.main([str(x) for x in flags])
    report = json.loads((out / "recall.json").read_text())
    assert list(report["pairs"]["models"]) == ["teacher", "all", "first:1"] and [m["mixers"] for m in report["pairs"]["models"].values()] == ["aa", "rr", "ra"]
    assert all(len(m["accuracy"]) == 2 for m in report["pairs"]["models"].values()) and len(report["length"]["models"]["student"]) == 2
    assert [(row["T"], row["depth"]) for row in report["passkey"]["student"]] == [(128, 0), (128, 1), (256, 0), (256, 1)]
    said = capsys.readouterr().out
    assert (out / "recall.md").read_text() in said and (out / "recall.png").stat().st_size > 1000


def test_bad_input_ends_in_one_clear_line(tiny, tmp_path):
    for change, says in (({"tasks": "needle"}, "pairs,passkey,length"), ({"pairs": "0"}, "from 1 to 32"), ({"pairs": "33"}, "from 1 to 32"),
                         ({"pairs": "x"}, "from 1"),
                         ({"model": ModelConfig(n_layer=2, block_size=16)}, "block_size"), ({"mixers": "most"}, "first:K"), ({"repeat": 0}, "at least 1"),
                         ({"depths": 1}, "at least 2"), ({"lengths": 0}, "at least 1")):
        with pytest.raises(ValueError, match=says) as e:
            RecallConfig(**change)
        one_line(e.value)
    save_model(tiny_model(), tmp_path / "model", {"tokenizer": "bytes"})
    common = ["--tasks", "passkey,length", "--out", str(tmp_path / "out"), "--student", "None"]
    for flags, says in ((["--teacher", str(tmp_path / "none")], "no model at"),
                        (["--teacher", str(tmp_path / "model"), "--data", str(tmp_path / "x")], "no data at"),
                        (["--teacher", str(tmp_path / "model"), "--data", tiny.sft], "supervised"),
                        (["--teacher", str(tmp_path / "model"), "--data", tiny.text], "no room")):
        with pytest.raises(ValueError, match=says) as e:
            recall.main(common + (["--data", tiny.text] if "--data" not in flags else []) + flags)
        one_line(e.value)
    assert replace(RecallConfig(), tasks="length").n_pairs == [4, 8, 16, 32]
