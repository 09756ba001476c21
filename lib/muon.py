"""Muon: the matrices take steps of equal length in all their directions.

    m <- beta m + (1 - beta) g        momentum
    W <- (1 - lr decay) W - lr 0.2 sqrt(max(rows, columns)) U V^T
                                      where U S V^T = (1 - beta) g + beta m

U V^T is the matrix nearest to U S V^T whose singular values are all 1. The factor gives
it about the size of AdamW's steps, whose learning rates serve both. References: Keller
Jordan, kellerjordan.github.io/posts/muon; arXiv 2502.16982, section 2.2 (the factor).
"""

import torch
from torch import Tensor

from lib.processes import is_part

MOMENTUM = 0.95
AT_ONCE = 2**24          # numbers in matrices that are turned together


class Muon(torch.optim.AdamW):
    """Muon for groups with `muon` set, AdamW for the others.

    torch.optim.Muon turns one matrix at a time, in bfloat16, which takes a small model
    on a CPU several times as long.
    """

    @torch.no_grad()
    def step(self, closure=None):
        alike: dict[torch.Size, list] = {}
        for group in self.param_groups:
            for p in group["params"] if group.get("muon") else ():     # groups of before have no muon
                if p.grad is not None:
                    alike.setdefault(p.shape, []).append((p, group))
        for shape, rows in alike.items():
            n = max(1, AT_ONCE // shape.numel())
            for i in range(0, len(rows), n):
                self.turn(rows[i : i + n])
        return super().step(closure)

    def turn(self, rows: list[tuple[Tensor, dict]]) -> None:
        """A step of matrices of one shape, with their groups; AdamW passes them by."""
        updates = []
        for p, _ in rows:
            state = self.state[p]
            if not state:                                  # AdamW looks for a step in every state
                state |= {"step": torch.zeros(()), "momentum": torch.zeros_like(p)}
            state["momentum"].lerp_(p.grad, 1 - MOMENTUM)
            updates.append(p.grad.lerp(state["momentum"], MOMENTUM))
            p.grad = None
        turned = spread(torch.stack(updates))
        for (p, group), update in zip(rows, turned):
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.add_(update, alpha=-group["lr"] * 0.2 * max(p.shape) ** 0.5)


def spread(G: Tensor) -> Tensor:
    """orthogonal(G). Of matrices of which each process has a part (lib/shard.py), each
    turns whole ones, G's share of them, and gets its parts of all of them back.
    """
    if not is_part(G):
        return orthogonal(G)
    from torch.distributed.tensor import DTensor, Replicate, Shard         # slow to import

    def deal(x: Tensor, placements) -> Tensor:
        if x.device.type == "cpu":                         # gloo has no all-to-all
            x = x.redistribute(placements=[Replicate()])
        return x.redistribute(placements=placements)

    mine = deal(G, [Shard(0)]).to_local()
    turned = DTensor.from_local(orthogonal(mine), G.device_mesh, [Shard(0)], run_check=False, shape=G.shape,
                                stride=G.stride())
    return deal(turned, G.placements)


def orthogonal(G: Tensor) -> Tensor:
    """About U V^T of each G = U S V^T, (n, rows, columns): singular values 0.7 ... 1.2.

    Five Newton-Schulz steps X <- a X + b (X X^T) X + c (X X^T)^2 X, whose coefficients
    drive even small singular values up; in bfloat16 on a GPU.
    """
    tall = G.shape[1] > G.shape[2]
    X = G.mT if tall else G
    X = X / X.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    X = X.bfloat16() if X.is_cuda else X
    for _ in range(5):
        gram = X @ X.mT
        X = 3.4445 * X + (-4.7750 * gram + 2.0315 * gram @ gram) @ X
    return (X.mT if tall else X).to(G.dtype)
