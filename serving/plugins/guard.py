"""Keeps an engine for the lab that started it, and out of reach of pages in the reader's browser.

A server on 127.0.0.1 can be asked by every program of the machine, and by any page that a browser
shows: a page may send it text, or have its own name resolve to 127.0.0.1. vLLM's own key guards
paths such as /v1 alone, and neither /metrics nor what development mode opens. `Guard` is middleware
that vLLM loads (`--middleware`). It refuses a request that names another host, or that a page of
another site sent; where there is a key, every request without it but the question of health; and
what loads an adapter from elsewhere than the folders that the lab names, as vLLM reads any path.
"""

from __future__ import annotations

import functools
import json
import os
import secrets
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any
from urllib.parse import urlsplit

KEY = "VLLM_API_KEY"
"""The variable with the key, which vLLM reads too: a command line could be read by all."""
ADAPTERS = "LAB_ADAPTER_FOLDERS"
"""The variable with the folders below which adapters lie, as PATH has them; empty where none is
loaded."""
LOADING = {"/v1/load_lora_adapter": "lora_path", "/adapters": "src"}
"""What loads an adapter -> the field that says from where; vLLM has the second for SageMaker."""
MOST_LOADING_BYTES = 2**16  # of such a request
OPEN = ("/health",)
HERE = ("127.0.0.1", "localhost", "::1")

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


@functools.cache
def _new_key() -> str:
    return secrets.token_urlsafe(32)


def key() -> str:
    """Return the key of this process's engines: the reader's, or one that is made for it."""
    return os.environ.get(KEY) or _new_key()


def headers() -> dict[str, str]:
    """Return the head of a request that holds the key."""
    return {"Authorization": f"Bearer {key()}"}


def refusal(path: str, head: Mapping[str, str], expected_key: str) -> tuple[int, str] | None:
    """Return the status and the reason with which a request is refused; None where it may pass.

    `head` has the names in lower case.
    """
    if _host(f"//{head.get('host', '')}") not in HERE:
        return 421, "this server answers on 127.0.0.1 only"
    if "origin" in head and _host(head["origin"]) not in HERE:
        return 403, "this server answers no page of another site"
    opened = head.get("sec-fetch-mode") == "navigate"  # by the reader, from a link for example
    if head.get("sec-fetch-site") == "cross-site" and not opened:
        return 403, "this server answers no page of another site"
    given = head.get("authorization", "").partition("Bearer ")[2]
    if expected_key and path not in OPEN and not _same(given, expected_key):
        return 401, "this server answers the lab that started it"
    return None


def loads_from(path: str) -> str:
    """Return the field that says from where a request to this path loads an adapter; or ""."""
    given = path.rstrip("/")
    return next((field for end, field in LOADING.items() if given.endswith(end)), "")


def loading_refusal(body: bytes, field: str, folders: str) -> tuple[int, str] | None:
    """Return the status and the reason with which the loading of an adapter is refused, or None."""
    try:
        place = os.path.realpath(json.loads(body)[field])
    except (ValueError, LookupError, TypeError, RecursionError):
        place = ""
    for folder in filter(None, folders.split(os.pathsep)):
        if place.startswith(os.path.join(os.path.realpath(folder), "")):
            return None
    return 403, "this server loads adapters from the lab's own folder only"


def _host(address: str) -> str | None:
    try:
        return urlsplit(address).hostname
    except ValueError:
        return None


def _same(given: str, expected: str) -> bool:
    return secrets.compare_digest(given.encode(), expected.encode())


class Guard:
    """ASGI middleware that answers what `refusal` refuses, and passes on the rest untouched."""

    def __init__(self, app: App) -> None:
        self._app, self._key = app, os.environ.get(KEY, "")
        self._folders = os.environ.get(ADAPTERS, "")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        head = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        refused = refusal(scope["path"], head, self._key)
        field = loads_from(scope["path"]) if scope.get("method") == "POST" else ""
        if refused is None and field:
            body = await _body(receive)
            refused = loading_refusal(body, field, self._folders)
            receive = _sent_again(body, receive)
        if refused is None:
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            status, reason = refused
            await send({"type": "http.response.start", "status": status, "headers": []})
            await send({"type": "http.response.body", "body": reason.encode()})


async def _body(receive: Receive) -> bytes:
    """Read a request's body, but no more than what says from where to load an adapter."""
    body, more = b"", True
    while more and len(body) <= MOST_LOADING_BYTES:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    return b"" if more or len(body) > MOST_LOADING_BYTES else body


def _sent_again(body: bytes, receive: Receive) -> Receive:
    """Return what gives the server a body that was read already, and then what comes after it."""
    first: list[MutableMapping[str, Any]] = [
        {"type": "http.request", "body": body, "more_body": False}
    ]

    async def receive_again() -> MutableMapping[str, Any]:
        return first.pop() if first else await receive()

    return receive_again
