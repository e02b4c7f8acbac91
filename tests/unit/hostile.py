"""A server whose answers are odd or have no end; what it answers is the path's last part."""

from __future__ import annotations

import socketserver
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress

HEAD = "HTTP/1.1 200 OK\r\nContent-Type: {}\r\n"
STREAM = (HEAD.format("text/event-stream") + "Connection: close\r\n\r\n").encode()
EVENT = (
    b'data: {"choices": [{"index": 0, "delta": {"content": "and"}}],'
    b' "usage": {"prompt_tokens": 9, "completion_tokens": 1}}\n\n'
)
HIDDEN = "".join(  # control characters without line breaks and tabs, and marks of direction
    map(chr, [*range(9), *range(11, 32), *range(0x7F, 0xA0), 0x61C, 0x200E, 0x200F,
              *range(0x202A, 0x202F), *range(0x2066, 0x206A)])
)  # fmt: skip
Send = Callable[[bytes], object]


def whole(
    body: str, status: str = "200 OK", kind: str = "application/json", more: str = ""
) -> bytes:
    """An answer that is no stream."""
    return (
        f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n{more}"
        f"Connection: close\r\n\r\n{body}"
    ).encode()


def drips(send: Send) -> None:
    """One byte at a time, each long before a limit on silence."""
    send(STREAM + EVENT)
    while True:
        send(b":")
        time.sleep(0.02)


def repeats(piece: bytes, after: bytes = STREAM) -> Callable[[Send], None]:
    """The same again, as fast as it is taken."""

    def send_forever(send: Send) -> None:
        send(after)
        while True:
            send(piece * 1000)

    return send_forever


def says(answer: bytes) -> Callable[[Send], object]:
    return lambda send: send(answer)


def says_nothing(send: Send) -> None:
    time.sleep(5)


@contextmanager
def serving(answers: Mapping[str, Callable[[Send], object]]) -> Iterator[str]:
    """Answer a request whose first line or body has one of these words as it says."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            asked = self.request.recv(65536).decode()
            answer = next(answer for word, answer in answers.items() if word in asked)
            with suppress(OSError):
                answer(self.request.sendall)

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads, allow_reuse_address = True, True

    with Server(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
