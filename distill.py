"""Turn a transformer into an RNN: take the attention out, put RWKV-7 time mixing in, and teach it what attention did.

    python distill.py                                          the whole job; makes data and teacher where they are missing
    python distill.py --teacher out/teacher --out out/rwkv     three stages on a teacher of your own
    python distill.py --rank_layers --keep 1                   which layers to leave attention, if one may stay
    torchrun --nproc_per_node=8 distill.py

    stage    what trains        teacher                                   loss
    align    student's mixers   its attention, inside the shared trunk    per layer ||t - s||^2 / ||t||^2
    distil   everything         the whole model                           kl_weight KL(teacher || student) + ce_weight CE
    finish   everything         none                                      SFT: CE on responses; or DPO on preferences

In `align` the *teacher's* output flows on, so that every layer learns at once and from clean inputs. The student starts
as the teacher: embedding, norms, feed-forward layers and head are copied, q becomes receptance (with the scale 1/sqrt(N)
folded in), k key, v value, o output, with their biases and, where the teacher has norms on q and k, with these; grouped
heads are repeated. Of what RWKV-7 has besides, token shift, bonus and gate start with no effect and the value residual with
almost none; decay, a little erasing and the group norm act from the first step, and stage 1 is there to absorb them.
`--decay lookback` and `--calibrate` start nearer, by looking at what the teacher does on one batch.

`distill` is the job, `distil` its second stage. What it is not: another trainer. Each stage is a call of train.fit with a
loss function and a list of what trains.

References: RADLADS (arXiv 2505.03005), ARWKV (arXiv 2501.15570) and its trainer RWKVInside, whose main options have a switch here.
"""

import copy
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from tyro.conf import OmitArgPrefixes

from config import cli, run
from data.loader import Batch, Loader
from data.prepare import ensure_prepared
from evaluate import as_markdown, check_vocabulary, compare, global_sum, make_report, same_tokenizer, write_report
from model import LM, CausalSelfAttention, ChannelMix, ModelConfig, State, TimeMixer, load_model
from plan import describe
from train import RUN, FitConfig, TrainConfig, check_free, claim, cross_entropy_loss, fit, joined, main_first, publish, restore, setup, train

STAGES = ("align", "distil", "finish")


# ---------------------------------------------------------------------------------------------------------------------
# v_first across processes, and the wrapper that holds teacher and student mixer

class AllGather(torch.autograd.Function):
    """x of every process, stacked: (...) -> (world_size, ...). Backward: each process gets the sum of all gradients of its x."""

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


class VFirstHolder:
    """RWKVInside's distributed state: v_first of every process, (world_size, B, T, C), the same everywhere.

    The process writes its slice, an explicit all-gather fills in the others', later layers read their slice. As each
    process reads only what it wrote, numbers and gradients are those without the gather; it is here because the state is
    RWKVInside's, whole on every process for whoever wants to look across, and it costs one collective per pass. What
    matters is that it stays in the autograd graph: the first layer's value projection learns from every later layer. It
    has a process group of its own, so that its collectives cannot be confused with DDP's.
    """

    def __init__(self):
        self.group = dist.new_group() if dist.is_initialized() else None
        self.state: Tensor | None = None

    def write(self, v: Tensor) -> None:
        """v (B, T, C): the value of this process's first RWKV layer."""
        self.state = v[None] if self.group is None else AllGather.apply(v, self.group)

    def read(self) -> Tensor:
        """This process's slice, (B, T, C)."""
        return self.state[0 if self.group is None else dist.get_rank(self.group)]


class AttentionWrapper(nn.Module):
    """A mixer that holds the student's TimeMixer and, while aligning, the teacher's attention.

    With a teacher, both read the same x, `pair` keeps (teacher's output, student's output) for the loss, and the
    teacher's output flows on. Without one it is the student's mixer with v_first gathered over the processes.
    """

    def __init__(self, student: TimeMixer, teacher: CausalSelfAttention | None, holder: VFirstHolder):
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


def wrap(student: LM, teacher: LM | None) -> LM:
    """The student, the very same parameters, with each RWKV mixer in an AttentionWrapper; `teacher` for stage 1 only."""
    holder = VFirstHolder()
    with torch.device("meta"):
        view = LM(student.cfg)
    for name, module in student.named_children():
        if name != "blocks":
            setattr(view, name, module)
    for i, block in enumerate(student.blocks):
        for name, module in block.named_children():
            if name == "att" and isinstance(module, TimeMixer):
                module = AttentionWrapper(module, teacher and teacher.blocks[i].att, holder)
            setattr(view.blocks[i], name, module)
    return view


# ---------------------------------------------------------------------------------------------------------------------
# The student, as its teacher left it

@dataclass(frozen=True)
class StudentConfig:
    """What the student is, beside what it takes over from its teacher."""

    mixer: str = "r"               # r = RWKV-7, a = the teacher's attention stays; or all, every:K, ... as model.mixer_letters has them
    ffn: str | None = None         # None: channelmix where the teacher has relu2, else the teacher's
    gate: bool = True
    group_norm: bool = True
    token_shift: bool = True
    bonus: bool = True
    rwkv_rope: bool = False
    untie_head: bool = False       # give the student a head of its own where the teacher's is the embedding
    transfer: bool = True          # start from the teacher's weights; without: mixers start as official RWKV-7
    decay: str = "spread"          # initial decay: spread (each head's channels remember 2 to block_size tokens), official,
                                   # lookback (they remember about as far as the teacher's head looks back on one batch)
    calibrate: bool = False        # scale each head's output so that the mixer is nearest to the attention on one batch


def make_student(teacher: LM, cfg: StudentConfig, tokens: Tensor | None = None, block_size: int | None = None) -> LM:
    """A copy of the teacher with RWKV-7 mixers that start near what its attention does with q, k, v and o.

    Token-shift mixes and bonus start at 0, the gate at exactly 1, the value residual near 0; decay, a share of 0.12 erased,
    and the group norm do act. `tokens` (B, T) are what `lookback` and `calibrate`, which need them, look at; `block_size` is the
    length that the student will be trained at (None: the teacher's). Raises ValueError for a student that the teacher does not allow.
    """
    t = teacher.cfg
    if cfg.decay not in ("spread", "official", "lookback"):
        raise ValueError(f"decay = {cfg.decay!r}: choose spread, official or lookback")
    assert tokens is not None or cfg.decay != "lookback" and not cfg.calibrate, "lookback and calibrate look at tokens"
    N = t.att_head_size
    ffn = cfg.ffn or ("channelmix" if t.ffn == "relu2" else t.ffn)
    if ffn != t.ffn and (ffn, t.ffn) != ("channelmix", "relu2"):
        raise ValueError(f"a student with ffn {ffn} cannot take over the teacher's {t.ffn}: omit --ffn")
    student = LM(replace(t, mixer=cfg.mixer, ffn=ffn, gate=cfg.gate, group_norm=cfg.group_norm, token_shift=cfg.token_shift, bonus=cfg.bonus,
                         rwkv_rope=cfg.rwkv_rope, tied=t.tied and not cfg.untie_head, rwkv_head_size=N, rwkv_size=t.n_head * N))
    theirs, ours = teacher.state_dict(), student.state_dict()
    with torch.no_grad():
        for name in theirs.keys() & ours.keys():
            ours[name].copy_(theirs[name])
        for block, source in zip(student.blocks, teacher.blocks):
            if isinstance(block.ffn, ChannelMix) and ffn != t.ffn:
                block.ffn.x_k.zero_()
            if isinstance(block.att, TimeMixer):
                if not isinstance(source.att, CausalSelfAttention):
                    raise ValueError("the teacher has RWKV layers already: only attention can be replaced")
                if cfg.transfer:
                    transfer(block.att, source.att)
                if cfg.decay == "spread":
                    block.att.w0.copy_(spread_decay(block.att, block_size or t.block_size))
    if tokens is not None:
        look_at_teacher(teacher, student, tokens, cfg)
    return student


@torch.no_grad()
def transfer(m: TimeMixer, t: CausalSelfAttention) -> None:
    """Give the mixer the attention's projections, and silence what can be silenced."""
    per_kv = m.H // t.n_kv  # grouped heads: each key and value head serves this many queries
    if t.cfg.qk_norm:       # what follows a norm has to be scaled after it
        m.r_norm.weight.copy_(t.q_norm.weight * m.N**-0.5)
        m.k_norm.weight.copy_(t.k_norm.weight)
    for ours, theirs, repeat, scale in ((m.receptance, t.q_proj, 1, 1.0 if t.cfg.qk_norm else m.N**-0.5), (m.key, t.k_proj, per_kv, 1.0),
                                        (m.value, t.v_proj, per_kv, 1.0), (m.output, t.o_proj, None, 1.0)):
        for p, q in zip(ours.parameters(), theirs.parameters()):
            rows = q.unflatten(0, (-1, m.N)).repeat_interleave(repeat, 0).flatten(0, 1) if repeat else q
            p.copy_(rows * scale)
    for name, p in m.named_parameters():
        if name.startswith("x_") or name in ("r_k", "k_a"):
            p.zero_()              # no token shift, no bonus, write key = k
    m.k_k.fill_(1.0)
    m.a0.fill_(-2.0)               # erase a little: sigmoid(-2) = 0.12
    if not m.first:
        m.v0.fill_(-4.0)           # value residual: 2 %
    if m.cfg.gate:
        # g = sigmoid(x g1) g2 = 1: with g1 = 0 every sigmoid is 1/2, so the rows of g2 must sum to 2. Equal rows would
        # get equal gradients for ever; what is added to tell them apart sums to 0.
        noise = nn.init.orthogonal_(torch.empty_like(m.g2))
        m.g1.zero_()
        m.g2.copy_(2 / len(m.g2) + 0.1 * (noise - noise.mean(0)))
    if m.cfg.group_norm:
        m.ln_x.weight.fill_(1.0)


def spread_decay(m: TimeMixer, longest: int | Tensor) -> Tensor:
    """w0 (1, 1, A) so that a head's channels remember n = 2 ... `longest` tokens, evenly in log n: e^w = 1 - 1/n, whose powers sum to n.

    `longest` is one number, or one for each head (H,).
    """
    longest = torch.as_tensor(longest, device=m.w0.device).expand(m.H)[:, None]    # (H, 1)
    n = 2 * (longest / 2) ** torch.linspace(0, 1, m.N, device=m.w0.device)         # (H, N)
    share = -torch.log1p(-1 / n) * math.exp(0.5)   # = sigmoid(w0), as w = -e^-0.5 sigmoid(w0)
    share = share.clamp(max=0.99)                  # RWKV-7 forgets no faster than e^-0.607, n = 2.2
    return torch.logit(share).view(1, 1, -1)


@torch.no_grad()
def look_at_teacher(teacher: LM, student: LM, tokens: Tensor, cfg: StudentConfig) -> None:
    """Set decay and output scale of each head by what the teacher's attention does with `tokens` (B, T); see StudentConfig.

    As in stage 1, each mixer reads what the teacher's attention reads.
    """
    seen: dict[int, tuple[Tensor, Tensor]] = {}  # layer -> attention's input and output, (B, T, C)
    hooks = [block.att.register_forward_hook(lambda _, args, result, i=i: seen.update({i: (args[0], result[0])})) for i, block in enumerate(teacher.blocks)]
    teacher.hidden(tokens)
    for hook in hooks:
        hook.remove()
    v_first = None
    for i, (x, target) in seen.items():
        mixer = student.blocks[i].att
        if not isinstance(mixer, TimeMixer):
            continue
        if cfg.decay == "lookback":
            # a head that attends to its last n tokens alike looks back d = (n - 1) / 2: let its channels remember 2 ... 2d + 1
            mixer.w0.copy_(spread_decay(mixer, (2 * lookback(teacher.blocks[i].att, x) + 1).clamp(min=2.5)))
        heads = []
        hook = mixer.output.register_forward_pre_hook(lambda _, args: heads.append(args[0]))
        _, v_first, _ = mixer(x, v_first, None)
        hook.remove()
        if cfg.calibrate:
            target = target if mixer.output.bias is None else target - mixer.output.bias
            scales = head_scales(heads[0].flatten(0, 1), mixer.output.weight, target.flatten(0, 1), mixer.H)
            mixer.output.weight.mul_(scales.repeat_interleave(mixer.N))


def lookback(att: CausalSelfAttention, x: Tensor) -> Tensor:
    """How many tokens back each head looks on average, reading x (B, T, C): (H,).

    Attention to position s of all positions 0 ... t, with s itself as the value, says where it looks: sum_s p_ts s.
    """
    q, k, _ = att.qkv(x, 0)
    position = torch.arange(x.shape[1], device=x.device, dtype=q.dtype)
    where = F.scaled_dot_product_attention(q, k, position[:, None].expand_as(k), is_causal=True, enable_gqa=att.n_kv < att.n_head)[..., 0]  # (B, H, T)
    return (position - where).mean((0, 2))


def head_scales(y: Tensor, W: Tensor, target: Tensor, H: int) -> Tensor:
    """The factors (H,) of y's heads (M, H N) that bring the sum of their shares y_h W_h^T, W (C, H N), nearest to target (M, C).

    Least squares: with u_h = y_h W_h^T, solve sum_h <u_g, u_h> c_h = <u_g, target>, drawn a little towards 1.
    """
    u = torch.stack([y_h @ W_h.T for y_h, W_h in zip(y.chunk(H, 1), W.chunk(H, 1))]).flatten(1).double()     # (H, M C)
    gram, wish = u @ u.T, u @ target.flatten().double()
    ridge = 1e-3 * gram.diagonal().mean().clamp(min=1e-9) * torch.eye(H, device=y.device, dtype=u.dtype)
    return torch.linalg.solve(gram + ridge, wish + ridge.sum(1)).to(y.dtype)


def set_training(model: LM, names: Callable[[str], bool]) -> None:
    """Only the parameters whose name satisfies `names` require gradients."""
    for name, p in model.named_parameters():
        p.requires_grad_(names(name))


# ---------------------------------------------------------------------------------------------------------------------
# Losses: sums over targets, from a state to a state, as train.py explains

def align_loss(model: LM, batch: Batch, state: None = None, with_loss: bool = True, *, kind: str = "relative") -> tuple[dict[str, Tensor], None]:
    """Stage 1, mean over layers: relative ||t - s||^2 / ||t||^2 per token, or RWKVInside's l2norm ||t - s||_2 / sqrt(C). Whole sequences only."""
    assert state is None and with_loss, "stage 1 has no loss by pieces"
    model.hidden(batch.x)
    pairs = [block.att.pair for block in model.blocks if isinstance(block.att, AttentionWrapper)]
    total = 0.0
    for t, s in pairs:
        error = (t - s).float().square().sum(-1)                                     # (B, T)
        if kind == "relative":
            error = error / t.float().square().sum(-1).clamp(min=1e-6)
        else:
            error = error.clamp(min=1e-12).sqrt() / t.shape[-1] ** 0.5
        total = total + (error * batch.mask).sum() / len(pairs)
    return {"loss": total}, None


def divergence(t: Tensor, s: Tensor, kind: str) -> Tensor:
    """Per position, from logits t and s (..., V): forward KL(t || s), reverse KL(s || t), or their adaptive mixture.

    Adaptive (arXiv 2404.02657): the teacher's most likely tokens, up to half of its mass, are its head. The larger the
    student's error on the head, compared with that on the tail, the more forward KL weighs.
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
        in_head = mass.cumsum(-1) - mass < 0.5                                       # the token that crosses 1/2 belongs to it
        weight = (error * in_head).sum(-1) / error.sum(-1).clamp(min=1e-9)
    return weight * forward + (1 - weight) * reverse


def distil_loss(student: LM, batch: Batch, state: tuple | None = None, with_loss: bool = True, *, teacher: LM, kind: str = "forward",
                kl_weight: float = 1.0, ce_weight: float = 0.0, kl_chunk: int | None = None) -> tuple[dict[str, Tensor], tuple]:
    """Stage 2: kl_weight KL + ce_weight CE over the masked targets, and the teacher's own CE to look at.

    `state` is (student's, teacher's), each from its own reading of what came before.

    The heads run on `kl_chunk` tokens at a time and again in the backward pass, so that (B, T, V) float32 logits of both
    models never exist together; None: as many as have about 2^24 logits. A teacher with more tokens than the student is
    cut to the student's.
    """
    V = student.cfg.vocab_size
    with torch.no_grad():
        ht, theirs = teacher.hidden(batch.x, state and state[1])
    hs, ours = student.hidden(batch.x, state and state[0])
    if not with_loss:
        return {}, (ours, theirs)

    def terms(hs, ht, y, mask):
        with torch.no_grad():
            t = teacher.head(ht)[:, :V]
        s = student.head(hs)
        kl = (divergence(t, s, kind) * mask).sum()
        ce = (F.cross_entropy(s.float(), y, reduction="none") * mask).sum()
        with torch.no_grad():
            teacher_ce = (F.cross_entropy(t.float(), y, reduction="none") * mask).sum()
        return kl, ce, teacher_ce

    n = kl_chunk or max(256, 2**24 // V)
    parts = list(zip(*(x.flatten(0, 1).split(n) for x in (hs, ht, batch.y, batch.mask))))              # of (BT, C) and (BT,)
    sums = [terms(*part) if len(parts) == 1 else checkpoint(terms, *part, use_reentrant=False) for part in parts]
    kl, ce, teacher_ce = (sum(column) for column in zip(*sums))
    return {"loss": kl_weight * kl + ce_weight * ce, "kl": kl, "ce": ce, "teacher_ce": teacher_ce}, (ours, theirs)


def sequence_logp(model: LM, batch: Batch, state: State | None = None) -> tuple[Tensor, State]:
    """Per row, the sum over its targets of log p(target), (B,), and the state after them."""
    logits, state = model(batch.x, state)
    logp = logits.float().log_softmax(-1).gather(-1, batch.y[..., None])[..., 0]
    return (logp * batch.mask).sum(1), state


def dpo_loss(policy: LM, batch: Batch, state: tuple | None = None, with_loss: bool = True, *, reference: LM, beta: float = 0.1,
             kind: str = "sigmoid", smoothing: float = 0.0) -> tuple[dict[str, Tensor], tuple]:
    """Stage 3 on preferences (arXiv 2305.18290); the first half of the rows is chosen, the second rejected.

    With d = beta (log-ratio of chosen - log-ratio of rejected), ratios of policy to reference, and label smoothing e:
    (1-e) f(d) + e f(-d), where f(d) is -log s(d) for sigmoid and max(0, 1 - d) for hinge. That is no sum over pieces, but what
    each adds is: `state` is (policy's, reference's, log-ratios so far (B,), targets so far (B,)), and a piece's loss is the increase.
    The ratios need the heads even without `with_loss`.
    """
    def terms(ratio: Tensor, targets: Tensor) -> dict[str, Tensor]:
        chosen, rejected = ratio.chunk(2)
        d = beta * (chosen - rejected)
        f = (lambda d: -F.logsigmoid(d)) if kind == "sigmoid" else (lambda d: F.relu(1 - d))
        loss = (1 - smoothing) * f(d) + smoothing * f(-d)
        real = targets.chunk(2)[0] > 0                                                # rows without a target (yet) teach nothing
        return {"loss": (loss * real).sum(), "accuracy": ((d > 0) & real).sum(), "margin": (d * real).sum()}

    with torch.no_grad():
        before, theirs = sequence_logp(reference, batch, state and state[1])
    after, ours = sequence_logp(policy, batch, state and state[0])
    ratio, targets = after - before, batch.mask.sum(1)
    if state is None:
        return terms(ratio, targets), (ours, theirs, ratio, targets)
    ratio, targets = state[2] + ratio, state[3] + targets
    earlier = terms(*state[2:])
    return {key: value - earlier[key] for key, value in terms(ratio, targets).items()}, (ours, theirs, ratio, targets)


# ---------------------------------------------------------------------------------------------------------------------
# The job

@dataclass(frozen=True)
class DistillConfig:
    teacher: str = "out/teacher"           # model folder; trained first where it is missing
    data: str = "data/pydoc"               # text, for stages 1 and 2
    finish_data: str = "data/pydoc-sft"    # supervised data: SFT; preference data: DPO
    out: str = "out/rwkv"
    stages: str = "align,distil,finish"
    student: Annotated[StudentConfig, OmitArgPrefixes] = StudentConfig()
    # losses
    align_kind: str = "relative"           # relative, l2norm
    kl_kind: str = "forward"               # forward, reverse, adaptive
    kl_weight: float = 1.0
    ce_weight: float = 0.0
    kl_chunk: int | None = None            # tokens whose logits exist at once; None = about 2^24 logits
    logit_teacher: str | None = None       # another, larger model with the same tokens for stage 2
    freeze: str = ""                       # in stage 2, parts of names that do not train: "ffn", "emb,head", ...
    dpo_kind: str = "sigmoid"              # sigmoid, hinge
    dpo_beta: float = 0.1
    dpo_smoothing: float = 0.0
    # loops
    align: FitConfig = FitConfig(max_steps=400, batch_size=4, learning_rate=5e-3, eval_every=None)
    distil: FitConfig = FitConfig(max_steps=3000, batch_size=2, learning_rate=5e-4, rwkv_lr_multiplier=2.0, weight_decay=0.0, eval_every=1000)
    finish: FitConfig = FitConfig(max_steps=100, batch_size=8, learning_rate=1e-4, weight_decay=0.0, eval_every=None)
    block_size: int | None = None          # tokens per sequence in stages 1 and 2; None = the teacher's
    finish_block_size: int | None = None   # None = block_size
    # the teacher, where it has to be trained
    teacher_model: ModelConfig = ModelConfig()
    teacher_fit: FitConfig = FitConfig(max_steps=3000, batch_size=4, eval_every=1000)
    controls: bool = False                 # afterwards, what the same tokens give without each idea
    rank_layers: bool = False              # instead: what replacing each layer costs, after stage 1 of all; see rank_layers
    keep: int = 1                          # how many layers --rank_layers proposes to leave as attention
    eval_tokens: int | None = 65536        # of the held-out half; None = all
    resume: bool = False
    overwrite: bool = False
    device: str = "auto"
    seed: int = 0

    def __post_init__(self):
        for name, choices in (("align_kind", ("relative", "l2norm")), ("kl_kind", ("forward", "reverse", "adaptive")), ("dpo_kind", ("sigmoid", "hinge"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} = {getattr(self, name)!r}: choose one of {', '.join(choices)}")
        for name in ("kl_chunk", "block_size", "finish_block_size", "eval_tokens"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: it must be at least 1")
        for name in ("kl_weight", "ce_weight", "dpo_beta"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ValueError(f"{name} = {getattr(self, name)}: it must be a number of at least 0")
        if not 0 <= self.dpo_smoothing < 0.5:
            raise ValueError(f"dpo_smoothing = {self.dpo_smoothing}: it must be in [0, 0.5)")
        if self.align.bptt_chunk is not None:
            raise ValueError(f"align.bptt_chunk = {self.align.bptt_chunk}: stage 1 learns each layer alone, without a loss by pieces; "
                             "run it alone at a shorter block_size, then the others with --resume and --distil.bptt_chunk, --finish.bptt_chunk")
        if any(getattr(self, stage).bptt_truncate for stage in STAGES):
            raise ValueError("bptt_truncate: the teacher cannot carry its cache from step to step; it is for train.py, here use bptt_chunk")
        if self.kl_weight == self.ce_weight == 0:
            raise ValueError("kl_weight and ce_weight are both 0: stage 2 would learn nothing")
        if not self.stages or list(filter(self.stages.split(",").__contains__, STAGES)) != self.stages.split(","):
            raise ValueError(f"stages = {self.stages!r}: name some of {','.join(STAGES)}, in this order")


def train_teacher(cfg: DistillConfig) -> None:
    """Train the missing teacher next to its place and move it there when it is done, so that half a teacher never teaches."""
    unfinished = Path(cfg.teacher).with_name(Path(cfg.teacher).name + ".partial")
    train(TrainConfig(data=cfg.data, out=str(unfinished), resume=unfinished.exists(), device=cfg.device,
                      seed=cfg.seed, model=cfg.teacher_model, fit=cfg.teacher_fit))
    if not dist.is_initialized() or dist.get_rank() == 0:
        unfinished.rename(cfg.teacher)
    if dist.is_initialized():
        dist.barrier()


def prepare_stage(stage: str, cfg: DistillConfig, student: LM, teacher: LM, logit_teacher: LM, kind: str) -> tuple[LM, Callable]:
    """What a stage is: the model with only its parameters set to train, and its loss. `kind` of the data decides SFT or DPO."""
    model = wrap(student, teacher if stage == "align" else None)
    if stage == "align":
        set_training(model, lambda name: ".att.student." in name)
        return model, partial(align_loss, kind=cfg.align_kind)
    if stage == "distil":
        frozen = [part for part in cfg.freeze.split(",") if part]
        set_training(model, lambda name: not any(part in name for part in frozen))
        return model, partial(distil_loss, teacher=logit_teacher, kind=cfg.kl_kind, kl_weight=cfg.kl_weight, ce_weight=cfg.ce_weight, kl_chunk=cfg.kl_chunk)
    set_training(model, lambda name: True)
    if kind == "preference":
        reference = copy.deepcopy(student).eval().requires_grad_(False)
        return model, partial(dpo_loss, reference=reference, beta=cfg.dpo_beta, kind=cfg.dpo_kind, smoothing=cfg.dpo_smoothing)
    return model, cross_entropy_loss


@torch.no_grad()
def mean_terms(loss_fn: Callable, model: LM, loader: Loader, max_tokens: int | None, chunk: int | None) -> dict[str, float]:
    """Every term of a loss, as its mean over the held-out targets (over the pairs, for preferences), read `chunk` tokens at a time."""
    sums, count = {}, torch.zeros((), device=next(model.parameters()).device)
    for batch in loader.windows(max_tokens):
        batch, state = batch.to(count.device), None
        for piece in batch.split(chunk):
            terms, state = loss_fn(model, piece, state)
            for name, value in terms.items():
                sums[name] = sums.get(name, 0.0) + value.double()
        count += (batch.mask.sum(1).chunk(2)[0] > 0).sum() if loader.kind == "preference" else batch.mask.sum()
    return {name: (global_sum(value) / global_sum(count)).item() for name, value in sums.items()}


def measure(teacher: LM, student: LM, val: Loader, max_tokens: int | None, chunk: int | None = None) -> dict[str, float]:
    """A row of the report: how the student does on held-out text."""
    result = compare(teacher, student.eval(), val, max_tokens, chunk)
    return {key: result[key] for key in ("val_loss", "gap", "kl", "top1", "top5")}


def read_row(path: Path) -> dict:
    """A finished stage's row. Raises ValueError, with the remedy, for a damaged file."""
    try:
        row = json.loads(path.read_bytes())
        return row | {key: row[key] for key in ("name", "tokens", "minutes", "val_loss", "gap", "kl", "top1", "top5")}
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is damaged: remove it, and --resume measures or finishes that stage again") from None


def calibration_batch(cfg: DistillConfig, T: int, device: torch.device) -> Tensor | None:
    """About 4096 tokens of training text, the same in every process, (B, T), where the student wants to look at its teacher."""
    if cfg.student.decay != "lookback" and not cfg.student.calibrate:
        return None
    loader = Loader(cfg.data, "train", max(1, 4096 // T), T, cfg.seed)
    same_tokenizer(loader, cfg.teacher)
    return loader.step(0)[0][0].x.to(device)


def run_stages(cfg: DistillConfig, student: LM, teacher: LM, logit_teacher: LM, loaders: dict[str, Loader], out: Path, meta: dict) -> list[dict]:
    """Take the student through the stages named in cfg, one folder each; a stage that is done is read back, not run again."""
    val = loaders["val"]
    say = print if val.rank == 0 else lambda *_: None

    def validate() -> dict[str, float]:  # in metrics.jsonl "kl" is the training loss's
        row = measure(teacher, student, val, min(cfg.eval_tokens or 16384, 16384), cfg.distil.bptt_chunk)
        return {key if key == "val_loss" else f"val_{key}": value for key, value in row.items()}

    def note(row: dict, path: Path) -> dict:
        say("after {name}: loss {val_loss:.4f}, gap to the teacher {gap:.4f}, KL {kl:.4f}, top-1 {top1:.1%}".format(**row))
        if val.rank == 0:
            path.with_suffix(".tmp").write_text(json.dumps(row))
            path.with_suffix(".tmp").replace(path)
        return row

    out.mkdir(parents=True, exist_ok=True)
    start = out / "start.json"
    if start.exists():
        rows = [read_row(start)]
    else:
        rows = [note({"name": "start", "tokens": 0, "minutes": 0.0, **measure(teacher, student, val, cfg.eval_tokens, cfg.distil.bptt_chunk)}, start)]
    for stage in STAGES:
        folder = out / stage
        if (folder / "stage.json").exists():  # done before, whether or not it was asked for again
            rows.append(read_row(folder / "stage.json"))
            restore(student, folder)
            if val.rank == 0:
                publish(folder, out)
            continue
        if stage not in cfg.stages.split(","):
            continue
        folder.mkdir(parents=True, exist_ok=True)
        model, loss_fn = prepare_stage(stage, cfg, student, teacher, logit_teacher, loaders[stage].kind)
        held_out = loaders["finish_val"] if stage == "finish" else None
        before = held_out and mean_terms(loss_fn, model.eval(), held_out, cfg.eval_tokens, cfg.finish.bptt_chunk)
        done = fit(model, loss_fn, loaders[stage], getattr(cfg, stage), folder, student, meta, validate if stage == "distil" else None, stage)
        row = {"name": stage, "tokens": done["tokens"], "minutes": done["minutes"], **measure(teacher, student, val, cfg.eval_tokens, cfg.distil.bptt_chunk)}
        if held_out:
            row["finish"] = {"before": before, "after": mean_terms(loss_fn, model.eval(), held_out, cfg.eval_tokens, cfg.finish.bptt_chunk)}
            say("held-out loss of stage 3: {before[loss]:.4f} before, {after[loss]:.4f} after".format(**row["finish"]))
        if val.rank == 0:
            publish(folder, out)
        rows.append(note(row, folder / "stage.json"))
    return rows


WRITES = (*RUN, *STAGES, "controls", "start.json", "ranking.json", "report.json", "report.md", "report.png")  # what a run of distill.py writes


def open_loaders(cfg: DistillConfig, student: LM, logit_teacher: LM, T: int, rank: int, world: int) -> dict[str, Loader]:
    """The text of every stage by its name, and what is held out: val, and finish_val. Refuses what the models cannot read."""
    def load(data: str, half: str, loop: FitConfig, T: int, seed: int) -> Loader:
        loader = Loader(data, half, loop.batch_size, T, seed, rank, world, loop.accum)
        if loader.kind == "preference" and loop is not cfg.finish:
            raise ValueError(f"{data} holds preferences, not text: they are for stage 3, --finish_data")
        check_vocabulary(logit_teacher, student, loader)
        same_tokenizer(loader, cfg.teacher, cfg.logit_teacher or cfg.teacher)
        return loader

    stages = cfg.stages.split(",")
    loaders = {"val": load(cfg.data, "val", replace(cfg.distil, batch_size=16), T, 0)}
    if "align" in stages:  # a stage's seed does not depend on which other stages run
        loaders["align"] = load(cfg.data, "train", cfg.align, T, cfg.seed)
    if "distil" in stages:
        loaders["distil"] = load(cfg.data, "train", cfg.distil, T, cfg.seed + 1)
    if "finish" in stages:
        for name, half in (("finish", "train"), ("finish_val", "val")):
            loaders[name] = load(cfg.finish_data, half, cfg.finish, cfg.finish_block_size or T, cfg.seed + 2)
    return loaders


def open_job(cfg: DistillConfig) -> tuple[LM, LM, LM, dict[str, Loader], dict]:
    """Make what is missing, refuse what cannot be, claim the folder; returns (teacher, teacher of stage 2, student, loaders, meta)."""
    rank, world, device = setup(cfg.device)
    out, stages = Path(cfg.out), cfg.stages.split(",")
    with main_first(rank):
        if rank == 0:
            check_free(out, cfg.resume, cfg.overwrite, WRITES, "checkpoints", (cfg.teacher, cfg.logit_teacher))
        tokenizer = cfg.teacher if Path(cfg.teacher).exists() else "bytes"
        ensure_prepared(cfg.data, tokenizer)
        if "finish" in stages:
            ensure_prepared(cfg.finish_data, tokenizer)
    if not Path(cfg.teacher).exists():
        if rank == 0:
            print(f"{cfg.teacher} is missing: training a teacher first", flush=True)
        train_teacher(cfg)

    teacher = load_model(cfg.teacher, device).eval().requires_grad_(False)
    logit_teacher = load_model(cfg.logit_teacher, device).eval().requires_grad_(False) if cfg.logit_teacher else teacher
    T = cfg.block_size or teacher.cfg.block_size
    torch.manual_seed(cfg.seed)
    student = make_student(teacher, cfg.student, calibration_batch(cfg, T, device), T).to(device)
    if "r" not in student.cfg.mixers:
        raise ValueError(f"mixer = {cfg.student.mixer!r} replaces no layer: put an r where RWKV-7 is to stand, name layers such as first:1, "
                         "or use auto:T with T above the teacher's block_size")
    if cfg.rank_layers and not 0 <= cfg.keep < teacher.cfg.n_layer:
        raise ValueError(f"keep = {cfg.keep}: of {teacher.cfg.n_layer} layers 0 to {teacher.cfg.n_layer - 1} can stay attention")
    for part in filter(None, cfg.freeze.split(",")):
        if not any(part in name for name, _ in student.named_parameters()):
            raise ValueError(f"freeze = {cfg.freeze!r}: no parameter has {part!r} in its name; try emb, att, ffn, ln or head")

    loaders = open_loaders(cfg, student, logit_teacher, T, rank, world)
    if rank == 0:
        print(json.dumps(asdict(cfg)))
        print(f"teacher {cfg.teacher}: {teacher.n_params():,} parameters; student: {student.n_params():,}", flush=True)
        print(describe(student.cfg, T), flush=True)
    with main_first(rank):
        if rank == 0:
            claim(out, cfg.overwrite, WRITES)
    return teacher, logit_teacher, student, loaders, {"tokenizer": loaders["val"].meta["tokenizer"], "teacher": cfg.teacher, "data": cfg.data}


def distill(cfg: DistillConfig) -> dict:
    """Teacher in, RNN out: run the stages into `cfg.out` and return the report; with cfg.rank_layers, rank_layers instead."""
    if cfg.rank_layers:
        return rank_layers(cfg)
    out, stages = Path(cfg.out), cfg.stages.split(",")
    if cfg.controls and not cfg.stages.startswith("align,distil"):
        raise ValueError(f"--controls compares with the stages align,distil, but stages = {cfg.stages!r}: add them")
    teacher, logit_teacher, student, loaders, meta = open_job(cfg)
    val = loaders["val"]
    rows = run_stages(cfg, student, teacher, logit_teacher, loaders, out, meta)

    # the report: the distilled student in full (the last stage may teach it something else), and a row per stage
    described = "distil" if "distil" in stages else stages[-1]
    train_half = Loader(cfg.data, "train", 1, val.T, 0, val.rank, val.W)
    distilled = load_model(out / described, next(teacher.parameters()).device).eval()
    report = make_report(teacher, distilled, train_half, val, cfg.eval_tokens, cfg.distil.bptt_chunk)
    report["student"]["stage"] = described
    report["stages"] = rows
    if cfg.controls:
        report["controls"] = run_controls(cfg, teacher, logit_teacher, loaders, out, meta)
    if val.rank == 0:
        write_report(out, report, {name: Path(folder) / "metrics.jsonl" for name, folder in (("teacher", cfg.teacher), *((s, out / s) for s in stages))})
        print(as_markdown(report))
        print(f"{out}: model, report.json, report.md, report.png. Now: python sample.py --ckpt {out} --prompt \"The \"")
    return report


# ---------------------------------------------------------------------------------------------------------------------
# Which layers to leave attention

def rank_layers(cfg: DistillConfig) -> dict:
    """Stage 1 for all layers at once, what replacing each alone then costs, and a proposal: OUT/ranking/ranking.json, returned as well."""
    if cfg.student.mixer not in ("r", "all"):
        raise ValueError(f"mixer = {cfg.student.mixer!r}: --rank_layers replaces every layer once, so omit --mixer")
    out = Path(cfg.out) / "ranking"
    cfg = replace(cfg, out=str(out), stages="align", controls=False, student=replace(cfg.student, mixer="all"))
    teacher, logit_teacher, student, loaders, meta = open_job(cfg)
    run_stages(cfg, student, teacher, logit_teacher, loaders, out, meta)
    ranking = propose(replacement_costs(student, teacher, loaders["val"], cfg.eval_tokens), cfg.keep)
    if loaders["val"].rank == 0:
        (out / "ranking.json").write_text(json.dumps(ranking, indent=1) + "\n")
        print("\n".join("layer {layer}: replaced alone it costs KL {kl:.4f}, top-1 {top1:.1%}".format(**row) for row in ranking["layers"]))
        print(f"{out}/ranking.json; attention stays best in {ranking['attention']}: python distill.py --mixer {ranking['mixer']}")
    return ranking


@torch.no_grad()
def replacement_costs(student: LM, teacher: LM, val: Loader, max_tokens: int | None) -> list[dict]:
    """What replacing each layer alone costs: KL(teacher || teacher with that mixer), costliest first. `student` has been aligned everywhere.

    v_first is layer 0's, as in stage 1, whichever layer is replaced.
    """
    model, rows = wrap(student, teacher).eval(), []
    for i, block in enumerate(model.blocks):
        block.att.teacher = None                       # here the student's output flows on, elsewhere the teacher's
        result = compare(teacher, model, val, max_tokens)
        block.att.teacher = teacher.blocks[i].att
        rows.append({"layer": i, **{key: result[key] for key in ("kl", "gap", "top1")}})
    return sorted(rows, key=lambda row: -row["kl"])


def propose(rows: list[dict], keep: int) -> dict:
    """Leave the `keep` costliest layers attention: as if costs added up, which they do only roughly."""
    stay = sorted(row["layer"] for row in rows[:keep])
    return {"layers": rows, "keep": keep, "attention": stay, "mixer": "".join("a" if i in stay else "r" for i in range(len(rows)))}


# ---------------------------------------------------------------------------------------------------------------------
# Controls

def run_controls(cfg: DistillConfig, teacher: LM, logit_teacher: LM, loaders: dict[str, Loader], out: Path, meta: dict) -> dict:
    """What the same student tokens give without each idea: a row each, compared with the same teacher."""
    device, t, val = next(teacher.parameters()).device, teacher.cfg, loaders["val"]
    sequences = cfg.align.max_steps * cfg.align.batch_size * cfg.align.accum + cfg.distil.max_steps * cfg.distil.batch_size * cfg.distil.accum
    alone = replace(cfg.distil, max_steps=sequences // (cfg.distil.batch_size * cfg.distil.accum))  # one loop over the tokens of both stages
    cfg = replace(cfg, stages="align,distil")
    rows = {}
    for name, change in {"no stage 1": {"stages": "distil", "distil": alone},
                         "no weight transfer": {"student": replace(cfg.student, transfer=False)},
                         "cross-entropy only": {"kl_weight": 0.0, "ce_weight": 1.0}}.items():
        control = replace(cfg, **change)
        torch.manual_seed(cfg.seed)
        student = make_student(teacher, control.student, calibration_batch(cfg, val.T, device), val.T).to(device)
        done = run_stages(control, student, teacher, logit_teacher, loaders, out / "controls" / name.replace(" ", "-"), meta)
        rows[name] = done[-1] | {key: sum(row[key] for row in done) for key in ("tokens", "minutes")}
    N = t.att_head_size
    scratch = replace(t, mixer="r", ffn="channelmix" if t.ffn == "relu2" else t.ffn, rwkv_head_size=N, rwkv_size=t.n_head * N, block_size=val.T)
    at_its_rate = replace(alone, learning_rate=cfg.teacher_fit.learning_rate, rwkv_lr_multiplier=1.0)
    for name, how in {"RWKV-7 from scratch": {"model": scratch, "fit": at_its_rate},
                      "teacher trained on": {"init": cfg.teacher, "fit": alone}}.items():
        folder = out / "controls" / name.replace(" ", "-")
        done = train(TrainConfig(data=cfg.data, out=str(folder), resume=folder.exists(), seed=cfg.seed, device=cfg.device, **how))
        row = measure(teacher, load_model(folder, device), val, cfg.eval_tokens, cfg.distil.bptt_chunk)
        rows[name] = {"name": name, "tokens": done["tokens"], "minutes": done["minutes"], **row}
    return rows


def main(argv: list[str] | None = None) -> None:
    with joined():
        distill(cli(DistillConfig, argv))


if __name__ == "__main__":
    run(main)
