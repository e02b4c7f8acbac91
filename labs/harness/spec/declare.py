"""Say in one line each what a lab asks: its variants, workloads, claims, forecasts and evidence.

A variant, a workload and a load are named as reports name them (`on`, `share-90`, `concurrent:4`);
one that is left empty may be any. What a claim compares is written as its ratio is: `on / off` is
the treatment over the baseline, of variants, workloads or loads, and what stands alone both share.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial, wraps
from typing import Any, Literal, ParamSpec

from labs.harness.spec.lab import (
    MARGIN,
    Arm,
    Claim,
    Evidence,
    Forecast,
    PredictEffect,
    Prediction,
    PredictPoint,
    Variant,
)
from loadtests.arrivals import AnyArrival, Concurrent
from loadtests.workload import Exponential, Fixed, Workload
from serving.engines.flags import FlagValue

ANY = ""  # variant, workload or load
OVER = " / "  # between what a claim's treatment has and what its baseline has
Load = str | AnyArrival
Points = ParamSpec("Points")


def variants(flag: str, **values: FlagValue) -> tuple[Variant, ...]:
    """Make variants that differ in one flag, by their names: `off, on = variants(..., off=..)`.

    An underscore in a name stands for a hyphen.
    """
    return tuple(
        Variant(name=name.replace("_", "-"), flags={flag: value}) for name, value in values.items()
    )


def users(*counts: int) -> tuple[Concurrent, ...]:
    """Make closed loops of so many users each."""
    return tuple(Concurrent(users=count) for count in counts)


def sends(
    name: str,
    prompt_tokens: int | Exponential,
    output_tokens: int | Exponential,
    *loads: AnyArrival,
    **more: Any,
) -> Workload:
    """Make a workload of prompts and outputs of these lengths; `more` are its other fields."""
    prompts, outputs = (
        Fixed(tokens=tokens) if isinstance(tokens, int) else tokens
        for tokens in (prompt_tokens, output_tokens)
    )
    return Workload(name=name, prompt_tokens=prompts, output_tokens=outputs, loads=loads, **more)


def arm(variant: str = "", workload: str = "", load: Load = "") -> Arm:
    """Select points; a load without a level, such as `concurrent`, is any of its kind."""
    text = str(load)
    kind = text if ":" not in text else ""
    return Arm(
        variant=variant or None,
        workload=workload or None,
        load=text if text != kind else None,
        kind=kind or None,
    )


def claim(
    expect: Literal["rises", "falls", "unchanged"],
    name: str,
    metric: str,
    variant: str = "",
    workload: str = "",
    load: Load = "",
    *,
    by: PredictEffect,
    coupled: str = "",
    margin: float = MARGIN,
) -> Claim:
    """Claim what becomes of a metric; `by` predicts its ratio."""
    sides = [str(part).split(OVER) for part in (variant, workload, load)]
    return Claim(
        name=name,
        metric=metric,
        treatment=arm(*(side[0] for side in sides)),
        baseline=arm(*(side[-1] for side in sides)),
        expect=expect,
        predict=by,
        coupled=coupled,
        margin=margin,
    )


rises = partial(claim, "rises")
falls = partial(claim, "falls")
unchanged = partial(claim, "unchanged")


def forecast(
    name: str,
    metric: str,
    by: PredictPoint,
    variant: str = "",
    workload: str = "",
    load: Load = "",
) -> Forecast:
    """Forecast a metric at every point of an arm."""
    return Forecast(name=name, metric=metric, arm=arm(variant, workload, load), predict=by)


def counter(
    metric: str,
    moves: Literal["rises", "stays", "absent", "pieces"],
    variant: str = "",
    workload: str = "",
    load: Load = "",
) -> Evidence:
    """Ask for what an engine's counter must do in a trial (`Evidence`)."""
    return Evidence(arm=arm(variant, workload, load), kind=moves, metric=metric)


def echoes(metric: str, label: str, values: Mapping[str, str]) -> tuple[Evidence, ...]:
    """Ask for what a label of an info metric must say, by variant.

    `--flag` stands for the variant's own value of that flag (`Evidence`).
    """
    return tuple(
        Evidence(arm=arm(variant), kind="echoes", metric=metric, label=label, value=value)
        for variant, value in values.items()
    )


def predicts(
    formula: str,
    *assumptions: str,
    source: str = "",
    kind: Literal["point", "ceiling", "floor"] = "point",
) -> Callable[[Callable[Points, float]], Callable[Points, Prediction]]:
    """Make a prediction of what a function computes, written down with what it rests on."""

    def predicting(compute: Callable[Points, float]) -> Callable[Points, Prediction]:
        @wraps(compute)  # a resolved lab has its name
        def predict(*points: Points.args, **more: Points.kwargs) -> Prediction:
            return Prediction(
                value=compute(*points, **more),
                kind=kind,
                formula=formula,
                assumptions=assumptions,
                source=source,
            )

        return predict

    return predicting
