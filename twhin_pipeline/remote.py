"""What is named by a path or URL: read with limits of time and size, and with one clear message where it cannot be."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from twhin_pipeline import extras
from twhin_pipeline.errors import UnavailableError, UserError

STALL_S = 30.0
"""A web server that sends nothing for so many seconds is given up."""
AWAY = re.compile(r"Timeout|TimedOut|Connect|Unavailable|Disconnected|Payload|SlowDown|Throttl")
"""In the names of errors, each library having its own, that say of a server that it does not answer now."""


@contextmanager
def reading(what: str, remedy: str = "correct it, install what it needs, or try again later") -> Iterator[None]:
    """Turn whatever a file system's library raises into a UserError; each has errors of many kinds of its own.

    Raises:
        UnavailableError: The server is away, or cannot answer now.
        UserError: Anything else that keeps `what` from being read.
    """
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        kind = UnavailableError if is_away(error) else UserError
        raise kind(f"{what}: cannot be read ({reason(error)}); {remedy}") from error


def is_away(error: BaseException | None) -> bool:
    """Tell whether an error, or what caused it, says that a server does not answer now."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:  # of some libraries' errors the causes go in a circle
        seen.add(id(error))
        status = getattr(error, "status", None)
        if isinstance(error, (TimeoutError, ConnectionError)) or AWAY.search(type(error).__name__):
            return True
        if isinstance(status, int) and status >= 500:
            return True
        error = error.__cause__ or error.__context__
    return False


def reason(error: BaseException) -> str:
    """Return what an error says on one line; that of its cause where it only repeats what was looked for."""
    if isinstance(error, TimeoutError):
        return f"no answer for {STALL_S:g} s"
    cause = error.__cause__
    if isinstance(error, FileNotFoundError) and cause is not None and not isinstance(cause, FileNotFoundError):
        return reason(cause)
    text = " ".join(str(error).split())
    return text if text and len(text) > 5 else f"{type(error).__name__} {text}".strip()


def refused(error: BaseException) -> UserError | None:
    """Return what to tell of an error of the library that speaks to an object store; None of any other error.

    Its messages hold no credentials: those are sent as a signature in headers.
    """
    seen: set[int] = set()
    one: BaseException | None = error
    while one is not None and id(one) not in seen:
        seen.add(id(one))
        if type(one).__module__.partition(".")[0] in ("botocore", "aiobotocore"):
            kind = UnavailableError if is_away(error) else UserError
            return kind(
                f"the object store cannot be used ({reason(error)}); see that the bucket is there and may be read and "
                "written, that the environment has the credentials (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
                "AWS_PROFILE), and that the server answers (AWS_ENDPOINT_URL, if it is not Amazon's)"
            )
        one = one.__cause__ or one.__context__
    return None


def filesystem(url: str) -> tuple[Any, str]:
    """Return the file system of a URL and the path in it; one by HTTP waits `STALL_S` seconds at most for an answer.

    Of S3, whose library waits and tries again by itself, no listing is kept: other processes write there too.

    Raises:
        UserError: The package that reads such URLs is not installed.
    """
    import fsspec  # only here: what is local needs none of it

    more = options(url)
    # fsspec reads such URLs by aiohttp, and says so itself where that is not installed.
    if url.startswith(("http://", "https://")) and find_spec("aiohttp") is not None:
        aiohttp = import_module("aiohttp")
        limit = aiohttp.ClientTimeout(total=None, connect=STALL_S, sock_connect=STALL_S, sock_read=STALL_S)
        more = {"client_kwargs": {"timeout": limit}}
    fs, inner = fsspec.core.url_to_fs(url, **more)
    return fs, inner


def options(url: str) -> dict[str, Any]:
    """Return what fsspec is told of every file system of a URL's protocol."""
    if not url.startswith(("s3://", "s3a://")):
        return {}
    extras.need("s3fs", "s3:// URLs")
    return {"use_listings_cache": False}


def refuse_password(url: str, what: str) -> None:
    """Raise UserError where a URL has a password in it: `what`, such as a store's root, is written to tables and logs.

    The message does not repeat it.
    """
    if re.match(r"[\w+.-]+://[^/@]*:[^/@]*@", url):
        raise UserError(
            f"{what}: has a user's password in its URL, which would be written to tables and logs; take it out, and "
            "give it in the environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile, for s3://)"
        )


def local_path(url: str) -> str | None:
    """Return the local path that a path or a URL of this machine's files names; None for other URLs."""
    protocol, separator, path = url.partition("://")
    if not separator:
        return url
    return path if protocol in ("file", "local") else None


def refuse_special(path: str) -> None:
    """Raise UserError where a local path names something that is neither file nor folder, which might never end."""
    mode = os.stat(path).st_mode if os.path.exists(path) else stat.S_IFREG
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        kind = "a named pipe" if stat.S_ISFIFO(mode) else "a device" if stat.S_ISCHR(mode) else "no plain file"
        raise UserError(f"{path}: is {kind}; copy what it gives to a file, and name that")


def fetch(url: str, path: str) -> str:
    """Copy what a URL names to a local file whose path begins with `path`, and return its path.

    Raises:
        UserError: The server does not answer, or not with the whole file.
    """
    local = f"{path}-{url.partition('?')[0].rpartition('/')[2]}"
    with reading(url):
        fs, inner = filesystem(url)
        fs.get_file(inner, local)
    return local


def text(path: str, most: int, what: str) -> str:
    """Return the text of a small file, a path or URL.

    Args:
        path: The file.
        most: Its largest size, bytes.
        what: What it should be, for messages, such as `a YAML file`.

    Raises:
        UserError: It cannot be read, is larger, or is no UTF-8 text.
    """
    if (local := local_path(path)) is not None:
        refuse_special(local)
    with reading(path, f"give the path or URL of {what}"):
        if local is not None:
            with open(local, "rb") as file:
                content = file.read(most + 1)
        else:
            fs, inner = filesystem(path)
            with fs.open(inner, "rb") as file:
                content = file.read(most + 1)
    if len(content) > most:
        raise UserError(f"{path}: is larger than {most:,} bytes; give the path or URL of {what}")
    try:
        return str(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: cannot be read (it is no UTF-8 text: {error}); give the path or URL of {what}"
        ) from error
