"""What each lab will take on a GPU, minute by minute, before anything has run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from labs import LABS
from labs.harness.running.clock import PREPARATION_S, START_S
from labs.harness.running.derived_models import NEED_NO_WEIGHTS
from labs.harness.running.prompt_files import lab_takes_s
from labs.harness.running.trials import MOST_AGAIN, PER_TRIAL_S
from labs.harness.spec import LabError
from serving.weights.dummy import DERIVED


@dataclass(frozen=True)
class Planned:
    """A lab's engines and trials, and when it will have ended, in seconds after the first one.

    Engines are taken to start one after another; those that fit one GPU together start at once, and
    the lab ends sooner. The latest is where every trial of every lab is disturbed, and played as
    often as it may be.
    """

    lab: str
    starts: int
    trials: int
    load_s: float
    takes_s: float
    ends_s: float
    latest_s: float


def plan(names: Iterable[str], scale: str, start_s: float, cores: int = 1) -> Iterator[Planned]:
    """Plan quick runs on random weights; a lab that does not apply is left out.

    The first engine compiles, and takes as long as the clock of a call assumes at first. `cores`
    write the prompts.
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
        takes_s = PREPARATION_S["gpu"] + lab_takes_s(lab, cores) + starts * start_s + played_s
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
