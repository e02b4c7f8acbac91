"""vLLM's routes, and completions read from the JSON that clients send."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Any, NoReturn

from tokenizers import Tokenizer

from serving.plugins import guard
from tests.fake.engine import answers
from tests.fake.engine.answers import Refused
from tests.fake.engine.connection import Connection
from tests.fake.engine.engine import Engine
from tests.fake.engine.request import Request

Handler = Callable[[Connection, dict[str, str], bytes], None]


class Api:
    def __init__(self, engine: Engine) -> None:
        self._engine, self._options = engine, engine.options
        self._arrived, self._key = 0, os.environ.get(guard.KEY, "")
        self._routes: dict[str, tuple[str, Handler]] = {
            "/health": ("GET", lambda to, *_: to.respond(HTTPStatus.OK, b"")),
            "/version": ("GET", lambda to, *_: to.respond_json({"version": answers.VERSION})),
            "/v1/models": ("GET", self._list_models),
            "/metrics": ("GET", self._render_metrics),
            "/v1/chat/completions": ("POST", partial(self._complete, chat=True)),
            "/v1/completions": ("POST", partial(self._complete, chat=False)),
            "/reset_prefix_cache": ("POST", self._reset_prefix_cache),
        }
        if self._options.enable_lora and os.environ.get("VLLM_ALLOW_RUNTIME_LORA_UPDATING") == "1":
            self._routes["/v1/load_lora_adapter"] = ("POST", self._load_adapter)
            self._routes["/v1/unload_lora_adapter"] = ("POST", self._unload_adapter)

    def answer(
        self, connection: Connection, method: str, path: str, headers: dict[str, str], body: bytes
    ) -> None:
        """Answers one HTTP request: at once or, a completion, as the scheduler lets it."""
        allowed, handle = self._routes.get(path, ("", None))
        if refused := guard.refusal(path, {**headers, "host": "127.0.0.1"}, self._key):
            connection.respond_json({"error": refused[1]}, HTTPStatus(refused[0]))
        elif path == self._options.silent_at:
            return
        elif not handle:
            connection.respond_json({"detail": "Not Found"}, HTTPStatus.NOT_FOUND)
        elif method != allowed:
            status = HTTPStatus.METHOD_NOT_ALLOWED
            connection.respond_json({"detail": "Method Not Allowed"}, status)
        else:
            try:
                handle(connection, headers, body)
            except Refused as refusal:
                connection.respond_json(refusal.answer, refusal.status)

    def _list_models(self, connection: Connection, *_: object) -> None:
        shared = {"object": "model", "created": int(time.time()), "owned_by": "vllm"}
        more = {"root": self._options.model, "max_model_len": self._options.max_model_len}
        data = [{"id": name, **shared, **more} for name in self._engine.models]
        connection.respond_json({"object": "list", "data": data})

    def _render_metrics(self, connection: Connection, *_: object) -> None:
        kind = "text/plain; version=1.0.0; charset=utf-8"
        connection.respond(HTTPStatus.OK, self._engine.metrics_text().encode(), kind)

    def _reset_prefix_cache(self, connection: Connection, *_: object) -> None:
        self._engine.cache.reset_prefixes()
        connection.respond_json({"success": True})

    def _load_adapter(self, connection: Connection, _: dict[str, str], body: bytes) -> None:
        asked = json.loads(body)
        name, folder = asked["lora_name"], Path(asked["lora_path"])
        self._engine.adapters[name] = folder
        text = f"Success: LoRA adapter '{name}' added successfully."
        connection.respond(HTTPStatus.OK, text.encode(), "text/plain")

    def _unload_adapter(self, connection: Connection, _: dict[str, str], body: bytes) -> None:
        name = json.loads(body)["lora_name"]
        del self._engine.adapters[name]
        text = f"Success: LoRA adapter '{name}' removed successfully."
        connection.respond(HTTPStatus.OK, text.encode(), "text/plain")

    def _complete(
        self, connection: Connection, headers: dict[str, str], body: bytes, *, chat: bool
    ) -> None:
        request, answers_wanted = self._read(connection, headers, body, chat)
        options = self._options
        nth = options.error_every and self._arrived % options.error_every == 0
        if nth or request.n_out == options.error_tokens:
            self._engine.close(request, "error")
            status = HTTPStatus.INTERNAL_SERVER_ERROR
            raise Refused(status, "InternalServerError", "EngineCore failed, as it was told to")
        if self._engine.is_full():
            message = "The engine is currently busy and cannot accept new requests."
            raise Refused(HTTPStatus.SERVICE_UNAVAILABLE, "ServiceUnavailableError", message)
        self._engine.start(request.siblings(answers_wanted))

    def _read(
        self, connection: Connection, headers: dict[str, str], text: bytes, chat: bool
    ) -> tuple[Request, int]:
        """The request in `text`, and how many answers it asks for.

        Raises Refused where vLLM would answer with an error.
        """
        engine, body = self._engine, json.loads(text)
        model = body.get("model") or engine.names[0]
        if model not in engine.models:
            aliases = ", ".join(engine.models)
            message = f"The model `{model}` does not exist. Valid aliases: {aliases}."
            raise Refused(HTTPStatus.NOT_FOUND, "NotFoundError", message, "model")
        prompt = self._prompt(body, chat)
        n_out, stops = self._output(body, chat, len(prompt))
        priority = self._priority(body)

        self._arrived += 1
        index = headers.get("x-request-id", str(self._arrived))
        stream = bool(body.get("stream"))
        wanted = body.get("stream_options") or {}
        usage = bool(stream and wanted.get("include_usage"))
        request = Request(
            connection=connection,
            received=time.monotonic(),
            index=index,
            head=answers.head(index, model, chat, stream),
            model=model,
            adapter=model if model in engine.adapters else None,
            mark=_mark(engine.adapters.get(model)) or _beginning(body.get("structured_outputs")),
            salt=str(body.get("cache_salt") or ""),
            top=body.get("prompt_logprobs"),
            logprobs=bool(body.get("logprobs")),
            chat=chat,
            stream=stream,
            usage=usage,
            continuous=bool(usage and wanted.get("continuous_usage_stats")),
            prompt=prompt,
            n_out=n_out,
            stops=stops,
            truth=body.get("truth") or {},
            priority=priority,
        )
        return request, _count(body, "n", 1)

    def _prompt(self, body: dict[str, Any], chat: bool) -> Sequence[object]:
        """The prompt's tokens. Raises Refused."""
        try:
            if chat:
                return _chat_tokens(body["messages"], self._engine.tokenizer)
            return _tokens(body["prompt"])
        except (KeyError, TypeError, AttributeError):
            _refuse("Field required", "messages" if chat else "prompt")

    def _output(self, body: dict[str, Any], chat: bool, prompt_tokens: int) -> tuple[int, bool]:
        """How many tokens an answer has, and whether it stops by itself there. Raises Refused."""
        longest = self._options.max_model_len
        rest = longest - prompt_tokens
        most = _count(body, "max_tokens", rest if chat else min(rest, 16))
        most = _count(body, "max_completion_tokens", most) if chat else most
        least = _count(body, "min_tokens", 0)
        if most < 1 or prompt_tokens + most > longest:
            _refuse(f"{prompt_tokens} + {most} tokens, of max_model_len={longest}.", "max_tokens")
        ends = self._options.eos_after if not body.get("ignore_eos") else 0
        tokens = min(most, max(least, ends)) if ends else most
        return tokens, tokens < most or tokens == ends

    def _priority(self, body: dict[str, Any]) -> int:
        priority = body.get("priority", 0)
        if type(priority) is not int or (priority and self._options.scheduling_policy == "fcfs"):
            _refuse(f"Got priority {priority} but Priority scheduling is not enabled.", "priority")
        return priority


def _refuse(message: str, param: str) -> NoReturn:
    raise Refused(HTTPStatus.BAD_REQUEST, "BadRequestError", message, param)


def _count(body: dict[str, Any], name: str, default: int) -> int:
    value = body.get(name)
    if value is None:
        return default
    if type(value) is not int or value < 0:
        _refuse(f"{name} must be a whole number, got {value}.", name)
    return value


def _mark(adapter: Path | None) -> str:
    """The first word of an adapter's answers, where its folder names one."""
    path = adapter and adapter / "mark.txt"
    return path.read_text().strip() if path and path.exists() else ""


def _beginning(structure: dict[str, Any] | None) -> str:
    """What every answer of a structure begins with: no more of it is kept to."""
    if not structure:
        return ""
    if "regex" in structure:
        return str(structure["regex"]).partition("(")[0]
    return f'{{"{next(iter(structure["json"]["properties"]))}":'


def _tokens(text: object) -> Sequence[object]:
    """A token a word, of a prompt, or the prompt itself when it is a list of token ids."""
    if isinstance(text, list) and all(isinstance(token, int) for token in text):
        return text
    if not isinstance(text, str):
        raise TypeError
    return text.split()


def _chat_tokens(messages: list[dict[str, Any]], tokenizer: Tokenizer | None) -> Sequence[object]:
    """The tokens of all messages in the model's template (ChatML), as its tokenizer has them.

    Without a tokenizer they are the words, and ten tokens of template before each message.
    """
    tokens: list[object] = []
    text = ""
    for message in messages:
        content = message["content"]
        if not isinstance(content, str):
            content = " ".join(part["text"] for part in content)
        tokens += [message["role"]] * 10 + content.split()
        text += f"<|im_start|>{message['role']}\n{content}<|im_end|>\n"
    if tokenizer is None:
        return tokens
    ids: list[int] = tokenizer.encode(f"{text}<|im_start|>assistant\n").ids
    return ids
