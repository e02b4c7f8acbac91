"""Tell what one claim of a lab found, in plain words and in the direction that people say it."""

from __future__ import annotations

from labs.harness.analysis.metrics import METRICS
from labs.harness.analysis.text import ratio_ends, ratio_number
from labs.harness.analysis.verdicts import Interval, Judgement
from labs.harness.derived.lab_modules import Headline
from labs.harness.reports.markdown import Inline, Markdown
from labs.harness.reports.templates import filled


def told(
    judgement: Judgement, headline: Headline, done: Inline = "", on: str = "", earlier: Inline = ""
) -> Markdown:
    """Tell a claim that was measured: a ratio below 1 as how many times less.

    `done` stands in the place of the headline's own words, as a link to the report does, `on` says
    where it was measured, and `earlier` what else the reader must know.
    """
    ratio = judgement.ratio
    assert ratio
    less, predicted = 0 < ratio.value < 1, judgement.prediction.value
    if less:
        ratio, predicted = _turned(ratio), 1 / predicted if predicted else 0.0
    return filled(
        "headline.md",
        done=done or headline.done,
        on=on,
        figure=headline.figure,
        less=less,
        is_time=METRICS[judgement.metric].unit == "s",
        times=ratio_number(ratio.value),
        ends=ratio_ends(ratio),
        predicted=ratio_number(predicted),
        outcome=judgement.prediction_outcome + ", trivial" * judgement.trivial,
        earlier=earlier,
    )


def _turned(ratio: Interval) -> Interval:
    """Return the ratio the other way round."""
    low, high = (end and 1 / end for end in (ratio.high, ratio.low))
    return ratio.model_copy(update={"value": 1 / ratio.value, "low": low, "high": high})
