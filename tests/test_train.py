"""The loop: what a step computes, what moves how fast, when it stops, and that nothing is lost when it is stopped."""

import errno
import functools
import math
import resource
import signal
import subprocess
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import model as model_file
import train
from common import T, TINY, assert_same_run, metrics, moments, newest, one_line, random_batch, start, state_dict, tiny_model
from data.loader import Loader
from evaluate import cross_entropy, mean_loss, read_metrics
from model import load_model
import config
from train import RUN, FitConfig, TrainConfig, check_free, cross_entropy_loss, fit, forward_backward, interpolate, param_groups

QUIET = dict(save_every=None, eval_every=None, log_every=1, warmup_steps=0)
META = {"tokenizer": "bytes"}


def run_fit(out: Path, tiny, cfg: FitConfig, model=None, loss_fn=cross_entropy_loss, validate=None) -> dict:
    model = model or tiny_model(mixer="r", std=0.05)
    out.mkdir(exist_ok=True)
    return fit(model, loss_fn, Loader(tiny.text, "train", cfg.batch_size, T, 0, 0, 1, cfg.accum), cfg, out, model, META, validate)


# ---------------------------------------------------------------------------------------------------------------------
# What a step computes

def test_three_steps_are_three_steps_of_adamw_on_the_mean_loss(tmp_path, tiny):
    cfg = FitConfig(max_steps=3, batch_size=4, learning_rate=1e-2, schedule="constant", weight_decay=0.0, clip=0.5, **QUIET)
    model, twin = tiny_model(), tiny_model()
    run_fit(tmp_path / "run", tiny, cfg, model)
    optimizer, loader = torch.optim.AdamW(twin.parameters(), lr=1e-2, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0), Loader(tiny.text, "train", 4, T)
    rows = metrics(tmp_path / "run")
    for i in range(3):
        (batch,), _ = loader.step(i)
        loss = torch.nn.functional.cross_entropy(twin(batch.x)[0].transpose(1, 2), batch.y)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
        optimizer.step()
        assert rows[i]["loss"] == pytest.approx(loss.item(), rel=1e-5) and rows[i]["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    assert norm > 0.5  # clipping did something
    for name, p in twin.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], p, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["text", "sft"])
def test_accumulation_over_two_batches_is_one_doubled_batch(tmp_path, tiny, kind):
    """For supervised data the two halves hold unequal numbers of targets. exp_avg after one step is a tenth of the gradient."""
    runs = []
    for name, (B, accum) in {"one": (8, 1), "two": (4, 2)}.items():
        out, model = tmp_path / name, tiny_model(mixer="r")
        out.mkdir()
        cfg = FitConfig(max_steps=1, batch_size=B, accum=accum, clip=None, **QUIET)
        loader = Loader(getattr(tiny, kind), "train", B, T, 0, 0, 1, accum)
        if kind == "sft" and accum == 2:
            a, b = (batch.mask.sum().item() for batch in loader.step(0)[0])
            assert a != b
        runs.append((fit(model, cross_entropy_loss, loader, cfg, out, model, META), moments(newest(out)), metrics(out)[0]["loss"]))
    (one, ours, loss1), (two, theirs, loss2) = runs
    assert loss1 == pytest.approx(loss2, rel=1e-6)
    if kind == "text":
        assert one["tokens"] == two["tokens"] == 8 * T
    for a, b in zip(ours, theirs):
        assert (a - b).norm() <= 1e-5 * b.norm() + 1e-9


class Cache:
    """In the place of a state, where somebody counts who is alive."""


def test_a_state_that_is_not_carried_is_gone_before_the_next_micro_batch(monkeypatch):
    """Attention's is a cache: kept for every micro-batch it would cost memory that grows with accum."""
    states: list[weakref.ref] = []

    def backward(module, batch, state, *args, **kwargs):
        assert state is None and not any(ref() for ref in states)
        states.append(weakref.ref(cache := Cache()))
        return {"loss": torch.ones(())}, cache

    monkeypatch.setattr(train, "backward_in_pieces", backward)
    batches = [random_batch()] * 3
    sums, after = forward_backward(None, batches, 6, 1, torch.device("cpu"))
    assert sums["loss"] == 0.5 and after is None and len(states) == 3
    monkeypatch.setattr(train, "backward_in_pieces", lambda module, batch, state, *args, **kwargs: ({}, state + 1))
    assert forward_backward(None, batches, 6, 1, torch.device("cpu"), states=[10, 20, 30])[1] == [11, 21, 31]


# ---------------------------------------------------------------------------------------------------------------------
# Optimizer and schedules

def test_parameter_groups_follow_the_official_rule_and_the_three_knobs():
    model = tiny_model(mixer="ra", ffn="channelmix", qkv_bias=True, positions="learned")
    cfg = FitConfig(weight_decay=0.1, att_weight_decay=0.2, ffn_weight_decay=0.3, rwkv_lr_multiplier=3.0)
    names = {id(p): name for name, p in model.named_parameters()}
    got = {names[id(p)]: (g["rate"], g["decay"]) for g in param_groups(model, cfg) for p in g["params"]}
    assert sorted(got) == sorted(names.values()) and len(names) == sum(len(g["params"]) for g in param_groups(model, cfg))  # each once
    plain = ["blocks.0.ln0.weight", "blocks.0.ln1.bias", "blocks.0.ffn.x_k", "blocks.1.att.q_proj.bias", "ln_out.weight"]
    rwkv = [f"blocks.0.att.{n}" for n in ("x_r", "w1", "w2", "a0", "a1", "g1", "g2", "k_k", "k_a", "r_k", "ln_x.weight", "ln_x.bias", "key.bias")]
    want = {"emb.weight": (1, 0.1), "pos.weight": (1, 0.1), "head.weight": (1, 0.1), "blocks.0.att.w0": (6, 0)}
    want |= {f"blocks.0.att.{n}.weight": (3, 0.2) for n in ("receptance", "key", "value", "output")}
    want |= {f"blocks.1.att.{n}.weight": (1, 0.2) for n in ("q_proj", "k_proj", "v_proj", "o_proj")}
    want |= {f"blocks.{i}.ffn.{n}.weight": (1, 0.3) for i in (0, 1) for n in ("key", "value")}
    want |= {name: (1, 0) for name in plain} | {name: (3, 0) for name in rwkv}
    assert {name: got[name] for name in want} == want
    assert all(decay == 0 for name, (_, decay) in got.items() if name not in want)


def test_unset_knobs_mean_the_common_decay_and_frozen_parameters_are_in_no_group():
    model = tiny_model(mixer="r")
    model.emb.weight.requires_grad_(False)
    groups = param_groups(model, FitConfig(weight_decay=0.1))
    assert {(g["rate"], g["decay"]) for g in groups} == {(1.0, 0.0), (2.0, 0.0), (1.0, 0.1)}
    assert not any(p is model.emb.weight for g in groups for p in g["params"])
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"):
        param_groups(model, FitConfig())


@pytest.mark.parametrize("schedule, at", [("cosine", [2, 1 + (1 + 0.5**0.5) / 2, 1.5, 1]), ("linear", [2, 1.75, 1.5, 1]), ("constant", [2, 2, 2, 2])])
def test_schedules_by_hand(schedule, at):
    """From 2 to 1 at progress 0, 1/4, 1/2, 1; half a cosine at a quarter is (1 + cos 45 degrees) / 2."""
    assert [interpolate(2.0, 1.0, p, schedule) for p in (0, 0.25, 0.5, 1)] == pytest.approx(at)


def test_rates_and_decay_of_every_step_by_hand(tmp_path, tiny, monkeypatch):
    """Linear from 1 to 0 over 4 steps is 1, 3/4, 1/2, 1/4, the first half of it for warming up; decay from 0.4 to 0 alike."""
    seen = []

    class Spy(torch.optim.AdamW):
        def step(self):
            seen.append({(g["rate"], g["decay"]): (g["lr"], g["weight_decay"]) for g in self.param_groups})
            super().step()

    monkeypatch.setattr(train.torch.optim, "AdamW", Spy)
    cfg = FitConfig(max_steps=4, batch_size=2, learning_rate=1.0, learning_rate_end=0.0, schedule="linear", weight_decay=0.4, weight_decay_end=0.0,
                    **QUIET | {"warmup_steps": 2})
    run_fit(tmp_path / "run", tiny, cfg)
    lr = [0.5, 0.75, 0.5, 0.25]
    assert [row["lr"] for row in metrics(tmp_path / "run")] == pytest.approx(lr)
    for i, groups in enumerate(seen):
        assert groups[1.0, 0.4] == pytest.approx((lr[i], 0.4 * (1, 0.75, 0.5, 0.25)[i]))
        assert groups[2.0, 0.0] == pytest.approx((2 * lr[i], 0.0))


# ---------------------------------------------------------------------------------------------------------------------
# Stopping

def test_max_tokens_stops_and_ends_the_schedule(tmp_path, tiny):
    cfg = FitConfig(max_steps=1000, max_tokens=5 * 2 * T, batch_size=2, learning_rate_end=0.0, schedule="linear", learning_rate=1.0, **QUIET)
    result = run_fit(tmp_path / "run", tiny, cfg)
    assert (result["step"], result["tokens"]) == (5, 5 * 2 * T)
    assert [row["lr"] for row in metrics(tmp_path / "run")] == pytest.approx([1, 0.8, 0.6, 0.4, 0.2])


def test_terminate_at_loss_waits_for_the_mean_of_a_log_interval(tmp_path, tiny):
    """Losses 8, 7, 6, ...: in pairs 7.5, 5.5, 3.5. At most 4 is reached by the third pair, in step 6, not by the single 4 of step 5."""
    losses = iter(range(8, 0, -1))

    def loss_fn(model, batch, state, with_loss):
        loss = cross_entropy(model(batch.x)[0], batch)
        return {"loss": loss * 0 + next(losses) * batch.mask.sum()}, None

    result = run_fit(tmp_path / "run", tiny, FitConfig(max_steps=8, batch_size=2, terminate_at_loss=4.0, **QUIET | {"log_every": 2}), loss_fn=loss_fn)
    assert result["step"] == 6 and result["loss"] == pytest.approx(3.5)
    assert newest(tmp_path / "run").name == "step_0000006"


def test_max_minutes_stops_by_the_clock_and_evaluation_does_not_count(tmp_path, tiny, monkeypatch):
    """Every step takes 30 s and every evaluation an hour: 2 minutes are over after 4 steps."""
    now = [1e9]
    monkeypatch.setattr(train, "time", SimpleNamespace(time=lambda: now[0]))

    def loss_fn(*args):
        now[0] += 30
        return cross_entropy_loss(*args)

    def validate():
        now[0] += 3600
        return {"val_loss": 1.0}

    cfg = FitConfig(max_steps=100, batch_size=2, max_minutes=2.0, **QUIET | {"eval_every": 1})
    result = run_fit(tmp_path / "run", tiny, cfg, loss_fn=loss_fn, validate=validate)
    assert result["step"] == 4 and result["minutes"] == pytest.approx(2.0)


def test_what_fit_returns_and_logs_is_of_the_last_step_even_between_log_steps(tmp_path, tiny):
    result = run_fit(tmp_path / "a", tiny, FitConfig(max_steps=7, batch_size=2, **QUIET | {"log_every": 3}), validate=lambda: {"val_loss": 5.0})
    assert [row["step"] for row in metrics(tmp_path / "a")] == [3, 6, 7]
    assert (result["step"], result["tokens"], result["val_loss"]) == (7, 7 * 2 * T, 5.0)
    result = run_fit(tmp_path / "b", tiny, FitConfig(max_steps=2, batch_size=2, **QUIET | {"log_every": 100}))
    assert result["step"] == 2 and len(metrics(tmp_path / "b")) == 1


def test_zero_steps_change_nothing(tmp_path, tiny):
    model = tiny_model(mixer="r")
    before = state_dict(model)
    assert run_fit(tmp_path / "run", tiny, FitConfig(max_steps=0, batch_size=2, **QUIET), model)["step"] == 0
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())


def test_validation_comes_every_eval_every_steps_and_at_the_end(tmp_path, tiny):
    calls = []
    cfg = FitConfig(max_steps=11, batch_size=2, **QUIET | {"eval_every": 4, "log_every": 2})
    run_fit(tmp_path / "run", tiny, cfg, validate=lambda: calls.append(1) or {"val_loss": float(len(calls))})
    assert [(r["step"], r["val_loss"]) for r in metrics(tmp_path / "run") if "val_loss" in r] == [(4, 1), (8, 2), (11, 3)]


def test_keep_last_keeps_the_newest_k_whole_checkpoints(tmp_path, tiny):
    out = tmp_path / "run"
    stale = out / "checkpoints" / "step_0000099.tmp"  # what a killed run leaves must not count as a checkpoint
    stale.mkdir(parents=True)
    run_fit(out, tiny, FitConfig(max_steps=9, batch_size=2, keep_last=2, **QUIET | {"save_every": 2}))
    assert sorted(p.name for p in (out / "checkpoints").glob("step_???????")) == ["step_0000008", "step_0000009"]
    for name in ("config.json", "meta.json", "model.safetensors"):  # OUT itself is the newest model
        assert (out / name).read_bytes() == (out / "checkpoints" / "step_0000009" / name).read_bytes()
    one = tmp_path / "one"
    (one / "checkpoints" / "step_0000099.tmp").mkdir(parents=True)
    run_fit(one, tiny, FitConfig(max_steps=3, batch_size=2, keep_last=1, **QUIET | {"save_every": 2}))
    assert [p.name for p in (one / "checkpoints").glob("step_???????")] == ["step_0000003"]


# ---------------------------------------------------------------------------------------------------------------------
# Stopped and resumed = never stopped

RESUMED = FitConfig(max_steps=11, batch_size=2, accum=2, save_every=4, eval_every=3, log_every=3, warmup_steps=2)


class Killed(Exception):
    pass


def dies_at(step: int):
    """The loss, but the process "dies" in the forward pass of this step (two micro-batches per step)."""
    calls = []

    def loss_fn(*args):
        calls.append(1)
        if len(calls) == 2 * step:
            raise Killed
        return cross_entropy_loss(*args)

    return loss_fn


def test_a_run_that_dies_and_resumes_equals_one_that_never_stopped_bit_for_bit(tmp_path, tiny):
    def validator(model):
        return lambda: {"val_loss": mean_loss(model, Loader(tiny.text, "val", 4, T), 300)}

    whole = tiny_model(mixer="ra")
    run_fit(tmp_path / "whole", tiny, RESUMED, whole, validate=validator(whole))
    for step in (6, 3):  # from step 4 on; and once more, 3 steps after the new start, from step 4 or later on
        broken = tiny_model(mixer="ra")
        with pytest.raises(Killed):
            run_fit(tmp_path / "broken", tiny, RESUMED, broken, dies_at(step), validator(broken))
    broken = tiny_model(mixer="ra", seed=5)  # other weights: everything must come from the checkpoint
    run_fit(tmp_path / "broken", tiny, RESUMED, broken, validate=validator(broken))
    assert_same_run(tmp_path / "whole", tmp_path / "broken")
    assert [row["step"] for row in metrics(tmp_path / "whole")] == [3, 4, 6, 8, 9, 11]


def test_a_finished_run_resumed_stays_as_it_is_and_with_more_steps_goes_on(tmp_path, tiny):
    out, cfg = tmp_path / "run", FitConfig(max_steps=4, batch_size=2, schedule="constant", **QUIET)
    first = run_fit(out, tiny, cfg)
    bytes_before = (out / "model.safetensors").read_bytes()
    again = run_fit(out, tiny, cfg, tiny_model(mixer="r", seed=9))
    assert (out / "model.safetensors").read_bytes() == bytes_before and (again["step"], again["tokens"]) == (first["step"], first["tokens"])
    run_fit(out, tiny, FitConfig(max_steps=6, batch_size=2, schedule="constant", **QUIET), tiny_model(mixer="r", seed=9))
    run_fit(tmp_path / "whole", tiny, FitConfig(max_steps=6, batch_size=2, schedule="constant", **QUIET))
    assert_same_run(out, tmp_path / "whole")


def test_a_run_that_dies_between_its_last_checkpoint_and_publishing_it_publishes_when_resumed(tmp_path, tiny, monkeypatch):
    out, cfg = tmp_path / "run", FitConfig(max_steps=2, batch_size=2, **QUIET)

    def dies(*_):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train, "publish", dies)
        run_fit(out, tiny, cfg)
    assert newest(out).name == "step_0000002" and not (out / "model.safetensors").exists()
    assert run_fit(out, tiny, cfg)["step"] == 2
    assert (out / "model.safetensors").read_bytes() == (newest(out) / "model.safetensors").read_bytes()


def wait_for(condition, process: subprocess.Popen, seconds: float = 60) -> None:
    end = time.time() + seconds
    while not condition():
        assert process.poll() is None and time.time() < end, process.communicate()[1] if process.poll() is not None else "too slow"
        time.sleep(0.01)


def test_ctrl_c_saves_says_how_to_resume_exits_130_and_the_resumed_run_equals_one_never_stopped(tmp_path, tiny):
    common = ["--data", tiny.text, *TINY, "--mixer", "r", "--max_steps", "400", "--batch_size", "2", "--log_every", "1", "--no-resume"]
    common += ["--save_every", "None", "--eval_every", "None", "--device", "cpu", "--eval_tokens", "100"]
    process = start("train.py", *common, "--out", tmp_path / "broken")
    log = tmp_path / "broken" / "metrics.jsonl"
    wait_for(lambda: log.exists() and log.read_text().count("\n") > 3, process)
    process.send_signal(signal.SIGINT)
    err = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "Traceback" not in err
    said = next(line for line in err.splitlines() if "--resume" in line)
    stopped = int(newest(tmp_path / "broken").name[-7:])
    assert 3 < stopped < 400 and f"step {stopped}" in said and str(tmp_path / "broken") in said
    command = said[said.index("python train.py"):].split()
    train.main(command[2:])  # what it says works
    train.main([*common, "--out", str(tmp_path / "whole")])
    assert_same_run(tmp_path / "broken", tmp_path / "whole")


def test_two_torchrun_processes_train_as_one_with_the_doubled_batch(tmp_path, tiny):
    """With eps = 1 AdamW is close to plain descent, so that parameters compare as gradients do. accum doubles the batch once more."""
    common = ["--data", tiny.text, *TINY, "--mixer", "ar", "--max_steps", "3", "--eps", "1", "--learning_rate", "1", "--log_every", "1",
              "--warmup_steps", "0", "--device", "cpu"]
    process = start("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py", *common, "--batch_size", "2", "--accum", "2",
                    "--out", tmp_path / "two")
    train.main([*common, "--batch_size", "8", "--out", str(tmp_path / "one")])
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert out.count("held-out loss") == out.count("2 layers, ar;") == 1  # only rank 0 speaks, first of what the model is
    for a, b in zip(moments(newest(tmp_path / "one")), moments(newest(tmp_path / "two")), strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm() + 1e-8
    for a, b in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    one, two = load_model(tmp_path / "one").state_dict(), load_model(tmp_path / "two").state_dict()
    start_ = torch.manual_seed(0) and model_file.LM(load_model(tmp_path / "one").cfg).state_dict()
    for name in one:
        assert (one[name] - two[name]).norm() <= 1e-4 * (one[name] - start_[name]).norm() + 1e-6, name


# ---------------------------------------------------------------------------------------------------------------------
# Bad input and bad luck: one clear line, nothing lost

def test_a_loss_that_is_not_finite_names_its_step_and_keeps_the_last_good_checkpoint(tmp_path, tiny):
    for bad in (math.nan, math.inf):
        calls, out = [], tmp_path / f"{bad}"

        def loss_fn(*args):
            calls.append(1)
            losses, state = cross_entropy_loss(*args)
            return {"loss": losses["loss"] * (bad if len(calls) == 8 else 1)}, state

        with pytest.raises(ValueError) as error:
            run_fit(out, tiny, FitConfig(max_steps=20, batch_size=2, **QUIET | {"save_every": 3, "log_every": 5}), loss_fn=loss_fn)
        said = one_line(error.value)
        assert "step 8" in said and "learning_rate" in said and "step_0000006" in said
        assert newest(out).name == "step_0000006"
        for folder in (out, newest(out)):
            assert all(p.isfinite().all() for p in load_model(folder).state_dict().values())
        assert [row["step"] for row in metrics(out)] == [3, 5, 6]


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("where", ["model", "trainer", "really"])
def test_a_full_disk_keeps_the_last_good_checkpoint_and_says_so(tmp_path, tiny, monkeypatch, where):
    """Simulated while the model or the optimizer is written; and really, by a limit on how large a file may become."""
    out, cfg = tmp_path / "run", FitConfig(max_steps=4, batch_size=2, schedule="constant", **QUIET)
    run_fit(out, tiny, cfg)
    before = {p.relative_to(out): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file() and p.name != "metrics.jsonl"}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    more = FitConfig(max_steps=6, batch_size=2, schedule="constant", **QUIET)
    with pytest.raises(ValueError) as error:
        with monkeypatch.context() as patch:
            if where == "model":
                patch.setattr(model_file, "save_file", full_disk)
            elif where == "trainer":
                patch.setattr(train.torch, "save", full_disk)
            else:
                resource.setrlimit(resource.RLIMIT_FSIZE, (20000, limits[1]))
            try:
                run_fit(out, tiny, more, tiny_model(mixer="r"))
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    said = one_line(error.value)
    assert "could not save step 6" in said and "--resume" in said and "step_0000004" in said
    after = {p.relative_to(out): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file() and p.name != "metrics.jsonl"}
    assert after == before
    run_fit(out, tiny, more, tiny_model(mixer="r"))  # with space again it goes on as if nothing had been
    run_fit(tmp_path / "whole", tiny, more)
    assert_same_run(out, tmp_path / "whole")


@pytest.mark.parametrize("name", ["model.safetensors", "trainer.pt", "config.json"])
@pytest.mark.parametrize("damage", ["truncated", "overwritten", "empty", "missing"])
def test_a_damaged_checkpoint_is_named_on_resume(tmp_path, tiny, name, damage):
    out = trained_once(str(tmp_path.parent), tiny.text)
    copy = tmp_path / "run"
    subprocess.run(["cp", "-r", out, copy], check=True)
    victim = newest(copy) / name
    content = victim.read_bytes()
    if damage == "missing":
        victim.unlink()
    else:
        victim.write_bytes({"truncated": content[: len(content) // 2], "overwritten": b"\xff\x00" * 500, "empty": b""}[damage])
    with pytest.raises(ValueError) as error:
        run_fit(copy, tiny, FitConfig(max_steps=6, batch_size=2, **QUIET), tiny_model(mixer="r"))
    assert str(newest(copy)) in one_line(error.value)
    assert newest(copy).name == "step_0000004" and (newest(copy).parent / "step_0000002" / "trainer.pt").exists()


@functools.cache
def trained_once(folder: str, text: str) -> Path:
    out = Path(folder) / "trained-once"
    run_fit(out, SimpleNamespace(text=text), FitConfig(max_steps=4, batch_size=2, **QUIET | {"save_every": 2}))
    return out


def test_resuming_with_a_model_of_another_shape_is_refused(tmp_path, tiny):
    out, cfg = tmp_path / "run", FitConfig(max_steps=2, batch_size=2, **QUIET)
    run_fit(out, tiny, cfg)
    before = (out / "model.safetensors").read_bytes(), (out / "metrics.jsonl").read_bytes()
    for other, named in ((tiny_model(mixer="r", n_layer=3), "n_layer"), (tiny_model(mixer="a"), "mixer"), (tiny_model(mixer="r", n_embd=64), "n_embd")):
        with pytest.raises(ValueError, match=named) as error:
            run_fit(out, tiny, FitConfig(max_steps=4, batch_size=2, **QUIET), other)
        one_line(error.value)
    assert ((out / "model.safetensors").read_bytes(), (out / "metrics.jsonl").read_bytes()) == before


def test_resuming_with_other_parameter_groups_is_refused(tmp_path, tiny):
    """The saved moments belong to the saved groups, and so do their rates: new ones would be ignored, or go to wrong parameters."""
    out, common = tmp_path / "run", dict(batch_size=2, **QUIET)
    run_fit(out, tiny, FitConfig(max_steps=2, **common))
    for other in ({"weight_decay": 0.2}, {"weight_decay": 0.0}, {"rwkv_lr_multiplier": 2.0}):
        with pytest.raises(ValueError, match="weight decay|weight_decay") as error:
            run_fit(out, tiny, FitConfig(max_steps=4, **common, **other))
        one_line(error.value)


def test_a_model_without_checkpoints_is_not_resumed_over(tmp_path):
    """A converted or copied model: --resume would begin at step 0 with random weights, and then replace it."""
    model_file.save_model(tiny_model(), tmp_path / "model", META)
    with pytest.raises(ValueError, match="nothing to resume") as error:
        check_free(tmp_path / "model", True, False, RUN, "start.json", ())
    one_line(error.value)
    check_free(tmp_path / "new", True, False, RUN, "start.json", ())  # where there is nothing at all, a run may begin with --resume


def test_the_folder_of_another_run_is_neither_overwritten_nor_resumed_unasked(tmp_path, tiny):
    out, flags = tmp_path / "run", ["--data", tiny.text, *TINY, "--max_steps", "2", "--batch_size", "2", "--device", "cpu", "--out", str(tmp_path / "run")]
    train.main(flags)
    (out / "notes.txt").write_text("mine")
    before = (out / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="--resume.*--overwrite") as error:
        train.main([*flags, "--seed", "1"])
    one_line(error.value)
    with pytest.raises(ValueError, match="contradict"):
        check_free(out, True, True, RUN, "start.json", ())
    assert (out / "model.safetensors").read_bytes() == before
    train.main([*flags, "--seed", "1", "--overwrite"])
    assert (out / "model.safetensors").read_bytes() != before and (out / "notes.txt").read_text() == "mine"


def test_overwriting_never_deletes_what_the_run_starts_from_or_would_have_kept_by_failing(tmp_path, tiny):
    out, flags = tmp_path / "run", ["--data", tiny.text, "--device", "cpu", "--out", str(tmp_path / "run"), "--overwrite"]
    train.main([*flags, *TINY, "--max_steps", "1", "--batch_size", "2"])
    before = (out / "model.safetensors").read_bytes()
    for bad, says in ((["--init", str(out)], "read by this run"), (["--init", str(tmp_path / "none")], "no model"),
                      ([*TINY, "--batch_size", "1000000"], "different rows"),
                      (["--device", "cuda:9"], "no CUDA|choose auto"), (["--data", str(tmp_path)], "meta.json")):
        with pytest.raises(ValueError, match=says) as error:
            train.main([*flags, *bad])
        one_line(error.value)
        assert (out / "model.safetensors").read_bytes() == before
    (out / "start.json").write_text("{}")  # the mark of distill.py
    with pytest.raises(ValueError, match="another script"):
        train.main([*flags, *TINY])


def test_a_models_own_shape_counts_where_training_starts_from_it(tmp_path, tiny):
    model_file.save_model(tiny_model(block_size=8), tmp_path / "model", META)
    flags = ["--data", tiny.text, "--device", "cpu", "--init", str(tmp_path / "model"), "--max_steps", "1", "--batch_size", "2"]
    assert train.train(config.cli(TrainConfig, [*flags, "--out", str(tmp_path / "a")]))["tokens"] == 2 * 8
    with pytest.raises(ValueError, match="as it is"):
        train.main([*flags, "--out", str(tmp_path / "b"), "--n_layer", "7"])


def test_half_a_line_at_the_end_of_the_metrics_is_dropped(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "loss": 2.0}\n{}\ngarbage}\n{"step": 2, "lo')
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 2.0}] and read_metrics(tmp_path / "none") == []


def test_bad_data_and_tokens_are_refused_before_anything_is_written(tmp_path, tiny):
    out = tmp_path / "out"
    (tmp_path / "empty").mkdir()
    for data in (tmp_path / "missing", tmp_path / "empty"):
        with pytest.raises(ValueError, match=str(data)) as error:
            train.main(["--data", str(data), "--out", str(out), "--device", "cpu"])
        one_line(error.value)
    small = tiny_model(vocab_size=100)
    model_file.save_model(small, tmp_path / "small", META)
    with pytest.raises(ValueError, match="257 tokens.*100"):
        train.main(["--data", tiny.text, "--out", str(out), "--init", str(tmp_path / "small"), "--device", "cpu", *TINY])
    with pytest.raises(ValueError, match="vocabulary of 100"):
        run_fit(tmp_path / "run", tiny, FitConfig(max_steps=2, batch_size=2, **QUIET), small)
    assert not (out / "model.safetensors").exists() and not (out / "checkpoints").exists()


def test_odd_sizes_train(tmp_path, tiny):
    """One layer, one token, one row; learned positions with a tied head; a hybrid of three layers; RMSNorm and SwiGLU."""
    odd = [{"--n_layer": 1, "--block_size": 1, "--batch_size": 1, "--mixer": "r"}, {"--positions": "learned", "--mixer": "ar", "--n_layer": 3},
           {"--norm": "rmsnorm", "--ffn": "swiglu", "--n_kv_head": 1, "--mixer": "a", "--batch_size": 3},
           {"--ffn": "channelmix", "--mixer": "r", "--rwkv_head_size": 16}]
    for i, flags in enumerate(odd):
        args = dict(zip(TINY[::2], TINY[1::2])) | {"--batch_size": 2, "--rwkv_head_size": 32} | flags
        argv = [str(x) for pair in args.items() for x in pair] + (["--tied"] if i % 2 else [])
        train.main([*argv, "--data", tiny.text, "--out", str(tmp_path / str(i)), "--max_steps", "2", "--device", "cpu", "--eval_tokens", "50"])
        assert metrics(tmp_path / str(i))[-1]["step"] == 2
        assert load_model(tmp_path / str(i)).cfg.tied == bool(i % 2)


def test_an_interrupt_is_put_off_to_the_end_of_the_step_but_a_second_one_is_not():
    guard = train.Interrupt()
    before = signal.getsignal(signal.SIGINT)
    with guard:
        signal.raise_signal(signal.SIGINT)
        assert guard.seen
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
