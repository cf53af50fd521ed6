"""The application of one worker: `create_app` puts endpoints, errors and limits together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI, Request, Security
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException

from twhin_pipeline.errors import UserError
from twhin_pipeline.serving import routes
from twhin_pipeline.serving.explorer import router as explorer
from twhin_pipeline.serving.middleware import Around, as_text
from twhin_pipeline.serving.options import ServeOptions
from twhin_pipeline.serving.service import Service, status_of

DESCRIPTION = """Recommendations, neighbors, probabilities and vectors of the current release of a store.

Ids are strings or integers, as the data has them. A response names the release that answered, in the field `release`
and in the header `Twhin-Release`. An error is `{"error": "what was wrong, and what to do"}`."""


def create_app(options: ServeOptions) -> FastAPI:
    """Make the application of one worker.

    The current release is opened when the application starts, before the first request; then it is followed.

    Raises:
        UserError: The API keys or the store's address are of no use.
    """
    service = Service(options)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await asyncio.to_thread(service.current.look)
        service.current.start()
        try:
            yield
        finally:
            service.close()

    # No pages of FastAPI's own: they load scripts from another host.
    app = FastAPI(
        title="twhin serve",
        description=DESCRIPTION,
        version=version("twhin-pipeline"),
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    app.state.service = service
    key = [Security(HTTPBearer(auto_error=False))] if service.keys else []
    app.include_router(routes.answers, dependencies=key)
    app.include_router(explorer.make(options.home), dependencies=key)
    app.include_router(routes.state)
    app.add_exception_handler(UserError, _user_error)
    app.add_exception_handler(RequestValidationError, _wrong_fields)
    app.add_exception_handler(HTTPException, _http_error)
    _with_limits(app, options)
    app.add_middleware(Around, service=service, endpoints=frozenset(app.openapi()["paths"]))
    return app


def _user_error(request: Request, error: Any) -> JSONResponse:
    service: Service = request.app.state.service
    return JSONResponse({"error": service.without_paths(str(error))}, status_of(error))


def _wrong_fields(request: Request, error: Any) -> JSONResponse:
    return JSONResponse({"error": as_text(error.errors())}, 422)


def _http_error(request: Request, error: Any) -> JSONResponse:
    return JSONResponse({"error": str(error.detail)}, error.status_code, error.headers)


def _with_limits(app: FastAPI, options: ServeOptions) -> None:
    """Write the service's limits into its OpenAPI."""
    schema = app.openapi()
    for one in schema["components"]["schemas"].values():
        for name, field in one.get("properties", {}).items():
            if name == "k":
                field["maximum"] = options.max_k
            elif name in ("ids", "lhs", "rhs", "exclude") and field.get("type") == "array":
                field["maxItems"] = options.max_batch
    for path in schema["paths"].values():
        for parameter in path.get("get", {}).get("parameters", []):
            if parameter["name"] == "k":
                parameter["schema"]["maximum"] = options.max_k
