"""The training loop, and as a script: a GPT or an RWKV-7 from scratch.

    python train.py                                 a small GPT on Python's own manual
    python train.py config/shakespeare-cpu.toml     nanoGPT's CPU setting
    torchrun --nproc_per_node=8 train.py config/gpt2-124m.toml
    python train.py --mixer r --ffn channelmix      RWKV-7 instead of attention
    python train.py --mixer r --ffn channelmix --block_size 16384 --bptt_chunk 1024

`fit` is the one loop of this project; each stage of a distillation (distill.py) is one
more call of it. Whatever is trained, its loss is a function of this form:

    loss_fn(model, batch, state) -> ({"loss": ..., ...}, state)    SUMS over the targets

`fit` divides by the number of targets in the whole step (all micro-batches of all
ranks), which the loader knows. So accumulation, padding and data parallelism never
change what is computed: two processes give one process's gradients.

A batch may be a piece of longer sequences (lib/bptt.py, lib/streams.py): then `state`
is what the loss returned for the piece before, None at the beginning.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Literal

from config import at_least, cli, run as run_script, settings     # before torch: see config/script.py
import torch
import torch.nn as nn
from torch import Tensor
from tyro.conf import OmitArgPrefixes

from data.loader import Batch, Loader
from data.prepare import ensure_prepared
from lib.bptt import backward_in_pieces
from lib.folders import check_start, check_vocabulary, rows, same_tokenizer
from lib.hybrid import describe, mixer_letters
from lib.muon import Muon
from lib.processes import data_parallel, joined, main_first, setup
from lib.runs import Meter, Progress, Run, RunConfig
from lib.scores import cross_entropy, mean_loss
from lib.shard import load, new_model
from lib.streams import open_loader
from model import LM, ModelConfig, State, TimeMixer


@settings
class FitConfig:
    """How long, how fast. None means off; so does 0 for limits and clip."""

    max_steps: int = at_least(0, 2000)                      # stop at whichever of four comes first
    max_tokens: int | None = at_least(1, None)              # inputs read, over all processes
    max_minutes: float | None = at_least(0.0, None)
    terminate_at_loss: float | None = at_least(0.0, None)   # averaged over log_every steps
    batch_size: int = at_least(1, 8)                        # sequences per process and micro-batch
    accum: int = at_least(1, 1)                             # micro-batches per step
    bptt_chunk: int | None = at_least(1, None)              # tokens whose activations exist at once
    bptt_truncate: bool = False                             # text goes on from step to step, gradients do not
    optimizer: Literal["adamw", "muon"] = "adamw"           # muon (lib/muon.py) is for the blocks' matrices
    learning_rate: float = at_least(0.0, 2e-3)
    learning_rate_end: float | None = at_least(0.0, None)   # None = a twentieth
    warmup_steps: int = at_least(0, 20)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"    # of learning rate and weight decay
    weight_decay: float = at_least(0.0, 0.1)
    weight_decay_end: float | None = at_least(0.0, None)    # None = constant
    att_weight_decay: float | None = at_least(0.0, None)    # of the mixers' matrices; None = weight_decay
    ffn_weight_decay: float | None = at_least(0.0, None)    # of the feed-forward layers'; None = weight_decay
    rwkv_lr_multiplier: float = at_least(0.0, 1.0)          # on the learning rate of all in RWKV mixers
    beta1: float = at_least(0.0, 0.9, below=1.0)
    beta2: float = at_least(0.0, 0.99, below=1.0)
    eps: float = at_least(1e-30, 1e-8)                      # 0: a gradient of 0 would be 0 / 0
    clip: float | None = at_least(0.0, 1.0)                 # of the gradient's norm
    eval_every: int | None = at_least(1, 500)               # steps

    def __post_init__(self):
        if self.weight_decay_end is not None and not self.weight_decay:
            raise ValueError("weight_decay_end: without a weight_decay it would do nothing")
        for end in ("learning_rate_end", "weight_decay_end"):
            if getattr(self, end) is not None and self.schedule == "constant":
                raise ValueError(f"{end}: with the schedule constant it would do nothing")


# ------------------------------------------------------------------------------------------
# Optimizer and schedules

def param_groups(model: nn.Module, cfg: FitConfig) -> list[dict]:
    """The optimizer's groups by the official RWKV-7 rule.

    Weight decay only on the matrices of projections, embedding and head (names in
    .weight, two dimensions); `w0`, the decay of the state, learns twice as fast; all in
    RWKV mixers by rwkv_lr_multiplier. Muon is for the blocks' matrices.
    """
    in_rwkv = {id(p) for m in model.modules() if isinstance(m, TimeMixer) for p in m.parameters()}
    groups: dict[tuple, list] = {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        rate = 2.0 if name.endswith(".w0") else 1.0
        rate *= cfg.rwkv_lr_multiplier if id(p) in in_rwkv else 1.0
        own = {".att.": cfg.att_weight_decay, ".ffn.": cfg.ffn_weight_decay}
        decay = next((own[part] for part in own if part in name and own[part] is not None), cfg.weight_decay)
        matrix = name.endswith(".weight") and p.ndim == 2
        muon = cfg.optimizer == "muon" and matrix and name.startswith("blocks.")
        groups.setdefault((rate, decay if matrix else 0.0, muon), []).append(p)
    if not groups:
        raise ValueError("nothing to train: every parameter is frozen")
    return [dict(zip(("rate", "decay", "muon"), how), params=params) for how, params in groups.items()]


def set_rates(optimizer: torch.optim.Optimizer, cfg: FitConfig, at: Progress) -> float:
    """Give every group this step's rate, which is returned, and weight decay."""
    done = at.fraction(cfg)
    end = cfg.learning_rate / 20 if cfg.learning_rate_end is None else cfg.learning_rate_end
    warmup = min(1.0, (at.step + 1) / max(1, cfg.warmup_steps))
    lr = interpolate(cfg.learning_rate, end, done, cfg.schedule) * warmup
    fade = 1.0
    if cfg.weight_decay and cfg.weight_decay_end is not None:
        fade = interpolate(1.0, cfg.weight_decay_end / cfg.weight_decay, done, cfg.schedule)
    for group in optimizer.param_groups:
        group["lr"], group["weight_decay"] = lr * group["rate"], group["decay"] * fade
    return lr


def interpolate(start: float, end: float, done: float, schedule: str) -> float:
    """From start (done 0) to end (done 1): half a cosine, a line, or not at all."""
    left = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}[schedule]
    return end + (start - end) * left


# ------------------------------------------------------------------------------------------
# The loop

class Step(nn.Module):
    """Model and loss as one module: DDP and torch.compile see the whole step."""

    def __init__(self, model: nn.Module, loss_fn: Callable):
        super().__init__()
        self.model, self.loss_fn = model, loss_fn

    def forward(self, batch, state):
        return self.loss_fn(self.model, batch, state)


def fit(model: nn.Module, loss_fn: Callable, loader: Loader, cfg: FitConfig, run: Run,
        validate: Callable[[], dict] | None = None) -> dict:
    """Train what requires gradients in `model`, from the newest checkpoint of `run`.

    Returns the last row of the log, with the last validation. Raises ValueError when
    the loss is not finite, and KeyboardInterrupt, after saving, for Ctrl-C; the last
    good checkpoint stays.
    """
    device = next(model.parameters()).device
    trained = [p for p in model.parameters() if p.requires_grad]
    groups, betas = param_groups(model, cfg), (cfg.beta1, cfg.beta2)
    optimizer = Muon(groups, lr=cfg.learning_rate, betas=betas, eps=cfg.eps, fused=True)  # or AdamW, by group
    at = run.resume(optimizer, loader)                     # step, tokens, seconds
    last = {"loss": math.nan}
    module = data_parallel(Step(model, loss_fn), loader.W, device, run.cfg.compile)
    if at.fraction(cfg) >= 1:                              # nothing to do, but perhaps not saved or published
        run.save(optimizer, at, loader)

    model.train()
    with Meter(run, cfg, at, loader, model) as meter:
        while at.fraction(cfg) < 1 and not meter.ends:
            lr = set_rates(optimizer, cfg, at)
            batches, targets = loader.step(at.step)        # this rank's, and how many all ranks have
            losses = forward_backward(module, batches, targets, loader, at.step, device, cfg.bptt_chunk)
            norm = nn.utils.clip_grad_norm_(trained, cfg.clip or math.inf)
            optimizer.step()
            optimizer.zero_grad()
            at.step += 1
            at.tokens += loader.W * sum(batch.x.numel() for batch in batches)

            row = meter.note(norm, losses, lr)             # when it is time to look, else None
            if row is None:
                continue
            if validate and (meter.ends or meter.due(cfg.eval_every)):
                model.eval()
                row |= validate()
                model.train()
            run.log(row)
            last |= row
            if meter.save_due():
                run.save(optimizer, at, loader)
            meter.continue_or_stop()                       # restarts the clock; after Ctrl-C it raises
    return last | {"step": at.step, "tokens": at.tokens, "minutes": at.seconds / 60}


def forward_backward(module: nn.Module, batches: list[Batch], targets: int, loader: Loader, step: int,
                     device: torch.device, chunk: int | None = None) -> dict[str, Tensor]:
    """Gradients of the loss per target; returns this process's share of every mean.

    Losses are sums, `targets` counts those of all processes, DDP averages: W / targets.
    `backward_in_pieces` (lib/bptt.py) runs forward and backward, in bfloat16 on GPUs.
    """
    means = {}
    for i, (batch, state) in enumerate(zip(batches, loader.carried(step))):
        last = i == len(batches) - 1                       # DDP averages once, after the last
        losses, state = backward_in_pieces(module, batch.to(device), state, chunk, loader.W / targets, last)
        loader.carry(i, state)
        del state                                          # a KV cache that nobody carries is not kept
        for name, value in losses.items():
            means[name] = means.get(name, 0) + value / targets
    return means


def cross_entropy_loss(model: LM, batch: Batch, state: State | None = None) -> tuple[dict, State]:
    """The language-modelling loss, summed over the targets, and the state after."""
    logits, state = model(batch.x, state)
    return {"loss": cross_entropy(logits, batch)}, state


# ------------------------------------------------------------------------------------------
# As a script

@settings
class TrainConfig:
    data: str = "data/pydoc"      # a folder made by data/prepare.py; the embedded ones are made where missing
    init: str | None = None       # start from this model folder instead of random weights
    mixer: str | None = None      # which layers are RWKV-7: r, ra, all, first:2, ... (lib/hybrid.py)
    eval_tokens: int = at_least(1, 65536)    # of the held-out text, while training; at the end all of it
    model: Annotated[ModelConfig, OmitArgPrefixes] = ModelConfig()
    fit: Annotated[FitConfig, OmitArgPrefixes] = FitConfig()
    run: Annotated[RunConfig, OmitArgPrefixes] = RunConfig(out="out/teacher")

    @property
    def shape(self) -> ModelConfig:
        return replace(self.model, mixer=mixer_letters(self.model, self.mixer or self.model.mixer))


def train(cfg: TrainConfig) -> dict:
    """Train a language model on `cfg.data` into the folder `cfg.run.out`."""
    rank, world, device = setup(cfg.run.device)
    run = Run(cfg.run, rank, "train", reads=[cfg.init, cfg.data])
    start = load(cfg.init, device, cfg.run.shard) if cfg.init else None
    shape = start.cfg if start else cfg.shape
    check_start(cfg, shape)
    with main_first(rank):
        ensure_prepared(cfg.data, cfg.init or "bytes")
    how = (cfg.fit, shape.block_size, cfg.run.seed, rank, world)
    train_loader, val_loader = (open_loader(cfg.data, split, *how) for split in ("train", "val"))
    if train_loader.kind == "preference":
        raise ValueError(f"{cfg.data} holds preferences, not text: give them to distill.py, --finish_data")
    if start:
        check_vocabulary(start, start, train_loader)
        same_tokenizer(train_loader, cfg.init)
    torch.manual_seed(cfg.run.seed)
    model = start or new_model(replace(shape, vocab_size=rows(shape, train_loader)), device, cfg.run.shard)
    meta = {"tokenizer": train_loader.meta["tokenizer"], "data": cfg.data}
    run.begin(model, meta, cfg, describe(model.cfg, shape.block_size))

    def validate(max_tokens: int | None = cfg.eval_tokens) -> dict[str, float]:
        return {"val_loss": mean_loss(model, val_loader, max_tokens, cfg.fit.bptt_chunk)}

    result = fit(model, cross_entropy_loss, train_loader, cfg.fit, run, validate)
    result |= validate(None)
    line = "held-out loss {val_loss:.4f} nats per token after {tokens:,} tokens and {minutes:.1f} minutes"
    run.say(f"{cfg.run.out}: {line.format(**result)}")
    return result


def main(argv: list[str] | None = None) -> None:
    with joined():
        train(cli(TrainConfig, argv))


if __name__ == "__main__":
    run_script(main)
