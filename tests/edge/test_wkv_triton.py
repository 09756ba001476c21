"""The Triton kernels where it hurts: extremes, repeated tokens, layouts.

Huge tensors.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from common_triton import DEVICE, GPU, assert_right, rounded, triton_operator
from common_wkv import BOUND, NAMES, equation, errors, random_inputs, repeated_token, upstream

import triton                    # after common_triton, which skips all where it is missing

import kernels
from kernels import wkv_triton
from wkv import BACKENDS, wkv7

LONG = 4096 if GPU else 192


# ------------------------------------------------------------------------------------------
# Extreme values

@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_batch_gives_an_empty_answer(backend):
    y, S = wkv7(*[z[:0].float().to(DEVICE) for z in random_inputs(N=32)], backend=backend)
    assert y.shape == (0, 50, 2, 32) and S.shape == (0, 2, 32, 32)


def test_a_decay_that_is_no_number_gives_answers_that_are_none():
    x = [z.float().to(DEVICE) for z in random_inputs(B=1, T=20, H=1, N=32)]
    x[1][0, 3, 0, 5] = math.nan
    assert wkv7(*x, backend="triton")[0].isnan().any()


def test_more_segments_than_there_is_text_for_leave_the_last_ones_empty():
    # 7 chunks, 2 to a segment: the fifth has none
    assert_right(random_inputs(B=1, T=100, H=1, N=32), L=16, segments=5)


@pytest.mark.parametrize("decay", [-1.24, -1.26, -2.49, -2.51, -30, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decays_far_below_rwkv7_s_bound(decay, dtype):
    """Chunks of 32 until -1.25 (bfloat16), 16 until -2.5, then the loop."""
    assert_right(random_inputs(B=1, T=50, H=1, N=32, decay=decay), dtype)


def test_one_strong_decay_among_weak_ones_does_not_hurt_the_weak():
    x = random_inputs(B=1, T=50, H=1, N=32)
    x[1][0, 25, 0, 3] = -2.4
    assert_right(x)


@pytest.mark.parametrize("which", [("r",), ("k",), ("v",), ("state",), ("r", "k", "v", "state")])
def test_huge_inputs_cost_no_accuracy(which):
    x = random_inputs(B=1, T=40, H=1, N=32, decay=BOUND)
    x = [1e4 * z if n in which else z for n, z in zip(NAMES, x)]
    for dtype in (torch.float32, torch.bfloat16):
        assert_right(x, dtype)


def test_all_zeros_give_zero_and_finite_gradients():
    x = [torch.zeros_like(z) for z in random_inputs(B=1, T=40, H=1, N=32)]
    out = triton_operator(x, *upstream(x))
    assert all(z.isfinite().all() for z in out.values()) and not out["y"].any() and not out["S"].any()
    assert_right(x)


@pytest.mark.parametrize("a", [0.0, 1e-30, 1.0])
def test_both_ends_of_the_learning_rate(a):
    x = random_inputs(B=1, T=50, H=1, N=32)
    x[5].fill_(a)
    assert_right(x)
    assert_right(x, torch.bfloat16)


# ------------------------------------------------------------------------------------------
# Repeated tokens

def sensitivity(x, dy, dS):
    """How far dv moves when each bfloat16 input does by up to one last-place unit."""
    g = torch.Generator().manual_seed(1)
    moved = [z * (1 + 2**-7 * (torch.rand(z.shape, generator=g).double() - 0.5)) for z in x[:6]] + [x[6]]
    return errors(equation(moved, dy, dS), equation(x, dy, dS))["dv"]


@pytest.mark.parametrize("fresh_reads", [False, True])
@pytest.mark.parametrize("decay", [-1e-3, -0.01, -0.1, BOUND])
def test_one_token_repeated_is_as_accurate_as_random_tokens_in_bfloat16(decay, fresh_reads):
    """What folding the erased into the keys is for: without it this fails.

    It fails, too, without the low halves of `dot32`. Except dv: what is left of dS
    under a key that every later token erases is a small part, as hard to know as it is.
    """
    x = repeated_token(decay, T=LONG)
    if fresh_reads:
        x[0] = random_inputs(B=1, T=LONG, H=1, N=64)[0]
        x[6].zero_()
    x = rounded(x, torch.bfloat16)
    dy, dS = (z.to(d).double() for z, d in zip(upstream(x), (torch.bfloat16, torch.float32)))
    found = errors(triton_operator(x, dy, dS, torch.bfloat16), equation(x, dy, dS))
    assert found.pop("dv") <= max(1.2e-2, 2 * sensitivity(x, dy, dS))
    assert all(e <= (1.2e-2 if n in ("dkk", "da") else 6e-3) for n, e in found.items()), found


@pytest.mark.parametrize("decay", [-0.1, BOUND])
def test_one_token_repeated_in_float32(decay):
    assert_right(repeated_token(decay, T=LONG, N=32))


def test_near_identical_keys_with_learning_rate_one_stay_stable():
    """Where powers of A would explode.

    All keys lie on one channel, whose rounding no sum over channels averages.
    """
    x = random_inputs(B=1, T=LONG // 4, H=1, N=32)
    x[4] = F.normalize(F.one_hot(torch.tensor(0), 32) + 1e-3 * x[4], dim=-1)
    x[2], x[5] = x[4].clone(), torch.ones_like(x[5])
    assert_right(x)
    assert_right(x, torch.bfloat16, slack=1.5)


# ------------------------------------------------------------------------------------------
# Layouts and gradients

def outputs_and_gradients(leaves, upstreams):
    out = wkv7(*leaves, backend="triton")
    return *out, *torch.autograd.grad(out, leaves, upstreams)


def test_memory_layout_does_not_matter_and_inputs_stay_as_they_are():
    x = [z.float().to(DEVICE) for z in random_inputs(B=2, T=20, H=2, N=32)]
    dy, dS = (z.float().to(DEVICE) for z in upstream(x))
    plain = [z.clone().requires_grad_() for z in x]
    expected = outputs_and_gradients(plain, (dy, dS))
    assert all(map(torch.equal, plain, x))

    def heads_outside(z):
        return z.transpose(1, 2).contiguous().transpose(1, 2)

    heads_first = [heads_outside(z) for z in x[:6]] + [x[6].mT.contiguous().mT]
    strided = [torch.stack((z, z), -1).flatten(-2)[..., ::2] for z in x]
    for layout in (heads_first, strided):
        leaves = [z.detach().requires_grad_() for z in layout]
        assert not leaves[0].is_contiguous()
        results = outputs_and_gradients(leaves, (heads_outside(dy), dS.mT.contiguous().mT))
        assert all(map(torch.equal, results, expected))
    expanded = [z[:, :1].expand_as(z).detach().requires_grad_() for z in x[:6]] + [plain[6]]
    same = [z.detach().contiguous().requires_grad_() for z in expanded]
    results, expected = outputs_and_gradients(expanded, (dy, dS)), outputs_and_gradients(same, (dy, dS))
    assert all(map(torch.equal, results, expected))


def test_unused_outputs_and_inputs_without_gradient():
    x = [z.float().to(DEVICE) for z in random_inputs(B=1, T=20, H=1, N=32)]
    for used in (0, 1):
        leaves = [z.clone().requires_grad_(n in ("k", "state")) for n, z in zip(NAMES, x)]
        grads = torch.autograd.grad(wkv7(*leaves, backend="triton")[used].sum(), [leaves[2], leaves[6]])
        expected = torch.autograd.grad(wkv7(*leaves, backend="loop")[used].sum(), [leaves[2], leaves[6]])
        for a, b in zip(grads, expected):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert not wkv7(*x, backend="triton")[0].requires_grad


def test_every_element_of_the_outputs_is_written(monkeypatch):
    """Outputs start as NaN: one that is left out stays so."""
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: empty_like(*a, **k).fill_(math.nan))
    x = random_inputs(B=1, T=37, H=2, N=32)
    for settings in ({}, {"L": 16, "segments": 2}):
        assert_right(x, **settings)


# ------------------------------------------------------------------------------------------
# Refusals

def test_inputs_that_the_kernels_cannot_take_are_refused_with_a_remedy(monkeypatch):
    x = random_inputs(T=20)
    single = [z.float().to(DEVICE) for z in x]
    narrow = [z.float().to(DEVICE) for z in random_inputs(T=20, N=8)]
    limits = (
        "takes float32, bfloat16 or float16 and heads of 16, 32, 64 or 128, not float64 and 16: use torch"
    )
    with pytest.raises(ValueError, match=f"'triton' {limits}"):
        wkv7(*[z.to(DEVICE) for z in x], backend="triton")
    with pytest.raises(ValueError, match="not float32 and 8: use torch"):
        wkv7(*narrow, backend="triton")
    with pytest.raises(ValueError, match="it must be <= 0"):
        wkv7(single[0], torch.ones_like(single[1]), *single[2:], backend="triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="needs tensors on an NVIDIA GPU, or TRITON_INTERPRET=1"):
        wkv7(*[z.float() for z in x], backend="triton")
    monkeypatch.setattr(kernels, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install triton"):
        wkv7(*[z.float() for z in x], backend="triton")


# ------------------------------------------------------------------------------------------
# Addresses

def test_addresses_beyond_two_to_the_31_are_right():
    out = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    place_of[(1,)](out, 70000, 2**20, 64, N=64)
    assert out.item() == 70000 // 64 * 2**20 * 64 * 64 + 70000 % 64 * 64


@triton.jit
def place_of(out, head, T, H, N: triton.language.constexpr):
    triton.language.store(out, wkv_triton.place(head + triton.language.program_id(0), T, H, N))


LARGE_GPU = GPU and torch.cuda.mem_get_info()[1] >= 100e9


@pytest.mark.skipif(not LARGE_GPU, reason="needs a GPU with 100 GB")
def test_tensors_of_more_than_two_to_the_31_elements():
    B, T, H, N = 9, 65536, 64, 64
    x = [z.bfloat16().to(DEVICE) for z in random_inputs(B=1, T=T, H=1, N=N)[:6]]
    big = [z.expand(B, T, H, N).contiguous() for z in x]
    with torch.no_grad():
        y, _ = wkv7(*big, backend="triton")
        y1, _ = wkv7(*x, backend="triton")
    assert torch.equal(y[-1, :, -1], y1[0, :, 0])
