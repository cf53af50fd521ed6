"""The explorer's pages and what they ask for, all below `/explore` and read only.

Pages are HTML in one frame, scripts and styles without a framework, and nothing is fetched from elsewhere. Answers are
JSON with ids as texts, since JavaScript has no integers of 64 bits.
"""

from __future__ import annotations

import json
import math
import mimetypes
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from string import Template
from typing import Annotated, Any

from fastapi import APIRouter, HTTPException, Query, Response
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, RedirectResponse

from twhin_pipeline.lifecycle import lineage
from twhin_pipeline.serving.explorer import edges, history, map_points
from twhin_pipeline.serving.explorer import search as searching
from twhin_pipeline.serving.explorer.opened import Explorer, Opened
from twhin_pipeline.serving.routes import ERRORS
from twhin_pipeline.views import release_tables

STATIC, CONTENTS = (Path(__file__).parent / name for name in ("static", "pages"))
PAGES = {"./": "search", "entity": "entity", "releases": "releases", "map": "map"}
"""Each page's name by its link: `pages/<name>.html` is put into `pages/frame.html`, and `static/<name>.js` fills it."""
POLICY = (
    "default-src 'none'; script-src 'self'{}; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'self'; frame-ancestors 'none'"
)
"""No script or style but those of this folder runs. WebGL's library builds functions of its own (`'unsafe-eval'`): that
is allowed on the page of the map alone."""
MOST = 100
"""Entities of a list at most."""

Release = Annotated[str | None, Query(description="Name of a release; left out: the current one.", max_length=100)]
Entity = Annotated[str, Query(alias="type", description="Entity type.", max_length=1_000)]
Id = Annotated[str, Query(description="Id of the entity.", max_length=1_000)]
Count = Annotated[int, Query(ge=1, le=MOST, description="How many.")]


class Answer(JSONResponse):
    """JSON in which numbers that are not finite are null."""

    def render(self, content: Any) -> bytes:
        """Return the body."""
        return json.dumps(finite(content), ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def finite(value: Any) -> Any:
    """Return JSON values with None in the place of numbers that are not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(one) for key, one in value.items()}
    return [finite(one) for one in value] if isinstance(value, list | tuple) else value


def make(root: str) -> APIRouter:
    """Return the routes that explore the store at `root` (path or URL)."""
    explorer = Explorer(root)
    routes = APIRouter(prefix="/explore", default_response_class=Answer, tags=["explore"], responses=ERRORS)
    _pages(routes)

    @routes.get("/api/releases")
    def releases() -> dict[str, Any]:
        """List the releases whose vectors are still there, the newest last, and name the one that is shown."""
        there = {one.name for one in explorer.with_vectors()}
        listed = [one for one in release_tables.listed(explorer.store) if one["release"] in there]
        shown = explorer.opened()
        return {"shown": shown.name, "releases": sorted(listed, key=lambda one: (one["created"], one["release"]))}

    @routes.get("/api/release")
    def release(release: Release = None) -> dict[str, Any]:
        """Describe a release: entity types, relations, figures, maps."""
        opened = explorer.opened(release)
        return {
            "release": opened.name,
            "snapshot": opened.snapshot,
            "entities": [
                {"name": name, "count": len(table), "trained": opened.model.count(name), "dim": opened.model.dim}
                for name, table in opened.model.tables.items()
            ],
            "relations": [
                {"name": one.name, "lhs": one.lhs, "rhs": one.rhs, "operator": one.operator}
                for one in opened.model.config.relations
            ],
            "maps": map_points.types(opened),
            "metrics": history.metrics(opened),
        }

    @routes.get("/api/search")
    def search(
        q: Annotated[str, Query(description="An id, its beginning, or a part of it.", max_length=1_000)],
        release: Release = None,
        type: Annotated[str | None, Query(description="Entity type; left out: all.", max_length=1_000)] = None,
        count: Count = 10,
    ) -> list[dict[str, Any]]:
        """Find entities."""
        return [asdict(hit) for hit in searching.search(explorer.opened(release).model, q, count, type)]

    @routes.get("/api/entity")
    def entity(type: Entity, id: Id, release: Release = None, count: Count = 10) -> dict[str, Any]:
        """Describe an entity: what it is linked with in the graph, and the nearest vectors."""
        opened = explorer.opened(release)
        row = opened.row(type, id)
        table = opened.model.tables[type]
        id = opened.id(type, id)
        linked = edges.linked(explorer.cursor(), opened, type, id, count)
        return {
            "type": type,
            "id": id,
            "release": opened.name,
            "snapshot": opened.snapshot,
            "trained": True if table.trained is None else bool(table.trained[row]),
            "linked": None if linked is None else [asdict(one) for one in linked],
            "nearest": _near(opened, type, id, count),
            "relations": [one.name for one in opened.model.config.relations if one.lhs == type],
            "map": type in map_points.types(opened),
        }

    @routes.get("/api/neighbors")
    def neighbors(type: Entity, id: Id, release: Release = None, count: Count = 10) -> dict[str, Any]:
        """List the entities with the nearest vectors; none where the release does not have the entity."""
        opened = explorer.opened(release)
        there = type in opened.model.tables and opened.model.has(type, id)
        return {"release": opened.name, "there": there, "nearest": _near(opened, type, id, count) if there else []}

    @routes.get("/api/recommendations")
    def recommendations(
        relation: Annotated[str, Query(description="Relation.", max_length=1_000)],
        id: Annotated[str, Query(description="Id of the head.", max_length=1_000)],
        release: Release = None,
        count: Count = 10,
    ) -> dict[str, Any]:
        """List the best new tails of a head, each with what in the graph speaks for it."""
        opened = explorer.opened(release)
        best = opened.model.recommend(relation, id, count)
        chosen = next(one for one in opened.model.config.relations if one.name == relation)
        tails = [str(tail) for tail, _ in best]
        chances = opened.model.probabilities(relation, [score for _, score in best])
        found = edges.reasons(explorer.cursor(), opened, relation, opened.id(chosen.lhs, id), tails)
        return {
            "relation": relation,
            "lhs": chosen.lhs,
            "rhs": chosen.rhs,
            "edges": found is not None,
            "recommended": [
                {"id": tail, "score": score, "probability": chance, "reasons": (found or {}).get(tail, [])}
                for tail, (_, score), chance in zip(
                    tails, best, [None] * len(best) if chances is None else chances.tolist(), strict=True
                )
            ],
        }

    @routes.get("/api/history")
    def past(type: Entity, id: Id, release: Release = None, count: Count = 5) -> list[dict[str, Any]]:
        """Follow an entity's vector from release to release."""
        return [asdict(one) for one in history.history(explorer, explorer.opened(release), type, id, count)]

    @routes.get("/api/origin")
    def origin(type: Entity, id: Id, release: Release = None) -> dict[str, Any]:
        """Follow a vector back to its edges and their files, as `twhin lineage` does."""
        opened = explorer.opened(release)
        opened.row(type, id)
        return lineage.trace(explorer.cursor(), explorer.store, type, id, opened.name).as_dict()

    @routes.get("/api/compare")
    def compare(before: Release = None, after: Release = None) -> dict[str, Any]:
        """Put two releases side by side; left out: the newest and the one that was current before it."""
        earlier, later = release_tables.two(explorer.store, before, after)
        opened = explorer.opened(earlier.name), explorer.opened(later.name)
        return {
            "releases": [
                {"release": one.name, "snapshot": one.snapshot, "metrics": history.metrics(one)} for one in opened
            ],
            "drift": history.compared(explorer, *opened),
        }

    @routes.get("/api/map", response_model=None)
    def map_of(type: Entity, release: Release = None) -> Response:
        """Return the points of a map, column by column, with its clusters."""
        return Response(map_points.body(explorer.opened(release), type), media_type="application/json")

    return routes


def _near(opened: Opened, entity: str, id: str, k: int) -> list[dict[str, Any]]:
    return [{"id": str(one), "cosine": cosine} for one, cosine in opened.model.neighbors(entity, id, k)]


def _pages(routes: APIRouter) -> None:
    files = {path.relative_to(STATIC).as_posix(): path for path in sorted(STATIC.rglob("*")) if path.is_file()}

    @routes.get("", include_in_schema=False)
    def without_slash() -> Response:
        return RedirectResponse("explore/")

    @routes.get("/static/{name:path}", include_in_schema=False)
    def static(name: str) -> Response:
        if name not in files:
            raise HTTPException(404, f"no file {name}")
        kind = mimetypes.guess_type(name)[0] or "text/plain"
        return FileResponse(files[name], media_type=kind, headers=_headers())

    def page(text: str, policy: str) -> Callable[[], Response]:
        return lambda: HTMLResponse(text, headers=_headers() | {"Content-Security-Policy": policy})

    for link, name in PAGES.items():
        policy = POLICY.format(" 'unsafe-eval'" if name == "map" else "")
        path = "/" if link == "./" else f"/{link}"
        routes.add_api_route(path, page(page_text(link, name), policy), include_in_schema=False, response_model=None)


def page_text(link: str, name: str) -> str:
    """Return a page's HTML: its content in the frame, where its own link is marked as that of this page."""
    frame, content = ((CONTENTS / f"{one}.html").read_text(encoding="utf-8") for one in ("frame", name))
    frame = frame.replace(f'href="{link}"', f'href="{link}" aria-current="page"')
    return Template(frame).substitute(title=name.capitalize(), page=name, main=content)


def _headers() -> dict[str, str]:
    return {"Cache-Control": "no-cache", "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
