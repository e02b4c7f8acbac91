"""Several engines that serve together in virtual time: replicas behind a router, or a split pair.

A fleet serves as one engine does (`VirtualServer`). Its replicas run their steps side by side, each
by its own clock; the router sees what a real one can know: how many requests of each replica are
outstanding, and which prompts it has sent where. The number of replicas may follow the load. A
split pair has no router: one engine prefills every prompt, and hands its keys and values over a
link to the other, which decodes.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable, Sequence
from itertools import count
from statistics import fmean
from typing import Literal, Protocol

from pydantic import BaseModel

from serving.simulator.traffic import Prompt, VirtualServer


class Handover(BaseModel, frozen=True, extra="forbid"):
    """Says how the engine that prefills hands a prompt over to the one that decodes."""

    bytes_per_token: float  # of keys and values, in all layers
    link_bytes_per_s: float
    asked_s: float  # from the end of the prefill until the second engine has the request


class Router(Protocol):
    """Chooses the replica of each request."""

    def choose(self, prompt: Prompt, outstanding: Sequence[int]) -> int:
        """Return the index of the replica; `outstanding` has the open requests of each."""


class RoundRobin:
    """Sends each request to the next replica in turn."""

    def __init__(self) -> None:
        self.turn = count()

    def choose(self, prompt: Prompt, outstanding: Sequence[int]) -> int:
        """Return the next replica in turn."""
        return next(self.turn) % len(outstanding)


class LeastLoaded:
    """Sends each request where the fewest are outstanding; in turn among equals."""

    def __init__(self) -> None:
        self.turn = count()

    def choose(self, prompt: Prompt, outstanding: Sequence[int]) -> int:
        """Return the replica with the fewest open requests."""
        start, replicas = next(self.turn), len(outstanding)
        in_turn = [(start + i) % replicas for i in range(replicas)]
        return min(in_turn, key=lambda replica: outstanding[replica])


class PrefixAware:
    """Sends a request where its prompt's beginning was last sent, unless the load is uneven.

    The rule is that of SGLang's cache-aware router, and of vLLM's: affinity while the load is
    balanced, the least loaded replica else. Balanced means that no replica has more than so many
    outstanding requests more than the least loaded one, or than so many times as many. It remembers
    the beginning of each prompt for ever, which is more than a replica's cache does.
    """

    BEGINNING_TOKENS = 64  # prompts that agree in so many are taken to share a document

    def __init__(self, imbalance_requests: int = 32, imbalance_ratio: float = 1.1) -> None:
        self.imbalance_requests, self.imbalance_ratio = imbalance_requests, imbalance_ratio
        self.by_load = LeastLoaded()
        self.sent_to: dict[tuple[int, ...], int] = {}

    def choose(self, prompt: Prompt, outstanding: Sequence[int]) -> int:
        """Return the replica that has seen this beginning, or the least loaded one."""
        beginning = prompt.token_ids[: self.BEGINNING_TOKENS]
        most, least = max(outstanding), min(outstanding)
        balanced = most - least <= self.imbalance_requests or most <= self.imbalance_ratio * least
        if not balanced or beginning not in self.sent_to:
            self.sent_to[beginning] = self.by_load.choose(prompt, outstanding)
        return self.sent_to[beginning]


ROUTERS: dict[str, Callable[[], Router]] = {
    "round-robin": RoundRobin,
    "least-loaded": LeastLoaded,
    "prefix-aware": PrefixAware,
}


class Routing(BaseModel, frozen=True, extra="forbid"):
    """Says by which rule requests go to replicas, and when a prefix-aware one balances them."""

    rule: str = "round-robin"
    imbalance_requests: int = 64
    imbalance_ratio: float = 1.5

    def router(self) -> Router:
        """Make the router; it has seen no request."""
        if self.rule == "prefix-aware":
            return PrefixAware(self.imbalance_requests, self.imbalance_ratio)
        return ROUTERS[self.rule]()


class SideBySide:
    """Engines that run side by side; their clocks may show different times when it is made."""

    def __init__(self, engines: Sequence[VirtualServer]) -> None:
        self.engines = engines
        self.now_s = max(engine.now_s for engine in engines)
        self.outstanding = [0] * len(engines)
        self.endings: list[tuple[float, int, dict[str, tuple[int, bool]]]] = []  # of steps
        self.in_step = [False] * len(engines)

    @property
    def busy(self) -> bool:
        """Whether any engine has an open request."""
        return any(self.outstanding)

    def add_to(self, chosen: int, request_id: str, prompt: Prompt) -> bool:
        """Hand a request to an engine; one that is in a step takes it up in its next one.

        Returns False where that engine turns it away.
        """
        if not self.in_step[chosen]:
            self.engines[chosen].wait_until(self.now_s)
        admitted = self.engines[chosen].add(request_id, prompt)
        self.outstanding[chosen] += admitted
        return admitted

    def step(self, before_s: float = math.inf) -> dict[str, tuple[int, bool]]:
        """Go on to the end of the next step of any engine, but not beyond `before_s`.

        Returns what that step brought: request -> (new tokens, whether they were its last).
        """
        for number, engine in enumerate(self.engines):
            if self.outstanding[number] and not self.in_step[number]:
                brought = engine.step()
                heapq.heappush(self.endings, (engine.now_s, number, brought))
                self.in_step[number] = True
        if not self.endings or self.endings[0][0] > before_s:
            self.now_s = max(self.now_s, before_s)
            return {}
        self.now_s, number, brought = heapq.heappop(self.endings)
        self.in_step[number] = False
        self.outstanding[number] -= sum(last for _, last in brought.values())
        return brought

    def wait_until(self, at_s: float) -> None:
        """Advance the clock to `at_s`, if that is later, while no engine has anything to do."""
        self.now_s = max(self.now_s, at_s)


class Fleet(SideBySide):
    """Replicas of an engine behind a router."""

    def __init__(self, replicas: Sequence[VirtualServer], router: Router) -> None:
        super().__init__(replicas)
        self.router = router

    def add(self, request_id: str, prompt: Prompt) -> bool:
        """Route a request; return False where the chosen replica turns it away."""
        return self.add_to(self.router.choose(prompt, self.outstanding), request_id, prompt)


class Scaling(BaseModel, frozen=True, extra="forbid"):
    """Says how the number of replicas follows the load, and how long one takes to start.

    By `queue` and `kv` one more is ordered, if none is starting, once the requests that wait for
    each, or the mean share of their KV caches in use, reach the threshold. By `plan` there are as
    many as are wanted now, and as many ordered as will be until they have started.
    """

    rule: Literal["queue", "kv", "plan"]
    start_s: float
    threshold: float = 0.0
    places: int = 1  # requests in a replica's batch
    plan: tuple[tuple[float, int], ...] = ()  # (from when on, replicas), from 0 on
    decides_every_s: float = 1.0
    spare: float = 0.6  # one leaves where the others would have no more of their batches in use
    calm_s: float = 10.0  # for so long

    def planned(self, from_s: float, until_s: float) -> int:
        """Return the most replicas that are wanted between two times, from the beginning on."""
        ends_s = [*(at_s for at_s, _ in self.plan[1:]), math.inf]
        spans = zip(self.plan, ends_s, strict=True)
        return max(n for (at_s, n), end_s in spans if at_s <= until_s and end_s > from_s)


class Gauged(VirtualServer, Protocol):
    """An engine that shows how much of its KV cache is in use."""

    @property
    def kv_share(self) -> float: ...


class Scaled(Fleet):
    """Replicas whose number follows the load: one serves some time after it is ordered.

    The first ones serve. One that leaves gets no more requests and answers those that it has.
    """

    def __init__(self, replicas: Sequence[Gauged], router: Router, scaling: Scaling) -> None:
        super().__init__(replicas, router)
        self.replicas, self.scaling = replicas, scaling
        self.began_s = self.decides_s = self.busy_s = self.now_s
        self.serving = scaling.planned(0, 0) if scaling.plan else 1
        self.starting = deque[float]()  # when each serves that was ordered
        self.paid: list[int] = []  # replicas at each decision, those that start or leave among them

    @property
    def mean_replicas(self) -> float:
        """The replicas that were paid for, a mean over the time."""
        return fmean(self.paid)

    def add(self, request_id: str, prompt: Prompt) -> bool:
        """Route a request to a replica that serves; return False where that turns it away."""
        chosen = self.router.choose(prompt, self.outstanding[: self.serving])
        return self.add_to(chosen, request_id, prompt)

    def step(self, before_s: float = math.inf) -> dict[str, tuple[int, bool]]:
        """Go on to the end of the next step of any engine, or until the number is decided."""
        brought = super().step(min(before_s, self.decides_s))
        self._decide()
        return brought

    def wait_until(self, at_s: float) -> None:
        """Advance the clock to `at_s`, and decide on the way, while nothing is to be done."""
        while self.decides_s < at_s:
            super().wait_until(self.decides_s)
            self._decide()
        super().wait_until(at_s)

    def _decide(self) -> None:
        if self.now_s < self.decides_s:
            return
        self.decides_s += self.scaling.decides_every_s
        while self.starting and self.starting[0] <= self.now_s:
            self.starting.popleft()
            self.serving += 1
        ordered = self.serving + len(self.starting)
        wanted = max(1, min(self._wanted(ordered), len(self.replicas)))
        self.starting.extend([self.now_s + self.scaling.start_s] * (wanted - ordered))
        if wanted < ordered and not self.starting:
            self.serving = wanted
        leaving = sum(map(bool, self.outstanding[self.serving :]))
        self.paid.append(self.serving + len(self.starting) + leaving)

    def _wanted(self, ordered: int) -> int:
        of, serving = self.scaling, self.outstanding[: self.serving]
        if of.rule == "plan":
            at_s = self.now_s - self.began_s
            return of.planned(at_s, at_s + of.start_s)
        if of.rule == "queue":
            value = fmean(max(0, requests - of.places) for requests in serving)
        else:
            value = fmean(replica.kv_share for replica in self.replicas[: self.serving])
        if sum(serving) > of.spare * of.places * (self.serving - 1):
            self.busy_s = self.now_s
        if value >= of.threshold:
            return ordered + (not self.starting)
        if self.now_s - self.busy_s < of.calm_s:
            return ordered
        self.busy_s = self.now_s
        return ordered - 1


class Split(SideBySide):
    """An engine that only prefills, and one that only decodes; a link between them.

    The first engine computes a prompt and its first token, which nobody sees. The second is then
    asked for the whole answer and takes the prompt's keys and values over the link, one prompt
    after another; it computes the prompt's last token again, as vLLM does with what a connector
    brings, and so the client has every token from it.
    """

    PREFILLS, DECODES = range(2)

    def __init__(
        self, prefilling: VirtualServer, decoding: VirtualServer, handover: Handover
    ) -> None:
        super().__init__((prefilling, decoding))
        self.handover = handover
        self.prompts: dict[str, Prompt] = {}  # by request, until the first engine is done with it
        self.coming: deque[tuple[float, str, Prompt]] = deque()  # (when it is all there, ..)
        self.link_free_s = 0.0

    @property
    def busy(self) -> bool:
        """Whether any request is open, be it at an engine or on the link."""
        return super().busy or bool(self.coming)

    def add(self, request_id: str, prompt: Prompt) -> bool:
        """Have a prompt prefilled; return False where the first engine turns it away."""
        alone = prompt.model_copy(update={"output_tokens": 1})
        admitted = self.add_to(self.PREFILLS, request_id, alone)
        if admitted:
            self.prompts[request_id] = prompt
        return admitted

    def step(self, before_s: float = math.inf) -> dict[str, tuple[int, bool]]:
        """Go on to the end of the next step of either engine, or until a prompt has come over.

        Returns what a step of the second brought; that of the first brings the client nothing.
        """
        comes_s = self.coming[0][0] if self.coming else math.inf
        brought = super().step(min(before_s, comes_s))
        while self.coming and self.coming[0][0] <= self.now_s:
            _, request_id, prompt = self.coming.popleft()
            if not self.add_to(self.DECODES, request_id, prompt):
                raise ValueError("the engine that decodes refuses what the other has prefilled")
        prefilled = [request_id for request_id in brought if request_id in self.prompts]
        for request_id in prefilled:
            self._hand_over(request_id, self.prompts.pop(request_id))
        return {} if prefilled else brought

    def _hand_over(self, request_id: str, prompt: Prompt) -> None:
        asked_s = self.now_s + self.handover.asked_s
        begins_s = max(self.link_free_s, asked_s)
        moved_bytes = len(prompt.token_ids) * self.handover.bytes_per_token
        self.link_free_s = begins_s + moved_bytes / self.handover.link_bytes_per_s
        self.coming.append((self.link_free_s, request_id, prompt))
