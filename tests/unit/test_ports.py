"""Whether a program could listen at a port, before one tries to."""

from __future__ import annotations

import socket

import pytest

from serving.processes.ports import (
    LOOPBACK,
    MOST_HELD,
    PortTaken,
    free_port,
    require_free,
    require_port,
)

ELSEWHERE = "192.0.2.1"  # of no machine: RFC 5737


@pytest.mark.parametrize("option", [socket.SO_REUSEADDR, socket.SO_REUSEPORT])
def test_a_port_is_held_for_the_server_that_is_to_listen_there(option: int) -> None:
    """Whoever takes any port, or this one without a word about it, does not get it."""
    port = free_port()
    assert require_port(port, "PORT") == port
    require_free(LOOPBACK, port)
    with socket.socket() as stranger, pytest.raises(OSError, match="in use"):
        stranger.bind((LOOPBACK, port))
    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, option, 1)
        listening.bind((LOOPBACK, port))
        listening.listen()
        socket.create_connection((LOOPBACK, port)).close()


def test_the_ports_that_are_held_are_bounded() -> None:
    first = free_port()
    assert len({free_port() for _ in range(MOST_HELD)}) == MOST_HELD
    with socket.socket() as anybody:
        anybody.bind((LOOPBACK, first))


def test_a_port_on_which_something_listens_is_taken() -> None:
    with socket.socket() as listening:
        listening.bind((LOOPBACK, 0))
        listening.listen()
        port = listening.getsockname()[1]
        with pytest.raises(OSError, match="in use"):
            require_free(LOOPBACK, port)
        with pytest.raises(PortTaken, match=f"port {port} .* PORT="):
            require_port(port, "PORT")


def test_nothing_listens_at_an_address_of_another_machine() -> None:
    with pytest.raises(OSError, match="assign"):
        require_free(ELSEWHERE, free_port())
