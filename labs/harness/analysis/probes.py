"""Probes ask an engine apart from the load; here are those that several labs ask.

Each runs once for a variant, on the same engine, after its trials. Its result is kept as it came
(`probes/<probe>-<variant>.json.gz`); the lab's facts conclude from it. A lab's own probes are the
`PROBES` of its `probes.py`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import requests

from labs.harness.analysis.evaluation import (
    LENGTHS_TOKENS,
    TIMEOUT_S,
    evaluate,
    thread_pool,
)
from labs.harness.spec.lab import Lab, Variant
from loadtests.prompts import Writer
from serving import metrics
from serving.engines.base import EngineError, Server
from serving.plugins import guard
from serving.processes.masking import tellable


@dataclass(frozen=True)
class ProbedEngine:
    """A running engine with what a probe needs to ask it."""

    variant: Variant
    lab: Lab
    engine: Server
    places: Mapping[str, Path]  # derived model -> its folder
    writer: Writer


@dataclass(frozen=True)
class Probe:
    """Asks a running engine, and returns its answers as plain JSON."""

    ask: Callable[[ProbedEngine], dict[str, Any]]
    reads_text: bool = True  # random weights write none: then it is refused with them


TEXTS_ASKED = 12  # with five needles each: with fewer the gate could not even pass a twin


def quality(served: ProbedEngine, quick: bool = False) -> dict[str, Any]:
    """Ask what `analysis/evaluation.py` asks; the first variant twice, for the false alarms."""
    engine, longest = served.engine, served.lab.flags_of(served.variant).max_model_len
    lengths = [n for n in LENGTHS_TOKENS if 1.2 * n < longest]
    if not lengths:
        raise ValueError(f"no text fits max-model-len={longest}")
    seeds = TEXTS_ASKED // len(lengths)
    times = 2 if served.variant.name == served.lab.variants[0].name else 1
    evaluations = [
        evaluate(engine.url, engine.model, lengths_tokens=lengths, seeds=seeds, quick=quick)
        for _ in range(times)
    ]
    return {"answers": [a.model_dump(mode="json") for a in evaluations]}


def tenants(served: ProbedEngine, requests_sent: int = 1700, at_once: int = 16) -> dict[str, Any]:
    """Ask every tenant under concurrency, prefix caching and hot loading: is each answer its own?

    All tenants ask the same few prompts, so that their prefixes could be mistaken for each other's.
    One more adapter, `visitor`, is loaded at run time under the load, answers, and is unloaded;
    each time it is another tenant's files under the same name.
    """
    count = len(served.lab.flags_of(served.variant).lora_modules)
    rng = random.Random(f"{served.lab.seed}/tenants")
    # a token more than whole blocks: all the rest can come out of the cache
    prompts = [served.writer.chat(33 + 32 * (i % 2), rng) for i in range(16)]
    before = _prefix_tokens(served.engine)

    def ask(model: str, prompt: int) -> requests.Response:
        body = {"model": model, "messages": prompts[prompt % len(prompts)], "max_tokens": 5,
                "temperature": 0, "ignore_eos": True}  # fmt: skip
        return post(served, "chat/completions", body)

    def text_of(response: requests.Response) -> str:
        response.raise_for_status()
        return str(response.json()["choices"][0]["message"]["content"])

    drawn = [rng.randrange(count) for _ in range(requests_sent)]
    visits: list[tuple[int, str]] = []
    with thread_pool(at_once) as pool:
        pending = [pool.submit(ask, f"tenant-{t}", i) for i, t in enumerate(drawn)]
        for owner in range(count):
            served.engine.load_adapter("visitor", served.places["adapters"] / f"tenant-{owner}")
            visits += [(owner, text_of(ask("visitor", i))) for i in range(4)]
            served.engine.unload_adapter("visitor")
        answers = [(t, text_of(future.result())) for t, future in zip(drawn, pending, strict=True)]
    looked_up, hits = (b - a for a, b in zip(before, _prefix_tokens(served.engine), strict=True))
    unknown, gone = ask("tenant-nobody", 0), ask("visitor", 0)
    return {
        "answers": [*answers, *visits],
        "visits": len(visits),
        "cached_share": hits / looked_up if looked_up else None,
        "refused": {"tenant-nobody": unknown.status_code, "visitor, unloaded": gone.status_code},
        "refusal": tellable(unknown.text)[:200],
        # the right question sent to the wrong adapter: the check must notice
        "misrouted": [(0, text_of(ask("tenant-1", i))) for i in range(4)],
        "base": [text_of(ask(served.engine.model, i)) for i in range(4)],
    }


def post(served: ProbedEngine, path: str, body: Mapping[str, Any]) -> requests.Response:
    """Send a request to the engine, which need not succeed. Raises `requests`' exceptions."""
    url = f"{served.engine.url}/v1/{path}"
    return requests.post(url, json=body, headers=guard.headers(), timeout=TIMEOUT_S)


def _prefix_tokens(engine: Server) -> tuple[float, float]:
    """Read how many tokens the prefix cache was asked for and how many it held (hits) so far.

    Raises EngineError.
    """
    if (snapshot := engine.snapshot()) is None:
        raise EngineError(f"{engine.name} shows no metrics")
    values = snapshot.values
    return values.get(metrics.PREFIX_QUERIES, 0.0), values.get(metrics.PREFIX_HITS, 0.0)


COMMON_PROBES: dict[str, Probe] = {
    "quality": Probe(quality),
    "quality-quick": Probe(partial(quality, quick=True)),
    "tenants": Probe(tenants),
    "tenants-quick": Probe(partial(tenants, requests_sent=120)),
}
"""Probes that any lab may name."""
