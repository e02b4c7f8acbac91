"""What is asked of the virtual engines, and what they answer: the two sides of a pipe."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel

from serving.forecasting.step import StepTimes
from serving.forecasting.traffic import Delays, Play, Traffic


class PlannedTrial(BaseModel, frozen=True, extra="forbid"):
    """One trial to be played: what is sent, and when."""

    key: str
    repeat: int
    requests: Path  # JSON lines, each with `index`, `output_tokens`, a chat `body`, ...
    acceptance: float = 0.0  # probability that a draft token is accepted, each by itself
    primed: int = 0  # the first requests of this many are sent beforehand, one after another
    traffic: Traffic


class PlannedEngine(BaseModel, frozen=True, extra="forbid"):
    """An engine by its arguments, how long its steps take, and the trials to be played on it."""

    argv: tuple[str, ...]
    step_times: StepTimes
    draft_times: StepTimes | None = None
    trials: tuple[PlannedTrial, ...]


class ForecastPlan(BaseModel, frozen=True, extra="forbid"):
    tokenizer: Path
    delays: Delays = Delays()
    engines: tuple[PlannedEngine, ...]


class ForecastPlay(BaseModel, frozen=True, extra="forbid"):
    """A trial as it would go, with what the engine would have counted in it."""

    key: str
    repeat: int
    play: Play
    counters: dict[str, int]
    kv_capacity_tokens: int
