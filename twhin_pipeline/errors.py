"""Mistakes a user can mend: one line that says where, what and how."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in configuration, data or usage. Its message is one sentence or a short list, and ends in the remedy.

    The command line prints it without a traceback and exits with 2.
    """


class UnavailableError(UserError):
    """What is needed is not to be had now and may be later: a server is away, or another process writes the table.

    Who runs by itself tries again; any other mistake stays until someone mends it.
    """


def nearest(word: str, known: Iterable[object], count: int = 3) -> list[str]:
    """Return up to `count` members of `known` that look like `word` (in whatever case), best first."""
    named: dict[str, list[str]] = {}
    for k in known:
        named.setdefault(str(k).lower(), []).append(str(k))
    close = difflib.get_close_matches(str(word).lower(), named, n=count, cutoff=0.5)
    return [k for lowered in close for k in named[lowered]][:count]


def unknown(what: str, word: object, known: Iterable[object]) -> str:
    """Say that `word` is not a known `what`, with the nearest known ones or, failing that, all of them."""
    names = [str(k) for k in known]
    close = nearest(str(word), names)
    hint = f"did you mean {' or '.join(repr(c) for c in close)}?" if close else f"known: {', '.join(sorted(names))}"
    return f"unknown {what} {word!r}; {hint}"


def out_of_handles(error: BaseException) -> bool:
    """Tell whether an error says that the process, or the machine, can open no further file."""
    return getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE) or "Too many open files" in str(error)


def no_handles(what: str) -> str:
    """Say of `what` that no file can be opened any more, and what helps."""
    import resource

    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return f"{what}: no more files can be opened (the limit is {limit:,}); raise it, such as by `ulimit -n 4096`"
