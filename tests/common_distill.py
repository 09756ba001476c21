"""What the tests of distillation share.

Tiny jobs and their teacher, sums over rows.
Processes that are spawned import this file by its name, so check_gather stands here.
"""

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from common import tiny_model
from distill import AllGather, DistillConfig, VFirstHolder
from lib.folders import load_model, save_model
from lib.runs import RunConfig
from model import LM
from train import FitConfig

META = {"tokenizer": "bytes"}
RUN_FIELDS = {f.name for f in fields(RunConfig)}


# ------------------------------------------------------------------------------------------
# Jobs


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


def flags(cfg: DistillConfig) -> list[str]:
    """What to give a script for such a job."""
    words = ["--teacher", cfg.teacher, "--data", cfg.data, "--out", cfg.run.out,
             "--device", "cpu", "--log_every", "1", "--eval_tokens", str(cfg.eval_tokens)]
    for stage in ("align", "match", "finish"):
        fit = getattr(cfg, stage)
        for name in ("max_steps", "batch_size", "warmup_steps", "learning_rate", "rwkv_lr_multiplier",
                     "weight_decay", "optimizer"):
            words += [f"--{stage}.{name}", str(getattr(fit, name))]
    return words


def rerun(cfg: DistillConfig, **options) -> DistillConfig:
    """The same job with other settings of its run."""
    return replace(cfg, run=replace(cfg.run, **options))


def weights(folder: Path | str) -> dict[str, torch.Tensor]:
    return load_model(folder).state_dict()


# ------------------------------------------------------------------------------------------
# Models and losses


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


def check_gather(rank: int) -> None:
    """The gather by hand: both ranks' x on both; my gradient sums both their wishes."""
    x = torch.full((1, 2, 3), 1.0 + rank, requires_grad=True)
    gathered = AllGather.apply(x, None)
    assert gathered[:, 0, 0, 0].tolist() == [1.0, 2.0] and gathered.shape == (2, 1, 2, 3)
    wish = torch.tensor([10.0, 1.0])[:, None, None, None] * (3.0 if rank else 1.0)
    (gathered * wish).sum().backward()
    assert x.grad.unique().tolist() == [[40.0], [4.0]][rank]  # (1 + 3) * 10, (1 + 3) * 1
    holder = VFirstHolder()
    holder.write(x)
    assert holder.state.shape == (2, 1, 2, 3) and torch.equal(holder.read(), x)
