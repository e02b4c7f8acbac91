"""Ports: on the loopback address, on which everything the lab starts listens, and on others."""

from __future__ import annotations

import socket
from collections import deque

LOOPBACK = "127.0.0.1"
MOST_HELD = 64
_held: deque[socket.socket] = deque(maxlen=MOST_HELD)


class PortTaken(Exception):
    """A port that was asked for is in use; the message names the setting that moves it."""


def free_port() -> int:
    """Draw a port that nothing listens on, and hold it for the server that is to listen there.

    Until this process ends, or has drawn MOST_HELD more, no other program draws it, and no
    connection leaves from it. A server can still listen there that lets its address be used again
    (SO_REUSEADDR or SO_REUSEPORT), as servers do: a socket that only holds a port is no obstacle.
    """
    holding = socket.socket()
    holding.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holding.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    holding.bind((LOOPBACK, 0))
    _held.append(holding)
    return int(holding.getsockname()[1])


def require_free(host: str, port: int) -> None:
    """Check that a program can listen there: `host` is a name or IPv4 address of this machine.

    Raises OSError where the port is taken, or the host no address of this machine.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, port))


def require_port(port: int, setting: str) -> int:
    """Return the port if it is free. Raises PortTaken, which names the setting that moves it."""
    try:
        require_free(LOOPBACK, port)
    except OSError as error:
        raise PortTaken(
            f"port {port} on {LOOPBACK} is taken: choose another with {setting}="
        ) from error
    return port
