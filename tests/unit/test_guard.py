"""Who may ask an engine: the lab that started it, and no page in the reader's browser."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

import pytest

from labs import LABS
from labs.harness.plan.resolve import engine_environment
from serving.engines.vllm import GUARD, Vllm
from serving.models.catalog import Model
from serving.plugins import guard
from tests.unit.builders import SHAPE

HERE = {"host": "127.0.0.1:8000"}
MINE = {**HERE, "authorization": "Bearer the-key"}
MODEL = Model("abacus", Path("/models/abacus"), SHAPE)


def asked(field: str, place: object) -> bytes:
    return json.dumps({"lora_name": "visitor", field: place}).encode()


def answered(
    path: str,
    head: dict[str, str],
    key: str,
    kind: str = "http",
    body: bytes = b"",
    got: list[bytes] | None = None,
) -> list[Any]:
    """What a server behind the guard sends: its own answer is one message, `let in`.

    The body comes in two parts; what the server gets of it is added to `got`.
    """
    sent: list[MutableMapping[str, Any]] = []
    parts = [(body[:9], True), (body[9:], False)]

    async def server(scope: Any, receive: Any, send: Any) -> None:
        if got is not None:
            whole, more = b"", True
            while more:
                message = await receive()
                whole, more = whole + message["body"], message["more_body"]
            got.append(whole)
        await send({"type": "let in"})

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    async def receive() -> MutableMapping[str, Any]:
        part, more = parts.pop(0)
        return {"type": f"{kind}.request", "body": part, "more_body": more}

    headers = [(name.encode(), value.encode()) for name, value in head.items()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(guard.KEY, key)
        app = guard.Guard(server)
    scope = {"type": kind, "path": path, "headers": headers, "method": "POST"}
    asyncio.run(app(scope, receive, send))
    return [message.get("status", message["type"]) for message in sent]


@pytest.mark.parametrize(
    "path",
    ["/metrics", "/reset_prefix_cache", "/collective_rpc", "/v1/completions", "/v1/models", "/docs",
     "/v1/unload_lora_adapter", "/health/../collective_rpc", "/healthy"],
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


@pytest.fixture
def adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The lab's folder of adapters; beside it another, and a link to that."""
    for folder in ("adapters/tenant-0", "adapters-of-another", "elsewhere"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "adapters" / "link").symlink_to(tmp_path / "elsewhere")
    monkeypatch.setenv(guard.ADAPTERS, f"{tmp_path}/none{os.pathsep}{tmp_path}/adapters")
    return tmp_path


@pytest.mark.parametrize("path", ["/v1/load_lora_adapter", "/v1/load_lora_adapter/", "/adapters"])
def test_adapters_are_loaded_from_the_labs_folder_only(path: str, adapters: Path) -> None:
    field = guard.loads_from(path)
    assert answered(path, MINE, "the-key", body=asked(field, f"{adapters}/adapters/tenant-0")) == [
        "let in"
    ]
    for place in (
        "elsewhere", "adapters", "adapters/", "adapters-of-another", "adapters/../elsewhere",
        "adapters/link", "adapters/link/x",
    ):  # fmt: skip
        body = asked(field, f"{adapters}/{place}")
        assert answered(path, MINE, "the-key", body=body)[0] == 403, place
    for body in (
        asked(field, "org/adapter"), asked(field, 5), asked("another", f"{adapters}/adapters/x"),
        b"", b"[1]", b"[" * 10**4, b" " * 2**17 + asked(field, f"{adapters}/adapters/x"),
    ):  # fmt: skip
        assert answered(path, MINE, "the-key", body=body)[0] == 403, body[:80]


def test_without_a_folder_no_adapter_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(guard.ADAPTERS, raising=False)
    body = asked("lora_path", "/models/adapters/tenant-0")
    assert answered("/v1/load_lora_adapter", MINE, "", body=body)[0] == 403
    assert answered("/v1/load_lora_adapter", HERE, "the-key", body=body)[0] == 401


def test_the_server_gets_the_request_as_it_was_sent(adapters: Path) -> None:
    got: list[bytes] = []
    body = asked("lora_path", f"{adapters}/adapters/tenant-0")
    answered("/v1/load_lora_adapter", MINE, "the-key", body=body, got=got)
    answered("/v1/completions", MINE, "the-key", body=b"any", got=got)
    assert got == [body, b"any"]


def test_the_folder_is_that_of_the_adapters_that_an_engine_serves() -> None:
    modules = [f"tenant-{i}=/cache/models/adapters/tenant-{i}" for i in range(2)]
    assert Vllm.adapter_folders({"lora-modules": modules}) == ["/cache/models/adapters"]
    assert Vllm.adapter_folders({"enable-lora": True}) == []


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
