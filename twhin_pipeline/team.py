"""Compiled loops in torch's own threads.

Threads of ours beside torch's would wait for cores on which torch's spin for their next work. So, where torch's threads
are those of GNU OpenMP (as in its wheels for Linux), a loop is given to the same team; elsewhere it runs in one thread.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from numba import carray, types

from twhin_pipeline import kernels
from twhin_pipeline.compiled import compiled, pointer

Array = np.ndarray[Any, Any]

# Fewer are not worth a second thread.
ROWS_A_THREAD = 500
_HEAD, _SLOT = 1, 3
_thread_number: Any = types.ExternalFunction("omp_get_thread_num", types.int32())
_team_size: Any = types.ExternalFunction("omp_get_num_threads", types.int32())


class TeamLoop:
    """A compiled loop over part of a range, that a team can share.

    `body(first, last, frame)` gets its arguments from the frame by `floats`, `integers` and `number`.
    """

    def __init__(self, body: Callable[..., None]) -> None:
        self.body = body
        self.alone = compiled()(body)

    @functools.cached_property
    def shared(self) -> Any:
        """The loop as a function that each thread of a team calls."""
        body = self.alone

        def part(data: Any) -> None:
            frame = carray(data, 64)
            # A team may be smaller than was asked for, as where the environment limits it.
            thread, parts, size = _thread_number(), _team_size(), frame[0]
            body(size * thread // parts, size * (thread + 1) // parts, frame)

        return numba.cfunc(types.void(types.CPointer(types.int64)))(part)

    def __call__(self, size: int, least: int, *arguments: Array | float) -> None:
        """Work on `range(size)`, in parts of at least `least`, as many at a time as torch may use threads.

        Args:
            size: Of the range.
            least: Of a part; a range smaller than two of these is not shared.
            arguments: Arrays in C order, of one or two dimensions, of float32 or int64; and numbers.
        """
        frame = np.zeros(64, np.int64)
        frame[0] = size
        for i, argument in enumerate(arguments):
            slot = frame[_HEAD + _SLOT * i :]
            if isinstance(argument, np.ndarray):
                assert argument.flags.c_contiguous and argument.dtype in (np.float32, np.int64)
                slot[:3] = argument.ctypes.data, len(argument), argument.shape[1] if argument.ndim == 2 else 1
            else:
                slot[:1] = np.float64(argument).view(np.int64)
        parts = min(torch.get_num_threads(), size // max(least, 1))
        runtime = _runtime() if parts > 1 else None
        if runtime is None:
            self.alone(0, size, frame)
            return
        runtime.GOMP_parallel(self.shared.address, frame.ctypes.data, parts, 0)


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
def floats(frame: Array, i: int) -> Any:
    """Return argument `i`, `float32 [N, D]`."""
    at = _HEAD + _SLOT * i
    return carray(pointer(frame[at]), (frame[at + 1], frame[at + 2]), np.float32)


@compiled(inline="always")
def integers(frame: Array, i: int) -> Any:
    """Return argument `i`, `int64 [N]`."""
    at = _HEAD + _SLOT * i
    return carray(pointer(frame[at]), (frame[at + 1],), np.int64)


@compiled(inline="always")
def number(frame: Array, i: int) -> Any:
    """Return argument `i`, a float."""
    return frame[_HEAD + _SLOT * i : _HEAD + _SLOT * i + 1].view(np.float64)[0]


@TeamLoop
def gather(first: int, last: int, frame: Array) -> None:
    """Share `kernels.gather` by rows; arguments as its."""
    kernels.gather(integers(frame, 0)[first:last], floats(frame, 1)[first:last])


@TeamLoop
def sums(first: int, last: int, frame: Array) -> None:
    """Share `kernels.sums` by sums; arguments as its."""
    kernels.sums(integers(frame, 0), integers(frame, 1)[first : last + 1], floats(frame, 2)[first:last])


@TeamLoop
def rowwise_adagrad(first: int, last: int, frame: Array) -> None:
    """Share `kernels.rowwise_adagrad` by rows of the gradient; arguments as its."""
    index, start, address = integers(frame, 2)[first:last], integers(frame, 3)[first : last + 1], integers(frame, 4)
    numbers = number(frame, 5), number(frame, 6), number(frame, 7)
    kernels.rowwise_adagrad(floats(frame, 0), floats(frame, 1)[:, 0], index, start, address, *numbers)


@TeamLoop
def adagrad(first: int, last: int, frame: Array) -> None:
    """Share `kernels.adagrad` by rows of the gradient; arguments as its."""
    index, start, address = integers(frame, 2)[first:last], integers(frame, 3)[first : last + 1], integers(frame, 4)
    numbers = number(frame, 5), number(frame, 6), number(frame, 7)
    kernels.adagrad(floats(frame, 0), floats(frame, 1), index, start, address, *numbers)


@TeamLoop
def softmax(first: int, last: int, frame: Array) -> None:
    """Share `kernels.softmax` by rows; arguments as its."""
    kernels.softmax(floats(frame, 0)[first:last], floats(frame, 1)[first:last], floats(frame, 2)[first:last, 0])


@TeamLoop
def dots(first: int, last: int, frame: Array) -> None:
    """Share `kernels.dots` by pairs; arguments as its."""
    of_a, of_b = integers(frame, 1)[first:last], integers(frame, 3)[first:last]
    kernels.dots(floats(frame, 0), of_a, floats(frame, 2), of_b, floats(frame, 4)[first:last, 0])


@TeamLoop
def dots_gradient(first: int, last: int, frame: Array) -> None:
    """Add the gradients of `dots`: part 0 to `a`'s, part 1 to `b`'s, so that each row's come in order.

    Arguments: `a`, `of_a`, `b`, `of_b`, the gradient `[E]` of the products, and those of `a` and of `b`, added to.
    """
    of_a, of_b, scale = integers(frame, 1), integers(frame, 3), floats(frame, 4)[:, 0]
    for part in range(first, last):
        if part == 0:
            kernels.add_scaled_rows(floats(frame, 5), of_a, floats(frame, 2), of_b, scale)
        else:
            kernels.add_scaled_rows(floats(frame, 6), of_b, floats(frame, 0), of_a, scale)
