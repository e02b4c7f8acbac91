"""Time what a cache that tenants share tells one of another."""

from __future__ import annotations

import random
import time
from functools import partial
from typing import Any

from labs.harness.analysis.probes import Probe, ProbedEngine, post
from loadtests.prompts import Messages
from loadtests.workload import Fixed


def salt(served: ProbedEngine, rounds: int = 12) -> dict[str, Any]:
    """Time whether one tenant can tell what another has asked, with and without `cache_salt`.

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
        post(served, "chat/completions", body).raise_for_status()
        return time.monotonic() - began

    times_s: dict[str, list[float]] = {}
    for _ in range(rounds):
        for name, victim, stranger in (("shared", None, None), ("salted", "victim", "stranger")):
            secret, other = (served.writer.chat(tokens, rng) for _ in range(2))
            took_s(secret, victim)
            times_s.setdefault(f"{name}, known", []).append(took_s(secret, stranger))
            times_s.setdefault(f"{name}, fresh", []).append(took_s(other, stranger))
    return {"took_s": times_s, "prompt_tokens": tokens}


PROBES = {
    "salt": Probe(salt, reads_text=False),
    "salt-quick": Probe(partial(salt, rounds=4), reads_text=False),
}
