"""Compare quantization tools and calibration texts on the same passages and questions."""

from __future__ import annotations

from dataclasses import dataclass

from labs.harness.facts.context import Context, JudgedRun
from labs.harness.facts.parts import Conclusion, Headline, ReportParts
from labs.harness.facts.quality import (
    QUALITY,
    Figures,
    figure_of,
    in_brief,
    probe_evaluations,
    quality_gate,
    treatments_of,
    with_interval,
)
from labs.harness.facts.weights import WEIGHTS, draw_tradeoff
from labs.harness.filing.results import Finding
from labs.harness.judging.quality import compare
from labs.harness.judging.text import sentences

TOOLS = (
    ("gptqmodel", "auto-gptq", "GPTQ by GPTQModel, the successor, against AutoGPTQ"),
    ("w4a16-gptq", "auto-gptq", "GPTQ by llm-compressor against AutoGPTQ"),
    ("w4a16-awq", "autoawq", "AWQ by llm-compressor against AutoAWQ"),
    ("w4a16-awq", "w4a16-gptq", "AWQ against GPTQ, by one tool"),
    ("w4a16-gptq", "w4a16-rtn", "GPTQ against rounding to nearest, by one tool"),
    ("w4a16-awq", "w4a16-rtn", "AWQ, with zero points, against rounding to nearest, by one tool"),
    ("w4a16-gptq-code", "w4a16-gptq", "Calibrated on code against on prose, GPTQ by one tool"),
)


@dataclass(frozen=True)
class Compared:
    """Compares one variant's quality with another's."""

    one: str
    other: str
    title: str
    figures: Figures  # the first's against the second's

    @property
    def better(self) -> str | None:
        """Names the variant of lower perplexity; None where the interval includes both."""
        ratio = figure_of(self.figures, "perplexity_ratio")
        if ratio.low is None or ratio.high is None or ratio.low <= 1 <= ratio.high:
            return None
        return self.one if ratio.value < 1 else self.other


def compared_tools(context: Context) -> tuple[Compared, ...]:
    evaluations = {v.name: probe_evaluations(context, v.name) for v in context.lab.variants}
    return tuple(
        Compared(one, other, title, compare(baseline[0], treatment[0]))
        for one, other, title in TOOLS
        if (treatment := evaluations.get(one)) and (baseline := evaluations.get(other))
    )


def tell_tools(facts: tuple[Compared, ...]) -> Finding:
    rows = [["Compared", "Perplexity ratio", "Top-1 agreement", "Needles", "Tasks"]]
    names = ("perplexity_ratio", "top1_agreement", "needle_retrieval_difference",
             "task_accuracy_difference")  # fmt: skip
    rows += [
        [pair.title, *(with_interval(figure_of(pair.figures, name)) for name in names)]
        for pair in facts
    ]
    return Finding(
        title="Tool against tool, text against text",
        rows=rows,
        lines=[
            *(better_sentence(pair) for pair in facts),
            "Ratios and differences compare the first with the second, with 95% intervals paired"
            " over passages or questions. No tool was calibrated on the held-out text (prose).",
        ],
    )


def better_sentence(pair: Compared) -> str:
    if pair.better is None:
        return f"{pair.title}: no difference in perplexity is shown."
    return f"{pair.title}: `{pair.better}` has the lower perplexity."


TOOLS_COMPARED = Conclusion("tools", compared_tools, tell_tools)

# ------------------------------------------------------------------------------------ the answers


def worth(run: JudgedRun) -> str | None:
    """Answers what GPTQ and AWQ are worth beside rounding to nearest."""
    treatments = treatments_of(run)
    if "w4a16-rtn" not in treatments:
        return None
    parts = [
        f"{name}: {in_brief(treatments[variant])}"
        for variant, name in (
            ("w4a16-rtn", "4 bits rounded to nearest"), ("w4a16-gptq", "GPTQ"),
            ("w4a16-awq", "AWQ (with zero points)"),
        )
        if variant in treatments
    ]  # fmt: skip
    eight = " `make lab-weight-quantization` compares SmoothQuant with 8 bits rounded to nearest."
    return f"Each is compared with BF16. {sentences(parts)}{eight}"


def tools(run: JudgedRun) -> str | None:
    facts = TOOLS_COMPARED.facts_of(run)
    return " ".join(better_sentence(pair) for pair in facts) or None if facts else None


PARTS = ReportParts(
    conclusions=(TOOLS_COMPARED, QUALITY, WEIGHTS),
    answers={"CO-3": worth, "CO-7": tools, "ME-2": quality_gate},
    plots={"tradeoff": draw_tradeoff},
    headline=Headline(
        claim="gptq-heir",
        done="Making the 4-bit weights with GPTQModel instead of the archived AutoGPTQ",
        figure="the time per token",
        on_front_page=False,
    ),
)
