"""The dashboards, as code: `make readme` writes them to dashboards/grafana/*.json.

*Lab, live* is one run as it happens, *Compare* a finished run's variants side by side, *Machines*
one lab on several machines, *Generator health* whether the load was sent as it should have been.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from grafana_foundation_sdk.builders import dashboard
from grafana_foundation_sdk.cog.encoder import JSONEncoder

from dashboards import series
from dashboards.panels import (
    BOUND,
    DASHED,
    DOLLARS,
    FLOP_PER_S,
    JOULES,
    PER_S,
    PLAIN,
    RATIO,
    SECONDS,
    SOLID,
    THIN,
    TIMES,
    TOKENS,
    TOKENS_PER_S,
    Column,
    Drawn,
    Line,
    Panel,
    bars,
    beside,
    board,
    choice,
    coloured,
    interval,
    lines,
    moments,
    recorded_runs,
    rows,
    with_interval,
    without_interval,
)
from loadtests import exporter
from serving import atomic


class Computed(Protocol):
    """Says how a metric is computed over the repeats of a point."""

    @property
    def pooled(self) -> bool:
        """Whether it is taken over the samples of all repeats, and so has no interval."""


class Described(Protocol):
    """A metric of finished runs as a panel names it; the table of metrics belongs to the labs."""

    @property
    def title(self) -> str:
        """The panel's title."""

    @property
    def unit(self) -> str:
        """A key of `UNITS`."""

    @property
    def better(self) -> str:
        """Which figures are better: `higher` or `lower` ones."""

    @property
    def statistic(self) -> Computed:
        """How it is computed."""

    @property
    def compare_panel(self) -> str:
        """What its panel in *Compare* says beside that; empty where it has none there."""

    @property
    def machines_panel(self) -> str:
        """What its panel in *Machines* says; empty where it has none there."""


Figures = Mapping[str, Described]  # by the name under which it is exported
UNITS = {"s": SECONDS, "tok": TOKENS, "tok/s": TOKENS_PER_S, "req/s": PER_S, "FLOP/s": FLOP_PER_S,
         "1": PLAIN, "share": RATIO, "USD": DOLLARS, "J": JOULES}  # fmt: skip
FOLDER = Path(__file__).parent / "grafana"
OUTCOMES = {
    "helps": "green", "hurts": "red", "no effect": "blue", "inconclusive": "orange",
    "not valid": "purple",
}  # fmt: skip
PREDICTIONS = {
    "held": "green", "not broken": "green", "open": "orange", "refuted": "red", "broken": "red",
}  # fmt: skip

PANELS = tomllib.loads(Path(__file__).with_name("panels.toml").read_text())
STYLES = {"solid": SOLID, "thin": THIN, "dashed": DASHED, "bound": BOUND}
NEEDS = {
    "Forecasts": "forecasts",
    "Ratio to the baseline, 95% interval": "a second repeat",
    "ITL, p99": "samples enough for a p99",
    **{
        panel["title"]: panel["needs"]
        for described in PANELS.values()
        for row in described["rows"]
        for panel in row["panels"]
        if "needs" in panel
    },
}
"""Panel -> what it needs to show anything; without that it is empty, and for no other reason."""

LIVE = 'lab="$lab",run_id="$run",variant=~"$variant"'
RUN = 'lab="$lab",run_id="$run"'
POINTS = f'{RUN},variant=~"$variant",workload=~"$workload",load=~"$load"'
EVERYWHERE = 'lab="$lab",run_id=~"$run",machine=~"$machine"'


def _last(name: str, where: str) -> str:
    """Query a finished run's figure, wherever in the time range it lies.

    The name of the series goes: last_over_time keeps it, and a table would not join rows across it.
    """
    return f"max without (instance, job) (last_over_time({name}{{{where}}}[$__range]))"


def _newest(name: str, where: str) -> str:
    """Query what a run came to last: the value is when it did, so a resumed run has older ones."""
    reached = _last(name, where)
    newest = f"max without (outcome, prediction) ({reached})"
    return f"{reached} == ignoring (outcome, prediction) group_left {newest}"


def _claimed(expr: str) -> str:
    """Name each row by claim and treatment: a claim may be judged at several pairs of points."""
    return _joined(expr, "claimed", ": ", "title", "treatment")


def _joined(expr: str, label: str, between: str, *labels: str) -> str:
    """Give the series of a query another label, in which the values of these stand together."""
    named = ", ".join(f'"{name}"' for name in labels)
    return f'label_join({expr}, "{label}", "{between}", {named})'


def _runs(where: str) -> Panel:
    return rows(
        "Reports",
        "Where each run's report lies under results/; a run is here once it has ended or been"
        " imported.",
        Column("Machine", "described", width=300),
        Column("Run", "run_id", width=240),
        Column("Model", "model", width=200),
        Column("Scale", "scale", width=80),
        Column("Quick", "quick", width=80),
        Column("Report", "report"),
        Column(expr=_last(series.RUN_INFO, where)),
        sort_by="Run",
    )


# ------------------------------------------------------------------ Lab, live and Generator health


def _panel(row: Mapping[str, Any]) -> Drawn:
    """Make a panel of a row of `panels.toml`."""
    head = row["title"], row["says"], row["unit"]
    panel: Drawn
    if "bars" in row:
        panel = bars(*head, _selected(row["bars"]), row["each"], row["by"])
    else:
        queries = [
            Line(
                _selected(line["expr"]),
                line.get("legend", "{{variant}}"),
                STYLES[line.get("style", "solid")],
            )
            for line in row["lines"]
        ]
        panel = lines(*head, *queries, limit=row.get("limit"), most=row.get("most", 0))
    return panel.height(8).span(row.get("span", 12))


def _selected(query: str) -> str:
    return query.replace("{LIVE", f"{{{LIVE}").replace("{RUN", f"{{{RUN}")


def _while_it_runs(uid: str, *more: tuple[str, Sequence[Panel]]) -> dashboard.Dashboard:
    """Build a board of `panels.toml`, with `more` rows behind those that it has there."""
    described = PANELS[uid]
    parts = [
        (row["title"], [_panel(panel) for panel in row["panels"]]) for row in described["rows"]
    ]
    return board(
        uid,
        described["title"],
        described["says"],
        "now-15m",
        "5s",
        _live_choices(),
        _annotations(),
        (*parts, *more),
    )


def live(_: Figures) -> dashboard.Dashboard:
    """Build *Lab, live*: one run as it happens, on a load generator's and an engine's series."""
    return _while_it_runs("lab-live", ("Report", (_runs(RUN).height(4),)))


def generator(_: Figures) -> dashboard.Dashboard:
    """Build *Generator health*: whether the load was sent as it should have been."""
    return _while_it_runs("lab-generator")


def _live_choices() -> list[dashboard.QueryVariable]:
    point = exporter.LOAD_POINT
    return [
        choice("lab", "Lab", f"label_values({point}, lab)"),
        choice("run", "Run", f'label_values({point}{{lab="$lab"}}, run_id)'),
        choice("variant", "Variant", f"label_values({point}{{{RUN}}}, variant)", several=True),
    ]


def _annotations() -> tuple[dashboard.AnnotationQuery, ...]:
    points, warm_up = (f"{name}{{{LIVE}}} > 0" for name in (exporter.LOAD_POINT, exporter.WARM_UP))
    return (
        moments("Load points", points, "light-blue", "{{workload}} {{load}}"),
        moments("Warm-up", warm_up, "light-orange", "warm-up"),
        recorded_runs(),
    )


# --------------------------------------------------------------------------------------- Compare


def _answer_panels() -> tuple[Panel, ...]:
    effect, low, high, predicted = (
        _last(name, RUN)
        for name in (
            series.EFFECT, series.EFFECT_LOW, series.EFFECT_HIGH, series.EFFECT_PREDICTED,
        )
    )  # fmt: skip
    return (
        rows(
            "Verdicts",
            "What each claim came to: the ratio of treatment to baseline with its 95% interval,"
            " and the ratio predicted before anything ran. An interval covers one sitting. A"
            " prediction p held where the 90% interval lies within p / 1.25 and 1.25 p, is refuted"
            " where it lies wholly outside, else open; in brackets is the measured effect, the"
            " ratio's logarithm, as a share of the predicted one. Trivial: p is about 1.",
            Column("Claim", "title", width=330),
            Column("Verdict", "outcome", width=100, colours=OUTCOMES),
            Column("Prediction", "prediction", width=110, colours=PREDICTIONS),
            Column("Metric", "metric", width=150),
            Column(expr=_newest(series.VERDICT, RUN)),
            Column("Ratio", expr=effect, width=75, unit=TIMES),
            Column("Low", expr=low, width=75, unit=TIMES),
            Column("High", expr=high, width=75, unit=TIMES),
            Column("Predicted", expr=predicted, width=85, unit=TIMES),
            Column("Treatment", "treatment"),
            Column("Baseline", "baseline"),
        ),
        interval(
            "Ratio to the baseline, 95% interval",
            "A bar spans the interval, and its colour changes at the ratio. A bar across the line"
            " at 1 shows no difference. An interval covers one sitting.",
            "claimed",
            _claimed(effect),
            _claimed(low),
            _claimed(high),
            limit=1,
        ),
        beside(
            "Ratio, measured and predicted",
            "Bars of equal length: theory explains the effect; else its assumptions fail here.",
            TIMES,
            "claimed",
            {"measured": _claimed(effect), "predicted": _claimed(predicted)},
            limit=1,
        ),
    )


def _prediction_tables() -> tuple[Panel, ...]:
    forecast, predicted = (
        _last(name, POINTS) for name in (series.FORECAST, series.FORECAST_PREDICTED)
    )
    point = (
        Column("Variant", "variant", width=160),
        Column("Workload", "workload", width=160),
        Column("Load", "load", width=140),
        Column("Metric", "metric", width=220),
        Column("Unit", "unit", width=80),
    )
    return (
        rows(
            "Forecasts",
            "Absolute figures predicted from this machine's ceilings;"
            " measured over predicted near 1 means the model of the machine is right. It held, is"
            " refuted or is open by the rule of verdicts; a bound is not broken or broken.",
            *point,
            Column("Forecast", "prediction", width=160, colours=PREDICTIONS),
            Column(expr=_newest(series.FORECAST_OUTCOME, POINTS)),
            Column("Predicted", expr=predicted, width=110),
            Column("Measured", expr=forecast, width=110),
            Column("Measured / predicted", expr=f"{forecast} / {predicted}", unit=TIMES),
        ),
        rows(
            "Every figure",
            "Mean over the repeats with its 95% interval, which covers one sitting. A percentile"
            " over the samples of all repeats together has no interval.",
            *point,
            Column("Value", expr=_last(series.MEASUREMENT, POINTS)),
            Column("Low", expr=_last(series.MEASUREMENT_LOW, POINTS)),
            Column("High", expr=_last(series.MEASUREMENT_HIGH, POINTS)),
        ).height(14),
    )


def compare(described: Figures) -> dashboard.Dashboard:
    """Build *Compare*: a finished run's variants, its verdicts and its predictions."""

    def at_points(name: str, metric: str) -> str:
        figure = _last(name, f'{POINTS},metric="{metric}"')
        return _joined(
            _joined(figure, "at", " ", "workload", "load"), "point", ": ", "at", "variant"
        )

    def figure(metric: str, of: Described) -> Panel:
        title, unit = of.title, UNITS[of.unit]
        says = f"{of.better.capitalize()} is better; {of.compare_panel}"
        value = at_points(series.MEASUREMENT, metric)
        if of.statistic.pooled:
            says += " Over the samples of all repeats together, which gives no interval."
            return without_interval(title, says, unit, "point", value)
        return with_interval(
            title,
            f"{says} With the 95% interval of each mean, which speaks of one sitting: variants"
            " whose intervals overlap are not told apart by them.",
            unit,
            "point",
            value,
            at_points(series.MEASUREMENT_LOW, metric),
            at_points(series.MEASUREMENT_HIGH, metric),
        )

    figures = tuple(figure(name, of) for name, of in described.items() if of.compare_panel)
    return board(
        "lab-compare",
        "Compare",
        "A finished run's variants side by side, with what was predicted and what was concluded.",
        "now-2y",
        "",
        _finished_choices(),
        (),
        (
            ("The answer", _answer_panels()),
            ("Variants side by side", figures),
            (
                "Predicted beside measured",
                (*_prediction_tables(), _runs(RUN).height(4)),
            ),
        ),
    )


def _finished_choices() -> list[dashboard.QueryVariable]:
    return [
        choice("lab", "Lab", f"label_values({series.RUN_INFO}, lab)"),
        choice("run", "Run", f'label_values({series.RUN_INFO}{{lab="$lab"}}, run_id)'),
        *(
            choice(
                name,
                name.capitalize(),
                f"label_values({series.MEASUREMENT}{{{RUN}}}, {name})",
                several=True,
            )
            for name in ("variant", "workload", "load")
        ),
    ]


# -------------------------------------------------------------------------------------- Machines


def _sitting(expr: str) -> str:
    """Name a run and its machine in the label `sitting`, the run first: a long label is cut."""
    return _joined(expr, "sitting", " ", "run_id", "machine")


def _effect_panels() -> tuple[Panel, ...]:
    effect = _claimed(_last(series.EFFECT, EVERYWHERE))
    return (
        bars(
            "Ratio to the baseline",
            "A bar for each run, at the treatment that stands behind the claim. On the same side of"
            " 1 everywhere: a mechanism; else it is the machine's.",
            TIMES,
            _sitting(effect),
            row="claimed",
            column="sitting",
            limit=1,
            flat=True,
        ).span(24),
        rows(
            "Verdicts",
            "The same claim, machine by machine, and what became of its prediction there.",
            Column("Claim", "title", width=460),
            Column("Machine", "machine", width=260),
            Column("Run", "run_id", width=260),
            Column("Verdict", "outcome", width=120, colours=OUTCOMES),
            Column("Prediction", "prediction", width=120, colours=PREDICTIONS),
            Column(expr=_newest(series.VERDICT, EVERYWHERE)),
            sort_by="Claim",
        ),
    )


def _machine_choices() -> list[dashboard.QueryVariable]:
    return [
        choice("lab", "Lab", f"label_values({series.RUN_INFO}, lab)"),
        choice(
            "machine",
            "Machine",
            f'label_values({series.RUN_INFO}{{lab="$lab"}}, machine)',
            several=True,
        ),
        choice(
            "run",
            "Run",
            f'label_values({series.RUN_INFO}{{lab="$lab",machine=~"$machine"}}, run_id)',
            several=True,
        ),
        choice(
            "at_workload",
            "Workload",
            f"label_values({series.MEASUREMENT}{{{EVERYWHERE}}}, workload)",
        ),
        choice(
            "at_load",
            "Load",
            f'label_values({series.MEASUREMENT}{{{EVERYWHERE},workload="$at_workload"}}, load)',
        ),
    ]


def machines(described: Figures) -> dashboard.Dashboard:
    """Build *Machines*: one lab's effects on several machines, and its figures at one load point.

    Nothing is averaged, neither over load points nor over runs: each run has its own bars.
    """

    def measured(metric: str) -> str:
        where = f'{EVERYWHERE},workload="$at_workload",load="$at_load",metric="{metric}"'
        return _sitting(_last(series.MEASUREMENT, where))

    figures = tuple(
        bars(
            of.title,
            f"{of.machines_panel} At the workload and load that are chosen, for each run.",
            UNITS[of.unit],
            measured(name),
            row="sitting",
            column="variant",
            flat=True,
        )
        for name, of in described.items()
        if of.machines_panel
    )
    return board(
        "lab-machines",
        "Machines",
        "The same lab on several machines: which effects carry over, and how much they differ.",
        "now-2y",
        "",
        _machine_choices(),
        (),
        (
            ("Effects", _effect_panels()),
            ("Figures at one load point", figures),
            ("Runs", (_runs(EVERYWHERE).height(8),)),
        ),
    )


# ----------------------------------------------------------------------------------------- files

BOARDS = {"lab-live": live, "compare": compare, "machines": machines, "generator": generator}


def files(variants: Sequence[Sequence[str]], described: Figures) -> dict[Path, str]:
    """Generate every dashboard: its file -> its JSON, coloured for these labs' variants."""
    texts = {}
    for name, make in BOARDS.items():
        plain = json.loads(json.dumps(make(described).build(), cls=JSONEncoder))
        for panel in panels(plain):
            coloured(panel, variants)
        texts[FOLDER / f"{name}.json"] = f"{json.dumps(plain, indent=1)}\n"
    return texts


def written() -> dict[str, dict[str, Any]]:
    """Read the committed dashboards: the name of the file -> its JSON."""
    return {name: json.loads((FOLDER / f"{name}.json").read_text()) for name in BOARDS}


def write(variants: Sequence[Sequence[str]], described: Figures) -> list[Path]:
    """Write the dashboards that differ from their files; return those files."""
    FOLDER.mkdir(exist_ok=True)
    changed = []
    for path, text in files(variants, described).items():
        if path.exists() and path.read_text() == text:
            continue
        changed.append(atomic.write(path, text))
    return changed


def panels(board_json: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a dashboard's panels, without the rows that head them."""
    return [panel for panel in board_json["panels"] if panel["type"] != "row"]
