"""The page of published runs on GPUs: what others measured beside what the lab forecasts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median

from labs.harness.analysis.quantity import Quantity
from labs.harness.reports.document import Table
from labs.harness.reports.markdown import Markdown
from labs.harness.reports.tables import Column, figure, tabulated
from labs.harness.reports.templates import filled
from labs.harness.storage.published_gpu import FIGURES, Judged

TITLES = dict(
    zip(FIGURES, ("TTFT mean", "TTFT p50", "TTFT p99", "TPOT", "E2E mean", "E2E p99"), strict=True)
)
SHOWN_OF_STAGES = ("ttft_mean_s", "e2e_mean_s")
FAR = 0.25  # off its forecast: such a figure is a miss, however wide its band is


@dataclass(frozen=True)
class Scores:
    """How near forecasts came to the runs that judge them."""

    runs: int
    distance: dict[str, Quantity]  # figure -> median of |measured / forecast - 1|
    ttft_in_band: int
    ttft_figures: int
    ttft_p99_in_band: int

    @classmethod
    def of(cls, judged: Sequence[Judged]) -> Scores:
        whole = [run for run in judged if not run.run.stage]
        ratios = {name: [abs(run.ratio(name) - 1) for run in whole] for name in FIGURES}
        ttft = [name for name in FIGURES if name.startswith("ttft")]
        hits = [run.in_band(name) for run in whole for name in ttft]
        return cls(
            runs=len(whole),
            distance={
                name: Quantity.given(median(far) if far else None, "share")
                for name, far in ratios.items()
            },
            ttft_in_band=sum(hits),
            ttft_figures=len(hits),
            ttft_p99_in_band=sum(run.in_band("ttft_p99_s") for run in whole),
        )


@dataclass(frozen=True)
class Miss:
    """A figure that was not forecast well, and why; the cause is empty where it is unknown."""

    run: str
    figure: str
    ratio: Quantity  # measured / forecast
    cause: str

    @classmethod
    def all_of(cls, judged: Sequence[Judged]) -> list[Miss]:
        return [
            cls(run.run.name, TITLES[name], Quantity(ratio, "x"), run.run.causes.get(name, ""))
            for run in judged
            for name in run.measured
            if abs((ratio := run.ratio(name)) - 1) > FAR or not run.in_band(name)
        ]


@dataclass(frozen=True)
class Predictor:
    """How near a predictor came to the mean E2E of the stages that it is known for."""

    name: str
    stages: int
    median: Quantity
    mean: Quantity
    largest: Quantity


def page(
    judged: Sequence[Judged], picture: str = "", without: Mapping[str, str] | None = None
) -> Markdown:
    """Write the page, with its picture where that is a file beside it.

    `without` says of runs that could not be simulated why, by their names.
    """
    return filled(
        "published_gpu.md",
        picture=picture,
        without=(without or {}).items(),
        runs=[run for run in judged if not run.run.stage],
        stages=[run for run in judged if run.run.stage],
        scores=Scores.of(judged),
        far=Quantity(FAR, "share"),
        misses=Miss.all_of(judged),
        predictors=sorted(_predictors(judged), key=lambda p: p.mean.value or 0),
        ratio=lambda run, name: Quantity(run.ratio(name), "x"),
        stage_table=_stages([run for run in judged if run.run.stage]),
    )


def _stages(stages: Sequence[Judged]) -> Table:
    """Tabulate measured / forecast of each stage, and measured / predicted by the others."""

    def ratio(name: str) -> Column[Judged]:
        def cell(run: Judged) -> str:
            return f"{run.ratio(name):.2f}x" if name in run.measured else "–"

        return Column(TITLES[name], cell)

    def others_ratio(name: str) -> Column[Judged]:
        def cell(run: Judged) -> str:
            predicted_s = run.others.get(name)
            return f"{run.measured['e2e_mean_s'] / predicted_s:.2f}x" if predicted_s else "–"

        return Column(f"E2E mean, {name}", cell)

    others = dict.fromkeys(name for run in stages for name in run.others)
    return tabulated(
        stages,
        Column("Stage", lambda run: run.run.name),
        figure("Requests/s", "rate_per_s"),
        *map(ratio, SHOWN_OF_STAGES),
        *map(others_ratio, others),
    )


def in_brief(judged: Sequence[Judged]) -> Markdown:
    """Say in a sentence how near forecasts came; nothing where no run was judged."""
    return filled("published_gpu_in_brief.md", scores=Scores.of(judged))


def _predictors(judged: Sequence[Judged]) -> Iterator[Predictor]:
    stages = [run for run in judged if run.run.stage]
    far: dict[str, list[float]] = defaultdict(list)
    for run in stages:
        forecast_s = run.forecast["e2e_mean_s"].value
        for name, predicted_s in {"this lab": forecast_s, **run.others}.items():
            far[name].append(abs(predicted_s / run.measured["e2e_mean_s"] - 1))
    for name, shares in far.items():
        distances = (Quantity(of(shares), "share") for of in (median, fmean, max))
        yield Predictor(name, len(shares), *distances)
