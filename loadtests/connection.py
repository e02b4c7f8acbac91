"""An HTTP/1.1 connection that takes the time of all that it reads, and does little else meanwhile.

What arrives is read in the event loop itself and kept as it is, with the time: no greenlet is
switched to and nothing is parsed while other answers' chunks wait to be read. `lines_of` parses
it when there is time.

The end of an answer in chunks is told by the chunk of length 0 in its last bytes. Any other answer
is parsed as it comes. One that stands still is parsed once, since its end may have been missed.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
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


class EndParser(HTTPResponse):
    """Parses an answer's pieces to find its end, and keeps nothing of its body."""

    def __init__(self) -> None:
        super().__init__("POST")

    def _on_body(self, buf: bytearray) -> None:
        """Leave the body alone: the pieces hold it."""

    @property
    def whole(self) -> bool:
        """Whether the answer has come to its end; one of 100 to 199 comes before another."""
        return bool(self.message_complete and self.status_code >= 200)


class BodyParser(EndParser):
    """Parses an answer's pieces; what is new of its body is in `fresh`."""

    def __init__(self) -> None:
        super().__init__()
        self.fresh = b""

    def _on_body(self, buf: bytearray) -> None:
        self.fresh += buf


class Connection:
    """Sends requests to one path of a server, one after another, and reads their answers."""

    def __init__(
        self, url: str, path: str, headers: Mapping[str, str], connect_s: float, silence_s: float
    ) -> None:
        """`url` is the server's, below which `path` is; `headers` go with every request.

        `connect_s` is the most time to connect, `silence_s` the longest pause in an answer.
        """
        address = urlsplit(url)
        self._tls, host = address.scheme == "https", address.hostname or ""
        port = address.port or (443 if self._tls else 80)
        kind = SSLConnectionPool if self._tls else ConnectionPool
        self._pool = kind(
            host, port, host, port, connection_timeout=connect_s, network_timeout=silence_s
        )
        self._connect_s, self._silence_s = connect_s, silence_s
        self._below = address.path.rstrip("/")
        fields = {"Host": address.netloc.rpartition("@")[2], **headers}
        self._fields = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        self._head = f"{self._begun('POST', path)}Content-Length: "
        self._socket: Socket | None = None
        self._done = gevent.event.Event()
        self._failure: Exception | None = None
        self._last_s = 0.0  # when the last answer ended

    def open(self, healthy: str) -> None:
        """Connect, and ask for this path once, all of it within the time to connect.

        Raises OSError, HTTPParseError, EndlessAnswer.
        """
        request = f"{self._begun('GET', healthy)}\r\n"
        self._exchange(request.encode(), [], self._connect_s, BLOCK_BYTES)

    def _begun(self, method: str, path: str) -> str:
        """Return the head of a request to a path of the server, as far as all have the same."""
        return f"{method} {self._below}{path} HTTP/1.1\r\n{self._fields}"

    def close(self) -> None:
        """Close the connection; the next request opens another one."""
        if self._socket is not None:
            self._readable.close()
            self._pool.release_socket(self._socket)
            self._socket = None

    def ask(self, body: bytes, pieces: Pieces, most_s: float, most_bytes: int) -> None:
        """Send a request, and read its answer into `pieces` as it comes.

        Raises EndlessAnswer where it takes more time or bytes than these, TimeoutError where the
        server is silent for too long, else OSError or HTTPParseError; what came is in `pieces` all
        the same.
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
            try:
                self._socket = self._pool.get_socket()
            except TimeoutError as error:
                raise ConnectionError(f"no connection within {self._connect_s:g} s") from error
            # timers of the same turn of the loop come after it: what has arrived waits for none
            loop = gevent.get_hub().loop
            self._readable = loop.io(self._socket.fileno(), READ, True, loop.MAXPRI)
            # gevent's own method is a function in Python around this one, for sockets that block
            self._receive = self._socket.recv if self._tls else self._socket._sock.recv
        self._pieces, self._most_bytes, self._bytes = pieces, most_bytes, 0
        self._parsed: EndParser | None = None
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
        last_s, looked_at = now(), 0
        self._readable.start(self._arrived)
        try:
            while not self._done.wait(self._next_look_s(last_s)):
                at_s, before_s = now(), last_s
                if at_s > deadline_s:
                    raise EndlessAnswer(f"no end of the answer within {most_s:.0f} s")
                last_s = self._pieces[-1][0] if self._pieces else last_s
                if at_s >= last_s + self._silence_s:
                    raise TimeoutError(f"nothing came for {self._silence_s:g} s")
                stands_still = last_s == before_s and len(self._pieces) > looked_at
                if stands_still and self._parse_all().whole:
                    break
                looked_at = len(self._pieces) if stands_still else looked_at
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
                data = self._receive(BLOCK_BYTES)
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
        if self._parsed is not None:
            self._parsed.feed(data)
            return self._parsed.whole
        if len(data) < len(END_OF_LAST) and len(self._pieces) > 1:  # the mark may be in two pieces
            data = self._pieces[-2][1][-len(END_OF_LAST) :] + data
        return data.endswith(END_OF_LAST)

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
            self._parsed = EndParser()

    def _parse_all(self) -> EndParser:
        """Parse all that has come."""
        if self._parsed is not None:
            return self._parsed
        answer = EndParser()
        for _, piece in self._pieces:
            answer.feed(piece)
        return answer


def lines_of(pieces: Pieces) -> tuple[int, Lines]:
    """Parse an answer; return its status, 0 without a whole head, and its lines but empty ones.

    Raises HTTPParseError where it is no HTTP.
    """
    answer, left = BodyParser(), b""
    lines: Lines = []
    for at_s, body in _bodies(pieces, answer):
        if not left and body.endswith(b"\n\n") and body.count(b"\n") == 2:  # an event by itself
            lines.append((at_s, body[:-2]))
            continue
        *ended, left = (left + body).split(b"\n")
        lines += [(at_s, line) for line in ended if line]
    if left:
        lines.append((pieces[-1][0], left))
    return answer.status_code if answer.headers_complete else 0, lines


def _bodies(pieces: Pieces, answer: BodyParser) -> Iterator[tuple[float, bytes]]:
    """Yield what each piece holds of the body.

    The parser gets the head. Pieces that hold whole chunks, as nearly all do, are read without it;
    from the first one that does not, it gets all.
    """
    whole_chunks = False
    for place, (at_s, piece) in enumerate(pieces):
        rest = piece
        if place == 0:
            head, end, after = piece.partition(END_OF_HEAD)
            if end and b"transfer-encoding: chunked" in head.lower():
                answer.feed(head + end)
                whole_chunks, rest = answer.status_code >= 200, after
        body = _body_of_chunks(rest) if whole_chunks else None
        if body is None:
            whole_chunks = False
            if rest:  # nothing would mean the connection's end
                answer.feed(rest)
            body, answer.fresh = answer.fresh, b""
        if body:
            yield at_s, body


def _body_of_chunks(piece: bytes) -> bytes | None:
    """Join the chunks of HTTP/1.1 that a piece holds; None where it holds anything else."""
    body, at = b"", 0
    while at < len(piece):
        end = piece.find(b"\r\n", at, at + 10)  # of the chunk's length
        digits = piece[at:end]
        if end < 0 or not digits.isalnum():
            return None
        try:
            end_of_chunk = end + 2 + int(digits, 16)
        except ValueError:
            return None
        if piece[end_of_chunk : end_of_chunk + 2] != b"\r\n":
            return None
        body += piece[end + 2 : end_of_chunk]
        at = end_of_chunk + 2
    return body
