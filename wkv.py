"""The WKV-7 operator: the memory of RWKV-7, and the whole of what replaces attention.

What it is: a matrix S per head that is read, partly erased and written once per token. What it is not: a layer
(no projections, no token shift, no normalisation: those are in model.py).

    S_t = S_{t-1} diag(e^{w_t}) - (S_{t-1} kk_t)(kk_t * a_t)^T + v_t k_t^T          y_t = S_t r_t

Read right to left: S r looks a value up under the key r; v k^T writes the value v under the key k; S kk is the value
now stored under kk, and subtracting (S kk)(kk * a)^T erases a share a of it (a = 1: all of it, the delta rule); e^w fades
each column. A matrix of constant size stands where attention keeps every key and value of the past.

    r   receptance: the key that is read                           (B, T, H, N)
    w   log decay, <= 0, natural logarithm                         (B, T, H, N)
    k   write key                                                  (B, T, H, N)
    v   value                                                      (B, T, H, N)
    kk  removal key, of unit norm per head                         (B, T, H, N)
    a   in-context learning rate, in (0, 1)                        (B, T, H, N)
    S   state, rows are value channels, columns are key channels   (B, H, N, N)

Three forms, one entry `wkv7`:
    loop    the definition, one token after another: the truth that everything else is tested against
    chunk   L tokens at once by matrix products, with its own backward pass; docs/chunking.md derives it, forward and backward
    triton  the same in three GPU kernels, in wkv_triton.py

References: RWKV-7 "Goose", arXiv 2503.14456 (the operator); DeltaNet in chunks, arXiv 2406.06484 (the chunked idea).
"""

import os
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 32       # tokens per chunk; 16 to 64 cost about the same (docs/log.md)
MAX_LOG = 40.0   # the most that log W may fall within a chunk: RWKV-7's e^w >= 0.5452 gives -19.4 over 32 steps, so 1/W <= 3e8
BACKENDS = ("auto", "loop", "chunk", "triton")


def wkv7(r: Tensor, w: Tensor, k: Tensor, v: Tensor, kk: Tensor, a: Tensor, state: Tensor | None = None,
         backend: str = "auto", lowest: float | None = None) -> tuple[Tensor, Tensor]:
    """Run the WKV-7 recurrence over T tokens, from a state to a state; differentiable in every input.

    r, w, k, v, kk, a: (B, T, H, N), any T >= 1. `state`: (B, H, N, N), or None for an empty memory. `lowest`: a bound of w
    that the caller knows, so that w need not be looked at, for which a GPU must stop; None looks.
    Returns y (B, T, H, N) in r's dtype, and the state after the last token, float32 (float64 for float64 inputs).
    Any w <= 0 is right: where decays fall below RWKV-7's bound the chunks get shorter, and then the loop takes over. (But
    compiled kernels that are not told `lowest` take w down to -2.5, and stop for the look.)
    `auto` is triton on a GPU, else chunk, and the loop for a few tokens.
    Raises ValueError for shapes that do not match, an unknown or unusable backend, or w > 0 (not looked for at T = 1).
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is unknown: choose one of {', '.join(BACKENDS)}")
    if r.ndim != 4 or r.shape[1] == 0 or any(x.shape != r.shape for x in (w, k, v, kk, a)):
        raise ValueError(f"r, w, k, v, kk, a must share one shape (B, T>=1, H, N): got {[tuple(x.shape) for x in (r, w, k, v, kk, a)]}")
    B, T, H, N = r.shape
    if state is not None and state.shape != (B, H, N, N):
        raise ValueError(f"state has shape {tuple(state.shape)}: it must be (B, H, N, N) = {(B, H, N, N)}")
    dtype = torch.promote_types(r.dtype, torch.float32)  # bfloat16 in, float32 inside; float64 stays
    state = r.new_zeros(B, H, N, N, dtype=dtype) if state is None else state.to(dtype)
    reason = why_not_triton(r) if backend == "triton" or backend == "auto" and r.is_cuda else ""
    if backend == "auto":
        kernels = r.is_cuda and not reason
        backend = "loop" if T < (2 if kernels else 16) else "triton" if kernels else "chunk"  # short chunks do not pay
    if backend == "triton" and reason:
        raise ValueError(f"backend 'triton' {reason}")
    if r.numel() == 0:
        backend = "loop"
    if lowest is not None and lowest > 0:
        raise ValueError(f"lowest = {lowest}: a bound of log decays is at most 0")
    later = backend == "triton" and lowest is None and torch.compiler.is_compiling()  # a compiled graph can't look; the operator can
    if lowest is None and not later and r.numel() and (T > 1 or backend != "loop"):  # generation goes token by token and is spared the look
        lowest, highest = (x.item() for x in torch.aminmax(w.detach()))
        if highest > 0:
            raise ValueError(f"log decay w reaches {highest:.3g}: it must be <= 0, or the memory grows without end")
    if backend == "triton":
        from wkv_triton import chunk_length, wkv7_triton  # only here: Triton is for Linux, and slow to import
        if L := chunk_length(r.dtype, N, lowest):
            return wkv7_triton(r, w, k, v, kk, a, state, L, look=later)
        backend = "loop"
    inputs = [x.to(dtype) for x in (r, w, k, v, kk, a)]
    y, state = wkv7_loop(*inputs, state) if backend == "loop" else wkv7_chunk(*inputs, state, lowest)
    return y.to(r.dtype), state


def why_not_triton(r: Tensor) -> str:
    """Why the kernels can't run on inputs like r (B, T, H, N); empty if they can."""
    if find_spec("triton") is None:
        return "needs the package triton: pip install triton (Linux)"
    if not r.is_cuda and os.environ.get("TRITON_INTERPRET", "").lower() not in ("1", "true", "on", "y", "yes"):
        return "needs tensors on an NVIDIA GPU, or TRITON_INTERPRET=1 in the environment from the start: use chunk"
    if r.dtype not in (torch.float32, torch.bfloat16, torch.float16) or r.shape[-1] not in (16, 32, 64, 128):
        return f"takes float32, bfloat16 or float16 and heads of 16, 32, 64 or 128, not {str(r.dtype)[6:]} and {r.shape[-1]}: use chunk"
    return ""


def wkv7_loop(r, w, k, v, kk, a, S):
    """The definition. `unbind` and multiply-sum, not slicing and matmul: slices would make backward O(T^2)."""
    ys = []
    row = lambda x: x.unsqueeze(-2).unbind(1)  # noqa: E731   T tensors (B, H, 1, N): along S's columns, its keys
    for r_t, e_t, k_t, v_t, kk_t, b_t in zip(row(r), row(w.exp()), row(k), v.unsqueeze(-1).unbind(1), row(kk), row(kk * a)):
        stored = (S * kk_t).sum(-1, keepdim=True)      # S kk: the value now under this key   (B, H, N, 1)
        S = S * e_t - stored * b_t + v_t * k_t         # fade, erase, write                   (B, H, N, N)
        ys.append((S * r_t).sum(-1))                   # S r                                  (B, H, N)
    return torch.stack(ys, 1), S


# ---------------------------------------------------------------------------------------------------------------------
# The chunked form. Within a chunk of L tokens with start state S0, W_t = prod_{i<=t} e^{w_i}, z = -kk, b = kk * a:
#
#     z~_t = W_{t-1} z_t     r~_t = W_t r_t     b~_t = b_t / W_t     k~_t = k_t / W_t        all (L, N)
#     U    = (I - tril(z~ b~^T, -1))^-1 (z~ S0^T + tril(z~ k~^T, -1) v)      what each token erases
#     y    = r~ S0^T + tril(r~ b~^T) U + tril(r~ k~^T) v
#     S_L  = (S0 + U^T b~ + v^T k~) diag(W_L)
#
# U depends on S0 linearly, U = P S0^T + G, with P and G known for every chunk at once. Only the two small products that
# make U and S_L from them walk through the chunks in order.

def longest_chunk(T: int) -> int:
    """Tokens per chunk of a text of T tokens, where the decays allow it."""
    return min(CHUNK, -(-T // 16) * 16)


def wkv7_chunk(r, w, k, v, kk, a, state, lowest: float):
    """Pad to whole chunks, put the chunks side by side, and run the chunked form with its own backward pass."""
    B, T, H, N = r.shape
    L = longest_chunk(T)
    while L >= 8 and not -lowest * L <= MAX_LOG:  # shorter chunks for faster decays ("not <=": NaN ends in the loop)
        L //= 2
    if L < 8:
        return wkv7_loop(r, w, k, v, kk, a, state)
    n = -(-T // L)

    def chunks(x):  # a view (n, B, H, L, N); zeros beyond T leave S as it is: decay e^0, nothing erased or written
        x = F.pad(x, (0, 0, 0, 0, 0, n * L - T)) if n * L > T else x
        return x.view(B, n, L, H, N).permute(1, 0, 3, 2, 4)

    with torch.autocast(r.device.type, enabled=False):  # float32 stays float32, whatever surrounds the operator
        y, state = WKV7Chunk.apply(*map(chunks, (r, w, k, v, -kk, kk * a)), state)
    return y.permute(1, 0, 3, 2, 4).reshape(B, n * L, H, N)[:, :T], state


class WKV7Chunk(torch.autograd.Function):
    """The chunked form and its gradient. r, w, k, v, z, b: (n, B, H, L, N), n chunks; S: (B, H, N, N)."""

    @staticmethod
    def forward(ctx, r, w, k, v, z, b, S):
        shape, L, S = r.shape, r.shape[3], S.flatten(0, 1)
        w, v = w.flatten(0, 2), v.flatten(0, 2)                                  # one batch of chunks   (nBH, L, N)
        logW = w.cumsum(1)
        decay = torch.cat((logW - w, logW), 1).exp_()                            # W_{t-1}, then W_t     (nBH, 2L, N)
        grow = logW.neg_().exp_().repeat(1, 2, 1)                                # 1 / W_t, twice        (nBH, 2L, N)
        zr = torch.cat((z, r), 3).flatten(0, 2).mul_(decay)                      # z~, r~                (nBH, 2L, N)
        bk = torch.cat((b, k), 3).flatten(0, 2).mul_(grow)                       # b~, k~                (nBH, 2L, N)
        D = decay[:, -1:]                                                        # W_L                   (nBH, 1, N)
        A = (zr @ bk.mT).mul_(causal_mask(L, r))                                 # the four products     (nBH, 2L, 2L)

        # U = P S0^T + G, (P, G) = X (z~, tril(z~ k~^T, -1) v), X = (I - tril(z~ b~^T, -1))^-1 by forward substitution
        X = torch.linalg.solve_triangular(-A[:, :L, :L], torch.eye(L).to(v), upper=False, unitriangular=True)
        P, G = X @ zr[:, :L], X @ (A[:, :L, L:] @ v)

        # Only this walks through the chunks in order: U = P S0^T + G, S_L = (S0 + (U, v)^T (b~, k~)) diag(W_L)
        UVs, states = [], [S]
        for P_i, G_i, v_i, bk_i, D_i in zip(*(x.split(len(S)) for x in (P, G, v, bk, D))):
            UVs.append(torch.cat((torch.baddbmm(G_i, P_i, states[-1].mT), v_i), 1))
            states.append(torch.baddbmm(states[-1], UVs[-1].mT, bk_i).mul_(D_i))
        UV, S, states = torch.cat(UVs), states[-1], torch.cat(states)            # (nBH, 2L, N), (BH, N, N), ((n+1)BH, N, N)

        # y = r~ S0^T + tril(r~ b~^T) U + tril(r~ k~^T) v
        y = torch.baddbmm(zr[:, L:] @ states[:len(v)].mT, A[:, L:], UV)
        ctx.save_for_backward(decay, grow, zr, bk, A, X, P, UV, states)
        return y.view(shape), S.view(shape[1:3] + S.shape[1:])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, dS):
        with torch.autocast(dy.device.type, enabled=False):  # the caller's backward may run inside autocast
            return WKV7Chunk.chain_rule(ctx, dy, dS)

    @staticmethod
    def chain_rule(ctx, dy, dS):
        """The chain rule through the lines above, last to first; dQ is the gradient of Q."""
        decay, grow, zr, bk, A, X, P, UV, states = ctx.saved_tensors
        shape, dy, dS = dy.shape, dy.flatten(0, 2).contiguous(), dS.flatten(0, 1)
        BH, L, D = len(dS), shape[3], decay[:, -1:]

        # The walk back, last chunk first: d(U, v) += (b~, k~) dC^T with dC = dS_L diag(W_L), dS0 = dC + dU^T P + dy^T r~
        dUV = A[:, L:].mT @ dy                                                   # from y                (nBH, 2L, N)
        dS0 = dy.mT @ zr[:, L:]                                                  # from y                (nBH, N, N)
        dends = []
        for dUV_i, bk_i, P_i, D_i, dS0_i in zip(*(x.split(BH)[::-1] for x in (dUV, bk, P, D, dS0))):
            dends.append(dS)
            dC = dS * D_i
            dUV_i.baddbmm_(bk_i, dC.mT)
            dS = dS0_i.add_(dC).baddbmm_(dUV_i[:, :L].mT, P_i)
        dends = torch.cat(dends[::-1])                                           # of each chunk's end   (nBH, N, N)
        dlogD = (dends * states[BH:]).sum(1)                                     #                       (nBH, N)
        dC = dends.mul_(D)

        # U = X Q with Q = z~ S0^T + tril(z~ k~^T, -1) v, and dX = dU Q^T becomes d(z~ b~^T) = X^T dX X^T = dQ U^T
        dQ = X.mT @ dUV[:, :L]
        dv = torch.baddbmm(dUV[:, L:], A[:, :L, L:].mT, dQ)
        # (Q, y) = (z~, r~) S0^T + tril((z~, r~) (b~, k~)^T) (U, v): one shape of product for both
        dQy = torch.cat((dQ, dy), 1)
        dA = (dQy @ UV.mT).mul_(causal_mask(L, dy))
        dzr = torch.baddbmm(dQy @ states[:-BH], dA, bk)
        dbk = torch.baddbmm(UV @ dC, dA.mT, zr)

        # Q~ = Q e^{+-log W}: d log W is +- Q~ dQ~, and log W_t is the sum of w up to t (for z~: up to t-1)
        dz_w, dr_w = zr.mul(dzr).split(L, 1)
        db_w, dk_w = bk.mul(dbk).split(L, 1)
        dlogW = (dz_w + dr_w).sub_(db_w).sub_(dk_w)
        dlogW[:, -1] += dlogD
        dw = dlogW.flip(1).cumsum_(1).flip(1).sub_(dz_w)
        dz, dr = dzr.mul_(decay).split(L, 1)
        db, dk = dbk.mul_(grow).split(L, 1)
        return *(x.view(shape) for x in (dr, dw, dk, dv, dz, db)), dS.view(shape[1:3] + dS.shape[1:])


def causal_mask(L: int, like: Tensor) -> Tensor:
    """(2L, 2L) of 0 and 1: rows z~ then r~, columns b~ then k~. z~ meets earlier tokens only, r~ its own token too."""
    t = torch.arange(L, device=like.device)
    before, upto = (t[:, None] > t), (t[:, None] >= t)
    return torch.cat((before.repeat(1, 2), upto.repeat(1, 2))).to(like.dtype)
