"""How loops are compiled for the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numba
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

F = TypeVar("F", bound=Callable[..., Any])


def compiled(**options: Any) -> Callable[[F], F]:
    """Compile a loop by numba at its first call, to run without Python's lock; keep it on disk where there is a place.

    `options` are numba's. A division by 0 gives inf or NaN, as arrays have it: to look for it would leave a loop with
    one element at a time.
    """

    def compile_it(loop: F) -> F:
        chosen = {"nogil": True, "error_model": "numpy", **options}
        try:
            found: F = numba.njit(cache=True, **chosen)(loop)
        except RuntimeError:  # neither the package's folder nor the user's can be written to
            found = numba.njit(**chosen)(loop)
        return found

    return compile_it


def _to_pointer(typing: Any, address: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), generate


pointer: Any = intrinsic(_to_pointer)
"""In a compiled loop: the pointer to an address, an int64."""
