"""The worksheet of a lesson: questions with a typed number, and their key.

A question stands on a lab's page, under *Worksheet*, behind the name of what it asks for: a claim
(`ttft-share-90`: its predicted ratio), or a quantity of one of its sides (`step_s(one.baseline)`).
A quantity is one of `QUANTITIES` or a function that the lab forecasts with, so that no key is typed
and none can drift from what is predicted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from labs.harness.analysis.metrics import METRICS
from labs.harness.analysis.text import number, point_label
from labs.harness.analysis.verdicts import AGREEMENT
from labs.harness.reports.dials import Hardware, has_shapes, pair_of
from labs.harness.reports.document import Inline, parse
from labs.harness.spec import theory
from labs.harness.spec.lab import Claim, Lab, LabError, Point
from labs.harness.spec.page import WORKSHEET, PageError, page_of

SIDES = ("treatment", "baseline")
EXACT = 1.05  # within which a figure has to lie that needs no model of time
UNITS: Mapping[
    str, Sequence[tuple[float, str]]
] = {  # how a figure is shown and typed, largest first
    "s": ((1, "s"), (1e-3, "ms"), (1e-6, "µs")),
    "B": ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "B")),
    "B/s": ((1e9, "GB/s"), (1e6, "MB/s")),
    "share": ((0.01, "%"),),
    "tok": ((1, "tok"),),
    "tok/s": ((1, "tok/s"),),
    "x": ((1, "x"),),
}
_ASKED = re.compile(r"(?P<name>[\w-]+)(?:\((?P<claim>[\w-]+)\.(?P<side>treatment|baseline)\))?")


class Figure(NamedTuple):
    """A quantity that a worksheet may ask for."""

    of: Callable[[Point], float]
    unit: str
    formula: str


QUANTITIES: Mapping[str, Figure] = {
    "kv_bytes_per_token": Figure(
        lambda p: p.shape.kv_bytes_per_token(),
        "B", "2 (key and value) x layers x KV heads x head size x bytes of a value",
    ),
    "kv_bytes_of_prompt": Figure(
        lambda p: p.prompt_tokens * p.shape.kv_bytes_per_token(),
        "B", "prompt x 2 x layers x KV heads x head size x bytes of a value",
    ),
    "scores_bytes": Figure(
        lambda p: theory.scores_bytes(p.shape, p.prompt_tokens),
        "B", "heads x prompt² x 4 bytes",
    ),
    "weights_read_s": Figure(theory.weights_read_of, "s", "weight bytes / bandwidth"),
    "kv_read_s": Figure(
        theory.kv_read_of, "s", "in flight x context x KV bytes of a token / bandwidth"
    ),
    "step_s": Figure(
        theory.step_of, "s",
        "max((weight bytes + KV bytes) / bandwidth, FLOP / rate), with a context of a prompt and"
        " half of its answer",
    ),
    "stream_tokens_per_s": Figure(
        lambda p: 1 / theory.step_of(p), "tok/s", "1 / the time of a step"
    ),
    "prefill_s": Figure(
        theory.prefill_of, "s", "(2 x parameters x prompt + attention) / rate"
    ),
    "ridge_batch": Figure(
        lambda p: theory.ridge_batch(p.shape, p.ceilings), "1",
        "time of reading the weights x rate / (2 x parameters)",
    ),
    "even_context_tokens": Figure(
        lambda p: theory.even_context_tokens(p.shape, p.load.users), "tok",
        "weight bytes / (in flight x KV bytes of a token)",
    ),
    "experts_read": Figure(
        lambda p: theory.experts_needed(p.shape.experts, p.shape.experts_per_token, p.load.users),
        "1", "E (1 - (1 - k/E)^B)",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Task:
    """A question of a worksheet on one machine, its key, and what explains a gap to it."""

    question: Inline
    why: Inline  # what the page says behind the question
    given: Mapping[str, Sequence[str]]  # what is sent and set: name -> a value for each point
    assumptions: Sequence[str]
    formula: str
    key: float  # in `unit`
    unit: str
    within: float  # the factor by which an answer may be off
    points: Sequence[str]
    parts: Mapping[str, Sequence[float]]  # name -> seconds of each point

    @property
    def answer(self) -> str:
        return f"{number(self.key)} {self.unit}".strip()

    @property
    def shown_parts(self) -> Mapping[str, Sequence[str]]:
        return {name: [number(s, "s") for s in of] for name, of in self.parts.items()}

    @property
    def marking(self) -> str:
        """What a script needs to mark an answer, as JSON; parts in the unit of the answer."""
        scale = {unit: scale for scale, unit in UNITS["s"]}.get(self.unit)
        parts = {name: of[0] / scale for name, of in self.parts.items()} if scale else {}
        return json.dumps({"key": self.key, "within": self.within, "parts": parts})


@dataclass(frozen=True)
class Worksheet:
    """The questions of a lesson on one machine, and the figures that all of them need."""

    machine: str
    given: Mapping[str, str]
    tasks: Sequence[Task]


def worksheets(lab: Lab, machines: Sequence[Hardware]) -> list[Worksheet]:
    """The worksheet of a lab on each of these machines; none of one where nothing can be asked.

    Raises PageError where a page asks for what nothing computes.
    """
    page = page_of(lab.name)
    asked = page[WORKSHEET].named if page else {}
    sheets = (
        Worksheet(on.name, _given_machine(on), list(_tasks(lab, asked, on))) for on in machines
    )
    return [sheet for sheet in sheets if sheet.tasks]


def _tasks(lab: Lab, asked: Mapping[str, str], on: Hardware) -> Iterator[Task]:
    resolved = lab.at(on.scale, quick=False)
    claims = {claim.name: claim for claim in resolved.claims}
    for what, text in asked.items():
        named = _ASKED.fullmatch(what)
        claim = claims.get((named["claim"] or named["name"]) if named else "")
        if named is None or claim is None:
            raise PageError(f"{lab.name}: the worksheet asks for {what!r}, which names no claim")
        points = pair_of(lab, claim, on)
        if points and named["side"]:
            points = (points[SIDES.index(named["side"])],)
        if not points or not has_shapes(points, on):
            continue  # what is derived of a model was made elsewhere
        question, mark, why = text.partition("?")
        try:
            figure = _figure(lab, named["name"], claim, points)
        except PageError:
            raise
        except (LabError, KeyError):
            continue  # the formula needs what the maker of a derived model recorded
        yield _task(resolved, parse(question + mark), parse(why.strip()), points, *figure)


def _figure(
    lab: Lab, name: str, claim: Claim, points: Sequence[Point]
) -> tuple[float, str, str, Sequence[str]]:
    """A value, its unit, its formula, and what that assumes. Raises PageError."""
    if len(points) == 2:
        of = claim.predict(*points)
        return of.value, "x", of.formula, of.assumptions
    if name in QUANTITIES:
        quantity = QUANTITIES[name]
        return quantity.of(points[0]), quantity.unit, quantity.formula, ()
    for forecast in lab.forecasts:
        if forecast.predict.__name__ == name:
            of = forecast.predict(points[0])
            return of.value, METRICS[forecast.metric].unit, of.formula, of.assumptions
    raise PageError(f"{lab.name}: the worksheet asks for {name!r}, which nothing computes")


def _task(
    lab: Lab, question: Inline, why: Inline, points: Sequence[Point],
    value: float, unit: str, formula: str, assumptions: Sequence[str],
) -> Task:  # fmt: skip
    scales = UNITS.get(unit, ((1, ""),))
    scale, shown = next((of for of in scales if value >= of[0]), scales[-1])
    timed = unit in ("s", "tok/s", "x")
    return Task(
        question, why, _given(points, formula), assumptions, formula, value / scale, shown,
        AGREEMENT if timed else EXACT,
        [point_label(point.key, lab) for point in points],
        _parts(points) if timed and not points[0].load.open_loop else {},
    )  # fmt: skip


def _given_machine(on: Hardware) -> dict[str, str]:
    shape, rates = on.shape, on.ceilings
    given = {
        "Layers": f"{shape.layers}",
        "Heads, KV heads, head size": f"{shape.heads}, {shape.kv_heads}, {shape.head_dim}",
        "Parameters that a token is multiplied with": number(shape.matmul_params / 1e6, "million"),
        "Weights": number(shape.weight_bytes / 1e6, "MB"),
        "Bytes of a key's or a value's number": f"{shape.value_bytes}",
        "Memory bandwidth": number(rates.memory_bandwidth_bytes_per_s / 1e9, "GB/s"),
        "Rate of arithmetic": number(rates.flops_per_s / 1e12, "TFLOP/s"),
    }
    if shape.experts:
        given["Experts of a layer (E), and of a token (k)"] = (
            f"{shape.experts}, {shape.experts_per_token}"
        )
        given["Of the weights, all experts'"] = number(shape.expert_bytes / 1e6, "MB")
    return given


def _given(points: Sequence[Point], formula: str) -> dict[str, list[str]]:
    """What is sent and set at the points: one value where it is the same at both."""
    rows = [dict(_sent(point, formula)) for point in points]
    names = dict.fromkeys(name for row in rows for name in row)
    values = {name: [row.get(name, "–") for row in rows] for name in names}
    return {n: of[:1] if len(set(of)) == 1 else of for n, of in values.items()}


SET: Sequence[
    tuple[str, str, str, str]
] = (  # a flag, in words, its unit, and whose formulas need it
    ("block-size", "block (b)", "tok", r"\bblocks?\b|\bb\b"),
    ("max-num-batched-tokens", "token budget of a step", "tok", r"budget|pieces"),
    ("max-num-seqs", "most at once (S)", "", r"max-num-seqs|\bS\b"),
    ("num-gpu-blocks-override", "blocks in all", "", r"\bmemory\b|\(C -"),
    ("kv-cache-memory-bytes", "KV cache, bytes", "", r"\bmemory\b|\(C -"),
    ("max-lora-rank", "rank of the slots", "", r"adapters"),
    ("max-loras", "slots for adapters", "", r"slots|share running"),
)


def _sent(point: Point, formula: str) -> Iterator[tuple[str, str]]:
    flags, workload, load = point.flags, point.workload, point.load
    yield "prompt", number(point.prompt_tokens, "tok")
    yield "answer", number(point.output_tokens, "tok")
    if load.open_loop:
        yield "load", load.words
        if point.slo:
            yield "SLO of the first token", number(point.slo.ttft_s, "s")
        yield "requests that count", "sent after {:g} s and before {:g} s".format(*point.measured_s)
    elif workload.chat and point.turns > 1:
        yield "load", load.words
        yield "turns of a session", f"{point.turns}"
        yield "a turn is longer by", number(workload.chat.grows_tokens, "tok")
    else:
        yield "in flight (B)", f"{load.users}"
    if workload.choices > 1:
        yield "answers to a prompt", f"{workload.choices}"
    if workload.intruder:
        yield "long prompt", f"{workload.intruder.prompt_tokens:,} tok"
    if workload.prefix:
        yield "of the prompt shared", f"{workload.prefix.tokens:,} tok"
    if workload.adapters:
        made = point.about["adapters"]
        yield "adapters", f"{workload.adapters.count}"
        yield "parameters of an adapter", f"{made['params_per_adapter']:,} at rank {made['rank']}"
    if point.variant.weights:
        yield "weights", number(point.shape.weight_bytes / 1e6, "MB")
    if "speculative-config" in flags:
        yield "guesses ahead (g)", f"{flags.speculative_config['num_speculative_tokens']}"
    for flag, name, unit, needed in SET:
        counted = flag == "kv-cache-memory-bytes" and flags.num_gpu_blocks_override
        if flag in flags and re.search(needed, formula) and not counted:
            yield name, f"{flags.integer(flag):,} {unit}".strip()


def _parts(points: Sequence[Point]) -> dict[str, list[float]]:
    """What a step and a prefill are made of, in seconds: a value for each point."""
    parts = {
        "reading the weights once": theory.weights_read_of,
        "reading all keys and values": theory.kv_read_of,
        "the arithmetic of a decode step": theory.arithmetic_of,
        "the arithmetic of a whole prompt": theory.prefill_of,
        "the arithmetic of the long prompt": _long_prefill,
    }
    times = {name: [of(point) for point in points] for name, of in parts.items()}
    return {name: of for name, of in times.items() if any(of)}


def _long_prefill(point: Point) -> float:
    intruder = point.workload.intruder
    return theory.prefill_s(point.shape, point.ceilings, intruder.prompt_tokens) if intruder else 0
