"""The oracle of the WKV-7 operator, and inputs for it, random and adversarial.

`equation` is the recurrence of arXiv 2503.14456 and its chain rule, one token after
another in float64 NumPy, sharing no line with wkv.py. Finite differences check it.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F

NAMES = ("r", "w", "k", "v", "kk", "a", "state")
BOUND = -math.exp(-0.5)  # RWKV-7's fastest log decay: e^w = 0.5452


def random_inputs(B=2, T=50, H=2, N=16, decay=None, seed=0):
    """r, w, k, v, kk, a, state in float64.

    Rounded to float32, so that both precisions mean the same numbers.
    """
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g)

    r, k, v = normal(B, T, H, N), normal(B, T, H, N), normal(B, T, H, N)
    kk, a = F.normalize(normal(B, T, H, N), dim=-1), torch.rand(B, T, H, N, generator=g)
    if decay is None:
        w = BOUND * torch.rand(B, T, H, N, generator=g)
    else:
        w = torch.full((B, T, H, N), float(decay))
    return [x.double() for x in (r, w, k, v, kk, a, normal(B, H, N, N))]


def repeated_token(decay, T=4096, N=64):
    """The adversary: one token T times, removed under its write key, a next to 1."""
    r, w, k, v, kk, a, S = random_inputs(B=1, T=1, H=1, N=N, decay=decay)
    a = torch.full_like(a, 0.9999).float().double()
    return [z.expand(1, T, 1, N).contiguous() for z in (r, w, kk, v, kk, a)] + [S]


def upstream(x, seed=1):
    """Gradients for y and the last state: every path through the operator counts."""
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(z.shape, generator=g).double() for z in (x[0], x[-1])]


def equation(x, dy, dS):
    """y, S and the gradients of sum(y dy) + sum(S dS) by the definition, in NumPy."""
    r, w, k, v, kk, a, S = (z.double().numpy() for z in x)
    dy, dS = dy.double().numpy(), dS.double().numpy()
    e, T = np.exp(w), r.shape[1]
    states, y = [S], np.empty_like(r)
    for t in range(T):
        erased = np.einsum("bhij,bhj->bhi", S, kk[:, t])
        S = (S * e[:, t, :, None, :] - np.einsum("bhi,bhj->bhij", erased, kk[:, t] * a[:, t])
             + np.einsum("bhi,bhj->bhij", v[:, t], k[:, t]))
        y[:, t] = np.einsum("bhij,bhj->bhi", S, r[:, t])
        states.append(S)
    out = {"y": y, "S": S}
    dr, dw, dk, dv, dkk, da = (np.empty_like(r) for _ in range(6))
    for t in reversed(range(T)):
        before = states[t]
        dr[:, t] = np.einsum("bhij,bhi->bhj", states[t + 1], dy[:, t])
        dS = dS + np.einsum("bhi,bhj->bhij", dy[:, t], r[:, t])
        dv[:, t] = np.einsum("bhij,bhj->bhi", dS, k[:, t])
        dk[:, t] = np.einsum("bhij,bhi->bhj", dS, v[:, t])
        dw[:, t] = np.einsum("bhij,bhij->bhj", dS, before) * e[:, t]
        db = -np.einsum("bhij,bhi->bhj", dS, np.einsum("bhij,bhj->bhi", before, kk[:, t]))
        derased = -np.einsum("bhij,bhj->bhi", dS, kk[:, t] * a[:, t])
        da[:, t] = db * kk[:, t]
        dkk[:, t] = db * a[:, t] + np.einsum("bhij,bhi->bhj", before, derased)
        dS = dS * e[:, t, :, None, :] + np.einsum("bhi,bhj->bhij", derased, kk[:, t])
    out |= {"d" + n: g for n, g in zip(NAMES, (dr, dw, dk, dv, dkk, da, dS))}
    return {name: torch.from_numpy(z) for name, z in out.items()}


def errors(out, ref):
    """||out - ref|| / ||ref|| of each value and gradient; ||out|| where ref is zero."""
    return {n: ((out[n].double() - ref[n]).norm() / (ref[n].norm() or 1.0)).item() for n in ref}
