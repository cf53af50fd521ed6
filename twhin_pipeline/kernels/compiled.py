"""How loops are compiled for the CPU, and cached on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numba
from llvmlite import ir
from numba import types
from numba.core import caching, cgutils
from numba.extending import intrinsic

F = TypeVar("F", bound=Callable[..., Any])
FOLDER = Path(__file__).resolve().parent.parent


@cache
def _sources() -> bytes:
    """Return a hash of every module that has compiled loops: those that import this one."""
    texts = [Path(__file__).read_bytes(), *(path.read_bytes() for path in sorted(FOLDER.glob("*/*.py")))]
    loops = texts[:1] + [text for text in texts[1:] if b"from twhin_pipeline.kernels.compiled import" in text]
    return hashlib.sha256(b"".join(loops)).digest()


class _OfAllSources:
    """Where a loop of this package is cached: as in numba, but recompiled when any module with loops has changed.

    numba compares only the loop's own file, so a loop would keep calling old versions of what it calls.
    """

    @classmethod
    def from_function(cls, function: Any, file: str) -> Any:
        ours = FOLDER in Path(file).resolve().parents
        return super().from_function(function, file) if ours else None  # type: ignore[misc]

    def get_source_stamp(self) -> bytes:
        return _sources()

    def get_disambiguator(self) -> str:
        """Return a part of the file's name: what older sources left may name types that are gone, and is not opened."""
        return f"{super().get_disambiguator() or ''}{_sources().hex()[:8]}"  # type: ignore[misc]


# numba has no public way to say when a cached loop is stale; these private names are those of numba 0.61 to 0.68
# (pyproject.toml allows no later one). All of numba uses the list, so our entries come first and decline other files.
_locators: list[Any] = caching.CompileResultCacheImpl._locator_classes
_locators[:0] = [
    type(kind.__name__, (_OfAllSources, kind), {})
    for kind in (caching.UserProvidedCacheLocator, caching.InTreeCacheLocator, caching.UserWideCacheLocator)
    if kind in _locators
]


def compiled(**options: Any) -> Callable[[F], F]:
    """Compile a loop by numba at its first call, to run without Python's lock; cache it on disk where possible.

    `options` are numba's. A division by 0 gives inf or NaN, as arrays have it: checking for it would keep a loop from
    using vector instructions.
    """

    def compile_it(loop: F) -> F:
        chosen = {"nogil": True, "error_model": "numpy", **options}
        try:
            jitted: F = numba.njit(cache=True, **chosen)(loop)
        except RuntimeError:  # neither the package's folder nor the user's can be written to
            jitted = numba.njit(**chosen)(loop)
        return jitted

    return compile_it


def callback(signature: Any, loop: Callable[..., Any]) -> Any:
    """Compile a loop for C to call: as `compiled`, but at once, with its types as numba's `signature` has them.

    Returns:
        numba's CFunc, which has an `address`; it must stay alive while it is called.
    """
    try:
        return numba.cfunc(signature, cache=True, error_model="numpy")(loop)
    except RuntimeError:
        return numba.cfunc(signature, error_model="numpy")(loop)


def _to_pointer(typing: Any, address: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), generate


pointer: Any = intrinsic(_to_pointer)
"""In a compiled loop: the pointer to an address, an int64."""


def _reader(bits: int) -> Any:
    def to_read(typing: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            place = builder.inttoptr(arguments[0], ir.IntType(bits).as_pointer())
            return builder.load(place, align=1)

        return getattr(types, f"uint{bits}")(types.int64), generate

    return intrinsic(to_read)


read_byte: Any = _reader(8)
"""In a compiled loop: the byte at an address, an int64; uint8."""
read_word: Any = _reader(64)
"""In a compiled loop: the eight bytes at an address, an int64, aligned or not; uint64."""


def _to_call(typing: Any, address: Any, first: Any, last: Any, frame: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        number = ir.IntType(64)
        kind = ir.FunctionType(ir.VoidType(), [number] * 3).as_pointer()
        builder.call(builder.inttoptr(arguments[0], kind), arguments[1:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), generate


call: Any = intrinsic(_to_call)
"""In a compiled loop: call a C function `void (int64_t, int64_t, int64_t)` by its address, with three numbers."""


def _to_take_next(typing: Any, address: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        number = ir.IntType(64)
        counter = builder.inttoptr(arguments[0], number.as_pointer())
        return builder.atomic_rmw("add", counter, number(1), "seq_cst")

    return types.int64(types.int64), generate


take_next: Any = intrinsic(_to_take_next)
"""In a compiled loop: add 1 to the int64 at an address, which other threads do too, and return what it was."""
