"""The whole story in one command: data and teacher where they are missing, student, report.

    python -m tools.demo
    python -m tools.demo --out out/demo --teacher out/demo-teacher --overwrite
    python -m tools.demo config/results.toml --controls

Its settings are distill.py's, and with a prefix those of the teacher that is trained where
there is none: --teacher_model.n_layer, --teacher_fit.max_steps, ...
"""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch.distributed as dist
from tyro.conf import OmitArgPrefixes

from config import cli, run as run_script, settings
from data.prepare import ensure_prepared
from distill import DistillConfig, distill
from lib.processes import joined, main_first, setup
from lib.runs import Run
from model import ModelConfig
from tools.controls import ControlsConfig, add_controls
from train import FitConfig, TrainConfig, train


@settings
class DemoConfig:
    teacher_model: ModelConfig = ModelConfig()
    teacher_fit: FitConfig = FitConfig(max_steps=3000, batch_size=4, eval_every=1000)
    controls: bool = False         # afterwards, what the same tokens give without each idea
    job: Annotated[DistillConfig, OmitArgPrefixes] = DistillConfig()


def demo(cfg: DemoConfig) -> dict:
    """Teacher from nothing, RNN from the teacher; returns the report."""
    job = cfg.job
    rank, _, _ = setup(job.run.device)
    Run(job.run, rank, "distill", reads=[job.teacher, job.logit_teacher])      # refuses before anything trains
    if not Path(job.teacher).exists():
        with main_first(rank):
            ensure_prepared(job.data)
        if rank == 0:
            print(f"{job.teacher} is missing: training a teacher first", flush=True)
        train_teacher(cfg)
    report = distill(job)
    if cfg.controls:
        report = add_controls(ControlsConfig(scratch_rate=cfg.teacher_fit.learning_rate, job=job))
    return report


def train_teacher(cfg: DemoConfig) -> None:
    """Train the teacher next to its place and move it there when it is done: half a teacher never teaches."""
    place = Path(cfg.job.teacher)
    unfinished = place.with_name(place.name + ".partial")
    run = replace(cfg.job.run, out=str(unfinished), resume=unfinished.exists(), overwrite=False)
    train(TrainConfig(data=cfg.job.data, model=cfg.teacher_model, fit=cfg.teacher_fit, run=run))
    if not dist.is_initialized() or dist.get_rank() == 0:
        unfinished.rename(place)
    if dist.is_initialized():
        dist.barrier()


def main(argv: list[str] | None = None) -> None:
    cfg = cli(DemoConfig, argv)
    with joined():
        demo(cfg)


if __name__ == "__main__":
    run_script(main)
