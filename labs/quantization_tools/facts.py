"""Quantization tools and calibration texts, compared on the same passages and questions."""

from __future__ import annotations

from dataclasses import dataclass

from labs.harness.derived.quality_summary import Beside, Quality, beside, probe_evaluations, quality
from labs.harness.derived.run_view import Context, JudgedRun
from labs.harness.derived.weights import KindsOfWeights, kinds_of_weights

PAIRS = {
    "gptq-heir": ("gptqmodel", "auto-gptq"),
    "gptq-vllm": ("w4a16-gptq", "auto-gptq"),
    "awq-heir": ("w4a16-awq", "autoawq"),
    "awq-gptq": ("w4a16-awq", "w4a16-gptq"),
    "gptq-rtn": ("w4a16-gptq", "w4a16-rtn"),
    "awq-rtn": ("w4a16-awq", "w4a16-rtn"),
    "code-prose": ("w4a16-gptq-code", "w4a16-gptq"),
}


@dataclass(frozen=True)
class Facts:
    tools: dict[str, Pair]  # by the names of `PAIRS`; empty where the probe did not run
    quality: Quality | None
    weights: KindsOfWeights


def facts(run: JudgedRun) -> Facts:
    return Facts(compared_tools(run), quality(run), kinds_of_weights(run))


@dataclass(frozen=True)
class Pair:
    """One variant's quality beside another's."""

    one: str
    other: str
    quality: Beside  # the first's beside the second's

    @property
    def better(self) -> str | None:
        """Name the variant of lower perplexity; None where the interval includes both."""
        ratio = self.quality.perplexity_ratio
        if ratio.high is not None and ratio.high < 1:
            return self.one
        return self.other if ratio.low is not None and ratio.low > 1 else None


def compared_tools(run: Context) -> dict[str, Pair]:
    evaluations = {v.name: probe_evaluations(run, v.name) for v in run.lab.variants}
    return {
        name: Pair(one, other, beside(baseline[0], treatment[0]))
        for name, (one, other) in PAIRS.items()
        if (treatment := evaluations.get(one)) and (baseline := evaluations.get(other))
    }
