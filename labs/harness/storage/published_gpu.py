"""Runs of vLLM that others have published, and how forecasts of them came out.

`results/published-gpu.json` holds the lab's own figures of them: settings, measured aggregates,
forecasts, and the hash of the requests' file, which is theirs and is not here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

from pydantic import BaseModel, Field, TypeAdapter, field_validator, model_validator

from labs.harness.analysis.computed import Band
from labs.harness.storage import results
from serving import atomic
from serving.engines.flags import FlagValue

FIGURES = ("ttft_mean_s", "ttft_p50_s", "ttft_p99_s", "tpot_mean_s", "e2e_mean_s", "e2e_p99_s")
FILE = "published-gpu.json"
PICTURE = "published-gpu.svg"  # beside it, and beside the page

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Stage(BaseModel, frozen=True, extra="forbid"):
    """A load of which only its settings and mean figures were published: Poisson arrivals."""

    rate_per_s: Positive
    prompt_tokens: int = Field(ge=1)
    output_tokens: int = Field(ge=2)
    texts: int = Field(ge=1)  # distinct prompts, sent in turn
    measured: Mapping[str, Positive]  # by a name of FIGURES: `e2e_mean_s` and others
    others: Mapping[str, Positive] = {}  # predictor -> the `e2e_mean_s` that it predicted

    @field_validator("measured")
    @classmethod
    def _known(cls, measured: Mapping[str, float]) -> Mapping[str, float]:
        unknown = [name for name in measured if name not in FIGURES]
        if unknown or "e2e_mean_s" not in measured:
            wrong = f"has {unknown[0]}" if unknown else "lacks e2e_mean_s"
            raise ValueError(f"{wrong}; known are {', '.join(FIGURES)}")
        return measured


class PublishedRun(BaseModel, frozen=True, extra="forbid"):
    """A run of vLLM that somebody published: what was served, on what, and its requests' file."""

    name: str
    source: str
    requests: str = ""  # the CSV, maybe with gzip; empty where there is a stage instead
    stage: Stage | None = None
    model: str  # a shape that ships with the lab, or the `config.json` beside `runs.toml`
    model_name: str
    card: str
    gpus: int = Field(default=1, ge=1)
    vllm: str
    kv_blocks: int = Field(ge=1)
    block_tokens: int = Field(default=16, ge=1)
    # requests that its client, or a router, kept open at most; None: no limit
    most_in_flight: Annotated[int | None, Field(ge=1, exclude_if=lambda most: most is None)] = None
    # an earlier load on the same engine had sent its texts: all are cached from the beginning
    warm: Annotated[bool, Field(exclude_if=lambda warm: not warm)] = False
    flags: Mapping[str, FlagValue]  # by vLLM's own names
    remark: str = ""  # what to know of it
    # figure that is missed -> why, where that is known
    causes: Annotated[Mapping[str, str], Field(exclude_if=lambda causes: not causes)] = {}

    @model_validator(mode="after")
    def _has_a_load(self) -> PublishedRun:
        if bool(self.requests) == bool(self.stage):
            raise ValueError("either requests or a stage is needed")
        return self


class Judged(BaseModel, frozen=True, extra="forbid"):
    """A published run beside its forecast: each figure as it was measured, and its band."""

    run: PublishedRun
    sha256: str  # of the requests' file; empty for a stage
    sent: int
    rate_per_s: float
    in_flight: float  # requests, on average: rate x E2E
    measured: Mapping[str, float]
    forecast: Mapping[str, Band]

    @property
    def others(self) -> Mapping[str, float]:
        """The `e2e_mean_s` that others predicted, by the predictor's name."""
        return self.run.stage.others if self.run.stage else {}

    def ratio(self, figure: str) -> float:
        """Return measured / forecast."""
        return self.measured[figure] / self.forecast[figure].value

    def in_band(self, figure: str) -> bool:
        """Tell whether the measured figure lies within the forecast's band."""
        band = self.forecast[figure]
        return band.low <= self.measured[figure] <= band.high


_ALL: TypeAdapter[tuple[Judged, ...]] = TypeAdapter(tuple[Judged, ...])


def on_file() -> tuple[Judged, ...]:
    """Read the published runs that were judged; none without the file."""
    path = results.RESULTS / FILE
    return _ALL.validate_json(path.read_bytes()) if path.exists() else ()


def write(judged: Sequence[Judged]) -> None:
    """Replace the published runs that were judged."""
    atomic.write(results.RESULTS / FILE, _ALL.dump_json(tuple(judged), indent=1).decode() + "\n")
