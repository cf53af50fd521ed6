"""Whether a stage has to run again: nothing that it reads has changed since it made its tables, and they passed.

Compared are the source's files (name, size and time), the versions of the tables that were read, the configuration's
fields that the stage reads, and the version of this package.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from twhin_pipeline.config import TwhinConfig, stage_settings
from twhin_pipeline.config.training import PREVIOUS
from twhin_pipeline.errors import UserError
from twhin_pipeline.store import Manifest, Store, code_version, releases
from twhin_pipeline.vectors import index_choice
from twhin_pipeline.words import DRIFT, INDEX, PROMOTION, PUBLISHED

if TYPE_CHECKING:
    from twhin_pipeline.stages.chain import Stage

FINGERPRINT = "source_fingerprint"
"""What the manifest of `raw_edges` says of the source's files."""


def reason_to_run(config: TwhinConfig, store: Store, snapshot: str, stage: Stage) -> str | None:
    """Return why a stage has to run, None where its tables are as they would be made anew.

    Args:
        config: The configuration, relations resolved where the stage reads them.
        store: Where the tables are.
        snapshot: Which snapshot.
        stage: The stage.
    """
    from twhin_pipeline.checks import checks

    tables = stage.tables(config)
    checked = {table for _, table in checks.of_tables(config, tables)}
    for table in tables:
        manifest = store.newest(table, snapshot)
        if manifest is None:
            return f"{table} is not there"
        verdict = store.verdict(table, snapshot, manifest.version)
        if (verdict is None and table in checked) or (verdict is not None and not verdict.accepted):
            return f"{table} has not passed its checks"
        if (why := _changed(config, store, snapshot, stage, manifest)) is not None:
            return why
    return None if tables else "it has no table"


def _changed(config: TwhinConfig, store: Store, snapshot: str, stage: Stage, manifest: Manifest) -> str | None:
    if manifest.code_version != code_version():
        return f"{manifest.asset} was made by version {manifest.code_version} of this package"
    if stale := store.stale(manifest.asset, snapshot):
        return f"{', '.join(stale)} changed"
    if stage.name in stage_settings.STAGES:
        fields = stage_settings.differences(manifest.settings, stage_settings.settings(config, stage.name))
        fields.pop("negatives.epochs", None)  # training that runs longer uses them again
        # What could not be an edge has the settings beside the edges.
        if fields and manifest.settings:
            return f"{next(iter(fields))} is another than {manifest.asset} was made by"
    # A refit has a configuration of its own, made from that of the model, which is one of its parents.
    elif stage.name != "refit" and manifest.config_hash != config.hash():
        return f"the configuration is another than {manifest.asset} was made by"
    return _other_inputs(config, store, snapshot, stage, manifest)


def _other_inputs(config: TwhinConfig, store: Store, snapshot: str, stage: Stage, manifest: Manifest) -> str | None:
    """Look at what a stage reads besides the tables of its snapshot."""
    if manifest.asset == "raw_edges":
        from twhin_pipeline.graph import source

        if manifest.details.get(FINGERPRINT) != source.fingerprint(config, snapshot):
            return "the source changed"
        read = manifest.details.get("log_state")  # not of what Spark reads: one machine does not read that again
        if read and read != source.log_state(config, snapshot):
            from twhin_pipeline.graph import log_rows

            if manifest.details["log_rows"] != log_rows.digest(config, snapshot):
                return "the log's rows of this snapshot changed"
    if stage.name == "vocabulary":
        before = store.latest_before(manifest.asset, snapshot)
        grown_from = manifest.parents.get(f"{manifest.asset}@{before.snapshot}") if before else None
        if before is not None and grown_from != before.version:
            return f"{manifest.asset} of {before.snapshot} changed"
    if stage.name in ("train", "refit") and config.training.initial_checkpoint_dir is not None:
        return _other_start(config, store, snapshot, manifest)
    if manifest.asset == PUBLISHED:
        indexes = set(index_choice.current(store, snapshot, config.indexed_types))
        if indexes != {name for name in manifest.parents if name.startswith(f"{INDEX}/")}:
            return "it has other indexes"
        if not releases.of_published(store, snapshot, manifest.version):
            return "it has no release"  # a run was ended between the two
    if stage.name == "compare":
        current = releases.current(store)
        decided = store.newest(PROMOTION, snapshot)
        if decided is not None and decided.parents.get(DRIFT) == manifest.version:
            return None  # it has served its purpose: that release may be the current one by now
        if manifest.details["compared_with"] != (current.name if current else None):
            return "another release is current"
    return None


def _other_start(config: TwhinConfig, store: Store, snapshot: str, manifest: Manifest) -> str | None:
    """Compare the model that a training started from with the one that it would start from now."""
    from twhin_pipeline.evaluation.ancestors import origins_of
    from twhin_pipeline.vectors.model_files import ASSET, has_release, locate

    source, origins = str(config.training.initial_checkpoint_dir), origins_of(manifest)
    if source == PREVIOUS:
        if not has_release(store, before=snapshot):
            return "the earlier model is gone" if origins else None
        source = store.root
    try:
        earlier, at = locate(source, before=snapshot)
        version = earlier.manifest(ASSET, at).version
    except UserError as error:
        return str(error)
    return None if version in {one.version for one in origins} else f"training would start from the model of {at}"
