"""A lab's baseline against itself, on fake engines or on a real one: how many false alarms."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from unittest.mock import patch

import scipy

from bench import BenchError, truth
from bench.clock import Clock
from bench.console import aim, console
from labs.harness.filing.results import MachineFile, RunFolder, write_json
from labs.harness.judging.judge import CONFIDENCE, Caveat, Judgement, judge
from labs.harness.judging.measure import influences
from labs.harness.judging.metrics import measure as figures_of
from labs.harness.judging.validity import caveats_of
from labs.harness.telling import instruments
from serving.hardware import gpus
from serving.hardware import machine as machines

LAB = "continuous-batching"
SET = (
    "warmup_s=0.1 window_s=0.4 repeats=3 most_repeats=0 requests=128"
    " workloads.exponential.output_tokens.mean_tokens=8"
    " workloads.exponential.output_tokens.max_tokens=16"
)
LAW = ("--step-s", ".01", "--step-per-seq-s", ".0001", "--prefill-per-token-s", "0")
# a step varies by a tenth, the machine's speed by 3% over seconds, two starts by half a percent
NOISE = ("--seed", "any", "--jitter", ".1", "--drift", ".03", "--start-spread", ".005")
NO_GPU = {gpus.VARIABLE: ""}  # where there is a GPU too, a fake engine's labs are a CPU's
LOOK_EVERY_S = 0.5
PAIRS_JUDGED = 5  # trials of each twin that one verdict rests on
TWINS = "warmup_s=0.5 window_s=2 requests=128 repeats={pairs} most_repeats=0"
TWINS_PAIR_S, TWINS_START_S = 36.0, 90.0  # three points of each twin; both engines and a forecast
CEILINGS = machines.Ceilings(
    memory_bandwidth_bytes_per_s=2e10,
    bf16_flops_per_s=1e12,
    threads=1,
    torch="none",
    measured_at="not measured: given by the bench",
)


def measure(clock: Clock, work: Path, runs: int) -> instruments.Alarms:
    """Run a lab's baseline against itself on fake engines, and count the false alarms.

    Raises BenchError where a run fails, or no claim of any run could be judged.
    """
    judgements: list[list[Judgement]] = []
    for i in range(runs):
        clock.tell(f"run {i + 1} of {runs}", i / runs)
        judgements.append(_on_a_fake_engine(work / str(i), seed=i).summary().judgements)
    alarms = alarms_of(judgements, LAB)
    _tell(alarms)
    return alarms


def measure_twins(clock: Clock, work: Path, pairs: int) -> instruments.Twins:
    """Run a lab's baseline against itself on two real engines side by side.

    Every five pairs of trials are judged by the rules of a lab, as a run of their own. Raises
    BenchError where the run fails, the engines cannot stay loaded together, or nothing could be
    judged.
    """

    def tell(trials: int) -> None:
        played = f"{trials} trials so far, of {pairs} pairs at each point"
        clock.tell(played, min(0.95, trials * TWINS_PAIR_S / 6 / (TWINS_PAIR_S * pairs)))

    run = _lab_run(work, {"SET": TWINS.format(pairs=pairs)}, tell)
    session = run.session()
    if session is None or not session.resident:
        raise BenchError("the twins cannot stay loaded together here, so they make no pairs")
    judgements = judged_in_blocks(run, PAIRS_JUDGED)
    twins = instruments.Twins(pairs=pairs, **vars(alarms_of(judgements, LAB)))
    _tell(twins)
    return twins


def judged_in_blocks(folder: RunFolder, repeats: int) -> list[list[Judgement]]:
    """Judge every so many repeats of a run by themselves; a rest that is shorter is left out."""
    run = folder.run()
    lab, points, predictions = run.rebuilt_lab(), run.points(), folder.predictions()
    expected, sampling = run.expected(predictions), folder.sampling(points, lab)
    moved: dict[str, dict[int, dict[str, dict[int, float]]]] = defaultdict(dict)
    values: dict[int, dict[str, dict[int, dict[str, float | None]]]] = defaultdict(dict)
    caveats: dict[int, list[Caveat]] = defaultdict(list)
    for point, result, trial in folder.trials(points, lab):
        block = (result.repeat - 1) // repeats
        if trial is not None:
            values[block].setdefault(point.key, {})[result.repeat] = figures_of(trial)
            caveats[block] += caveats_of(trial, expected)
            moved[point.key][result.repeat] = influences(trial)
    sampling = replace(sampling, influences=moved)
    return [
        [
            judge(
                claim,
                t.key,
                b.key,
                values[block],
                predictions.effects[claim.name][f"{t.key}|{b.key}"],
                caveats[block],
                sampling,
            )
            for claim in lab.claims
            for t, b in lab.pairs(claim, points)
        ]
        for block in range(lab.repeats // repeats)
    ]


def _tell(alarms: instruments.Alarms) -> None:
    console.print(
        f"False alarms: {alarms.alarms} of {alarms.judged} claims judged ({alarms.low:.1%} to"
        f" {alarms.high:.1%}, exact 95% interval), {alarms.not_judged} not judged; the ratio"
        f" varies by {alarms.spread:.1%} between repeats"
    )
    console.print(
        "[dim]Two claims of a run that use the same trial are not independent, so the interval is"
        " somewhat too narrow.[/]"
    )
    in_doubt = alarms.low <= 0.05 < alarms.rate
    doubt = "the interval includes the bound: try more --runs" if in_doubt else ""
    aim("false alarms", 100 * alarms.rate, 5.0, "% of the claims judged", doubt=doubt)


def _on_a_fake_engine(work: Path, seed: int) -> RunFolder:
    """Run the lab once against itself, on an engine whose speed varies. Raises BenchError."""
    with patch.dict(os.environ, NO_GPU):
        machine = machines.detect()
        write_json(
            work / "results" / machine.slug / "machine.json",
            MachineFile(machine=machine, ceilings=CEILINGS),  # measuring takes 15 s
        )
        command = shlex.join([sys.executable, "-m", truth.SERVER, *LAW, *NOISE])
        settings = {"SET": SET, "SEED": str(seed), "ENGINE_COMMAND": command}
        return _lab_run(work, settings, lambda trials: None)


def _lab_run(work: Path, settings: Mapping[str, str], tell: Callable[[int], None]) -> RunFolder:
    """Run the lab once against itself, with a results folder of its own. Raises BenchError.

    `tell` is told now and then how many trials have ended.
    """
    work.mkdir(parents=True, exist_ok=True)
    results, log = work / "results", work / "lab.log"
    own = {"AA": "1", "RESULTS": str(results), "PROMETHEUS_DATA": str(work / "prometheus")}
    env = {name: value for name, value in os.environ.items() if not name.startswith("LABS_")}
    env |= {f"LABS_{name}": value for name, value in (own | dict(settings)).items()}
    argv = [sys.executable, "-m", "labs.harness.commands.cli", "run", LAB]
    with (
        log.open("wb") as sink,
        subprocess.Popen(
            argv, env=env, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink
        ) as process,
    ):
        while process.poll() is None:
            tell(sum(1 for _ in results.glob("*/*/*/trials/*/*/*/*/trial.json")))
            time.sleep(LOOK_EVERY_S)
    if process.returncode:
        raise BenchError(f"the lab failed; its output:\n{log.read_text()}")
    (run,) = results.glob("*/*/*/run.json")
    return RunFolder(run.parent)


def alarms_of(runs: Sequence[Sequence[Judgement]], lab: str) -> instruments.Alarms:
    """Count false alarms: in a lab against itself, any claim that is judged to help or hurt.

    Raises BenchError where no claim could be judged.
    """
    judgements = [j for run in runs for j in run]
    judged = [j for j in judgements if j.outcome != "not valid"]
    if not judged:
        why = Counter(j.why for j in judgements).most_common(1)
        reason = f" ({why[0][0]})" if why else ""
        raise BenchError(f"no claim could be judged{reason}: this machine is too busy")
    alarms = sum(j.outcome in ("helps", "hurts") for j in judged)
    exact = scipy.stats.binomtest(alarms, len(judged)).proportion_ci(CONFIDENCE, method="exact")
    spreads = [j.effect.spread for j in judged if j.effect and j.effect.spread is not None]
    return instruments.Alarms(
        lab=lab,
        runs=len(runs),
        alarms=alarms,
        judged=len(judged),
        not_judged=len(judgements) - len(judged),
        low=exact.low,
        high=exact.high,
        spread=median(spreads),
    )
