"""An OpenAI-compatible server that is already running: it is driven, never started or stopped."""

from __future__ import annotations

import contextlib
import json

import requests

from serving import guard
from serving.answers import Answer, ask
from serving.engines import ENGINES
from serving.engines.base import EngineError, Server, metrics_text
from serving.masking import holds_secret, masked
from serving.metrics import Snapshot

MODELS_TIMEOUT_S, FIRST_ANSWER_TIMEOUT_S = 10.0, 60.0
MOST_BYTES = 2**20  # of a list of models, and of an answer of one token
FIRST_REQUEST = {
    "messages": [{"role": "user", "content": "Hello"}],
    "max_tokens": 1,
    "stream": True,
}


class Endpoint(Server):
    """The server at an address; its metrics are read if its engine is one that the lab knows."""

    def __init__(self, url: str) -> None:
        """Ask which model it serves. Raises EngineError where it does not answer."""
        self._given = f"ENDPOINT={masked(url)}"
        if holds_secret(url):
            raise EngineError(
                f"{self._given} holds a user, a password or a key, which would be recorded: leave"
                f" it out, and set {guard.KEY} in the environment, which is sent as its key"
            )
        base = url.rstrip("/").removesuffix("/v1")
        answer = self._ask("GET", f"{base}/v1/models", MODELS_TIMEOUT_S)
        super().__init__("endpoint", self._first_model(answer), base)

    def require_stream(self) -> None:
        """Send a first request of one token. Raises EngineError where no stream of tokens comes."""
        request = {**FIRST_REQUEST, "model": self.model}
        url = f"{self.url}/v1/chat/completions"
        answer = self._ask("POST", url, FIRST_ANSWER_TIMEOUT_S, request)
        events = [line[5:] for line in answer.body.splitlines() if line.startswith(b"data:")]
        for event in events:
            with contextlib.suppress(ValueError, RecursionError):
                if isinstance(chunk := json.loads(event), dict) and chunk.get("choices"):
                    return
        kind = answer.headers.get("content-type", "no content type")
        raise EngineError(
            f"{self._given} does not stream: its answer to the first request is"
            f" {_short(answer.text)!r} ({kind}), without an event that has choices; the labs need"
            " server-sent events, as from OpenAI's API with stream=true"
        )

    def snapshot(self) -> Snapshot | None:
        if not (text := metrics_text(self.url)):
            return None
        with contextlib.suppress(ValueError):  # not in Prometheus's format
            for engine in ENGINES.values():
                if engine.has_shown(reading := engine.read_metrics(text)):
                    return reading
        return None

    def reset_prefix_cache(self) -> None:
        with contextlib.suppress(requests.RequestException):  # only vLLM has it, in dev mode
            url = f"{self.url}/reset_prefix_cache"
            ask("POST", url, within_s=30, most_bytes=MOST_BYTES)

    def _ask(
        self, method: str, url: str, within_s: float, request: dict[str, object] | None = None
    ) -> Answer:
        """Return an answer that is a success. Raises EngineError for any other, and for none."""
        path = url[url.rindex("/v1/") :]
        try:
            answer = ask(method, url, within_s=within_s, most_bytes=MOST_BYTES, json=request)
        except requests.RequestException as error:
            raise EngineError(
                f"{self._given} does not answer {path} ({type(error).__name__}: {error}): start the"
                " server first, or correct the address"
            ) from error
        if 300 <= answer.status < 400:
            raise EngineError(
                f"{self._given} redirects {path} to {answer.headers.get('location', 'nowhere')}:"
                " give the address that answers itself"
            )
        if not answer.ok:
            raise EngineError(
                f"{self._given} answers {path} with HTTP {answer.status}:"
                f" {_short(answer.text)}; correct the address, or mend the server"
            )
        return answer

    def _first_model(self, answer: Answer) -> str:
        """Return the first model of a list of models. Raises EngineError where there is none."""
        try:
            model = answer.json()["data"][0]["id"]
        except (KeyError, IndexError, TypeError, ValueError):
            model = None
        if not model or not isinstance(model, str):
            raise EngineError(
                f"{self._given} names no model at /v1/models, but answers {_short(answer.text)!r}:"
                " give the address of a server with OpenAI's API"
            )
        return model


def _short(text: str, most: int = 120) -> str:
    return text if len(text) <= most else f"{text[:most]}.."
