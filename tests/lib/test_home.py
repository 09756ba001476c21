"""A run's folder: nobody writes it meanwhile, nothing goes too early, it goes on as it
began.
"""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import data.prepare
import distill
import lib.home
import lib.runs
import tools.controls
import tools.recall
import train
from common import TINY, one_line, tiny_model
from common_distill import META, job, loop, rerun, teacher  # noqa: F401   (fixtures)
from common_train import QUIET, Killed, dies_at_call, run_fit
from lib.folders import fingerprint, load_model, read_tensor, save_model
from lib.home import NEW, OLD, TRAIN, check_order, read_settings, replace as take_place, tidy
from lib.runs import load_trainer, read_row
from train import FitConfig, cross_entropy_loss

HOLD = """
import pathlib, sys
from lib.home import lock
held = lock(pathlib.Path(sys.argv[1]))
print("locked", flush=True)
sys.stdin.read()
"""


def steps(n: int, **changes) -> FitConfig:
    return FitConfig(**{"max_steps": n, "batch_size": 2, "schedule": "constant"} | QUIET | changes)


def files(folder: Path) -> dict[str, bytes]:
    """Everything in a folder that carries meaning."""
    found = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> str:
    """Another text, of the same tokens."""
    folder = tmp_path_factory.mktemp("other")
    (folder / "text.txt").write_text("Another text than that of the other tests. " * 60)
    data.prepare.main([str(folder / "text.txt"), "--out", str(folder / "data")])
    return str(folder / "data")


def refused(work, says: str) -> str:
    with pytest.raises(ValueError, match=says) as error:
        work()
    return one_line(error.value)


# ------------------------------------------------------------------------------------------
# What --overwrite replaces


def test_the_old_run_stays_until_the_new_ones_first_checkpoint_is_whole(tmp_path, tiny):
    out = tmp_path / "run"
    run_fit(out, tiny.text, steps(2))
    old = files(out)
    with pytest.raises(Killed):
        run_fit(out, tiny.text, steps(4), loss_fn=dies_at_call(2), resume=False, overwrite=True)
    assert {name: old[name] for name in old} == {name: files(out)[name] for name in old}
    run_fit(out, tiny.text, steps(4), resume=False, overwrite=True)
    run_fit(tmp_path / "fresh", tiny.text, steps(4))
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "fresh/model.safetensors").read_bytes()
    assert not (out / "checkpoints/step_0000002").exists()
    assert not (out / NEW).exists() and not (out / OLD).exists()


def test_a_replacement_that_was_killed_anywhere_is_finished_and_the_model_is_always_there(
    tmp_path, tiny, monkeypatch
):
    """Every rename and every removal is a place to die."""
    real = {name: getattr(module, name) for module, name in ((os, "replace"), (lib.home.shutil, "rmtree"))}
    for death in range(12):
        out = tmp_path / f"run{death}"
        run_fit(out, tiny.text, steps(2))
        run_fit(out / NEW, tiny.text, steps(3))
        expected = files(out / NEW)
        calls = []

        def dying(name):
            def call(*args, **kwargs):
                calls.append(name)
                if len(calls) == death + 1:
                    raise Killed
                return real[name](*args, **kwargs)
            return call

        monkeypatch.setattr(lib.home.os, "replace", dying("replace"))
        monkeypatch.setattr(lib.home.shutil, "rmtree", dying("rmtree"))
        died = False
        try:
            take_place(out, TRAIN)
        except Killed:
            died = True
        monkeypatch.setattr(lib.home.os, "replace", real["replace"])
        monkeypatch.setattr(lib.home.shutil, "rmtree", real["rmtree"])
        load_model(out)                                      # whichever it is, at any moment
        tidy(out, TRAIN)
        assert files(out) == expected, death
    assert not died                                          # the last round had no place left to die at


def test_what_nobody_needs_any_more_is_swept_and_an_unborn_run_is_forgotten(tmp_path, tiny):
    out = tmp_path / "run"
    run_fit(out, tiny.text, steps(2))
    old = files(out)
    (out / "checkpoints/step_0000009.tmp").mkdir()
    (out / "meta.json.tmp").write_text("half")
    (out / NEW / "checkpoints/step_0000001").mkdir(parents=True)        # killed before it was published
    (out / NEW / "metrics.jsonl").write_text("")
    tidy(out, TRAIN)
    assert files(out) == old and not (out / NEW).exists()


def test_only_what_a_run_wrote_is_replaced_and_never_what_it_reads(tmp_path, tiny):
    model, link = tmp_path / "model", tmp_path / "link"
    save_model(tiny_model(), model, META)
    link.symlink_to(tmp_path / "nowhere")
    flags = [*TINY, "--max_steps", "1", "--batch_size", "2", "--device", "cpu", "--data", tiny.text]
    inside = model / "checkpoints" / "teacher"
    save_model(tiny_model(), inside, META)
    before = files(tmp_path)
    for bad, says in (
        (["--out", tiny.text], "is read by this run"),
        (["--out", str(link)], "is a link to .*nowhere, which does not exist"),
        (["--out", str(model), "--init", str(inside)], "is read by this run"),
    ):
        refused(lambda: train.main([*flags, *bad, "--overwrite"]), says)
    (inside / "config.json").unlink()
    for file in list(inside.iterdir()):
        file.unlink()
    inside.rmdir()
    (model / "checkpoints").rmdir()
    refused(lambda: train.main([*flags, "--out", str(model), "--overwrite"]), "no run that it could be of")
    assert {name: data for name, data in before.items() if "teacher" not in name} == files(tmp_path)


# ------------------------------------------------------------------------------------------
# One process at a time


def test_a_folder_that_another_process_writes_is_refused_and_the_process_named(tmp_path, tiny):
    out = tmp_path / "run"
    run_fit(out, tiny.text, steps(2))
    before = files(out)
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(out)], stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE, text=True, cwd=Path(train.__file__).parent)
    try:
        assert other.stdout.readline() == "locked\n"
        for options in ({"resume": True}, {"resume": False, "overwrite": True}):
            refused(lambda: run_fit(out, tiny.text, steps(4), **options), f"another process .{other.pid} on ")
        assert files(out) == before
    finally:
        other.communicate("")
    run_fit(out, tiny.text, steps(4))


# ------------------------------------------------------------------------------------------
# The settings of the start


FLAGS = [*TINY, "--batch_size", "2", "--device", "cpu"]


@pytest.mark.parametrize("change, says", [
    (["--learning_rate", "1e-3"], "learning_rate = 0.002, not 0.001"),
    (["--batch_size", "4"], "batch_size . accum . processes = 2, not 4"),
    (["--beta2", "0.95"], "beta2 = 0.99, not 0.95"),
    (["--seed", "7"], "seed = 0, not 7"),
    (["--data", "OTHER"], "another data than is now in"),
])
def test_a_run_is_resumed_with_the_settings_of_its_start(tmp_path, tiny, other, change, says):
    out = tmp_path / "run"
    start = [*FLAGS, "--out", str(out), "--max_steps", "2", "--data", tiny.text]
    train.main(start)
    before = files(out)
    change = [other if word == "OTHER" else word for word in change]
    refused(lambda: train.main([*start, *change, "--resume"]), says)
    assert files(out) == before


def test_the_same_batches_in_other_pieces_and_more_steps_are_no_other_run(tmp_path, tiny):
    flags = ["--out", str(tmp_path / "run"), "--data", tiny.text, *TINY, "--device", "cpu", "--batch_size"]
    train.main([*flags, "4", "--max_steps", "2", "--save_every", "1"])
    train.main([*flags, "2", "--accum", "2", "--max_steps", "3", "--keep_last", "1", "--resume"])
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir()) == ["step_0000003"]


def test_a_distillation_goes_on_with_its_own_teacher_data_and_losses(job, other, tmp_path):  # noqa: F811
    first = job("out", stages="align")
    distill.distill(first)
    stranger = str(tmp_path / "stranger")
    save_model(tiny_model(seed=1), stranger, META)
    whole = rerun(replace(first, stages="align,match", kl_kind="reverse"), resume=True)
    for bad, says in (
        ({"teacher": stranger}, "another teacher"),
        ({"data": other}, "another data"),
        ({"align_kind": "l2norm"}, "align_kind = relative, not l2norm"),
        ({"student": replace(first.student, gate=False)}, "gate = True, not False"),
        ({"align": loop(3, learning_rate=1.0)}, "align.learning_rate = 0.001, not 1.0"),
    ):
        refused(lambda: distill.distill(replace(whole, **bad)), says)
    distill.distill(whole)                                   # a stage that had not begun has its own settings
    refused(lambda: distill.distill(replace(whole, ce_weight=0.5)), "ce_weight = 0.0, not 0.5")
    refused(lambda: distill.distill(replace(whole, align=loop(9))),
            "align.max_steps = 3, not 9 .and match is built upon it")
    longer = distill.distill(replace(whole, match=loop(5)))
    distill.distill(replace(whole, match=loop(5)))           # and once more, as it is
    tokens = [row["tokens"] for row in longer["stages"]]
    assert tokens[2] * 3 == tokens[1] * 5 > 0                # three steps of align, and now five of match


def test_stages_may_have_lengths_of_their_own_and_a_run_says_them_again(job, tmp_path):  # noqa: F811
    """The block size that is the teacher's is the same, said or not."""
    distill.distill(job("out", stages="align", block_size=8))
    whole = job("out", stages="align,match", resume=True)
    for again in (whole, replace(whole, block_size=16), replace(whole, match=loop(5, batch_size=2))):
        distill.distill(again)
    refused(lambda: distill.distill(replace(whole, block_size=4)), "match.block_size = 16, not 4")


def test_folders_are_known_by_what_is_in_them(tmp_path, tiny, other):
    a, b = tmp_path / "a", tmp_path / "b"
    model = tiny_model()
    save_model(model, a, META)
    save_model(model, b, META)
    assert fingerprint(a) == fingerprint(b) != fingerprint(tiny.text) != fingerprint(other)
    with torch.no_grad():
        model.emb.weight[0, 0] += 1e-6
    save_model(model, b, META)
    assert fingerprint(a) != fingerprint(b) and fingerprint(tmp_path / "none") is None


# ------------------------------------------------------------------------------------------
# Damage


def test_a_flipped_bit_of_a_weight_is_found_wherever_it_is(tmp_path):
    save_model(tiny_model(), tmp_path, META)
    file = tmp_path / "model.safetensors"
    good = file.read_bytes()
    begin = 8 + int.from_bytes(good[:8], "little")
    for place in range(begin, len(good), (len(good) - begin) // 50):
        bad = bytearray(good)
        bad[place] ^= 1 << place % 8
        file.write_bytes(bad)
        refused(lambda: load_model(tmp_path), "is damaged: .* has another checksum than when it was saved")
    file.write_bytes(good)
    load_model(tmp_path)


def test_a_flipped_bit_of_a_trainer_is_found_wherever_it_changes_a_number(tmp_path, tiny):
    """Bits that no reader looks at, as in the gaps of the archive, may be anything."""
    run_fit(tmp_path, tiny.text, steps(2))
    folder = tmp_path / "checkpoints/step_0000002"
    file = folder / "trainer.pt"
    good, expected = file.read_bytes(), str(load_trainer(folder))
    found = 0
    for place in range(0, len(good), len(good) // 200):
        bad = bytearray(good)
        bad[place] ^= 1 << place % 8
        file.write_bytes(bad)
        try:
            assert str(load_trainer(folder)) == expected
        except ValueError as error:
            assert "trainer.pt is damaged" in one_line(error)
            found += 1
    assert found > 100


def test_a_model_of_before_has_no_checksums_and_is_read(tmp_path):
    from safetensors.torch import save_file
    model = tiny_model()
    save_model(model, tmp_path, META)
    weights = {name: p for name, p in model.state_dict().items()}
    save_file(weights, tmp_path / "model.safetensors")
    assert torch.equal(load_model(tmp_path).emb.weight, model.emb.weight)
    assert torch.equal(read_tensor(tmp_path / "model.safetensors", "emb.weight"), model.emb.weight)


def test_the_loss_of_a_run_is_that_of_before(tmp_path, tiny):
    """Under --overwrite a run writes elsewhere at first, and its log comes along."""
    a = run_fit(tmp_path / "a", tiny.text, steps(3), loss_fn=cross_entropy_loss)
    run_fit(tmp_path / "b", tiny.text, steps(1))
    b = run_fit(tmp_path / "b", tiny.text, steps(3), resume=False, overwrite=True, save_every=2)
    assert a["loss"] == b["loss"]
    rows = (tmp_path / "b/metrics.jsonl").read_text().splitlines()
    assert len(rows) == 3


def test_a_run_whose_replacement_was_killed_is_known_as_one(tmp_path, tiny):
    """Between the two halves of a replacement the folder holds a model and no run."""
    out = tmp_path / "run"
    save_model(tiny_model(mixer="r", std=0.05), out, META)
    run_fit(out / NEW, tiny.text, steps(2))
    (out / OLD).mkdir()
    (out / OLD / "moved").touch()
    refused(lambda: run_fit(out, tiny.text, steps(3), resume=False), "holds another run")
    run_fit(out, tiny.text, steps(3))
    run_fit(tmp_path / "whole", tiny.text, steps(3))
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()


def test_links_to_nowhere_are_named_and_an_empty_folder_is_no_run(tmp_path, tiny):
    out, disk = tmp_path / "run", tmp_path / "disk"
    out.mkdir()
    (out / "checkpoints").symlink_to(disk)
    refused(lambda: run_fit(out, tiny.text, steps(2), resume=False), "checkpoints is a link to .*disk, which")
    disk.mkdir()
    run_fit(out, tiny.text, steps(2), resume=False)
    assert (disk / "step_0000002/trainer.pt").exists()
    refused(lambda: run_fit(out, tiny.text, steps(2), resume=False, overwrite=True), "would not empty")


# ------------------------------------------------------------------------------------------
# What a second adversary found

def test_a_flipped_bit_of_a_row_or_of_the_settings_is_no_other_number(tmp_path, job):  # noqa: F811
    """Of a checksum's own name nothing depends: without one it is a file of before."""
    distill.distill(job("out", stages="align"))
    out = tmp_path / "out"
    for name, read in (("align/stage.json", read_row), ("start.json", read_row),
                       ("settings.json", read_settings)):
        good, expected = (out / name).read_bytes(), read(out / name)
        refusals = 0
        for place in range(0, len(good) - 1, max(1, len(good) // 150)):
            bad = bytearray(good)
            bad[place] ^= 1 << place % 7
            (out / name).write_bytes(bad)
            try:
                assert expected.items() <= read(out / name).items()
            except ValueError as error:
                assert name.split("/")[-1] in one_line(error) and "remove it" in str(error)
                refusals += 1
        assert refusals > 90
        (out / name).write_bytes(good)
        assert read(out / name) == expected


def test_a_changed_setting_of_a_saved_model_is_found(tmp_path):
    """One that leaves all shapes as they are."""
    save_model(tiny_model(), tmp_path, META)
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace("10000.0", "18000.0"))
    refused(lambda: load_model(tmp_path), "config.json is damaged: it has another checksum")
    (tmp_path / "config.json").write_text(text)
    load_model(tmp_path)


def test_a_student_with_other_layers_is_refused_before_its_first_checkpoint(
    job, tmp_path, monkeypatch  # noqa: F811
):
    """start.json holds what the first one knew."""
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(distill, "fit", dies_at_call(1))
        distill.distill(job("out"))
    before = files(tmp_path / "out")
    again = job("out", resume=True)
    refused(lambda: distill.distill(replace(again, student=replace(again.student, mixer="first:1"))), "mixer")
    assert files(tmp_path / "out") == before
    distill.distill(replace(again, student=replace(again.student, mixer="rr")))      # said otherwise


def test_a_run_that_ended_by_its_loss_is_at_its_end_when_resumed(tmp_path, tiny):
    first = run_fit(tmp_path, tiny.text, steps(9, terminate_at_loss=1e9))
    before = (tmp_path / "model.safetensors").read_bytes()
    assert run_fit(tmp_path, tiny.text, steps(9, terminate_at_loss=1e9))["step"] == first["step"] < 9
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert run_fit(tmp_path, tiny.text, steps(9))["step"] == 9


def test_data_are_the_same_with_and_without_their_digests(tmp_path, tiny):
    """Their message advises to remove them."""
    shutil.copytree(tiny.text, tmp_path / "data")
    meta = json.loads((tmp_path / "data/meta.json").read_text())
    del meta["blocks"], meta["digest"]
    (tmp_path / "data/meta.json").write_text(json.dumps(meta))
    assert fingerprint(tmp_path / "data") == fingerprint(tiny.text)


def test_a_stage_is_nobody_elses_folder_and_none_comes_after_what_is_built_upon_it(
    job, tmp_path, tiny  # noqa: F811
):
    distill.distill(job("out", stages="match"))
    out = tmp_path / "out"
    for how in ("--overwrite", "--resume"):
        refused(lambda: train.main([*FLAGS, "--data", tiny.text, "--out", str(out / "match"), how]),
                "is a stage of the distillation in ")
    refused(lambda: distill.distill(job("out", stages="align,match", resume=True)),
            "has begun match without align")
    removed = ["align", "match"]                           # the first, as a message advised
    check_order(out, removed, ["match"], ["match"], removed)


def test_a_run_does_not_begin_in_what_another_replaces(job, tmp_path, tiny, monkeypatch):  # noqa: F811
    distill.distill(job("out", stages="match"))
    before = files(tmp_path)
    monkeypatch.chdir(tmp_path / "out" / "match")
    for out in ("checkpoints", "checkpoints/mine", "mine"):
        refused(lambda: train.main([*FLAGS, "--data", tiny.text, "--out", out]), "choose another --out")
    assert files(tmp_path) == before


def test_a_run_that_came_and_went_meanwhile_is_seen(tmp_path, tiny, monkeypatch):
    """Between a look at the folder and the first step a large model is read."""
    out, begin = tmp_path / "run", lib.runs.Run.begin

    def late(self, *args):
        with monkeypatch.context() as patch:
            patch.setattr(lib.runs.Run, "begin", begin)
            run_fit(out, tiny.text, steps(2))
        begin(self, *args)

    monkeypatch.setattr(lib.runs.Run, "begin", late)
    refused(lambda: run_fit(out, tiny.text, steps(4), resume=False), "holds another run")


def test_controls_are_of_the_distillation_that_is_there_and_keep_its_folder(
    job, tmp_path, monkeypatch  # noqa: F811
):
    cfg = job("out", stages="align,match")
    distill.distill(cfg)
    same = {name: getattr(cfg, name) for name in cfg.__dataclass_fields__}
    before = files(tmp_path)
    refused(lambda: tools.controls.add_controls(tools.controls.ControlsConfig(**same | {"align": loop(9)})),
            "was distilled with align.max_steps")
    student = replace(cfg.student, mixer="first:1")
    refused(lambda: tools.controls.add_controls(tools.controls.ControlsConfig(**same | {"student": student})),
            "was distilled with mixer = rr, not ra")
    assert files(tmp_path) == before

    def held(cfg):
        code = "import pathlib, sys; from lib.home import lock; lock(pathlib.Path(sys.argv[1]))"
        done = subprocess.run([sys.executable, "-c", code, cfg.run.out], capture_output=True, text=True,
                              cwd=Path(train.__file__).parent)
        assert f"another process ({os.getpid()} on" in done.stderr
        raise Killed

    monkeypatch.setattr(tools.controls, "run_controls", held)
    with pytest.raises(Killed):
        tools.controls.add_controls(tools.controls.ControlsConfig(**same))


def test_a_second_recall_leaves_the_data_of_the_first_alone(tmp_path):
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE, text=True, cwd=Path(train.__file__).parent)
    try:
        assert other.stdout.readline() == "locked\n"
        refused(lambda: tools.recall.main(["--out", str(tmp_path), "--device", "cpu"]), "another process")
        assert not any((tmp_path / "data").iterdir())
    finally:
        other.communicate("")
