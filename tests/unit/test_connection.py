"""The connection on which load is sent: how an answer's end is told, and the times of its lines."""

from __future__ import annotations

import os
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from geventhttpclient.response import HTTPParseError

from loadtests import connection
from loadtests.connection import Connection, EndlessAnswer, Pieces, lines_of
from serving.models.catalog import ROOT

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
LAST = b"0\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


ANSWER = CHUNKED + chunk(b"data: one\n\n") + chunk(b"data: two\n\n") + LAST
BODY = b"data: one\n\ndata: two\n\n"
Parts = Iterable[bytes]  # of an answer, each sent for itself; an empty one closes the connection


@contextmanager
def serving(
    answers: Sequence[Parts],
    context: ssl.SSLContext | None = None,
    received: list[bytes] | None = None,
) -> Iterator[int]:
    """Give request after request the next answer, on whichever connection it comes; yield the port.

    Other servers in these tests open a connection for each request; here it is what is tested.
    """
    left = iter(answers)

    def serve(plain: socket.socket) -> None:
        with suppress(OSError), plain:
            talk = context.wrap_socket(plain, server_side=True) if context else plain
            talk.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while request := talk.recv(65536):
                if received is not None:
                    received.append(request)
                for part in next(left):
                    if not part:
                        talk.close()
                        return
                    talk.sendall(part)
                    time.sleep(0.01)

    def accept(listening: socket.socket) -> None:
        with suppress(OSError):
            while True:
                one = listening.accept()[0]
                threading.Thread(target=serve, args=(one,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=accept, args=(listening,), daemon=True).start()
        yield listening.getsockname()[1]


def connected(port: int, silence_s: float = 2.0) -> Connection:
    return Connection(f"http://127.0.0.1:{port}", "/v1", {"Accept": "text"}, 2.0, silence_s)


def lines(pieces: Pieces) -> list[bytes]:
    return [line for _, line in lines_of(pieces)[1]]


@pytest.mark.parametrize(
    "parts",
    [
        [ANSWER],
        [CHUNKED, chunk(b"data: one\n\n"), chunk(b"data: two\n\n"), LAST],
        [CHUNKED[:20], CHUNKED[20:], ANSWER[len(CHUNKED) :]],
        [ANSWER[:-3], ANSWER[-3:]],  # the mark of the end in two pieces
        [ANSWER[:-5] + b"0\r\nX-More: 1\r\n\r\n"],  # fields after the last chunk
        [HEAD + b"Content-Length: %d\r\n\r\n" % len(BODY), BODY[:9], BODY[9:]],
        [HEAD + b"\r\n" + BODY, b""],  # it ends with its connection
        [b"HTTP/1.1 100 Continue\r\n\r\n", ANSWER],
    ],
)
def test_the_end_of_an_answer_is_told_however_it_comes(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "LOOK_EVERY_S", 0.05)
    with serving([parts, [ANSWER]]) as port:
        asked = connected(port)
        first: Pieces = []
        second: Pieces = []
        asked.ask(b"{}", first, 5.0, 10_000)
        asked.ask(b"{}", second, 5.0, 10_000)  # what is left of the first would be in the second
        asked.close()
    assert lines(first) == lines(second) == [b"data: one", b"data: two"]
    assert b"".join(piece for _, piece in first) == b"".join(parts)


def test_an_answer_is_not_parsed_while_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long it takes: parsing it would keep all others' pieces waiting."""
    monkeypatch.setattr(connection, "LOOK_EVERY_S", 0.05)
    made = []
    monkeypatch.setattr(connection, "EndParser", lambda: made.append(1))
    pieces: Pieces = []
    with serving([[CHUNKED, *[chunk(b"data: one\n\n")] * 30, LAST]]) as port:  # 0.3 s and more
        asked = connected(port)
        asked.ask(b"{}", pieces, 5.0, 10_000)
        asked.close()
    assert lines(pieces) == [b"data: one"] * 30
    assert made == []


WITH_FIELD = CHUNKED + b"a;last=no\r\ndata: one\n\r\n" + chunk(b"data: two\n\n") + LAST


@pytest.mark.parametrize("answer", [ANSWER, WITH_FIELD, b"HTTP/1.1 100 Continue\r\n\r\n" + ANSWER])
def test_lines_do_not_depend_on_where_an_answer_is_cut(answer: bytes) -> None:
    for first in range(1, len(answer)):
        for second in range(first + 1, len(answer), 7):
            parts = answer[:first], answer[first:second], answer[second:]
            pieces = [(float(place), part) for place, part in enumerate(parts)]
            status, found = lines_of(pieces)
            assert status == 200
            assert [line for _, line in found] == [b"data: one", b"data: two"]


@pytest.mark.parametrize("size", [b"zz", b"-1", b"1_0", b"", b"5"])
def test_a_chunk_whose_length_is_wrong_is_no_http(size: bytes) -> None:
    with pytest.raises(HTTPParseError):
        lines_of([(0.0, CHUNKED), (0.1, size + b"\r\ndata: one\n\n\r\n")])


@pytest.mark.parametrize("idle_s", [0.0, 10.0])
def test_a_request_is_sent_again_where_the_server_has_closed_an_idle_connection(
    idle_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether that is noticed before it is sent, or by its answer."""
    monkeypatch.setattr(connection, "IDLE_S", idle_s)
    with serving([[ANSWER, b""], [ANSWER]]) as port:
        asked = connected(port)
        pieces: Pieces = []
        asked.ask(b"{}", [], 5.0, 10_000)
        time.sleep(0.1)
        asked.ask(b"{}", pieces, 5.0, 10_000)
        asked.close()
    assert lines(pieces) == [b"data: one", b"data: two"]


@pytest.mark.parametrize("parts", [[CHUNKED, chunk(b"data: one\n\n"), b""], [HEAD, b""], [b""]])
def test_an_answer_that_is_cut_off_is_an_error_and_what_came_is_kept(parts: Parts) -> None:
    pieces: Pieces = []
    with serving([parts]) as port:
        asked = connected(port)
        with pytest.raises(ConnectionResetError, match="before the answer"):
            asked.ask(b"{}", pieces, 5.0, 10_000)
    assert b"".join(piece for _, piece in pieces) == b"".join(parts)


def test_silence_is_counted_from_the_last_piece() -> None:
    """And not from one look at the answer to the next, of which the second comes too late here."""

    def standing_still() -> Iterator[bytes]:
        yield CHUNKED
        time.sleep(1.7)
        yield LAST

    with serving([standing_still()]) as port:
        asked = connected(port, silence_s=1.0)
        with pytest.raises(TimeoutError):
            asked.ask(b"{}", [], 30.0, 10_000)


def test_a_connection_is_opened_beforehand() -> None:
    nothing = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
    with serving([[nothing], [ANSWER]]) as port:
        asked = connected(port)
        pieces: Pieces = []
        asked.open("/health")
        asked.ask(b"{}", pieces, 5.0, 10_000)
        asked.close()
    assert lines(pieces) == [b"data: one", b"data: two"]


@pytest.mark.parametrize("path", ["", "/", "/openai", "/openai/"])
def test_every_request_goes_below_the_path_of_the_server_and_shows_the_key(path: str) -> None:
    nothing = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
    received: list[bytes] = []
    with serving([[nothing], [ANSWER]], received=received) as port:
        url, key = f"http://127.0.0.1:{port}{path}", {"Authorization": "Bearer a-key"}
        asked = Connection(url, "/v1/chat/completions", key, 2.0, 2.0)
        asked.open("/health")
        asked.ask(b"{}", [], 5.0, 10_000)
        asked.close()
    below = path.rstrip("/")
    assert [request.split(b" HTTP")[0].decode() for request in received] == [
        f"GET {below}/health",
        f"POST {below}/v1/chat/completions",
    ]
    assert all(b"\r\nAuthorization: Bearer a-key\r\n" in request for request in received)


def test_a_server_that_is_silent_is_not_waited_for_beforehand() -> None:
    """However long an answer may be silent: a trial would begin as much later."""
    with serving([[]]) as port:
        asked = Connection(f"http://127.0.0.1:{port}", "/v1", {}, 0.1, 3600.0)
        with pytest.raises(EndlessAnswer):
            asked.open("/health")


def test_a_connection_that_does_not_come_about_is_no_silence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = connected(1)

    def none_in_time() -> None:
        raise TimeoutError

    monkeypatch.setattr(asked._pool, "get_socket", none_in_time)
    with pytest.raises(ConnectionError, match="no connection within 2 s"):
        asked.ask(b"{}", [], 5.0, 10_000)


def test_a_long_prompt_is_sent_whole() -> None:
    """It does not fit into the kernel's buffers, and the server reads slowly."""
    got: list[int] = []
    body = b"x" * 8_000_000

    def serve(listening: socket.socket) -> None:
        talk = listening.accept()[0]
        while sum(got) < len(body):
            got.append(len(talk.recv(1_000_000)))
            time.sleep(0.001)
        talk.sendall(ANSWER)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=serve, args=(listening,), daemon=True).start()
        asked = connected(listening.getsockname()[1], 30)
        pieces: Pieces = []
        asked.ask(body, pieces, 30.0, 10_000)
        asked.close()
    assert lines(pieces) == [b"data: one", b"data: two"]


def test_a_line_has_the_time_at_which_its_last_byte_was_read() -> None:
    parts = [CHUNKED + chunk(b"data: o"), chunk(b"ne\n\ndata: t"), chunk(b"wo\n\nrest"), LAST]
    status, found = lines_of([(float(at), part) for at, part in enumerate(parts)])
    assert status == 200
    assert found == [(1.0, b"data: one"), (2.0, b"data: two"), (3.0, b"rest")]


def test_without_a_whole_head_there_is_no_status() -> None:
    assert lines_of([(0.0, CHUNKED[:25])]) == (0, [])
    assert lines_of([]) == (0, [])


_TLS = """
import sys
from loadtests.connection import Connection, lines_of
pieces = []
asked = Connection(f"https://localhost:{sys.argv[1]}", "/v1", {}, 2.0, 2.0)
asked.ask(b"{}", pieces, 5.0, 1_000_000)
print(len(lines_of(pieces)[1]))
"""


@pytest.mark.skipif(not shutil.which("openssl"), reason="openssl makes the certificate")
def test_over_tls_nothing_that_is_at_hand_waits_for_more(tmp_path: Path) -> None:
    """A record of TLS is read in parts, of which the event loop sees the first alone."""
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost",
         "-keyout", str(key), "-out", str(certificate)],
        check=True, capture_output=True,
    )  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    events = chunk(b"data: one\n\n" * 9000)
    with serving([[CHUNKED + events + LAST]], context) as port:
        said = subprocess.run(
            [sys.executable, "-c", _TLS, str(port)], cwd=ROOT, capture_output=True, text=True,
            env={**os.environ, "SSL_CERT_FILE": str(certificate)},
        )  # fmt: skip
    assert said.stdout.strip() == "9000", said.stderr
