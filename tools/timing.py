"""What the benchmarks share: clocks, sides timed in turns, settings, and files."""

import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from config import at_least, settings
from lib.folders import write_json
from lib.owned import check_place, contents
from lib.processes import pick_device
from model import MIN_LOG_DECAY
from wkv import wkv7


@settings
class TimingConfig:
    """What every benchmark takes. None means off."""

    repeat: int = at_least(1, 5, below=2**16)    # repetitions of each side
    json: str | None = None                     # also write the results here
    device: str = "auto"                        # auto, cpu, cuda

    def __post_init__(self):
        if self.json and Path(self.json).is_dir():         # before all the measuring, not after it
            raise ValueError(f"json = {self.json!r} is a folder: name a file")


def begin(cfg: TimingConfig, device: str | None = None) -> tuple[str, dict]:
    """The device to measure on, and the head of the results; says both.

    Raises ValueError where the results would replace what is none of a benchmark's.
    """
    if cfg.json:
        check_place([Path(cfg.json)], is_benchmark, "--json")
    device = device or pick_device(cfg.device).type
    machine = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    threads, load = torch.get_num_threads(), os.getloadavg()[0]
    print(f"torch {torch.__version__}, {machine}, {threads} CPU threads, load {load:.1f}, "
          f"medians of {cfg.repeat}", flush=True)
    return device, {"torch": torch.__version__, "device": device, "machine": machine, "threads": threads,
                    "load": load, "repeat": cfg.repeat}


def save(cfg: TimingConfig, results: dict) -> None:
    if cfg.json:
        write_json(Path(cfg.json), results)


def is_benchmark(file: Path) -> bool:
    return {"torch", "machine", "threads", "repeat"} <= contents(file).keys()


def stopwatch(side: Callable[[], object]) -> float:
    """Seconds by the clock on the wall, with all that Python and the CPU do."""
    sync = torch.cuda.synchronize if torch.cuda.is_initialized() else lambda: None
    sync()
    start = time.perf_counter()
    side()
    sync()
    return time.perf_counter() - start


def seconds_in_turns(sides: list[Callable[[], float]], repeat: int) -> list[list[float]]:
    """For each side the seconds of `repeat` runs, as the side itself says them.

    All sides run once, then again; a first round, to warm up, does not count.
    """
    rounds = [[side() for side in sides] for _ in range(repeat + 1)]
    return [list(times) for times in zip(*rounds[1:])]


def in_turns(sides: dict, repeat: int, clock: Callable[[Callable[[], object]], float] = stopwatch) -> dict:
    """Median seconds of each side by the clock, run in turns."""
    times = seconds_in_turns([partial(clock, side) for side in sides.values()], repeat)
    return dict(zip(sides, map(statistics.median, times)))


def cell(values: dict[str, float], name: str, width: int, digits: int = 0) -> str:
    """A number of a table, or a dash where it was not measured."""
    return f"{values[name]:{width},.{digits}f}" if name in values else f"{'-':>{width}}"


# ------------------------------------------------------------------------------------------
# The operator's work, forward and backward


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
    """wkv7's forms and causal attention on inputs (B, T, H, N) as RWKV-7 makes them."""
    torch.manual_seed(0)
    r, w, k, v, kk, a, dy = torch.randn(7, B, T, H, N, device=device)
    inputs = [
        x.to(dtype).requires_grad_()
        for x in (r, MIN_LOG_DECAY * w.sigmoid(), k / 8, v, F.normalize(kk, dim=-1), a.sigmoid())
    ]
    q = [x.to(dtype).transpose(1, 2).contiguous().requires_grad_() for x in (r, k, v)]  # (B, H, T, N)
    dy = dy.to(dtype)

    def wkv(form: str):
        return Side(
            partial(wkv7, backend=form, min_w=MIN_LOG_DECAY), inputs, dy, exact=partial(wkv7, backend="torch")
        )

    def attention(*q):
        return F.scaled_dot_product_attention(*q, is_causal=True), None

    return {form: wkv(form) for form in ("loop", "chunk", "torch", "triton")} | {
        "attention": Side(attention, q, dy.transpose(1, 2).contiguous())
    }
