"""A completion under way: what was asked, how far it is, and what was sent when."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from tests.fake.engine.connection import Connection


class Step(NamedTuple):
    """What the law says of the step that a chunk comes from."""

    due: float
    batch: int
    prefilled: int


@dataclass(eq=False, slots=True)
class Request:
    connection: Connection
    received: float
    index: str
    head: str  # the JSON that every answer starts with
    model: str
    adapter: str | None  # its name, of a model that is one
    mark: str  # its first word
    salt: str
    top: int | None  # how many of the prompt's logprobs are wanted at each position
    logprobs: bool  # those of the answer's tokens are wanted
    chat: bool
    stream: bool
    usage: bool  # a last chunk with the usage
    continuous: bool  # the usage in every chunk
    prompt: Sequence[object]
    n_out: int
    stops: bool  # ends by itself, not by max_tokens
    truth: dict[str, float]
    priority: int  # lower ones are served first
    choice: int = 0  # its place among the answers to one HTTP request
    family: Sequence[Request] = ()  # all of these, itself included
    scheduled: float = 0.0
    n_cached: int = 0
    computed: int = 0  # tokens whose keys and values are there
    sent: int = 0
    finish: str = ""
    middle: tuple[str, ...] = ()  # what the chunks between first and last have in common
    times: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)

    def siblings(self, n: int) -> list[Request]:
        """Makes a family of n out of this request, as vLLM makes n requests of one with `n`."""
        others = (replace(self, choice=i, times=[], tokens=[], steps=[]) for i in range(1, n))
        family = [self, *others]
        for member in family:
            member.family = family
        return family

    @property
    def all_ended(self) -> bool:
        """Whether every answer to the HTTP request has ended."""
        return all(member.finish for member in self.family or [self])

    @property
    def length(self) -> int:
        """Tokens of the prompt and of the answer so far."""
        return len(self.prompt) + self.sent

    @property
    def left(self) -> int:
        """Tokens to compute before the next one can be sampled: one, once it decodes."""
        return self.length - self.computed
