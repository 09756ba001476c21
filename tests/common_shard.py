"""What the tests of sharding share, and, as a script, what their two processes run."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from common import make_data, random_batch, tiny_model
from common_distill import META
from distill import DistillConfig, StudentConfig, distill, make_student
from lib.folders import save_model
from lib.muon import Muon
from lib.processes import joined, whole
from lib.runs import RunConfig
from lib.shard import load, new_model
from lib.stages import load_teacher
from model import ModelConfig
from train import FitConfig, Step, TrainConfig, cross_entropy_loss, param_groups, train

STEPS, T = 20, 32
STUDENTS = {"rwkv": "r", "hybrid": "ra"}
LARGE = ModelConfig(mixer="ra", n_embd=128, n_layer=3, n_head=2, block_size=T)    # for counting bytes


def write_inputs(root: Path) -> None:
    """Little text, so that little is held out, and a teacher."""
    make_data(root, characters=2500)
    save_model(tiny_model(ffn="swiglu", tied=True, ln0=False, block_size=T), root / "teacher", META)


def loop(rows: int, accum: int, **changes) -> FitConfig:
    quiet = {"warmup_steps": 0, "eval_every": None, "optimizer": "muon"}
    return FitConfig(max_steps=STEPS, batch_size=rows, accum=accum, **quiet | changes)


def run_config(root: Path, name: str, **options) -> RunConfig:
    return RunConfig(out=str(root / name), device="cpu", log_every=1, **{"save_every": None} | options)


def scratch(root: Path, name: str, rows: int, accum: int, **options) -> TrainConfig:
    """Attention alone, trained from scratch, and saved half way."""
    return TrainConfig(data=f"{root}/text", eval_tokens=60, model=replace(tiny_model().cfg, block_size=T),
                       fit=loop(rows, accum), run=run_config(root, name, save_every=10, **options))


def stages(root: Path, name: str, kind: str, rows: int, **options) -> DistillConfig:
    """All three stages, one of them by pieces; the hybrid ends with preferences."""
    rwkv, student = kind == "rwkv", StudentConfig(mixer=STUDENTS[kind])
    match, finish = ({"bptt_chunk": 16 if pieces else None} for pieces in (not rwkv, rwkv))
    return DistillConfig(teacher=f"{root}/teacher", data=f"{root}/text",
                         finish_data=f"{root}/{'sft' if rwkv else 'dpo'}", eval_tokens=60, student=student,
                         align=loop(rows, 1, optimizer="adamw"), match=loop(rows, 1, **match),
                         finish=loop(rows, 1, optimizer="adamw", learning_rate=1e-3, **finish),
                         run=run_config(root, name, **options))


def half_done(source: Path, copy: Path) -> None:
    """A run as it was after ten steps."""
    shutil.copytree(source, copy)
    shutil.rmtree(copy / "checkpoints" / f"step_{STEPS:07d}")


def all_runs(root: Path) -> None:
    """In one of two processes: sharded and with DDP, and some gone on with."""
    train(scratch(root, "shard", 2, 2, shard=True))
    for kind in STUDENTS:
        how = {"shard": True, "checkpoint_blocks": kind == "hybrid"}
        distill(stages(root, f"shard-{kind}", kind, 2, **how))
    train(scratch(root, "ddp", 2, 2))
    for kind in STUDENTS:
        distill(stages(root, f"ddp-{kind}", kind, 2))
    if dist.get_rank() == 0:
        half_done(root / "shard", root / "again")
        half_done(root / "shard", root / "one-goes-on")
        half_done(root / "ddp", root / "shard-goes-on")
    dist.barrier()
    for name in ("again", "shard-goes-on"):
        train(scratch(root, name, 2, 2, shard=True, resume=True))
    checks = {"bytes": local_bytes(), "folder": same_folder(root), "new": same_start(),
              "student": farthest_student(root)}
    (root / f"rank{dist.get_rank()}.json").write_text(json.dumps(checks))


def local_bytes() -> dict[str, int]:
    """What this process holds of a model after a step's backward pass."""
    model = new_model(LARGE, torch.device("cpu"), True)
    optimizer = Muon(param_groups(model, FitConfig()), fused=True)
    for _ in range(2):                                     # the second has moments
        optimizer.zero_grad()
        losses, _ = Step(model, cross_entropy_loss)(random_batch(), None)
        losses["loss"].backward()
        optimizer.step()
    states = [x for state in optimizer.state.values() for x in state.values() if x.ndim]

    def nbytes(xs) -> int:
        return sum(x.to_local().nbytes for x in xs)

    return {"weights": nbytes(model.parameters()), "gradients": nbytes(p.grad for p in model.parameters()),
            "optimizer": nbytes(states)}


def same_folder(root: Path) -> bool:
    """Whether a folder's model has the same weights in parts and whole."""
    parts, model = (load(root / "teacher", torch.device("cpu"), shard) for shard in (True, False))
    weights = parts.state_dict()
    return all(torch.equal(whole(weights[name]), x) for name, x in model.state_dict().items())


def farthest_student(root: Path) -> float:
    """The largest relative difference between weights of a student, made from a teacher
    in parts and a whole one, at which it looks.
    """
    cfg, tokens, made = StudentConfig(decay="lookback", calibrate=True), random_batch(2, T).x, []
    for shard in (True, False):
        torch.manual_seed(7)
        teacher = load_teacher(str(root / "teacher"), torch.device("cpu"), shard)
        student = make_student(teacher, cfg, tokens, T)
        made.append([whole(x) for x in student.state_dict().values()])
    return max(((a - b).norm() / (b.norm() + 1e-9)).item() for a, b in zip(*made, strict=True))


def same_start() -> bool:
    """Whether a new model has the same weights in parts and whole, and so have later
    random numbers.
    """
    for ffn, mixer in (("channelmix", "r"), ("gelu", "ra")):
        cfg, draws = replace(LARGE, ffn=ffn, mixer=mixer, positions="learned"), []
        for shard in (True, False):
            torch.manual_seed(7)
            weights = new_model(cfg, torch.device("cpu"), shard).state_dict()
            draws.append([whole(x) for x in weights.values()] + [torch.rand(3)])
        if not all(map(torch.equal, *draws)):
            return False
    return True


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.modules["matplotlib"] = None                       # a report without its picture is as good here
    with joined():
        all_runs(Path(sys.argv[1]))
