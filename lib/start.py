"""Where a student's decay and output begin, by rule or by a look at its teacher."""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from model import LM, CausalSelfAttention, TimeMixer


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
    share = -torch.log1p(-1 / n) * math.exp(0.5)   # = sigmoid(w0), as w = -e^-0.5 sigmoid(w0)
    share = share.clamp(max=0.99)                  # RWKV-7 forgets no faster than e^-0.607, n = 2.2
    return torch.logit(share).view(1, 1, -1)


@torch.no_grad()
def look_at_teacher(teacher: LM, student: LM, tokens: Tensor, decay: bool, output: bool) -> None:
    """Set each head's decay and output scale by what attention does with tokens (B, T).

    As in stage 1, each mixer reads what the teacher's attention reads.
    """
    v_first = None
    for i, (x, target) in attention_io(teacher, tokens).items():
        mixer = student.blocks[i].att
        if not isinstance(mixer, TimeMixer):
            continue
        if decay:
            # a head that attends to its last n tokens alike looks back d = (n - 1) / 2:
            # let its channels remember 2 ... 2d + 1
            reach = 2 * lookback(teacher.blocks[i].att, x) + 1
            mixer.w0.copy_(spread_decay(mixer, reach.clamp(min=2.5)))
        heads = []
        hook = mixer.output.register_forward_pre_hook(lambda _, args: heads.append(args[0]))
        _, v_first, _ = mixer(x, v_first, None)
        hook.remove()
        if output:
            target = target if mixer.output.bias is None else target - mixer.output.bias
            scales = head_scales(heads[0].flatten(0, 1), mixer.output.weight, target.flatten(0, 1), mixer.H)
            mixer.output.weight.mul_(scales.repeat_interleave(mixer.N))


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


def head_scales(y: Tensor, W: Tensor, target: Tensor, H: int) -> Tensor:
    """The factors (H,) of y's heads that bring their sum nearest to target (M, C).

    y (M, H N), W (C, H N); the share of head h is u_h = y_h W_h^T. Least squares: solve
    sum_h <u_g, u_h> c_h = <u_g, target>, drawn a little towards 1.
    """
    shares = [y_h @ W_h.T for y_h, W_h in zip(y.chunk(H, 1), W.chunk(H, 1))]
    u = torch.stack(shares).flatten(1).double()                                    # (H, M C)
    gram, wish = u @ u.T, u @ target.flatten().double()
    ridge = 1e-3 * gram.diagonal().mean().clamp(min=1e-9) * torch.eye(H, device=y.device, dtype=u.dtype)
    return torch.linalg.solve(gram + ridge, wish + ridge.sum(1)).to(y.dtype)
