"""What test_selection.py runs under torchrun: gathers sharded tables to rank 0, which compares them with whole ones.

Run by hand: `torchrun --standalone --nproc-per-node 2 tests/support/gather_ranks.py`.
"""

from __future__ import annotations

import tiny
import torch
import torch.distributed as dist

from twhin_pipeline.config.training import LaunchConfig
from twhin_pipeline.model.twhin_model import TwhinModel
from twhin_pipeline.sharding import placement
from twhin_pipeline.sharding.distributed import Ranks
from twhin_pipeline.sharding.optimizer import apply_optimizers
from twhin_pipeline.sharding.unsharded_tables import UnshardedTables

# A shard is several blocks, and some rows have no entity.
ROWS, ENTITIES = {"user": 901, "item": 503}, {"user": 890, "item": 200}


def main() -> None:
    """Gather by both layouts and in both types; fail where a row is not that of an unsharded table."""
    config = tiny.config().model
    whole = TwhinModel(config, UnshardedTables(config, ROWS))
    placement.init_tables(whole, seed=3)
    expected = placement.table_weights(whole)
    dist.init_process_group("gloo")
    control = dist.new_group(backend="gloo")
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), torch.device("cpu"), control)
    placement.BLOCK_ROWS = 100
    for layout in ("row_wise", "table_wise"):
        model = apply_optimizers(TwhinModel(config, UnshardedTables(config, ROWS)), config)
        sharded = placement.maybe_shard_model(model, "cpu", LaunchConfig(nproc_per_node=2, sharding=layout))
        placement.init_tables(sharded, seed=3)
        for table, weight in placement.table_weights(sharded).items():
            found = placement.gather_table(weight, ranks, ENTITIES[table])
            assert (found is None) == (ranks.rank > 0)
            if found is not None:
                assert torch.equal(found, expected[table][: ENTITIES[table]]), (layout, table)
                print(f"{layout} {table} gathered", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
