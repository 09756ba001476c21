"""Distillation with odd teachers and bad luck: killed, damaged, resumed, on two
processes, refused in one line.
"""

import json
import re
import math
import shlex
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import distill
import lib.runs
from common import (
    T,
    assert_same_run,
    metrics,
    moments,
    newest,
    one_line,
    random_batch,
    start,
    state_dict,
    tiny_model,
)
from common_distill import META, check_gather, job, loop, rerun, teacher, weights  # noqa: F401   (fixtures)
from common_train import Killed, dies_at_call, two_processes, wait_for
from config import cli
from data.loader import Loader
from distill import DistillConfig, Stage, StudentConfig, make_student, open_stage
from lib import stages
from lib.folders import load_model, save_model
from lib.runs import checkpoints
from lib.scores import cross_entropy


def report_of(out: Path) -> dict:
    """Without what the clock says."""
    report = json.loads((out / "report.json").read_text())
    for row in report["stages"]:
        del row["minutes"]
    return report


# ------------------------------------------------------------------------------------------
# Killed and resumed


@pytest.mark.parametrize(
    "stage, loss", [("align", "align_loss"), ("match", "match_loss"), ("finish", "dpo_loss")]
)
def test_a_stage_that_dies_and_resumes_equals_one_that_never_stopped_bit_for_bit(
    job, tiny, tmp_path, monkeypatch, stage, loss
):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    steps = {"align": loop(5), "match": loop(5), "finish": loop(5), "finish_data": tiny.dpo, "save_every": 2}
    distill.distill(job("whole", **steps))
    with monkeypatch.context() as patch:
        patch.setattr(distill, loss, dies_at_call(4, getattr(distill, loss)))
        with pytest.raises(Killed):
            distill.distill(job("broken", **steps))
    assert newest(broken / stage).name == "step_0000002"
    distill.distill(job("broken", **steps, resume=True))
    for name in ("align", "match", "finish"):
        assert_same_run(broken / name, whole / name)
    assert (broken / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    # DPO's reference is the student before this stage: ln 2, and then away from it
    rows = metrics(broken / "finish")
    assert rows[0]["loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert rows[0]["margin"] == 0 and abs(rows[-1]["margin"]) > 1e-4
    # what the clock does not touch is the same, down to the last digit
    assert report_of(broken) == report_of(whole)
    assert [row["name"] for row in report_of(whole)["stages"]] == ["start", "align", "match", "finish"]


def test_a_run_killed_by_sigkill_resumes_to_what_it_would_have_been(job, tiny, teacher, tmp_path):
    """It could go on for ever; both others end midway after its last checkpoint."""
    flags = [
        "--teacher",
        teacher,
        "--data",
        tiny.text,
        "--device",
        "cpu",
        "--eval_tokens",
        "200",
        "--stages",
        "align,match",
        "--align.schedule",
        "constant",
        "--save_every",
        "10",
        "--match.max_steps",
        "2",
        "--align.batch_size",
        "2",
        "--match.batch_size",
        "2",
        "--log_every",
        "5",
    ]
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    process = start("distill.py", *flags, "--align.max_steps", "1000000", "--out", broken)
    wait_for(lambda: any(int(p.name[5:]) >= 30 for p in checkpoints(broken / "align")), process)
    process.kill()
    err = process.communicate()[1]
    assert process.returncode == -signal.SIGKILL, err  # it was still running
    end = ["--align.max_steps", str(int(newest(broken / "align").name[5:]) + 15)]
    distill.main([*flags, *end, "--out", str(broken), "--resume"])
    distill.main([*flags, *end, "--out", str(whole)])
    for stage in ("align", "match"):
        assert_same_run(broken / stage, whole / stage)


def test_finish_alone_goes_on_from_the_stages_that_are_done(job, tmp_path):
    """Not from the raw student: a finish must start where distillation ended."""
    distill.distill(job("out", stages="align,match"))
    distill.distill(job("out", stages="finish", resume=True, finish=loop(1, learning_rate=1e-8)))
    matched, finished = weights(tmp_path / "out" / "match"), weights(tmp_path / "out" / "finish")
    for name in matched:
        torch.testing.assert_close(finished[name], matched[name], rtol=0, atol=1e-5)


def test_a_stage_that_was_interrupted_is_not_passed_over(job, tmp_path, monkeypatch):
    """The next one would begin without it, and the report would say that it did not."""
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(distill, "align_loss", dies_at_call(3, distill.align_loss))
        distill.distill(job("out", stages="align,match", save_every=1))
    for stages in ("match", "finish", "match,finish"):
        with pytest.raises(ValueError, match="has begun align and not ended it") as error:
            distill.distill(job("out", stages=stages, resume=True))
        one_line(error.value)
    report = distill.distill(job("out", stages="align,match", resume=True))
    assert [row["name"] for row in report["stages"]] == ["start", "align", "match"]


@pytest.mark.parametrize("done", [True, False], ids=["the stage is done", "the stage was interrupted"])
def test_a_run_of_before_whose_second_stage_was_distil_goes_on_as_match(job, tmp_path, monkeypatch, done):
    """The folder was called distil, and stage.json says that name."""
    whole, old = job("whole", save_every=2), job("old", save_every=2)
    distill.distill(whole)
    if done:
        distill.distill(replace(old, stages="align,match"))
        row = json.loads((tmp_path / "old" / "match" / "stage.json").read_text())
        del row["crc32"]
        (tmp_path / "old" / "match" / "stage.json").write_text(json.dumps(row | {"name": "distil"}))
    else:
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(distill, "match_loss", dies_at_call(3, distill.match_loss))
            distill.distill(old)
    (tmp_path / "old" / "match").rename(tmp_path / "old" / "distil")
    report = distill.distill(rerun(old, resume=True))
    assert [row["name"] for row in report["stages"]] == ["start", "align", "match", "finish"]
    assert not (tmp_path / "old" / "distil").exists()
    for stage in ("align", "match", "finish"):
        assert_same_run(tmp_path / "old" / stage, tmp_path / "whole" / stage)
    assert report_of(tmp_path / "old") == report_of(tmp_path / "whole")


def test_a_run_of_before_is_neither_overwritten_unasked_nor_left_behind_when_asked(job, tmp_path):
    (tmp_path / "out" / "distil" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ValueError, match="holds another run"):
        distill.distill(job("out", stages="align"))
    (tmp_path / "out" / "curve").mkdir()                   # of tools.curve: points of the run that goes
    distill.distill(job("out", stages="align", overwrite=True))
    for name in ("distil", "match", "curve"):
        assert not (tmp_path / "out" / name).exists()


# ------------------------------------------------------------------------------------------
# Two processes


def test_two_processes_are_one_with_the_doubled_batch_in_all_stages(job, tiny, tmp_path):
    """Eight rows a step: on one process at once, or in two halves; on two, in halves.

    SFT has unequal numbers of targets per process and half. exp_avg after one step is a
    tenth of the gradient, that through v_first included; eps = 1 makes AdamW so close
    to plain descent that rounding is not blown up on the way to later stages.
    """

    def cfg(name: str, B: int, accum: int) -> DistillConfig:
        one = loop(1, B, accum=accum, clip=None, eps=1.0, learning_rate=0.1)
        data, stages = (tiny.sft, "align,match,finish") if "sft" in name else (tiny.dpo, "match,finish")
        return job(
            name,
            align=one,
            match=one,
            finish=one,
            finish_data=data,
            stages=stages,
            kl_kind="adaptive",
            ce_weight=0.5,
            eval_tokens=None,
        )

    jobs = [cfg("two-sft", 2, 2), cfg("two-dpo", 2, 2)]
    context = two_processes(tmp_path / "store", jobs, check_gather)
    for kind in ("sft", "dpo"):
        distill.distill(cfg(f"one-{kind}", 8, 1))
        distill.distill(cfg(f"half-{kind}", 4, 2))
    while not context.join():
        pass

    def rows(out: Path) -> list[dict]:
        return [{key: x for key, x in row.items() if key != "tokens"} for row in metrics(out)]

    for place in ("sft/align", "sft/match", "sft/finish", "dpo/finish"):
        one = tmp_path / f"one-{place}"
        for other in (tmp_path / f"half-{place}", tmp_path / f"two-{place}"):
            for a, b in zip(moments(newest(other)), moments(newest(one)), strict=True):
                assert (a - b).norm() <= 2e-4 * b.norm() + 1e-9, (other, a.shape)
            for a, b in zip(rows(other), rows(one), strict=True):
                assert a == pytest.approx(b, rel=1e-4)
    one = json.loads((tmp_path / "one-sft" / "report.json").read_text())
    for rank in (0, 1):  # every rank has the same, whole measurement
        two = json.loads((tmp_path / "two-sft" / f"rank{rank}.json").read_text())
        for key in ("gap", "kl", "top1", "recovered"):
            assert two[key] == pytest.approx(one[key], rel=1e-3, abs=1e-5)
        for a, b in zip(two["stages"], one["stages"], strict=True):
            assert (a["val_loss"], a["kl"]) == pytest.approx((b["val_loss"], b["kl"]), rel=1e-4)


# ------------------------------------------------------------------------------------------
# Odd teachers and students

QWEN2 = {
    "block_size": 512,
    "n_kv_head": 1,
    "qkv_bias": True,
    "o_bias": False,
    "ffn": "swiglu",
    "norm": "rmsnorm",
    "ln0": False,
    "tied": True,
}
QWEN3 = {
    "head_size": 24,
    "n_kv_head": 1,
    "qk_norm": True,
    "rope_scaling": "llama3",
    "rope_factor": 8.0,
    "ffn": "swiglu",
    "norm": "rmsnorm",
}


@pytest.mark.parametrize(
    "model, student",
    [
        ({"n_layer": 1}, {}),
        ({}, {"mixer": "ar"}),
        ({}, {"mixer": "ra", "gate": False, "group_norm": False, "rwkv_rope": True}),
        (
            {"tied": True, "positions": "learned", "ffn": "gelu"},
            {"untie_head": True, "token_shift": False, "bonus": False},
        ),
        (
            {"block_size": 1, "n_kv_head": 1, "ffn": "swiglu", "norm": "rmsnorm"},
            {"transfer": False, "decay": "official"},
        ),
        (QWEN2, {"decay": "lookback", "calibrate": True, "rwkv_rope": True}),
        (QWEN3, {"mixer": "ar", "decay": "lookback", "calibrate": True}),
    ],
    ids=[
        "one layer",
        "attention first",
        "bare mixers",
        "own head",
        "one token",
        "as qwen2, long context",
        "as qwen3",
    ],
)
def test_odd_teachers_and_students_go_through_all_stages(job, tmp_path, model, student):
    lm, one = tiny_model(**model), loop(2, 1)
    save_model(lm, tmp_path / "odd", META)
    sizes = {
        "block_size": T if lm.cfg.block_size > T else None,
        "finish_block_size": 16 if lm.cfg.positions != "learned" else None,
    }
    report = distill.distill(
        job(
            "out",
            teacher=str(tmp_path / "odd"),
            student=StudentConfig(**student),
            align=one,
            match=one,
            finish=one,
            eval_tokens=60,
            kl_kind="reverse",
            align_kind="l2norm",
            **sizes,
        )
    )
    assert [row["name"] for row in report["stages"]] == ["start", "align", "match", "finish"]
    assert math.isfinite(report["kl"])
    saved = load_model(tmp_path / "out").cfg
    assert saved.mixers == (student.get("mixer", "r") * 2)[: lm.cfg.n_layer]
    assert saved.tied == (lm.cfg.tied and not student.get("untie_head"))


def test_a_larger_teacher_with_more_tokens_teaches_stage_2(job, tmp_path):
    large = tiny_model(4, n_embd=64, n_layer=1, n_head=1, vocab_size=300)
    save_model(large, tmp_path / "large", META)
    cfg = job(
        "out",
        stages="match",
        logit_teacher=str(tmp_path / "large"),
        match=loop(1),
        kl_weight=2.0,
        ce_weight=0.5,
    )
    distill.distill(cfg)
    row = metrics(tmp_path / "out" / "match")[0]  # with the held-out KL in it too, under another name
    assert row["loss"] == pytest.approx(2 * row["kl"] + 0.5 * row["ce"], rel=1e-4)
    (batch,), n = Loader(cfg.data, "train", 2, T, 1).step(0)
    expected = cross_entropy(large(batch.x)[0][..., :257], batch).item() / n
    assert row["teacher_ce"] == pytest.approx(expected, rel=1e-4)


def test_the_teacher_of_stage_2_is_in_memory_once_where_it_is_the_same(job, monkeypatch):
    folders, real = [], stages.load
    monkeypatch.setattr(stages, "load", lambda folder, *how: folders.append(folder) or real(folder, *how))
    cfg = job("out", stages="match")
    distill.distill(cfg)
    assert folders == [cfg.teacher]


@pytest.mark.parametrize(
    "pattern, letters", [("first:1", "raa"), ("1", "ara"), ("0,2", "rar"), ("last:2", "arr")]
)
def test_stage_1_of_a_hybrid_moves_the_replaced_layers_and_nothing_else(pattern, letters):
    teacher = tiny_model(n_layer=3).requires_grad_(False)
    student, batch = make_student(teacher, StudentConfig(mixer=pattern)), random_batch()
    assert student.cfg.mixers == letters
    stage = open_stage("align", DistillConfig(), student, teacher, teacher, "text")
    model, before = stage.model(student), state_dict(student)
    replaced = {f"blocks.{i}.att." for i, letter in enumerate(letters) if letter == "r"}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(2):
        stage.loss(model, batch)[0]["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {name for name, p in student.state_dict().items() if not torch.equal(p, before[name])}
    assert {name[: name.index("att.") + 4] for name in moved} == replaced
    for name, p in student.state_dict().items():
        if ".att." in name and name[: name.index("att.") + 4] not in replaced:
            assert torch.equal(p, teacher.state_dict()[name])
    # the error is the mean over the replaced layers alone, each on the teacher's inputs
    assert len([block for block in model.blocks if hasattr(block.att, "pair")]) == len(replaced)


# ------------------------------------------------------------------------------------------
# Bad input


def test_students_that_their_teacher_does_not_allow_are_refused():
    for shape, changes, says in (
        ({"mixer": "r"}, {}, "attention"),
        ({"ffn": "gelu"}, {"ffn": "swiglu"}, "--ffn"),
        ({}, {"decay": "fast"}, "spread"),
        ({}, {"mixer": "rrr"}, "n_layer"),
    ):
        teacher = tiny_model(**shape)
        with pytest.raises(ValueError, match=says) as error:
            make_student(teacher, StudentConfig(**changes))
        one_line(error.value)


def test_freeze_knows_the_names_of_the_models_own_parameters():
    student = make_student(tiny_model().requires_grad_(False), StudentConfig())
    names = [name for name, _ in student.named_parameters()]
    for part in ("att.receptance", "att.w0", "blocks.1.att", "x_k", "ln1.weight"):
        model = Stage(None, frozen=(part,)).model(student)
        frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
        assert len(frozen) == sum(part in name for name in names) > 0, part


def test_a_freeze_that_names_nothing_or_leaves_nothing_is_refused(job, tmp_path):
    """Before stage 1; a tied head is frozen with its embedding."""
    save_model(tiny_model(tied=True), tmp_path / "tied", META)
    tied = {"teacher": str(tmp_path / "tied")}
    for freeze, how, says in (("fnn", {}, "fnn"), ("emb,head,att,ffn,ln", {}, "nothing would be left"),
                              ("emb,att,ffn,ln", tied, "nothing would be left")):
        with pytest.raises(ValueError, match=says):
            distill.distill(job("out", freeze=freeze, **how))
    assert not (tmp_path / "out" / "align").exists()


def test_a_stage_whose_damaged_folder_was_removed_is_run_again(job, tmp_path):
    """As the message says: also the first one."""
    cfg, out = {"align": loop(2), "match": loop(2), "stages": "align,match"}, tmp_path / "out"
    report = distill.distill(job("out", **cfg))
    before = (out / "model.safetensors").read_bytes()
    for stages in (["match"], ["match", "align"]):
        for stage in stages:
            shutil.rmtree(out / stage)
        again = distill.distill(job("out", **cfg, resume=True))
        assert (out / "model.safetensors").read_bytes() == before
        assert [row["kl"] for row in again["stages"]] == [row["kl"] for row in report["stages"]]


def test_a_damaged_stage_file_is_named_and_overwriting_keeps_the_teacher(job, tmp_path):
    one = {"align": loop(1, 1), "match": loop(1, 1), "stages": "align"}
    distill.distill(job("out", **one))
    (tmp_path / "out" / "align" / "stage.json").write_text("{}")
    with pytest.raises(ValueError, match="stage.json is damaged: remove it"):
        distill.distill(job("out", **one, resume=True))
    cfg = job("out", **one, overwrite=True)
    teacher = Path(cfg.teacher)
    for bad, says in (
        (rerun(cfg, out=str(teacher)), "read by this run"),
        (replace(cfg, student=StudentConfig(mixer="a")), "replaces no layer"),
        (replace(cfg, student=StudentConfig(mixer=f"auto:{T}")), "or use auto:T with T above"),
        (replace(cfg, student=StudentConfig(mixer="rrrrr")), "n_layer"),
    ):
        with pytest.raises(ValueError, match=says):
            distill.distill(bad)
        assert (teacher / "model.safetensors").exists()
        assert (tmp_path / "out" / "align" / "model.safetensors").exists()


def test_wandb_without_its_package_is_refused_before_the_old_run_goes(job, tmp_path, monkeypatch):
    distill.distill(job("out", stages="align"))
    before = {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    monkeypatch.setattr(lib.runs, "find_spec", lambda name: None)  # as where it is not installed
    with pytest.raises(ValueError, match="pip install wandb, or omit --wandb") as error:
        distill.distill(job("out", stages="align", overwrite=True, wandb="project"))
    one_line(error.value)
    assert {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()} == before


def test_models_and_data_of_other_tokens_are_refused(job, tmp_path):
    small, gpt2 = str(tmp_path / "small"), str(tmp_path / "gpt2")
    save_model(tiny_model(vocab_size=100), small, META)
    save_model(tiny_model(vocab_size=300), gpt2, {"tokenizer": "gpt2"})
    cases = [
        ({"teacher": small}, "257 tokens, the student 100"),
        ({"logit_teacher": small}, "257 tokens, the teacher 100, and token 256 occurs"),
        ({"teacher": gpt2}, "gpt2"),
        ({"logit_teacher": gpt2}, "gpt2"),
    ]
    for i, (change, says) in enumerate(cases):
        with pytest.raises(ValueError, match=says) as error:
            distill.distill(job(f"out{i}", **change))
        one_line(error.value)


def test_learned_positions_that_end_too_early_are_found_before_anything_trains(job, tmp_path, monkeypatch):
    monkeypatch.setattr(distill, "fit", lambda *_: pytest.fail("a stage ran"))
    for n in (16, 8):
        save_model(tiny_model(positions="learned", block_size=n), tmp_path / f"learned{n}", META)
    learned = {"teacher": str(tmp_path / "learned16"), "student": StudentConfig(mixer="ra")}
    for change, says in (({"finish_block_size": 32}, "finish_block_size = 32: the student has learned 16"),
                         ({"block_size": 32}, "^block_size = 32: .*learned16 has learned 16"),
                         ({"logit_teacher": str(tmp_path / "learned8")}, "^block_size = 16: .*learned 8")):
        with pytest.raises(ValueError, match=says) as error:
            distill.distill(job("out", **learned | change))
        one_line(error.value)


def test_a_student_looks_at_as_much_as_there_is(job, tiny, tmp_path):
    """Few examples, of which one step takes two: the look would like 256."""
    report = distill.distill(job("out", data=tiny.sft, stages="match"))
    assert report["stages"][-1]["tokens"] > 0


def test_a_damaged_teacher_or_stage_is_named(job, tmp_path):
    (tmp_path / "empty").mkdir()
    for folder in ("empty", "missing"):
        with pytest.raises(ValueError, match=folder) as error:
            distill.distill(job("out", teacher=str(tmp_path / folder)))
        one_line(error.value)
    distill.distill(job("done", stages="align"))
    file = tmp_path / "done" / "align" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match="align") as error:
        distill.distill(job("done", stages="align,match", resume=True))
    one_line(error.value)


def test_resuming_with_another_student_is_refused_in_one_line(job):
    distill.distill(job("out", stages="align"))
    with pytest.raises(ValueError, match="gate|other") as error:
        distill.distill(job("out", stages="align,match", resume=True, student=StudentConfig(gate=False)))
    one_line(error.value)


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--stages", "match,align"], "name some of align, ?match, ?finish, in this order"),
        (["--stages", "align,distil"], "name some of align, ?match, ?finish"),
        (["--kl_weight", "0"], "both 0"),
        (["--align.eval_every", "5"], "align.eval_every: only match is evaluated"),
        (["--finish.eval_every", "5"], "finish.eval_every: only match is evaluated"),
        (["--dpo_smoothing", "0.5"], "below 0.5"),
        (["--kl_kind", "both"], "forward"),
        (["--eval_tokens", "0"], "at least 1"),
        (["--match.beta1", "1.5"], "beta1 = 1.5.*below 1.0"),
        (["--align.save_every", "5"], "save_every"),
    ],
    ids=lambda x: x[0][2:] if isinstance(x, list) else "",
)
def test_settings_that_cannot_be_are_refused_in_one_line(flags, says, tmp_path):
    with pytest.raises(ValueError, match=says) as error:
        distill.main([*flags, "--out", str(tmp_path / "out")])
    one_line(error.value)
    assert not (tmp_path / "out").exists()


def test_options_of_the_run_are_said_once(capsys):
    """--save_every, and no --align.save_every, --match.save_every, ..."""
    with pytest.raises(SystemExit):
        cli(DistillConfig, ["--help"])
    words = capsys.readouterr().out.replace("-", "_").split()
    flags = {word.strip(",") for word in words if re.match("__[a-z]", word)}
    assert {"__save_every", "__out", "__resume", "__align.max_steps", "__match.bptt_chunk"} <= flags
    assert not any(
        flag.endswith(name) for name in (".save_every", ".out", ".log_every", ".wandb") for flag in flags
    )


def test_the_command_that_a_report_ends_with_is_right_for_a_folder_with_a_space(job, tmp_path, capsys):
    distill.distill(job("my student", stages="align", align=loop(1)))
    command = capsys.readouterr().out.partition("Now: ")[2]
    assert shlex.split(command) == ["python", "sample.py", "--ckpt", str(tmp_path / "my student"),
                                    "--prompt", "The "]
