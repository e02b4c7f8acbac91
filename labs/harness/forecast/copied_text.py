"""What an engine would copy from the context: the model answers beforehand, and is looked up in."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from labs.harness.analysis.computed import Band
from labs.harness.forecast.forecaster import Forecaster
from labs.harness.forecast.step_timing import served_folder
from labs.harness.plan.progress import ProgressDisplay
from labs.harness.plan.resolve import Setup
from labs.harness.spec.lab import Point
from serving.engines.flags import FlagValue
from serving.engines.vllm_flags import VllmFlags
from serving.simulator.ngram_acceptance import Copied, CopyingPlan, Lookup, decoded

ANSWERS = 24  # of the model, at least, for each load of an engine that copies from the context
UNSAID_LOOKUP = 5  # tokens of an n-gram, where neither its least nor its most is given
DRAWS = 2000  # of trials
Copies = Mapping[str, Sequence[Sequence[Copied]]]
"""Point -> repeat -> what is copied in the answers to its first requests, where it is known."""


def read_answers(
    setup: Setup,
    points: Sequence[Point],
    requests: Mapping[str, Sequence[Path]],
    forecaster: Forecaster,
    progress: ProgressDisplay,
) -> Copies:
    """Let the model answer what is sent to engines that copy from the context, and look up there.

    Points whose lookups and requests agree share their answers. A point is left out where there is
    no model that writes a text, and where it does not answer here: what the lab assumes then holds.
    """
    if setup.datasheet or setup.model.dummy:
        return {}
    plans: dict[str, CopyingPlan] = {}
    for point in points:
        if lookup := lookup_of(point.variant.flags):
            files = tuple(requests[point.workload.name])
            plans[point.key] = CopyingPlan(
                model=served_folder(setup, point.variant),
                requests=files,
                answers=-(-ANSWERS // len(files)),
                lookup=lookup,
            )
    found = {}
    for plan in dict.fromkeys(plans.values()):
        progress.waiting("letting the model answer, to see what can be copied")
        found[plan] = forecaster.read_answers(plan).answers
    return {key: found[plan] for key, plan in plans.items() if found[plan]}


def lookup_of(flags: Mapping[str, FlagValue]) -> Lookup | None:
    """Say how an engine with these flags looks n-grams up; None where it does not.

    Source: `SpeculativeConfig` of vllm/config/speculative.py for what is left out.
    """
    config = VllmFlags(flags).speculative_config
    if config.get("method") != "ngram":
        return None
    least, most = config.get("prompt_lookup_min"), config.get("prompt_lookup_max")
    return Lookup(
        guesses=int(config["num_speculative_tokens"]),
        least=int(least or most or UNSAID_LOOKUP),
        most=int(most or least or UNSAID_LOOKUP),
    )


def share_copied(
    known: Sequence[Sequence[Copied]], requests: int, chance: random.Random
) -> Band | None:
    """Forecast the share of drafted tokens that is accepted in a trial of so many requests.

    The guesses in one answer are right or wrong together, and answers to prompts that share a
    prefix are too. So the band is not that of independent draws: it holds 98% of trials whose
    answers are drawn from the known ones of one repeat. None where these have nothing to copy.
    """
    repeats = [[decoded(copied) for copied in repeat] for repeat in known]

    def share(drawn: Sequence[tuple[int, int]]) -> float | None:
        drafted = sum(guesses for guesses, _ in drawn)
        return sum(accepted for _, accepted in drawn) / drafted if drafted else None

    value = share([answer for repeat in repeats for answer in repeat])
    if value is None:
        return None
    draws = (share(chance.choices(chance.choice(repeats), k=requests)) for _ in range(DRAWS))
    low, high = np.percentile([drawn for drawn in draws if drawn is not None] or [value], (1, 99))
    return Band(value=value, low=min(value, float(low)), high=max(value, float(high)))
