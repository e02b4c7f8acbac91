"""Build the pages of what was forecast and not run, and the table of what clients would see."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from labs.harness.analysis.computed import PointForecasts, Predictions
from labs.harness.analysis.text import number, point_label
from labs.harness.forecast.load_forecast import LoadForecast
from labs.harness.reports import tables
from labs.harness.reports.document import Inline, Table, section, table
from labs.harness.reports.markdown import Markdown, code
from labs.harness.reports.tables import GROWS, with_band
from labs.harness.reports.templates import filled
from labs.harness.spec.lab import Lab
from serving.hardware.machine import Machine

Place = tuple[str, ...]  # a cell for each of the first columns
SEEN = ("Within the objective", "TTFT p50", "TTFT p99", "TPOT p50", "TPOT p99", "E2E p50",
        "E2E p99", "Prefix hits", "Preemptions")  # fmt: skip


def loads(places: Sequence[str], forecasts: Mapping[Place, LoadForecast]) -> Table:
    """Tabulate what clients would see of each load; `places` head the columns that name it."""
    rows: list[list[Inline]] = []
    for place, load in forecasts.items():
        seen = load.expected
        rows.append(
            [
                *place,
                with_band(load.within, "share"),
                GROWS if seen.grows else number(seen.ttft_p50_s, "s"),
                GROWS if seen.grows else with_band(load.ttft_p99_s, "s"),
                number(seen.tpot_p50_s, "s"),
                number(seen.tpot_p99_s, "s"),
                GROWS if seen.grows else number(seen.e2e_p50_s, "s"),
                GROWS if seen.grows else number(seen.e2e_p99_s, "s"),
                number(seen.hit_rate, "share"),
                f"{seen.preemptions:,}",
            ]
        )
    return table((*places, *SEEN), rows)


def on_two_engines(lab: Lab, forecasts: PointForecasts) -> Markdown:
    """Show what two engines are forecast to do, and what that leaves out; empty without any."""
    of_two = tables.on_two_engines(lab, forecasts)
    return section(
        "Forecast on two engines, not measured",
        filled("two_engines.md", two_engines=of_two),
    )


@dataclass(frozen=True)
class Basis:
    """Says what a forecast rests on."""

    lab: Lab
    model: str
    machine: Machine
    here: bool  # its steps were timed on this machine; else they follow from a datasheet, or
    run: str = ""  # they were timed before this run, on another that is on file
    by_kernels: bool = False  # and not by a datasheet

    def page(self, without: Mapping[str, str], **known: Any) -> Markdown:
        """Build a page of forecasts; `without` says why there are none of some variants."""
        return filled(
            "forecast.md", lab=self.lab, model=self.model, machine=self.machine, here=self.here,
            run=self.run and code(self.run), without=[(code(v), why) for v, why in without.items()],
            by_kernels=self.by_kernels, number=number,
            **known,
        )  # fmt: skip


ALSO = ("goodput_per_s", "ttft_p50_s", "ttft_p99_s", "e2e_p50_s", "e2e_p99_s")
"""Metrics that a page of forecasts shows beside those of a report."""


def page(basis: Basis, predictions: Predictions) -> Markdown:
    """Build the page of a lab: claims, points with their bands, and what has no forecast."""
    forecasts, lab = predictions.in_virtual_time, basis.lab
    assert forecasts, "a page of forecasts is made of forecasts"
    # what an adapter's operations take is not modelled: no formula stands in for it
    adapters = [
        v.name
        for v in lab.variants
        if v.name in forecasts.without and lab.flags_of(v).get("enable-lora")
    ]
    return basis.page(
        forecasts.without,
        several=False,
        claims=tables.predictions(lab, predictions, left_out=adapters),
        points=tables.in_virtual_time(lab, forecasts, also=ALSO),
        grows=bool(forecasts.growing),
        searched=tables.searched(forecasts) or "",
        two_engines=tables.on_two_engines(lab, forecasts),
    )


def page_of_fleets(
    basis: Basis,
    replicas: int,
    fleets: Mapping[tuple[str, str], LoadForecast],
    without: Mapping[str, str],
) -> Markdown:
    """Build the page of engines behind a router; `fleets` are by a point's key and the router."""
    lab, several = basis.lab, replicas > 1
    # of a single engine no router has a choice
    told: dict[Place, LoadForecast] = {
        (point_label(key, lab), router) if several else (point_label(key, lab),): fleet
        for (key, router), fleet in fleets.items()
    }
    limited = lab.admission_by_client and any(flags.turns_away for flags in lab.all_flags)
    return basis.page(
        without,
        replicas=replicas,
        several=several,
        limited=limited,
        fleets=loads(("Point", "Router") if several else ("Point",), told),
        requests=next((fleet.expected.requests for fleet in fleets.values()), 0),
        grows=any(fleet.expected.grows for fleet in fleets.values()),
    )
