"""How far the Triton kernels are from the equation; without Triton tests are skipped.

Without a GPU they run in Triton's interpreter, on sizes that take it seconds; with one
they run compiled, and also larger.
"""

import math

import pytest
import torch

from common_wkv import NAMES, equation, errors, upstream
from wkv import wkv7

wkv7_triton = pytest.importorskip("kernels.wkv_triton", reason="Triton is for Linux").wkv7_triton

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
VALUES, GRADIENTS = ("y", "S"), tuple("d" + name for name in NAMES)
TOLERANCES = {torch.float32: (1e-5, 1e-4), torch.float16: (1e-3, 4e-3),
              torch.bfloat16: (6e-3, 1.2e-2)}                                 # of values, of gradients


def rounded(x, dtype):
    """The inputs as the kernels get them, r ... a in `dtype` and the state in float32.

    But held in float64: the truth is that of the same numbers.
    """
    return [z.to(dtype if n != "state" else torch.float32).double() for n, z in zip(NAMES, x)]


def triton_operator(x, dy, dS, dtype=torch.float32, **settings):
    """y, the state and all gradients by the kernels.

    `settings` go to wkv7_triton (chunk length L, segments), past wkv7's checks.
    """
    dtypes = [dtype] * 6 + [torch.float32]
    leaves = [z.detach().to(DEVICE, d).requires_grad_() for z, d in zip(x, dtypes)]
    y, S = wkv7_triton(*leaves, **settings) if settings else wkv7(*leaves, backend="triton")
    assert y.dtype == dtype and S.dtype == torch.float32
    grads = torch.autograd.grad((y, S), leaves, (dy.to(DEVICE, dtype), dS.to(DEVICE, torch.float32)))
    assert all(g.dtype == z.dtype for g, z in zip(grads, leaves))
    return {"y": y.detach().cpu(), "S": S.detach().cpu(), **{n: g.cpu() for n, g in zip(GRADIENTS, grads)}}


def worst(x, dtype=torch.float32, **settings):
    """Largest relative errors of values and of gradients.

    By the equation on the same rounded numbers.
    """
    x = rounded(x, dtype)
    dy, dS = (z.to(d).double() for z, d in zip(upstream(x), (dtype, torch.float32)))
    found = errors(triton_operator(x, dy, dS, dtype, **settings), equation(x, dy, dS))
    assert not any(map(math.isnan, found.values())), found
    return max(found[n] for n in VALUES), max(found[n] for n in GRADIENTS)


def assert_right(x, dtype=torch.float32, slack=1.0, **settings):
    found = worst(x, dtype, **settings)
    assert all(e <= slack * limit for e, limit in zip(found, TOLERANCES[dtype])), found
