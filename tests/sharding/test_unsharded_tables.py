"""Tables in one process: rows are read from the table where that is possible, and are the same either way."""

import pytest
import tiny
import torch

from twhin_pipeline.model.rows import take
from twhin_pipeline.sharding.unsharded_tables import UnshardedTables

IDS = {"user": torch.tensor([0, 3, 23]), "item": torch.tensor([7])}


def config(data_type: str = "fp32"):
    tables = [
        {"name": n, "embedding_dim": 8, "data_type": data_type, "optimizer": {"sgd": {"lr": 0.1}}} for n in tiny.ROWS
    ]
    return tiny.config(embeddings={"tables": tables}).model


def test_float32_rows_with_sparse_gradients_are_read_from_the_table():
    tables = UnshardedTables(config(), tiny.ROWS)
    copied = tables.rows(IDS)
    assert all(rows.ids is None for rows in copied)
    for name in tiny.ROWS:
        tables.table(name).sparse = True
    in_place = tables.rows(IDS)
    for name, rows in zip(tiny.ROWS, in_place, strict=True):
        assert rows.matrix is tables.table(name).weight and rows.ids is IDS[name]
    index = torch.tensor([2, 0, 3, 3])
    assert torch.equal(*(take(rows, index)[0] for rows in (copied, in_place)))


@pytest.mark.parametrize("sparse", [False, True])
def test_rows_of_other_types_are_copied_as_float32(sparse):
    tables = UnshardedTables(config("fp16"), tiny.ROWS)
    for name in tiny.ROWS:
        tables.table(name).sparse = sparse
    for name, rows in zip(tiny.ROWS, tables.rows(IDS), strict=True):
        assert rows.matrix.dtype == torch.float32
        assert torch.equal(rows.looked_up(), tables.table(name).weight[IDS[name]].float())


def test_the_state_dict_has_the_keys_of_earlier_checkpoints():
    state = UnshardedTables(config(), tiny.ROWS).module.state_dict()
    assert {key: len(weight) for key, weight in state.items()} == {
        f"embeddings.{name}.weight": rows for name, rows in tiny.ROWS.items()
    }
