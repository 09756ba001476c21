"""The Triton kernels: triton = the equation in float64 NumPy, in values and in every gradient, also where it hurts.

Without a GPU they run in Triton's interpreter, on sizes that take it seconds; with one they run compiled, and also larger.
"""

import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import wkv
from common import REPO
from test_wkv import BOUND, NAMES, equation, errors, random_inputs, repeated_token, upstream
from wkv import wkv7

triton = pytest.importorskip("triton", reason="Triton is for Linux")
wkv_triton = pytest.importorskip("wkv_triton")

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
VALUES, GRADIENTS = ("y", "S"), tuple("d" + name for name in NAMES)
TOLERANCES = {torch.float32: (1e-5, 1e-4), torch.float16: (1e-3, 4e-3), torch.bfloat16: (6e-3, 1.2e-2)}  # values, gradients


# --- helpers --------------------------------------------------------------------------------------


def rounded(x, dtype):
    """The inputs as the kernels get them, r ... a in `dtype` and the state in float32, but held in float64: the truth is that of the same numbers."""
    return [z.to(dtype if n != "state" else torch.float32).double() for n, z in zip(NAMES, x)]


def triton_operator(x, dy, dS, dtype=torch.float32, **settings):
    """y, the state and all gradients by the kernels; `settings` go to wkv7_triton (chunk length L, segments), past wkv7's checks."""
    leaves = [z.detach().to(DEVICE, dtype if n != "state" else torch.float32).requires_grad_() for n, z in zip(NAMES, x)]
    y, S = wkv_triton.wkv7_triton(*leaves, **settings) if settings else wkv7(*leaves, backend="triton")
    assert y.dtype == dtype and S.dtype == torch.float32
    grads = torch.autograd.grad((y, S), leaves, (dy.to(DEVICE, dtype), dS.to(DEVICE, torch.float32)))
    assert all(g.dtype == z.dtype for g, z in zip(grads, leaves))
    return {"y": y.detach().cpu(), "S": S.detach().cpu(), **{n: g.cpu() for n, g in zip(GRADIENTS, grads)}}


def worst(x, dtype=torch.float32, **settings):
    """Largest relative error of the values and of the gradients, against the equation on the same rounded numbers."""
    x = rounded(x, dtype)
    dy, dS = (z.to(d).double() for z, d in zip(upstream(x), (dtype, torch.float32)))
    found = errors(triton_operator(x, dy, dS, dtype, **settings), equation(x, dy, dS))
    assert not any(map(math.isnan, found.values())), found
    return max(found[n] for n in VALUES), max(found[n] for n in GRADIENTS)


def assert_right(x, dtype=torch.float32, slack=1.0, **settings):
    found = worst(x, dtype, **settings)
    assert all(e <= slack * limit for e, limit in zip(found, TOLERANCES[dtype])), found


# --- triton = equation ------------------------------------------------------------------------------


@pytest.mark.parametrize("T", [1, 15, 16, 17, 33, 70])
def test_kernels_are_the_equation_in_values_and_all_gradients(T):
    assert_right(random_inputs(B=2, T=T, H=2, N=32, seed=T))


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("N", [16, 32, 64, 128])
def test_every_head_size_and_precision(N, dtype):
    assert_right(random_inputs(B=1, T=50, H=1, N=N, seed=N), dtype)


@pytest.mark.parametrize("backend", ["auto", "loop", "chunk", "triton"])
def test_an_empty_batch_gives_an_empty_answer(backend):
    y, S = wkv7(*[z[:0].float().to(DEVICE) for z in random_inputs(N=32)], backend=backend)
    assert y.shape == (0, 50, 2, 32) and S.shape == (0, 2, 32, 32)


def test_a_decay_that_is_no_number_gives_answers_that_are_none():
    x = [z.float().to(DEVICE) for z in random_inputs(B=1, T=20, H=1, N=32)]
    x[1][0, 3, 0, 5] = math.nan
    assert wkv7(*x, backend="triton")[0].isnan().any()


def test_a_large_gpu_is_filled_and_what_is_kept_stays_small(monkeypatch):
    """132 multiprocessors: heads alone, or segments of at least 8 chunks; none is empty."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: type("H200", (), {"multi_processor_count": 132}))
    plan = lambda heads, T, L=32: wkv_triton.plan(heads, T, L, 64, torch.bfloat16, torch.device("cuda"))  # noqa: E731
    assert plan(512, 4096) == (64, 1) and plan(96, 1024) == (32, 1) and plan(12, 4096) == (32, 11) and plan(32, 32768)[1] == 4
    for heads in (1, 3, 12, 40):
        for T in range(1, 6000, 37):
            (BV, segments), chunks = plan(heads, T), -(-T // 32)
            m = -(-chunks // segments)
            assert (segments - 1) * m < chunks and (segments == 1 or m >= 8)


@pytest.mark.parametrize("B, H", [(1, 3), (3, 1), (2, 2)])
def test_texts_and_heads_do_not_mix(B, H):
    assert_right(random_inputs(B=B, T=20, H=H, N=32))


@pytest.mark.parametrize("L", [16, 32, 64])
def test_the_chunk_length_is_only_a_matter_of_speed(L):
    assert_right(random_inputs(B=1, T=100, H=2, N=32, decay=BOUND), L=L)


@pytest.mark.parametrize("T, segments, dtype", [(128, 4, torch.float32), (100, 2, torch.float32), (150, 7, torch.float32),
                                               (90, 6, torch.float32), (70, 3, torch.bfloat16)])
def test_segments_walked_side_by_side_are_one_walk(T, segments, dtype):
    """Of 16 tokens a chunk: (150, 7) has short last segments, and (90, 6) one segment per chunk."""
    assert_right(random_inputs(B=1, T=T, H=2, N=32), dtype, L=16, segments=segments)


def test_more_segments_than_there_is_text_for_leave_the_last_ones_empty():
    assert_right(random_inputs(B=1, T=100, H=1, N=32), L=16, segments=5)  # 7 chunks, 2 to a segment: the fifth has none


@pytest.mark.parametrize("decay", [0.0, -1e-7, -2e-4, BOUND])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_decays_that_rwkv7_can_make(decay, dtype):
    assert_right(random_inputs(B=1, T=70, H=1, N=32, decay=decay), dtype)


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
    for dtype in (torch.float32, torch.bfloat16):
        x = [1e4 * z if n in which else z for n, z in zip(NAMES, random_inputs(B=1, T=40, H=1, N=32, decay=BOUND))]
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


LONG = 4096 if GPU else 192


def sensitivity(x, dy, dS):
    """How far dv moves when each bfloat16 input does by up to a unit in the last place."""
    g = torch.Generator().manual_seed(1)
    moved = [z * (1 + 2**-7 * (torch.rand(z.shape, generator=g).double() - 0.5)) for z in x[:6]] + [x[6]]
    return errors(equation(moved, dy, dS), equation(x, dy, dS))["dv"]


@pytest.mark.parametrize("fresh_reads", [False, True])
@pytest.mark.parametrize("decay", [-1e-3, -0.01, -0.1, BOUND])
def test_one_token_repeated_is_as_accurate_as_random_tokens_in_bfloat16(decay, fresh_reads):
    """What folding the erased into the keys is for: without it, or without the low halves of `dot32`, this fails.

    Except dv: what is left of dS under a key that every later token erases is a small part of it, and as hard to know as the key is.
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
    """Where powers of A would explode. All keys lie on one channel, whose rounding no sum over channels averages."""
    x = random_inputs(B=1, T=LONG // 4, H=1, N=32)
    x[4] = F.normalize(F.one_hot(torch.tensor(0), 32) + 1e-3 * x[4], dim=-1)
    x[2], x[5] = x[4].clone(), torch.ones_like(x[5])
    assert_right(x)
    assert_right(x, torch.bfloat16, slack=1.5)


# --- state, layout, precision ------------------------------------------------------------------------


def test_splitting_anywhere_and_passing_the_state_changes_nothing_gradients_included():
    x = random_inputs(B=1, T=60, H=2, N=32)
    dy, dS = upstream(x)
    leaves = [z.float().to(DEVICE).requires_grad_() for z in x]
    state, ys = leaves[-1], []
    for part in zip(*(z.split((7, 33, 1, 19), 1) for z in leaves[:6])):
        y, state = wkv7(*part, state, backend="triton")
        ys.append(y)
    grads = torch.autograd.grad((torch.cat(ys, 1), state), leaves, (dy.float().to(DEVICE), dS.float().to(DEVICE)))
    out = {"y": torch.cat(ys, 1).detach(), "S": state.detach(), **dict(zip(GRADIENTS, grads))}
    assert all(e < 1e-5 for e in errors({n: z.cpu() for n, z in out.items()}, equation(x, dy, dS)).values())


def test_no_state_is_a_state_of_zeros():
    x = [z.float().to(DEVICE) for z in random_inputs(B=1, T=20, H=1, N=32)]
    without, zeros = wkv7(*x[:6], backend="triton"), wkv7(*x[:6], torch.zeros_like(x[-1]), backend="triton")
    assert all(map(torch.equal, without, zeros))


def test_memory_layout_does_not_matter_and_inputs_stay_as_they_are():
    x = [z.float().to(DEVICE) for z in random_inputs(B=2, T=20, H=2, N=32)]
    given = [z.float().to(DEVICE) for z in upstream(x)]
    run = lambda z, g: (*(out := wkv7(*z, backend="triton")), *torch.autograd.grad(out, z, g))  # noqa: E731
    plain = [z.clone().requires_grad_() for z in x]
    ref = run(plain, given)
    assert all(map(torch.equal, plain, x))
    heads_first = [z.transpose(1, 2).contiguous().transpose(1, 2) for z in x[:6]] + [x[6].mT.contiguous().mT]
    strided = [torch.stack((z, z), -1).flatten(-2)[..., ::2] for z in x]
    for layout in (heads_first, strided):
        leaves = [z.detach().requires_grad_() for z in layout]
        assert not leaves[0].is_contiguous()
        assert all(map(torch.equal, run(leaves, (given[0].transpose(1, 2).contiguous().transpose(1, 2), given[1].mT.contiguous().mT)), ref))
    expanded = [z[:, :1].expand_as(z).detach().requires_grad_() for z in x[:6]] + [plain[6]]
    same = [z.detach().contiguous().requires_grad_() for z in expanded]
    assert all(map(torch.equal, run(expanded, given), run(same, given)))


def test_mixed_precision_as_the_model_has_it():
    """r, k, v, a from bfloat16 matrices, w, kk and the state in float32; each gradient in its input's precision."""
    x = [z.float() if n in ("w", "kk", "state") else z.bfloat16() for n, z in zip(NAMES, random_inputs(B=1, T=50, H=1, N=32))]
    dy, dS = (z.to(d) for z, d in zip(upstream(x), (torch.bfloat16, torch.float32)))
    leaves = [z.clone().to(DEVICE).requires_grad_() for z in x]
    y, S = wkv7(*leaves, backend="triton")
    grads = torch.autograd.grad((y, S), leaves, (dy.to(DEVICE), dS.to(DEVICE)))
    assert y.dtype == torch.bfloat16 and all(g.dtype == z.dtype for g, z in zip(grads, leaves))
    found = errors({"y": y.detach().cpu(), "S": S.detach().cpu(), **{n: g.cpu() for n, g in zip(GRADIENTS, grads)}}, equation(x, dy, dS))
    assert all(e <= 1.2e-2 for e in found.values()) and found["y"] <= 6e-3, found


def test_unused_outputs_and_inputs_without_gradient():
    x = [z.float().to(DEVICE) for z in random_inputs(B=1, T=20, H=1, N=32)]
    for used in (0, 1):
        leaves = [z.clone().requires_grad_(n in ("k", "state")) for n, z in zip(NAMES, x)]
        got = torch.autograd.grad(wkv7(*leaves, backend="triton")[used].sum(), [leaves[2], leaves[6]])
        want = torch.autograd.grad(wkv7(*leaves, backend="loop")[used].sum(), [leaves[2], leaves[6]])
        for a, b in zip(got, want):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert not wkv7(*x, backend="triton")[0].requires_grad


def test_every_element_of_the_outputs_is_written(monkeypatch):
    """Outputs start as NaN: one that is left out stays so."""
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: empty_like(*a, **k).fill_(math.nan))
    x = random_inputs(B=1, T=37, H=2, N=32)
    for settings in ({}, {"L": 16, "segments": 2}):
        assert_right(x, **settings)


def test_saved_memory_is_at_most_one_and_a_half_times_the_inputs():
    """Heads of 64 in bfloat16: a state of N N numbers for every 32 tokens, beside 6 N numbers for every token."""
    x = [z.bfloat16().to(DEVICE).requires_grad_() for z in random_inputs(B=1, T=128, H=1, N=64)[:6]]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda z: saved.append(z.nbytes) or z, lambda z: z):
        wkv7(*x, backend="triton")
    assert sum(z.nbytes for z in x) < sum(saved) <= 1.5 * sum(z.nbytes for z in x)
    with torch.no_grad():
        states = wkv_triton.forward(*x, torch.zeros(1, 1, 64, 64, device=DEVICE), 32, 32, 1, False, False)[2]
    assert states.numel() == 0


# --- as an operator of PyTorch --------------------------------------------------------------------------


def test_compiles_without_a_graph_break():
    x = [z.float().to(DEVICE).requires_grad_() for z in random_inputs(B=1, T=40, H=2, N=32)]
    results = []
    for lowest in (None, BOUND):
        f = lambda *z: wkv7(*z, backend="triton", lowest=lowest)  # noqa: E731
        compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
        for g in (f, compiled):
            y, S = g(*x)
            results.append((y, S, *torch.autograd.grad(y.sum() + S.sum(), x)))
        assert all(map(torch.equal, *results[-2:]))
    with pytest.raises(ValueError, match="from -3 to -3: a compiled wkv7 takes -2.5 to 0"):
        torch.compile(lambda *z: wkv7(*z, backend="triton"), fullgraph=True, backend="aot_eager")(x[0], torch.full_like(x[1], -3), *x[2:])


def test_pytorch_s_own_check_of_the_operator():
    x = [z.float().to(DEVICE).requires_grad_() for z in random_inputs(B=1, T=40, H=1, N=32)]
    for segments, save in ((1, True), (2, True), (1, False)):
        inputs = x if save else [z.detach() for z in x]
        torch.library.opcheck(torch.ops.nanorwkv.wkv7.default, (*inputs, 16, 32, segments, save, False))


def test_a_second_derivative_is_refused():
    x = [z.float().to(DEVICE).requires_grad_() for z in random_inputs(B=1, T=20, H=1, N=32)]
    g = torch.autograd.grad(wkv7(*x, backend="triton")[0].sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(g[0].sum(), x)


def test_a_model_with_the_kernels_is_the_model_without(monkeypatch):
    from common import tiny_model
    model = tiny_model(mixer="r", ffn="channelmix").to(DEVICE)
    tokens = torch.randint(257, (2, 40), device=DEVICE)
    run = lambda: (lambda logits: (logits, *torch.autograd.grad(logits.square().mean(), list(model.parameters()))))(model(tokens)[0])  # noqa: E731
    both = []
    for backend in ("loop", "triton"):
        monkeypatch.setattr("model.wkv7", lambda *z, backend=backend, **k: wkv7(*z, backend=backend, **k))
        both.append(run())
    for a, b in zip(*both):
        assert (a - b).norm() <= 1e-4 * b.norm() + 1e-7


# --- what it refuses ------------------------------------------------------------------------------------


def test_inputs_that_the_kernels_cannot_take_are_refused_with_a_remedy(monkeypatch):
    x = random_inputs(T=20)
    with pytest.raises(ValueError, match="'triton' takes float32, bfloat16 or float16 and heads of 16, 32, 64 or 128, not float64 and 16: use chunk"):
        wkv7(*[z.to(DEVICE) for z in x], backend="triton")
    with pytest.raises(ValueError, match="not float32 and 8: use chunk"):
        wkv7(*[z.float().to(DEVICE) for z in random_inputs(T=20, N=8)], backend="triton")
    with pytest.raises(ValueError, match="it must be <= 0"):
        wkv7(x[0].float().to(DEVICE), torch.ones_like(x[1]).float().to(DEVICE), *[z.float().to(DEVICE) for z in x[2:]], backend="triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="needs tensors on an NVIDIA GPU, or TRITON_INTERPRET=1"):
        wkv7(*[z.float() for z in x], backend="triton")
    monkeypatch.setattr(wkv, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install triton"):
        wkv7(*[z.float() for z in x], backend="triton")


# --- addresses, machine code ----------------------------------------------------------------------------


def test_addresses_beyond_two_to_the_31_are_right():
    out = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    place_of[(1,)](out, 70000, 2**20, 64, N=64)
    assert out.item() == 70000 // 64 * 2**20 * 64 * 64 + 70000 % 64 * 64


@triton.jit
def place_of(out, head, T, H, N: triton.language.constexpr):
    triton.language.store(out, wkv_triton.place(head + triton.language.program_id(0), T, H, N))


@pytest.mark.skipif(not GPU or torch.cuda.mem_get_info()[1] < 100e9, reason="needs a GPU with 100 GB")
def test_tensors_of_more_than_two_to_the_31_elements():
    B, T, H, N = 9, 65536, 64, 64
    x = [z.bfloat16().to(DEVICE) for z in random_inputs(B=1, T=T, H=1, N=N)[:6]]
    big = [z.expand(B, T, H, N).contiguous() for z in x]
    with torch.no_grad():
        y, _ = wkv7(*big, backend="triton")
        y1, _ = wkv7(*x, backend="triton")
    assert torch.equal(y[-1, :, -1], y1[0, :, 0])


COMPILE = """
import sys, torch, triton
from triton.backends.compiler import GPUTarget
import wkv_triton as W
dtype, N = getattr(torch, sys.argv[1]), int(sys.argv[2])
L, (BV, _) = W.chunk_length(dtype, N, -0.6065), W.plan(10000, 4096, W.chunk_length(dtype, N, -0.6065), N, dtype, torch.device("cpu"))
sizes = W.grid_and_sizes(8, 4096, 64, N, L, 1, BV, dtype)[1]
element = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16"}[sys.argv[1]]
for kernel, flags in ((W.walk, {"PROBE": False, "SAVE": True}), (W.walk, {"PROBE": True, "SAVE": False}), (W.walk_back, {"PROBE": False}), (W.gradients, {})):
    constants = {k: v for k, v in (sizes | flags).items() if k.isupper() and len(k) > 1 or k in "NL"}
    constants = {k: v for k, v in constants.items() if k in kernel.arg_names}
    kind = lambda p: ("constexpr" if p in constants else "i32" if p in ("T", "H", "chunks", "m", "segments")
                      else "*fp32" if "jumps" in p or p.startswith(("S_", "dS_")) else "*bf16" if "states" in p else element)
    source = triton.compiler.ASTSource(fn=kernel, signature={p: kind(p) for p in kernel.arg_names}, constexprs=constants)
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": sizes["num_warps"]})
    print(kernel.__name__, built.metadata.shared, built.asm["ptx"].count("mma"), len(built.asm["cubin"]))
"""


@pytest.mark.parametrize("dtype, N", [("bfloat16", 64), ("float16", 128)])
def test_kernels_compile_to_hopper_machine_code_within_its_shared_memory(dtype, N, tmp_path):
    """Triton needs no GPU to compile for one: an H100 gives a program at most 227 KB."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(REPO)}
    said = subprocess.run([sys.executable, "-c", COMPILE, dtype, str(N)], env=env, capture_output=True, text=True, cwd=tmp_path)
    assert said.returncode == 0, said.stderr[-2000:]
    lines = [line.split() for line in said.stdout.splitlines()]
    assert [line[0] for line in lines] == ["walk", "walk", "walk_back", "gradients"]
    assert all(int(shared) <= 232448 and int(products) > 20 and int(size) > 0 for _, shared, products, size in lines), lines
