"""An HTTP/1.1 connection that takes the time of all that it reads, and does little else meanwhile.

What arrives is read in the event loop itself and kept as it is, with the time: no greenlet is
switched to and nothing is parsed while other answers' chunks wait to be read. `lines_of` parses
it when there is time.

The end of an answer in chunks is told by the chunk of length 0 in its last bytes. Whatever else an
answer is, and one that seems to stand still, is parsed as it comes.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from http.client import HTTPException
from urllib.parse import urlsplit

import gevent
import gevent.event
from gevent.socket import socket as Socket
from gevent.ssl import SSLWantReadError
from geventhttpclient.connectionpool import ConnectionPool, SSLConnectionPool
from geventhttpclient.response import HTTPResponse

Pieces = list[tuple[float, bytes]]  # of an answer, head included, each with the time it was read
Lines = list[tuple[float, bytes]]  # of its body, without their ends, each with its last piece's

BLOCK_BYTES = 65536
LOOK_EVERY_S = 1.0  # at an answer that is under way
IDLE_S = 1.0  # after which a server may have closed a connection; none is known to do so sooner
END_OF_HEAD, LAST_CHUNK = b"\r\n\r\n", b"0\r\n\r\n"
END_OF_LAST = b"\r\n" + LAST_CHUNK  # where it came together with the chunk before it
READ = 1  # of libev: the socket is readable
now = time.monotonic


class EndlessAnswer(Exception):
    """An answer was cut off: it took more time or more bytes than the request can need."""


class AnswerParser(HTTPResponse):
    """Parses an answer's pieces; what is new of its body is in `fresh`."""

    def __init__(self) -> None:
        super().__init__("POST")
        self.fresh = b""

    def _on_body(self, buf: bytearray) -> None:
        self.fresh += buf

    @property
    def whole(self) -> bool:
        """Whether the answer has come to its end; one of 100 to 199 comes before another."""
        return bool(self.message_complete and self.status_code >= 200)


class Connection:
    """Sends requests to one path, one after another, and reads their answers."""

    def __init__(
        self, url: str, path: str, headers: Mapping[str, str], connect_s: float, silence_s: float
    ) -> None:
        """`connect_s` is the most time to connect, `silence_s` the longest pause in an answer."""
        address = urlsplit(url)
        self._tls, host = address.scheme == "https", address.hostname or ""
        port = address.port or (443 if self._tls else 80)
        kind = SSLConnectionPool if self._tls else ConnectionPool
        self._pool = kind(
            host, port, host, port, connection_timeout=connect_s, network_timeout=silence_s
        )
        self._silence_s = silence_s
        self._host = address.netloc.rpartition("@")[2]
        fields = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        self._head = f"POST {path} HTTP/1.1\r\nHost: {self._host}\r\n{fields}Content-Length: "
        self._socket: Socket | None = None
        self._done = gevent.event.Event()
        self._failure: Exception | None = None
        self._last_s = 0.0  # when the last answer ended

    def open(self, healthy: str) -> None:
        """Connect, and ask for this path once. Raises OSError, HTTPParseError, EndlessAnswer."""
        request = f"GET {healthy} HTTP/1.1\r\nHost: {self._host}\r\n\r\n"
        self._exchange(request.encode(), [], self._silence_s, BLOCK_BYTES)

    def close(self) -> None:
        """Close the connection; the next request opens another one."""
        if self._socket is not None:
            self._readable.close()
            self._pool.release_socket(self._socket)
            self._socket = None

    def ask(self, body: bytes, pieces: Pieces, most_s: float, most_bytes: int) -> None:
        """Send a request, and read its answer into `pieces` as it comes.

        Raises EndlessAnswer where it takes more time or bytes than these, else OSError or
        HTTPParseError; what came is in `pieces` all the same.
        """
        head = f"{self._head}{len(body)}\r\n\r\n".encode()
        self._exchange(head + body, pieces, most_s, most_bytes)

    def _exchange(self, request: bytes, pieces: Pieces, most_s: float, most_bytes: int) -> None:
        deadline_s = now() + most_s
        reused = self._is_open()
        try:
            self._send_and_read(request, pieces, deadline_s, most_s, most_bytes)
        except ConnectionError:
            if pieces or not reused:  # the server may have closed it while nothing was sent
                raise
            self._send_and_read(request, pieces, deadline_s, most_s, most_bytes)

    def _is_open(self) -> bool:
        """Whether there is a connection. One on which something came unasked is closed."""
        if self._socket is None:
            return False
        if now() - self._last_s < IDLE_S:
            return True
        with contextlib.suppress(BlockingIOError, SSLWantReadError):
            with contextlib.suppress(ConnectionError):
                self._socket.recv(1)
            self.close()
            return False
        return True

    def _send_and_read(
        self, request: bytes, pieces: Pieces, deadline_s: float, most_s: float, most_bytes: int
    ) -> None:
        if self._socket is None:
            self._socket = self._pool.get_socket()
            self._readable = gevent.get_hub().loop.io(self._socket.fileno(), READ)
        self._pieces, self._most_bytes, self._bytes = pieces, most_bytes, 0
        self._parsed: AnswerParser | None = None
        self._keeps = True
        try:
            self._socket.settimeout(self._silence_s)
            sent = self._socket.send(request)
            if sent < len(request):
                self._socket.sendall(request[sent:])
            self._socket.settimeout(0)
            self._read(deadline_s, most_s)
        except BaseException:
            self.close()
            raise
        self._last_s = self._pieces[-1][0]
        if not self._keeps:
            self.close()

    def _read(self, deadline_s: float, most_s: float) -> None:
        self._failure = None
        self._done.clear()
        last_s = now()
        self._readable.start(self._arrived)
        try:
            while not self._done.wait(self._next_look_s(last_s)):
                if now() > deadline_s:
                    raise EndlessAnswer(f"no end of the answer within {most_s:.0f} s")
                last_s = self._pieces[-1][0] if self._pieces else last_s
                if now() >= last_s + self._silence_s:
                    raise TimeoutError("timed out")
                if self._parse_all().whole:
                    break
        finally:
            self._readable.stop()
        if self._failure is not None:
            raise self._failure

    def _next_look_s(self, last_s: float) -> float:
        """Return how long to wait until the next look at an answer of which this piece was last."""
        return min(LOOK_EVERY_S, max(0.0, last_s + self._silence_s - now()))

    def _arrived(self) -> None:
        """Take what has arrived: called by the event loop, which must not be made to wait."""
        assert self._socket is not None
        try:
            more = True
            while more:
                data = self._socket.recv(BLOCK_BYTES)
                if self._takes(now(), data):
                    self._end()
                    return
                more = self._tls  # may have more at hand than the event loop can see
        except (BlockingIOError, SSLWantReadError):
            return
        except Exception as failure:
            self._failure = failure
            self._end()

    def _end(self) -> None:
        """Let the request go on; what comes after its answer is not read with it."""
        self._readable.stop()
        self._done.set()

    def _takes(self, at_s: float, data: bytes) -> bool:
        """Keep what was read; return whether the answer has ended with it. Raises as `ask` does."""
        if not data:
            return self._cut_off()
        self._pieces.append((at_s, data))
        self._bytes += len(data)
        if self._bytes > self._most_bytes:
            raise EndlessAnswer(f"the answer has more than {self._most_bytes} bytes")
        if len(self._pieces) == 1:
            self._begin(data)
        if self._parsed is None:
            return data.endswith(LAST_CHUNK) and (data.endswith(END_OF_LAST) or data == LAST_CHUNK)
        self._parsed.feed(data)
        return self._parsed.whole

    def _cut_off(self) -> bool:
        """Whether the answer ends with its connection. Raises ConnectionError where it does not."""
        answer = self._parse_all()
        self._keeps = False
        if answer.message_begun:
            with contextlib.suppress(HTTPException):  # nothing more is to be parsed
                answer.feed(b"")  # the end
        if not answer.whole:
            raise ConnectionResetError("the connection was closed before the answer's end")
        return True

    def _begin(self, data: bytes) -> None:
        """Look at an answer's head, in what came first of it: how will it end?"""
        head, end, _ = data.partition(END_OF_HEAD)
        head = head.lower()
        self._keeps = head.startswith(b"http/1.1") and b"connection: close" not in head
        if not end or b"transfer-encoding: chunked" not in head:
            self._parsed = AnswerParser()

    def _parse_all(self) -> AnswerParser:
        """Parse all that has come, and from now on whatever comes, as it does."""
        if self._parsed is None:
            self._parsed = AnswerParser()
            for _, piece in self._pieces:
                self._parsed.feed(piece)
        return self._parsed


def lines_of(pieces: Pieces) -> tuple[int, Lines]:
    """Parse an answer; return its status, 0 without a whole head, and its lines but empty ones.

    Raises HTTPParseError where it is no HTTP.
    """
    answer, left = AnswerParser(), b""
    lines: Lines = []
    for at_s, piece in pieces:
        answer.feed(piece)
        if answer.fresh:
            *ended, left = (left + answer.fresh).split(b"\n")
            answer.fresh = b""
            lines += [(at_s, line) for line in ended if line]
    if left:
        lines.append((pieces[-1][0], left))
    return answer.status_code if answer.headers_complete else 0, lines
