"""What a run says to each question of its lab."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from labs import LABS
from labs.chunked_prefill.facts import chunks_solve, split
from labs.continuous_batching.facts import both_ends, one_stream, ridge
from labs.harness import theory
from labs.harness.facts.context import Context, JudgedRun
from labs.harness.facts.drawing import plt
from labs.harness.facts.parts import Conclusion, answers, parts_of
from labs.harness.filing.results import (
    Agreement,
    Band,
    Finding,
    OnTwoEngines,
    PointForecasts,
    Predictions,
    Session,
    write_json,
)
from labs.harness.judging.metrics import METRICS
from labs.harness.page import ANSWERS, folder_of, page_of
from labs.harness.spec import Lab, LabError, Point, Variant
from labs.harness.telling import plots
from labs.speculative_decoding.facts import speculation_wins
from loadtests.workload import Intruder
from tests.unit.builders import CEILINGS, SHAPE, make_lab, make_workload
from tests.unit.judged import ABOUT, context, judged, judged_run, told_of, with_facts, withheld
from tests.unit.test_findings import guessing


def test_answers_neither_rank_nor_win_by_what_is_not_valid(tmp_path: Path) -> None:
    found = guessing(tmp_path / "guessing", {"none 1": 10.0, "guess 1": 8.0})
    found = replace(found, lab=found.lab.model_copy(update={"findings": ("speed-up",)}))
    valid, not_valid = (
        speculation_wins(judged_run(run)) or ""
        for run in (found, withheld(found, "none/story/concurrent-1"))
    )
    assert valid.startswith("The largest speed-up is 1.25x")
    assert not_valid.startswith("Speculation wins at no load that is valid. `guess` on story: not")


@pytest.mark.parametrize("lab", LABS.values(), ids=LABS)
def test_every_question_of_a_lab_has_an_answer_and_no_other(lab: Lab) -> None:
    """A lab without a file of facts leaves all of them unanswered."""
    if page := page_of(lab.name):
        assert page[ANSWERS].parts.keys() == set(lab.answers)
        return
    tells = (folder_of(lab.name) / "facts.py").exists()
    assert parts_of(lab.name).answers.keys() == (set(lab.answers) if tells else set())


@pytest.mark.parametrize("lab", LABS.values(), ids=LABS)
def test_a_run_of_which_nothing_came_invents_nothing(lab: Lab, tmp_path: Path) -> None:
    """What a cache holds is arithmetic all the same, and says so."""
    run = judged_run(context(tmp_path, lab.model_copy(update={"requests": 64}), {}))
    if page_of(lab.name):
        given = {id: str(blocks) for id, blocks in told_of(run).answers.items()}
    else:
        given = answers(run)
    assert given.keys() <= {"KV-2", "KV-3", "KV-7"}
    assert not [text for text in given.values() if "easured" in text]


def kept_in_part(lab: Lab) -> Iterator[dict[str, Any]]:
    """Settings that leave out one variant, workload or load, or all but one."""
    for field in ("variants", "workloads"):
        names = [part.name for part in getattr(lab, field)]
        for name in names:
            yield {field: [name]}
            yield {field: [other for other in names if other != name]}
    for workload in lab.workloads:
        if len(workload.loads) > 1:
            yield {f"workloads.{workload.name}.loads": [str(workload.loads[0])]}
        served = list(workload.only or [v.name for v in lab.variants])
        yield {f"workloads.{workload.name}.only": served[1:]}


SIZES = {
    "cpu": ("cpu", False, False),
    "gpu-quick": ("gpu-80", True, False),
    "gpu-quick-random": ("gpu-80", True, True),
}


def sizes_that_differ(name: str) -> Iterator[str]:
    """The sizes in which a lab is not what it is in the one before."""
    before: dict[str, Any] = {}
    for size, (scale, quick, dummy) in SIZES.items():
        resolved = LABS[name].at(scale, quick, dummy=dummy).resolved()
        if resolved != before:
            yield size
        before = resolved


def left_of(name: str, size: str) -> Iterator[tuple[Lab, list[Point]]]:
    """Each part of a lab in that size which a reader may keep, with few requests, and its points.

    Its figures are given, so that these are enough for the lengths.
    """
    scale, quick, dummy = SIZES[size]
    told = list[Any]()
    for changes in ({}, *kept_in_part(LABS[name].at(scale, quick, dummy=dummy))):
        try:
            lab = LABS[name].at(scale, quick, changes, dummy)
        except LabError:  # nothing is left, or nothing that tells a capacity
            continue
        lab = lab.model_copy(update={"requests": min(lab.requests, 256)})
        points = lab.points(SHAPE, CEILINGS, {}, ABOUT)
        kept = [v.name for v in lab.variants], [p.key for p in points]
        if kept not in told:
            told.append(kept)
            yield lab, points
    assert told


@pytest.mark.parametrize("name", LABS)
def test_findings_answers_and_plots_bear_what_is_left_out(name: str, tmp_path: Path) -> None:
    """All that a reader may keep of a lab, every figure of it measured; nothing may raise.

    A quick run on a GPU does without parts of it from the beginning. What has the same parts in
    another size is drawn once: a plot's axes take longer than all that is computed for them.
    """
    parts, drawn = parts_of(name), list[Any]()
    left = ((size, *part) for size in sizes_that_differ(name) for part in left_of(name, size))
    for i, (size, lab, points) in enumerate(left):
        values = {
            p.key: {metric: 0.5 + j / 100 for metric in METRICS} for j, p in enumerate(points)
        }
        run = judged_run(context(tmp_path / str(i), lab, values, about=ABOUT))
        if page_of(name):
            run = with_facts(run)
            assert len(told_of(run).findings) == len(lab.findings)
        else:
            for finding in lab.findings:
                assert parts.findings[finding].finding(run).title, (size, *values)
            answers(run)
        kinds = [(p.variant.name, p.workload.name, p.load.kind) for p in points]
        shown = [v.name for v in lab.variants], kinds, [*plots._drawn(lab)]
        if shown not in drawn:
            drawn.append(shown)
            for draw in plots._drawn(lab).values():
                draw(run)
                plt.close("all")


def swept(home: Path, intensities: tuple[float, float]) -> JudgedRun:
    lab = make_lab(variants=(Variant(name="base"),), claims=(), evidence=())
    values = {
        f"base/short/concurrent-{users}": {"intensity": i, "tpot_mean_s": 0.004 * users}
        for users, i in zip((1, 2), intensities, strict=True)
    }
    return judged_run(context(home, lab, values))


def test_the_side_of_the_ridge_is_told_by_the_intensities(tmp_path: Path) -> None:
    """10 MFLOP/s over 1 MB/s is a ridge of 10 FLOP a byte; a step reads 2 bytes for 2 FLOP."""
    below = ridge(swept(tmp_path, (1, 9)))
    assert below
    assert "1 at 1 in flight, 9 at 2" in below
    assert (
        "ridge is 10, a batch of about 10: by the work alone, memory bandwidth is the nearer"
        in below
    )
    across = ridge(swept(tmp_path / "b", (1, 11)))
    assert across
    assert "memory bandwidth is the nearer ceiling of the first, arithmetic of the last" in across
    above = ridge(swept(tmp_path / "c", (11, 20)))
    assert above
    assert "by the work alone, arithmetic is the nearer ceiling of both." in above


def test_one_stream_is_held_against_the_weights_and_the_bandwidth(tmp_path: Path) -> None:
    """2,000 bytes at 1 MB/s are 500 steps a second; 4 ms a token are half of that."""
    text = one_stream(swept(tmp_path, (1, 2)))
    assert text
    assert "at most 500 tok/s. Measured: 250 tok/s (1 / TPOT), 50% of it." in text


def test_the_time_of_a_step_is_told_beside_the_side_of_the_ridge(tmp_path: Path) -> None:
    """A step of 20 ms at one in flight reads for 2.3 ms: neither ceiling limits it."""
    lab = make_lab(variants=(Variant(name="base"),), claims=(), evidence=())
    text = ridge(judged_run(context(tmp_path, lab, {
        "base/short/concurrent-1": {"intensity": 1.0, "tpot_mean_s": 0.020, "batch": 1.0},
        "base/short/concurrent-2": {"intensity": 2.0, "tpot_mean_s": 0.004, "batch": 2.0},
    })))  # fmt: skip
    assert text
    # (2000 + 2 x 8 x 32) bytes at 1 MB/s; 2 x (2000 + 64 x 8) FLOP, and a quarter of a prefill
    flop = 2 * (2000 + 64 * 8) + theory.prefill_flops(SHAPE, 6) / 4
    assert (
        f"At 2 in flight an output token takes 4.00 ms: 2.51 ms (63%) reading, {flop / 1e4:.2f} ms"
    ) in text
    assert text.endswith(
        "By the measured times, neither ceiling limits a step at 1 in flight, and memory bandwidth"
        " limits one at 2."
    )


@pytest.mark.parametrize("users", [(1, 2), (1,)])
def test_the_parts_of_a_step_are_explained_in_one_answer(
    users: tuple[int, ...], tmp_path: Path
) -> None:
    lab = make_lab(variants=(Variant(name="base"),), claims=(), evidence=())
    figures = {"intensity": 1.0, "tpot_mean_s": 0.020, "batch": 1.0}
    run = judged_run(context(tmp_path, lab, {f"base/short/concurrent-{n}": figures for n in users}))
    texts = [ridge(run) or "", one_stream(run) or ""]
    assert "A step takes 20.0 ms" in texts[1]
    assert [text.count("Reading is the time") for text in texts] == [len(users) - 1, 2 - len(users)]


def test_the_price_of_small_pieces_is_told_beside_what_they_solve(tmp_path: Path) -> None:
    """Claims of a run that was made before the price was one of them are enough."""
    variants = tuple(
        Variant(name=name, flags={"max-num-batched-tokens": tokens,
                                  "enable-chunked-prefill": name != "whole"})
        for name, tokens in (("sixteenth", 10), ("whole", 64))
    )  # fmt: skip
    workload = make_workload("contended:2/1", intruder=Intruder(prompt_tokens=32))
    lab = make_lab(variants=variants, workloads=(workload,), claims=(), evidence=(),
                   findings=("token-budget",))  # fmt: skip
    values = {
        f"{name}/short/contended-2-1": {
            "stall_mean_s": 0.1, "intruder_ttft_mean_s": 0.5, "ttft_mean_s": ttft_s
        }
        for name, ttft_s in (("sixteenth", 1.2), ("whole", 0.2))
    }  # fmt: skip
    judgements = [judged("stall-sixteenth", 0.1), judged("ttft", 1.4)]
    text = chunks_solve(judged_run(context(tmp_path, lab, values), judgements))
    assert text
    assert "stall is 0.10x" in text
    assert text.endswith(
        "With `sixteenth` their own first token takes 1.2 s on average, without chunks"
        " 200 ms: 6.00x (6.00 to 6.00), the ratio of their geometric means."
    )


def test_a_split_is_told_as_a_forecast_and_only_where_there_is_one(tmp_path: Path) -> None:
    lab = make_lab(
        variants=tuple(
            Variant(name=n, flags={"max-num-batched-tokens": b, "enable-chunked-prefill": c})
            for n, b, c in (("quarter", 12, True), ("sixteenth", 6, True), ("whole", 32, False))
        ),
        workloads=(make_workload("contended:2/1", intruder=Intruder(prompt_tokens=32)),),
        claims=(), evidence=(), findings=("token-budget",),
    )  # fmt: skip
    sixteenth, quarter, whole = (
        f"{name}/short/contended-2-1" for name in ("sixteenth", "quarter", "whole")
    )
    values = {
        key: {"stall_mean_s": 0.6, "intruder_ttft_mean_s": 0.5, "ttft_mean_s": 0.2}
        for key in (sixteenth, quarter, whole)
    }
    found = context(tmp_path, lab, values)
    told = split(judged_run(found))
    assert told
    assert told.endswith("The split itself was not run.")

    def bands(stall_s: float, long_s: float, own_s: float, rate: float) -> dict[str, Band]:
        figures = {
            "stall_mean_s": stall_s, "intruder_ttft_mean_s": long_s, "ttft_mean_s": own_s,
            "output_tokens_per_s": rate,
        }  # fmt: skip
        return {m: Band(value=v, low=v, high=v) for m, v in figures.items()}

    forecasts = PointForecasts(
        points={sixteenth: bands(0.1, 1.2, 0.4, 50), quarter: bands(0.2, 0.9, 0.3, 60)},
        on_two=(
            OnTwoEngines(point=whole, link_gbit_per_s=1, bands=bands(0.02, 0.8, 0.3, 90)),
            OnTwoEngines(point=whole, link_gbit_per_s=100, bands=bands(0.02, 0.7, 0.3, 90)),
            OnTwoEngines(point=quarter, link_gbit_per_s=None, bands=bands(0.2, 0.8, 0.2, 75)),
            OnTwoEngines(point=sixteenth, link_gbit_per_s=None, bands=bands(0.1, 1.1, 0.2, 70)),
        ),
    )
    predicted = Predictions(effects={}, forecasts={}, in_virtual_time=forecasts)
    write_json(found.folder.path / "predictions.json", predicted)
    foreseen = split(judged_run(found))
    assert foreseen
    assert foreseen.startswith(told)
    assert "*Forecast, not measured*, with a second machine as fast as this one" in foreseen
    assert (
        "100 Gbit/s between them: stall 20 ms, TTFT of the long prompt 700 ms and of the streams"
        " 300 ms, 90 tok/s. Over 1 Gbit/s the long prompt's first token comes after 800 ms."
        in foreseen
    )
    assert "With `sixteenth` one engine is forecast to give: stall 100 ms" in foreseen
    assert "two that share the requests: stall 100 ms, TTFT of the long prompt 1.1 s" in foreseen


@pytest.mark.parametrize(
    ("prometheus", "engine", "said"),
    [
        (9, 8, "Client and server do not agree on requests;"),
        (0, 8, "Client and server do not agree on requests;"),
        (8, 8, "Client and server count the same requests;"),
        (None, 8, "Client and server count the same requests;"),
        (8, 0, "Client and server do not agree on requests;"),
        (8, None, "The server's counts are not known, so none were compared;"),
    ],
)
def test_counts_that_differ_are_told(
    prometheus: int | None, engine: int | None, said: str, tmp_path: Path
) -> None:
    lab = make_lab(variants=(Variant(name="base"),), claims=(), evidence=())
    ends = {"client_ttft_mean_s": 0.012, "engine_ttft_mean_s": 0.010}
    found = context(tmp_path, lab, {f"base/short/concurrent-{n}": ends for n in (1, 2)})
    assert both_ends(judged_run(found)) is None
    counts = Agreement(what="requests", records=8, prometheus=prometheus, engine=engine)
    session = Session(
        engine_start_s=1, load_s=1, wall_s=3, resident=True, agreement=[counts], prometheus=None
    )
    write_json(found.folder.path / "session.json", session)
    text = both_ends(judged_run(found))
    assert text
    assert said in text
    assert "mean TTFT is longer by 2 to 2 ms" in text


def test_facts_are_computed_once_for_the_finding_and_the_answers(tmp_path: Path) -> None:
    calls = []

    def facts(run: Context) -> str:
        calls.append(run)
        return "the facts"

    count = Conclusion("count", facts, lambda said: Finding(title=said))
    run = context(tmp_path, make_lab(findings=("count",)), {})
    assert count.finding(run).title == "the facts"
    assert count.facts_of(judged_run(run)) == "the facts"
    assert len(calls) == 1
    left_out = replace(run, lab=make_lab())
    assert count.facts_of(judged_run(left_out)) is None


def test_no_name_of_a_claim_lies_over_the_next(tmp_path: Path) -> None:
    """A long title takes four lines, and the metric one more."""
    title = f"With 4 in flight tokens come later from the {'mixture of many experts ' * 3}than here"
    key = "on/short/concurrent-1"
    claims = [judged(f"claim-{n}", 1.5, title=title, treatment=key) for n in range(3)]
    found = judged_run(context(tmp_path, make_lab(), {}), claims)
    assert plots.effects(found)
    figure = plt.gcf()
    figure.canvas.draw()
    names = [label.get_window_extent() for label in figure.axes[0].get_yticklabels()]
    plt.close("all")
    assert all(below.y1 <= above.y0 for below, above in itertools.pairwise(names))
