"""The training loop, and as a script: train a GPT or an RWKV-7 from scratch, on one process or many.

    python train.py                                        a small GPT on Python's own manual, any CPU
    python train.py config/shakespeare-cpu.toml            nanoGPT's CPU setting
    torchrun --nproc_per_node=8 train.py config/gpt2-124m.toml
    python train.py --mixer r --ffn channelmix             RWKV-7 instead of attention
    python train.py config/rwkv7-3b.toml --plan 8          does not train: parameters and memory per GPU, with 8 of them
    python train.py --mixer r --ffn channelmix --block_size 16384 --bptt_chunk 1024     long sequences at the memory of short ones

What it is: `fit`, the one loop of this project. Distillation (distill.py) is three more calls of it: a stage is a loss
function and the parameters that train. What it is not: a framework; whoever needs another loop changes this one.

    loss_fn(model, batch, state=None, with_loss=True) -> ({"loss": ..., ...}, state)    SUMS over this batch's targets, as scalars

`fit` divides by the number of targets in the whole step (all micro-batches of all ranks), which the loader knows. So
accumulation, padding and data parallelism never change what is computed: two processes give one process's gradients.

The states are for `bptt_chunk` and `bptt_truncate` (bptt.py), where a batch is a piece of each sequence: `state` is what the loss
returned for the previous piece, None at the beginning. The sum over the pieces is the loss of the whole. Without `with_loss` only
the state is wanted, and the dict may be empty.
"""

import contextlib
import json
import math
import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated

import torch
import torch.distributed as dist
import torch.nn as nn
from safetensors import SafetensorError
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm
from tyro.conf import OmitArgPrefixes

from bptt import backward_in_pieces, pack, unpack
from config import cli, run
from data.loader import Batch, Loader
from data.prepare import ensure_prepared
from data.tokenizer import copy_tokenizer
from evaluate import check_vocabulary, cross_entropy, global_sum, mean_loss, read_metrics, same_tokenizer
from model import LM, ModelConfig, State, TimeMixer, load_model, open_model, save_model, tensors
from plan import describe, plan


@dataclass(frozen=True)
class FitConfig:
    """How long, how fast, how often. None means off."""

    max_steps: int = 2000
    batch_size: int = 8                       # sequences per process and micro-batch
    accum: int = 1                            # micro-batches per step
    learning_rate: float = 2e-3
    learning_rate_end: float | None = None    # None = a twentieth
    warmup_steps: int = 20
    schedule: str = "cosine"                  # cosine, linear, constant; for learning rate and weight decay
    weight_decay: float = 0.1
    weight_decay_end: float | None = None     # None = constant
    att_weight_decay: float | None = None     # of the mixers' matrices; None = weight_decay
    ffn_weight_decay: float | None = None     # of the feed-forward matrices; None = weight_decay
    rwkv_lr_multiplier: float = 1.0           # on the learning rate of everything in RWKV mixers
    beta1: float = 0.9
    beta2: float = 0.99
    eps: float = 1e-8
    clip: float | None = 1.0                  # of the gradient's norm
    bptt_chunk: int | None = None             # tokens whose activations exist at once, with exact gradients; None = whole sequences
    bptt_truncate: bool = False               # the text goes on from step to step: the state is carried over, the gradient is not
    # stop at whichever comes first; the schedules end there
    max_tokens: int | None = None             # inputs seen, over all processes
    max_minutes: float | None = None
    terminate_at_loss: float | None = None    # training loss, averaged over log_every steps
    # keep
    save_every: int | None = 500              # steps; the end and Ctrl-C always save
    save_minutes: float | None = None
    keep_last: int = 2                        # checkpoints
    eval_every: int | None = 500
    log_every: int = 10
    compile: bool = False
    wandb: str | None = None                  # project name

    def __post_init__(self):
        for f in fields(self):
            value = getattr(self, f.name)
            if value is None or f.type in (str, bool) or f.name == "wandb":
                continue
            least = 1 if "int" in str(f.type) and f.name != "warmup_steps" and f.name != "max_steps" else 0
            if not (math.isfinite(value) and value >= least):
                raise ValueError(f"{f.name} = {value}: it must be a number of at least {least}")
        if self.schedule not in ("cosine", "linear", "constant"):
            raise ValueError(f"schedule = {self.schedule!r}: choose cosine, linear or constant")


# ---------------------------------------------------------------------------------------------------------------------
# Processes

def setup(device: str = "auto") -> tuple[int, int, torch.device]:
    """(rank, world size, device) from torchrun's environment; alone it is (0, 1, device). NCCL on GPUs, gloo on CPUs."""
    rank, world, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    gpu = torch.cuda.is_available()
    if device not in ("auto", "cpu") and not (gpu and device.startswith("cuda")):
        raise ValueError(f"device = {device!r}: choose auto, cpu" + (" or cuda" if gpu else "; there is no CUDA here"))
    device = torch.device(f"cuda:{local}" if gpu and device in ("auto", "cuda") else "cpu" if device == "auto" else device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return rank, world, device


@contextlib.contextmanager
def joined():
    """Around a script's work: at the end no process tears its connections down while another still uses them."""
    try:
        yield
        if dist.is_initialized():
            dist.barrier()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


@contextlib.contextmanager
def main_first(rank: int):
    """Rank 0 runs the block before the others do: for preparing data once."""
    if dist.is_initialized() and rank > 0:
        dist.barrier()
    yield
    if dist.is_initialized() and rank == 0:
        dist.barrier()


# ---------------------------------------------------------------------------------------------------------------------
# Optimizer and schedules

def param_groups(model: nn.Module, cfg: FitConfig) -> list[dict]:
    """AdamW groups by the official RWKV-7 rule.

    Decay only on the matrices of projections, embedding and head (names in .weight, two dimensions or more); `w0`, which
    sets the decay of the state, learns twice as fast; everything in RWKV mixers by rwkv_lr_multiplier.
    """
    in_rwkv = {id(p) for m in model.modules() if isinstance(m, TimeMixer) for p in m.parameters()}
    groups: dict[tuple, list] = {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        rate = (2.0 if name.endswith(".w0") else 1.0) * (cfg.rwkv_lr_multiplier if id(p) in in_rwkv else 1.0)
        own = cfg.att_weight_decay if ".att." in name else cfg.ffn_weight_decay if ".ffn." in name else None
        decay = (cfg.weight_decay if own is None else own) if name.endswith(".weight") and p.ndim >= 2 else 0.0
        groups.setdefault((rate, decay), []).append(p)
    if not groups:
        raise ValueError("nothing to train: every parameter is frozen")
    return [{"params": ps, "rate": rate, "decay": decay} for (rate, decay), ps in groups.items()]


def interpolate(start: float, end: float, progress: float, schedule: str) -> float:
    """From start (progress 0) to end (progress 1), along half a cosine or a line; constant stays at start."""
    left = {"cosine": 0.5 * (1 + math.cos(math.pi * progress)), "linear": 1 - progress, "constant": 1.0}[schedule]
    return end + (start - end) * left


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints: OUT/checkpoints/step_N/ is a model folder with trainer.pt. A folder is written under another name and
# then renamed, so whatever bears the name is whole. OUT itself is the newest checkpoint's model, for everybody else.

MODEL = ("config.json", "tokenizer.json", "meta.json", "model.safetensors")  # the second only where a name does not say it all


def save_checkpoint(out: Path, model: LM, meta: dict, trainer: dict, keep_last: int, data: Path) -> None:
    folder = out / "checkpoints" / f"step_{trainer['step']:07d}"
    unfinished = folder.with_suffix(".tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        save_model(model, unfinished, meta)
        copy_tokenizer(data, unfinished)
        torch.save(trainer, unfinished / "trainer.pt")
        if folder.exists():  # an interrupted run saved this very step
            shutil.rmtree(folder)
        os.replace(unfinished, folder)
        publish(folder, out)
    except (OSError, RuntimeError, SafetensorError) as e:  # a full disk: torch.save's RuntimeError, safetensors' own
        shutil.rmtree(unfinished, ignore_errors=True)
        last = last_checkpoint(out)
        raise ValueError(f"could not save step {trainer['step']} ({e}): free some disk space and go on with --resume"
                         + (f"; {last} is kept" if last else "")) from None
    for old in checkpoints(out)[:-keep_last]:
        shutil.rmtree(old)


def publish(folder: Path, out: Path) -> None:
    """Make the model in `folder` the model of `out`, file by file, each by one rename."""
    for name in MODEL:
        if (folder / name).exists():
            shutil.copyfile(folder / name, out / f"{name}.tmp")
            os.replace(out / f"{name}.tmp", out / name)


def checkpoints(out: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    return sorted((p for p in (out / "checkpoints").glob("step_*") if p.name[5:].isdigit()), key=lambda p: int(p.name[5:]))


def last_checkpoint(out: Path) -> Path | None:
    return next(reversed(checkpoints(out)), None)


def load_trainer(folder: Path) -> dict:
    """trainer.pt, read without running pickled code. Raises ValueError for a damaged one."""
    try:
        trainer = torch.load(folder / "trainer.pt", weights_only=True)
        return {key: trainer[key] for key in ("step", "tokens", "seconds", "optimizer", "rng")} | {"states": trainer.get("states")}
    except Exception as e:  # torch raises many kinds here; each means the same to the user
        raise ValueError(f"{folder}/trainer.pt is damaged ({type(e).__name__}): remove {folder} and --resume from the checkpoint before") from None


def restore(model: LM, folder: Path) -> None:
    """Give the model the weights saved in `folder`. Raises ValueError where they are damaged, or another model's."""
    try:
        saved = load_model(folder)
    except ValueError as e:
        raise ValueError(f"cannot go on from {folder} ({e}): remove that folder and --resume from what was saved before it") from None
    if saved.cfg != model.cfg:
        other = ", ".join(f.name for f in fields(saved.cfg) if getattr(saved.cfg, f.name) != getattr(model.cfg, f.name))
        raise ValueError(f"{folder} holds another model (other {other}): resume with the settings it was started with")
    model.load_state_dict(saved.state_dict())


RUN = ("checkpoints", *MODEL, "metrics.jsonl")  # what a run of train.py writes


def check_free(out: Path, resume: bool, overwrite: bool, writes: tuple[str, ...], foreign: str, reads: tuple[str | None, ...]) -> None:
    """Raises ValueError where a run that `writes` these names into `out` would lose another's work.

    `foreign` is a name that only the other script's runs have; `reads` are the model folders that the run starts from.
    """
    if resume and overwrite:
        raise ValueError("--resume and --overwrite contradict each other: choose one")
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: choose another --out")
    if any(Path(folder).resolve() == out.resolve() for folder in reads if folder):
        raise ValueError(f"{out} is read by this run and would be replaced by it: choose another --out")
    if (out / foreign).exists():
        raise ValueError(f"{out} holds a run of another script: choose another --out")
    if resume and (out / "model.safetensors").exists() and not any(out.glob("**/checkpoints")):
        raise ValueError(f"{out} holds a model but no checkpoints: there is nothing to resume; choose another --out, or start from it with --init")
    if not resume and not overwrite and any((out / name).exists() for name in writes):
        raise ValueError(f"{out} holds another run: go on with --resume, replace it with --overwrite, or choose another --out")


def claim(out: Path, overwrite: bool, writes: tuple[str, ...]) -> None:
    """Make the folder of a run, empty of what it `writes` if that is to be overwritten. Called when all else is known to be right."""
    for name in writes if overwrite else ():
        shutil.rmtree(out / name) if (out / name).is_dir() else (out / name).unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)


# ---------------------------------------------------------------------------------------------------------------------
# The loop

class Step(nn.Module):
    """Model and loss as one module, so that DDP and torch.compile see the whole step."""

    def __init__(self, model: nn.Module, loss_fn: Callable):
        super().__init__()
        self.model, self.loss_fn = model, loss_fn

    def forward(self, *args):
        return self.loss_fn(self.model, *args)


def fit(model: nn.Module, loss_fn: Callable, loader: Loader, cfg: FitConfig, out: Path, save: LM, meta: dict,
        validate: Callable[[], dict] | None = None, name: str = "train") -> dict:
    """Train what requires gradients in `model`, from the newest checkpoint in `out` if there is one.

    `save` is the LM that checkpoints hold: the model itself, or the student inside it. `validate` gives a dict of floats.
    Returns {"step", "tokens", "minutes", "loss"} and the last validation. Raises ValueError when the loss is not finite,
    and KeyboardInterrupt, after saving, for Ctrl-C; either way the last good checkpoint stays.
    """
    assert cfg.bptt_truncate == loader.streams, "a state can only be carried along streams"
    rank, world = loader.rank, loader.W
    device = next(model.parameters()).device
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(param_groups(model, cfg), lr=cfg.learning_rate, betas=(cfg.beta1, cfg.beta2), eps=cfg.eps, fused=True)

    # where we are: at the start, or where the newest checkpoint ended
    checkpoint = last_checkpoint(out)
    step, tokens, seconds, carried = resume(checkpoint, save, optimizer, loader) if checkpoint else (0, 0, 0.0, None)
    log = MetricsLog(out, step, cfg.wandb) if rank == 0 else None

    module = Step(model, loss_fn)
    if cfg.compile:
        torch._functorch.config.enable_autograd_cache = False  # replaying cached view outputs fails in torch 2.13
        module = torch.compile(module)
    if world > 1:
        module = DistributedDataParallel(module, device_ids=[device.index] if device.type == "cuda" else None)
    if rank == 0:
        n = sum(p.numel() for p in trained)
        print(f"{name}: {n:,} of {sum(p.numel() for p in model.parameters()):,} parameters train, {loader.accum * world * loader.B} x {loader.T} "
              f"tokens a step, {world} x {device.type}" + (f", from step {step}" if step else ""), flush=True)

    def progress() -> float:
        """0 at the start, 1 at the end, by whichever limit is nearest."""
        done = [step / cfg.max_steps if cfg.max_steps else 1.0]
        done += [tokens / cfg.max_tokens] if cfg.max_tokens else []
        done += [seconds / 60 / cfg.max_minutes] if cfg.max_minutes else []
        return min(1.0, max(done))

    def checkpoint_now():
        states = pack(carried) if carried else None
        if rank == 0:
            trainer = {"step": step, "tokens": tokens, "seconds": seconds, "optimizer": optimizer.state_dict(), "rng": torch.get_rng_state(), "states": states}
            save_checkpoint(out, save, meta, trainer, cfg.keep_last, loader.folder)

    if checkpoint is None and progress() >= 1:
        checkpoint_now()
    elif progress() >= 1 and rank == 0:
        publish(checkpoint, out)  # the run may have died between saving and this
    since: list[torch.Tensor] = []  # gradient norm and losses of each step since the last look
    last_look = last_save = time.time()
    tokens_then = tokens
    validation, loss = {}, math.nan
    bar = tqdm(total=cfg.max_steps, initial=step, desc=name, disable=rank > 0, mininterval=0.2 if sys.stderr.isatty() else 20, dynamic_ncols=True)
    model.train()
    with Interrupt() as interrupted:
        while progress() < 1:
            lr = set_rates(optimizer, cfg, step, progress())
            batches, targets = loader.step(step)
            if loader.streams and loader.begins(step):
                carried = [None] * loader.accum
            sums, carried = forward_backward(module, batches, targets, world, device, cfg.bptt_chunk, carried)
            tokens += world * sum(batch.x.numel() for batch in batches)
            norm = nn.utils.clip_grad_norm_(trained, cfg.clip or math.inf)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            since.append(torch.stack([norm.float(), *sums.values()]))

            saves = bool(cfg.save_every) and step % cfg.save_every == 0
            alone = world == 1 and interrupted.seen  # others must hear of it first, at the next look
            if step % cfg.log_every and progress() < 1 and not saves and not alone:
                continue
            # look at the numbers: every log_every steps, and always before a checkpoint
            window = torch.stack(since)                                           # (steps, 1 + losses)
            window[:, 1:] = global_sum(window[:, 1:])
            late = bool(cfg.save_minutes) and time.time() - last_save > 60 * cfg.save_minutes
            stop, elapsed, save_due = agree([float(interrupted.seen), max(0.0, time.time() - last_look), float(late)], device)
            seconds += elapsed  # the slowest process's, so that all are equally far along their schedule
            if not window.isfinite().all():
                bad = step - len(window) + 1 + int((~window.isfinite()).any(1).nonzero()[0])
                kept = last_checkpoint(out)
                raise ValueError(f"{name}: the loss or its gradient is not finite at step {bad}: lower learning_rate; "
                                 + (f"the last good checkpoint is {kept}" if kept else "no checkpoint was written yet"))
            means = dict(zip(sums, window[:, 1:].mean(0).tolist()))
            speed = (tokens - tokens_then) / max(1e-9, elapsed)
            row = {"step": step, "tokens": tokens, "minutes": seconds / 60, **means, "grad_norm": window[:, 0].mean().item(), "lr": lr, "tokens_per_s": speed}
            bar.set_postfix_str(f"loss {means['loss']:.4f}, lr {lr:.1e}, {speed / 1000:.1f}k tok/s", refresh=False)
            bar.update(step - bar.n)
            since, loss = [], means["loss"]
            ends = progress() >= 1 or bool(cfg.terminate_at_loss) and means["loss"] <= cfg.terminate_at_loss
            eval_due = bool(cfg.eval_every) and step // cfg.eval_every > (step - len(window)) // cfg.eval_every
            if validate and (ends or eval_due):
                model.eval()
                validation = validate()
                model.train()
            if rank == 0:
                log.write(row | (validation if ends or eval_due else {}))
            if saves or save_due or ends or stop:
                checkpoint_now()
                last_save = time.time()
            if stop:
                bar.close()
                if rank == 0:
                    print(f"\nstopped after step {step}; everything is saved in {out}. Go on with: {resume_command()}", file=sys.stderr)
                raise KeyboardInterrupt("saved")
            last_look, tokens_then = time.time(), tokens  # evaluation and saving are not training time
            if ends:
                break
    bar.close()
    return {"step": step, "tokens": tokens, "minutes": seconds / 60, "loss": loss, **validation}


def resume(checkpoint: Path, save: LM, optimizer: torch.optim.Optimizer, loader: Loader) -> tuple[int, int, float, list[State] | None]:
    """Put weights, optimizer and random numbers back as the checkpoint has them; returns (step, tokens, seconds, carried states)."""
    trainer = load_trainer(checkpoint)
    restore(save, checkpoint)
    rates = lambda groups: [(g["rate"], g["decay"], len(g["params"])) for g in groups]  # noqa: E731
    if rates(optimizer.param_groups) != rates(trainer["optimizer"]["param_groups"]):
        raise ValueError(f"{checkpoint} had another weight decay, rwkv_lr_multiplier or freeze: resume with the settings it was started with")
    states = trainer["states"] or []  # one for each micro-batch, each with the rows of all processes
    have = [tensors(layers)[0].shape[0] for _, layers in states]
    want = [loader.W * loader.B] * (loader.accum if loader.streams else 0)
    if trainer["step"] and have != want:
        raise ValueError(f"{checkpoint} carries the state of {sum(have)} texts in {len(have)} micro-batches, these settings of {sum(want)} in {len(want)}: "
                         "resume with the bptt_truncate, batch_size, accum and processes that it was started with")
    optimizer.load_state_dict(trainer["optimizer"])
    torch.set_rng_state(trainer["rng"])
    device = next(save.parameters()).device
    return trainer["step"], trainer["tokens"], trainer["seconds"], unpack(states, loader.B, loader.rank, device) or None


def set_rates(optimizer: torch.optim.Optimizer, cfg: FitConfig, step: int, progress: float) -> float:
    """Give every group this step's learning rate and weight decay; returns the learning rate."""
    end = cfg.learning_rate / 20 if cfg.learning_rate_end is None else cfg.learning_rate_end
    lr = interpolate(cfg.learning_rate, end, progress, cfg.schedule) * min(1.0, (step + 1) / max(1, cfg.warmup_steps))
    fade = 1.0
    if cfg.weight_decay and cfg.weight_decay_end is not None:
        fade = interpolate(1.0, cfg.weight_decay_end / cfg.weight_decay, progress, cfg.schedule)
    for group in optimizer.param_groups:
        group["lr"], group["weight_decay"] = lr * group["rate"], group["decay"] * fade
    return lr


def forward_backward(module: nn.Module, batches: list[Batch], targets: int, world: int, device: torch.device, chunk: int | None = None,
                     states: list | None = None) -> tuple[dict[str, torch.Tensor], list | None]:
    """Gradients of the loss per target of the whole step; returns this process's share of every term's mean, and the next `states`.

    The losses are sums, `targets` counts those of all micro-batches of all processes, and DDP averages: hence `world`.
    `states`, one for each micro-batch, is where the sequences go on from; None: they begin here, and what follows them is forgotten.
    """
    sums: dict[str, torch.Tensor] = {}
    after = []
    for i, batch in enumerate(batches):
        last = i == len(batches) - 1  # DDP averages once, after the last micro-batch
        losses, state = backward_in_pieces(module, batch.to(device), states and states[i], chunk, world / targets, average=last)
        if states:
            after.append(state)
        for key, value in losses.items():
            sums[key] = sums.get(key, 0) + value / targets
        del state  # a KV cache that nobody carries would stay beside the next micro-batch
    return sums, after or None


def agree(values: list[float], device: torch.device) -> list[float]:
    """The maximum over all ranks of each value, so that all of them decide alike."""
    if not dist.is_initialized():
        return values
    t = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(t, dist.ReduceOp.MAX)
    return t.tolist()


def resume_command() -> str:
    args = [a for a in sys.argv[1:] if a.split("=")[0] not in ("--resume", "--overwrite", "--no-resume", "--no-overwrite")]
    world = dist.get_world_size() if dist.is_initialized() else 1
    start = ["python"] if world == 1 else ["torchrun", f"--nproc_per_node={world}"]
    return shlex.join([*start, Path(sys.argv[0]).name, *args, "--resume"])


class Interrupt:
    """Notes Ctrl-C and SIGTERM instead of dying in the middle of a step; a second one ends at once."""

    def __init__(self):
        self.seen = False

    def __enter__(self):
        self.before = {s: signal.signal(s, self.note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def note(self, signum, frame):
        if self.seen:
            raise KeyboardInterrupt
        self.seen = True

    def __exit__(self, *_):
        for s, handler in self.before.items():
            signal.signal(s, handler)


class MetricsLog:
    """metrics.jsonl, one line per log point; what an interrupted run wrote past its checkpoint is cut off."""

    def __init__(self, out: Path, step: int, wandb_project: str | None):
        self.path = out / "metrics.jsonl"
        kept = self.path.with_suffix(".tmp")
        kept.write_text("".join(json.dumps(row) + "\n" for row in read_metrics(self.path) if row["step"] <= step))
        kept.replace(self.path)
        self.wandb = None
        if wandb_project:
            try:
                import wandb
            except ImportError:
                raise ValueError("--wandb needs the package wandb: pip install wandb, or omit --wandb") from None
            self.wandb = wandb.init(project=wandb_project, name=out.name, resume="allow", id=out.name)

    def write(self, row: dict) -> None:
        with self.path.open("a") as f:
            f.write(json.dumps({k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in row.items()}) + "\n")
        if self.wandb:
            self.wandb.log(row, step=row["step"])


# ---------------------------------------------------------------------------------------------------------------------
# As a script

def cross_entropy_loss(model: LM, batch: Batch, state: State | None = None, with_loss: bool = True) -> tuple[dict[str, torch.Tensor], State]:
    """The language-modelling loss, summed over the targets, and the state after them; without `with_loss` the head is spared."""
    x, state = model.hidden(batch.x, state)
    return {"loss": cross_entropy(model.head(x), batch)} if with_loss else {}, state


@dataclass(frozen=True)
class TrainConfig:
    data: str = "data/pydoc"      # a folder made by data/prepare.py; the embedded ones are prepared where missing
    out: str = "out/teacher"
    init: str | None = None       # start from this model folder instead of random weights
    resume: bool = False          # go on from the newest checkpoint in `out`
    overwrite: bool = False       # replace what is in `out`
    device: str = "auto"
    seed: int = 0
    eval_tokens: int = 65536      # of the held-out half, while training; at the end all of it counts
    plan: int | None = None       # print what training on so many GPUs takes, and end
    model: Annotated[ModelConfig, OmitArgPrefixes] = ModelConfig()
    fit: Annotated[FitConfig, OmitArgPrefixes] = FitConfig()


def train(cfg: TrainConfig) -> dict:
    """Train a language model on `cfg.data` into the model folder `cfg.out`; returns the last metrics."""
    rank, world, device = setup(cfg.device)
    out = Path(cfg.out)
    with main_first(rank):
        if rank == 0:
            check_free(out, cfg.resume, cfg.overwrite, RUN, "start.json", (cfg.init,))
        ensure_prepared(cfg.data, cfg.init or "bytes")
    started = load_model(cfg.init) if cfg.init else None
    if started and cfg.model != ModelConfig() and replace(cfg.model, vocab_size=started.cfg.vocab_size) != started.cfg:
        raise ValueError(f"--init takes the model of {cfg.init} as it is: omit the flags that describe another one")
    T = (started.cfg if started else cfg.model).block_size
    if cfg.fit.bptt_truncate and "a" in (started.cfg if started else cfg.model).mixers:
        raise ValueError("bptt_truncate carries the state from step to step, where attention's would grow without end: it is for --mixer r alone")
    loaders = [Loader(cfg.data, half, cfg.fit.batch_size, T, cfg.seed, rank, world, cfg.fit.accum, cfg.fit.bptt_truncate and half == "train")
               for half in ("train", "val")]
    if loaders[0].kind == "preference":
        raise ValueError(f"{cfg.data} holds preferences, not text: they are for stage 3 of distill.py, --finish_data")
    if started:
        check_vocabulary(started, started, loaders[0])
        same_tokenizer(loaders[0], cfg.init)
    torch.manual_seed(cfg.seed)
    model = started or LM(replace(cfg.model, vocab_size=loaders[0].vocab_size))
    model.to(device)
    with main_first(rank):
        if rank == 0:
            claim(out, cfg.overwrite, RUN)
    meta = {"tokenizer": loaders[0].meta["tokenizer"], "data": cfg.data}
    if rank == 0:
        print(json.dumps(asdict(cfg)))
        print(describe(model.cfg, T), flush=True)

    def validate() -> dict[str, float]:
        return {"val_loss": mean_loss(model, loaders[1], cfg.eval_tokens, cfg.fit.bptt_chunk)}

    result = fit(model, cross_entropy_loss, loaders[0], cfg.fit, out, model, meta, validate)
    result["val_loss"] = mean_loss(model.eval(), loaders[1], chunk=cfg.fit.bptt_chunk)
    if rank == 0:
        print(f"{out}: held-out loss {result['val_loss']:.4f} nats per token after {result['tokens']:,} tokens and {result['minutes']:.1f} minutes")
    return result


def main(argv: list[str] | None = None) -> None:
    cfg = cli(TrainConfig, argv)
    if cfg.plan is not None:
        model = open_model(cfg.init)[0].cfg if cfg.init else cfg.model
        print(plan(model, cfg.fit.batch_size, cfg.fit.accum, min(model.block_size, cfg.fit.bptt_chunk or model.block_size), cfg.plan))
        return
    with joined():
        train(cfg)


if __name__ == "__main__":
    run(main)
