"""What all endpoints of a worker share: the current release, the threads that compute, limits and errors."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from typing import Any, TypeVar

from fastapi import Request, Response
from pydantic_core import to_json

from twhin_pipeline.errors import UnavailableError, UserError
from twhin_pipeline.serving.current_release import CurrentRelease, Opened
from twhin_pipeline.serving.metrics import Metrics
from twhin_pipeline.serving.options import ApiKeys, ServeOptions

RELEASE_HEADER = "Twhin-Release"
T = TypeVar("T")


class RequestError(UserError):
    """A request that is refused; `status` says how."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Service:
    """One worker's parts. Endpoints get it by `service_of(request)`."""

    def __init__(self, options: ServeOptions) -> None:
        """Read the API keys; the release is opened later.

        Raises:
            UserError: The keys or the store's address are of no use.
        """
        self.options = options
        self.keys = ApiKeys.read(options.api_key_file)
        self.metrics = Metrics()
        self.current = CurrentRelease(options.home, self.metrics, options.interval, interests=options.interests)
        self._pool = ThreadPoolExecutor(options.threads, "twhin-compute")

    def opened(self) -> Opened:
        """Return the release to answer from; keep it to the request's end. Raises RequestError where none is open."""
        opened = self.current.opened
        if opened is None:
            reason = self.current.failure.reason if self.current.failure else "the release is being opened"
            raise RequestError(HTTPStatus.SERVICE_UNAVAILABLE, f"not ready: {reason}")
        return opened

    async def compute(self, work: Callable[[], T]) -> T:
        """Run work in a thread that computes, so that the event loop goes on. Work that has begun runs to its end."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    async def answer(self, work: Callable[[Opened], dict[str, Any]]) -> Response:
        """Return what `work` says of the current release as JSON that names the release."""
        opened = self.opened()

        def made() -> bytes:
            named = {"release": opened.name, "snapshot": opened.release.snapshot}
            return to_json({**named, **work(opened)}, inf_nan_mode="null")

        return Response(await self.compute(made), media_type="application/json", headers={RELEASE_HEADER: opened.name})

    def without_paths(self, message: str) -> str:
        """Return a message for clients, which need not know where the store is."""
        return message.replace(self.current.store.root, "the store")

    def check_count(self, name: str, asked: Any, *fields: str) -> None:
        """Refuse a request whose `fields` have more than `max_batch` ids together. Raises RequestError."""
        given = [getattr(asked, field) or () for field in fields]
        count = sum(sum(map(len, one.values())) if isinstance(one, dict) else len(one) for one in given)
        if count > self.options.max_batch:
            raise RequestError(
                HTTPStatus.UNPROCESSABLE_ENTITY,
                f"{name}: {count:,} ids, and a request may have {self.options.max_batch:,}; send several requests, or "
                "serve with a larger --max-batch",
            )

    def check_k(self, k: int, ids: int) -> None:
        """Refuse more than `max_k` results of an id, or `max_results` of all `ids` together. Raises RequestError."""
        if k > self.options.max_k:
            raise RequestError(
                HTTPStatus.UNPROCESSABLE_ENTITY,
                f"k: {k:,}, and it may be {self.options.max_k:,} at most; ask for fewer, or serve with a larger "
                "--max-k",
            )

        if k * ids > self.options.max_results:
            raise RequestError(
                HTTPStatus.UNPROCESSABLE_ENTITY,
                f"k: {k:,} for each of {ids:,} ids, and a request may have {self.options.max_results:,} results; send "
                "several requests, or serve with a larger --max-results",
            )

    def close(self) -> None:
        """End the threads; work that has not begun is dropped."""
        self.current.stop()
        self._pool.shutdown(wait=False, cancel_futures=True)


def service_of(request: Request) -> Service:
    """Return the service of a request's application."""
    service: Service = request.app.state.service
    return service


def status_of(error: UserError) -> int:
    """Return the HTTP status of an error of the library."""
    if isinstance(error, RequestError):
        return error.status
    if isinstance(error, KeyError):  # an unknown id, entity type or relation
        return HTTPStatus.NOT_FOUND
    return HTTPStatus.SERVICE_UNAVAILABLE if isinstance(error, UnavailableError) else HTTPStatus.BAD_REQUEST
