"""Let one more replica join while more comes than is served, and account for every request."""

from __future__ import annotations

import contextlib
import itertools
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import requests

from labs.harness.analysis.evaluation import TIMEOUT_S, thread_pool
from labs.harness.analysis.probes import Probe, ProbedEngine
from loadtests.workload import Fixed
from serving import metrics
from serving.engines.base import EngineError, Server
from serving.engines.routed import Routed
from serving.plugins import guard

TIMES = 1.3  # the capacity of the first replica, at which requests are sent
CAPACITY_S, AFTER_S = 5.0, 25.0  # the capacity is measured for; sent after the first answer for
WITHIN_S = 120.0  # that the queue fills, or that a replica which serves gets its first request
MOST_AT_ONCE = 512
PROMPTS = 64
CACHES = ("VLLM_CACHE_ROOT", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
Asked = dict[str, float | None]
"""`sent_s`, when it was due; from then on `ttft_s`, and `e2e_s` where it was answered whole."""


def joining(served: ProbedEngine, alone: bool = True) -> dict[str, Any]:
    """Send a replica more than it serves; have another join once a batch is waiting.

    Requests come at random times, `TIMES` what the first completes in a closed loop. Times are in
    seconds since the first was sent. With `alone` replicas are then started with nothing in flight:
    with the lab's flags, and compiled, without and with what that leaves in the caches.
    """
    engine, lab = served.engine, served.lab
    if not isinstance(engine, Routed):
        raise ValueError("a replica joins others behind a router only")
    places, clients = lab.flags_of(served.variant).max_num_seqs, Clients(served)
    capacity_per_s = clients.capacity_per_s(2 * places)
    before = completed(engine)
    with contextlib.ExitStack() as exits:
        with clients.sending(TIMES * capacity_per_s) as asked:
            until("the queue", lambda: gauge(engine, metrics.WAITING) >= places)
            decided_s = clients.now_s
            another = engine.another({}, {})
            exits.callback(another.stop)
            another.wait()
            serves_s = clients.now_s
            engine.admit(another.url)
            exits.callback(engine.dismiss, another.url)
            until("the other replica", lambda: completed(another) > 0)
            first_s = clients.now_s
            time.sleep(AFTER_S)
            ends_s = clients.now_s
        completed_by = [completed(engine) - before, completed(another)]
    return {
        "capacity_per_s": capacity_per_s,
        "rate_per_s": TIMES * capacity_per_s,
        "decided_s": decided_s,
        "serves_s": serves_s,
        "first_s": first_s,
        "ends_s": ends_s,
        "requests": [future.result() for future in asked],
        "completed_by": completed_by,
        "starts": starts(engine) if alone else {},
    }


class Clients:
    """Sends a lab's first workload, and notes of each request when it had its first token."""

    def __init__(self, served: ProbedEngine) -> None:
        workload = served.lab.workloads[0]
        prompt, output = workload.prompt_tokens, workload.output_tokens
        if not isinstance(prompt, Fixed) or not isinstance(output, Fixed):
            raise ValueError(f"the lengths of {workload.name} differ")
        self.url, self.rng = served.engine.url, random.Random(f"{served.lab.seed}/joining")
        chats = [served.writer.chat(prompt.tokens, self.rng) for _ in range(PROMPTS)]
        self.bodies = itertools.cycle(
            {"model": served.engine.model, "messages": chat, "max_tokens": output.tokens,
             "temperature": 0, "ignore_eos": True, "stream": True}
            for chat in chats
        )  # fmt: skip
        self.began_s = time.monotonic()

    @property
    def now_s(self) -> float:
        return time.monotonic() - self.began_s

    def ask(self, body: dict[str, Any], due_s: float) -> Asked:
        """Send a request, and read its answer to the end.

        It counts from when it was due: its wait for one of `MOST_AT_ONCE` threads is a wait, too.
        """
        asked: Asked = {"sent_s": due_s, "ttft_s": None, "e2e_s": None}
        with (
            contextlib.suppress(requests.RequestException),
            requests.post(
                f"{self.url}/v1/chat/completions", json=body, headers=guard.headers(),
                stream=True, timeout=TIMEOUT_S,
            ) as answer,
        ):  # fmt: skip
            for line in answer.iter_lines():
                if line == b"data: [DONE]":
                    asked["e2e_s"] = self.now_s - due_s
                elif asked["ttft_s"] is None and line.startswith(b"data: "):
                    asked["ttft_s"] = self.now_s - due_s
        return asked

    def capacity_per_s(self, users: int) -> float:
        """Measure the requests/s that so many users in a closed loop have answered."""
        ends_s, lock = self.now_s + CAPACITY_S, threading.Lock()

        def user(_: int) -> int:
            answered = 0
            while self.now_s < ends_s:
                with lock:
                    body = next(self.bodies)
                answered += self.ask(body, self.now_s)["e2e_s"] is not None
            return answered

        began_s = self.now_s
        with thread_pool(users) as pool:
            answered = sum(pool.map(user, range(users)))
        return answered / (self.now_s - began_s)

    @contextlib.contextmanager
    def sending(self, rate_per_s: float) -> Iterator[Sequence[Future[Asked]]]:
        """Send at this rate while the block lasts, and then wait for what is not yet answered."""
        asked, over = list[Future[Asked]](), threading.Event()
        self.began_s = time.monotonic()

        def send() -> None:
            due_s = 0.0
            while not over.wait(max(0.0, due_s - self.now_s)):
                asked.append(pool.submit(self.ask, next(self.bodies), due_s))
                due_s += self.rng.expovariate(rate_per_s)

        with thread_pool(MOST_AT_ONCE) as pool:
            sender = threading.Thread(target=send, daemon=True)
            sender.start()
            try:
                yield asked
            finally:
                over.set()
                sender.join()


def starts(engine: Routed) -> dict[str, float | str]:
    """Time how long a replica takes to serve, by how it starts; why not, where it does not."""
    compiled = {"enforce-eager": False}
    found: dict[str, float | str] = {}
    with TemporaryDirectory(prefix="lab-caches-") as folder:
        fresh = {name: f"{folder}/{name}" for name in CACHES}
        for how, flags, env in (
            ("eager", {"enforce-eager": True}, {}),
            ("compiled, caches empty", compiled, fresh),
            ("compiled, caches filled", compiled, fresh),
        ):
            another = None
            try:
                another = engine.another(flags, env)
                another.wait()
                found[how] = another.age_s
            except EngineError as error:
                found[how] = str(error)
            finally:
                if another:
                    another.stop()
    return found


def until(what: str, holds: Callable[[], bool]) -> None:
    """Look ten times a second until something holds. Raises EngineError where it does not."""
    ends_s = time.monotonic() + WITHIN_S
    while not holds():
        if time.monotonic() > ends_s:
            raise EngineError(f"{what} was not there within {WITHIN_S:.0f} s")
        time.sleep(0.1)


def completed(server: Server) -> float:
    return gauge(server, metrics.REQUESTS)


def gauge(server: Server, metric: str) -> float:
    """Read what an engine counts or shows now; 0 where it does not answer."""
    reading = server.snapshot()
    return reading.values.get(metric, 0.0) if reading else 0.0


PROBES = {
    "joining": Probe(joining, reads_text=False),
    "joining-quick": Probe(partial(joining, alone=False), reads_text=False),
}
