"""What the forecaster reads and writes: a plan of trials, and how each of them would go."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel

from serving.forecasting.step import StepTimes
from serving.forecasting.traffic import Delays, Play, Traffic


class PlannedTrial(BaseModel, frozen=True, extra="forbid"):
    """A trial to be played: what is sent, and when."""

    key: str
    repeat: int
    requests: Path  # JSON lines, each with `index`, `output_tokens`, a chat `body`, ...
    acceptance: float = 0.0  # probability that a draft token is accepted, each by itself
    primed: int = 0  # so many of the first requests are sent beforehand, one after another
    traffic: Traffic


class PlannedEngine(BaseModel, frozen=True, extra="forbid"):
    """A virtual engine: its arguments, how long its steps take, and the trials to play on it."""

    argv: tuple[str, ...]
    step_times: StepTimes
    draft_times: StepTimes | None = None
    trials: tuple[PlannedTrial, ...]


class ForecastPlan(BaseModel, frozen=True, extra="forbid"):
    """All that one forecaster plays, engine by engine."""

    tokenizer: Path  # the model's folder
    delays: Delays = Delays()
    engines: tuple[PlannedEngine, ...]


class ForecastPlay(BaseModel, frozen=True, extra="forbid"):
    """How a trial would go, and what the engine would count in it."""

    key: str
    repeat: int
    play: Play
    counters: dict[str, int]
    kv_capacity_tokens: int
