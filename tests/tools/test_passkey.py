"""Past the length of training: loss by stretch, and a number to remember."""

import json

import numpy as np
import pytest
import torch

import tools.passkey
from common import T, one_line, tiny_model
from common_models import Oracle, panels
from data.loader import Loader
from data.tokenizer import get_tokenizer
from lib.folders import save_model
from lib.scores import compare, cross_entropy, mean_loss
from tools.passkey import answer_scores, as_markdown, loss_by_stretch, main, passkey, passkey_texts

BYTES, FILLER = get_tokenizer("bytes"), np.full(5000, ord("x"), np.uint16)


# ------------------------------------------------------------------------------------------
# Loss by stretch

def test_loss_by_stretch_is_the_mean_of_the_loss_by_position_and_ends_with_the_text(tiny):
    models = {"teacher": tiny_model(1).eval(), "student": tiny_model(mixer="ra").eval()}
    loader = Loader(tiny.text, "val", 3, 8 * T)
    whole = compare(*models.values(), loader, 1024)["by_position"]
    for name, model in models.items():
        expected = torch.tensor(whole[name]).view(8, T).mean(1).tolist()
        assert loss_by_stretch(model, loader, T, 1024) == pytest.approx(expected, rel=1e-4)
    n = len(loader.tokens) - 1  # targets
    losses = loss_by_stretch(models["student"], Loader(tiny.text, "val", 1, 4000 * T), 1000)
    assert len(losses) == -(-n // 1000)
    weights = [1000] * (n // 1000) + [n % 1000] * (n % 1000 > 0)
    mean = mean_loss(models["student"], Loader(tiny.text, "val", 1, n), chunk=512)
    assert np.average(losses, weights=weights) == pytest.approx(mean, rel=1e-5)


def test_attention_with_learned_positions_is_read_as_far_as_these_go(tiny):
    bounded = tiny_model(positions="learned").eval()
    free = tiny_model(positions="learned", mixer="r").eval()
    loader = Loader(tiny.text, "val", 2, 4 * T)
    assert len(loss_by_stretch(free, loader, T, 1024)) == 4
    first = sum(cross_entropy(bounded(batch.x[:, :T])[0], batch.split(T)[0]).item()
                for batch in loader.windows(1024))
    assert loss_by_stretch(bounded, loader, T, 1024) == [pytest.approx(first / (1024 / 4), rel=1e-5)]


def test_a_teacher_whose_positions_end_within_the_first_stretch_leaves_the_student_measured(
        tiny, tmp_path, capsys):
    for name, mixer in (("teacher", "a"), ("student", "r")):
        save_model(tiny_model(positions="learned", mixer=mixer), tmp_path / name, {"tokenizer": "bytes"})
    out = tmp_path / "out"
    flags = ["--teacher", tmp_path / "teacher", "--student", tmp_path / "student", "--data", tiny.text,
             "--max_tokens", 900, "--block_size", T + 4, "--longest", 3, "--passkey", None, "--out", out]
    main([str(x) for x in flags])
    models = json.loads((out / "passkey.json").read_text())["length"]["models"]
    assert models["teacher"] == [] and len(models["student"]) == 3
    assert "| teacher | - | - | - |" in capsys.readouterr().out and panels(out / "passkey.png") == 1


# ------------------------------------------------------------------------------------------
# The passkey

def copies(row):
    """The next digit after the last "key is ", as it stood after the first one."""
    text = bytes(b for b in row if b < 256).decode()
    told = text.count("The pass key is ") > 1
    key = text.split("The pass key is ")[1][:5] if told else "#####"
    return ord((key + "....")[len(text.rpartition("The pass key is ")[2]) % 5])


def test_passkey_of_a_model_that_copies_is_exact_at_every_depth_and_free_only_where_told():
    texts = passkey_texts(BYTES, FILLER, 300, 4, 3)
    row = passkey(Oracle(copies), texts, 3, 5)
    assert row["exact"] == [1, 1, 1] and max(row["nats"]) < 1e-3 and row["nats_without"] > 20


def test_passkey_at_each_depth_is_the_mean_over_the_numbers(monkeypatch):
    """Two numbers at two depths and not told: scores in the order of the texts."""
    scores = [(1.0, 1.0), (0.0, 2.0), (0.0, 9.0), (1.0, 3.0), (1.0, 6.0), (0.0, 5.0)]
    monkeypatch.setattr(tools.passkey, "answer_scores", lambda *_: scores)
    assert passkey(None, None, 2, 1) == {"exact": [1.0, 0.5], "nats": [2.0, 4.0], "nats_without": 7.0}


def test_every_passkey_text_has_the_length_it_says_with_the_key_at_its_depth():
    depths = (0, 0.5, 1)
    texts = passkey_texts(BYTES, FILLER, 400, 5, 3)
    assert len(texts) == 5 * 4
    assert all(len(prompt) + len(answer) == 400 and prompt[0] == 256 for prompt, answer in texts)
    assert len({bytes(answer) for _, answer in texts}) == 5
    for i, (prompt, answer) in enumerate(texts):
        text, key = bytes(prompt[1:]).decode(), bytes(answer).decode()
        before, told, after = text.partition(f" The pass key is {key}.")
        if i % 4 == 3:
            assert not told and key not in text
            assert text.endswith("x What is the pass key? The pass key is ")
        else:
            assert before == "x" * round(depths[i % 4] * text.count("x")) and text.count(key) == 2
            assert after.lstrip(" ").startswith("Remember it") and after.endswith("The pass key is ")
    assert passkey_texts(BYTES, FILLER, 400, 5, 3) == texts
    for bad, words in ((100, "no room"), (9000, "held-out text has 5000")):
        with pytest.raises(ValueError, match=words) as e:
            passkey_texts(BYTES, FILLER, bad, 4, 3)
        one_line(e.value)


def test_what_is_told_and_what_is_asked_for_are_the_same_tokens():
    """The World vocabulary has other tokens for a number behind a space."""
    world = get_tokenizer("world")
    key = "23456"
    assert world.encode_ordinary(key) != world.encode_ordinary(" " + key)[-len(world.encode_ordinary(key)) :]
    for prompt, answer in passkey_texts(world, FILLER, 300, 6, 1)[::2]:
        n = len(answer)
        assert sum(prompt[i : i + n] == answer for i in range(len(prompt))) == 2


@pytest.mark.parametrize("mixer", ["a", "r", "ra"])
def test_answers_read_in_pieces_and_side_by_side_have_the_scores_of_one_pass(mixer):
    model = tiny_model(mixer=mixer).eval()
    rows = torch.randint(0, 256, (5, 606), generator=torch.Generator().manual_seed(0)).tolist()
    texts = [(row[:cut], row[cut:]) for row, cut in zip(rows, (600, 600, 580, 604, 605))]
    likeliest = model(torch.tensor([rows[0][:30]]))[0][0, -1].argmax().item()
    texts.append((rows[0][:30], [likeliest]))  # what it would say itself
    for (prompt, answer), (exact, nats) in zip(texts, answer_scores(model, texts, 4), strict=True):
        logits = model(torch.tensor([prompt + answer]))[0][0, len(prompt) - 1 : -1]
        logp = logits.log_softmax(-1)
        expected = -logp.gather(1, torch.tensor(answer)[:, None]).mean().item()
        assert nats == pytest.approx(expected, rel=1e-4)
        assert exact == float(logp.argmax(-1).tolist() == answer)
    assert exact == 1


# ------------------------------------------------------------------------------------------
# The script

@pytest.mark.parametrize("mixer", ["r", "ra"])
def test_the_script_reads_on_and_asks_for_the_passkey(mixer, tiny, tmp_path, capsys):
    for name, changes in (("teacher", {"positions": "learned"}), ("student", {"mixer": mixer})):
        save_model(tiny_model(block_size=128, **changes), tmp_path / name, {"tokenizer": "bytes"})
    out = tmp_path / "out"
    flags = ["--teacher", tmp_path / "teacher", "--student", tmp_path / "student", "--data", tiny.text,
             "--max_tokens", 1500, "--out", out, "--longest", 5, "--passkey", 2, "--depths", 2]
    main([str(x) for x in flags])
    printed, report = capsys.readouterr().out, json.loads((out / "passkey.json").read_text())
    models = report["length"]["models"]
    assert report["length"]["T"] == 128 and len(models["teacher"]) == 1 and len(models["student"]) == 5
    teacher = tiny_model(block_size=128, positions="learned").eval()
    assert models["teacher"] == loss_by_stretch(teacher, Loader(tiny.text, "val", 16, 640), 128, 1500)
    rows = report["passkey"]["models"]
    assert report["passkey"]["depths"] == [0, 1]
    assert all(len(row["nats"]) == len(row["exact"]) == 2 for row in rows["student"])
    lengths = {name: [row["T"] for row in some] for name, some in rows.items()}
    assert lengths == {"teacher": [128], "student": [128, 256, 512]}
    assert (out / "passkey.md").read_text(encoding="utf-8") == as_markdown(report)
    assert as_markdown(report) in printed and panels(out / "passkey.png") == 2
    assert f"| teacher | {models['teacher'][0]:.4f} | - | - | - | - |" in printed
    assert printed.count("| student | 512 |") == 1


def test_a_length_that_no_model_can_read_is_one_line(tiny, tmp_path):
    save_model(tiny_model(positions="learned", block_size=32), tmp_path / "m", {"tokenizer": "bytes"})
    with pytest.raises(ValueError, match="block_size = 64: .* has learned 32 positions: lower it") as error:
        main(["--teacher", str(tmp_path / "m"), "--student", "None", "--data", str(tiny.text),
              "--block_size", "64", "--longest", "4", "--passkey", "None"])
    one_line(error.value)


def test_each_measure_is_made_alone_too_and_of_the_teacher_alone(tiny, tmp_path, capsys):
    save_model(tiny_model(block_size=128), tmp_path / "m", {"tokenizer": "bytes"})
    flags = ["--teacher", tmp_path / "m", "--student", "None", "--data", tiny.text, "--max_tokens", 1500]
    out = tmp_path / "out"
    main([str(x) for x in [*flags, "--longest", 4, "--passkey", None, "--out", out]])
    printed, report = capsys.readouterr().out, json.loads((out / "passkey.json").read_text())
    assert len(report["length"]["models"]["teacher"]) == 4 and "passkey" not in report
    assert "student" not in printed and panels(out / "passkey.png") == 1
    main([str(x) for x in [*flags, "--longest", None, "--passkey", 2]])
    printed = capsys.readouterr().out
    assert "| teacher | 128 |" in printed and "| teacher | 256 |" not in printed
    assert "loss at positions" not in printed
