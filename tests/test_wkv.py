"""wkv.py: what the memory does, and that every form of it is the equation.

The oracle of the second half is the recurrence and its chain rule in float64 NumPy
(common_wkv.py), which shares no line with wkv.py. Odd sizes, bad inputs and memory
layouts: edge/test_wkv.py. The fast form alone: kernels/test_wkv_torch.py.
"""

import math

import pytest
import torch
import torch.nn.functional as F

import wkv
from common_forms import CHUNKED, FORMS, assert_all_forms_agree, assert_close, basis, named
from common_forms import operator, same, steps
from common_wkv import BOUND, NAMES, equation, errors, random_inputs, repeated_token, upstream
from wkv import wkv7

# ------------------------------------------------------------------------------------------
# What the operator means: hand-worked, and the same in all forms

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
    def write(v, a):
        return {"k": K1, "v": v, "kk": K1, "a": a, "r": K1}

    delta, _ = steps(write(V1, 1.0), write(V2, 1.0))
    linear, _ = steps(write(V1, 0.0), write(V2, 0.0))
    same(delta[1], V2)
    same(linear[1], V1 + V2)


def test_learning_rate_of_one_quarter_erases_one_quarter():
    y, _ = steps({"k": K1, "v": V1}, {"kk": K1, "a": 0.25, "r": K1})
    same(y[1], 0.75 * V1)


def test_learning_rate_is_per_channel():
    both = (K1 + K2) / math.sqrt(2)                     # stored and removed under both, in channel 1 only
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
    same(S, torch.zeros(16, 16).double())               # half faded, half of the unfaded erased


def test_learning_rate_of_two_turns_the_sign_and_swaps_two_memories():
    """Beyond RWKV-7's a < 1, where an eigenvalue is -1: a state that could count."""
    y, _ = steps({"k": K1, "v": V1}, {"kk": K1, "a": 2.0, "r": K1}, {"kk": K1, "a": 2.0, "r": K1})
    same(y[1:], torch.stack((-V1, V1)))
    swap = {"kk": (K1 - K2) / math.sqrt(2), "a": 2.0, "r": K1}
    y, _ = steps({"k": K1, "v": V1}, {"k": K2, "v": V2}, swap, {"r": K2})
    same(y[2:], torch.stack((V2, V1)))


@pytest.mark.parametrize("backend", CHUNKED)
def test_without_decay_and_erasing_it_is_linear_attention(backend):
    r, w, k, v, kk, a, _ = random_inputs(T=70, decay=0.0)
    scores = torch.einsum("bthn,bshn->bhts", r, k).tril()
    y, _ = wkv7(r, w, k, v, kk, torch.zeros_like(a), backend=backend)
    same(y, torch.einsum("bhts,bshn->bthn", scores, v))


def test_a_token_of_zeros_leaves_the_state_as_it_was():
    S = random_inputs()[-1][0, 0]
    _, after = steps(*[{}] * 20, state=S)
    same(after, S)


@pytest.mark.parametrize("backend", CHUNKED)
def test_no_token_sees_a_later_one(backend):
    x = random_inputs(T=70)
    y, _ = wkv7(*x, backend=backend)
    for t in (1, 31, 32, 45):
        changed = [torch.cat((z[:, :t], 2 * z[:, t:]), 1) for z in x[:6]]
        assert torch.equal(wkv7(*changed, x[-1], backend=backend)[0][:, :t], y[:, :t])


# ------------------------------------------------------------------------------------------
# wkv7: from a state to a state, in float32 inside

SPLITS = [(1, 99), (99, 1), (32, 68), (31, 1, 33, 35), (16, 17, 18, 49), (1,) * 20 + (80,)]


@pytest.mark.parametrize("backend", ["auto", "chunk"])
@pytest.mark.parametrize("pieces", SPLITS, ids=str)
def test_splitting_anywhere_and_passing_the_state_changes_nothing_gradients_included(pieces, backend):
    x = random_inputs(T=100)
    dy, dS = upstream(x)
    leaves = [z.clone().requires_grad_() for z in x]
    state, ys = leaves[-1], []
    for part in zip(*(z.split(pieces, 1) for z in leaves[:6])):
        y, state = wkv7(*part, state, backend=backend)
        ys.append(y)
    y = torch.cat(ys, 1)
    grads = torch.autograd.grad((y, state), leaves, (dy, dS))
    assert_close(named(y, state, grads), equation(x, dy, dS), 1e-10)


@pytest.mark.parametrize("backend", ["auto", *FORMS])
def test_no_state_is_a_state_of_zeros(backend):
    x = random_inputs()
    without = wkv7(*x[:6], backend=backend)
    zeros = wkv7(*x[:6], torch.zeros_like(x[-1]), backend=backend)
    assert all(map(torch.equal, without, zeros))


@pytest.mark.parametrize("backend", FORMS)
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
    out = named(y, S, grads)
    assert_close({"S": out.pop("S")}, {"S": ref.pop("S")}, 3e-6)        # inside everything is float32
    assert_close(out, ref, 4e-3)


def test_float64_stays_float64():
    assert all(z.dtype == torch.float64 for z in wkv7(*random_inputs()))


# ------------------------------------------------------------------------------------------
# chunk = torch = loop = equation

def test_the_oracle_s_gradients_are_those_of_its_values():
    x = random_inputs(B=1, T=5, H=1, N=16)
    dy, dS = upstream(x)
    ref, h = equation(x, dy, dS), 1e-6

    def total(z):
        out = equation(z, dy, dS)
        return (out["y"] * dy).sum() + (out["S"] * dS).sum()

    for i, name in enumerate(NAMES):
        g = torch.Generator().manual_seed(i)
        direction = torch.randn(x[i].shape, dtype=torch.float64, generator=g)
        up, down = ([*x[:i], x[i] + s * h * direction, *x[i + 1:]] for s in (1, -1))
        slope = (total(up) - total(down)) / (2 * h)
        assert abs(slope - (ref["d" + name] * direction).sum()) < 1e-6 * abs(slope), name


@pytest.mark.parametrize("T", [1, 15, 16, 17, 63, 100, 257])
def test_chunk_is_loop_is_equation_in_values_and_all_gradients(T):
    assert_all_forms_agree(random_inputs(T=T, seed=T), single=3e-6)


@pytest.mark.parametrize("N", [16, 32, 64, 128])
def test_every_head_size_with_a_single_head(N):
    assert_all_forms_agree(random_inputs(B=1, T=40, H=1, N=N, seed=N), single=3e-6)


@pytest.mark.parametrize("decay", [0.0, -1e-7, -2e-4, BOUND])
def test_all_decays_that_rwkv7_can_make(decay):
    assert_all_forms_agree(random_inputs(T=100, decay=decay), single=5e-6)


@pytest.mark.parametrize("decay", [-1.24, -1.26, -2.5, -3, -5, -5.1, -10, -50, -1e30, -math.inf])
def test_decays_far_below_rwkv7_s_bound(decay):
    """Chunks of 32 until -1.25, 16 until -2.5, 8 until -5, then the loop.

    Gradients of w lose e^-w, hence 1e-4.
    """
    assert_all_forms_agree(random_inputs(T=70, decay=decay), single=1e-4)


@pytest.mark.parametrize("backend", CHUNKED)
@pytest.mark.parametrize("decay", [-0.1, BOUND])
def test_one_token_repeated_4096_times_costs_at_most_thirty_times_the_error_of_random_tokens(decay, backend):
    """And at most ten times the loop's: most of it is the recurrence's own."""
    x, ordinary = repeated_token(decay), random_inputs(B=1, T=4096, H=1, N=64)
    dy, dS = upstream(x)
    ref = equation(x, dy, dS)
    hard = errors(operator(x, dy, dS, backend, torch.float32), ref)
    easy = errors(operator(ordinary, dy, dS, backend, torch.float32), equation(ordinary, dy, dS))
    loop = errors(operator(x, dy, dS, "loop", torch.float32), ref)
    limit = min(30 * max(easy.values()), 10 * max(loop.values()))
    assert max(easy.values()) < 2e-6 and all(e <= limit for e in hard.values()), (hard, easy, loop)
    assert_close(operator(x, dy, dS, backend), ref, 1e-10)


# ------------------------------------------------------------------------------------------
# The fastest form, and `python wkv.py`

def test_auto_on_a_cpu_is_the_loop_for_short_text_and_the_chunks_for_the_rest():
    for T, backend in ((1, "loop"), (15, "loop"), (16, "torch"), (40, "torch")):
        x = random_inputs(T=T)
        assert all(map(torch.equal, wkv7(*x), wkv7(*x, backend=backend)))


def test_the_script_prints_how_far_each_form_is_from_the_definition(capsys):
    """A line for each form that can run here: y, S and the seven gradients."""
    wkv.compare(T=40)
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["y", "S", "dr", "dw", "dk", "dv", "dkk", "da", "dS"]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    forms = list(FORMS) if wkv.why_not_triton(torch.empty(1, 1, 1, 32, device=device)) else [*FORMS, "triton"]
    assert [line.split()[0] for line in lines] == forms
    for line in lines:
        values = [float(value) for value in line.split()[1:]]
        assert len(values) == 9 and all(value < 1e-5 for value in values), line
