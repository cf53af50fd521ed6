"""What is known of a source's files when they are read: enough to tell later whether a file is still the same."""

from __future__ import annotations

import os
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

from twhin_pipeline import remote

CHECKSUMS = ("ETag", "etag", "md5Hash", "md5", "content_md5", "sha256")
"""Where file systems have a checksum that costs no reading."""
TIMES = ("LastModified", "last_modified", "mtime", "updated", "created")


def facts(files: Iterable[str]) -> list[dict[str, Any]]:
    """Return `path`, `bytes`, `modified` (ISO, UTC) and `checksum` of files, as far as their file system tells them.

    A checksum of a local file would take another reading of it, so it has none; size and time tell a change. Of what is
    no file, such as a query or a table of a lake, only the `path` is known.
    """
    return [_facts(file) for file in files]


def _facts(file: str) -> dict[str, Any]:
    known: dict[str, Any] = {"path": file}
    try:
        local = remote.local_path(file)
        if local is not None:
            status = os.stat(local)
            if os.path.isfile(local):
                known |= {"bytes": status.st_size, "modified": _iso(datetime.fromtimestamp(status.st_mtime, UTC))}
            return known
        fs, inner = remote.filesystem(file)
        info = fs.info(inner)
    except Exception:  # of many kinds, as the libraries are; who reads the file says what is wrong
        return known
    if isinstance(info.get("size"), int):
        known["bytes"] = info["size"]
    for name in TIMES:
        value = info.get(name)
        if isinstance(value, int | float):
            value = datetime.fromtimestamp(value, UTC)
        if isinstance(value, datetime):
            known["modified"] = _iso(value)
            break
    checksum = next((str(info[name]).strip('"') for name in CHECKSUMS if info.get(name)), None)
    return known | ({"checksum": checksum} if checksum else {})


def _iso(time: datetime) -> str:
    return (time if time.tzinfo else time.replace(tzinfo=UTC)).astimezone(UTC).isoformat(timespec="milliseconds")
