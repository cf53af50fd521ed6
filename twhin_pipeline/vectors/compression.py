"""Vectors in fewer bytes, and what that costs: 16 bits, 8 bits with scales, and product quantization."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np

from twhin_pipeline import extras
from twhin_pipeline.errors import UserError
from twhin_pipeline.vectors.index_choice import LEAST_FOR_PQ

DataType = Literal["fp32", "fp16", "int8", "pq"]
VECTORS, SCALE, CODEBOOKS = "embedding", "scale", "codebooks"
CODE_ELEMENTS = (4, 3, 2, 1)
"""Elements of a vector that become one byte: the first of these that divides its length."""
LEARNED_ROWS = 65_536
DATA_TYPES: tuple[DataType, ...] = get_args(DataType)
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Codec:
    """How vectors float32 `[n, D]` become arrays of n rows, and back."""

    encode: Callable[[np.ndarray], Arrays]
    """Returns `embedding` `[n, …]`, and with `int8` its `scale` `[n]`."""
    decode: Callable[[Arrays], np.ndarray]
    """Returns vectors float32 `[n, D]`."""
    shared: Arrays = field(default_factory=dict)
    """What all vectors need besides: with `pq` the `codebooks` float32 `[M, 256, D / M]`."""


def codec(data_type: DataType, sample: np.ndarray, name: str, seed: int = 0) -> Codec:
    """Return the codec of a type.

    Args:
        data_type: Which.
        sample: Some of the vectors, `[S, D]`, that codebooks are learned from; `fp32`, `fp16` and `int8` learn nothing.
        name: The entity type, for errors.
        seed: Of the codebooks.

    Raises:
        UserError: `pq` has too few vectors, or FAISS is missing.
    """
    if data_type == "int8":
        return Codec(_to_int8, lambda arrays: arrays[VECTORS] * arrays[SCALE][:, np.newaxis])
    if data_type == "pq":
        return _product_codes(sample, name, seed)
    element = np.dtype({"fp32": np.float32, "fp16": np.float16}[data_type])
    return Codec(
        lambda vectors: {VECTORS: vectors.astype(element, copy=False)},
        lambda arrays: arrays[VECTORS].astype(np.float32, copy=False),
    )


def _to_int8(vectors: np.ndarray) -> Arrays:
    """Scale each vector so that its largest element is 127.

    A scale for each dimension would be that of its longest vectors, and leave short ones few of the 255 values.
    """
    scale = np.abs(vectors).max(axis=1, initial=0) / np.float32(127)
    codes = np.rint(vectors / np.where(scale > 0, scale, 1)[:, np.newaxis])
    return {VECTORS: codes.astype(np.int8), SCALE: scale.astype(np.float32)}


def _product_codes(sample: np.ndarray, name: str, seed: int) -> Codec:
    """Learn codebooks (product quantization; Jégou et al., 2011): each part of a vector becomes its nearest entry."""
    extras.need("faiss", "--data-type pq")
    import faiss

    if len(sample) < LEAST_FOR_PQ:
        raise UserError(
            f"{name} has {len(sample):,} vectors, and pq learns its codebooks from {LEAST_FOR_PQ:,} at least; take "
            "int8, or leave the type out (--entity names those to write)"
        )
    dim = sample.shape[1]
    parts = dim // next(size for size in CODE_ELEMENTS if dim % size == 0)
    quantizer: Any = faiss.ProductQuantizer(dim, parts, 8)
    quantizer.cp.seed = seed
    quantizer.train(np.ascontiguousarray(sample[:LEARNED_ROWS], np.float32))
    books = faiss.vector_to_array(quantizer.centroids).reshape(parts, 256, dim // parts)

    def decode(arrays: Arrays) -> np.ndarray:
        codes = arrays[VECTORS]
        return books[np.arange(parts), codes].reshape(len(codes), dim)

    return Codec(
        lambda vectors: {VECTORS: quantizer.compute_codes(np.ascontiguousarray(vectors, np.float32))},
        decode,
        {CODEBOOKS: books},
    )


def loss(codec: Codec, vectors: np.ndarray, k: int = 10, queries: int = 500) -> dict[str, float]:
    """Measure what compression costs: neighbors among decompressed vectors against those among the vectors.

    Args:
        codec: The compression.
        vectors: float32 `[N, D]`; the first of them ask for their k nearest by cosine.
        k: How many.
        queries: How many ask at most.

    Returns:
        `recall@k`, the share of the nearest that are found again; and `error`, the share of the vectors' sum of squares
        that is lost.

    Raises:
        UserError: torch is missing.
    """
    extras.need("torch", "measuring what compression costs", "reader")
    from twhin_pipeline.model.comparators import Cosine
    from twhin_pipeline.vectors.retrieval import ExactSearch
    from twhin_pipeline.vectors.row_pairs import RowPairs

    if len(vectors) < 2:
        return {}
    again = codec.decode(codec.encode(vectors))
    k, asked = min(k, len(vectors) - 1), vectors[:queries]
    asked = asked / np.maximum(np.linalg.norm(asked, axis=1, keepdims=True), np.float32(1e-8))
    own = RowPairs(np.arange(len(asked)), np.arange(len(asked)))
    true, found = (ExactSearch(Cosine(), table).search(asked, k, own)[0] for table in (vectors, again))
    shared = [len(set(one) & set(other)) for one, other in zip(true.tolist(), found.tolist(), strict=True)]
    error = float(np.square(vectors - again).sum() / max(float(np.square(vectors).sum()), 1e-30))
    return {f"recall@{k}": sum(shared) / (k * len(asked)), "error": error}
