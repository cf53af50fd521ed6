"""Where edges come from and how they become training sets."""

from __future__ import annotations

import glob
import math
import os
import re
from datetime import date, timedelta
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, PrivateAttr, ValidationError, field_validator, model_validator

from twhin_pipeline.config.base import Section, Seed
from twhin_pipeline.config.model import names_relation
from twhin_pipeline.errors import unknown

MOST_NEGATIVES = 1_000_000
TIME_UNITS = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}
"""Parts of a second."""
LONGEST_DAYS = 3_652_058
"""Days from year 1 to year 9999."""
DURATION = re.compile(r"([1-9][0-9]*)([hdw])")


def _date(snapshot: str) -> str:
    if not re.fullmatch(r"\d{4}-\d{2}-\d{2}", snapshot):
        raise ValueError(f"snapshot {snapshot!r} must be a date, YYYY-MM-DD")
    return snapshot


def duration(text: str) -> timedelta:
    """Return the length of time that a text such as `12h`, `90d` or `4w` gives. Raises ValueError where it is none."""
    match = DURATION.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} must be a number and h, d or w, such as 90d")
    hours = int(match[1]) * {"h": 1, "d": 24, "w": 168}[match[2]]
    if hours > 24 * LONGEST_DAYS:
        raise ValueError(f"{text!r} is longer than {LONGEST_DAYS:,} days; give a shorter time")
    return timedelta(hours=hours)


def _said(error: ValidationError) -> str:
    """Return the first mistake of a section that is read by itself, its field first."""
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"{field}: {unknown('key', field, ['from', 'every', 'to'])}"
    text = "is missing; add it" if first["type"] == "missing" else first["msg"].removeprefix("Value error, ")
    return f"{field}: {text}" if field else text


class TwhinDataConfig(Section):
    """One side of the data: the training edges, or the validation edges."""

    data_root: str | None = None
    """A path, glob or URL of indexed Parquet (`lhs`, `rel`, `rhs`: integers). Read where there is no `source`."""
    per_replica_batch_size: int = Field(8192, ge=1, le=10_000_000)
    """Edges a rank takes in one step."""
    global_negatives: Annotated[int, Field(ge=0, le=MOST_NEGATIVES)] | Literal["all"] = 256
    """Candidates sampled from the whole entity type, for each chunk and side. `all` takes every entity of the type
    (1-vs-all), which suits small types: a step's work grows with them, unless `sampled_per_step` bounds it."""
    sampled_per_step: int | None = Field(None, ge=1, le=10_000_000)
    """With `global_negatives: all`: so many entities of each type, drawn for each step, stand for all of them (sampled
    softmax; `loss.log_q` makes it an estimate of 1-vs-all), `negatives.degree_share` of them by degree. All chunks and
    both sides share them, whatever their relations, so chunks may be small: the way for graphs of many relations. Left
    out: all entities."""
    in_batch_negatives: int = Field(64, ge=0, le=65_536)
    """Candidates taken from the chunk's own entities, for each chunk and side."""
    limit: int | None = Field(None, ge=1)
    """Take at most so many edges."""
    offset: int | None = Field(None, ge=1)
    """Leave out so many edges first."""

    @model_validator(mode="after")
    def _sample_of_all(self) -> TwhinDataConfig:
        if self.sampled_per_step is not None and self.global_negatives != "all":
            raise ValueError(
                f"sampled_per_step: {self.sampled_per_step} is a sample of global_negatives: all; set that, or leave "
                "sampled_per_step out (global_negatives: a number is a sample for each chunk and side)"
            )
        return self

    @field_validator("global_negatives", mode="before")
    @classmethod
    def _number_or_all(cls, value: object) -> object:
        # A union would tell one mistake twice, once for each of its types.
        if value != "all" and (not isinstance(value, int) or not 0 <= value <= MOST_NEGATIVES):
            raise ValueError(f"{value!r} must be a number of candidates, from 0 to {MOST_NEGATIVES:,}, or all")
        return value


class Columns(Section):
    """Names of the columns in the source."""

    lhs: str = "lhs"
    """The left-hand entity's id."""
    rel: str | None = None
    """The relation: its name, or its index where `ids` is `indexed`. Left out: the column `rel` where there is one."""
    rhs: str = "rhs"
    """The right-hand entity's id."""
    time: str | None = None
    """When the edge happened: a timestamp, a date, or a number (see `time_unit`). Edges after the snapshot's day do
    not count. An edge whose time is null or empty has no date: it is in every window, and always known."""
    time_unit: Literal["s", "ms", "us", "ns"] = "s"
    """The unit of times that are numbers: seconds, milliseconds, microseconds or nanoseconds since 1970 (UTC)."""
    weight: str | None = None
    """How much the edge counts (finite, not negative)."""
    split: str | None = None
    """`train`, `validation` or `test`, for `split.strategy: given`."""


class SnapshotDays(Section):
    """The form `{from: 2025-01-01, every: 1d}` of `snapshots`: days at equal steps. Of an event log each of them is a
    snapshot: the edges until that day's end. Of files whose path has `{snapshot}`, those that there are files for."""

    model_config = ConfigDict(serialize_by_alias=True)

    first: str = Field(alias="from")
    """The first snapshot (YYYY-MM-DD)."""
    every: str = "1d"
    """From one snapshot to the next: days or weeks, such as `1d`, `7d` or `2w`."""
    last: str | None = Field(None, alias="to")
    """No snapshot after this day (YYYY-MM-DD). Left out, of an event log the newest is the last day that was over (UTC)
    when the newest of its files was written; a query in SQL has no files, and there it is yesterday."""

    @field_validator("first", "last")
    @classmethod
    def _day(cls, value: str | None) -> str | None:
        if value is not None:
            date.fromisoformat(_date(value))
        return value

    @field_validator("every")
    @classmethod
    def _whole_days(cls, value: str) -> str:
        if duration(value) % timedelta(days=1):
            raise ValueError(f"{value!r} must be a number of days or weeks, such as 7d or 2w")
        return value

    @model_validator(mode="after")
    def _in_order(self) -> SnapshotDays:
        if self.last is not None and self.last < self.first:
            raise ValueError(f"to: {self.last} is before from: {self.first}; exchange them")
        return self

    def __contains__(self, snapshot: object) -> bool:
        """Tell whether a day (YYYY-MM-DD) is one of them."""
        text = str(snapshot)
        if text < self.first or (self.last is not None and text > self.last):
            return False
        return not (date.fromisoformat(text) - date.fromisoformat(self.first)) % duration(self.every)


class SourceConfig(Section):
    """Where edges come from. In place of `source`, `sources` is a list of such sections, whose edges are one graph; see
    [Bring your data](../how-to/bring-data.md)."""

    path: str | None = None
    """Parquet, CSV or TSV: a file, glob or URL; a table of Delta Lake or Iceberg: its folder; or a file of SQL (see
    `sql`). `{snapshot}` stands for the snapshot's date. A relative path is relative to the folder of the configuration
    file, or to the working directory where `--set` gives it."""
    sql: str | None = None
    """In place of `path`: a SELECT in DuckDB's SQL that gives the columns. `{snapshot}` stands for the snapshot's date.
    Relative files in it are relative to the folder of the configuration file."""
    format: Literal["auto", "parquet", "csv", "sql", "delta", "iceberg"] = "auto"
    """`auto` goes by the file name's ending: .parquet, .csv, .tsv, .csv.gz, .tsv.gz, .csv.zst, .tsv.zst or .sql.
    `delta` needs the package deltalake, `iceberg` the package pyiceberg."""
    delimiter: str | None = Field(None, min_length=1, max_length=1)
    """The CSV delimiter; left out, it is a tab for .tsv and a comma otherwise."""
    ids: Literal["named", "indexed"] = "named"
    """`named`: ids are strings or any integers and `rel` a relation's name. `indexed`: `lhs`, `rhs` are rows, `rel` an
    index into `model.relations`, as in the published system."""
    normalize_ids: list[Literal["nfc", "trim", "lower"]] = []
    """What is done to ids that are text, in this order: `nfc`, Unicode's composed form; `trim`, no spaces at their
    ends; `lower`, small letters. Ids that are alike then are one entity; the check `ids_alike` counts those that would
    be."""
    relation: str | None = None
    """The relation of every row; no column is read for it. Left out, and without a relation column, it is the file's
    name without the ending and the snapshot: `follows` of follows.csv."""
    columns: Columns = Columns()
    """Names of the columns."""
    window: str | None = None
    """With a time column: how far back from the snapshot's end edges count, such as `90d`, `12h` or `4w`."""
    weights: dict[str, float] | None = None
    """Weights by relation, such as `{view: 1, buy: 5}`, for sources of event types. They multiply the weight column's;
    a relation that is left out has 1."""
    half_life: str | None = None
    """With a time column: an edge's weight halves with each such time between it and the snapshot's end, such as `30d`.
    Edges without a time keep theirs."""
    repeat_weight: Literal["largest", "sum"] | Annotated[float, Field(ge=1)] = "largest"
    """What rows of one edge (equal lhs, rel and rhs) weigh together. `largest`: as much as the largest of them. `sum`:
    their sum. A number: their sum, but at most so many times the largest."""
    snapshots: list[str] | SnapshotDays | None = None
    """The snapshots there are: a list of dates (YYYY-MM-DD), or days of an event log, `{from: 2025-01-01, every: 1d}`.
    Left out, they are found by listing `path`. Of several sources those count that every dated one has."""
    max_rejected_share: float = Field(0.01, ge=0, le=1)
    """Above this share of rejected rows of the source the check on `raw_edges` fails."""
    min_kept_share: float = Field(0.5, ge=0, le=1)
    """A relation of the source that had 100 edges or more in the snapshot before, and has less than this share of them
    now, fails the check on `raw_edges`; 0 accepts any loss."""
    max_growth: float = Field(5.0, ge=1)
    """Such a relation that has more than so many times its edges now fails it too."""
    max_top_gain: float = Field(0.25, ge=0, le=1)
    """A relation of 1,000 edges or more fails it too where its best connected heads, or tails (0.1 % of them, and 10 at
    least), have a share of its edges that is larger than before by more than this, as by spam; 1 accepts any."""

    _folder: str | None = PrivateAttr(None)

    def set_folder(self, folder: str) -> None:
        """Take `folder` (a path or URL) for the one that a relative path is relative to.

        It is no field: where a configuration is must change neither its hash nor how it is printed.
        """
        self._folder = folder

    @property
    def folder(self) -> str | None:
        """The folder that relative paths are relative to; None: the working directory."""
        return self._folder

    def resolve(self, path: str) -> str:
        """Return a path or glob as an absolute one; URLs stay as they are."""
        if "://" in path or os.path.isabs(path):
            return path
        folder = self._folder if self._folder is not None else os.getcwd()
        if "://" in folder:
            return f"{folder}/{path.removeprefix('./')}"
        return os.path.normpath(f"{glob.escape(folder)}/{path}")

    @field_validator("window", "half_life")
    @classmethod
    def _duration(cls, value: str | None) -> str | None:
        if value is not None:
            duration(value)
        return value

    @field_validator("relation")
    @classmethod
    def _relation(cls, value: str | None) -> str | None:
        if value is not None and not names_relation(value):
            raise ValueError(f"{value!r} cannot be the name of a relation; choose another")
        return value

    @field_validator("weights")
    @classmethod
    def _weights(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        for name, weight in (value or {}).items():
            if not math.isfinite(weight) or weight < 0:
                raise ValueError(f"{name}: {weight} must be a number, 0 or more")
        return value

    @field_validator("repeat_weight", mode="before")
    @classmethod
    def _repeat_weight(cls, value: object) -> object:
        # A union would report one mistake twice, once for each of its types.
        number = isinstance(value, int | float) and not isinstance(value, bool) and 1 <= value < math.inf
        if value not in ("largest", "sum") and not number:
            raise ValueError(f"{value!r} must be largest, sum, or a number of 1 or more")
        return value

    @field_validator("snapshots", mode="before")
    @classmethod
    def _dates_or_days(cls, value: object) -> object:
        # A union would report one mistake twice, once for each of its types.
        if isinstance(value, list):
            return [_date(str(snapshot)) for snapshot in value]
        if isinstance(value, dict):
            try:
                return SnapshotDays.model_validate(value)
            except ValidationError as error:
                raise ValueError(_said(error)) from None
        if value is not None and not isinstance(value, SnapshotDays):
            raise ValueError(f"{value!r} must be a list of dates, or days such as {{from: 2025-01-01, every: 1d}}")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> SourceConfig:
        if self.columns.time_unit != "s" and self.columns.time is None:
            raise ValueError("columns.time_unit needs columns.time; name the time column or leave time_unit out")
        if (self.path is None) == (self.sql is None):
            raise ValueError("give exactly one of path and sql")
        if self.sql is not None and self.format not in ("auto", "sql"):
            raise ValueError(f"format: {self.format} is of a file, and sql is given; leave it out, or give path")
        if self.relation is not None and self.columns.rel is not None:
            raise ValueError("relation and columns.rel are both given; leave one of them out")
        by_day = isinstance(self.snapshots, SnapshotDays)
        is_query = self.path is None or self.format == "sql" or self.path.lower().endswith(".sql")
        if by_day and self.columns.time is None and not is_query and "{snapshot}" not in str(self.path):
            raise ValueError(
                "snapshots: days of a log need columns.time; name the time column, or write {snapshot} into the path "
                "of dated files"
            )
        for name in ("window", "half_life"):
            if getattr(self, name) is not None and self.columns.time is None:
                raise ValueError(f"{name} needs columns.time; name the time column or leave {name} out")
        return self


class VocabularyConfig(Section):
    """Which entities get a row."""

    min_count: int = Field(1, ge=1)
    """An entity with fewer edges gets no row, and its edges are left out (counted, by relation). Indexed ids
    have theirs."""
    keep_departed: int | None = Field(30, ge=0)
    """For so many snapshots an id without an edge keeps its vector. In the next one it is evicted: it keeps its row,
    but has no vector until it returns. 0 evicts it in the first snapshot without it. Left empty, ids stay for ever.
    Indexed ids always do."""


class SplitConfig(Section):
    """Which edges are held out."""

    strategy: Literal["random", "temporal", "given"] = "random"
    """`random`: by edge, seeded. `temporal`: the newest edges, by the time when each first happened; those without a
    time stay in training. With `later_snapshot`, the edges that are new there between entities known here. `given`: by
    the source's split column."""
    validation: float = Field(0.05, ge=0, lt=1)
    """Share of the edges held out for validation (random, temporal). For `given`: where the source has no validation
    edge, this share of its training edges, drawn at random; where it has any, they stand and this is not used; 0 leaves
    training without validation."""
    test: float = Field(0.05, ge=0, lt=1)
    """Share of the edges held out for the test (random, temporal)."""
    relations: list[str] | None = None
    """Relations of which edges are held out; left out, all."""
    later_snapshot: str | None = None
    """For `temporal`: the snapshot whose new edges are the test; validation is then a random share of this one's."""
    repeats: bool = False
    """For `temporal`, without `later_snapshot`: evaluate training edges that happen again in the test's time too, apart
    from the test, as `repeat_recall@k` and `repeat_ndcg@k`. They stay in training, and are also in the table
    `held_out/repeats`."""
    keep_connected: bool = True
    """For `random`, and where `given` draws validation edges: an edge that is the last one of an entity stays in
    training, so that every entity can learn."""
    seed: Seed = 0
    """Seed of the random choice. An edge meets the same fate in every snapshot."""

    @field_validator("later_snapshot")
    @classmethod
    def _later(cls, value: str | None) -> str | None:
        return None if value is None else _date(value)

    @model_validator(mode="after")
    def _shares(self) -> SplitConfig:
        if self.validation + self.test >= 1:
            raise ValueError(
                f"validation ({self.validation}) and test ({self.test}) leave nothing to train on; lower them"
            )
        if self.later_snapshot is not None and self.strategy != "temporal":
            raise ValueError("later_snapshot is for strategy: temporal; set the strategy or leave it out")
        if self.repeats and (self.strategy != "temporal" or self.later_snapshot is not None):
            raise ValueError("repeats is for strategy: temporal, without later_snapshot; leave it out")
        return self


class NegativesConfig(Section):
    """How false edges are sampled."""

    chunk_size: int = Field(1000, ge=1, le=65_536)
    """Positives of one relation that share their candidates."""
    degree_share: float = Field(0.5, ge=0, le=1)
    """Share of a pool, or of a step's sample, drawn in proportion to degree^alpha; the rest is uniform over the entity
    type."""
    alpha: float = Field(0.75, ge=0, le=2)
    """The exponent of the degree (word2vec's is 0.75)."""
    sides: Literal["both", "lhs", "rhs"] = "both"
    """Which side of an edge is corrupted (replaced by negatives): `rhs` gives false tails only."""
    mask: Literal["known", "own"] = "known"
    """Which true edges are not taken for false ones in training: `known`, all training edges; `own`, those of the same
    chunk, as 1-vs-all has it: then the true tails of a query compete with each other, and one that is yet unknown is
    not the only one left to be pushed away. It suits graphs whose queries have many answers, compared by `dot`."""
    epochs: int | None = Field(None, ge=1, le=10_000)
    """Epochs of negatives to make; training that runs longer uses them again. Left out: `training.num_epochs`, and 20
    at most."""
    seed: Seed = 0
    """Seed of chunks and pools."""
