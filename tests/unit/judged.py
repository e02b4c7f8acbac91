"""Runs of a lab whose figures are given, for tests of what is computed and told of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from labs.harness.analysis.computed import Summary
from labs.harness.analysis.evaluation import Evaluation, Passage, ScoredCompletion
from labs.harness.analysis.verdicts import Caveat, Effect, Interval, Judgement
from labs.harness.derived.lab_modules import parts_of, plain
from labs.harness.derived.run_view import Context, JudgedRun
from labs.harness.reports.rendering import Told, told
from labs.harness.spec.lab import Lab
from labs.harness.spec.page import read
from labs.harness.storage.recorded import TrialResult, snapshot_json
from labs.harness.storage.results import RunFolder
from labs.harness.storage.writing import write_json
from loadtests import records
from loadtests.records import RequestRecord
from serving.metrics import Snapshot
from tests.unit.builders import CEILINGS, PREDICTION, SHAPE, make_summary, plain_manifest

Values = Mapping[str, float | Sequence[float] | None]
ABOUT = {"adapters": {"params_per_adapter": 100, "rank": 8}}


def context(
    home: Path,
    lab: Lab,
    values: Mapping[str, Values],
    *,
    halved: Sequence[str] = (),
    about: Mapping[str, Any] | None = None,
) -> Context:
    """A run of a lab; `values[point][metric]` over its repeats, all alike where one is given."""
    run = plain_manifest().model_copy(update={"about": dict(about or {})})
    weights = {name: replace(SHAPE, weight_bytes=1000) for name in halved}
    points = lab.points(SHAPE, CEILINGS, weights, about)
    assert values.keys() <= {p.key for p in points}
    measured = {
        key: {
            r: {m: v if v is None or isinstance(v, float | int) else v[r - 1]
                for m, v in of.items()}
            for r in range(1, lab.repeats + 1)
        }
        for key, of in values.items()
    }  # fmt: skip
    return Context(RunFolder(home / "run"), run, lab, points, measured)


def played(
    found: Context,
    key: str,
    trial: Sequence[RequestRecord] = (),
    engine: Snapshot | None = None,
) -> None:
    """The same trial in every repeat of a point, on disk."""
    point = next(p for p in found.points if p.key == key)
    for repeat in range(1, found.lab.repeats + 1):
        home = found.folder.trial_folder(point, repeat)
        records.write(home / "requests.jsonl.gz", trial)
        counted = None if engine is None else snapshot_json(engine)
        result = TrialResult(point=key, repeat=repeat, summary=make_summary(), engine=counted)
        write_json(home / "trial.json", result)


def withheld(found: Context, point: str, metrics: tuple[str, ...] = ()) -> Context:
    """The run with a caveat that blocks verdicts at a point."""
    caveat = Caveat(name="errors", text="", blocks=True, point=point, metrics=metrics)
    return replace(found, caveats=[caveat])


def judged(claim: str, value: float, **fields: Any) -> Judgement:
    ratio = Interval(value=value, low=value / 1.1, high=value * 1.1, n=3)
    plain: dict[str, Any] = {
        "claim": claim, "title": claim, "metric": "ttft_mean_s", "treatment": "", "baseline": "",
        "outcome": "helps", "expected": True, "prediction": PREDICTION,
        "prediction_outcome": "held", "margin": 0.05,
        "effect": Effect(ratio=ratio, spread=0.01), "why": "",
    }  # fmt: skip
    return Judgement(**{**plain, **fields})


def judged_run(context: Context, judgements: Sequence[Judgement] = ()) -> JudgedRun:
    values = context.values.items()
    return JudgedRun.of(context, Summary(
        measurements={k: {r: dict(row) for r, row in of.items()} for k, of in values},
        pooled={},
        judgements=list(judgements), forecasts=[], caveats=[], failed={}, missing=0,
    ))  # fmt: skip


def with_facts(run: JudgedRun, name: str = "") -> JudgedRun:
    """The run with the facts of its lab, or of that name's, as they stand in a summary on file."""
    compute = parts_of(name or run.lab.name).facts
    facts = plain(name or run.lab.name, compute(run)) if compute else {}
    return replace(run, summary=run.summary.model_copy(update={"facts": facts}))


def told_of(run: JudgedRun) -> Told:
    """What the lab's page says of the run."""
    return told(run.run, run.lab, with_facts(run).summary)


def answered(probability: float, right: int) -> dict[str, Any]:
    """An evaluation: each token of two passages had this probability; so many of 100 were right."""
    known = {1: math.log(probability), 2: math.log(1 - probability)}
    passage = Passage(token_ids=(1,) * 50, known=(known,) * 50)
    replies = tuple(
        ScoredCompletion(question=str(i), expected="7", answer="", correct=i < right,
              length_tokens=256 * (1 + i % 2), depth=0.5)
        for i in range(100)
    )  # fmt: skip
    tasks = tuple(r.model_copy(update={"length_tokens": None, "depth": None}) for r in replies)
    found = Evaluation(model="m", passages=(passage,) * 2, needles=replies, tasks=tasks, took_s=1)
    return found.model_dump(mode="json")


def page_says(monkeypatch: pytest.MonkeyPatch, parts: str) -> None:
    """Every lab has a page with these parts, such as `## Answers` and `### SO-4` with its text."""
    page = read(f"# Tiny\n\nWhat?\n\n{parts}")
    monkeypatch.setattr("labs.harness.reports.rendering.page_of", lambda lab: page)
