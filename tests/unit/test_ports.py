"""Whether a program could listen at a port, before one tries to."""

from __future__ import annotations

import socket

import pytest

from serving.ports import LOOPBACK, PortTaken, free_port, require_free, require_port

ELSEWHERE = "192.0.2.1"  # of no machine: RFC 5737


def test_a_free_port_is_left_free() -> None:
    port = free_port()
    assert require_port(port, "PORT") == port
    require_free(LOOPBACK, port)
    with socket.socket() as listening:
        listening.bind((LOOPBACK, port))


def test_a_port_on_which_something_listens_is_taken() -> None:
    with socket.socket() as listening:
        listening.bind((LOOPBACK, 0))
        listening.listen()
        port = listening.getsockname()[1]
        with pytest.raises(OSError, match="in use"):
            require_free(LOOPBACK, port)
        with pytest.raises(PortTaken, match=f"port {port} .* choose another with WEB_PORT="):
            require_port(port, "WEB_PORT")


def test_nothing_listens_at_an_address_of_another_machine() -> None:
    with pytest.raises(OSError, match="assign"):
        require_free(ELSEWHERE, free_port())
