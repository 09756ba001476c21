"""A row times a matrix, at the speed at which the matrix can be read.

Decoding one text is such products, of one token with every weight matrix. A BLAS is
made for many rows; for one, a CPU is faster in the kernel that adds up embeddings.
"""

import torch
from torch import Tensor


class Matvec:
    """x, add -> x W + add + bias, for x (B, C) and W (C, A).

    G of them at once: x (G, B, C) and W (G, C, A). Where W has another dtype, x is
    converted to it and the result back.

    For one text on a CPU W's rows are added up by embedding_bag (mode 0: the sum),
    which streams memory at 1.5 times the speed of the BLAS (measured 32 against 20
    GB/s; in 16 bits 27 against 10 for bfloat16, 1 for float16); from 2^18 numbers on in
    `parts`, one per thread (33 to 41 GB/s with two). Otherwise it is a matrix product.

    `sparse`, for a single product: rows that meet a zero of x are not read. After relu
    that is half of them, in trained models nine tenths.
    """

    def __init__(self, W: Tensor, bias: Tensor | None = None, dtype: torch.dtype | None = None,
                 sparse: bool = False):
        *G, C, A = W.shape
        assert not (G and sparse), "zeros are skipped in one product, not in G"
        self.W = W.detach().to(dtype or W.dtype).contiguous()
        self.bias, self.sparse = bias, sparse
        self.mm, self.addmm = (torch.bmm, torch.baddbmm) if G else (torch.mm, torch.addmm)

        # with fewer numbers the call costs more than the reading
        enough = 2**17 if self.W.dtype == torch.float32 else 0
        on_cpu = W.device.type == "cpu" and self.W.dtype.itemsize <= 4
        self.by_rows = on_cpu and W.numel() >= enough
        self.parts = 1
        if self.by_rows and W.numel() >= 2**18:
            self.parts = max(1, min(torch.get_num_threads(), C))
        self.rows = self.W.view(-1, A)                                      # (G C, A)
        self.index = torch.arange(len(self.rows))
        first_rows = range(0, len(self.rows), C)                            # of each of the G products
        starts = [row + C * part // self.parts for row in first_rows for part in range(self.parts)]
        self.starts = torch.tensor(starts)
        self.shape = (*G, 1, A)                                             # of the result for one text

    def __call__(self, x: Tensor, add: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        if self.by_rows and x.shape[-2] == 1:
            y = self.sum_of_rows(x)
        elif self.W.dtype != x.dtype:
            y = self.mm(x.to(self.W.dtype), self.W).to(x.dtype)
        else:
            y = self.mm(x, self.W, out=out) if add is None else self.addmm(add, x, self.W, out=out)
            add = out = None                                                # both are seen to
        if add is not None:
            y = torch.add(y, add, out=out)
        elif out is not None:
            y = out.copy_(y)
        return y if self.bias is None else y.add_(self.bias)

    def sum_of_rows(self, x: Tensor) -> Tensor:
        """x W as the sum of W's rows, each times its number of x; for one text."""
        index, starts, factors = self.index, self.starts, x.view(-1)
        if self.sparse:
            index = factors.nonzero().view(-1)
            starts = torch.tensor([len(index) * part // self.parts for part in range(self.parts)])
            factors = factors[index]
        factors = factors.to(self.W.dtype)
        y = torch.embedding_bag(self.rows, index, starts, mode=0, per_sample_weights=factors)[0].to(x.dtype)
        if self.parts > 1:
            y = y.unflatten(0, (-1, self.parts)).sum(1)
        return y.view(self.shape)
