"""The tracking server or database: where it is, whether it can be used, and calls of it that end in time.

A server that is away or slow must not hold up what it only watches. Every call has a time limit, and MLflow's own
retries, which take minutes, are off.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, unquote, urlsplit

from twhin_pipeline import extras
from twhin_pipeline.errors import UserError
from twhin_pipeline.store import Store

OFF_ENV = "TWHIN_NO_TRACKING"
"""With 1, nothing is tracked (`--no-tracking`)."""
SERVER_LIMIT_S, DATABASE_LIMIT_S = 10.0, 120.0
"""How long a call may take. A new SQLite file is filled by dozens of migrations, which take long on a busy machine."""
SERVERS = ("http://", "https://", "databricks")
# What MLflow can write artifacts to (its own registry of them takes a second to import).
ARTIFACT_PROTOCOLS = {"s3", "gs", "wasbs", "abfss", "ftp", "sftp", "dbfs", "hdfs", "viewfs"}
REMEDY = "mend MLFLOW_TRACKING_URI, or track nothing with --no-tracking"
Result = TypeVar("Result")


class Away(Exception):  # noqa: N818 (it is what happened, not what to mend)
    """The tracking server does not answer, or not in time."""


def is_off() -> bool:
    """Tell whether nothing is to be tracked."""
    return os.environ.get(OFF_ENV, "").lower() not in ("", "0", "false", "no")


def uri(store: Store) -> str:
    """Return the tracking URI: MLFLOW_TRACKING_URI, else SQLite in the store (for a remote store, in `./.twhin`)."""
    variable = os.environ.get("MLFLOW_TRACKING_URI")
    if variable:
        path = sqlite_path(variable)
        # Ranks and servers may work in other folders.
        return variable if path is None or path.is_absolute() else sqlite_uri(path.absolute())
    folder = store.root if store.is_local else str(Path(".twhin").absolute())
    return sqlite_uri(Path(folder, "mlflow.db"))


def sqlite_uri(path: Path) -> str:
    """Return the URL of a SQLite file, in which some signs of a path mean something else."""
    return f"sqlite:///{str(path).replace('%', '%25').replace('?', '%3F').replace('#', '%23')}"


def sqlite_path(tracking_uri: str) -> Path | None:
    """Return the SQLite file of a tracking URI; None where it is another kind of URI, or in memory."""
    if not tracking_uri.startswith("sqlite:///"):
        return None
    rest = unquote(tracking_uri.removeprefix("sqlite:///").partition("?")[0])
    return Path(rest) if rest and not rest.startswith(("file:", ":memory:")) else None


def is_server(tracking_uri: str) -> bool:
    """Tell whether a tracking URI is a server's, and not a database's."""
    return tracking_uri.startswith(SERVERS)


def artifact_root(store: Store) -> str | None:
    """Return where a new experiment's artifacts go, or None where a tracking server decides.

    That is the store; or, where MLflow does not know the store's protocol, a folder under the working directory.
    """
    if is_server(uri(store)):
        return None
    if not store.is_local and store.root.partition("://")[0] in ARTIFACT_PROTOCOLS:
        return store.path("mlartifacts")
    folder = store.path("mlartifacts") if store.is_local else str(Path(".twhin", "mlartifacts").absolute())
    # MLflow takes a path for a URL, in which `%20` is a space.
    return Path(folder).as_uri() if any(sign in folder for sign in "?#%") else folder


def connect(store: Store) -> Any:
    """Return a client of the store's tracking server and registry; MLflow's own telemetry and notices are off."""
    extras.need("mlflow", "reading or writing runs and registered models")
    settings = {
        # MLflow's own telemetry is not ours to send.
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": str(int(SERVER_LIMIT_S)),
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    }
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    import logging

    # The migrations of a new SQLite file are no news to a user.
    logging.getLogger("alembic").setLevel(logging.WARNING)
    # It logs errors of a database with a traceback, besides raising them.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    from mlflow import MlflowClient

    if (path := sqlite_path(uri(store))) is not None and "MLFLOW_TRACKING_URI" not in os.environ:
        path.parent.mkdir(parents=True, exist_ok=True)
    return MlflowClient(tracking_uri=uri(store), registry_uri=os.environ.get("MLFLOW_REGISTRY_URI") or uri(store))


def limit_s(store: Store) -> float:
    """Return how long a call may take."""
    return SERVER_LIMIT_S if is_server(uri(store)) else DATABASE_LIMIT_S


def within(seconds: float, call: Callable[[], Result]) -> Result:
    """Return what a call returns. Raises Away where it has not by then; it then ends by itself, or with the process."""
    result: list[Result] = []
    failed: list[BaseException] = []

    def work() -> None:
        try:
            result.append(call())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=work, daemon=True, name="tracking")
    thread.start()
    thread.join(seconds)
    if failed:
        raise failed[0]
    if not result:
        raise Away(f"no answer within {seconds:g} s")
    return result[0]


def reason(error: BaseException) -> str:
    """Return what an error says in one line, without the statement of SQL that a database failed at."""
    text = " ".join(str(error).partition("[SQL:")[0].split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]}…"


def check(store: Store) -> str | None:
    """Look at the tracking server before there is something to lose; it takes seconds at most.

    Returns:
        None where it can be used, else why it cannot be used now, such as an outage.

    Raises:
        UserError: It will never work: the URI is none, or names a file that is no database or cannot be written.
    """
    tracking_uri = uri(store)
    if (path := sqlite_path(tracking_uri)) is not None:
        _check_file(path, given="MLFLOW_TRACKING_URI" in os.environ)
        return None
    if not is_server(tracking_uri):
        scheme = urlsplit(tracking_uri).scheme
        if scheme not in ("postgresql", "mysql", "mssql") and "+" not in scheme:
            raise UserError(
                f"MLFLOW_TRACKING_URI={tracking_uri!r}: is none of http://…, https://…, databricks, sqlite:///FILE, "
                f"postgresql://… or mysql://…; {REMEDY}"
            )
    client = connect(store)
    try:
        within(SERVER_LIMIT_S, lambda: client.search_experiments(max_results=1))
    except Exception as error:
        code = getattr(error, "get_http_status_code", lambda: 500)()
        if code in (401, 403):
            raise UserError(f"MLFLOW_TRACKING_URI={tracking_uri!r}: refuses us ({reason(error)}); {REMEDY}") from error
        return f"{tracking_uri}: {reason(error)}"
    return None


def _check_file(path: Path, given: bool) -> None:
    """Raise UserError where MLflow cannot keep its runs in a SQLite file."""
    name = f"MLFLOW_TRACKING_URI: {path}" if given else str(path)
    if given and not path.parent.is_dir():
        raise UserError(f"{name}: there is no folder {path.parent}; {REMEDY}")
    if not path.exists():
        if path.parent.is_dir() and not os.access(path.parent, os.W_OK):
            raise UserError(f"{name}: the folder cannot be written; {REMEDY}")
        return
    try:
        with closing(sqlite3.connect(f"file:{quote(str(path))}?mode=rw", uri=True, timeout=5)) as con:
            con.execute("SELECT count(*) FROM sqlite_master").fetchone()
            con.execute("BEGIN IMMEDIATE")
            con.execute("CREATE TABLE twhin_can_write (x)")  # taken back at once
            con.execute("ROLLBACK")
    except sqlite3.DatabaseError as error:
        if "locked" not in str(error):  # by somebody who writes: then it is a database
            raise UserError(f"{name}: cannot be used as a SQLite database ({error}); {REMEDY}") from error
