"""The page `docs/reference/configuration.md`, made from the sections' types, defaults and descriptions."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

import annotated_types as at
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from twhin_pipeline.config import TwhinConfig
from twhin_pipeline.config.twhin_config import RENAMED

HEAD = """# Configuration

One YAML file holds everything a run depends on. This page is made from the code by `make reference`; a test keeps it
current. `twhin config` prints a file with every default spelled out, `twhin config --schema` its JSON schema, and
`--set training.num_epochs=3` overrides a field by its path (items of a list by their name or position:
`--set model.embeddings.tables.user.embedding_dim=64`). An unknown key is an error that names the nearest known one.

`twhin init FILE` writes such a file for your own edges. A command takes the file that `--config` or `TWHIN_CONFIG`
names, which may be a bundled one (`--config debian`), else the only configuration in the working directory. A store
remembers which file made its tables, and refuses another one that was not named.

Sections and names are the published system's; `source`, `vocabulary`, `split`, `negatives`, `loss`, `evaluation`,
`export` and `launch` stand beside them.
"""


def markdown() -> str:
    """Return the whole page."""
    alone = {name: field for name, field in TwhinConfig.model_fields.items() if section_of(field.annotation)[0] is None}
    parts = [HEAD, "\n## Beside the sections\n", *_table(alone, "")]
    for path, section, _ in sections():
        parts.append(f"\n{'##' if '.' not in path else '###'} `{path}`\n\n{_prose(section.__doc__)}\n")
        parts += _table(section.model_fields, f"{path}.")
    return "".join(parts)


def _table(fields: Mapping[str, FieldInfo], path: str) -> Iterator[str]:
    """Yield the lines of a table of fields whose paths begin with `path`."""
    yield "\n| field | type | default | |\n|---|---|---|---|\n"
    for name, field in fields.items():
        name = field.alias or name
        cells = (f"`{name}`", type_text(field), default_text(field), _description(f"{path}{name}", field))
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def sections(root: type[BaseModel] = TwhinConfig, path: str = "") -> Iterator[tuple[str, type[BaseModel], FieldInfo]]:
    """Yield every section once: its path in the YAML, its class and the field that holds it, in the file's order."""
    yield from _walk(root, path, set())


def _walk(
    root: type[BaseModel], path: str, seen: set[type[BaseModel]]
) -> Iterator[tuple[str, type[BaseModel], FieldInfo]]:
    for name, field in root.model_fields.items():
        section, many = section_of(field.annotation)
        if section is None or section in seen:
            continue
        seen.add(section)
        here = f"{path}.{name}" if path else name
        here += "[]" if many else ""
        yield here, section, field
        yield from _walk(section, here, seen)


def section_of(annotation: Any) -> tuple[type[BaseModel] | None, bool]:
    """Return the section an annotation speaks of, and whether it is a list of them."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, False
    origin = typing.get_origin(annotation)
    for argument in typing.get_args(annotation) if origin in (list, typing.Union, types.UnionType) else ():
        section, many = section_of(argument)
        if section is not None:
            return section, many or origin is list
    return None, False


def type_text(field: FieldInfo) -> str:
    """Say what a field takes: its type, and its bounds in mathematical signs."""
    text = _annotation_text(field.annotation)
    bounds = list(_bounds(field.metadata))
    return text + (f", {', '.join(bounds)}" if bounds else "")


def _annotation_text(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_annotation_text(a) for a in arguments if a is not type(None))
    section, many = section_of(annotation)
    if section is not None:
        return "list of sections" if many else "section"
    if origin is typing.Annotated:
        bounds = list(_bounds(arguments[1:]))
        return " ".join([_annotation_text(arguments[0]), *bounds])
    if origin is typing.Literal:
        return " or ".join(f"`{a}`" for a in arguments)
    if origin is list:
        return f"list of {_annotation_text(arguments[0])}"
    if origin is tuple:
        return f"({', '.join(_annotation_text(a) for a in arguments)})"
    if origin is dict:
        return f"mapping of {_annotation_text(arguments[0])} to {_annotation_text(arguments[1])}"
    names = {str: "text", int: "integer", float: "number", bool: "`true` or `false`", Any: "anything"}
    return names.get(annotation) or str(getattr(annotation, "__name__", annotation))


def _bounds(metadata: typing.Iterable[Any]) -> Iterator[str]:
    signs = {at.Ge: ("ge", "≥"), at.Gt: ("gt", ">"), at.Le: ("le", "≤"), at.Lt: ("lt", "<")}
    for item in metadata:
        if isinstance(item, FieldInfo):
            yield from _bounds(item.metadata)
        for kind, (attribute, sign) in signs.items():
            if isinstance(item, kind):
                yield f"{sign} {getattr(item, attribute):,}"
        if isinstance(item, at.MultipleOf):
            yield f"a multiple of {item.multiple_of}"
        if isinstance(item, at.MinLen) and item.min_length:
            yield f"at least {item.min_length}"


def default_text(field: FieldInfo) -> str:
    """Say what a field is where it is left out."""
    default = field.get_default(call_default_factory=True) if not field.is_required() else PydanticUndefined
    if default is PydanticUndefined:
        return "required"
    if default is None:
        return "–"
    if isinstance(default, BaseModel):
        values = default.model_dump(mode="json", exclude_defaults=True, exclude_none=True)
        return f"`{_flow(values)}`" if values else "its defaults"
    return f"`{_flow(default)}`"


def _flow(value: Any) -> str:
    """Write a value as YAML on one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {_flow(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_flow(v) for v in value) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    return str(value)


def _description(path: str, field: FieldInfo) -> str:
    """Say what a field is for, and which name it had before."""
    former = [f"Formerly `{old}`, which is still accepted." for old, new in RENAMED.items() if new == path]
    return " ".join([_prose(field.description), *former])


def _prose(text: str | None) -> str:
    return " ".join((text or "").split())
