"""HTTP/1.1 as much as clients use: keep-alive, content-length in, chunked out."""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
from collections.abc import Callable, Iterator
from http import HTTPStatus
from typing import Any, cast

from orjson import dumps  # json would hold the loop ten times as long

Answer = Callable[["Connection", str, str, dict[str, str], bytes], None]
"""Answers one HTTP request on a connection: method, path, headers (lower case), body."""


class Connection(asyncio.Protocol):
    transport: asyncio.Transport

    def __init__(self, answer: Answer) -> None:
        self.if_lost: Callable[[], None] | None = None  # told when the client leaves its answer
        self._answer, self._loop = answer, asyncio.get_running_loop()
        self._buffer, self._busy, self._keep = bytearray(), False, True
        self._held: list[bytes] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.if_lost:
            self.if_lost()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        self._next()

    def _next(self) -> None:
        end = self._buffer.find(b"\r\n\r\n")
        if self._busy or end < 0:
            return
        first, *lines = self._buffer[:end].decode("latin-1").split("\r\n")
        fields = (line.partition(":") for line in lines)
        headers = {name.strip().lower(): value.strip() for name, _, value in fields}
        try:
            method, target, version = first.split()
            stop = end + 4 + int(headers.get("content-length", 0))
            if "transfer-encoding" in headers:
                raise ValueError
        except ValueError:
            self._keep = False
            return self.respond(HTTPStatus.BAD_REQUEST, b"Invalid HTTP request received.")
        if len(self._buffer) >= stop:
            body = bytes(self._buffer[end + 4 : stop])
            del self._buffer[:stop]
            self._busy = True
            self._keep = version == "HTTP/1.1" and headers.get("connection", "") != "close"
            self._answer(self, method, target.partition("?")[0], headers, body)

    def write(self, text: str) -> None:
        self.send(text.encode())

    def send(self, data: bytes) -> None:
        if self._held is None:
            self.transport.write(data)
        else:
            self._held.append(data)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Send all that is written within the block together, at its end."""
        self._held = []
        try:
            yield
        finally:
            held, self._held = self._held, None
            self.transport.write(b"".join(held))

    def _head(self, status: HTTPStatus, *fields: str) -> str:
        date = f"date: {email.utils.formatdate(usegmt=True)}"
        close = () if self._keep else ("connection: close",)
        first = f"HTTP/1.1 {status.value} {status.phrase}"
        return "\r\n".join((first, date, "server: fake-engine", *fields, *close)) + "\r\n\r\n"

    def start_stream(self) -> None:
        kind = "content-type: text/event-stream; charset=utf-8"
        self.write(self._head(HTTPStatus.OK, kind, "transfer-encoding: chunked"))

    def respond(self, status: HTTPStatus, body: bytes, kind: str = "application/json") -> None:
        head = self._head(status, f"content-length: {len(body)}", f"content-type: {kind}")
        self.transport.write(head.encode() + body)
        self.done()

    def respond_json(self, value: Any, status: HTTPStatus = HTTPStatus.OK) -> None:
        self.respond(status, dumps(value))

    def done(self) -> None:
        """The response is complete: the connection takes the next request."""
        self.if_lost, self._busy = None, False
        if not self._keep:
            self.transport.close()
        elif self._buffer:
            self._loop.call_soon(self._next)
