"""Split the time of a forward pass into reading, computing, overhead and the engine's own part.

On the roofline a pass that reads slowly is bound by memory bandwidth, however long the engine takes
beside it. The parts say how much of the measured time either ceiling explains, how much more the
stand-in step took that was timed before the engine started, and how much the engine added to that.
Where no stand-in step was timed, the last two are known together alone: the rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from labs.harness.analysis.quantity import Quantity
from labs.harness.derived.run_view import Context
from labs.harness.spec import theory
from labs.harness.spec.lab import Point
from serving.hardware.machine import Ceilings
from serving.simulator.step import Piece, Step, StepTimes

Ceiling = Literal["bandwidth", "arithmetic"]
Limit = Literal["bandwidth", "arithmetic", "neither", "none"]


@dataclass(frozen=True)
class Parts:
    """The measured time of a pass, and parts that add up to it.

    Reading and computing are counted one after the other. Where the device does both at once, what
    comes after is longer, by the shorter of the two at most; a negative rest shows such an overlap.
    """

    measured_s: Quantity
    reading_s: Quantity  # the weights, keys and values, at the measured bandwidth
    computing_s: Quantity  # at the measured rate of matrix products
    rest_s: Quantity
    stand_in_s: Quantity  # the pass as it was timed without an engine, where it was
    overhead_s: Quantity  # of the rest, what the stand-in took beyond both; 0 if they overlapped
    engine_s: Quantity  # of the rest, what the engine took beyond its stand-in

    def share(self, part_s: Quantity) -> Quantity:
        return (part_s / self.measured_s).in_unit("share")

    @property
    def limit(self) -> Limit:
        """What limits the pass: the part that takes more than half of its time, if any."""
        parts: dict[Limit, Quantity] = {
            "bandwidth": self.reading_s, "arithmetic": self.computing_s, "neither": self.rest_s,
        }  # fmt: skip
        shares = {name: self.share(part_s).value or 0.0 for name, part_s in parts.items()}
        most = max(shares, key=shares.__getitem__)
        return most if shares[most] > 1 / 2 else "none"


def nearer_ceiling(ceilings: Ceilings, flop_per_byte: float) -> Ceiling:
    """Name the ceiling that work of this intensity would meet first, if the rest took no time."""
    return "arithmetic" if flop_per_byte > ceilings.ridge_flops_per_byte else "bandwidth"


def stand_in(run: Context, point: Point) -> StepTimes | None:
    """Returns how long this point's step was timed to take before its engine started.

    None where it was not forecast, and where several steps were timed: whose is not on file.
    """
    forecasts = run.predictions.in_virtual_time
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


@dataclass(frozen=True)
class Pass:
    """The work of a forward pass, which reads each byte once, and its stand-in's time."""

    moved_bytes: float
    flop: float
    stand_in_s: float | None
    ceilings: Ceilings

    @property
    def flop_per_byte(self) -> float:
        return self.flop / self.moved_bytes

    def split(self, measured_s: Quantity) -> Parts:
        """Splits the measured time of the pass."""
        reading_s = Quantity(self.moved_bytes / self.ceilings.memory_bandwidth_bytes_per_s, "s")
        computing_s = Quantity(self.flop / self.ceilings.flops_per_s, "s")
        rest_s = measured_s - reading_s - computing_s
        alone_s = overhead_s = Quantity.missing("no stand-in step was timed", "s")
        if self.stand_in_s is not None:
            alone_s = Quantity(self.stand_in_s, "s")
            beyond_s = alone_s - reading_s - computing_s
            overhead_s = Quantity(max(0.0, beyond_s.value or 0.0), "s")
        engine_s = rest_s - overhead_s
        return Parts(measured_s, reading_s, computing_s, rest_s, alone_s, overhead_s, engine_s)


def decode_step(run: Context, point: Point, batch: float, prefills: float = 0) -> Pass:
    """Computes a decode step, with so many prefills of a point's prompts for each step."""
    shape, prompt, context = point.shape, point.prompt_tokens, point.context_tokens
    times, alone_s = stand_in(run, point), None
    if times:
        alone_s = decode_s(times, batch, context)
        alone_s += prefills * prefill_s(times, prompt, batch, context) if prefills else 0
    flop = theory.decode_flops(shape, batch, context)
    return Pass(
        theory.decode_bytes(shape, batch, context, point.flags.kv_value_bytes),
        flop + prefills * theory.prefill_flops(shape, prompt),
        alone_s,
        point.ceilings,
    )


def prompt_pass(run: Context, point: Point) -> Pass:
    """Computes the prefill of a whole prompt."""
    tokens, times = round(point.prompt_tokens), stand_in(run, point)
    kv_bytes = tokens * point.shape.kv_bytes_per_token(point.flags.kv_value_bytes)
    return Pass(
        point.shape.step_bytes(tokens) + kv_bytes,
        theory.prefill_flops(point.shape, tokens),
        prefill_s(times, tokens) if times else None,
        point.ceilings,
    )
