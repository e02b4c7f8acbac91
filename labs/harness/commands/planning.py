"""The command `plan`: does a model fit, how many GPUs does traffic need, at what price?"""

from __future__ import annotations

import math
from pathlib import Path
from statistics import fmean
from typing import Annotated

import typer

from labs.harness.commands.options import (
    FleetOption,
    MarkdownOut,
    PriceOption,
    RouterOption,
    SloOption,
    TraceOption,
    pair,
    price_of,
    recorded_machine,
    require_known,
    routers_of,
    slo_of,
    trace_of,
)
from labs.harness.commands.terminal import ConsoleProgress, reported_errors
from labs.harness.running.capacity_plan import (
    PRECISIONS,
    Question,
    model_named,
    model_on_file,
    plan,
)
from labs.harness.running.resolve import machine_of
from labs.harness.spec import LabError, duration_s_of
from labs.harness.telling import capacity_plans, markdown
from labs.harness.telling.capacity_plans import Demand
from loadtests.trace import Tell
from serving import whole
from serving.hardware.gpus import short_names
from serving.weights.dummy import SHAPES

app = typer.Typer()

MOST_TOKENS = 131_072  # of a prompt, or an answer
MOST_DOCUMENTS = 100_000


CardOption = Annotated[
    str,
    typer.Option(
        "--machine",
        envvar="LABS_MACHINE",
        help=f"The GPU: {', '.join(short_names())}; or a machine on file, by the name of its folder"
        " in results/, or one of its runs.",
    ),
]
ShapeOption = Annotated[
    str,
    typer.Option(
        envvar="LABS_MODEL",
        help=f"A shape that ships with the lab ({', '.join(SHAPES)}), or a model folder; default:"
        " llama-8b, and on a machine on file the model whose step was timed there.",
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
    model: ShapeOption = "",
    precision: PrecisionOption = "bf16",
    gpus: GpusOption = 1,
    rate: RateOption = 0.0,
    lengths: LengthsOption = "1000/200",
    documents: DocumentsOption = "",
    trace: TraceOption = None,
    slo: SloOption = "1000/50",
    replicas: FleetOption = 0,
    router: RouterOption = "all",
    price: PriceOption = 0.0,
    api_price: ApiPriceOption = 0.0,
    out: MarkdownOut = None,
) -> None:
    """Plan capacity on a machine that is not here, in some minutes. Nothing is started or measured.

    Does the model fit? Which rate does one GPU serve within the objective? How many GPUs does this
    traffic need, and what does the router change? How much use makes a rented GPU cheaper than
    tokens from an API?
    """  # fmt: skip
    with reported_errors(), ConsoleProgress() as progress:
        on_file = recorded_machine(card, model)
        machine = on_file.machine if on_file else machine_of(card)[0]
        require_known("PRECISION", precision, PRECISIONS)
        question = Question(
            precision=precision,
            card=card,
            gpus=gpus,
            demand=_demand(rate, lengths, documents, trace, progress.waiting),
            slo=slo_of(slo),
            replicas=replicas or None,
            routers=routers_of(router),
            usd_per_hour=price_of(price),
            api_usd_per_million=api_price or None,
            model=model_on_file(on_file, model) if on_file else model_named(machine, model),
            on_file=on_file,
        )
        page = capacity_plans.page(plan(question, progress))
        progress.show(page)
        if out:
            whole.write(out, markdown.document(page))


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
