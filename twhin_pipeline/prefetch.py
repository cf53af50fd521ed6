"""Working ahead in threads."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Prefetcher(Generic[T]):
    """Runs an iterator in a background thread, up to `depth` items ahead; its exception is raised to the reader."""

    def __init__(self, items: Iterator[T], depth: int) -> None:
        self.items = items
        self.queue: queue.Queue[tuple[str, Any]] = queue.Queue(depth)
        self.stopping = threading.Event()
        self.thread = threading.Thread(target=self._run, name="prefetch", daemon=True)

    def __enter__(self) -> Prefetcher[T]:
        self.thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stopping.set()
        self.thread.join()

    def __iter__(self) -> Iterator[T]:
        """Yield the items in order."""
        while True:
            kind, value = self.queue.get()
            if kind == "error":
                raise value
            if kind == "end":
                return
            yield value

    def _put(self, kind: str, value: Any) -> bool:
        while not self.stopping.is_set():
            try:
                self.queue.put((kind, value), timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def _run(self) -> None:
        try:
            for item in self.items:
                if not self._put("item", item):
                    return
        except BaseException as error:
            self._put("error", error)
        else:
            self._put("end", None)


def in_order(
    pool: ThreadPoolExecutor, work: Callable[..., Any], given: Iterable[tuple[Any, ...]], ahead: int
) -> Iterator[Any]:
    """Yield what `work` returns for each of `given`, in their order, made in `pool` at most `ahead` at a time."""
    waiting: deque[Future[Any]] = deque()
    for arguments in given:
        waiting.append(pool.submit(work, *arguments))
        if len(waiting) == ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
