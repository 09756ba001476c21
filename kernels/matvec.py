"""A matrix times a row, at the speed at which the matrix can be read.

Decoding one text is such products, of one token with every weight matrix. PyTorch hands
one row to a BLAS routine that reads at half of a core's speed or less. A batch of them
goes to another, sgemm_batch, that reads at all of it: so here a matrix is a batch of
its upper and its lower half, or of a part for each thread. In 16 bits, or where most of
the row is zero, the kernel that adds up embeddings is better. docs/log.md has the
figures, and what else was tried.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

LARGE = 2**17        # numbers; with fewer, views, threads and a look for zeros cost more than they save
WIDTH = 16           # PyTorch's product with int8 reads so many numbers at once, whatever lies behind them


class Matvec:
    """x, add -> x W^T + add + bias, for x (B, C) and W (A, C), as nn.Linear has it.

    G of them at once: x (G, B, C) and W (G, A, C). `dtype` is W's: x is converted to it
    and the result back. In int8 each of W's rows has a scale, and x and the result
    are in bfloat16.

    `sparse`, for a single product: what meets a zero of x is not read. After relu that
    is half of W, in trained models nine tenths.

    W may be read where it lies: change it, and make another. Raises ValueError for int8
    on a GPU.
    """

    def __init__(self, W: Tensor, bias: Tensor | None = None, dtype: torch.dtype | None = None,
                 sparse: bool = False):
        *G, A, C = W.shape
        assert not (G and sparse), "zeros are skipped in one product, not in G"
        self.dtype, self.bias, self.shape = dtype or W.dtype, bias, (*G, 1, A)
        on_cpu, large = W.device.type == "cpu", W.numel() >= LARGE
        self.threads = torch.get_num_threads() if on_cpu and large else 1   # that are worth their while
        self.sparse = sparse and on_cpu and large and self.dtype.itemsize in (2, 4)
        self.mm, self.addmm = (torch.bmm, torch.baddbmm) if G else (torch.mm, torch.addmm)

        self.one = None                      # x -> x W^T for one text; None: as for several
        if self.dtype == torch.int8:
            if not on_cpu:
                raise ValueError("dtype = int8 is for CPUs: take bfloat16")
            self.scaled = [in_8_bits(w) for w in W.detach().view(-1, A, C)]
            return
        W = W.detach().to(self.dtype)
        if self.sparse or on_cpu and self.dtype.itemsize == 2:
            self.one, self.turned = self.sum_of_columns, W.mT.contiguous()  # (G, C, A)
            self.columns = self.turned.view(-1, A)
            self.index = torch.arange(len(self.columns))
            self.starts = torch.cat([first + self.shares(C) for first in range(0, len(self.columns), C)])
        elif on_cpu and large:
            self.one, self.turned = self.in_batch, W.mT
            self.batch = W if G else in_parts(W, self.threads)
            self.n, self.even = len(self.batch), self.batch.numel() == W.numel()
        else:
            self.turned = W.mT.contiguous()

    def __call__(self, x: Tensor, add: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        if self.dtype == torch.int8:
            y = self.by_scales(x)
        elif self.one and x.shape[-2] == 1:
            y = self.one(x)
        elif self.dtype != x.dtype:
            y = self.mm(x.to(self.dtype), self.turned).to(x.dtype)
        else:
            y = self.mm(x, self.turned, out=out) if add is None else self.addmm(add, x, self.turned, out=out)
            add = out = None                                                # both are seen to
        if add is not None:
            y = torch.add(y, add, out=out)
        elif out is not None:
            y = out.copy_(y)
        return y if self.bias is None else y.add_(self.bias)

    def in_batch(self, x: Tensor) -> Tensor:
        """The parts of W, or the G, each times x as a column."""
        y = torch.bmm(self.batch, x.to(self.dtype).expand(self.n, 1, -1).mT).to(x.dtype)
        return y.view(self.shape) if self.even else y.view(1, -1)[:, : self.shape[1]]

    def sum_of_columns(self, x: Tensor) -> Tensor:
        """The columns of W, each times its number of x, added up."""
        index, starts, factors = self.index, self.starts, x.view(-1)
        if self.sparse:
            index = factors.nonzero().view(-1)
            starts = self.shares(len(index))
            factors = factors[index]
        factors = factors.to(self.dtype)
        y = torch.embedding_bag(self.columns, index, starts, mode=0, per_sample_weights=factors)[0]
        if self.threads > 1:
            y = y.to(x.dtype).unflatten(0, (-1, self.threads)).sum(1)
        return y.to(x.dtype).view(self.shape)

    def shares(self, n: int) -> Tensor:
        """Where each thread's share of n begins."""
        return torch.tensor([n * i // self.threads for i in range(self.threads)])

    def by_scales(self, x: Tensor) -> Tensor:
        """x W^T with W in int8."""
        x16 = F.pad(x.to(torch.bfloat16), (0, -x.shape[-1] % WIDTH)).contiguous()
        if len(self.shape) == 2:
            return torch._weight_int8pack_mm(x16, *self.scaled[0]).to(x.dtype)
        return torch.stack([torch._weight_int8pack_mm(g, *w) for g, w in zip(x16, self.scaled)]).to(x.dtype)


def in_parts(W: Tensor, threads: int) -> Tensor:
    """W (A, C) as a batch (n, A / n, C), n > 1; an odd A gets a row of zeros behind."""
    A, C = W.shape
    W = F.pad(W, (0, 0, 0, 1)) if A % 2 else W
    n = max(n for n in range(1, max(2, threads) + 1) if len(W) % n == 0)
    return W.view(n, -1, C)


def in_8_bits(W: Tensor) -> tuple[Tensor, Tensor]:
    """W (A, C) as int8, zeros behind, and a scale in bfloat16 for each of its rows."""
    A, C = W.shape
    scale = (torch.linalg.vector_norm(W, torch.inf, 1) / 127).clamp(min=1e-30).to(torch.bfloat16)
    whole = torch.zeros(A, C + -C % WIDTH, dtype=torch.int8)
    for rows in torch.arange(A).split(256):                                 # no copy of all of W
        whole[rows, :C] = (W[rows] / scale[rows, None]).round_().clamp_(-127, 127).to(torch.int8)
    return whole, scale
