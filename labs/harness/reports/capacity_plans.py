"""Build the page of a capacity plan: each figure with its formula and its kind."""

from __future__ import annotations

from labs.harness.analysis.text import counted, number
from labs.harness.forecast.capacity_figures import CapacityPlan
from labs.harness.forecast.load_forecast import LoadForecast
from labs.harness.reports.document import Inline, Table, table
from labs.harness.reports.forecasts import Place, loads
from labs.harness.reports.markdown import Markdown, code
from labs.harness.reports.tables import with_band
from labs.harness.reports.templates import filled
from serving.engines.vllm import ACTIVATION_BYTES, CPU_KV_BYTES, MEMORY_SHARE, PROCESS_BYTES
from serving.places import how_to_install


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
