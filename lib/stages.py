"""What the stages of a distillation read, and what is refused before they begin.

`cfg` is distill.py's DistillConfig, which stands above this room.
"""

import sys
from dataclasses import replace
from pathlib import Path
from shlex import quote

import torch
from torch import Tensor

from data.loader import Loader
from data.mixture import open_split
from data.prepare import ensure_prepared
from data.tokenizer import frames_of, load_tokenizer
from lib.folders import check_vocabulary, same_tokenizer
from lib.home import STAGES
from lib.hybrid import describe
from lib.processes import main_first
from lib.scores import readable
from lib.shard import load
from lib.start import LOOK
from model import LM


def check_settings(cfg) -> None:
    """Raises ValueError for settings that no distillation can have."""
    if cfg.align.bptt_chunk is not None:
        raise ValueError(f"align.bptt_chunk = {cfg.align.bptt_chunk}: stage 1 has no loss by pieces; "
                         "run it alone at a shorter block_size, then the others with --resume")
    if any(loop.bptt_truncate for loop in (cfg.align, cfg.match, cfg.finish)):
        raise ValueError("bptt_truncate: a teacher's cache cannot go on for ever; it is for train.py")
    for name in ("align", "finish"):
        loop = getattr(cfg, name)
        if loop.eval_every not in (None, type(loop)().eval_every):
            raise ValueError(f"{name}.eval_every: only match is evaluated while it trains; omit it")
    if cfg.kl_weight == cfg.ce_weight == 0:
        raise ValueError("kl_weight and ce_weight are both 0: stage 2 would learn nothing")
    if cfg.dpo_beta == 0:
        raise ValueError("dpo_beta = 0: no preference would be learned; 0.1 is usual")
    if not cfg.stages or [name for name in STAGES if name in cfg.named] != cfg.named:
        raise ValueError(f"stages = {cfg.stages!r}: name some of {','.join(STAGES)}, in this order")


def load_teacher(folder: str, device: torch.device, shard: bool) -> LM:
    """A model that teaches and does not learn.

    Raises ValueError where there is none.
    """
    if not Path(folder).exists():
        raise ValueError(
            f"no teacher at {folder}: train one with train.py, import one with tools.convert, or "
            "let python -m tools.demo make it, and everything else"
        )
    return load(folder, device, shard).eval().requires_grad_(False)


def prepare_data(cfg, rank: int) -> None:
    """Make the embedded data sets where missing, with the teacher's tokenizer."""
    with main_first(rank):
        ensure_prepared(cfg.data, cfg.teacher)
        if "finish" in cfg.named:
            ensure_prepared(cfg.finish_data, cfg.teacher)


def calibration_text(cfg, teacher: LM, T: int) -> Tensor | None:
    """Training text (B, T), the same in every process, for a student that looks: LOOK
    tokens, for wide models 16 for each channel, or as many rows as there are.
    """
    if not cfg.student.looks:
        return None
    n = max(LOOK, 16 * teacher.cfg.n_head * teacher.cfg.att_head_size)
    there = min(int(part.different_rows() / part.share) for part in open_split(cfg.data, "train", 1, T).parts)
    loader = open_split(cfg.data, "train", max(1, min(n // T, there)), T, cfg.run.seed)
    check_vocabulary(teacher, teacher, loader)
    same_tokenizer(loader, cfg.teacher)
    return loader.step(0)[0][0].x.to(teacher.emb.weight.device)


def check_student(cfg, student: LM) -> None:
    """Raises ValueError for a student without RWKV-7 or a freeze that names nothing."""
    if "r" not in student.cfg.mixers:
        raise ValueError(
            f"mixer = {cfg.student.mixer!r} replaces no layer: put an r where RWKV-7 is to stand, "
            "name layers such as first:1, or use auto:T with T above the teacher's block_size"
        )
    names = [name for name, _ in student.named_parameters(remove_duplicate=False)]     # a tied head has one
    for part in filter(None, cfg.freeze.split(",")):
        if not any(part in name for name in names):
            raise ValueError(f"freeze = {cfg.freeze!r}: no parameter has {part!r} in its name; try emb, att, "
                             "ffn, ln or head")
    parts = frozen_parts(cfg, student)
    if all(any(part in name for part in parts) for name, _ in student.named_parameters()):
        raise ValueError(f"freeze = {cfg.freeze!r}: nothing would be left to train")
    if "finish" in cfg.named and cfg.finish_block_size:
        check_length("finish_block_size", cfg.finish_block_size, "the student", student)


def check_positions(cfg, teacher: LM, logit_teacher: LM, T: int) -> None:
    """Raises ValueError where a teacher has learned positions, and fewer than T."""
    check_length("block_size", T, cfg.teacher, teacher)
    if "match" in cfg.named:
        check_length("block_size", T, cfg.logit_teacher or cfg.teacher, logit_teacher)


def check_length(name: str, length: int, who: str, model: LM) -> None:
    if length > readable(model, length):
        raise ValueError(f"{name} = {length}: {who} has learned {model.cfg.longest} positions: lower it")


def frozen_parts(cfg, student: LM) -> tuple[str, ...]:
    """The parts of names that do not train in `match`: a tied head is the embedding."""
    parts = tuple(filter(None, cfg.freeze.split(",")))
    if student.cfg.tied and any(part in "head.weight" for part in parts):
        return *parts, "emb.weight"
    return parts


def introduce(cfg, teacher: LM, student: LM, T: int) -> str:
    """Who is distilled into whom, in a few lines."""
    line = f"teacher {cfg.teacher}: {teacher.n_params():,} parameters; student: {student.n_params():,}"
    if student.cfg.tied and any(part in "emb.weight" for part in frozen_parts(cfg, student)):
        line += "\nmatch: embedding and head are one, and frozen both"
    return f"{line}\n{describe(student.cfg, T)}"


def open_loaders(cfg, student: LM, logit_teacher: LM, T: int, rank: int, world: int) -> dict[str, Loader]:
    """The text of every stage by its name, and what is held out: val, and finish_val.

    A stage's seed does not depend on which others run. Raises ValueError for what the
    models cannot read.
    """
    def load(data: str, half: str, loop, seed: int, T: int = T) -> Loader:
        loader = open_split(data, half, loop.batch_size, T, seed, rank, world, loop.accum)
        if loader.kind == "preference" and loop is not cfg.finish:
            raise ValueError(f"{data} holds preferences, not text: they are for stage 3, --finish_data")
        check_vocabulary(logit_teacher, student, loader)
        same_tokenizer(loader, cfg.teacher, cfg.logit_teacher or cfg.teacher)
        return loader

    seed, finish_T = cfg.run.seed, cfg.finish_block_size or T
    loaders = {"val": load(cfg.data, "val", replace(cfg.match, batch_size=16), 0)}
    if "align" in cfg.named:
        loaders["align"] = load(cfg.data, "train", cfg.align, seed)
    if "match" in cfg.named:
        loaders["match"] = load(cfg.data, "train", cfg.match, seed + 1)
    if "finish" in cfg.named:
        loaders["finish"] = load(cfg.finish_data, "train", cfg.finish, seed + 2, finish_T)
        loaders["finish_val"] = load(cfg.finish_data, "val", cfg.finish, seed + 2, finish_T)
    if rank == 0:
        read = {loaders[name].folder: loaders[name] for name in cfg.named}         # each folder once
        for loader in read.values():
            tell_frames(cfg.teacher, loader)
    return loaders


def tell_frames(teacher: str, loader: Loader) -> None:
    """Say on stderr that examples unlearn the teacher's chat template: they may be of a
    sister's tokenizer, which has the same ids.
    """
    theirs = loader.meta.get("frames")                  # text has none, nor have folders of before
    if not theirs or not (Path(teacher) / "tokenizer.json").exists():  # else the template goes by the name
        return
    enc = load_tokenizer(teacher)
    if getattr(enc, "chat", None) and theirs != frames_of(enc):
        print(f"{loader.folder} has another chat template than {teacher}, or none, and so will the "
              f"student: to keep the teacher's, prepare it with --tokenizer {quote(teacher)}",
              file=sys.stderr)
