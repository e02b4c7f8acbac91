"""A lab on a real vLLM, as a reader runs it, for the cpu and gpu tiers."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import pytest
import requests

from dashboards import boards
from dashboards.prometheus import Prometheus
from labs import LABS
from labs.harness.forecast.request_counts import ENGINE_METRICS
from labs.harness.plan.chat_writer import writer_of
from labs.harness.plan.resolve import absent_engines, require_compiler
from labs.harness.reports.rendering import NOTHING, told_by
from labs.harness.spec.lab import Lab, NotApplicable
from labs.harness.spec.overrides import parse_changes
from labs.harness.storage.recorded import MachineFile, Run
from labs.harness.storage.results import RunFolder
from labs.harness.storage.writing import write_json
from loadtests import plan
from serving.engines import ENGINES
from serving.engines.base import EngineError
from serving.hardware import machine
from serving.models import catalog
from serving.models.catalog import ROOT
from tests import queries, with_vllm
from tests.fake.conftest import CEILINGS
from tests.shallow import shallow
from tests.sizes import sizes_of, with_every_part
from tests.startup import sitecustomize

AS_READERS_DO = "labs.harness.cli"  # what the target in the Makefile runs
FRONT_DOOR = "continuous-batching"  # the lab of the README's first command
AS_VLLM_DOES = "diagnosis"  # two engines beside each other, each with a worker of its own
BESIDE = ("agent-sessions", "serving-engines")  # so that both files of labs take about as long
RUNS = "*/*/*/run.json"
BRIEF = "warmup_s=0.5 window_s=2 repeats=1 most_repeats=0"
MOST_SERIES = 5000  # of one run in Prometheus


def quick_run(
    lab: str,
    results: Path,
    settings: str = "",
    *,
    weights: str = "",
    model: str = "",
    command: str = AS_READERS_DO,
    copies: int = 1,
) -> RunFolder:
    """`labs run LAB` with QUICK=1 and these settings; the run it left among the results.

    The README's lab, on a trained model, is run by processes that start as a reader's do, the
    others' as `tests/startup` says; one of them has vLLM's default processes, as a reader's have.
    """
    before = set(results.glob(RUNS))
    words = [command, "run", lab]
    as_a_reader = lab == FRONT_DOOR and command == AS_READERS_DO and not weights
    if command == AS_READERS_DO:
        argv = [sys.executable, "-m", *words]
    else:
        with_vllm.start()
        argv = with_vllm.argv_of(*words)
    done = subprocess.run(
        argv,
        cwd=ROOT,
        env={
            **os.environ,
            **({"PYTHONPATH": ""} if as_a_reader else {}),
            **({sitecustomize.WORKER_APART: "1"} if lab == AS_VLLM_DOES else {}),
            "LABS_QUICK": "1",
            "LABS_DISTURBED": "keep",  # other tests run meanwhile
            "LABS_SET": settings + f" flags.data-parallel-size={copies}" * (copies > 1),
            "LABS_MODEL": model,
            "LABS_WEIGHTS": weights,
            "LABS_RESULTS": str(results),
        },
        capture_output=True,
        text=True,
    )
    print(done.stdout, done.stderr)
    assert done.returncode == 0, done.stderr
    (run,) = set(results.glob(RUNS)) - before
    return RunFolder(run.parent)


def with_ceilings(results: Path) -> Path:
    """The same folder of results, with ceilings of this machine in it: measuring takes 15 s."""
    here = machine.detect()
    given = MachineFile(machine=here, ceilings=CEILINGS)
    write_json(results / here.slug / "machine.json", given)
    return results


def derived_for(lab: str) -> list[str]:
    """Name the models that a lab derives in its sizes for a CPU; none where no test runs it.

    Those of a shape with random weights are configurations, which take an instant.
    """
    if sizes_of(lab).not_real or LABS[lab].shape:
        return []
    return in_sizes_for_a_cpu(lab).derived()


def in_sizes_for_a_cpu(lab: str) -> Lab:
    """The lab as a test runs it on a CPU, but for its windows."""
    changes = parse_changes(f"{with_every_part(lab)} {sizes_of(lab).real} {sizes_of(lab).cpu}")
    return LABS[lab].at(catalog.scale_of(machine.cpu()), quick=True, changes=changes)


def runs_beside(lab: str) -> bool:
    """Whether a lab is run in `test_derived.py`: where it derives a model, and where else it says.

    A file in another format takes seconds to make.
    """
    return lab in BESIDE or bool({*derived_for(lab)} - {"gguf"})


def require_something_to_compare(lab: Lab, model: str) -> None:
    """Raise NotApplicable where this CPU lacks what the lab compares."""
    absent_engines(lab, machine.cpu(), catalog.resolve(machine.cpu(), model))


def served(layers: int | None) -> str:
    """Name the model of so many layers, as MODEL= does."""
    return "" if layers is None else str(shallow(layers))


def lab_on_a_cpu(lab: str, results: Path, command: str = "tests.small") -> None:
    """Runs a lab in its sizes for a CPU; checks the run, and the dashboards that followed it.

    The README's lab serves the bundled model, and so do those whose text matters; the others serve
    a few of its layers (`tests/shallow.py`). All but the README's are run by `command`.
    Skips where no test runs it, and where it needs a compiler that is not here or what this CPU has
    no instructions for.
    """
    sizes = sizes_of(lab)
    if sizes.not_real:
        pytest.skip(sizes.not_real)
    model = served(sizes.layers)
    try:
        require_compiler(LABS[lab], machine.detect())
        require_something_to_compare(in_sizes_for_a_cpu(lab), model)
    except (EngineError, NotApplicable) as error:
        pytest.skip(str(error))
    settings = f"{BRIEF} {with_every_part(lab)} {sizes.real} {sizes.cpu}"
    command = AS_READERS_DO if lab == FRONT_DOOR else command
    folder = quick_run(lab, results, settings, model=model, command=command)
    check_run(folder, makes_sense=sizes.layers is None)
    check_forecasts(folder)
    check_prompts(folder, catalog.resolve(machine.detect(), model))
    check_dashboards(folder)


def check_run(folder: RunFolder, makes_sense: bool = True) -> None:
    """What must hold of any finished run on a real engine.

    How much of a text that makes no sense a draft guesses rightly nobody can predict: it differs
    from one kind of CPU to another.
    """
    run, summary, session = folder.run(), folder.summary(), folder.session()
    lab, points = run.rebuilt_lab(), run.points()
    assert folder.complete
    assert not summary.failed
    assert not summary.missing
    assert session
    for found in session.agreement:
        assert found.records > 0
        assert found.engine == (found.records if all_count(lab, found.what) else None)
        assert found.prometheus in (found.records, None)
        assert found.prometheus is not None or session.prometheus
    trials = [trial for _, _, trial in folder.trials(points, lab)]
    assert len(trials) == sum(map(lab.repeats_of, points))
    for trial in trials:
        assert trial
        shown = ENGINES[trial.point.variant.engine].shown_metrics()
        assert bool(trial.engine) == bool(shown)
        if trial.engine:
            assert {*trial.engine.values, *trial.engine.histograms} >= shown
        lengths = trial.point.lengths[(trial.repeat - 1) * lab.requests :]
        assert not trial.failed
        for record in trial.records:
            if record.turned_away:
                continue
            assert record.output_tokens == record.asked_tokens
            assert sum(tokens for _, tokens in record.chunks) == record.output_tokens
            assert (record.prompt_tokens, record.asked_tokens) == lengths[record.index]
            assert (record.text is not None) == trial.point.workload.keep_text
        assert bool(trial.intruders) == (trial.point.workload.intruder is not None)
    guesses = "of the drafted tokens were accepted"
    blocking = [c for c in summary.caveats if c.blocks and (makes_sense or guesses not in c.text)]
    if any(c.name == "other processes" for c in blocking):
        # a token that was sent before a piece of a prompt may then arrive in it
        blocking = [c for c in blocking if "its pieces" not in c.text]
    assert not [c for c in blocking if c.name in ("treatment not applied", "token counts differ")]
    # in what they count: whether they agree on times depends on what else the machine does
    disagreeing = [c for c in blocking if c.name == "client and engine disagree"]
    assert not [c for c in disagreeing if "the engine counts" in c.text]
    for probe in lab.probes:
        asked = {v.name for v in lab.variants if folder.probe_result(probe, v.name)}
        assert asked == set(lab.probed or [v.name for v in lab.variants])
    forecasts = folder.predictions().in_virtual_time
    assert forecasts, "the forecaster has failed"
    assert forecasts.trial_s.keys() == forecasts.points.keys()
    assert min(forecasts.trial_s.values()) > lab.warmup_s
    report = (folder.path / "report.md").read_text()
    for finding in told_by(folder).findings:
        assert finding.title in report
        assert finding.text != NOTHING, finding.name
        # four rounds of a quick run may take an accident for a leak by timing
        assert finding.passed is not False or finding.name == "timing-leak", finding
    judged = {j.claim for j in summary.judgements}  # a smaller run may lack a claim's points
    assert judged
    assert all(claim.title in report for claim in lab.claims if claim.name in judged)
    assert (folder.path / "report.html").exists()
    assert all((folder.path / f"{name}.svg").exists() for name in ("effects", *lab.plots))


def check_forecasts(folder: RunFolder) -> None:
    """The forecast of every load beside the engine that then ran: what both count, and no time.

    With a draft model the engine has fewer blocks than the scheduler by itself: it leaves room for
    the draft's keys and values.
    """
    points, summary = folder.run().points(), folder.summary()
    forecasts = folder.predictions().in_virtual_time
    assert forecasts
    without = {p.key for p in points if p.variant.name in forecasts.without}
    assert forecasts.points.keys() == {p.key for p in points} - without
    measured = {(f.point, f.metric): f for f in summary.in_virtual_time if f.measured}
    for point in (p for p in points if p.key not in without):
        capacity = measured[point.key, "kv_capacity_tokens"]
        assert capacity.measured
        if not point.flags.speculative_config.get("model"):
            assert capacity.measured.value == capacity.value, point.key
        hits = measured.get((point.key, "prefix_hit_rate"))
        if hits and hits.measured and not point.flags.enable_prefix_caching:
            assert (hits.value, hits.measured.value) == (0, 0), point.key


def check_prompts(folder: RunFolder, model: catalog.Model) -> None:
    """The forecaster's prompts have as many tokens as the engine counted."""
    lab, points = folder.run().rebuilt_lab(), folder.run().points()
    writer, first = writer_of(model), {p.workload.name: p for p in reversed(points)}
    for workload in lab.workloads:
        (request,) = workload.requests(1, lab.draw_seed(1), writer)
        point = first[workload.name]
        result = folder.trial_result(point, 1)
        assert result
        trial = folder.trial(point, result, lab)
        assert trial
        counted = {r.prompt_tokens for r in trial.records if r.index == 0 and not r.turned_away}
        messages = plan.body(request, model.name)["messages"]
        assert counted <= {len(writer.tokens(messages))}
        assert counted or trial.turned_away


def all_count(lab: Lab, what: str) -> bool:
    """Whether every engine of the lab counts these: where one does not, their sum is unknown."""
    return all(ENGINE_METRICS[what] in ENGINES[v.engine].shown_metrics() for v in lab.variants)


def may_be_empty(run: Run) -> dict[str, bool | None]:
    """Panel -> whether it has something to show of this run (None: that is left to chance)."""
    lab = run.rebuilt_lab()
    has = {
        "speculation": any("speculative-config" in lab.flags_of(v) for v in lab.variants),
        "adapters": any(w.adapters and w.adapters.count for w in lab.workloads),
        "a GPU": run.machine.kind == "gpu",
        "an open loop": any(load.open_loop for w in lab.workloads for load in w.loads),
        "forecasts": bool(lab.forecasts),
        "a second repeat": lab.repeats > 1,
    }
    return {panel: has.get(needed) for panel, needed in boards.NEEDS.items()}


def check_dashboards(folder: RunFolder) -> None:
    """Each query of each panel, asked of the Prometheus that has just followed the run.

    A panel is empty only where the lab or the machine lacks what it is about.
    """
    run, lab = folder.run(), folder.run().rebuilt_lab()
    known = (p for p in run.points() if folder.summary().value(p.key, "mbu") is not None)
    shown = next(known, run.points()[0])
    values = {
        "lab": lab.name, "run": folder.path.name, "__rate_interval": "6s",
        "at_workload": shown.workload.name, "at_load": shown.load.name,
    }  # fmt: skip
    start = datetime.fromisoformat(run.started_at).timestamp()
    found: dict[tuple[str, str], int] = {}
    with Prometheus(folder.path / "logs" / "dashboards.log") as there:
        mine = {"match[]": f'{{run_id="{folder.path.name}"}}'}
        every = requests.get(f"{there.url}/api/v1/series", mine, timeout=10).json()["data"]
        series_of_run = len(every)
        for board, panel, query in queries.expressions(values):
            # a coarser step passes by a warm-up of a second
            asked = {"query": query, "start": start, "end": time.time(), "step": 1}
            url = f"{there.url}/api/v1/query_range"
            answer = requests.get(url, {k: str(v) for k, v in asked.items()}, timeout=10).json()
            assert answer["status"] == "success", (panel, query, answer)
            key = (board, panel)
            found[key] = found.get(key, 0) + len(answer["data"]["result"])
    expected = may_be_empty(run)
    of_points = folder.summary().pooled.values()
    for title, metric in (
        ("TTFT, p50", "ttft_p50_s"),  # brief windows hold too few requests
        ("E2E, p50", "e2e_p50_s"),
        ("TPOT, mean", "tpot_mean_s"),  # answers may be of one token
        ("MBU", "mbu"),
    ):
        if not any(metric in pooled for pooled in of_points):
            expected[title] = None
    if lab.warmup_s < 1:  # on a busy machine it may pass between two scrapes
        expected["Warm-up"] = None
    others = (trial.cpu_others or 0 for _, trial, _ in folder.trials(run.points(), lab))
    if max(others) > 0.6:  # so may all that only a trial shows, where hardly any time is left
        expected |= dict.fromkeys(("Load points", "Warm-up", "Event-loop lag"))
    wrong = {
        key: series
        for key, series in found.items()
        if (shows := expected.get(key[1], True)) is not None and bool(series) != shows
    }
    assert not wrong, wrong  # panel -> series found
    assert series_of_run < MOST_SERIES
