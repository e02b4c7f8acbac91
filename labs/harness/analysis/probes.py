"""Probes ask an engine apart from the load; here are those that several labs ask.

Each runs once for a variant, on the same engine, after its trials. Its result is kept as it came
(`probes/<probe>-<variant>.json.gz`); the lab's facts conclude from it. A lab's own probes are the
`PROBES` of its `probes.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import requests

from labs.harness.analysis.evaluation import LENGTHS_TOKENS, TIMEOUT_S, evaluate
from labs.harness.spec.lab import Lab, Variant
from loadtests.prompts import Writer
from serving.engines.base import Server
from serving.plugins import guard


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


def post(served: ProbedEngine, path: str, body: Mapping[str, Any]) -> requests.Response:
    """Send a request to the engine, which need not succeed. Raises `requests`' exceptions."""
    url = f"{served.engine.url}/v1/{path}"
    return requests.post(url, json=body, headers=guard.headers(), timeout=TIMEOUT_S)


COMMON_PROBES: dict[str, Probe] = {
    "quality": Probe(quality),
    "quality-quick": Probe(partial(quality, quick=True)),
}
"""Probes that any lab may name."""
