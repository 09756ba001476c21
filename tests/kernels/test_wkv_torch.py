"""kernels/wkv_torch.py: the hand-written gradient, what it keeps in memory, layouts.

Values and gradients over lengths, head sizes and decays are held against the equation
in test_wkv.py, beside the other forms.
"""

import pytest
import torch

import kernels
from common_forms import assert_close, named, operator, same
from common_wkv import BOUND, NAMES, equation, random_inputs, repeated_token, upstream
from kernels.wkv_torch import WKV7Chunk, causal_mask, wkv7_torch
from wkv import wkv7, wkv7_chunk

# ------------------------------------------------------------------------------------------
# Gradients

def test_gradcheck_of_the_hand_written_backward(monkeypatch):
    monkeypatch.setattr(kernels, "CHUNK", 8)  # three chunks, the last one padded
    x = [z.requires_grad_() for z in random_inputs(B=1, T=19, H=1, N=2)]
    assert torch.autograd.gradcheck(lambda *z: wkv7(*z, backend="torch"), x)


@pytest.mark.parametrize("L", [8, 16, 32, 64])
def test_it_is_the_readable_chunk_and_its_backward_is_autograd_through_that(L):
    x = random_inputs(T=70)
    dy, dS = upstream(x)
    outputs = []
    for form in (wkv7_chunk, wkv7_torch):
        leaves = [z.clone().requires_grad_() for z in x]
        y, S = form(*leaves, L)
        outputs.append(named(y, S, torch.autograd.grad((y, S), leaves, (dy, dS))))
    assert_close(*outputs, 1e-11)


def test_gradients_for_some_inputs_only():
    x = random_inputs(T=50)
    dy, dS = upstream(x)
    ref = equation(x, dy, dS)
    for i, name in enumerate(NAMES):
        leaves = [z.clone().requires_grad_(j == i) for j, z in enumerate(x)]
        (g,) = torch.autograd.grad(wkv7(*leaves, backend="torch"), [leaves[i]], (dy, dS))
        assert_close({"d" + name: g}, {"d" + name: ref["d" + name]}, 1e-10)


@pytest.mark.parametrize("decay", [0.0, -2e-4])
def test_one_token_repeated_4096_times_almost_without_decay_drifts_by_less_than_a_thousandth(decay):
    """Nothing fades, so every chunk adds the same rounding error.

    In float32 the loop drifts as well (1e-4 at -2e-4).
    """
    x = repeated_token(decay)
    dy, dS = upstream(x)
    ref = equation(x, dy, dS)
    assert_close(operator(x, dy, dS, "torch", dtype=torch.float32), ref, 1e-3)
    assert_close(operator(x, dy, dS, "torch"), ref, 1e-10)


def test_a_second_derivative_is_refused_rather_than_wrong():
    x = [z.requires_grad_() for z in random_inputs(B=1, T=20, H=1)]
    y, _ = wkv7(*x, backend="torch")
    (first,) = torch.autograd.grad(y.square().sum(), x[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


# ------------------------------------------------------------------------------------------
# Memory

@pytest.mark.parametrize("T", [64, 256])
def test_what_backward_keeps_grows_with_the_text_by_a_constant_per_token(T):
    """A constant for each chunk, its first state included, and the last state."""
    B, H, N, L = 2, 3, 16, 32
    x = [z.requires_grad_() for z in random_inputs(B=B, T=T, H=H, N=N)]
    kept = {}

    def keep(z):
        kept[z.untyped_storage().data_ptr()] = z.untyped_storage().nbytes() // 8
        return z

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda z: z):
        r, w, k, v, z, b = (q.detach().unflatten(1, (-1, L)).permute(1, 0, 3, 2, 4) for q in x[:6])
        WKV7Chunk.apply(r.clone().requires_grad_(), w, k, v, z, b, x[6].detach())
    n = B * H * T // L
    per_chunk = 2 * L * N * 5 + 2 * L * 2 * L + L * L + L * N
    assert sum(kept.values()) == n * per_chunk + (n + B * H) * N * N


def test_the_mask_is_strict_for_z_and_not_for_r():
    mask = causal_mask(3, torch.zeros(1))
    before, upto = [[0, 0, 0], [1, 0, 0], [1, 1, 0]], [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    assert mask.tolist() == [row * 2 for row in before] + [row * 2 for row in upto]


# ------------------------------------------------------------------------------------------
# Layouts

def test_one_tensor_may_serve_as_several_inputs_and_be_expanded():
    x = random_inputs(T=50)
    one = torch.nn.functional.normalize(x[0], dim=-1)
    shared = [one, -one.abs(), one, one, one, one.abs(), x[-1]]
    expanded = [z[:, :1].expand_as(z) for z in x[:6]] + [x[6][:1].expand_as(x[6])]
    for z in (shared, expanded):
        dy, dS = upstream(x)
        assert_close(operator(z, dy, dS, "torch"), equation(z, dy, dS), 1e-10)


@pytest.mark.parametrize("L", [8, 16, 32, 64])
def test_what_is_padded_behind_the_text_changes_nothing(L):
    x = random_inputs(T=50, decay=BOUND)
    padded = [torch.nn.functional.pad(z, (0, 0, 0, 0, 0, 14)) for z in x[:6]] + [x[6]]
    (y, S), (longer, after) = wkv7_torch(*x, L), wkv7_torch(*padded, L)
    same(longer[:, :50], y)
    same(after, S)
