"""What a lab's own formulas predict as one setting is turned, on machines measured and published.

There is no second copy of a formula: the lab is resolved anew at every setting, as `SET=` would do
it, and its claims' own functions predict. Which settings can be turned is found by trying: those of
the two points of a claim that are numbers, and change what is predicted. A card that was not
measured has its datasheet's figures as ceilings, and the shape that it serves under WEIGHTS=dummy.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from labs.harness.facts.parts import Dialled, parts_of
from labs.harness.filing.computed import Summary
from labs.harness.filing.newest import marks
from labs.harness.filing.recorded import Run
from labs.harness.filing.results import UNREADABLE
from labs.harness.judging.judge import Interval
from labs.harness.judging.metrics import METRICS
from labs.harness.judging.text import ceilings_text
from labs.harness.spec import Claim, Forecast, Lab, LabError, Point
from labs.harness.telling.document import parse, plain_text
from loadtests.workload import BLOCK
from serving.hardware import gpus
from serving.hardware.machine import Ceilings
from serving.weights import dummy, models
from serving.weights.dummy import HOME, SHAPES
from serving.weights.models import Shape

FACTORS = (0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4)
REQUESTS = BLOCK  # whose lengths are drawn for a card: any number of blocks has the same mean
USERS = "requests in flight"
BLOCK_SIZES = (16, 32, 64, 128, 256)
SHARES = (0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95)  # of what is recorded of a derived model
MIB = 2**20
NAMES = {  # of settings, by the end of their path
    "prompt_tokens.tokens": "prompt tokens",
    "output_tokens.tokens": "output tokens",
    "output_tokens.mean_tokens": "mean output tokens",
    "output_tokens.max_tokens": "most output tokens",
    "prefix.tokens": "shared prefix tokens",
    "intruder.prompt_tokens": "tokens of the long prompt",
    "speculative-config.num_speculative_tokens": "tokens guessed ahead",
    "kv-cache-memory-bytes": "kv-cache-memory, MiB",
    "mask_s": "time to fill a mask, s",
}

Asked = Claim | Forecast | Dialled  # a ratio of two points, a figure of one, or what no run has
Points = tuple[Point, ...]


@dataclass(frozen=True)
class Hardware:
    """Something to predict for: a machine of a published run, or a card by its datasheet."""

    name: str
    model: str
    limits: str  # its ceilings, and where they come from
    card: str  # by which MACHINE= asks for it; "" for a machine that was measured
    scale: str
    shape: Shape
    ceilings: Ceilings
    weights: Mapping[str, Shape]
    about: Mapping[str, Any]

    @property
    def basis(self) -> str:
        """What a prediction rests on."""
        return f"{self.limits}; {self.model}"

    @classmethod
    def of(cls, run: Run) -> Hardware:
        """The machine of a run, with the shapes of what it served."""
        weights = {name: Shape(**shape) for name, shape in run.weights.items()}
        return cls(
            run.machine.describe(), run.model, ceilings_text(run.ceilings), "", run.scale,
            Shape(**run.model_shape), run.ceilings, weights, run.about,
        )  # fmt: skip


@cache
def shipped_shape(name: str) -> Shape:
    """The shape of an architecture that ships with the lab."""
    return models.shape_of(json.loads((HOME / f"{name}.json").read_text()))


def shape_text(name: str) -> str:
    """A shape that ships with the lab in words, e.g. `a made-up mixture of 40 experts`."""
    public, _, made_up = SHAPES[name].partition("nobody's: ")
    if not made_up:
        return f"the shape of {public}"
    return f"a made-up {made_up[2:] if made_up.startswith('a ') else f'one, {made_up}'}"


@cache
def cards() -> tuple[Hardware, ...]:
    """Every card that has a datasheet here, with the shape it serves by default."""
    hardware = []
    for name, sheet in gpus.DATASHEETS.items():
        of = gpus.class_of(sheet.memory_bytes)
        ceilings = Ceilings(
            memory_bandwidth_bytes_per_s=sheet.memory_bandwidth_bytes_per_s,
            bf16_flops_per_s=sheet.bf16_flops_per_s, fp8_flops_per_s=sheet.fp8_flops_per_s,
            threads=1, torch="", measured_at="",
        )  # fmt: skip
        model = shape_text(of.dummy)
        hardware.append(
            Hardware(name.removeprefix("NVIDIA "), model, ceilings_text(ceilings, "datasheet"),
                     sheet.short_name, f"gpu-{of.gb}", shipped_shape(of.dummy), ceilings, {}, {})
        )  # fmt: skip
    return tuple(hardware)


def cards_of(lab: Lab) -> list[Hardware]:
    """Every such card with what this lab serves there: a shape of its own, where it has one."""
    if not lab.shape:
        return list(cards())
    return [_in_its_shape(lab.at(card.scale, quick=False), card) for card in cards()]


def _in_its_shape(lab: Lab, card: Hardware) -> Hardware:
    """The card with the shape that a resolved lab serves, and those of its derived models."""
    config = dummy.config_of(lab.shape)
    weights = {
        v.name: models.shape_of(dummy.dense(config, v.weights)) for v in lab.variants if v.weights
    }
    model = shape_text(lab.shape)
    return replace(card, model=model, shape=shipped_shape(lab.shape), weights=weights)


def dials(lab: Lab, runs: Sequence[tuple[Run, Summary]], first: str = "") -> dict[str, Any]:
    """Predict a lab's claims over its settings, the claim of the name `first` before the others.

    Returns {} where no formula answers anywhere.
    """
    in_order = sorted(lab.claims, key=lambda c: c.name != first)
    return _turned(lab, runs, [*_one_a_function(in_order), *_one_a_function(lab.forecasts)])


def unmeasured(lab: Lab) -> dict[str, Any]:
    """Predict on cards what no run measures, by a lab's closed forms, in the form of `dials`."""
    return _turned(lab, (), parts_of(lab.name).dialled)


def _turned(
    lab: Lab, runs: Sequence[tuple[Run, Summary]], claims: Sequence[Asked]
) -> dict[str, Any]:
    hardware = [*map(Hardware.of, (run for run, _ in runs)), *cards_of(lab)]
    curves = [
        {"claim": c, "machine": m, **curve}
        for alike in _resolved_alike(hardware)
        for c, m, curve in _curves(lab, claims, alike)
    ]
    curves.sort(key=lambda curve: int(curve["machine"]))
    knobs = list(dict.fromkeys(str(curve["knob"]) for curve in curves))
    machines = sorted({int(curve["machine"]) for curve in curves})
    if not curves:
        return {}
    return {
        "lab": lab.name,
        "judged": [claim.name for claim in lab.claims],
        "claims": [_described(claim) for claim in claims],
        "machines": [
            {"name": hardware[m].name, "told": hardware[m].basis, "card": hardware[m].card}
            for m in machines
        ],
        "knobs": [_named(knob) for knob in knobs],
        "curves": [
            {**curve, "knob": knobs.index(str(curve["knob"])),
             "machine": machines.index(int(curve["machine"]))}
            for curve in curves
        ],
        "measured": [
            {"claim": c, "machine": machines.index(m), "y": ratio.value, "low": ratio.low,
             "high": ratio.high, "told": outcome + (marks(run) if run.quick else "")}
            for m, (run, summary) in enumerate(runs) if m in machines
            for c, claim in enumerate(claims)
            for ratio, outcome in _measured(claim, run, summary)
        ],
    }  # fmt: skip


def predicted(lab: Lab, name: str) -> list[tuple[str, float]]:
    """What a claim predicts at the lab's own settings on each card that its formula answers for."""
    (claim,) = (c for c in lab.claims if c.name == name)
    predictions = []
    for card in cards_of(lab):
        drawn = _briefly(lab.at(card.scale, quick=False))
        pair = _pair(drawn, claim, _points(drawn, card), card)
        value = _predicted(claim, pair, card) if pair else None
        if value:
            predictions.append((card.name, value))
    return predictions


def pair_of(lab: Lab, claim: Claim, on: Hardware) -> Points:
    """The first two points that a claim compares, as they are by default on this hardware.

    Empty where there are none. One whose weights have no known shape there has the base model's.
    """
    resolved = lab.at(on.scale, quick=False)
    drawn = _briefly(resolved) if on.card else resolved
    claims = (c for c in drawn.claims if c.name == claim.name)
    pairs = [pair for c in claims for pair in drawn.pairs(c, _points(drawn, on))]
    return tuple(_on(point, on.ceilings) for point in pairs[0]) if pairs else ()


def has_shapes(points: Points, on: Hardware) -> bool:
    """Whether the shape of everything that these points serve is known there."""
    return all(not p.variant.weights or p.variant.name in on.weights for p in points)


def _one_a_function(asked: Sequence[Claim | Forecast]) -> list[Claim | Forecast]:
    """The first of all that one function predicts."""
    return list({of.predict: of for of in reversed(asked)}.values())[::-1]


def _described(asked: Asked) -> dict[str, str]:
    if isinstance(asked, Dialled):
        return {"name": "", "title": asked.title, "axis": asked.axis, "unit": asked.unit}
    metric = METRICS[asked.metric]
    if isinstance(asked, Claim):
        title = f"{plain_text(parse(asked.title))} ({metric.title}, treatment / baseline)"
        return {"name": asked.name, "title": title, "axis": f"{metric.title}, ratio", "unit": "x"}
    unit = {"1": "", "share": ""}.get(metric.unit, metric.unit)
    return {"name": "", "title": f"{metric.title} by the formula", "axis": metric.title,
            "unit": unit}  # fmt: skip


def _measured(asked: Asked, run: Run, summary: Summary) -> list[tuple[Interval, str]]:
    """What a run measured of it, at the first pair or the last point, and what came of it."""
    if isinstance(asked, Claim):
        judged = [j for j in summary.judgements if j.claim == asked.name][:1]
        return [(j.ratio, j.outcome) for j in judged if j.ratio]
    if isinstance(asked, Dialled):
        return []
    keys = [point.key for point in run.points() if asked.arm.matches(point)][-1:]
    return [
        (f.measured, f"prediction {f.outcome}")
        for f in summary.forecasts
        if f.point in keys and f.metric == asked.metric and f.measured
    ]


def _named(knob: str) -> dict[str, Any]:
    """Say a setting's path in words, `prompt tokens (share-90)`, and how many make one shown.

    Paths of workloads that are turned together, with blanks between, are named without them.
    """
    if "." not in knob:
        return {"name": knob, "per": 1}  # no path: it is in words
    path, *other_paths = knob.split(" ")
    steps = path.split(".")
    owned = steps[0] in ("workloads", "variants")
    inner = [s for s in (steps[2:] if owned else steps) if s != "flags"]
    known = next((words for end, words in NAMES.items() if f".{path}".endswith(f".{end}")), None)
    words = known or " ".join(s.replace("_", " ") for s in inner)
    name = f" ({steps[1]})" if owned and not other_paths else ""
    return {"name": words + name, "per": MIB if path.endswith("bytes") else 1}


# ------------------------------------------------------------------------------------- predicting


def _resolved_alike(hardware: Sequence[Hardware]) -> list[dict[int, Hardware]]:
    """Put cards together, each under its number, where they differ in their ceilings alone."""
    groups: dict[Any, dict[int, Hardware]] = {}
    for number, on in enumerate(hardware):
        groups.setdefault((on.scale, on.model) if on.card else number, {})[number] = on
    return [*groups.values()]


def _curves(
    lab: Lab, claims: Sequence[Asked], alike: Mapping[int, Hardware]
) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """Yield each claim's prediction over each setting that changes it.

    With the numbers of the claim and of the hardware. What a setting makes of the lab is found once
    for all of the hardware, and for all claims about the same points.
    """
    on = next(iter(alike.values()))
    resolved = lab.at(on.scale, quick=False)
    drawn = _briefly(resolved) if on.card else resolved
    at_base = {point.key: point for point in _points(drawn, on)}

    @cache
    def turned(keys: tuple[str, ...], paths: tuple[str, ...], value: float) -> list[Point]:
        """The points with a setting changed; none where the lab refuses it."""
        small = _restricted(drawn, [at_base[key] for key in keys])
        try:
            return _points(small.at(on.scale, False, dict.fromkeys(paths, value)), on)
        except (LabError, *UNREADABLE):
            return []

    for number, claim in enumerate(claims):
        pair = _pair(drawn, claim, [*at_base.values()], on)
        answered = [
            m for m, of in alike.items() if pair and _predicted(claim, pair, of) is not None
        ]
        if not pair or not answered:
            continue
        keys = tuple(point.key for point in pair)
        tried: list[tuple[str, float, list[tuple[float, Points | None]], str]] = []
        for paths, base in _settings(resolved, pair):
            values = _values(paths[0], base)
            pairs = [(v, _pair(drawn, claim, turned(keys, paths, v), on)) for v in values]
            tried.append((" ".join(paths), base, pairs, " ".join(f"{path}={{}}" for path in paths)))
        for steps, share in _shares(on.about):
            made: list[tuple[float, Points | None]] = [
                (v, _with_maker_share(pair, steps, v)) for v in sorted({*SHARES, share})
            ]
            tried.append((".".join(steps), share, made, ""))
        if users := _users(pair[0]):
            crowded = [(v, _with_users(pair, v)) for v in _values(USERS, users)]
            tried.append((USERS, users, crowded, _loads(pair)))
        for m in answered:
            for knob, base, pairs, setting in tried:
                curve_points = [
                    (v, _predicted(claim, of, alike[m]) if of else None) for v, of in pairs
                ]
                if curve := _curve(knob, base, curve_points, setting):
                    yield number, m, curve
            for name, (words, usual, tries) in _parameters(claim):
                own = [(v, _predicted(claim, pair, alike[m], **{name: v})) for v in tries]
                if curve := _curve(words, usual, own, ""):
                    yield number, m, curve


def _parameters(asked: Asked) -> Sequence[tuple[str, tuple[str, float, Sequence[float]]]]:
    return [*asked.parameters.items()] if isinstance(asked, Dialled) else []


def _curve(
    path: str, base: float, points: Sequence[tuple[float, float | None]], setting: str
) -> dict[str, Any] | None:
    """A curve over a setting; None where it is hardly answered, or changes nothing."""
    there = [(x, y) for x, y in points if y is not None]
    values = [y for _, y in there]
    if len(there) < 3 or max(values) - min(values) <= 1e-3 * abs(max(values, key=abs)):
        return None
    coordinates = {"x": [x for x, _ in there], "y": [float(f"{y:.4g}") for y in values]}
    return {"knob": path, **coordinates, "base": base, "set": setting}


def _briefly(lab: Lab) -> Lab:
    """The lab with no more requests than a mean length needs."""
    return lab.model_copy(update={"requests": min(lab.requests, REQUESTS), "repeats": 1})


def _points(lab: Lab, on: Hardware) -> list[Point]:
    return lab.points(on.shape, on.ceilings, on.weights, on.about)


def _pair(lab: Lab, claim: Asked, points: list[Point], on: Hardware) -> Points | None:
    """A claim's first pair of these points, or a forecast's last point.

    None where there is none, or it serves weights whose shape is not known.
    """
    pairs: list[Points] = []
    if isinstance(claim, Dialled):
        pairs += [
            pair for c in lab.claims if c.name == claim.claim for pair in lab.pairs(c, points)
        ]
    elif isinstance(claim, Claim):
        pairs += lab.pairs(claim, points)
    else:
        pairs += [(p,) for p in points if claim.arm.matches(p)][-1:]
    if not pairs:
        return None
    return pairs[0] if has_shapes(pairs[0], on) else None


def _restricted(lab: Lab, pair: Sequence[Point]) -> Lab:
    """The lab with nothing but what the pair needs, so that it is resolved fast."""
    variants = {p.variant.name for p in pair}
    workloads = {p.workload.name for p in pair}
    loads = [p.load for p in pair]
    return lab.model_copy(
        update={
            "variants": tuple(v for v in lab.variants if v.name in variants),
            "workloads": tuple(
                w.model_copy(
                    update={
                        "only": tuple(n for n in w.only if n in variants),
                        "loads": tuple(of for of in w.loads if of in loads),
                    }
                )
                for w in lab.workloads
                if w.name in workloads
            ),
            "claims": (), "forecasts": (), "evidence": (), "probed": (), "scales": {}, "quick": {},
        }
    )  # fmt: skip


def _with_maker_share(pair: Points, path: Sequence[str], share: float) -> Points:
    """The points as they were had a derived model's maker recorded another share."""
    about = json.loads(json.dumps(pair[0].about))
    at = about
    for step in path[:-1]:
        at = at[step]
    at[path[-1]] = share
    return tuple(replace(point, about=about) for point in pair)


def _shares(plain: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], float]]:
    """Yield each share that is recorded of derived models, such as that of accepted guesses."""
    if isinstance(plain, Mapping):
        for name, value in plain.items():
            yield from _shares(value, (*path, name))
    elif isinstance(plain, float) and 0 < plain < 1:
        yield path, plain


def _with_users(pair: Points, users: float) -> Points | None:
    """The points with other loads, both where they are alike; None beside an open loop."""
    sizes = [_users(point) for point in pair]
    turned = [
        replace(p, load=p.load.model_copy(update={_size(p): int(users)})) if n == sizes[0] else p
        for p, n in zip(pair, sizes, strict=True)
    ]
    return tuple(turned) if all(sizes) else None


def _users(point: Point) -> int:
    """The requests that a closed loop keeps in flight; 0 in an open one, where nobody knows."""
    return 0 if point.load.open_loop else point.load.users


def _size(point: Point) -> str:
    return "size" if point.load.kind == "waves" else "users"


def _loads(pair: Points) -> str:
    """The setting that asks for a load of another size: `{}` stands for it."""
    of, users = pair[0].workload.name, _users(pair[0])
    texts = [
        str(p.load).replace(str(users), "{}", 1) if _users(p) == users else str(p.load)
        for p in pair
        if p.workload.name == of
    ]
    loads = json.dumps(list(dict.fromkeys(texts)), separators=(",", ":"))
    return f"workloads.{of}.loads={loads}"


def _predicted(claim: Asked, pair: Points, on: Hardware, **chosen: float) -> float | None:
    """What a claim predicts of points with the hardware's ceilings; None where nothing is."""
    predict = claim.at(**chosen) if isinstance(claim, Dialled) else claim.predict
    try:
        if not all(map(_fits, pair)):
            return None
        value = predict(*(_on(point, on.ceilings) for point in pair)).value
    except (LabError, *UNREADABLE):
        return None
    return value if math.isfinite(value) and value > 0 else None


def _on(point: Point, ceilings: Ceilings) -> Point:
    """Put a point's engine on devices of these ceilings, as many as share its layers."""
    return replace(point, ceilings=ceilings.times(point.flags.tensor_parallel_size))


def _fits(point: Point) -> bool:
    """Whether there can be such a prompt, and the engine takes it."""
    prefix = point.workload.prefix
    if prefix and prefix.tokens >= min(p for p, _ in point.lengths[:8]):
        return False
    if "max-model-len" not in point.flags:
        return True
    return max(p + o for p, o in point.lengths[:8]) <= point.flags.max_model_len


def _settings(lab: Lab, pair: Points) -> Iterator[tuple[tuple[str, ...], float]]:
    """Yield the paths of each setting that is a number, and its value.

    What two workloads have alike is one setting: turned in one of them alone, their ratio would
    compare requests that are not alike.
    """
    numbers = dict(_numbers(lab, pair))
    names = list(dict.fromkeys(f"workloads.{point.workload.name}." for point in pair))
    for path, base in numbers.items():
        alike = [
            other + path.removeprefix(own)
            for own in names
            if path.startswith(own)
            for other in names
            if numbers.get(other + path.removeprefix(own)) == base
        ]
        if not alike or alike[0] == path:
            yield tuple(alike) or (path,), base


def _numbers(lab: Lab, pair: Points) -> Iterator[tuple[str, float]]:
    """Yield each setting of the pair that is a number: its path and its value."""
    numbers: dict[str, float] = {}
    for point in pair:
        workload = point.workload.model_dump(exclude={"loads", "only"})
        numbers |= dict(_leaves(f"workloads.{point.workload.name}", workload))
        own = next(v for v in lab.variants if v.name == point.variant.name)
        numbers |= dict(_leaves(f"variants.{own.name}.flags", own.flags))
    numbers |= dict(_leaves("flags", lab.flags))
    yield from numbers.items()


def _leaves(path: str, plain: Any) -> Iterator[tuple[str, float]]:
    if isinstance(plain, Mapping):
        for name, value in plain.items():
            yield from _leaves(f"{path}.{name}", value)
    elif isinstance(plain, int | float) and not isinstance(plain, bool) and plain > 0:
        yield path, plain


def _values(path: str, base: float) -> list[float]:
    """The values to try, the lab's own among them."""
    if path.endswith("block-size"):
        return sorted({*BLOCK_SIZES, base})
    whole = isinstance(base, int)
    tried = {max(1, round(base * f)) if whole else base * f for f in FACTORS}
    return sorted({*tried, *([1, 2, 3] if whole and base <= 4 else [])})
