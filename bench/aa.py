"""A lab's baseline against itself, on fake engines: how many false alarms."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from unittest.mock import patch

import scipy

from bench import BenchError, truth
from bench.console import aim, console, tell
from labs.harness.filing.recorded import MachineFile
from labs.harness.filing.results import RunFolder
from labs.harness.filing.writing import write_json
from labs.harness.judging.judge import CONFIDENCE, Judgement
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
RUNS = 20
CEILINGS = machines.Ceilings(
    memory_bandwidth_bytes_per_s=2e10,
    bf16_flops_per_s=1e12,
    threads=1,
    torch="none",
    measured_at="not measured: given by the bench",
)


def measure(work: Path) -> instruments.Alarms:
    """Run a lab's baseline against itself on fake engines, and count the false alarms.

    Raises BenchError where a run fails, or no claim of any run could be judged.
    """
    judgements: list[list[Judgement]] = []
    for i in range(RUNS):
        tell(f"aa: run {i + 1} of {RUNS}")
        judgements.append(run_lab(work / str(i), seed=i).summary().judgements)
    alarms = alarms_of(judgements, LAB)
    show(alarms)
    return alarms


def show(alarms: instruments.Alarms) -> None:
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
    doubt = "the interval includes the bound" if in_doubt else ""
    aim("false alarms", 100 * alarms.rate, 5.0, "% of the claims judged", doubt=doubt)


def run_lab(work: Path, seed: int) -> RunFolder:
    """Run the lab once against itself, on a fake engine whose speed varies.

    It has a results folder of its own. Raises BenchError.
    """
    with patch.dict(os.environ, NO_GPU):
        machine = machines.detect()
    results, log = work / "results", work / "lab.log"
    write_json(
        results / machine.slug / "machine.json",
        MachineFile(machine=machine, ceilings=CEILINGS),  # measuring takes 15 s
    )
    settings = {
        "AA": "1",
        "RESULTS": str(results),
        "PROMETHEUS_DATA": str(work / "prometheus"),
        "SET": SET,
        "SEED": str(seed),
        "ENGINE_COMMAND": shlex.join([sys.executable, "-m", truth.SERVER, *LAW, *NOISE]),
    }
    env = {name: value for name, value in os.environ.items() if not name.startswith("LABS_")}
    env |= {f"LABS_{name}": value for name, value in settings.items()} | NO_GPU
    argv = [sys.executable, "-m", "labs.harness.commands.cli", "run", LAB]
    with log.open("wb") as sink:
        done = subprocess.run(argv, env=env, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink)
    if done.returncode:
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
