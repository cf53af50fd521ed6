"""What an asset was made from: its key in Dagster, and the version of the code that it ran.

What belongs here: asset keys and code versions. What does not: recording parents and refusing stale ones
(`twhin_pipeline/store/store.py` does both).
https://docs.dagster.io/guides/build/assets/asset-versioning-and-caching
"""

from __future__ import annotations

import ast
import functools
import hashlib
from pathlib import Path

import dagster as dg

import twhin_pipeline
from twhin_pipeline.stages.chain import STAGES
from twhin_pipeline.store import code_version

ENGINE = Path(twhin_pipeline.__file__).parent
_DATA = ("ingest", "vocabulary")
UNREAD = {
    "config.tune": tuple(STAGES),
    "config.retention": tuple(STAGES),
    "config.indexes": tuple(name for name in STAGES if name not in ("index", "publish")),
    "config.maps": tuple(name for name in STAGES if name not in ("map", "publish")),
    "config.reference": tuple(STAGES),
    "config.optimizer": tuple(name for name in STAGES if name not in ("train", "refit")),
    "config.training": _DATA,
    "config.recipes": _DATA,
}
"""Modules of the configuration that every stage imports, by the stages that use no value of their sections
(`stage_settings.settings` says which fields a stage reads)."""


def code(module: str, stage: str) -> str:
    """Return a code version that changes with the code that a stage runs.

    That is the statements of a module of `twhin_pipeline` and of those that it imports. Comments and descriptions do
    not count, nor sections of the configuration that the stage does not read.

    Args:
        module: Where the stage's work begins.
        stage: Its name.
    """
    digest = hashlib.sha256()
    for name, statements in sorted(_reached(module, stage).items()):
        digest.update(f"{name}\n{statements}".encode())
    return f"{code_version()}-{digest.hexdigest()[:8]}"


def _reached(module: str, stage: str) -> dict[str, str]:
    """Return `module` and every module of the engine that it imports, at whatever remove, with its statements' hash.

    Nothing is imported here.
    """
    reached: dict[str, str] = {}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name not in reached and stage not in UNREAD.get(name, ()):
            reached[name], named = _parsed(_path(name).read_text(encoding="utf-8"))
            waiting += [found for found in named if _path(found).is_file()]
    return reached


@functools.cache
def _parsed(text: str) -> tuple[str, tuple[str, ...]]:
    """Return a hash of a module's statements, without lines, comments and descriptions; and what of the engine it may
    name in its import statements, lazy ones too.
    """
    tree, named = ast.parse(text), []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            named += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            named += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(body := getattr(node, "body", None), list):
            node.body = [one for one in body if not _is_text(one)]  # type: ignore[attr-defined]
    found = [name.removeprefix("twhin_pipeline.") for name in named if name.startswith("twhin_pipeline.")]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest(), tuple(found)


def _is_text(statement: ast.stmt) -> bool:
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )


def _path(module: str) -> Path:
    path = ENGINE / module.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def key(table: str) -> dg.AssetKey:
    """Return the asset key of a table of the store: `vocabulary/user` is ["vocabulary", "user"]."""
    return dg.AssetKey(table.split("/"))


def table(key: dg.AssetKey) -> str:
    """Return the table of the store that an asset key stands for."""
    return "/".join(key.path)
