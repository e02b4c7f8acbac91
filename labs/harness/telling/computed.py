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
from labs.harness.telling.document import Code, Inline
from labs.harness.telling.forecasts import over
from labs.harness.telling.planner import BLOCK_TOKENS, kv_room_tokens
from labs.harness.telling.tables import with_band
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
    text: str
    command: str


@cache
def computed(id: str) -> Computed | None:
    """Answer a question without a run, where that is possible."""
    return _ANSWERS[id]() if id in _ANSWERS else None


def answer_with_command(answer: Computed) -> Inline:
    """Write an answer with its kind and with the command that computes another example."""
    kind = answer.kind[0].upper() + answer.kind[1:]
    return f"{kind}, nothing measured: {answer.text} For your own figures: ", Code(answer.command)


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

    return Computed(
        "arithmetic",
        f"the {number(whole.params / 1e9)} billion parameters of {_model(name)} in 16 bits are"
        f" {_gb(2 * whole.params)}, and an {card} has {_gb(sheet.memory_bytes)}, of which"
        f" {_gb(usable_bytes(sheet.memory_bytes))} are usable ({number(MEMORY_SHARE, 'share')},"
        " less the activations): it does not fit. In 8 bits the weights take"
        f" {_gb(eight.held_bytes)}, in 4 bits {_gb(four.held_bytes)}. The keys and values of a"
        f" token take {whole.kv_bytes_per_token() / 1e3:,.0f} kB (2 x {whole.layers} layers x"
        f" {whole.kv_heads} KV heads x {whole.head_dim} x 2 bytes), so that 8-bit weights leave"
        f" room for {room(eight, 2)}; 4-bit weights for {room(four, 2)}; with keys and values in 8"
        f" bits, too, for {room(four, 1)}.",
        f"make plan MACHINE={sheet.short_name} MODEL={name} PRECISION=w4a16-gptq RATE=2",
    )


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
    return Computed(
        "forecast",
        f"keep the documents in the prefix cache, send each to the replica that has it, and cut"
        f" prompts into pieces. {_model(name)} on an {card} needs {cold_s} for a prompt of"
        f" {prompt:,} tokens, and {warm_s} where its first {document:,} are cached: at most"
        f" {cold_per_s} and {warm_per_s} prompts a second if it did nothing else. The cache of a"
        f" replica has room for {kept:,.0f} such documents. Behind a round-robin router each of"
        f" {replicas} replicas meets all {documents}, behind a prefix-aware one only"
        f" {documents // replicas}. In pieces of {budget} tokens a prompt that is not cached holds"
        f" everybody else up for {piece_s} at a time.",
        f"make plan MACHINE={sheet.short_name} RATE=60 LENGTHS={prompt}/100"
        f" DOCUMENTS={documents}/{document} REPLICAS={replicas}",
    )


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
    return Computed(
        "arithmetic and forecast",
        "break-even tokens a day = 24 h x price of an hour / price of a token. A card for"
        f" {per_hour:.2f} USD an hour beside {per_million:.2f} USD for a million output tokens:"
        f" {number(millions)} million tokens a day, {number(millions * 1e6 / 86_400)} a second day"
        f" and night. {_model(name)} on an {card} is forecast to give {with_band(a_day, '1')}"
        f" million a day with {users} requests of {prompt:,} prompt and {output} output tokens"
        f" always in flight, so the card has to be {number(millions / a_day.value, 'share')} busy"
        " to be worth its rent. The prices are an example: give your own.",
        f"make plan MACHINE={sheet.short_name} RATE=10 LENGTHS={prompt}/{output}"
        f" PRICE_PER_HOUR={per_hour:.2f} API_PRICE={per_million:.2f}",
    )


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
    return Computed(
        "arithmetic",
        f"the keys and values of {context:,} tokens of {_model(name)} take {_gb(each * context)}."
        f" In 8 bits they take {_gb(eight * context)}; with a sliding window, or eviction, that"
        f" keeps {window:,} tokens, {_gb(each * window)}; with one cache for every two layers,"
        f" {_gb(each * context / 2)}. The factors multiply. 8 bits are a setting of the engine;"
        " a window and shared layers have to be trained into the model. What each costs in quality"
        " cannot be computed. Nothing is lost where what is evicted stays in the host's memory: an"
        f" {card} copies it back at {number(link / 1e9, 'GB/s')} (its datasheet) in"
        f" {number(copy_s, 's')}, and computes it again in {number(prefill_s, 's')} at"
        f" {number(EXPECTED.computing, 'share')} of its FLOP/s. Over a link of more than"
        f" {number(pays / 1e9, 'GB/s')} copying is faster at any length, over a slower one only"
        " from some length on.",
        "make plan MACHINE=h100 MODEL=llama-8b LENGTHS=32000/500",
    )


_ANSWERS: Mapping[str, Callable[[], Computed]] = {
    "KV-8": _smaller_cache,
    "SD-4": _documents,
    "SD-5": _large_model,
    "SD-6": _rent_or_buy,
}
assert _ANSWERS.keys() <= QUESTIONS.keys()
