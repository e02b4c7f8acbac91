"""The record of what was sent: one JSON line a request, written as requests end."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import IO, Any

from orjson import dumps

from tests.fake.engine.request import Request


class RequestLog:
    """Writes one line a turn of the loop: requests that end together do not hold up the others."""

    def __init__(self, file: IO[bytes] | None) -> None:
        self._file, self._loop = file, asyncio.get_running_loop()
        self._to_write: deque[Request] = deque()

    def add(self, request: Request) -> None:
        if self._file:
            self._to_write.append(request)
            if len(self._to_write) == 1:
                self._loop.call_soon(self._write_line)

    def write_all(self) -> None:
        """Write at once what still waits for its turn."""
        while self._to_write:
            self._write_line()

    def _write_line(self) -> None:
        if self._file and self._to_write:
            self._file.write(dumps(line(self._to_write.popleft())) + b"\n")
            if self._to_write:
                self._loop.call_soon(self._write_line)
            else:
                self._file.flush()


def line(request: Request) -> dict[str, Any]:
    """What a line of the log says of a request; the package's docstring explains each field."""
    return {
        "index": request.index,
        "model": request.model,
        "received": request.received,
        "scheduled": request.scheduled or None,
        "n_in": len(request.prompt),
        "n_cached": request.n_cached,
        "n_out": request.sent,
        "finish": request.finish,
        "stream": request.stream,
        "chunks": list(zip(request.times, request.tokens, strict=True)),
        "due": [step.due for step in request.steps],
        "batch": [step.batch for step in request.steps],
        "prefilled": [step.prefilled for step in request.steps],
    }
