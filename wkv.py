"""The WKV-7 operator: the memory of RWKV-7, and the whole of what replaces attention.

One matrix S per head is read, partly erased and written once per token:
    S_t = S_{t-1} diag(e^{w_t}) - (S_{t-1} kk_t)(kk_t * a_t)^T + v_t k_t^T
    y_t = S_t r_t

Read right to left: S r looks a value up under the key r; v k^T writes the value v
under the key k; S kk is the value now stored under kk, and subtracting (S kk)(kk * a)^T
erases a share a of it (a = 1, w = 0: all of it, the delta rule); e^w fades each column.
A matrix of constant size stands where attention keeps every key and value of the past.

    r   receptance: the key that is read                           (B, T, H, N)
    w   log decay, <= 0, natural logarithm                         (B, T, H, N)
    k   write key                                                  (B, T, H, N)
    v   value                                                      (B, T, H, N)
    kk  removal key, of unit norm per head                         (B, T, H, N)
    a   in-context learning rate, in (0, 1)                        (B, T, H, N)
    S   state, rows are value channels, columns are key channels   (B, H, N, N)

Two forms to read, and two to run:
    loop    the definition, token by token: the truth that all else is tested against
    chunk   L tokens at once, as docs/chunking.md derives it
    torch   chunk, with a backward pass of its own                kernels/wkv_torch.py
    triton  chunk as three GPU kernels                            kernels/wkv_triton.py

`python wkv.py` prints how far each is from the definition. References: RWKV-7 "Goose",
arXiv 2503.14456 (the operator); DeltaNet in chunks, arXiv 2406.06484 (the chunks).
"""

import math
import os

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import chunk_length, why_not_triton
from kernels.wkv_torch import wkv7_torch

BACKENDS = ("auto", "loop", "chunk", "torch", "triton")


def wkv7(r: Tensor, w: Tensor, k: Tensor, v: Tensor, kk: Tensor, a: Tensor, state: Tensor | None = None,
         backend: str = "auto", min_w: float | None = None) -> tuple[Tensor, Tensor]:
    """Run the recurrence over T >= 1 tokens, from a state (None: empty) to a state.

    Differentiable in every input. `min_w` is a known lower bound of w; without it w is
    read, which makes a GPU wait. Any w <= 0 works: below RWKV-7's bound the chunks get
    shorter, and at last the loop takes over. (A compiled graph of Triton kernels that
    is not told `min_w` takes w down to -2.5.)
    Returns y (B, T, H, N) in r's dtype, and the last state in float32 or float64.
    Raises ValueError for unequal shapes, an unusable backend, or w > 0 where w is read.
    """
    check(r, w, k, v, kk, a, state, backend, min_w)
    B, T, H, N = r.shape
    dtype = torch.promote_types(r.dtype, torch.float32)    # bfloat16 in, float32 inside
    S = r.new_zeros(B, H, N, N, dtype=dtype) if state is None else state.to(dtype)
    form = fastest(r) if backend == "auto" else backend
    L = chunk_length(form, r, w, min_w)                    # 0: token by token
    if L and form == "triton":
        from kernels.wkv_triton import wkv7_triton         # here, as Triton is for Linux alone
        return wkv7_triton(r, w, k, v, kk, a, S, L, look=min_w is None and torch.compiler.is_compiling())
    inputs = [x.to(dtype) for x in (r, w, k, v, kk, a)]
    with torch.autocast(r.device.type, enabled=False):     # float32 stays float32, whatever surrounds it
        if L:
            y, S = (wkv7_chunk if form == "chunk" else wkv7_torch)(*inputs, S, L)
        else:
            y, S = wkv7_loop(*inputs, S)
    return y.to(r.dtype), S


def wkv7_loop(r, w, k, v, kk, a, S):
    """The definition: what is stored under kk, then fade, erase, write, read."""
    ys = []
    rows = (x.unsqueeze(-2).unbind(1) for x in (r, w.exp(), k, kk, kk * a))   # T times (B, H, 1, N)
    for v_t, r_t, e_t, k_t, kk_t, b_t in zip(v.unsqueeze(-1).unbind(1), *rows):
        stored = (S * kk_t).sum(-1, keepdim=True)          # S kk              (B, H, N, 1)
        S = S * e_t                                        # S diag(e^w)       (B, H, N, N)
        S = S - stored * b_t                               # - (S kk)(kk * a)^T
        S = S + v_t * k_t                                  # + v k^T
        ys.append((S * r_t).sum(-1))                       # S r               (B, H, N)
    return torch.stack(ys, 1), S


def wkv7_chunk(r, w, k, v, kk, a, S, L: int):
    """L tokens at a time. In a chunk that starts from S, W_t = e^{w_1 + ... + w_t} and

        z~_t = W_{t-1} z_t     r~_t = W_t r_t     b~_t = b_t / W_t     k~_t = k_t / W_t
        U    = (I - tril(z~ b~^T, -1))^-1 (z~ S^T + tril(z~ k~^T, -1) v)
        y    = r~ S^T + tril(r~ b~^T) U + tril(r~ k~^T) v
        S    = (S + U^T b~ + v^T k~) diag(W_L)

    with z = -kk, b = kk * a. Row t of U is S_{t-1} z_t: minus what to erase.
    """
    T, ys = r.shape[1], []
    for r, w, k, v, z, b in zip(*(chunks(x, L) for x in (r, w, k, v, -kk, kk * a))):     # each (B, H, L, N)
        W = w.cumsum(-2).exp()
        z_, r_, b_, k_ = z * W / w.exp(), r * W, b / W, k / W        # W / e^w = W_{t-1}
        A = torch.eye(L).to(W) - (z_ @ b_.mT).tril(-1)
        U = torch.linalg.solve_triangular(A, z_ @ S.mT + (z_ @ k_.mT).tril(-1) @ v, upper=False)
        ys.append(r_ @ S.mT + (r_ @ b_.mT).tril() @ U + (r_ @ k_.mT).tril() @ v)
        S = (S + U.mT @ b_ + v.mT @ k_) * W[..., -1:, :]
    return torch.cat(ys, 2).transpose(1, 2)[:, :T], S


def chunks(x: Tensor, L: int) -> Tensor:
    """(B, T, H, N) -> (n, B, H, L, N). Zeros behind T change nothing: e^0, no key."""
    x = F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % L))
    return x.unflatten(1, (-1, L)).permute(1, 0, 3, 2, 4)


def fastest(r: Tensor) -> str:
    """triton on a GPU, else torch; for a few tokens, where chunks do not pay, loop."""
    if r.is_cuda and not why_not_triton(r):
        return "triton" if r.shape[1] > 1 else "loop"
    return "torch" if r.shape[1] >= 16 else "loop"


def check(r, w, k, v, kk, a, state, backend, min_w) -> None:
    shapes = [tuple(x.shape) for x in (r, w, k, v, kk, a)]
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is unknown: choose one of {', '.join(BACKENDS)}")
    if r.ndim != 4 or r.shape[1] == 0 or len(set(shapes)) > 1:
        raise ValueError(f"r, w, k, v, kk, a must share one shape (B, T >= 1, H, N): got {shapes}")
    B, T, H, N = r.shape
    if state is not None and state.shape != (B, H, N, N):
        raise ValueError(f"state has shape {tuple(state.shape)}: it must be (B, H, N, N) = {(B, H, N, N)}")
    if min_w is not None and min_w > 0:
        raise ValueError(f"min_w = {min_w}: a bound of log decays is at most 0")
    if backend == "triton" and (reason := why_not_triton(r)):
        raise ValueError(f"backend 'triton' {reason}")


def compare(B: int = 2, T: int = 100, H: int = 2, N: int = 32) -> None:
    """Print ||x - exact|| / ||exact|| of y, S, gradients; exact is a float64 loop."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    r, w, k, v, kk, a = torch.randn(6, B, T, H, N, device=device)
    w, kk, a = -math.exp(-0.5) * w.sigmoid(), F.normalize(kk, dim=-1), a.sigmoid()
    inputs = [r, w, k, v, kk, a, torch.randn(B, H, N, N, device=device)]

    def run(backend: str, dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        y, S = wkv7(*leaves, backend=backend)
        grads = torch.autograd.grad(y.square().sum() + S.square().sum(), leaves)
        return [x.double() for x in (y, S, *grads)]

    exact = run("loop", torch.float64)
    print(f"{'':8}" + "".join(f"{name:>9}" for name in ("y", "S", "dr", "dw", "dk", "dv", "dkk", "da", "dS")))
    for backend in BACKENDS[1:]:
        if backend == "triton" and why_not_triton(r):
            continue
        errors = [(x - e).norm() / e.norm() for x, e in zip(run(backend, torch.float32), exact)]
        print(f"{backend:8}" + "".join(f"{error:9.1e}" for error in errors))


if __name__ == "__main__":
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")     # slowly, but on any CPU
    compare()
