"""kernels/matvec.py: a product is x W plus what is added, however it is read."""

import pytest
import torch

from kernels.matvec import Matvec

SHAPES = (((600, 300), False), ((3, 300, 200), False), ((600, 300), True))
DTYPES = ((None, 1e-6), (torch.bfloat16, 1e-2), (torch.float16, 2e-3))


@pytest.mark.parametrize("shape, sparse", SHAPES, ids=str)
@pytest.mark.parametrize("dtype, limit", DTYPES)
def test_a_product_is_x_times_w_plus_what_is_added(shape, sparse, dtype, limit):
    """By rows and by BLAS.

    Where rows of zeros are skipped, also with only zeros, and with a single number.
    """
    torch.manual_seed(0)
    W, bias = torch.randn(shape), torch.randn(*shape[:-2], 1, shape[-1])
    product = Matvec(W, bias, dtype, sparse=sparse)
    for B, nonzero in ((1, 600), (4, 600), (1, 100), (1, 1), (1, 0)):
        x, add = torch.randn(*shape[:-2], B, shape[-2]), torch.randn(*shape[:-2], B, shape[-1])
        x[..., nonzero:] = 0
        out, exact = torch.empty_like(add), x.double() @ W.double() + bias
        for result, expected in ((product(x), exact), (product(x, add, out=out), exact + add)):
            assert (result - expected).norm() <= limit * expected.norm()
        assert torch.equal(out, product(x, add))
