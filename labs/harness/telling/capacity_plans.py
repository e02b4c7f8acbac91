"""Build the page of a capacity plan: each figure with its formula and its kind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from labs.harness.filing.results import Band
from labs.harness.judging.text import counted, number
from labs.harness.spec import SLO
from labs.harness.telling.document import (
    Block,
    Code,
    Emphasis,
    Inline,
    Paragraph,
    Section,
    Strong,
    bullets,
    section,
    table,
)
from labs.harness.telling.tables import with_band
from loadtests.trace import TraceRow
from serving.engines.vllm import ACTIVATION_BYTES, CPU_KV_BYTES, MEMORY_SHARE, PROCESS_BYTES


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
class Alone:
    """Holds the figures of one request with the GPU to itself."""

    ceiling_tokens_per_s: float
    tokens_per_s: Band
    prompt_s: Band


@dataclass(frozen=True)
class Latencies:
    """Holds what the clients of one play in virtual time would observe."""

    requests: int
    within: float  # the share of requests that meet the objective
    ttft_p50_s: float | None
    ttft_p99_s: float | None
    tpot_p50_s: float | None
    tpot_p99_s: float | None
    hit_rate: float | None
    preemptions: int


@dataclass(frozen=True)
class RateForecast:
    """Holds the forecast of one GPU under an offered rate."""

    rate_per_s: float
    expected: Latencies
    within: Band


@dataclass(frozen=True)
class FleetForecast:
    """Holds the forecast of the demand on several GPUs behind a router."""

    router: str
    expected: Latencies
    within: Band
    ttft_p99_s: Band | None


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
    alone: Alone | None = None
    rates: tuple[RateForecast, ...] = ()
    capacity_per_s: Band | None = None
    replicas: int | None = None
    fleets: tuple[FleetForecast, ...] = ()
    price: Price | None = None

    @property
    def replica(self) -> str:
        """Name what serves a copy of the model."""
        return self.device if self.gpus == 1 else f"replica of {self.gpus} GPUs"

    @property
    def device(self) -> str:
        return "machine" if self.on_cpu else "GPU"


def page(plan: CapacityPlan) -> Section:
    """Build the page: does it fit, one GPU, the demand on several, the price."""
    return section(
        f"{plan.model} in {plan.precision} on {plan.card}"
        + (f", {plan.gpus} for each replica" if plan.gpus > 1 else ""),
        Paragraph(
            (
                Strong("Arithmetic and forecast; nothing was measured."),
                " Memory is arithmetic. Times are forecasts by vLLM's own scheduler in virtual"
                " time, over steps ",
                *_origin(plan.run),
                ". A band (in parentheses) spans a faster and a slower step.",
                " GPUs that share each layer exchange results over NVLink, at its datasheet's"
                " bandwidth and published shares of it; none was timed here."
                if plan.gpus > 1
                else "",
            )
        ),
        bullets([f"Demand: {_demand(plan.demand)}.", f"Objective: {_objective(plan)}."]),
        _answer(plan),
        section("Does it fit?", *_fit(plan)),
        section("One request alone", *_request_alone(plan)),
        section(f"One {plan.replica}", *_one_replica(plan)),
        section(
            f"{_replicas(plan)} behind a router",
            *_fleet(plan),
        ),
        section("Rent or buy tokens?", *_money(plan)),
    )


def _origin(run: str) -> tuple[Inline, ...]:
    """Say where the steps are from."""
    if run:
        return ("that were timed on such a machine before the run ", Code(run))
    return (
        "computed from the GPU's datasheet and published efficiencies, which ",
        Code("serving/forecasting/datasheet.py"),
        " names",
    )


def _replicas(plan: CapacityPlan) -> str:
    return counted(plan.replicas or 0, plan.device if plan.gpus == 1 else "replica")


def _demand(demand: Demand) -> str:
    lengths = f"{demand.prompt_tokens:,.0f} prompt and {demand.output_tokens:,.0f} output tokens"
    if demand.trace:
        return (
            f"a trace of {len(demand.trace):,} requests over {demand.trace[-1][0]:,.0f} s,"
            f" {demand.rate_per_s:.3g} requests/s, on average {lengths}"
        )
    rate = f"{demand.rate_per_s:g} requests/s" if demand.rate_per_s else "no rate given"
    shared = (
        f"; each prompt begins with one of {demand.documents:,} documents of"
        f" {demand.document_tokens:,} tokens, popular ones more often"
        if demand.documents
        else ""
    )
    drawn = f"{lengths} (output lengths are exponentially distributed)"
    return f"{rate} at random times, each of {drawn}{shared}"


def _objective(plan: CapacityPlan) -> str:
    slo = plan.slo
    return (
        f"TTFT within {number(slo.ttft_s, 's')} and TPOT within {number(slo.tpot_s, 's')}"
        f" for {plan.share:.0%} of the requests"
    )


def _answer(plan: CapacityPlan) -> Paragraph:
    """Answer in one sentence or two."""
    served = next(fit for fit in plan.fits if fit.precision == plan.precision)
    if plan.alone is None:
        precisions = [f.precision for f in plan.fits if f.kv_tokens >= plan.demand.tokens]
        instead = (
            f"It fits with {', '.join(precisions)}." if precisions else "It fits at no precision."
        )
        left = served.usable_bytes - served.weight_bytes
        weights = f"It does not fit: {served.weight_bytes / 1e9:.1f} GB of weights"
        text = (
            f"{weights} leave {left / 1e9:.1f} GB for the KV cache. {instead}"
            if left > 0
            else f"{weights} are more than the {served.usable_bytes / 1e9:.1f} GB that are usable."
            f" {instead}"
        )
        return Paragraph(Strong(text))
    if plan.capacity_per_s is None:
        lowest = plan.rates[0]
        return Paragraph(
            Strong(
                f"The objective is not met: even at {lowest.rate_per_s:g} requests/s per"
                f" {plan.replica} only {lowest.expected.within:.0%} of the requests meet it."
            )
        )
    at_least = "at least " if plan.rates[-1].expected.within >= plan.share else ""
    capacity = with_band(plan.capacity_per_s, "requests/s")
    text = f"One {plan.replica} serves {at_least}{capacity} within the objective."
    if plan.demand.rate_per_s and plan.replicas:
        text += f" {plan.demand.rate_per_s:.3g} requests/s are forecast on {plan.replicas} of them."
    elif plan.demand.rate_per_s:
        text += f" The demand needs more {plan.device}s than a plan can forecast."
    return Paragraph(Strong(text))


def _fit(plan: CapacityPlan) -> Sequence[Block]:
    usable = plan.fits[0].usable_bytes
    rows: list[list[Inline]] = [
        [
            fit.precision,
            f"{fit.weight_bytes / 1e9:.1f} GB",
            f"{max(0.0, usable - fit.weight_bytes) / 1e9:.1f} GB",
            f"{fit.kv_tokens:,.0f}",
            f"{int(fit.requests):,}" if fit.requests >= 1 else "it does not fit",
        ]
        for fit in plan.fits
    ]
    of_memory, each = (
        ("the GPU's memory", "") if plan.gpus == 1 else (f"the memory of {plan.gpus} GPUs", " each")
    )
    room = (
        f" The KV cache has {CPU_KV_BYTES / 1e9:.1f} GB, which is vLLM's default on a CPU, or what"
        f" weights and processes ({PROCESS_BYTES / 1e9:.1f} GB) leave where that is less."
        if plan.on_cpu
        else f" {usable / 1e9:.1f} GB of {of_memory} are usable: {MEMORY_SHARE:.0%}, which is"
        f" vLLM's default, less {ACTIVATION_BYTES / 1e9:g} GB{each} for activations."
    )
    formula = (
        Emphasis("Arithmetic."),
        f"{room} The weights are the"
        " linear layers at their precision and the embeddings at 16 bits. A token's keys and"
        " values are"
        f" {plan.fits[0].kv_bytes_per_token:,.0f} bytes: 2 x layers x KV heads x head dim x 2. A"
        f" request of this demand occupies {plan.demand.tokens:,.0f} tokens at its end.",
    )
    header = ("Weights", "Size", "Left for the KV cache", "Tokens in the cache", "Requests at once")
    return table(header, rows), Paragraph(formula)


def _request_alone(plan: CapacityPlan) -> Sequence[Block]:
    if not plan.alone:
        return ()
    rows: list[list[Inline]] = [
        ["Decode, ceiling", number(plan.alone.ceiling_tokens_per_s, "tok/s"), "arithmetic",
         "memory bandwidth / bytes a step reads"],
        ["Decode", with_band(plan.alone.tokens_per_s, "tok/s"), "forecast", "1 / time of a step"],
        ["Prefill", with_band(plan.alone.prompt_s, "s"), "forecast",
         "time of a step with the whole prompt"],
    ]  # fmt: skip
    return (table(("Figure", "Value", "Kind", "From"), rows),)


def _one_replica(plan: CapacityPlan) -> Sequence[Block]:
    rows: list[list[Inline]] = [
        [
            f"{r.rate_per_s:g} /s",
            with_band(r.within, "share"),
            number(r.expected.ttft_p50_s, "s"),
            number(r.expected.ttft_p99_s, "s"),
            number(r.expected.tpot_p50_s, "s"),
            number(r.expected.tpot_p99_s, "s"),
            number(r.expected.hit_rate, "share"),
            f"{r.expected.preemptions:,}",
        ]
        for r in plan.rates
    ]
    header = ("Offered", "Within the objective", "TTFT p50", "TTFT p99", "TPOT p50", "TPOT p99",
              "Prefix hits", "Preemptions")  # fmt: skip
    note = (
        Emphasis("Forecast."),
        f" {min((r.expected.requests for r in plan.rates), default=0):,} requests or more count at"
        " each rate, after a warm-up as long as an answer within the objective may last."
        " Where the queue grows without end, TTFT is far beyond its limit, and would be longer"
        " still over a longer time.",
    )
    return table(header, rows), Paragraph(note) if rows else Paragraph("")


FLEET = ("Router", "Within the objective", "TTFT p50", "TTFT p99", "TPOT p99", "Prefix hits",
         "Preemptions")  # fmt: skip
"""The header of what `fleet_row` writes."""


def fleet_row(fleet: FleetForecast) -> list[Inline]:
    """Write what clients of a fleet would observe, for each column of FLEET."""
    return [
        fleet.router,
        with_band(fleet.within, "share"),
        number(fleet.expected.ttft_p50_s, "s"),
        with_band(fleet.ttft_p99_s, "s"),
        number(fleet.expected.tpot_p99_s, "s"),
        number(fleet.expected.hit_rate, "share"),
        f"{fleet.expected.preemptions:,}",
    ]


def fleet_note(fleets: Sequence[FleetForecast], several: bool = True) -> Paragraph:
    """Say how the replicas were played, of which there are `several`."""
    requests = f" {fleets[0].expected.requests if fleets else 0:,} requests count"
    preparing = "prepares its requests one after another, in 2 ms, as measured on two CPU cores"
    if not several:
        return Paragraph((Emphasis("Forecast."), f"{requests}. The engine's server {preparing}."))
    return Paragraph((
        Emphasis("Forecast."),
        f"{requests}, the same for each router. The network between router and replicas takes no"
        f" time, each replica's server {preparing}, and replicas do not fail. The prefix-aware"
        " router follows the rule of SGLang's: a prompt goes where its beginning was sent before,"
        " unless that replica is overloaded.",
    ))  # fmt: skip


def _fleet(plan: CapacityPlan) -> Sequence[Block]:
    rows = [fleet_row(fleet) for fleet in plan.fleets]
    return (table(FLEET, rows), fleet_note(plan.fleets)) if rows else ()


def _money(plan: CapacityPlan) -> Sequence[Block]:
    price = plan.price
    if price is None:
        return (
            Paragraph(
                ("Give ", Code("PRICE_PER_HOUR="), " and ", Code("API_PRICE="), " to see it.")
            ),
        )
    rows: list[list[Inline]] = [
        ["Output tokens a day, at most, in millions",
         with_band(price.million_tokens_per_day, "1"), "forecast",
         "capacity x mean output x 86,400 s"],
        ["Price of a million tokens at that load", with_band(price.usd_per_million, "USD"),
         "forecast", f"{price.usd_per_hour:g} USD/h / tokens an hour"],
    ]  # fmt: skip
    if price.api_usd_per_million:
        millions = break_even_millions(price.usd_per_hour, price.api_usd_per_million)
        rows.append(
            ["Break-even, tokens a day, in millions", number(millions), "arithmetic",
             f"24 h x {price.usd_per_hour:g} USD/h / {price.api_usd_per_million:g} USD a million"]
        )  # fmt: skip
    note = (
        f"A rented {plan.replica} costs the same when it is idle. Below the break-even, bought"
        " tokens are cheaper; a break-even beyond what it can produce in a day is never reached."
        " You gave both prices; the price of prompt tokens, which most APIs charge too, is left"
        " out."
    )
    return table(("Figure", "Value", "Kind", "From"), rows), Paragraph(note)


def break_even_millions(usd_per_hour: float, usd_per_million: float) -> float:
    """Return how many million tokens a day cost as much from an API as the GPU does."""
    return 24 * usd_per_hour / usd_per_million


def over(values: Sequence[float]) -> Band:
    """Gather a figure as expected, the first, and those with a faster and a slower step."""
    return Band(value=values[0], low=min(values), high=max(values))
