"""Heads of 64 out of smaller ones, exactly: the same logits from a wider model.

llama.cpp computes heads of 64 everywhere; of 32 or 16 channels, depending on the CPU it
was built for, wrongly and without a word. With f = 64 / N, the residual stream stands f
times side by side, and whatever reads it reads its first copy. A head's channels are
followed by zeros in r, w, k, a, so that their products are as before, and by copies of
themselves in v, so that the group norm's mean and variance are.

    again   written to the stream: f copies
    first   read from the stream: the first copy, then zeros
    zeros   each head's channels, then zeros
    copies  each head's channels, f times
    -       not a channel: a token, a rank, an inner channel of the feed-forward layer
"""

from dataclasses import replace

import torch
from torch import Tensor

from model import ModelConfig

HEAD_SIZE = 64

AXES = """
emb             -       again
head            -       first
ln0             again
ln1             again
ln2             again
ln_out          again
att.x_r         -       -       again
att.x_w         -       -       again
att.x_k         -       -       again
att.x_v         -       -       again
att.x_a         -       -       again
att.x_g         -       -       again
att.w0          -       -       zeros
att.a0          -       -       zeros
att.v0          -       -       copies
att.w1          first   -
att.a1          first   -
att.v1          first   -
att.g1          first   -
att.w2          -       zeros
att.a2          -       zeros
att.v2          -       copies
att.g2          -       copies
att.k_k         -       -       zeros
att.k_a         -       -       zeros
att.r_k         -       first
att.receptance  zeros   first
att.key         zeros   first
att.value       copies  first
att.output      again   zeros
att.ln_x        copies
ffn.x_k         -       -       again
ffn.gate        -       first
ffn.key         -       first
ffn.value       again   -
"""
TABLE = {name: axes for name, *axes in map(str.split, AXES.strip().splitlines())}


def factor(cfg: ModelConfig) -> int:
    """How often N fits into a head of 64; 1 where it can't be widened."""
    return max(1, HEAD_SIZE // cfg.rwkv_head_size) if HEAD_SIZE % cfg.rwkv_head_size == 0 else 1


def widened(cfg: ModelConfig) -> ModelConfig:
    """The settings of the wider model, whose ranks and inner widths are the same."""
    f = factor(cfg)
    ranks = {f"rank_{kind}": cfg.rank(kind) for kind in "wavg"}
    return replace(cfg, n_embd=f * cfg.n_embd, rwkv_head_size=f * cfg.rwkv_head_size, rwkv_size=None,
                   ffn_size=cfg.ffn_width, **ranks)


def widened_parameter(name: str, t: Tensor, cfg: ModelConfig) -> Tensor:
    """A parameter of `cfg`'s model as that of the wider one."""
    module = name.removesuffix(".weight").removesuffix(".bias")
    if module.startswith("blocks."):
        module = module.split(".", 2)[2]
    f, n_head = factor(cfg), cfg.rwkv_width // cfg.rwkv_head_size
    for axis, kind in enumerate(TABLE[module]):
        if kind == "-":
            continue
        groups = n_head if kind in ("zeros", "copies") else 1
        t = t.unflatten(axis, (groups, -1))
        copy = t if kind in ("again", "copies") else torch.zeros_like(t)
        t = torch.cat([t, *[copy] * (f - 1)], axis + 1).flatten(axis, axis + 1)
    return t
