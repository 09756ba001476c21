"""A student's shape, and where its mixers begin: by rule, a look at its teacher, or as
another's.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from lib.hybrid import mixer_letters
from lib.processes import part_of
from lib.shard import gathered, in_turn, load_like, precision_of
from model import MIN_LOG_DECAY, LM, CausalSelfAttention, ModelConfig, TimeMixer

LOOK = 4096  # tokens whose inputs and outputs of all layers exist at once


def student_shape(t: ModelConfig, cfg) -> ModelConfig:
    """The shape of a StudentConfig's student, whose teacher has the shape t.

    Raises ValueError for a teacher that it cannot have.
    """
    if "r" in t.mixers:
        raise ValueError("the teacher has RWKV layers already: only attention can be replaced")
    ffn = cfg.ffn or ("channelmix" if t.ffn == "relu2" else t.ffn)
    if ffn != t.ffn and (ffn, t.ffn) != ("channelmix", "relu2"):
        raise ValueError(f"a student with ffn {ffn} cannot take over the teacher's {t.ffn}: omit --ffn")
    if cfg.rwkv_rope and t.att_head_size % 2:
        raise ValueError("rwkv_rope turns pairs of channels, and the teacher's heads have "
                         f"{t.att_head_size}: omit it")
    shape = replace(t, ffn=ffn, gate=cfg.gate, group_norm=cfg.group_norm, token_shift=cfg.token_shift,
                    bonus=cfg.bonus, rwkv_rope=cfg.rwkv_rope, tied=t.tied and not cfg.untie_head,
                    rwkv_head_size=t.att_head_size, rwkv_size=t.n_head * t.att_head_size)
    return replace(shape, mixer=mixer_letters(shape, cfg.mixer))


def tune_mixers(teacher: LM, student: LM, cfg, tokens: Tensor | None, longest: int) -> None:
    """What transferred weights do not say, as a StudentConfig has it.

    Decays that remember up to `longest` tokens, or a look at the teacher with tokens
    (B, T); or the mixers of another student.
    """
    if cfg.decay == "spread":
        for (block,) in in_turn(student.blocks):
            if isinstance(block.att, TimeMixer):
                block.att.w0.data = spread_decay(block.att, longest)
    if cfg.aligned:
        take_mixers(student, cfg.aligned)
    if cfg.looks:
        look_at_teacher(teacher, student.to(tokens.device), tokens, cfg.decay == "lookback", cfg.calibrate)


def copy_linear(m: nn.Linear, t: nn.Linear, N: int = 1, repeat: int = 1, scale: float = 1.0) -> None:
    """Give m the weight and bias of t times `scale`.

    Each head of N rows comes `repeat` times, one after another.
    """
    for p, q in zip(m.parameters(), t.parameters()):
        heads = q.unflatten(0, (-1, N)).repeat_interleave(repeat, 0)
        p.copy_(heads.flatten(0, 1) * scale)


def spread_decay(m: TimeMixer, longest: int | Tensor) -> Tensor:
    """w0 (1, 1, A) so that a head's channels remember n = 2 ... `longest` tokens,
    evenly in log n.

    e^w = 1 - 1/n, whose powers sum to n. `longest` is a number, or one per head, (H,).
    """
    longest = torch.as_tensor(longest, device=m.w0.device).expand(m.H)[:, None]    # (H, 1)
    n = 2 * (longest / 2) ** torch.linspace(0, 1, m.N, device=m.w0.device)         # (H, N)
    share = torch.log1p(-1 / n) / MIN_LOG_DECAY    # = sigmoid(w0), as w = -e^-0.5 sigmoid(w0)
    share = share.clamp(max=0.99)                  # RWKV-7 forgets no faster than e^-0.607, n = 2.2
    return torch.logit(share).view(1, 1, -1)


@torch.no_grad()
def take_mixers(student: LM, folder: str) -> None:
    """Give the student's RWKV-7 layers the mixers that a model folder has in their
    places.

    Raises ValueError where it has attention there, or is of another shape.
    """
    given = load_like(student, folder)
    if replace(given.cfg, mixer=student.cfg.mixer) != student.cfg:
        raise ValueError(f"aligned = {folder}: it is no student of this teacher with these settings")
    for i, (block, source) in enumerate(in_turn(student.blocks, given.blocks)):
        if isinstance(block.att, TimeMixer):
            if not isinstance(source.att, TimeMixer):
                raise ValueError(f"aligned = {folder}: its layer {i} is attention; name one whose layers "
                                 "are all RWKV-7")
            block.att.load_state_dict(source.att.state_dict(), strict=False)   # first: no value residual


@torch.no_grad()
def look_at_teacher(teacher: LM, student: LM, tokens: Tensor, decay: bool, output: bool) -> None:
    """Set each head's decay and each output map by what attention does with tokens
    (B, T).

    As in stage 1, each mixer reads what the teacher's attention reads.
    """
    mixers = {i: block.att for i, block in enumerate(student.blocks) if isinstance(block.att, TimeMixer)}
    if decay:
        seen = attention_io(teacher, tokens[: max(1, LOOK // tokens.shape[1])])
        for i, mixer in mixers.items():
            # a head that attends to its last n tokens alike looks back d = (n - 1) / 2:
            # let its channels remember 2 ... 2d + 1
            with gathered(mixer, teacher.blocks[i].att):
                reach = 2 * lookback(teacher.blocks[i].att, seen[i][0]) + 1
                mixer.w0.copy_(spread_decay(mixer, reach.clamp(min=2.5)))
    if output:
        fits = {i: LeastSquares(mixer.output) for i, mixer in mixers.items()}
        for row in tokens.split(1):
            v_first = None
            for i, (x, target) in attention_io(teacher, row).items():
                if i in fits:
                    with fits[i].listening(target), precision_of(student, x):
                        _, v_first, _ = mixers[i](x, v_first, None)
        for fit in fits.values():
            fit.solve()


class LeastSquares:
    """A linear map m (A -> C) that is to bring what it reads, y, nearest to a target.

    m's weight W becomes W + E^T Y (Y^T Y + ridge)^-1, E = target - m(Y): the least
    squares solution, drawn a little towards what m was.
    """

    RIDGE = 1e-3                                   # of the mean of Y^T Y's diagonal

    def __init__(self, m: nn.Linear):
        self.m, (C, A) = m, m.weight.shape
        how = {"dtype": torch.float64, "device": m.weight.device}
        self.gram, self.cross = torch.zeros(A, A, **how), torch.zeros(C, A, **how)

    @contextlib.contextmanager
    def listening(self, target: Tensor) -> Iterator[None]:
        """Note what m reads and gives meanwhile, beside what it should give."""
        hook = self.m.register_forward_hook(lambda m, args, out: self.note(args[0], target.float() - out))
        yield
        hook.remove()

    def note(self, y: Tensor, error: Tensor) -> None:
        y, error = y.flatten(0, 1).double(), error.flatten(0, 1).double()
        self.gram += y.T @ y
        self.cross += error.T @ y

    def solve(self) -> None:
        mean = self.gram.diagonal().mean().clamp(min=1e-9)
        ridge = self.RIDGE * mean * torch.eye(len(self.gram), dtype=torch.float64, device=self.gram.device)
        change = torch.linalg.solve(self.gram + ridge, self.cross.T).T
        self.m.weight.add_(part_of(change.to(self.m.weight.dtype), self.m.weight))


def attention_io(model: LM, tokens: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
    """For each layer what goes into its mixer and what comes out, each (B, T, C)."""
    seen: dict[int, tuple[Tensor, Tensor]] = {}

    def note(layer: int):
        return lambda module, args, result: seen.update({layer: (args[0], result[0])})

    hooks = [block.att.register_forward_hook(note(i)) for i, block in enumerate(model.blocks)]
    model.hidden(tokens)
    for hook in hooks:
        hook.remove()
    return seen


def lookback(att: CausalSelfAttention, x: Tensor) -> Tensor:
    """How many tokens back each head looks on average, reading x (B, T, C): (H,).

    Attention to position s of all positions 0 ... t, with s itself as the value, says
    where it looks: sum_s p_ts s.
    """
    q, k, _ = att.qkv(x, 0)
    position = torch.arange(x.shape[1], device=x.device, dtype=q.dtype)
    values = position[:, None].expand_as(k)
    grouped = att.n_kv < att.n_head
    # where each position looks, (B, H, T)
    mean = F.scaled_dot_product_attention(q, k, values, is_causal=True, enable_gqa=grouped)[..., 0]
    return (position - mean).mean((0, 2))
