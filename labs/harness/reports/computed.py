"""Answers that are computed instead of measured, each for an example that it states.

*Arithmetic* follows from a model's shape, a card's memory and prices; a *forecast* is a time over
the step of a card's datasheet (`serving/simulator/datasheet.py`). The functions are those that
`make plan` and the planner's page use, and every figure in a sentence comes from them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache

from labs.harness.analysis.text import number
from labs.harness.derived.lab_modules import parts_of
from labs.harness.derived.offloading import EXAMPLE_MODEL, on_one_card
from labs.harness.forecast.load_forecast import over
from labs.harness.reports.capacity_plans import break_even_millions
from labs.harness.reports.dials import shipped_shape
from labs.harness.reports.markdown import Inline, code
from labs.harness.reports.planner import BLOCK_TOKENS, kv_room_tokens
from labs.harness.reports.rendering import Answer
from labs.harness.reports.tables import with_band
from labs.harness.reports.templates import filled
from labs.harness.spec.questions import QUESTIONS
from serving.engines.vllm import MEMORY_SHARE, usable_bytes
from serving.hardware.gpus import DATASHEETS, Datasheet
from serving.models import catalog, dummy
from serving.models.catalog import Shape
from serving.models.dummy import SHAPES
from serving.simulator import cards
from serving.simulator.step import Piece, Step

CARD = "NVIDIA H100 80GB HBM3"  # of every example


@dataclass(frozen=True)
class Computed:
    """Holds an answer, what kind of answer it is, and the command that gives one for the reader."""

    kind: str
    answer: Answer
    command: str


@cache
def computed(id: str) -> Computed | None:
    """Answer a question without a run, where that is possible."""
    return _ANSWERS[id]() if id in _ANSWERS else None


def answer_with_command(answer: Computed) -> Inline:
    """Write an answer in brief with its kind, and the command that computes another example."""
    kind = answer.kind[0].upper() + answer.kind[1:]
    before, after = f"{kind}, nothing measured. ", " For your own figures: "
    return before, answer.answer.brief, after, code(answer.command)


def kind_of(id: str, labs: Iterable[str]) -> str:
    """Say how a question is answered: `measured`, or as it is computed, or neither yet.

    `labs` are the names of those whose runs answer it. What they compute from what they measured
    is told apart.
    """
    answer = computed(id)
    kinds = [parts_of(lab).kinds.get(id, "measured") for lab in labs]
    return "; ".join(dict.fromkeys(kinds + ([answer.kind] if answer else []))) or "not measured yet"


def _card() -> tuple[str, Datasheet]:
    return CARD.removeprefix("NVIDIA ").split()[0], DATASHEETS[CARD]


def _model(name: str) -> str:
    return SHAPES[name].partition(":")[0]


def _gb(of_bytes: float) -> str:
    return number(of_bytes / 1e9, "GB")


def _large_model() -> Computed:
    """Compute whether a model of 70 billion parameters fits on one card of 80 GB."""
    name, context = "llama-70b", 8192
    card, sheet = _card()
    config = dummy.config_of(name)
    whole, eight, four = (
        catalog.shape_of(config if bits == 16 else dummy.quantized(config, precision))
        for bits, precision in ((16, "bf16"), (8, "fp8"), (4, "w4a16-gptq"))
    )

    def room(shape: Shape, value_bytes: float) -> str:
        tokens = kv_room_tokens(shape, sheet.memory_bytes, value_bytes)
        requests = int(tokens // context)
        of = f"request{'' if requests == 1 else 's'} of {context:,}"
        return f"{tokens:,.0f} tokens, or {requests:,} {of}"

    text = filled(
        "computed_large_model.md",
        params=number(whole.params / 1e9),
        model=_model(name),
        card=card,
        memory=_gb(sheet.memory_bytes),
        usable=_gb(usable_bytes(sheet.memory_bytes)),
        share=number(MEMORY_SHARE, "share"),
        whole=_gb(2 * whole.params),
        eight=_gb(eight.held_bytes),
        four=_gb(four.held_bytes),
        read=_gb(four.weight_bytes),
        bandwidth=number(sheet.memory_bandwidth_bytes_per_s, "B/s"),
        stream=number(sheet.memory_bandwidth_bytes_per_s / four.weight_bytes, "tok/s"),
        kv_kb=f"{whole.kv_bytes_per_token() / 1e3:,.0f}",
        shape=whole,
        room={
            "eight": f"{kv_room_tokens(eight, sheet.memory_bytes, 2):,.0f}",
            "four": room(four, 2),
            "both": room(four, 1),
        },
    )
    command = f"make plan MACHINE={sheet.short_name} MODEL={name} PRECISION=w4a16-gptq RATE=2"
    return Computed("arithmetic", Answer.of(text), command)


def _documents() -> Computed:
    """Forecast prompts that are long and begin with one of some documents, at a high rate."""
    name, prompt, answer, document, documents, replicas, budget, users = (
        "llama-8b", 4000, 100, 3800, 300, 4, 512, 16,
    )  # fmt: skip
    card, sheet = _card()
    shape = shipped_shape(name)
    times = cards.steps(dummy.config_of(name), shape, sheet)

    def prefill_s(tokens: int, cached: int) -> str:
        """Forecast the time of a prompt's last tokens."""
        return with_band(over([t.seconds(Step([Piece(tokens, cached)], 1)) for t in times]), "s")

    def answered_per_s(cached: int) -> str:
        """Forecast such requests a second where so many are always in flight."""
        return with_band(
            over([users / t.request_s(users, prompt, answer, cached) for t in times]), "req/s"
        )

    kept = kv_room_tokens(shape, sheet.memory_bytes, 2) // (document // BLOCK_TOKENS * BLOCK_TOKENS)
    text = filled(
        "computed_documents.md",
        model=_model(name), card=card, prompt=prompt, answer=answer, document=document,
        budget=budget, documents=documents, replicas=replicas, each=documents // replicas,
        users=users, kept=f"{kept:,.0f}", cold_s=prefill_s(prompt, 0),
        warm_s=prefill_s(prompt - document, document), piece_s=prefill_s(budget, prompt - budget),
        step_s=prefill_s(1, prompt),
        cold_per_s=answered_per_s(0), warm_per_s=answered_per_s(document),
    )  # fmt: skip
    command = (
        f"make plan MACHINE={sheet.short_name} RATE=60 LENGTHS={prompt}/{answer}"
        f" DOCUMENTS={documents}/{document} REPLICAS={replicas}"
    )
    return Computed("forecast", Answer.of(text), command)


LOADS = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # requests in flight


def _rent_or_buy() -> Computed:
    """Compute from which load on a rented card is cheaper than an API, input and output paid."""
    name, prompt, output = "llama-8b", 1000, 200
    usd_per_hour, usd_per_million_in, usd_per_million_out = 2.5, 0.1, 0.3
    card, sheet = _card()
    times = cards.steps(dummy.config_of(name), shipped_shape(name), sheet)
    request_usd = (prompt * usd_per_million_in + output * usd_per_million_out) / 1e6
    per_output_usd = 1e6 * request_usd / output
    millions_out = break_even_millions(usd_per_hour, per_output_usd)
    requests_a_day = 1e6 * millions_out / output
    even_per_s = requests_a_day / 86_400

    def served(users: int) -> list[float]:
        """Forecast the requests a second with so many in flight, on the three engines."""
        return [users / t.request_s(users, prompt, output) for t in times]

    from_users, *ends = (
        next(users for users in LOADS if served(users)[engine] > even_per_s)
        for engine in range(len(times))
    )
    at_that, most = over(served(from_users)), over(served(LOADS[-1]))
    text = filled(
        "computed_rent_or_buy.md",
        model=_model(name), card=card, prompt=prompt, output=output,
        usd_per_hour=f"{usd_per_hour:.2f}", usd_in=f"{usd_per_million_in:.2f}",
        usd_out=f"{usd_per_million_out:.2f}", requests_a_day=f"{requests_a_day:,.0f}",
        millions=number(requests_a_day * (prompt + output) / 1e6), even_per_s=number(even_per_s),
        from_users=from_users, fewest=min([from_users, *ends]), most_users=max([from_users, *ends]),
        at_that=with_band(at_that, "1"), loads=LOADS[-1], most=with_band(most, "1"),
        busy=number(even_per_s / most.value, "share"),
    )  # fmt: skip
    command = (
        f"make plan MACHINE={sheet.short_name} RATE=10 LENGTHS={prompt}/{output}"
        f" PRICE_PER_HOUR={usd_per_hour:.2f} API_PRICE={per_output_usd:.2f}"
    )
    return Computed("arithmetic and forecast", Answer.of(text), command)


def _smaller_cache() -> Computed:
    """Compute what each way to a smaller cache leaves of one long request."""
    example, window = on_one_card(), 4096
    context, shape = example.tokens, shipped_shape(EXAMPLE_MODEL)
    each, eight = shape.kv_bytes_per_token(2), shape.kv_bytes_per_token(1)
    text = filled(
        "computed_smaller_cache.md",
        example=example, context=context, window=window, whole=_gb(each * context),
        eight=_gb(eight * context), windowed=_gb(each * window), halved=_gb(each * context / 2),
    )  # fmt: skip
    command = "make plan MACHINE=h100 MODEL=llama-8b LENGTHS=16000/500"
    return Computed("arithmetic and forecast", Answer.of(text), command)


_ANSWERS: Mapping[str, Callable[[], Computed]] = {
    "KV-8": _smaller_cache,
    "SD-4": _documents,
    "SD-5": _large_model,
    "SD-6": _rent_or_buy,
}
assert _ANSWERS.keys() <= QUESTIONS.keys()
