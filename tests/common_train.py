"""What the tests of training and distillation share.

Short runs, tiny jobs, ways to interrupt them, and models that pass for others.
Processes that are spawned import this file by its name, so their functions stand here
too.
"""

import json
import os
import subprocess
import time
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from common import T, tiny_model
from distill import AllGather, DistillConfig, VFirstHolder, distill
from lib.folders import load_model, save_model
from lib.runs import Run, RunConfig
from lib.streams import open_loader
from model import LM, CausalSelfAttention
from train import FitConfig, TrainConfig, cross_entropy_loss, fit, train

META = {"tokenizer": "bytes"}
QUIET = {"eval_every": None, "warmup_steps": 0}  # for a FitConfig
RUN_FIELDS = {f.name for f in fields(RunConfig)}


class Killed(Exception):
    """What a process dies of, as far as a test can tell."""


# ------------------------------------------------------------------------------------------
# Runs of fit


def open_run(out: Path | str, model: LM, **options) -> Run:
    """The run in `out`, which goes on where there is one.

    Every step is logged, only the last saved.
    """
    quiet = {
        "out": str(out),
        "resume": Path(out).exists(),
        "device": "cpu",
        "save_every": None,
        "log_every": 1,
    }
    cfg = RunConfig(**quiet | options)
    run = Run(cfg, 0)
    run.begin(model, META, cfg)
    return run


def run_fit(
    out: Path,
    data: str,
    cfg: FitConfig,
    model: LM | None = None,
    loss_fn: Callable = cross_entropy_loss,
    validate: Callable | None = None,
    length: int = T,
    **options,
) -> dict:
    """fit on a data folder, of a small RWKV-7 if no model is given; options are
    RunConfig's.
    """
    model = model or tiny_model(mixer="r", std=0.05)
    loader = open_loader(data, "train", cfg, length, 0, 0, 1)
    return fit(model, loss_fn, loader, cfg, open_run(out, model, **options), validate)


def dies_at_call(n: int, loss_fn: Callable = cross_entropy_loss) -> Callable:
    """The loss, but the process "dies" in its n-th training pass."""
    calls = []

    def dying(*args, **kwargs):
        calls.append(torch.is_grad_enabled())  # without gradients it is the held-out loss
        if sum(calls) == n:
            raise Killed
        return loss_fn(*args, **kwargs)

    return dying


def wait_for(condition: Callable[[], bool], process: subprocess.Popen, seconds: float = 600) -> None:
    """Until the condition holds; the process must be running.

    `seconds` only end a test that hangs.
    """
    end = time.time() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.time() < end, "too slow"
        time.sleep(0.01)


# ------------------------------------------------------------------------------------------
# Distillations


def loop(max_steps: int, batch_size: int = 2, **changes) -> FitConfig:
    """A stage's loop."""
    common = {"max_steps": max_steps, "batch_size": batch_size, "warmup_steps": 0, "learning_rate": 1e-3}
    return FitConfig(**common | changes)


@pytest.fixture(scope="session")
def teacher(tmp_path_factory) -> str:
    """A tiny teacher's folder; nothing was learnt, which no theorem here needs."""
    folder = tmp_path_factory.mktemp("teacher") / "teacher"
    save_model(tiny_model(), folder, META)
    return str(folder)


@pytest.fixture
def job(tiny, teacher, tmp_path) -> Callable[..., DistillConfig]:
    """job(name, ...) -> the settings of a tiny distillation into tmp_path / name.

    What RunConfig has goes there, all else to DistillConfig.
    """

    def make(name: str, **changes) -> DistillConfig:
        options = {key: value for key, value in changes.items() if key in RUN_FIELDS}
        stages = {key: value for key, value in changes.items() if key not in RUN_FIELDS}
        run = RunConfig(**{"out": str(tmp_path / name), "device": "cpu", "log_every": 1} | options)
        common = {
            "teacher": teacher,
            "data": tiny.text,
            "finish_data": tiny.sft,
            "eval_tokens": 300,
            "align": loop(3),
            "match": loop(3),
            "finish": loop(3),
            "run": run,
        }
        return DistillConfig(**common | stages)

    return make


def rerun(cfg: DistillConfig, **options) -> DistillConfig:
    """The same job with other settings of its run."""
    return replace(cfg, run=replace(cfg.run, **options))


def weights(folder: Path | str) -> dict[str, torch.Tensor]:
    return load_model(folder).state_dict()


class Pretender(CausalSelfAttention):
    """Passes for attention, and computes what a student's mixer computes, v_first
    included.
    """

    def __init__(self, cfg, mixer, shared):
        super().__init__(cfg)
        self.mixer, self.shared = mixer, shared

    def forward(self, x, v_first, state):
        student_v_first = None if self.mixer.first else self.shared["v_first"]
        y, self.shared["v_first"], _ = self.mixer(x, student_v_first, None)
        return y, v_first, None


def pretend(student, layers=(0, 1)):
    """A teacher that is the student, but whose mixers are called attention."""
    teacher, shared = tiny_model(7, mixer="a", ffn=student.cfg.ffn), {}
    common = {name: p for name, p in student.state_dict().items() if ".att." not in name}
    teacher.load_state_dict(common, strict=False)
    for i in layers:
        teacher.blocks[i].att = Pretender(teacher.cfg, student.blocks[i].att, shared)
    return teacher.eval()


def assert_sum_of_rows(loss: Callable, batch, rows: list, model: LM) -> None:
    """The batch's loss and its gradients are the sums of the rows' own."""
    parameters = list(model.parameters())
    together, alone = loss(batch), sum(map(loss, rows))
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
    gradients = (torch.autograd.grad(x, parameters, allow_unused=True) for x in (together, alone))
    for a, b in zip(*gradients):
        assert (a is None) == (b is None)
        if a is not None:
            assert (a - b).norm() <= 1e-4 * b.norm() + 1e-6


# ------------------------------------------------------------------------------------------
# Two processes


def two_processes(store: Path, jobs: list, check: Callable[[int], None] | None = None):
    """Start both; `.join()` until it says True. Each does `check`, then the jobs."""
    return torch.multiprocessing.spawn(two_ranks, (str(store), jobs, check), nprocs=2, join=False)


def two_ranks(rank: int, store: str, jobs: list, check: Callable[[int], None] | None) -> None:
    """One of two processes: each job's result goes to OUT/rank0.json or rank1.json."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    if check:
        check(rank)
    for cfg in jobs:
        result = train(cfg) if isinstance(cfg, TrainConfig) else distill(cfg)
        Path(f"{cfg.run.out}/rank{rank}.json").write_text(json.dumps(result))
    dist.destroy_process_group()


def check_gather(rank: int) -> None:
    """The gather by hand: x of both ranks on both; my gradient is the sum of both
    ranks' wishes.
    """
    x = torch.full((1, 2, 3), 1.0 + rank, requires_grad=True)
    gathered = AllGather.apply(x, None)
    assert gathered[:, 0, 0, 0].tolist() == [1.0, 2.0] and gathered.shape == (2, 1, 2, 3)
    wish = torch.tensor([10.0, 1.0])[:, None, None, None] * (3.0 if rank else 1.0)
    (gathered * wish).sum().backward()
    assert x.grad.unique().tolist() == [[40.0], [4.0]][rank]  # (1 + 3) * 10, (1 + 3) * 1
    holder = VFirstHolder()
    holder.write(x)
    assert holder.state.shape == (2, 1, 2, 3) and torch.equal(holder.read(), x)
