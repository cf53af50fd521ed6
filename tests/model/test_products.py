"""Products written out by hand: the values and gradients of the plain operations."""

from __future__ import annotations

import pytest
import torch

from twhin_pipeline.model.products import products
from twhin_pipeline.model.rows import pick


def plainly(a, b, of_a, of_b, scale, inside, pools):
    """The same by indexing, concatenation and matrix products, which autograd knows."""
    found = [scale * (pick(a, of_a)[0] * pick(b, of_b)[0]).sum(-1)]
    for x, y, index, pool in zip((a, b), (b, a), inside, pools, strict=False):
        candidates = torch.cat([*pick(y, index), pool], dim=1)
        found.append(scale * x @ candidates.transpose(1, 2))
    return found


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize(("window", "pool"), [(4, 6), (0, 6), (4, 0)])
@pytest.mark.parametrize("sides", [0, 1, 2])
def test_products_and_their_gradients_are_those_of_plain_operations(sides, window, pool, threads):
    draw = torch.Generator().manual_seed(0)
    a, b = (torch.randn(3, rows, 8, generator=draw, requires_grad=True) for rows in (5, 7))
    of_a, of_b = (torch.randint(rows, (3, 1100), generator=draw) for rows in (5, 7))
    inside = tuple(torch.randint(rows, (3, window), generator=draw) for rows in (7, 5)[:sides])
    pools = tuple(torch.randn(3, pool, 8, generator=draw, requires_grad=True) for _ in range(sides))
    found = products(a, b, of_a, of_b, 0.7, inside, pools)
    exact = [x.detach().double().requires_grad_() for x in (a, b, *pools)]
    expected = plainly(*exact[:2], of_a, of_b, 0.7, inside, exact[2:])
    given = [torch.randn(x.shape, generator=draw) for x in found]
    got = torch.autograd.grad(found, (a, b, *pools), given)
    want = torch.autograd.grad(expected, exact, [x.double() for x in given])
    for x, y in zip([*found, *got], [*expected, *want], strict=True):
        torch.testing.assert_close(x.double(), y.detach(), rtol=1e-5, atol=1e-4)


def test_without_chunks_there_are_no_products_and_no_gradients():
    a, b, pool = (torch.zeros(0, rows, 8, requires_grad=True) for rows in (5, 7, 2))
    none = torch.zeros(0, 4, dtype=torch.int64)
    pairs, logits = products(a, b, none, none, 1.0, (none,), (pool,))
    assert (pairs.shape, logits.shape) == ((0, 4), (0, 5, 6))
    (pairs.sum() + logits.sum()).backward()
    assert a.grad.shape == a.shape
