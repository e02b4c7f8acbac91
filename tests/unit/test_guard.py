"""Who may ask an engine: the lab that started it, and no page in the reader's browser."""

from __future__ import annotations

import asyncio
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

import pytest

from labs import LABS
from labs.running.resolve import engine_environment
from serving import guard
from serving.engines.vllm import GUARD, Vllm
from serving.models import Model
from tests.unit.builders import SHAPE

HERE = {"host": "127.0.0.1:8000"}
MINE = {**HERE, "authorization": "Bearer the-key"}
MODEL = Model("abacus", Path("/models/abacus"), SHAPE)


def answered(path: str, head: dict[str, str], key: str, kind: str = "http") -> list[Any]:
    """What a server behind the guard sends: its own answer is one message, `let in`."""
    sent: list[MutableMapping[str, Any]] = []

    async def server(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "let in"})

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    async def receive() -> MutableMapping[str, Any]:
        return {"type": f"{kind}.request"}

    headers = [(name.encode(), value.encode()) for name, value in head.items()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(guard.KEY, key)
        app = guard.Guard(server)
    asyncio.run(app({"type": kind, "path": path, "headers": headers}, receive, send))
    return [message.get("status", message["type"]) for message in sent]


@pytest.mark.parametrize(
    "path",
    ["/metrics", "/reset_prefix_cache", "/collective_rpc", "/v1/completions", "/v1/models", "/docs",
     "/v1/load_lora_adapter", "/health/../collective_rpc", "/healthy"],
)  # fmt: skip
def test_without_the_key_nothing_but_health_is_answered(path: str) -> None:
    assert answered(path, MINE, "the-key") == ["let in"]
    for head in (HERE, {**HERE, "authorization": "Bearer another"}, {**HERE, "cookie": "the-key"}):
        assert answered(path, head, "the-key") == [401, "http.response.body"]
    assert answered("/health", HERE, "the-key") == ["let in"]


@pytest.mark.parametrize("key", ["the-key", ""])
def test_a_page_of_another_site_is_refused_with_a_key_and_without_one(key: str) -> None:
    """A cross-origin POST of plain text needs no permission to be sent."""
    for origin in ("http://evil.example", "null", "http://127.0.0.1.evil.example", "http://["):
        head = {**MINE, "origin": origin, "content-type": "text/plain"}
        assert answered("/collective_rpc", head, key)[0] == 403
    assert answered("/v1/models", {**MINE, "origin": "http://localhost:3000"}, key) == ["let in"]


@pytest.mark.parametrize("key", ["the-key", ""])
def test_what_a_page_of_another_site_only_loads_is_refused_and_a_link_is_not(key: str) -> None:
    """A picture's request has no origin; a browser says where it comes from all the same."""
    picture = {**MINE, "sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"}
    assert answered("/api/v1/query", picture, key)[0] == 403
    assert answered("/", {**picture, "sec-fetch-mode": "navigate"}, key) == ["let in"]
    assert answered("/", {**picture, "sec-fetch-site": "same-origin"}, key) == ["let in"]


@pytest.mark.parametrize("key", ["the-key", ""])
@pytest.mark.parametrize("host", ["evil.example:8000", "", "127.0.0.1.evil.example", "10.0.0.1"])
def test_a_name_that_was_made_to_resolve_here_is_refused(key: str, host: str) -> None:
    assert answered("/v1/models", {**MINE, "host": host}, key)[0] == 421
    assert answered("/health", {"host": host}, key)[0] == 421
    assert answered("/v1/models", {"authorization": "Bearer the-key"}, key)[0] == 421


def test_every_name_of_this_machine_is_answered() -> None:
    for host in ("127.0.0.1", "localhost:8000", "[::1]:8000", "LOCALHOST"):
        assert answered("/v1/models", {**MINE, "host": host}, "the-key") == ["let in"]


def test_websockets_are_guarded_and_the_start_of_the_server_is_not() -> None:
    assert answered("/v1/realtime", HERE, "the-key", "websocket") == ["websocket.close"]
    assert answered("/v1/realtime", MINE, "the-key", "websocket") == ["let in"]
    assert answered("", {}, "the-key", "lifespan") == ["let in"]


def test_the_key_is_one_for_a_process_or_the_readers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(guard.KEY, raising=False)
    assert len(guard.key()) > 30
    assert guard.key() == guard.key()
    monkeypatch.setenv(guard.KEY, "mine")
    assert guard.headers() == {"Authorization": "Bearer mine"}


def test_the_key_is_neither_in_a_command_line_nor_in_a_manifest() -> None:
    argv = Vllm.server_argv(MODEL, {}, 8000)
    assert argv[argv.index("--middleware") + 1] == GUARD
    assert guard.key() not in " ".join(argv)
    lab = LABS["prefix-caching"].at("cpu", quick=True)
    recorded = engine_environment("cpu", MODEL, lab).variables
    assert guard.KEY not in recorded
    assert guard.key() not in str(recorded)


def test_vllm_opens_its_development_mode_only_where_a_lab_needs_it() -> None:
    served_by_hand = Vllm.environment("cpu", MODEL)
    assert "VLLM_SERVER_DEV_MODE" not in served_by_hand
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING" not in served_by_hand
    assert Vllm.controls({"enable-prefix-caching": False}) == {}
    assert Vllm.controls({}) == {"VLLM_SERVER_DEV_MODE": "1"}  # vLLM caches prefixes by default
    adapters = {"enable-prefix-caching": False, "enable-lora": True}
    assert Vllm.controls(adapters) == {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
