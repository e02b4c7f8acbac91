"""The planner's page: does a model fit a machine, and how fast may it be, by the closed forms.

The page computes with `web/theory.js`, which a test holds against `theory.py`. From here come
datasheets and published efficiencies of cards, measured ceilings of machines with published runs,
and shapes of models. Nothing else on it is measured, and it says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from labs.harness.analysis.text import number
from labs.harness.reports.dials import Hardware, cards, shipped_shape
from labs.harness.reports.document import Table, table
from labs.harness.spec import theory
from labs.harness.storage.recorded import Run
from serving.engines.vllm import ACTIVATION_BYTES, MEMORY_SHARE, usable_bytes
from serving.hardware import gpus
from serving.models.catalog import Shape
from serving.models.dummy import SHAPES
from serving.simulator.datasheet import ENDS

BLOCK_TOKENS = 16  # of the KV cache on CUDA
SHOWN_CONTEXT = 8192  # tokens, in the table of what fits
BY_QUESTION = {  # what the page shows -> the question whose lab shows it
    "weights": "CO-1", "kv": "KV-1", "fits": "KV-2", "stream": "IP-7", "ttft": "IP-1",
    "tpot": "SD-1", "throughput": "SD-1",
}  # fmt: skip


def data(runs: Sequence[Run], lessons: Mapping[str, tuple[str, str]]) -> dict[str, Any]:
    """Gather what the page computes from; `lessons` maps a question to a title and a link."""
    machines = [
        {
            "name": of.name, "card": of.card, "told": of.limits, "memory": memory,
            "bytes_per_s": of.ceilings.memory_bandwidth_bytes_per_s,
            "flops_per_s": of.ceilings.flops_per_s,
            "fp8_flops_per_s": of.ceilings.fp8_flops_per_s,
        }
        for of, memory in [*_cards(), *_measured(runs)]
    ]  # fmt: skip
    served = {run.model: Shape(**run.model_shape) for run in runs if not run.dummy}
    shapes = {name: shipped_shape(name) for name in _shipped()}
    return {
        "machines": machines,
        "models": [
            *({"name": SHAPES[n], "shape": asdict(s), "lab": n} for n, s in shapes.items()),
            *({"name": name, "shape": asdict(s), "lab": ""} for name, s in served.items()),
        ],
        "efficiencies": [asdict(e) for e in ENDS],
        "share": MEMORY_SHARE,
        "activations": ACTIVATION_BYTES,
        "block": BLOCK_TOKENS,
        "lessons": {
            part: lessons[id] for part, id in BY_QUESTION.items() if id in lessons
        },
    }  # fmt: skip


def _shipped() -> list[str]:
    return [name for name, description in SHAPES.items() if not description.startswith("nobody's")]


def _cards() -> list[tuple[Hardware, float]]:
    memory = [sheet.memory_bytes for sheet in gpus.DATASHEETS.values()]
    return list(zip(cards(), memory, strict=True))


def _measured(runs: Sequence[Run]) -> list[tuple[Hardware, float]]:
    machines = {run.machine.slug: run for run in runs}
    return [(Hardware.of(run), run.machine.memory_bytes) for run in machines.values()]


def kv_room_tokens(shape: Shape, memory_bytes: float, bytes_per_value: float) -> float:
    """Return for how many tokens' keys and values a GPU has room beside the weights."""
    room = max(0.0, usable_bytes(memory_bytes) - shape.held_bytes)
    return theory.kv_tokens(shape, room, bytes_per_value, BLOCK_TOKENS)


def what_fits() -> Table:
    """Tabulate, for pages without scripts, every card with every shape: room, and one stream."""
    rows = []
    for of, memory in _cards():
        for name in _shipped():
            shape = shipped_shape(name)
            tokens = kv_room_tokens(shape, memory, 2)
            step_s = theory.decode_step_s(shape, of.ceilings, 1, SHOWN_CONTEXT)
            rows.append(
                [
                    of.name,
                    SHAPES[name].partition(":")[0],
                    number(shape.held_bytes / 1e9, "GB"),
                    f"{tokens:,.0f}" if tokens else "does not fit",
                    f"{tokens // SHOWN_CONTEXT:,.0f}" if tokens else "–",
                    f"at most {number(1 / step_s, 'tok/s')}" if tokens else "–",
                ]
            )
    header = (
        "Card", "Model, BF16", "Weights", "KV tokens that fit", "Requests of 8,192 tokens at once",
        "One stream",
    )  # fmt: skip
    return table(header, rows)
