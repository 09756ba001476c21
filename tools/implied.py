"""Implied attention: what a TimeMixer's outputs take from each earlier value.

The operator is linear in its values. Unrolled from an empty state, per head,

    y_t = sum_i A_ti v_i     A_ti = k_i^T G_{i+1} ... G_t r_t     i <= t
                             G_t = diag(e^{w_t}) - kk_t (kk_t * a_t)^T

A is what softmax attention would call its map, and exact; but it is signed, and its
rows sum to anything: where a later key is like an earlier one, the delta rule erases,
and A is near 0 or below it. Norm, bonus and gate come after it and have no part in it.

    r, w, k, v, kk, a: (T, H, N)   the arguments of wkv7, of one text
    A, attention's map: (H, T, T)  row t reads, column i is read
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

import model as chapter
from model import LM, CausalSelfAttention, TimeMixer, shift


@dataclass
class Seen:
    """What a mixer read, and for a TimeMixer what it gave to wkv7 and got from it."""
    x: Tensor                                        # (1, T, C)
    inputs: tuple[Tensor, ...] | None                # r, w, k, v, kk, a
    y: Tensor | None                                 # the operator's output, (T, H, N)


@dataclass
class Mixing:
    """One layer on one text: its map, and for a TimeMixer what its memory did."""
    letter: str                                      # a = attention, r = RWKV-7
    map: Tensor                                      # (H, T, T)
    half_lives: Tensor | None = None                 # (H, N)  tokens, from the mean decay
    rate: Tensor | None = None                       # (H, T)  a, mean over channels
    share: Tensor | None = None                      # (H, T)  of v_first in the values
    norm: Tensor | None = None                       # (H, T)  Frobenius norm of S_t


@contextlib.contextmanager
def listening(model: LM) -> Iterator[dict[int, Seen]]:
    """What each mixer of the model reads in the block, by layer."""
    seen, calls, wkv7 = {}, [], chapter.wkv7

    def recorded(*inputs, **settings):
        y, state = wkv7(*inputs, **settings)
        calls.append((tuple(x[0].double() for x in inputs[:6]), y[0].double()))
        return y, state

    def note(layer: int):
        def hook(mixer, args, result):
            called = calls.pop() if isinstance(mixer, TimeMixer) else (None, None)
            seen[layer] = Seen(args[0], *called)
        return hook

    hooks = [block.att.register_forward_hook(note(i)) for i, block in enumerate(model.blocks)]
    chapter.wkv7 = recorded
    try:
        yield seen
    finally:
        chapter.wkv7 = wkv7
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def read(model: LM, tokens: list[int]) -> tuple[Tensor, list[Mixing]]:
    """The logits (T, V) of a text, and what its layers did."""
    with listening(model) as seen:
        logits, _ = model(torch.tensor([tokens], device=model.emb.weight.device))
    layers = [mixing(block.att, seen[i]) for i, block in enumerate(model.blocks)]
    return logits[0].double().cpu(), layers


def mixing(mixer: CausalSelfAttention | TimeMixer, seen: Seen) -> Mixing:
    if isinstance(mixer, CausalSelfAttention):
        return Mixing("a", attention_map(mixer, seen.x).cpu())
    r, w, k, v, kk, a = seen.inputs
    share = None if mixer.first else v_first_share(mixer, seen.x).unflatten(-1, a.shape[1:]).mean(-1).T.cpu()
    return Mixing("r", implied_attention(r, w, k, kk, a).cpu(), half_lives(w).cpu(), a.mean(-1).T.cpu(),
                  share, state_norms(w, k, v, kk, a).cpu())


def attention_map(att: CausalSelfAttention, x: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(N)) over the past and present of x (1, T, C)."""
    q, k, _ = att.qkv(x, 0)
    scores = q[0].double() @ k[0].double().repeat_interleave(att.n_head // att.n_kv, 0).mT / math.sqrt(att.N)
    future = torch.ones_like(scores[0], dtype=torch.bool).triu(1)
    return scores.masked_fill(future, -math.inf).softmax(-1)


def implied_attention(r: Tensor, w: Tensor, k: Tensor, kk: Tensor, a: Tensor) -> Tensor:
    """A, from the last token to the first: all that reads behind i goes through G_i.

    G u = e^w * u - kk ((kk * a)^T u), for u = G_{i+1} ... G_t r_t of every t >= i.
    """
    T, H, _ = r.shape
    A, u = r.new_zeros(H, T, T), r.transpose(0, 1).clone()               # u (H, T, N)
    r, w, k, kk, a = (x.transpose(0, 1)[:, :, None] for x in (r, w, k, kk, a))   # (H, T, 1, N)
    for i in reversed(range(T)):
        A[:, i:, i] = (u[:, i:] * k[:, i]).sum(-1)
        erased = (u[:, i:] * kk[:, i] * a[:, i]).sum(-1, keepdim=True)
        u[:, i:] = w[:, i].exp() * u[:, i:] - kk[:, i] * erased
    return A


def state_norms(w: Tensor, k: Tensor, v: Tensor, kk: Tensor, a: Tensor) -> Tensor:
    """||S_t|| (H, T), by the definition in wkv.py."""
    T, H, N = w.shape
    S, norms = w.new_zeros(H, N, N), []
    for t in range(T):
        stored = S @ kk[t, :, :, None]                                   # (H, N, 1)
        S = S * w[t, :, None].exp() - stored * (kk[t] * a[t])[:, None] + v[t, :, :, None] * k[t, :, None]
        norms.append(S.flatten(1).norm(dim=1))
    return torch.stack(norms, 1)


def half_lives(w: Tensor) -> Tensor:
    """Tokens until a channel has faded by half at its mean log decay: (H, N)."""
    return math.log(2) / -w.mean(0).clamp(max=-1e-12)


def v_first_share(mixer: TimeMixer, x: Tensor) -> Tensor:
    """How much of each value is v_first's, (T, A): the sigmoid in TimeMixer.forward."""
    x_v = torch.addcmul(x, shift(x, None) - x, mixer.x_v)
    return torch.sigmoid(mixer.v0 + (x_v @ mixer.v1) @ mixer.v2)[0].double()


def correlations(A: Tensor, B: Tensor) -> list[float | None]:
    """Pearson's, per head, over all pairs of a token and one not behind it.

    None where a map has the same value everywhere.
    """
    i, j = torch.tril_indices(*A.shape[1:])
    a, b = (x[:, i, j] - x[:, i, j].mean(-1, keepdim=True) for x in (A, B))
    products, sizes = (a * b).sum(-1).tolist(), (a.norm(dim=-1) * b.norm(dim=-1)).tolist()
    return [product / size if size > 1e-12 else None for product, size in zip(products, sizes)]
