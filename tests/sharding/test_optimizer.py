"""Optimizers off-distributed: update rules, groups, schedules in force, and state that comes back."""

import pytest
import tiny
import torch

from twhin_pipeline.config.training import LossConfig
from twhin_pipeline.kernels import parallel
from twhin_pipeline.model.losses import LOSSES
from twhin_pipeline.model.twhin_model import TwhinModel, TwhinModelAndLoss
from twhin_pipeline.sharding.optimizer import apply_optimizers, assign_groups, build_optimizer
from twhin_pipeline.sharding.placement import init_tables, table_weights
from twhin_pipeline.sharding.row_optimizers import (
    RowAdagrad,
    RowAdam,
    RowGradients,
    RowRmsprop,
    RowSgd,
    RowwiseAdagrad,
)
from twhin_pipeline.sharding.unsharded_tables import UnshardedTables

ALGORITHMS = {
    "sgd": {"sgd": {"lr": 0.1}},
    "adagrad": {"adagrad": {"lr": 0.1, "eps": 1e-8}},
    "rowwise_adagrad": {"rowwise_adagrad": {"lr": 0.1}},
    "adam": {"adam": {"lr": 0.1}},
    "rmsprop": {"rmsprop": {"lr": 0.1}},
}


def configured(user, item=None, translation=None):
    tables = [
        {"name": "user", "embedding_dim": tiny.DIM, "optimizer": user},
        {"name": "item", "embedding_dim": tiny.DIM, "optimizer": item or user},
    ]
    return tiny.config(
        embeddings={"tables": tables}, translation_optimizer=translation or {"adagrad": {"lr": 0.1, "eps": 1e-8}}
    )


class Trained:
    """A model with its optimizer, stepped on given seeds of batches."""

    def __init__(self, config):
        self.config = config
        self.model = apply_optimizers(TwhinModel(config.model, UnshardedTables(config.model, tiny.ROWS)), config.model)
        init_tables(self.model, seed=0)
        self.optimizer, self.schedule = build_optimizer(self.model, config.model)
        self.trainable = TwhinModelAndLoss(self.model, LOSSES["softmax"](LossConfig()), config.model)

    def step(self, seed):
        self.optimizer.zero_grad()
        loss, _ = self.trainable(tiny.batch(seed, self.config.model))
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        return loss.item()

    def tables(self):
        return {table: weight.clone() for table, weight in table_weights(self.model).items()}


@pytest.mark.parametrize(
    "ids",
    # 3 twice: its gradients add up before the step. Ascending ids are what a batch has, and all rows what 1-vs-all has.
    [[4, 1, 3, 3], [1, 3, 4], [0, 1, 2, 3, 4, 5]],
    ids=["twice", "ascending", "all"],
)
@pytest.mark.parametrize(
    ("ours", "options", "reference", "reference_options"),
    [
        (RowSgd, {"lr": 0.3}, torch.optim.SGD, {"lr": 0.3}),
        (RowAdagrad, {"lr": 0.3, "eps": 1e-8}, torch.optim.Adagrad, {"lr": 0.3, "eps": 1e-8}),
        (
            RowAdam,
            {"lr": 0.3, "beta1": 0.8, "beta2": 0.9, "eps": 1e-7},
            torch.optim.SparseAdam,
            {"lr": 0.3, "betas": (0.8, 0.9), "eps": 1e-7},
        ),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_row_optimizer_follows_torchs_rule(ours, options, reference, reference_options, ids):
    torch.manual_seed(0)
    mine = torch.nn.Embedding(6, 4, sparse=True)
    theirs = torch.nn.Embedding.from_pretrained(mine.weight.detach().clone(), freeze=False, sparse=True)
    optimizers = [ours([mine.weight], **options), reference([theirs.weight], **reference_options)]
    untouched = sorted(set(range(6)) - set(ids))
    before = mine.weight.detach().clone()
    ids = torch.tensor(ids)
    for step in range(4):
        for table, optimizer in zip((mine, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            (table(ids) * (step + 1)).sin().sum().backward()
            optimizer.step()
    torch.testing.assert_close(mine.weight, theirs.weight, rtol=1e-4, atol=1e-5)
    assert torch.equal(mine.weight[untouched], before[untouched])
    for name, value in optimizers[0].state[mine.weight].items():
        assert name == "step" or not value[untouched].any()


def test_rowwise_adagrad_divides_by_the_root_of_the_rows_mean_squared_gradients():
    weight = torch.nn.Parameter(torch.zeros(3, 2))
    optimizer = RowwiseAdagrad([weight], lr=0.5, eps=0.0)
    for _ in range(2):
        weight.grad = torch.sparse_coo_tensor(torch.tensor([[1]]), torch.tensor([[3.0, 4.0]]), (3, 2))
        optimizer.step()
    # mean(g²) = 12.5: first step 0.5 g / sqrt(12.5), second 0.5 g / sqrt(25)
    factor = 0.5 / 12.5**0.5 + 0.5 / 5
    torch.testing.assert_close(weight.detach(), torch.tensor([[0.0, 0.0], [-3 * factor, -4 * factor], [0.0, 0.0]]))
    assert optimizer.state[weight]["momentum1"].tolist() == [0.0, 25.0, 0.0]


def test_rmsprop_of_some_rows_at_a_time_is_adam_without_momentum_over_the_whole_table():
    torch.manual_seed(0)
    mine = torch.nn.Embedding(6, 4, sparse=True)
    theirs = torch.nn.Embedding.from_pretrained(mine.weight.detach().clone(), freeze=False)
    ours = RowRmsprop([mine.weight], lr=0.3, decay=0.9, eps=1e-7)
    reference = torch.optim.Adam([theirs.weight], lr=0.3, betas=(0.0, 0.9), eps=1e-7)
    for step, ids in enumerate(([0, 1, 1], [2], [2, 4], [3], [0, 4], [0, 1, 2, 3, 4, 5], [5], [1, 0])):
        for table, optimizer in ((mine, ours), (theirs, reference)):
            optimizer.zero_grad()
            (table(torch.tensor(ids)) * (step + 1)).sin().sum().backward()
            optimizer.step()
    torch.testing.assert_close(mine.weight, theirs.weight)


@pytest.mark.parametrize("name", list(ALGORITHMS))
def test_a_gradient_of_all_rows_makes_the_steps_of_gradients_of_each_half(name):
    """1-vs-all gives every row a gradient, which takes another way through the optimizer."""
    rows, options = {
        "sgd": (RowSgd, {"lr": 0.1}),
        "adagrad": (RowAdagrad, {"lr": 0.1, "eps": 1e-8}),
        "rowwise_adagrad": (RowwiseAdagrad, {"lr": 0.1, "eps": 1e-8}),
        "adam": (RowAdam, {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "eps": 1e-7}),
        "rmsprop": (RowRmsprop, {"lr": 0.1, "decay": 0.99, "eps": 1e-7}),
    }[name]
    gradients = torch.randn(3, 8, 4, generator=torch.Generator().manual_seed(0))
    tables = [torch.nn.Parameter(torch.ones(8, 4)) for _ in range(3)]
    optimizers = [rows([table], **options) for table in tables]
    for gradient in gradients:
        for part, (table, optimizer) in zip(
            (slice(0, 8), slice(0, 4), slice(4, 8)), zip(tables, optimizers, strict=True), strict=True
        ):
            index = torch.arange(8)[None, part]
            table.grad = torch.sparse_coo_tensor(index, gradient[part], (8, 4))
            optimizer.step()
    assert torch.equal(tables[0], torch.cat([tables[1][:4], tables[2][4:]]))
    for key, value in optimizers[0].state[tables[0]].items():
        halves = [optimizer.state[table][key] for table, optimizer in zip(tables[1:], optimizers[1:], strict=True)]
        assert torch.equal(value, torch.cat([halves[0][:4], halves[1][4:]]) if value.ndim else halves[0])


@pytest.mark.parametrize("name", list(ALGORITHMS))
def test_every_table_optimizer_lowers_the_loss(name):
    trained = Trained(configured(ALGORITHMS[name]))
    losses = [trained.step(0) for _ in range(12)]
    assert losses[-1] < losses[0] - 0.02


@pytest.mark.parametrize("algorithm", ["adagrad", "rowwise_adagrad"])
def test_eps_0_with_zero_gradients_gives_no_nan(algorithm):
    """The published default is eps 0, and rows, or relations absent from a batch, have gradients of exactly 0."""
    config = configured({algorithm: {"lr": 0.1, "eps": 0}}, translation={"adagrad": {"lr": 0.1, "eps": 0}})
    trained = Trained(config)
    batch = tiny.batch(0, config.model)
    batch.weight[0] = 0  # no edge of `likes` counts: its users and its vector get zeros
    loss, _ = trained.trainable(batch)
    loss.backward()
    trained.optimizer.step()
    for parameter in trained.model.parameters():
        assert torch.isfinite(parameter).all()
    assert trained.model.scorer.state_rows()["likes"].norm() == 0
    assert trained.model.scorer.state_rows()["hides"].norm() > 0


def test_each_group_follows_its_own_schedule_in_effect():
    user = {
        "sgd": {"lr": 9.0},
        "learning_rate": {"piecewise_constant": {"learning_rate_boundaries": [1], "learning_rate_values": [0.0, 0.5]}},
    }
    translation = {
        "sgd": {"lr": 9.0},
        "learning_rate": {"linear_ramp_to_constant": {"learning_rate": 0.2, "num_ramp_steps": 2}},
    }
    trained = Trained(configured(user, {"sgd": {"lr": 0.25}}, translation))
    assert trained.schedule.rates() == {"user": 0.0, "item": 0.25, "translation": 0.0}
    before, relations = trained.tables(), trained.model.scorer.state_rows()
    trained.step(0)
    after = trained.tables()
    assert torch.equal(before["user"], after["user"]), "the rate of step 0 is 0"
    assert not torch.equal(before["item"], after["item"])
    assert torch.equal(relations["likes"], trained.model.scorer.state_rows()["likes"])
    assert trained.schedule.rates() == {"user": 0.5, "item": 0.25, "translation": 0.1}
    trained.step(0)
    assert not torch.equal(after["user"], trained.tables()["user"])
    assert trained.model.scorer.state_rows()["likes"].norm() > 0


def test_a_tables_step_is_its_rate_times_its_gradient():
    config = configured({"sgd": {"lr": 0.5}}, {"sgd": {"lr": 2.0}})
    plain = TwhinModel(config.model, UnshardedTables(config.model, tiny.ROWS))
    init_tables(plain, seed=0)
    loss, _ = TwhinModelAndLoss(plain, LOSSES["softmax"](LossConfig()), config.model)(tiny.batch(0, config.model))
    loss.backward()
    trained = Trained(config)
    trained.step(0)
    for table, rate in (("user", 0.5), ("item", 2.0)):
        weight = plain.tables.table(table).weight
        torch.testing.assert_close(trained.tables()[table], (weight - rate * weight.grad).detach())


def test_translation_momentum_is_honoured():
    steps = {}
    for momentum in (0.0, 0.9):
        trained = Trained(configured({"sgd": {"lr": 0.0}}, translation={"sgd": {"lr": 0.01, "momentum": momentum}}))
        for _ in range(2):
            trained.step(0)
        steps[momentum] = trained.model.scorer.state_rows()["likes"]
    # With tables at rest the gradient hardly changes: two steps with momentum go g + 1.9 g, without 2 g.
    assert (steps[0.9].norm() / steps[0.0].norm()).item() == pytest.approx(2.9 / 2, rel=0.01)


@pytest.mark.parametrize(
    "translation", [{"adam": {"lr": 0.1}}, {"sgd": {"lr": 0.1, "momentum": 0.9}}, {"adagrad": {"lr": 0.1}}]
)
@pytest.mark.parametrize("name", list(ALGORITHMS))
def test_a_resumed_optimizer_equals_an_uninterrupted_one(name, translation):
    config = configured(
        ALGORITHMS[name] | {"learning_rate": {"linear_ramp_to_constant": {"learning_rate": 0.1, "num_ramp_steps": 6}}},
        translation=translation,
    )
    first = Trained(config)
    for seed in range(3):
        first.step(seed)
    saved = {
        "model": {key: value.clone() for key, value in first.model.state_dict().items()},
        "optimizer": {
            key: {name: value.clone() if torch.is_tensor(value) else value for name, value in state.items()}
            for key, state in first.optimizer.state_dict()["state"].items()
        },
        "schedule": first.schedule.state_dict(),
    }
    expected = [first.step(seed) for seed in range(3, 6)]
    second = Trained(config)
    second.model.load_state_dict(saved["model"])
    second.optimizer.load_state_dict({"state": saved["optimizer"]})
    second.schedule.load_state_dict(saved["schedule"])
    assert [second.step(seed) for seed in range(3, 6)] == expected


def test_a_fresh_optimizer_has_taken_no_step():
    """Its state is made complete by a step of zeros, which must not count in Adam's bias correction."""
    trained = Trained(configured(ALGORITHMS["sgd"], translation={"adam": {"lr": 0.1}}))
    trained.step(0)
    # Adam's first step is the rate in each element, whatever the gradient.
    assert trained.model.scorer.state_rows()["likes"].abs().tolist() == pytest.approx([0.1] * tiny.DIM, rel=1e-3)


def test_a_model_without_operator_parameters_trains():
    relations = [{"name": "likes", "lhs": "user", "rhs": "item", "operator": "identity"}]
    trained = Trained(tiny.config(relations=relations))
    before = trained.tables()
    trained.step(0)
    assert not torch.equal(before["user"], trained.tables()["user"])


class TestGroups:
    def test_a_table_is_known_by_its_whole_name(self):
        """The published system goes by prefix, so `user` would take `user_old` too."""
        tables = [{"name": name, "embedding_dim": 4} for name in ("user", "user_old")]
        config = tiny.config(
            embeddings={"tables": tables}, relations=[{"name": "likes", "lhs": "user", "rhs": "user_old"}]
        )
        names = [f"embeddings.embeddings.{name}.weight" for name in ("user", "user_old")]
        assert list(assign_groups(names, config.model).values()) == ["user", "user_old"]

    def test_every_parameter_belongs_to_one_group(self):
        config = tiny.config()
        names = [
            name for name, _ in TwhinModel(config.model, UnshardedTables(config.model, tiny.ROWS)).named_parameters()
        ]
        assert sorted(assign_groups(names, config.model).values()) == ["item", "translation", "user"]

    def test_an_unmatched_parameter_is_an_error(self):
        config = tiny.config()
        model = apply_optimizers(TwhinModel(config.model, UnshardedTables(config.model, tiny.ROWS)), config.model)
        model.extra = torch.nn.Linear(2, 2)
        with pytest.raises(ValueError, match=r"'extra\.weight' belongs to no group; .* user, item, translation"):
            build_optimizer(model, config.model)

    def test_a_doubly_matched_parameter_is_an_error(self):
        config = tiny.config()
        table = config.model.embeddings.tables[0]
        doubled = config.model.model_copy(
            update={"embeddings": config.model.embeddings.model_copy(update={"tables": [table, table]})}
        )
        with pytest.raises(ValueError, match="belongs to user and user"):
            assign_groups(["embeddings.embeddings.user.weight"], doubled)

    def test_tables_without_an_optimizer_are_an_error(self):
        config = tiny.config()
        with pytest.raises(ValueError, match=r"no optimizer on .*user.*; call apply_optimizers before"):
            build_optimizer(TwhinModel(config.model, UnshardedTables(config.model, tiny.ROWS)), config.model)

    def test_a_table_named_like_the_operators_group_is_refused(self):
        from twhin_pipeline.errors import UserError

        with pytest.raises(UserError, match="no table may be named 'translation'"):
            tiny.config(embeddings={"tables": [{"name": "translation", "embedding_dim": 4}]})


def lists_of_gradients(lists: int = 3) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Lists of some of 60 rows, one of them empty, and their gradients; most rows are in several lists."""
    generator = torch.Generator().manual_seed(4)
    rows = [torch.randperm(60, generator=generator)[:size].sort().values for size in (40, 0, 50)[:lists]]
    return rows, [torch.randn(len(part), 12, generator=generator) for part in rows]


@pytest.mark.parametrize("make", ["of", "merged"])
@pytest.mark.parametrize("kernel", ["rowwise_adagrad", "adagrad"])
def test_gradients_of_one_row_are_added_up_as_it_is_updated(make, kernel):
    rows, values = lists_of_gradients()
    gradients = RowGradients.of(torch.cat(rows), *values) if make == "of" else RowGradients.merged(rows, values)
    table, total = torch.randn(60, 12, generator=torch.Generator().manual_seed(1)), torch.zeros(60, 12)
    for row, value in zip(torch.cat(rows), torch.cat(values), strict=True):
        total[row] += value / 4
    updated, momentum = table.clone(), torch.ones(60) if kernel == "rowwise_adagrad" else torch.ones(60, 12)
    gradients.update(getattr(parallel, kernel), updated, momentum, 0.25, 0.1, 1e-8)
    mean = total.square().mean(1, keepdim=True) if kernel == "rowwise_adagrad" else total.square()
    torch.testing.assert_close(updated, table - 0.1 * total / (1 + mean).sqrt())
    torch.testing.assert_close(momentum.view(60, -1), 1 + mean)
    assert (total == 0).all(1).any() and len(torch.cat(rows).unique()) < len(torch.cat(rows))


def test_lists_of_gradients_are_merged_as_they_are_sorted():
    rows, values = lists_of_gradients()
    merged, sorted_ = RowGradients.merged(rows, values), RowGradients.of(torch.cat(rows), *values)
    for name in ("rows", "start", "address"):
        assert getattr(merged, name).tolist() == getattr(sorted_, name).tolist(), name
    assert RowGradients.merged([torch.zeros(0, dtype=torch.int64)], [torch.zeros(0, 3)]).start.tolist() == [0]
