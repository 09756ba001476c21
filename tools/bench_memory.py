"""Peak memory and speed of training against the length of the sequence.

    python -m tools.bench_memory --json out/memory.json    some minutes on two cores

A GPT, RWKV-7, RWKV-7 with checkpointed blocks, and RWKV-7 in pieces (lib/bptt.py), each
at each length in a process of its own, whose peak is nobody else's. Speeds are medians
of --repeat steps, or of one alone where a step takes 5 s or more.
"""

import json
import resource
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path

from config import at_least, cli, run, settings, shown
import torch
from torch.utils.checkpoint import checkpoint

from data.loader import Batch
from lib.bptt import backward_in_pieces
from lib.processes import pick_device
from model import LM, ModelConfig
from tools.timing import TimingConfig, begin, save, stopwatch
from train import Step, cross_entropy_loss


@settings
class MemoryConfig(TimingConfig):
    lengths: str | None = None      # tokens per sequence; None = 1024,2048, ... 16384, on a GPU up to 65536
    bptt_chunk: int = at_least(1, 1024, below=2**31)    # tokens at a time
    layers: int = at_least(1, 3, below=2**12)           # the model's shape
    embd: int = at_least(32, 96, below=2**20)
    # seconds; a side that took longer is left out at greater lengths
    limit: float = at_least(0.0, 60.0, below=1e6)

    def __post_init__(self):
        if self.embd % 32:
            raise ValueError(f"embd = {self.embd}: it must be at least 32, and a multiple of 32")
        parse_lengths(self.lengths or "16")


# checkpointed: each block runs again on the way back
SIDES = {"GPT": "a", "RWKV-7": "r", "RWKV-7, checkpointed": "r", "RWKV-7, in pieces": "r"}


def length_side(name: str, T: int, cfg: MemoryConfig, device: str) -> dict[str, float]:
    """Tokens/s of one AdamW step on one sequence of T tokens, and the process's peak
    memory above what it had before, in MB.

    The step before, on 16 tokens, has made gradients and moments: what is left are
    activations. For a process of its own.
    """
    attention = SIDES[name] == "a"
    shape = ModelConfig(mixer=SIDES[name], ffn="relu2" if attention else "channelmix", n_layer=cfg.layers,
                        n_embd=cfg.embd, n_head=max(1, cfg.embd // 32), block_size=T)
    torch.manual_seed(0)
    model = LM(shape).to(pick_device(device))          # whose memory stays, as in training
    if name.endswith("checkpointed"):
        for block in model.blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    module = Step(model, cross_entropy_loss)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens = torch.randint(shape.vocab_size, (1, T + 1), device=device)

    def step(n: int):
        batch = Batch(tokens[:, :n], tokens[:, 1 : n + 1], torch.ones(1, n, device=device))
        backward_in_pieces(
            module, batch, None, cfg.bptt_chunk if name.endswith("in pieces") else None, 1 / n, True
        )
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    def peak() -> float:
        if device == "cuda":
            return torch.cuda.max_memory_allocated()
        # macOS says bytes, Linux kB
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    step(16)
    before = peak()
    seconds = stopwatch(lambda: step(T))
    high = peak()
    if seconds < 5:  # the first time includes making room
        seconds = statistics.median(stopwatch(lambda: step(T)) for _ in range(cfg.repeat))
    return {
        "parameters": model.n_params(),
        "MB": (high - before) / 1e6,
        "tokens_per_s": T / seconds,
        "seconds": seconds,
    }


def bench_memory(cfg: MemoryConfig, device: str, results: dict) -> None:
    """Each side at each length in a process of its own, whose peak is nobody else's.

    Each row is saved as it comes: the next may be interrupted.
    """
    lengths = sorted(
        parse_lengths(cfg.lengths or ",".join(str(1024 * 2**i) for i in range(7 if device == "cuda" else 5)))
    )
    print(
        f"\ntraining on one sequence of T tokens, {cfg.layers} layers, C {cfg.embd}, {device}: MB above the"
        f" idle model, tokens/s (one step where it takes 5 s or more); pieces of {cfg.bptt_chunk}"
    )
    print(f"{'T':>8}" + "".join(f"{name:>26}" for name in SIDES))
    over = set()
    for T in lengths:
        row: dict = {"T": T}
        for name in SIDES:
            if name in over:
                continue
            code = ("import json; from tools.bench_memory import MemoryConfig, length_side; "
                    f"print(json.dumps(length_side({name!r}, {T}, {cfg!r}, {device!r})))")
            try:
                child = subprocess.run(
                    [sys.executable, "-c", code],
                    cwd=Path(__file__).parent.parent,
                    capture_output=True,
                    text=True,
                    timeout=4 * cfg.limit + 60,
                )
                failed = (
                    child.stderr.strip().splitlines()[-1:] or [f"exit status {child.returncode}"]
                    if child.returncode
                    else []
                )
            except subprocess.TimeoutExpired:
                failed = ["too slow"]
            if failed:  # out of memory, most likely; longer sequences need more
                print(f"{name} is left out from T = {T} on: {failed[0][:120]}", flush=True)
            else:
                row[name] = json.loads(child.stdout.splitlines()[-1])
            if failed or row[name]["seconds"] > cfg.limit:
                over.add(name)
        results["memory"].append(row)
        save(cfg, results)
        print(
            f"{T:8}"
            + "".join(
                (
                    f"{row[name]['MB']:12,.0f} MB{row[name]['tokens_per_s']:9,.0f}/s"
                    if name in row
                    else f"{'-':>26}"
                )
                for name in SIDES
            ),
            flush=True,
        )


def parse_lengths(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and len(part) < 10 and int(part) >= 16 for part in parts):
        raise ValueError(f"lengths = {shown(text)}: write numbers of at least 16, below 10^9, with "
                         "commas, such as 1024,4096")
    return list(map(int, parts))


def main(argv: list[str] | None = None) -> None:
    cfg = cli(MemoryConfig, argv)
    device, results = begin(cfg)
    results["memory"] = []
    bench_memory(cfg, device, results)


if __name__ == "__main__":
    run(main)
