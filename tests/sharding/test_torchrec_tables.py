"""Sharded tables on the CPU: our loops do what fbgemm's kernels do."""

import copy

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torch import nn

from twhin_pipeline.sharding.torchrec_tables import use_compiled_loops

ROWS, DIM = (40, 25, 30), 12


def tables(optimizer: EmbOptimType, precision: SparseType = SparseType.FP32) -> SplitTableBatchedEmbeddingBagsCodegen:
    """Three tables; the last but one has two features."""
    torch.manual_seed(0)
    made = SplitTableBatchedEmbeddingBagsCodegen(
        embedding_specs=[(rows, DIM, EmbeddingLocation.HOST, ComputeDevice.CPU) for rows in ROWS],
        feature_table_map=[0, 1, 1, 2],
        pooling_mode=PoolingMode.NONE,
        optimizer=optimizer,
        weights_precision=precision,
        learning_rate=0.3,
        eps=1e-3,
    )
    for weight in made.split_embedding_weights():
        weight.normal_()
    return made


def batch(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices of two samples a feature, with repeats within and between them; one feature has none."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([5, 9, 4, 0, 6, 7, 0, 0] if seed % 2 else [5, 9, 4, 2, 6, 7, 1, 3])
    rows = torch.tensor(ROWS)[[0, 0, 1, 1, 1, 1, 2, 2]].repeat_interleave(lengths)
    indices = (torch.rand(len(rows), generator=generator) * rows * 0.4).long()
    return indices, torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])


@pytest.mark.parametrize("optimizer", [EmbOptimType.EXACT_ROWWISE_ADAGRAD, EmbOptimType.EXACT_ADAGRAD])
def test_steps_are_those_of_fbgemms_kernels(optimizer):
    reference, ours = tables(optimizer), tables(optimizer)
    assert use_compiled_loops(nn.ModuleList([ours])) == 1
    before = copy.deepcopy([weight.clone() for weight in ours.split_embedding_weights()])
    for step in range(4):
        for made in (reference, ours):
            made.set_learning_rate(0.3 / (step + 1))
        indices, offsets = batch(step)
        found = [made(indices=indices, offsets=offsets) for made in (reference, ours)]
        assert found[0].shape == found[1].shape == (len(indices), DIM)
        torch.testing.assert_close(*found)
        gradient = torch.randn(len(indices), DIM, generator=torch.Generator().manual_seed(step))
        for value in found:
            value.backward(gradient)
        for expected, got in zip(reference.split_embedding_weights(), ours.split_embedding_weights(), strict=True):
            torch.testing.assert_close(got, expected)
        for expected, got in zip(reference.split_optimizer_states(), ours.split_optimizer_states(), strict=True):
            torch.testing.assert_close(got[0].flatten(), expected[0].flatten())
    assert all((old != new).any() for old, new in zip(before, ours.split_embedding_weights(), strict=True))


@pytest.mark.parametrize(
    ("optimizer", "precision"),
    [(EmbOptimType.EXACT_SGD, SparseType.FP32), (EmbOptimType.EXACT_ROWWISE_ADAGRAD, SparseType.FP16)],
)
def test_what_our_loops_do_not_know_is_left_to_fbgemm(optimizer, precision):
    assert use_compiled_loops(nn.ModuleList([tables(optimizer, precision)])) == 0


def test_nothing_is_updated_where_no_gradient_is_asked_for():
    made = tables(EmbOptimType.EXACT_ROWWISE_ADAGRAD)
    use_compiled_loops(nn.ModuleList([made]))
    before = [weight.clone() for weight in made.split_embedding_weights()]
    with torch.no_grad():
        found = made(*batch(0))
    assert not found.requires_grad
    assert all(torch.equal(a, b) for a, b in zip(before, made.split_embedding_weights(), strict=True))
