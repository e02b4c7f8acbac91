"""What is asked of an engine beside the load: quality, isolation, leaks by timing.

A probe is asked once a variant, after its trials, of the same engine. What it found is kept as it
came (`probes/<probe>-<variant>.json`); `labs/findings.py` concludes from it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from labs.lab import Lab, Variant
from loadtests.prompts import Writer


@dataclass(frozen=True)
class Served:
    """A running engine."""

    variant: Variant
    lab: Lab
    url: str
    model: str
    places: Mapping[str, Path]
    writer: Writer


Probe = Callable[[Served], dict[str, Any] | None]
"""None where the probe does not apply to this variant."""

PROBES: dict[str, Probe] = {}
