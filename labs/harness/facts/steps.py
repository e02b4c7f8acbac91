"""Split the time of a forward pass into reading, computing, overhead and the engine's own part.

On the roofline a pass that reads slowly is bound by memory bandwidth, however long the engine takes
beside it. The parts say how much of the measured time either ceiling explains, how much more the
stand-in step took that was timed before the engine started, and how much the engine added to that.
Where no stand-in step was timed, the last two are one: the rest.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from matplotlib.axes import Axes

from dashboards.palette import BLUE, BOUND, ORANGE
from labs.harness.facts.context import Context
from labs.harness.facts.drawing import GREY
from labs.harness.spec import Point
from serving.forecasting.step import Piece, Step, StepTimes

CEILINGS_MEAN = (
    "Reading is the time to read weights, keys and values at the measured bandwidth, computing the"
    " time at the measured rate."
)
REST_MEANS = (
    " The rest is launching operations, scheduling, sampling, and what reading and computing fall"
    " short of those ceilings."
)
SPLIT_MEANS = (
    " Overhead is what the stand-in step, timed before the engine started, took beyond both:"
    " launching operations, and what reading and computing fall short of those ceilings. The"
    " engine's own part is what its step took beyond the stand-in step: scheduling, sampling,"
    " serving, and what the machine's speed changed in between; it is negative where the engine's"
    " step was the shorter one."
)
BOTH_MEAN = " Where no stand-in step was timed, these two are told as one, the rest."


@dataclass(frozen=True)
class Parts:
    """Splits the measured time of a pass; the parts add up to it.

    Reading and computing are counted one after the other. Where the device does both at once, what
    comes after is longer, by the shorter of the two at most; a negative rest shows such an overlap.
    """

    measured_s: float
    reading_s: float  # the weights, keys and values, at the measured bandwidth
    computing_s: float  # at the measured rate of matrix products
    stand_in_s: float | None = None  # the pass as it was timed without an engine, where it was

    @property
    def rest_s(self) -> float:
        return self.measured_s - self.reading_s - self.computing_s

    @property
    def overhead_s(self) -> float:
        """What the stand-in took beyond reading and computing; 0 where they overlapped in it."""
        return max(0.0, (self.stand_in_s or 0.0) - self.reading_s - self.computing_s)

    @property
    def engine_s(self) -> float:
        """What the engine took beyond its stand-in."""
        return self.rest_s - self.overhead_s

    @property
    def limit(self) -> str:
        """Says what limits the pass: the part that takes more than half of its time, if any."""
        parts = {
            "memory bandwidth limits": self.reading_s,
            "arithmetic limits": self.computing_s,
            "neither ceiling limits": self.rest_s,
        }
        most = max(parts, key=parts.__getitem__)
        return most if parts[most] > self.measured_s / 2 else "no one part alone limits"

    def cells(self) -> tuple[str, ...]:
        """Writes each part as `9.4 ms (36%)`: three of them, or four where a stand-in was timed."""
        return tuple(f"{time} ({share}%)" for time, share in zip(*self._written()[1:], strict=True))

    def sentence(self, what: str) -> str:
        """Says what the pass is made of, in numbers that add up as they are printed."""
        reading, computing, *others = self.cells()
        parts = f"{what} takes {self._written()[0]}: {reading} reading, {computing} computing"
        if self.stand_in_s is None:
            (rest,) = others
            if self.rest_s < 0:
                return f"{parts}, of which {rest.replace('-', '')} overlap."
            return f"{parts}, {rest} the rest."
        overhead, engine = others
        overhead += " overhead beyond both ceilings"
        if self.engine_s < 0:
            less = engine.replace("-", "")
            return f"{parts}, {overhead}, less {less} by which the engine was faster."
        return f"{parts}, {overhead}, {engine} the engine's own."

    def _written(self) -> tuple[str, list[str], list[int]]:
        """Rounds the total, the parts and their percentages, so that both lists add up."""
        unit, scale = ("ms", 1000) if self.measured_s < 0.9995 else ("s", 1)
        digits = max(0, 2 - math.floor(math.log10(scale * self.measured_s)))
        total = round(scale * self.measured_s, digits)
        known_s = [self.reading_s, self.computing_s]
        known_s += [] if self.stand_in_s is None else [self.overhead_s]
        known = [round(scale * s, digits) for s in known_s]
        times = [*known, round(total - sum(known), digits) + 0.0]  # never a negative zero
        shares = [round(100 * s / self.measured_s) for s in known_s]
        return (
            f"{total:.{digits}f} {unit}",
            [f"{time:.{digits}f} {unit}" for time in times],
            [*shares, 100 - sum(shares)],
        )


def alike(passes: Iterable[Parts]) -> list[Parts]:
    """Returns passes for one table: all with their stand-ins, or none where one has none."""
    parts = list(passes)
    if all(p.stand_in_s is not None for p in parts):
        return parts
    return [Parts(p.measured_s, p.reading_s, p.computing_s) for p in parts]


def header(passes: Collection[Parts]) -> list[str]:
    """Names the columns of the cells of passes that are alike."""
    split = any(p.stand_in_s is not None for p in passes)
    return ["Reading", "Computing", *(["Overhead", "The engine's own"] if split else ["The rest"])]


def parts_mean(passes: Iterable[Parts]) -> str:
    """Says what the parts of these passes are."""
    split = {p.stand_in_s is not None for p in passes}
    if True not in split:
        return CEILINGS_MEAN + REST_MEANS
    return CEILINGS_MEAN + SPLIT_MEANS + BOTH_MEAN * (False in split)


def counted_in_turn(passes: Iterable[Parts]) -> str:
    """Says what becomes of the parts where the device reads and computes at once."""
    longer = "overhead" if any(p.stand_in_s is not None for p in passes) else "the rest"
    return (
        "Reading and computing are counted one after the other. Where the device does both at"
        f" once, {longer} is longer, by at most the shorter of the two."
    )


def stand_in(context: Context, point: Point) -> StepTimes | None:
    """Returns how long this point's step was timed to take before its engine started.

    None where it was not forecast, and where several steps were timed: whose is not on file.
    """
    forecasts = context.predictions.in_virtual_time
    if not forecasts or point.key not in forecasts.points or len(forecasts.step_times) != 1:
        return None
    return StepTimes.model_validate(forecasts.step_times[0])


def decode_s(times: StepTimes, batch: float, context_tokens: float) -> float:
    """Computes the seconds of a stand-in step in which so many requests decode, on average.

    A mean over time may be below 1; a step that brings a token has at least one.
    """
    few, share = divmod(max(1.0, batch), 1)
    fewer_s, more_s = (
        times.seconds(Step([Piece(1, round(context_tokens))] * n, n))
        for n in (int(few), int(few) + 1)
    )
    return fewer_s + share * (more_s - fewer_s)


def prefill_s(
    times: StepTimes, prompt_tokens: float, beside: float = 0, context_tokens: float = 0
) -> float:
    """Computes the seconds that a prompt adds to a stand-in step in which others decode."""
    others = [Piece(1, round(context_tokens))] * round(beside)
    prompt = Piece(round(prompt_tokens), 0)
    with_prompt_s = times.seconds(Step([*others, prompt], len(others) + 1))
    return with_prompt_s - times.seconds(Step(others, len(others)))


def draw_parts(ax: Axes, passes: Mapping[str, Parts]) -> None:
    """Draws each of one or more passes as a bar of its parts in ms, with the measured total.

    Where the parts before the last are longer together than the pass, as where the device reads and
    computes at once, the total lies below the top of the bar.
    """
    x, foot = range(len(passes)), [0.0] * len(passes)
    split = [p.stand_in_s is not None for p in passes.values()]
    each = list(zip(split, passes.values(), strict=True))
    for name, colour, seconds in (
        ("reading", BLUE, [p.reading_s for p in passes.values()]),
        ("computing", BOUND, [p.computing_s for p in passes.values()]),
        ("overhead", ORANGE, [p.overhead_s if known else None for known, p in each]),
        ("the engine's own", GREY, [p.engine_s if known else None for known, p in each]),
        ("the rest", GREY, [None if known else p.rest_s for known, p in each]),
    ):
        if all(s is None for s in seconds):
            continue
        heights = [1000 * max(0.0, s or 0.0) for s in seconds]
        hatch = "//" if name == "the rest" and any(split) else None
        ax.bar(x, heights, 0.6, bottom=foot, color=colour, alpha=0.75, label=name, hatch=hatch)
        foot = [below + height for below, height in zip(foot, heights, strict=True)]
    measured = [1000 * p.measured_s for p in passes.values()]
    ax.plot(x, measured, "_", color="black", ms=30, mew=2, label="measured")
    for at, top in zip(x, measured, strict=True):
        text = f"{float(f'{top:.3g}'):,.4g}"
        ax.annotate(text, (at, top), xytext=(0, 3), textcoords="offset points", ha="center")
    ax.set_xticks(x, list(passes))
    ax.set_xlim(-0.6, max(1.6, len(passes) - 0.4))
    ax.set_ylim(0, 1.2 * max([*foot, *measured]))
    ax.grid(axis="x", visible=False)
