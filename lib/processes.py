"""torchrun's processes, and the device that each computes on."""

import contextlib
import ctypes
import os
import re

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

LOST = "onnection (closed|reset|refused)|by peer|Broken pipe|Socket Timeout|remote process exited"


def setup(device: str = "auto") -> tuple[int, int, torch.device]:
    """(rank, world size, device) from torchrun's environment; alone, (0, 1, device).

    NCCL on GPUs, gloo on CPUs. Raises ValueError as `pick_device`.
    """
    rank, world, local = (int(os.environ.get(key, default)) for key, default in
                          (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    chosen = pick_device(device, local)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
        torch.set_float32_matmul_precision("high")
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    return rank, world, chosen


def pick_device(device: str = "auto", local: int = 0) -> torch.device:
    """The device called so; auto is this process's GPU, or the CPU if there is none.

    On the CPU it also sets how memory is freed.
    """
    gpu = torch.cuda.is_available()
    if device not in ("auto", "cpu") and not (gpu and re.fullmatch(r"cuda(:\d+)?", device)):
        raise ValueError(f"device = {device!r}: choose auto, cpu"
                         + (" or cuda" if gpu else "; there is no CUDA here"))
    number = device.partition(":")[2] or str(local)
    if gpu and device != "cpu" and int(number) >= torch.cuda.device_count():
        raise ValueError(f"device = {device!r}: there is no GPU {number} here, of "
                         f"{torch.cuda.device_count()}: name another, or start fewer processes")
    if gpu and device in ("auto", "cuda"):
        return torch.device(f"cuda:{local}")
    keep_memory()
    return torch.device("cpu" if device == "auto" else device)


def keep_memory() -> None:
    """Memory that tensors free stays with the process, for later tensors.

    Otherwise glibc returns it and asks for it again in every step. Without that, two
    threads train RWKV-7 an eighth faster, with a large vocabulary nearly twice as fast.
    The peak is the same, but with a large vocabulary a quarter higher (docs/log.md).
    """
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4                                 # as in glibc's malloc.h
    with contextlib.suppress(AttributeError, OSError, TypeError):         # no glibc: nothing to set
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_TRIM_THRESHOLD, -1)                                     # never return the free end
        mallopt(M_MMAP_MAX, 0)                                            # no blocks that free() returns


@contextlib.contextmanager
def using_threads(n: int):
    """In the block, or in a function decorated with it, PyTorch has n threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


@contextlib.contextmanager
def joined():
    """Around a script's work: no process tears its connections down while another uses
    them, and where one of them fails, the first to do so says it for all.

    Raises SystemExit, without a word, in the others; ValueError where a process is gone
    that said nothing.
    """
    try:
        yield
        if dist.is_initialized():
            dist.barrier()
    except SystemExit:
        raise
    except BaseException as e:
        if dist.is_initialized() and not e.args == ("saved",) and not fails_first():
            raise SystemExit(1) from None
        if isinstance(e, RuntimeError) and re.search(LOST, str(e)):
            raise ValueError("another process of this run has ended without a word, it may have been killed: "
                             "go on with --resume") from None
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def fails_first() -> bool:
    """Whether no other process has failed before this one, as far as can be known."""
    try:
        return dist.distributed_c10d._get_default_store().add("failed", 1) == 1
    except (RuntimeError, ValueError):
        return True


@contextlib.contextmanager
def main_first(rank: int):
    """Rank 0 runs the block before the others do: for preparing data once."""
    if dist.is_initialized() and rank > 0:
        dist.barrier()
    yield
    if dist.is_initialized() and rank == 0:
        dist.barrier()


def agree(values: list[float], device: torch.device) -> list[float]:
    """The maximum over all ranks of each value, so that all of them decide alike."""
    if not dist.is_initialized():
        return values
    t = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(t, dist.ReduceOp.MAX)
    return t.tolist()


def global_sum(x: Tensor) -> Tensor:
    """x summed over all processes."""
    if dist.is_initialized():
        x = x.clone()
        dist.all_reduce(x)
    return x


def is_part(x: Tensor) -> bool:
    """Whether this process holds only its part of x (lib/shard.py): x is a DTensor."""
    return hasattr(x, "full_tensor")


def whole(x: Tensor) -> Tensor:
    """All of x, of which each process may hold a part; then every process must ask."""
    return x.full_tensor() if is_part(x) else x


def part_of(x: Tensor, like: Tensor) -> Tensor:
    """This process's part of x, cut as `like` is; every process has the same x."""
    if not is_part(like):
        return x
    from torch.distributed.tensor import distribute_tensor                 # slow to import
    return distribute_tensor(x.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def mixed_precision(x: Tensor):
    """bfloat16 compute on GPUs only: on a CPU it is slower than float32."""
    return torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda)


def averaging(module: nn.Module, now: bool):
    """Around a forward and a backward pass: DDP averages the gradients in it if `now`.

    Else each process only adds up its own (no_sync).
    """
    return (
        module.no_sync()
        if isinstance(module, DistributedDataParallel) and not now
        else contextlib.nullcontext()
    )


def data_parallel(module: nn.Module, world: int, device: torch.device, compiled: bool) -> nn.Module:
    """The module, perhaps compiled, in DDP, where there are several processes that do
    not hold parts of it.
    """
    if compiled:
        torch._functorch.config.enable_autograd_cache = False    # its cached view outputs fail in torch 2.13
        module = torch.compile(module)
    if world == 1 or any(map(is_part, module.parameters())):
        return module
    return DistributedDataParallel(module, device_ids=[device.index] if device.type == "cuda" else None)
