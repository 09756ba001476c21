"""A run's folder: checkpoints whole, resumed, damaged; what its gauges say and when."""

import json
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch

import lib.runs
from common import T, assert_same_run, metrics, newest, one_line, tiny_model
from common_train import META, QUIET, Killed, open_run, run_fit
from lib.folders import save_model
from lib.home import TRAIN, check_free, take_over_former_names
from lib.processes import using_threads
from lib.runs import Interrupt, Progress, RunConfig, read_metrics, read_row
from lib.scores import cross_entropy
from train import FitConfig, cross_entropy_loss


def steps(n: int, **changes) -> FitConfig:
    return FitConfig(**{"max_steps": n, "batch_size": 2} | QUIET | changes)


def whole_checkpoints(out) -> list[str]:
    return sorted(p.name for p in (out / "checkpoints").glob("step_???????"))


# ------------------------------------------------------------------------------------------
# Checkpoints, and going on from them


def test_keep_last_keeps_the_newest_k_whole_checkpoints(tmp_path, tiny):
    out = tmp_path / "run"
    stale = out / "checkpoints" / "step_0000099.tmp"  # a killed run left it: no checkpoint
    stale.mkdir(parents=True)
    run_fit(out, tiny.text, steps(9), keep_last=2, save_every=2)
    assert whole_checkpoints(out) == ["step_0000008", "step_0000009"]
    for name in ("config.json", "meta.json", "model.safetensors"):  # OUT itself is the newest model
        assert (out / name).read_bytes() == (out / "checkpoints" / "step_0000009" / name).read_bytes()
    one = tmp_path / "one"
    (one / "checkpoints" / "step_0000099.tmp").mkdir(parents=True)
    run_fit(one, tiny.text, steps(3), keep_last=1, save_every=2)
    assert whole_checkpoints(one) == ["step_0000003"]


def test_a_finished_run_resumed_stays_as_it_is_and_with_more_steps_goes_on(tmp_path, tiny):
    out, other = tmp_path / "run", tiny_model(mixer="r", seed=9)
    first = run_fit(out, tiny.text, steps(4, schedule="constant"))
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in newest(out).iterdir()}
    model = (out / "model.safetensors").read_bytes()
    again = run_fit(out, tiny.text, steps(4, schedule="constant"), other)
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in newest(out).iterdir()} == before
    assert (out / "model.safetensors").read_bytes() == model
    assert (again["step"], again["tokens"]) == (first["step"], first["tokens"])
    run_fit(out, tiny.text, steps(6, schedule="constant"), other)
    run_fit(tmp_path / "whole", tiny.text, steps(6, schedule="constant"))
    assert_same_run(out, tmp_path / "whole")


@pytest.mark.parametrize("cores, asked, gets", ((4, None, 3), (2, None, 2), (4, "1", 1)))
def test_a_run_goes_on_with_the_threads_it_had_unless_others_are_asked_for(
    tmp_path, tiny, monkeypatch, capsys, cores, asked, gets
):
    """Their number decides how sums are rounded. Never more than there are cores."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(lib.runs.os, "cpu_count", lambda: cores)
    with using_threads(3):
        run_fit(tmp_path, tiny.text, steps(2))
        torch.set_num_threads(1)
        if asked:
            monkeypatch.setenv("OMP_NUM_THREADS", asked)
        run_fit(tmp_path, tiny.text, steps(3))
        assert torch.get_num_threads() == gets
        said = [line for line in capsys.readouterr().out.splitlines() if "1 x cpu" in line]
        assert "1 x cpu with 3 threads" in said[0] and ("with" in said[1]) == (gets > 1)


def test_a_run_that_dies_between_its_last_checkpoint_and_publishing_it_publishes_when_resumed(
    tmp_path, tiny, monkeypatch
):
    out = tmp_path / "run"

    def dies(*_):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(lib.runs, "publish", dies)
        run_fit(out, tiny.text, steps(2))
    assert newest(out).name == "step_0000002" and not (out / "model.safetensors").exists()
    assert run_fit(out, tiny.text, steps(2))["step"] == 2
    assert (out / "model.safetensors").read_bytes() == (newest(out) / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def trained_once(tmp_path_factory, tiny):
    out = tmp_path_factory.mktemp("trained") / "once"
    run_fit(out, tiny.text, steps(4), save_every=2)
    return out


@pytest.mark.parametrize("name", ["model.safetensors", "trainer.pt", "config.json"])
@pytest.mark.parametrize("damage", ["truncated", "overwritten", "empty", "missing"])
def test_a_damaged_checkpoint_is_named_on_resume(tmp_path, tiny, trained_once, name, damage):
    out = tmp_path / "run"
    shutil.copytree(trained_once, out)
    victim = newest(out) / name
    content = victim.read_bytes()
    if damage == "missing":
        victim.unlink()
    else:
        damaged = {"truncated": content[: len(content) // 2], "overwritten": b"\xff\x00" * 500, "empty": b""}
        victim.write_bytes(damaged[damage])
    with pytest.raises(ValueError) as error:
        run_fit(out, tiny.text, steps(6), tiny_model(mixer="r"))
    assert str(newest(out)) in one_line(error.value)
    assert newest(out).name == "step_0000004"
    assert (newest(out).parent / "step_0000002" / "trainer.pt").exists()


def test_a_checkpoint_of_a_gpu_is_resumed_without_one(tmp_path, tiny, monkeypatch):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        run_fit(out, tiny.text, steps(2))
    run_fit(out, tiny.text, steps(4))
    assert [row["step"] for row in metrics(out)][-1] == 4


def test_resuming_with_a_model_of_another_shape_is_refused(tmp_path, tiny):
    out = tmp_path / "run"
    run_fit(out, tiny.text, steps(2))
    before = (out / "model.safetensors").read_bytes(), (out / "metrics.jsonl").read_bytes()
    for shape, name in (
        ({"mixer": "r", "n_layer": 3}, "mixer = rr, not rrr"),
        ({"mixer": "a"}, "mixer"),
        ({"mixer": "r", "n_embd": 64}, "n_embd"),
    ):
        with pytest.raises(ValueError, match=name) as error:
            run_fit(out, tiny.text, steps(4), tiny_model(**shape))
        one_line(error.value)
    assert ((out / "model.safetensors").read_bytes(), (out / "metrics.jsonl").read_bytes()) == before


def test_resuming_with_other_parameter_groups_is_refused(tmp_path, tiny):
    """The saved moments belong to the saved groups, and so do their rates.

    New ones would be ignored, or go to wrong parameters.
    """
    out = tmp_path / "run"
    run_fit(out, tiny.text, steps(2))
    for other in ({"weight_decay": 0.2}, {"weight_decay": 0.0}, {"rwkv_lr_multiplier": 2.0}):
        with pytest.raises(ValueError, match="weight decay|weight_decay") as error:
            run_fit(out, tiny.text, steps(4, **other))
        one_line(error.value)


def test_a_model_without_checkpoints_is_not_resumed_over(tmp_path):
    """A converted or copied model.

    --resume would begin at step 0 with random weights, and then replace it.
    """
    save_model(tiny_model(), tmp_path / "model", META)
    with pytest.raises(ValueError, match="nothing to resume") as error:
        check_free(tmp_path / "model", True, False, TRAIN, "start.json", ())
    one_line(error.value)
    # where there is nothing at all, a run may begin with --resume
    check_free(tmp_path / "new", True, False, TRAIN, "start.json", ())


def test_stages_go_on_under_todays_names_and_nobody_elses_folder_is_renamed(tmp_path):
    """Only a distillation's `distil` was a stage, and never where a `match` is."""
    row = {key: 1.0 for key in ("tokens", "minutes", "val_loss", "gap", "kl", "top1", "top5")}
    (tmp_path / "distil").mkdir()
    (tmp_path / "distil" / "stage.json").write_text(json.dumps(row | {"name": "distil"}))
    open_run(tmp_path, tiny_model())  # of train.py
    assert (tmp_path / "distil").exists()
    assert read_row(tmp_path / "distil" / "stage.json")["name"] == "match"
    take_over_former_names(tmp_path)
    assert (tmp_path / "match" / "stage.json").exists() and not (tmp_path / "distil").exists()
    (tmp_path / "distil").mkdir()
    take_over_former_names(tmp_path)
    assert (tmp_path / "distil").exists() and (tmp_path / "match" / "stage.json").exists()


# ------------------------------------------------------------------------------------------
# Gauges


def test_progress_is_that_of_the_nearest_limit():
    cfg = FitConfig(max_steps=10, max_tokens=100, max_minutes=2.0)
    assert Progress(5, 10, 0.0).fraction(cfg) == 0.5
    assert Progress(5, 80, 0.0).fraction(cfg) == 0.8
    assert Progress(5, 80, 108.0).fraction(cfg) == 0.9
    assert Progress(50, 0, 0.0).fraction(cfg) == Progress().fraction(FitConfig(max_steps=0)) == 1.0
    assert Progress(5, 80, 0.0).fraction(FitConfig(max_steps=0, max_tokens=100)) == 0.8     # 0: no limit
    assert Progress(5, 80, 0.0).fraction(FitConfig(max_steps=0, terminate_at_loss=2.0)) == 0.0


@pytest.mark.parametrize("how", [{}, {"save_every": 1}, {"stop": 3}, {"save_every": 2, "stop": 5}], ids=str)
def test_terminate_at_loss_does_not_hear_of_checkpoints_and_interruptions(tmp_path, tiny, how):
    """Losses 8, 7, 6, ...: in threes 7, 4, 1; at most 3.5 is reached in step 9.

    The loss of step 6 alone is 3.
    """
    losses, stop = iter(range(8, -9, -1)), how.pop("stop", None)

    def loss_fn(model, batch, state):
        loss, now = cross_entropy(model(batch.x)[0], batch), next(losses)
        if stop and now == 9 - stop:
            signal.raise_signal(signal.SIGINT)
        return {"loss": loss * 0 + now * batch.mask.sum()}, None

    def run():
        cfg = steps(12, terminate_at_loss=3.5)
        return run_fit(tmp_path / "run", tiny.text, cfg, loss_fn=loss_fn, log_every=3, **how)

    if stop:
        with pytest.raises(KeyboardInterrupt):
            run()
    assert run()["step"] == 9


def test_what_fit_returns_and_logs_is_of_the_last_step_even_between_log_steps(tmp_path, tiny):
    result = run_fit(tmp_path / "a", tiny.text, steps(7), validate=lambda: {"val_loss": 5.0}, log_every=3)
    assert [row["step"] for row in metrics(tmp_path / "a")] == [3, 6, 7]
    assert (result["step"], result["tokens"], result["val_loss"]) == (7, 7 * 2 * T, 5.0)
    result = run_fit(tmp_path / "b", tiny.text, steps(2), log_every=100)
    assert result["step"] == 2 and len(metrics(tmp_path / "b")) == 1


def test_half_a_line_at_the_end_of_the_metrics_is_dropped(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "loss": 2.0}\n{}\ngarbage}\n{"step": 2, "lo')
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 2.0}]
    assert read_metrics(tmp_path / "none") == []


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_an_interrupt_is_put_off_to_the_end_of_the_step_but_a_second_one_is_not(name):
    guard, number = Interrupt(), getattr(signal, name)
    before = signal.getsignal(number)
    with guard:
        signal.raise_signal(number)
        assert guard.seen
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    assert signal.getsignal(number) is before


def test_under_nohup_a_closed_terminal_does_not_stop_a_run():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        guard = Interrupt()
        with guard:
            signal.raise_signal(signal.SIGHUP)
        assert not guard.seen and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    "bad",
    [{"keep_last": 0}, {"log_every": 0}, {"save_every": 0}, {"seed": -1}, {"save_minutes": float("nan")}],
    ids=str,
)
def test_a_run_outside_its_ranges_is_refused(bad):
    with pytest.raises(ValueError, match=f"{next(iter(bad))} = .*at least") as error:
        RunConfig(**bad)
    one_line(error.value)


def test_save_minutes_saves_when_they_have_passed(tmp_path, tiny, monkeypatch):
    """A step takes a minute; a checkpoint is due when more than 2.5 have passed."""
    now, saved, real = [1e9], [], lib.runs.save_checkpoint

    def save(out, model, meta, trainer, *rest):
        saved.append(trainer["step"])
        real(out, model, meta, trainer, *rest)

    def loss_fn(*args):
        now[0] += 60
        return cross_entropy_loss(*args)

    monkeypatch.setattr(lib.runs, "time", SimpleNamespace(time=lambda: now[0]))
    monkeypatch.setattr(lib.runs, "save_checkpoint", save)
    run_fit(tmp_path / "run", tiny.text, steps(8), loss_fn=loss_fn, save_minutes=2.5)
    assert saved == [3, 6, 8]


def test_random_numbers_go_on_where_the_checkpoint_left_them(tmp_path, tiny):
    run_fit(tmp_path / "run", tiny.text, steps(1))
    state = torch.load(newest(tmp_path / "run") / "trainer.pt", weights_only=True)["rng"]
    other = tiny_model(5, mixer="r")
    assert not torch.equal(torch.get_rng_state(), state)
    run_fit(tmp_path / "run", tiny.text, steps(1), other)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_command_that_goes_on_is_the_one_that_was_typed(monkeypatch):
    """From another folder, too: a script's path stays as it was."""
    for argv, said in ((["train.py", "--out", "my run"], "python train.py --out 'my run' --resume"),
                       (["../src/train.py", "--overwrite"], "python ../src/train.py --resume"),
                       (["/src/tools/demo.py", "--resume"], "python -m tools.demo --resume")):
        monkeypatch.setattr("sys.argv", argv)
        assert lib.runs.resume_command() == said
