"""Registry: classes by the name that a configuration gives them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from twhin_pipeline.errors import UserError, unknown

T = TypeVar("T")


class Registry(Generic[T]):
    """Classes of one kind by name: `@OPERATORS.register_as("translation")`, `OPERATORS["translation"]`."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._classes: dict[str, type[T]] = {}

    def register_as(self, name: str) -> Callable[[type[T]], type[T]]:
        """Return a decorator that registers a class. Raises ValueError where the name is taken."""

        def register(cls: type[T]) -> type[T]:
            if name in self._classes:
                raise ValueError(f"{self.kind} {name!r} is registered already, by {self._classes[name].__qualname__}")
            self._classes[name] = cls
            return cls

        return register

    def __getitem__(self, name: str) -> type[T]:
        """Return the class of that name. Raises UserError that lists the known names."""
        if name not in self._classes:
            raise UserError(f"{unknown(self.kind, name, self._classes)} (known: {', '.join(sorted(self._classes))})")
        return self._classes[name]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names, in the order they were registered."""
        return iter(self._classes)
