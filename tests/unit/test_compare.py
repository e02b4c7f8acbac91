"""Two runs side by side, and what is worse in the second."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Literal

import pytest

from labs.harness.analysis.verdicts import Contrast, ForecastResult, Interval, contrast
from labs.harness.comparison import compare, outcomes, side_by_side, worse
from labs.harness.comparison.comparison import ComparedFigure, Comparison, VerdictPair
from labs.harness.comparison.sides import Side, read_side
from labs.harness.derived.summarize import summarise
from labs.harness.reports.markdown import Markdown
from labs.harness.spec.lab import MARGIN, LabError, Prediction, digest_of
from labs.harness.storage import results
from labs.harness.storage.results import RunFolder
from labs.harness.storage.writing import write_json
from tests.unit.builders import MACHINE, make_claim, write_run, write_slowed

ALLOWED = worse.thresholds()
Bounds = tuple[float, float | None, float | None] | None


def compared(a: RunFolder, b: RunFolder, force: bool = False) -> Comparison:
    """Compare what their summaries say, which tests write by hand."""
    side_a, side_b = (Side(f, None, f.run(), f.summary()) for f in (a, b))
    return compare.compare(side_a, side_b, force)


def row(found: Comparison, figure: str, where: str) -> ComparedFigure:
    return next(r for r in found.rows if (r.figure, r.where) == (figure, where))


def effects(found: Comparison) -> list[ComparedFigure]:
    return [r for r in found.rows if r.kind == "effect"]


def tables(found: Comparison) -> Markdown:
    rows = side_by_side.comparable(found)
    return side_by_side.tables(found, rows, "Figures", found.forced, found.loads)


def edited(folder: RunFolder, machine: str = MACHINE.model, **lab: object) -> RunFolder:
    """A copy whose lab or machine is another."""
    run = folder.run()
    fields = {**run.lab, **lab}
    host = run.machine.model_copy(update={"model": machine})
    digest = digest_of(fields)
    name = f"20260103T000000Z-{digest}"
    copy = RunFolder(folder.path.parents[2] / host.slug / "tiny" / name)
    shutil.copytree(folder.path, copy.path)
    update = {"lab": fields, "machine": host, "digest": digest, "run_id": name}
    write_json(copy.path / "run.json", run.model_copy(update=update))
    summarise(copy)
    return copy


# ------------------------------------------------------------------------------------- statistics


def test_paired_ratio_sees_through_what_both_repeats_share() -> None:
    found = contrast({1: 2.0, 2: 200.0, 3: 20.2}, {1: 1.0, 2: 100.0, 3: 10.0}, paired=True)
    assert found
    assert found.p
    assert found.ratio.n == 3
    assert found.ratio.low
    assert found.ratio.high
    # logs: ln 2 twice and ln 2.02; mean ln 2 + 0.003317, s = 0.005745, t(2) = 4.3027
    assert math.log(found.ratio.value / 2) == pytest.approx(0.003317, rel=1e-3)
    half = 4.3027 * 0.005745 / math.sqrt(3)
    assert math.log(found.ratio.high / found.ratio.value) == pytest.approx(half, rel=1e-3)
    assert found.p < 0.001


def test_unpaired_ratio_has_welchs_interval() -> None:
    e = math.e
    found = contrast({1: 1.0, 2: e**0.2}, {1: e, 2: e**1.2}, paired=False)
    assert found
    assert found.ratio.low
    # mean logs 0.1 and 1.1; both variances 0.02, so that se = sqrt(0.02) and t(2) = 4.3027
    assert math.log(found.ratio.value) == pytest.approx(-1)
    assert math.log(found.ratio.low) == pytest.approx(-1 - 4.3027 * math.sqrt(0.02), rel=1e-4)


def test_one_repeat_has_no_interval_and_exact_counts_have_an_exact_one() -> None:
    single = contrast({1: 2.0}, {1: 1.0}, paired=True)
    exact = contrast({1: 64.0, 2: 64.0}, {1: 32.0, 2: 32.0}, paired=False)
    assert single
    assert exact
    assert (single.ratio.low, single.p) == (None, None)
    assert (exact.ratio.low, exact.ratio.high) == pytest.approx((2.0, 2.0))
    assert exact.p == 0
    assert contrast({2: 1.0}, {1: 1.0}, paired=True) is None


@pytest.mark.parametrize(
    ("p", "others", "ratio", "margin", "outcome"),
    [
        (0.04, [], 1.2, MARGIN, ("differs", "")),
        (0.04, [0.5] * 19, 1.2, MARGIN, ("undecided", "may be chance among so many figures")),
        (0.04, [0.04] * 19, 1.2, MARGIN, ("differs", "")),
        (0.04, [], 1.04, MARGIN, ("same", "within 5%")),
        (0.04, [], 1.2, 0.25, ("same", "within 25%")),
        (0.04, [], 1.04, 0.02, ("differs", "")),
    ],
)
def test_a_figure_differs_beyond_its_margin_and_beyond_chance_among_all(
    p: float, others: list[float], ratio: float, margin: float, outcome: tuple[str, str]
) -> None:
    first = judged(p, *others, ratio=ratio, margin=margin)[0]
    assert (first.outcome, first.why) == outcome


def test_an_interval_that_reaches_beyond_the_margin_decides_nothing() -> None:
    open_ = zeros(0.01).model_copy(
        update={
            "contrast": Contrast(ratio=Interval(value=1.04, low=1.01, high=1.07, n=3), p=0.01),
            "why": "",
        }
    )
    (found,) = outcomes.judged([open_])
    assert (found.outcome, found.why) == ("undecided", "the interval reaches beyond 5%")


def judged(*ps: float, ratio: float = 1.2, margin: float = MARGIN) -> list[ComparedFigure]:
    found = contrast({1: ratio, 2: ratio}, {1: 1.0, 2: 1.0}, paired=True)
    assert found
    rows = [
        ComparedFigure(
            figure="tpot_mean_s", where="x", unit="s", better="lower", a=1, b=ratio,
            margin=margin, contrast=found.model_copy(update={"p": p}), outcome="undecided",
        )
        for p in ps
    ]  # fmt: skip
    return outcomes.judged(rows)


# --------------------------------------------------------------------------------------- comparing


def test_a_run_is_the_same_as_itself(folder: RunFolder) -> None:
    found = compared(folder, folder)
    assert found.rows
    assert {r.outcome for r in found.rows} == {"same"}
    assert all(v.outcome == "same" and not v.flips for v in found.verdicts)
    assert found.paired
    assert found.differences == []
    assert worse.failures(found, ALLOWED) == []


def test_a_slower_copy_differs_by_as_much_and_fails(folder: RunFolder) -> None:
    slow = write_slowed(folder, 1.25)
    found = compared(folder, slow)
    rate = row(found, "output_tokens_per_s", "on/short/concurrent-1")
    assert rate.outcome == "differs"
    assert rate.contrast
    assert rate.contrast.ratio.value == pytest.approx(0.8)
    assert rate.worse_by == pytest.approx(0.25)
    assert {r.outcome for r in effects(found)} == {"same"}  # both sides slowed alike
    failed = worse.failures(found, ALLOWED)
    assert any("TPOT, mean" in line and "worse by 25%, 10% allowed" in line for line in failed)
    assert worse.failures(compared(slow, folder), ALLOWED) == []  # faster


def test_a_comparison_begins_with_what_to_decide_by(folder: RunFolder) -> None:
    slow = with_figure(write_slowed(folder, 1.25), "error_rate", 0.1)
    found = compared(folder, slow)
    first, _, rest = side_by_side.headline(found).partition("\n\n")
    assert first.startswith("B is worse on Output throughput (0.80x at 3 of 4 points); ")
    assert "better" not in first
    assert "Error rate (from 0)" in first
    assert re.search(r"ITL, p99 \([^)]* to [^)]*, 1.25x at on, 2 users\)", first)
    assert "MBU" not in first
    assert rest.startswith("- A: ")
    summary = slow.summary()
    summary.measurements["off/short/concurrent-1"].clear()
    write_json(slow.path / "summary.json", summary)
    (only,) = re.findall("as only A has it: (.*)", side_by_side.headline(compared(folder, slow)))
    assert "off, 1 user" in only  # a whole place
    faster = side_by_side.headline(compared(slow, folder))
    assert re.match("At off, . users?, B is better on Output throughput [(].* 1.25x[)]", faster)
    same = side_by_side.headline(compared(folder, folder))
    assert same.startswith("No figure of B is shown to be better or worse than A's.")
    side_a, side_b = (Side(f, "on", f.run(), f.summary()) for f in (folder, slow))
    one, *_ = side_by_side.headline(compare.compare(side_a, side_b)).split("\n\n")
    assert re.match("At . users?, `on` is worse on ", one)


def test_a_margin_lets_pass_what_it_says(folder: RunFolder, tmp_path: Path) -> None:
    found = compared(folder, write_slowed(folder, 1.25))
    wide = tmp_path / "wide.toml"
    wide.write_text("[worse]\ndefault = 0.3\n")
    failed = worse.failures(found, worse.thresholds(wide))
    assert not [line for line in failed if "worse by" in line]
    assert failed  # nothing meets the SLO any more, of which no share is left
    wide.write_text("[worse]\ndefault = 0.3\ntpot_mean_s = 0.2\n")
    failed = worse.failures(found, worse.thresholds(wide))
    assert {line.partition(" at ")[0] for line in failed if "worse by" in line} == {"TPOT, mean"}


def test_a_verdict_that_flips_fails_whatever_the_margins(folder: RunFolder, tmp_path: Path) -> None:
    """`on`, three times as fast, is made six times slower: it hurts."""
    slow = write_slowed(folder, 6, variant="on")
    blind = tmp_path / "blind.toml"
    blind.write_text("[worse]\ndefault = 100\n")
    failed = worse.failures(compared(folder, slow), worse.thresholds(blind))
    assert ["helps in the baseline, hurts now" in line for line in failed[:2]] == [True, True]
    assert "helps in the baseline" not in str(failed[2:])


def test_a_lost_flag_fails(folder: RunFolder) -> None:
    """What made `on` three times as fast is lost; or it is, and the engine's counters show it."""
    failed = worse.failures(compared(folder, write_slowed(folder, 3, variant="on")), ALLOWED)
    assert any("Output throughput at on/short/concurrent-1: worse by 200%" in f for f in failed)
    summary = folder.summary()
    lost = [j.model_copy(update={"outcome": "not valid"}) for j in summary.judgements]
    seen = edited(folder)
    write_json(seen.path / "summary.json", summary.model_copy(update={"judgements": lost}))
    failed = worse.failures(compared(folder, seen), ALLOWED)
    assert ["helps in the baseline, not valid now" in line for line in failed] == [True, True]


def test_what_is_missing_now_fails_but_for_percentiles_of_too_few_samples(
    folder: RunFolder,
) -> None:
    bare, place = write_slowed(folder, 1), "on/short/concurrent-1"
    summary = bare.summary()
    for repeat in summary.measurements[place].values():
        repeat["ttft_p50_s"] = None
    summary.pooled[place].pop("ttft_p50_s", None)
    write_json(bare.path / "summary.json", summary)
    assert row(compared(folder, bare), "ttft_p50_s", place).b is None
    assert worse.failures(compared(folder, bare), ALLOWED) == []
    summary.measurements[place].clear()
    write_json(bare.path / "summary.json", summary)
    failed = worse.failures(compared(folder, bare), ALLOWED)
    assert f"Output throughput at {place}: missing now" in failed


def test_a_run_that_is_not_complete_fails_by_the_names_of_failed_trials(folder: RunFolder) -> None:
    """What is left of it is as good as the baseline."""
    crashed = write_slowed(folder, 1)
    complete = crashed.summary()
    failed = {f"on/short/concurrent-2/{n}": "the engine died" for n in range(2, 10)}
    update = {"failed": failed, "missing": 1}
    write_json(crashed.path / "summary.json", crashed.summary().model_copy(update=update))
    named = ", ".join(list(failed)[:6])
    assert worse.failures(compared(folder, crashed), ALLOWED) == [
        f"{name_of(crashed)} is not complete: 8 trials failed ({named}, ...), 1 trial not played"
    ]
    assert worse.failures(compared(crashed, folder), ALLOWED) == []
    assert worse.failures(compared(crashed, crashed), ALLOWED) == []
    write_json(crashed.path / "summary.json", complete)
    (crashed.path / "COMPLETE").unlink()
    assert worse.failures(compared(folder, crashed), ALLOWED) == [
        f"{name_of(crashed)} is not complete: the run has not ended"
    ]


def name_of(folder: RunFolder) -> str:
    return Side(folder, None, folder.run(), folder.summary()).name


def with_figure(folder: RunFolder, metric: str, *values: float) -> RunFolder:
    """The run with these values of a metric, a repeat each, at one point of `on`."""
    summary = folder.summary()
    repeats = summary.measurements["on/short/concurrent-1"]
    several = {n: {**repeats[1], metric: value} for n, value in enumerate(values, 1)}
    measurements = {**summary.measurements, "on/short/concurrent-1": several}
    write_json(
        folder.path / "summary.json", summary.model_copy(update={"measurements": measurements})
    )
    return folder


@pytest.mark.parametrize(
    ("metric", "before", "now", "failed"),
    [
        ("goodput_per_s", [14.0, 14, 14, 14, 14], [0.0, 0, 0, 0, 0.3], True),
        ("goodput_per_s", [0.0, 0, 0, 0, 0.3], [14.0, 14, 14, 14, 14], False),  # better
        ("goodput_per_s", [14.0, 14, 14, 14, 14], [14.0, 14, 0, 14, 14], False),  # chance
        ("goodput_per_s", [14.0, 0, 14, 14, 13], [13.0, 14, 0, 14, 14], False),
        ("error_rate", [0.0] * 6, [0.009] * 5 + [0], True),
        ("error_rate", [0.0] * 6, [0.009] + [0.0] * 5, True),
        ("error_rate", [0.009] * 5 + [0], [0.0] * 6, False),
        ("error_rate", [0, 0.01, 0, 0, 0.02, 0], [0, 0, 0.02, 0.01, 0, 0.01], False),
        ("error_rate", [0.001, 0, 0.001, 0, 0, 0], [0.2, 0.21, 0.19, 0.2, 0.2, 0.2], True),
    ],
)
def test_a_figure_that_is_zero_in_some_repeats_is_judged_by_its_means(
    folder: RunFolder, metric: str, before: list[float], now: list[float], failed: bool
) -> None:
    other = with_figure(write_slowed(folder, 1), metric, *now)
    found = compared(with_figure(folder, metric, *before), other)
    figure = row(found, metric, "on/short/concurrent-1")
    assert figure.contrast is None
    told = worse.failures(found, ALLOWED)
    assert [line.partition(" at ")[0] for line in told] == [figure.title] * failed
    if failed:
        assert f"{figure.a:.3g} in the baseline, {figure.b:.3g} now" in told[0]


def test_what_is_zero_in_some_repeats_may_be_chance_among_many(folder: RunFolder) -> None:
    """A difference of means is one of the figures among which false discoveries are bounded."""
    (lone,) = outcomes.judged([zeros(0.04)])
    assert (lone.outcome, lone.why) == ("differs", "zero in some repeats")
    among_many = outcomes.judged([zeros(0.04), *[zeros(0.5)] * 19])[0]
    assert among_many.outcome == "undecided"
    assert outcomes.judged([zeros(0.04, b=0.0101)])[0].outcome == "undecided"  # the margin
    assert "p_of_difference" not in json.loads(judged(0.5)[0].model_dump_json())
    side = compared(folder, with_figure(write_slowed(folder, 1), "error_rate", 0, 0.1, 0.2))
    assert row(side, "error_rate", "on/short/concurrent-1").p_of_difference


def zeros(p: float, b: float = 0.02) -> ComparedFigure:
    return ComparedFigure(
        figure="error_rate", where="x", unit="share", better="lower", a=0.01, b=b, contrast=None,
        p_of_difference=p, outcome="undecided", why="zero in some repeats",
    )  # fmt: skip


def test_what_could_not_fail_does_not_pass(folder: RunFolder) -> None:
    """One repeat each: no figure has an interval."""
    other = write_slowed(folder, 3)
    for run in (folder, other):
        summary = run.summary()
        for rows in summary.measurements.values():
            del rows[2]
            del rows[1]["goodput_per_s"]  # there is none left, which takes no interval to see
        write_json(run.path / "summary.json", summary)
    (why,) = worse.failures(compared(folder, other), ALLOWED)
    assert "nothing is decided: measure more repeats" in why
    gone = with_figure(other, "error_rate", 0.1)  # what must not happen needs no interval
    assert worse.failures(compared(folder, gone), ALLOWED) == [
        "Error rate at on/short/concurrent-1: 0 in the baseline, 0.1 now"
    ]


def test_across_hardware_what_claims_compare_is_what_fails(folder: RunFolder) -> None:
    """Also where no figure without a dimension was forecast, as where all forecasts are bounds."""
    found = compared(folder, edited(folder, machine="Slide rule"))
    same = effects(found)
    assert [e.outcome for e in same] == ["same"] * 2
    assert worse.failures(found.model_copy(update={"rows": same}), ALLOWED) == []
    lost = compared(folder, edited(write_slowed(folder, 3, "on"), machine="Slide rule 2"))
    failed = worse.failures(
        lost.model_copy(update={"rows": effects(lost), "verdicts": []}), ALLOWED
    )
    assert [line.partition(" at ")[0] for line in failed] == ["effect on Output throughput"] * 2
    open_ = [e.model_copy(update={"outcome": "undecided"}) for e in same]
    for of, rows, said in (
        (found, open_, "are too wide to tell"),
        (found, [], "no figure in common to compare (of other hardware"),
        (compared(folder, folder), [], "no figure in common to compare, so nothing"),
    ):
        (why,) = worse.failures(of.model_copy(update={"rows": rows}), ALLOWED)
        assert said in why


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[worse]\nspeed = 0.1\ndefault = 0.1", "names unknown figures: speed"),
        ("[worse]\ntpot_mean_s = 0.1", "has no `default`"),
        ("[worse\n", "is not a file of thresholds"),
        ("[worse]\ndefault = -1", "is not a file of thresholds"),
    ],
)
def test_thresholds_that_make_no_sense_are_refused(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "t.toml"
    path.write_text(text)
    with pytest.raises(LabError, match=said):
        worse.thresholds(path)


def test_variants_of_a_run_are_compared_where_they_met_the_same(folder: RunFolder) -> None:
    off, on = (read_side(f"{folder.path}:{name}") for name in ("off", "on"))
    found = compare.compare(off, on)
    rate = row(found, "output_tokens_per_s", "short/concurrent-1")
    assert rate.outcome == "differs"
    assert rate.contrast
    assert rate.contrast.ratio.value == pytest.approx(math.sqrt(301 * 302 / (101 * 102)))
    assert not found.verdicts
    assert not effects(found)
    with pytest.raises(LabError, match="has no variant 'best'; it has off, on"):
        read_side(f"{folder.path}:best")
    with pytest.raises(LabError, match="on both sides"):
        compare.compare(off, read_side(str(folder.path)))


def test_another_load_is_refused_and_forced_it_is_said_on_every_table(folder: RunFolder) -> None:
    longer = edited(folder, window_s=60)
    with pytest.raises(LabError, match=r"not sent the same load: window_s differ; FORCE=1"):
        compared(folder, longer)
    found = compared(folder, longer, force=True)
    forced = "(FORCED: they were not sent the same load: window_s differ)"
    headings = re.findall("^# .*$", tables(found), re.M)
    assert len(headings) > 2
    assert all(heading.endswith(forced) for heading in headings)
    assert "not comparable: they were not sent" in worse.failures(found, ALLOWED)[0]


def quick_form(folder: RunFolder, **workload: object) -> RunFolder:
    """A quick run of the same lab: the first load alone, in a shorter window."""
    (whole,) = folder.run().lab["workloads"]
    cut = {**whole, "loads": whole["loads"][:1], **workload}
    quick = edited(folder, workloads=[cut], requests=7, window_s=3.0)
    write_json(quick.path / "run.json", quick.run().model_copy(update={"quick": True}))
    return quick


def test_of_a_quick_and_a_full_run_what_both_have_is_compared(folder: RunFolder) -> None:
    """And it is not taken for the whole."""
    quick = quick_form(folder)
    found = compared(folder, quick)
    assert found.in_part == (
        "A is a full run of 4 points, B a quick one of 2: compared is what both have, at 2 points;"
        " requests 8 / 7, window_s 4 / 3"
    )
    assert f"- {found.in_part}." in side_by_side.headline(found)
    assert {r.where for r in found.rows if r.kind == "metric"} == {
        "off/short/concurrent-1", "on/short/concurrent-1",
    }  # fmt: skip
    assert [(v.a, v.b, v.outcome) for v in found.verdicts] == [("helps", "helps", "same")]
    assert not [r for r in found.rows if r.why.startswith("missing")]
    assert [f for f in worse.failures(found, ALLOWED) if "not all is compared" in f]
    one, whole = (Side(f, "on", f.run(), f.summary()) for f in (quick, folder))
    assert "A is a quick run of 1 point, B a full one of 2" in compare.compare(one, whole).in_part


def test_a_quick_run_that_sends_something_else_is_refused(folder: RunFolder) -> None:
    other = quick_form(folder, output_tokens={"kind": "fixed", "tokens": 2})
    with pytest.raises(LabError, match="no point of the other was sent the same load"):
        compared(folder, other)


def test_what_is_no_other_load(folder: RunFolder) -> None:
    """A field that came later, and a number that a run chose for its machine."""
    with pytest.raises(LabError, match="load_processes differ"):
        compared(folder, edited(folder, load_processes=2))
    chosen = edited(folder, load_processes=3, load_processes_chosen=True)
    assert compared(folder, chosen).forced == ""
    old = folder.run()
    del old.lab["load_processes"]
    write_json(folder.path / "run.json", old)
    assert compared(folder, write_slowed(folder, 1)).forced == ""


def test_other_flags_are_compared_and_what_differs_most_is_named_first(folder: RunFolder) -> None:
    other = edited(folder, flags={"max-model-len": 256})
    for at, vllm, zipp in ((folder, "1", "8"), (other, "2", "9")):
        run = at.run()
        packages = run.environment.model_copy(update={"packages": {"zipp": zipp, "vllm": vllm}})
        write_json(at.path / "run.json", run.model_copy(update={"environment": packages}))
    differ = compared(folder, other).differences
    assert str(differ[0]) == "lab.flags.max-model-len: 128 / 256"
    assert [fact.what.rpartition(".")[2] for fact in differ[1:]] == ["vllm", "zipp"]


def test_on_other_hardware_only_what_has_no_dimension_is_compared(folder: RunFolder) -> None:
    found = compared(folder, edited(folder, machine="Slide rule"))
    assert not found.same_hardware
    assert {r.unit for r in found.rows} <= {"1", "share"}
    assert len(effects(found)) == 2
    assert found.left_out > 4
    assert found.differences[0].what == "machine.model"


@pytest.mark.parametrize(
    ("endpoint", "same"),
    [
        ("http://127.0.0.1:8000", False),
        ("http://localhost:8000/v1", False),
        ("http://[::1]:8000", False),
        ("http://gpu-7:8000", True),
        ("http://[::1", True),  # of no host
        (None, False),
    ],
)
def test_an_address_of_every_machine_is_not_the_same_hardware(
    folder: RunFolder, endpoint: str | None, same: bool
) -> None:
    """Two machines that each drive a server of their own, and two that drive the same one."""
    here, there = folder, edited(folder, machine="Slide rule")
    for side in (here, there):
        run = side.run().model_copy(update={"endpoint": endpoint})
        write_json(side.path / "run.json", run)
    assert compared(here, there).same_hardware == same
    assert compared(here, here).same_hardware


def test_shares_of_its_own_ceilings_are_properties_of_a_machine(folder: RunFolder) -> None:
    other = edited(folder, machine="Slide rule")
    summary = other.summary()
    for rows in summary.measurements.values():
        for values in rows.values():
            values["mbu"] = 2 * (values["mbu"] or 0)
    write_json(other.path / "summary.json", summary)
    found = compared(folder, other)
    assert not {"mbu", "mfu"} & {r.metric for r in found.rows}
    assert [p.figure for p in found.of_machines] == ["mbu", "mfu"]
    mbu = found.of_machines[0]
    assert mbu.points == 4
    assert mbu.b == pytest.approx((2 * mbu.a[0], 2 * mbu.a[1]))
    assert "# Properties of the machines" in tables(found)

    here = compared(folder, write_slowed(folder, 1.25))
    assert row(here, "mbu", "on/short/concurrent-1").outcome == "differs"
    assert here.of_machines == []


def test_what_was_reached_of_a_bound_is_a_property_of_a_machine_too(folder: RunFolder) -> None:
    other = edited(folder, machine="Slide rule")
    kinds: list[tuple[int, Literal["ceiling", "point"]]] = [(1, "ceiling"), (2, "point")]
    for run in (folder, other):
        told = [
            ForecastResult(
                metric="output_tokens_per_s", point=f"on/short/concurrent-{n}", measured=None,
                prediction=Prediction(value=1000, kind=kind, formula=""), outcome="open",
            )
            for n, kind in kinds
        ]  # fmt: skip
        summary = run.summary().model_copy(update={"forecasts": told})
        write_json(run.path / "summary.json", summary)
    found = compared(folder, other)
    share = "measured / predicted output_tokens_per_s"
    assert [r.where for r in found.rows if r.figure == share] == ["on/short/concurrent-2"]
    assert [p.points for p in found.of_machines if p.figure == share] == [1]


def test_an_effect_is_the_same_within_its_claims_margin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    wide = write_run(tmp_path, claims=(make_claim(margin=0.5),))
    found = compared(wide, write_slowed(wide, 1.3, variant="on"))
    assert [(r.outcome, r.why) for r in effects(found)] == [("same", "within 50%")] * 2


@pytest.mark.parametrize(
    ("a", "a_ratio", "b", "b_ratio", "outcome"),
    [
        ("helps", (2.0, 1.8, 2.2), "helps", (1.5, 1.4, 1.6), "same"),  # the verdict, not its size
        ("no effect", (1.0, 1.0, 1.0), "inconclusive", (1.05, 0.8, 1.38), "undecided"),
        ("helps", (1.3, 1.2, 1.4), "inconclusive", (1.2, 0.9, 1.5), "undecided"),
        ("helps", (1.3, 1.2, 1.4), "inconclusive", (1.05, 0.95, 1.15), "differs"),
        ("helps", (1.3, 1.2, 1.4), "hurts", (0.7, 0.6, 0.8), "differs"),
        ("helps", (1.06, 1.01, 1.11), "no effect", (1.0, 0.97, 1.03), "undecided"),
        ("helps", (1.3, 1.2, 1.4), "no effect", (1.0, 0.97, 1.03), "differs"),
        ("helps", (1.3, 1.2, 1.4), "inconclusive", (1.05, None, None), "undecided"),
        ("helps", (1.3, 1.2, 1.4), "not valid", None, "undecided"),
        ("helps", (1.3, 1.2, 1.4), "not valid", (0.7, 0.6, 0.8), "undecided"),
        ("inconclusive", (1.0, 0.8, 1.2), "no effect", (1.0, 1.0, 1.0), "not comparable"),
        ("not valid", None, "not valid", None, "not comparable"),
    ],
)
def test_what_became_of_a_verdict(
    a: str, a_ratio: Bounds, b: str, b_ratio: Bounds, outcome: str
) -> None:
    ratios = [r and Interval(value=r[0], low=r[1], high=r[2], n=3) for r in (a_ratio, b_ratio)]
    pair = VerdictPair(
        claim="c", title="t", where="x / y", a=a, b=b, a_ratio=ratios[0], b_ratio=ratios[1]
    )
    assert pair.outcome == outcome


def test_machines_are_compared_lab_by_lab_wherever_their_folders_lie(
    folder: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = edited(folder, machine="Slide rule")
    here, there = (f.path.parents[1] for f in (folder, other))
    (here / "machine.json").write_text("{}")  # the other has no ceilings of its own
    monkeypatch.setattr(results, "RESULTS", tmp_path / "elsewhere")
    found, refused = compare.compare_named(str(here), str(there))
    assert [c.lab for c in found] == ["tiny"]
    assert refused == []
    side_by_side.write_json(found, refused, folder.path / "compared.json")
    json.loads((folder.path / "compared.json").read_text())
    page = folder.path.parents[2] / "compared.md"
    side_by_side.write(found, refused, page)
    assert "| Claim | Where | A | B |" in page.read_text()
    assert "](compared-tiny.svg)" in page.read_text()
    assert "<svg" in page.with_name("compared-tiny.svg").read_text()
    with pytest.raises(LabError, match="two machines"):
        compare.compare_named(str(here), str(folder.path))
