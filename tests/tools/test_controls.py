"""Controls: as many tokens as the student saw, one idea less; refused where there is
nothing to compare.
"""

import json
from dataclasses import replace

import pytest

import tools.controls
from common import one_line, tiny_model
from common_distill import META, job, loop, teacher  # noqa: F401   (fixtures)
from distill import DistillConfig, StudentConfig, distill, make_student
from lib.folders import load_model, save_model
from tools.controls import CONTROLS, SCRATCH, ControlsConfig, add_controls, from_scratch, run_controls


def controls_of(cfg: DistillConfig, **changes) -> ControlsConfig:
    return ControlsConfig(**vars(cfg), **changes)


def test_every_control_sees_the_students_tokens_without_one_idea(job, tmp_path, monkeypatch, capsys):
    """And is read back, not run again, where it is there already."""
    cfg, out = job("out", align=loop(2, 4), match=loop(3, 2, accum=2), stages="align,match"), tmp_path / "out"
    report = distill(cfg)
    jobs, real = [], tools.controls.distill
    monkeypatch.setattr(tools.controls, "distill", lambda control: jobs.append(control) or real(control))
    with_controls = add_controls(controls_of(cfg))
    assert with_controls == report | {"controls": with_controls["controls"]}
    assert json.loads((out / "report.json").read_text()) == with_controls
    rows = with_controls["controls"]
    tokens = {name: row["tokens"] for name, row in rows.items()}
    assert tokens == dict.fromkeys(CONTROLS, (2 * 4 + 3 * 4) * 16)
    for name in rows:
        assert f"| control: {name} |" in (out / "report.md").read_text()
    ideas = [(c.stages, c.match.max_steps, c.student, c.kl_weight, c.ce_weight) for c in jobs]
    assert ideas == [
        ("align,match", 3, replace(cfg.student, rwkv_rope=True), 1, 0),
        ("match", 5, cfg.student, 1, 0),
        ("align,match", 3, replace(cfg.student, transfer=False), 1, 0),
        ("align,match", 3, cfg.student, 0, 1),
    ]
    mixers = {name: load_model(out / "controls" / name.replace(" ", "-")).cfg.mixers for name in rows}
    assert mixers.pop("teacher trained on") == "aa" and set(mixers.values()) == {"rr"}

    files = {p: p.read_bytes() for p in out.rglob("*.safetensors")}
    again = add_controls(controls_of(cfg))["controls"]
    assert {p: p.read_bytes() for p in out.rglob("*.safetensors")} == files
    assert again == rows


def test_a_teacher_trained_on_reads_as_many_tokens_whatever_its_length(job):
    cfg = job("out", stages="align,match", block_size=8, align=loop(4), match=loop(4))
    distill(cfg)
    rows = add_controls(controls_of(cfg, only=f"teacher trained on,{SCRATCH}"))["controls"]
    assert {row["tokens"] for row in rows.values()} == {(4 + 4) * 2 * 8}


@pytest.mark.parametrize("tied", [False, True])
def test_rwkv7_from_scratch_has_the_students_shape(job, tied):
    for changes in ({"gate": False, "rwkv_rope": True}, {"ffn": "relu2", "untie_head": True}):
        cfg, t = job("out", student=StudentConfig(mixer="ra", **changes)), tiny_model(tied=tied)
        shape = from_scratch(controls_of(cfg), t.cfg, cfg.match)["model"]
        assert shape.mixers == "ra"
        assert shape == make_student(t, cfg.student).cfg


def test_a_distillation_resumed_for_more_keeps_its_controls_until_a_stage_changes(job):
    cfg = job("out", stages="align,match", align=loop(2), match=loop(2))
    distill(cfg)
    controls = add_controls(controls_of(cfg, only=SCRATCH))["controls"]
    again = replace(cfg, run=replace(cfg.run, resume=True))
    assert distill(again)["controls"] == controls
    assert "controls" not in distill(replace(again, match=loop(4)))


def test_a_student_that_is_being_trained_on_has_no_controls(job, tmp_path):
    """As a process that was killed leaves it: a report of before, stages of now."""
    cfg, out = job("out", stages="align,match", align=loop(2), match=loop(2)), tmp_path / "out"
    distill(cfg)
    before = (out / "report.json").read_text()
    longer = replace(cfg, match=loop(4), run=replace(cfg.run, resume=True))
    distill(longer)
    (out / "report.json").write_text(before)
    for i in range(2):
        with pytest.raises(ValueError, match="not of the stage match as it is now: .*--resume") as error:
            add_controls(controls_of(longer, only=SCRATCH))
        one_line(error.value)
        (out / "match" / "stage.json").unlink(missing_ok=True)
    (out / "report.json").write_text("{}")
    with pytest.raises(ValueError, match="not of the stage align"):
        add_controls(controls_of(longer, only=SCRATCH))
    (out / "report.json").write_text('{"stages": [')
    with pytest.raises(ValueError, match="report.json is damaged"):
        add_controls(controls_of(longer, only=SCRATCH))


@pytest.mark.parametrize("change, says", [
    ({"match": replace(loop(4), max_tokens=64)}, "match.max_tokens = 64: .*match.max_steps alone"),
    ({"align": replace(loop(4), max_minutes=1.0)}, "align.max_minutes = 1.0: .*align.max_steps alone"),
    ({"student": StudentConfig(aligned="out/x/align")}, "aligned: .* distil without it"),
])
def test_what_controls_cannot_equal_is_one_line(job, change, says):
    with pytest.raises(ValueError, match=says) as error:
        add_controls(controls_of(job("out", stages="align,match", **change)))
    one_line(error.value)


def test_heads_of_an_odd_size_are_refused_a_rotation_with_a_flag_that_helps(job, tmp_path):
    save_model(tiny_model(positions="none", n_head=3, head_size=5), tmp_path / "odd", META)
    cfg = job("out", stages="align,match", teacher=str(tmp_path / "odd"), align=loop(1), match=loop(1))
    with pytest.raises(ValueError, match="rwkv_rope turns pairs .* have 5: omit it") as error:
        distill(replace(cfg, student=StudentConfig(rwkv_rope=True)))
    one_line(error.value)
    assert not (tmp_path / "out").exists()
    distill(cfg)
    with pytest.raises(ValueError, match="rotating heads: .* have 5: .*--only") as error:
        add_controls(controls_of(cfg))
    one_line(error.value)
    assert "no stage 1" in add_controls(controls_of(cfg, only="no stage 1"))["controls"]


def test_controls_are_not_overwritten(job):
    cfg = job("out", stages="align,match")
    with pytest.raises(ValueError, match="overwrite: .* remove its folder") as error:
        controls_of(replace(cfg, run=replace(cfg.run, overwrite=True)))
    one_line(error.value)


def test_controls_without_their_run_or_its_stages_are_refused_in_one_line(job):
    with pytest.raises(ValueError, match="no report in .*distill.py --out") as error:
        add_controls(controls_of(job("none")))
    one_line(error.value)
    for stages in ("align", "match", "match,finish"):
        with pytest.raises(ValueError, match="stages align,match, but stages = ") as error:
            add_controls(controls_of(job("out", stages=stages)))
        one_line(error.value)


def test_what_stage_1_takes_is_given_to_stage_2_where_it_is_left_out(job, monkeypatch):
    """In whole steps of stage 2, rounded down."""

    def first(control):
        jobs.append(control)
        raise InterruptedError

    cfg, jobs = job("out", stages="align,match", align=loop(3, 3), match=loop(5, 4)), []
    monkeypatch.setattr(tools.controls, "distill", first)
    with pytest.raises(InterruptedError):
        run_controls(controls_of(cfg, only="no stage 1"))
    assert jobs[0].stages == "match" and jobs[0].match.max_steps == (3 * 3 + 5 * 4) // 4


def test_some_controls_are_run_and_those_of_before_stay(job):
    cfg = job("out", stages="align,match", align=loop(2), match=loop(2))
    distill(cfg)
    first = add_controls(controls_of(cfg, only=SCRATCH))["controls"]
    with pytest.raises(ValueError, match="learning_rate = .*move .*/RWKV-7-from-scratch away") as error:
        add_controls(controls_of(cfg, only=SCRATCH, scratch_rate=1e-3))
    assert "--out" not in one_line(error.value)            # of which there is but one
    both = add_controls(controls_of(cfg, only="rotating heads"))["controls"]
    assert list(first) == [SCRATCH] and both[SCRATCH] == first[SCRATCH]
    rotating = load_model(f"{cfg.run.out}/controls/rotating-heads").cfg
    assert rotating.rwkv_rope and not load_model(cfg.run.out).cfg.rwkv_rope
    for names in ("", "no stage 2", "rotating heads,"):
        with pytest.raises(ValueError, match="only") as error:
            controls_of(cfg, only=names)
        one_line(error.value)
