"""Build the page of a lab that was forecast and not run."""

from __future__ import annotations

from labs.filing.results import Predictions
from labs.judging.text import number
from labs.lab import Lab
from labs.telling import tables
from labs.telling.document import Code, Inline, Paragraph, Section, Strong, bullets, section
from serving.machine import Machine

SCHEDULER = "vLLM's own scheduler played every load point in virtual time, over steps"


def page(
    lab: Lab, model: str, machine: Machine, predictions: Predictions, by_datasheet: bool
) -> Section:
    """Build the page: claims, points with their bands, and what has no forecast.

    `by_datasheet` says that the machine is not here, so that its steps were computed.
    """
    forecasts = predictions.in_virtual_time
    assert forecasts, "a page of forecasts is made of forecasts"
    origin: Inline = " of the model's shape that were timed on this machine"
    if by_datasheet:
        origin = (
            " computed from the GPU's datasheet and from published efficiencies, which ",
            Code("serving/forecasting/datasheet.py"),
            " names",
        )
    basis: Inline = (
        Strong("Forecast; nothing was measured."),
        f" {model} on {machine.describe()}. {SCHEDULER}",
        origin,
        ". A band spans a faster and a slower step. Goodput counts requests with a TTFT of at most"
        f" {number(lab.slo.ttft_s, 's')} and a TPOT of at most {number(lab.slo.tpot_s, 's')}.",
    )
    return section(
        f"{lab.title}: forecast for {machine.model}",
        Paragraph(basis),
        section("Claims", tables.predictions(lab, predictions)),
        section(
            "Load points",
            tables.in_virtual_time(lab, forecasts, also=("goodput_per_s",)),
            bullets(
                (Code(name), f" has no forecast: {why}") for name, why in forecasts.without.items()
            ),
        ),
        section("Other settings, one play each", tables.searched(forecasts)),
    )
