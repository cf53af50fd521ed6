"""The endpoints. GET asks for one id, POST for many; both get the same answer."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse

from twhin_pipeline.serving import schemas
from twhin_pipeline.serving.current_release import Opened
from twhin_pipeline.serving.service import Service, service_of

ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": schemas.Error, "description": "The release cannot answer this."},
    401: {"model": schemas.Error, "description": "The API key is missing or wrong."},
    404: {"model": schemas.Error, "description": "An id, entity type or relation is unknown."},
    413: {"model": schemas.Error, "description": "The body is too large."},
    422: {"model": schemas.Error, "description": "A field is missing, wrong or beyond a limit."},
    503: {"model": schemas.Error, "description": "No release is open yet, or the time limit has passed."},
}
answers = APIRouter(responses=ERRORS, tags=["answers"])
state = APIRouter(tags=["state"])


@answers.get("/recommend", response_model=schemas.Recommendations)
async def recommend_one(request: Request, asked: Annotated[schemas.RecommendOne, Query()]) -> Response:
    """Recommend new tails to one head."""
    many = schemas.RecommendMany(ids=[asked.id], **asked.model_dump(exclude={"id"}))
    return await _recommend(service_of(request), many)


@answers.post("/recommend", response_model=schemas.Recommendations)
async def recommend_many(request: Request, asked: schemas.RecommendMany) -> Response:
    """Recommend new tails to several heads."""
    return await _recommend(service_of(request), asked)


async def _recommend(service: Service, asked: schemas.RecommendMany) -> Response:
    service.check_k(asked.k)
    service.check_count("ids and exclude", len(asked.ids) + len(asked.exclude))

    def work(opened: Opened) -> dict[str, Any]:
        model = opened.model
        excluded = {str(one) for one in asked.exclude}
        results = []
        for id in asked.ids:
            best = model.recommend(
                asked.relation, id, asked.k + len(excluded), asked.exclude_known, untrained=asked.untrained
            )
            kept = [(tail, score) for tail, score in best if str(tail) not in excluded][: asked.k]
            results.append({"id": id, "tails": [{"id": tail, "score": score} for tail, score in kept]})
        return {"relation": asked.relation or model.relations[0], "results": results}

    return await service.answer(work)


@answers.get("/neighbors", response_model=schemas.Neighbors)
async def neighbors_one(request: Request, asked: Annotated[schemas.NeighborsOne, Query()]) -> Response:
    """Return the nearest entities of the same type."""
    many = schemas.NeighborsMany(ids=[asked.id], **asked.model_dump(exclude={"id"}))
    return await _neighbors(service_of(request), many)


@answers.post("/neighbors", response_model=schemas.Neighbors)
async def neighbors_many(request: Request, asked: schemas.NeighborsMany) -> Response:
    """Return the nearest entities of the same type, of several entities."""
    return await _neighbors(service_of(request), asked)


async def _neighbors(service: Service, asked: schemas.NeighborsMany) -> Response:
    service.check_k(asked.k)
    service.check_count("ids", len(asked.ids))

    def work(opened: Opened) -> dict[str, Any]:
        results = []
        for id in asked.ids:
            near = opened.model.neighbors(asked.entity, id, asked.k, untrained=asked.untrained)
            results.append({"id": id, "neighbors": [{"id": one, "similarity": cosine} for one, cosine in near]})
        return {"entity": asked.entity, "results": results}

    return await service.answer(work)


@answers.get("/score", response_model=schemas.Probabilities)
async def score_one(request: Request, asked: Annotated[schemas.ScoreOne, Query()]) -> Response:
    """Return the probability that a head has a relation to a tail."""
    many = schemas.ScoreMany(lhs=[asked.lhs], rhs=[asked.rhs], relation=asked.relation)
    return await _score(service_of(request), many)


@answers.post("/score", response_model=schemas.Probabilities)
async def score_many(request: Request, asked: schemas.ScoreMany) -> Response:
    """Return the probabilities of several edges."""
    return await _score(service_of(request), asked)


async def _score(service: Service, asked: schemas.ScoreMany) -> Response:
    service.check_count("lhs", len(asked.lhs))
    service.check_count("rhs", len(asked.rhs))

    def work(opened: Opened) -> dict[str, Any]:
        model = opened.model
        lhs, rhs = (side[0] if len(side) == 1 else side for side in (asked.lhs, asked.rhs))
        found = model.predict_relation(lhs, rhs, asked.relation)
        probabilities = [found] if isinstance(found, float) else found.tolist()
        return {"relation": asked.relation or model.relations[0], "probabilities": probabilities}

    return await service.answer(work)


@answers.get("/embedding", response_model=schemas.Embeddings)
async def embedding_one(request: Request, asked: Annotated[schemas.EmbeddingOne, Query()]) -> Response:
    """Return the vector of an entity."""
    return await _embedding(service_of(request), asked.entity, [asked.id])


@answers.post("/embedding", response_model=schemas.Embeddings)
async def embedding_many(request: Request, asked: schemas.EmbeddingMany) -> Response:
    """Return the vectors of several entities of a type."""
    return await _embedding(service_of(request), asked.entity, asked.ids)


async def _embedding(service: Service, entity: str, ids: Sequence[int | str]) -> Response:
    service.check_count("ids", len(ids))

    def work(opened: Opened) -> dict[str, Any]:
        return {"entity": entity, "embeddings": opened.model.get_embedding(entity, ids).tolist()}

    return await service.answer(work)


@state.get("/healthz", response_model=schemas.Health)
async def healthz() -> Response:
    """Tell that the process is alive."""
    return JSONResponse({"status": "alive"})


@state.get("/readyz", response_model=schemas.Readiness, responses={503: {"model": schemas.Readiness}})
async def readyz(request: Request) -> Response:
    """Tell whether a release is open; 503 where none is."""
    service = service_of(request)
    opened, failure = service.current.opened, service.current.failure
    since = datetime.fromtimestamp(opened.since, UTC).isoformat(timespec="seconds") if opened else None
    failed = failure and {"release": failure.release, "reason": service.without_paths(failure.reason)}
    content = {
        "ready": opened is not None,
        "release": opened and opened.name,
        "snapshot": opened and opened.release.snapshot,
        "since": since,
        "failed": failed,
    }
    return JSONResponse(content, 503 if opened is None else 200)


@state.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def metrics(request: Request) -> Response:
    """Return the numbers of all workers for Prometheus."""
    text = await asyncio.to_thread(service_of(request).metrics.text)
    return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")
