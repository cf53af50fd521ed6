"""Writes of a small object that happen only if it is as the writer last saw it; locks and pointers rest on them.

S3 has them (`If-None-Match: *` and `If-Match`: "conditional requests" in its user guide), and so has fsspec's memory.
Other remote file systems of fsspec can create an object only where there is none; there `replace` and `remove` look
first and write then, which excludes nobody, so `excludes` says whether they do.
"""

from __future__ import annotations

import hashlib
import threading
from typing import Any

_CHANGED, _CONFLICT = "PreconditionFailed", "ConditionalRequestConflict"
"""What S3 answers where a condition does not hold, and where another write of the object is under way."""
_memory = threading.Lock()


class Changed(Exception):  # noqa: N818 (it is what happened, not what to mend)
    """The object is no longer as the writer last saw it, or is gone; nothing was written."""


def excludes(fs: Any) -> bool:
    """Tell whether `replace` and `remove` do nothing where another writer was quicker, however quick it was."""
    return _is(fs, "s3") or _is(fs, "memory")


def create(fs: Any, path: str, content: bytes) -> str:
    """Write an object where there is none; return its tag.

    Raises:
        FileExistsError: There is one.
    """
    if not _is(fs, "s3"):
        with _memory:
            fs.pipe_file(path, content, mode="create")
        return _hash(content)
    try:
        return str(fs.pipe_file(path, content, mode="create")["ETag"])
    except FileExistsError:
        raise
    except OSError as error:
        if _code(error) in (_CHANGED, _CONFLICT):  # of a server that does not say which condition it was
            raise FileExistsError(path) from error
        raise


def read(fs: Any, path: str) -> tuple[bytes, str]:
    """Return an object and its tag, which `replace` and `remove` take. Raises FileNotFoundError where there is none."""
    if not _is(fs, "s3"):
        content = bytes(fs.cat_file(path))
        return content, _hash(content)
    # The tag first: where the object changes in between, the tag is the former one, and a write with it fails.
    tag = str(fs.info(path, refresh=True)["ETag"])
    return bytes(fs.cat_file(path)), tag


def replace(fs: Any, path: str, content: bytes, tag: str) -> str:
    """Write an object in place of the one with a tag; return the new tag.

    Raises:
        Changed: It is not that one any more.
    """
    if not _is(fs, "s3"):
        with _memory:
            _compare(fs, path, tag)
            fs.pipe_file(path, content)
        return _hash(content)
    try:
        return str(fs.pipe_file(path, content, IfMatch=tag)["ETag"])
    except OSError as error:
        raise _changed(error, path) from error


def remove(fs: Any, path: str, tag: str) -> None:
    """Remove the object with a tag.

    Raises:
        Changed: It is not that one any more.
    """
    if not _is(fs, "s3"):
        with _memory:
            _compare(fs, path, tag)
            fs.rm_file(path)
        return
    bucket, key, _ = fs.split_path(path)
    try:
        fs.call_s3("delete_object", Bucket=bucket, Key=key, IfMatch=tag)
    except OSError as error:
        raise _changed(error, path) from error


def _compare(fs: Any, path: str, tag: str) -> None:
    try:
        if _hash(bytes(fs.cat_file(path))) == tag:
            return
    except FileNotFoundError as error:
        raise Changed(path) from error
    raise Changed(path)


def _changed(error: OSError, path: str) -> Exception:
    """Return Changed where that is what an error of S3 says, else the error."""
    if isinstance(error, FileNotFoundError) or _code(error) in (_CHANGED, _CONFLICT):
        return Changed(path)
    return error


def _code(error: BaseException) -> str:
    response = getattr(error.__cause__, "response", None) or {}
    return str(response.get("Error", {}).get("Code", ""))


def _is(fs: Any, protocol: str) -> bool:
    return protocol in ((fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol)


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
