"""The WKV-7 operator where it hurts: extremes, layouts, precision, bad inputs.

The theorems, and the oracle that all is held against: tests/test_wkv.py.
"""

import math

import pytest
import torch
import torch.nn.functional as F

import kernels
from common_forms import CHUNKED, FORMS, assert_all_forms_agree, assert_close, basis, named, operator, same
from common_wkv import BOUND, NAMES, equation, random_inputs, upstream
from wkv import wkv7

# ------------------------------------------------------------------------------------------
# Sizes

@pytest.mark.parametrize("backend", CHUNKED)
@pytest.mark.parametrize("B, H", [(1, 3), (3, 1), (1, 1)])
def test_batch_and_heads_do_not_mix(B, H, backend):
    x = random_inputs(B=B, T=37, H=H)
    y, S = wkv7(*x, backend=backend)
    for b in range(B):
        for h in range(H):
            one = [z[b:b + 1, :, h:h + 1] for z in x[:6]] + [x[6][b:b + 1, h:h + 1]]
            y_one, S_one = wkv7(*one, backend=backend)
            same(y_one[0, :, 0], y[b, :, h])
            same(S_one[0, 0], S[b, h])


@pytest.mark.parametrize("L", [8, 16, 32, 64])
def test_the_chunk_length_is_only_a_matter_of_speed(L, monkeypatch):
    monkeypatch.setattr(kernels, "CHUNK", L)
    x = random_inputs(T=130, decay=BOUND)               # 64 steps at the bound: 1/W = 7e16
    assert_all_forms_agree(x, single=5e-6)


# ------------------------------------------------------------------------------------------
# Extreme values

CHOICES = [(0, -0.1, -0.6, -1.2), (0, -1e-3, -3), (0, -0.6, -10), (0, -0.3, -50, -math.inf)]


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_decays_mixed_within_a_sequence(choice):
    x = random_inputs(T=100)
    which = torch.randint(len(choice), x[1].shape, generator=torch.Generator().manual_seed(2))
    x[1] = torch.tensor(choice).double()[which]
    assert_all_forms_agree(x, single=1e-4)


def test_one_strong_decay_among_weak_ones_does_not_hurt_the_weak():
    x = random_inputs(T=100)
    x[1][0, 50, 0, 3] = -30.0
    assert_all_forms_agree(x, single=3e-6)


def test_all_zeros_give_zero_and_finite_gradients():
    x = [torch.zeros_like(z) for z in random_inputs()]
    dy, dS = upstream(x)
    for backend in CHUNKED:
        out = operator(x, dy, dS, backend)
        assert all(z.isfinite().all() for z in out.values())
        assert not out["y"].any() and not out["S"].any()
    assert_all_forms_agree(x, single=1e-6)


@pytest.mark.parametrize("which", [("r",), ("k",), ("v",), ("state",), ("r", "k", "v", "state")], ids=str)
def test_huge_inputs_cost_no_accuracy(which):
    for decay in (None, BOUND):
        x = [1e4 * z if n in which else z for n, z in zip(NAMES, random_inputs(T=70, decay=decay))]
        assert_all_forms_agree(x, single=5e-6)


@pytest.mark.parametrize("a", [0.0, 1e-30, 1.0])
def test_both_ends_of_the_learning_rate(a):
    x = random_inputs(T=70)
    x[5].fill_(a)
    assert_all_forms_agree(x, single=5e-6)


def test_near_identical_keys_with_learning_rate_one_stay_stable():
    """Where powers of A explode.

    (I - A)^-1 by Neumann products would hold entries of 2^31 and more.
    """
    x = random_inputs(T=256, N=32)
    x[4] = F.normalize(basis(0, 32) + 1e-3 * x[4], dim=-1).float().double()
    x[2], x[5] = x[4].clone(), torch.ones_like(x[5])
    assert_all_forms_agree(x, single=1e-5)


NOT_FINITE = [(n, bad) for n in NAMES for bad in (math.nan, math.inf) if (n, bad) != ("w", math.inf)]


@pytest.mark.parametrize("name, bad", NOT_FINITE)
def test_nan_or_infinity_in_gives_nan_or_infinity_out_in_its_own_head_only(name, bad):
    x = random_inputs(B=2, T=70, H=2)
    i = NAMES.index(name)
    x[i][(0, 1) if name == "state" else (0, 40, 1)] = bad
    for backend in FORMS:
        y, S = wkv7(*x, backend=backend)
        assert not y[0, -1 if name != "r" else 40, 1].isfinite().any()
        assert name == "r" or not S[0, 1].isfinite().any()
        assert y[1].isfinite().all() and y[0, :, 0].isfinite().all()
        assert S[1].isfinite().all() and S[0, 0].isfinite().all()


# ------------------------------------------------------------------------------------------
# Memory

@pytest.mark.parametrize("backend", FORMS)
@pytest.mark.parametrize("T", [1, 32, 50])
def test_inputs_and_upstream_gradients_are_never_changed_in_place(backend, T):
    for dtype in (torch.float32, torch.float64):
        x = [z.to(dtype) for z in random_inputs(B=1, T=T, H=1)]         # B H = 1: where views are most likely
        leaves, given = [z.clone().requires_grad_() for z in x], [z.to(dtype) for z in upstream(x)]
        y, S = wkv7(*leaves, backend=backend)
        y_before, S_before, given_before = y.detach().clone(), S.detach().clone(), [z.clone() for z in given]
        torch.autograd.grad((y, S), leaves, given)
        assert all(map(torch.equal, leaves, x)) and all(map(torch.equal, given, given_before))
        assert torch.equal(y, y_before) and torch.equal(S, S_before)


def test_the_outgoing_state_shares_no_memory_with_the_incoming_one():
    for backend in FORMS:
        for T in (1, 40):
            x = random_inputs(B=1, T=T, H=1)
            before = x[-1].clone()
            wkv7(*x, backend=backend)[1].zero_()
            assert torch.equal(x[-1], before)


def test_memory_layout_does_not_matter():
    x = random_inputs(T=50)
    dy, dS = upstream(x)
    ref = equation(x, dy, dS)
    heads_first = [z.transpose(1, 2).contiguous().transpose(1, 2) for z in x[:6]]
    heads_first.append(x[6].mT.contiguous().mT)
    strided = [torch.stack((z, z), -1).flatten(-2)[..., ::2] for z in x]
    sliced = [torch.cat((z, z), 1)[:, 50:] for z in x[:6]] + [x[6]]
    dy, dS = dy.transpose(1, 2).contiguous().transpose(1, 2), dS.mT.contiguous().mT
    for layout in (heads_first, strided, sliced):
        assert not layout[0].is_contiguous() and all(map(torch.equal, layout, x))
        for backend in FORMS:
            assert_close(operator(layout, dy, dS, backend), ref, 1e-10)


@pytest.mark.parametrize("backend", FORMS)
def test_expanded_upstream_gradients_and_unused_outputs(backend):
    """The gradient of a sum is one number expanded, that of an unused output None."""
    x = random_inputs(T=50)
    for of_y, of_S in ((True, True), (True, False), (False, True)):
        leaves = [z.clone().requires_grad_() for z in x]
        y, S = wkv7(*leaves, backend=backend)
        outputs = [z for z, counts in ((y, of_y), (S, of_S)) if counts]
        grads = torch.autograd.grad(sum(z.sum() for z in outputs), leaves, materialize_grads=True)
        ref = equation(x, torch.full_like(x[0], float(of_y)), torch.full_like(x[-1], float(of_S)))
        only_gradients = {n: z for n, z in ref.items() if n[0] == "d"}
        assert_close({"d" + n: g for n, g in zip(NAMES, grads)}, only_gradients, 1e-10)


# ------------------------------------------------------------------------------------------
# Precision

@pytest.mark.parametrize("backend", ["auto", "chunk"])
def test_mixed_precision_as_the_model_has_it(backend):
    """r, k, v, a from bfloat16 matrices, w, kk and the state in float32."""
    single = ("w", "kk", "state")
    x = [z.float() if n in single else z.bfloat16() for n, z in zip(NAMES, random_inputs(T=50))]
    y, S = wkv7(*x, backend=backend)
    ref = equation(x, *upstream(x))
    assert y.dtype == torch.bfloat16 and S.dtype == torch.float32
    assert_close({"S": S}, {"S": ref["S"]}, 3e-6)


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("inside", [False, True], ids=["backward after autocast", "backward within autocast"])
@pytest.mark.parametrize("T", [5, 50])
def test_autocast_leaves_the_inside_in_float32(T, inside, backend):
    x = random_inputs(T=T)
    dy, dS = upstream(x)
    leaves = [z.float().requires_grad_() for z in x]
    with torch.autocast("cpu", torch.bfloat16):
        y, S = wkv7(*leaves, backend=backend)
    with torch.autocast("cpu", torch.bfloat16, enabled=inside):
        grads = torch.autograd.grad((y, S), leaves, (dy.float(), dS.float()))
    assert_close(named(y, S, grads), equation(x, dy, dS), 3e-6)


# ------------------------------------------------------------------------------------------
# Errors

def refuses(pattern, *args, **kwargs):
    with pytest.raises(ValueError, match=pattern) as caught:
        wkv7(*args, **kwargs)
    # one line: the value, then the rule
    assert "\n" not in str(caught.value) and ":" in str(caught.value)


def test_inputs_of_different_shapes_are_refused():
    x = random_inputs(T=20)
    for i in range(1, 6):
        refuses(r"one shape .*\(2, 19, 2, 16\)", *[z[:, :19] if j == i else z for j, z in enumerate(x)])
    refuses("one shape", *[z[:, 0] for z in x[:6]])
    refuses("one shape", *[z[..., :1] if j == 3 else z for j, z in enumerate(x)])      # would broadcast


def test_no_tokens_are_refused():
    refuses(r"T >= 1", *[z[:, :0] for z in random_inputs()[:6]])


def test_a_state_of_another_shape_is_refused():
    x = random_inputs()
    for state in (x[-1][:1], x[-1][..., :8], x[-1].flatten(), x[-1][0]):
        refuses(r"must be \(B, H, N, N\) = \(2, 2, 16, 16\)", *x[:6], state)


def test_an_unknown_backend_is_refused_and_the_known_ones_named():
    known = "auto, loop, chunk, torch, triton"
    refuses(f"'cuda' is unknown: choose one of {known}", *random_inputs(), backend="cuda")


def test_a_bound_of_log_decays_above_zero_is_refused():
    refuses("min_w = 0.5: ", *random_inputs(), min_w=0.5)


@pytest.mark.parametrize("backend", ["auto", *FORMS])
@pytest.mark.parametrize("T", [2, 50])
def test_growth_is_refused_by_every_form(backend, T):
    x = random_inputs(T=T)
    x[1][0, T // 2, 0, 0] = 0.25
    refuses("0.25: it must be <= 0", *x, backend=backend)
