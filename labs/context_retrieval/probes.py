"""Ask for needles in long texts."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

from labs.context_retrieval import retrieval
from labs.harness.analysis.evaluation import EvaluationClient
from labs.harness.analysis.probes import Probe, ProbedEngine


def retrieve(served: ProbedEngine, texts: int = 3) -> dict[str, Any]:
    """Ask for the needles of so many texts of each of the lab's lengths, one after another."""
    lengths = retrieval.text_lengths(served.lab.flags_of(served.variant).max_model_len)
    client = EvaluationClient(served.engine.url, served.engine.model)
    began = time.monotonic()
    needles = retrieval.ask(client, lengths, texts, served.writer.tokens_of)
    return {
        "needles": [needle.model_dump(mode="json") for needle in needles],
        "took_s": round(time.monotonic() - began, 3),
    }


PROBES = {
    "retrieval": Probe(retrieve),
    "retrieval-quick": Probe(partial(retrieve, texts=1)),
}
