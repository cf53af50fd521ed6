"""What is known of one version of a table: its manifest, written last, and the verdict of its checks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from twhin_pipeline.errors import UserError

FORMAT = 2
"""The format of manifests that this code writes. 1: one manifest a snapshot, without checksums."""
MANIFEST, VERDICT = "_manifest.json", "_verdict.json"
"""Files of a version's folder that are not rows: what reads a folder of Parquet passes over names with `_`."""
FORMER = "manifest.json"
"""Of format 1, in the snapshot's folder."""
MAKERS = {
    "raw_edges": "ingest",
    "raw_edges_rejected": "ingest",
    "vocabulary": "vocabulary",
    "training_set": "sample",
    "held_out": "sample",
    "twhin_model": "train",
    "evaluation": "evaluate",
    "calibration": "evaluate",
    "embeddings": "export",
    "index": "index",
    "map": "map",
    "refit": "refit",
    "drift": "compare",
    "published": "publish",
    "promotion": "decide",
    "seen_edges": "prune",
}
"""The command that makes a table, by the first part of the table's name."""


def maker(asset: str) -> str:
    """Return the command that makes a table."""
    return MAKERS.get(asset.split("/")[0], "run")


@dataclass(frozen=True)
class Manifest:
    """What one version of a table is and where it comes from.

    `rows` and `schema` are those of the table itself, and `parts` has the same of Parquet files beside it, by their
    names (see `draft.ROWS_IN`). `files` has `path`, `bytes`, `sha256` and, of Parquet files, `rows`. `parents` maps a
    parent table to the version that was read; `details` is what the stage counted (JSON values), `settings` are
    the fields that it read, by their paths; `digest` is the checksum of all else.
    """

    asset: str
    snapshot: str
    version: str
    created: str
    rows: int
    bytes: int
    files: list[dict[str, Any]]
    schema: dict[str, str]
    config_hash: str
    code_version: str
    parents: dict[str, str] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    format: int = FORMAT
    digest: str = ""

    @property
    def maker(self) -> str:
        """The command that makes the table."""
        return maker(self.asset)

    def to_json(self) -> str:
        """Return the manifest's file. Raises ValueError where `details` holds a number that is not finite."""
        values = asdict(self)
        values["digest"] = _digest(values)
        return json.dumps(values, indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str, place: str) -> Manifest:
        """Read a manifest's file, whose path or URL is `place`.

        Raises:
            UserError: It is no manifest, is of a newer format, or was changed after it was written.
        """
        try:
            values = json.loads(text)
            version = int(values.get("format", 1))
        except (ValueError, AttributeError, TypeError) as error:
            raise UserError(f"{place}: is damaged ({error}); restore the file, or make the table again") from error
        if version > FORMAT:
            raise UserError(
                f"{place}: is of format {version}, and this version of twhin-pipeline reads formats up to {FORMAT}; "
                "use the version that wrote it, or a newer one"
            )
        known = {one.name for one in fields(cls)}
        if version == FORMAT and values.get("digest") != _digest(values):
            raise UserError(
                f"{place}: was changed after it was written (its checksum differs); restore the file, or make the "
                "table again"
            )
        try:
            return cls(**{**{key: value for key, value in values.items() if key in known}, "format": version})
        except TypeError as error:
            raise UserError(f"{place}: is damaged ({error}); restore the file, or make the table again") from error


def _digest(values: dict[str, Any]) -> str:
    # As JSON has it, whose keys are texts, so that what was read gives the same as what was written.
    rest = json.loads(json.dumps({key: value for key, value in values.items() if key != "digest"}, allow_nan=False))
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


Status = Literal["passed", "failed", "overruled"]


@dataclass(frozen=True)
class Verdict:
    """What the checks of one version said; write, audit, publish: what has not passed is never published.

    `checks` has a record of each check: `name`, `passed`, `blocking`, and `finding`, a line about what was found.
    """

    status: Status
    at: str
    """When, ISO 8601 in UTC."""
    checks: Sequence[dict[str, Any]] = ()
    by: str | None = None
    """Who overruled a failed check."""
    reason: str | None = None
    """Why."""

    @property
    def accepted(self) -> bool:
        """Whether later stages may publish the version and grow from it."""
        return self.status in ("passed", "overruled")

    @property
    def failed_checks(self) -> list[str]:
        """Names of the blocking checks that failed."""
        return [str(one["name"]) for one in self.checks if one["blocking"] and not one["passed"]]

    def to_json(self) -> str:
        """Return the verdict's file."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Verdict:
        """Read a verdict's file."""
        return cls(**json.loads(text))
