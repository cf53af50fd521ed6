"""The chain behind a vector, for people."""

from __future__ import annotations

from twhin_pipeline.lifecycle.lineage import Lineage
from twhin_pipeline.views import console

FILES = 20
"""Source files that are shown; `--json` has all."""


def show(found: Lineage) -> None:
    """Print the chain, from the release to the source's files."""
    out = console.console()

    def line(name: str, text: object) -> None:
        out.print(f"{name:<14}{text}", markup=False, soft_wrap=True)

    line(found.entity, found.id)
    if found.release is None:
        line("release", "none: these are the newest vectors of the store")
    else:
        figures = ", ".join(f"{name} {value:.4g}" for name, value in list(found.release["figures"].items())[:3])
        state = "current" if found.release["current"] else "not current"
        line("release", f"{found.release['name']} ({state}), made {found.release['created']}")
        if figures:
            line("", figures)
        if found.release["model"]:
            line("registered", found.release["model"])
    edges = "" if found.trained_edges is None else f", {found.trained_edges:,} training edges"
    line("vector", f"row {found.row:,}, length {found.length:.4g}{edges}")
    line("vocabulary", f"first in snapshot {found.first_snapshot}, degree {found.degree:,}"
         if found.degree is not None else "without degrees")  # fmt: skip
    model = found.model
    again = "trained once more on all edges, " if model["refit"] else ""
    line("model", f"{again}epoch {model['chosen_epoch']}, MLflow run {model['mlflow_run_id'] or 'none: not tracked'}")
    for one in found.ancestors:
        line("started from", f"{one.name}, version {one.version}: {one.state}")
    out.print()
    rows = [
        (one.table, one.snapshot, one.version, one.created, one.code_version, one.config_hash, len(one.settings) or "–")
        for one in found.tables
    ]
    console.print_table(("table", "snapshot", "version", "made", "code", "configuration", "fields"), rows)
    out.print()
    counts = [
        (one.relation, one.side, f"{one.raw:,}", f"{one.trained:,}", "–" if one.tested is None else f"{one.tested:,}")
        for one in found.edges
    ]
    console.print_table(("relation", "side", "raw edges", "training edges", "test edges"), counts)
    out.print()
    files = [
        (one["path"], console.size(one["bytes"]) if "bytes" in one else "–", one.get("modified", "–"),
         one.get("checksum", "–"))
        for one in found.files[:FILES]
    ]  # fmt: skip
    console.print_table(("source file", "size", "modified", "checksum"), files)
    if (more := len(found.files) - FILES) > 0:
        out.print(f"… and {more:,} more (--json has all)")
    if found.configuration is not None:
        out.print()
        line("configuration", f"{found.configuration['path']}, sha256 {found.configuration['sha256'][:12]}…")
        line("", "the file that the store's tables were made by last; --json has the fields of each table")
