"""The WKV-7 operator: chunk = loop = the equation in NumPy, in values and in every gradient, also where it hurts.

The oracle is `equation` below: the recurrence of arXiv 2503.14456 and its chain rule, one token after another in float64
NumPy, sharing no line with wkv.py. It is itself held against finite differences.
"""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import wkv
from wkv import wkv7

NAMES = ("r", "w", "k", "v", "kk", "a", "state")
BOUND = -math.exp(-0.5)  # RWKV-7's fastest log decay: e^w = 0.5452


# --- helpers --------------------------------------------------------------------------------------


def random_inputs(B=2, T=50, H=2, N=16, decay=None, seed=0):
    """r, w, k, v, kk, a, state in float64, rounded to float32 so that both precisions mean the same numbers."""
    g = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    r, k, v = normal(B, T, H, N), normal(B, T, H, N), normal(B, T, H, N)
    kk, a = F.normalize(normal(B, T, H, N), dim=-1), torch.rand(B, T, H, N, generator=g)
    w = BOUND * torch.rand(B, T, H, N, generator=g) if decay is None else torch.full((B, T, H, N), float(decay))
    return [x.double() for x in (r, w, k, v, kk, a, normal(B, H, N, N))]


def upstream(x, seed=1):
    """Gradients for y and for the outgoing state, so that every path through the operator counts."""
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(z.shape, generator=g).double() for z in (x[0], x[-1])]


def equation(x, dy, dS):
    """y, S and the gradients of sum(y dy) + sum(S dS) by the definition, in float64 NumPy."""
    r, w, k, v, kk, a, S = (z.double().numpy() for z in x)
    dy, dS = dy.double().numpy(), dS.double().numpy()
    e, T = np.exp(w), r.shape[1]
    states, y = [S], np.empty_like(r)
    for t in range(T):
        erased = np.einsum("bhij,bhj->bhi", S, kk[:, t])
        S = S * e[:, t, :, None, :] - np.einsum("bhi,bhj->bhij", erased, kk[:, t] * a[:, t]) + np.einsum("bhi,bhj->bhij", v[:, t], k[:, t])
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
    grads = dict(zip(NAMES, (dr, dw, dk, dv, dkk, da, dS)))
    return {name: torch.from_numpy(z) for name, z in (out | {"d" + n: g for n, g in grads.items()}).items()}


def operator(x, dy, dS, backend="chunk", dtype=torch.float64):
    """The same from wkv7 by autograd."""
    x = [z.detach().to(dtype).requires_grad_() for z in x]
    y, S = wkv7(*x, backend=backend)
    grads = torch.autograd.grad((y, S), x, (dy.to(dtype), dS.to(dtype)))
    return {"y": y.detach(), "S": S.detach(), **{"d" + n: g for n, g in zip(NAMES, grads)}}


def errors(out, ref):
    """||out - ref|| / ||ref|| of each value and gradient (||out|| where the truth is zero)."""
    return {n: ((out[n].double() - ref[n]).norm() / (ref[n].norm() or 1.0)).item() for n in ref}


def assert_close(out, ref, tolerance):
    """Not `max(...) < tolerance`: a NaN must fail."""
    worst = errors(out, ref)
    assert all(e <= tolerance for e in worst.values()), {n: f"{e:.1e}" for n, e in worst.items() if not e <= tolerance}


def assert_all_forms_agree(x, single, double=1e-10):
    """loop and chunk against the equation: algebra in float64, arithmetic in float32."""
    dy, dS = upstream(x)
    ref = equation(x, dy, dS)
    for backend in ("loop", "chunk"):
        assert_close(operator(x, dy, dS, backend), ref, double)
        assert_close(operator(x, dy, dS, backend, torch.float32), ref, single)


def basis(i, N=16):
    return F.one_hot(torch.tensor(i), N).double()


def steps(*tokens, state=None, N=16):
    """Run hand-written tokens through both forms, which must agree; each token is a dict of vectors, others are zero."""
    x = {n: torch.zeros(1, len(tokens), 1, N, dtype=torch.float64) for n in NAMES[:-1]}
    for t, token in enumerate(tokens):
        for name, value in token.items():
            x[name][0, t, 0] = torch.as_tensor(value, dtype=torch.float64)
    state = None if state is None else state[None, None]
    y, S = wkv7(**x, state=state, backend="loop")
    y_chunk, S_chunk = wkv7(**x, state=state, backend="chunk")
    torch.testing.assert_close((y, S), (y_chunk, S_chunk), rtol=1e-12, atol=1e-12)
    return y[0, :, 0], S[0, 0]


def same(a, b):
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


# --- what the operator means: hand-worked ------------------------------------------------------------


K1, K2, K3 = basis(1), basis(2), basis(3)
V1, V2 = torch.arange(16).double(), torch.arange(16).double().flip(0) + 0.5


def test_what_is_written_under_a_key_is_read_under_that_key_by_the_same_token():
    y, S = steps({"k": K1, "v": V1, "r": K1}, {"r": K2}, {"r": 3 * K1})
    same(y, torch.stack((V1, 0 * V1, 3 * V1)))
    same(S, torch.outer(V1, K1))  # rows are value channels, columns key channels


def test_decay_of_one_half_halves():
    y, _ = steps({"k": K1, "v": V1}, {"w": math.log(0.5), "r": K1}, {"w": math.log(0.5), "r": K1})
    same(y[1:], torch.stack((V1 / 2, V1 / 4)))


def test_decay_fades_each_key_channel_by_its_own_factor():
    y, _ = steps({"k": K1, "v": V1}, {"k": K2, "v": V2}, {"w": math.log(0.5) * K1, "r": K1}, {"r": K2})
    same(y[2:], torch.stack((V1 / 2, V2)))


def test_decay_comes_before_the_write_and_the_write_before_the_read():
    y, _ = steps({"w": math.log(0.5), "k": K1, "v": V1, "r": K1})
    same(y[0], V1)


def test_minus_infinite_log_decay_forgets_everything():
    y, S = steps({"k": K1, "v": V1}, {"w": -math.inf, "r": K1, "k": K2, "v": V2})
    same(y[1], 0 * V1)
    same(S, torch.outer(V2, K2))


def test_delta_rule_overwrites_where_linear_attention_adds():
    write = lambda v, a: {"k": K1, "v": v, "kk": K1, "a": a, "r": K1}  # noqa: E731
    delta, _ = steps(write(V1, 1.0), write(V2, 1.0))
    linear, _ = steps(write(V1, 0.0), write(V2, 0.0))
    same(delta[1], V2)
    same(linear[1], V1 + V2)


def test_learning_rate_of_one_quarter_erases_one_quarter():
    y, _ = steps({"k": K1, "v": V1}, {"kk": K1, "a": 0.25, "r": K1})
    same(y[1], 0.75 * V1)


def test_learning_rate_is_per_channel():
    both = (K1 + K2) / math.sqrt(2)                         # stored under both, removed under both, in channel 1 only
    _, S = steps({"k": both, "v": V1}, {"kk": both, "a": K1})
    same(S, torch.outer(V1, K2 / math.sqrt(2)))


def test_erasing_one_key_leaves_orthogonal_keys_alone():
    y, _ = steps({"k": K1, "v": V1}, {"k": K2, "v": V2}, {"kk": K1, "a": 1.0, "r": K2}, {"r": K1})
    same(y[2:], torch.stack((V2, 0 * V1)))


def test_removal_key_and_write_key_are_independent():
    y, _ = steps({"k": K1, "v": V1}, {"kk": K1, "a": 1.0, "k": K2, "v": V2, "r": K1 + K2}, {"r": K1})
    same(y[1:], torch.stack((V2, 0 * V1)))


def test_erasing_takes_what_was_stored_before_the_decay():
    _, S = steps({"k": K1, "v": V1}, {"w": math.log(0.5), "kk": K1, "a": 0.5})
    same(S, torch.zeros(16, 16).double())                    # 1/2 faded and 1/2 of the unfaded erased: nothing is left


def test_learning_rate_of_two_turns_the_sign_and_swaps_two_memories():
    """Beyond RWKV-7's a < 1, where an eigenvalue is -1: what a state of this kind could count with."""
    y, _ = steps({"k": K1, "v": V1}, {"kk": K1, "a": 2.0, "r": K1}, {"kk": K1, "a": 2.0, "r": K1})
    same(y[1:], torch.stack((-V1, V1)))
    y, _ = steps({"k": K1, "v": V1}, {"k": K2, "v": V2}, {"kk": (K1 - K2) / math.sqrt(2), "a": 2.0, "r": K1}, {"r": K2})
    same(y[2:], torch.stack((V2, V1)))


def test_without_decay_and_erasing_it_is_linear_attention():
    r, w, k, v, kk, a, _ = random_inputs(T=70, decay=0.0)
    scores = torch.einsum("bthn,bshn->bhts", r, k).tril()
    y, _ = wkv7(r, w, k, v, kk, torch.zeros_like(a), backend="chunk")
    same(y, torch.einsum("bhts,bshn->bthn", scores, v))


def test_a_token_of_zeros_leaves_the_state_as_it_was():
    S = random_inputs()[-1][0, 0]
    _, after = steps(*[{}] * 20, state=S)
    same(after, S)


def test_no_token_sees_a_later_one():
    x = random_inputs(T=70)
    y, _ = wkv7(*x, backend="chunk")
    for t in (1, 31, 32, 45):
        later = [torch.cat((z[:, :t], 2 * z[:, t:]), 1) for z in x[:6]]
        assert torch.equal(wkv7(*later, x[-1], backend="chunk")[0][:, :t], y[:, :t])


# --- chunk = loop = equation -------------------------------------------------------------------------


def test_the_oracle_s_gradients_are_those_of_its_values():
    x = random_inputs(B=1, T=5, H=1, N=16)
    dy, dS = upstream(x)
    ref, h = equation(x, dy, dS), 1e-6
    total = lambda z: ((o := equation(z, dy, dS))["y"] * dy).sum() + (o["S"] * dS).sum()  # noqa: E731
    for i, name in enumerate(NAMES):
        direction = torch.randn(x[i].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(i))
        up, down = ([*x[:i], x[i] + s * h * direction, *x[i + 1:]] for s in (1, -1))
        slope = (total(up) - total(down)) / (2 * h)
        assert abs(slope - (ref["d" + name] * direction).sum()) < 1e-6 * abs(slope), name


@pytest.mark.parametrize("T", [1, 15, 16, 17, 63, 100, 257])
def test_chunk_is_loop_is_equation_in_values_and_all_gradients(T):
    assert_all_forms_agree(random_inputs(T=T, seed=T), single=3e-6)


@pytest.mark.parametrize("N", [16, 32, 64, 128])
def test_every_head_size_with_a_single_head(N):
    assert_all_forms_agree(random_inputs(B=1, T=40, H=1, N=N, seed=N), single=3e-6)


@pytest.mark.parametrize("B, H", [(1, 3), (3, 1), (1, 1)])
def test_batch_and_heads_do_not_mix(B, H):
    x = random_inputs(B=B, T=37, H=H)
    y, S = wkv7(*x, backend="chunk")
    for b in range(B):
        for h in range(H):
            one = [z[b:b + 1, :, h:h + 1] for z in x[:6]] + [x[6][b:b + 1, h:h + 1]]
            y_one, S_one = wkv7(*one, backend="chunk")
            same(y_one[0, :, 0], y[b, :, h])
            same(S_one[0, 0], S[b, h])


@pytest.mark.parametrize("L", [8, 16, 32, 64])
def test_the_chunk_length_is_only_a_matter_of_speed(L, monkeypatch):
    monkeypatch.setattr(wkv, "CHUNK", L)
    assert_all_forms_agree(random_inputs(T=130, decay=BOUND), single=5e-6)  # 64 steps at the bound: 1/W = 7e16


@pytest.mark.parametrize("decay", [0.0, -1e-7, -2e-4, BOUND])
def test_all_decays_that_rwkv7_can_make(decay):
    assert_all_forms_agree(random_inputs(T=100, decay=decay), single=5e-6)


@pytest.mark.parametrize("decay", [-1.24, -1.26, -2.5, -3, -5, -5.1, -10, -50, -1e30, -math.inf])
def test_decays_far_below_rwkv7_s_bound(decay):
    """Chunks of 32 until -1.25, 16 until -2.5, 8 until -5, then the loop. Gradients of w lose e^-w, hence 1e-4."""
    assert_all_forms_agree(random_inputs(T=70, decay=decay), single=1e-4)


@pytest.mark.parametrize("choice", [(0, -0.1, -0.6, -1.2), (0, -1e-3, -3), (0, -0.6, -10), (0, -0.3, -50, -math.inf)])
def test_decays_mixed_within_a_sequence(choice):
    x = random_inputs(T=100)
    x[1] = torch.tensor(choice).double()[torch.randint(len(choice), x[1].shape, generator=torch.Generator().manual_seed(2))]
    assert_all_forms_agree(x, single=1e-4)


def test_one_strong_decay_among_weak_ones_does_not_hurt_the_weak():
    x = random_inputs(T=100)
    x[1][0, 50, 0, 3] = -30.0
    assert_all_forms_agree(x, single=3e-6)


def test_all_zeros_give_zero_and_finite_gradients():
    x = [torch.zeros_like(z) for z in random_inputs()]
    dy, dS = upstream(x)
    out = operator(x, dy, dS)
    assert all(z.isfinite().all() for z in out.values())
    assert not out["y"].any() and not out["S"].any()
    assert_all_forms_agree(x, single=1e-6)


@pytest.mark.parametrize("which", [("r",), ("k",), ("v",), ("state",), ("r", "k", "v", "state")])
def test_huge_inputs_cost_no_accuracy(which):
    x = [1e4 * z if n in which else z for n, z in zip(NAMES, random_inputs(T=70))]
    assert_all_forms_agree(x, single=5e-6)
    x = [1e4 * z if n in which else z for n, z in zip(NAMES, random_inputs(T=70, decay=BOUND))]
    assert_all_forms_agree(x, single=5e-6)


@pytest.mark.parametrize("a", [0.0, 1e-30, 1.0])
def test_both_ends_of_the_learning_rate(a):
    x = random_inputs(T=70)
    x[5].fill_(a)
    assert_all_forms_agree(x, single=5e-6)


def repeated_token(decay, T=4096, N=64):
    """The adversary: one token T times, removed under the key it is written under, a next to 1."""
    r, w, k, v, kk, a, S = random_inputs(B=1, T=1, H=1, N=N, decay=decay)
    return [z.expand(1, T, 1, N).contiguous() for z in (r, w, kk, v, kk, torch.full_like(a, 0.9999).float().double())] + [S]


@pytest.mark.parametrize("decay", [-0.1, BOUND])
def test_one_token_repeated_4096_times_costs_at_most_thirty_times_the_error_of_random_tokens(decay):
    """... and at most ten times the float32 loop's: most of the loss is the recurrence's own, not the chunks'."""
    x, ordinary = repeated_token(decay), random_inputs(B=1, T=4096, H=1, N=64)
    dy, dS = upstream(x)
    hard = errors(operator(x, dy, dS, dtype=torch.float32), equation(x, dy, dS))
    easy = errors(operator(ordinary, dy, dS, dtype=torch.float32), equation(ordinary, dy, dS))
    loop = errors(operator(x, dy, dS, "loop", torch.float32), equation(x, dy, dS))
    assert max(easy.values()) < 2e-6
    assert all(e <= 30 * max(easy.values()) and e <= 10 * max(loop.values()) for e in hard.values()), (hard, easy, loop)
    assert_close(operator(x, dy, dS), equation(x, dy, dS), 1e-10)


@pytest.mark.parametrize("decay", [0.0, -2e-4])
def test_one_token_repeated_4096_times_almost_without_decay_drifts_by_less_than_a_thousandth(decay):
    """Nothing fades, so every chunk adds the same rounding error: in float32 the loop drifts as well (1e-4 at -2e-4)."""
    x = repeated_token(decay)
    dy, dS = upstream(x)
    ref = equation(x, dy, dS)
    assert_close(operator(x, dy, dS, dtype=torch.float32), ref, 1e-3)
    assert_close(operator(x, dy, dS), ref, 1e-10)


def test_near_identical_keys_with_learning_rate_one_stay_stable():
    """Where powers of A explode: (I - A)^-1 by Neumann products would hold entries of 2^31 and more."""
    x = random_inputs(T=256, N=32)
    x[4] = F.normalize(basis(0, 32) + 1e-3 * x[4], dim=-1).float().double()
    x[2], x[5] = x[4].clone(), torch.ones_like(x[5])
    assert_all_forms_agree(x, single=1e-5)


def test_gradcheck_of_the_hand_written_backward(monkeypatch):
    monkeypatch.setattr(wkv, "CHUNK", 8)  # three chunks, the last one padded
    x = [z.requires_grad_() for z in random_inputs(B=1, T=19, H=1, N=2)]
    assert torch.autograd.gradcheck(lambda *z: wkv7(*z, backend="chunk"), x)


# --- state, layout, precision ------------------------------------------------------------------------


@pytest.mark.parametrize("pieces", [(1, 99), (99, 1), (32, 68), (31, 1, 33, 35), (16, 17, 18, 49), (1,) * 20 + (80,)])
def test_splitting_anywhere_and_passing_the_state_changes_nothing_gradients_included(pieces):
    x = random_inputs(T=100)
    dy, dS = upstream(x)
    leaves = [z.clone().requires_grad_() for z in x]
    state, ys = leaves[-1], []
    for part in zip(*(z.split(pieces, 1) for z in leaves[:6])):
        y, state = wkv7(*part, state)
        ys.append(y)
    grads = torch.autograd.grad((torch.cat(ys, 1), state), leaves, (dy, dS))
    out = {"y": torch.cat(ys, 1).detach(), "S": state.detach(), **{"d" + n: g for n, g in zip(NAMES, grads)}}
    assert_close(out, equation(x, dy, dS), 1e-10)


def test_no_state_is_a_state_of_zeros():
    x = random_inputs()
    for backend in ("auto", "loop", "chunk"):
        without, zeros = wkv7(*x[:6], backend=backend), wkv7(*x[:6], torch.zeros_like(x[-1]), backend=backend)
        assert all(map(torch.equal, without, zeros))


@pytest.mark.parametrize("backend", ["loop", "chunk"])
@pytest.mark.parametrize("T", [1, 32, 50])
def test_inputs_and_upstream_gradients_are_never_changed_in_place(backend, T):
    for dtype in (torch.float32, torch.float64):
        x = [z.to(dtype) for z in random_inputs(B=1, T=T, H=1)]  # B H = 1: where views are most likely
        leaves, given = [z.clone().requires_grad_() for z in x], [z.to(dtype) for z in upstream(x)]
        y, S = wkv7(*leaves, backend=backend)
        kept, given_kept = (y.detach().clone(), S.detach().clone()), [z.clone() for z in given]
        torch.autograd.grad((y, S), leaves, given)
        assert all(map(torch.equal, leaves, x)) and all(map(torch.equal, given, given_kept))
        assert torch.equal(y, kept[0]) and torch.equal(S, kept[1])


def test_the_outgoing_state_shares_no_memory_with_the_incoming_one():
    for backend in ("loop", "chunk"):
        for T in (1, 40):
            x = random_inputs(B=1, T=T, H=1)
            before = x[-1].clone()
            wkv7(*x, backend=backend)[1].zero_()
            assert torch.equal(x[-1], before)


def test_memory_layout_does_not_matter():
    x = random_inputs(T=50)
    dy, dS = upstream(x)
    ref = equation(x, dy, dS)
    heads_first = [z.transpose(1, 2).contiguous().transpose(1, 2) for z in x[:6]] + [x[6].mT.contiguous().mT]
    strided = [torch.stack((z, z), -1).flatten(-2)[..., ::2] for z in x]
    sliced = [torch.cat((z, z), 1)[:, 50:] for z in x[:6]] + [x[6]]
    for layout in (heads_first, strided, sliced):
        assert not layout[0].is_contiguous() and all(map(torch.equal, layout, x))
        for backend in ("loop", "chunk"):
            assert_close(operator(layout, dy.transpose(1, 2).contiguous().transpose(1, 2), dS.mT.contiguous().mT, backend), ref, 1e-10)


def test_one_tensor_may_serve_as_several_inputs_and_be_expanded():
    x = random_inputs(T=50)
    one = F.normalize(x[0], dim=-1)
    shared = [one, -one.abs(), one, one, one, one.abs(), x[-1]]
    expanded = [z[:, :1].expand_as(z) for z in x[:6]] + [x[6][:1].expand_as(x[6])]
    for z in (shared, expanded):
        dy, dS = upstream(x)
        assert_close(operator(z, dy, dS), equation(z, dy, dS), 1e-10)


@pytest.mark.parametrize("backend", ["loop", "chunk"])
def test_expanded_upstream_gradients_and_unused_outputs(backend):
    x = random_inputs(T=50)
    one, none = (lambda z: torch.ones_like(z)), (lambda z: torch.zeros_like(z))  # noqa: E731
    for loss, dy, dS in ((lambda y, S: y.sum() + S.sum(), one, one), (lambda y, S: y.sum(), one, none), (lambda y, S: S.sum(), none, one)):
        leaves = [z.clone().requires_grad_() for z in x]
        grads = torch.autograd.grad(loss(*wkv7(*leaves, backend=backend)), leaves, materialize_grads=True)
        ref = equation(x, dy(x[0]), dS(x[-1]))
        assert_close({"d" + n: g for n, g in zip(NAMES, grads)}, {n: z for n, z in ref.items() if n[0] == "d"}, 1e-10)


def test_gradients_for_some_inputs_only():
    x = random_inputs(T=50)
    dy, dS = upstream(x)
    ref = equation(x, dy, dS)
    for i, name in enumerate(NAMES):
        leaves = [z.clone().requires_grad_(j == i) for j, z in enumerate(x)]
        (g,) = torch.autograd.grad(wkv7(*leaves, backend="chunk"), [leaves[i]], (dy, dS))
        assert_close({"d" + name: g}, {"d" + name: ref["d" + name]}, 1e-10)


@pytest.mark.parametrize("backend", ["loop", "chunk"])
def test_bfloat16_in_gives_bfloat16_y_and_a_float32_state(backend):
    x = [z.bfloat16() for z in random_inputs(T=50)]
    leaves = [z.clone().requires_grad_() for z in x]
    y, S = wkv7(*leaves, backend=backend)
    assert y.dtype == torch.bfloat16 and S.dtype == torch.float32
    dy, dS = upstream(x)
    dy, dS = dy.bfloat16().double(), dS.float().double()
    ref = equation(x, dy, dS)
    grads = torch.autograd.grad((y, S), leaves, (dy.bfloat16(), dS.float()))
    assert all(g.dtype == torch.bfloat16 for g in grads)
    assert_close({"S": S.detach()}, {"S": ref["S"]}, 3e-6)  # inside everything is float32
    assert_close({"y": y.detach(), **{"d" + n: g for n, g in zip(NAMES, grads)}}, {n: z for n, z in ref.items() if n != "S"}, 4e-3)


def test_mixed_precision_as_the_model_has_it():
    """r, k, v, a from bfloat16 matrices, w, kk and the state in float32."""
    x = [z.float() if n in ("w", "kk", "state") else z.bfloat16() for n, z in zip(NAMES, random_inputs(T=50))]
    y, S = wkv7(*x)
    ref = equation(x, *upstream(x))
    assert y.dtype == torch.bfloat16 and S.dtype == torch.float32
    assert_close({"S": S}, {"S": ref["S"]}, 3e-6)


@pytest.mark.parametrize("inside", [False, True], ids=["backward after autocast", "backward within autocast"])
@pytest.mark.parametrize("T", [5, 50])
def test_autocast_leaves_the_inside_in_float32(T, inside):
    x = random_inputs(T=T)
    dy, dS = upstream(x)
    leaves = [z.float().requires_grad_() for z in x]
    with torch.autocast("cpu", torch.bfloat16):
        out = wkv7(*leaves)
    with torch.autocast("cpu", torch.bfloat16, enabled=inside):
        grads = torch.autograd.grad(out, leaves, (dy.float(), dS.float()))
    assert_close(dict(zip(["y", "S"] + ["d" + n for n in NAMES], [z.detach() for z in (*out, *grads)])), equation(x, dy, dS), 3e-6)


def test_float64_stays_float64():
    assert all(z.dtype == torch.float64 for z in wkv7(*random_inputs()))


def test_auto_on_a_cpu_is_the_loop_for_short_text_and_the_chunks_for_the_rest():
    for T, backend in ((1, "loop"), (15, "loop"), (16, "chunk"), (40, "chunk")):
        x = random_inputs(T=T)
        assert all(map(torch.equal, wkv7(*x), wkv7(*x, backend=backend)))


@pytest.mark.parametrize("name, bad", [(n, bad) for n in NAMES for bad in (math.nan, math.inf) if (n, bad) != ("w", math.inf)])
def test_nan_or_infinity_in_gives_nan_or_infinity_out_in_its_own_head_only(name, bad):
    x = random_inputs(B=2, T=70, H=2)
    i = NAMES.index(name)
    x[i][(0, 1) if name == "state" else (0, 40, 1)] = bad
    for backend in ("loop", "chunk"):
        y, S = wkv7(*x, backend=backend)
        assert not y[0, -1 if name != "r" else 40, 1].isfinite().any()
        assert name == "r" or not S[0, 1].isfinite().any()
        assert y[1].isfinite().all() and y[0, :, 0].isfinite().all() and S[1].isfinite().all() and S[0, 0].isfinite().all()


# --- errors ------------------------------------------------------------------------------------------


def refuses(pattern, *args, **kwargs):
    with pytest.raises(ValueError, match=pattern) as caught:
        wkv7(*args, **kwargs)
    assert "\n" not in str(caught.value) and ":" in str(caught.value)  # one line: the value, then the rule


def test_inputs_of_different_shapes_are_refused():
    x = random_inputs(T=20)
    for i in range(1, 6):
        refuses(r"one shape .*\(2, 19, 2, 16\)", *[z[:, :19] if j == i else z for j, z in enumerate(x)])
    refuses("one shape", *[z[:, 0] for z in x[:6]])
    refuses("one shape", *[z[..., :1] if j == 3 else z for j, z in enumerate(x)])  # would broadcast


def test_no_tokens_are_refused():
    refuses(r"T>=1", *[z[:, :0] for z in random_inputs()[:6]])


def test_a_state_of_another_shape_is_refused():
    x = random_inputs()
    for state in (x[-1][:1], x[-1][..., :8], x[-1].flatten(), x[-1][0]):
        refuses(r"must be \(B, H, N, N\) = \(2, 2, 16, 16\)", *x[:6], state)


def test_an_unknown_backend_is_refused_and_the_known_ones_named():
    refuses("'cuda' is unknown: choose one of auto, loop, chunk", *random_inputs(), backend="cuda")


@pytest.mark.parametrize("backend", ["auto", "loop", "chunk"])
@pytest.mark.parametrize("T", [2, 50])
def test_growth_is_refused_by_every_form(backend, T):
    x = random_inputs(T=T)
    x[1][0, T // 2, 0, 0] = 0.25
    refuses("0.25: it must be <= 0", *x, backend=backend)
