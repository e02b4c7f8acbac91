"""What each lab will take on a GPU, minute by minute, before anything has run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from labs import LABS
from labs.harness.plan.derived_models import NEED_NO_WEIGHTS
from labs.harness.plan.time_budget import MOST_AGAIN, PER_TRIAL_S, PREPARATION_S, START_S
from labs.harness.spec.lab import Lab, LabError
from serving.models.dummy import DERIVED

TOKENS_PER_S = 2e6
"""Of prompts that one core of a CPU writes, word by word (`loadtests/pieces.py`). Measured:
0.3 ms for a prompt of 128 tokens, 1.2 ms for 2,048 and 5 ms for 8,000. It takes less where long
prompts share most of their text, and more with a tokenizer that is not asked for words."""
REQUEST_TOKENS = 250  # that are written in the time that each request takes beside its prompt


@dataclass(frozen=True)
class Planned:
    """A lab's engines and trials, and when it will have ended, in seconds after the first one.

    Engines start one after another. The latest is where every trial of every lab is disturbed, and
    played as often as it may be.
    """

    lab: str
    starts: int
    trials: int
    load_s: float
    takes_s: float
    ends_s: float
    latest_s: float


def writing_s(lab: Lab) -> float:
    """Estimate how long one core writes what a lab sends in its own repeats, in seconds."""
    tokens = 0
    for workload in lab.workloads:
        for repeat in range(1, lab.repeats + 1):
            lengths = workload.lengths(lab.requests_of(workload), lab.draw_seed(repeat))
            tokens += sum(prompt + REQUEST_TOKENS for prompt, _ in lengths[:: workload.copies])
    return tokens / TOKENS_PER_S


def plan(names: Iterable[str], scale: str, start_s: float) -> Iterator[Planned]:
    """Plan quick runs on random weights; a lab that does not apply is left out.

    The first engine compiles, and takes as long as the clock of a call assumes at first.
    """
    ends_s, latest_s, first = 0.0, 0.0, True
    for name in names:
        try:
            lab = LABS[name].at(scale, quick=True, dummy=True)
        except LabError:
            continue
        if not {*lab.derived()} <= {*DERIVED, *NEED_NO_WEIGHTS}:  # it needs real weights
            continue
        trials = load_s = 0.0
        for variant in lab.variants:
            for workload in lab.workloads:
                if not workload.only or variant.name in workload.only:
                    count = len(workload.loads) * lab.repeats
                    trials += count
                    load_s += count * (lab.warmup_of(workload) + lab.window_s)
        starts = len(lab.variants) * (lab.starts if len(lab.variants) > 1 else 1)
        played_s = load_s + trials * PER_TRIAL_S
        takes_s = PREPARATION_S["gpu"] + writing_s(lab) + starts * start_s + played_s
        takes_s += (START_S["gpu"] - start_s) * first
        first = False
        ends_s += takes_s
        latest_s += takes_s + MOST_AGAIN * played_s
        yield Planned(name, starts, int(trials), load_s, takes_s, ends_s, latest_s)


def table(planned: Iterable[Planned]) -> str:
    lines = ["lab                     starts  trials  load   takes    ends at    latest"]
    for p in planned:
        lines.append(
            f"{p.lab:<24}{p.starts:>6}{p.trials:>8}{p.load_s:>5.0f} s{p.takes_s:>6.0f} s"
            f"{p.ends_s / 60:>7.1f} min{p.latest_s / 60:>6.1f} min"
        )
    return "\n".join(lines)
