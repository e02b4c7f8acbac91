"""A reverse proxy that passes on only the requests that name this machine as their host.

    python -m dashboards.front 8089 127.83.2.9:40123 locust --web-host=..

It stands before Locust's web UI, which starts a load on any address for whatever page of any site
posts to it, and looks neither at the `Origin` nor at the `Host` of a request. So Locust listens at
a loopback address that is drawn anew at each start, one of 16 million, and this program answers at
the port that readers know. Locust's command follows; both end together.
"""

from __future__ import annotations

import ctypes
import http.client
import secrets
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from serving.inside import guard
from serving.processes.ports import LOOPBACK, free_port
from serving.processes.process import PR_SET_PDEATHSIG

ANSWER_TIMEOUT_S = 120.0
MOST_BODY_BYTES = 2**20  # of a request: a form
PLAIN = (("Content-Type", "text/plain"),)
OF_ONE_CONNECTION = ("connection", "keep-alive", "transfer-encoding", "content-length")


def hidden_address() -> str:
    """Draw a loopback address and a port, as `127.83.2.9:40123`. Linux has all of 127.0.0.0/8."""
    middle = ".".join(str(secrets.randbelow(254) + 1) for _ in range(3))
    return f"127.{middle}:{free_port()}"


def behind(port: int, address: str, command: Sequence[str]) -> list[str]:
    """Return the command that answers at `port` for the server that `command` starts."""
    return [sys.executable, "-m", "dashboards.front", str(port), address, *command]


def handler(upstream: str) -> type[BaseHTTPRequestHandler]:
    """Return what answers each request: a refusal, or the answer of the server at `upstream`."""

    class Front(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def forward(self) -> None:
            names = self.headers.get_all("host") or []
            head = {name.lower(): value for name, value in self.headers.items()}
            refused = guard.refusal(self.path, head, "")
            length = head.get("content-length", "0")
            if len(names) != 1:
                refused = 400, "a request names one host"
            elif "transfer-encoding" in head or not length.isdecimal():
                refused = 411, "a request says how long it is"
            elif int(length) > MOST_BODY_BYTES:
                refused = 413, "a request is no longer than 1 MiB"
            if refused:
                self.close_connection = True  # its body, if any, is not read
                self.answer(refused[0], PLAIN, refused[1].encode())
                return
            passed_on = {n: v for n, v in head.items() if n not in (*OF_ONE_CONNECTION, "host")}
            server = http.client.HTTPConnection(upstream, timeout=ANSWER_TIMEOUT_S)
            try:
                server.request(self.command, self.path, self.rfile.read(int(length)), passed_on)
                answer = server.getresponse()
                body = answer.read()
            except (OSError, http.client.HTTPException) as error:
                self.answer(502, PLAIN, f"the server does not answer: {error}".encode())
                return
            finally:
                server.close()
            self.answer(answer.status, answer.getheaders(), body)

        do_GET = do_POST = do_OPTIONS = forward

        def answer(self, status: int, head: Sequence[tuple[str, str]], body: bytes) -> None:
            self.send_response_only(status)
            for name, value in head:
                if name.lower() not in OF_ONE_CONNECTION:
                    self.send_header(name, value)
            if status != 304:  # a copy that the browser has is still good
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    return Front


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64  # a page asks for its panels at once

    def handle_error(self, request: object, client_address: object) -> None:
        """Pass over a browser that has gone."""


def main(port: int, upstream: str, command: Sequence[str]) -> int:
    """Serve until the command ends; return its exit code. SIGTERM ends it."""
    try:
        server = Server((LOOPBACK, port), handler(upstream))
    except OSError as error:
        sys.exit(f"port {port} on {LOOPBACK}: {error.strerror}")
    libc = ctypes.CDLL(None)
    server_behind = subprocess.Popen(
        command, preexec_fn=lambda: libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    )
    signal.signal(signal.SIGTERM, lambda *_: server_behind.terminate())
    threading.Thread(target=server.serve_forever, daemon=True).start()
    code = server_behind.wait()
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2], sys.argv[3:]))
