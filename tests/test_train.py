"""The loop: what a step computes, when it stops, and that stopping loses nothing."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import lib.runs
import train
from common import T, TINY, assert_same_run, metrics, moments, newest, start, state_dict, tiny_model
from common_train import QUIET, Killed, dies_at_call, run_fit
from data.loader import Loader
from lib.folders import load_model
from lib.scores import cross_entropy, mean_loss
from model import LM
from train import FitConfig, cross_entropy_loss, interpolate, param_groups


# ------------------------------------------------------------------------------------------
# What a step computes

def test_three_steps_are_three_steps_of_adamw_on_the_mean_loss(tmp_path, tiny):
    cfg = FitConfig(max_steps=3, batch_size=4, learning_rate=1e-2, schedule="constant", weight_decay=0.0,
                    clip=0.5, **QUIET)
    model, twin = tiny_model(), tiny_model()
    run_fit(tmp_path / "run", tiny.text, cfg, model)
    rows = metrics(tmp_path / "run")

    optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-2, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0)
    loader = Loader(tiny.text, "train", 4, T)
    for i in range(3):
        (batch,), _ = loader.step(i)
        loss = F.cross_entropy(twin(batch.x)[0].transpose(1, 2), batch.y)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
        optimizer.step()
        assert rows[i]["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert rows[i]["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    assert norm > 0.5                                      # clipping did something
    for name, p in twin.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], p, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["text", "sft"])
def test_accumulation_over_two_batches_is_one_doubled_batch(tmp_path, tiny, kind):
    """For supervised data the two halves hold unequal numbers of targets.

    exp_avg after one step is a tenth of the gradient.
    """
    results = {}
    for name, (B, accum) in {"one": (8, 1), "two": (4, 2)}.items():
        cfg = FitConfig(max_steps=1, batch_size=B, accum=accum, clip=None, **QUIET)
        results[name] = run_fit(tmp_path / name, getattr(tiny, kind), cfg, tiny_model(mixer="r"))
    if kind == "sft":
        first, second = Loader(tiny.sft, "train", 4, T, accum=2).step(0)[0]
        assert first.mask.sum() != second.mask.sum()
    else:
        assert results["one"]["tokens"] == results["two"]["tokens"] == 8 * T
    one, two = (metrics(tmp_path / name)[0]["loss"] for name in ("one", "two"))
    assert one == pytest.approx(two, rel=1e-6)
    for a, b in zip(*(moments(newest(tmp_path / name)) for name in ("one", "two")), strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm() + 1e-9


def test_two_torchrun_processes_train_as_one_with_the_doubled_batch(tmp_path, tiny):
    """With eps = 1 AdamW is almost plain descent: parameters compare as gradients do.

    accum doubles the batch once more.
    """
    flags = ["--data", tiny.text, *TINY, "--mixer", "ar", "--max_steps", "3", "--eps", "1", "--learning_rate",
             "1", "--log_every", "1", "--warmup_steps", "0", "--device", "cpu"]
    one, two = tmp_path / "one", tmp_path / "two"
    process = start("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py", *flags,
                    "--batch_size", "2", "--accum", "2", "--out", two)
    train.main([*flags, "--batch_size", "8", "--out", str(one)])
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    # only rank 0 speaks, first of what the model is
    assert out.count("held-out loss") == out.count("2 layers, ar;") == 1
    for a, b in zip(moments(newest(one)), moments(newest(two)), strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm() + 1e-8
    for a, b in zip(metrics(one), metrics(two), strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    model = load_model(one)
    torch.manual_seed(0)
    begin = LM(model.cfg).state_dict()
    for name, p in load_model(two).state_dict().items():
        moved = (model.state_dict()[name] - begin[name]).norm()
        assert (model.state_dict()[name] - p).norm() <= 1e-4 * moved + 1e-6, name


# ------------------------------------------------------------------------------------------
# Optimizer and schedules

def test_parameter_groups_follow_the_official_rule_and_the_three_knobs():
    model = tiny_model(mixer="ra", ffn="channelmix", qkv_bias=True, positions="learned")
    cfg = FitConfig(weight_decay=0.1, att_weight_decay=0.2, ffn_weight_decay=0.3, rwkv_lr_multiplier=3.0)
    groups, names = param_groups(model, cfg), {id(p): name for name, p in model.named_parameters()}
    rates = {names[id(p)]: (g["rate"], g["decay"]) for g in groups for p in g["params"]}
    assert sorted(rates) == sorted(names.values())
    assert len(names) == sum(len(g["params"]) for g in groups)                 # each once
    vectors = ("x_r", "w1", "w2", "a0", "a1", "g1", "g2", "k_k", "k_a", "r_k", "ln_x.weight", "ln_x.bias",
               "key.bias")
    expected = {"emb.weight": (1, 0.1), "pos.weight": (1, 0.1), "head.weight": (1, 0.1),
                "blocks.0.att.w0": (6, 0)}
    for name in ("receptance", "key", "value", "output"):
        expected[f"blocks.0.att.{name}.weight"] = (3, 0.2)
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        expected[f"blocks.1.att.{name}.weight"] = (1, 0.2)
    for name in ("blocks.0.ffn.key", "blocks.0.ffn.value", "blocks.1.ffn.key", "blocks.1.ffn.value"):
        expected[f"{name}.weight"] = (1, 0.3)
    for name in ("0.ln0.weight", "0.ln1.bias", "0.ffn.x_k", "1.att.q_proj.bias"):
        expected[f"blocks.{name}"] = (1, 0)
    expected |= {"ln_out.weight": (1, 0)} | {f"blocks.0.att.{name}": (3, 0) for name in vectors}
    assert {name: rates[name] for name in expected} == expected
    assert all(decay == 0 for name, (_, decay) in rates.items() if name not in expected)


def test_unset_knobs_mean_the_common_decay_and_frozen_parameters_are_in_no_group():
    model = tiny_model(mixer="r")
    model.emb.weight.requires_grad_(False)
    groups = param_groups(model, FitConfig(weight_decay=0.1))
    assert {(g["rate"], g["decay"]) for g in groups} == {(1.0, 0.0), (2.0, 0.0), (1.0, 0.1)}
    assert not any(p is model.emb.weight for g in groups for p in g["params"])
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"):
        param_groups(model, FitConfig())


@pytest.mark.parametrize("schedule, values", [("cosine", [2, 1 + (1 + 0.5**0.5) / 2, 1.5, 1]),
                                              ("linear", [2, 1.75, 1.5, 1]), ("constant", [2, 2, 2, 2])])
def test_schedules_by_hand(schedule, values):
    """From 2 to 1, after 0, 1/4, 1/2, 1 of the way.

    Half a cosine at a quarter is (1 + cos 45 degrees) / 2.
    """
    assert [interpolate(2.0, 1.0, done, schedule) for done in (0, 0.25, 0.5, 1)] == pytest.approx(values)


def test_rates_and_decay_of_every_step_by_hand(tmp_path, tiny, monkeypatch):
    """Linear from 1 to 0 over 4 steps is 1, 3/4, 1/2, 1/4; half of step 1 warms up.

    Decay from 0.4 to 0 alike.
    """
    seen = []

    class Spy(torch.optim.AdamW):
        def step(self):
            seen.append({(g["rate"], g["decay"]): (g["lr"], g["weight_decay"]) for g in self.param_groups})
            super().step()

    monkeypatch.setattr(train.torch.optim, "AdamW", Spy)
    cfg = FitConfig(max_steps=4, batch_size=2, learning_rate=1.0, learning_rate_end=0.0, schedule="linear",
                    weight_decay=0.4, weight_decay_end=0.0, **QUIET | {"warmup_steps": 2})
    run_fit(tmp_path / "run", tiny.text, cfg)
    lr, fade = [0.5, 0.75, 0.5, 0.25], [1, 0.75, 0.5, 0.25]
    assert [row["lr"] for row in metrics(tmp_path / "run")] == pytest.approx(lr)
    for i, groups in enumerate(seen):
        assert groups[1.0, 0.4] == pytest.approx((lr[i], 0.4 * fade[i]))
        assert groups[2.0, 0.0] == pytest.approx((2 * lr[i], 0.0))


# ------------------------------------------------------------------------------------------
# Stopping

def test_max_tokens_stops_and_ends_the_schedule(tmp_path, tiny):
    cfg = FitConfig(max_steps=1000, max_tokens=5 * 2 * T, batch_size=2, learning_rate_end=0.0,
                    schedule="linear", learning_rate=1.0, **QUIET)
    result = run_fit(tmp_path / "run", tiny.text, cfg)
    assert (result["step"], result["tokens"]) == (5, 5 * 2 * T)
    assert [row["lr"] for row in metrics(tmp_path / "run")] == pytest.approx([1, 0.8, 0.6, 0.4, 0.2])


def test_terminate_at_loss_waits_for_the_mean_of_a_log_interval(tmp_path, tiny):
    """Losses 8, 7, 6, ...: in pairs 7.5, 5.5, 3.5.

    At most 4 is reached by the third pair, in step 6, not by the single 4 of step 5.
    """
    losses = iter(range(8, 0, -1))

    def loss_fn(model, batch, state):
        loss = cross_entropy(model(batch.x)[0], batch)
        return {"loss": loss * 0 + next(losses) * batch.mask.sum()}, None

    cfg = FitConfig(max_steps=8, batch_size=2, terminate_at_loss=4.0, **QUIET)
    result = run_fit(tmp_path / "run", tiny.text, cfg, loss_fn=loss_fn, log_every=2)
    assert result["step"] == 6 and result["loss"] == pytest.approx(3.5)
    assert newest(tmp_path / "run").name == "step_0000006"


def test_max_minutes_stops_by_the_clock_and_evaluation_does_not_count(tmp_path, tiny, monkeypatch):
    """A step takes 30 s and an evaluation an hour: 2 minutes are over after 4 steps."""
    now = [1e9]
    monkeypatch.setattr(lib.runs, "time", SimpleNamespace(time=lambda: now[0]))

    def loss_fn(*args):
        now[0] += 30
        return cross_entropy_loss(*args)

    def validate():
        now[0] += 3600
        return {"val_loss": 1.0}

    cfg = FitConfig(max_steps=100, batch_size=2, max_minutes=2.0, **QUIET | {"eval_every": 1})
    result = run_fit(tmp_path / "run", tiny.text, cfg, loss_fn=loss_fn, validate=validate)
    assert result["step"] == 4 and result["minutes"] == pytest.approx(2.0)


def test_zero_steps_change_nothing(tmp_path, tiny):
    model = tiny_model(mixer="r")
    before = state_dict(model)
    cfg = FitConfig(max_steps=0, batch_size=2, **QUIET)
    assert run_fit(tmp_path / "run", tiny.text, cfg, model)["step"] == 0
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())


# ------------------------------------------------------------------------------------------
# Validation, and stopped and resumed = never stopped

def test_validation_comes_every_eval_every_steps_and_at_the_end(tmp_path, tiny):
    calls = []
    cfg = FitConfig(max_steps=11, batch_size=2, **QUIET | {"eval_every": 4})
    run_fit(tmp_path / "run", tiny.text, cfg, log_every=2,
            validate=lambda: calls.append(1) or {"val_loss": float(len(calls))})
    held_out = [(row["step"], row["val_loss"]) for row in metrics(tmp_path / "run") if "val_loss" in row]
    assert held_out == [(4, 1), (8, 2), (11, 3)]


def test_a_run_that_dies_and_resumes_equals_one_that_never_stopped_bit_for_bit(tmp_path, tiny):
    cfg = FitConfig(max_steps=11, batch_size=2, accum=2, eval_every=3, warmup_steps=2)
    often = {"save_every": 4, "log_every": 3}

    def go_on(out, seed=0, loss_fn=cross_entropy_loss):
        model, val_half = tiny_model(seed, mixer="ra"), Loader(tiny.text, "val", 4, T)
        validate = lambda: {"val_loss": mean_loss(model, val_half, 300)}  # noqa: E731
        run_fit(out, tiny.text, cfg, model, loss_fn, validate, **often)

    go_on(tmp_path / "whole")
    for step in (6, 3):          # of two passes each; the second counts from the checkpoint at step 4
        with pytest.raises(Killed):
            go_on(tmp_path / "broken", loss_fn=dies_at_call(2 * step))
    go_on(tmp_path / "broken", seed=5)           # other weights: everything must come from the checkpoint
    assert_same_run(tmp_path / "whole", tmp_path / "broken")
    assert [row["step"] for row in metrics(tmp_path / "whole")] == [3, 4, 6, 8, 9, 11]
