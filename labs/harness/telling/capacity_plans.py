"""Build the page of a capacity plan: each figure with its formula and its kind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from labs.harness.filing.computed import Band
from labs.harness.judging.text import counted, number
from labs.harness.spec import SLO
from labs.harness.telling.document import Inline, Table, table
from labs.harness.telling.forecasts import LoadForecast, Place, loads
from labs.harness.telling.markdown import Markdown, code
from labs.harness.telling.tables import with_band
from labs.harness.telling.templates import filled
from loadtests.trace import TraceRow
from serving.engines.vllm import ACTIVATION_BYTES, CPU_KV_BYTES, MEMORY_SHARE, PROCESS_BYTES
from serving.places import how_to_install


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


def page(plan: CapacityPlan) -> Markdown:
    """Build the page: does it fit, one GPU, the demand on several, the price."""
    demand, price = plan.demand, plan.price
    rates: dict[Place, LoadForecast] = {
        (f"{rate:g} /s",): load for rate, load in plan.rates.items()
    }
    fleets: dict[Place, LoadForecast] = {(router,): load for router, load in plan.fleets.items()}
    return filled(
        "plan.md",
        plan=plan,
        demand=demand,
        lengths=f"{demand.prompt_tokens:,.0f} prompt and {demand.output_tokens:,.0f} output tokens",
        served=next(fit for fit in plan.fits if fit.precision == plan.precision),
        fitting=[fit.precision for fit in plan.fits if fit.kv_tokens >= demand.tokens],
        fits=_fits(plan),
        memory_share=MEMORY_SHARE,
        activation_bytes=ACTIVATION_BYTES,
        kv_default_bytes=CPU_KV_BYTES,
        process_bytes=PROCESS_BYTES,
        rates=loads(("Offered",), rates),
        fewest=min((load.expected.requests for load in plan.rates.values()), default=0),
        replicas=counted(plan.replicas or 0, plan.device if plan.gpus == 1 else "replica"),
        fleets=loads(("Router",), fleets),
        requests=next((load.expected.requests for load in plan.fleets.values()), 0),
        grows=any(load.expected.grows for load in (*rates.values(), *fleets.values())),
        several=True,
        break_even=price
        and price.api_usd_per_million
        and break_even_millions(price.usd_per_hour, price.api_usd_per_million),
        here=False,
        how_to_install=how_to_install("cuda"),
        by_kernels=plan.by_kernels,
        run=plan.run and code(plan.run),
        number=number,
        band=with_band,
    )


def _fits(plan: CapacityPlan) -> Table:
    header = ("Weights", "Size", "Left for the KV cache", "Tokens in the cache", "Requests at once")
    rows: list[list[Inline]] = [
        [
            fit.precision,
            f"{fit.weight_bytes / 1e9:.1f} GB",
            f"{max(0.0, fit.usable_bytes - fit.weight_bytes) / 1e9:.1f} GB",
            f"{fit.kv_tokens:,.0f}",
            f"{int(fit.requests):,}" if fit.requests >= 1 else "it does not fit",
        ]
        for fit in plan.fits
    ]
    return table(header, rows)


def break_even_millions(usd_per_hour: float, usd_per_million: float) -> float:
    """Return how many million tokens a day cost as much from an API as the GPU does."""
    return 24 * usd_per_hour / usd_per_million
