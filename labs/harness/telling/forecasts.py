"""Build the pages of a lab that was forecast and not run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from labs.harness.filing.results import PointForecasts, Predictions
from labs.harness.judging.text import number, point_label
from labs.harness.spec import Lab
from labs.harness.telling import tables
from labs.harness.telling.capacity_plans import FLEET, FleetForecast, fleet_note, fleet_row
from labs.harness.telling.document import (
    Block,
    Code,
    Inline,
    Paragraph,
    Section,
    Strong,
    bullets,
    section,
    table,
)
from serving.hardware.machine import Machine

SCHEDULER = "vLLM's own scheduler played every load point in virtual time, over steps"
ON_TWO_ENGINES = (
    " No run has two engines. The second one is taken to be on a machine as fast as the first."
    " Where one prefills, keys and values go over the link prompt by prompt, and the other computes"
    " the prompt's last token again and writes the whole answer. Left out: the work of sending and"
    " receiving, whatever else uses the link, blocks that are sent whole though they are not full,"
    " and the memory that both engines hold while a prompt is on its way. Two machines are compared"
    " with one here: the rows that share the requests say what a second one gains without a split."
)
RUN_WITH_THESE = "The folder of a run with these settings ends in "
LIMITS_OF_ALL = (
    "The load generator holds the limits on the queue, and not each engine its own: there is one"
    " limit on all replicas together, the sum of theirs."
)


def on_two_engines(lab: Lab, forecasts: PointForecasts) -> Section:
    """Show what two engines are forecast to do, and what that leaves out; empty without any."""
    return section(
        "Forecast on two engines, not measured",
        tables.on_two_engines(lab, forecasts),
        Paragraph((Strong("Forecast alone."), ON_TWO_ENGINES)) if forecasts.on_two else None,
    )


def page(
    lab: Lab,
    model: str,
    machine: Machine,
    predictions: Predictions,
    by_datasheet: bool,
    run_on_file: str = "",
) -> Section:
    """Build the page: claims, points with their bands, and what has no forecast.

    `by_datasheet` says that the machine is not here, so that its steps were computed; `run_on_file`
    names the run that timed them where it is another that is on file.
    """
    forecasts = predictions.in_virtual_time
    assert forecasts, "a page of forecasts is made of forecasts"
    return section(
        f"{lab.title}: forecast for {machine.model}",
        _basis(lab, model, machine, by_datasheet, run_on_file, "Goodput counts requests"),
        Paragraph((RUN_WITH_THESE, Code(lab.digest()), ".")),
        section("Claims", tables.predictions(lab, predictions)),
        section(
            "Load points",
            tables.in_virtual_time(lab, forecasts, also=("goodput_per_s",)),
            _without(forecasts.without),
        ),
        section("Other settings, one play each", tables.searched(forecasts)),
        on_two_engines(lab, forecasts),
    )


def page_of_fleets(
    lab: Lab,
    model: str,
    machine: Machine,
    replicas: int,
    points: Mapping[str, Sequence[FleetForecast]],
    without: Mapping[str, str],
    by_datasheet: bool,
    run_on_file: str = "",
) -> Section:
    """Build the page of engines behind a router, `points` by load; the rest is as for `page`."""
    fleets = [fleet for of in points.values() for fleet in of]
    rows = [[point_label(key, lab), *fleet_row(f)] for key, of in points.items() for f in of]
    header: list[Inline] = ["Point", *FLEET]
    several = replicas > 1
    if not several:  # no router has a choice
        header, rows = (
            [header[0], *header[2:]],
            [[point, *figures] for point, _, *figures in rows],
        )
    of_each = f"{replicas} replicas of each engine, " if several else ""
    return section(
        f"{lab.title}: {of_each}forecast for {machine.model}",
        _basis(lab, model, machine, by_datasheet, run_on_file, "The objective is met by requests"),
        section(
            "Open loads",
            table(header, rows),
            fleet_note(fleets, several) if fleets else None,
            Paragraph(LIMITS_OF_ALL) if several and _held_by_client(lab) else None,
            _without(without),
        ),
    )


def _held_by_client(lab: Lab) -> bool:
    return lab.admission_by_client and any(flags.turns_away for flags in lab.all_flags)


def _basis(
    lab: Lab, model: str, machine: Machine, by_datasheet: bool, run_on_file: str, good: str
) -> Paragraph:
    """Say what a forecast rests on, and what is `good` within the objective."""
    origin: Inline = " of the model's shape that were timed on this machine"
    if run_on_file:
        origin = (" that were timed on such a machine before the run ", Code(run_on_file))
    elif by_datasheet:
        origin = (
            " computed from the GPU's datasheet and from published efficiencies, which ",
            Code("serving/forecasting/datasheet.py"),
            " names",
        )
    basis: Inline = (
        Strong("Forecast; nothing was measured."),
        f" {model} on {machine.describe()}. {SCHEDULER}",
        origin,
        f". A band spans a faster and a slower step. {good} with a TTFT of at most"
        f" {number(lab.slo.ttft_s, 's')} and a TPOT of at most {number(lab.slo.tpot_s, 's')}.",
    )
    return Paragraph(basis)


def _without(reasons: Mapping[str, str]) -> Block | None:
    return bullets((Code(name), f" has no forecast: {why}") for name, why in reasons.items())
