"""How the trials of a run came about: how often engines started, took turns, were looked at."""

from __future__ import annotations

from collections.abc import Sequence

from labs.harness.analysis.checks.expected import Expected
from labs.harness.analysis.checks.transport import is_one_stream
from labs.harness.analysis.validity import undisturbed_transport_s
from labs.harness.analysis.verdicts import Sampling
from labs.harness.spec.lab import Lab, Point
from labs.harness.spec.names import PointName
from labs.harness.storage.results import RunFolder


def starts_on_file(folder: RunFolder, points: Sequence[Point], lab: Lab) -> dict[str, int]:
    """Read the last start of each variant's engine that a trial was played on."""
    last: dict[str, int] = {}
    for result in folder.trial_results(points, lab):
        variant = PointName.parse(result.point).variant
        last[variant] = max(last.get(variant, 0), result.start or 0)
    return last


def played_s(folder: RunFolder, points: Sequence[Point], lab: Lab) -> float:
    """Return how long the trials on file took, in seconds, without engine starts.

    What was discarded of them is in it.
    """
    return sum(
        result.took_s + sum(attempt.took_s for attempt in result.discarded)
        for result in folder.trial_results(points, lab)
    )


def took_turns(folder: RunFolder, points: Sequence[Point], lab: Lab) -> bool | None:
    """Tell whether engines took turns in the trials that succeeded; None where none has."""
    starts = [r.start for r in folder.trial_results(points, lab) if r.failed is None]
    return any(start is not None for start in starts) if starts else None


def sampling_of(folder: RunFolder, points: Sequence[Point], lab: Lab) -> Sampling:
    """Read how the repeats came about: the looks, and which trials were played together.

    Where engines took turns, the starts are in it.
    """
    starts = dict[str, dict[int, int]]()
    beside = dict[str, dict[int, tuple[str, ...]]]()
    for result in folder.trial_results(points, lab):
        if result.beside:
            beside.setdefault(result.point, {})[result.repeat] = result.beside
        if result.start is not None:
            starts.setdefault(result.point, {})[result.repeat] = result.start
    undecided = folder.undecided()
    looks = 1 if undecided and undecided.once else lab.looks
    return Sampling(looks=looks, starts=starts, beside=beside)


def transports_s(
    folder: RunFolder, points: Sequence[Point], lab: Lab, expected: Expected
) -> dict[str, dict[tuple[str, int], float]]:
    """Measure how long transport takes in each undisturbed trial at one stream, by variant.

    Each is named by its point and repeat. Raises DamagedError.
    """
    found: dict[str, dict[tuple[str, int], float]] = {}
    for point, result, trial in folder.trials([*filter(is_one_stream, points)], lab):
        took_s = undisturbed_transport_s(trial, result.timed, expected) if trial else None
        if took_s is not None:
            found.setdefault(point.variant.name, {})[point.key, result.repeat] = took_s
        del trial  # before the next one is read
    return found
