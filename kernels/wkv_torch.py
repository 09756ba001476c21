"""The chunked WKV-7 operator for any device, with a backward pass of its own.

What it is: `backend="torch"` of `wkv7`, the equations of wkv.py's `wkv7_chunk` with
products of one shape put side by side. Plain autograd through `wkv7_chunk` takes 402,
555 and 1,327 ms for B, T = (16, 256), (4, 1024), (1, 4096) and H = 4, N = 64 on two CPU
cores; this takes 172, 152, 159. docs/chunking.md derives it, forward and backward.
Within a chunk of L tokens that starts from the state S0, with W_t = prod_{i<=t}
e^{w_i}, z = -kk and b = kk * a:

    z~_t = W_{t-1} z_t   r~_t = W_t r_t   b~_t = b_t / W_t   k~_t = k_t / W_t     (L, N)
    U    = (I - tril(z~ b~^T, -1))^-1 (z~ S0^T + tril(z~ k~^T, -1) v)
    y    = r~ S0^T + tril(r~ b~^T) U + tril(r~ k~^T) v
    S_L  = (S0 + U^T b~ + v^T k~) diag(W_L)

Row t of U is S_{t-1} z_t, minus what token t finds under its kk. U depends on S0
linearly, U = P S0^T + G, with P and G known for every chunk at once. Only the two small
products that make U and S_L from them walk through the chunks in order.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def wkv7_torch(r, w, k, v, kk, a, state, L: int):
    """Pad to whole chunks of L tokens, put them side by side, and run the form below.

    r, w, k, v, kk, a: (B, T, H, N), float32 or float64; `state`: (B, H, N, N).
    Returns y (B, T, H, N) and the state after the last token. L: kernels.chunk_length.
    """
    B, T, H, N = r.shape
    n = -(-T // L)

    def chunks(x):
        """A view (n, B, H, L, N).

        Zeros beyond T leave S as it is: decay e^0, nothing erased or written.
        """
        x = F.pad(x, (0, 0, 0, 0, 0, n * L - T)) if n * L > T else x
        return x.view(B, n, L, H, N).permute(1, 0, 3, 2, 4)

    y, state = WKV7Chunk.apply(*map(chunks, (r, w, k, v, -kk, kk * a)), state)
    return y.permute(1, 0, 3, 2, 4).reshape(B, n * L, H, N)[:, :T], state


class WKV7Chunk(torch.autograd.Function):
    """The chunked form and its gradient.

    r, w, k, v, z, b: (n, B, H, L, N), n chunks; S: (B, H, N, N).
    """

    @staticmethod
    def forward(ctx, r, w, k, v, z, b, S):
        shape, L = r.shape, r.shape[3]
        S = S.flatten(0, 1)
        w, v = w.flatten(0, 2), v.flatten(0, 2)                   # one batch of chunks (nBH, L, N)
        logW = w.cumsum(1)
        decay = torch.cat((logW - w, logW), 1).exp_()             # W_{t-1}, then W_t (nBH, 2L, N)
        grow = logW.neg_().exp_().repeat(1, 2, 1)                 # 1 / W_t, twice (nBH, 2L, N)
        zr = torch.cat((z, r), 3).flatten(0, 2).mul_(decay)       # z~, r~ (nBH, 2L, N)
        bk = torch.cat((b, k), 3).flatten(0, 2).mul_(grow)        # b~, k~ (nBH, 2L, N)
        D = decay[:, -1:]                                         # W_L (nBH, 1, N)
        A = (zr @ bk.mT).mul_(causal_mask(L, r))                  # the four products (nBH, 2L, 2L)

        # U = P S0^T + G, (P, G) = X (z~, tril(z~ k~^T, -1) v),
        # X = (I - tril(z~ b~^T, -1))^-1 by forward substitution
        X = torch.linalg.solve_triangular(-A[:, :L, :L], torch.eye(L).to(v), upper=False, unitriangular=True)
        P, G = X @ zr[:, :L], X @ (A[:, :L, L:] @ v)

        # Only this walks through the chunks in order: U = P S0^T + G,
        # S_L = (S0 + (U, v)^T (b~, k~)) diag(W_L)
        UVs, states = [], [S]
        for P_i, G_i, v_i, bk_i, D_i in zip(*(x.split(len(S)) for x in (P, G, v, bk, D))):
            UVs.append(torch.cat((torch.baddbmm(G_i, P_i, states[-1].mT), v_i), 1))
            states.append(torch.baddbmm(states[-1], UVs[-1].mT, bk_i).mul_(D_i))
        UV = torch.cat(UVs)                                       # (nBH, 2L, N)
        S, states = states[-1], torch.cat(states)                 # (BH, N, N), ((n+1)BH, N, N)

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
        """The lines of forward, last to first; dQ is the gradient of Q."""
        decay, grow, zr, bk, A, X, P, UV, states = ctx.saved_tensors
        shape, L = dy.shape, dy.shape[3]
        dy, dS = dy.flatten(0, 2).contiguous(), dS.flatten(0, 1)
        BH, D = len(dS), decay[:, -1:]

        # The walk back, last chunk first: d(U, v) += (b~, k~) dC^T with
        # dC = dS_L diag(W_L), and dS0 = dC + dU^T P + dy^T r~
        dUV = A[:, L:].mT @ dy                                    # from y (nBH, 2L, N)
        dS0 = dy.mT @ zr[:, L:]                                   # from y (nBH, N, N)
        dends = []
        for dUV_i, bk_i, P_i, D_i, dS0_i in zip(*(x.split(BH)[::-1] for x in (dUV, bk, P, D, dS0))):
            dends.append(dS)
            dC = dS * D_i
            dUV_i.baddbmm_(bk_i, dC.mT)
            dS = dS0_i.add_(dC).baddbmm_(dUV_i[:, :L].mT, P_i)
        dends = torch.cat(dends[::-1])                            # of each chunk's end (nBH, N, N)
        dlogD = (dends * states[BH:]).sum(1)                      # (nBH, N)
        dC = dends.mul_(D)

        # U = X Q with Q = z~ S0^T + tril(z~ k~^T, -1) v,
        # and dX = dU Q^T becomes d(z~ b~^T) = X^T dX X^T = dQ U^T
        dQ = X.mT @ dUV[:, :L]
        dv = torch.baddbmm(dUV[:, L:], A[:, :L, L:].mT, dQ)
        # (Q, y) = (z~, r~) S0^T + tril((z~, r~)(b~, k~)^T)(U, v): products of one shape
        dQy = torch.cat((dQ, dy), 1)
        dA = (dQy @ UV.mT).mul_(causal_mask(L, dy))
        dzr = torch.baddbmm(dQy @ states[:-BH], dA, bk)
        dbk = torch.baddbmm(UV @ dC, dA.mT, zr)

        # Q~ = Q e^{+-log W}: d log W is +- Q~ dQ~, and log W_t is the sum of w up to t
        # (for z~: up to t-1)
        dz_w, dr_w = zr.mul(dzr).split(L, 1)
        db_w, dk_w = bk.mul(dbk).split(L, 1)
        dlogW = (dz_w + dr_w).sub_(db_w).sub_(dk_w)
        dlogW[:, -1] += dlogD
        dw = dlogW.flip(1).cumsum_(1).flip(1).sub_(dz_w)
        dz, dr = dzr.mul_(decay).split(L, 1)
        db, dk = dbk.mul_(grow).split(L, 1)
        return *(x.view(shape) for x in (dr, dw, dk, dv, dz, db)), dS.view(shape[1:3] + dS.shape[1:])


def causal_mask(L: int, like: Tensor) -> Tensor:
    """(2L, 2L) of 0 and 1: rows z~ then r~, columns b~ then k~.

    z~ meets earlier tokens only, r~ its own token too.
    """
    t = torch.arange(L, device=like.device)
    before, upto = (t[:, None] > t), (t[:, None] >= t)
    return torch.cat((before.repeat(1, 2), upto.repeat(1, 2))).to(like.dtype)
