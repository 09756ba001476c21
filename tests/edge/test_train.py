"""Training with bad input and bad luck: one clear line, nothing lost.

Odd sizes train too.
"""

import errno
import math
import resource
import signal
import weakref

import pytest
import torch

import lib.folders
import lib.runs
import train
from common import T, TINY, assert_same_run, metrics, newest, one_line, random_batch, start, tiny_model
from common_train import META, QUIET, run_fit, wait_for
from config import cli
from data.loader import Loader
from lib.folders import load_model, save_model
from lib.home import TRAIN, check_free
from lib.runs import RunConfig
from train import FitConfig, TrainConfig, cross_entropy_loss, forward_backward

# ------------------------------------------------------------------------------------------
# Stopped from outside


def test_ctrl_c_saves_says_how_to_resume_exits_130_and_the_resumed_run_equals_one_never_stopped(
    tmp_path, tiny
):
    """It could go on for ever; both others end 3 steps after it was stopped."""
    common = [
        "--data",
        tiny.text,
        *TINY,
        "--mixer",
        "r",
        "--batch_size",
        "2",
        "--log_every",
        "1",
        "--no-resume",
        "--schedule",
        "constant",
        "--save_every",
        "None",
        "--eval_every",
        "None",
        "--device",
        "cpu",
        "--eval_tokens",
        "100",
    ]
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    process = start("train.py", *common, "--max_steps", "1000000", "--out", broken)
    log = broken / "metrics.jsonl"
    wait_for(lambda: log.exists() and log.read_text().count("\n") > 3, process)
    process.send_signal(signal.SIGINT)
    err = process.communicate(timeout=600)[1]
    assert process.returncode == 130 and "Traceback" not in err
    message = next(line for line in err.splitlines() if "--resume" in line)
    stopped = int(newest(broken).name[-7:])
    assert stopped > 3 and f"step {stopped}" in message and str(broken) in message
    command = message[message.index("python train.py") :].split()
    end = str(stopped + 3)
    train.main([end if word == "1000000" else word for word in command[2:]])  # what it says works
    train.main([*common, "--max_steps", end, "--out", str(whole)])
    assert_same_run(broken, whole)


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("place", ["model", "trainer", "really"])
def test_a_full_disk_keeps_the_last_good_checkpoint_and_says_so(tmp_path, tiny, monkeypatch, place):
    """Simulated while the model or the optimizer is written.

    And really, by a limit on how large a file may become.
    """
    out, loop = tmp_path / "run", {"batch_size": 2, "schedule": "constant", **QUIET}
    more = FitConfig(max_steps=6, **loop)

    def files():
        paths = [p for p in sorted(out.rglob("*")) if p.is_file() and p.name != "metrics.jsonl"]
        return {p.relative_to(out): p.read_bytes() for p in paths}

    run_fit(out, tiny.text, FitConfig(max_steps=4, **loop))
    before, limits = files(), resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.raises(ValueError) as error, monkeypatch.context() as patch:
        if place == "model":
            patch.setattr(lib.folders, "save_file", full_disk)
        elif place == "trainer":
            patch.setattr(lib.runs.torch, "save", full_disk)
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20000, limits[1]))
        try:
            run_fit(out, tiny.text, more, tiny_model(mixer="r"))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    message = one_line(error.value)
    assert "could not save step 6" in message and "--resume" in message and "step_0000004" in message
    assert files() == before
    run_fit(out, tiny.text, more, tiny_model(mixer="r"))  # with space again it goes on as if nothing had been
    run_fit(tmp_path / "whole", tiny.text, more)
    assert_same_run(out, tmp_path / "whole")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_names_its_step_and_keeps_the_last_good_checkpoint(tmp_path, tiny, bad):
    calls, out = [], tmp_path / "run"

    def loss_fn(*args):
        calls.append(1)
        losses, state = cross_entropy_loss(*args)
        return {"loss": losses["loss"] * (bad if len(calls) == 8 else 1)}, state

    with pytest.raises(ValueError) as error:
        run_fit(
            out,
            tiny.text,
            FitConfig(max_steps=20, batch_size=2, **QUIET),
            loss_fn=loss_fn,
            save_every=3,
            log_every=5,
        )
    message = one_line(error.value)
    assert "step 8" in message and "learning_rate" in message and "step_0000006" in message
    assert newest(out).name == "step_0000006"
    for folder in (out, newest(out)):
        assert all(p.isfinite().all() for p in load_model(folder).state_dict().values())
    assert [row["step"] for row in metrics(out)] == [3, 5, 6]


# ------------------------------------------------------------------------------------------
# Whose folder it is


def test_the_folder_of_another_run_is_neither_overwritten_nor_resumed_unasked(tmp_path, tiny):
    out = tmp_path / "run"
    flags = [
        "--data",
        tiny.text,
        *TINY,
        "--max_steps",
        "2",
        "--batch_size",
        "2",
        "--device",
        "cpu",
        "--out",
        str(out),
    ]
    train.main(flags)
    (out / "notes.txt").write_text("mine")
    before = (out / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="--resume.*--overwrite") as error:
        train.main([*flags, "--seed", "1"])
    one_line(error.value)
    with pytest.raises(ValueError, match="contradict"):
        check_free(out, True, True, TRAIN, "start.json", ())
    assert (out / "model.safetensors").read_bytes() == before
    train.main([*flags, "--seed", "1", "--overwrite"])
    assert (out / "model.safetensors").read_bytes() != before and (out / "notes.txt").read_text() == "mine"


def test_overwriting_never_deletes_what_the_run_starts_from_or_would_have_kept_by_failing(tmp_path, tiny):
    out = tmp_path / "run"
    flags = ["--data", tiny.text, "--device", "cpu", "--out", str(out), "--overwrite"]
    train.main([*flags, *TINY, "--max_steps", "1", "--batch_size", "2"])
    before = (out / "model.safetensors").read_bytes()
    for bad, says in (
        (["--init", str(out)], "read by this run"),
        (["--init", str(tmp_path / "none")], "no model"),
        ([*TINY, "--batch_size", "1000000"], "different rows"),
        (["--device", "cuda:9"], "no CUDA|choose auto"),
        ([*TINY, "--mixer", "first:9"], "n_layer = 2"),
        ([*TINY, "--mixer", "a", "--bptt_truncate"], "--mixer r alone"),
        (["--data", str(tmp_path)], "meta.json"),
    ):
        with pytest.raises(ValueError, match=says) as error:
            train.main([*flags, *bad])
        one_line(error.value)
        assert (out / "model.safetensors").read_bytes() == before
    (out / "start.json").write_text("{}")  # the mark of distill.py
    with pytest.raises(ValueError, match="another script"):
        train.main([*flags, *TINY])


def test_wandb_without_its_package_is_refused_before_anything_is_replaced(tmp_path, tiny, monkeypatch):
    out = tmp_path / "run"
    flags = [
        "--data",
        tiny.text,
        *TINY,
        "--max_steps",
        "1",
        "--batch_size",
        "2",
        "--device",
        "cpu",
        "--out",
        str(out),
    ]
    train.main(flags)
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    monkeypatch.setattr(lib.runs, "find_spec", lambda name: None)  # as where it is not installed
    for more in (["--overwrite"], ["--resume"]):
        with pytest.raises(ValueError, match="pip install wandb, or omit --wandb") as error:
            train.main([*flags, "--wandb", "project", *more])
        one_line(error.value)
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
    with pytest.raises(ValueError, match="wandb"):
        train.main([*flags[:-1], str(tmp_path / "new"), "--wandb", "project"])
    assert not (tmp_path / "new").exists()


def test_a_models_own_shape_counts_where_training_starts_from_it(tmp_path, tiny):
    save_model(tiny_model(block_size=8), tmp_path / "model", META)
    flags = [
        "--data",
        tiny.text,
        "--device",
        "cpu",
        "--init",
        str(tmp_path / "model"),
        "--max_steps",
        "1",
        "--batch_size",
        "2",
    ]
    assert train.train(cli(TrainConfig, [*flags, "--out", str(tmp_path / "a")]))["tokens"] == 2 * 8
    for other in (["--n_layer", "7"], ["--mixer", "r"]):
        with pytest.raises(ValueError, match="as it is"):
            train.main([*flags, "--out", str(tmp_path / "b"), *other])


# ------------------------------------------------------------------------------------------
# Bad settings and data


@pytest.mark.parametrize(
    "flag, value",
    [
        ("beta1", "1.5"),
        ("beta1", "1"),
        ("beta2", "-0.1"),
        ("eps", "nan"),
        ("eps", "0"),
        ("learning_rate", "inf"),
        ("batch_size", "0"),
        ("schedule", "step"),
    ],
)
def test_a_setting_outside_its_range_is_refused_before_anything_trains(tmp_path, tiny, flag, value):
    with pytest.raises(ValueError, match=flag) as error:
        train.main(
            [
                "--data",
                tiny.text,
                *TINY,
                "--device",
                "cpu",
                "--out",
                str(tmp_path / "out"),
                f"--{flag}",
                value,
            ]
        )
    assert value.rstrip("0.") in one_line(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("end", ["learning_rate_end", "weight_decay_end"])
def test_an_end_that_a_constant_schedule_never_nears_is_refused(end):
    with pytest.raises(ValueError, match=f"^{end}: with the schedule constant it would do nothing"):
        FitConfig(schedule="constant", **{end: 0.01})


def test_bad_data_and_tokens_are_refused_before_anything_is_written(tmp_path, tiny):
    out = tmp_path / "out"
    (tmp_path / "empty").mkdir()
    for data in (tmp_path / "missing", tmp_path / "empty"):
        with pytest.raises(ValueError, match=str(data)) as error:
            train.main(["--data", str(data), "--out", str(out), "--device", "cpu"])
        one_line(error.value)
    with pytest.raises(ValueError, match="holds preferences, not text"):
        train.main(["--data", tiny.dpo, "--out", str(out), "--device", "cpu", *TINY])
    small = tiny_model(vocab_size=100)
    save_model(small, tmp_path / "small", META)
    with pytest.raises(ValueError, match="257 tokens.*100"):
        train.main(
            ["--data", tiny.text, "--out", str(out), "--init", str(tmp_path / "small"), "--device", "cpu"]
        )
    with pytest.raises(ValueError, match="257 tokens.*100"):
        run_fit(tmp_path / "run", tiny.text, FitConfig(max_steps=2, batch_size=2, **QUIET), small)
    assert not out.exists() and not (tmp_path / "run" / "checkpoints").exists()


# ------------------------------------------------------------------------------------------
# Odd sizes, and what stays in memory


def test_odd_sizes_train(tmp_path, tiny):
    """One layer, one token, one row; learned positions with a tied head; a hybrid.

    The hybrid has three layers, RMSNorm and SwiGLU.
    """
    odd = [
        {"--n_layer": 1, "--block_size": 1, "--batch_size": 1, "--mixer": "r"},
        {"--positions": "learned", "--mixer": "ar", "--n_layer": 3},
        {"--norm": "rmsnorm", "--ffn": "swiglu", "--n_kv_head": 1, "--mixer": "a", "--batch_size": 3},
        {"--ffn": "channelmix", "--mixer": "r", "--rwkv_head_size": 16},
    ]
    for i, flags in enumerate(odd):
        args = dict(zip(TINY[::2], TINY[1::2])) | {"--batch_size": 2, "--rwkv_head_size": 32} | flags
        argv = [str(x) for pair in args.items() for x in pair] + (["--tied"] if i % 2 else [])
        train.main(
            [
                *argv,
                "--data",
                tiny.text,
                "--out",
                str(tmp_path / str(i)),
                "--max_steps",
                "2",
                "--device",
                "cpu",
                "--eval_tokens",
                "50",
            ]
        )
        assert metrics(tmp_path / str(i))[-1]["step"] == 2
        assert load_model(tmp_path / str(i)).cfg.tied == bool(i % 2)


class Cache:
    """In the place of a state, where somebody counts who is alive."""


class Carrier(Loader):
    """A loader that carries numbers."""

    def __init__(self, states):
        self.W, self.accum, self.states = 1, len(states), states

    def carried(self, i):
        return list(self.states)

    def carry(self, micro, state):
        self.states[micro] = state


def test_a_state_that_is_not_carried_is_gone_before_the_next_micro_batch(monkeypatch, tiny):
    """Attention's is a cache: kept for every micro-batch it would cost memory that
    grows with accum.
    """
    states: list[weakref.ref] = []

    def backward(module, batch, state, *args, **kwargs):
        assert state is None and not any(ref() for ref in states)
        states.append(weakref.ref(cache := Cache()))
        return {"loss": torch.ones(())}, cache

    monkeypatch.setattr(train, "backward_in_pieces", backward)
    batches, cpu = [random_batch()] * 3, torch.device("cpu")
    loader = Loader(tiny.text, "train", 3, T, accum=3)
    means = forward_backward(None, batches, 6, loader, 0, cpu)
    assert means["loss"] == 0.5 and loader.carried(1) == [None] * 3 and len(states) == 3
    monkeypatch.setattr(train, "backward_in_pieces", lambda module, batch, state, *_, **__: ({}, state + 1))
    carrier = Carrier([10, 20, 30])
    forward_backward(None, batches, 6, carrier, 0, cpu)
    assert carrier.states == [11, 21, 31]


def test_what_a_run_writes_is_said_once():
    """Options of the run are no options of the loop, and have no prefix."""
    run, loop = (set(cls.__dataclass_fields__) for cls in (RunConfig, FitConfig))
    assert not run & loop and {"save_every", "log_every", "out", "device"} <= run


@pytest.mark.parametrize("asked, rows", [("100", 257), ("257", 257), ("320", 320)])
def test_a_vocabulary_has_at_least_the_tokens_of_the_data_and_more_if_asked(tmp_path, tiny, asked, rows):
    train.main([*TINY, "--data", tiny.text, "--vocab_size", asked, "--max_steps", "1", "--batch_size", "1",
                "--eval_tokens", "20", "--device", "cpu", "--out", str(tmp_path / "run")])
    assert load_model(tmp_path / "run").emb.weight.shape[0] == rows


def test_a_vocabulary_that_cannot_be_the_datas_is_refused(tmp_path, tiny):
    with pytest.raises(ValueError, match="vocab_size = 65536, but .* has 257 tokens: prepare"):
        train.main([*TINY, "--data", tiny.text, "--vocab_size", "65536", "--device", "cpu",
                    "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()
