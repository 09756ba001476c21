"""The whole story in one command: data and teacher where missing, student, report.

    python -m tools.demo
    python -m tools.demo --out out/demo --teacher out/demo-teacher --overwrite
    python -m tools.demo config/results.toml --controls

Its settings are distill.py's, and with a prefix those of the teacher that is trained
where there is none: --teacher_model.n_layer, --teacher_fit.max_steps, ...
"""

from dataclasses import replace
from pathlib import Path

from config import cli, narrow, run as run_script, settings
import torch.distributed as dist

from data.prepare import ensure_prepared
from data.shares import folders_of
from distill import DistillConfig, distill
from lib.folders import on_paper, open_model
from lib.processes import joined, main_first, setup
from lib.runs import Run
from lib.stages import check_positions, check_student
from lib.start import student_shape
from model import ModelConfig
from tools.controls import ControlsConfig, add_controls, check_stages
from train import FitConfig, TrainConfig, train


@settings
class DemoConfig(DistillConfig):
    teacher_model: ModelConfig = ModelConfig()
    teacher_fit: FitConfig = FitConfig(max_steps=3000, batch_size=4, eval_every=1000)
    controls: bool = False         # afterwards, what the same tokens give without each idea


def demo(cfg: DemoConfig) -> dict:
    """Teacher from nothing, RNN from the teacher; returns the report."""
    rank, _, _ = setup(cfg.run.device)
    if cfg.controls:
        check_stages(cfg)
    reads = [cfg.teacher, cfg.logit_teacher, cfg.data, cfg.finish_data]
    Run(cfg.run, rank, "distill", reads)                   # refuses before anything trains
    if not Path(cfg.teacher).exists():
        with main_first(rank):
            ensure_prepared(cfg.data)
            check_early(cfg)
        if rank == 0:
            print(f"{cfg.teacher} is missing: training a teacher first", flush=True)
        train_teacher(cfg)
    else:
        check_teacher(cfg)
    report = distill(cfg)
    if cfg.controls:
        rate = cfg.teacher_fit.learning_rate
        done = narrow(cfg, DistillConfig, run=replace(cfg.run, overwrite=False))
        report = add_controls(ControlsConfig(**vars(done), scratch_rate=rate))
    return report


def check_early(cfg: DemoConfig) -> None:
    """Raises ValueError for what the stages would refuse when the teacher is there."""
    check_student(cfg, on_paper(student_shape(cfg.teacher_model, cfg.student)))
    teacher = on_paper(cfg.teacher_model)
    check_positions(cfg, teacher, teacher, cfg.block_size or teacher.cfg.block_size)
    if "finish" in cfg.named:
        ensure_prepared(cfg.finish_data, folders_of(cfg.data)[0])  # the teacher will have its tokenizer
    for folder in filter(None, (cfg.logit_teacher, cfg.student.aligned)):
        if not Path(folder).exists():
            raise ValueError(f"no model at {folder}: train or import it first")


def check_teacher(cfg: DemoConfig) -> None:
    """Raises ValueError where --teacher_model describes another model than is there."""
    if cfg.teacher_model == ModelConfig():                 # nothing was asked for
        return
    there = open_model(cfg.teacher)[0].cfg
    for name, value in vars(cfg.teacher_model).items():
        if name not in ("vocab_size", "mixer") and value != getattr(there, name):      # the data's; no flag
            raise ValueError(f"{cfg.teacher} is there already, with {name} = {getattr(there, name)}, not "
                             f"{value}: omit --teacher_model, or name a new --teacher")


def train_teacher(cfg: DemoConfig) -> None:
    """Train the teacher next to its place and move it there when it is done: half a
    teacher never teaches.
    """
    place = Path(cfg.teacher)
    unfinished = place.with_name(place.name + ".partial")
    run = replace(cfg.run, out=str(unfinished), resume=unfinished.exists(), overwrite=False)
    train(TrainConfig(data=cfg.data, model=cfg.teacher_model, fit=cfg.teacher_fit, run=run))
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
