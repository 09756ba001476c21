"""What the tests of training share; those of distillation have common_distill.

Short runs, ways to interrupt them, and two processes. Spawned processes import this
file by its name, so their functions stand here too.
"""

import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from common import T, tiny_model
from common_distill import META, job, loop, teacher  # noqa: F401   (for who imports them from here)
from distill import distill
from lib.runs import Run, RunConfig
from lib.streams import open_loader
from model import LM
from train import FitConfig, TrainConfig, cross_entropy_loss, fit, train

QUIET = {"eval_every": None, "warmup_steps": 0}  # for a FitConfig


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
    """fit on a data folder, by default of a small RWKV-7; options are RunConfig's."""
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
