"""Tables in memory that ranks share: what one process can show of them. test_sharding.py trains them in two."""

import os
import re

import pytest
import torch

from twhin_pipeline.sharding import shared_tables
from twhin_pipeline.sharding.shared_memory import Desk, File, laid_out
from twhin_pipeline.sharding.shared_tables import _between, _Lying, _Offer, _reason_against

GIB = 2**30


def test_rows_are_found_in_the_shard_that_has_them():
    shards = [torch.randn(4, 3), torch.randn(2, 3), torch.randn(5, 3)]
    lying = _Lying([0, 4, 6], shards)
    rows = torch.arange(11)
    expected = [shard.data_ptr() + 12 * i for shard in shards for i in range(len(shard))]
    assert lying.addresses(rows).tolist() == expected
    assert lying.addresses(rows[[1, 5, 10]]).tolist() == [expected[i] for i in (1, 5, 10)]
    assert lying.addresses(rows[:0]).tolist() == []


@pytest.mark.parametrize("rows", [[-1, 3], [3, 6]])
def test_a_row_that_no_shard_has_is_refused(rows):
    with pytest.raises(IndexError, match=f"rows {rows[0]} to {rows[1]} of a table that has 6"):
        _Lying([0, 4], [torch.zeros(4, 3), torch.zeros(2, 3)]).addresses(torch.tensor(rows))


def laid(desk: Desk, counts: list[int], seed: int) -> tuple[File, list[torch.Tensor], list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.arange(count) * 3 for count in counts]
    gradients = [torch.randn(count, 5, generator=generator) for count in counts]
    return desk.lay(ids, gradients), ids, gradients


def test_another_process_reads_from_a_desk_what_was_laid_there_though_it_grows():
    desk, files = Desk(), []
    for seed, counts in enumerate([[0, 0, 0], [3, 0, 2], [4000, 50, 1]]):
        file, ids, gradients = laid(desk, counts, seed)
        found_ids, found = laid_out(file.open(), sum(counts), 5)
        assert torch.equal(found_ids, torch.cat(ids))
        assert torch.equal(found, torch.cat(gradients))
        files.append(file)
    assert files[0] == files[1] != files[2], "a desk is made anew where it is too small, and only there"


def test_gradients_written_to_their_room_are_laid_without_a_copy():
    desk = Desk()
    room = desk.room(5, 4)
    room.copy_(torch.arange(20.0).view(5, 4))
    file = desk.lay([torch.tensor([1, 7]), torch.tensor([0, 2, 3])], list(room.split([2, 3])))
    ids, vectors = laid_out(file.open(), 5, 4)
    assert ids.tolist() == [1, 7, 0, 2, 3]
    assert torch.equal(vectors, room)
    assert desk.room(5, 4).data_ptr() == room.data_ptr()


def test_a_descriptor_that_is_another_file_now_is_not_read(tmp_path):
    wanted = os.memfd_create("wanted")
    os.ftruncate(wanted, 64)
    file = File.of(wanted, 64)
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
