"""The model and its loss, against plain loops over edges."""

import dataclasses

import numpy as np
import pytest
import tiny
import torch
from plain_batches import assemble, of_sample

from twhin_pipeline.config.training import LossConfig
from twhin_pipeline.model import all_candidates, chunk_losses
from twhin_pipeline.model.batch import EdgeBatch
from twhin_pipeline.model.losses import LOSSES
from twhin_pipeline.model.operators import OPERATORS
from twhin_pipeline.model.rows import Rows
from twhin_pipeline.model.twhin_model import ModelAndLoss, TwhinModel, TwhinModelAndLoss
from twhin_pipeline.sharding.optimizer import apply_optimizers, build_optimizer
from twhin_pipeline.sharding.placement import init_tables, table_weights
from twhin_pipeline.sharding.unsharded_tables import UnshardedTables


@pytest.fixture
def config():
    return tiny.config(init_scale=1.0, temperature=0.5)


@pytest.fixture
def model(config):
    made = TwhinModel(config.model, UnshardedTables(config.model, tiny.ROWS))
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


def trainable(model, config, loss: str, *, amp: bool = False, **fields) -> TwhinModelAndLoss:
    return TwhinModelAndLoss(model, LOSSES[loss](LossConfig(name=loss, **fields)), config.model, amp=amp)


def of_sides(config, *sides: str | None):
    """The configuration with each relation's `sides`."""
    relations = [
        {**relation.model_dump(), "sides": replaced}
        for relation, replaced in zip(config.model.relations, sides, strict=True)
    ]
    return tiny.config(**{**config.model.model_dump(), "relations": relations})


def gradients(model, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_the_batched_lookup_equals_a_lookup_of_each_row(config, model):
    batch = tiny.batch(0, config.model)
    expected = [table_weights(model)[table][row] for table, rows in batch.ids.items() for row in rows]
    assert torch.equal(torch.cat(model.lookup(batch.ids)), torch.stack(expected))


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
    batch = assemble(chunks, config.model, 13)
    outputs = model(batch)
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
                got = outputs[f"{side}_logits"][g, getattr(batch, f"{side}_query")[g, i]]
                assert got[window:width].tolist() == [-np.inf] * (width - window)
                candidates = [*getattr(chunk, side)[chunk.in_batch], *getattr(chunk, f"{side}_pool")]
                for j, candidate in enumerate(candidates):
                    at = j if j < window else j + width - window
                    if (i, j) in masked[side]:
                        assert got[at].item() == -np.inf
                    else:
                        expected = score(model, config, chunk.relation, **{**edge, side: candidate})
                        assert got[at].item() == pytest.approx(expected, rel=1e-4, abs=1e-5)


def plain_loss(config, loss, chunks, batch, outputs) -> float:
    """The weighted sum over edges of the mean over replaced sides, edge by edge, from the logits."""
    total = 0.0
    for g, chunk in enumerate(chunks):
        relation = config.model.relations[chunk.relation]
        used = ["lhs", "rhs"] if chunk.sides == "both" else [chunk.sides]
        for i, weight in enumerate(chunk.weight):
            edge = [
                loss(
                    outputs["logits"][g, i : i + 1],
                    outputs[f"{s}_logits"][g, getattr(batch, f"{s}_query")[g, i]].unsqueeze(0),
                )
                for s in used
            ]
            total += float(weight) * relation.weight * sum(value.item() for value in edge) / len(edge)
    return total


SIDES_OF_RELATIONS = [(None, None, None), ("lhs",) * 3, ("rhs",) * 3, ("rhs", "both", "lhs"), ("lhs", "rhs", "both")]


@pytest.mark.parametrize("by_chunk", [False, True])
@pytest.mark.parametrize("sides", SIDES_OF_RELATIONS)
@pytest.mark.parametrize("name", list(LOSSES))
def test_the_loss_is_the_weighted_mean_over_edges(config, model, monkeypatch, name, sides, by_chunk):
    monkeypatch.setattr(chunk_losses, "suits", lambda chunks: by_chunk)
    config = of_sides(config, *sides)
    chunks = tiny.chunks(0, config.model)
    batch = assemble(chunks, config.model, 20)
    wrapped = trainable(model, config, name)
    loss, _ = wrapped(batch)
    with torch.no_grad():  # so that scores are kept
        _, outputs = wrapped(batch)
    assert (batch.lhs_query_index.shape[1], batch.rhs_query_index.shape[1]) == (5, 5), "edges share queries"
    assert {key for key in outputs if key.endswith("s_logits")} == {f"{side}_logits" for side in batch.sides}
    expected = plain_loss(config, wrapped.loss, chunks, batch, outputs)
    assert loss.item() == pytest.approx(expected / 20, rel=1e-5)


@pytest.mark.parametrize("reciprocal", [False, True])
@pytest.mark.parametrize("sides", SIDES_OF_RELATIONS)
def test_chunks_of_different_sides_give_together_what_each_gives_alone(config, sides, reciprocal):
    config = of_sides(tiny.config(init_scale=1.0, reciprocal=reciprocal), *sides)
    model = tiny.random_model(config)
    chunks = tiny.chunks(0, config.model)
    together, _ = trainable(model, config, "softmax")(assemble(chunks, config.model, 20))
    alone = [trainable(model, config, "softmax")(assemble([chunk], config.model, 20))[0] for chunk in chunks]
    assert together.item() == pytest.approx(sum(loss.item() for loss in alone), rel=1e-5)
    expected = gradients(model, sum(alone))
    for name, gradient in gradients(model, together).items():
        torch.testing.assert_close(gradient, expected[name], msg=name)


@pytest.mark.parametrize("by_chunk", [False, True])
def test_a_side_that_no_chunk_replaces_is_not_compared(config, model, monkeypatch, by_chunk):
    config = of_sides(config, "rhs", "rhs", "rhs")
    compared = []
    edges, losses = model.scorer.edges, chunk_losses.losses
    monkeypatch.setattr(chunk_losses, "suits", lambda chunks: by_chunk)
    monkeypatch.setattr(model.scorer, "edges", lambda *given: compared.append(len(given[-1])) or edges(*given))
    monkeypatch.setattr(chunk_losses, "losses", lambda *given: compared.append(len(given[7:])) or losses(*given))
    trainable(model, config, "softmax")(tiny.batch(0, config.model))
    assert compared == [1]


def test_with_reciprocal_relations_heads_are_predicted_by_second_operators(config):
    config = tiny.config(init_scale=1.0, reciprocal=True)
    model = tiny.random_model(config)
    chunks = tiny.chunks(0, config.model)
    batch = assemble(chunks, config.model, 13)
    outputs = model(batch)
    tables, rows = table_weights(model), model.scorer.state_rows()
    first, second = rows["likes"].chunk(2)
    head, tail = tables["user"][chunks[0].lhs[2]], tables["item"][chunks[0].rhs[2]]
    other = tables["user"][chunks[0].lhs_pool[1]]
    assert outputs["rhs_positive"][0, 2].item() == pytest.approx(((head + first) @ tail).item(), rel=1e-4)
    assert outputs["lhs_positive"][0, 2].item() == pytest.approx(((tail + second) @ head).item(), rel=1e-4)
    found = outputs["lhs_logits"][0, batch.lhs_query[0, 2], 3 + 1]
    assert found.item() == pytest.approx(((tail + second) @ other).item(), rel=1e-4)
    assert torch.equal(outputs["logits"], outputs["rhs_positive"])


OPERATORS_OF_RELATIONS = [
    ("translation", "identity", "linear"),
    ("complex_diagonal", "affine", "rotation"),
    ("diagonal", "diagonal", "diagonal"),
]


def everything_as_pools(chunks):
    """The same chunks with each type's rows as their pools; of 33 candidates each, the spare ones masked."""
    made = []
    for chunk in chunks:
        fields = {}
        for side in ("lhs", "rhs"):
            if chunk.sides in ("both", side):
                rows = ROWS_OF[side][chunk.relation]
                spare = [(i, j) for i in range(len(chunk.lhs)) for j in range(rows, 33)]
                fields[f"{side}_pool"] = np.concatenate([np.arange(rows), np.zeros(33 - rows, np.int64)])
                masks = [getattr(chunk, f"{side}_mask"), np.array(spare, np.int64).reshape(-1, 2)]
                fields[f"{side}_mask"] = np.concatenate(masks)
        made.append(dataclasses.replace(chunk, **fields))
    return made


ROWS_OF = {"lhs": (24, 33, 24), "rhs": (33, 33, 33)}


@pytest.mark.parametrize(
    ("operators", "reciprocal", "block"),
    [
        *((operators, reciprocal, 3) for operators in OPERATORS_OF_RELATIONS for reciprocal in (False, True)),
        *((OPERATORS_OF_RELATIONS[0], False, block) for block in (1, 1000)),
    ],
)
@pytest.mark.parametrize("name", list(LOSSES))
def test_all_candidates_give_the_loss_and_gradients_of_pools_that_hold_every_entity(
    monkeypatch, name, operators, reciprocal, block
):
    monkeypatch.setattr(all_candidates, "BLOCK_BYTES", block * 4 * 33)
    comparator = {"diagonal": "l2", "complex_diagonal": "cosine"}.get(operators[0], "dot")
    relations = [
        {**relation.model_dump(), "operator": operator}
        for relation, operator in zip(tiny.config().model.relations, operators, strict=True)
    ]
    config = tiny.config(init_scale=1.0, comparator=comparator, reciprocal=reciprocal, relations=relations)
    config = of_sides(config, None, None, "rhs") if reciprocal else config
    model = tiny.random_model(config)
    wrapped = trainable(model, config, name)
    # Two chunks of each relation: candidates are shared.
    chunks = [c for seed in (0, 1) for c in tiny.chunks(seed, config.model, everything=True)]
    sampled, expected = wrapped(assemble(everything_as_pools(chunks), config.model, 20))
    want = gradients(model, sampled)
    loss, outputs = wrapped(assemble(chunks, config.model, 20, everything=tiny.ROWS))
    got = gradients(model, loss)
    assert loss.item() == pytest.approx(sampled.item(), rel=1e-5)
    for name in ("edge_loss", "relation_loss", "relation_edges"):
        real = outputs[name] != 0
        torch.testing.assert_close(outputs[name][real], expected[name][real], msg=name)
    assert (outputs["edge_loss"] != 0).sum() > 0
    for parameter, gradient in got.items():
        assert gradient.norm() > 0, parameter
        torch.testing.assert_close(gradient, want[parameter], rtol=1e-4, atol=1e-6, msg=parameter)


@pytest.mark.parametrize("comparator", ["dot", "cosine"])
def test_whole_tables_give_the_loss_and_gradients_of_rows_that_are_looked_up(monkeypatch, comparator):
    config = tiny.config(init_scale=1.0, comparator=comparator)
    model = tiny.random_model(config)
    wrapped, batch = trainable(model, config, "softmax"), tiny.batch(0, config.model)
    loss, _ = wrapped(batch)
    want = gradients(model, loss)
    for table in config.model.table_names:
        model.tables.table(table).sparse = True
    monkeypatch.setattr(TwhinModel, "lookup", lambda *_: pytest.fail("rows should be read from the tables"))
    whole, _ = wrapped(batch)
    got = gradients(model, whole)
    assert torch.equal(whole, loss)
    for parameter, gradient in got.items():
        assert gradient.is_sparse == parameter.startswith("embeddings")
        torch.testing.assert_close(gradient.to_dense(), want[parameter], msg=parameter)


def test_all_candidates_in_mixed_precision_are_near_those_in_single(config, model):
    batch = tiny.batch(0, config.model, everything=True)
    exact, _ = trainable(model, config, "softmax")(batch)
    mixed, _ = trainable(model, config, "softmax", amp=True)(batch)
    assert mixed.dtype == torch.float32
    assert mixed.item() != exact.item()
    assert mixed.item() == pytest.approx(exact.item(), rel=0.02)
    mixed.backward()


def test_all_candidates_are_prepared_once_for_all_chunks_where_relations_leave_them_as_they_are(
    config, model, monkeypatch
):
    chunks = [c for seed in (0, 1) for c in tiny.chunks(seed, config.model, everything=True)]
    batch = assemble(chunks, config.model, 20, everything=tiny.ROWS)
    outputs = model(batch)
    # Tails are items in all relations; heads go through their relation's operator.
    assert [len(group.candidates) for group in outputs["rhs_everything"]] == [33]
    assert [len(group.candidates) for group in outputs["lhs_everything"]] == [24, 33, 24]


@pytest.mark.parametrize("name", ["softmax", "bsl"])
def test_log_q_makes_gradients_of_uneven_pools_those_of_all_entities(name):
    """400 chunks of the same edges with pools of 200 each; without log_q the gradient is far off."""
    config = of_sides(tiny.config(init_scale=1.0), "rhs", None, None)
    model = tiny.random_model(config)
    fields = {"positive_temperature": 0.7, "negative_temperature": 1.5} if name == "bsl" else {}
    (chunk, *_) = tiny.chunks(0, config.model, everything=True)
    full, _ = trainable(model, config, name, **fields)(assemble([chunk], config.model, 6, everything=tiny.ROWS))
    want = gradients(model, full)
    rng = np.random.default_rng(0)
    share = np.arange(1, 34) ** 1.0 / np.arange(1, 34).sum()
    true = set(map(tuple, np.stack([chunk.lhs, chunk.rhs], 1).tolist()))
    sampled = []
    for _ in range(400):
        pool = rng.choice(33, 200, p=share)
        pairs = [(i, j) for i in range(6) for j, c in enumerate(pool.tolist()) if (chunk.lhs[i], c) in true]
        log_q = np.log(200 * share[pool]).astype(np.float32)
        mask = np.array(pairs, np.int64).reshape(-1, 2)
        sampled.append(dataclasses.replace(chunk, rhs_pool=pool, rhs_mask=mask, rhs_log_q=log_q))
    batch = assemble(sampled, config.model, 6 * len(sampled))
    off = {}
    for log_q in (True, False):
        loss, _ = trainable(model, config, name, log_q=log_q, **fields)(batch)
        got = gradients(model, loss)
        off[log_q] = max(((got[k] - want[k]).norm() / want[k].norm()).item() for k in want if "operators" not in k)
    assert off[True] < 0.03
    assert off[False] > 5 * off[True]


@pytest.mark.parametrize("reciprocal", [False, True])
@pytest.mark.parametrize("name", list(LOSSES))
def test_a_sample_of_all_gives_the_loss_and_gradients_of_pools_that_are_the_sample(name, reciprocal):
    config = tiny.config(init_scale=1.0, reciprocal=reciprocal)
    model = tiny.random_model(config)
    log_q = name in ("softmax", "bsl")
    fields = {"positive_temperature": 0.7, "negative_temperature": 1.5} if name == "bsl" else {}
    wrapped = trainable(model, config, name, log_q=log_q, **fields)
    rows = {"user": np.array([0, 3, 4, 11, 23]), "item": np.array([1, 2, 5, 30, 32])}
    # Of another probability each, as by degree.
    share = {table: np.log(np.arange(1, 6) / tiny.ROWS[table]) if log_q else np.zeros(5) for table in rows}
    chunks = [c for seed in (0, 1) for c in tiny.chunks(seed, config.model, everything=True)]
    pools = []
    for chunk in chunks:
        made = {}
        for side in ("lhs", "rhs"):
            table = getattr(config.model.relations[chunk.relation], side)
            place = {row: i for i, row in enumerate(rows[table].tolist())}
            pairs = [(i, place[row]) for i, row in getattr(chunk, f"{side}_mask").tolist() if row in place]
            made |= {f"{side}_pool": rows[table], f"{side}_mask": np.array(pairs, np.int64).reshape(-1, 2)}
            made[f"{side}_log_q"] = share[table].astype(np.float32)
        pools.append(dataclasses.replace(chunk, **made))
    plain, expected = wrapped(assemble(pools, config.model, 20))
    want = gradients(model, plain)
    batch = of_sample(assemble(chunks, config.model, 20, everything=tiny.ROWS), config.model, rows, share)
    assert len(batch.rhs_mask) > 0
    loss, outputs = wrapped(batch)
    got = gradients(model, loss)
    assert loss.item() == pytest.approx(plain.item(), rel=1e-5)
    torch.testing.assert_close(outputs["relation_loss"], expected["relation_loss"])
    for parameter, gradient in got.items():
        assert gradient.norm() > 0, parameter
        torch.testing.assert_close(gradient, want[parameter], rtol=1e-4, atol=1e-6, msg=parameter)


def set_tables(model, seed: int = 0) -> dict[str, np.ndarray]:
    """Give the tables small literal numbers; return them."""
    rng = np.random.default_rng(seed)
    values = {}
    for table, weight in table_weights(model).items():
        values[table] = rng.integers(-3, 4, tuple(weight.shape)).astype(np.float64)
        weight.data.copy_(torch.from_numpy(values[table]))
    return values


def norm_of(x: np.ndarray, norm: str, complex_: bool) -> float:
    if norm == "l2":
        return float((x**2).sum())
    if complex_:
        half = len(x) // 2
        return float((np.abs(x[:half] + 1j * x[half:]) ** 3).sum())
    return float((np.abs(x) ** 3).sum())


@pytest.mark.parametrize("degree_weighted", [True, False])
@pytest.mark.parametrize("norm", ["n3", "l2"])
@pytest.mark.parametrize("operator", ["complex_diagonal", "diagonal"])
@pytest.mark.parametrize("everything", [False, True])
def test_the_penalty_is_the_literal_sum_over_edges_or_over_what_they_use(norm, degree_weighted, operator, everything):
    chosen = {"norm": norm, "entities": 0.25, "operators": 0.5, "degree_weighted": degree_weighted}
    relations = [{**relation.model_dump(), "operator": operator} for relation in tiny.config().model.relations]
    config = tiny.config(regularization=chosen, relations=relations, embedding_dropout=0.5)
    model = tiny.random_model(config)
    values, rows = set_tables(model), model.scorer.state_rows()
    chunks = [c for seed in (0, 1) for c in tiny.chunks(seed, config.model, everything)]
    expected, seen = 0.0, set()
    for chunk in chunks:
        relation = config.model.relations[chunk.relation]
        for head, tail in zip(chunk.lhs, chunk.rhs, strict=True):
            ends = [("entity", relation.lhs, head), ("entity", relation.rhs, tail), ("operator", relation.name, 0)]
            for kind, name, row in ends:
                if degree_weighted or (kind, name, row) not in seen:
                    vector = values[name][row] if kind == "entity" else rows[name].double().numpy()
                    factor = 0.25 if kind == "entity" else 0.5
                    expected += factor * norm_of(vector, norm, operator == "complex_diagonal")
                seen.add((kind, name, row))
    batch = assemble(chunks, config.model, 7, everything=tiny.ROWS if everything else None)
    wrapped = trainable(model, config, "softmax")
    assert model(batch)["penalty"].item() == pytest.approx(expected, rel=1e-5)
    torch.manual_seed(0)
    loss, outputs = wrapped(batch)
    factors = torch.tensor([relation.weight for relation in config.model.relations])
    assert loss.item() == pytest.approx(((outputs["relation_loss"] * factors).sum().item() + expected) / 7, rel=1e-5)
    wrapped.eval()
    loss, outputs = wrapped(batch)
    assert loss.item() == pytest.approx((outputs["relation_loss"] * factors).sum().item() / 7, rel=1e-5)


def test_the_penalty_pulls_on_entities_and_operators():
    regularization = {"entities": 1.0, "operators": 1.0}
    relations = [{**relation.model_dump(), "operator": "diagonal"} for relation in tiny.config().model.relations]
    config = tiny.config(regularization=regularization, relations=relations, init_scale=1.0)
    model = tiny.random_model(config)
    batch = tiny.batch(0, config.model)
    found = gradients(model, model(batch)["penalty"])
    assert all(gradient.norm() > 0 for gradient in found.values())
    assert found.keys() == dict(model.named_parameters()).keys()


def test_vectors_longer_than_max_norm_are_scaled_down_and_their_gradient_is_that_of_the_scaled():
    config = tiny.config(max_norm=1.0)
    model = TwhinModel(config.model, UnshardedTables(config.model, tiny.ROWS))
    init_tables(model, seed=0)
    ids = {"user": torch.tensor([0, 1, 2]), "item": torch.tensor([5])}
    table = table_weights(model)["user"]
    with torch.no_grad():
        table[0], table[1], table[2] = torch.zeros(8), torch.full((8,), 0.1), torch.arange(8.0)
    vectors = torch.cat(model.lookup(ids))
    assert vectors[0].tolist() == [0.0] * 8
    assert vectors[1].tolist() == table[1].tolist()
    torch.testing.assert_close(vectors[2], torch.arange(8.0) / torch.arange(8.0).norm())
    vectors.sum().backward()
    x = torch.arange(8.0, requires_grad=True)
    (x / x.norm()).sum().backward()
    weight = dict(model.named_parameters())["embeddings.embeddings.user.weight"]
    torch.testing.assert_close(weight.grad[2], x.grad)
    assert weight.grad[0].tolist() == weight.grad[1].tolist() == [1.0] * 8


@pytest.mark.parametrize("everything", [False, True])
def test_dropout_is_there_in_training_only(everything):
    config = tiny.config(init_scale=1.0, embedding_dropout=0.5)
    plain = tiny.config(init_scale=1.0)
    model, without = tiny.random_model(config), tiny.random_model(plain)
    batch = tiny.batch(0, config.model, everything)
    wrapped, expected = trainable(model, config, "softmax"), trainable(without, plain, "softmax")(batch)[0].item()
    assert len({wrapped(batch)[0].item() for _ in range(3)}) == 3
    wrapped.eval()
    assert wrapped(batch)[0].item() == pytest.approx(expected, rel=1e-6)


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


@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("reciprocal", [False, True])
@pytest.mark.parametrize("sides", [None, "lhs", "rhs"])
@pytest.mark.parametrize("operator", list(OPERATORS))
def test_every_parameter_gets_gradient(operator, sides, reciprocal, everything):
    names = (operator, "identity", operator)
    relations = [
        {**relation.model_dump(), "operator": name, "sides": sides}
        for relation, name in zip(tiny.config().model.relations, names, strict=True)
    ]
    config = tiny.config(init_scale=1.0, relations=relations, reciprocal=reciprocal)
    model = tiny.random_model(config)
    loss, _ = trainable(model, config, "softmax")(tiny.batch(0, config.model, everything))
    for name, gradient in gradients(model, loss).items():
        assert gradient.norm() > 0, name
        if "operators" in name:
            slots = range(len(gradient)) if sides is None or not reciprocal else {"rhs": (0, 1), "lhs": (2, 3)}[sides]
            assert all(gradient[slot].norm() > 0 for slot in slots), f"{name} of a relation is frozen"


@pytest.mark.parametrize("sides", ["lhs", "rhs"])
def test_parameters_of_a_rank_whose_chunks_replace_one_side_all_have_a_gradient(sides):
    """Ranks may differ in the sides that they replace in a step, and wait for each other's gradients."""
    config = tiny.config(init_scale=1.0, reciprocal=True)
    model = tiny.random_model(config)
    (chunk, *_) = tiny.chunks(0, of_sides(config, sides, None, None).model)
    loss, _ = trainable(model, config, "softmax")(assemble([chunk], config.model, 6))
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("name", list(LOSSES))
@pytest.mark.parametrize("comparator", ["dot", "cosine"])
def test_one_step_changes_looked_up_rows_and_relation_vectors_and_nothing_else(name, comparator):
    config = tiny.config(comparator=comparator)
    model = apply_optimizers(TwhinModel(config.model, UnshardedTables(config.model, tiny.ROWS)), config.model)
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


class PlainTables:
    """The least that a model needs of its tables: a module of the vectors, and their rows."""

    def __init__(self, model: TwhinModel) -> None:
        self.module = model.embeddings

    def rows(self, ids: dict[str, torch.Tensor]) -> list[Rows]:
        parameters = dict(self.module.named_parameters())
        return [Rows(parameters[f"embeddings.{table}.weight"][rows]) for table, rows in ids.items()]


def test_a_model_trains_the_same_with_any_object_that_looks_rows_up(config, model):
    batch = tiny.batch(0, config.model)
    expected, _ = trainable(model, config, "softmax")(batch)
    want = gradients(model, expected)
    model.use_tables(PlainTables(model))
    loss, _ = trainable(model, config, "softmax")(batch)
    got = gradients(model, loss)
    assert torch.equal(loss, expected)
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)
