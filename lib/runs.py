"""A run: the folder it writes, how far it is, and the gauges that watch its loop.

OUT/checkpoints/step_N/ is a model folder with trainer.pt. It is written under another
name and then renamed, so whatever bears the name is whole. OUT itself is the newest
checkpoint's model, for everybody else, with metrics.jsonl. A stage of a distillation is
such a run in OUT/STAGE.
"""

import contextlib
import copy
import json
import math
import os
import shlex
import shutil
import signal
import sys
import time
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

from config import at_least, settings
from data.loader import Loader
from data.tokenizer import copy_tokenizer
from lib.folders import (check_vocabulary, open_model, require_sealed, save_model, write_sealed, write_text,
                         write_whole)
from lib.home import FORMER, MODEL, Home
from lib.processes import agree, global_sum, main_first, whole, world_size
from lib.shard import checkpoint_blocks, is_sharded, load_optimizer, load_weights, save_optimizer
from lib.states import tree_map
from model import LM


@settings
class RunConfig:
    """Where a run writes, and how often. None means off."""

    out: str = "out/teacher"
    resume: bool = False                                # go on from the newest checkpoint in `out`
    overwrite: bool = False                             # replace what is in `out`
    device: str = "auto"                                # auto, cpu, cuda
    seed: int = at_least(0, 0)
    save_every: int | None = at_least(1, 500)           # steps; the end and Ctrl-C always save
    save_minutes: float | None = at_least(0.0, None)
    keep_last: int = at_least(1, 2)                     # checkpoints
    log_every: int = at_least(1, 10)
    compile: bool = False
    wandb: str | None = None                            # project name
    shard: bool = False                                 # each process holds a part of every tensor
    checkpoint_blocks: bool = False                     # activations of one block at once, others are redone

    def __post_init__(self):
        if self.shard and self.compile:
            raise ValueError("shard and compile: together they are not supported, omit one")

    def within(self, name: str) -> "RunConfig":
        """The same in the folder OUT/name, where an earlier run goes on."""
        folder = Path(self.out) / name
        return replace(self, out=str(folder), resume=folder.exists(), overwrite=False)


@dataclass
class Progress:
    """How far a run is."""

    step: int = 0
    tokens: int = 0         # inputs read, over all processes
    seconds: float = 0.0    # of training
    loss: float = math.inf  # the mean over log_every steps, when that many were last full
    part: float = 0.0       # the sum of the losses since then
    parts: int = 0          # of so many steps

    def fraction(self, cfg) -> float:
        """0 at the start, 1 at the end, by whichever limit of the FitConfig is nearest.
        """
        done = [self.step / cfg.max_steps] if cfg.max_steps else []
        done += [self.tokens / cfg.max_tokens] if cfg.max_tokens else []
        done += [self.seconds / 60 / cfg.max_minutes] if cfg.max_minutes else []
        done += [float(self.loss <= cfg.terminate_at_loss)] if cfg.terminate_at_loss else []
        return min(1.0, max(done, default=1.0))            # no limit: nothing is trained


class Run:
    """The folder `cfg.out`, which this run alone may write.

    `kind` is train or distill, whose folders differ; `reads` are the folders that it
    reads, first that of the model that it starts from, if any. Raises ValueError,
    before anything is written, where another's work would be lost.
    """

    def __init__(self, cfg: RunConfig, rank: int, kind: str = "train", reads: Sequence[str | None] = ()):
        self.cfg, self.rank, self.name, self.folder = cfg, rank, kind, ""
        self.home = Home(cfg.out, kind, cfg.resume, cfg.overwrite)
        self.start = reads[0] if reads else None
        self.wandb = None
        self.model: LM | None = None
        self.meta: dict = {}
        if cfg.wandb and find_spec("wandb") is None:
            raise ValueError("--wandb needs the package wandb: pip install wandb, or omit --wandb")
        if cfg.shard and world_size() == 1:
            raise ValueError("shard: one process has nobody to share with: start it with torchrun "
                             "--nproc_per_node=N, or omit --shard")
        with main_first(rank):
            if rank == 0:
                self.home.check(reads)

    @property
    def out(self) -> Path:
        """The folder that it writes now; see lib/home.py."""
        return self.home.root / self.folder

    def begin(self, model: LM, meta: dict, settings: object, *lines: str) -> None:
        """Make the folder the run's; called when all else is known to be right.

        `model` is what checkpoints hold, `meta` names its tokenizer; the settings and
        lines are printed.
        """
        self.model, self.meta = model, meta
        if self.cfg.checkpoint_blocks:
            checkpoint_blocks(model)
        self.say(json.dumps(asdict(settings)), *lines)
        with main_first(self.rank):
            if self.rank == 0:
                self.home.enter(asdict(settings), world_size(), model.cfg.mixers)
                self.wandb = start_wandb(self.cfg)
        self.home.follow()

    def stage(self, name: str) -> "Run":
        """The same run in a folder of its own inside this one."""
        stage = copy.copy(self)
        stage.folder = stage.name = name
        return stage

    def say(self, *lines: str) -> None:
        if self.rank == 0:
            print(*lines, sep="\n", flush=True)

    def resume(self, optimizer: torch.optim.Optimizer, loader: Loader) -> Progress:
        """Put weights, optimizer, random numbers and carried states back as the newest
        checkpoint has them.

        Also opens the log, cut off behind that checkpoint. Without one the run is at
        its start.
        """
        check_vocabulary(self.model, self.model, loader)
        if self.rank == 0:
            self.out.mkdir(parents=True, exist_ok=True)
        checkpoint = last_checkpoint(self.out)
        at = restore_trainer(checkpoint, self.model, optimizer, loader) if checkpoint else Progress()
        self.saved_at = time.time()
        if self.rank == 0:
            cut_metrics(self.out / "metrics.jsonl", at.step)
        return at

    def save(self, optimizer: torch.optim.Optimizer, at: Progress, loader: Loader) -> None:
        """A checkpoint, and its model for everybody else.

        Every process must call it.
        """
        trainer = asdict(at) | {"optimizer": optimizer, "rng": torch.get_rng_state(),
                                "states": loader.state_dict(), "threads": torch.get_num_threads()}
        if self.rank == 0 or is_sharded(self.model):
            save_checkpoint(self.out, self.model, self.meta, trainer, self.cfg.keep_last,
                            self.tokenizer_of(loader), self.rank)
        if self.home.replacing:
            with main_first(self.rank):
                if self.rank == 0:
                    self.home.settle()
            self.home.replacing = False
        self.saved_at = time.time()

    def tokenizer_of(self, loader: Loader) -> Path:
        """The folder whose tokenizer the model gets; the data's have the same ids.

        Examples teach a chat template, and text does not: there the model keeps that of
        the model it starts from, which the data's tokenizer may lack.
        """
        own = self.start and loader.kind == "text" and (Path(self.start) / "tokenizer.json").exists()
        return Path(self.start) if own else loader.folder

    def log(self, row: dict) -> None:
        """Add a row to metrics.jsonl, and to wandb, where a stage's have its name."""
        if self.rank > 0:
            return
        short = {key: float(f"{x:.6g}") if isinstance(x, float) else x for key, x in row.items()}
        with (self.out / "metrics.jsonl").open("a") as f:
            f.write(json.dumps(short) + "\n")
        if self.wandb:
            self.wandb.log({f"{self.name}/{key}": x for key, x in row.items()} if self.folder else row)

    def note(self, row: dict, name: str) -> dict:
        """Print what was measured, and keep it as OUT/name."""
        self.say("after {name}: loss {val_loss:.4f}, gap to the teacher {gap:.4f}, KL {kl:.4f}, "
                 "top-1 {top1:.1%}".format(**row))
        if self.rank == 0:
            write_sealed(self.out / name, row)
        return row

    def read_row(self, name: str) -> dict | None:
        """What `note` kept as OUT/name, if it did."""
        return read_row(self.out / name) if (self.out / name).exists() else None

    def publish(self, stage: "Run") -> None:
        """Make the model of a stage the model of this run."""
        if self.rank == 0:
            publish(stage.out, self.out)


class Meter:
    """The gauges of a loop: means of its losses, its clock, its bar, and Ctrl-C.

    What they show is the same on every process, so that all decide alike.
    """

    def __init__(self, run: Run, cfg, at: Progress, loader: Loader, model: torch.nn.Module):
        self.run, self.cfg, self.at, self.world, self.loader = run, cfg, at, loader.W, loader
        self.device = next(model.parameters()).device
        self.rows: list[Tensor] = []            # gradient norm and losses of each step since the last look
        self.clock, self.tokens = time.time(), at.tokens
        self.ends = self.stops = self.late = False
        self.passed = 0                         # steps between the last two looks
        self.interrupt = Interrupt()
        threads = torch.get_num_threads()
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        total = sum(p.numel() for p in model.parameters())
        run.say(
            f"{run.name}: {trained:,} of {total:,} parameters train, {loader.accum * loader.W * loader.B} x "
            f"{loader.T} tokens a step, {loader.W} x {self.device.type}"
            + (f" with {threads} threads" if self.device.type == "cpu" and threads > 1 else "")
            + (f", from step {at.step}" if at.step else "")
            + (": no step is left" if at.fraction(cfg) >= 1 else ""),
            *loader.introduction(),
        )
        self.bar = tqdm(total=cfg.max_steps, initial=at.step, desc=run.name, disable=run.rank > 0,
                        mininterval=0.2 if sys.stderr.isatty() else 20, dynamic_ncols=True)

    def __enter__(self) -> "Meter":
        self.interrupt.__enter__()
        return self

    def __exit__(self, *_) -> None:
        self.interrupt.__exit__()
        self.bar.close()
        epochs = self.loader.seen(self.at.step)
        self.run.say(*(f"{part} was read {times:.2f} times" for part, times in epochs.items()))

    def note(self, norm: Tensor, losses: dict[str, Tensor], lr: float) -> dict | None:
        """Take up a step; every log_every steps, and before every checkpoint, the row
        for the log.
        """
        self.rows.append(torch.stack([whole(norm).float(), *losses.values()]))
        if not self.looks():
            return None
        at, rows = self.at, torch.stack(self.rows)                             # (steps, 1 + losses)
        rows[:, 1:] = global_sum(rows[:, 1:])
        self.passed, self.rows = len(rows), []
        minutes = self.run.cfg.save_minutes
        late = bool(minutes) and time.time() - self.run.saved_at > 60 * minutes
        signs = [float(self.interrupt.seen), float(late), max(0.0, time.time() - self.clock)]
        self.stops, self.late, elapsed = agree(signs, self.device)
        at.seconds += elapsed              # the slowest process's, so that all are equally far along
        check_finite(rows, at.step, self.run)
        means = dict(zip(losses, rows[:, 1:].mean(0).tolist()))
        speed = (at.tokens - self.tokens) / max(1e-9, elapsed)
        self.add_up(rows[:, 1 + list(losses).index("loss")].tolist())
        self.ends = at.fraction(self.cfg) >= 1
        self.bar.set_postfix_str(
            f"loss {means['loss']:.4f}, lr {lr:.1e}, {speed / 1000:.1f}k tok/s", refresh=False
        )
        self.bar.update(at.step - self.bar.n)
        row = {"step": at.step, "tokens": at.tokens, "minutes": at.seconds / 60, **means,
               "grad_norm": rows[:, 0].mean().item(), "lr": lr, "tokens_per_s": speed}
        epochs = self.loader.seen(at.step)
        return row | ({"epochs": epochs} if epochs else {})

    def add_up(self, losses: list[float]) -> None:
        """The mean that terminate_at_loss waits for, whenever else there was a look."""
        at = self.at
        for loss in losses:
            at.part += loss
        at.parts += len(losses)
        if at.step % self.run.cfg.log_every == 0:
            at.loss, at.part, at.parts = at.part / at.parts, 0.0, 0

    def looks(self) -> bool:
        """Whether to read the losses back now, for which a GPU must stop."""
        step, run = self.at.step, self.run.cfg
        alone = self.world == 1 and self.interrupt.seen  # others must hear of it first, at the next look
        saves = bool(run.save_every) and step % run.save_every == 0
        return step % run.log_every == 0 or saves or alone or self.at.fraction(self.cfg) >= 1

    def due(self, every: int | None) -> bool:
        """Whether a multiple of `every` steps was passed since the look before."""
        step = self.at.step
        return bool(every) and step // every > (step - self.passed) // every

    def save_due(self) -> bool:
        return bool(self.ends or self.stops or self.late) or self.due(self.run.cfg.save_every)

    def continue_or_stop(self) -> None:
        """Start the clock again: evaluation and saving are not training time.

        After Ctrl-C it says how to resume, and raises KeyboardInterrupt.
        """
        if self.stops:
            self.bar.close()
            if self.run.rank == 0:
                print(f"\nstopped after step {self.at.step}; everything is saved in {self.run.out}. "
                      f"Go on with: {resume_command()}", file=sys.stderr)
            raise KeyboardInterrupt("saved")
        self.clock, self.tokens = time.time(), self.at.tokens


def check_finite(rows: Tensor, step: int, run: Run) -> None:
    """Raises ValueError, naming the first bad step, where a loss or a gradient's norm
    is not finite.
    """
    if rows.isfinite().all():
        return
    bad = step - len(rows) + 1 + int((~rows.isfinite()).any(1).nonzero()[0])
    checkpoint = last_checkpoint(run.out)
    remains = f"the last good checkpoint is {checkpoint}" if checkpoint else "no checkpoint was written yet"
    raise ValueError(
        f"{run.name}: the loss or its gradient is not finite at step {bad}: lower learning_rate; {remains}"
    )


class Interrupt:
    """Notes Ctrl-C, SIGTERM and a closed terminal instead of dying in the middle of a
    step; a second one ends at once.
    """

    def __init__(self):
        self.seen = False

    def __enter__(self):
        signals = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
        heard = [s for s in signals if signal.getsignal(s) is not signal.SIG_IGN]         # as by nohup
        self.before = {s: signal.signal(s, self.note) for s in heard}
        return self

    def note(self, signum, frame):
        if self.seen:
            raise KeyboardInterrupt
        self.seen = True

    def __exit__(self, *_):
        for s, handler in self.before.items():
            signal.signal(s, handler)


def resume_command() -> str:
    """What to type to go on."""
    switches = ("--resume", "--overwrite", "--no-resume", "--no-overwrite")
    args = [a for a in sys.argv[1:] if a.split("=")[0] not in switches]
    world = world_size()
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    machines = [f"--nnodes={world // local}"] if local < world else []
    start = ["python"] if world == 1 else ["torchrun", *machines, f"--nproc_per_node={local}"]
    script = Path(sys.argv[0])
    name = ["-m", f"tools.{script.stem}"] if script.parent.name == "tools" else [sys.argv[0]]
    return shlex.join([*start, *name, *args, "--resume"])


# ------------------------------------------------------------------------------------------
# What it leaves in its folder

def read_row(path: Path) -> dict:
    """A finished stage's row.

    Raises ValueError, with the remedy, for a damaged file.
    """
    try:
        row = require_sealed(json.loads(path.read_bytes()))
        scores = [row[key] for key in ("tokens", "minutes", "val_loss", "gap", "kl", "top1", "top5")]
        if not all(map(math.isfinite, scores)):
            raise ValueError
        return row | {"name": FORMER.get(row["name"], row["name"])}
    except (ValueError, AttributeError, KeyError, TypeError, OverflowError, RecursionError):
        raise ValueError(f"{path} is damaged: remove it, and --resume measures or finishes that stage "
                         "again") from None


def cut_metrics(path: Path, step: int) -> None:
    """Leave the rows of a metrics.jsonl up to `step`: an interrupted run wrote more
    than its checkpoint has.
    """
    text = "".join(json.dumps(row) + "\n" for row in read_metrics(path) if row["step"] <= step)
    write_text(path, text)


def start_wandb(cfg: RunConfig):
    """One wandb run for all stages, which a resumed run goes on with."""
    if not cfg.wandb:
        return None
    import wandb                                                              # optional, and slow to import
    name = cfg.out.strip("/").replace("/", "-")
    return wandb.init(project=cfg.wandb, name=name, id=name, resume="allow")


def read_metrics(path: Path) -> list[dict]:
    """The rows of a metrics.jsonl, without what a killed run may have left half
    written.
    """
    rows = []
    for line in path.read_bytes().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError, RecursionError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict) and type(row.get("step")) is int]


# ------------------------------------------------------------------------------------------
# Checkpoints

def save_checkpoint(out: Path, model: LM, meta: dict, trainer: dict, keep_last: int, tokenizer: Path,
                    rank: int = 0) -> None:
    """Of a sharded model every process gives its parts, and rank 0 alone writes.

    `tokenizer` is the folder that the model's is copied from. Raises ValueError where
    it cannot be written; the checkpoints before it stay.
    """
    folder = out / "checkpoints" / f"step_{trainer['step']:07d}"
    unfinished = folder.with_suffix(".tmp")
    is_new = not folder.exists()                    # else it was resumed there, and is the same
    if is_sharded(model):
        is_new = not agree([float(rank == 0 and not is_new)], model.emb.weight.device)[0]
    if rank > 0:
        if is_new:
            save_model(model, unfinished, meta, rank)
            save_optimizer(trainer["optimizer"], unfinished, rank)
        return
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        if is_new:
            save_model(model, unfinished, meta)
            copy_tokenizer(tokenizer, unfinished)
            trainer |= {"optimizer": save_optimizer(trainer["optimizer"], unfinished, rank)}
            torch.save(trainer, unfinished / "trainer.pt")
            os.replace(unfinished, folder)
        publish(folder, out)
    except (OSError, RuntimeError, SafetensorError) as e:         # a full disk: three ways of saying so
        shutil.rmtree(unfinished, ignore_errors=True)
        last = last_checkpoint(out)
        raise ValueError(f"could not save step {trainer['step']} ({e}): free some disk space and go on with "
                         "--resume" + (f"; {last} is kept" if last else "")) from None
    for old in checkpoints(out)[:-keep_last]:
        shutil.rmtree(old)


def publish(folder: Path, out: Path) -> None:
    """Make the model in `folder` the model of `out`, file by file, each by one rename.
    """
    for name in MODEL:
        if (folder / name).exists():
            write_whole(out / name, lambda part: shutil.copyfile(folder / name, part))


def checkpoints(out: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    complete = [p for p in (out / "checkpoints").glob("step_*") if p.name[5:].isdigit()]
    return sorted(complete, key=lambda p: int(p.name[5:]))


def last_checkpoint(out: Path) -> Path | None:
    return next(reversed(checkpoints(out)), None)


def restore_trainer(
    checkpoint: Path, model: LM, optimizer: torch.optim.Optimizer, loader: Loader
) -> Progress:
    """Everything as the checkpoint has it.

    Raises ValueError where it is damaged, or another run's.
    """
    trainer = load_trainer(checkpoint)
    restore(model, checkpoint)

    def rates(groups: list[dict]) -> list[tuple]:
        return [(group["rate"], group["decay"], group.get("muon", False), len(group["params"]))
                for group in groups]

    if rates(optimizer.param_groups) != rates(trainer["optimizer"]["param_groups"]):
        raise ValueError(
            f"{checkpoint} had another optimizer, weight decay, rwkv_lr_multiplier or freeze: resume with "
            "the settings it was started with"
        )
    device = next(model.parameters()).device
    states = [tree_map(lambda x: x.to(device), state) for state in trainer["states"] or []]
    loader.load_state_dict(states, trainer["step"], str(checkpoint))
    load_optimizer(optimizer, trainer["optimizer"], checkpoint)
    torch.set_rng_state(trainer["rng"])
    if trainer["threads"] and device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(trainer["threads"], os.cpu_count() or 1))    # sums are rounded as before
    return Progress(**{field.name: trainer[field.name] for field in fields(Progress)})


def load_trainer(folder: Path) -> dict:
    """trainer.pt, read without running pickled code.

    Raises ValueError for a damaged one.
    """
    try:
        with zipfile.ZipFile(folder / "trainer.pt") as parts:
            if damaged := parts.testzip():                 # torch writes checksums, and does not read them
                raise ValueError(damaged)
        trainer = torch.load(folder / "trainer.pt", map_location="cpu", weights_only=True)    # of any device
        needed = {key: trainer[key] for key in ("step", "tokens", "seconds", "optimizer", "rng")}
        # checkpoints of before lack some
        former = {"states": None, "threads": None, "loss": math.inf, "part": 0.0, "parts": 0}
        return needed | {key: trainer.get(key, missing) for key, missing in former.items()}
    except (PermissionError, MemoryError):
        raise
    except Exception as e:  # torch raises many kinds here; each means the same to the user
        raise ValueError(
            f"{folder}/trainer.pt is damaged ({type(e).__name__}): remove {folder} and --resume from "
            "the checkpoint before"
        ) from None


def restore(model: LM, folder: Path) -> None:
    """Give the model the weights saved in `folder`.

    Raises ValueError where they are damaged, or another model's.
    """
    try:
        saved, file = open_model(folder)
        old, new = (asdict(cfg) | {"mixer": cfg.mixers} for cfg in (saved.cfg, model.cfg))
        other = ", ".join(f.name for f in fields(saved.cfg) if old[f.name] != new[f.name])
        if not other:
            load_weights(model, file)
    except ValueError as e:
        raise ValueError(
            f"cannot go on from {folder} ({e}): remove that folder and --resume from what was saved before it"
        ) from None
    if other:
        raise ValueError(
            f"{folder} holds another model (other {other}): resume with the settings it was started with"
        )
