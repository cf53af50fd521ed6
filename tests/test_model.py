"""The model and its loss, against plain loops over edges."""

import dataclasses

import numpy as np
import pytest
import tiny
import torch
from plain_batches import assemble

from twhin_pipeline.batch import EdgeBatch
from twhin_pipeline.losses import LOSSES
from twhin_pipeline.model import ModelAndLoss, TwhinModel, TwhinModelAndLoss
from twhin_pipeline.optimizer import apply_optimizers, build_optimizer
from twhin_pipeline.sections.training import LossConfig
from twhin_pipeline.sharding import init_tables, table_weights


@pytest.fixture
def config():
    return tiny.config(init_scale=1.0, temperature=0.5)


@pytest.fixture
def model(config):
    made = TwhinModel(config.model, tiny.ROWS)
    init_tables(made, seed=1)
    torch.manual_seed(0)
    for parameter in made.scorer.parameters():
        torch.nn.init.normal_(parameter)
    return made


def score(model, config, relation: int, lhs: int, rhs: int) -> float:
    tables = table_weights(model)
    chosen = config.model.relations[relation]
    vectors = tables[chosen.lhs][lhs], tables[chosen.rhs][rhs]
    return model.scorer.score(vectors[0], relation, vectors[1]).item()


def trainable(model, config, loss: str, **options) -> TwhinModelAndLoss:
    return TwhinModelAndLoss(model, LOSSES[loss](LossConfig(name=loss)), config.model, **options)


def test_the_batched_lookup_equals_a_lookup_of_each_row(config, model):
    batch = tiny.batch(0, config.model)
    expected = [table_weights(model)[table][row] for table, rows in batch.ids.items() for row in rows]
    assert torch.equal(model.lookup(batch.ids), torch.stack(expected))


def test_indices_of_a_batch_lead_back_to_the_chunks_rows(config):
    chunks = tiny.chunks(0, config.model)
    batch = assemble(chunks, config.model, 13)
    flat = torch.cat([batch.ids[table] for table in config.model.table_names])
    for g, chunk in enumerate(chunks):
        c = len(chunk.lhs)
        assert flat[batch.lhs_index[g, :c]].tolist() == chunk.lhs.tolist()
        assert flat[batch.rhs_index[g, :c]].tolist() == chunk.rhs.tolist()
        assert flat[batch.lhs_pool_index[g]].tolist() == chunk.lhs_pool.tolist()
        assert flat[batch.rhs_pool_index[g]].tolist() == chunk.rhs_pool.tolist()
        assert batch.weight[g, c:].tolist() == [0.0] * (batch.weight.shape[1] - c)
    assert all(len(rows) == len(set(rows.tolist())) for rows in batch.ids.values())


def test_logits_equal_a_plain_loop_over_edges_and_candidates(config, model):
    chunks = tiny.chunks(0, config.model)
    outputs = model(assemble(chunks, config.model, 13))
    width = max(len(chunk.in_batch) for chunk in chunks)
    for g, chunk in enumerate(chunks):
        window = len(chunk.in_batch)
        masked = {side: {tuple(pair) for pair in getattr(chunk, f"{side}_mask").tolist()} for side in ("lhs", "rhs")}
        for i in range(len(chunk.lhs)):
            edge = {"lhs": chunk.lhs[i], "rhs": chunk.rhs[i]}
            expected = score(model, config, chunk.relation, **edge)
            assert outputs["logits"][g, i].item() == pytest.approx(expected, rel=1e-4, abs=1e-5)
            assert outputs["probabilities"][g, i].item() == pytest.approx(1 / (1 + np.exp(-expected)), rel=1e-4)
            for side in ("lhs", "rhs"):
                got = outputs[f"{side}_logits"][g, i]
                assert got[window:width].tolist() == [-np.inf] * (width - window)
                candidates = [*getattr(chunk, side)[chunk.in_batch], *getattr(chunk, f"{side}_pool")]
                for j, candidate in enumerate(candidates):
                    at = j if j < window else j + width - window
                    if (i, j) in masked[side]:
                        assert got[at].item() == -np.inf
                    else:
                        expected = score(model, config, chunk.relation, **{**edge, side: candidate})
                        assert got[at].item() == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("sides", ["both", "lhs", "rhs"])
@pytest.mark.parametrize("name", list(LOSSES))
def test_the_loss_is_the_weighted_mean_over_edges(config, model, name, sides):
    chunks = tiny.chunks(0, config.model)
    batch = assemble(chunks, config.model, 20)
    loss, outputs = trainable(model, config, name, sides=sides)(batch)
    used = ["lhs", "rhs"] if sides == "both" else [sides]
    assert {key for key in outputs if key.endswith("s_logits")} == {f"{side}_logits" for side in used}
    total = 0.0
    for g, chunk in enumerate(chunks):
        relation = config.model.relations[chunk.relation]
        for i, weight in enumerate(chunk.weight):
            edge = [
                LOSSES[name](LossConfig(name=name))(
                    outputs["logits"][g, i : i + 1], outputs[f"{s}_logits"][g, i : i + 1]
                )
                for s in used
            ]
            total += float(weight) * relation.weight * sum(value.item() for value in edge) / len(edge)
    assert loss.item() == pytest.approx(total / 20, rel=1e-5)


def test_relation_losses_and_weights_add_up_to_the_loss(config, model):
    batch = tiny.batch(0, config.model)
    loss, outputs = trainable(model, config, "softmax")(batch)
    factors = torch.tensor([relation.weight for relation in config.model.relations])
    assert loss.item() == pytest.approx(
        (outputs["relation_loss"] * factors).sum().item() / batch.global_edges, rel=1e-5
    )
    assert outputs["relation_edges"].sum().item() == pytest.approx(batch.weight.sum().item(), rel=1e-5)


def test_an_edge_of_weight_two_counts_like_two_edges(config, model):
    (chunk, *_) = tiny.chunks(0, config.model)
    one = dataclasses.replace(chunk, weight=np.ones(6, np.float32))
    two = dataclasses.replace(chunk, weight=2 * np.ones(6, np.float32))
    losses = [
        trainable(model, config, "bce")(assemble(chunks, config.model, 6))[0].item() for chunks in ([two], [one, one])
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("name", list(LOSSES))
@pytest.mark.parametrize("sides", ["both", "lhs", "rhs"])
def test_every_parameter_gets_gradient(config, model, name, sides):
    loss, _ = trainable(model, config, name, sides=sides)(tiny.batch(0, config.model))
    loss.backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad.norm() > 0, parameter_name
    assert (model.scorer.operators["translation"].weight.grad.norm(dim=1) > 0).all(), "a relation vector is frozen"


@pytest.mark.parametrize("name", list(LOSSES))
@pytest.mark.parametrize("comparator", ["dot", "cosine"])
def test_one_step_changes_looked_up_rows_and_relation_vectors_and_nothing_else(name, comparator):
    config = tiny.config(comparator=comparator)
    model = apply_optimizers(TwhinModel(config.model, tiny.ROWS), config.model)
    init_tables(model, seed=0)
    optimizer, schedule = build_optimizer(model, config.model)
    batch = tiny.batch(0, config.model)
    before = {table: weight.clone() for table, weight in table_weights(model).items()}
    wrapped = trainable(model, config, name)
    loss, _ = wrapped(batch)
    loss.backward()
    optimizer.step()
    schedule.step()
    for table, weight in table_weights(model).items():
        changed = (weight != before[table]).any(dim=1).nonzero().squeeze(1)
        assert changed.tolist() == batch.ids[table].tolist(), table
    rows = model.scorer.state_rows()
    assert rows["likes"].norm() > 0
    assert rows["hides"].norm() > 0
    assert rows["resembles"].norm() == 0
    assert wrapped(batch)[0] < loss


def test_a_batch_without_edges_gives_loss_0_and_gradients_of_0(config, model):
    batch = EdgeBatch.empty(config.model, global_edges=7)
    loss, _ = trainable(model, config, "softmax")(batch)
    loss.backward()
    assert loss.item() == 0
    assert [parameter.grad.abs().sum().item() for parameter in model.parameters()] == [0.0, 0.0, 0.0]


def test_mixed_precision_scores_in_bfloat16_and_keeps_the_loss_in_float32(config, model):
    batch = tiny.batch(0, config.model)
    exact, _ = trainable(model, config, "softmax")(batch)
    mixed, outputs = trainable(model, config, "softmax", amp=True)(batch)
    assert mixed.dtype == outputs["rhs_logits"].dtype == torch.float32
    assert mixed.item() != exact.item()
    assert mixed.item() == pytest.approx(exact.item(), rel=0.02)


def test_model_and_loss_joins_any_model_and_loss():
    layer = torch.nn.Linear(2, 1)

    class Outer(torch.nn.Module):
        def forward(self, batch):
            return {"logits": layer(batch)}

    joined = ModelAndLoss(Outer(), lambda outputs, batch: outputs["logits"].mean() - batch.mean())
    x = torch.ones(3, 2)
    loss, outputs = joined(x)
    assert loss.item() == pytest.approx(layer(x).mean().item() - 1)
    assert outputs["loss"] == loss
    assert not outputs["loss"].requires_grad
