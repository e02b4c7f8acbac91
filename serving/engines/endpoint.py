"""An OpenAI-compatible server that is already running: it is driven, never started or stopped."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

import requests

from serving import metrics
from serving.engines import ENGINES
from serving.engines.base import EngineError, Server, metrics_text
from serving.metrics import Snapshot
from serving.plugins import guard
from serving.processes.answers import BoundedResponse, ask, why_unanswered
from serving.processes.masking import holds_secret, masked, tellable, without_key

MODELS_TIMEOUT_S, FIRST_ANSWER_TIMEOUT_S = 10.0, 60.0
MOST_BYTES = 2**20  # of a list of models, and of an answer of one token
METRICS_SETTING = "ENDPOINT_METRICS"
AGREED = ("block_size", "cache_dtype", "enable_prefix_caching")
"""Settings, as vLLM's metrics show them, that replicas have to have alike."""
FIRST_REQUEST = {
    "messages": [{"role": "user", "content": "Hello"}],
    "max_tokens": 1,
    "stream": True,
}


class Endpoint(Server):
    """The server at an address; its metrics are read if its engine is one that the lab knows.

    Where it is a router, `replicas` are the addresses of the engines behind it, whose metrics are
    read in its place.
    """

    def __init__(self, url: str, replicas: Sequence[str] = ()) -> None:
        """Ask which model it serves, and whether the replicas agree.

        Raises EngineError where one does not answer, or what they count cannot be added up.
        """
        base = base_address("ENDPOINT", url)
        self._given = f"ENDPOINT={masked(url)}"
        served = _models(self._given, base)
        super().__init__("endpoint", served[0], base)
        self.replicas = [base_address(METRICS_SETTING, each) for each in replicas]
        self._require_agreement()

    def require_stream(self) -> None:
        """Send a first request of one token. Raises EngineError where no stream of tokens comes."""
        request = {**FIRST_REQUEST, "model": self.model}
        url = f"{self.url}/v1/chat/completions"
        answer = _asked(self._given, "POST", url, FIRST_ANSWER_TIMEOUT_S, request)
        events = [line[5:] for line in answer.body.splitlines() if line.startswith(b"data:")]
        for event in events:
            with contextlib.suppress(ValueError, RecursionError):
                if isinstance(chunk := json.loads(event), dict) and chunk.get("choices"):
                    return
        kind = _short(answer.headers.get("content-type", "no content type"))
        raise EngineError(
            f"{self._given} does not stream: its answer to the first request is"
            f" {_short(answer.text)!r} ({kind}), without an event that has choices; the labs need"
            " server-sent events, as from OpenAI's API with stream=true"
        )

    def snapshot(self) -> Snapshot | None:
        """Read its metrics, or all of its replicas'; a part of them would be a wrong count."""
        readings = [reading for each in self._counting if (reading := _reading(each)[1])]
        if len(readings) < len(self._counting):
            return None
        with contextlib.suppress(ValueError):  # a replica was started again, in another version
            return metrics.across(readings) if self.replicas else readings[0]
        return None

    def reset_prefix_cache(self) -> None:
        for each in self._counting:
            with contextlib.suppress(requests.RequestException):  # only vLLM has it, in dev mode
                url = f"{each}/reset_prefix_cache"
                ask("POST", url, within_s=30, most_bytes=MOST_BYTES)

    @property
    def _counting(self) -> list[str]:
        """The addresses of the engines that count its requests."""
        return self.replicas or [self.url]

    def _require_agreement(self) -> None:
        """Check that the replicas are of one kind. Raises EngineError."""
        facts = {each: self._facts(each) for each in self.replicas}
        if len(facts) < len(self.replicas):
            raise EngineError(
                f"{METRICS_SETTING} names an address twice: it would be counted twice"
            )
        for one, other in pairwise(facts):
            for what, value in facts[one].items():
                if value != facts[other][what]:
                    raise EngineError(
                        f"{METRICS_SETTING}: {one} has {what} {_short(value)}, and {other} has"
                        f" {_short(facts[other][what])}: what replicas that differ count is not"
                        " added up; name those of one model, version and settings"
                    )

    def _facts(self, replica: str) -> dict[str, str]:
        """Ask a replica for all in which replicas have to agree. Raises EngineError."""
        given = f"{METRICS_SETTING}={replica}"
        served = _models(given, replica)
        if self.model not in served:
            raise EngineError(
                f"{given} serves {', '.join(served)}, and {self._given} serves {self.model}: name"
                " the replicas behind this endpoint"
            )
        engine, reading = _reading(replica)
        if reading is None:
            raise EngineError(
                f"{given} does not show the metrics of an engine that the lab knows at /metrics:"
                " give the address of a replica itself, and have it show them"
            )
        config = reading.info.get(metrics.CACHE_CONFIG, {})
        shown = [name for name in metrics.HISTOGRAMS if name in reading.histograms]
        buckets = {name: reading.histograms[name].le for name in shown}
        return {
            "engine": engine,
            "version": _version(replica),
            **{name: config.get(name, "not shown") for name in AGREED},
            "histograms' buckets": str(buckets),
        }


def base_address(setting: str, url: str) -> str:
    """Return the address without a path. Raises EngineError where it holds a secret."""
    if holds_secret(url) or "@" in url:
        shown = masked(url) if holds_secret(url) else f"***@{url.rpartition('@')[2]}"
        raise EngineError(
            f"{setting}={shown} holds a user, a password or a key, which would be recorded:"
            f" leave it out, and set {guard.KEY} in the environment, which is sent as its key"
        )
    return url.rstrip("/").removesuffix("/metrics").removesuffix("/v1")


def _reading(base: str) -> tuple[str, Snapshot | None]:
    """Read a server's metrics: the engine that has such ones, and what they show."""
    with contextlib.suppress(ValueError):  # not in Prometheus's format
        if text := metrics_text(base):
            for engine in ENGINES.values():
                if engine.has_shown(reading := engine.read_metrics(text)):
                    return engine.title, replace(reading, info=_without_key(reading.info))
    return "", None


def _without_key(info: Mapping[str, Mapping[str, str]]) -> dict[str, dict[str, str]]:
    return {
        name: {label: without_key(value) for label, value in labels.items()}
        for name, labels in info.items()
    }


def _version(base: str) -> str:
    """Ask for its version, which vLLM tells."""
    with contextlib.suppress(requests.RequestException, ValueError, KeyError, TypeError):
        answer = ask("GET", f"{base}/version", within_s=MODELS_TIMEOUT_S, most_bytes=MOST_BYTES)
        if answer.ok:
            return _short(str(answer.json()["version"]))
    return "not told"


def _asked(
    given: str, method: str, url: str, within_s: float, request: dict[str, object] | None = None
) -> BoundedResponse:
    """Return an answer that is a success. Raises EngineError for any other, and for none."""
    path = url[url.rindex("/v1/") :]
    try:
        answer = ask(method, url, within_s=within_s, most_bytes=MOST_BYTES, json=request)
    except requests.RequestException as error:
        raise EngineError(
            f"{given} does not answer {path} ({why_unanswered(error)}): start the server first, or"
            " correct the address"
        ) from error
    if 300 <= answer.status < 400:
        raise EngineError(
            f"{given} redirects {path} to {_short(answer.headers.get('location', 'nowhere'))}:"
            " give the address that answers itself"
        )
    if not answer.ok:
        raise EngineError(
            f"{given} answers {path} with HTTP {answer.status}:"
            f" {_short(answer.text)}; correct the address, or mend the server"
        )
    return answer


def _models(given: str, base: str) -> list[str]:
    """Ask for its models, the first one first. Raises EngineError where there is none."""
    answer = _asked(given, "GET", f"{base}/v1/models", MODELS_TIMEOUT_S)
    try:
        names = [card["id"] for card in answer.json()["data"]]
    except (KeyError, IndexError, TypeError, ValueError):
        names = []
    served = [name for name in names if name and isinstance(name, str)]
    if not served or served[0] != names[0]:
        raise EngineError(
            f"{given} names no model at /v1/models, but answers {_short(answer.text)!r}:"
            " give the address of a server with OpenAI's API"
        )
    if secret := next((name for name in served if tellable(name) != name), None):
        raise EngineError(
            f"{given} names a model {_short(secret)}, which holds a key or what looks like one, and"
            " a model's name is recorded: have the server give it another name"
        )
    return served


def _short(text: str, most: int = 120) -> str:
    """Cut what a server says short, without the secrets in it."""
    told = tellable(text)
    return told if len(told) <= most else f"{told[:most]}.."
