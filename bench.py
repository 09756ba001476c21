"""Speed and memory, each figure beside what it is to be compared with, measured in turns in one run.

    python bench.py                            all three, some minutes on two CPU cores
    python bench.py --only operator            wkv7 in chunks against its loop and against causal attention
    python bench.py --only train               a training step of a GPT and of an RWKV-7
    python bench.py --only decode              generation against the PyPI package `rwkv`, on the same weights
    python bench.py --json out/bench.json

What it is: medians of alternating repetitions, so that a busy machine slows both sides of a ratio. What it is not: a
profiler, or a test (no test depends on a time).
"""

import contextlib
import io
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F

from config import cli, run
from decode import Decoder, kv_bytes
from model import LM, ModelConfig
from wkv import wkv7

SHAPES = ((16, 256, 4, 3.0), (4, 1024, 4, 4.0), (1, 4096, 4, 6.0))  # B, T, H, and how much faster than the loop we want to be
GPT, RWKV = ModelConfig(), ModelConfig(mixer="r", ffn="channelmix")
DECODE = {"small": (replace(RWKV, n_layer=4, n_embd=128, n_head=2, rwkv_head_size=64), 200),  # a model, and how many tokens to time it with
          "large": (replace(RWKV, n_layer=12, n_embd=768, n_head=12, rwkv_head_size=64, vocab_size=4096), 16)}


@dataclass(frozen=True)
class BenchConfig:
    """What to measure. None means off."""

    only: str | None = None     # operator, train, decode
    repeat: int = 5             # repetitions of each side
    json: str | None = None     # also write the results here
    device: str = "auto"        # auto, cpu, cuda; for operator and train, decoding is measured on the CPU


def in_turns(sides: dict[str, Callable[[], object]], repeat: int, device: str = "cpu") -> dict[str, float]:
    """Median seconds of each side, all sides run one after the other `repeat` times, after one run to warm up."""
    sync = torch.cuda.synchronize if device == "cuda" else lambda: None
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for i in range(repeat + 1):
        for name, side in sides.items():
            sync()
            start = time.perf_counter()
            side()
            sync()
            if i:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


# ---------------------------------------------------------------------------------------------------------------------
# The operator: forward and backward

def operator_sides(B: int, T: int, H: int, N: int, device: str, dtype: torch.dtype) -> dict[str, Callable[[], None]]:
    """wkv7's forms and causal attention on inputs (B, T, H, N) such as RWKV-7 makes them; each side is forward + backward."""
    torch.manual_seed(0)
    r, w, k, v, kk, a, dy = torch.randn(7, B, T, H, N, device=device)
    inputs = [x.to(dtype).requires_grad_() for x in (r, -0.6065 * w.sigmoid(), k / 8, v, F.normalize(kk, dim=-1), a.sigmoid())]
    q = [x.to(dtype).transpose(1, 2).contiguous().requires_grad_() for x in (r, k, v)]  # (B, H, T, N)
    dy = dy.to(dtype)

    def wkv(form: str):
        return lambda: torch.autograd.grad(wkv7(*inputs, backend=form)[0], inputs, dy)

    def attention():
        return torch.autograd.grad(F.scaled_dot_product_attention(*q, is_causal=True), q, dy.transpose(1, 2))

    return {"loop": wkv("loop"), "chunk": wkv("chunk"), "attention": attention}


def bench_operator(cfg: BenchConfig, device: str) -> list[dict]:
    dtype, rows = (torch.bfloat16 if device == "cuda" else torch.float32), []
    print(f"\nwkv7, forward and backward, N = 64, {device}, {str(dtype)[6:]}: milliseconds, and how many times faster chunk is")
    print(f"{'':20}{'loop':>10}{'chunk':>10}{'attention':>11}{'than the loop':>21}{'than attention':>21}")
    for B, T, H, goal in SHAPES:
        ms = {name: 1e3 * seconds for name, seconds in in_turns(operator_sides(B, T, H, 64, device, dtype), cfg.repeat, device).items()}
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
    seconds = in_turns({name: train_side(model, tokens) for name, model in models.items()}, cfg.repeat, device)
    print(f"\ntraining step, {GPT.n_layer} layers, C {GPT.n_embd}, {B} x {T} tokens, {device}\n{'':10}{'parameters':>12}{'tokens/s':>12}{'of GPT':>9}")
    for name, model in models.items():
        rows.append({"model": name, "parameters": model.n_params(), "tokens_per_s": B * T / seconds[name], "ratio": seconds["GPT"] / seconds[name]})
        print(f"{name:10}{model.n_params():12,}{rows[-1]['tokens_per_s']:12,.0f}{rows[-1]['ratio']:9.2f}", flush=True)
    return rows


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
        _, start = model(torch.tensor([tokens]))
    decoder, threads = Decoder(model), torch.get_num_threads()

    @torch.inference_mode()
    def ours(step: Callable, shape: tuple[int, ...]):
        state = start
        for t in tokens:
            logits, state = step(torch.tensor(t).view(shape), state)
        return logits.flatten()

    sides = {"ours": lambda: ours(decoder, (1,)), "LM": lambda: ours(model, (1, 1))}
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


def bench_decode(cfg: BenchConfig) -> list[dict]:
    print("\none text, one token at a time, CPU, float32: tokens/s; how many times faster than rwkv at its best; largest difference of logits")
    print(f"{'':22}{'ours':>10}{'LM':>10}{'rwkv':>10}{'rwkv, 1 thread':>16}{'than rwkv':>21}{'difference':>12}")
    rows = []
    for name, (shape, n) in DECODE.items():
        model = random_rwkv(shape)
        with tempfile.TemporaryDirectory() as folder:
            sides = decode_sides(model, torch.randint(shape.vocab_size, (n,)).tolist(), folder)
            speed = {side: n / seconds for side, seconds in in_turns(sides, cfg.repeat).items()}
        row = {"model": name, "n_layer": shape.n_layer, "n_embd": shape.n_embd, "parameters": model.n_params(), "tokens_per_s": speed}
        if "rwkv" in sides:
            a, b = sides["ours"](), sides["rwkv"]()
            row |= {"ratio": speed["ours"] / max(speed["rwkv"], speed["rwkv, 1 thread"]), "difference": ((a - b).abs().max() / b.abs().max()).item()}
        print(f"{name:8}L {shape.n_layer:<4}C {shape.n_embd:<6}" + cell(speed, "ours", 10) + cell(speed, "LM", 10) + cell(speed, "rwkv", 10) +
              cell(speed, "rwkv, 1 thread", 16) + (f"{row['ratio']:10.2f} (goal 1.5){row['difference']:12.1e}" if "ratio" in row else ""), flush=True)
        _, state = model(torch.zeros(1, 1, dtype=torch.long))
        rows.append(row | {"state_bytes": state.nbytes(), "kv_bytes": {T: kv_bytes(shape, T) for T in (1024, 8192, 65536)}})

    print(f"\nmemory of one text in bytes, float32\n{'':22}{'RWKV-7':>12}" + "".join(f"{f'attention, {T}':>19}" for T in rows[0]["kv_bytes"]))
    for row in rows:
        print(f"{row['model']:8}L {row['n_layer']:<4}C {row['n_embd']:<6}{row['state_bytes']:12,}" + "".join(f"{b:19,}" for b in row["kv_bytes"].values()))
    return rows


def main(argv: list[str] | None = None) -> None:
    cfg = cli(BenchConfig, argv)
    if cfg.only not in (None, "operator", "train", "decode"):
        raise ValueError(f"only = {cfg.only!r}: choose operator, train or decode")
    if cfg.repeat < 1:
        raise ValueError(f"repeat = {cfg.repeat}: it must be at least 1")
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    if cfg.device not in ["auto", *devices]:
        raise ValueError(f"device = {cfg.device!r}: choose auto or {' or '.join(devices)}, which is what this machine has")
    device = devices[-1] if cfg.device == "auto" else cfg.device
    machine = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    results = {"torch": torch.__version__, "device": device, "machine": machine, "threads": torch.get_num_threads(), "repeat": cfg.repeat}
    print(f"torch {torch.__version__}, {machine}, {torch.get_num_threads()} CPU threads, medians of {cfg.repeat}", flush=True)
    if cfg.only in (None, "operator"):
        results["operator"] = bench_operator(cfg, device)
    if cfg.only in (None, "train"):
        results["train"] = bench_train(cfg, device)
    if cfg.only in (None, "decode"):
        results["decode"] = bench_decode(cfg)
    if cfg.json:
        Path(cfg.json).parent.mkdir(parents=True, exist_ok=True)
        Path(cfg.json).write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    run(main)
