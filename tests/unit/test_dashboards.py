"""The dashboards: in sync, well formed, and asking only for what somebody exports."""

from __future__ import annotations

import functools
import json
import os
import re
from pathlib import Path
from typing import Any, get_args

import jsonschema
import promql_parser
import pytest

from dashboards import boards, series
from dashboards.panels import shared_out
from labs import LABS
from labs.harness.analysis import verdicts
from labs.harness.analysis.checks import load
from labs.harness.analysis.metrics import METRICS
from loadtests.exporter import Exporter
from serving import metrics
from serving.hardware import telemetry
from tests import queries
from tests.cases import each

SCHEMA = Path(
    os.environ.get(
        "GRAFANA_SCHEMA",
        boards.FOLDER.parents[2] / "shared" / "grafana" / "dashboard.jsonschema.json",
    )
)
VARIANTS = [[variant.name for variant in lab.variants] for lab in LABS.values()]
BUILT: dict[str, dict[str, Any]] = {
    path.stem: json.loads(text) for path, text in boards.files(VARIANTS, METRICS).items()
}
EVERY = [(name, panel) for name, found in BUILT.items() for panel in boards.panels(found)]
RUN_ID = "20261125T111404Z-d3cbb5f9"
QUERIES = [
    *queries.expressions({"lab": "prefix-caching", "run": RUN_ID}),
    *(
        (name, variable["name"], variable["query"].split("(", 1)[1].rsplit(",", 1)[0])
        for name, found in BUILT.items()
        for variable in found["templating"]["list"]
    ),
]


def histogram(name: str) -> set[str]:
    return {f"{name}_bucket", f"{name}_sum", f"{name}_count"}


@functools.cache
def exported() -> set[str]:
    """Every sample's name that the client, the engine, finished runs and the GPUs have."""
    client: set[str] = set()
    for family in Exporter().registry.collect():
        kinds = {"histogram": histogram(family.name), "counter": {f"{family.name}_total"}}
        client |= kinds.get(family.type, {family.name})
    engine = {*metrics.COUNTERS, *metrics.GAUGES, *metrics.SPECULATION}
    for name in metrics.HISTOGRAMS:
        engine |= histogram(name)
    return client | engine | {*series.FINISHED, *telemetry.SERIES}


def asked(query: str) -> set[str]:
    found: set[str] = set()

    def note(node: Any) -> None:
        if isinstance(node, promql_parser.VectorSelector):
            found.add(str(node.name))

    promql_parser.walk(promql_parser.parse(query), note)
    return found


def test_the_files_are_as_generated() -> None:
    for path, text in boards.files(VARIANTS, METRICS).items():
        assert path.read_text() == text, f"{path.name}: run `make readme`"
    assert {*boards.FOLDER.iterdir()} == {*boards.files(VARIANTS, METRICS)}


def test_writing_again_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boards, "FOLDER", tmp_path / "grafana")
    assert len(boards.write(VARIANTS, METRICS)) == len(boards.BOARDS)
    assert boards.write(VARIANTS, METRICS) == []
    one = tmp_path / "grafana" / "machines.json"
    one.write_text("{}")
    assert boards.write(VARIANTS, METRICS) == [one]


@each(("board", "panel", "query"), QUERIES)
def test_every_query_parses_and_asks_for_what_is_exported(
    board: str, panel: str, query: str
) -> None:
    assert "$" not in re.sub(r'"\$(lab|run|machine|at_workload)"', "", query)
    names = asked(query)
    assert names
    assert names <= exported()


@each(("board", "panel"), EVERY)
def test_rows_join_because_no_series_keeps_its_name(board: str, panel: dict[str, Any]) -> None:
    nameless = promql_parser.AggregateExpr | promql_parser.BinaryExpr
    if "merge" in [step["id"] for step in panel.get("transformations", ())]:
        for target in panel["targets"]:
            query = target["expr"].replace("$__range", "1h")
            parsed = promql_parser.parse(query)
            while isinstance(parsed, promql_parser.Call) and parsed.func.name == "label_join":
                parsed = parsed.args[0]  # it keeps a name, and gives none
            assert isinstance(parsed, nameless), query


def test_metrics_of_the_report_are_asked_for_by_their_names() -> None:
    found = {
        str(matcher.value)
        for _, _, query in QUERIES
        for node in _selectors(query)
        for matcher in node.matchers.matchers
        if matcher.name == "metric"
    }
    assert found
    assert found <= METRICS.keys()


def _selectors(query: str) -> list[Any]:
    found: list[Any] = []
    promql_parser.walk(
        promql_parser.parse(query),
        lambda n: found.append(n) if isinstance(n, promql_parser.VectorSelector) else None,
    )
    return found


def test_machines_shows_one_load_point_and_averages_nothing() -> None:
    chosen = {v["name"]: v for v in BUILT["machines"]["templating"]["list"]}
    for name in ("at_workload", "at_load"):
        assert not chosen[name]["multi"]
        assert not chosen[name]["includeAll"]
    assert 'workload="$at_workload"' in chosen["at_load"]["query"]
    for panel in boards.panels(BUILT["machines"]):
        for target in panel["targets"]:
            assert "avg" not in target["expr"], panel["title"]
            if series.MEASUREMENT in target["expr"]:
                assert 'workload="$at_workload",load="$at_load"' in target["expr"]


def test_compare_promises_an_interval_where_there_is_one() -> None:
    """A percentile over the samples of all repeats has none."""
    found = {panel["title"]: panel for panel in boards.panels(BUILT["compare"])}
    drawn = [(m, found[m.title]) for m in METRICS.values() if m.title in found]
    assert {m.name for m, _ in drawn if m.statistic.pooled} == {
        "ttft_p50_s", "itl_p99_s", "e2e_p50_s",
    }  # fmt: skip
    for metric, panel in drawn:
        asks = "".join(target["expr"] for target in panel["targets"])
        assert (f"{series.MEASUREMENT_LOW}{{" in asks) != metric.statistic.pooled, metric.name
        promised = "95% interval" in panel["description"]
        assert promised != metric.statistic.pooled, metric.name


def test_what_panels_ask_of_an_engine_on_file_is_kept_with_a_run() -> None:
    """But for the buckets of its histograms."""
    engine = {name for _, _, query in QUERIES for name in asked(query) if name.startswith("vllm:")}
    assert {name for name in engine if not name.endswith("_bucket")} == {*series.ENGINE_KEPT}


def test_uids_and_titles_are_their_own() -> None:
    assert len({found["uid"] for found in BUILT.values()}) == len(BUILT)
    for name, found in BUILT.items():
        titles = [panel["title"] for panel in boards.panels(found)]
        assert len(titles) == len(set(titles)), name
        ids = [panel["id"] for panel in found["panels"]]
        assert len(ids) == len(set(ids)), name


def test_panels_that_may_be_empty_are_panels() -> None:
    assert boards.NEEDS.keys() <= {panel["title"] for _, panel in EVERY}


def test_variants_of_a_lab_differ_in_colour_and_keep_theirs() -> None:
    colour_of = {n: colour for colour, names in shared_out(VARIANTS).items() for n in names}
    for lab in VARIANTS:
        assert len({colour_of[name] for name in lab}) == len(lab)
    for _, panel in EVERY:
        if panel["type"] != "table":
            fixed = [
                (o["matcher"]["options"], o["properties"][0]["value"]["fixedColor"])
                for o in panel["fieldConfig"]["overrides"]
                if o["matcher"]["id"] == "byRegexp"
            ]
            assert fixed == [
                (f"/^({'|'.join(names)})$/", colour)
                for colour, names in shared_out(VARIANTS).items()
            ]


def test_limits_are_those_of_the_verdicts() -> None:
    limits = {
        panel["title"]: panel["fieldConfig"]["defaults"]["thresholds"]["steps"][1]["value"]
        for panel in boards.panels(BUILT["generator"])
        if len(panel["fieldConfig"]["defaults"]["thresholds"]["steps"]) > 1
    }
    assert limits == {
        "Send lag": load.LATE_S,
        "Event-loop lag": load.MOST_LOOP_LAG_S,
        "Errors": load.MOST_ERRORS,
    }


def test_the_panel_of_errors_counts_what_a_verdict_counts() -> None:
    """And shows beside it what the engine turned away by its limit."""
    panel = next(p for p in boards.panels(BUILT["generator"]) if p["title"] == "Errors")
    share, turned_away = (target["expr"] for target in panel["targets"])
    assert 'outcome="error"' in share.partition("/")[0]
    assert 'outcome="turned away"' in turned_away.partition("/")[0]


def test_every_outcome_of_a_prediction_has_its_colour_with_whatever_follows() -> None:
    """As Grafana matches: from the beginning to the end, the first pattern that does."""
    table = next(p for p in boards.panels(boards.written()["compare"]) if p["title"] == "Verdicts")
    (mappings,) = (
        value["value"]
        for override in table["fieldConfig"]["overrides"]
        if override["matcher"]["options"] == "Prediction"
        for value in override["properties"]
        if value["id"] == "mappings"
    )

    def colour(text: str) -> str:
        found = (m["options"] for m in mappings if re.fullmatch(m["options"]["pattern"], text))
        return str(next(found)["result"]["color"])

    for outcome in get_args(verdicts.PredictionOutcome):
        for told in (outcome, f"{outcome}, trivial", f"{outcome} (120% of it)"):
            assert colour(told) == boards.PREDICTIONS[outcome]
    assert colour("open, trivial") != colour("held, trivial")


def test_every_outcome_of_a_verdict_has_its_colour() -> None:
    outcomes = verdicts.Judgement.model_fields["outcome"].annotation.__args__  # type: ignore[union-attr]
    assert set(outcomes) == boards.OUTCOMES.keys()


@functools.cache
def validator() -> Any:
    schema = json.loads(SCHEMA.read_text())
    # where Grafana takes any value, the published schema says object
    schema["definitions"]["MatcherConfig"]["properties"]["options"] = {}
    schema["definitions"]["DynamicConfigValue"]["properties"]["value"] = {}
    return jsonschema.validators.validator_for(schema)(schema)


@pytest.mark.skipif(not SCHEMA.exists(), reason="GRAFANA_SCHEMA names no dashboard.jsonschema.json")
@pytest.mark.parametrize("name", BUILT)
def test_dashboards_obey_the_published_schema(name: str) -> None:
    assert validator().is_valid(BUILT[name])
    broken = json.loads(json.dumps(BUILT[name]))
    broken["panels"][1]["fieldConfig"]["defaults"]["thresholds"]["mode"] = "nonsense"
    assert not validator().is_valid(broken)
