"""The plots of quantization tools."""

from __future__ import annotations

from labs.harness.reports.tradeoff import tradeoff

PLOTS = {"tradeoff": tradeoff}
