"""Backpropagation through time in pieces: sequences of any length with the activations of one piece, and exact gradients.

A model that remembers takes a piece of the text x_i and its state S_i to a loss and the next state, (l_i, S_{i+1}) = f(x_i, S_i).
Ordinary backpropagation of l_1 + ... + l_n keeps the activations of all n pieces. Here only the states at the borders are kept:

    there       S_2 = f(x_1, S_1), S_3 = f(x_2, S_2), ...        without gradients, nothing but the states remains
    and back    for i = n ... 1: run f(x_i, S_i) once more, now with gradients, and go back from
                    l_i + <S_{i+1}, dS_{i+1}>                    to the parameters, which add it up, and to S_i, which is dS_i

dS_{i+1} = d(l_{i+1} + ... + l_n) / dS_{i+1} is a constant here, so that the sum's gradient is the chain rule, and nothing is
approximated. With n = 1 this is ordinary backpropagation. The price is one more forward pass (of n - 1 pieces of n), the same
price as activation checkpointing, which still keeps every layer's input for every token.

What a "state" is here: any nest of tuples, State and tensors. For RWKV-7 it is of constant size. Attention's is its cache, and
the gradient of a cached key is what all later pieces want of it. As caches only grow, the last one holds all others.

What it is not: truncated backpropagation, which forgets dS. train.py has that too (bptt_truncate), between steps.
"""

import contextlib

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from data.loader import Batch
from model import State, tensors, tree_map


def drop_caches(state, after):
    """Each KV cache of `state` as a meta tensor, its shape alone: `after`, the next border, begins with the same keys and values."""
    return tree_map(lambda s, a: s if s.shape == a.shape else s.to("meta"), state, after)


def restore_caches(state, last):
    """Each dropped cache, (B, Hkv, T, N), cut from the one in `last`, the last border."""
    return tree_map(lambda s, a: a[:, :, : s.shape[2]] if s.is_meta else s, state, last)


def backward_in_pieces(module: nn.Module, batch: Batch, state, chunk: int | None, scale: float, average: bool) -> tuple[dict[str, Tensor], object]:
    """Add the gradients of scale · loss of a whole batch to the parameters, running `chunk` tokens at a time (None: all at once).

    module(piece, state, with_loss) -> ({"loss": sum over the piece's targets, ...}, state) is the model and its loss, perhaps in
    DDP; without `with_loss` the dict may be empty. `average`: DDP averages the gradients over the processes, in the backward pass
    of the first piece, which comes last; every process must have as many pieces. Returns the sums over the whole batch and the
    state after it. No gradient goes into the `state` before it.
    """
    pieces = batch.split(chunk)
    borders = [state]
    for piece in pieces[:-1]:
        with torch.no_grad(), mixed_precision(batch):
            _, after = module(piece, borders[-1], False)
        borders[-1] = drop_caches(borders[-1], after)
        borders.append(after)

    last, final, sums, dS = borders[-1], None, {}, []
    for i in reversed(range(len(pieces))):
        start = tree_map(lambda s: s.detach().requires_grad_(i > 0 and s.is_floating_point()), restore_caches(borders.pop(), last))
        with averaging(module, average and i == 0):
            with mixed_precision(batch):  # one per pass: what autocast caches without gradients would get none
                losses, end = module(pieces[i], start, True)
            # dS is empty after the last piece, where nothing follows; a teacher's state gets no gradient
            ends = [(s, g) for s, g in zip(tensors(end), dS) if g is not None and s.requires_grad]
            torch.autograd.backward([losses["loss"] * scale, *(s for s, _ in ends)], [None, *(g for _, g in ends)])
        dS = [s.grad for s in tensors(start)]
        final = tree_map(Tensor.detach, end) if i == len(pieces) - 1 else final
        sums = {key: sums.get(key, 0) + value.detach().float() for key, value in losses.items()}
        del losses, end, ends, start  # or the next piece would run beside this one's activations
    return sums, final


def mixed_precision(batch: Batch):
    """bfloat16 compute on GPUs only."""
    return torch.autocast(batch.x.device.type, torch.bfloat16, enabled=batch.x.is_cuda)


def averaging(module: nn.Module, now: bool):
    """Around a forward and a backward pass: DDP averages the gradients in it if `now`, else each process only adds up its own (no_sync)."""
    return module.no_sync() if isinstance(module, DistributedDataParallel) and not now else contextlib.nullcontext()


# ---------------------------------------------------------------------------------------------------------------------
# A state that is carried from step to step belongs to the checkpoint: as plain tuples, with the rows of all processes

def pack(states: list[State]) -> list[tuple]:
    """For each micro-batch (position, layers) on the CPU, the rows of all processes concatenated. Every process must call it."""
    def rows(x: Tensor) -> Tensor:
        parts = [x]
        if dist.is_initialized():
            parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
            dist.all_gather(parts, x.contiguous())
        return torch.cat(parts).cpu()

    return [(s.position, tree_map(rows, s.layers)) for s in states]


def unpack(packed: list[tuple], B: int, rank: int, device: torch.device) -> list[State]:
    """This process's B rows of each."""
    return [State(position, tree_map(lambda x: x[rank * B : (rank + 1) * B].to(device), layers)) for position, layers in packed]
