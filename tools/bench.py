"""Speed, each figure beside what it is compared with, measured in turns in one run.

    python -m tools.bench                       all three, some minutes on two CPU cores
    python -m tools.bench --only operator       wkv7 beside its loop and attention
    python -m tools.bench --only train          a training step, GPT and RWKV-7
    python -m tools.bench --only decode         beside the package `rwkv`, same weights
    python -m tools.bench --json out/bench.json

Medians of alternating repetitions, so that a busy machine slows both sides of a ratio.
Memory: tools/bench_memory.py; the GPU kernels: tools/bench_kernels.py. What it is not:
a profiler, or a test (no test depends on a time).
"""

import contextlib
import io
import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

from config import cli, run, settings
import torch
import torch.nn.functional as F

from lib.decode import Decoder
from lib.hybrid import cache_bytes, remembered_bytes
from model import LM, ModelConfig
from tools.timing import TimingConfig, begin, cell, in_turns, operator_sides, save


# B, T, H, and how much faster than the loop
SHAPES = ((16, 256, 4, 3.0), (4, 1024, 4, 4.0), (1, 4096, 4, 6.0))
GPT, RWKV = ModelConfig(), ModelConfig(mixer="r", ffn="channelmix")
DECODE = {  # a model, and how many tokens to time it with
    "small": (replace(RWKV, n_layer=4, n_embd=128, n_head=2, rwkv_head_size=64), 200),
    "large": (replace(RWKV, n_layer=12, n_embd=768, n_head=12, rwkv_head_size=64, vocab_size=4096), 16)}


@settings
class BenchConfig(TimingConfig):
    only: Literal["operator", "train", "decode"] | None = None     # None = all three


# ------------------------------------------------------------------------------------------
# The operator: forward and backward

def bench_operator(cfg: BenchConfig, device: str) -> list[dict]:
    dtype, rows = (torch.bfloat16 if device == "cuda" else torch.float32), []
    print(
        f"\nwkv7, forward and backward, N = 64, {device}, {str(dtype)[6:]}: milliseconds, and how many times"
        " faster torch is"
    )
    print(f"{'':20}{'loop':>10}{'torch':>10}{'attention':>11}{'than the loop':>21}{'than attention':>21}")
    for B, T, H, goal in SHAPES:
        sides = {
            name: side.both
            for name, side in operator_sides(B, T, H, 64, device, dtype).items()
            if name not in ("triton", "chunk")
        }
        ms = {name: 1e3 * seconds for name, seconds in in_turns(sides, cfg.repeat).items()}
        than_loop, than_attention = ms["loop"] / ms["torch"], ms["attention"] / ms["torch"]
        rows.append(
            {
                "B": B,
                "T": T,
                "H": H,
                "ms": ms,
                "than_loop": than_loop,
                "goal": goal,
                "than_attention": than_attention,
            }
        )
        print(
            f"B {B:<4}T {T:<6}H {H:<5}"
            + cell(ms, "loop", 10, 1)
            + cell(ms, "torch", 10, 1)
            + cell(ms, "attention", 11, 1)
            + f"{than_loop:12.2f} (goal {goal:.0f}){than_attention:{12 if T >= 4096 else 21}.2f}"
            + " (goal 1)" * (T >= 4096),
            flush=True,
        )
    return rows


# ------------------------------------------------------------------------------------------
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
    print(
        f"\ntraining step, {GPT.n_layer} layers, C {GPT.n_embd}, {B} x {T} tokens,"
        f" {device}\n{'':10}{'parameters':>12}{'tokens/s':>12}{'of GPT':>9}"
    )
    for name, model in models.items():
        rows.append(
            {
                "model": name,
                "parameters": model.n_params(),
                "tokens_per_s": B * T / seconds[name],
                "ratio": seconds["GPT"] / seconds[name],
            }
        )
        print(
            f"{name:10}{model.n_params():12,}{rows[-1]['tokens_per_s']:12,.0f}{rows[-1]['ratio']:9.2f}",
            flush=True,
        )
    return rows


# ------------------------------------------------------------------------------------------
# Generation

def random_rwkv(cfg: ModelConfig) -> LM:
    """RWKV-7 with noise in the matrices whose official initial values are zero or
    nearly so: no branch is silent.
    """
    torch.manual_seed(0)
    model = LM(cfg).eval().requires_grad_(False)
    for p in model.parameters():
        if p.ndim == 2 and p.abs().max() < 1e-3:
            p.normal_(std=0.1)
    return model


def official(model: LM, folder: str | Path) -> Callable:
    """The PyPI package `rwkv` with this model's weights: forward(tokens, state) ->
    (logits (V,), state). ImportError without it.
    """
    os.environ.update(RWKV_V7_ON="1", RWKV_CUDA_ON="0", RWKV_JIT_ON="1")  # read while it is imported
    with contextlib.redirect_stdout(io.StringIO()):                       # it greets
        from rwkv.model import RWKV as Official

        torch.save({name: p.clone() for name, p in model.state_dict().items()}, Path(folder) / "official.pth")
        return Official(model=str(Path(folder) / "official"), strategy="cpu fp32").forward


def decode_sides(model: LM, tokens: list[int], folder: str | Path) -> dict[str, Callable[[], torch.Tensor]]:
    """Ways to read `tokens` one by one, after having read them at once; each returns
    the last logits (V,).
    """
    with torch.no_grad():
        _, start = model(torch.tensor([tokens], device=model.emb.weight.device))
    decoder, threads = Decoder(model), torch.get_num_threads()
    device = model.emb.weight.device

    @torch.inference_mode()
    def ours(step: Callable, shape: tuple[int, ...], n: int = threads):
        torch.set_num_threads(n)
        state = start
        for t in tokens:
            logits, state = step(torch.tensor(t, device=device).view(shape), state)
        torch.set_num_threads(threads)
        return logits.flatten()

    half = Decoder(model, torch.bfloat16)
    sides = {
        "ours": lambda: ours(decoder, (1,)),
        "ours, 1 thread": lambda: ours(decoder, (1,), 1),
        "ours, bfloat16": lambda: ours(half, (1,)),
        "LM": lambda: ours(model, (1, 1)),
    }
    if device.type == "cuda":  # threads are the CPU's, and the package's kernels are not compared here
        unrecorded = Decoder(model)
        unrecorded.records = False
        return {
            "ours": sides["ours"],
            "ours, no graph": lambda: ours(unrecorded, (1,)),
            "ours, bfloat16": sides["ours, bfloat16"],
            "LM": sides["LM"],
        }
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
    print(
        f"\none text, one token at a time, {device}: GB/s of weights, as if all were read for each token;"
        " largest difference of logits / largest logit"
    )
    rows = []
    for name, (shape, n) in DECODE.items():
        model = random_rwkv(shape).to(device)
        with tempfile.TemporaryDirectory() as folder:
            sides = decode_sides(model, torch.randint(shape.vocab_size, (n,)).tolist(), folder)
            speed = {side: n / seconds for side, seconds in in_turns(sides, cfg.repeat).items()}
            logits = {side: run_side() for side, run_side in sides.items()}
        read = 4 * (model.n_params() - model.emb.weight.numel())  # of the embedding it is one row
        bandwidth = {
            side: v * read / (2 if "bfloat16" in side else 1) / 1e9
            for side, v in speed.items()
            if side.startswith("ours")
        }
        difference = {
            side: ((x - logits["ours"]).abs().max() / logits["ours"].abs().max()).item()
            for side, x in logits.items()
        }
        row = {
            "model": name,
            "n_layer": shape.n_layer,
            "n_embd": shape.n_embd,
            "parameters": model.n_params(),
            "tokens_per_s": speed,
            "GB_per_s": bandwidth,
            "difference": difference,
        }
        title = f"{name}: {shape.n_layer} layers, C {shape.n_embd}"
        print(f"{title:25}{'tokens/s':>10}{'GB/s':>8}{'difference':>12}")
        for side, v in speed.items():
            print(f"  {side:23}{v:10,.0f}{cell(bandwidth, side, 8, 1)}{difference[side]:12.1e}")
        if "rwkv" in sides:
            theirs = max(speed["rwkv"], speed["rwkv, 1 thread"])
            ours = max(speed["ours"], speed["ours, 1 thread"])
            row["ratio"] = {"float32": ours / theirs, "bfloat16": speed["ours, bfloat16"] / theirs}
            line = "  ours is {float32:.2f} times as fast as rwkv (goal 2), {bfloat16:.2f} times "
            print((line + "with matrices in bfloat16").format(**row["ratio"]), flush=True)
        row["state_bytes"] = remembered_bytes(shape, 1)
        row["kv_bytes"] = {T: shape.n_layer * cache_bytes(shape, "a", T) for T in (1024, 8192, 65536)}
        rows.append(row)

    print(f"\nmemory of one text in bytes, float32\n{'':22}{'RWKV-7':>12}", end="")
    print("".join(f"{f'attention, {T}':>19}" for T in rows[0]["kv_bytes"]))
    for row in rows:
        caches = "".join(f"{b:19,}" for b in row["kv_bytes"].values())
        print(f"{row['model']:8}L {row['n_layer']:<4}C {row['n_embd']:<6}{row['state_bytes']:12,}{caches}")
    return rows


def main(argv: list[str] | None = None) -> None:
    cfg = cli(BenchConfig, argv)
    device, results = begin(cfg)
    for name, measure in (("operator", bench_operator), ("train", bench_train), ("decode", bench_decode)):
        if cfg.only in (None, name):
            results[name] = measure(cfg, device)
            save(cfg, results)                             # what follows may be interrupted


if __name__ == "__main__":
    run(main)
