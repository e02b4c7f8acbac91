"""The building blocks of the dashboards: lines over time, bars and tables of finished runs.

A variant has the same colour on every panel (`coloured`). Where a panel draws several lines of one
variant, they share its name and colour and differ in style; the legend names the first of them.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from grafana_foundation_sdk.builders import barchart, common, dashboard, prometheus, table
from grafana_foundation_sdk.builders import timeseries as series
from grafana_foundation_sdk.builders.dashboard import ThresholdsConfig
from grafana_foundation_sdk.models import common as kinds
from grafana_foundation_sdk.models.common import DataSourceRef
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DashboardLinkType,
    DashboardRegexMapOptions,
    DataTransformerConfig,
    DynamicConfigValue,
    FieldColorModeId,
    RegexMap,
    Threshold,
    ThresholdsMode,
    ValueMappingResult,
    VariableRefresh,
    VariableSort,
)
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

from dashboards import palette

DATASOURCE = DataSourceRef("prometheus", "inference-lab")
TAG = "inference-lab"
SECONDS, RATIO, PLAIN = "s", "percentunit", "short"
TOKENS, TOKENS_PER_S, PER_S = "suffix:tok", "suffix:tok/s", "suffix:/s"
FLOP_PER_S, DOLLARS, JOULES = "flops", "currencyUSD", "joule"
TIMES = "suffix:x"  # of a ratio
STEP = "5s"  # $__rate_interval is four steps: few requests end in less on a slow machine
Panel = series.Panel | barchart.Panel | table.Panel


@dataclass(frozen=True)
class Style:
    """Describes a line: its width and dashes in pixels, and a colour if not its variant's."""

    width: int = 2
    dash: tuple[int, ...] = ()
    in_legend: bool = True
    colour: str = ""

    def overrides(self) -> list[DynamicConfigValue]:
        """Express the style as Grafana's properties of a field."""
        properties = [DynamicConfigValue("custom.lineWidth", self.width)]
        if self.dash:
            style = {"fill": "dash", "dash": list(self.dash)}
            properties.append(DynamicConfigValue("custom.lineStyle", style))
        if not self.in_legend:
            hidden = {"legend": True, "tooltip": False, "viz": False}
            properties.append(DynamicConfigValue("custom.hideFrom", hidden))
        if self.colour:
            properties.append(_fixed(self.colour))
        return properties


SOLID = Style()
THIN = Style(width=1, in_legend=False)
DASHED = Style(width=1, dash=(6, 4), in_legend=False)
BOUND = Style(width=1, dash=(10, 6), colour=palette.BOUND)


@dataclass(frozen=True)
class Line:
    """A PromQL query over time, and what names and draws its series."""

    expr: str
    legend: str = "{{variant}}"
    style: Style = SOLID


Drawn = series.Panel | barchart.Panel
Chart = TypeVar("Chart", series.Panel, barchart.Panel)


def lines(
    title: str, says: str, unit: str, *queries: Line, limit: float | None = None, most: float = 0
) -> series.Panel:
    """Draw queries over time, with a line at `limit`; the axis reaches at least to `most`."""
    panel = (
        _headed(series.Panel(), title, says, unit, limit)
        .height(8)
        .color_scheme(dashboard.FieldColor().mode(FieldColorModeId.PALETTE_CLASSIC_BY_NAME))
        .fill_opacity(0)
        .show_points(kinds.VisibilityMode.AUTO)
    )
    if most:
        panel.axis_soft_max(most)
    for ref, line in zip(string.ascii_uppercase, queries, strict=False):
        panel.with_target(
            prometheus.Dataquery()
            .expr(line.expr)
            .legend_format(line.legend)
            .interval(STEP)
            .range()
            .ref_id(ref)
            .datasource(DATASOURCE)
        )
        panel.override_by_query(ref, line.style.overrides())
    return panel


def bars(
    title: str,
    says: str,
    unit: str,
    expr: str,
    row: str,
    column: str,
    limit: float | None = None,
    flat: bool = False,
) -> barchart.Panel:
    """Draw a figure of finished runs: a group of bars for each `row`, in it a bar a `column`.

    `flat` ones have room for long names of rows.
    """
    matrix = {"rowField": row, "columnField": column, "valueField": "Value", "emptyValue": "null"}
    panel = _bars(title, says, unit, limit).with_target(_instant("A", expr))
    if flat:
        panel.orientation(kinds.VizOrientation.HORIZONTAL).x_tick_label_max_length(60).height(14)
    panel.with_transformation(DataTransformerConfig("groupingToMatrix", options=matrix))
    return panel


def beside(
    title: str,
    says: str,
    unit: str,
    row: str,
    queries: Mapping[str, str],
    limit: float | None = None,
) -> barchart.Panel:
    """Draw several figures of finished runs (name -> query): for each `row` a bar for each name."""
    panel = _bars(title, says, unit, limit).x_field(row)
    panel.orientation(kinds.VizOrientation.HORIZONTAL).x_tick_label_max_length(44)
    _merge(panel, [row], queries)
    return panel


def interval(
    title: str, says: str, row: str, value: str, low: str, high: str, limit: float
) -> barchart.Panel:
    """Draw floating bars from the lower to the upper end; the colour changes at the ratio."""
    below, lower, upper = "below", "lower end to ratio", "ratio to upper end"
    parts = {below: low, lower: f"{value} - {low}", upper: f"{high} - {value}"}
    panel = beside(title, says, TIMES, row, parts, limit).stacking(kinds.StackingMode.NORMAL)
    hidden = {"legend": True, "tooltip": True, "viz": False}
    panel.override_by_name(
        below,
        [
            DynamicConfigValue("custom.fillOpacity", 0),
            DynamicConfigValue("custom.lineWidth", 0),
            DynamicConfigValue("custom.hideFrom", hidden),
        ],
    )
    for name, colour in ((lower, palette.BLUE), (upper, palette.SKY)):
        panel.override_by_name(name, [_fixed(colour)])
    return panel


def with_interval(
    title: str, says: str, unit: str, row: str, value: str, low: str, high: str
) -> barchart.Panel:
    """Draw a bar for each `row` up to the lower end of its interval, and the interval on it.

    Without an interval the bar reaches to the value.
    """
    below, lower, upper = "to the lower end", "lower end to mean", "mean to upper end"
    least = f"clamp_min({low}, 0) or {value}"
    parts = {below: least, lower: f"{value} - ({least})", upper: f"({high} or {value}) - {value}"}
    panel = _sorted(beside(title, says, unit, row, parts), row)
    colours = {below: palette.BLUE, lower: palette.SKY, upper: palette.ORANGE}
    for name, colour in colours.items():
        panel.override_by_name(name, [_fixed(colour)])
    return panel.stacking(kinds.StackingMode.NORMAL)


def without_interval(title: str, says: str, unit: str, row: str, value: str) -> barchart.Panel:
    """Draw a bar for each `row`, in the place and the colour of one `with_interval`."""
    panel = _sorted(beside(title, says, unit, row, {"over all repeats": value}), row)
    return panel.override_by_name("over all repeats", [_fixed(palette.BLUE)])


def _sorted(panel: barchart.Panel, row: str) -> barchart.Panel:
    """Sort the bars by the name of their row, and give them room."""
    panel.with_transformation(
        DataTransformerConfig("sortBy", options={"fields": {}, "sort": [{"field": row}]})
    )
    return panel.height(14)


@dataclass(frozen=True)
class Column:
    """A table's column: a label, or the value of a query; without a name it is not shown."""

    name: str = ""
    label: str = ""
    expr: str = ""
    width: int = 0
    unit: str = ""
    colours: Mapping[str, str] | None = None  # how a cell's text begins -> its colour


def rows(title: str, says: str, *columns: Column, sort_by: str = "") -> table.Panel:
    """Draw a table of finished runs, in which queries whose labels agree share a row."""
    panel = (
        table.Panel()
        .title(title)
        .description(says)
        .unit(PLAIN)
        .decimals(3)
        .height(10)
        .span(24)
        .datasource(DATASOURCE)
        .filterable(True)
        .thresholds(_thresholds(None))
    )
    values = {c.name: c.expr for c in columns if c.expr}
    _merge(panel, [c.label for c in columns if c.label], values)
    order = {c.label or c.name: place for place, c in enumerate(columns) if c.name}
    names = {c.label: c.name for c in columns if c.label}
    panel.with_transformation(
        DataTransformerConfig("organize", options={"indexByName": order, "renameByName": names})
    )
    for column in columns:
        if column.width:
            panel.override_by_name(column.name, [DynamicConfigValue("custom.width", column.width)])
        if column.unit:
            panel.override_by_name(column.name, [DynamicConfigValue("unit", column.unit)])
        if column.colours:
            words = [  # more may follow: `open, trivial`, `broken (120% of it)`
                RegexMap(
                    DashboardRegexMapOptions(
                        f"({word}.*)", ValueMappingResult("$1", colour, index=place)
                    )
                )
                for place, (word, colour) in enumerate(column.colours.items())
            ]
            panel.override_by_name(
                column.name,
                [
                    DynamicConfigValue("mappings", words),
                    DynamicConfigValue("custom.cellOptions", {"type": "color-text"}),
                ],
            )
    if sort_by:
        panel.sort_by([common.TableSortByFieldState().display_name(sort_by)])
    return panel


def _merge(
    panel: barchart.Panel | table.Panel, labels: Sequence[str], queries: Mapping[str, str]
) -> None:
    """Show the queries' values under their names, beside the labels, and no other columns.

    A query without a name contributes its labels only.
    """
    refs = dict(zip(string.ascii_uppercase, queries, strict=False))
    for ref, name in refs.items():
        panel.with_target(_instant(ref, queries[name]))
    values = {ref: f"Value #{ref}" if len(refs) > 1 else "Value" for ref in refs}
    renamed = {values[ref]: name for ref, name in refs.items() if name}
    panel.with_transformation(DataTransformerConfig("merge", options={}))
    keep: dict[str, Any] = {"include": {"names": [*labels, *renamed]}}
    panel.with_transformation(DataTransformerConfig("filterFieldsByName", options=keep))
    panel.with_transformation(DataTransformerConfig("organize", options={"renameByName": renamed}))


def _instant(ref: str, expr: str) -> prometheus.Dataquery:
    return (
        prometheus.Dataquery()
        .expr(expr)
        .instant()
        .format(PromQueryFormat.TABLE)
        .ref_id(ref)
        .datasource(DATASOURCE)
    )


def _bars(title: str, says: str, unit: str, limit: float | None) -> barchart.Panel:
    return (
        _headed(barchart.Panel(), title, says, unit, limit)
        .height(9)
        .color_scheme(dashboard.FieldColor().mode(FieldColorModeId.PALETTE_CLASSIC))
        .fill_opacity(80)
        .show_value(kinds.VisibilityMode.NEVER)
        .x_tick_label_max_length(28)
    )


def _headed(panel: Chart, title: str, says: str, unit: str, limit: float | None) -> Chart:
    """Set what all charts have: words, unit, legend, and a dashed line at the limit."""
    legend = (
        common.VizLegendOptions()
        .display_mode(kinds.LegendDisplayMode.LIST)
        .placement(kinds.LegendPlacement.BOTTOM)
        .show_legend(True)
    )
    panel.title(title).description(says).unit(unit).min(0).span(12).datasource(DATASOURCE)
    panel.legend(legend).thresholds(_thresholds(limit))
    panel.tooltip(common.VizTooltipOptions().mode(kinds.TooltipDisplayMode.MULTI))
    if limit is not None:
        style = common.GraphThresholdsStyleConfig().mode(kinds.GraphThresholdsStyleMode.DASHED)
        panel.thresholds_style(style)
    return panel


def _fixed(colour: str) -> DynamicConfigValue:
    return DynamicConfigValue("color", {"mode": "fixed", "fixedColor": colour})


def coloured(panel: dict[str, Any], variants: Sequence[Sequence[str]]) -> None:
    """Give each variant's lines and bars its colour; no two variants of one lab share one."""
    if panel["type"] in ("timeseries", "barchart"):
        overrides = panel["fieldConfig"].setdefault("overrides", [])
        overrides[:0] = [
            {
                "matcher": {"id": "byRegexp", "options": f"/^({'|'.join(names)})$/"},
                "properties": [_fixed(colour).to_json()],
            }
            for colour, names in shared_out(variants).items()
        ]


def shared_out(variants: Sequence[Sequence[str]]) -> dict[str, list[str]]:
    """Assign colours to the variants of all labs; return colour -> the variants that have it."""
    colour_of: dict[str, str] = {}
    for lab in variants:
        free = [c for c in palette.VARIANTS if c not in {colour_of.get(name) for name in lab}]
        colour_of |= dict(zip((n for n in lab if n not in colour_of), free, strict=False))
    names: dict[str, list[str]] = {}
    for name, colour in colour_of.items():
        names.setdefault(colour, []).append(name)
    return names


def _thresholds(limit: float | None) -> ThresholdsConfig:
    steps = [Threshold(value=None, color="green")]
    if limit is not None:
        steps.append(Threshold(value=limit, color=palette.BOUND))
    return ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(steps)


# ---------------------------------------------------------------------------- a board and its head


def choice(name: str, label: str, query: str, several: bool = False) -> dashboard.QueryVariable:
    """Make a drop-down of a label's values; the newest run comes first, since run ids are times."""
    order = VariableSort.ALPHABETICAL_DESC if name == "run" else VariableSort.ALPHABETICAL_ASC
    variable = (
        dashboard.QueryVariable(name)
        .label(label)
        .query(query)
        .definition(query)
        .datasource(DATASOURCE)
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(order)
        .multi(several)
        .include_all(several)
    )
    if several:
        everything: Any = {"selected": True, "text": ["All"], "value": ["$__all"]}
        variable.current(everything).all_value(".*")
    return variable


def moments(name: str, expr: str, colour: str, title: str) -> dashboard.AnnotationQuery:
    """Mark a region of time for as long as the query has a value."""
    query = prometheus.Dataquery().expr(expr).range().ref_id("Anno").datasource(DATASOURCE)
    return (
        dashboard.AnnotationQuery()
        .name(name)
        .datasource(DATASOURCE)
        .enable(True)
        .icon_color(colour)
        .expr(expr)
        .step("1s")
        .target(query)
        .title_format(title)
        .text_format("{{variant}}")
        .tag_keys("lab,variant,run_id")
    )


def recorded_runs() -> dashboard.AnnotationQuery:
    """Mark the regions of time that `make grafana-push` has written, one for each run."""
    tagged: Any = dashboard.AnnotationTarget().limit(100).match_any(False).tags([TAG]).type("tags")
    return (
        dashboard.AnnotationQuery()
        .name("Runs")
        .datasource(DataSourceRef("datasource", "-- Grafana --"))
        .enable(True)
        .icon_color("light-blue")
        .target(tagged)
    )


def board(
    uid: str,
    title: str,
    says: str,
    since: str,
    refresh: str,
    variables: Sequence[dashboard.QueryVariable],
    annotations: Sequence[dashboard.AnnotationQuery],
    parts: Sequence[tuple[str, Sequence[Panel]]],
) -> dashboard.Dashboard:
    """Put a dashboard together; each of the `parts` is a row's title and its panels."""
    links = (
        dashboard.DashboardLink("The lab's dashboards")
        .type(DashboardLinkType.DASHBOARDS)
        .tags([TAG])
        .include_vars(True)
    )
    built = (
        dashboard.Dashboard(title)
        .uid(uid)
        .description(says)
        .tags([TAG])
        .timezone("browser")
        .editable()
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .time(since, "now")
        .refresh(refresh)
        .link(links)
    )
    for variable in variables:
        built.with_variable(variable)
    for annotation in annotations:
        built.annotation(annotation)
    number = 0
    for part, panels in parts:
        number += 1
        built.with_row(dashboard.Row(part).id(number))
        for panel in panels:
            number += 1
            built.with_panel(panel.id(number))
    return built
