"""Side by side: a model agrees with itself, another parts where it must."""

import json

import pytest
import torch

from common import one_line, tiny_model
from common_distill import META
from common_models import constant_model
from data.tokenizer import get_tokenizer
from lib.decode import Decoder
from lib.folders import save_model
from tools.side_by_side import agreement, answer, main, question

PROMPTS = ["def f(x):", "The"]


@pytest.fixture
def folders(tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    save_model(tiny_model(std=1.0), tmp_path / "teacher", META)
    save_model(tiny_model(1, std=1.0, mixer="r"), tmp_path / "student", META)

    def words(teacher: str, student: str, **more) -> list[str]:
        values = {"teacher": tmp_path / teacher, "student": tmp_path / student, "device": "cpu",
                  "prompts": tmp_path / "prompts.txt", "max_tokens": 12} | more
        return [word for flag, value in values.items() for word in (f"--{flag}", str(value))]

    return words


def test_a_model_says_what_it_says_itself(folders, tmp_path, capsys):
    main(folders("teacher", "teacher", out=tmp_path / "out"))
    report = json.loads((tmp_path / "out" / "answers.json").read_text())
    assert report["agrees"] == report["first"] == 1 and [row["prompt"] for row in report["rows"]] == PROMPTS
    assert all(row["teacher"] == row["student"] and row["tokens"] == row["first"] for row in report["rows"])
    assert capsys.readouterr().out == (tmp_path / "out" / "answers.md").read_text()


def test_agreement_is_counted_token_by_token_on_the_teachers_answer(folders, tmp_path):
    """A loop of single steps gives the same number; what is said first is a prefix."""
    main(folders("teacher", "student", out=tmp_path / "out"))
    report, enc = json.loads((tmp_path / "out" / "answers.json").read_text()), get_tokenizer("bytes")
    teacher, student = tiny_model(std=1.0).eval(), tiny_model(1, std=1.0, mixer="r").eval()
    for row in report["rows"]:
        prompt = question(enc, row["prompt"])
        said, _ = answer(Decoder(teacher), enc, prompt, 12)
        own, _ = answer(Decoder(student), enc, prompt, 12)
        read = [torch.tensor([prompt + said[:i]]) for i in range(len(said))]
        choices = [student(tokens)[0][0, -1].argmax().item() for tokens in read]
        assert row["agrees"] == sum(a == b for a, b in zip(choices, said)) == agreement(student, prompt, said)
        n = row["first"]
        assert said[:n] == own[:n] and (n == min(len(said), len(own)) or said[n] != own[n])
    assert report["agrees"] == sum(row["agrees"] for row in report["rows"]) / report["tokens"]


def test_an_answer_ends_at_its_end():
    always = [0.0] * 257
    always[256] = 1.0
    assert answer(Decoder(constant_model(always)), get_tokenizer("bytes"), [65], 5) == ([256], "")


def test_an_answer_ends_where_the_template_ends_it_as_text(monkeypatch):
    """The World models have no token of their own for the end, but an empty line."""
    world, model = get_tokenizer("world"), constant_model([0.0] * 65536)
    said = world.encode_ordinary(" yes") + world.encode_ordinary("\n\n")
    scripted = lambda *_, **__: ((torch.tensor([token]), None) for token in said * 3)  # noqa: E731
    monkeypatch.setattr("tools.side_by_side.generate", scripted)
    assert answer(Decoder(model), world, question(world, "Is it?"), 12) == (said, " yes")


def test_rows_that_no_token_has_are_shown_as_unknown(folders, tmp_path):
    always = [0.0] * 300
    always[290] = 1.0
    for name in ("wide", "wider"):
        save_model(constant_model(always), tmp_path / name, META)
    main(folders("wide", "wider", out=tmp_path / "out"))
    rows = json.loads((tmp_path / "out" / "answers.json").read_text())["rows"]
    assert all(row["teacher"] == row["student"] == "\ufffd" * 12 and row["agrees"] == 12 for row in rows)
    with pytest.raises(ValueError, match="reads other tokens"):
        main(folders("wide", "student"))


def test_prompts_beyond_learned_positions_are_refused_before_any_is_answered(folders, tmp_path, monkeypatch):
    save_model(tiny_model(positions="learned", block_size=16), tmp_path / "short", META)
    (tmp_path / "prompts.txt").write_text("The\n" + "x" * 40)
    monkeypatch.setattr("tools.side_by_side.answer", None)
    for names in (("short", "student"), ("teacher", "short")):
        with pytest.raises(ValueError, match="need 52 positions, .*short has learned 16") as error:
            main(folders(*names))
        one_line(error.value)


def test_what_cannot_be_laid_side_by_side_is_one_line(folders, tmp_path):
    save_model(tiny_model(vocab_size=200), tmp_path / "small", META)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "answers.md").write_text("mine")
    for words, says in ((folders("teacher", "small"), "reads other tokens"),
                        (folders("teacher", "student", prompts=""), "prompts is empty"),
                        (folders("teacher", "student", out=tmp_path / "foreign"), "did not write it")):
        with pytest.raises(ValueError, match=says) as error:
            main(words)
        one_line(error.value)
