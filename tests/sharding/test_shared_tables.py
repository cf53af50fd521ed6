"""Tables in memory that ranks share: what one process can show of them. test_sharding.py trains them in two."""

import os
import re

import pytest
import torch

from twhin_pipeline.sharding import shared_tables
from twhin_pipeline.sharding.shared_memory import GradientBuffer, SharedFile, buffer_views
from twhin_pipeline.sharding.shared_tables import _between, _Offer, _reason_against, _RowAddresses

GIB = 2**30


def test_rows_have_the_addresses_of_the_shard_that_has_them():
    shards = [torch.randn(4, 3), torch.randn(2, 3), torch.randn(5, 3)]
    addresses = _RowAddresses([0, 4, 6], shards)
    rows = torch.arange(11)
    expected = [shard.data_ptr() + 12 * i for shard in shards for i in range(len(shard))]
    assert addresses.of(rows).tolist() == expected
    assert addresses.of(rows[[1, 5, 10]]).tolist() == [expected[i] for i in (1, 5, 10)]
    assert addresses.of(rows[:0]).tolist() == []


@pytest.mark.parametrize("rows", [[-1, 3], [3, 6]])
def test_a_row_that_no_shard_has_is_refused(rows):
    with pytest.raises(IndexError, match=f"rows {rows[0]} to {rows[1]} of a table that has 6"):
        _RowAddresses([0, 4], [torch.zeros(4, 3), torch.zeros(2, 3)]).of(torch.tensor(rows))


def written(
    buffer: GradientBuffer, counts: list[int], seed: int
) -> tuple[SharedFile, list[torch.Tensor], list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.arange(count) * 3 for count in counts]
    gradients = [torch.randn(count, 5, generator=generator) for count in counts]
    return buffer.write(ids, gradients), ids, gradients


def test_a_buffer_returns_what_was_written_and_grows_where_it_is_too_small():
    buffer, files = GradientBuffer(), []
    for seed, counts in enumerate([[0, 0, 0], [3, 0, 2], [4000, 50, 1]]):
        file, ids, gradients = written(buffer, counts, seed)
        got_ids, got = buffer_views(file.open(), sum(counts), 5)
        assert torch.equal(got_ids, torch.cat(ids))
        assert torch.equal(got, torch.cat(gradients))
        files.append(file)
    assert files[0] == files[1] != files[2], "a buffer is allocated again only where it is too small"


def test_gradients_that_are_in_the_buffer_already_are_not_copied():
    buffer = GradientBuffer()
    memory = buffer.gradients(5, 4)
    memory.copy_(torch.arange(20.0).view(5, 4))
    file = buffer.write([torch.tensor([1, 7]), torch.tensor([0, 2, 3])], list(memory.split([2, 3])))
    ids, vectors = buffer_views(file.open(), 5, 4)
    assert ids.tolist() == [1, 7, 0, 2, 3]
    assert torch.equal(vectors, memory)
    assert buffer.gradients(5, 4).data_ptr() == memory.data_ptr()


def test_a_descriptor_that_is_another_file_now_is_not_read(tmp_path):
    wanted = os.memfd_create("wanted")
    os.ftruncate(wanted, 64)
    file = SharedFile.of(wanted, 64)
    os.close(wanted)
    other = os.open(tmp_path / "other", os.O_RDWR | os.O_CREAT)
    try:
        assert other == wanted, "the number is given again"
        with pytest.raises(OSError, match=f"process {os.getpid()} is another one here"):
            file.open()
    finally:
        os.close(other)


def test_a_shards_part_of_a_list_is_counted_from_its_first_row():
    rows, values = torch.tensor([1, 4, 5, 9]), torch.arange(4.0).unsqueeze(1)
    found, part = _between(rows, values, 4, 9)
    assert (found.tolist(), part.flatten().tolist()) == ([0, 1], [1, 2])


@pytest.mark.parametrize(
    ("offers", "reason"),
    [
        ([("a", GIB, 4 * GIB), ("a", 0, 4 * GIB)], None),
        ([("a", GIB, 4 * GIB), ("a", None, 4 * GIB)], "fbgemm's kernels keep some of their tables"),
        ([("a", GIB, 4 * GIB), ("b", GIB, 4 * GIB)], "they are not all on one machine"),
        ([("", GIB, 4 * GIB), ("", GIB, 4 * GIB)], "it has no memory that processes share"),
        ([("a", GIB, 4 * GIB), ("a", 3 * GIB, 4 * GIB)], "take 5 GiB, and /dev/shm has 4 GiB .*--shm-size"),
    ],
)
def test_ranks_share_tables_where_all_of_them_can(offers, reason):
    found = _reason_against([_Offer(*offer) for offer in offers])
    if reason is None:
        assert found is None
    else:
        assert found is not None and re.search(reason, found)


def test_an_offer_tells_this_machine_and_its_memory(monkeypatch, tmp_path):
    offer = _Offer.of([])
    assert offer.boot and offer.size == 0 and offer.free > 0
    assert _Offer.of(None).size is None
    monkeypatch.setattr(shared_tables, "SHARED_MEMORY", tmp_path / "none")
    assert _Offer.of([]) == _Offer("", 0, 0)


def test_memory_whose_content_is_not_needed_is_given_back_before_it_is_shared():
    """A shard would else take its memory twice while it is moved."""
    from twhin_pipeline.sharding.shared_memory import forget

    weight = torch.ones(1 << 20)
    forget(weight.untyped_storage())
    assert not weight[1024:-1024].any(), "its pages are new ones, which take memory when they are written"
    weight.fill_(2.0)
    assert float(weight.sum()) == 2.0 * (1 << 20)
