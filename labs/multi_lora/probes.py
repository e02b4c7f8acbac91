"""Ask every tenant under concurrency, and adapters that come and go."""

from __future__ import annotations

import random
from functools import partial
from typing import Any

import requests

from labs.harness.analysis.evaluation import thread_pool
from labs.harness.analysis.probes import Probe, ProbedEngine, post
from serving import metrics
from serving.engines.base import EngineError, Server
from serving.processes.masking import tellable


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


def _prefix_tokens(engine: Server) -> tuple[float, float]:
    """Read how many tokens the prefix cache was asked for and how many it held (hits) so far.

    Raises EngineError.
    """
    if (snapshot := engine.snapshot()) is None:
        raise EngineError(f"{engine.name} shows no metrics")
    values = snapshot.values
    return values.get(metrics.PREFIX_QUERIES, 0.0), values.get(metrics.PREFIX_HITS, 0.0)


PROBES = {
    "tenants": Probe(tenants),
    "tenants-quick": Probe(partial(tenants, requests_sent=120)),
}
