"""The folder of a run: who writes it, what it replaces, and what it was started with.

One process at a time writes a run. What --overwrite replaces stays until the new run's
first checkpoint is whole; until then that one lives in OUT/.new. settings.json says
what a run was started with, and a resumed one goes on with the same.
"""

import os
import shutil
import socket
from collections.abc import Sequence
from pathlib import Path

from data.foreign import read_json
from data.shares import folders_of, is_mixture, parts_of
from lib.folders import checksum_of, fingerprint, require_sealed, write_sealed

try:
    import fcntl
except ImportError:                                # Windows has no such locks
    fcntl = None

MODEL = ("config.json", "tokenizer.json", "meta.json", "model.safetensors")  # the second only where needed
TRAIN = ("checkpoints", *MODEL, "metrics.jsonl", "settings.json")            # what train.py writes
DISTILL = (*TRAIN, "align", "match", "distil", "finish", "controls", "curve", "start.json",
           "ranking.json", "report.json", "report.md", "report.png")         # what distill.py writes
FORMER = {"distil": "match"}                                                 # a stage's name of before
NEW, OLD = ".new", ".replaced"                     # a run before its first checkpoint; what it then replaced

# what only lengthens a run, and what only says how it is watched, saved and computed
LENGTHS = ("max_steps", "max_tokens", "max_minutes", "terminate_at_loss")
HOW = ("eval_every", "out", "resume", "overwrite", "device", "save_every", "save_minutes", "keep_last",
       "log_every", "compile", "wandb", "shard", "checkpoint_blocks", "controls", "keep", "scratch_rate",
       "mixer")
FOLDERS = ("teacher", "logit_teacher", "aligned", "init", "data", "finish_data")     # compared by contents
FLAT = ("student", "model", "fit", "run")          # their settings are flags without a prefix
STAGES = ("align", "match", "finish")
OWNERS = {"align": ("align_kind",), "finish": ("dpo_kind", "dpo_beta", "dpo_smoothing", "finish_data"),
          "match": ("kl_kind", "kl_weight", "kl_temperature", "ce_weight", "kl_chunk", "logit_teacher",
                    "freeze")}


class Home:
    """The folder `out` of a run of this kind, train or distill, whose names differ."""

    def __init__(self, out: str, kind: str, resume: bool, overwrite: bool):
        self.out, self.resume, self.overwrite = Path(out), resume, overwrite
        self.writes, self.foreign = (TRAIN, "start.json") if kind == "train" else (DISTILL, "checkpoints")
        self.replacing, self.lock, self.reads = False, None, ()

    @property
    def root(self) -> Path:
        """Where the run writes now."""
        return self.out / NEW if self.replacing else self.out

    def check(self, reads: Sequence[str | None]) -> None:
        """Raises ValueError, before anything is written, where another's work would be
        lost, or what this run `reads`.
        """
        self.reads = reads
        self.check_free()
        if (self.out / ".lock").exists():
            lock(self.out).close()

    def check_free(self) -> None:
        check_free(self.out, self.resume, self.overwrite, self.writes, self.foreign, self.reads)

    def enter(self, settings: dict, world: int, mixers: str) -> None:
        """Make the folder the run's, which is started with these settings, and whose
        layers have these letters.

        Raises ValueError where it was started with others, or another process is there.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        self.lock = lock(self.out)
        self.check_free()                          # another run may have come and gone meanwhile
        tidy(self.out, self.writes)
        if self.writes is DISTILL:
            take_over_former_names(self.out)
        values = flatten(settings, world) | {"mixer": mixers}      # however --mixer says it
        if self.resume:
            values = go_on(self.out, values)
        self.replacing = self.overwrite and any((self.out / name).exists() for name in self.writes)
        self.root.mkdir(exist_ok=True)
        write_sealed(self.root / "settings.json", values)

    def follow(self) -> None:
        """On the other processes, after the first has entered."""
        self.replacing = self.overwrite and (self.out / NEW).exists()

    def settle(self) -> None:
        """Its first checkpoint is whole: what it replaces goes."""
        replace(self.out, self.writes)


def check_free(out: Path, resume: bool, overwrite: bool, writes: Sequence[str], foreign: str,
               reads: Sequence[str | None]) -> None:
    """Raises ValueError where a run that `writes` these names into `out` would lose
    another's work.

    `foreign` is a name that only the other script's runs have.
    """
    if resume and overwrite:
        raise ValueError("--resume and --overwrite contradict each other: choose one")
    if out.is_symlink() and not out.exists():
        raise ValueError(f"{out} is a link to {os.readlink(out)}, which does not exist: make that folder or "
                         "choose another --out")
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: choose another --out")
    for name in writes:
        if (out / name).is_symlink() and (overwrite or not (out / name).exists()):
            raise ValueError(f"{out / name} is a link to {os.readlink(out / name)}, which "
                             + ("--overwrite would not empty" if (out / name).exists() else "does not exist")
                             + ": make or remove it, or choose another --out")
    for folder in [folder for name in filter(None, reads) for folder in folders_of(name)]:
        if would_replace(out, writes, Path(folder).resolve()):
            raise ValueError(f"{folder} is read by this run and would be replaced by it: choose another "
                             "--out")
    if foreign == "start.json" and out.name in STAGES and (out.parent / "start.json").exists():
        raise ValueError(f"{out} is a stage of the distillation in {out.parent}: choose another --out")
    for folder in (out.resolve(), *out.resolve().parents):
        if folder.name in ("checkpoints", *STAGES) and (folder.parent / "settings.json").exists():
            raise ValueError(f"{out} is in the run of {folder.parent}, and would go when that is replaced: "
                             "choose another --out")
    if (out / foreign).exists():
        raise ValueError(f"{out} holds a run of another script: choose another --out")
    present = [name for name in writes if name != "settings.json" and is_full(out / name)]
    moving = (out / NEW).exists() or (out / OLD).exists()      # a killed process had one replaced
    # a distillation whose first stage was removed has its start.json
    empty = not any(out.glob("**/checkpoints")) and not (out / "start.json").exists()
    if resume and "model.safetensors" in present and empty:
        raise ValueError(f"{out} holds a model but no checkpoints: there is nothing to resume; choose "
                         "another --out, or start from it with --init")
    if present and not moving and all(name in MODEL for name in present):
        raise ValueError(f"{out} holds {present[0]}, but no run that it could be of: choose another --out")
    if (present or moving) and not resume and not overwrite:
        raise ValueError(f"{out} holds another run: go on with --resume, replace it with --overwrite, or "
                         "choose another --out")


def is_full(path: Path) -> bool:
    """A file, or a folder with something in it."""
    return any(path.iterdir()) if path.is_dir() else path.exists()


def would_replace(out: Path, writes: Sequence[str], folder: Path) -> bool:
    """Whether `folder` is `out`, or lies under what a run writes there."""
    places = {(out / name).resolve() for name in (*writes, NEW, OLD)}
    return folder == out.resolve() or not places.isdisjoint((folder, *folder.parents))


def lock(out: Path):
    """The open file OUT/.lock: as long as it is open, no other process has the folder.

    Raises ValueError, naming that process, where one has.
    """
    file = (out / ".lock").open("a+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        raise ValueError(f"{out} is being written by another process ({file.read().strip()}): wait for it, "
                         "or choose another --out") from None
    except (OSError, AttributeError):              # a system without locks
        return file
    file.truncate(0)
    file.write(f"{os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


# ------------------------------------------------------------------------------------------
# One run in another's place

def tidy(out: Path, writes: Sequence[str]) -> None:
    """Finish a replacement in which a process was killed, and sweep what it left."""
    if (out / OLD).exists() and (out / NEW).exists():
        replace(out, writes)
    shutil.rmtree(out / NEW, ignore_errors=True)
    shutil.rmtree(out / OLD, ignore_errors=True)
    for folder in (out, *(out / stage for stage in STAGES)):
        for name in writes:
            (folder / f"{name}.tmp").unlink(missing_ok=True)
        for unfinished in (folder / "checkpoints").glob("step_*.tmp"):
            shutil.rmtree(unfinished)


def replace(out: Path, writes: Sequence[str]) -> None:
    """OUT/.new takes the place of what is in OUT: killed at any moment, it goes on.

    First all of the old run moves away, but for files of the model, which are there at
    every moment; then the new one moves in.
    """
    new, old = out / NEW, out / OLD
    moved = old / "moved"
    old.mkdir(exist_ok=True)
    if not moved.exists():
        for name in writes:
            if (out / name).exists() and not (name in MODEL and (new / name).exists()):
                os.replace(out / name, old / name)
        moved.touch()
    for name in writes:
        if (new / name).exists():
            os.replace(new / name, out / name)
    shutil.rmtree(new)
    shutil.rmtree(old)


def take_over_former_names(out: Path) -> None:
    """A run that began under former names of its stages goes on under today's."""
    for former, name in FORMER.items():
        if (out / former).is_dir() and not (out / name).exists():
            (out / former).rename(out / name)


# ------------------------------------------------------------------------------------------
# The settings of its start

def flatten(settings: dict, world: int) -> dict:
    """A script's settings by the names of their flags; folders by what is in them.

    Batch size, accumulation and processes are one number, the rows of a step: as long
    as it stays, so do the batches. Each stage has a block size of its own.
    """
    values = {}
    for name, value in settings.items():
        if name.startswith("teacher_"):            # of tools.demo, about another run
            continue
        if isinstance(value, dict):
            values |= {key if name in FLAT else f"{name}.{key}": setting for key, setting in value.items()}
        else:
            values[name] = value
    for name in FOLDERS:
        if values.get(name):
            values[name] = {"path": values[name], "digest": contents(values[name])}
    for name in [name for name in values if name.endswith("batch_size")]:
        prefix = name.removesuffix("batch_size")
        rows = values.pop(name) * values.pop(prefix + "accum") * world
        values[f"{prefix}batch_size * accum * processes"] = rows
    if "stages" not in values:
        values.pop("eval_tokens", None)            # only watched
    else:
        T, finish_T = values.pop("block_size"), values.pop("finish_block_size")
        values |= {"align.block_size": T, "match.block_size": T, "finish.block_size": finish_T or T}
    return {name: value for name, value in values.items() if name.rpartition(".")[2] not in HOW}


def contents(folder: str) -> int | None:
    """A number for what is in a folder; in a mixture, in all of them, and their shares.
    """
    if not is_mixture(folder):
        return fingerprint(folder)
    return checksum_of([[fingerprint(part), str(share)] for part, share in parts_of(folder).items()])


def go_on(out: Path, values: dict) -> dict:
    """The settings of a resumed run: `values`, which are those of its start.

    A stage that has not begun, or comes after all that are asked for, may have others,
    and the last one that has begun goes on with a greater length although it was
    finished. Raises ValueError for any other difference.
    """
    before = read_settings(out / "settings.json")
    begun = [stage for stage in STAGES if (out / stage / "checkpoints").exists()]
    done = [stage for stage in begun if (out / stage / "stage.json").exists()]
    asked = values.get("stages", "").split(",")
    check_order(out, asked, begun, done, before.get("stages", values.get("stages", "")).split(","))
    complete = all(stage in done for stage in asked)
    differences, longer = [], set()
    for name in before.keys() & values.keys():
        stage, last = owner(name), name.rpartition(".")[2]
        if same(before[name], values[name]) or stage and stage not in begun:
            continue
        if stage and asked[-1] in STAGES and STAGES.index(stage) > STAGES.index(asked[-1]):
            values[name] = before[name]            # of a stage behind those that are asked for
        elif last == "block_size" and stage in done and (stage != begun[-1] or not complete):
            values[name] = before[name]            # the others may have a longer one
        elif last in LENGTHS and stage in done and stage not in asked:
            values[name] = before[name]
        elif last in LENGTHS and stage in done and stage in asked and stage != begun[-1]:
            differences.append(f"{told(name, before, values)} (and {begun[-1]} is built upon it)")
        elif last in LENGTHS and stage in done and stage in asked:
            longer.add(stage)
        elif last not in (*LENGTHS, "stages"):
            differences.append(told(name, before, values))
    if differences:
        raise ValueError(f"{out} was started with {'; '.join(sorted(differences)[:5])}: a resumed run may "
                         "only train longer, and be watched and saved in another way; repeat the settings "
                         f"of its start, or move {out} away to begin anew")
    for stage in longer:
        (out / stage / "stage.json").unlink()
    return values


def check_same(out: Path, settings: dict, world: int, mixers: str) -> None:
    """Raises ValueError where the distillation in `out` had other settings than these,
    up to the stage `match`.
    """
    before, values = read_settings(out / "settings.json"), flatten(settings, world) | {"mixer": mixers}
    names = [name for name in sorted(before.keys() & values.keys() - {"stages"}) if owner(name) != "finish"]
    differences = [told(name, before, values) for name in names if not same(before[name], values[name])]
    if differences:
        raise ValueError(f"{out} was distilled with {'; '.join(differences[:5])}: repeat the settings of its "
                         "start")


def check_order(out: Path, asked: Sequence[str], begun: Sequence[str], done: Sequence[str],
                before: Sequence[str]) -> None:
    """Raises ValueError for a stage that would come after one that is built upon it, or
    pass over an earlier one that has begun and not ended.
    """
    last = max((STAGES.index(stage) for stage in asked if stage in STAGES), default=0)
    for stage in STAGES[:last]:
        if stage in begun and stage not in (*done, *asked):
            raise ValueError(f"{out} has begun {stage} and not ended it: name it in --stages too, or choose "
                             "another --out")
    for stage in asked:
        later = [name for name in begun if stage in STAGES and STAGES.index(name) > STAGES.index(stage)]
        if later and stage not in begun and stage not in before:
            raise ValueError(f"{out} has begun {later[0]} without {stage}, which cannot come after it: omit "
                             f"{stage} from --stages, or choose another --out")


def owner(name: str) -> str | None:
    """The stage that a setting is for; None: for all of the run."""
    owners = {setting: stage for stage, settings in OWNERS.items() for setting in settings}
    prefix = name.partition(".")[0]
    return prefix if prefix in STAGES else owners.get(name)


def same(old, new) -> bool:
    """Folders are the same when what is in them is."""
    if isinstance(old, dict) and isinstance(new, dict):
        return old.get("digest") == new.get("digest")
    return old == new


def told(name: str, before: dict, values: dict) -> str:
    """A difference in a user's words."""
    old, new = before[name], values[name]
    if isinstance(old, dict) and isinstance(new, dict):
        return f"another {name} than is now in {new['path']}"
    old, new = (value["path"] if isinstance(value, dict) else value for value in (old, new))
    return f"{name} = {old}, not {new}"


def read_settings(file: Path) -> dict:
    """What `Home.enter` wrote; nothing for a run of before, which did not."""
    remedy = "remove it, and --resume goes on without comparing settings"
    try:
        return require_sealed(read_json(file, remedy)) if file.exists() else {}
    except ValueError as e:
        raise e if str(file) in str(e) else ValueError(f"{file} is damaged ({e}): {remedy}") from None
