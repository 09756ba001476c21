"""Speed and memory, each figure beside what it is to be compared with, measured in turns in one run.

    python bench.py                            all three, some minutes on two CPU cores
    python bench.py --only operator            wkv7 in chunks against its loop and against causal attention
    python bench.py --only train               a training step of a GPT and of an RWKV-7
    python bench.py --only decode              generation against the PyPI package `rwkv`, on the same weights
    python bench.py --only memory              peak memory and speed of training against the length of the sequence (alone: minutes)
    python bench.py --json out/bench.json
    python bench.py --kernels --repeat 20 --json out/kernels.json      on a GPU: the Triton kernels beside their rivals, and a plot
    TRITON_INTERPRET=1 python bench.py --kernels                       on any machine: shows that this runs, not how fast

What it is: medians of alternating repetitions, so that a busy machine slows both sides of a ratio. What it is not: a
profiler, or a test (no test depends on a time).
"""

import contextlib
import io
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from bptt import backward_in_pieces
from config import cli, run
from data.loader import Batch
from decode import optimize_for_inference
from model import LM, ModelConfig, cache_bytes, remembered_bytes
from train import Step, cross_entropy_loss
from wkv import why_not_triton, wkv7

SHAPES = ((16, 256, 4, 3.0), (4, 1024, 4, 4.0), (1, 4096, 4, 6.0))  # B, T, H, and how much faster than the loop we want to be
LOWEST = -math.exp(-0.5)  # RWKV-7's log decay is above it
GPT, RWKV = ModelConfig(), ModelConfig(mixer="r", ffn="channelmix")
DECODE = {"small": (replace(RWKV, n_layer=4, n_embd=128, n_head=2, rwkv_head_size=64), 200),  # a model, and how many tokens to time it with
          "large": (replace(RWKV, n_layer=12, n_embd=768, n_head=12, rwkv_head_size=64, vocab_size=4096), 16)}


@dataclass(frozen=True)
class BenchConfig:
    """What to measure. None means off."""

    only: str | None = None     # operator, train, decode; or memory, which is not among the three
    repeat: int = 5             # repetitions of each side
    json: str | None = None     # also write the results here
    device: str = "auto"        # auto, cpu, cuda; rwkv is measured on the CPU alone
    lengths: str | None = None  # of memory: tokens per sequence; None = 1024,2048,4096,8192,16384, on a GPU up to 65536
    bptt_chunk: int = 1024      # of memory: tokens at a time
    layers: int = 3             # of memory: the model's shape
    embd: int = 96
    limit: float = 60.0         # of memory: seconds; a side that took longer is left out at greater lengths
    kernels: bool = False       # only this: the operator's Triton kernels beside fla's and others


def stopwatch(side: Callable[[], object]) -> float:
    """Seconds by the clock on the wall, with all that Python and the CPU do."""
    sync = torch.cuda.synchronize if torch.cuda.is_initialized() else lambda: None
    sync()
    start = time.perf_counter()
    side()
    sync()
    return time.perf_counter() - start


def in_turns(sides: dict, repeat: int, clock: Callable[[Callable[[], object]], float] = stopwatch) -> dict:
    """Median seconds of each side, all sides run one after the other `repeat` times, after one run to warm up."""
    seconds: dict[object, list[float]] = {name: [] for name in sides}
    for i in range(repeat + 1):
        for name, side in sides.items():
            took = clock(side)
            if i:
                seconds[name].append(took)
    return {name: statistics.median(times) for name, times in seconds.items()}


# ---------------------------------------------------------------------------------------------------------------------
# The operator: forward and backward

@dataclass(frozen=True)
class Side:
    """One way to do the operator's work: run(*inputs) -> (y, state)."""

    run: Callable
    inputs: list[torch.Tensor]
    dy: torch.Tensor
    exact: Callable | None = None  # the same by definition, in whatever precision it is given

    @torch.no_grad()
    def forward(self) -> torch.Tensor:
        return self.run(*self.inputs)[0]

    def both(self) -> tuple[torch.Tensor, ...]:
        """Forward and backward: the gradients of the inputs."""
        return torch.autograd.grad(self.run(*self.inputs)[0], self.inputs, self.dy)


def operator_sides(B: int, T: int, H: int, N: int, device: str, dtype: torch.dtype) -> dict[str, Side]:
    """wkv7's forms and causal attention on inputs (B, T, H, N) such as RWKV-7 makes them."""
    torch.manual_seed(0)
    r, w, k, v, kk, a, dy = torch.randn(7, B, T, H, N, device=device)
    inputs = [x.to(dtype).requires_grad_() for x in (r, LOWEST * w.sigmoid(), k / 8, v, F.normalize(kk, dim=-1), a.sigmoid())]
    q = [x.to(dtype).transpose(1, 2).contiguous().requires_grad_() for x in (r, k, v)]  # (B, H, T, N)
    dy = dy.to(dtype)

    def wkv(form: str):
        return Side(partial(wkv7, backend=form, lowest=LOWEST), inputs, dy, exact=partial(wkv7, backend="chunk"))

    def attention(*q):
        return F.scaled_dot_product_attention(*q, is_causal=True), None

    return {form: wkv(form) for form in ("loop", "chunk", "triton")} | {"attention": Side(attention, q, dy.transpose(1, 2).contiguous())}


def bench_operator(cfg: BenchConfig, device: str) -> list[dict]:
    dtype, rows = (torch.bfloat16 if device == "cuda" else torch.float32), []
    print(f"\nwkv7, forward and backward, N = 64, {device}, {str(dtype)[6:]}: milliseconds, and how many times faster chunk is")
    print(f"{'':20}{'loop':>10}{'chunk':>10}{'attention':>11}{'than the loop':>21}{'than attention':>21}")
    for B, T, H, goal in SHAPES:
        sides = {name: side.both for name, side in operator_sides(B, T, H, 64, device, dtype).items() if name != "triton"}
        ms = {name: 1e3 * seconds for name, seconds in in_turns(sides, cfg.repeat).items()}
        than_loop, than_attention = ms["loop"] / ms["chunk"], ms["attention"] / ms["chunk"]
        rows.append({"B": B, "T": T, "H": H, "ms": ms, "than_loop": than_loop, "goal": goal, "than_attention": than_attention})
        print(f"B {B:<4}T {T:<6}H {H:<5}" + cell(ms, "loop", 10, 1) + cell(ms, "chunk", 10, 1) + cell(ms, "attention", 11, 1)
              + f"{than_loop:12.2f} (goal {goal:.0f}){than_attention:{12 if T >= 4096 else 21}.2f}" + " (goal 1)" * (T >= 4096), flush=True)
    return rows


def cell(values: dict[str, float], name: str, width: int, digits: int = 0) -> str:
    return f"{values[name]:{width},.{digits}f}" if name in values else f"{'-':>{width}}"


# ---------------------------------------------------------------------------------------------------------------------
# A training step

def train_side(model: LM, tokens: torch.Tensor) -> Callable[[], None]:
    """One AdamW step on tokens (B, T + 1)."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step():
        with torch.autocast("cuda", torch.bfloat16, enabled=tokens.is_cuda):
            logits, _ = model(tokens[:, :-1])
        F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def bench_train(cfg: BenchConfig, device: str, B: int = 8, T: int = 256) -> list[dict]:
    models, rows = {"GPT": LM(GPT).to(device), "RWKV-7": LM(RWKV).to(device)}, []
    tokens = torch.randint(GPT.vocab_size, (B, T + 1), device=device)
    seconds = in_turns({name: train_side(model, tokens) for name, model in models.items()}, cfg.repeat)
    print(f"\ntraining step, {GPT.n_layer} layers, C {GPT.n_embd}, {B} x {T} tokens, {device}\n{'':10}{'parameters':>12}{'tokens/s':>12}{'of GPT':>9}")
    for name, model in models.items():
        rows.append({"model": name, "parameters": model.n_params(), "tokens_per_s": B * T / seconds[name], "ratio": seconds["GPT"] / seconds[name]})
        print(f"{name:10}{model.n_params():12,}{rows[-1]['tokens_per_s']:12,.0f}{rows[-1]['ratio']:9.2f}", flush=True)
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Memory of a training step against the length of the sequence

SIDES = {"GPT": "a", "RWKV-7": "r", "RWKV-7, checkpointed": "r", "RWKV-7, in pieces": "r"}  # checkpointed: each block runs again on the way back


def length_side(name: str, T: int, cfg: BenchConfig, device: str) -> dict[str, float]:
    """Tokens/s of one AdamW step on one sequence of T tokens, and the process's peak memory above what it had before, in MB.

    The step before, on 16 tokens, has made gradients and moments: what is left are activations. For a process of its own.
    """
    shape = replace(GPT if SIDES[name] == "a" else RWKV, n_layer=cfg.layers, n_embd=cfg.embd, n_head=max(1, cfg.embd // 32), block_size=T)
    torch.manual_seed(0)
    model = LM(shape).to(device)
    if name.endswith("checkpointed"):
        for block in model.blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    module = Step(model, cross_entropy_loss)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens = torch.randint(shape.vocab_size, (1, T + 1), device=device)

    def step(n: int):
        batch = Batch(tokens[:, :n], tokens[:, 1 : n + 1], torch.ones(1, n, device=device))
        backward_in_pieces(module, batch, None, cfg.bptt_chunk if name.endswith("in pieces") else None, 1 / n, True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    def peak() -> float:
        if device == "cuda":
            return torch.cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)  # macOS says bytes, Linux kB

    step(16)
    before = peak()
    seconds = stopwatch(lambda: step(T))
    high = peak()
    if seconds < 5:  # the first time includes making room
        seconds = statistics.median(stopwatch(lambda: step(T)) for _ in range(3))
    return {"parameters": model.n_params(), "MB": (high - before) / 1e6, "tokens_per_s": T / seconds, "seconds": seconds}


def bench_memory(cfg: BenchConfig, device: str) -> list[dict]:
    """Each side at each length in a process of its own, whose peak is nobody else's."""
    lengths = sorted(parse_lengths(cfg.lengths or ",".join(str(1024 * 2**i) for i in range(7 if device == "cuda" else 5))))
    print(f"\ntraining on one sequence of T tokens, {cfg.layers} layers, C {cfg.embd}, {device}: MB above the idle model, tokens/s; pieces of {cfg.bptt_chunk}")
    print(f"{'T':>8}" + "".join(f"{name:>26}" for name in SIDES))
    rows, over = [], set()
    for T in lengths:
        row: dict = {"T": T}
        for name in SIDES:
            if name in over:
                continue
            code = f"import json, bench; print(json.dumps(bench.length_side({name!r}, {T}, bench.{cfg!r}, {device!r})))"
            try:
                child = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=4 * cfg.limit + 60)
                failed = child.stderr.strip().splitlines()[-1:] or [f"exit status {child.returncode}"] if child.returncode else []
            except subprocess.TimeoutExpired:
                failed = ["too slow"]
            if failed:  # out of memory, most likely; longer sequences need more
                print(f"{name} is left out from T = {T} on: {failed[0][:120]}", flush=True)
            else:
                row[name] = json.loads(child.stdout.splitlines()[-1])
            if failed or row[name]["seconds"] > cfg.limit:
                over.add(name)
        rows.append(row)
        print(f"{T:8}" + "".join(f"{row[name]['MB']:12,.0f} MB{row[name]['tokens_per_s']:9,.0f}/s" if name in row else f"{'-':>26}" for name in SIDES),
              flush=True)
    return rows


def parse_lengths(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) >= 16 for part in parts):
        raise ValueError(f"lengths = {text!r}: write numbers of at least 16 with commas, such as 1024,4096")
    return list(map(int, parts))


# ---------------------------------------------------------------------------------------------------------------------
# Generation

def random_rwkv(cfg: ModelConfig) -> LM:
    """RWKV-7 with noise in the matrices whose official initial values are zero or nearly so: no branch is silent."""
    torch.manual_seed(0)
    model = LM(cfg).eval().requires_grad_(False)
    for p in model.parameters():
        if p.ndim == 2 and p.abs().max() < 1e-3:
            p.normal_(std=0.1)
    return model


def official(model: LM, folder: str | Path) -> Callable:
    """The PyPI package `rwkv` with this model's weights: forward(tokens, state) -> (logits (V,), state). ImportError without it."""
    os.environ.update(RWKV_V7_ON="1", RWKV_CUDA_ON="0", RWKV_JIT_ON="1")  # read while it is imported
    with contextlib.redirect_stdout(io.StringIO()):                       # it greets
        from rwkv.model import RWKV as Official

        torch.save({name: p.clone() for name, p in model.state_dict().items()}, Path(folder) / "official.pth")
        return Official(model=str(Path(folder) / "official"), strategy="cpu fp32").forward


def decode_sides(model: LM, tokens: list[int], folder: str | Path) -> dict[str, Callable[[], torch.Tensor]]:
    """Ways to read `tokens` one by one, after having read them at once; each returns the last logits (V,)."""
    with torch.no_grad():
        _, start = model(torch.tensor([tokens], device=model.emb.weight.device))
    decoder, threads = optimize_for_inference(model), torch.get_num_threads()
    device = model.emb.weight.device

    @torch.inference_mode()
    def ours(step: Callable, shape: tuple[int, ...], n: int = threads):
        torch.set_num_threads(n)
        state = start
        for t in tokens:
            logits, state = step(torch.tensor(t, device=device).view(shape), state)
        torch.set_num_threads(threads)
        return logits.flatten()

    half = optimize_for_inference(model, torch.bfloat16)
    sides = {"ours": lambda: ours(decoder, (1,)), "ours, 1 thread": lambda: ours(decoder, (1,), 1), "ours, bfloat16": lambda: ours(half, (1,)),
             "LM": lambda: ours(model, (1, 1))}
    if device.type == "cuda":  # threads are the CPU's, and the package's kernels are not compared here
        unrecorded = optimize_for_inference(model)
        unrecorded.records = False
        return {"ours": sides["ours"], "ours, no graph": lambda: ours(unrecorded, (1,)), "ours, bfloat16": sides["ours, bfloat16"], "LM": sides["LM"]}
    try:
        forward = official(model, folder)
    except ImportError:
        print("rwkv is not installed, so there is nothing to compare with: pip install rwkv")
        return sides
    read = forward(tokens, None)[1]

    def theirs(n: int):
        torch.set_num_threads(n)
        state = [s.clone() for s in read]  # it changes its state in place
        for t in tokens:
            logits, state = forward([t], state)
        torch.set_num_threads(threads)
        return logits

    return sides | {"rwkv": lambda: theirs(threads), "rwkv, 1 thread": lambda: theirs(1)}


def bench_decode(cfg: BenchConfig, device: str) -> list[dict]:
    print(f"\none text, one token at a time, {device}: GB/s of weights, as if all were read for each token; largest difference of logits / largest logit")
    rows = []
    for name, (shape, n) in DECODE.items():
        model = random_rwkv(shape).to(device)
        with tempfile.TemporaryDirectory() as folder:
            sides = decode_sides(model, torch.randint(shape.vocab_size, (n,)).tolist(), folder)
            speed = {side: n / seconds for side, seconds in in_turns(sides, cfg.repeat).items()}
            logits = {side: run_side() for side, run_side in sides.items()}
        read = 4 * (model.n_params() - model.emb.weight.numel())  # of the embedding it is one row
        bandwidth = {side: v * read / (2 if "bfloat16" in side else 1) / 1e9 for side, v in speed.items() if side.startswith("ours")}
        difference = {side: ((x - logits["ours"]).abs().max() / logits["ours"].abs().max()).item() for side, x in logits.items()}
        row = {"model": name, "n_layer": shape.n_layer, "n_embd": shape.n_embd, "parameters": model.n_params(), "tokens_per_s": speed,
               "GB_per_s": bandwidth, "difference": difference}
        print(f"{f'{name}: {shape.n_layer} layers, C {shape.n_embd}':25}{'tokens/s':>10}{'GB/s':>8}{'difference':>12}")
        for side, v in speed.items():
            print(f"  {side:23}{v:10,.0f}{cell(bandwidth, side, 8, 1)}{difference[side]:12.1e}")
        if "rwkv" in sides:
            theirs = max(speed["rwkv"], speed["rwkv, 1 thread"])
            row["ratio"] = {"float32": max(speed["ours"], speed["ours, 1 thread"]) / theirs, "bfloat16": speed["ours, bfloat16"] / theirs}
            print("  ours is {float32:.2f} times as fast as rwkv (goal 2), {bfloat16:.2f} times with matrices in bfloat16".format(**row["ratio"]), flush=True)
        rows.append(row | {"state_bytes": remembered_bytes(shape, 1), "kv_bytes": {T: shape.n_layer * cache_bytes(shape, "a", T) for T in (1024, 8192, 65536)}})

    print(f"\nmemory of one text in bytes, float32\n{'':22}{'RWKV-7':>12}" + "".join(f"{f'attention, {T}':>19}" for T in rows[0]["kv_bytes"]))
    for row in rows:
        print(f"{row['model']:8}L {row['n_layer']:<4}C {row['n_embd']:<6}{row['state_bytes']:12,}" + "".join(f"{b:19,}" for b in row["kv_bytes"].values()))
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# The kernels on a GPU: ours beside the loop, the chunks, attention, and the package fla-core

KERNEL_SHAPES = ((8, 4096, 64), (8, 1024, 12), (16, 1024, 12), (1, 32768, 32), (1, 4096, 12))  # B, T, H
TINY_SHAPES = ((1, 20, 2),)  # for the interpreter
LOOP_LIMIT = 2**17  # B T H, beyond which the loop takes minutes, or more memory than there is
OUTPUTS = ("y", "S", "dr", "dw", "dk", "dv", "dkk", "da", "dS0")
FLA = {"fla": {}} | {f"fla, chunk {n}": {"chunk_size": n, "lower_bound": LOWEST} for n in (64, 32, 16)}  # the bound lets it use matrix units
FLA |= {f"{name}, no recompute": options | {"disable_recompute": True} for name, options in FLA.items()}


def least_bytes(N: int) -> dict[str, int]:
    """What one token of one head must move through memory, in bfloat16, with a state kept every 64 tokens for the way back."""
    row, state = 2 * N, 2 * N * N // 64
    forward = 6 * row + row                     # read r, w, k, v, kk, a; write y
    backward = 6 * row + row + state + 6 * row  # read the same, dy and the state; write six gradients
    return {"forward": forward, "both": forward + state + backward}


def gpu_clock(side: Callable[[], object]) -> float:
    """Seconds of the GPU alone, by its own events."""
    for _ in range(8):  # milliseconds of other work: the cache forgets the inputs, and the CPU gets ahead with launching
        torch.rand(2**28, device="cuda").sum()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    side()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def fla_side(chunk_rwkv7: Callable, ours: Side, **options) -> Side:
    """fla's operator takes z = -kk and b = kk * a, made beforehand at no cost to it, and its states are transposed."""
    def run(r, w, k, v, z, b, state=None):
        return chunk_rwkv7(r, w, k, v, z, b, initial_state=state, output_final_state=state is not None, **options)

    def exact(r, w, k, v, z, b, state):  # b / kk is an `a`, and the chain rule through it gives the gradients of z and b
        y, state = wkv7(r, w, k, v, -z, b / -z, state.mT, backend="chunk")
        return y, state.mT

    r, w, k, v, kk, a = (x.detach() for x in ours.inputs)
    return Side(run, [x.requires_grad_() for x in (r, w, k, v, -kk, kk * a)], ours.dy, exact)


def errors(side: Side) -> dict[str, float]:
    """||x - exact|| / ||exact|| of y, the last state and seven gradients (fla's dkk and da are dz and db).

    Exact is float64, on two heads, the very first and the last; the worse counts. All memory is NaN until it is written, and
    NaN or infinity anywhere makes all errors NaN.
    """
    B, T, H, N = side.dy.shape
    inputs = [x.detach().requires_grad_() for x in (*side.inputs, torch.randn(B, H, N, N, device=side.dy.device) / 8)]
    dy = [side.dy, torch.randn_like(inputs[-1])]

    def outputs(run, inputs, dy):
        y = run(*inputs)
        return *(x.detach() for x in y), *torch.autograd.grad(y, inputs, dy)

    def two_heads(x):  # (B, T, H, N) or, a state, (B, H, N, N): the same with B = 2, H = 1
        return torch.stack((x[0, :, :1], x[-1, :, -1:]) if x.shape == side.dy.shape else (x[0, :1], x[-1, -1:])).detach().double()

    exact = outputs(side.exact, [two_heads(x).requires_grad_() for x in inputs], [two_heads(x) for x in dy])
    torch.use_deterministic_algorithms(True, warn_only=True)  # for its side effect: torch.empty is filled with NaN
    try:
        found = outputs(side.run, inputs, dy)
    finally:
        torch.use_deterministic_algorithms(False)
    finite = all(x.isfinite().all() for x in found)
    worst = lambda x, e: ((two_heads(x) - e).flatten(1).norm(dim=1) / e.flatten(1).norm(dim=1)).max().item()  # noqa: E731
    return {name: worst(x, e) if finite else math.nan for name, x, e in zip(OUTPUTS, found, exact)}


def memory(side: Side) -> dict[str, float]:
    """What waits for the backward pass, inputs included, over the inputs; and the peak of both passes above the inputs."""
    before = torch.cuda.memory_allocated()
    graph = side.run(*side.inputs)[0].grad_fn  # holds what is kept; y is not
    kept = torch.cuda.memory_allocated() - before
    del graph
    torch.cuda.reset_peak_memory_stats()
    side.both()
    peak = torch.cuda.max_memory_allocated() - before
    return {"kept": 1 + kept / sum(x.nbytes for x in side.inputs), "peak_MB": peak / 1e6}


def attempt(name: str, what: Callable[[], object]):
    """What it returns, or None and a line that says why: a side that fails must not cost the others' results."""
    try:
        result = what()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return result
    except Exception as e:
        print(f"{name} is left out: {type(e).__name__}: {' '.join(str(e).split())[:200]}", flush=True)


def measure(sides: dict[str, Side], cfg: BenchConfig, clock: Callable, copy: float) -> dict[str, dict[str, float]]:
    """Milliseconds of all sides in turns, the rate if least_bytes were all that is moved, memory, errors."""
    B, T, H, N = sides["triton"].dy.shape
    seconds = in_turns({(name, way): getattr(side, way) for name, side in sides.items() for way in ("forward", "both")}, cfg.repeat, clock)
    rows = {name: {f"{way}_ms": 1e3 * seconds[name, way] for way in ("forward", "both")} for name in sides}
    for name, side in sides.items():
        for way, least in least_bytes(N).items():
            rate = B * T * H * least / seconds[name, way]
            rows[name] |= {f"{way}_GB_per_s": rate / 1e9, f"{way}_of_copy": rate / copy} if side.exact else {}
        if clock is gpu_clock:
            rows[name] |= attempt(f"memory of {name}", lambda: memory(side)) or {}
        if side.exact:
            rows[name] |= {"errors": attempt(f"errors of {name}", lambda: errors(side)) or dict.fromkeys(OUTPUTS, math.nan)}
    return rows


def kernel_goals(row: dict) -> dict[str, tuple[float, float]]:
    """What is to be reached: its value, and the most that it may be."""
    ours, best = row["sides"]["triton"], row["sides"].get(row.get("best"))
    worst = {what: max(ours["errors"][name] for name in names) for what, names in (("values", OUTPUTS[:2]), ("gradients", OUTPUTS[2:]))}
    goals = {"errors of values": (worst["values"], 6e-3), "errors of gradients": (worst["gradients"], 1.2e-2)}
    if (row["B"], row["T"], row["H"]) == KERNEL_SHAPES[0]:
        goals |= {"forward ms": (ours["forward_ms"], 1), "forward + backward ms": (ours["both_ms"], 4)}
    if "kept" in ours:
        goals["kept, of the inputs"] = ours["kept"], 1.5
    if best:
        goals["errors, of fla's best"] = max(ours["errors"][name] / best["errors"][name] for name in OUTPUTS), 1
        goals |= {f"{way} ms, of fla's best": (ours[f"{way}_ms"] / best[f"{way}_ms"], 0.5) for way in ("forward", "both")}
    return goals


def print_kernels(row: dict) -> None:
    place = f"B {row['B']:<4}T {row['T']:<7}H {row['H']}"
    print(f"\n{place:28}{'forward ms':>12}{'GB/s':>7}{'of copy':>9}{'+ backward ms':>16}{'GB/s':>7}{'of copy':>9}{'kept':>7}{'peak MB':>9}")
    for name, side in row["sides"].items():
        print(f"{name:28}" + "".join(cell(side, f"{way}_ms", width, 3) + cell(side, f"{way}_GB_per_s", 7) + cell(side, f"{way}_of_copy", 9, 2)
                                     for way, width in (("forward", 12), ("both", 16))) + cell(side, "kept", 7, 2) + cell(side, "peak_MB", 9))
    print(f"{'relative errors':28}" + "".join(f"{name:>9}" for name in OUTPUTS))
    for name, errors in ((name, side["errors"]) for name, side in row["sides"].items() if "errors" in side):
        print(f"{name:28}" + "".join(f"{errors[output]:9.1e}" for output in OUTPUTS))
    for what, (value, most) in row["goals"].items():
        print(f"  {what:26}{value:10.2g} (goal {most:g})" + ("" if value <= most else " MISSED"), flush=True)


def plot_kernels(rows: dict[str, dict], path: Path) -> None:
    """Milliseconds of every side at every shape."""
    try:
        import matplotlib
    except ImportError:
        return print("no plot: pip install matplotlib, and run again")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, axes = plt.subplots(1, 2, figsize=(12, 4), constrained_layout=True)
    for ax, way, title in zip(axes, ("forward", "both"), ("forward", "forward and backward")):
        for i, name in enumerate(("triton", "fla's best", "fla", "attention", "chunk", "loop")):
            sides = [row["sides"].get(row.get("best") if name == "fla's best" else name, {}) for row in rows.values()]
            ax.bar([x + i / 7 for x in range(len(rows))], [side.get(f"{way}_ms", math.nan) for side in sides], 1 / 7, label=name)
        ax.set_xticks([x + 0.36 for x in range(len(rows))], rows)
        ax.set(title=title, xlabel="B, T, H", ylabel="ms", yscale="log")
    axes[0].legend(fontsize=7)
    fig.savefig(path, dpi=120)
    plt.close(fig)


def kernel_row(B: int, T: int, H: int, chunk_rwkv7: Callable | None, cfg: BenchConfig, device: str, copy: float) -> dict:
    """All that is measured at one shape; of fla its default and, by the time of both passes, its best setting."""
    clock = gpu_clock if device == "cuda" else stopwatch
    sides, row = operator_sides(B, T, H, 64, device, torch.bfloat16), {"B": B, "T": T, "H": H}
    if B * T * H > LOOP_LIMIT:
        del sides["loop"]
    sides = {name: side for name, side in sides.items() if attempt(name, side.both)}
    if chunk_rwkv7:
        settings = {name: fla_side(chunk_rwkv7, sides["triton"], **options) for name, options in FLA.items()}
        settings = {name: side for name, side in settings.items() if attempt(name, side.both)}
        row["fla_ms"] = {name: 1e3 * s for name, s in in_turns({name: side.both for name, side in settings.items()}, 3, clock).items()}
        row["best"] = min(settings, key=row["fla_ms"].get, default=None)
        sides |= {name: side for name, side in settings.items() if name in ("fla", row["best"])}
    row["sides"] = measure(sides, cfg, clock, copy)
    row["goals"] = kernel_goals(row)
    print_kernels(row)
    return row


def bench_kernels(cfg: BenchConfig, device: str, results: dict) -> None:
    """Two rounds over the shapes, the second with fla, which compiles for long: what the first has written is not lost."""
    shapes, clock, size = (KERNEL_SHAPES, gpu_clock, 2**29) if device == "cuda" else (TINY_SHAPES, stopwatch, 2**20)
    source, target = torch.rand(2, size, device=device)
    copy = 8 * size / in_turns({"copy": lambda: target.copy_(source)}, cfg.repeat, clock)["copy"]  # 4 bytes read and 4 written
    results |= {"copy_GB_per_s": copy / 1e9, "least_bytes": least_bytes(64), "fla_settings": FLA, "kernels": {}}
    print("\nwkv7, N = 64, bfloat16: per token and head at least {forward:,} bytes forward, {both:,} with backward;".format(**least_bytes(64)),
          f"a copy in memory moves {copy / 1e9:,.0f} GB/s" + "\nTriton's interpreter: this shows that everything runs, not how fast" * (device == "cpu"))
    chunk_rwkv7 = attempt("fla (pip install fla-core==0.6.0)", lambda: import_module("fla.ops.rwkv7").chunk_rwkv7)
    for theirs in (None, chunk_rwkv7) if chunk_rwkv7 else (None,):
        for B, T, H in shapes:
            if row := attempt(f"B {B} T {T} H {H}", lambda: kernel_row(B, T, H, theirs, cfg, device, copy)):
                results["kernels"][f"{B}, {T}, {H}"] = row
                save(cfg, results)
    if cfg.json and results["kernels"]:
        plot_kernels(results["kernels"], Path(cfg.json).with_suffix(".png"))


# ---------------------------------------------------------------------------------------------------------------------

def save(cfg: BenchConfig, results: dict) -> None:
    if cfg.json:
        Path(cfg.json).parent.mkdir(parents=True, exist_ok=True)
        Path(cfg.json).write_text(json.dumps(results, indent=1) + "\n")


def main(argv: list[str] | None = None) -> None:
    cfg = cli(BenchConfig, argv)
    if cfg.only not in (None, "operator", "train", "decode", "memory"):
        raise ValueError(f"only = {cfg.only!r}: choose operator, train, decode or memory")
    for name, least in (("bptt_chunk", 1), ("layers", 1), ("embd", 32), ("limit", 0)):
        if not least <= getattr(cfg, name) < math.inf or name == "embd" and cfg.embd % 32:
            raise ValueError(f"{name} = {getattr(cfg, name)}: it must be at least {least}" + ", and a multiple of 32" * (name == "embd"))
    parse_lengths(cfg.lengths or "16")
    if cfg.json and Path(cfg.json).is_dir():  # found out before all the measuring
        raise ValueError(f"json = {cfg.json!r} is a folder: name a file")
    if cfg.repeat < 1:
        raise ValueError(f"repeat = {cfg.repeat}: it must be at least 1")
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    if cfg.device not in ["auto", *devices]:
        raise ValueError(f"device = {cfg.device!r}: choose auto or {' or '.join(devices)}, which is what this machine has")
    device = devices[-1] if cfg.device == "auto" else cfg.device
    if cfg.kernels:
        device = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else device
        if reason := why_not_triton(torch.empty(1, 1, 1, 64, dtype=torch.bfloat16, device=device)):
            raise ValueError(f"kernels: backend triton {reason.removesuffix(': use chunk')}")
    machine = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    results = {"torch": torch.__version__, "device": device, "machine": machine, "threads": torch.get_num_threads(), "repeat": cfg.repeat}
    print(f"torch {torch.__version__}, {machine}, {torch.get_num_threads()} CPU threads, medians of {cfg.repeat}", flush=True)
    if cfg.kernels:
        return bench_kernels(cfg, device, results)
    if cfg.only in (None, "operator"):
        results["operator"] = bench_operator(cfg, device)
    if cfg.only in (None, "train"):
        results["train"] = bench_train(cfg, device)
    if cfg.only in (None, "decode"):
        results["decode"] = bench_decode(cfg, device)
    if cfg.only == "memory":
        results["memory"] = bench_memory(cfg, device)
    save(cfg, results)


if __name__ == "__main__":
    run(main)
