"""TwhinConfig: everything a run depends on, from one YAML file."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
import types
import typing
import warnings
from collections.abc import Iterable
from typing import Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from twhin_pipeline import remote
from twhin_pipeline.bundled import EXAMPLE
from twhin_pipeline.config.base import Section
from twhin_pipeline.config.data import (
    NegativesConfig,
    SourceConfig,
    SplitConfig,
    TwhinDataConfig,
    VocabularyConfig,
)
from twhin_pipeline.config.engine import EngineConfig
from twhin_pipeline.config.indexes import IndexesConfig
from twhin_pipeline.config.maps import MapsConfig
from twhin_pipeline.config.model import EVERY_OTHER, TwhinModelConfig
from twhin_pipeline.config.promotion import PromotionConfig
from twhin_pipeline.config.retention import RetentionConfig
from twhin_pipeline.config.training import (
    EvaluationConfig,
    ExportConfig,
    LaunchConfig,
    LossConfig,
    RuntimeConfig,
    TrainingConfig,
)
from twhin_pipeline.config.tune import TuneConfig
from twhin_pipeline.errors import UserError, unknown
from twhin_pipeline.words import BOTH, SIDES, Side

LARGEST, DEEPEST, MOST_VALUES = 1 << 20, 50, 100_000
"""A larger file is no configuration (bytes), nor is one of more levels or values."""
MOST_EPOCHS_OF_NEGATIVES = 20
"""Where the configuration says no number of its own."""
RENAMED = {
    "launch.duckdb_threads": "launch.data_threads",
    "training.early_stopping_metric": "training.selection_metric",
}
"""Fields that had another name: former path to present path. Files and `--set` may use either."""


class TwhinConfig(Section):
    """The whole configuration. Sections and fields are named as published; what that lacks stands beside them."""

    recipe: Literal["auto", "interactions", "graph", "none"] = "auto"
    """Where fields that are left out get their values from. `auto`: from a recipe, chosen by the graph's schema and
    counts once its edges are ingested. `interactions` (users and items: relations between different types; or who
    follows whom, if that is all) and `graph` (several relations among entities of one type) name the recipe. `none`:
    the defaults on this page. A value in the file or given by `--set` always wins. Without a source, as in the
    published system, there is no recipe."""
    model: TwhinModelConfig
    """Tables, relations and the scorer."""
    runtime: RuntimeConfig = RuntimeConfig()
    """Numerics of the device."""
    training: TrainingConfig = TrainingConfig()
    """The training loop."""
    train_data: TwhinDataConfig = TwhinDataConfig()
    """The training edges."""
    validation_data: TwhinDataConfig = TwhinDataConfig()
    """The validation edges."""
    source: SourceConfig | None = None
    """Where edges come from. Left out, as `sources` is: from `train_data.data_root` and `validation_data.data_root`, as
    published."""
    sources: list[SourceConfig] | None = Field(None, min_length=1)
    """In place of `source`, several of them, each with its own path, format, columns and the like. Their edges are one
    graph: equal ones are merged, and an id is the same entity in all."""
    vocabulary: VocabularyConfig = VocabularyConfig()
    """Which entities get a row."""
    split: SplitConfig = SplitConfig()
    """Which edges are held out."""
    negatives: NegativesConfig = NegativesConfig()
    """How false edges are sampled."""
    loss: LossConfig = LossConfig()
    """What is minimized."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """What is measured, and what must be reached."""
    export: ExportConfig = ExportConfig()
    """How embedding tables are written."""
    indexes: IndexesConfig = IndexesConfig()
    """Which vectors get an index for approximate search."""
    maps: MapsConfig = MapsConfig()
    """Maps of entity types, to look at."""
    promotion: PromotionConfig = PromotionConfig()
    """What a release must show before consumers get it."""
    engine: EngineConfig = EngineConfig()
    """What prepares the data."""
    launch: LaunchConfig = LaunchConfig()
    """Processes and memory."""
    tune: TuneConfig = TuneConfig()
    """What a search over hyperparameters tries."""
    retention: RetentionConfig = RetentionConfig()
    """What `twhin prune` keeps."""

    @model_validator(mode="after")
    def _whole(self) -> TwhinConfig:
        if self.source is not None and self.sources is not None:
            raise ValueError("source and sources are both given; move the one into the list")
        if not self.all_sources and self.train_data.data_root is None:
            raise ValueError("no edges: give source.path, or train_data.data_root as in the published system")
        if len({source.ids for source in self.all_sources}) > 1:
            raise ValueError("sources: ids are indexed in some and named in others; give all of them the same ids")
        columns = [source.columns for source in self.all_sources]
        if self.split.strategy == "given" and all(c.split is None for c in columns):
            raise ValueError("split.strategy: given needs source.columns.split, the name of the split column")
        timed = any(c.time is not None for c in columns)
        if self.split.strategy == "temporal" and self.split.later_snapshot is None and not timed:
            raise ValueError("split.strategy: temporal needs source.columns.time or split.later_snapshot")
        if self.split.repeats and (self.train_data.limit is not None or self.train_data.offset is not None):
            raise ValueError("split.repeats needs all training edges; leave train_data.limit and offset out")
        self._candidates()
        for name, limit in self.promotion.drift:
            for entity in limit if isinstance(limit, dict) else ():
                if entity not in self.model.table_names:
                    known = unknown("entity type", entity, self.model.table_names)
                    raise ValueError(f"promotion.drift.{name}: {known}")
        for name in self.export.postgres.relations if self.export.postgres else ():
            if name not in self.model.relation_names and EVERY_OTHER not in self.model.relation_names:
                raise ValueError(f"export.postgres.relations: {unknown('relation', name, self.model.relation_names)}")
        for entity in self.maps.entities:
            if entity not in self.model.table_names:
                raise ValueError(f"maps.entities: {unknown('entity type', entity, self.model.table_names)}")
        ranks = self.launch.nproc_per_node * self.launch.nnodes
        for table in self.model.embeddings.tables:
            if table.optimizer.unsharded and ranks > 1:
                raise ValueError(
                    f"model.embeddings.tables: rmsprop, of {table.name!r}, trains in one process, and launch asks for "
                    f"{ranks}; take rowwise_adagrad or adagrad, or set launch.nproc_per_node and launch.nnodes to 1"
                )
        return self

    @model_validator(mode="after")
    def _relations(self) -> TwhinConfig:
        if self.model.every_other is not None:
            if not self.all_sources or self.all_sources[0].ids == "indexed":
                raise ValueError(
                    'model.relations: indexed edges have numbers, not names, of relations, so "*" finds none; list each'
                )
            return self  # split.relations may name one of the source: `relations.resolve` looks at it again
        for name in self.split.relations or ():
            if name not in self.model.relation_names:
                raise ValueError(f"split.relations: {unknown('relation', name, self.model.relation_names)}")
        return self

    @model_validator(mode="after")
    def _on_spark(self) -> TwhinConfig:
        if self.engine.name != "spark":
            return self
        remedy = "leave it out, or set engine.name to embedded"
        if not self.all_sources:
            raise ValueError(f"train_data.data_root: Spark reads source or sources alone; name one, {remedy}")
        for section, source in self.named_sources:
            if source.sql is not None or source.format == "sql" or (source.path or "").lower().endswith(".sql"):
                raise ValueError(
                    f"{section}: is a query, which Spark does not run; write its result to Parquet and name that, or "
                    "set engine.name to embedded"
                )
            if source.ids == "indexed":
                raise ValueError(f"{section}.ids: indexed ids are not prepared by Spark; use named ids, {remedy}")
            if (source.path or "").startswith(("http://", "https://")):
                raise ValueError(
                    f"{section}.path: {source.path} would be read by several machines at once; copy it to an object "
                    "store or a shared folder, or set engine.name to embedded"
                )
        if self.split.later_snapshot is not None:
            raise ValueError(f"split.later_snapshot: is not prepared by Spark; {remedy}")
        for name in ("train_data", "validation_data"):
            for field in ("limit", "offset"):
                if getattr(getattr(self, name), field) is not None:
                    raise ValueError(f"{name}.{field}: edges are not counted off in order by Spark; {remedy}")
        return self

    def _candidates(self) -> None:
        sampled, in_batch = self.train_data.global_negatives, self.train_data.in_batch_negatives
        if sampled == 0 and in_batch == 0:
            raise ValueError(
                "train_data.global_negatives and train_data.in_batch_negatives are both 0, so nothing would be "
                "contrasted; set one of them"
            )
        if sampled == "all" and in_batch > 0:
            raise ValueError(
                f"train_data.in_batch_negatives: {in_batch} candidates would be counted twice beside "
                "global_negatives: all; set it to 0"
            )
        if self.validation_data.global_negatives == "all":
            raise ValueError(
                "validation_data.global_negatives: all is for training only; give a number here, and to validate "
                "against every entity set training.selection_metric: filtered_mrr"
            )

    @property
    def all_sources(self) -> list[SourceConfig]:
        """The sources, whether `source` or `sources` gives them; empty where only a `data_root` does."""
        return [self.source] if self.source is not None else self.sources or []

    @property
    def named_sources(self) -> list[tuple[str, SourceConfig]]:
        """The sources, each after its path in the YAML: `source`, or `sources[0]` and so on."""
        if self.source is not None:
            return [("source", self.source)]
        return [(f"sources[{number}]", source) for number, source in enumerate(self.sources or [])]

    @property
    def corrupted_sides(self) -> dict[str, tuple[Side, ...]]:
        """By relation, in the model's order: the sides of its edges that are corrupted.

        The sampler draws negatives for these sides, the loss is the mean over them, and evaluation and its checks
        measure a relation on them.
        """
        chosen = {relation.name: relation.sides or self.negatives.sides for relation in self.model.relations}
        return {name: tuple(side for side in SIDES if sides in (BOTH, side)) for name, sides in chosen.items()}

    @property
    def indexed_types(self) -> list[str]:
        """Entity types that may have an index: those that a relation leads to; none with `indexes.kind: none`."""
        tails = {relation.rhs for relation in self.model.relations}
        return [name for name in self.model.table_names if name in tails and self.indexes.kind != "none"]

    @property
    def epochs_of_negatives(self) -> int:
        """Epochs of negatives that the training set holds: one, and empty, where `all` entities are candidates."""
        if self.train_data.global_negatives == "all":
            return 1
        return self.negatives.epochs or min(self.training.num_epochs, MOST_EPOCHS_OF_NEGATIVES)

    def hash(self) -> str:
        """Return 12 hex digits that name this configuration.

        Where and how fast it runs (`launch`, `engine`), what is searched (`tune`), what is kept (`retention`), and
        `indexes`, which one stage alone reads, are left out.
        """
        left_out = {"launch", "engine", "tune", "retention", "indexes"}
        text = json.dumps(self.model_dump(mode="json", exclude=left_out), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def to_yaml(self) -> str:
        """Return the resolved configuration, every default spelled out."""
        return yaml.safe_dump(self.model_dump(mode="json", exclude_none=True), sort_keys=False)


class _Loader(yaml.SafeLoader):
    """YAML, but a date is text (a snapshot's name), and a key that is there twice is an error: it would silently
    replace the first.
    """

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} is there twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(text: str) -> Any:
    """Return what a YAML text holds.

    Raises:
        yaml.YAMLError: It is no YAML.
        ValueError: It is nested too deep, or aliases (`*name`) make it too large, or a key is no plain value.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _measure(node, {}, 0)
        return loader.construct_document(node)
    except RecursionError:
        raise ValueError(f"is nested deeper than {DEEPEST} levels; no section is") from None
    finally:
        loader.dispose()


def _measure(node: yaml.Node, sizes: dict[int, int], depth: int) -> int:
    """Return how many values a node is once its aliases are written out. Raises ValueError beyond the limits."""
    known = sizes.get(id(node))
    if known is not None:
        if known == 0:
            raise ValueError(f"line {node.start_mark.line + 1}: a value contains itself by an alias; write it out")
        return known
    if depth > DEEPEST:
        raise ValueError(f"line {node.start_mark.line + 1}: is nested deeper than {DEEPEST} levels; no section is")
    sizes[id(node)] = 0  # so that one that contains itself is noticed
    size = 1
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise ValueError(f"line {key.start_mark.line + 1}: a key is a list or a mapping; make it a name")
            size += 1 + _measure(value, sizes, depth + 1)
    elif isinstance(node, yaml.SequenceNode):
        size += sum(_measure(item, sizes, depth + 1) for item in node.value)
    if size > MOST_VALUES:
        raise ValueError(
            f"line {node.start_mark.line + 1}: has more than {MOST_VALUES:,} values, aliases written out; no "
            "configuration needs so many"
        )
    sizes[id(node)] = size
    return size


def cut(text: str, width: int = 100) -> str:
    """Return a text, cut to `width` characters."""
    return text if len(text) <= width else text[: width - 1] + "…"


def load_config(path: str, overrides: Iterable[str] = ()) -> TwhinConfig:
    """Read a YAML file (path or URL) and apply overrides such as `training.num_epochs=3`.

    A relative `source.path` is relative to the file's folder, or to the working directory where an override sets it;
    `data_root` is relative to the working directory, as published. Both stay as they are written: the folder is kept
    apart, so that neither `hash` nor `to_yaml` depends on it.

    Raises:
        UserError: The file is missing or no YAML mapping, or a field is wrong; it names the path in the YAML.
    """
    text = remote.text(path, LARGEST, "a YAML file")
    try:
        data = read_yaml(text)
    except yaml.YAMLError as error:
        raise UserError(f"{path}: is not YAML: {' '.join(str(error).split())}") from error
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    if not isinstance(data, dict):
        raise UserError(f"{path}: must hold sections such as `model:` and `source:`, got {type(data).__name__}")
    data = rename_fields(data, str(path))
    overrides = _current_overrides(overrides)
    for override in overrides:
        apply_override(data, override)
    config = parse_config(data, origin=str(path))
    _set_folders(config, str(path), overrides)
    return config


def _set_folders(config: TwhinConfig, path: str, overrides: list[str]) -> None:
    """Tell each source whose path is in the file at `path`, and in no override, the file's folder."""
    folder = path.rpartition("/")[0] if "://" in path else os.path.dirname(os.path.abspath(path))
    changed = {override.partition("=")[0].strip() for override in overrides}
    for section, source in config.named_sources:
        key = section.replace("[", ".").rstrip("]")
        if not changed & {key.partition(".")[0], key, f"{key}.path", f"{key}.sql"}:
            source.set_folder(folder)


def parse_config(data: dict[str, Any], origin: str = "configuration") -> TwhinConfig:
    """Validate `data`. Raises UserError that names each wrong field by its path in the YAML, `origin` in front."""
    data = rename_fields(data, origin)
    if too_large := _beyond_64_bits(data):
        raise UserError(f"{origin}: {too_large} is beyond 64 bits; give a smaller number")
    try:
        config = TwhinConfig.model_validate(data)
    except ValidationError as error:
        messages = [_tell(dict(e), data) for e in error.errors()]
        raise UserError("\n".join(f"{origin}: {line}" for line in messages)) from error
    if config.runtime.wandb is not None:
        warnings.warn("runtime.wandb is accepted and not used: runs are tracked with MLflow", stacklevel=1)
    return config


def _beyond_64_bits(value: Any, path: tuple[int | str, ...] = ()) -> str:
    """Return path and value of the first integer that no field can take; empty where there is none."""
    if isinstance(value, int):
        return f"{_yaml_path(path)}: {cut(str(value))}" if abs(value) >= 2**63 else ""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    result = (_beyond_64_bits(item, (*path, key)) for key, item in items)
    return next((text for text in result if text), "")


def current_path(path: str) -> str:
    """Return a field's present path; a former one (`RENAMED`) gives a warning that names both."""
    if path not in RENAMED:
        return path
    # The same place each time: Python then shows the same warning once in a process.
    warnings.warn(f"configuration: {path} is now named {RENAMED[path]}; the old name still works", stacklevel=1)
    return RENAMED[path]


def rename_fields(data: dict[str, Any], origin: str) -> dict[str, Any]:
    """Return `data` with renamed fields (`RENAMED`) under their present names; `data` itself stays as it is.

    Raises:
        UserError: A field is there under both names.
    """
    for old, new in RENAMED.items():
        section, _, old_name = old.rpartition(".")
        if old_name not in (_mapping_at(data, section) or {}):
            continue
        section_now, _, name = new.rpartition(".")
        if name in (_mapping_at(data, section_now) or {}):
            raise UserError(f"{origin}: {old} is the old name of {new}, and both are there; remove {old}")
        current_path(old)  # for its warning
        data = copy.deepcopy(data)
        holder = _mapping_at(data, section)
        assert holder is not None
        value, node = holder.pop(old_name), data
        for key in section_now.split("."):
            node = _descend(node, key, new, create=True)
        node[name] = value
    return data


def _mapping_at(data: Any, path: str) -> dict[str, Any] | None:
    """Return the mapping at a path without list items; None where there is none."""
    for key in path.split("."):
        data = data.get(key) if isinstance(data, dict) else None
    return data if isinstance(data, dict) else None


def _current_overrides(overrides: Iterable[str]) -> list[str]:
    """Return overrides with the present paths of renamed fields. Raises UserError where one is set by both names."""
    overrides = list(overrides)
    paths = {override.partition("=")[0].strip() for override in overrides}
    for old, new in RENAMED.items():
        if {old, new} <= paths:
            raise UserError(f"--set {old}: is the old name of {new}, and both are set; leave {old} out")
    split = (override.partition("=") for override in overrides)
    return [f"{current_path(path.strip())}{separator}{value}" for path, separator, value in split]


def apply_override(data: dict[str, Any], override: str) -> None:
    """Set one field of nested `data` in place from `path.to.field=value` (YAML); list items go by index or name.

    Raises:
        UserError: It is not of that form, or the path leads through something that has no fields.
    """
    path, separator, value = override.partition("=")
    if not separator or not path.strip():
        raise UserError(f"override {override!r} must look like training.num_epochs=3")
    try:
        parsed = read_yaml(value)
    except yaml.YAMLError as error:
        raise UserError(f"override {cut(override)!r}: the value is not YAML") from error
    except ValueError as error:
        raise UserError(f"override {cut(override)!r}: {error}") from error
    *parents, last = path.strip().split(".")
    node: Any = data
    for key in parents:
        node = _descend(node, key, override, create=True)
    if isinstance(node, list):
        node[_position(node, last, override)] = parsed
    elif isinstance(node, dict):
        node[last] = parsed
    else:
        raise UserError(f"override {override!r}: {'.'.join(parents)} has no fields")


def as_override(path: str, value: Any) -> str:
    """Return `path=value` for `--set`: the value as YAML on one line, such that it keeps its type."""
    return f"{path}={as_yaml_line(value)}"


def as_yaml_line(value: Any) -> str:
    """Return a value as YAML on one line, such that it keeps its type."""
    # YAML 1.1 reads 1e-05 as text, so numbers are written by the library that reads them.
    return yaml.safe_dump(value, default_flow_style=True, width=10**9).removesuffix("...\n").strip()


def _descend(node: Any, key: str, override: str, *, create: bool = False) -> Any:
    if isinstance(node, list):
        return node[_position(node, key, override)]
    if isinstance(node, dict):
        if create and node.get(key) is None:
            node[key] = {}
        return node[key]
    raise UserError(f"override {override!r}: there is nothing below {key!r}")


def _position(items: list[Any], key: str, override: str) -> int:
    names = [item.get("name") if isinstance(item, dict) else None for item in items]
    if key in names:
        return names.index(key)
    if key.isdigit() and int(key) < len(items):
        return int(key)
    known = [str(n) for n in names if n is not None]
    raise UserError(f"override {override!r}: {unknown('item', key, known or range(len(items)))}")


def _tell(error: dict[str, Any], data: Any) -> str:
    location = error["loc"]
    where = _yaml_path(location)
    message = str(error["msg"]).removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        fields = _fields_at(TwhinConfig, location[:-1])
        parent = _yaml_path(location[:-1])
        return f"{where}: {unknown('key', location[-1], fields)}" + (f" (in {parent})" if parent else "")
    if error["type"] == "missing":
        return f"{where}: is missing; add it"
    if error["type"] == "value_error":
        inner = re.match(r"[a-z_]+(\[\d+\])?(\.[a-z_]+)*: ", message)
        return where + ("." if inner else ": ") + message if where else message
    return f"{where}: {message}, got {cut(repr(error['input']))}"


def _yaml_path(location: Iterable[int | str]) -> str:
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)
    return path


def _fields_at(model: type[BaseModel], location: Iterable[int | str]) -> list[str]:
    """Known keys of the section at `location` in the tree of sections."""
    for part in location:
        if isinstance(part, int):
            continue
        field = model.model_fields.get(part)
        result = _section_in(field.annotation) if field else None
        if result is None:
            return []
        model = result
    return list(model.model_fields)


def _section_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (list, typing.Union, types.UnionType):
        for argument in typing.get_args(annotation):
            result = _section_in(argument)
            if result is not None:
                return result
    return None


def default_config_path() -> str:
    """Return the path of `configs/debian.yaml`, the bundled example."""
    return str(EXAMPLE)
