"""Rows picked out of matrices, and dropout: values and gradients."""

import pytest
import torch

from twhin_pipeline import rows
from twhin_pipeline.rows import dropout, pick, take


@pytest.mark.parametrize("in_order", [True, False], ids=["as on the CPU", "as on CUDA"])
def test_taken_rows_and_their_gradients_are_those_of_plain_indexing(monkeypatch, in_order):
    monkeypatch.setattr(rows, "_adds_in_order", lambda total: in_order)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(9, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    indices = [torch.tensor([[0, 3, 3], [8, 0, 1]]), torch.tensor([5, 5, 0]), torch.zeros(0, dtype=torch.int64)]
    found = take(x, *indices)
    assert [tuple(f.shape) for f in found] == [(2, 3, 4), (3, 4), (0, 4)]
    assert all(torch.equal(f, x[i]) for f, i in zip(found, indices, strict=True))
    assert torch.autograd.gradcheck(lambda x: take(x, *indices[:2]), (x,))


def test_picked_rows_are_of_their_own_chunk():
    x = torch.randn(3, 5, 2, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([[4, 0], [1, 1], [2, 3]])
    (found,) = pick(x, index)
    assert torch.equal(found, torch.stack([x[g][index[g]] for g in range(3)]))
    assert torch.autograd.gradcheck(lambda x: pick(x, index), (x,))


def test_an_index_whose_rows_are_not_used_costs_no_gradient():
    x = torch.randn(4, 3, requires_grad=True)
    used, _ = take(x, torch.tensor([1, 1]), torch.tensor([2]))
    used.sum().backward()
    assert x.grad is not None and x.grad.sum(1).tolist() == [0, 6, 0, 0]


@pytest.mark.parametrize("p", [0.0, 0.1, 0.75])
def test_dropout_leaves_a_share_and_keeps_the_mean(p):
    torch.manual_seed(0)
    x = torch.ones(999, 101, requires_grad=True)
    found = dropout(x, p)
    share = (found != 0).double().mean().item()
    assert share == pytest.approx(1 - p, abs=4 * (p * (1 - p) / x.numel()) ** 0.5 + 1e-9)
    kept = found.detach()[found.detach() != 0]
    assert torch.allclose(kept, torch.full_like(kept, 1 / (1 - p)), rtol=1e-4)
    found.sum().backward()
    assert torch.equal(x.grad, found.detach())


def test_dropout_follows_the_seed():
    x = torch.ones(50, 7)
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(dropout(x, 0.5))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_neighbouring_elements_are_dropped_independently():
    torch.manual_seed(0)
    kept = (dropout(torch.ones(200_000), 0.5) != 0).double()
    for distance in (1, 2, 3, 4):
        together = (kept[:-distance] * kept[distance:]).mean().item()
        assert together == pytest.approx(0.25, abs=0.006)
