"""Several nodes that train together: how each finds the first one, by which interface, and how long it waits for it.

Node 0 (`launch.node_rank`) holds the meeting place, `launch.rdzv_endpoint`, and rank 0, and does all that is not
training. The others take part in its trainings: they wait until the place opens, train, and wait until it closes.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from contextlib import suppress

import psutil

from twhin_pipeline.config import TwhinConfig
from twhin_pipeline.errors import UnavailableError, UserError

POLL_S, CLOSING_S, CONNECT_S = 0.5, 60.0, 5.0
LOST = ("RendezvousConnectionError", "DistNetworkError")
"""Errors of torchrun where node 0, or the network to it, is gone."""
_PORT = 29400
_ELSEWHERE = "192.0.2.1"
"""An address of no machine (RFC 5737): which interface leads there is asked, and nothing is sent."""


def joins(config: TwhinConfig) -> bool:
    """Tell whether this node takes part in the trainings of node 0, which does everything else."""
    return config.launch.node_rank > 0


def endpoint(config: TwhinConfig) -> tuple[str, int]:
    """Return host and port of node 0. Raises UserError where `launch.rdzv_endpoint` is not of that form."""
    text = config.launch.rdzv_endpoint or ""
    host, colon, port = text.rpartition(":")
    if not colon:
        host, port = text, str(_PORT)
    if not host or not port.isdigit():
        raise UserError(f"launch.rdzv_endpoint: {text!r} is no host:port of the first node; write one such as a:29400")
    return host.strip("[]"), int(port)


def label(config: TwhinConfig) -> str:
    """Return what torchrun calls this node: its address for node 0, and otherwise a text.

    torchrun numbers ranks in the order of these, and needs an address only of the node with rank 0.
    """
    return f"~{config.launch.node_rank:05d}" if joins(config) else endpoint(config)[0]


def interface(config: TwhinConfig) -> str | None:
    """Return the network interface by which this node reaches the others; None where that cannot be found out.

    Left alone, gloo takes the one that the machine's name leads to, which on many is the loopback.
    """
    host = endpoint(config)[0]
    named = host == "localhost" or host[:1].isdigit() or ":" in host
    try:
        address = _own_address(host) if joins(config) else socket.gethostbyname(host)
        if address.startswith("127.") and not named:
            address = _own_address(_ELSEWHERE)
    except OSError:
        return None
    return next((name for name, held in psutil.net_if_addrs().items() if address in {a.address for a in held}), None)


def _own_address(towards: str) -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((towards, _PORT))
        return str(probe.getsockname()[0])


def is_open(config: TwhinConfig) -> bool:
    """Tell whether node 0 can be reached and trains."""
    with suppress(OSError), socket.create_connection(endpoint(config), timeout=CONNECT_S):
        return True
    return False


def wait_for_first(config: TwhinConfig, say: Callable[[str], None]) -> None:
    """Wait until node 0 opens a training.

    Raises:
        UnavailableError: It does not within `launch.join_timeout_s`.
    """
    limit, where = config.launch.join_timeout_s, config.launch.rdzv_endpoint
    deadline = time.monotonic() + limit
    if is_open(config):
        return
    say(f"node {config.launch.node_rank} waits for node 0 at {where}, {limit:g} s at most")
    while not is_open(config):
        if time.monotonic() > deadline:
            raise UnavailableError(
                f"node 0 opened no training at {where} within {limit:g} s; start the same command there with "
                "launch.node_rank=0, see that the address is right and the port open, or raise launch.join_timeout_s"
            )
        time.sleep(POLL_S)


def wait_for_close(config: TwhinConfig) -> None:
    """Wait until node 0 has closed its training, `CLOSING_S` at most: what it opens next is another one."""
    deadline = time.monotonic() + CLOSING_S
    while is_open(config) and time.monotonic() < deadline:
        time.sleep(POLL_S)
