"""How loops are compiled for the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numba

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
