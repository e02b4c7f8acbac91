"""Several replicas of one engine behind a router, in virtual time.

A fleet serves as one engine does (`VirtualServer`). Its replicas run their steps side by side, each
by its own clock; the router sees what a real one can know: how many requests of each replica are
outstanding, and which prompts it has sent where.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from itertools import count
from typing import Protocol

from serving.forecasting.traffic import Prompt, VirtualServer


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

    The rule is that of SGLang's cache-aware router: affinity while the load is balanced, the least
    loaded replica else. Balanced means that no replica has more than `IMBALANCE_REQUESTS` and
    `IMBALANCE_RATIO` times as many outstanding requests as the least loaded one. It remembers the
    beginning of each prompt for ever, which is more than a replica's cache does.
    """

    BEGINNING_TOKENS = 64  # prompts that agree in so many are taken to share a document
    IMBALANCE_REQUESTS, IMBALANCE_RATIO = 32, 1.1

    def __init__(self) -> None:
        self.by_load = LeastLoaded()
        self.sent_to: dict[tuple[int, ...], int] = {}

    def choose(self, prompt: Prompt, outstanding: Sequence[int]) -> int:
        """Return the replica that has seen this beginning, or the least loaded one."""
        beginning = prompt.token_ids[: self.BEGINNING_TOKENS]
        most, least = max(outstanding), min(outstanding)
        balanced = most - least <= self.IMBALANCE_REQUESTS or most <= self.IMBALANCE_RATIO * least
        if not balanced or beginning not in self.sent_to:
            self.sent_to[beginning] = self.by_load.choose(prompt, outstanding)
        return self.sent_to[beginning]


ROUTERS: dict[str, Callable[[], Router]] = {
    "round-robin": RoundRobin,
    "least-loaded": LeastLoaded,
    "prefix-aware": PrefixAware,
}


class Fleet:
    """Replicas that serve together; their clocks may show different times when it is made."""

    def __init__(self, replicas: Sequence[VirtualServer], router: Router) -> None:
        self.replicas, self.router = replicas, router
        self.now_s = max(replica.now_s for replica in replicas)
        self.outstanding = [0] * len(replicas)
        self.endings: list[tuple[float, int, dict[str, tuple[int, bool]]]] = []  # of steps
        self.in_step = [False] * len(replicas)

    @property
    def busy(self) -> bool:
        """Whether any replica has an open request."""
        return any(self.outstanding)

    def add(self, request_id: str, prompt: Prompt) -> bool:
        """Route a request; a replica that is in a step takes it up in its next one.

        Returns False where that replica turns it away.
        """
        chosen = self.router.choose(prompt, self.outstanding)
        if not self.in_step[chosen]:
            self.replicas[chosen].wait_until(self.now_s)
        admitted = self.replicas[chosen].add(request_id, prompt)
        self.outstanding[chosen] += admitted
        return admitted

    def step(self, before_s: float = float("inf")) -> dict[str, tuple[int, bool]]:
        """Go on to the end of the next step of any replica, but not beyond `before_s`.

        Returns what that step brought: request -> (new tokens, whether they were its last).
        """
        for number, replica in enumerate(self.replicas):
            if self.outstanding[number] and not self.in_step[number]:
                brought = replica.step()
                heapq.heappush(self.endings, (replica.now_s, number, brought))
                self.in_step[number] = True
        if self.endings[0][0] > before_s:
            self.now_s = max(self.now_s, before_s)
            return {}
        self.now_s, number, brought = heapq.heappop(self.endings)
        self.in_step[number] = False
        self.outstanding[number] -= sum(last for _, last in brought.values())
        return brought

    def wait_until(self, at_s: float) -> None:
        """Advance an idle fleet's clock to `at_s`, if that is later."""
        self.now_s = max(self.now_s, at_s)
