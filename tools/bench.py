"""Speed, each figure beside what it is compared with, measured in turns in one run.

    python -m tools.bench                    all three, some ten minutes on two cores
    python -m tools.bench --only operator    wkv7 beside its loop and attention
    python -m tools.bench --only train       a training step, GPT and RWKV-7
    python -m tools.bench --only text        reading and writing beside the package
                                             `rwkv` and llama.cpp, the same weights
    python -m tools.bench --json out/bench.json

Medians of alternating repetitions, so that a busy machine slows both sides of a ratio.
Memory: tools/bench_memory.py; the GPU kernels: tools/bench_kernels.py. What it is not:
a profiler, or a test (no test depends on a time).
"""

import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from config import cli, run, settings
import torch
import torch.nn.functional as F

from lib.decode import Decoder
from lib.hybrid import cache_bytes, remembered_bytes
from lib.processes import using_threads
from model import LM, ModelConfig
from tools.rivals import LlamaCpp, official, random_rwkv
from tools.timing import (TimingConfig, begin, cell, in_turns, operator_sides, save, seconds_in_turns,
                          stopwatch)


# B, T, H, and the goal: how many times as fast as the loop
SHAPES = ((16, 256, 4, 3.0), (4, 1024, 4, 4.0), (1, 4096, 4, 6.0))
SMALL, MIDDLE = ModelConfig(), ModelConfig(n_layer=6, n_embd=384, n_head=6)
TRAIN = ((SMALL, 8, 256), (MIDDLE, 4, 512), (MIDDLE, 1, 4096))     # a GPT, B, T
LARGE = ModelConfig(mixer="r", ffn="channelmix", n_layer=12, n_embd=768, rwkv_head_size=64, vocab_size=4096)
TEXT = {  # a model, and how many tokens to write
    "small": (replace(LARGE, n_layer=4, n_embd=128, vocab_size=257), 200),
    "large": (LARGE, 16),
    "large, V 50,304": (replace(LARGE, vocab_size=50304), 16)}
PROMPT, LENGTHS = 512, (1024, 8192, 65536)         # read for speed, and for bytes remembered
LLAMA = {"float32": "float32", "bfloat16": "bfloat16", "8 bits": "q8_0"}


@settings
class BenchConfig(TimingConfig):
    only: Literal["operator", "train", "text"] | None = None     # None = all three


# ------------------------------------------------------------------------------------------
# The operator: forward and backward

def bench_operator(cfg: BenchConfig, device: str) -> list[dict]:
    dtype, rows = (torch.bfloat16 if device == "cuda" else torch.float32), []
    print(f"\nwkv7, forward and backward, N = 64, {device}, {str(dtype)[6:]}: milliseconds, and how many"
          " times faster torch is")
    print(f"{'':20}{'loop':>10}{'torch':>10}{'attention':>11}{'than the loop':>21}{'than attention':>21}")
    for B, T, H, goal in SHAPES:
        forms = operator_sides(B, T, H, 64, device, dtype)
        sides = {name: forms[name].both for name in ("loop", "torch", "attention")}
        ms = {name: 1e3 * seconds for name, seconds in in_turns(sides, cfg.repeat).items()}
        than_loop, than_attention = ms["loop"] / ms["torch"], ms["attention"] / ms["torch"]
        rows.append({"B": B, "T": T, "H": H, "ms": ms, "than_loop": than_loop, "goal": goal,
                     "than_attention": than_attention})
        print(f"B {B:<4}T {T:<6}H {H:<5}{cell(ms, 'loop', 10, 1)}{cell(ms, 'torch', 10, 1)}"
              f"{cell(ms, 'attention', 11, 1)}{than_loop:12.2f} (goal {goal:.0f})"
              f"{than_attention:{12 if T >= 4096 else 21}.2f}" + " (goal 1)" * (T >= 4096), flush=True)
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


def bench_train(cfg: BenchConfig, device: str) -> list[dict]:
    rows = []
    print(f"\ntraining step, {device}\n{'':32}{'parameters':>12}{'tokens/s':>12}{'of GPT':>9}")
    for gpt, B, T in TRAIN:
        rwkv = replace(gpt, mixer="r", ffn="channelmix", positions="none", rwkv_head_size=gpt.att_head_size)
        models = {"GPT": LM(gpt).to(device), "RWKV-7": LM(rwkv).to(device)}
        tokens = torch.randint(gpt.vocab_size, (B, T + 1), device=device)
        seconds = in_turns({name: train_side(model, tokens) for name, model in models.items()}, cfg.repeat)
        for name, model in models.items():
            row = {"model": name, "n_layer": gpt.n_layer, "n_embd": gpt.n_embd, "B": B, "T": T,
                   "parameters": model.n_params(), "tokens_per_s": B * T / seconds[name],
                   "ratio": seconds["GPT"] / seconds[name]}
            rows.append(row)
            shape = f"L {gpt.n_layer} C {gpt.n_embd} {B} x {T}"
            print(f"{name:10}{shape:22}{row['parameters']:12,}{row['tokens_per_s']:12,.0f}"
                  f"{row['ratio']:9.2f}", flush=True)
    return rows


# ------------------------------------------------------------------------------------------
# One text: read at once, and written token by token

@dataclass(frozen=True)
class Program:
    """A way to read and write a text: whose, its precision, its number of threads."""

    name: str
    threads: int
    write: Callable[[], float]                     # seconds for n single tokens
    read: Callable[[], float] | None = None        # seconds for PROMPT tokens at once
    logits: Callable[[], torch.Tensor] | None = None


def text_sides(model: LM, n: int, folder: str | Path) -> list[Program]:
    """Ways to read a prompt, and n more tokens one by one.

    llama.cpp chooses those tokens, the others are given them.
    """
    device, most = model.emb.weight.device, torch.get_num_threads()
    counts = sorted({1, most}) if device.type == "cpu" else [most]
    sides = [side for threads in counts for side in our_sides(model, n, threads)]
    if device.type == "cpu":                       # on a GPU the others' kernels are not compared
        sides += [side for threads in counts for side in other_sides(model, n, threads, folder)]
    return sides


def our_sides(model: LM, n: int, threads: int) -> list[Program]:
    """Decoder in each precision, and LM itself; on a GPU also without a CUDA graph."""
    device, cpu = model.emb.weight.device, model.emb.weight.device.type == "cpu"
    prompt, tokens = prompt_and_tokens(model, n)
    with torch.no_grad():
        _, start = model(prompt)

    @torch.inference_mode()
    def write(step: Callable, shape: tuple[int, ...]) -> torch.Tensor:
        state = start
        for t in tokens:
            logits, state = step(torch.tensor(t, device=device).view(shape), state)
        return logits.flatten()

    @torch.inference_mode()
    def read() -> torch.Tensor:
        return model.head(model.hidden(prompt)[0][:, -1])

    steps = {"ours, LM": model}
    with using_threads(threads):                   # a Decoder divides its matrices among them
        steps |= {"ours, float32": Decoder(model), "ours, bfloat16": Decoder(model, torch.bfloat16)}
        if cpu:
            steps["ours, int8"] = Decoder(model, torch.int8)
        else:
            steps["ours, no graph"] = Decoder(model)
            steps["ours, no graph"].records = False
    sides = []
    for name, step in steps.items():
        written = using_threads(threads)(partial(write, step, (1, 1) if step is model else (1,)))
        whole = partial(stopwatch, using_threads(threads)(read)) if step is model else None
        sides.append(Program(name, threads, partial(stopwatch, written), whole, written))
    return sides


def other_sides(model: LM, n: int, threads: int, folder: str | Path) -> list[Program]:
    """The package `rwkv` and llama.cpp, as far as they are installed."""
    sides, missing = [], []
    prompt, tokens = prompt_and_tokens(model, n)
    try:
        forward = official(model, folder)
        start = forward(prompt[0].tolist(), None)[1]

        @using_threads(threads)
        def write() -> torch.Tensor:
            state = [s.clone() for s in start]     # it changes its state in place
            for t in tokens:
                logits, state = forward([t], state)
            return logits

        whole = using_threads(threads)(lambda: forward(prompt[0].tolist(), None))
        sides.append(Program("rwkv, float32", threads, partial(stopwatch, write), partial(stopwatch, whole),
                          write))
    except ImportError:
        missing.append("rwkv")
    try:
        for name, dtype in LLAMA.items():
            ask = LlamaCpp(model, folder, dtype, threads)
            sides.append(Program(f"llama.cpp, {name}", threads, lambda ask=ask: ask(1, n)[1],
                                 lambda ask=ask: ask(PROMPT, 1)[0]))
    except ImportError:
        missing.append("xllamacpp")
    if missing and threads == 1:
        print(f"not installed, so not compared: {', '.join(missing)}")
    return sides


def prompt_and_tokens(model: LM, n: int) -> tuple[torch.Tensor, list[int]]:
    """The same in every call: (1, PROMPT), and n more."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.cfg.vocab_size, (PROMPT + n,), generator=generator)
    return ids[None, :PROMPT].to(model.emb.weight.device), ids[PROMPT:].tolist()


def bench_text(cfg: BenchConfig, device: str) -> list[dict]:
    print(f"\none text, {device}: tokens/s one by one, and of {PROMPT} at once; the median, and the slowest"
          " and fastest turn\ndiffer: largest difference of logits from float32's / largest logit")
    rows = []
    for name, (shape, n) in TEXT.items():
        model = random_rwkv(shape).to(device)
        print(f"{name}: {shape.n_layer} layers, C {shape.n_embd}, {model.n_params():,} parameters")
        print(f"  {'':22}{'threads':>8}{'one by one':>24}{'at once':>24}{'differ':>10}")
        with tempfile.TemporaryDirectory() as folder:
            found = measure_text(model, n, folder, cfg.repeat)
        rows.append({"model": name, "n_layer": shape.n_layer, "n_embd": shape.n_embd,
                     "vocab_size": shape.vocab_size, "parameters": model.n_params(), "sides": found,
                     "state_bytes": remembered_bytes(shape, 1),
                     "kv_bytes": {T: shape.n_layer * cache_bytes(shape, "a", T) for T in LENGTHS}})

    print(f"\nmemory of one text in bytes, float32\n{'':22}{'RWKV-7':>12}", end="")
    print("".join(f"{f'attention, {T}':>19}" for T in rows[0]["kv_bytes"]))
    for row in rows:
        caches = "".join(f"{b:19,}" for b in row["kv_bytes"].values())
        print(f"{row['model']:16}L {row['n_layer']:<4}C {row['n_embd']:<6}{row['state_bytes']:12,}{caches}")
    return rows


def measure_text(model: LM, n: int, folder: str | Path, repeat: int) -> list[dict]:
    """A row for each program. At the end they all go, llama.cpp's servers too."""
    sides, rows = text_sides(model, n, folder), []
    readers = [side for side in sides if side.read]
    exact = next(side for side in sides if side.name == "ours, float32").logits()
    written = seconds_in_turns([side.write for side in sides], repeat)
    read = dict(zip(readers, seconds_in_turns([side.read for side in readers], repeat)))
    for side, seconds in zip(sides, written):
        row = {"side": side.name, "threads": side.threads, "one_by_one": speeds(n, seconds)}
        row |= {"at_once": speeds(PROMPT, read[side])} if side in read else {}
        if side.logits:
            row["differ"] = ((side.logits() - exact).abs().max() / exact.abs().max()).item()
        rows.append(row)
        print(f"  {side.name:22}{side.threads:8}{spread(row, 'one_by_one')}{spread(row, 'at_once')}"
              + (f"{row['differ']:10.1e}" if side.logits else f"{'-':>10}"), flush=True)
    return rows


def speeds(n: int, seconds: list[float]) -> dict[str, float]:
    """Tokens/s: the median turn's, the slowest's, the fastest's."""
    middle = statistics.median(seconds)
    return {"median": n / middle, "slowest": n / max(seconds), "fastest": n / min(seconds)}


def spread(row: dict, key: str) -> str:
    if key not in row:
        return f"{'-':>24}"
    v = row[key]
    digits = 0 if v["median"] >= 100 else 1
    between = f"({v['slowest']:,.{digits}f} ... {v['fastest']:,.{digits}f})"
    return f"{v['median']:8,.{digits}f}{between:>16}"


def main(argv: list[str] | None = None) -> None:
    cfg = cli(BenchConfig, argv)
    device, results = begin(cfg)
    for name, measure in (("operator", bench_operator), ("train", bench_train), ("text", bench_text)):
        if cfg.only in (None, name):
            results[name] = measure(cfg, device)
            save(cfg, results)                             # what follows may be interrupted


if __name__ == "__main__":
    run(main)
