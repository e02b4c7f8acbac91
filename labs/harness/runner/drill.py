"""Bring about causes of worse latency on real engines, one after another, for a reader to name.

The points are the lab's own, played by what plays its trials: first the healthy reference, then, on
an engine that is started for it, a point at which something may be wrong. Variants and workloads
are called by names that tell nothing, in Prometheus too. Nothing is filed.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from labs import LABS
from labs.harness.analysis.diagnosis import LEAST_REQUESTS, Reading
from labs.harness.derived.lab_modules import BlindTrial, Injections, parts_of
from labs.harness.plan.progress import ProgressDisplay
from labs.harness.plan.resolve import RunRequest
from labs.harness.runner.harness import Harness
from labs.harness.runner.run import unfiled
from labs.harness.runner.trials import write_requests
from labs.harness.spec.lab import NOTHING_ELSE, Lab
from serving import metrics
from serving.engines.base import EngineError

REFERENCE = "healthy"  # its points' names in a drill
Place = tuple[str, str]  # a variant and a workload


def drilled_lab() -> Lab:
    """Return the lab that says what it makes go wrong."""
    return next(lab for lab in LABS.values() if parts_of(lab.name).injections)


def injections() -> Injections:
    """Return what that lab can make go wrong."""
    found = parts_of(drilled_lab().name).injections
    assert found
    return found


def causes(lab: Lab) -> dict[Place, str]:
    """Return what can be wrong with a lab as it is on this machine, by the place of each cause."""
    variants, workloads = {v.name for v in lab.variants}, {w.name: w.only for w in lab.workloads}
    return {
        (variant, workload): cause
        for (variant, workload), cause in injections().causes.items()
        if variant in variants and variant in (workloads.get(workload, ()) or variants)
        if workload in workloads
    }


def disguised(lab: Lab, places: Mapping[str, Place]) -> Lab:
    """Keep these places of a lab and the reference alone, each under the name that it is given."""
    variants = {v.name: v for v in lab.variants}
    workloads = {w.name: w for w in lab.workloads}
    named = {REFERENCE: injections().reference, **places}
    return lab.model_copy(update={
        "variants": tuple(
            variants[variant].model_copy(update={"name": name})
            for name, (variant, _) in named.items()
        ),
        "workloads": tuple(
            workloads[workload].model_copy(update={"name": name, "only": (name,)})
            for name, (_, workload) in named.items()
        ),
        "claims": (), "evidence": (), "scales": {}, "quick": {}, **NOTHING_ELSE,
    })  # fmt: skip


@dataclass(frozen=True)
class Drill:
    """Engines that are ready for a reader, by the names of the rounds."""

    harness: Harness
    healthy: Reading
    causes: Mapping[str, str]  # a round -> what is wrong

    @property
    def page_url(self) -> str:
        """The address of the live page; empty without a Prometheus."""
        return self.harness.prometheus.page_url

    def readings(self, name: str) -> Iterator[Reading]:
        """Keep a round's engine under load; yield what it has counted so far after each trial.

        Raises EngineError where it does not start, or dies.
        """
        return readings(self.harness, name)

    def blind(self, name: str, now: Reading) -> BlindTrial:
        """Put what a round's engine has counted beside its cause."""
        cause = self.causes[name]
        return BlindTrial(cause, now, self.healthy, injections().foretold[cause])


@contextlib.contextmanager
def drilling(
    request: RunRequest, places: Sequence[Place], progress: ProgressDisplay
) -> Iterator[Drill]:
    """Play the reference of the request's lab, and be ready for a round at each of these places.

    The lab is one in its sizes. No engine is left when the block ends. Raises what a run raises.
    """
    rounds = {f"round-{number}": place for number, place in enumerate(places, 1)}
    known = {name: injections().causes[place] for name, place in rounds.items()}
    request = replace(request, lab=disguised(request.lab, rounds), changes={})
    with unfiled(request, progress) as harness:
        *_, healthy = itertools.islice(readings(harness, REFERENCE), request.lab.repeats)
        yield Drill(harness, healthy, known)


def readings(harness: Harness, name: str) -> Iterator[Reading]:
    """Play trials of a point without end, on one engine; yield what they have counted together."""
    setup, counted = harness.setup, list[metrics.Snapshot]()
    point = next(p for p in setup.points if p.variant.name == name)
    alone = replace(setup, lab=setup.lab.model_copy(update={"workloads": (point.workload,)}))
    harness.engines.load([point.variant])
    for repeat in itertools.count(1):
        write_requests(alone, harness.trials.work, harness.progress, [repeat])
        harness.trials.play(point, repeat)
        result = harness.folder.trial_result(point, repeat)
        trial = result and harness.folder.trial(point, result, setup.lab)
        if not trial or not trial.engine:
            failed = result.failed if result else None
            raise EngineError(failed or f"the engine of {name} shows no metrics to diagnose")
        counted.append(trial.engine)
        reading = Reading(metrics.together(counted))
        if reading.requests >= LEAST_REQUESTS:
            yield reading
