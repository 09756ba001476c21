"""kernels/matvec.py: a product is x W^T plus what is added, however it is read."""

import pytest
import torch

from common import one_line
from kernels.matvec import LARGE, Matvec
from lib.processes import using_threads

# large enough for each of the ways or not, with odd numbers in every place
SHAPES = (((600, 300), False), ((3, 200, 300), False), ((300, 600), True), ((601, 301), False),
          ((301, 601), True), ((3, 203, 301), False), ((7, 5), False), ((5, 3), True), ((2, 3, 5), False))
DTYPES = ((torch.float32, None, 1e-6), (torch.float64, None, 1e-14), (torch.float32, torch.float64, 1e-6),
          (torch.float64, torch.float32, 1e-6), (torch.float32, torch.bfloat16, 1e-2),
          (torch.float32, torch.float16, 2e-3), (torch.float32, torch.int8, 2e-2))


@pytest.fixture(params=(1, 2, 3))
def threads(request):
    with using_threads(request.param):
        yield request.param


@pytest.mark.parametrize("shape, sparse", SHAPES, ids=str)
@pytest.mark.parametrize("wide, dtype, limit", DTYPES)
def test_a_product_is_w_times_x_plus_what_is_added(shape, sparse, wide, dtype, limit, threads):
    """For one text and for several, which read W in other ways.

    Where columns that meet zeros are skipped, also with only zeros, and with a single
    number.
    """
    torch.manual_seed(0)
    *G, A, C = shape
    W, bias = torch.randn(shape, dtype=wide), torch.randn(*G, 1, A, dtype=wide)
    product = Matvec(W, bias, dtype, sparse=sparse)
    assert product.threads == (threads if W.numel() >= LARGE else 1)
    for B, nonzero in ((1, C), (4, C), (1, C // 6), (1, 1), (1, 0)):
        x, add = torch.randn(*G, B, C, dtype=wide), torch.randn(*G, B, A, dtype=wide)
        x[..., nonzero:] = 0
        out, exact = torch.empty_like(add), x.double() @ W.double().mT + bias
        first = product(x)
        kept = first.clone()
        for result, expected in ((first, exact), (product(x, add, out=out), exact + add)):
            assert result.shape == add.shape and (result - expected).norm() <= limit * expected.norm()
        assert torch.equal(out, product(x, add)) and torch.equal(first, kept)


def test_eight_bits_are_as_near_as_their_scales_allow_row_by_row():
    """A row of large numbers harms no other, and a row of zeros stays zero."""
    torch.manual_seed(0)
    W = torch.randn(400, 512) * torch.logspace(-6, 6, 400)[:, None]
    W[7] = 0
    y, exact = Matvec(W, dtype=torch.int8)(torch.eye(512)), W.T
    assert ((y - exact).abs() <= exact.abs().amax(0) * (0.5 / 127 + 2**-7)).all()
    assert not y[:, 7].any()


def test_eight_bits_are_refused_on_a_gpu():
    with pytest.raises(ValueError, match="int8 is for CPUs") as error:
        Matvec(torch.empty(4, 4, device="meta"), dtype=torch.int8)
    one_line(error.value)
