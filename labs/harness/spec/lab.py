"""The vocabulary a lab is written in.

A lab file is one `Lab` literal and the pure functions that predict. A **point** is what a trial
repeats: a variant (an engine configuration) under a workload (what is sent) with an arrival (when).
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from itertools import chain, compress
from operator import itemgetter
from statistics import fmean
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    Field,
    FiniteFloat,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo

from labs.harness.spec import theory
from labs.harness.spec.errors import LabError as LabError  # a part of the vocabulary
from labs.harness.spec.errors import NotApplicable as NotApplicable
from labs.harness.spec.errors import did_you_mean
from labs.harness.spec.names import PointName
from labs.harness.spec.overrides import in_words, known_names, parts_kept, set_field
from labs.harness.spec.page import CLAIMS, HEADLINE, Page, page_of, sizes_of
from loadtests.arrivals import Arrival, Concurrent, OfCapacity, OfSessions, Replay
from loadtests.plan import QueueLimits
from loadtests.records import LONGEST_S
from loadtests.trace import MOST_ROWS, TraceRow
from loadtests.workload import Fixed, Name, Workload
from serving.engines import DEFAULT_ENGINE, ENGINES
from serving.engines.flags import Flags, FlagValue
from serving.engines.vllm import KV_MEMORY
from serving.engines.vllm_flags import VllmFlags
from serving.hardware import gpus
from serving.hardware.machine import Ceilings
from serving.models import catalog
from serving.models.catalog import Shape
from serving.simulator.step import Masking

MOST_POINTS = 500  # load points of a lab
MOST_REQUESTS = 3_000_000  # prepared for all repeats of all load points
MOST_ATTENTION_TOKENS = 131_072  # at which attention is timed by itself
Seconds = Annotated[float, Field(gt=0, le=LONGEST_S, allow_inf_nan=False)]
MARGIN = 0.05
"""Two figures are equal where their ratio is 1 within this share, unless a claim says otherwise.

It is stated before measuring, and is the same for every run: a margin taken from the noise of the
run that is judged would call equal what was measured badly. It is 5% because that is about how far
two starts of one engine lie apart, so that a smaller difference is no property of a setting; and
because five repeats give intervals of about 3% to either side, so that equality within less could
hardly ever be shown.
"""


class Variant(BaseModel, frozen=True, extra="forbid"):
    """An engine configuration is the engine, flags by its own names, and the weights it serves.

    `weights` names a model that is derived from the lab's own (`plan/derived_models.py`).
    So does `<name>` within a flag's value, which is replaced by the derived model's folder.
    An engine that reads a format of its own (`Engine.reads`) gets the lab's weights in that one.
    `engine` is a name of `serving/engines/__init__.py`; the default one is left out of files and
    digests.
    """

    name: Name
    flags: dict[str, FlagValue] = {}
    weights: Annotated[str, Field(pattern=r"^([a-z][a-z0-9-]*)?$")] = ""
    engine: Annotated[str, Field(exclude_if=lambda name: name == DEFAULT_ENGINE)] = DEFAULT_ENGINE

    @field_validator("engine")
    @classmethod
    def _engine_is_known(cls, name: str) -> str:
        if name not in ENGINES:
            known = ", ".join(ENGINES)
            raise ValueError(f"no engine {name!r}{did_you_mean(name, ENGINES)} ones are {known}")
        return name

    @property
    def served(self) -> str:
        """The derived model that its engine loads; "" where that is the lab's own."""
        return self.weights or ENGINES[self.engine].reads

    def but(
        self, name: str, flags: Mapping[str, FlagValue] | None = None, weights: str = ""
    ) -> Variant:
        """Return this variant with other flags, or other weights, under a new name."""
        return Variant(
            name=name,
            flags={**self.flags, **(flags or {})},
            weights=weights or self.weights,
            engine=self.engine,
        )


class RequestLengths(tuple[tuple[int, int], ...]):
    """The (prompt, output) tokens of each request to be sent, and their means.

    All points that are sent the same requests hold the same one, so that thousands of lengths are
    added up once.
    """

    @cached_property
    def mean_prompt_tokens(self) -> float:
        total: int = sum(map(itemgetter(0), self))
        return total / len(self)

    @cached_property
    def mean_output_tokens(self) -> float:
        total: int = sum(map(itemgetter(1), self))
        return total / len(self)


@dataclass(frozen=True)
class Point:
    """A point holds everything that a prediction may use: what is known before an engine starts."""

    variant: Variant
    workload: Workload
    load: Arrival
    lengths: RequestLengths
    shape: Shape
    ceilings: Ceilings
    about: Mapping[str, Any] = field(default_factory=dict)  # derived model -> its maker's record
    measured_s: tuple[float, float] = (0.0, 0.0)  # what is sent from the one to the other counts
    slo: SLO | None = None
    admission_by_client: bool = False  # limits on the queue are the load generator's

    @property
    def flags(self) -> VllmFlags:
        """The variant's flags with typed access by vLLM's names.

        Another engine's flags have other names, so that of such a variant this gives vLLM's
        defaults, and raises KeyError where vLLM's flag has none.
        """
        return VllmFlags(self.variant.flags)

    @property
    def engine_flags(self) -> VllmFlags:
        """Those of the flags that the engine is started with."""
        return self.flags.without_queue_limits() if self.admission_by_client else self.flags

    @property
    def client_limits(self) -> QueueLimits | None:
        """The limits on the queue that the load generator holds; None where it holds none."""
        if not self.admission_by_client or not self.flags.turns_away:
            return None
        flags = self.flags
        return QueueLimits(
            requests=flags.max_num_queued_reqs, prompt_tokens=flags.max_num_queued_tokens
        )

    @property
    def name(self) -> PointName:
        """The point's name, with its parts."""
        return PointName(self.variant.name, self.workload.name, self.load.name)

    @property
    def key(self) -> str:
        """The point's name in summaries and in folders: `variant/workload/load`."""
        return str(self.name)

    @property
    def prompt_tokens(self) -> float:
        """The mean length of the prompts, in tokens."""
        return self.lengths.mean_prompt_tokens

    @property
    def output_tokens(self) -> float:
        """The mean length of the completions, in tokens."""
        return self.lengths.mean_output_tokens

    @property
    def context_tokens(self) -> float:
        """The mean context of a request while it decodes: its prompt and half of its output."""
        return self.prompt_tokens + self.output_tokens / 2

    @property
    def attended_tokens(self) -> float:
        """The tokens of that context to which a layer attends: within a sliding window, if any."""
        return min(self.context_tokens, self.flags.sliding_window or self.context_tokens)

    @property
    def primed_requests(self) -> int:
        """The first requests that are sent before a trial, so that their prefixes are cached."""
        prefix = self.workload.prefix if self.workload.primed else None
        return prefix.groups if prefix and self.flags.enable_prefix_caching else 0

    @property
    def turns(self) -> int:
        """The requests in a row that are one session's: the turns of a conversation, or 1."""
        chat = self.workload.chat
        return chat.turns if chat and isinstance(self.load, OfSessions) else 1

    @property
    def kv_room_tokens(self) -> float:
        """The tokens of one copy's KV cache by its number of blocks or its memory.

        The block that vLLM keeps for itself is among them, as in `kv_capacity_tokens`.
        """
        flags = self.flags
        if blocks := flags.num_gpu_blocks_override:
            return float(blocks * flags.block_size)
        memory_bytes = flags.kv_parts(self.shape.kv_heads) * flags.kv_cache_memory_bytes
        return theory.kv_tokens(self.shape, memory_bytes, flags.kv_value_bytes, flags.block_size)

    @property
    def sequences(self) -> int:
        """The answers that are written at once where all users wait for theirs."""
        return self.load.users * self.workload.choices

    def kv_bytes(self, bytes_per_value: float | None = None) -> float:
        """Bytes of the keys and values to which all requests in flight attend."""
        per_token = self.shape.kv_bytes_per_token(bytes_per_value)
        return self.sequences * self.attended_tokens * per_token


OF_FORECASTS = "serving/forecasting/"
"""The source of a prediction that is a ratio of two forecasts, as runs on file name it."""


class Prediction(BaseModel, frozen=True, extra="forbid"):
    """A prediction is a number written down before measuring, with what it rests on.

    A `point` says what is measured, a `ceiling` that nothing exceeds it, a `floor` that nothing
    falls below it. What became of it is decided in one place,
    `labs.harness.analysis.verdicts.prediction_outcome`.
    """

    value: FiniteFloat
    kind: Literal["point", "ceiling", "floor"] = "point"
    formula: str
    assumptions: tuple[str, ...] = ()
    source: str = ""


class Arm(BaseModel, frozen=True, extra="forbid"):
    """An arm selects points: each field that is given must match, one that is None matches any."""

    variant: str | None = None
    workload: str | None = None
    load: str | None = None  # text form, `concurrent:8`
    kind: str | None = None  # of load: `concurrent`

    def matches(self, point: Point) -> bool:
        """Whether the point has every property that the arm names."""
        properties = (point.variant.name, point.workload.name, str(point.load), point.load.kind)
        required = (self.variant, self.workload, self.load, self.kind)
        return all(r is None or r == p for r, p in zip(required, properties, strict=True))


PredictEffect = Callable[[Point, Point], Prediction]
PredictPoint = Callable[[Point], Prediction]


class Claim(BaseModel, frozen=True, extra="forbid"):
    """A claim states what the lab expects of the ratio treatment / baseline of one metric.

    It is judged at every pair of points that agree on what the arms leave open. The two points
    differ in one factor (`factors`); where they must differ in more, `coupled` says why. `margin`
    is the share of 1 within which the two sides are equal; the default one is left out of files and
    digests.
    """

    name: str
    title: str = ""  # the claim as a sentence; a lab's page has it
    metric: str
    treatment: Arm
    baseline: Arm
    expect: Literal["rises", "falls", "unchanged"]
    predict: PredictEffect
    coupled: str = ""
    margin: Annotated[PositiveFloat, Field(exclude_if=lambda margin: margin == MARGIN)] = MARGIN


class Forecast(BaseModel, frozen=True, extra="forbid"):
    """A forecast predicts a metric at every point of an arm, and is shown beside the measured."""

    name: str
    metric: str
    arm: Arm
    predict: PredictPoint


class Evidence(BaseModel, frozen=True, extra="forbid"):
    """Evidence is what the engine itself must show in a trial before the trial's figures count.

    `rises` and `stays` look at a counter over the trial; `echoes` at a label of an info metric,
    which must say `value`, or the variant's own value of the flag that `--flag` names, or of a
    field of it (`--flag.field`).
    `absent` says that the engine has no such counter.
    `pieces` counts the tokens that the running streams received while a long prompt was prefilled.
    They receive one with each piece of the prompt, so the count must be the number of pieces that
    the variant's token budget makes (the engine itself does not count pieces).
    """

    arm: Arm
    kind: Literal["rises", "stays", "echoes", "absent", "pieces"]
    metric: str
    label: str = ""
    value: str = ""

    def expected(self, point: Point) -> str:
        """Return what the label of an info metric must say at a point."""
        if not self.value.startswith("--"):
            return self.value
        flag, _, name = self.value.removeprefix("--").partition(".")
        value = point.flags.get(flag, "")
        return str(value.get(name, "") if name and isinstance(value, dict) else value)


class SLO(BaseModel, frozen=True, extra="forbid"):
    """Service-level objective: the longest times, in seconds, that a user should have to wait.

    Goodput counts the requests that meet those on TTFT and TPOT.
    """

    ttft_s: Seconds
    tpot_s: Seconds
    itl_s: Seconds | None = None  # the longest gap between tokens, where a lab judges it

    def by_name(self) -> dict[str, float]:
        """Map `ttft`, `tpot` and, where it is set, `itl` to their limits in seconds."""
        limits_s = {"ttft": self.ttft_s, "tpot": self.tpot_s, "itl": self.itl_s}
        return {name: limit_s for name, limit_s in limits_s.items() if limit_s is not None}


NO_CAPACITY = (
    "a load is a multiple of the capacity, which is found at the first load of the first workload:"
    " that must be a closed loop, such as concurrent:16"
)
READ_TEXT = ("studies", "probes", "findings", "plots")
"""The parts of a lab that may read what an engine wrote; random weights do not write text."""
NO_TEXT = "quality is not measured on random weights, nor is what else is read off the text"


NOTHING_ELSE: dict[str, Any] = {
    "forecasts": (), "studies": (), "attention_tokens": (), "probes": (), "probed": (),
    "findings": (), "plots": (), "limits": {}, "next_knobs": (),
}  # fmt: skip
"""What is about a lab's own question, and has no meaning once its engines are put to another."""
NOT_FILED = ("acceptance", "guessed", "masking", "arithmetic", "searched", "made_here")
"""The fields of a lab that are in no file; what they predicted and what was served are on file."""
QUICK: dict[str, Any] = {"repeats": 3, "most_repeats": 0, "starts": 1}
"""What a quick run of any lab makes do with, unless the lab says otherwise.

Fewer than three repeats give no interval that decides anything.
"""
NOT_SET = 1  # load processes of a lab that does not say how many
WITHOUT = "without"  # of sizes: the names of the variants and workloads that they do without
NOT_QUICK = "not in a quick run on this kind of machine"
QUICK_OF_KIND: dict[str, dict[str, Any]] = {
    "cpu": {"curve_repeats": 1, "most_repeats": 6, "most_s": 100.0}
}
"""What a quick run of any lab has on a kind of machine, whatever the lab says.

On a CPU it is about the claim of the lab's headline alone (`Lab.decides`), so that it ends with a
verdict within about three minutes. On a GPU most of a run's time goes into starting its engines.
"""
OF_KIND: dict[str, dict[str, Any]] = {"gpu": {"most_s": 1800.0, "slo.tpot_s": 0.05}}
"""Sizes of every lab on a kind of machine.

On a GPU an engine takes a minute or more to start, and a step a few milliseconds, or 30 on the
slowest card for its model.
"""


def gpu_flags(scale: str) -> dict[str, FlagValue]:
    """Return the flags of an engine on a GPU that the lab does not set itself.

    They are alike in all labs, so that what vLLM compiles for one lab serves the next; and with the
    size of its KV cache given, no engine has to profile its memory as it starts.
    """
    flags: dict[str, FlagValue] = {
        "max-model-len": 8192,
        "max-num-batched-tokens": 8192,
        "max-num-seqs": 256,
    }
    of_class = {f"gpu-{c.gb}": c.kv_bytes for c in gpus.CLASSES}
    return {**flags, **({"kv-cache-memory-bytes": of_class[scale]} if scale in of_class else {})}


class Lab(BaseModel, frozen=True, extra="forbid"):
    """A lab is a question, how it is put to an engine, and what is expected.

    `scales` holds sizes only. For each kind of machine (`cpu`, `gpu`) it gives other values of some
    fields, by dotted path (`workloads.exponential.output_tokens.mean_tokens`); values for a class
    of GPU memory (`gpu-24`) override those of the kind, and `quick` overrides both. A quick run on
    one kind of machine (`gpu-quick`), or on one class of it (`gpu-80-quick`), may differ from one
    elsewhere. Under `without` each lists the variants and workloads that it does without; of these
    a report says only those that a quick run leaves out.
    """

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]+$")]
    title: str = ""  # this and all other words are on the lab's page, `labs/<lab>/page.md`
    question: str = ""
    answers: tuple[str, ...]  # ids of questions in the catalogue
    variants: Annotated[tuple[Variant, ...], Field(min_length=1, max_length=MOST_POINTS)]
    # of every variant of the default engine; a variant's own flags override them
    flags: dict[str, FlagValue] = {}
    # of serving/models/dummy.py: what it serves, with random weights, in the place of the
    # machine's model
    shape: Annotated[str, Field(exclude_if=lambda shape: not shape)] = ""
    workloads: Annotated[tuple[Workload, ...], Field(min_length=1, max_length=MOST_POINTS)]
    claims: Annotated[tuple[Claim, ...], Field(max_length=100)]
    forecasts: Annotated[tuple[Forecast, ...], Field(max_length=100)] = ()
    evidence: tuple[Evidence, ...] = ()
    studies: tuple[
        Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]*$")], ...
    ] = ()  # measured once on the model itself, without an engine
    # lengths at which attention is timed by itself in each run, before its engines start
    attention_tokens: Annotated[
        tuple[Annotated[int, Field(gt=0, le=MOST_ATTENTION_TOKENS)], ...],
        Field(max_length=100, exclude_if=lambda lengths: not lengths),
    ] = ()
    # it compares how models are made: what others publish in their place is not downloaded
    made_here: Annotated[bool, Field(exclude=True)] = False
    probes: tuple[str, ...] = ()  # asked of the engines after their trials
    probed: tuple[str, ...] = ()  # the variants whose engines are probed; all where none is named
    findings: tuple[str, ...] = ()  # conclusions beyond the claims
    plots: tuple[str, ...] = ()
    slo: SLO
    # prepared for each trial, which ends early if they run out
    requests: Annotated[int, Field(gt=0, le=MOST_REQUESTS)]
    warmup_s: Annotated[float, Field(ge=0, le=LONGEST_S, allow_inf_nan=False)]
    # a closed loop and waves hold it open until five requests count: `loadtests/plan.py`
    window_s: Seconds
    repeats: Annotated[int, Field(gt=0, le=1000)] = 5
    # the claims whose points are repeated until they are decided; all where none is named
    decides: Annotated[tuple[str, ...], Field(exclude_if=lambda names: not names)] = ()
    # of the points that none of these compares, where those shall have fewer; 0: `repeats`
    curve_repeats: Annotated[int, Field(ge=0, le=1000, exclude_if=lambda number: not number)] = 0
    # of the points whose claims are undecided after `repeats`; no more than `repeats`: never
    most_repeats: Annotated[int, Field(ge=0, le=1000)] = 10
    # after so long with its engines a run begins no repeats beyond `repeats`
    most_s: Annotated[NonNegativeFloat, Field(allow_inf_nan=False)] = 420.0
    # of each engine, its repeats shared out, where engines take turns
    starts: Annotated[int, Field(gt=0, le=1000)] = 2
    timeout_s: Seconds = 60.0  # longest silence within one response
    # processes that share the sending of requests; where a lab leaves this at 1, and no reader
    # sets it, its runs choose the number: `labs/harness/plan/load_processes.py`
    load_processes: Annotated[int, Field(gt=0, le=256)] = NOT_SET
    # the run did, for its machine's cores: then no digest has it
    load_processes_chosen: Annotated[bool, Field(exclude_if=lambda chosen: not chosen)] = False
    # the load generator holds the limits on the engines' queues, which their version has not; an
    # engine's own are left out of files and digests
    admission_by_client: Annotated[bool, Field(exclude_if=lambda by_client: not by_client)] = False
    seed: NonNegativeInt = 0
    scales: dict[str, dict[str, Any]] = {}
    quick: dict[str, Any] = {}
    aa: bool = False  # the baseline against itself: `against_itself`
    # of its studies, probes, findings and plots, those that have no meaning with random weights
    needs_text: Annotated[tuple[str, ...], Field(exclude=True)] = ()
    # adapts the lab to random weights, after what needs text was left out
    dummy: Annotated[Callable[[Lab], Lab] | None, Field(exclude=True)] = None
    # how often a draft token is expected to be accepted at a point whose engine guesses ahead
    acceptance: Annotated[Callable[[Point], float] | None, Field(exclude=True)] = None
    # in how many of its steps it is expected to guess at all; None: in all of them
    guessed: Annotated[Callable[[Point], float] | None, Field(exclude=True)] = None
    # how long the engine is expected to take over the structure of an answer; None: no structure
    masking: Annotated[Callable[[Point], Masking | None] | None, Field(exclude=True)] = None
    # what its findings are held against, by what it is of, `memory at 4096`; None: nothing
    arithmetic: Annotated[
        Callable[[Lab, Point], dict[str, Prediction]] | None, Field(exclude=True)
    ] = None
    # the points of which only a forecast is made, from those that are measured: they differ from
    # these in settings of the scheduler, so that a step is the same
    searched: Annotated[
        Callable[[Sequence[Point]], Sequence[Point]] | None, Field(exclude=True)
    ] = None
    left_out: tuple[str, ...] = ()  # with random weights or without an engine, with its reason
    # the variants whose engines cannot serve the model here; none is left out of files
    absent: Annotated[tuple[str, ...], Field(exclude_if=lambda absent: not absent)] = ()
    limits: dict[str, str] = {}  # kind of machine -> what such a machine can and cannot show
    next_knobs: tuple[str, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _with_its_folder(cls, given: Any) -> Any:
        """Fill in the words and sizes that stand in the lab's folder; a lab on file has its own."""
        if not isinstance(given, dict) or given.get("title"):
            return given
        name = str(given.get("name"))
        if (page := page_of(name)) is None:
            raise ValueError("it has no title, and no page.md in a folder of its own")
        scales = _scales_of(name, page, given.get("scales", {}))
        quick, claims = scales.pop("quick", {}), _titled(page, given["claims"])
        return {"quick": quick, **page.fields, **given, "scales": scales, "claims": claims}

    @model_validator(mode="after")
    def _enough_requests(self) -> Self:
        for workload in self.workloads:
            users = [load.users for load in workload.loads if not load.open_loop]
            most_users, prepared = max(users, default=1), self.requests_of(workload)
            if prepared < most_users:
                of_workload = f"workloads.{workload.name}.most_requests"
                name = "requests" if prepared == self.requests else of_workload
                raise ValueError(
                    f"{name}={prepared} do not fill a load of {most_users} at once: give"
                    f" SET={name}={most_users} or more, or fewer users"
                )
        return self

    @model_validator(mode="after")
    def _require_capacity(self) -> Self:
        if self._lacks_capacity:
            raise ValueError(NO_CAPACITY)
        return self

    @property
    def _lacks_capacity(self) -> bool:
        return self.finds_capacity and not isinstance(self.workloads[0].loads[0], Concurrent)

    @model_validator(mode="after")
    def _sizes_can_be_prepared(self) -> Self:
        points = len(self.variants) * sum(len(w.loads) for w in self.workloads)
        if points > MOST_POINTS:
            raise ValueError(
                f"{points} load points, and {MOST_POINTS} are the most: leave out variants,"
                " workloads or loads"
            )
        if (requests := self.requests * self.rounds * points) > MOST_REQUESTS:
            raise ValueError(
                f"requests={self.requests} in each of {self.rounds} repeats of {points} load points"
                f" are {requests} to prepare, and {MOST_REQUESTS} are the most: lower requests or"
                " most_repeats"
            )
        return self

    @model_validator(mode="after")
    def _names_exist(self) -> Self:
        variants = {v.name for v in self.variants}
        references = {a.variant for c in self.claims for a in (c.treatment, c.baseline)}
        references |= {e.arm.variant for e in self.evidence}
        references |= {name for w in self.workloads for name in w.only} | set(self.probed)
        if unknown := references - variants - {None}:
            raise ValueError(f"{sorted(map(str, unknown))} are no variants of {self.name}")
        return self

    def at(
        self,
        scale: str,
        quick: bool,
        changes: Mapping[str, Any] | None = None,
        dummy: bool = False,
    ) -> Lab:
        """Resolve the lab for a scale such as `cpu`, `gpu` or `gpu-24`.

        Applied in this order: the sizes of every lab on this kind of machine, the lab's own of the
        scale, those of a quick run (the lab's, then those of the kind, then those of the class),
        the flags of every engine on a GPU where the lab has none, or those of float32 on a CPU
        that serves in it, what random weights (`dummy`) leave out, what a quick run does without
        (on a CPU all that its headline's claim does not compare, and loads that no claim does,
        unless the reader lists parts), and the reader's changes. A change of `variants` or
        `workloads` lists the names of those that are kept; what a change names, a quick run has.
        Raises LabError for a change that does not fit; the message names the field and the known
        ones.
        """
        kind = scale.partition("-")[0]
        names = list(dict.fromkeys((kind, scale)))
        own = [self.scales.get(name, {}) for name in names]
        short = QUICK | self.quick | QUICK_OF_KIND.get(kind, {})
        brief = [short, *(self.scales.get(f"{n}-quick", {}) for n in names)] if quick else []
        never, gone = ({n for layer in of for n in layer.get(WITHOUT, ())} for of in (own, brief))
        sizes = [{k: v for k, v in layer.items() if k != WITHOUT} for layer in (*own, *brief)]
        lab = self._changed(OF_KIND.get(kind, {}), *sizes)._but(never)
        if scale == catalog.CPU_FP32:
            lab = lab._in_float32()
        if kind == "gpu":
            lab = lab.model_copy(update={"flags": {**gpu_flags(scale), **lab.flags}})
        if dummy:
            lab = lab._without(self.needs_text)
            lab = self.dummy(lab) if self.dummy else lab
        whole = self.aa or parts_kept(changes or {})[1]  # an A/A lab was made brief before
        brief_on_cpu = quick and kind == "cpu" and not whole
        if brief_on_cpu and (headline := lab._headline()):
            lab = lab.model_copy(update={"decides": (headline.name,)})
            gone |= lab._beside(headline)
        lab = lab._but(gone - lab._named_by(changes or {}), NOT_QUICK)
        if lab.decides:
            lab = lab._at_compared_loads()
        changes, kept = parts_kept(changes or {})
        if changes or dummy or gone:  # else nothing has been left out since it was checked
            lab = lab._changed(changes)
        if dummy and (parts := lab._named(self.needs_text)):
            raise LabError(f"{', '.join(parts)}: {NO_TEXT}")
        return lab._keeping(**kept)

    def _in_float32(self) -> Lab:
        """Serve in float32, with twice the memory for keys and values: as many tokens fit.

        A lab that was resolved so before is left as it is.
        """
        if ENGINES[DEFAULT_ENGINE].in_float32.items() <= self.flags.items():
            return self

        def widened(flags: Flags) -> Flags:
            memory = {KV_MEMORY: 2 * int(str(flags[KV_MEMORY]))} if KV_MEMORY in flags else {}
            return {**flags, **memory}

        variants = tuple(
            v if v.engine == DEFAULT_ENGINE and KV_MEMORY not in v.flags
            else v.model_copy(
                update={"flags": {**widened(v.flags), **ENGINES[v.engine].in_float32}}
            )
            for v in self.variants
        )  # fmt: skip
        flags = {**widened(self.flags), **ENGINES[DEFAULT_ENGINE].in_float32}
        return self.model_copy(update={"flags": flags, "variants": variants})

    def _headline(self) -> Claim | None:
        """Return the claim of the headline on the lab's page, or else its first, if it has any."""
        page = page_of(self.name)
        name = page[HEADLINE].named.get("claim") if page else None
        named = [claim for claim in self.claims if claim.name == name]
        return next(iter([*named, *self.claims]), None)

    def _beside(self, claim: Claim) -> set[str]:
        """Name the variants and workloads that a claim does not compare.

        What the capacity is found with is none of them.
        """
        arms = (claim.treatment, claim.baseline)
        variants, workloads = {a.variant for a in arms}, {a.workload for a in arms}
        if self.finds_capacity:
            variants.add(self.variants[0].name)
            workloads.add(self.workloads[0].name)
        compared = {v.name for v in self.variants if variants & {v.name, None}}
        compared |= {w.name for w in self.workloads if workloads & {w.name, None}}
        return {*self._part_names()} - compared

    def _at_compared_loads(self) -> Lab:
        """Keep of each workload the loads that a claim compares, all where none does."""
        arms = [arm for claim in self.claims for arm in (claim.treatment, claim.baseline)]

        def compared(workload: Workload, load: Arrival) -> bool:
            finds = self.finds_capacity and load == self.workloads[0].loads[0]
            return finds or any(
                arm.workload in (workload.name, None)
                and arm.load in (str(load), None)
                and arm.kind in (load.kind, None)
                for arm in arms
            )

        workloads = tuple(
            w.model_copy(update={"loads": loads})
            for w in self.workloads
            for loads in [tuple(of for of in w.loads if compared(w, of)) or w.loads]
        )
        return self.model_copy(update={"workloads": workloads})

    def _named_by(self, changes: Mapping[str, Any]) -> set[str]:
        """Name the variants and workloads that changes speak of, and those that they need."""
        _, kept = parts_kept(changes)
        paths = [path.split(".") for path in changes]
        named = {name for names in kept.values() for name in names}
        named |= {path[1] for path in paths if path[0] in ("variants", "workloads") and path[1:]}
        claims = {path[1] for path in paths if path[0] == "claims" and path[1:]}
        arms = [a for c in self.claims if c.name in claims for a in (c.treatment, c.baseline)]
        named |= {name for a in arms for name in (a.variant, a.workload) if name}
        return named.union(*(w.only for w in self.workloads if w.name in named))

    def _but(self, gone: set[str], why: str = "") -> Lab:
        """Keep all variants and workloads but these, by name; unknown names are passed over.

        The lab says what is left out, and why, where a reason is given.
        """
        if not gone.intersection(self._part_names()):
            return self
        lab = self._keeping(
            [v.name for v in self.variants if v.name not in gone],
            [w.name for w in self.workloads if w.name not in gone],
        )
        if not why:
            return lab
        there = lab._part_names()
        missing = ", ".join(name for name in self._part_names() if name not in there)
        return lab.model_copy(update={"left_out": (*lab.left_out, f"{missing}: {why}")})

    def _part_names(self) -> dict[str, None]:
        """Name the variants and the workloads, each name once, in order."""
        names = [*(v.name for v in self.variants), *(w.name for w in self.workloads)]
        return dict.fromkeys(names)

    def _keeping(
        self, variants: Collection[str] | None = None, workloads: Collection[str] | None = None
    ) -> Lab:
        """Keep these variants and workloads, and of the rest what speaks of no other.

        Raises LabError for an unknown name, and where no load point is left.
        """
        if variants is None and workloads is None:
            return self
        names = known_names("variants", variants, [v.name for v in self.variants])
        sent = known_names("workloads", workloads, [w.name for w in self.workloads])
        remaining = [
            w.model_copy(update={"only": tuple(name for name in w.only if name in names)})
            for w in self.workloads
            if w.name in sent and (not w.only or names.intersection(w.only))
        ]
        if not remaining:
            raise LabError("variants, workloads: none of these variants gets any of the workloads")
        there = {w.name for w in remaining}

        def is_kept(*arms: Arm) -> bool:
            return all(
                (a.variant is None or a.variant in names)
                and (a.workload is None or a.workload in there)
                for a in arms
            )

        probed = tuple(name for name in self.probed if name in names)
        kept = self.model_copy(
            update={
                "variants": tuple(v for v in self.variants if v.name in names),
                "workloads": tuple(remaining),
                "claims": tuple(c for c in self.claims if is_kept(c.treatment, c.baseline)),
                "forecasts": tuple(f for f in self.forecasts if is_kept(f.arm)),
                "evidence": tuple(e for e in self.evidence if is_kept(e.arm)),
                "probed": probed,
                "probes": self.probes if probed or not self.probed else (),
            }
        )
        if kept._lacks_capacity:
            raise LabError(f"workloads: {NO_CAPACITY}")
        return kept

    def without(self, reasons: Mapping[str, str]) -> Lab:
        """Leave out variants, by name, for the reason given, and the claims that need them."""
        known = [v.name for v in self.variants]
        gone = {name: why for name, why in reasons.items() if name in known}
        if not gone:
            return self
        kept = self._keeping(variants=[name for name in known if name not in gone])
        left_out = tuple(f"{name}: {why}" for name, why in gone.items())
        return kept.model_copy(
            update={"absent": (*self.absent, *gone), "left_out": (*self.left_out, *left_out)}
        )

    def _named(self, names: Collection[str]) -> list[str]:
        return [name for part in READ_TEXT for name in getattr(self, part) if name in names]

    def _without(self, names: Collection[str]) -> Lab:
        if not (removed := self._named(names)):
            return self
        remaining = {
            part: tuple(n for n in getattr(self, part) if n not in names) for part in READ_TEXT
        }
        titles = dict.fromkeys(name.removesuffix("-quick") for name in removed)
        reason = f"{', '.join(titles)}: {NO_TEXT}"
        return self.model_copy(update={**remaining, "left_out": (reason,)})

    def _changed(self, *layers: Mapping[str, Any]) -> Lab:
        fields = self.model_dump(exclude={"scales", "quick"})
        _write_out_defaults(fields)
        for layer in layers:
            for path, value in layer.items():
                set_field(fields, path, copy.deepcopy(value))  # a later path may lead into it
                if isinstance(value, dict | list | tuple):  # in which there may be whole parts
                    _write_out_defaults(fields)
        beside = {n: getattr(self, n) for n in NOT_FILED}
        try:
            return Lab.model_validate(fields | beside)
        except ValidationError as error:
            raise LabError(in_words(error, fields)) from error

    def against_itself(self) -> Lab:
        """Make an A/A lab: the first claim's baseline against a twin of it.

        The two run at every load where a claim uses that baseline, after the load that finds the
        capacity, where there is one. Any difference between them is noise, so every claim expects
        no change. Raises LabError where no claim has a baseline that
        could be repeated.
        """
        name = self.claims[0].baseline.variant or self.variants[0].name if self.claims else ""
        arms = {
            (c.metric, c.baseline.model_copy(update={"variant": name})): c
            for c in self.claims
            if c.baseline.variant in (name, None)
        }
        if not arms:
            raise LabError(f"{self.name} has no claim whose baseline could run against itself")
        base = next(v for v in self.variants if v.name == name)
        twin = base.but(f"{name}-again")
        names = (base.name, twin.name)
        workloads = []
        for workload in self.workloads:
            of_workload = [a for _, a in arms if a.workload in (workload.name, None)]
            loads = tuple(
                load
                for load in workload.loads
                if any(
                    arm.load in (str(load), None) and arm.kind in (load.kind, None)
                    for arm in of_workload
                )
            )
            if loads and (not workload.only or name in workload.only):
                only = names if workload.only else ()
                workloads.append(workload.model_copy(update={"loads": loads, "only": only}))
        if self.finds_capacity:
            first = self.workloads[0]
            update = {"loads": first.loads[:1], "only": (name,), "name": f"{first.name}-first"}
            workloads.insert(0, first.model_copy(update=update))
        return self.model_copy(update={
            "aa": True,
            "variants": (base, twin),
            "workloads": tuple(workloads),
            "claims": tuple(
                Claim(
                    name=f"aa-{claim.name}",
                    title=f"`{name}` and its identical twin measure the same",
                    metric=metric,
                    treatment=arm.model_copy(update={"variant": twin.name}),
                    baseline=arm,
                    expect="unchanged",
                    predict=the_same,
                    margin=claim.margin,
                )
                for (metric, arm), claim in arms.items()
            ),
            "evidence": tuple(
                e.model_copy(update={"arm": e.arm.model_copy(update={"variant": v})})
                for e in self.evidence
                if e.arm.variant in (name, None)
                for v in names
            ),
            **NOTHING_ELSE,
        })  # fmt: skip

    def replaying(self, trace: tuple[TraceRow, ...]) -> Lab:
        """Return the lab's engines under the whole of a trace, in place of its own workloads.

        What the lab claims and looks for is about its own loads, so none of it is left. Raises
        LabError for a trace without a duration.
        """
        duration_s = duration_s_of(trace)
        warmup_s = min(self.warmup_s, duration_s / 10)
        _, *lengths = zip(*trace, strict=True)
        prompt_tokens, output_tokens = (round(fmean(column)) for column in lengths)
        workload = Workload(
            name="trace",
            prompt_tokens=Fixed(tokens=prompt_tokens),
            output_tokens=Fixed(tokens=output_tokens),
            trace=trace[:MOST_ROWS],
            loads=(Replay(speed=1.0),),
        ).model_copy(update={"trace": trace})  # the bound is a run's, and this is never run
        return self.model_copy(update={
            "workloads": (workload,),
            "requests": len(trace), "repeats": 1, "curve_repeats": 0, "most_repeats": 0,
            "warmup_s": warmup_s, "window_s": duration_s,  # it ends with the trace
            "claims": (), "evidence": (), **NOTHING_ELSE,
        })  # fmt: skip

    @property
    def value_bytes(self) -> int:
        """The bytes of a weight that has 16 bits in its file, as the default engine holds it."""
        return VllmFlags(self.flags).value_bytes

    def flags_of(self, variant: Variant) -> VllmFlags:
        """Return all flags of a variant, those that the load generator may hold among them.

        The lab's own are for the default engine, and another has them by other names.
        """
        shared = self.flags if variant.engine == DEFAULT_ENGINE else {}
        return VllmFlags({**shared, **variant.flags})

    def engine_flags_of(self, variant: Variant) -> VllmFlags:
        """Return those of its flags that the variant's engine is started with."""
        flags = self.flags_of(variant)
        return flags.without_queue_limits() if self.admission_by_client else flags

    @property
    def all_flags(self) -> list[VllmFlags]:
        """The flags of each variant, in order."""
        return [self.flags_of(variant) for variant in self.variants]

    def resolved(self) -> dict[str, Any]:
        """Return the lab as plain JSON, in which a function is its dotted name.

        One of a lab's own file is named by the lab's folder.
        """

        def name_of(function: Callable[..., Any]) -> str:
            return f"{function.__module__.removesuffix('.lab')}.{function.__qualname__}"

        plain: dict[str, Any] = json.loads(json.dumps(self.model_dump(), default=name_of))
        return plain

    def digest(self) -> str:
        """Hash the resolved lab; see `digest_of`."""
        return digest_of(self.resolved())

    def requests_of(self, workload: Workload) -> int:
        """Return how many requests are prepared for each trial of a workload."""
        return min(self.requests, workload.most_requests or self.requests)

    def warmup_of(self, workload: Workload) -> float:
        """Return the seconds of a workload's trials that come before their window."""
        return workload.warmup_s or self.warmup_s

    def repeats_of(self, point: Point) -> int:
        """Return how often a point is played before the lab first looks at its claims.

        Where no claim is left, as of one variant alone, all points have `repeats`.
        """
        arms = [arm for claim in self.deciding for arm in (claim.treatment, claim.baseline)]
        if not self.curve_repeats or not arms or any(arm.matches(point) for arm in arms):
            return self.repeats
        return min(self.curve_repeats, self.repeats)

    @property
    def deciding(self) -> list[Claim]:
        """The claims whose points are repeated until these are decided."""
        named = [claim for claim in self.claims if claim.name in self.decides]
        return named or [*self.claims]

    @property
    def sets_load_processes(self) -> bool:
        """Whether the lab says how many processes send."""
        return self.load_processes != NOT_SET

    @property
    def rounds(self) -> int:
        """The largest number of repeats that a point may have."""
        return max(self.repeats, self.most_repeats)

    @property
    def looks(self) -> int:
        """How often the lab looks at its claims: again after more repeats, where they may come."""
        return 2 if self.rounds > self.repeats else 1

    @property
    def finds_capacity(self) -> bool:
        """Whether a load is a multiple of the capacity of the lab's first point.

        That is the first variant at the first load of the first workload, a closed loop: the
        capacity is the requests/s that it completes there, in the first repeat. It is forecast in
        the same way for the forecasts of those loads.
        """
        return any(isinstance(a, OfCapacity) for w in self.workloads for a in w.loads)

    def draw_seed(self, repeat: int) -> int:
        """Return the seed of a repeat's lengths and prompts; no two values of `seed` share one."""
        return 1000 * self.seed + repeat

    def derived(self) -> list[str]:
        """List what the lab needs derived from the served model, each once, in order of use."""
        text = [json.dumps(self.flags_of(v)) + f"<{v.served}>" for v in self.variants]
        placeholders = re.findall(r"<([a-z][a-z0-9-]*)[>/]", " ".join(text))
        return list(dict.fromkeys([*placeholders, *self.studies]))

    def points(
        self,
        shape: Shape,
        ceilings: Ceilings,
        weights: Mapping[str, Shape] | None = None,
        about: Mapping[str, Any] | None = None,
    ) -> list[Point]:
        """List every variant, with all its flags, under every workload meant for it and every load.

        `ceilings` are those of one device; a point has those of all that share its engine's layers.
        `weights` maps variants that serve other weights than the lab's model to their shapes;
        `about` maps derived models to what their makers recorded.
        """
        seeds = [self.draw_seed(repeat) for repeat in range(1, self.repeats + 1)]
        sent = [  # every variant under every load of a workload is sent the same
            (
                workload,
                RequestLengths(
                    chain.from_iterable(
                        workload.lengths(self.requests_of(workload), seed) for seed in seeds
                    )
                ),
            )
            for workload in self.workloads
        ]
        served = [  # every load is served by the same engine
            (
                variant.model_copy(update={"flags": dict(flags)}),
                (weights or {}).get(variant.name, shape),
                ceilings.times(flags.tensor_parallel_size),
            )
            for variant in self.variants
            for flags in [self.flags_of(variant)]
        ]
        return [
            Point(
                variant,
                workload,
                load,
                lengths,
                served_shape,
                shared_ceilings,
                about or {},
                (warmup_s := self.warmup_of(workload), warmup_s + self.window_s),
                self.slo,
                self.admission_by_client,
            )
            for variant, served_shape, shared_ceilings in served
            for workload, lengths in sent
            if not workload.only or variant.name in workload.only
            for load in workload.loads
        ]

    def pairs(self, claim: Claim, points: list[Point]) -> list[tuple[Point, Point]]:
        """Pair the points of a claim's treatment with those of its baseline.

        A pair agrees on the properties that both arms leave open.
        """
        treatment, baseline = claim.treatment, claim.baseline
        left_open = [
            getattr(treatment, name) is None and getattr(baseline, name) is None
            for name in ("variant", "workload", "load")
        ]

        def open_part(point: Point) -> list[str]:
            return list(compress(point.name.parts, left_open))

        return [
            (t, b)
            for t in points
            if treatment.matches(t)
            for b in points
            if baseline.matches(b) and open_part(t) == open_part(b)
        ]


def duration_s_of(trace: Sequence[TraceRow]) -> float:
    """Return the time from a trace's first request to its last. Raises LabError for none."""
    if not (duration_s := trace[-1][0]):
        raise LabError(
            "all requests of the trace come at one time, so it has no rate: give more of it"
        )
    return duration_s


def _scales_of(lab: str, page: Page, own: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Join, scale by scale, a lab's own parts in Python, their sizes, and its page's words."""
    layers = (own, sizes_of(lab), page.words_on)
    scales: dict[str, dict[str, Any]] = {
        name: {path: value for of in layers for path, value in of.get(name, {}).items()}
        for name in dict.fromkeys(name for of in layers for name in of)
    }
    for scale in scales.values():
        if "claims" in scale:
            scale["claims"] = [c.model_dump() for c in _titled(page, scale["claims"])]
    return scales


def _titled(page: Page, claims: Sequence[Claim]) -> tuple[Claim, ...]:
    """Give claims the titles of the page."""
    titles = page.titles
    if untitled := [c.name for c in claims if c.name not in titles]:
        raise ValueError(f"its page says under {CLAIMS!r} no title for {', '.join(untitled)}")
    return tuple(c.model_copy(update={"title": titles[c.name]}) for c in claims)


def _write_out_defaults(fields: dict[str, Any]) -> None:
    """Add to a lab's plain fields what a digest leaves out while it is the default.

    A change then finds them, as it finds the others.
    """
    kinds: dict[str, type[BaseModel]] = {
        "variants": Variant, "workloads": Workload, "claims": Claim
    }  # fmt: skip
    parts: list[tuple[type[BaseModel], Any]] = [(Lab, fields)]
    lists = {name: plain for name in kinds if isinstance(plain := fields[name], list | tuple)}
    parts += [(kinds[name], plain) for name, plains in lists.items() for plain in plains]
    for model, plain in parts:
        if isinstance(plain, dict):
            for name, info in _left_out_of_digests(model):
                if name not in plain:
                    plain[name] = info.get_default()


@cache
def _left_out_of_digests(model: type[BaseModel]) -> tuple[tuple[str, FieldInfo], ...]:
    """List the fields that a digest leaves out while they have their defaults."""
    return tuple((name, info) for name, info in model.model_fields.items() if info.exclude_if)


def the_same(twin: Point, base: Point) -> Prediction:
    """Predict the ratio 1, for an A/A run."""
    return Prediction(
        value=1.0,
        formula="1",
        assumptions=("both are the same engine",),
        source="A/A tests: Kohavi et al., Data Mining and Knowledge Discovery, 2009",
    )


def factors(treatment: Point, baseline: Point) -> list[str]:
    """Name what differs between two points: flags, the engine, weights, the workload, the load.

    Two engines have flags by names of their own, which are no factors beside the engine.
    """
    a, b = treatment.variant, baseline.variant
    flags = sorted({*a.flags, *b.flags}) if a.engine == b.engine else []
    names = [f"--{flag}" for flag in flags if a.flags.get(flag) != b.flags.get(flag)]
    names += ["engine"] if a.engine != b.engine else []
    names += ["weights"] if a.weights != b.weights else []
    names += ["workload"] if treatment.workload.name != baseline.workload.name else []
    return names + (["load"] if treatment.load != baseline.load else [])


_PROSE = ("title", "question", "limits", "next_knobs", "left_out")
_DERIVED = ("answers", "findings", "plots")  # computed from the files of a run, at any time
_CHOSEN = "load_processes_chosen"


def digest_of(resolved: Mapping[str, Any]) -> str:
    """Hash a resolved lab: the digest changes with any setting, not with a word of explanation.

    Nor does it change with what a run chose for its machine.
    """
    knobs = {k: v for k, v in resolved.items() if k not in (*_PROSE, _CHOSEN)}
    if resolved.get(_CHOSEN):
        knobs["load_processes"] = NOT_SET
    knobs["claims"] = [
        {k: v for k, v in c.items() if k not in ("title", "coupled")} for c in knobs["claims"]
    ]
    return hashlib.sha256(json.dumps(knobs, sort_keys=True).encode()).hexdigest()[:8]


def knobs(resolved: Mapping[str, Any]) -> dict[str, Any]:
    """Select what of a resolved lab can change a figure: no prose, predictions or conclusions."""
    settings = {k: v for k, v in resolved.items() if k not in (*_PROSE, *_DERIVED, _CHOSEN)}
    for part in ("claims", "forecasts"):
        settings[part] = [
            {k: v for k, v in c.items() if k not in ("title", "coupled", "predict")}
            for c in settings[part]
        ]
    return settings
