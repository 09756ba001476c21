"""The WKV-7 operator in Triton: the chunked form of wkv.py as three kernels.

What it is: `backend="triton"` of `wkv7`, forward and backward, for NVIDIA GPUs; with
TRITON_INTERPRET=1 it runs on a CPU, slowly, which is how the tests check it everywhere.
What it is not: autotuned; the launch settings are those of `launch_plan`.

In wkv.py a chunk of L tokens that starts from state S erases U = P S^T + E v, where,
with z~, r~, b~, k~ all (L, N),

    A_zb = tril(z~ b~^T, -1)   A_zk = tril(z~ k~^T, -1)   X = (I - A_zb)^-1
    A_rb = tril(r~ b~^T)       A_rk = tril(r~ k~^T)       P = X z~          E = X A_zk

and y = r~ S^T + A_rb U + A_rk v. In 16 bits this loses the answer where a token
repeats: U undoes what the v before it wrote, so that 32 terms of size 1 cancel to 1,
each rounded to 2^-9. Therefore U is put in, which folds what a chunk erases into its
keys; the terms cancel among keys,

    R = r~ + A_rb P            F = A_rk + A_rb E          K = k~ + E^T b~

in near float32. What is left touches values, in their precision (docs/chunking.md, 8):

    y = R S^T + F v            S_L = (S + (P S^T)^T b~ + v^T K) diag(D)         D = W_L

    walk        forward: S in registers, chunk after chunk; writes y, and for the
                backward pass the state before each chunk
    walk_back   backward: dS in registers, last chunk first; writes the gradient of
                the state after each chunk
    gradients   every chunk at once, from the state before it and the dS after it

Rows of S, its value channels, never meet in the walks: a program holds BV of them.
Where heads are too few to fill the chip, the text is also cut into segments that are
walked side by side (see `walk`).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import MAX_LOG

MODES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
LOG2E = tl.constexpr(1.4426950408889634)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)    # TRITON_INTERPRET=1 when this file was imported


# ------------------------------------------------------------------------------------------
# Two precisions of product; both sum in float32

@triton.jit
def cast(x, dtype: tl.constexpr):
    """x in `dtype`, rounded to nearest.

    The interpreter would cut bfloat16 off, slowly: rounded by hand, it stays float32.
    """
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.float32).to(tl.int32, bitcast=True)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def dot(x, y, MODE: tl.constexpr):
    """Where values meet: in the inputs' precision.

    1/W leaves float16's range, so float16 is multiplied as float32.
    """
    if MODE == "bf16":
        return tl.dot(cast(x, tl.bfloat16), cast(y, tl.bfloat16))
    else:
        return dot32(x.to(tl.float32), y.to(tl.float32), MODE)


@triton.jit
def dot32(x, y, MODE: tl.constexpr):
    """Among keys: near float32.

    A float32 is split into a high and a low half of 8 (bfloat16) or 11 bits (tf32x3).
    """
    if MODE == "bf16":
        x1, y1 = cast(x, tl.bfloat16), cast(y, tl.bfloat16)
        out = tl.dot(x1, y1)
        if x.dtype != tl.bfloat16:
            out += tl.dot(cast(x - x1.to(tl.float32), tl.bfloat16), y1)
        if y.dtype != tl.bfloat16:
            out += tl.dot(x1, cast(y - y1.to(tl.float32), tl.bfloat16))
        return out
    else:
        return tl.dot(x, y, input_precision="ieee" if MODE == "fp32" else "tf32x3")


# ------------------------------------------------------------------------------------------
# One chunk of one head

@triton.jit
def place(head, T, H, N: tl.constexpr):
    """Where head number `head` of B H starts in a tensor (B, T, H, N)."""
    return (head // H).to(tl.int64) * T * H * N + head % H * N


@triton.jit
def load(x, t, T, stride, n):
    """Rows t, columns n of x (T, N).

    Behind T come zeros, which leave the state as it is: decay e^0, nothing written.
    """
    return tl.load(x + t[:, None] * stride + n[None, :], mask=(t < T)[:, None], other=0.0).to(tl.float32)


@triton.jit
def store(x, value, t, T, stride, n):
    tl.store(x + t[:, None] * stride + n[None, :], cast(value, x.dtype.element_ty), mask=(t < T)[:, None])


@triton.jit
def weigh(r, w, k, kk, a, start, t, T, stride, n, MODE: tl.constexpr):
    """z~, r~, b~, k~ (L, N), log W (L, N), log D (N).

    The first four are rounded here, once: all later steps see the same. Logarithms are
    to base 2 in this file, the base in which the hardware takes powers.
    """
    w = load(w + start, t, T, stride, n) * LOG2E
    kk = load(kk + start, t, T, stride, n)
    logW = tl.cumsum(w, 0)
    z_ = -kk * tl.exp2(logW - w)
    r_ = load(r + start, t, T, stride, n) * tl.exp2(logW)
    b_ = kk * load(a + start, t, T, stride, n) * tl.exp2(-logW)
    k_ = load(k + start, t, T, stride, n) * tl.exp2(-logW)
    if MODE == "bf16":
        z_, r_ = cast(z_, tl.bfloat16), cast(r_, tl.bfloat16)
        b_, k_ = cast(b_, tl.bfloat16), cast(k_, tl.bfloat16)
    return z_, r_, b_, k_, logW, tl.sum(w, 0)


@triton.jit
def inverse(A, L: tl.constexpr, MODE: tl.constexpr):
    """X = (I - A)^-1 for A (L, L) strictly lower triangular.

    From exact inverses of its diagonal blocks of 1, 2, 4, ... L: two neighbours become
    one block by X + X O X, O the quarter of A that joins them. No power of A is formed.
    """
    i, j = tl.arange(0, L)[:, None], tl.arange(0, L)[None, :]
    X = tl.where(i == j, 1.0, 0.0) + tl.where((i // 2 == j // 2) & (i != j), A, 0.0)
    for e in tl.static_range(1, 6):
        if 2**e < L:
            joins = (i // 2 ** (e + 1) == j // 2 ** (e + 1)) & (i // 2**e != j // 2**e)
            X += dot32(dot32(X, tl.where(joins, A, 0.0), MODE), X, MODE)
    return X


@triton.jit
def fold(z_, r_, b_, k_, L: tl.constexpr, MODE: tl.constexpr):
    """The chunk's matrices, float32: X, A_rb, P, E, R, F, K.

    What a kernel does not use the compiler leaves out.
    """
    i, j = tl.arange(0, L)[:, None], tl.arange(0, L)[None, :]
    A_zb = tl.where(i > j, dot32(z_, tl.trans(b_), MODE), 0.0)
    A_zk = tl.where(i > j, dot32(z_, tl.trans(k_), MODE), 0.0)
    A_rb = tl.where(i >= j, dot32(r_, tl.trans(b_), MODE), 0.0)
    A_rk = tl.where(i >= j, dot32(r_, tl.trans(k_), MODE), 0.0)
    X = inverse(A_zb, L, MODE)
    P = dot32(X, z_, MODE)
    E = dot32(X, A_zk, MODE)
    R = r_ + dot32(A_rb, P, MODE)
    F = A_rk + dot32(A_rb, E, MODE)
    K = k_ + dot32(tl.trans(E), b_, MODE)
    return X, A_rb, P, E, R, F, K


# ------------------------------------------------------------------------------------------
# The walks. Tensors are (B, T, H, N), contiguous. A program has BV rows of S, and m
# chunks of one head

@triton.jit
def walk(r, w, k, v, kk, a, S_first, jumps, y, states, S_last, T, H, chunks, m, segments,
         N: tl.constexpr, L: tl.constexpr, BV: tl.constexpr, MODE: tl.constexpr,
         PROBE: tl.constexpr, SAVE: tl.constexpr):
    """The forward pass over one segment, which makes S M + C of the state S before it.

    M and C are (N, N). With several segments there are two launches. The first (PROBE)
    walks all segments at once, from rows of zeros, which gives C, and without values
    from the rows of the identity, which gives M. In the second, every program jumps
    over the segments before its own by these and then walks its own. jumps: (BH,
    segments, (C, M) 2N, N).
    """
    head, segment = tl.program_id(0) // segments, tl.program_id(0) % segments
    n, rows = tl.arange(0, N), tl.program_id(1) * BV + tl.arange(0, BV)
    start, stride, square = place(head, T, H, N), H * N, rows[:, None] * N + n[None, :]
    head = head.to(tl.int64)
    if PROBE:
        S = tl.where(rows[:, None] - N == n[None, :], 1.0, 0.0)                       # (BV, N)
    else:
        S = tl.load(S_first + head * N * N + square)
        for i in range(segment):
            jump = jumps + (head * segments + i) * 2 * N * N
            S = tl.load(jump + square) + dot32(S, tl.load(jump + N * N + n[:, None] * N + n[None, :]), MODE)

    for c in range(segment * m, min(segment * m + m, chunks)):
        t = (c * L + tl.arange(0, L)).to(tl.int64)
        z_, r_, b_, k_, logW, logD = weigh(r, w, k, kk, a, start, t, T, stride, n, MODE)
        _, _, P, _, R, F, K = fold(z_, r_, b_, k_, L, MODE)
        valid = (t < T)[:, None] & (rows < N)[None, :]
        values = tl.load(v + start + t[:, None] * stride + rows[None, :], mask=valid, other=0.0)  # (L, BV)
        if SAVE:
            tl.store(states + (head * chunks + c) * N * N + square, cast(S, states.dtype.element_ty))
        if not PROBE:                                                                 # y = R S^T + F v
            out = cast(dot(R, tl.trans(S), MODE) + dot(F, values, MODE), y.dtype.element_ty)
            tl.store(y + start + t[:, None] * stride + rows[None, :], out, mask=valid)
        # S_L = (S + (P S^T)^T b~ + v^T K) diag(D)
        S += dot(tl.trans(dot(P, tl.trans(S), MODE)), b_, MODE) + dot(tl.trans(values), K, MODE)
        S *= tl.exp2(logD)[None, :]

    if PROBE:
        tl.store(jumps + (head * segments + segment) * 2 * N * N + square, S)
    elif segment == segments - 1:
        tl.store(S_last + head * N * N + square, S)


@triton.jit
def walk_back(r, w, k, kk, a, dy, dS_last, jumps, jumps_back, dstates, dS_first, T, H, chunks, m, segments,
              N: tl.constexpr, L: tl.constexpr, BV: tl.constexpr, MODE: tl.constexpr, PROBE: tl.constexpr):
    """The way back over one segment, from the gradient dS after it to dS M^T + C'.

    jumps_back: C' (BH, segments, N, N).
    """
    head, segment = tl.program_id(0) // segments, tl.program_id(0) % segments
    n, rows = tl.arange(0, N), tl.program_id(1) * BV + tl.arange(0, BV)
    start, stride, square = place(head, T, H, N), H * N, rows[:, None] * N + n[None, :]
    head = head.to(tl.int64)
    if PROBE:
        dS = tl.zeros((BV, N), tl.float32)
    else:
        dS = tl.load(dS_last + head * N * N + square)
        for later in range(segments - 1 - segment):
            i = head * segments + segments - 1 - later
            M_T = tl.load(jumps + i * 2 * N * N + N * N + n[None, :] * N + n[:, None])
            dS = tl.load(jumps_back + i * N * N + square) + dot32(dS, M_T, MODE)

    end = min(segment * m + m, chunks)
    for i in range(end - segment * m):
        c = end - 1 - i
        t = (c * L + tl.arange(0, L)).to(tl.int64)
        z_, r_, b_, k_, logW, logD = weigh(r, w, k, kk, a, start, t, T, stride, n, MODE)
        _, _, P, _, R, _, _ = fold(z_, r_, b_, k_, L, MODE)
        if not PROBE:
            tl.store(dstates + (head * chunks + c) * N * N + square, cast(dS, dstates.dtype.element_ty))
        # dS = dC + (dC b~^T) P + dy^T R, dC = dS_L diag(D)
        dS *= tl.exp2(logD)[None, :]
        dy_T = tl.trans(load(dy + start, t, T, stride, rows))
        dS += dot(dot(dS, tl.trans(b_), MODE), P, MODE) + dot(dy_T, R, MODE)

    if PROBE:
        tl.store(jumps_back + (head * segments + segment) * N * N + square, dS)
    elif segment == 0:
        tl.store(dS_first + head * N * N + square, dS)


# ------------------------------------------------------------------------------------------
# The gradients: the chain rule through one chunk, from the lines above, last to first;
# dQ is the gradient of Q

@triton.jit
def gradients(r, w, k, v, kk, a, dy, states, dstates, dr, dw, dk, dv, dkk, da, T, H, chunks,
              N: tl.constexpr, L: tl.constexpr, BV: tl.constexpr, MODE: tl.constexpr):
    """Of r, w, k, v, kk and a. A program has one chunk of one head."""
    head, c = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    n, start, stride = tl.arange(0, N), place(head, T, H, N), H * N
    t = (c * L + tl.arange(0, L)).to(tl.int64)
    z_, r_, b_, k_, logW, logD = weigh(r, w, k, kk, a, start, t, T, stride, n, MODE)
    X, A_rb, P, E, R, F, K = fold(z_, r_, b_, k_, L, MODE)
    dR, dP, dK, db, dF, dlogD = through_values(v + start, dy + start, dv + start, states, dstates, b_, logD,
                                               P, F, K, t, T, stride, n, N, L, BV, MODE)

    # Read again: kept over the loop above, they would spill from the registers
    z_, r_, b_, k_, logW, logD = weigh(r, w, k, kk, a, start, t, T, stride, n, MODE)
    dA_rb, dA_rk, dA_zk, dA_zb, db, dz = through_keys(b_, X, A_rb, P, E, dR, dP, dK, db, dF, L, MODE)

    # The four A = tril((z~, r~)(b~, k~)^T). Q~ = Q e^{+-log W}, so d log W is +- Q~ dQ~
    dr_ = dR + dot32(dA_rb, b_, MODE) + dot32(dA_rk, k_, MODE)
    dlogW = r_ * dr_
    store(dr + start, dr_ * tl.exp2(logW), t, T, stride, n)
    dk_ = dK + dot32(tl.trans(dA_zk), z_, MODE) + dot32(tl.trans(dA_rk), r_, MODE)
    dlogW -= k_ * dk_
    store(dk + start, dk_ * tl.exp2(-logW), t, T, stride, n)
    db += dot32(tl.trans(dA_zb), z_, MODE) + dot32(tl.trans(dA_rb), r_, MODE)
    dlogW -= b_ * db
    dz += dot32(dA_zb, b_, MODE) + dot32(dA_zk, k_, MODE)
    dlogW += z_ * dz
    # log W_t is the sum of w up to t (for z~: up to t-1), log D the sum of all
    store(dw + start, tl.cumsum(dlogW, 0, reverse=True) + dlogD[None, :] - z_ * dz, t, T, stride, n)
    # z = -kk, b = kk * a
    db *= tl.exp2(-logW)
    dz *= tl.exp2(logW - load(w + start, t, T, stride, n) * LOG2E)
    store(da + start, load(kk + start, t, T, stride, n) * db, t, T, stride, n)
    store(dkk + start, load(a + start, t, T, stride, n) * db - dz, t, T, stride, n)


@triton.jit
def through_values(v, dy, dv, states, dstates, b_, logD, P, F, K, t, T, stride, n,
                   N: tl.constexpr, L: tl.constexpr, BV: tl.constexpr, MODE: tl.constexpr):
    """dR, dP, dK, a part of db~, dF, d log D; and writes dv. BV rows of S at a time.

    y = R S^T + F v    C = S + (P S^T)^T b~ + v^T K    S_L = C diag(D)
    """
    zero = tl.zeros((L, N), tl.float32)
    dR, dP, dK, db = zero, zero, zero, zero
    dF, dlogD = tl.zeros((L, L), tl.float32), tl.zeros((N,), tl.float32)
    for first in tl.static_range(0, N, BV):
        rows = first + tl.arange(0, BV)
        square = tl.program_id(0).to(tl.int64) * N * N + rows[:, None] * N + n[None, :]
        S = tl.load(states + square).to(tl.float32)                                   # (BV, N)
        dC = tl.load(dstates + square).to(tl.float32) * tl.exp2(logD)[None, :]        # (BV, N)
        values, dout = load(v, t, T, stride, rows), load(dy, t, T, stride, rows)      # (L, BV)
        store(dv, dot(tl.trans(F), dout, MODE) + dot(K, tl.trans(dC), MODE), t, T, stride, rows)
        dR += dot(dout, S, MODE)
        dF += dot(dout, tl.trans(values), MODE)
        dK += dot(values, dC, MODE)
        dP += dot(dot(b_, tl.trans(dC), MODE), S, MODE)
        db += dot(dot(P, tl.trans(S), MODE), dC, MODE)
        dlogD += tl.sum(S * dC, 0)
    dlogD += tl.sum(b_ * db + K * dK, 0)                            # the rest of sum_rows C dC
    return dR, dP, dK, db, dF, dlogD


@triton.jit
def through_keys(b_, X, A_rb, P, E, dR, dP, dK, db, dF, L: tl.constexpr, MODE: tl.constexpr):
    """dA_rb, dA_rk, dA_zk, dA_zb, and what has come to db~ and dz~ so far.

    R = r~ + A_rb P    F = A_rk + A_rb E    K = k~ + E^T b~    P = X z~    E = X A_zk
    """
    i, j = tl.arange(0, L)[:, None], tl.arange(0, L)[None, :]
    # dr~ = dR, dA_rk = dF, dk~ = dK, and more in `gradients`
    dF = tl.where(i >= j, dF, 0.0)
    dA_rb = tl.where(i >= j, dot32(dR, tl.trans(P), MODE) + dot32(dF, tl.trans(E), MODE), 0.0)
    dP += dot32(tl.trans(A_rb), dR, MODE)
    dE = dot32(tl.trans(A_rb), dF, MODE) + dot32(b_, tl.trans(dK), MODE)
    db += dot32(E, dK, MODE)
    # X = (I - A_zb)^-1, so dA_zb = X^T dX X^T
    dz = dot32(tl.trans(X), dP, MODE)
    dA_zk = tl.where(i > j, dot32(tl.trans(X), dE, MODE), 0.0)
    dA_zb = tl.where(i > j, dot32(dz, tl.trans(P), MODE) + dot32(dA_zk, tl.trans(E), MODE), 0.0)
    return dA_rb, dF, dA_zk, dA_zb, db, dz


# ------------------------------------------------------------------------------------------
# The operator

def launch_plan(heads: int, T: int, L: int, N: int, dtype: torch.dtype,
                device: torch.device) -> tuple[int, int]:
    """Rows of S per program, and segments: two programs for every multiprocessor.

    As far as the text is long enough for that. Every program repeats the work among
    keys, so it takes 64 rows where there are heads enough. A probe costs as much as a
    walk, so fewer than four segments do not pay; and what is saved of a segment, (2N,
    N), must stay small beside its inputs.
    """
    wanted = 1
    if device.type == "cuda":
        wanted = 2 * torch.cuda.get_device_properties(device).multi_processor_count
    BV = 64 if N == 64 and dtype == torch.bfloat16 and heads >= wanted else min(N, 32)
    programs, chunks = heads * N // BV, triton.cdiv(T, L)
    segments = min(wanted // programs, chunks // 8)
    if segments < 4:
        return BV, 1
    return BV, triton.cdiv(chunks, triton.cdiv(chunks, segments))    # as many as whole chunks fill


def grid_and_sizes(B: int, T: int, H: int, N: int, L: int, segments: int, BV: int,
                   dtype: torch.dtype) -> tuple[tuple[int, int], dict]:
    """The grid of a walk, and the sizes that its kernel takes."""
    chunks = triton.cdiv(T, L)
    # these would not fit into the registers of 4 warps
    wide = N == 128 or N == 64 and dtype == torch.float32
    sizes = {"T": T, "H": H, "chunks": chunks, "m": triton.cdiv(chunks, segments), "segments": segments,
             "N": N, "L": L, "BV": BV, "MODE": MODES[dtype], "num_warps": 8 if wide else 4}
    return (B * H * segments, N // BV), sizes


@torch.library.custom_op("nanorwkv::wkv7", mutates_args=())
def forward(r: Tensor, w: Tensor, k: Tensor, v: Tensor, kk: Tensor, a: Tensor, state: Tensor, L: int, BV: int,
            segments: int, save: bool, look: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, the last state, and what the backward pass needs.

    That is the states before each chunk, and the segments' jumps. `look`: first check
    that w suits chunks of L tokens. Raises ValueError where it does not.
    """
    if look:
        low, high = (x.item() for x in torch.aminmax(w))
        if not -MAX_LOG / L <= low <= high <= 0:
            raise ValueError(f"log decay w goes from {low:.3g} to {high:.3g}: a compiled wkv7 takes "
                             f"{-MAX_LOG / L} to 0, unless told min_w")
    (programs, blocks), sizes = grid_and_sizes(*r.shape, L, segments, BV, r.dtype)
    y, last, states, jumps = empty_outputs(r, w, k, v, kk, a, state, L, BV, segments, save, look)
    tensors = [x.contiguous() for x in (r, w, k, v, kk, a, state)] + [jumps, y, states, last]
    with torch.cuda.device_of(r):                            # Triton launches on the current device
        if segments > 1:
            walk[programs, 2 * blocks](*tensors, **sizes, PROBE=True, SAVE=False)
        walk[programs, blocks](*tensors, **sizes, PROBE=False, SAVE=save)
    return y, last, states, jumps


@forward.register_fake
def empty_outputs(r, w, k, v, kk, a, state, L, BV, segments, save, look):
    """What `forward` returns, unwritten.

    For `forward` itself, and for torch.compile, which asks for shapes alone.
    """
    B, T, H, N = r.shape
    states = (B * H, triton.cdiv(T, L), N, N) if save else (0,)
    jumps = (B * H, segments, 2 * N, N) if segments > 1 else (0,)
    return (torch.empty_like(r, memory_format=torch.contiguous_format),
            torch.empty_like(state, memory_format=torch.contiguous_format),
            r.new_empty(states, dtype=torch.float32 if r.dtype == torch.float32 else torch.bfloat16),
            r.new_empty(jumps, dtype=torch.float32))


@torch.library.custom_op("nanorwkv::wkv7_backward", mutates_args=())
def backward(r: Tensor, w: Tensor, k: Tensor, v: Tensor, kk: Tensor, a: Tensor, states: Tensor, jumps: Tensor,
             dy: Tensor, dlast: Tensor, L: int, BV: int, segments: int) -> list[Tensor]:
    """The gradients of r, w, k, v, kk, a and of the first state."""
    (programs, blocks), sizes = grid_and_sizes(*r.shape, L, segments, BV, r.dtype)
    grads = empty_gradients(r, w, k, v, kk, a, states, jumps, dy, dlast, L, BV, segments)
    r, w, k, v, kk, a, dy, dlast = (x.contiguous() for x in (r, w, k, v, kk, a, dy, dlast))
    dstates = torch.empty_like(states)
    jumps_back = r.new_empty(r.shape[0] * r.shape[2], segments, *dlast.shape[2:], dtype=torch.float32)
    tensors = (r, w, k, kk, a, dy, dlast, jumps, jumps_back, dstates, grads[-1])
    with torch.cuda.device_of(r):
        if segments > 1:
            walk_back[programs, blocks](*tensors, **sizes, PROBE=True)
        walk_back[programs, blocks](*tensors, **sizes, PROBE=False)
        every_chunk = {name: size for name, size in sizes.items() if name not in ("m", "segments")}
        programs = programs // segments * sizes["chunks"]
        gradients[(programs,)](r, w, k, v, kk, a, dy, states, dstates, *grads[:-1], **every_chunk)
    return grads


@backward.register_fake
def empty_gradients(r, w, k, v, kk, a, states, jumps, dy, dlast, L, BV, segments):
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (r, w, k, v, kk, a, dlast)]


def save_for_backward(ctx, inputs, output):
    *tensors, _, L, BV, segments, _, _ = inputs
    ctx.save_for_backward(*tensors, *output[2:])
    ctx.sizes = L, BV, segments
    ctx.set_materialize_grads(False)                         # else zeros as large as all states


def differentiate(ctx, dy, dlast, *_):
    r = ctx.saved_tensors[0]
    B, _, H, N = r.shape
    if dy is None:
        dy = torch.zeros_like(r)
    if dlast is None:
        dlast = r.new_zeros(B, H, N, N, dtype=torch.float32)
    grads = backward(*ctx.saved_tensors, dy, dlast, *ctx.sizes)
    return *grads, None, None, None, None, None


forward.register_autograd(differentiate, setup_context=save_for_backward)


def wkv7_triton(r: Tensor, w: Tensor, k: Tensor, v: Tensor, kk: Tensor, a: Tensor, state: Tensor, L: int,
                segments: int | None = None, look: bool = False) -> tuple[Tensor, Tensor]:
    """`wkv7` for inputs that it has checked: (B, T, H, N), r's dtype in MODES.

    state: float32 (B, H, N, N). L: kernels.triton_chunk; `look` at w first, which
    raises ValueError where L is too long for it. segments: None as launch_plan has
    them. Saved for the backward pass: the inputs, a state per chunk, in bfloat16 with
    L = 32 and N = 64 a third of their size, and jumps.
    """
    B, T, H, N = r.shape
    BV, planned = launch_plan(B * H, T, L, N, r.dtype, r.device)
    save = torch.is_grad_enabled() and any(x.requires_grad for x in (r, w, k, v, kk, a, state))
    segments = planned if segments is None else segments
    y, last, _, _ = forward(r, w, k, v, kk, a, state, L, BV, segments, save, look)
    return y, last
