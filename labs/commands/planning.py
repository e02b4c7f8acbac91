"""The command `plan`: does a model fit, how many GPUs does traffic need, at what price?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Annotated

import typer

from labs.commands.options import (
    MarkdownOut,
    PriceOption,
    SloOption,
    TraceOption,
    pair,
    price_of,
    slo_of,
    trace_of,
)
from labs.commands.terminal import ConsoleProgress, reported_errors
from labs.errors import did_you_mean
from labs.lab import LabError
from labs.running.capacity_plan import (
    MOST_REPLICAS,
    PRECISIONS,
    Question,
    model_named,
    plan,
)
from labs.running.resolve import machine_of
from labs.telling import capacity_plans, markdown
from labs.telling.capacity_plans import Demand
from serving import whole
from serving.dummy import SHAPES
from serving.forecasting.fleet import ROUTERS
from serving.gpus import short_names

app = typer.Typer()

MOST_TOKENS = 131_072  # of a prompt, or an answer
MOST_DOCUMENTS = 100_000


CardOption = Annotated[
    str,
    typer.Option("--machine", envvar="LABS_MACHINE", help=f"The GPU: {', '.join(short_names())}."),
]
ShapeOption = Annotated[
    str,
    typer.Option(
        envvar="LABS_MODEL",
        help=f"A shape that ships with the lab ({', '.join(SHAPES)}), or a model folder.",
    ),
]
PrecisionOption = Annotated[
    str, typer.Option(envvar="LABS_PRECISION", help=f"One of {', '.join(PRECISIONS)}.")
]
RateOption = Annotated[
    float, typer.Option(envvar="LABS_RATE", min=0, help="Requests per second, in total.")
]
LengthsOption = Annotated[
    str, typer.Option(envvar="LABS_LENGTHS", help="Mean tokens of prompts and outputs.")
]
DocumentsOption = Annotated[
    str,
    typer.Option(
        envvar="LABS_DOCUMENTS",
        help="The number of documents that prompts begin with, and their tokens: 200/800.",
    ),
]
GpusOption = Annotated[
    int,
    typer.Option(
        "--tp",
        envvar="LABS_TP",
        min=1,
        help="The GPUs that share each layer of a replica (tensor parallelism), over NVLink.",
    ),
]
ReplicasOption = Annotated[
    int,
    typer.Option(
        envvar="LABS_REPLICAS",
        min=0,
        max=MOST_REPLICAS,
        help="The number of replicas; 0: as many as the rate needs.",
    ),
]
RouterOption = Annotated[
    str, typer.Option(envvar="LABS_ROUTER", help=f"all, or one of {', '.join(ROUTERS)}.")
]
ApiPriceOption = Annotated[
    float,
    typer.Option(
        envvar="LABS_API_PRICE",
        min=0,
        help="The price of a million output tokens from an API, in US dollars, to compare with"
        " PRICE_PER_HOUR.",
    ),
]


@app.command("plan")
def plan_capacity(
    card: CardOption,
    model: ShapeOption = "llama-8b",
    precision: PrecisionOption = "bf16",
    gpus: GpusOption = 1,
    rate: RateOption = 0.0,
    lengths: LengthsOption = "1000/200",
    documents: DocumentsOption = "",
    trace: TraceOption = None,
    slo: SloOption = "1000/50",
    replicas: ReplicasOption = 0,
    router: RouterOption = "all",
    price: PriceOption = 0.0,
    api_price: ApiPriceOption = 0.0,
    out: MarkdownOut = None,
) -> None:
    """Plan capacity on a GPU that is not here, in some minutes. Nothing is started or measured.

    Does the model fit? Which rate does one GPU serve within the objective? How many GPUs does this
    traffic need, and what does the router change? How much use makes a rented GPU cheaper than
    tokens from an API?
    """  # fmt: skip
    with reported_errors(), ConsoleProgress() as progress:
        machine, _ = machine_of(card)
        _require_known("PRECISION", precision, PRECISIONS)
        _require_known("ROUTER", router, ("all", *ROUTERS))
        question = Question(
            precision=precision,
            card=card,
            gpus=gpus,
            demand=_demand(rate, lengths, documents, trace),
            slo=slo_of(slo),
            replicas=replicas or None,
            routers=tuple(ROUTERS) if router == "all" else (router,),
            usd_per_hour=price_of(price),
            api_usd_per_million=api_price or None,
            model=model_named(machine, model),
        )
        page = capacity_plans.page(plan(question, progress))
        progress.show(page)
        if out:
            whole.write(out, markdown.document(page))


def _require_known(setting: str, given: str, known: Sequence[str]) -> None:
    """Raise LabError where a setting names none of those that are known."""
    if given not in known:
        raise LabError(
            f"there is no {setting}={given}{did_you_mean(given, known)} ones are {', '.join(known)}"
        )


def _demand(rate: float, lengths: str, documents: str, trace: Path | None) -> Demand:
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
        rows = trace_of(trace)
        duration_s = rows[-1][0]
        if not duration_s:
            raise LabError(f"all requests of the trace {trace} come at one time, so it has no rate")
        return Demand(
            prompt_tokens=fmean(p for _, p, _ in rows),
            output_tokens=fmean(o for _, _, o in rows),
            rate_per_s=len(rows) / duration_s,
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
