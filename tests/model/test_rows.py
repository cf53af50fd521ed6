"""Rows picked out of matrices, and dropout: values and gradients."""

import pytest
import torch

from twhin_pipeline.model import rows
from twhin_pipeline.model.rows import Rows, added_up, dropout, pick, take


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


def two_tables(generator):
    """Rows of a table that is used where it is, and rows that are already looked up."""
    table = torch.randn(50, 6, generator=generator, requires_grad=True)
    looked_up = torch.randn(4, 6, generator=generator, requires_grad=True)
    ids = torch.tensor([0, 3, 17, 49])
    return table, ids, looked_up


@pytest.mark.parametrize("threads", [1, 2])
def test_rows_of_several_tables_and_their_gradients_are_those_of_plain_indexing(monkeypatch, threads):
    monkeypatch.setattr(rows, "ROWS_A_THREAD", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        generator = torch.Generator().manual_seed(0)
        table, ids, looked_up = two_tables(generator)
        index = [torch.randint(8, (5, 7), generator=generator), torch.tensor([7, 7, 0]), torch.tensor([], dtype=int)]
        found = take([Rows(table, ids), Rows(looked_up)], *index)
        whole = torch.cat([table[ids], looked_up]).detach().requires_grad_()
        expected = [whole[i] for i in index]
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        scale = [torch.randn(i.shape, generator=generator) for i in expected]
        for outputs in (found, expected):
            sum((a * b).sum() for a, b in zip(outputs, scale, strict=True)).backward()
        assert table.grad.is_sparse and torch.equal(table.grad._indices()[0], ids)
        torch.testing.assert_close(table.grad._values(), whole.grad[:4])
        torch.testing.assert_close(looked_up.grad, whole.grad[4:])
    finally:
        torch.set_num_threads(before)


def test_rows_that_are_not_there_are_refused_and_unused_ones_have_a_gradient_of_0():
    table, ids, looked_up = two_tables(torch.Generator().manual_seed(0))
    for wrong in ([0, 50], [-1, 3]):
        with pytest.raises(IndexError, match="of a table that has 50"):
            take([Rows(table, torch.tensor(wrong))], torch.tensor([0]))
    for wrong in (8, -1):
        with pytest.raises(IndexError):
            take([Rows(table, ids), Rows(looked_up)], torch.tensor([wrong]))
    used, _ = take([Rows(table, ids), Rows(looked_up)], torch.tensor([1, 1]), torch.tensor([5]))
    used.sum().backward()
    assert table.grad.to_dense().sum(1)[ids].tolist() == [0, 12, 0, 0]
    assert looked_up.grad.count_nonzero() == 0


def test_a_tables_rows_are_the_same_used_where_they_are_or_looked_up():
    table, ids, _ = two_tables(torch.Generator().manual_seed(0))
    index = torch.tensor([3, 0, 3])
    found = []
    for part in (Rows(table, ids), Rows(Rows(table, ids).looked_up())):
        table.grad = None
        (vectors,) = take([part], index)
        vectors.square().sum().backward()
        found.append((vectors.detach(), table.grad.to_dense()))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_rows_are_added_up_in_their_order_as_a_plain_loop_does():
    generator = torch.Generator().manual_seed(1)
    place = torch.randint(40, (300,), generator=generator)
    parts = [torch.randn(size, 5, generator=generator) for size in (100, 0, 200)]
    expected = torch.zeros(41, 5)
    for i, row in zip(place, torch.cat(parts), strict=True):
        expected[i] += row
    assert torch.equal(added_up(place, parts, 41), expected)


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
