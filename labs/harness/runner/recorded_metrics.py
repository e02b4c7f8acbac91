"""Read what an engine counted between two times from a Prometheus that scraped it.

Prometheus is asked for the engine's series as they stood at both times, and their difference is
what happened between them. Nothing is sent to the engine.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from itertools import groupby
from typing import Any

import requests

from labs.harness.analysis.diagnosis import Reading
from labs.harness.runner.diagnosing import between
from labs.harness.spec.lab import LabError
from serving import metrics
from serving.engines import ENGINES
from serving.engines.endpoint import base_address
from serving.metrics import Snapshot
from serving.processes.answers import ask, why_unanswered

WITHIN_S, MOST_BYTES = 30.0, 64 * 2**20
MODEL_LABEL = "model_name"  # of vLLM's metrics
OWN_NAMES = {own: name for e in ENGINES.values() for own, name in e.metric_names.items()}
NAMES = sorted({*metrics.HISTOGRAMS, *metrics.COUNTERS, *metrics.GAUGES, *metrics.SPECULATION,
                *OWN_NAMES})  # fmt: skip
OF_TOKENS = (  # every engine's count of generated tokens, by its own name
    metrics.GENERATION_TOKENS,
    *(own for own, name in OWN_NAMES.items() if name == metrics.GENERATION_TOKENS),
)
OF_HISTOGRAM = re.compile(r"^(.+)_(bucket|sum|count)$")
Sample = tuple[Mapping[str, str], float]  # labels, the name among them, and the value


def moment(text: str, setting: str) -> datetime:
    """Parse a time as ISO 8601; without a zone it is this machine's. Raises LabError."""
    try:
        return datetime.fromisoformat(text).astimezone()
    except (ValueError, OverflowError, OSError) as error:
        raise LabError(
            f"{setting}={text} is no time: write it as 2026-11-28T10:15, or with a zone as"
            " 2026-11-28T10:15+00:00"
        ) from error


def read_between(url: str, start: datetime, end: datetime, model: str = "") -> tuple[str, Reading]:
    """Return the model's name and what was counted from `start` to `end`. Raises LabError.

    The counts of all engines that serve the model are added. Where an engine was started again in
    between, what it counted before is lost, which is an error.
    """
    if end <= start:
        raise LabError("TO= has to be later than FROM=")
    there = PrometheusAt(base_address("PROMETHEUS_URL", url))
    after = there.samples(_selector(model), end)
    models = sorted({labels[MODEL_LABEL] for labels, _ in after if MODEL_LABEL in labels})
    if not after:
        raise LabError(
            f"PROMETHEUS_URL has no series of an engine that the lab knows at TO={end:%FT%T%z}"
            + (f" with {MODEL_LABEL}={model}" if model else "")
            + ": give a time at which it scraped one"
        )
    if len(models) > 1:
        raise LabError(f"several models were served then: add MODEL=.., one of {', '.join(models)}")
    name = models[0] if models else "the model"
    before = there.samples(_selector(model), start)
    if not _engines(before) <= _engines(after) or there.restarts(model, start, end):
        raise LabError(
            "an engine was stopped, or started again, between FROM= and TO=, so that what it had"
            " counted is lost: give times between which none was"
        )
    try:
        readings = snapshot(before), snapshot(after)
    except ValueError as error:
        raise LabError(f"PROMETHEUS_URL has series that are no engine's: {error}") from error
    return name, Reading(between(*readings), (end - start).total_seconds())


def _engines(samples: Iterable[Sample]) -> set[frozenset[tuple[str, str]]]:
    """Tell engines apart by the labels of their count of generated tokens."""
    return {frozenset(labels.items()) for labels, _ in samples if labels["__name__"] in OF_TOKENS}


def snapshot(samples: Iterable[Sample]) -> Snapshot:
    """Make of samples what an engine's `/metrics` would have shown, added over all engines."""
    lines = []
    ordered = sorted(samples, key=lambda sample: _family(sample[0]["__name__"]))
    for family, of_family in groupby(ordered, lambda sample: _family(sample[0]["__name__"])):
        kind = "histogram" if family in metrics.HISTOGRAMS else "untyped"
        lines.append(f"# TYPE {family} {kind}")
        lines += [_line(labels, value) for labels, value in of_family]
    return metrics.parse("\n".join([*lines, ""]), OWN_NAMES)


def _family(name: str) -> str:
    match = OF_HISTOGRAM.match(name)
    return match[1] if match and match[1] in metrics.HISTOGRAMS else name


def _line(labels: Mapping[str, str], value: float) -> str:
    pairs = [f'{name}="{_escaped(text)}"' for name, text in labels.items() if name != "__name__"]
    return f"{labels['__name__']}{{{','.join(pairs)}}} {value!r}"


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _selector(model: str, names: Sequence[str] = NAMES) -> str:
    of_model = f',{MODEL_LABEL}="{_escaped(model)}"' if model else ""
    return f'{{__name__=~"({"|".join(names)})(_bucket|_sum|_count)?"{of_model}}}'


class PrometheusAt:
    """A Prometheus at an address, asked for what it recorded."""

    def __init__(self, url: str) -> None:
        self.url = url

    def samples(self, selector: str, at: datetime) -> list[Sample]:
        """Return the newest sample of each series that was there at a time. Raises LabError."""
        return [
            (each["metric"], float(each["value"][1]))
            for each in self._query(selector, at)
            if "__name__" in each["metric"]
        ]

    def restarts(self, model: str, start: datetime, end: datetime) -> float:
        """Count how often an engine's counters began anew between two times. Raises LabError."""
        seconds = max(1, round((end - start).total_seconds()))
        selector = _selector(model, OF_TOKENS)
        answer = self._query(f"sum(resets({selector}[{seconds}s]))", end)
        return float(answer[0]["value"][1]) if answer else 0.0

    def _query(self, expression: str, at: datetime) -> list[Any]:
        form = {"query": expression, "time": f"{at.timestamp():.3f}"}
        url = f"{self.url}/api/v1/query"
        try:
            answer = ask(
                "POST", url, within_s=WITHIN_S, most_bytes=MOST_BYTES, headers={}, data=form
            )
            if not answer.ok:
                raise ValueError(f"HTTP {answer.status}: {answer.text[:120]!r}")
            result = answer.json()["data"]["result"]
            for each in result:
                float(each["value"][1]), {**each["metric"]}
        except requests.RequestException as error:
            raise LabError(
                f"PROMETHEUS_URL={self.url} does not answer ({why_unanswered(error)}): start that"
                " Prometheus first, or correct the address"
            ) from error
        except (ArithmeticError, ValueError, LookupError, TypeError) as error:
            raise LabError(
                f"PROMETHEUS_URL does not answer as Prometheus does ({type(error).__name__}:"
                f" {error}): give its address, as http://127.0.0.1:9090"
            ) from error
        return list(result)
