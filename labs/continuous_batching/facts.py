"""Conclude what a step consists of, where the ridge lies, and what client and server count.

Its answers read the sweep over concurrency and the run's claims.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dashboards.palette import BLUE, BOUND
from labs.harness import theory
from labs.harness.facts.context import Context, JudgedRun
from labs.harness.facts.drawing import GREY, PLAYED, legend_of_all, plt, thinned
from labs.harness.facts.parts import Conclusion, Headline, ReportParts
from labs.harness.facts.published import ONE_STREAM, Published, PublishedFigures
from labs.harness.facts.steps import (
    Parts,
    alike,
    counted_in_turn,
    decode_s,
    draw_parts,
    header,
    parts_mean,
    prefill_s,
    stand_in,
)
from labs.harness.facts.sweep import concurrency_sweep, step_line
from labs.harness.filing.results import Agreement, Finding
from labs.harness.judging.metrics import METRICS
from labs.harness.judging.text import between, number, ratio_number
from labs.harness.spec import Point
from loadtests import records

# ------------------------------------------------------------------------- what a step is made of

WHAT_A_STEP_IS = "What is a step made of?"


@dataclass(frozen=True)
class StepAtLoad:
    """Splits the time of an output token at a load; None of them where it was not measured."""

    users: int
    batch: float  # requests in decode, mean
    parts: Parts


def steps_at_loads(context: Context) -> tuple[StepAtLoad, ...]:
    """Splits TPOT at each load of the sweep, with the stand-in step where it was timed.

    A step reads the weights once, and the keys and values of the requests in decode; it computes
    their tokens and, spread over the steps, the prefills of others that come between two tokens.
    """
    steps = []
    for point in concurrency_sweep(context.points):
        tpot_s, size = (context.mean(point, metric) for metric in ("tpot_mean_s", "batch"))
        if not tpot_s or not size:
            continue
        shape, ceilings, at = point.shape, point.ceilings, point.context_tokens
        moved_bytes = theory.decode_bytes(shape, size, at, point.flags.kv_value_bytes)
        prefills = (point.load.users - 1) / point.output_tokens
        flop = theory.decode_flops(shape, size, at)
        flop += prefills * theory.prefill_flops(shape, point.prompt_tokens)
        times, prompt = stand_in(context, point), point.prompt_tokens
        parts = Parts(
            measured_s=tpot_s,
            reading_s=moved_bytes / ceilings.memory_bandwidth_bytes_per_s,
            computing_s=flop / ceilings.flops_per_s,
            stand_in_s=(
                decode_s(times, size, at) + prefills * prefill_s(times, prompt, size, at)
                if times
                else None
            ),
        )
        steps.append(StepAtLoad(point.load.users, size, parts))
    return tuple(steps)


def tell_steps(facts: tuple[StepAtLoad, ...]) -> Finding:
    parts = alike(s.parts for s in facts)
    rows = [["In flight", "Requests in decode", "TPOT, mean", *header(parts)]]
    rows += [
        [str(s.users), number(s.batch), number(s.parts.measured_s, "s"), *own.cells()]
        for s, own in zip(facts, parts, strict=True)
    ]
    ends = dict.fromkeys((*facts[:1], *facts[-1:]))
    lines = [s.parts.sentence(f"At {s.users} in flight an output token") for s in ends]
    lines.append(
        f"{parts_mean(parts)} Weights are read once a step; computing counts the tokens of the"
        " requests in decode, and the prefills of others that come between two tokens."
        f" {counted_in_turn(parts)}"
    )
    return Finding(title=WHAT_A_STEP_IS, rows=rows, lines=lines)


def draw_steps(facts: tuple[StepAtLoad, ...]) -> str | None:
    """Draws what an output token's time goes to at each load of the sweep."""
    if not facts:
        return None
    figure, ax = plt.subplots(figsize=(6.5, 3.6))
    draw_parts(ax, {str(s.users): s.parts for s in facts})
    ax.set_xlabel("requests in flight")
    ax.set_ylabel("TPOT, mean (ms)")
    figure.legend(loc="outside right upper", frameon=False)
    return (
        "What the time of an output token goes to at each load. The report explains the parts under"
        f' "{WHAT_A_STEP_IS}"'
    )


STEPS = Conclusion("steps", steps_at_loads, tell_steps, draw_steps)

# ------------------------------------------------------------------------------------ the answers


def static_batches(run: JudgedRun) -> str | None:
    varied, equal = run.ratio("static"), run.ratio("static-fixed")
    if not varied:
        return None
    (judgement, *_) = run.judged("static")
    return (
        f"Where lengths vary, filling free places at once gave {varied} the throughput of fixed"
        f" batches, which wait for the longest completion (predicted:"
        f" {ratio_number(judgement.prediction.value)}x)."
        + (f" With equal lengths: {equal}." if equal else "")
    )


def larger_batch(run: JudgedRun) -> str | None:
    rate, tpot = run.ratio("throughput"), run.ratio("tpot")
    line = step_line(run.points, run.summary)
    if not (rate and tpot and line):
        return None
    users = [p.load.users for p in concurrency_sweep(run.points)]
    fixed_s, slope_s = line
    grows = (
        f"it takes {1000 * fixed_s:.3g} ms, and {1000 * slope_s:.3g} ms more for each request in"
        " decode (least squares over the loads), so that throughput has a limit of"
        f" {number(1 / slope_s, 'tok/s')}, half of which is reached near {fixed_s / slope_s:.0f} in"
        " flight"
        if slope_s > 0
        else "in this range its time did not grow with the batch"
    )
    return (
        f"A step serves all requests and reads the weights once for them: {grows}. With {users[-1]}"
        f" in flight instead of {users[0]}, throughput is {rate} and TPOT {tpot}."
    )


def ridge(run: JudgedRun) -> str | None:
    """Says on which side of the roofline's ridge the lightest and the heaviest load stand.

    The ridge is about the work alone; what the time goes to is said beside it.
    """
    sweep = concurrency_sweep(run.points)
    intensities = [(p.load.users, i) for p in sweep if (i := run.mean(p, "intensity"))]
    if len(intensities) < 2:
        return None
    (few, low), (many, high) = intensities[0], intensities[-1]
    at = sweep[0].ceilings.ridge_flops_per_byte
    batch = theory.ridge_batch(sweep[0].shape, sweep[0].ceilings)
    first, last = ("memory bandwidth" if i < at else "arithmetic" for i in (low, high))
    side = f"{first} is the nearer ceiling of " + (
        "both" if first == last else f"the first, {last} of the last"
    )
    by_work = (
        f"FLOP for each byte read: {low:.3g} at {few} in flight, {high:.3g} at {many}. This"
        f" machine's ridge is {at:,.3g}, a batch of about {batch:,.0f}: by the work alone, {side}."
    )
    return " ".join([by_work, *_time_sentences(run.once(steps_at_loads))])


def _time_sentences(steps: tuple[StepAtLoad, ...]) -> list[str]:
    """Say what the time goes to at the heaviest load, and what limits a step at both ends."""
    if len(steps) < 2:
        return []
    first, *_, last = steps
    limits = (
        f"{first.parts.limit} a step at {first.users} in flight or at {last.users}"
        if first.parts.limit == last.parts.limit
        else f"{first.parts.limit} a step at {first.users} in flight, and"
        f" {last.parts.limit} one at {last.users}"
    )
    return [
        last.parts.sentence(f"At {last.users} in flight an output token"),
        parts_mean(s.parts for s in steps),
        f"By the measured times, {limits}.",
    ]


def one_stream(run: JudgedRun) -> str | None:
    """Says what share one stream reached of its bound, the bandwidth over the weights' bytes."""
    point = next((p for p in concurrency_sweep(run.points) if p.load.users == 1), None)
    tpot_s = run.mean(point, "tpot_mean_s") if point else None
    if point is None or tpot_s is None:
        return None
    bandwidth = point.ceilings.memory_bandwidth_bytes_per_s
    most_per_s = bandwidth / point.shape.step_bytes(1)
    steps = run.once(steps_at_loads)
    alone = [s.parts for s in steps if s.users == 1]
    made_of = [alone[0].sentence("A step")] if alone else []
    if alone and not _time_sentences(steps):  # else the answer before has said it
        made_of.append(parts_mean(alone))
    measured = (
        f"{bandwidth / 1e9:,.1f} GB/s over {point.shape.step_bytes(1) / 1e6:,.0f} MB of weights is"
        f" at most {number(most_per_s, 'tok/s')}. Measured: {number(1 / tpot_s, 'tok/s')} (1 /"
        f" TPOT), {1 / tpot_s / most_per_s:.0%} of it."
    )
    return " ".join([measured, *made_of])


def both_ends(run: JudgedRun) -> str | None:
    """Gives the figures at the heaviest load, and whether client and server agree on them."""
    heaviest = concurrency_sweep(run.points)[-1:]
    longer_s = [
        client_s - engine_s
        for p in run.points
        if (client_s := run.mean(p, "client_ttft_mean_s")) is not None
        and (engine_s := run.mean(p, "engine_ttft_mean_s")) is not None
    ]
    session = run.folder.session()
    if not heaviest or not longer_s or not session:
        return None
    (point,) = heaviest
    ttft, itl, e2e, throughput = (
        number(run.summary.value(point.key, metric), METRICS[metric].unit)
        for metric in ("ttft_p50_s", "itl_p50_s", "e2e_p50_s", "output_tokens_per_s")
    )
    figures = f"TTFT {ttft}, ITL {itl}, end to end {e2e} (medians) and {throughput}"
    return (
        f"At {point.load.users} in flight: {figures}. {_agreement(session.agreement)}; the client's"
        f" mean TTFT is longer by {between(min(longer_s), max(longer_s), 's')}."
    )


def _agreement(counts: Sequence[Agreement]) -> str:
    """Say whether client and server count the same, of what the server counts at all."""
    known = [a for a in counts if a.engine is not None]
    if not known:
        return "The server's counts are not known, so none were compared"
    differ = [a.what for a in known if len({a.records, a.engine, a.prometheus} - {None}) > 1]
    if differ:
        return f"Client and server do not agree on {', '.join(differ)}"
    what = " and ".join(a.what.removeprefix("output ") for a in known)
    return f"Client and server count the same {what}"


# -------------------------------------------------------------------------------------- its plots


def draw_static(run: JudgedRun) -> str | None:
    """Draws requests being decoded over time, fixed batches above continuous ones."""
    chosen = waves_beside_continuous(run.points)
    if not chosen:
        return None
    figure, axes = plt.subplots(
        2, len(chosen), figsize=(9, 3.6), sharex=True, sharey=True, squeeze=False
    )
    forecast = any(point.key in run.played for pair in chosen for point in pair)
    for column, pair in enumerate(chosen):
        for row, (point, colour) in enumerate(zip(pair, (BOUND, BLUE), strict=True)):
            ax = axes[row][column]
            path = run.folder.trial_folder(point, 1) / "requests.jsonl.gz"
            if not path.exists():
                continue
            spans = [(r.chunks[0][0], r.chunks[-1][0]) for r in records.read(path) if r.chunks]
            times, in_decode = _in_decode(spans)
            kind = "fixed batches" if row == 0 else "continuous"
            label = f"{kind}, measured"
            ax.step(times, in_decode, where="post", color=colour, lw=1, label=label)
            ax.fill_between(times, in_decode, step="post", color=colour, alpha=0.2)
            if played := run.played.get(point.key):
                times, in_decode = _in_decode(played.decoding_s)
                ax.step(times, in_decode, where="post", color=GREY, lw=1, label="forecast")
            tokens_per_s = run.mean(point, "output_tokens_per_s")
            rate = f", {tokens_per_s:.0f} tok/s" if tokens_per_s else ""
            ax.set_title(f"{point.workload.name} lengths, {kind} ({point.load}){rate}", fontsize=9)
            if column == 0:
                ax.set_ylabel("in decode")
    for ax in axes[1]:
        ax.set_xlabel("time in the first repeat (s)")
        ax.set_xlim(0, run.lab.warmup_s + run.lab.window_s)
    if forecast:
        legend_of_all(figure, axes.flat)
    return (
        "Requests in decode over time. With varying lengths a fixed batch runs empty while its"
        " longest completion is finished; continuous batching keeps the places filled."
        + PLAYED
        * forecast
    )


def waves_beside_continuous(points: Sequence[Point]) -> list[tuple[Point, Point]]:
    """Pairs each load in waves with the closed loop of as many users."""
    return [
        (wave, same)
        for wave in points
        if wave.load.kind == "waves"
        for same in points
        if same.load.kind == "concurrent"
        and same.load.users == wave.load.users
        and (same.variant, same.workload) == (wave.variant, wave.workload)
    ]


def _in_decode(spans: Iterable[tuple[float, float]]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Counts the requests that are decoded, from each of these times to the next."""
    both_ends = ([(a, 1), (b, -1)] for a, b in spans)
    edges = sorted(chain.from_iterable(both_ends))
    times = np.array([0.0, *(t for t, _ in edges)])
    return thinned(times, np.cumsum([0, *(d for _, d in edges)]))


# ------------------------------------------------------------------- what others published

PUBLISHED: PublishedFigures = {
    "claims": {
        "static": (
            Published(
                figure="36.9x",
                setting="against FasterTransformer, GPT-3 175B",
                source="Orca, OSDI 2022",
            ),
            Published(
                figure="8x",
                setting="continuous against naive batching, 23x with vLLM",
                source="Anyscale",
            ),
            Published(
                figure="14 to 24x",
                setting="vLLM against Hugging Face, 2.2 to 2.5x against TGI",
                source="vLLM",
            ),
            Published(figure="2 to 4x", source="PagedAttention, SOSP 2023"),
        ),
    },
    "forecasts": {
        "throughput": (
            *ONE_STREAM,
            Published(
                figure="28,312 tok/s",
                setting="8B in FP8 on one H100, 128 tokens in and 128 out, 15,220 at 1K in and"
                " 1K out",
                source="TensorRT-LLM documentation",
            ),
            Published(
                figure="5,777 tok/s",
                setting="vLLM, offline, 8B in FP8 on one H100",
                source="MLPerf v5.1",
            ),
        ),
    },
}

PARTS = ReportParts(
    conclusions=(STEPS,),
    answers={
        "SO-1": static_batches,
        "SD-1": larger_batch,
        "IP-3": ridge,
        "IP-7": one_stream,
        "ME-1": both_ends,
    },
    plots={"static": draw_static},
    over_time=lambda points: [*chain.from_iterable(waves_beside_continuous(points))],
    published=PUBLISHED,
    headline=Headline(
        claim="static",
        done="Filling a free place in the batch at once, instead of waiting for the whole batch",
        figure="the throughput",
    ),
)
