"""The plots of weight quantization."""

from __future__ import annotations

from labs.harness.facts.tradeoff import tradeoff

PLOTS = {"tradeoff": tradeoff}
