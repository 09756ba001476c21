"""The forms of the WKV-7 operator that run anywhere, held against the oracle."""

import torch
import torch.nn.functional as F

from common_wkv import NAMES, equation, errors, upstream
from wkv import wkv7

CHUNKED = ("chunk", "torch")
FORMS = ("loop", *CHUNKED)


def operator(x, dy, dS, backend, dtype=torch.float64):
    """What `equation` gives, from wkv7 by autograd."""
    x = [z.detach().to(dtype).requires_grad_() for z in x]
    y, S = wkv7(*x, backend=backend)
    grads = torch.autograd.grad((y, S), x, (dy.to(dtype), dS.to(dtype)))
    return named(y, S, grads)


def named(y, S, grads):
    return {"y": y.detach(), "S": S.detach(), **{"d" + n: g for n, g in zip(NAMES, grads)}}


def assert_close(out, ref, tolerance):
    """Not `max(...) < tolerance`: a NaN must fail."""
    worst = errors(out, ref)
    assert all(e <= tolerance for e in worst.values()), {n: f"{e:.1e}" for n, e in worst.items()}


def assert_all_forms_agree(x, single, double=1e-10):
    """Every form against the equation: algebra in float64, arithmetic in float32."""
    dy, dS = upstream(x)
    ref = equation(x, dy, dS)
    for backend in FORMS:
        assert_close(operator(x, dy, dS, backend), ref, double)
        assert_close(operator(x, dy, dS, backend, torch.float32), ref, single)


def basis(i, N=16):
    return F.one_hot(torch.tensor(i), N).double()


def steps(*tokens, state=None, N=16):
    """Run hand-written tokens through every form, which must agree.

    Each token is a dict of vectors, of which those left out are zero.
    Returns y (T, N) and S (N, N).
    """
    x = {n: torch.zeros(1, len(tokens), 1, N, dtype=torch.float64) for n in NAMES[:-1]}
    for t, token in enumerate(tokens):
        for name, value in token.items():
            x[name][0, t, 0] = torch.as_tensor(value, dtype=torch.float64)
    state = None if state is None else state[None, None]
    y, S = wkv7(**x, state=state, backend="loop")
    for backend in CHUNKED:
        same(wkv7(**x, state=state, backend=backend), (y, S))
    return y[0, :, 0], S[0, 0]


def same(a, b):
    """Equal but for the last digits of float64."""
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
