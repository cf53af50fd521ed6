"""Where tables live, and how they are read: the store, DuckDB connections, and the catalog of views."""

from twhin_pipeline.store.draft import Draft, code_version
from twhin_pipeline.store.manifest import MAKERS, Manifest, Verdict
from twhin_pipeline.store.store import DEFAULT_HOME, Store

__all__ = ["DEFAULT_HOME", "MAKERS", "Draft", "Manifest", "Store", "Verdict", "code_version"]
