"""kernels/matvec.py: a product of one row, by rows and by the BLAS, in 32 and 16 bits.
"""

import pytest
import torch

from kernels.matvec import Matvec


@pytest.mark.parametrize(
    "shape, sparse", (((600, 300), False), ((3, 300, 200), False), ((600, 300), True)), ids=str
)
@pytest.mark.parametrize("dtype, most", ((None, 1e-6), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)))
def test_a_product_is_x_times_w_plus_what_is_added(shape, sparse, dtype, most):
    """By rows and by BLAS; where the rows of zeros are skipped, also with nothing but
    zeros and with a single number.
    """
    torch.manual_seed(0)
    W, bias = torch.randn(shape), torch.randn(*shape[:-2], 1, shape[-1])
    product = Matvec(W, bias, dtype, sparse=sparse)
    for B, kept in ((1, 600), (4, 600), (1, 100), (1, 1), (1, 0)):
        x, add = torch.randn(*shape[:-2], B, shape[-2]), torch.randn(*shape[:-2], B, shape[-1])
        x[..., kept:] = 0
        out, want = torch.empty_like(add), x.double() @ W.double() + bias
        for got, true in ((product(x), want), (product(x, add, out=out), want + add)):
            assert (got - true).norm() <= most * true.norm()
        assert torch.equal(out, product(x, add))
