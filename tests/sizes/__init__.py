"""How small a lab is in the tests, where its own sizes take too long: one file a lab.

A lab without a file here is as any other: in brief windows, and on a real engine with QUICK=1.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
from dataclasses import dataclass

from labs import LABS
from serving.models.quantize import Tool
from tests.shallow import LAYERS

BRIEF = "warmup_s=0.1 window_s=0.3 repeats=1 most_repeats=0 requests=64"
"""SET of every lab on the fake engine: a whole run is a matter of seconds."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What else is set, in the notation of SET, where a test runs the lab."""

    fake: str = ""  # on the fake engine, whose steps take ten milliseconds
    real: str = ""  # on a real engine, beside QUICK=1
    cpu: str = ""  # and there on a CPU, where every point is played on fewer and shorter requests
    gpu: str = ""  # and there on a GPU, whose sizes are to fit the bundled model's 8,192 positions
    layers: int | None = LAYERS  # of the bundled model that it serves on a CPU; None: all
    needs: Tool | None = None  # that makes its weights; where there is none a test skips the lab
    not_real: str = ""  # why no test runs it on a real engine


def sizes_of(lab: str) -> Sizes:
    """The sizes of the lab of that name."""
    name = f"tests.sizes.{lab.replace('-', '_')}"
    if importlib.util.find_spec(name) is None:
        return Sizes()
    sizes = importlib.import_module(name).SIZES
    if not isinstance(sizes, Sizes):
        raise TypeError(f"{name}.SIZES is no Sizes")
    return sizes


def with_every_part(lab: str) -> str:
    """SET of all parts of a lab, which QUICK=1 on a CPU would do without; a later one has fewer."""
    at = LABS[lab].at("cpu", quick=False)
    names = {
        "variants": [variant.name for variant in at.variants],
        "workloads": [workload.name for workload in at.workloads],
    }
    return " ".join(f"{part}={json.dumps(of, separators=(',', ':'))}" for part, of in names.items())


def answers_of(tokens: int, *workloads: str) -> str:
    """Answers of so many tokens, ten milliseconds each: some begin and end within the window."""
    return " ".join(f"workloads.{name}.output_tokens.tokens={tokens}" for name in workloads)
