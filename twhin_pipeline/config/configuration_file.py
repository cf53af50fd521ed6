"""Which YAML file is the configuration: the one named, a bundled one by its name, or the only one here.

A store remembers the file that its tables were made by (`<root>/configuration.json`), so that another one that lies in
the working directory is not taken for it by mistake.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from twhin_pipeline import remote
from twhin_pipeline.bundled import CONFIGS
from twhin_pipeline.errors import UserError, nearest

if TYPE_CHECKING:
    from twhin_pipeline.store import Store

RECORD = "configuration.json"
LARGEST = 1 << 20
"""A larger file is no configuration, bytes."""


@dataclass(frozen=True)
class Record:
    """The file that a store's tables were made by last."""

    path: str
    """Its absolute path, or URL."""
    sha256: str
    """Of its text."""


def bundled() -> dict[str, str]:
    """Return the paths of the bundled configurations by name, such as `debian`."""
    return {path.stem: str(path) for path in sorted(CONFIGS.glob("*.yaml"))}


def named(path: str) -> str:
    """Return the file that `path` names: a bundled configuration where that is its name and there is no such file.

    Raises:
        UserError: It looks like a name, and no bundled configuration has it.
    """
    if os.path.exists(path) or not re.fullmatch(r"[\w-]+", path):
        return path
    known = bundled()
    if path not in known:
        close = nearest(path, known)
        hint = f"did you mean {' or '.join(map(repr, close))}?" if close else f"bundled are {', '.join(known)}"
        raise UserError(f"{path}: is neither a file nor a bundled configuration; {hint}")
    return known[path]


def choose(path: str | None, store: Store | None = None) -> tuple[str, bool]:
    """Return the configuration's file, and whether it was found in the working directory.

    Args:
        path: What the user named: a file, a URL, or a bundled configuration. None: the only configuration in the
            working directory.
        store: Where tables are read or made, if they are. One whose tables another file made is refused, unless `path`
            names the file.

    Raises:
        UserError: None is named, and there is not exactly one in the working directory, or the store is another's.
    """
    if path is not None:
        return named(path), False
    here = in_folder(".")
    made_by = None if store is None else record(store)
    made = "" if made_by is None or store is None else f"; the tables in {store.root} were made by {made_by.path}"
    if not here:
        raise UserError(
            f"there is no configuration in this folder{made}; name one with --config, write one for your own files "
            "with `twhin init FILE`, or take the bundled example with --config debian"
        )
    if len(here) > 1:
        raise UserError(
            f"there are several configurations in this folder, {', '.join(here)}{made}; name one with --config"
        )
    if made_by is not None and not _same(made_by, here[0]):
        raise UserError(
            f"the configuration in this folder is {here[0]}{made}; name the one that is meant with --config, or "
            "another store with --home"
        )
    return here[0], True


def in_folder(folder: str) -> list[str]:
    """Return the YAML files in a local folder that are configurations: those with the section `model`."""
    files = sorted(file for ending in ("yaml", "yml") for file in glob.glob(f"{glob.escape(folder)}/*.{ending}"))
    return [os.path.normpath(file) for file in files if _has_model(file)]


def _has_model(file: str) -> bool:
    try:
        if not os.path.isfile(file) or os.path.getsize(file) > LARGEST:
            return False
        return re.search(r"^model:", Path(file).read_text(encoding="utf-8"), re.MULTILINE) is not None
    except (OSError, UnicodeDecodeError):
        return False


def record(store: Store) -> Record | None:
    """Return which file a store's tables were made by; None where it does not say so."""
    try:
        with store.fs.open(store.path(RECORD), "r") as file:
            return Record(**json.load(file))
    except (OSError, ValueError, TypeError):
        return None


def remember(store: Store, path: str) -> None:
    """Write into the store that its tables are made by the file `path`.

    A store that cannot be written stays as it is: the record only saves from a mistake.
    """
    with suppress(OSError, UserError):
        made_by = Record(path if "://" in path else os.path.abspath(path), _sha256(path))
        if made_by == record(store):
            return
        text = json.dumps(vars(made_by), indent=1)
        target = store.path(RECORD)
        if store.is_local:
            draft = f"{target}.{os.getpid()}"
            Path(draft).write_text(text, encoding="utf-8")
            os.replace(draft, target)
        else:
            store.fs.pipe_file(target, text.encode())


def _same(made_by: Record, path: str) -> bool:
    """Tell whether a file is the one that was recorded, or has the same text: it may have moved with its store."""
    return os.path.abspath(path) == made_by.path or _sha256(path) == made_by.sha256


def _sha256(path: str) -> str:
    return hashlib.sha256(remote.text(path, LARGEST, "a YAML file").encode()).hexdigest()
