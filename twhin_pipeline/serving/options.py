"""What `twhin serve` can be asked for, and the API keys, which are read where they are needed and kept nowhere else."""

from __future__ import annotations

import hmac
import ipaddress
import os
from dataclasses import dataclass
from pathlib import Path

from twhin_pipeline.errors import UserError

KEY_ENV = "TWHIN_API_KEY"
SHORTEST_KEY = 16
"""Characters of an API key at least: a shorter one can be guessed."""


@dataclass(frozen=True)
class ServeOptions:
    """The options of a service. They hold no secret, so they may be logged and sent to other processes."""

    home: str
    """The store: a folder or URL."""
    host: str = "127.0.0.1"
    port: int = 8000
    workers: int = 1
    """Processes that answer requests."""
    threads: int = 1
    """Threads of a worker that compute."""
    interval: float = 2.0
    """Seconds between two looks at which release is current."""
    api_key_file: str | None = None
    """A file with the API keys, one a line. None: the key is in `TWHIN_API_KEY`, or there is none."""
    max_k: int = 1_000
    """Results for one id at most."""
    max_batch: int = 1_000
    """Ids of one request at most, those that are left out included."""
    max_results: int = 100_000
    """Results of one request at most: ids times k."""
    max_body: int = 1 << 20
    """Bytes of a request's body at most."""
    time_limit: float = 10.0
    """Seconds that a request may take."""
    interests: bool = False
    """Make the clusters of many interests when a release is opened, so that requests may ask for them."""
    access_log: bool = True
    """Log a line for each request."""


class ApiKeys:
    """The keys that open a service; none opens it to everyone."""

    def __init__(self, keys: list[str]) -> None:
        self._keys = [key.encode() for key in keys]

    @classmethod
    def read(cls, file: str | None) -> ApiKeys:
        """Read the keys of a file, one a line, or the one in `TWHIN_API_KEY`.

        Raises:
            UserError: The file cannot be read or has no key, or a key is too short or is not plain ASCII.
        """
        where = file or KEY_ENV
        text = os.environ.get(KEY_ENV, "")
        if file is not None:
            try:
                text = Path(file).read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                reason = getattr(error, "strerror", None) or "is not text"
                raise UserError(f"{file}: the API key cannot be read ({reason}); give another --api-key-file") from None
        keys = [line.strip() for line in text.splitlines() if line.strip()]
        if not keys and (file is not None or KEY_ENV in os.environ):
            raise UserError(f"{where}: has no API key; write one into it, such as `openssl rand -hex 24` prints")
        for key in keys:
            if len(key) < SHORTEST_KEY or not key.isascii() or any(char.isspace() for char in key):
                raise UserError(
                    f"{where}: an API key needs at least {SHORTEST_KEY} ASCII characters without spaces; "
                    "`openssl rand -hex 24` prints one"
                )
        return cls(keys)

    def __bool__(self) -> bool:
        return bool(self._keys)

    def open_with(self, given: bytes) -> bool:
        """Tell whether a key opens the service. How long that takes says nothing of the keys."""
        matches = [hmac.compare_digest(key, given) for key in self._keys]  # all of them, whichever matches
        return any(matches)


def is_loopback(host: str) -> bool:
    """Tell whether only this machine reaches an address; of a name other than `localhost` that is not assumed."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_access(options: ServeOptions) -> None:
    """Refuse a service that other machines reach without a key.

    Raises:
        UserError: There is no key and the address is not a loopback address, or the keys cannot be read.
    """
    keys = ApiKeys.read(options.api_key_file)
    if not keys and not is_loopback(options.host):
        raise UserError(
            f"--host {options.host}: other machines reach this address, so an API key is needed; write one into a file "
            f"(`openssl rand -hex 24 > key`) and pass --api-key-file, or set {KEY_ENV}; or bind 127.0.0.1"
        )
