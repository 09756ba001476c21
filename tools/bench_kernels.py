"""The operator's Triton kernels on a GPU, beside loop, chunks, attention and fla's.

    python -m tools.bench_kernels --repeat 20 --json out/kernels.json    on a GPU
    TRITON_INTERPRET=1 python -m tools.bench_kernels          that it runs, not how fast

fla is the package fla-core, where it is installed. Every side is timed, weighed against
what must be moved at least, and compared with float64.
"""

import math
import os
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from config import cli, run, settings
import torch

from kernels import why_not_triton
from lib.owned import check_place
from lib.processes import pick_device
from lib.report import figure
from model import MIN_LOG_DECAY
from tools.timing import (Side, TimingConfig, begin, cell, in_turns, is_benchmark, operator_sides, save,
                          stopwatch)
from wkv import wkv7


KERNEL_SHAPES = ((8, 4096, 64), (8, 1024, 12), (16, 1024, 12), (1, 32768, 32), (1, 4096, 12))  # B, T, H
TINY_SHAPES = ((1, 20, 2),)  # for the interpreter
LOOP_LIMIT = 2**17  # B T H, beyond which the loop takes minutes, or more memory than there is
OUTPUTS = ("y", "S", "dr", "dw", "dk", "dv", "dkk", "da", "dS0")
# the bound lets it use matrix units
FLA = {"fla": {}} | {f"fla, chunk {n}": {"chunk_size": n, "lower_bound": MIN_LOG_DECAY} for n in (64, 32, 16)}
FLA |= {f"{name}, no recompute": options | {"disable_recompute": True} for name, options in FLA.items()}


@settings
class KernelsConfig(TimingConfig):
    pass


def least_bytes(N: int) -> dict[str, int]:
    """What one token of one head must move through memory, in bfloat16, with a state
    kept every 64 tokens for the way back.
    """
    row, state = 2 * N, 2 * N * N // 64
    forward = 6 * row + row                     # read r, w, k, v, kk, a; write y
    backward = 6 * row + row + state + 6 * row  # read the same, dy and the state; write six gradients
    return {"forward": forward, "both": forward + state + backward}


def gpu_clock(side: Callable[[], object]) -> float:
    """Seconds of the GPU alone, by its own events."""
    # milliseconds of other work: the cache forgets the inputs, the CPU launches ahead
    for _ in range(8):
        torch.rand(2**28, device="cuda").sum()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    side()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def fla_side(chunk_rwkv7: Callable, ours: Side, **options) -> Side:
    """fla's operator takes z = -kk and b = kk * a, made beforehand at no cost to it,
    and its states are transposed.
    """
    def run(r, w, k, v, z, b, state=None):
        return chunk_rwkv7(
            r, w, k, v, z, b, initial_state=state, output_final_state=state is not None, **options
        )

    # b / kk is an `a`, and the chain rule through it gives the gradients of z and b
    def exact(r, w, k, v, z, b, state):
        y, state = wkv7(r, w, k, v, -z, b / -z, state.mT, backend="torch")
        return y, state.mT

    r, w, k, v, kk, a = (x.detach() for x in ours.inputs)
    return Side(run, [x.requires_grad_() for x in (r, w, k, v, -kk, kk * a)], ours.dy, exact)


def errors(side: Side) -> dict[str, float]:
    """||x - exact|| / ||exact|| of y, the last state and seven gradients (fla's dkk and
    da are dz and db).

    Exact is float64, on two heads, the very first and the last; the worse counts. All
    memory is NaN until written, and NaN or infinity anywhere makes all errors NaN.
    """
    B, T, H, N = side.dy.shape
    inputs = [
        x.detach().requires_grad_()
        for x in (*side.inputs, torch.randn(B, H, N, N, device=side.dy.device) / 8)
    ]
    dy = [side.dy, torch.randn_like(inputs[-1])]

    def outputs(run, inputs, dy):
        y = run(*inputs)
        return *(x.detach() for x in y), *torch.autograd.grad(y, inputs, dy)

    def two_heads(x):  # (B, T, H, N) or, a state, (B, H, N, N): the same with B = 2, H = 1
        return (
            torch.stack((x[0, :, :1], x[-1, :, -1:]) if x.shape == side.dy.shape else (x[0, :1], x[-1, -1:]))
            .detach()
            .double()
        )

    exact = outputs(side.exact, [two_heads(x).requires_grad_() for x in inputs], [two_heads(x) for x in dy])
    # for its side effect: torch.empty is filled with NaN
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        found = outputs(side.run, inputs, dy)
    finally:
        torch.use_deterministic_algorithms(False)
    finite = all(x.isfinite().all() for x in found)

    def worst(x, e):
        error = (two_heads(x) - e).flatten(1).norm(dim=1) / e.flatten(1).norm(dim=1)
        return error.max().item()

    return {name: worst(x, e) if finite else math.nan for name, x, e in zip(OUTPUTS, found, exact)}


def memory(side: Side) -> dict[str, float]:
    """What waits for the backward pass, inputs included, over the inputs; and the peak
    of both passes above the inputs.
    """
    before = torch.cuda.memory_allocated()
    graph = side.run(*side.inputs)[0].grad_fn  # holds what is kept; y is not
    kept = torch.cuda.memory_allocated() - before
    del graph
    torch.cuda.reset_peak_memory_stats()
    side.both()
    peak = torch.cuda.max_memory_allocated() - before
    return {"kept": 1 + kept / sum(x.nbytes for x in side.inputs), "peak_MB": peak / 1e6}


def attempt(name: str, what: Callable[[], object]):
    """What it returns, or None and a line that says why: a side that fails must not
    cost the others' results.
    """
    try:
        result = what()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return result
    except Exception as e:
        print(f"{name} is left out: {type(e).__name__}: {' '.join(str(e).split())[:200]}", flush=True)


def measure(
    sides: dict[str, Side], cfg: KernelsConfig, clock: Callable, copy: float
) -> dict[str, dict[str, float]]:
    """Milliseconds of all sides in turns, the rate if least_bytes were all that is
    moved, memory, errors.
    """
    B, T, H, N = sides["triton"].dy.shape
    seconds = in_turns(
        {(name, way): getattr(side, way) for name, side in sides.items() for way in ("forward", "both")},
        cfg.repeat,
        clock,
    )
    rows = {name: {f"{way}_ms": 1e3 * seconds[name, way] for way in ("forward", "both")} for name in sides}
    for name, side in sides.items():
        for way, least in least_bytes(N).items():
            rate = B * T * H * least / seconds[name, way]
            rows[name] |= {f"{way}_GB_per_s": rate / 1e9, f"{way}_of_copy": rate / copy} if side.exact else {}
        if clock is gpu_clock:
            rows[name] |= attempt(f"memory of {name}", lambda: memory(side)) or {}
        if side.exact:
            rows[name] |= {
                "errors": (
                    attempt(f"errors of {name}", lambda: errors(side)) or dict.fromkeys(OUTPUTS, math.nan)
                )
            }
    return rows


def kernel_goals(row: dict) -> dict[str, tuple[float, float]]:
    """What is to be reached: its value, and the most that it may be."""
    ours, best = row["sides"]["triton"], row["sides"].get(row.get("best"))
    worst = {
        what: max(ours["errors"][name] for name in names)
        for what, names in (("values", OUTPUTS[:2]), ("gradients", OUTPUTS[2:]))
    }
    goals = {"errors of values": (worst["values"], 6e-3), "errors of gradients": (worst["gradients"], 1.2e-2)}
    if (row["B"], row["T"], row["H"]) == KERNEL_SHAPES[0]:
        goals |= {"forward ms": (ours["forward_ms"], 1), "forward + backward ms": (ours["both_ms"], 4)}
    if "kept" in ours:
        goals["kept, of the inputs"] = ours["kept"], 1.5
    if best:
        goals["errors, of fla's best"] = (
            max(ours["errors"][name] / best["errors"][name] for name in OUTPUTS),
            1,
        )
        goals |= {
            f"{way} ms, of fla's best": (ours[f"{way}_ms"] / best[f"{way}_ms"], 0.5)
            for way in ("forward", "both")
        }
    return goals


def print_kernels(row: dict) -> None:
    place = f"B {row['B']:<4}T {row['T']:<7}H {row['H']}"
    rates = f"{'GB/s':>7}{'of copy':>9}"
    print(f"\n{place:28}{'forward ms':>12}{rates}{'+ backward ms':>16}{rates}{'kept':>7}{'peak MB':>9}")
    for name, side in row["sides"].items():
        line = f"{name:28}"
        for way, width in (("forward", 12), ("both", 16)):
            line += cell(side, f"{way}_ms", width, 3) + cell(side, f"{way}_GB_per_s", 7)
            line += cell(side, f"{way}_of_copy", 9, 2)
        print(line + cell(side, "kept", 7, 2) + cell(side, "peak_MB", 9))
    print(f"{'relative errors':28}" + "".join(f"{name:>9}" for name in OUTPUTS))
    for name, errors in ((name, side["errors"]) for name, side in row["sides"].items() if "errors" in side):
        print(f"{name:28}" + "".join(f"{errors[output]:9.1e}" for output in OUTPUTS))
    for what, (value, most) in row["goals"].items():
        print(f"  {what:26}{value:10.2g} (goal {most:g})" + ("" if value <= most else " MISSED"), flush=True)


def plot_kernels(rows: dict[str, dict], path: Path) -> None:
    """Milliseconds of every side at every shape."""
    with figure(path, 2, width=6, height=4) as panels:
        if panels is None:
            return
        for ax, way, title in zip(panels, ("forward", "both"), ("forward", "forward and backward")):
            for i, name in enumerate(("triton", "fla's best", "fla", "attention", "torch", "loop")):
                best = name == "fla's best"
                sides = [row["sides"].get(row.get("best") if best else name, {}) for row in rows.values()]
                ms = [side.get(f"{way}_ms", math.nan) for side in sides]
                ax.bar([x + i / 7 for x in range(len(rows))], ms, 1 / 7, label=name)
            ax.set_xticks([x + 0.36 for x in range(len(rows))], rows)
            ax.set(title=title, xlabel="B, T, H", ylabel="ms", yscale="log")


def kernel_row(B: int, T: int, H: int, chunk_rwkv7: Callable | None, cfg: KernelsConfig, device: str,
               copy: float) -> dict:
    """All that is measured at one shape; of fla its default and, by the time of both
    passes, its best setting.
    """
    clock = gpu_clock if device == "cuda" else stopwatch
    sides, row = operator_sides(B, T, H, 64, device, torch.bfloat16), {"B": B, "T": T, "H": H}
    if B * T * H > LOOP_LIMIT:
        del sides["loop"]
    sides = {name: side for name, side in sides.items() if attempt(name, side.both)}
    if chunk_rwkv7:
        settings = {name: fla_side(chunk_rwkv7, sides["triton"], **options) for name, options in FLA.items()}
        settings = {name: side for name, side in settings.items() if attempt(name, side.both)}
        seconds = in_turns({name: side.both for name, side in settings.items()}, 3, clock)
        row["fla_ms"] = {name: 1e3 * s for name, s in seconds.items()}
        row["best"] = min(settings, key=row["fla_ms"].get, default=None)
        sides |= {name: side for name, side in settings.items() if name in ("fla", row["best"])}
    row["sides"] = measure(sides, cfg, clock, copy)
    row["goals"] = kernel_goals(row)
    print_kernels(row)
    return row


def bench_kernels(cfg: KernelsConfig, device: str, results: dict) -> None:
    """Two rounds over the shapes, the second with fla, which compiles for long: what
    the first has written is not lost.
    """
    shapes, clock, size = KERNEL_SHAPES, gpu_clock, 2**29
    if device == "cpu":
        shapes, clock, size = TINY_SHAPES, stopwatch, 2**20
    source, target = torch.rand(2, size, device=device)
    # 4 bytes read and 4 written
    copy = 8 * size / in_turns({"copy": lambda: target.copy_(source)}, cfg.repeat, clock)["copy"]
    least = least_bytes(64)
    results |= {"copy_GB_per_s": copy / 1e9, "least_bytes": least, "fla_settings": FLA, "kernels": {}}
    print(f"\nwkv7, N = 64, bfloat16: per token and head at least {least['forward']:,} bytes forward, "
          f"{least['both']:,} with backward; a copy in memory moves {copy / 1e9:,.0f} GB/s")
    if device == "cpu":
        print("Triton's interpreter: this shows that everything runs, not how fast")
    fla = "fla (pip install fla-core==0.6.0)"
    chunk_rwkv7 = attempt(fla, lambda: import_module("fla.ops.rwkv7").chunk_rwkv7)
    for theirs in (None, chunk_rwkv7) if chunk_rwkv7 else (None,):
        for B, T, H in shapes:
            if row := attempt(f"B {B} T {T} H {H}", lambda: kernel_row(B, T, H, theirs, cfg, device, copy)):
                results["kernels"][f"{B}, {T}, {H}"] = row
                save(cfg, results)
    if cfg.json and results["kernels"]:
        plot_kernels(results["kernels"], plot_of(cfg))


def plot_of(cfg: KernelsConfig) -> Path:
    return Path(cfg.json).with_suffix(".png")


def main(argv: list[str] | None = None) -> None:
    cfg = cli(KernelsConfig, argv)
    if cfg.json:                                           # the plot beside it is its own, or is none
        check_place([Path(cfg.json), plot_of(cfg)], is_benchmark, "--json")
    device = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else pick_device(cfg.device).type
    probe = torch.empty(1, 1, 1, 64, dtype=torch.bfloat16, device=device)
    if reason := why_not_triton(probe):
        raise ValueError(f"kernels: backend triton {reason.removesuffix(': use torch')}")
    bench_kernels(cfg, *begin(cfg, device))


if __name__ == "__main__":
    run(main)
