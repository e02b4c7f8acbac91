"""Admission control in the client, for an engine that cannot limit its queue itself.

The rule is that of vLLM's API server (`AsyncLLM.check_admission` in 0.32): a request is turned away
where more than `requests` would then be unfinished, waiting or running, or where the prompts of
those without a first token have `prompt_tokens` or more. An engine counts a request from its
arrival to its last token, and the client from its send to the end of its answer, which is longer by
the transport: some milliseconds.

The load processes of one machine count together, in memory that all of them map; each writes its
own counts alone. Two that decide within the same microseconds may let in one more than the limit.
vLLM counts the prompt of a request for several answers once for each, until the first token of that
answer; that is not followed here, and such requests have no limit on prompt tokens.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path

from loadtests.plan import PlannedRequest, QueueLimits
from loadtests.records import BY_CLIENT

COUNT_BYTES = 8
IN_MEMORY = Path("/dev/shm")  # of Linux; no disk is written for what lies there


def counts_file(trial: str, otherwise: Path) -> Path:
    """Return the file in which the load processes count a trial together.

    It lies in memory where this machine has a place for that, and else in the folder `otherwise`.
    """
    in_memory = IN_MEMORY.is_dir() and os.access(IN_MEMORY, os.W_OK)
    return (IN_MEMORY if in_memory else otherwise) / f"labs-in-flight-{trial}"


class Admission:
    """Decides which requests of one trial are sent, by what all load processes have in flight."""

    def __init__(self, limits: QueueLimits, share: tuple[int, int], shared: Path) -> None:
        """Share the counts in this file with the other processes: `share` is (number, all)."""
        number, of = share
        self._limits = limits
        size_bytes = 2 * COUNT_BYTES * of
        with shared.open("a+b") as file:
            file.truncate(size_bytes)
            counts = memoryview(mmap.mmap(file.fileno(), size_bytes)).cast("q")
        self._shared = shared
        self._requests, self._prompt_tokens = counts[0::2], counts[1::2]  # of each process
        self._number = number
        self._requests[number] = self._prompt_tokens[number] = 0

    def remove_file(self) -> None:
        """Remove the file, once all processes have opened it; what they map of it stays."""
        self._shared.unlink(missing_ok=True)

    def refusal(self, request: PlannedRequest) -> str:
        """Say which limit turns this request away; empty where it may be sent."""
        most, most_tokens = self._limits.requests, self._limits.prompt_tokens
        if most is not None and sum(self._requests) + request.choices > most:
            return f"{BY_CLIENT}: as many requests were unfinished as the client's limit, {most}"
        if most_tokens is not None and sum(self._prompt_tokens) >= most_tokens:
            return f"{BY_CLIENT}: prompts were waiting beyond the client's limit, {most_tokens}"
        return ""

    def admit(self, request: PlannedRequest) -> Admitted:
        """Count a request that is sent now; its answer's pieces are to go into what is returned."""
        return Admitted(self, request)

    def count(self, requests: int, prompt_tokens: int) -> None:
        """Add so much to what this process has in flight."""
        self._requests[self._number] += requests
        self._prompt_tokens[self._number] += prompt_tokens


class Admitted(list[tuple[float, bytes]]):
    """The pieces of the answer to a request that was admitted; the first token ends its prefill."""

    def __init__(self, admission: Admission, request: PlannedRequest) -> None:
        super().__init__()
        self._admission = admission
        self._choices, self._prompt_tokens = request.choices, request.prompt_tokens
        admission.count(self._choices, self._prompt_tokens)

    def append(self, piece: tuple[float, bytes]) -> None:
        """Take a piece; vLLM sends nothing but the head of its answer before the first token."""
        super().append(piece)
        if self._prompt_tokens and b"data:" in piece[1]:
            self._end_prefill()

    def end(self) -> None:
        """Note that the answer has ended, however it did."""
        self._end_prefill()
        self._admission.count(-self._choices, 0)
        self._choices = 0

    def _end_prefill(self) -> None:
        self._admission.count(0, -self._prompt_tokens)
        self._prompt_tokens = 0
