"""The Triton kernels: triton = the equation in float64 NumPy.

In values and in every gradient. Where it hurts, and what is refused, is in
tests/edge/test_wkv_triton.py.
"""

import os
import subprocess
import sys

import pytest
import torch
from common import REPO, tiny_model
from common_triton import DEVICE, GRADIENTS, TOLERANCES, assert_right
from common_wkv import BOUND, NAMES, equation, errors, random_inputs, upstream

from kernels import wkv_triton
from wkv import wkv7


# ------------------------------------------------------------------------------------------
# triton = equation

@pytest.mark.parametrize("T", [1, 15, 16, 17, 33, 70])
def test_kernels_are_the_equation_in_values_and_all_gradients(T):
    assert_right(random_inputs(B=2, T=T, H=2, N=32, seed=T))


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("N", [16, 32, 64, 128])
def test_every_head_size_and_precision(N, dtype):
    assert_right(random_inputs(B=1, T=50, H=1, N=N, seed=N), dtype)


@pytest.mark.parametrize("B, H", [(1, 3), (3, 1), (2, 2)])
def test_texts_and_heads_do_not_mix(B, H):
    assert_right(random_inputs(B=B, T=20, H=H, N=32))


@pytest.mark.parametrize("L", [16, 32, 64])
def test_the_chunk_length_is_only_a_matter_of_speed(L):
    assert_right(random_inputs(B=1, T=100, H=2, N=32, decay=BOUND), L=L)


@pytest.mark.parametrize("T, segments, dtype", [
    (128, 4, torch.float32), (100, 2, torch.float32), (150, 7, torch.float32), (90, 6, torch.float32),
    (70, 3, torch.bfloat16)])
def test_segments_walked_side_by_side_are_one_walk(T, segments, dtype):
    """Of 16 tokens a chunk: (150, 7) has short last segments, and (90.

    6) one segment per chunk.
    """
    assert_right(random_inputs(B=1, T=T, H=2, N=32), dtype, L=16, segments=segments)


@pytest.mark.parametrize("decay", [0.0, -1e-7, -2e-4, BOUND])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_decays_that_rwkv7_can_make(decay, dtype):
    assert_right(random_inputs(B=1, T=70, H=1, N=32, decay=decay), dtype)


# ------------------------------------------------------------------------------------------
# State, precision, memory

def test_splitting_anywhere_and_passing_the_state_changes_nothing_gradients_included():
    x = random_inputs(B=1, T=60, H=2, N=32)
    dy, dS = upstream(x)
    leaves = [z.float().to(DEVICE).requires_grad_() for z in x]
    state, ys = leaves[-1], []
    for part in zip(*(z.split((7, 33, 1, 19), 1) for z in leaves[:6])):
        y, state = wkv7(*part, state, backend="triton")
        ys.append(y)
    y = torch.cat(ys, 1)
    grads = torch.autograd.grad((y, state), leaves, (dy.float().to(DEVICE), dS.float().to(DEVICE)))
    out = {"y": y.detach(), "S": state.detach(), **dict(zip(GRADIENTS, grads))}
    found = errors({n: z.cpu() for n, z in out.items()}, equation(x, dy, dS))
    assert all(e < 1e-5 for e in found.values())


def test_no_state_is_a_state_of_zeros():
    x = [z.float().to(DEVICE) for z in random_inputs(B=1, T=20, H=1, N=32)]
    without = wkv7(*x[:6], backend="triton")
    zeros = wkv7(*x[:6], torch.zeros_like(x[-1]), backend="triton")
    assert all(map(torch.equal, without, zeros))


def test_mixed_precision_as_the_model_has_it():
    """r, k, v, a from bfloat16 matrices, w, kk and the state in float32.

    Each gradient comes in its input's precision.
    """
    x = [z.float() if n in ("w", "kk", "state") else z.bfloat16()
         for n, z in zip(NAMES, random_inputs(B=1, T=50, H=1, N=32))]
    dy, dS = (z.to(d) for z, d in zip(upstream(x), (torch.bfloat16, torch.float32)))
    leaves = [z.clone().to(DEVICE).requires_grad_() for z in x]
    y, S = wkv7(*leaves, backend="triton")
    grads = torch.autograd.grad((y, S), leaves, (dy.to(DEVICE), dS.to(DEVICE)))
    assert y.dtype == torch.bfloat16 and all(g.dtype == z.dtype for g, z in zip(grads, leaves))
    out = {"y": y.detach(), "S": S.detach(), **dict(zip(GRADIENTS, grads))}
    found = errors({n: z.cpu() for n, z in out.items()}, equation(x, dy, dS))
    assert all(e <= 1.2e-2 for e in found.values()) and found["y"] <= 6e-3, found


def test_saved_memory_is_at_most_one_and_a_half_times_the_inputs():
    """Heads of 64 in bfloat16: a state of N N numbers for 32 tokens.

    Beside 6 N numbers for each.
    """
    x = [z.bfloat16().to(DEVICE).requires_grad_() for z in random_inputs(B=1, T=128, H=1, N=64)[:6]]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda z: saved.append(z.nbytes) or z, lambda z: z):
        wkv7(*x, backend="triton")
    assert sum(z.nbytes for z in x) < sum(saved) <= 1.5 * sum(z.nbytes for z in x)
    with torch.no_grad():
        S = torch.zeros(1, 1, 64, 64, device=DEVICE)
        states = wkv_triton.forward(*x, S, 32, 32, 1, False, False)[2]
    assert states.numel() == 0


def test_a_large_gpu_is_filled_and_what_is_kept_stays_small(monkeypatch):
    """132 multiprocessors: heads alone, or segments of at least 8 chunks.

    None is empty.
    """
    properties = type("H200", (), {"multi_processor_count": 132})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)

    def plan(heads, T):
        return wkv_triton.launch_plan(heads, T, 32, 64, torch.bfloat16, torch.device("cuda"))

    assert plan(512, 4096) == (64, 1) and plan(96, 1024) == (32, 1)
    assert plan(12, 4096) == (32, 11) and plan(32, 32768)[1] == 4
    for heads in (1, 3, 12, 40):
        for T in range(1, 6000, 37):
            (BV, segments), chunks = plan(heads, T), -(-T // 32)
            m = -(-chunks // segments)
            assert (segments - 1) * m < chunks and (segments == 1 or m >= 8)


# ------------------------------------------------------------------------------------------
# As an operator of PyTorch

def test_compiles_without_a_graph_break():
    x = [z.float().to(DEVICE).requires_grad_() for z in random_inputs(B=1, T=40, H=2, N=32)]
    results = []
    for min_w in (None, BOUND):
        def f(*z, min_w=min_w):
            return wkv7(*z, backend="triton", min_w=min_w)

        compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
        for g in (f, compiled):
            y, S = g(*x)
            results.append((y, S, *torch.autograd.grad(y.sum() + S.sum(), x)))
        assert all(map(torch.equal, *results[-2:]))
    compiled = torch.compile(lambda *z: wkv7(*z, backend="triton"), fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match="from -3 to -3: a compiled wkv7 takes -2.5 to 0, unless told min_w"):
        compiled(x[0], torch.full_like(x[1], -3), *x[2:])


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
    model = tiny_model(mixer="r", ffn="channelmix").to(DEVICE)
    tokens = torch.randint(257, (2, 40), device=DEVICE)
    both = []
    for backend in ("loop", "triton"):
        monkeypatch.setattr("model.wkv7", lambda *z, backend=backend, **k: wkv7(*z, backend=backend, **k))
        logits = model(tokens)[0]
        both.append((logits, *torch.autograd.grad(logits.square().mean(), list(model.parameters()))))
    for a, b in zip(*both):
        assert (a - b).norm() <= 1e-4 * b.norm() + 1e-7


# ------------------------------------------------------------------------------------------
# Machine code

COMPILE = """
import sys, torch, triton
from triton.backends.compiler import GPUTarget
import kernels.wkv_triton as W
from kernels import triton_chunk
name, N = sys.argv[1], int(sys.argv[2])
dtype = getattr(torch, name)
L = triton_chunk(dtype, N, -0.6065)
BV, _ = W.launch_plan(10000, 4096, L, N, dtype, torch.device("cpu"))
sizes = W.grid_and_sizes(8, 4096, 64, N, L, 1, BV, dtype)[1]
element = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16"}[name]

def kind(p):
    if p in constants:
        return "constexpr"
    if p in ("T", "H", "chunks", "m", "segments"):
        return "i32"
    if "jumps" in p or p.startswith(("S_", "dS_")):
        return "*fp32"
    return "*bf16" if "states" in p else element

for kernel, flags in ((W.walk, {"PROBE": False, "SAVE": True}), (W.walk, {"PROBE": True, "SAVE": False}),
                      (W.walk_back, {"PROBE": False}), (W.gradients, {})):
    constants = {k: v for k, v in (sizes | flags).items() if k.isupper() and len(k) > 1 or k in "NL"}
    constants = {k: v for k, v in constants.items() if k in kernel.arg_names}
    signature = {p: kind(p) for p in kernel.arg_names}
    source = triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs=constants)
    options = {"num_warps": sizes["num_warps"]}
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    print(kernel.__name__, built.metadata.shared, built.asm["ptx"].count("mma"), len(built.asm["cubin"]))
"""


@pytest.mark.parametrize("dtype, N", [("bfloat16", 64), ("float16", 128)])
def test_kernels_compile_to_hopper_machine_code_within_its_shared_memory(dtype, N, tmp_path):
    """Triton needs no GPU to compile for one.

    An H100 gives a program at most 227 KB.
    """
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(REPO)}
    child = subprocess.run([sys.executable, "-c", COMPILE, dtype, str(N)], env=env, capture_output=True,
                           text=True, cwd=tmp_path)
    assert child.returncode == 0, child.stderr[-2000:]
    lines = [line.split() for line in child.stdout.splitlines()]
    assert [line[0] for line in lines] == ["walk", "walk", "walk_back", "gradients"]
    for _, shared, products, size in lines:
        assert int(shared) <= 232448 and int(products) > 20 and int(size) > 0, lines
