"""The whole story in one command: data, teacher, student and report from nothing."""

import json
import math
from pathlib import Path

import pytest
import torch

import data.prepare
import distill
import tools.demo
import tools.evaluate
from common import metrics, one_line, tiny_model
from common_distill import weights
from lib.folders import load_model, save_model

SMALL = {"n_embd": 32, "n_layer": 2, "n_head": 2, "block_size": 32}
FLAGS = [f"--teacher_model.{name}={size}" for name, size in SMALL.items()]
FLAGS += [
    "--teacher_fit.max_steps",
    "80",
    "--teacher_fit.batch_size",
    "8",
    "--teacher_fit.warmup_steps",
    "5",
    "--align.max_steps",
    "40",
    "--align.batch_size",
    "4",
    "--match.max_steps",
    "80",
    "--match.batch_size",
    "2",
    "--finish.max_steps",
    "5",
    "--finish.batch_size",
    "4",
    "--eval_tokens",
    "1500",
    "--device",
    "cpu",
]


@pytest.fixture
def small_sources(tiny, tmp_path, monkeypatch):
    """An empty folder to work in, where the embedded sources are tiny."""
    files = {"pydoc": tiny.text + ".txt", "pydoc-sft": tiny.sft + ".jsonl", "pydoc-dpo": tiny.dpo + ".jsonl"}
    real = data.prepare.prepare
    monkeypatch.setattr(data.prepare, "prepare", lambda name, out, *rest: real(Path(files[name]), out, *rest))
    monkeypatch.chdir(tmp_path)


def check_report(report: dict) -> None:
    """Every key, and numbers that follow from each other."""
    assert {"teacher", "student", "stages", "gap", "kl", "top1", "recovered", "controls"} <= set(report)
    for who in ("teacher", "student"):
        assert {"val_loss", "params"} <= set(report[who])
    assert report["gap"] == report["student"]["val_loss"] - report["teacher"]["val_loss"]
    stages = {row["name"]: row for row in report["stages"]}
    assert list(stages) == ["start", "align", "match", "finish"]
    for row in stages.values():
        assert {"name", "tokens", "minutes", "val_loss", "kl", "top1", "gap"} <= set(row)
    tokens = [row["tokens"] for row in stages.values()]
    assert tokens[:3] == [0, 40 * 4 * 32, 80 * 2 * 32] and tokens[3] > 0
    # each stage that teaches brings the student nearer, and the report describes the
    # last of them
    kl = {name: row["kl"] for name, row in stages.items()}
    assert kl["start"] > kl["align"] > kl["match"] > 0
    assert all(report[key] == stages["match"][key] for key in ("kl", "gap", "top1"))
    controls = report["controls"]
    assert {"RWKV-7 from scratch", "no stage 1", "no weight transfer", "cross-entropy only"} <= set(controls)
    for name, row in controls.items():  # as many tokens as in stages 1 and 2 together
        assert row["tokens"] == (40 * 4 + 80 * 2) * 32 and math.isfinite(row["gap"]), name
    assert controls["RWKV-7 from scratch"]["kl"] > kl["match"]


def test_the_whole_job_from_nothing_and_again_with_preferences(small_sources, tmp_path, monkeypatch, capsys):
    """Data and teacher made where missing; three stages; controls; all report keys.

    Resumed when it is done it trains nothing; and from the distilled student another
    finish, on preferences.
    """
    tools.demo.main([*FLAGS, "--controls"])
    printed = capsys.readouterr().out
    assert "data/pydoc is missing" in printed and "out/teacher is missing" in printed
    out = tmp_path / "out" / "rwkv"
    report = json.loads((out / "report.json").read_text())
    check_report(report)
    assert (out / "report.md").read_text() in printed and (out / "report.png").read_bytes()[:4] == b"\x89PNG"
    for folder in (out, out / "align", out / "match", out / "finish", tmp_path / "out" / "teacher"):
        assert load_model(folder)(torch.zeros(1, 3, dtype=torch.long))[0].isfinite().all()
    assert (out / "model.safetensors").read_bytes() == (out / "finish" / "model.safetensors").read_bytes()

    # refused without --resume; with it nothing trains, and the report is the same
    with pytest.raises(ValueError, match="--resume"):
        tools.demo.main(FLAGS)
    before = {p: p.read_bytes() for p in out.rglob("*.safetensors")}
    with monkeypatch.context() as patch:
        patch.setattr(distill, "fit", lambda *_: pytest.fail("a stage ran again"))
        tools.demo.main([*FLAGS, "--resume"])
    assert {p: p.read_bytes() for p in out.rglob("*.safetensors")} == before
    again = json.loads((out / "report.json").read_text())
    assert all(again[key] == report[key] for key in again if key != "controls")
    assert again.keys() >= report.keys() - {"controls"}

    # tools.evaluate alone measures the same
    tools.evaluate.main(
        [
            "--teacher",
            "out/teacher",
            "--student",
            "out/rwkv/match",
            "--data",
            "data/pydoc",
            "--max_tokens",
            "1500",
            "--out",
            "out/alone",
        ]
    )
    alone = json.loads((tmp_path / "out" / "alone" / "report.json").read_text())
    assert alone["gap"] == pytest.approx(report["gap"], abs=1e-6)
    assert alone["kl"] == pytest.approx(report["kl"], rel=1e-4)

    # another finish on the same distilled student
    for name in ("finish", "report.json"):
        (out / name).rename(out / f"sft-{name}")
    tools.demo.main([*FLAGS, "--finish_data", "data/pydoc-dpo", "--resume"])
    rows = metrics(out / "finish")
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=0.05) and {"accuracy", "margin"} <= set(rows[0])
    assert weights(out / "finish")["head.weight"].ne(weights(out / "match")["head.weight"]).any()


def test_what_cannot_be_is_refused_before_a_teacher_is_trained(small_sources, tmp_path):
    (tmp_path / "out" / "rwkv" / "align" / "checkpoints").mkdir(parents=True)
    for flags, says in (
        (["--controls", "--stages", "align"], "controls compare with the stages align,match"),
        ([], "holds another run"),
        (["--teacher", "out/rwkv"], "read by this run"),
        (["--teacher_fit.beta1", "1.5"], "beta1 = 1.5"),
        (["--out", "new", "--mixer", "first:5"], "first:5"),
        (["--out", "new", "--mixer", "a"], "replaces no layer"),
        (["--out", "new", "--freeze", "att.mlp"], "no parameter has 'att.mlp'"),
        (["--out", "new", "--ffn", "swiglu"], "cannot take over"),
        (["--out", "new", "--teacher_model.positions", "learned", "--block_size", "33"],
         "block_size = 33: .* learned 32 positions: lower it"),
        (["--out", "new", "--finish_data", "nowhere"], "no data at nowhere"),
        (["--out", "new", "--logit_teacher", "nobody"], "no model at nobody"),
    ):
        with pytest.raises(ValueError, match=says) as error:
            tools.demo.main([*FLAGS, *flags])
        one_line(error.value)
    assert {p.name for p in tmp_path.iterdir()} <= {"out", "data"}
    assert not list((tmp_path / "out").glob("teacher*"))


def test_controls_of_a_run_that_replaces_another(small_sources, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(tools.demo, "train_teacher", lambda cfg: None)
    monkeypatch.setattr(tools.demo, "distill", lambda cfg: seen.append(cfg.run.overwrite))
    monkeypatch.setattr(tools.demo, "add_controls", lambda cfg: seen.append(cfg.run.overwrite))
    tools.demo.main([*FLAGS, "--controls", "--overwrite"])
    assert seen == [True, False]


def test_half_a_teacher_never_teaches_and_goes_on(small_sources, tmp_path, monkeypatch):
    """Interrupted, it lies beside its place; the next run takes it up there."""

    def interrupted(*args, **kwargs):
        real(*args, **kwargs)
        raise KeyboardInterrupt

    real = tools.demo.train
    monkeypatch.setattr(tools.demo, "distill", lambda cfg: {"teacher": load_model(cfg.teacher).n_params()})
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tools.demo, "train", interrupted)
        tools.demo.main([*FLAGS, "--teacher_fit.max_steps", "2"])
    partial = tmp_path / "out" / "teacher.partial"
    assert partial.exists() and not (tmp_path / "out" / "teacher").exists()
    with pytest.raises(ValueError, match=r"n_layer = 2, not 3: .* move out/teacher\.partial away") as error:
        tools.demo.main([*FLAGS, "--teacher_fit.max_steps", "3", "--teacher_model.n_layer", "3"])
    assert "--out" not in one_line(error.value)            # which says where the student goes
    tools.demo.main([*FLAGS, "--teacher_fit.max_steps", "3"])
    assert not partial.exists()
    assert [row["step"] for row in metrics(tmp_path / "out" / "teacher")] == [2, 3]


def test_a_shape_for_a_teacher_that_is_there_already_is_refused(small_sources, tmp_path, monkeypatch):
    """It was left aside without a word, and the student was the old teacher's."""
    taught = []
    monkeypatch.setattr(tools.demo, "distill", lambda cfg: taught.append(cfg.teacher))
    save_model(tiny_model(mixer="aa"), tmp_path / "out" / "teacher", {"tokenizer": "bytes"})
    with pytest.raises(ValueError, match="out/teacher is there already, with .* a new --teacher") as e:
        tools.demo.main(["--device", "cpu", "--teacher_model.n_layer", "1"])
    one_line(e.value)
    assert not taught
    tools.demo.main(["--device", "cpu"])                   # who asks for none takes what is there
    assert taught == ["out/teacher"]
    same = {"n_layer": 2, "n_embd": 32, "n_head": 2, "rwkv_head_size": 16, "block_size": 16}
    tools.demo.main(["--device", "cpu", *(f"--teacher_model.{name}={size}" for name, size in same.items())])
    assert len(taught) == 2
