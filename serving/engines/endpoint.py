"""An OpenAI-compatible server that is already running: it is driven, never started or stopped."""

from __future__ import annotations

import contextlib

import requests

from serving import metrics
from serving.engines import ENGINES
from serving.engines.base import EngineError, Server, metrics_text
from serving.metrics import Snapshot


class Endpoint(Server):
    """The server at an address; its metrics are read if its engine is one that the lab knows."""

    def __init__(self, url: str) -> None:
        """Ask which model it serves. Raises EngineError where it does not answer."""
        base = url.rstrip("/").removesuffix("/v1")
        try:
            response = requests.get(f"{base}/v1/models", timeout=10)
            response.raise_for_status()
            model = str(response.json()["data"][0]["id"])
        except (requests.RequestException, KeyError, IndexError, ValueError) as error:
            raise EngineError(
                f"ENDPOINT={url} does not answer /v1/models ({type(error).__name__}): start the"
                " server first, or correct the address"
            ) from error
        super().__init__("endpoint", model, base)

    def snapshot(self) -> Snapshot | None:
        if not (text := metrics_text(self.url)):
            return None
        with contextlib.suppress(ValueError):  # not in Prometheus's format
            readings = (engine.read_metrics(text) for engine in ENGINES.values())
            return next((r for r in readings if metrics.REQUESTS in r.values), None)
        return None

    def reset_prefix_cache(self) -> None:
        with contextlib.suppress(requests.RequestException):  # only vLLM has it, in dev mode
            requests.post(f"{self.url}/reset_prefix_cache", timeout=30)
