"""What is asked of an engine beside the load: quality, isolation, leaks by timing.

A probe is asked once a variant, after its trials, of the same engine. What it found is kept as it
came (`probes/<probe>-<variant>.json`); `labs/findings/` concludes from it.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import requests

from labs.judging.evaluation import LENGTHS_TOKENS, evaluate, thread_pool
from labs.lab import Lab, Variant
from loadtests.prompts import Messages, Writer
from loadtests.workload import Fixed
from serving import metrics
from serving.engines.base import EngineError, Server


@dataclass(frozen=True)
class Served:
    """A running engine."""

    variant: Variant
    lab: Lab
    engine: Server
    places: Mapping[str, Path]
    writer: Writer


Probe = Callable[[Served], dict[str, Any]]
TIMEOUT_S = 120
TEXTS_ASKED = 12  # with five needles each: with fewer the gate could not even pass a twin


def quality(served: Served, quick: bool = False) -> dict[str, Any]:
    """What `labs/judging/evaluation.py` asks; the first variant twice, for the false alarms."""
    engine, longest = served.engine, served.lab.flags_of(served.variant).max_model_len
    lengths = [n for n in LENGTHS_TOKENS if 1.2 * n < longest]
    seeds = TEXTS_ASKED // len(lengths)
    times = 2 if served.variant.name == served.lab.variants[0].name else 1
    asked = [
        evaluate(engine.url, engine.model, lengths_tokens=lengths, seeds=seeds, quick=quick)
        for _ in range(times)
    ]
    return {"answers": [a.model_dump(mode="json") for a in asked]}


def tenants(served: Served, requests_sent: int = 1700, at_once: int = 16) -> dict[str, Any]:
    """Is every answer its own tenant's? Under concurrency, prefix caching and hot loading.

    All tenants ask the same few prompts, so that their prefixes could be mistaken for each other's.
    One more adapter, `visitor`, is loaded at run time under the load, answers, and is unloaded;
    each time it is another tenant's files under the same name.
    """
    count = len(served.lab.flags_of(served.variant).lora_modules)
    rng = random.Random(f"{served.lab.seed}/tenants")
    # a token more than whole blocks: all the rest can come out of the cache
    prompts = [served.writer.chat(33 + 32 * (i % 2), rng) for i in range(16)]
    url, before = f"{served.engine.url}/v1/chat/completions", _prefix_tokens(served.engine)

    def answer(model: str, prompt: int) -> requests.Response:
        body = {"model": model, "messages": prompts[prompt % len(prompts)], "max_tokens": 5,
                "temperature": 0, "ignore_eos": True}  # fmt: skip
        return requests.post(url, json=body, timeout=TIMEOUT_S)

    def said(response: requests.Response) -> str:
        response.raise_for_status()
        return str(response.json()["choices"][0]["message"]["content"])

    drawn = [rng.randrange(count) for _ in range(requests_sent)]
    visits: list[tuple[int, str]] = []
    with thread_pool(at_once) as pool:
        asked = [pool.submit(answer, f"tenant-{t}", i) for i, t in enumerate(drawn)]
        for owner in range(count):
            served.engine.load_adapter("visitor", served.places["adapters"] / f"tenant-{owner}")
            visits += [(owner, said(answer("visitor", i))) for i in range(4)]
            served.engine.unload_adapter("visitor")
        answers = [(t, said(future.result())) for t, future in zip(drawn, asked, strict=True)]
    looked_up, found = (b - a for a, b in zip(before, _prefix_tokens(served.engine), strict=True))
    unknown, gone = answer("tenant-nobody", 0), answer("visitor", 0)
    return {
        "answers": [*answers, *visits],
        "visits": len(visits),
        "cached_share": found / looked_up if looked_up else None,
        "refused": {"tenant-nobody": unknown.status_code, "visitor, unloaded": gone.status_code},
        "refusal": unknown.text[:200],
        # the right question sent to the wrong adapter: the check must notice
        "misrouted": [(0, said(answer("tenant-1", i))) for i in range(4)],
        "base": [said(answer(served.engine.model, i)) for i in range(4)],
    }


def _prefix_tokens(engine: Server) -> tuple[float, float]:
    """(looked up, found) in the engine's prefix cache so far. Raises EngineError."""
    if (snapshot := engine.snapshot()) is None:
        raise EngineError(f"{engine.name} shows no metrics")
    values = snapshot.values
    return values.get(metrics.PREFIX_QUERIES, 0.0), values.get(metrics.PREFIX_HITS, 0.0)


def salt(served: Served, rounds: int = 12) -> dict[str, Any]:
    """Can one tenant tell by timing what another has asked? With and without `cache_salt`.

    Each round a victim sends a fresh prompt; then a stranger times the same prompt, and another of
    the same length that nobody has sent. With a salt of their own each, the stranger's copy is no
    faster than the fresh one.
    """
    rng = random.Random(f"{served.lab.seed}/salt")
    tokens = next(
        w.prompt_tokens.tokens for w in served.lab.workloads if isinstance(w.prompt_tokens, Fixed)
    )

    def took_s(prompt: Messages, who: str | None) -> float:
        body = {"model": served.engine.model, "messages": prompt, "max_tokens": 1, "temperature": 0}
        body |= {"cache_salt": who} if who else {}
        began = time.monotonic()
        url = f"{served.engine.url}/v1/chat/completions"
        requests.post(url, json=body, timeout=TIMEOUT_S).raise_for_status()
        return time.monotonic() - began

    found: dict[str, list[float]] = {}
    for _ in range(rounds):
        for name, victim, stranger in (("shared", None, None), ("salted", "victim", "stranger")):
            secret, other = (served.writer.chat(tokens, rng) for _ in range(2))
            took_s(secret, victim)
            found.setdefault(f"{name}, known", []).append(took_s(secret, stranger))
            found.setdefault(f"{name}, fresh", []).append(took_s(other, stranger))
    return {"took_s": found, "prompt_tokens": tokens}


PROBES: dict[str, Probe] = {
    "quality": quality,
    "quality-quick": partial(quality, quick=True),
    "tenants": tenants,
    "tenants-quick": partial(tenants, requests_sent=120),
    "salt": salt,
    "salt-quick": partial(salt, rounds=4),
}
READ_TEXT = frozenset(("quality", "quality-quick", "tenants", "tenants-quick"))
"""Probes that mean nothing of random weights, as what these write is no text."""
