"""The proxy before Locust's web UI: which requests it passes on."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest
import requests

from dashboards.front import MOST_BODY_BYTES, Server, handler
from tests.cases import each
from tests.unit.hostile import says, serving, whole


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """Of a proxy before a server that answers `there`."""
    with (
        serving({"": says(whole("there"))}) as url,
        Server(("127.0.0.1", 0), handler(url.removeprefix("http://"))) as server,
    ):
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


@each(
    ("host", "status"),
    [("127.0.0.1", 200), ("localhost:8080", 200), ("evil.example", 421), ("", 421), ("[", 421),
     ("127.0.0.1.evil.example", 421)],
)  # fmt: skip
def test_only_a_request_that_names_this_machine_passes(port: int, host: str, status: int) -> None:
    """Not one by a page whose site has its own name resolve to 127.0.0.1."""
    answer = requests.get(f"http://127.0.0.1:{port}/", headers={"Host": host}, timeout=10)
    assert (answer.status_code, answer.text == "there") == (status, status == 200)


def test_what_is_no_plain_request_is_refused(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), 10) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil\r\n\r\n")
        assert b" 400 " in connection.recv(1000)
    url = f"http://127.0.0.1:{port}/"
    assert requests.post(url, iter([b"x"]), timeout=10).status_code == 411
    assert requests.post(url, "1" * (MOST_BODY_BYTES + 1), timeout=10).status_code == 413
    assert requests.post(url, "1", headers={"Origin": "http://evil"}, timeout=10).status_code == 403
