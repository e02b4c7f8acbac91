"""Define what the forecaster reads and writes: what to time, and trials with how each would go."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel

from serving.metrics import KvUse
from serving.simulator.fleet import Handover, Routing, Scaling
from serving.simulator.ngram_acceptance import Copied
from serving.simulator.profiled_step import TimingPlan
from serving.simulator.step import Masking, StepTimes
from serving.simulator.traffic import Delays, Play, Prompt, Traffic

FAILED = "failed"  # what the forecaster prints in the place of a plan's lines that are missing


class TimingPlans(BaseModel, frozen=True, extra="forbid"):
    """All steps that the forecaster times, in turn with one another."""

    timing: tuple[TimingPlan, ...]


class PlannedTrial(BaseModel, frozen=True, extra="forbid"):
    """A trial to be played: what is sent, and when."""

    key: str
    repeat: int
    requests: Path  # JSON lines: a `Prompt`, or a `SyntheticRequest`, each
    acceptance: float = 0.0  # probability that a draft token is accepted, each by itself
    guessed: float = 1.0  # probability that a step has drafts at all, each request by itself
    copied: tuple[Copied, ...] = ()  # in the answers to the first requests, in their place if any
    pace: float = 1.0  # a step takes so many times as long in this trial
    masking: Masking | None = None  # where the answers have a structure
    primed: int = 0  # so many of the first requests are sent beforehand, one after another
    traffic: Traffic
    routing: Routing = Routing()  # of requests to replicas
    scaling: Scaling | None = None  # of the replicas; None: all of them serve from the beginning
    ends_only: bool = False  # an answer keeps its first chunk, and joins all others


FIRST_OWN = 2**24  # tokens from here on tell requests apart, those below tell documents apart


class SyntheticRequest(BaseModel, frozen=True, extra="forbid"):
    """A request without a text: its first `document_tokens` are those of its document."""

    index: int
    prompt_tokens: int
    output_tokens: int
    document: int = 0
    document_tokens: int = 0

    @property
    def prompt(self) -> Prompt:
        """A prompt whose tokens agree with another's exactly where both share a document.

        A token that tells a document, or a request, apart is enough: what follows it never matches,
        since a cached block is found by all tokens up to its end.
        """
        document = (1 + self.document, *[0] * (self.document_tokens - 1))[: self.document_tokens]
        own = self.prompt_tokens - self.document_tokens
        token_ids = (*document, *(FIRST_OWN + self.index, *[0] * (own - 1))[:own])
        return Prompt(index=self.index, token_ids=token_ids, output_tokens=self.output_tokens)


class PlannedEngine(BaseModel, frozen=True, extra="forbid"):
    """A virtual engine: its arguments, how long its steps take, and the trials to play on it."""

    argv: tuple[str, ...]
    step_times: StepTimes
    draft_times: StepTimes | None = None
    trials: tuple[PlannedTrial, ...]
    replicas: int = 1
    handover: Handover | None = None  # to a second one like it, which decodes: this one prefills
    on_cuda: bool = False  # it schedules as vLLM does there, whatever device this vLLM is for


class ForecastPlan(BaseModel, frozen=True, extra="forbid"):
    """All that one forecaster plays, engine by engine."""

    delays: Delays = Delays()
    engines: tuple[PlannedEngine, ...]


class ForecastPlay(BaseModel, frozen=True, extra="forbid"):
    """Describes how a trial would go, and what the engine would count in it."""

    key: str
    repeat: int
    play: Play
    counters: dict[str, int]
    kv_capacity_tokens: int  # of one replica, as an engine's configuration says it
    kv_use: KvUse | None = None  # of a single engine, in the window
    # prompt tokens that a single engine has found in its prefix cache after each request
    found_tokens: list[int] = []
    replicas: float | None = None  # paid for, a mean over time, where their number follows the load
