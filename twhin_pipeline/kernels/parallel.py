"""Compiled loops in torch's own threads.

A second set of threads would compete with torch's, which keep their cores busy while they wait for work. So, where
torch uses GNU OpenMP (as its wheels for Linux do), a loop runs in the same threads; elsewhere it runs in one thread.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numba import carray, types

from twhin_pipeline.kernels import vector_kernels
from twhin_pipeline.kernels.compiled import call, callback, compiled, pointer, take_next

Array = np.ndarray[Any, Any]

# Fewer rows are not worth a second thread.
ROWS_A_THREAD = 500
# Work is split into more parts than threads, so that a thread that finishes early takes another part.
PARTS_A_THREAD = 4
# A frame holds the size of the range, the number of parts, the next part to work on, and the loop's address; then, for
# each argument, its address, its number of rows, and their length.
_CELLS, _SIZE, _PARTS, _NEXT, _LOOP, _HEAD, _SLOT = 88, 0, 1, 2, 3, 4, 3
_OF_A_LOOP = types.void(types.int64, types.int64, types.int64)


class ParallelLoop:
    """A compiled loop over a range, whose parts run in several threads.

    `body(first, last, frame)` is the loop over one part; it reads its arguments from the frame by `floats`, `integers`
    and `number`.
    """

    def __init__(self, body: Callable[..., None]) -> None:
        self.body = body

    @functools.cached_property
    def loop(self) -> Any:
        """The loop, compiled."""
        return callback(_OF_A_LOOP, self.body)

    def __call__(self, size: int, min_part: int, *arguments: Array | float) -> None:
        """Work on `range(size)`, in parts of at least `min_part`, in as many threads as torch may use.

        Args:
            size: Size of the range.
            min_part: Least size of a part; a smaller range than two of these runs in one thread.
            arguments: Arrays in C order, of one or two dimensions, of float32 or int64; and numbers.
        """
        frame = np.zeros(_CELLS, np.int64)
        for i, argument in enumerate(arguments):
            slot = frame[_HEAD + _SLOT * i :]
            if isinstance(argument, np.ndarray):
                assert argument.flags.c_contiguous and argument.dtype in (np.float32, np.int64)
                slot[:3] = argument.ctypes.data, len(argument), argument.shape[1] if argument.ndim == 2 else 1
            else:
                slot[:1] = np.float64(argument).view(np.int64)
        threads = min(torch.get_num_threads(), size // max(min_part, 1))
        runtime = _runtime() if threads > 1 else None
        parts = 1 if runtime is None else min(size // max(min_part, 1), PARTS_A_THREAD * threads)
        frame[_SIZE], frame[_PARTS], frame[_LOOP] = size, parts, self.loop.address
        if runtime is None:
            _worker().ctypes(frame.ctypes.data)
        else:
            runtime.GOMP_parallel(_worker().address, frame.ctypes.data, threads, 0)


@functools.cache
def _worker() -> Any:
    """Return the function that each thread calls with the frame."""
    return callback(types.void(types.int64), _work)


def _work(frame: int) -> None:
    """Take and run parts until none is left."""
    cells = _cells(frame)
    size, parts = cells[_SIZE], cells[_PARTS]
    part = take_next(frame + 8 * _NEXT)
    while part < parts:
        call(cells[_LOOP], size * part // parts, size * (part + 1) // parts, frame)
        part = take_next(frame + 8 * _NEXT)


@functools.cache
def _runtime() -> Any:
    """Return the GNU OpenMP library that torch has loaded, or None."""
    if "parallel backend: OpenMP" not in torch.__config__.parallel_info():
        return None
    try:
        library = ctypes.CDLL("libgomp.so.1", mode=ctypes.RTLD_GLOBAL | os.RTLD_NOLOAD)
        library.GOMP_parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        library.GOMP_parallel.restype = None
    except (OSError, AttributeError):
        return None
    return library


@compiled(inline="always")
def _cells(frame: int) -> Any:
    return carray(pointer(frame), (_CELLS,), np.int64)


@compiled(inline="always")
def size_of(frame: int) -> Any:
    """Return the size of the range."""
    return _cells(frame)[_SIZE]


@compiled(inline="always")
def floats(frame: int, i: int) -> Any:
    """Return argument `i`, `float32 [N, D]`."""
    cells, at = _cells(frame), _HEAD + _SLOT * i
    return carray(pointer(cells[at]), (cells[at + 1], cells[at + 2]), np.float32)


@compiled(inline="always")
def integers(frame: int, i: int) -> Any:
    """Return argument `i`, `int64 [N]`."""
    cells, at = _cells(frame), _HEAD + _SLOT * i
    return carray(pointer(cells[at]), (cells[at + 1],), np.int64)


@compiled(inline="always")
def number(frame: int, i: int) -> Any:
    """Return argument `i`, a float."""
    at = _HEAD + _SLOT * i
    return _cells(frame)[at : at + 1].view(np.float64)[0]


@ParallelLoop
def gather(first: int, last: int, frame: int) -> None:
    """Run `vector_kernels.gather` in parts, by row; arguments as its."""
    vector_kernels.gather(integers(frame, 0)[first:last], floats(frame, 1)[first:last])


@ParallelLoop
def sums(first: int, last: int, frame: int) -> None:
    """Run `vector_kernels.sums` in parts, by sum; arguments as its."""
    vector_kernels.sums(integers(frame, 0), integers(frame, 1)[first : last + 1], floats(frame, 2)[first:last])


@ParallelLoop
def rowwise_adagrad(first: int, last: int, frame: int) -> None:
    """Run `vector_kernels.rowwise_adagrad` in parts, by row of the gradient; arguments as its."""
    index, start, address = integers(frame, 2)[first:last], integers(frame, 3)[first : last + 1], integers(frame, 4)
    numbers = number(frame, 5), number(frame, 6), number(frame, 7)
    vector_kernels.rowwise_adagrad(floats(frame, 0), floats(frame, 1)[:, 0], index, start, address, *numbers)


@ParallelLoop
def adagrad(first: int, last: int, frame: int) -> None:
    """Run `vector_kernels.adagrad` in parts, by row of the gradient; arguments as its."""
    index, start, address = integers(frame, 2)[first:last], integers(frame, 3)[first : last + 1], integers(frame, 4)
    numbers = number(frame, 5), number(frame, 6), number(frame, 7)
    vector_kernels.adagrad(floats(frame, 0), floats(frame, 1), index, start, address, *numbers)


@ParallelLoop
def softmax(first: int, last: int, frame: int) -> None:
    """Run `vector_kernels.softmax` in parts, by row; arguments as its."""
    vector_kernels.softmax(floats(frame, 0)[first:last], floats(frame, 1)[first:last], floats(frame, 2)[first:last, 0])


@ParallelLoop
def dots(first: int, last: int, frame: int) -> None:
    """Run `vector_kernels.dots` in parts, by pair; arguments as its."""
    of_a, of_b = integers(frame, 1)[first:last], integers(frame, 3)[first:last]
    vector_kernels.dots(floats(frame, 0), of_a, floats(frame, 2), of_b, floats(frame, 4)[first:last, 0])


@ParallelLoop
def dots_gradient(first: int, last: int, frame: int) -> None:
    """Add the gradients of `dots`: part 0 to `a`'s, part 1 to `b`'s, so that each row's are added in order.

    Arguments: `a`, `of_a`, `b`, `of_b`, the gradient `[E]` of the products, and those of `a` and of `b`, added to.
    """
    of_a, of_b, scale = integers(frame, 1), integers(frame, 3), floats(frame, 4)[:, 0]
    for part in range(first, last):
        if part == 0:
            vector_kernels.add_scaled_rows(floats(frame, 5), of_a, floats(frame, 2), of_b, scale)
        else:
            vector_kernels.add_scaled_rows(floats(frame, 6), of_b, floats(frame, 0), of_a, scale)
