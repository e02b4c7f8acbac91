"""The vocabulary a lab is written in.

A lab file is one `Lab` literal and the pure functions that predict. A **point** is what a trial
repeats: a variant (an engine configuration) under a workload (what is sent) with an arrival (when).
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import json
import re
import textwrap
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from loadtests.arrivals import Arrival
from loadtests.workload import Workload
from serving.engines import DEFAULT_ENGINE, ENGINES
from serving.engines.base import FlagValue
from serving.engines.vllm import VllmFlags
from serving.machine import Ceilings
from serving.models import Shape


class Variant(BaseModel, frozen=True, extra="forbid"):
    """An engine configuration: the engine, flags by its own names, and whose weights it serves.

    `weights` names a model derived from the lab's own (`labs/running/derived_models.py`), as does
    `<name>` within a flag's value, where the derived model's folder will stand. `engine` is a name
    of `serving/engines/__init__.py`; the default is left out of files and digests.
    """

    name: str
    flags: dict[str, FlagValue] = {}
    weights: str = ""
    engine: Annotated[str, Field(exclude_if=lambda name: name == DEFAULT_ENGINE)] = DEFAULT_ENGINE

    @field_validator("engine")
    @classmethod
    def _engine_is_known(cls, name: str) -> str:
        if name not in ENGINES:
            known = ", ".join(ENGINES)
            raise ValueError(f"no engine {name!r}{did_you_mean(name, ENGINES)} ones are {known}")
        return name

    def but(
        self, name: str, flags: Mapping[str, FlagValue] | None = None, weights: str = ""
    ) -> Variant:
        """This variant with one thing changed."""
        return Variant(
            name=name,
            flags={**self.flags, **(flags or {})},
            weights=weights or self.weights,
            engine=self.engine,
        )


@dataclass(frozen=True)
class Point:
    """Where a prediction is asked for: everything known before an engine starts."""

    variant: Variant
    workload: Workload
    load: Arrival
    lengths: tuple[tuple[int, int], ...]  # (prompt, output) tokens of the requests to be sent
    shape: Shape
    ceilings: Ceilings
    about: Mapping[str, Any] = field(default_factory=dict)  # derived model -> what is known of it

    @property
    def flags(self) -> VllmFlags:
        """The variant's flags, for those who ask by vLLM's names."""
        return VllmFlags(self.variant.flags)

    @property
    def key(self) -> str:
        return f"{self.variant.name}/{self.workload.name}/{self.load.name}"

    @property
    def prompt_tokens(self) -> float:
        return sum(p for p, _ in self.lengths) / len(self.lengths)

    @property
    def output_tokens(self) -> float:
        return sum(o for _, o in self.lengths) / len(self.lengths)

    @property
    def context_tokens(self) -> float:
        """Mean over a request's life in decode: its prompt and half its answer."""
        return self.prompt_tokens + self.output_tokens / 2

    def kv_bytes(self, bytes_per_value: float = 2) -> float:
        """Keys and values of all that are in flight."""
        per_token = self.shape.kv_bytes_per_token(bytes_per_value)
        return self.load.users * self.context_tokens * per_token


class Prediction(BaseModel, frozen=True, extra="forbid"):
    """A number written down before measuring, with what it rests on.

    A `point` holds when the measured interval meets value x (1 +- tolerance). A `ceiling` says that
    nothing exceeds it, a `floor` that nothing falls below it: they hold unless the whole interval
    lies beyond value x (1 +- tolerance).
    """

    value: float
    kind: Literal["point", "ceiling", "floor"] = "point"
    tolerance: NonNegativeFloat
    formula: str
    assumptions: tuple[str, ...] = ()
    source: str = ""


class Arm(BaseModel, frozen=True, extra="forbid"):
    """A partial description of points; what is left out may be anything."""

    variant: str | None = None
    workload: str | None = None
    load: str | None = None  # text form, `concurrent:8`
    kind: str | None = None  # of load: `concurrent`

    def matches(self, point: Point) -> bool:
        have = (point.variant.name, point.workload.name, str(point.load), point.load.kind)
        want = (self.variant, self.workload, self.load, self.kind)
        return all(w is None or w == h for w, h in zip(want, have, strict=True))


PredictEffect = Callable[[Point, Point], Prediction]
PredictPoint = Callable[[Point], Prediction]


class Claim(BaseModel, frozen=True, extra="forbid"):
    """What the lab expects of a treatment against its baseline: ratio treatment / baseline.

    The claim is judged at every pair of points that agree on what the arms leave open. The two
    differ in one thing (`factors`); where more must, `coupled` says why.
    """

    name: str
    title: str  # the claim as a sentence
    metric: str
    treatment: Arm
    baseline: Arm
    expect: Literal["rises", "falls", "unchanged"]
    predict: PredictEffect
    coupled: str = ""


class Forecast(BaseModel, frozen=True, extra="forbid"):
    """A predicted absolute figure at every point of an arm: the curve drawn over the measured."""

    name: str
    metric: str
    arm: Arm
    predict: PredictPoint


class Evidence(BaseModel, frozen=True, extra="forbid"):
    """What the engine itself must show in a trial before its figures count.

    `rises` and `stays` look at a counter over the trial; `echoes` at a label of an info metric.
    `absent` says that the engine has no such counter.
    `pieces` counts the tokens the running streams received while a long prompt was prefilled: one
    a piece, so as many as the variant's token budget makes (the engine counts no pieces itself).
    """

    arm: Arm
    kind: Literal["rises", "stays", "echoes", "absent", "pieces"]
    metric: str
    label: str = ""
    value: str = ""

    def __str__(self) -> str:
        what = f"{self.label}={self.value}" if self.kind == "echoes" else self.kind
        return f"{self.metric} {what}"


class SLO(BaseModel, frozen=True, extra="forbid"):
    """What a user should wait at most; goodput counts requests that meet all of it."""

    ttft_s: PositiveFloat
    tpot_s: PositiveFloat
    itl_s: PositiveFloat | None = None  # the longest gap between tokens, where a lab judges it

    def by_name(self) -> dict[str, float]:
        """ttft, tpot and, where there is one, itl -> seconds."""
        every = {"ttft": self.ttft_s, "tpot": self.tpot_s, "itl": self.itl_s}
        return {name: seconds for name, seconds in every.items() if seconds is not None}


class LabError(Exception):
    """The reader asked for something that cannot be; the message says what can."""


class NotApplicable(LabError):
    """The lab's question means nothing of random weights, or on this kind of machine."""


READ_TEXT = ("studies", "probes", "findings", "plots")
"""The parts of a lab that may read what an engine wrote, which is no text where the weights are
random.
"""
NO_TEXT = "quality is not measured on random weights, nor is what else is read off the text"


class Lab(BaseModel, frozen=True, extra="forbid"):
    """A question, how it is put to an engine, and what is expected.

    `scales` holds sizes only: for each kind of machine, and for GPUs of some class of memory
    (`gpu-24`) over that, other values for some of these fields, by dotted path
    (`workloads.exponential.output_tokens.mean_tokens`). `quick` is laid over that.
    """

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]+$")]
    title: str
    question: str
    answers: tuple[str, ...]  # ids of the catalogue of questions
    variants: Annotated[tuple[Variant, ...], Field(min_length=1)]
    flags: dict[str, FlagValue] = {}  # of every variant; a variant's own win
    workloads: Annotated[tuple[Workload, ...], Field(min_length=1)]
    claims: tuple[Claim, ...]
    forecasts: tuple[Forecast, ...] = ()
    evidence: tuple[Evidence, ...] = ()
    studies: tuple[str, ...] = ()  # what is measured on the model itself, once, without an engine
    probes: tuple[str, ...] = ()  # what else is asked of the engines, beside the load
    probed: tuple[str, ...] = ()  # of these variants; of all where none is named
    findings: tuple[str, ...] = ()  # what is concluded beyond the claims
    plots: tuple[str, ...] = ()
    slo: SLO
    requests: PositiveInt  # prepared for each trial; it ends early if they run out
    warmup_s: Annotated[PositiveFloat, Field(allow_inf_nan=False)]
    # held open in a closed loop, up to fourfold, until there is an answer for each user
    window_s: Annotated[PositiveFloat, Field(allow_inf_nan=False)]
    repeats: PositiveInt
    most_repeats: NonNegativeInt = 0  # where a claim is still undecided; fewer than repeats: none
    timeout_s: PositiveFloat = 60.0  # longest silence within one answer
    load_processes: PositiveInt = 1  # that share the sending
    seed: NonNegativeInt = 0
    scales: dict[str, dict[str, Any]] = {}
    quick: dict[str, Any] = {}
    aa: bool = False  # the baseline against itself: `against_itself`
    # of its studies, probes, findings and plots, what means nothing of random weights
    needs_text: Annotated[tuple[str, ...], Field(exclude=True)] = ()
    # how the lab asks its question of random weights, beyond leaving out what needs text
    dummy: Annotated[Callable[[Lab], Lab] | None, Field(exclude=True)] = None
    # how often a draft token is expected to be accepted at a point whose engine guesses ahead
    acceptance: Annotated[Callable[[Point], float] | None, Field(exclude=True)] = None
    left_out: tuple[str, ...] = ()  # by a run with random weights, each with its reason
    limits: dict[str, str] = {}  # kind of machine -> what such a machine can and cannot show
    next_knobs: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _enough_requests(self) -> Self:
        closed = [a.users for w in self.workloads for a in w.loads if not a.open_loop]
        most = max(closed, default=1)
        if self.requests < most:
            raise ValueError(f"requests={self.requests} do not fill a load of {most} at once")
        return self

    @model_validator(mode="after")
    def _names_exist(self) -> Self:
        variants = {v.name for v in self.variants}
        named = {a.variant for c in self.claims for a in (c.treatment, c.baseline)}
        named |= {e.arm.variant for e in self.evidence}
        named |= {name for w in self.workloads for name in w.only} | set(self.probed)
        if unknown := named - variants - {None}:
            raise ValueError(f"{sorted(map(str, unknown))} are no variants of {self.name}")
        return self

    def at(
        self,
        scale: str,
        quick: bool,
        changes: Mapping[str, Any] | None = None,
        dummy: bool = False,
    ) -> Lab:
        """The lab resolved for a scale, `cpu` or `gpu` or `gpu-24`: its sizes, then quick, then
        what random weights leave of it, then the reader's changes.

        Raises LabError naming the field, and the known ones, for a change that does not fit.
        """
        kind = scale.partition("-")[0]
        layers = [self.scales.get(name, {}) for name in dict.fromkeys((kind, scale))]
        lab = self._changed(*layers, self.quick if quick else {})
        if not dummy:
            return lab._changed(changes or {})
        lab = lab._without(self.needs_text)
        lab = (self.dummy(lab) if self.dummy else lab)._changed(changes or {})
        if asked := lab._named(self.needs_text):
            raise LabError(f"{', '.join(asked)}: {NO_TEXT}")
        return lab

    def _named(self, names: Collection[str]) -> list[str]:
        return [name for part in READ_TEXT for name in getattr(self, part) if name in names]

    def _without(self, names: Collection[str]) -> Lab:
        if not (gone := self._named(names)):
            return self
        kept = {part: tuple(n for n in getattr(self, part) if n not in names) for part in READ_TEXT}
        why = f"{', '.join(dict.fromkeys(n.removesuffix('-quick') for n in gone))}: {NO_TEXT}"
        return self.model_copy(update={**kept, "left_out": (why,)})

    def _changed(self, *layers: Mapping[str, Any]) -> Lab:
        fields = self.model_dump(exclude={"scales", "quick"})
        for path, value in (item for layer in layers for item in layer.items()):
            _set(fields, path, copy.deepcopy(value))  # a later path may lead into it
        fields["acceptance"] = self.acceptance
        try:
            return Lab.model_validate(fields)
        except ValidationError as error:
            raise LabError(_sentence(error, fields)) from error

    def against_itself(self) -> Lab:
        """A/A: the first claim's baseline and a twin of it, wherever claims have it as baseline.

        Whatever is found between the two is noise, so every claim expects no change. Raises
        LabError where no claim has a baseline to repeat.
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
        both = (base.name, twin.name)
        workloads = []
        for workload in self.workloads:
            asked = [a for _, a in arms if a.workload in (workload.name, None)]
            loads = tuple(
                load
                for load in workload.loads
                if any(a.load in (str(load), None) and a.kind in (load.kind, None) for a in asked)
            )
            if loads and (not workload.only or name in workload.only):
                only = both if workload.only else ()
                workloads.append(workload.model_copy(update={"loads": loads, "only": only}))
        return self.model_copy(update={
            "aa": True,
            "variants": (base, twin),
            "workloads": tuple(workloads),
            "claims": tuple(
                Claim(
                    name=f"aa-{claim.name}",
                    title=f"Nothing tells `{name}` from its twin",
                    metric=metric,
                    treatment=arm.model_copy(update={"variant": twin.name}),
                    baseline=arm,
                    expect="unchanged",
                    predict=the_same,
                )
                for (metric, arm), claim in arms.items()
            ),
            "forecasts": (),
            "evidence": tuple(
                e.model_copy(update={"arm": e.arm.model_copy(update={"variant": v})})
                for e in self.evidence
                if e.arm.variant in (name, None)
                for v in both
            ),
            "studies": (), "probes": (), "probed": (), "findings": (), "plots": (),
            "limits": {}, "next_knobs": (),
        })  # fmt: skip

    def flags_of(self, variant: Variant) -> VllmFlags:
        """All flags that the variant's engine is started with."""
        return VllmFlags({**self.flags, **variant.flags})

    @property
    def all_flags(self) -> list[VllmFlags]:
        """Those of each variant, in order."""
        return [self.flags_of(variant) for variant in self.variants]

    def resolved(self) -> dict[str, Any]:
        """As plain JSON; functions by name."""
        plain: dict[str, Any] = json.loads(
            json.dumps(self.model_dump(), default=lambda f: f"{f.__module__}.{f.__qualname__}")
        )
        return plain

    def digest(self) -> str:
        return digest_of(self.resolved())

    @property
    def rounds(self) -> int:
        """Repeats of a point at most."""
        return max(self.repeats, self.most_repeats)

    def draw_seed(self, repeat: int) -> int:
        """Of a repeat's lengths and prompts; no two seeds of a lab share any."""
        return 1000 * self.seed + repeat

    def derived(self) -> list[str]:
        """What is derived from the served model for this lab, each once, in order."""
        text = [json.dumps(self.flags_of(v)) + f"<{v.weights}>" for v in self.variants]
        named = re.findall(r"<([a-z][a-z0-9-]*)[>/]", " ".join(text))
        return list(dict.fromkeys([*named, *self.studies]))

    def points(
        self,
        shape: Shape,
        ceilings: Ceilings,
        weights: Mapping[str, Shape] | None = None,
        about: Mapping[str, Any] | None = None,
    ) -> list[Point]:
        """Every variant, with all its flags, under every workload that is for it, and load.

        `weights` holds the shapes of variants that serve other weights than the lab's model.
        """
        return [
            Point(
                variant.model_copy(update={"flags": dict(self.flags_of(variant))}),
                workload,
                load,
                tuple(
                    length
                    for repeat in range(1, self.repeats + 1)
                    for length in workload.lengths(self.requests, self.draw_seed(repeat))
                ),
                (weights or {}).get(variant.name, shape),
                ceilings,
                about or {},
            )
            for variant in self.variants
            for workload in self.workloads
            if not workload.only or variant.name in workload.only
            for load in workload.loads
        ]

    def pairs(self, claim: Claim, points: list[Point]) -> list[tuple[Point, Point]]:
        """(treatment, baseline) points that agree on what the claim's arms leave open."""

        def open_part(point: Point, arm: Arm, other: Arm) -> tuple[str | None, ...]:
            have = (point.variant.name, point.workload.name, str(point.load))
            ours = (arm.variant, arm.workload, arm.load)
            theirs = (other.variant, other.workload, other.load)
            return tuple(
                h if o is None and t is None else None
                for h, o, t in zip(have, ours, theirs, strict=True)
            )

        return [
            (t, b)
            for t in points
            if claim.treatment.matches(t)
            for b in points
            if claim.baseline.matches(b)
            and open_part(t, claim.treatment, claim.baseline)
            == open_part(b, claim.baseline, claim.treatment)
        ]


def the_same(twin: Point, base: Point) -> Prediction:
    return Prediction(
        value=1.0,
        tolerance=0.03,
        formula="1",
        assumptions=("both are the same engine",),
        source="A/A tests: Kohavi et al., Data Mining and Knowledge Discovery, 2009",
    )


def factors(treatment: Point, baseline: Point) -> list[str]:
    """What differs between two points: flags, the engine, the weights, the workload, the load."""
    ours, theirs = treatment.variant, baseline.variant
    flags = sorted({*ours.flags, *theirs.flags})
    found = [f"--{k}" for k in flags if ours.flags.get(k) != theirs.flags.get(k)]
    found += ["engine"] if ours.engine != theirs.engine else []
    found += ["weights"] if ours.weights != theirs.weights else []
    found += ["workload"] if treatment.workload.name != baseline.workload.name else []
    return found + (["load"] if treatment.load != baseline.load else [])


_PROSE = ("title", "question", "limits", "next_knobs", "left_out")
_DRAWN = ("answers", "findings", "plots")  # from the files of a run, at any time


def digest_of(resolved: Mapping[str, Any]) -> str:
    """Of a resolved lab: changes with any knob, not with a word of explanation."""
    knobs = {k: v for k, v in resolved.items() if k not in _PROSE}
    knobs["claims"] = [
        {k: v for k, v in c.items() if k not in ("title", "coupled")} for c in knobs["claims"]
    ]
    return hashlib.sha256(json.dumps(knobs, sort_keys=True).encode()).hexdigest()[:8]


def knobs(resolved: Mapping[str, Any]) -> dict[str, Any]:
    """Of a resolved lab what can change a figure: no prose, no predictions, nothing drawn."""
    found = {k: v for k, v in resolved.items() if k not in (*_PROSE, *_DRAWN)}
    for part in ("claims", "forecasts"):
        found[part] = [
            {k: v for k, v in c.items() if k not in ("title", "coupled", "predict")}
            for c in found[part]
        ]
    return found


def parse_changes(text: str) -> dict[str, Any]:
    """`window_s=4 workloads.fixed.output_tokens.tokens=16` -> {path: value}.

    Values are JSON where they can be read as such, else text. Raises LabError.
    """
    changes: dict[str, Any] = {}
    for item in text.split():
        path, equals, value = item.partition("=")
        if not equals:
            raise LabError(f"SET: {item!r} is not field=value")
        try:
            changes[path] = json.loads(value)
        except json.JSONDecodeError:
            changes[path] = value
    return changes


def _set(fields: dict[str, Any], path: str, value: Any) -> None:
    """Change an existing field in place; items of a list are found by their name."""
    *parents, last = path.split(".")
    at: Any = fields

    def require(step: str, free: bool) -> dict[str, Any]:
        known = _steps(at)
        if step not in known and not free:
            names = ", ".join(known) or "none"
            raise LabError(f"{path}: no field {step!r}{did_you_mean(step, known)} here: {names}")
        return known

    for step in parents:
        known = require(step, free=False)
        at = at[step] if isinstance(at, dict) else at[known[step]]
    require(last, free=bool(parents) and parents[-1] == "flags")  # vLLM knows its flags
    if not isinstance(at, dict):
        raise LabError(f"{path}: give one of its fields, {path}.<field>=")
    at[last] = value


def _sentence(error: ValidationError, fields: Mapping[str, Any]) -> str:
    """The first complaint, with a list's items called by their names as in a change's path."""
    first = error.errors()[0]
    said = first["msg"].removeprefix("Value error, ").replace("valid tuple", "list in JSON")
    if not first["loc"]:
        return said
    at: Any = fields
    steps = []
    for step in first["loc"]:
        if isinstance(at, dict):
            at = at.get(step)
        else:
            at = at[step] if isinstance(at, list | tuple) and isinstance(step, int) else None
        steps.append(str(at["name"] if isinstance(at, dict) and isinstance(step, int) else step))
    given = textwrap.shorten(repr(first["input"]), 80, placeholder=" ..")
    return f"{'.'.join(steps)}: {said} (given {given})"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """What a misspelled name was meant to be, as the middle of a sentence about the known ones."""
    found = difflib.get_close_matches(name, list(known), 1)
    return f": did you mean {found[0]}? Known" if found else "; known"


def _steps(at: Any) -> dict[str, Any]:
    if isinstance(at, dict):
        return {key: key for key in at}
    if isinstance(at, list | tuple):
        return {
            item["name"]: i
            for i, item in enumerate(at)
            if isinstance(item, dict) and "name" in item
        }
    return {}
