"""Ports: on the loopback address, on which everything the lab starts listens, and on others."""

from __future__ import annotations

import socket

LOOPBACK = "127.0.0.1"


class PortTaken(Exception):
    """A port that was asked for is in use; the message names the setting that moves it."""


def free_port() -> int:
    """Find a port that nothing listens on at this moment."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


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
