"""What happens around each request: the key, the limits on size and time, the numbers and the log."""

from __future__ import annotations

import asyncio
import base64
import logging
import time
from http import HTTPStatus
from typing import Any

from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from twhin_pipeline.serving.options import ApiKeys
from twhin_pipeline.serving.service import Service

log = logging.getLogger("twhin.serving")
access = logging.getLogger("twhin.access")
OPEN = ("/healthz", "/readyz")
"""Paths that need no key: those who start and stop processes have none."""
FOR_PEOPLE = "/explore"
"""Paths below this one are pages: there a browser is asked for a password, which is the key."""


class Around:
    """Wraps the application: counts, logs, and refuses what is too large, too slow or without a key."""

    def __init__(self, app: ASGIApp, service: Service, endpoints: frozenset[str]) -> None:
        """Take the application, its service, and the endpoints' paths: any other path is counted as `other`."""
        self.app, self.service, self.endpoints = app, service, endpoints

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.perf_counter(), 0

        async def sent(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        async def refuse(code: int, text: str, **headers: str) -> None:
            if not status:  # else the client has a part of another response
                await JSONResponse({"error": text}, code, headers)(scope, receive, sent)

        try:
            async with asyncio.timeout(self.service.options.time_limit):
                if self._may_enter(scope):
                    await self.app(scope, self._limited(scope, receive), sent)
                else:
                    text = "the API key is missing or wrong; send it as `Authorization: Bearer KEY`"
                    scheme = 'Basic realm="the API key is the password"' if for_people(scope) else "Bearer"
                    await refuse(HTTPStatus.UNAUTHORIZED, text, **{"WWW-Authenticate": scheme})
        except TimeoutError:
            limit = f"{self.service.options.time_limit:g} s"
            text = f"the time limit of {limit} has passed; ask for less at once, or again later"
            await refuse(HTTPStatus.SERVICE_UNAVAILABLE, text, **{"Retry-After": "1"})
        except Exception:
            log.exception("%s %s failed", scope["method"], scope["path"])
            await refuse(HTTPStatus.INTERNAL_SERVER_ERROR, "an error of the service, which its log has")
        finally:
            self._count(scope, status, time.perf_counter() - started)

    def _may_enter(self, scope: Scope) -> bool:
        keys: ApiKeys = self.service.keys
        if not keys or scope["path"] in OPEN:
            return True
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        return keys.open_with(key_in(given))

    def _limited(self, scope: Scope, receive: Receive) -> Receive:
        """Return `receive` that raises an HTTPException where a body is too large, by its header or as it comes."""
        limit, size = self.service.options.max_body, 0
        stated = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        too_large = HTTPException(
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            f"the body may have {limit:,} bytes; send several requests, or serve with a larger --max-body",
        )

        async def limited() -> Message:
            nonlocal size
            if stated.isdigit() and int(stated) > limit:
                raise too_large
            message = await receive()
            size += len(message.get("body", b""))
            if size > limit:
                raise too_large
            return message

        return limited

    def _count(self, scope: Scope, status: int, seconds: float) -> None:
        endpoint = scope["path"] if scope["path"] in self.endpoints else "other"
        self.service.metrics.requests.labels(endpoint, str(status or 499)).inc()
        self.service.metrics.seconds.labels(endpoint).observe(seconds)
        if self.service.options.access_log:  # no ids and no keys: neither the query nor a header
            access.info("%s %s %d %.1f ms", scope["method"], endpoint, status or 499, 1_000 * seconds)


def for_people(scope: Scope) -> bool:
    """Tell whether a path is that of a page."""
    path: str = scope["path"]
    return path == FOR_PEOPLE or path.startswith(f"{FOR_PEOPLE}/")


def key_in(authorization: bytes) -> bytes:
    """Return the key in the header `Authorization`: `Bearer KEY`, or the password of `Basic`; empty where none is."""
    scheme, _, value = authorization.strip().partition(b" ")
    if scheme.lower() == b"bearer":
        return value.strip()
    if scheme.lower() == b"basic":
        try:
            return base64.b64decode(value, validate=True).partition(b":")[2]
        except ValueError:
            return b""
    return b""


def as_text(errors: Any) -> str:
    """Say in one line what is wrong with the fields of a request, as pydantic found it; no value is repeated."""
    lines = []
    for one in errors:
        place = ".".join(str(part) for part in one["loc"] if part not in ("body", "query")) or "the body"
        lines.append(f"{place}: {one['msg'].removeprefix('Value error, ')}")
    return "; ".join(dict.fromkeys(lines))
