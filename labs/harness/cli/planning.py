"""Commands that compute instead of measuring: forecasts of labs, and plans of capacity."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from labs import LABS
from labs.harness.cli.options import (
    ALL,
    changes_of,
    command,
    lab_named,
    objective_changes,
    pair,
    price_of,
    recorded_machine,
    require_known,
    routers_of,
    slo_of,
    trace_of,
)
from labs.harness.cli.terminal import EXPECTED_ERRORS, ConsoleProgress
from labs.harness.forecast import validation
from labs.harness.forecast.capacity_figures import Demand
from labs.harness.forecast.capacity_plan import (
    PRECISIONS,
    Question,
    model_named,
    model_on_file,
    plan,
)
from labs.harness.forecast.forecast import FleetSize, rests_on_kernels
from labs.harness.forecast.forecaster import side_by_side
from labs.harness.forecast.simulated_loads import processes
from labs.harness.plan.resolve import RunRequest, Setup, machine_of
from labs.harness.reports import capacity_plans, forecasts, markdown, published_gpu
from labs.harness.reports.document import Paragraph, section
from labs.harness.reports.markdown import Markdown
from labs.harness.runner.run import forecast_alone, forecast_fleets_alone
from labs.harness.spec.lab import LabError, NotApplicable, duration_s_of
from labs.harness.storage import published_gpu as filed
from loadtests.trace import MOST_ROWS, Tell, TraceRow
from serving import atomic
from serving.engines.vllm import Vllm
from serving.models import catalog

MOST_TOKENS = 131_072  # of a prompt, or an answer
MOST_DOCUMENTS = 100_000


@command("plan", panel="Forecasts")
def plan_capacity(
    machine: str,
    model: str = "",
    precision: str = "bf16",
    tp: int = 1,
    rate: float = 0.0,
    lengths: str = "1000/200",
    documents: str = "",
    trace: Path | None = None,
    slo: str = "1000/50",
    replicas: int = 0,
    router: str = ALL,
    in_flight: int = 0,
    kv_blocks: int = 0,
    price_per_hour: float = 0.0,
    api_price: float = 0.0,
    out: Path | None = None,
) -> None:
    """Plan capacity on a machine that is not here, in some minutes. Nothing is started or measured.

    Does the model fit? Which rate does one GPU serve within the objective? How many GPUs does this
    traffic need, and what does the router change? How much use makes a rented GPU cheaper than
    tokens from an API?
    """  # fmt: skip
    with ConsoleProgress() as progress:
        on_file = recorded_machine(machine, model)
        host = on_file.machine if on_file else machine_of(machine)[0]
        require_known("PRECISION", precision, PRECISIONS)
        question = Question(
            precision=precision,
            card=machine,
            gpus=tp,
            demand=_demand(rate, lengths, documents, trace, progress.waiting),
            slo=slo_of(slo),
            replicas=replicas or None,
            routers=routers_of(router),
            in_flight=in_flight or None,
            kv_blocks=kv_blocks or None,
            usd_per_hour=price_of(price_per_hour),
            api_usd_per_million=api_price or None,
            model=model_on_file(on_file, model) if on_file else model_named(host, model),
            on_file=on_file,
        )
        page = capacity_plans.page(plan(question, progress))
        progress.show(page)
        if out:
            atomic.write(out, markdown.document(page))
        if rate or trace:
            Vllm.version()  # without it a plan ends with memory and one request


def _demand(rate: float, lengths: str, documents: str, trace: Path | None, tell: Tell) -> Demand:
    """Read what is asked of the service; raises LabError."""
    if not math.isfinite(rate):
        raise LabError(f"RATE={rate}: give a number of requests per second")
    count, document_tokens = 0.0, 0.0
    if documents:
        count, document_tokens = pair("DOCUMENTS", documents, "their number/tokens, as 200/800")
    if count > MOST_DOCUMENTS:
        raise LabError(f"DOCUMENTS={documents}: at most {MOST_DOCUMENTS:,} documents")
    if trace:
        if rate or documents:
            raise LabError("TRACE has its own times and prompts: leave RATE and DOCUMENTS out")
        rows = trace_of(trace, tell)
        return Demand(
            prompt_tokens=fmean(p for _, p, _ in rows),
            output_tokens=fmean(o for _, _, o in rows),
            rate_per_s=len(rows) / duration_s_of(rows),
            trace=rows,
        )
    prompt, output = pair("LENGTHS", lengths, "the tokens of prompts/outputs, such as 1000/200")
    if max(prompt, output) > MOST_TOKENS:
        raise LabError(f"LENGTHS={lengths}: at most {MOST_TOKENS:,} tokens each")
    if count and document_tokens >= prompt:
        raise LabError(
            f"DOCUMENTS={documents}: a prompt of {prompt:g} tokens has no room for a document of"
            f" {document_tokens:g} and a question; make LENGTHS longer"
        )
    return Demand(prompt, output, rate, int(count), int(document_tokens))


@command("forecast", panel="Forecasts", needs_vllm=True)
def forecast_lab(
    lab: str,
    machine: str = "",
    tp: int = 1,
    trace: Path | None = None,
    replicas: int = 0,
    router: str = ALL,
    slo: str = "",
    out: Path | None = None,
    quick: bool = False,
    set_: str = "",
    model: str = "",
    weights: str = "",
    seed: str = "",
    unsafe_flags: bool = False,
) -> None:
    """Forecast a lab, in seconds to a few minutes: no engine is started, nothing is recorded.

    vLLM's own scheduler plays every load point in virtual time, over a step of the model's shape
    that is timed on this machine. `MACHINE=h100` forecasts it for a GPU that is not here instead,
    `TP=4` for several of these that share each layer, `MACHINE=` with a folder of results for a
    machine that was measured. `TRACE=` puts the lab's engines under your traffic in place of the
    lab's loads, and goodput counts what meets the objective `SLO=`. `REPLICAS=4` sets so many of
    each engine behind a router, which shares the requests of open loads among them.
    """
    with ConsoleProgress() as progress:
        on_file = recorded_machine(machine, model)
        if on_file:
            model, weights = model or on_file.model, on_file.weights
        elif machine and not (model and catalog.has_weights(Path(model))):
            weights = "dummy"  # of a GPU that is not here only the shape counts
        changes = {**objective_changes(slo), **changes_of(set_, tp, seed)}
        rows = trace_of(trace, progress.waiting) if trace else ()
        size = _fleet_size(replicas, router, rows)
        if not on_file:
            machine_of(machine)  # refused once, and not for each lab
        written, without = [], list[str]()
        labs = list(LABS.values()) if lab == "all" else [lab_named(name) for name in lab.split(",")]
        for chosen in labs:
            request = RunRequest(
                chosen, quick, changes=changes, model=model,
                weights=weights, card=machine, on_file=on_file,
                unsafe_flags=unsafe_flags, trace=rows,
            )  # fmt: skip
            try:
                page = forecast_page(request, size, progress)
            except NotApplicable as reason:
                page = section(chosen.title, Paragraph(str(reason)))
            except EXPECTED_ERRORS as reason:
                if len(labs) == 1:
                    raise
                without.append(chosen.name)
                page = section(chosen.title, Paragraph(f"No forecast: {reason}"))
            progress.show(page)
            written.append(page)
        if out:
            only = written[0] if len(written) == 1 else section("Forecasts", *written)
            atomic.write(out, markdown.document(only))
        if without:
            raise LabError(f"labs without a forecast, for the reasons above: {', '.join(without)}")


def _fleet_size(replicas: int, router: str, trace: Sequence[TraceRow]) -> FleetSize | None:
    """Say how many of each engine are forecast; None where a lab's own forecast is asked for.

    A trace that is too long for a run is played as a fleet is, of one, which keeps less of it.
    Raises LabError.
    """
    routers = routers_of(router)
    if replicas:
        return FleetSize(replicas, routers if replicas > 1 else routers[:1])
    if router != ALL:
        raise LabError(f"ROUTER={router} has nothing to route to: say how many with REPLICAS=")
    return FleetSize(1, routers[:1]) if len(trace) > MOST_ROWS else None


def forecast_page(
    request: RunRequest, size: FleetSize | None, progress: ConsoleProgress
) -> Markdown:
    """Forecast a lab, or its engines as fleets, and tell it."""
    if size:
        setup, fleets = forecast_fleets_alone(request, size, progress)
        return forecasts.page_of_fleets(_basis(setup), size.replicas, fleets.points, fleets.without)
    setup, predictions = forecast_alone(request, progress)
    return forecasts.page(_basis(setup), predictions)


def _basis(setup: Setup) -> forecasts.Basis:
    run = setup.on_file.run if setup.on_file else ""
    by_kernels = rests_on_kernels(setup)
    return forecasts.Basis(
        setup.lab, setup.model.name, setup.machine, not setup.elsewhere, run, by_kernels
    )


@command("judge", panel="Forecasts", needs_vllm=True)
def judge_forecasts(data: Path) -> None:
    """Hold forecasts against runs that others have published, request by request.

    `DATA=` is a folder with the requests of published runs, or one such file. Runs of your own
    choice are described in a `runs.toml` beside them, in the form of
    `serving/simulator/public_runs/runs.toml`.
    """
    own = data.is_dir() and not (data / "runs.toml").exists()
    with ConsoleProgress() as progress, side_by_side(processes()) as forecasters:
        judged, without = validation.judge(data, forecasters, progress)
        progress.show(published_gpu.page(judged, without=without))
    if own and not without:
        filed.write(judged)
