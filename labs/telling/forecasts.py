"""Build the page of a lab that was forecast and not run."""

from __future__ import annotations

from labs.filing.results import PointForecasts, Predictions
from labs.judging.text import number
from labs.lab import Lab
from labs.telling import tables
from labs.telling.document import Code, Inline, Paragraph, Section, Strong, bullets, section
from serving.machine import Machine

SCHEDULER = "vLLM's own scheduler played every load point in virtual time, over steps"
ON_TWO_ENGINES = (
    " No run has two engines. The second one is taken to be on a machine as fast as the first."
    " Where one prefills, keys and values go over the link prompt by prompt, and the other computes"
    " the prompt's last token again and writes the whole answer. Left out: the work of sending and"
    " receiving, whatever else uses the link, blocks that are sent whole though they are not full,"
    " and the memory that both engines hold while a prompt is on its way. Two machines are compared"
    " with one here: the rows that share the requests say what a second one gains without a split."
)


def on_two_engines(lab: Lab, forecasts: PointForecasts) -> Section:
    """Show what two engines are forecast to do, and what that leaves out; empty without any."""
    return section(
        "Forecast on two engines, not measured",
        tables.on_two_engines(lab, forecasts),
        Paragraph((Strong("Forecast alone."), ON_TWO_ENGINES)) if forecasts.on_two else None,
    )


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
        on_two_engines(lab, forecasts),
    )
