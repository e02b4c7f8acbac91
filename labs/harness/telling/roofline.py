"""The roofline of decode, on machines measured and published: what a lesson draws, and its dots.

Every figure comes from theory.py; a page only draws it. What does not depend on a lesson is
written once for a whole site. A step's place is its arithmetic intensity, FLOP / byte, and the
FLOP/s that the roof above it admits (Williams, Waterman, Patterson 2009); measured dots are the
points of published runs, by the metrics of the report.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from labs.harness import theory
from labs.harness.filing.newest import marks
from labs.harness.filing.results import Run, Summary
from labs.harness.judging.text import number, point_label
from labs.harness.telling.dials import Hardware, cards, shipped_shape
from labs.harness.telling.document import Table, table
from serving.hardware.machine import Ceilings
from serving.weights import dummy, models
from serving.weights.models import Shape

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
CONTEXTS = (128, 1024, 8192)  # tokens of each sequence
LEFT, RIGHT = 0.25, 262_144  # of the drawn roof, in FLOP / byte
QUANTIZED = {8: ("fp8", "w8a8"), 4: ("w4a16-gptq",)}  # bits of a weight -> derived models
PRECISIONS = {
    16: "16 bits (BF16)",
    8: "8 bits, in FP8 where the device has it",
    4: "4 bits, multiplied in BF16",
}


def data(runs: Sequence[Run]) -> dict[str, Any]:
    """Compute the roofs of all machines, and every step of every model under them.

    `runs` are published ones: their machines and models stand before the cards' and the shapes
    that ship with the lab.
    """
    machines = hardware(runs)
    names, works = list[str](), list[dict[str, Any]]()
    for name, by_bits in _models(runs):
        names.append(name)
        works += [
            {"model": len(names) - 1, "bits": bits, "context": context,
             **_work(shape, bits, context, machines)}
            for bits, shape in by_bits.items()
            for context in CONTEXTS
        ]  # fmt: skip
    return {
        "batches": BATCHES,
        "contexts": CONTEXTS,
        "precisions": [[bits, title] for bits, title in PRECISIONS.items()],
        "machines": [
            {
                "name": of.name, "card": of.card, "told": of.limits,
                "roofs": {bits: _roof(_ceilings(of, bits)) for bits in PRECISIONS},
            }
            for of in machines
        ],
        "models": names,
        "works": works,
    }  # fmt: skip


def hardware(runs: Sequence[Run]) -> list[Hardware]:
    """List the machines of runs, each once, and then the cards."""
    newest = {run.machine.slug: run for run in runs}
    return [*map(Hardware.of, newest.values()), *cards()]


def _models(runs: Sequence[Run]) -> Iterator[tuple[str, dict[int, Shape]]]:
    """Yield each model's name and its shapes by the bits of a weight."""
    served: dict[str, dict[int, Shape]] = {}
    for run in runs:
        if not run.dummy and not run.in_float32:
            weights = {16: run.model_shape} | {
                bits: run.weights[name]
                for bits, names in QUANTIZED.items()
                for name in names
                if name in run.weights
            }
            known = served.setdefault(run.model, {})
            known.update({bits: Shape(**sizes) for bits, sizes in weights.items()})
    yield from served.items()
    for name, description in dummy.SHAPES.items():
        if description.startswith("nobody's"):
            continue
        shape, config = shipped_shape(name), dummy.config_of(name)
        by_bits = {16: shape}
        if not shape.experts:  # whose quantized weights the lab does not make
            by_bits |= {
                bits: models.shape_of(dummy.quantized(config, derived[0]))
                for bits, derived in QUANTIZED.items()
            }
        yield description.partition(":")[0], by_bits


def _ceilings(of: Hardware, bits: int) -> Ceilings:
    """A machine's ceilings for weights of so many bits; only FP8 has a rate of its own."""
    rate = of.ceilings.fp8_flops_per_s if bits == 8 else None
    rates = {"bf16_flops_per_s": rate or of.ceilings.flops_per_s, "fp32_flops_per_s": None}
    return of.ceilings.model_copy(update=rates)


def attainable_flops_per_s(ceilings: Ceilings, intensity: float) -> float:
    """The FLOP/s that the roof admits at an arithmetic intensity in FLOP / byte."""
    return min(intensity * ceilings.memory_bandwidth_bytes_per_s, ceilings.flops_per_s)


def _roof(ceilings: Ceilings) -> dict[str, Any]:
    x = (LEFT, ceilings.ridge_flops_per_byte, RIGHT)
    y = [attainable_flops_per_s(ceilings, at) for at in x]
    return {"x": _rounded(x), "y": _rounded(y), "ridge": _round(ceilings.ridge_flops_per_byte)}


def _work(shape: Shape, bits: int, context: int, machines: Sequence[Hardware]) -> dict[str, Any]:
    """The decode steps of a model over batches, and the prefill of one prompt of that length."""
    flops = [theory.decode_flops(shape, batch, context) for batch in BATCHES]
    moved = [theory.decode_bytes(shape, batch, context) for batch in BATCHES]
    prompt_flops, prompt_bytes = theory.prefill_flops(shape, context), shape.step_bytes(context)
    under = [_ceilings(of, bits) for of in machines]
    return {
        "flops": _rounded(flops),
        "intensity": _rounded([f / b for f, b in zip(flops, moved, strict=True)]),
        "step_s": [
            _rounded([theory.decode_step_s(shape, of, batch, context) for batch in BATCHES])
            for of in under
        ],
        "prefill": {
            "flops": _round(prompt_flops),
            "intensity": _round(prompt_flops / prompt_bytes),
            "s": _rounded([theory.prefill_left_s(shape, of, context, 0) for of in under]),
        },
    }


def _rounded(values: Sequence[float]) -> list[float]:
    return [_round(value) for value in values]


def _round(value: float) -> float:
    return float(f"{value:.4g}")


# ------------------------------------------------------------------------------- measured dots


@dataclass(frozen=True)
class Dot:
    """A point of a published run in the picture: FLOP / byte, and FLOP/s."""

    machine: str
    model: str
    point: str  # in words, with the marks of a quick run
    context_tokens: float
    batch: float
    intensity: float
    flops_per_s: float
    roof_flops_per_s: float

    @property
    def share(self) -> float:
        """How much of what the roof admits there was reached."""
        return self.flops_per_s / self.roof_flops_per_s


def dots(runs: Sequence[tuple[Run, Summary]]) -> list[Dot]:
    """List the points of runs whose decode was measured and is valid, run after run."""
    return [dot for run, summary in runs for dot in _dots(run, summary)]


def _dots(run: Run, summary: Summary) -> Iterator[Dot]:
    lab, metrics = run.rebuilt_lab(), ("intensity", "flops_per_s", "batch")
    for point in run.points():
        x, y, batch = (summary.value(point.key, name) for name in metrics)
        not_valid = any(c.hits(name, point.key) for c in summary.caveats for name in metrics)
        if x and y and batch and not not_valid:
            label = point_label(point.key, lab) + (marks(run) if run.quick else "")
            yield Dot(
                run.machine.describe(), run.model, label, point.context_tokens, batch, x, y,
                attainable_flops_per_s(point.ceilings, x),
            )  # fmt: skip


def lesson_data(lesson_dots: Sequence[Dot]) -> dict[str, Any]:
    """Gather the dots of a lesson, and where its dials stand at first: as at the last dot."""
    last = lesson_dots[-1] if lesson_dots else None
    return {
        "dots": [
            [d.machine, d.point, _round(d.intensity), _round(d.flops_per_s), _round(d.share)]
            for d in lesson_dots
        ],
        "machine": last.machine if last else "",
        "model": last.model if last else "",
        "context": _nearest(CONTEXTS, last.context_tokens) if last else CONTEXTS[1],
        "batch": _nearest(BATCHES, last.batch) if last else BATCHES[3],
    }


def _nearest(of: Sequence[int], value: float) -> int:
    return min(of, key=lambda one: abs(one - value))


def dots_table(lesson_dots: Sequence[Dot]) -> Table:
    """Tabulate the dots, for readers who do not see the picture."""
    header = ("Machine", "Point", "FLOP a byte", "Decode", "Of what the roof admits there")
    return table(
        header,
        (
            [d.machine, d.point, number(d.intensity), f"{number(d.flops_per_s / 1e9)} GFLOP/s",
             number(d.share, "share")]
            for d in lesson_dots
        ),
    )  # fmt: skip
