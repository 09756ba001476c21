"""The report: its numbers follow from each other, and become JSON, table, picture."""

import json
import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import lib.report
from common import T, random_batch, tiny_model
from common_models import ROW, pretend
from data.loader import Loader
from lib.hybrid import remembered_bytes
from lib.report import as_markdown, layer_errors, make_report, table_rows, unigram_loss, write_report


def test_unigram_loss_by_hand():
    """Train a, a, b of a vocabulary {a, b, c}: with one more of each p = 3/6, 2/6, 1/6.

    Held out: a, c.
    """
    train, val = (SimpleNamespace(counts=partial(np.bincount, tokens, minlength=3))
                  for tokens in ([0, 0, 1], [0, 2]))
    assert unigram_loss(train, val) == pytest.approx((math.log(2) + math.log(6)) / 2, rel=1e-12)


def test_layer_errors_are_zero_for_a_perfect_copy_and_one_for_silence():
    student, batch = tiny_model(mixer="r").eval(), random_batch()
    teacher = pretend(student)
    rows = layer_errors(teacher, student, batch)
    assert [row["layer"] for row in rows] == [0, 1]
    assert all(row["error"] == 0 and row["cosine"] == pytest.approx(1) for row in rows)
    silent = tiny_model(mixer="r").eval()
    torch.nn.init.zeros_(silent.blocks[1].att.output.weight)
    rows = layer_errors(teacher, silent, batch)
    assert rows[0]["error"] == 0 and rows[1]["error"] == 1 and rows[1]["cosine"] == 0


def test_the_report_has_every_key_and_its_numbers_follow_from_each_other(tiny):
    teacher, student = tiny_model(std=0.01).eval(), tiny_model(3, mixer="r", std=0.01).eval()
    train, val = Loader(tiny.text, "train", 1, T), Loader(tiny.text, "val", 4, T)
    report = make_report(teacher, student, train, val, 800)
    assert report["gap"] == report["student"]["val_loss"] - report["teacher"]["val_loss"]
    params = {name: report[name]["params"] for name in ("teacher", "student")}
    assert params["teacher"] == sum(p.numel() for p in teacher.parameters())
    assert params["student"] == sum(p.numel() for p in student.parameters()) != params["teacher"]
    keys = {"kl", "top1", "top5", "layers", "by_position", "state_bytes", "recovered", "unigram_loss"}
    assert keys <= set(report)
    assert report["unigram_loss"] == unigram_loss(train, val)
    u, t, s = report["unigram_loss"], report["teacher"]["val_loss"], report["student"]["val_loss"]
    assert report["recovered"] == pytest.approx((u - s) / (u - t))
    for n, size in report["state_bytes"].items():
        assert size == {"teacher": remembered_bytes(teacher.cfg, int(n)),
                        "student": remembered_bytes(student.cfg, int(n))}
    assert len(report["by_position"]["student"]) == T
    assert json.loads(json.dumps(report)) == report


def test_recovered_is_one_for_the_teacher_and_zero_for_token_frequencies(monkeypatch, tiny):
    """unigram 3, teacher 1: a student at 1 recovers all, at 3 nothing, at 1.5 3/4."""
    model = tiny_model().eval()
    train, val = Loader(tiny.text, "train", 1, T), Loader(tiny.text, "val", 4, T)
    result = {"teacher_loss": 1.0, "kl": 0.0, "top1": 1.0, "top5": 1.0, "by_position": {}}
    monkeypatch.setattr(lib.report, "unigram_loss", lambda *_: 3.0)
    for loss, share in ((1.0, 1.0), (3.0, 0.0), (1.5, 0.75)):
        monkeypatch.setattr(lib.report, "compare", lambda *_: result | {"val_loss": loss})
        assert make_report(model, model, train, val, 100)["recovered"] == share


def test_the_report_is_written_as_json_table_and_picture(tmp_path, tiny):
    teacher, student = tiny_model().eval(), tiny_model(3, mixer="r").eval()
    train, val = Loader(tiny.text, "train", 1, T), Loader(tiny.text, "val", 4, T)
    report = make_report(teacher, student, train, val, 200)
    report |= {"stages": [{"name": "align", **ROW}], "controls": {"no stage 1": {"name": "match", **ROW}}}
    rows = [{"step": i, "loss": 2.0 / i, "val_loss": 2.0} for i in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    curves = {"match": tmp_path / "metrics.jsonl", "none": tmp_path / "missing.jsonl"}
    write_report(tmp_path / "out", report, curves)
    text = as_markdown(report)
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report
    assert (tmp_path / "out" / "report.md").read_text(encoding="utf-8") == text
    assert "| align | 4,096 | 1.2 | 1.5000 | 0.2500 | 0.1250 | 50.0% |" in text
    assert "| control: no stage 1 | 4,096 |" in text
    assert (tmp_path / "out" / "report.png").read_bytes().startswith(b"\x89PNG")
    assert not list((tmp_path / "out").glob("*.tmp"))


def test_a_stage_of_a_former_name_stands_under_its_present_one():
    report = {"stages": [{"name": "align", **ROW}, {"name": "distil", **ROW}],
              "controls": {"no stage 1": {"name": "distil", **ROW}}}
    assert [row["name"] for row in table_rows(report)] == ["align", "match", "control: no stage 1"]
