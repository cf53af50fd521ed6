"""The endpoints. GET asks for one id, POST for many; both get the same answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from http import HTTPStatus
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse

from twhin_pipeline.serving import schemas
from twhin_pipeline.serving.current_release import Opened
from twhin_pipeline.serving.service import RequestError, Service, service_of
from twhin_pipeline.vectors.entity_table import EntityTable
from twhin_pipeline.vectors.interests import Interests
from twhin_pipeline.vectors.reader import TwhinEmbeddings

INTERESTS = Interests()
ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": schemas.Error, "description": "The release cannot answer this."},
    401: {"model": schemas.Error, "description": "The API key is missing or wrong."},
    404: {"model": schemas.Error, "description": "An id, entity type or relation is unknown."},
    413: {"model": schemas.Error, "description": "The body is too large."},
    421: {"model": schemas.Error, "description": "There is no API key, and the request names another host."},
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
    service.check_k(asked.k, len(asked.ids))
    service.check_count("ids, exclude and edges", asked, "ids", "exclude", "edges")
    if asked.interests and not service.options.interests:
        raise RequestError(HTTPStatus.BAD_REQUEST, "interests: they are not prepared; serve with --interests")

    def work(opened: Opened) -> dict[str, Any]:
        model = opened.model
        relation = asked.relation or model.relations[0]
        heads = next((one.lhs for one in model.config.relations if one.name == relation), "")
        ids, missing = _known(model, heads, asked)
        ask = partial(
            model.recommend, asked.relation, k=asked.k, exclude_known=asked.exclude_known,
            exclude=asked.exclude or None, untrained=asked.untrained, search=asked.search,
            interests=INTERESTS if asked.interests else None, **_new(asked),
        )  # fmt: skip
        found = _found(model.tables.get(heads), ids, ask, "tails", "score")
        _add_probabilities(model, relation, [tail for one in found for tail in one["tails"]])
        return {"relation": relation, "results": found, "missing": missing}

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
    service.check_k(asked.k, len(asked.ids))
    service.check_count("ids and edges", asked, "ids", "edges")

    def work(opened: Opened) -> dict[str, Any]:
        model = opened.model
        ids, missing = _known(model, asked.entity, asked)
        ask = partial(
            model.neighbors, asked.entity, k=asked.k, untrained=asked.untrained, search=asked.search, **_new(asked)
        )
        found = _found(model.tables.get(asked.entity), ids, ask, "neighbors", "similarity")
        return {"entity": asked.entity, "results": found, "missing": missing}

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
    service.check_count("lhs", asked, "lhs")
    service.check_count("rhs", asked, "rhs")

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
    return await _embedding(service_of(request), schemas.EmbeddingMany(entity=asked.entity, ids=[asked.id]))


@answers.post("/embedding", response_model=schemas.Embeddings)
async def embedding_many(request: Request, asked: schemas.EmbeddingMany) -> Response:
    """Return the vectors of several entities of a type."""
    return await _embedding(service_of(request), asked)


async def _embedding(service: Service, asked: schemas.EmbeddingMany) -> Response:
    service.check_count("ids and edges", asked, "ids", "edges")

    def work(opened: Opened) -> dict[str, Any]:
        ids, missing = _known(opened.model, asked.entity, asked)
        vectors = opened.model.get_embedding(asked.entity, ids, **_new(asked))
        return {"entity": asked.entity, "embeddings": vectors.tolist(), "missing": missing}

    return await service.answer(work)


def _known(
    model: TwhinEmbeddings, entity: str, asked: schemas.RecommendMany | schemas.NeighborsMany | schemas.EmbeddingMany
) -> tuple[list[int | str], list[int | str]]:
    """Return the ids to ask the model for, and with `skip` those that it does not have."""
    if asked.missing != "skip" or entity not in model.tables:
        return asked.ids, []
    rows = model.tables[entity].find(asked.ids)
    both: tuple[list[int | str], list[int | str]] = ([], [])
    for id, row in zip(asked.ids, rows.tolist(), strict=True):
        both[row < 0].append(id)
    return both


def _new(asked: schemas.RecommendMany | schemas.NeighborsMany | schemas.EmbeddingMany) -> dict[str, Any]:
    """Return the arguments about ids that have no vector; `skip` has left them out already."""
    return {"missing": "infer", "edges": asked.edges or {}} if asked.missing == "infer" else {}


def _found(
    table: EntityTable | None, ids: Sequence[int | str], ask: Callable[..., Any], of: str, value: str
) -> list[dict[str, Any]]:
    """Return the results of each id: `of` a list with `id` and `value`, the best first."""
    if len(ids) == 1:
        best = ask(ids=ids[0])
        return [{"id": ids[0], of: [{"id": one, value: score} for one, score in best]}]
    answer = ask(ids=list(ids)).read_all() if ids else None
    if answer is None or table is None:
        return []
    keys, others, ranks, values = (column.to_pylist() for column in answer.columns[:4])
    lists: list[dict[str, Any]] = []
    at = 0
    for id, key in zip(ids, _keys(table, ids), strict=True):
        found: list[dict[str, Any]] = []
        # An id that is asked for twice has its rows twice: each begins with rank 1.
        while at < len(keys) and keys[at] == key and ranks[at] == len(found) + 1:
            found.append({"id": others[at], value: values[at]})
            at += 1
        lists.append({"id": id, of: found})
    return lists


def _add_probabilities(model: TwhinEmbeddings, relation: str, tails: list[dict[str, Any]]) -> None:
    """Add the probability of each tail of a relation, None where it is not calibrated."""
    found = model.probabilities(relation, [one["score"] for one in tails])
    for tail, probability in zip(tails, [None] * len(tails) if found is None else found.tolist(), strict=True):
        tail["probability"] = probability


def _keys(table: EntityTable, ids: Sequence[int | str]) -> list[int | str]:
    """Return ids as the table has them: integers may come as texts."""
    return [int(id) for id in ids] if table.index.integer else [str(id) for id in ids]


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
