"""A row times a matrix, at the speed at which memory can be read.

Decoding one text is such products: one token's row with every weight matrix. For one
row PyTorch calls a BLAS routine (gemv) that reads at half of a core's speed or less.
For a batch of products it calls another, sgemm_batch, that reads at full speed. So a
matrix is cut into a batch of its upper and its lower half, or of more parts where there
are more threads. In 16 bits, and where many numbers of the row are zero, embedding_bag
is better: it adds up rows of a table, here W's columns, each times a factor.
docs/log.md has the figures, and what else was tried.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

LARGE = 2**17        # numbers in W; with fewer, views, threads and finding zeros cost more than they save
WIDTH = 16           # PyTorch's int8 product reads 16 numbers at a time, even past the end of a row


class Matvec:
    """x, add -> x W^T + add + bias, for x (B, C) and W (A, C), as nn.Linear has it.

    For G products at once: x (G, B, C) and W (G, A, C). W is kept in `dtype`; x is
    converted to it, and the result back to x's. In int8 each of W's rows has a scale,
    and x and the result are rounded to bfloat16.

    `sparse`, for a single product on a CPU: W's columns that meet a zero of the row are
    not read, if W is large and not in int8. After relu that is half of W, in trained
    models nine tenths.

    It may hold a view of W: after a change of W make another. Raises ValueError for
    int8 on a GPU.
    """

    def __init__(self, W: Tensor, bias: Tensor | None = None, dtype: torch.dtype | None = None,
                 sparse: bool = False):
        *G, A, C = W.shape
        assert not (G and sparse), "zeros are skipped in one product, not in G"
        self.dtype, self.bias, self.shape = dtype or W.dtype, bias, (*G, 1, A)
        on_cpu, large = W.device.type == "cpu", W.numel() >= LARGE
        self.threads = torch.get_num_threads() if on_cpu and large else 1   # among which W is divided
        self.sparse = sparse and on_cpu and large and self.dtype.itemsize in (2, 4)
        self.mm, self.addmm = (torch.bmm, torch.baddbmm) if G else (torch.mm, torch.addmm)

        self.one_row = None                  # the function for a single row; None: as for several
        if self.dtype == torch.int8:
            if not on_cpu:
                raise ValueError("dtype = int8 is for CPUs: take bfloat16")
            self.scaled = [in_8_bits(w) for w in W.detach().view(-1, A, C)]
            return
        W = W.detach().to(self.dtype)
        if self.sparse or on_cpu and self.dtype.itemsize == 2:
            self.one_row, self.transposed = self.sum_of_columns, W.mT.contiguous()  # (G, C, A)
            self.columns = self.transposed.view(-1, A)
            self.index = torch.arange(len(self.columns))
            # where each thread's share of each matrix begins
            self.starts = torch.cat([first + self.shares(C) for first in range(0, len(self.columns), C)])
        elif on_cpu and large:
            self.one_row, self.transposed = self.in_batch, W.mT
            self.batch = W if G else in_parts(W, self.threads)
            self.parts, self.padded = len(self.batch), self.batch.numel() > W.numel()
        else:
            self.transposed = W.mT.contiguous()

    def __call__(self, x: Tensor, add: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        if self.dtype == torch.int8:
            y = self.by_scales(x)
        elif self.one_row and x.shape[-2] == 1:
            y = self.one_row(x)
        elif self.dtype != x.dtype:
            y = self.mm(x.to(self.dtype), self.transposed).to(x.dtype)
        else:
            W = self.transposed
            y = self.mm(x, W, out=out) if add is None else self.addmm(add, x, W, out=out)
            add = out = None                                                # both are used
        if add is not None:
            y = torch.add(y, add, out=out)
        elif out is not None:
            y = out.copy_(y)
        return y if self.bias is None else y.add_(self.bias)

    def in_batch(self, x: Tensor) -> Tensor:
        """The parts of W, or the G, each times x as a column."""
        y = torch.bmm(self.batch, x.to(self.dtype).expand(self.parts, 1, -1).mT).to(x.dtype)
        return y.view(1, -1)[:, : self.shape[1]] if self.padded else y.view(self.shape)

    def sum_of_columns(self, x: Tensor) -> Tensor:
        """The columns of W, each times its number of x, added up."""
        index, starts, factors = self.index, self.starts, x.view(-1)
        if self.sparse:
            index = factors.nonzero().view(-1)
            starts = self.shares(len(index))
            factors = factors[index]
        factors = factors.to(self.dtype)
        y = torch.embedding_bag(self.columns, index, starts, mode=0, per_sample_weights=factors)[0]  # a sum
        y = y.to(x.dtype)
        if self.threads > 1:
            y = y.unflatten(0, (-1, self.threads)).sum(1)
        return y.view(self.shape)

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
    """W (A, C) as a batch (n, A / n, C), n > 1; an odd A gets a last row of zeros."""
    A, C = W.shape
    W = F.pad(W, (0, 0, 0, 1)) if A % 2 else W
    n = max(n for n in range(1, max(2, threads) + 1) if len(W) % n == 0)
    return W.view(n, -1, C)


def in_8_bits(W: Tensor) -> tuple[Tensor, Tensor]:
    """W (A, C) as int8, with zeros up to a multiple of WIDTH, and each row's scale."""
    A, C = W.shape
    scale = (torch.linalg.vector_norm(W, torch.inf, 1) / 127).clamp(min=1e-30).to(torch.bfloat16)
    W8 = torch.zeros(A, C + -C % WIDTH, dtype=torch.int8)
    for rows in torch.arange(A).split(256):                                 # no second copy of W in floats
        W8[rows, :C] = (W[rows] / scale[rows, None]).round_().clamp_(-127, 127).to(torch.int8)
    return W8, scale
