"""Answers that are computed instead of measured, each for an example that it states.

*Arithmetic* follows from a model's shape, a card's memory and prices; a *forecast* is a time over
the step of a card's datasheet (`serving/forecasting/datasheet.py`). The functions are those that
`make plan` and the planner's page use, and every figure in a sentence comes from them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache

from labs.harness import theory
from labs.harness.facts.parts import parts_of
from labs.harness.judging.text import number
from labs.harness.questions import QUESTIONS
from labs.harness.telling.capacity_plans import break_even_millions
from labs.harness.telling.dials import shipped_shape
from labs.harness.telling.forecasts import over
from labs.harness.telling.markdown import Inline, Markdown, code
from labs.harness.telling.planner import BLOCK_TOKENS, kv_room_tokens
from labs.harness.telling.tables import with_band
from labs.harness.telling.templates import filled
from serving.engines.vllm import MEMORY_SHARE, usable_bytes
from serving.forecasting import cards
from serving.forecasting.datasheet import EXPECTED
from serving.forecasting.step import Piece, Step
from serving.hardware.gpus import DATASHEETS, PCIE_4_BYTES_PER_S, Datasheet
from serving.weights import dummy, models
from serving.weights.dummy import SHAPES
from serving.weights.models import Shape

CARD = "NVIDIA H100 80GB HBM3"  # of every example


@dataclass(frozen=True)
class Computed:
    """Holds an answer, what kind of answer it is, and the command that gives one for the reader."""

    kind: str
    text: Markdown
    command: str


@cache
def computed(id: str) -> Computed | None:
    """Answer a question without a run, where that is possible."""
    return _ANSWERS[id]() if id in _ANSWERS else None


def answer_with_command(answer: Computed) -> Inline:
    """Write an answer with its kind and with the command that computes another example."""
    kind = answer.kind[0].upper() + answer.kind[1:]
    before, after = f"{kind}, nothing measured: ", " For your own figures: "
    return before, answer.text, after, code(answer.command)


def kind_of(id: str, labs: Iterable[str]) -> str:
    """Say how a question is answered: `measured`, or as it is computed, or neither yet.

    `labs` are the names of those whose runs answer it. What they compute from what they measured
    is told apart.
    """
    answer = computed(id)
    kinds = [parts_of(lab).kinds.get(id, "measured") for lab in labs]
    return ", ".join(dict.fromkeys(kinds + ([answer.kind] if answer else []))) or "not measured yet"


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
        models.shape_of(config if bits == 16 else dummy.quantized(config, precision))
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
        kv_kb=f"{whole.kv_bytes_per_token() / 1e3:,.0f}",
        shape=whole,
        room={"eight": room(eight, 2), "four": room(four, 2), "both": room(four, 1)},
    )
    command = f"make plan MACHINE={sheet.short_name} MODEL={name} PRECISION=w4a16-gptq RATE=2"
    return Computed("arithmetic", text, command)


def _documents() -> Computed:
    """Forecast prompts that are long and begin with one of some documents, at a high rate."""
    name, prompt, document, documents, replicas, budget = "llama-8b", 4000, 3800, 300, 4, 512
    card, sheet = _card()
    shape = shipped_shape(name)
    times = cards.steps(dummy.config_of(name), shape, sheet)

    def prefill(tokens: int, cached: int) -> tuple[str, str]:
        """Forecast the time of a prompt's last tokens, and such prompts a second."""
        bands = over([t.seconds(Step([Piece(tokens, cached)], 1)) for t in times])
        return with_band(bands, "s"), number(1 / bands.value)

    cold_s, cold_per_s = prefill(prompt, 0)
    warm_s, warm_per_s = prefill(prompt - document, document)
    piece_s, _ = prefill(budget, prompt - budget)
    kept = kv_room_tokens(shape, sheet.memory_bytes, 2) // (document // BLOCK_TOKENS * BLOCK_TOKENS)
    text = filled(
        "computed_documents.md",
        model=_model(name), card=card, prompt=prompt, document=document, budget=budget,
        documents=documents, replicas=replicas, each=documents // replicas, kept=f"{kept:,.0f}",
        cold_s=cold_s, warm_s=warm_s, piece_s=piece_s, cold_per_s=cold_per_s,
        warm_per_s=warm_per_s,
    )  # fmt: skip
    command = (
        f"make plan MACHINE={sheet.short_name} RATE=60 LENGTHS={prompt}/100"
        f" DOCUMENTS={documents}/{document} REPLICAS={replicas}"
    )
    return Computed("forecast", text, command)


def _rent_or_buy() -> Computed:
    """Compute from how many tokens a day on a rented card is cheaper than an API."""
    name, prompt, output, users, per_hour, per_million = "llama-8b", 1000, 200, 64, 2.5, 0.3
    card, sheet = _card()
    shape = shipped_shape(name)
    millions = break_even_millions(per_hour, per_million)
    per_s = over(
        [
            users * output / times.request_s(users, prompt, output)
            for times in cards.steps(dummy.config_of(name), shape, sheet)
        ]
    )
    a_day = over([86_400 * value / 1e6 for value in (per_s.value, per_s.low, per_s.high)])
    text = filled(
        "computed_rent_or_buy.md",
        model=_model(name), card=card, users=users, prompt=prompt, output=output,
        per_hour=f"{per_hour:.2f}", per_million=f"{per_million:.2f}", millions=number(millions),
        per_s=number(millions * 1e6 / 86_400), a_day=with_band(a_day, "1"),
        busy=number(millions / a_day.value, "share"),
    )  # fmt: skip
    command = (
        f"make plan MACHINE={sheet.short_name} RATE=10 LENGTHS={prompt}/{output}"
        f" PRICE_PER_HOUR={per_hour:.2f} API_PRICE={per_million:.2f}"
    )
    return Computed("arithmetic and forecast", text, command)


def _smaller_cache() -> Computed:
    """Compute what each way to a smaller cache leaves of one long request."""
    name, context, window = "llama-8b", 32_768, 4096
    card, sheet = _card()
    shape = shipped_shape(name)
    flops_per_s = EXPECTED.computing * sheet.bf16_flops_per_s
    prefill_s = theory.prefill_flops(shape, context) / flops_per_s
    link = sheet.host_bytes_per_s or PCIE_4_BYTES_PER_S
    copy_s = theory.kv_copy_s(shape, context, link)
    pays = theory.link_that_pays_bytes_per_s(shape, flops_per_s)
    each, eight = shape.kv_bytes_per_token(2), shape.kv_bytes_per_token(1)
    text = filled(
        "computed_smaller_cache.md",
        model=_model(name), card=card, context=context, window=window, whole=_gb(each * context),
        eight=_gb(eight * context), windowed=_gb(each * window), halved=_gb(each * context / 2),
        link=number(link / 1e9, "GB/s"), copy_s=number(copy_s, "s"),
        prefill_s=number(prefill_s, "s"), computing=number(EXPECTED.computing, "share"),
        pays=number(pays / 1e9, "GB/s"),
    )  # fmt: skip
    return Computed("arithmetic", text, "make plan MACHINE=h100 MODEL=llama-8b LENGTHS=32000/500")


_ANSWERS: Mapping[str, Callable[[], Computed]] = {
    "KV-8": _smaller_cache,
    "SD-4": _documents,
    "SD-5": _large_model,
    "SD-6": _rent_or_buy,
}
assert _ANSWERS.keys() <= QUESTIONS.keys()
