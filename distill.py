"""Turn a transformer into an RNN: attention out, RWKV-7 in, trained to do the same.

    python distill.py --teacher out/teacher --out out/rwkv    (a teacher: train.py)
    torchrun --nproc_per_node=8 distill.py                    8 GPUs, 8 times the batch
    python -m tools.demo                                      makes data and teacher too

    stage    what trains  teacher                        loss
    align    the mixers   its attention, beside each     ||t - s||^2 / ||t||^2 per token
    match    everything   the whole model, beside it     KL(teacher || student), and CE
    finish   everything   none (DPO: a copy of student)  SFT: CE on responses; or DPO

In `align` the *teacher's* output flows on, so that every layer learns at once and from
clean inputs. The student starts as the teacher: embedding, norms, feed-forward layers
and head are copied, q becomes receptance (times 1/sqrt(N)), k key, v value, o output,
with biases and norms; grouped heads are repeated, rope is left out. Token shift, bonus
and gate start with no effect, the value residual with almost none; decay, a little
erasing and the group norm act at once. A look at the teacher (lib/start.py) sets decays
and refits the output maps by least squares, and `align` does the rest.

Each stage is one call of train.fit. References: RADLADS (arXiv 2505.03005), ARWKV
(arXiv 2501.15570) and its trainer RWKVInside, whose main options have a switch here.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Literal

from config import at_least, cli, run as run_script, settings     # before torch: see config/script.py
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from tyro.conf import OmitArgPrefixes

from data.loader import Batch, Loader
from lib.home import STAGES
from lib.preference import dpo_loss
from lib.processes import joined, setup
from lib.report import report_stages
from lib.runs import Run, RunConfig, restore
from lib.scores import LOGITS, HeldOut, mean_terms
from lib.shard import frozen_copy, in_turn, new_like
from lib.stages import (calibration_text, check_positions, check_settings, check_student, frozen_parts,
                        introduce, load_teacher, open_loaders, prepare_data)
from lib.start import copy_linear, student_shape, tune_mixers
from model import LM, CausalSelfAttention, ChannelMix, TimeMixer
from train import FitConfig, cross_entropy_loss, fit


# ------------------------------------------------------------------------------------------
# The wrapper that holds both mixers, and v_first across processes

class AttentionWrapper(nn.Module):
    """A mixer that holds the student's and, while aligning, the teacher's attention.

    With a teacher, both read the same x, `pair` keeps (teacher's output, student's
    output) for the loss, and the teacher's output flows on. Without one it is the
    student's mixer, with v_first gathered over the processes.
    """

    def __init__(self, student: TimeMixer, teacher: CausalSelfAttention | None, holder: "VFirstHolder"):
        super().__init__()
        self.student, self.teacher, self.holder = student, teacher, holder
        self.pair: tuple[Tensor, Tensor] | None = None

    def forward(self, x, v_first, state):
        s, v_first, state = self.student(x, v_first, state)
        if self.student.first:
            self.holder.write(v_first)
            v_first = self.holder.read()
        if self.teacher is None:
            return s, v_first, state
        with torch.no_grad():
            t, _, _ = self.teacher(x, None, None)
        self.pair = t, s
        return t, v_first, state


class VFirstHolder:
    """RWKVInside's distributed state: every process's v_first, (world_size, B, T, A).

    The process writes its slice, an explicit all-gather fills in the others', later
    layers read their slice. No training here needs the gather: each process reads only
    what it wrote, so numbers and gradients are those without. RWKVInside has it, and so
    one can look across. What matters is that v_first stays in the autograd graph: the
    first layer's value projection learns from every later layer. A process group of
    its own keeps its collectives apart from DDP's.
    """

    def __init__(self):
        self.group = dist.new_group() if dist.is_initialized() else None
        self.state: Tensor | None = None

    def write(self, v: Tensor) -> None:
        self.state = v[None] if self.group is None else AllGather.apply(v, self.group)

    def read(self) -> Tensor:
        return self.state[0 if self.group is None else dist.get_rank(self.group)]


class AllGather(torch.autograd.Function):
    """x of every process, stacked; backward sums all processes' gradients of it."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.stack(parts)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous()
        dist.all_reduce(grad, group=ctx.group)
        return grad[dist.get_rank(ctx.group)], None


def wrap(student: LM, teacher: LM | None) -> LM:
    """The student, the very same parameters, its RWKV mixers in AttentionWrappers."""
    def shallow(module: nn.Module) -> nn.Module:
        view = copy.copy(module)
        view._modules = dict(module._modules)              # the same children, until one is replaced
        return view

    holder, view = VFirstHolder(), shallow(student)
    depth = student.cfg.mixers.rfind("r") + 1 if teacher else 0        # aligning stops at the last RWKV layer
    view.blocks = nn.ModuleList(map(shallow, student.blocks[: depth or None]))       # 0: all of them
    for i, block in enumerate(view.blocks):
        if isinstance(block.att, TimeMixer):
            block.att = AttentionWrapper(block.att, teacher and teacher.blocks[i].att, holder)
    return view


# ------------------------------------------------------------------------------------------
# The student, as its teacher left it

@settings
class StudentConfig:
    mixer: str = "r"               # which layers become RWKV-7: r, ra, all, first:2, ... (lib/hybrid.py)
    ffn: str | None = None         # None: channelmix where the teacher has relu2, else the teacher's
    gate: bool = True
    group_norm: bool = True
    token_shift: bool = True
    bonus: bool = True
    rwkv_rope: bool = False
    untie_head: bool = False       # a head of its own where the teacher's is the embedding
    transfer: bool = True          # mixers start from attention's weights; without: official, but for decay
    # These defaults need no text; DistillConfig's, lookback and True, look at some.
    # spread: channels remember 2 to block_size tokens; lookback: attention's reach
    decay: Literal["spread", "official", "lookback"] = "spread"
    calibrate: bool = False        # refit output maps by least squares to what attention gives on a batch
    aligned: str | None = None     # a student of all layers after stage 1, whose mixers this one takes

    @property
    def looks(self) -> bool:
        """Whether the student wants to see what its teacher does with some text."""
        return self.aligned is None and (self.decay == "lookback" or self.calibrate)


def make_student(teacher: LM, cfg: StudentConfig, tokens: Tensor | None = None,
                 block_size: int | None = None) -> LM:
    """A copy of the teacher with RWKV-7 mixers that start near what its attention does.

    `tokens` (B, T) are what `lookback` and `calibrate` look at; `block_size` is the
    length that the student will be trained at. Raises ValueError for unlike models.
    """
    t = teacher.cfg
    student = new_like(teacher, student_shape(t, cfg))
    student.load_state_dict(teacher.state_dict(), strict=False)       # all but replaced mixers' projections
    for block, source in in_turn(student.blocks, teacher.blocks):
        if isinstance(block.ffn, ChannelMix) and t.ffn == "relu2":
            nn.init.zeros_(block.ffn.x_k)
        if isinstance(block.att, TimeMixer) and cfg.transfer:
            transfer(block.att, source.att)
    tune_mixers(teacher, student, cfg, tokens, block_size or t.block_size)
    return student


@torch.no_grad()
def transfer(m: TimeMixer, t: CausalSelfAttention) -> None:
    """Give the mixer the attention's projections, and silence what can be silenced."""
    scale, queries = m.N**-0.5, m.H // t.n_kv      # each key and value head serves so many queries
    copy_linear(m.receptance, t.q_proj, scale=1.0 if t.cfg.qk_norm else scale)
    copy_linear(m.key, t.k_proj, m.N, queries)
    copy_linear(m.value, t.v_proj, m.N, queries)
    copy_linear(m.output, t.o_proj)
    if t.cfg.qk_norm:              # what follows a norm has to be scaled after it
        m.r_norm.weight.copy_(t.q_norm.weight * scale)
        m.k_norm.weight.copy_(t.k_norm.weight)
    for p in (m.x_r, m.x_w, m.x_k, m.x_v, m.x_a, m.x_g, m.r_k, m.k_a):
        p.zero_()                  # no token shift, no bonus, write key = k
    m.k_k.fill_(1.0)
    m.a0.fill_(-2.0)               # erase a little: sigmoid(-2) = 0.12
    if not m.first:
        m.v0.fill_(-4.0)           # value residual: 2 %
    if m.cfg.gate:
        # g = sigmoid(x g1) g2 = 1: with g1 = 0 sigmoids are 1/2, g2's columns sum to 2.
        # Equal rows would get equal gradients; what tells them apart sums to 0.
        noise = nn.init.orthogonal_(torch.empty_like(m.g2))
        m.g1.zero_()
        m.g2.copy_(2 / len(m.g2) + 0.1 * (noise - noise.mean(0)))
    if m.cfg.group_norm:
        m.ln_x.weight.fill_(1.0)


# ------------------------------------------------------------------------------------------
# Losses: sums over targets, from a state to a state, as train.py explains

def align_loss(model: LM, batch: Batch, state: None = None, *, kind: str = "relative") -> tuple[dict, None]:
    """Layers' mean of ||t - s||^2 / ||t||^2, or RWKVInside's ||t - s||_2 / sqrt(C)."""
    model.hidden(batch.x)
    pairs = [block.att.pair for block in model.blocks if isinstance(block.att, AttentionWrapper)]
    total = 0.0
    for t, s in pairs:
        error = (t - s).float().square().sum(-1)                                  # (B, T)
        if kind == "relative":
            error = error / t.float().square().sum(-1).clamp(min=1e-6)
        else:
            error = error.clamp(min=1e-12).sqrt() / t.shape[-1] ** 0.5
        total = total + (error * batch.mask).sum() / len(pairs)
    return {"loss": total}, None


def divergence(t: Tensor, s: Tensor, kind: str) -> Tensor:
    """From logits (..., V), forward KL(t || s), reverse KL(s || t), or adaptive.

    Adaptive (arXiv 2404.02657) mixes both: the teacher's most likely tokens, up to half
    of its mass, are its head. The larger the student's error on the head, compared with
    that on the tail, the more forward KL weighs.
    """
    log_p, log_q = t.float().log_softmax(-1), s.float().log_softmax(-1)
    p = log_p.exp()
    forward = (p * (log_p - log_q)).sum(-1)
    if kind == "forward":
        return forward
    q = log_q.exp()
    reverse = (q * (log_q - log_p)).sum(-1)
    if kind == "reverse":
        return reverse
    with torch.no_grad():
        mass, order = p.sort(-1, descending=True)
        error = (p - q).abs().gather(-1, order)
        in_head = mass.cumsum(-1) - mass < 0.5             # the token that crosses 1/2 belongs to it
        weight = (error * in_head).sum(-1) / error.sum(-1).clamp(min=1e-9)
    return weight * forward + (1 - weight) * reverse


def match_loss(student: LM, batch: Batch, state: tuple | None = None, *, teacher: LM,
               kind: str = "forward", kl_weight: float = 1.0, ce_weight: float = 0.0,
               kl_chunk: int | None = None, temperature: float = 1.0) -> tuple[dict, tuple]:
    """kl_weight KL + ce_weight CE over the targets, and the teacher's own CE beside it.

    `state` is (student's, teacher's). KL is of logits / temperature, times its square,
    so that its gradient keeps its size (arXiv 1503.02531), over the tokens that both
    models have. The heads run on `kl_chunk` tokens at a time (None: about 2^24 logits),
    and again in the backward pass: all logits of both models never exist together.
    """
    V = min(student.cfg.vocab_size, teacher.cfg.vocab_size)
    student_state, teacher_state = state or (None, None)
    with torch.no_grad():
        ht, teacher_state = teacher.hidden(batch.x, teacher_state)
    hs, student_state = student.hidden(batch.x, student_state)

    def sums(hs, ht, y, mask):
        with torch.no_grad():
            t = teacher.head(ht)[:, :V]
        s = student.head(hs)
        kl = (divergence(t / temperature, s[:, :V] / temperature, kind) * mask).sum() * temperature**2
        ce = (F.cross_entropy(s.float(), y, reduction="none") * mask).sum()
        teacher_ce = (F.cross_entropy(t.float(), y, reduction="none") * mask).sum()
        return kl, ce, teacher_ce

    n = kl_chunk or max(256, LOGITS // V)
    flat = (x.flatten(0, 1).split(n) for x in (hs, ht, batch.y, batch.mask))      # (n, C) and (n,)
    pieces = list(zip(*flat))
    again = partial(checkpoint, sums, use_reentrant=False) if len(pieces) > 1 else sums
    kl, ce, teacher_ce = (sum(column) for column in zip(*(again(*piece) for piece in pieces)))
    loss = kl_weight * kl + ce_weight * ce
    return {"loss": loss, "kl": kl, "ce": ce, "teacher_ce": teacher_ce}, (student_state, teacher_state)


# ------------------------------------------------------------------------------------------
# The job

@settings
class DistillConfig:
    teacher: str = "out/teacher"           # model folder
    data: str = "data/pydoc"               # text, for align and match
    finish_data: str = "data/pydoc-sft"    # supervised data: SFT; preference data: DPO
    stages: str = "align,match,finish"
    student: Annotated[StudentConfig, OmitArgPrefixes] = StudentConfig(decay="lookback", calibrate=True)
    align_kind: Literal["relative", "l2norm"] = "relative"
    kl_kind: Literal["forward", "reverse", "adaptive"] = "forward"
    kl_weight: float = at_least(0.0, 1.0)
    ce_weight: float = at_least(0.0, 0.0)
    kl_temperature: float = at_least(0.01, 1.0)        # above 1, unlikely tokens matter more
    kl_chunk: int | None = at_least(1, None)           # tokens whose logits exist at once
    logit_teacher: str | None = None                   # another, larger model with the same tokens, for match
    freeze: str = ""                                   # in match, parts of names that do not train: emb,head
    dpo_kind: Literal["sigmoid", "hinge"] = "sigmoid"
    dpo_beta: float = at_least(0.0, 0.1)
    dpo_smoothing: float = at_least(0.0, 0.0, below=0.5)
    align: FitConfig = FitConfig(max_steps=400, batch_size=4, optimizer="muon", learning_rate=1e-2,
                                 eval_every=None)
    match: FitConfig = FitConfig(max_steps=3000, batch_size=2, optimizer="muon", learning_rate=5e-4,
                                 rwkv_lr_multiplier=2.0, weight_decay=0.0, eval_every=1000)
    finish: FitConfig = FitConfig(max_steps=100, batch_size=8, learning_rate=1e-4, weight_decay=0.0,
                                  eval_every=None)
    block_size: int | None = at_least(1, None)         # tokens per sequence; None = the teacher's
    finish_block_size: int | None = at_least(1, None)  # None = block_size
    eval_tokens: int | None = at_least(1, 65536)       # of the held-out text; None = all
    run: Annotated[RunConfig, OmitArgPrefixes] = RunConfig(out="out/rwkv")

    def __post_init__(self):
        check_settings(self)

    @property
    def named(self) -> list[str]:
        return self.stages.split(",")


@dataclass(frozen=True)
class Stage:
    """One row of the table at the top of this file."""
    loss: Callable
    teacher: LM | None = None              # whose attention stands beside the student's mixers
    trains: tuple[str, ...] = ("",)        # parts of names that train; "" is in all
    frozen: tuple[str, ...] = ()           # parts of names that do not

    def model(self, student: LM) -> LM:
        """The student, wrapped; only what this stage trains requires gradients."""
        model = wrap(student, self.teacher)
        for name, p in model.named_parameters():
            trains = any(part in name for part in self.trains)
            frozen = any(part in name.replace(".att.student.", ".att.") for part in self.frozen)
            p.requires_grad_(trains and not frozen)
        return model


def open_stage(name: str, cfg: DistillConfig, student: LM, teacher: LM, logit_teacher: LM,
               kind: str) -> Stage:
    """A row of the table, made in its turn: DPO's reference is the student by then."""
    if name == "align":
        return Stage(partial(align_loss, kind=cfg.align_kind), teacher, trains=(".att.student.",))
    if name == "match":
        loss = partial(match_loss, teacher=logit_teacher, kind=cfg.kl_kind, kl_weight=cfg.kl_weight,
                       ce_weight=cfg.ce_weight, kl_chunk=cfg.kl_chunk, temperature=cfg.kl_temperature)
        return Stage(loss, frozen=frozen_parts(cfg, student))
    if kind == "preference":
        return Stage(partial(dpo_loss, reference=frozen_copy(student), beta=cfg.dpo_beta, kind=cfg.dpo_kind,
                             smoothing=cfg.dpo_smoothing))
    return Stage(cross_entropy_loss)


def distill(cfg: DistillConfig) -> dict:
    """Teacher in, RNN out: run the stages, a folder each, and return the report."""
    rank, world, device = setup(cfg.run.device)
    run = Run(cfg.run, rank, "distill", reads=[cfg.teacher, cfg.logit_teacher, cfg.student.aligned, cfg.data,
                                                   cfg.finish_data])
    teacher = load_teacher(cfg.teacher, device, cfg.run.shard)
    logit_teacher = load_teacher(cfg.logit_teacher, device, cfg.run.shard) if cfg.logit_teacher else teacher
    prepare_data(cfg, rank)
    T = cfg.block_size or teacher.cfg.block_size
    check_positions(cfg, teacher, logit_teacher, T)
    torch.manual_seed(cfg.run.seed)
    student = make_student(teacher, cfg.student, calibration_text(cfg, teacher, T), T).to(device)
    check_student(cfg, student)
    loaders = open_loaders(cfg, student, logit_teacher, T, rank, world)
    meta = {"tokenizer": loaders["val"].meta["tokenizer"], "teacher": cfg.teacher, "data": cfg.data}
    run.begin(student, meta, replace(cfg, block_size=T), introduce(cfg, teacher, student, T))
    held_out = HeldOut(teacher, student, loaders["val"], cfg.eval_tokens, cfg.match.bptt_chunk)
    start = {"name": "start", "tokens": 0, "minutes": 0.0}
    rows = [run.read_row("start.json") or run.note(start | held_out.row(), "start.json")]
    for name in STAGES:
        folder = run.stage(name)
        row = folder.read_row("stage.json")
        if row:                                            # done before, whether or not it is asked for again
            restore(student, folder.out)
        elif name in cfg.named:
            stage = open_stage(name, cfg, student, teacher, logit_teacher, loaders[name].kind)
            row = train_stage(name, stage, cfg, loaders, folder, held_out)
        if row:
            rows.append(row)
            run.publish(folder)
    return report_stages(run, teacher, rows, cfg, loaders["val"])


def train_stage(name: str, stage: Stage, cfg: DistillConfig, loaders: dict[str, Loader], folder: Run,
                held_out: HeldOut) -> dict:
    """Take the student through a stage, into its folder; returns the report's row."""
    model, loop, examples = stage.model(held_out.student), getattr(cfg, name), loaders.get(f"{name}_val")
    terms = partial(mean_terms, stage.loss, model, examples, cfg.eval_tokens, loop.bptt_chunk)
    before = terms() if examples else None
    done = fit(model, stage.loss, loaders[name], loop, folder, held_out.quick if name == "match" else None)
    row = {"name": name, "tokens": done["tokens"], "minutes": done["minutes"]} | held_out.row()
    if examples:
        row["finish"] = {"before": before, "after": terms()}
        after = row["finish"]["after"]["loss"]
        folder.say(f"held-out loss of stage 3: {before['loss']:.4f} before, {after:.4f} after")
    return folder.note(row, "stage.json")


def main(argv: list[str] | None = None) -> None:
    with joined():
        distill(cli(DistillConfig, argv))


if __name__ == "__main__":
    run_script(main)
