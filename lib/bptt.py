"""Backpropagation through time in pieces: any length with the activations of one piece.

A model that remembers takes a piece of the text x_i and its state S_i to a loss and the
next state, (l_i, S_{i+1}) = f(x_i, S_i). Ordinary backpropagation of l_1 + ... + l_n
keeps the activations of all n pieces. Here only the states at the borders are kept:

    there       S_2 = f(x_1, S_1), S_3 = f(x_2, S_2), ...
                without gradients: only the states remain
    and back    for i = n ... 1: run f(x_i, S_i) once more, now with gradients, and
                go back from  l_i + <S_{i+1}, dS_{i+1}>  to the parameters, which
                add it up, and to S_i, which is dS_i

dS_{i+1} = d(l_{i+1} + ... + l_n) / dS_{i+1} is a constant here, so that the sum's
gradient is the chain rule, and nothing is approximated. With n = 1 this is ordinary
backpropagation. The price is one more forward pass (of n - 1 pieces of n), as for
activation checkpointing, which still keeps every layer's input for every token.

A "state" is here any nest of tuples, State and tensors. For RWKV-7 it is of constant
size. Attention's is its cache, and the gradient of a cached key is what all later
pieces want of it. As caches only grow, the last one holds all others.

What it is not: truncated. lib/streams.py is, between steps, where it forgets dS.
"""

import torch
import torch.nn as nn
from torch import Tensor

from data.loader import Batch
from lib.processes import averaging, mixed_precision
from lib.states import tensors, tree_map


def drop_caches(state, after):
    """Each KV cache of `state` as a meta tensor, its shape alone.

    `after`, the next border, begins with the same keys and values.
    """
    return tree_map(lambda s, a: s if s.shape == a.shape else s.to("meta"), state, after)


def restore_caches(state, last):
    """Each dropped cache, (B, Hkv, T, N), cut from that in `last`, the last border."""
    return tree_map(lambda s, a: a[:, :, : s.shape[2]] if s.is_meta else s, state, last)


def backward_in_pieces(module: nn.Module, batch: Batch, state, chunk: int | None, scale: float,
                       average: bool) -> tuple[dict[str, Tensor], object]:
    """Add the gradients of scale * loss to the parameters, `chunk` tokens at a time
    (None: all at once).

    module(piece, state) -> ({"loss": sum over the piece's targets, ...}, state) is the
    model and its loss, perhaps in DDP. `average`: DDP averages the gradients over the
    processes, in the backward pass of the first piece, which comes last; every process
    must have as many pieces. Returns the sums over the whole batch, and the state after
    it. No gradient goes into `state`.
    """
    pieces = batch.split(chunk)
    borders = [state]
    for piece in pieces[:-1]:
        with torch.no_grad(), mixed_precision(piece.x):
            _, after = module(piece, borders[-1])
        borders[-1] = drop_caches(borders[-1], after)
        borders.append(after)

    last, final, sums, dS = borders[-1], None, {}, []
    for i in reversed(range(len(pieces))):
        start = restore_caches(borders.pop(), last)
        start = tree_map(lambda s: s.detach().requires_grad_(i > 0 and s.is_floating_point()), start)
        with averaging(module, average and i == 0):
            with mixed_precision(batch.x):  # one per pass: what autocast caches without gradients gets none
                losses, end = module(pieces[i], start)
            # dS is empty after the last piece, where nothing follows; a teacher's state
            # gets no gradient
            ends = [(s, g) for s, g in zip(tensors(end), dS) if g is not None and s.requires_grad]
            torch.autograd.backward(
                [losses["loss"] * scale, *(s for s, _ in ends)], [None, *(g for _, g in ends)]
            )
        dS = [s.grad for s in tensors(start)]
        final = tree_map(Tensor.detach, end) if i == len(pieces) - 1 else final
        sums = {key: sums.get(key, 0) + value.detach().float() for key, value in losses.items()}
        del losses, end, ends, start        # or the next piece would run beside this one's activations
    return sums, final
