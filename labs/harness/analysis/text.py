"""Writes figures, verdicts and the names of points as text."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import get_args

from labs.harness.analysis.verdicts import Interval, Judgement, PredictionOutcome, tally
from labs.harness.spec.lab import Lab, Prediction
from labs.harness.spec.names import PointName
from serving.hardware.machine import Ceilings

ADMISSION_BY_CLIENT = (
    "this vLLM has no limit on its queue, so the load generator holds the limits and turns requests"
    " away itself, by the rule of vLLM's own limit: unfinished requests, here from the send to the"
    " end of the answer, or tokens of prompts without a first token."
)


def number(value: float | None, unit: str = "1") -> str:
    """Write a value with three significant digits and its unit; times below a second in ms.

    A value that is missing is written as a dash, never as 0.
    """
    if value is None:
        return "–"
    if unit == "s" and abs(value) < 0.9995:
        return f"{_three_digits(1000 * value)} ms"
    if unit == "share":
        return f"{_three_digits(100 * value)}%"
    return _three_digits(value) if unit in ("1", "USD") else f"{_three_digits(value)} {unit}"


def _three_digits(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 999.5 else f"{value:.3g}"


def counted(number: int, of: str) -> str:
    """Write how many of something there are, with the plural of its name: `1 GPU`, `2 GPUs`."""
    return f"{number:,} {of}{'s' * (number != 1)}"


def ratio_number(ratio: float) -> str:
    """Write a ratio with two decimals; a small one with two digits, a large one with three.

    That is `0.088`, `1.46`, `29.8` and `215`.
    """
    if abs(ratio) >= 9.995:
        return _three_digits(ratio)
    return f"{ratio:.2f}" if abs(ratio) >= 0.095 or not ratio else f"{ratio:.2g}"


def times_with_interval(ratio: Interval) -> str:
    """Write a ratio as `1.05x (0.98 to 1.11)`; with one repeat it has no interval."""
    if ratio.low is None or ratio.high is None:
        return f"{ratio_number(ratio.value)}x (of one repeat)"
    return f"{ratio_number(ratio.value)}x ({ratio_ends(ratio)})"


def ratio_ends(ratio: Interval | None) -> str:
    """Write a ratio's interval as `0.98 to 1.11`, or a dash where there is none.

    Where one of the repeats has next to nothing of a figure, an end may be millions away: that it
    lies beyond a thousandfold is all that it says, unless the ratio itself does, too.
    """
    if ratio is None or ratio.low is None or ratio.high is None:
        return "–"
    is_tiny = ratio.low and abs(ratio.low) < 0.001 <= abs(ratio.value)
    is_huge = ratio.high > 1000 >= ratio.value
    low = "under 0.001" if is_tiny else ratio_number(ratio.low)
    high = "over 1,000" if is_huge else ratio_number(ratio.high)
    return f"{low} to {high}"


def yes_or_no(is_so: bool | None) -> str:
    """Write `yes` or `no`, or a dash where neither is known."""
    return {True: "yes", False: "no", None: "–"}[is_so]


def point_label(key: str, lab: Lab) -> str:
    """Name a point in words, by the parts that vary in this lab: `quarter`, `story, 8 users`."""
    name = PointName.parse(key)
    loads = {load.name: load.words for of in lab.workloads for load in of.loads}
    parts = [name.variant] if len(lab.variants) > 1 else []
    parts += [name.workload] if len(lab.workloads) > 1 else []
    if len(loads) > 1 or not parts:
        parts.append(loads.get(name.load, name.load))
    return ", ".join(parts)


def one_load(lab: Lab) -> str | None:
    """Name the load that all points of a lab have, or None where they have several."""
    loads = {load.words for workload in lab.workloads for load in workload.loads}
    return loads.pop() if len(loads) == 1 else None


def literal(text: str) -> str:
    """Escape text from outside, so that no character in it is read as markup.

    `labs.harness.reports.document.parse` gives it back unchanged.
    """
    return re.sub(r"[\\`*]", r"\\\g<0>", text)


def between(low: float, high: float, unit: str = "1") -> str:
    """Write `400 to 600 ms`; each end has its own unit where they differ: `900 ms to 1.2 s`."""
    (first, last), unit_once = _sharing_unit((low, high), unit)
    return f"{first} to {last}{unit_once}"


def with_ends(value: float, low: float, high: float, unit: str = "1") -> str:
    """Write `50 (43.3 to 55) tok/s`; each figure has its own unit where they differ.

    Ends that are written as the figure itself are left out.
    """
    (figure, first, last), unit_once = _sharing_unit((value, low, high), unit)
    if figure == first == last:
        return f"{figure}{unit_once}"
    return f"{figure} ({first} to {last}){unit_once}"


def _sharing_unit(values: Sequence[float], unit: str) -> tuple[list[str], str]:
    """Write the values without their unit, and that unit behind a space, if they share one."""
    texts = [number(value, unit) for value in values]
    units = {text.partition(" ")[2] for text in texts}
    if len(units) > 1 or units == {""}:
        return texts, ""
    return [text.partition(" ")[0] for text in texts], f" {units.pop()}"


def interval(measured: Interval | None, unit: str = "1") -> str:
    """Write `400 to 600 ms`, or a dash where one repeat gave no interval."""
    if measured is None or measured.low is None or measured.high is None:
        return "–"
    return between(measured.low, measured.high, unit)


ONE_SITTING = (
    "An interval covers one sitting: how much the repeats of a run vary, not what another day or"
    " another machine changes."
)


def ratio_text(judgement: Judgement) -> str:
    """Write the measured ratio, treatment / baseline, or a dash."""
    return f"{ratio_number(judgement.ratio.value)}x" if judgement.ratio else "–"


def ratio_interval(judgement: Judgement) -> str:
    """Write the 95% interval of the measured ratio, or a dash."""
    return ratio_ends(judgement.ratio)


def value_with_interval(measured: Interval) -> str:
    """Write `1.05 (0.98 to 1.11)`, without the interval where there is none."""
    if measured.low is None or measured.high is None:
        return f"{measured.value:.2f}"
    return f"{measured.value:.2f} ({measured.low:.2f} to {measured.high:.2f})"


def prediction_text(prediction: Prediction, unit: str = "1") -> str:
    """Write the predicted figure; a bound says on which side of it the figure must lie."""
    sign = {"point": "", "ceiling": "at most ", "floor": "at least "}[prediction.kind]
    return f"{sign}{number(prediction.value, unit)}"


def ceilings_text(ceilings: Ceilings, origin: str = "") -> str:
    """Write a machine's ceilings in GB/s and TFLOP/s; those without another origin are measured."""
    threads = f"{ceilings.threads} thread{'s' if ceilings.threads > 1 else ''}"
    served = "float32" if ceilings.fp32_flops_per_s else "BF16"
    fp8, link = ceilings.fp8_flops_per_s, ceilings.host_bytes_per_s
    return (
        f"memory {number(ceilings.memory_bandwidth_bytes_per_s / 1e9, 'GB/s')}, {served}"
        f" {number(ceilings.flops_per_s / 1e12, 'TFLOP/s')}"
        + (f", FP8 {number(fp8 / 1e12, 'TFLOP/s')}" if fp8 else "")
        + (f", link to the host {number(link / 1e9, 'GB/s')}" if link else "")
        + f" ({origin or f'{threads}, measured'})"
    )


def outcome_text(
    outcome: PredictionOutcome, prediction: Prediction, measured: Interval | None
) -> str:
    """Write what became of a prediction; of a bound, also the share of it that was measured."""
    if prediction.kind == "point" or measured is None or not prediction.value:
        return outcome
    return f"{outcome} ({measured.value / prediction.value:.0%} of it)"


def claim_outcome(judgement: Judgement) -> str:
    """Write what became of a claim's prediction, and how large the effect is beside the forecast.

    Or whether the prediction was about 1.
    """
    outcome = outcome_text(judgement.prediction_outcome, judgement.prediction, judgement.ratio)
    if (foreseen := judgement.foreseen) is not None:
        return f"{outcome} ({foreseen:.0%} of the effect)"
    return outcome + ", trivial" * judgement.trivial


def decided_text(judgements: Sequence[Judgement]) -> str:
    """Write how many claims are decided: `3 of 5`."""
    counted = tally(judgements)
    return f"{counted.decided} of {counted.claims}" if judgements else "–"


def predictions_text(judgements: Sequence[Judgement]) -> str:
    """Write what became of predictions: `2 held, 1 refuted; trivial: 1 held, 2 open`."""
    counted = tally(judgements)
    parts = [_outcomes(counted.predictions)] if counted.predictions else []
    if counted.trivial:
        parts.append(f"trivial: {_outcomes(counted.trivial)}")
    return "; ".join(parts) or "–"


def _outcomes(count: Counter[PredictionOutcome]) -> str:
    return ", ".join(f"{count[o]} {o}" for o in get_args(PredictionOutcome) if count[o])


def verdict_text(judgement: Judgement) -> str:
    """Write the verdict in words that a reader can act on."""
    if judgement.outcome in ("inconclusive", "not valid"):
        return f"{judgement.outcome}: {judgement.why}"
    agrees = "as claimed" if judgement.expected else "against the claim"
    within = f": {judgement.why}" if judgement.outcome == "no effect" else ""
    return f"{judgement.outcome}{within} ({agrees})"


def sentences(parts: Iterable[str]) -> str:
    """Each part begins with a capital and ends with a full stop."""
    return " ".join(f"{part[0].upper()}{part[1:]}." for part in parts)
