"""Forecast prefill and decode on machines of their own, for one model on a card that is not here.

Every time is that of a step by the card's kernels (`serving/simulator/cards.py`), with the band
of a faster and a slower engine; what moves is arithmetic. Nothing here was measured.
Source: Zhong et al., DistServe, OSDI 2024; Patel et al., Splitwise, ISCA 2024.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

from labs.harness.analysis.quantity import RATIO, Quantity
from labs.harness.derived.offloading import EXAMPLE_CARD, EXAMPLE_MODEL
from labs.harness.spec import theory
from serving.hardware.gpus import DATASHEETS
from serving.models import catalog, dummy
from serving.models.catalog import Shape
from serving.simulator import cards
from serving.simulator.step import Piece, Step, StepTimes

USERS, PROMPT_TOKENS, OUTPUT_TOKENS = 32, 8192, 256  # of the example: requests in decode, lengths
PIECES = (512, 2048)  # token budgets of a step, which cut the prompt
LINKS_GBIT_PER_S = (10, 25, 100, 400)
MIXES = ((8192, 256), (2048, 256), (1024, 1024), (256, 1024))  # tokens of prompts and of outputs


@dataclass(frozen=True)
class Beside:
    """A prompt that is prefilled beside the decoding requests, in pieces of a size."""

    piece_tokens: int
    gap_s: Quantity  # the longest between two tokens of the others
    ttft_s: Quantity  # of the prompt
    beside: Quantity  # that / its TTFT in the small pieces


@dataclass(frozen=True)
class Over:
    """The same prompt, prefilled on a machine of its own, over a link of a rate."""

    gbit_per_s: int
    copy_s: Quantity
    ttft_s: Quantity
    beside: Quantity  # that / its TTFT in the small pieces


@dataclass(frozen=True)
class Mix:
    """What requests of some lengths keep busy, where each machine does one of the two alone."""

    prompt_tokens: int
    output_tokens: int
    prefill_s: Quantity
    step_s: Quantity  # of decode
    machines: Quantity  # that prefill, for each that decodes
    link: Quantity  # that sends a prompt's keys and values in the time of its prefill
    used: Quantity  # share of two machines' time, with one of each kind


@dataclass(frozen=True)
class Apart:
    """The example of the page on prefill and decode apart."""

    card: str
    model: str
    users: int
    prompt_tokens: int
    token_kb: Quantity  # of keys and values
    moved: Quantity  # of the prompt
    prefill_s: Quantity
    step_s: Quantity  # of decode alone: the gap that a split leaves
    needed: Quantity  # of the link, to send it in the time of the prefill
    pieces: Sequence[Beside]
    links: Sequence[Over]
    mixes: Sequence[Mix]


@cache
def apart() -> Apart:
    """Compute the example."""
    config, sheet = dummy.config_of(EXAMPLE_MODEL), DATASHEETS[EXAMPLE_CARD]
    shape = catalog.shape_of(config)
    engines = cards.steps(config, shape, sheet)

    def banded(figure: Callable[..., float], *given: float, unit: str = "s") -> Quantity:
        expected, *ends = (figure(of, *given) for of in engines)
        return Quantity(expected, unit, min(ends), max(ends))

    moved = PROMPT_TOKENS * shape.kv_bytes_per_token()
    pieces = [
        Beside(
            size, banded(_gap_s, size), banded(_cut_s, size), banded(_of_small, size, unit=RATIO)
        )
        for size in PIECES
    ]
    links = []
    for rate in LINKS_GBIT_PER_S:
        copy_s = theory.kv_copy_s(shape, PROMPT_TOKENS, rate * 1e9 / 8)
        ttft_s, beside = banded(_apart_s, copy_s), banded(_beside_cut, copy_s, unit=RATIO)
        links.append(Over(rate, Quantity(copy_s, "s"), ttft_s, beside))
    return Apart(
        card=EXAMPLE_CARD.removeprefix("NVIDIA ").split()[0],
        model=dummy.SHAPES[EXAMPLE_MODEL].partition(":")[0],
        users=USERS,
        prompt_tokens=PROMPT_TOKENS,
        token_kb=Quantity(shape.kv_bytes_per_token() / 1e3, "kB"),
        moved=Quantity(moved / 1e9, "GB"),
        prefill_s=banded(prefill_s, PROMPT_TOKENS),
        step_s=banded(decode_s, PROMPT_TOKENS, OUTPUT_TOKENS),
        needed=banded(_filled_gbit_per_s, moved, unit="Gbit/s"),
        pieces=pieces,
        links=links,
        mixes=[_mix(engines[0], shape, *lengths) for lengths in MIXES],
    )


def prefill_s(of: StepTimes, tokens: int) -> float:
    """Return the seconds of a prompt that has a machine for itself."""
    return of.seconds(Step([Piece(tokens, 0)], 1))


def _decoding(prompt_tokens: int, output_tokens: int) -> list[Piece]:
    return [Piece(1, prompt_tokens + output_tokens // 2)] * USERS


def decode_s(of: StepTimes, prompt_tokens: int, output_tokens: int) -> float:
    """Return the seconds of a step in which the example's requests decode, and nothing else."""
    return of.seconds(Step(_decoding(prompt_tokens, output_tokens), USERS))


def _in_pieces(of: StepTimes, budget_tokens: int) -> list[float]:
    """Return the seconds of every step with a piece of the prompt beside the decoding requests."""
    size, decoding = budget_tokens - USERS, _decoding(PROMPT_TOKENS, OUTPUT_TOKENS)
    return [
        of.seconds(Step([*decoding, Piece(min(size, PROMPT_TOKENS - done), done)], USERS + 1))
        for done in range(0, PROMPT_TOKENS, size)
    ]


def _gap_s(of: StepTimes, budget_tokens: int) -> float:
    return max(_in_pieces(of, budget_tokens))


def _cut_s(of: StepTimes, budget_tokens: int) -> float:
    """Return the TTFT of the prompt in pieces."""
    return sum(_in_pieces(of, budget_tokens))


def _of_small(of: StepTimes, budget_tokens: int) -> float:
    return _cut_s(of, budget_tokens) / _cut_s(of, PIECES[0])


def _filled_gbit_per_s(of: StepTimes, moved_bytes: float) -> float:
    """Return the rate of a link that sends the prompt's in the time of its prefill."""
    return 8 * moved_bytes / prefill_s(of, PROMPT_TOKENS) / 1e9


def _beside_cut(of: StepTimes, copy_s: float) -> float:
    return _apart_s(of, copy_s) / _cut_s(of, PIECES[0])


def _apart_s(of: StepTimes, copy_s: float) -> float:
    """Return the prompt's TTFT: its prefill, the link, and a step that computes its last token."""
    return prefill_s(of, PROMPT_TOKENS) + copy_s + decode_s(of, PROMPT_TOKENS, OUTPUT_TOKENS)


def _mix(of: StepTimes, shape: Shape, prompt_tokens: int, output_tokens: int) -> Mix:
    first_s, step_s = prefill_s(of, prompt_tokens), decode_s(of, prompt_tokens, output_tokens)
    machines = first_s / (output_tokens * step_s / USERS)
    gbit = 8 * prompt_tokens * shape.kv_bytes_per_token() / 1e9
    return Mix(
        prompt_tokens,
        output_tokens,
        Quantity(first_s, "s"),
        Quantity(step_s, "s"),
        Quantity(machines),
        Quantity(gbit / first_s, "Gbit/s"),
        Quantity((1 + machines) / (2 * max(1, machines)), "share"),
    )
