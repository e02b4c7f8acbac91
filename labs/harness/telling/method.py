"""Say how a run was made: machine, software, engines, order of the trials, and command."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from labs.harness.filing.results import Residency, Run, Session, Summary
from labs.harness.judging.idle_neighbours import times_as_long
from labs.harness.judging.judge import (
    CONFIDENCE,
    ENOUGH_STARTS,
    START_SPREAD,
    TWO_ONE_SIDED,
    Judgement,
)
from labs.harness.judging.text import ONE_SITTING, ceilings_text, counted
from labs.harness.spec import Lab
from labs.harness.telling.document import Code, Inline
from serving.engines.vllm import SHARE_FLAG
from serving.hardware.machine import VLLM
from serving.weights.dummy import SUFFIX

CLOCKS_DIFFER_S = 5.0  # of a session's length and of its begin and end, in whole seconds


def lines(
    run: Run,
    lab: Lab,
    session: Session | None,
    summary: Summary,
    residency: Residency | None = None,
) -> list[Inline]:
    """Say everything that a reader needs to make the run again."""
    env = run.environment
    first = ", where it went first" if session and session.client_first else ""
    return [
        f"Machine: {run.machine.describe()}; {ceilings_text(run.ceilings)}.",
        f"Model: {run.model}, {run.model_shape['params'] / 1e6:,.0f} M parameters"
        f"{', served in float32' if run.in_float32 else ''}.",
        _software(run),
        *(
            ("Engine ", Code(name), ": ", Code(" ".join(a for a in argv if a)))
            for name, argv in run.argv.items()
        ),
        f"Engine threads ran on CPU cores {list(env.engine_cores)}, the load generator on"
        f" {list(env.client_cores)}{first}.",
        f"{repeats(lab, summary)}. Each repeat plays {_points(lab)} once, in random order (seed"
        f" {lab.seed}),"
        " and sends the same requests to all variants.",
        *(_sitting(run, lab, session) if session else ()),
        *([_shared(residency)] if residency else ()),
        _command(run, lab),
    ]


def _points(lab: Lab) -> str:
    if not 0 < lab.curve_repeats < lab.repeats:
        return "every point"
    return f"every point (after {lab.curve_repeats}, only those that a claim compares)"


def repeats(lab: Lab, summary: Summary) -> str:
    """Say how often each point was measured, and how often it could have been."""
    played = {len(of_point) for of_point in summary.measurements.values()} or {0}
    least, most = min(played), max(played)
    repeat_text = f"{least} to {most} repeats" if most > least else counted(most, "repeat")
    if lab.looks == 1:
        return repeat_text
    return (
        f"{repeat_text} (undecided claims get up to {lab.rounds}, where these can begin within"
        f" {lab.most_s:g} s)"
    )


def covers(lab: Lab, session: Session | None, judgements: Sequence[Judgement]) -> str:
    """Say what the intervals of the claims cover, and what they do not."""
    parts = [ONE_SITTING]
    starts = [j.effect.starts for j in judgements if j.effect and j.effect.starts is not None]
    if starts and min(starts) < ENOUGH_STARTS:
        only = counted(min(starts), "time")
        parts.append(
            f"The engines took turns, and one was started only {only}. Fewer than"
            f" {ENOUGH_STARTS} starts do not show how much two starts differ, so intervals between"
            f" engines are widened by {START_SPREAD:.1%} a start, as measured on one CPU."
        )
    elif starts:
        parts.append(
            f"The engines took turns, and each was started at least {min(starts)} times. Between"
            " engines the mean of a start is the unit, so the difference between starts is covered."
        )
    elif session and session.resident and len(lab.variants) > 1:
        parts.append("Each engine was started once: differences between starts are not covered.")
    if pairs := sum(j.effect is not None and j.effect.paired for j in judgements):
        parts.append(
            f"In {counted(pairs, 'claim')} the requests of both sides took turns: they are"
            " compared in pairs, request by request, by Student's interval in the place of Welch's."
        )
    looks = max((j.effect.looks for j in judgements if j.effect), default=lab.looks)
    if looks < lab.looks:
        parts.append(
            "After these repeats no time was left for more, whatever the figures said, so the lab"
            " judged its claims once."
        )
    if looks > 1:
        level, held = (1 - (1 - share) / looks for share in (CONFIDENCE, TWO_ONE_SIDED))
        parts.append(
            "The lab may judge its claims twice. So that both looks together keep to the stated"
            f" confidence, an interval of {CONFIDENCE:.0%} is taken at {level:.1%}, and one of"
            f" {TWO_ONE_SIDED:.0%} at {held:.0%}."
        )
    return " ".join(parts)


def _software(run: Run) -> str:
    env = run.environment
    named = (*VLLM, "torch", "locust")
    packages = ", ".join(f"{k} {env.packages[k]}" for k in named if k in env.packages)
    driver = f", driver {env.driver}" if env.driver else ""
    return f"Software: Python {env.python}, {packages}, kernel {env.kernel}{driver}."


def was_resumed(run: Run, session: Session) -> bool:
    """Tell whether a run began before its last session, whose times alone are on file.

    False where the file does not say when that session ended, as in older runs.
    """
    if session.ended_at is None:
        return False
    began, ended = (datetime.fromisoformat(at) for at in (run.started_at, session.ended_at))
    return (ended - began).total_seconds() > session.wall_s + CLOCKS_DIFFER_S


def _sitting(run: Run, lab: Lab, session: Session) -> list[str]:
    """Say how the engines shared the machine, where the time went, and what recording lacked."""
    overhead_s = session.wall_s - session.engine_start_s - session.load_s
    back = ", back and forth" if session.there_and_back else ""
    suspended = ", suspended while others were measured" if session.idle_suspended else ""
    resident = f"stayed loaded together{suspended}"
    together = resident if session.resident else f"were started in turn{back}"
    which, earlier = "Time", ""
    if was_resumed(run, session):
        which = "Time of the last session"
        earlier = " The run was begun in an earlier one, whose times are not on file."
    result = [
        f"Engines {together}." if len(lab.variants) > 1 else "One engine served every trial.",
        f"{which}: {session.wall_s:.0f} s in all, {session.engine_start_s:.0f} s starting"
        f" engines, {session.load_s:.0f} s under load, {overhead_s:.0f} s"
        f" ({overhead_s / session.wall_s:.0%}) for everything else.{earlier}",
    ]
    if session.prometheus:
        result.append(f"{session.prometheus}; the records are complete without it.")
    return result


def _shared(residency: Residency) -> str:
    """Say how engines shared a GPU, and what those that were idle changed; or why they did not."""
    if residency.in_turn:
        return f"The engines were to share the GPU, and took turns: {residency.in_turn}."
    shares = ", ".join(f"{name} {share:g}" for name, share in residency.shares.items())
    said = f"Shares of the GPU's memory ({SHARE_FLAG}): {shares}."
    if not (residency.alone and residency.beside):
        return said
    ratios = times_as_long(residency.alone, residency.beside)
    took = ", and its ".join(f"{part} {ratio:.2f} times" for part, ratio in ratios.items())
    return (
        f"{said} With all engines loaded and idle, the reference step's {took} as long as before"
        " they were started."
    )


def _command(run: Run, lab: Lab) -> Inline:
    """Say which command makes the same run, and on which commit."""
    command = f"make lab-{lab.name}{' QUICK=1' if run.quick else ''}{' AA=1' if run.aa else ''}"
    if run.dummy:
        command += f" WEIGHTS=dummy MODEL={run.model.removesuffix(SUFFIX)}"
    if run.changes:
        settings = " ".join(f"{k}={v}" for k, v in run.changes.items())
        command += f" SET='{settings}'"
    env = run.environment
    commit = (env.git_commit or "unknown")[:12] + (
        " with uncommitted changes" if env.git_dirty else ""
    )
    origin = f"Run {run.run_id}, started {run.started_at}, commit {commit}: "
    return (origin, Code(command), ".")
