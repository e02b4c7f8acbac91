"""Ask a server that may answer anything: every answer is bounded in time and size."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import requests
from urllib3.exceptions import NameResolutionError

from serving.plugins import guard

BLOCK_BYTES = 8192


class EndlessAnswer(requests.RequestException):
    """An answer took longer, or has more bytes, than what was asked for can need."""


@dataclass(frozen=True)
class BoundedResponse:
    """A whole answer; a redirect is one, too."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def ok(self) -> bool:
        return 200 <= self.status < 300

    @property
    def text(self) -> str:
        return self.body.decode(errors="replace")

    def json(self) -> Any:
        """Parse the body. Raises ValueError where it is no JSON, or too deep."""
        try:
            return json.loads(self.body)
        except RecursionError as error:
            raise ValueError("nested too deeply") from error


def ask(
    method: str, url: str, *, within_s: float, most_bytes: int, **request: Any
) -> BoundedResponse:
    """Send a request and read the whole answer, no longer than `within_s` in all.

    It shows the key that an engine asks for, unless other `headers` are given. Raises
    requests.RequestException.
    """
    answer: Future[BoundedResponse] = Future()

    def read() -> None:
        try:
            answer.set_result(_answer(method, url, within_s, most_bytes, request))
        except BaseException as error:
            answer.set_exception(error)

    # Its own time limits are for each read, so that a server that drips would never meet them.
    threading.Thread(target=read, daemon=True).start()
    try:
        return answer.result(within_s)
    except TimeoutError as error:
        raise EndlessAnswer(f"the answer has no end within {within_s:.0f} s") from error


def why_unanswered(error: requests.RequestException) -> str:
    """Say in a few words, which repeat nothing of the address, why no answer came."""
    reason = getattr(next(iter(error.args), None), "reason", None)  # urllib3's, within requests'
    if isinstance(error, EndlessAnswer):
        return str(error)
    if isinstance(error, ValueError):  # requests' errors of an address are ones
        return "it is no address such as http://127.0.0.1:8000"
    if isinstance(error, requests.Timeout):
        return "nothing comes from there in time"
    if isinstance(error, requests.exceptions.SSLError):
        return "no connection by TLS that is trusted"
    if isinstance(reason, NameResolutionError):
        return "no machine of that name is known here"
    if isinstance(refusal := getattr(reason, "__cause__", None), ConnectionRefusedError):
        return "nothing listens there"
    if isinstance(refusal, OSError) and refusal.strerror:
        return refusal.strerror.lower()
    return "the connection was cut, or what answers is not HTTP"


def _answer(
    method: str, url: str, within_s: float, most_bytes: int, request: Mapping[str, Any]
) -> BoundedResponse:
    body = bytearray()
    with requests.request(
        method,
        url,
        timeout=within_s,
        stream=True,
        allow_redirects=False,
        **{"headers": guard.headers(), **request},
    ) as response:
        for block in response.iter_content(BLOCK_BYTES):
            body += block
            if len(body) > most_bytes:
                raise EndlessAnswer(f"the answer has more than {most_bytes} bytes")
        return BoundedResponse(response.status_code, response.headers, bytes(body))
