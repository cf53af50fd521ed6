"""Losses taken chunk by chunk: the values and gradients of scores that are all kept."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import tiny
import torch
from plain_batches import assemble
from threadpoolctl import ThreadpoolController

from twhin_pipeline.config.training import LossConfig
from twhin_pipeline.model import chunk_losses
from twhin_pipeline.model.all_candidates import mask_logits
from twhin_pipeline.model.chunk_losses import Candidates
from twhin_pipeline.model.losses import LOSSES
from twhin_pipeline.model.rows import pick
from twhin_pipeline.model.twhin_model import TwhinModelAndLoss

CHUNKS, EDGES, ROWS, DIM = 5, 40, (6, 9), 8
LOSS = {
    "softmax": LossConfig(name="softmax"),
    "bsl": LossConfig(name="bsl", positive_temperature=1.3, negative_temperature=0.6),
}


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def draw(window: int, pool: int, sides: int, *, log_q: bool = False, seed: int = 0):
    """Vectors, the edges' rows (the last rows being padding, in all chunks but the first), and candidates."""
    random = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(CHUNKS, rows, DIM, generator=random) for rows in ROWS)
    of_a, of_b = (torch.randint(rows - 2, (CHUNKS, EDGES), generator=random) for rows in ROWS)
    of_a[0, 3], of_b[0, 5] = ROWS[0] - 1, ROWS[1] - 1
    real = torch.randint(window + 1, (CHUNKS,), generator=random)
    candidates = []
    for rows, others in ((ROWS[0], ROWS[1]), (ROWS[1], ROWS[0]))[:sides]:
        every = itertools.product(range(CHUNKS), range(rows), range(window + pool))
        mask = [[g, q, j] for g, q, j in every if (g + q + j) % 3 == 0]
        mask += [[2, 1, j] for j in range(window + pool)]  # a query without a candidate
        candidates.append(
            Candidates(
                inside=torch.randint(others, (CHUNKS, window), generator=random),
                pool=torch.randn(CHUNKS, pool, DIM, generator=random),
                mask=torch.tensor(sorted(mask), dtype=torch.int64).view(-1, 3),
                log_q=torch.randn(CHUNKS, window + pool, generator=random) if log_q else None,
                weight=torch.rand(CHUNKS, EDGES, generator=random),
            )
        )
    return a, b, of_a, of_b, real, candidates


def plainly(a, b, of_a, of_b, scale, loss, real, *sides):
    """The same from all scores, by operations that autograd knows."""
    positive = scale * (pick(a, of_a)[0] * pick(b, of_b)[0]).sum(-1)
    each = []
    for x, y, query, side in zip((a, b), (b, a), (of_a, of_b), sides, strict=False):
        logits = scale * x @ torch.cat([*pick(y, side.inside), side.pool], dim=1).transpose(1, 2)
        width = side.inside.shape[1]
        padding = torch.arange(logits.shape[2]).expand(CHUNKS, -1)
        padding = (padding >= real[:, None]) & (padding < width)
        logits = logits.masked_fill(padding.unsqueeze(1), float("-inf"))
        mask_logits(logits, side.mask.unbind(1))
        if side.log_q is not None:
            logits = logits - loss.candidate_temperature * side.log_q.unsqueeze(1)
        each.append(loss.edge(positive, loss.pool(logits).gather(1, query)))
    total = sum((x * side.weight).sum() for x, side in zip(each, sides, strict=True))
    return total, positive, *each


def with_gradients(function, a, b, of_a, of_b, loss, real, sides, kind=torch.float32):
    a, b, *pools = (x.detach().to(kind).requires_grad_() for x in (a, b, *(side.pool for side in sides)))
    sides = [dataclasses.replace(side, pool=pool) for side, pool in zip(sides, pools, strict=True)]
    found = function(a, b, of_a, of_b, 0.7, loss, real, *sides)
    return [*found, *torch.autograd.grad(3 * found[0], (a, b, *pools))]


@pytest.mark.parametrize("log_q", [False, True])
@pytest.mark.parametrize(("window", "pool"), [(4, 7), (0, 7), (4, 0)])
@pytest.mark.parametrize("sides", [1, 2])
@pytest.mark.parametrize("name", LOSS)
def test_losses_and_gradients_are_those_of_scores_that_are_kept(name, sides, window, pool, log_q):
    loss = LOSSES[name](LOSS[name])
    *given, real, candidates = draw(window, pool, sides, log_q=log_q)
    found = with_gradients(chunk_losses.losses, *given, loss.by_sum, real, candidates)
    expected = with_gradients(plainly, *given, loss, real, candidates, torch.float64)
    assert len(found) == len(expected) == 2 + sides + 2 + sides
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x.double(), y.double(), rtol=1e-4, atol=1e-5)


def test_threads_change_no_bit(threads):
    loss = LOSSES["softmax"](LOSS["softmax"])
    *given, real, candidates = draw(4, 7, 2)
    found = []
    for count in (1, 2):
        threads(count)
        found.append(with_gradients(chunk_losses.losses, *given, loss.by_sum, real, candidates))
    for x, y in zip(*found, strict=True):
        assert torch.equal(x, y)


def test_a_vector_that_is_not_a_number_makes_the_loss_one_that_is_not():
    loss = LOSSES["softmax"](LOSS["softmax"])
    a, *given, real, candidates = draw(4, 7, 2)
    a[1, 0, 0] = float("nan")
    total, *_ = chunk_losses.losses(a, *given, 1.0, loss.by_sum, real, *candidates)
    assert total.isnan()


def test_few_chunks_are_left_to_products_that_threads_share(threads):
    threads(4)
    wanted = {0: False, 2: False, 3: True, 4: True, 5: True, 8: True, 9: True}
    assert {chunks: chunk_losses.suits(chunks) for chunks in wanted} == wanted
    threads(16)
    assert not chunk_losses.suits(17)
    threads(1)
    assert [chunk_losses.suits(chunks) for chunks in (0, 1)] == [False, True]


def step(model, config, batch, loss, *, training=True):
    wrapped = TwhinModelAndLoss(model, LOSSES[loss](LOSS[loss].model_copy(update={"log_q": True})), config.model)
    wrapped.train(training)
    model.zero_grad()
    total, outputs = wrapped(batch)
    total.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    return outputs, {**found, **{k: outputs[k] for k in ("loss", "edge_loss", "relation_loss", "logits")}}


@pytest.mark.parametrize("loss", LOSS)
@pytest.mark.parametrize("comparator", ["dot", "cosine"])
@pytest.mark.parametrize("reciprocal", [False, True])
@pytest.mark.parametrize("sides", [None, "rhs", "lhs"])
def test_a_step_has_the_loss_and_gradients_of_one_whose_scores_are_kept(
    monkeypatch, sides, reciprocal, comparator, loss
):
    relations = [relation.model_dump() | {"sides": sides, "weight": 1.5} for relation in tiny.config().model.relations]
    config = tiny.config(init_scale=1.0, comparator=comparator, reciprocal=reciprocal, relations=relations)
    model = tiny.random_model(config)
    chunks = [c for seed in range(3) for c in tiny.chunks(seed, config.model)]
    for chunk in chunks:
        size = len(chunk.in_batch)
        chunk.lhs_log_q, chunk.rhs_log_q = (np.linspace(0, 1, size + len(p)) for p in (chunk.lhs_pool, chunk.rhs_pool))
    batch = assemble(chunks, config.model, 60)
    monkeypatch.setattr(chunk_losses, "suits", lambda chunks: False)
    kept, expected = step(model, config, batch, loss)
    monkeypatch.setattr(chunk_losses, "suits", lambda chunks: True)
    outputs, found = step(model, config, batch, loss)
    assert "fused_loss" not in kept
    # Second operators with tails alone leave heads without candidates: there is nothing to count.
    assert ("fused_loss" in outputs) == (not (reciprocal and sides == "lhs"))
    assert {f"{side}_logits" for side in batch.sides} <= kept.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_validation_keeps_its_scores(monkeypatch):
    monkeypatch.setattr(chunk_losses, "suits", lambda chunks: True)
    config = tiny.config()
    outputs, _ = step(tiny.random_model(config), config, tiny.batch(0, config.model), "softmax", training=False)
    assert "fused_loss" not in outputs and {"lhs_logits", "rhs_logits"} <= outputs.keys()


@pytest.mark.parametrize("fields", [{"comparator": "l2"}, {}])
@pytest.mark.parametrize("loss", ["margin", "softmax"])
def test_what_is_no_product_or_no_sum_of_exponentials_is_scored_as_before(monkeypatch, fields, loss):
    monkeypatch.setattr(chunk_losses, "suits", lambda chunks: True)
    config = tiny.config(**fields)
    wrapped = TwhinModelAndLoss(tiny.random_model(config), LOSSES[loss](LossConfig(name=loss)), config.model)
    _, outputs = wrapped(tiny.batch(0, config.model))
    assert ("fused_loss" in outputs) == (not fields and loss == "softmax")


def test_blas_has_no_threads_of_its_own_while_torchs_call_it(monkeypatch, threads):
    """Nor does it warn that it might hang, which it does where its threads meet OpenMP's."""
    threads(2)
    loss, seen = LOSSES["softmax"](LOSS["softmax"]), []
    *given, real, candidates = draw(4, 7, 2)
    blas = ThreadpoolController().select(user_api="blas")

    def looked_at(*arguments):
        seen.append([library["num_threads"] for library in blas.info()])
        return chunks(*arguments)

    chunks = chunk_losses._chunks
    monkeypatch.setattr(chunk_losses, "_chunks", looked_at)
    before = blas.info()
    chunk_losses.losses(*given, 1.0, loss.by_sum, real, *candidates)
    assert seen and set(seen[0]) == {1}
    assert blas.info() == before
