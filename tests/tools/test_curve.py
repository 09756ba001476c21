"""The curve of loss against bytes: every point a run of its own, to the end."""

import json
import math
import xml.etree.ElementTree as xml

import pytest

import tools.curve
from common import one_line
from common_distill import flags, job, loop, teacher  # noqa: F401   (fixtures)
from distill import distill
from lib.folders import load_model
from tools.controls import SCRATCH, ControlsConfig, add_controls
from tools.curve import CurveConfig, as_text, catch_up, main


def test_each_point_is_a_run_with_its_share_of_the_steps(job, tmp_path, capsys, monkeypatch):
    """Share 1 is what is there: the student, and the control from scratch."""
    cfg, out = job("out", stages="align,match", align=loop(4, 4), match=loop(8, 2)), tmp_path / "out"
    report = distill(cfg)
    scratch = add_controls(ControlsConfig(**vars(cfg), only=SCRATCH))["controls"][SCRATCH]
    jobs, real = [], tools.curve.distill
    monkeypatch.setattr(tools.curve, "distill", lambda cfg: jobs.append(cfg) or real(cfg))
    shares = ["--stages", "align,match", "--student_shares", "0.5,1", "--scratch_shares", "0.5,1,2"]
    main(flags(cfg) + shares)
    assert [(j.align.max_steps, j.match.max_steps, j.student) for j in jobs] == [(2, 4, cfg.student)]
    points = json.loads((out / "curve" / "curve.json").read_text())
    whole = (4 * 4 + 8 * 2) * 16
    assert [row["tokens"] for row in points["student"]] == [whole // 2, whole]
    assert [row["tokens"] for row in points["scratch"]] == [whole // 2, whole, 2 * whole]
    assert points["student"][1]["val_loss"] == report["stages"][-1]["val_loss"]
    assert points["scratch"][1]["val_loss"] == scratch["val_loss"]
    assert points["teacher"] == {"val_loss": report["teacher"]["val_loss"], "tokens": None}
    assert load_model(out / "curve" / "scratch-2").cfg.mixers == "rr"
    assert as_text(points) in capsys.readouterr().out
    picture = (out / "curve" / "curve.svg").read_bytes()
    assert "RWKV-7 from the teacher" in "".join(xml.fromstring(picture).itertext())
    main(flags(cfg) + shares)                             # reads everything back
    assert json.loads((out / "curve" / "curve.json").read_text()) == points
    assert (out / "curve" / "curve.svg").read_bytes() == picture


def test_a_curve_of_what_is_there_alone(job, tmp_path, capsys):
    cfg = job("out", stages="align,match", align=loop(2), match=loop(2))
    distill(cfg)
    main([*flags(cfg), "--stages", "align,match", "--student_shares", "1", "--scratch_shares", "1"])
    assert (tmp_path / "out" / "curve" / "curve.svg").exists()


def test_where_from_scratch_catches_up_is_read_between_two_points():
    rows = [{"tokens": n, "val_loss": loss} for n, loss in ((100, 3.0), (200, 2.0), (800, 1.0))]
    assert catch_up(2.0, rows) == 200
    assert catch_up(1.5, rows) == pytest.approx(400)
    assert catch_up(2.5, rows) == pytest.approx(100 * math.sqrt(2))
    assert catch_up(0.5, rows) is None and catch_up(3.5, rows) is None
    row = {"val_loss": 1.5, "gap": 0.0, "kl": 0.0, "top1": 1.0}
    points = {"student": [row | {"tokens": 50, "catches_up": catch_up(1.5, rows)}],
              "scratch": [row | {"tokens": 100}]}
    late = [line.split("|")[-2].strip() for line in as_text(points).splitlines()[2:]]
    assert late == ["400, 8.0 times as many", ""]


def test_what_cannot_be_drawn_is_one_line(job):
    for text in ("", "a", "0,1", "-1", "nan", "inf", "1,"):
        with pytest.raises(ValueError, match="shares") as error:
            CurveConfig(scratch_shares=text)
        one_line(error.value)
    for stages, says in (("align,match", "no report in"), ("match", "stages align,match, but stages")):
        with pytest.raises(ValueError, match=says) as error:
            main([*flags(job("none")), "--stages", stages])
        one_line(error.value)
