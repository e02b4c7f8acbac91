"""The figures of a capacity plan: what is asked for, what fits, and what it serves and costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from labs.harness.analysis.computed import Band
from labs.harness.forecast.load_forecast import LoadForecast
from labs.harness.spec.lab import SLO
from loadtests.trace import TraceRow


@dataclass(frozen=True)
class Demand:
    """Holds what is asked of the service; lengths are means, in tokens."""

    prompt_tokens: float
    output_tokens: float
    rate_per_s: float = 0.0  # 0: not given
    documents: int = 0  # of so many each prompt begins with one
    document_tokens: int = 0
    trace: tuple[TraceRow, ...] = ()

    @property
    def tokens(self) -> float:
        """The tokens that a request keeps in the cache at its end, on average."""
        return self.prompt_tokens + self.output_tokens


@dataclass(frozen=True)
class Fit:
    """Holds how a model at one precision fits one GPU; bytes, and tokens of KV cache."""

    precision: str
    weight_bytes: float
    usable_bytes: float
    kv_bytes_per_token: float
    kv_tokens: float
    requests: float


@dataclass(frozen=True)
class Assumed:
    """Holds what a plan takes a replica to have: its KV cache, and its limits on requests."""

    kv_blocks: int
    block_tokens: int
    batch: int  # requests in a step at most
    in_flight: int | None  # that its clients keep open at most; None: no limit


@dataclass(frozen=True)
class Alone:
    """Holds the figures of one request with the GPU to itself."""

    ceiling_tokens_per_s: float
    tokens_per_s: Band
    prompt_s: Band


@dataclass(frozen=True)
class Price:
    """Compares renting a GPU with buying tokens, in US dollars."""

    usd_per_hour: float
    million_tokens_per_day: Band
    usd_per_million: Band | None
    api_usd_per_million: float | None


@dataclass(frozen=True)
class CapacityPlan:
    """Holds all facts of a plan; what could not be answered is empty."""

    model: str
    card: str
    precision: str
    gpus: int  # that share each layer of a replica
    demand: Demand
    slo: SLO
    share: float
    fits: tuple[Fit, ...]
    on_cpu: bool = False
    run: str = ""  # on file, that timed the step; empty where a datasheet gives it
    by_kernels: bool = False  # the step, and not by a datasheet
    enough_gpus: int | None = None  # that share each layer, where it does not fit fewer
    alone: Alone | None = None
    assumed: Assumed | None = None  # where it fits
    rates: Mapping[float, LoadForecast] = field(default_factory=dict)  # by requests/s
    capacity_per_s: Band | None = None
    replicas: int | None = None
    fleets: Mapping[str, LoadForecast] = field(default_factory=dict)  # by router
    price: Price | None = None

    @property
    def replica(self) -> str:
        """Name what serves a copy of the model."""
        return self.device if self.gpus == 1 else f"replica of {self.gpus} GPUs"

    @property
    def device(self) -> str:
        return "machine" if self.on_cpu else "GPU"
