"""Forecasts beside runs that others published: what is read, and how it is compared."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from labs.harness.analysis.computed import Band
from labs.harness.forecast import validation
from labs.harness.forecast.forecaster import ForecastError
from labs.harness.reports import published_gpu, published_gpu_plot
from labs.harness.spec.lab import LabError
from labs.harness.storage.published_gpu import FIGURES, Judged, PublishedRun, Stage

SILENT: Any = SimpleNamespace(waiting=lambda _: None)
HEADER = "arrival_s,prompt_tokens,output_tokens,prompt_id,ttft_s,e2e_s"
DESCRIBED = """
[[run]]
name = "mine"
source = "here"
requests = "mine.csv"
model = "llama-8b"
model_name = "Llama 3.1 8B"
card = "h100"
vllm = "0.24.0"
kv_blocks = 1000
flags = { max-num-seqs = 8 }
"""

STAGE = (
    DESCRIBED.replace('requests = "mine.csv"\n', "").replace('"mine"', '"a stage"')
    + """
[run.stage]
rate_per_s = 2
prompt_tokens = 40
output_tokens = 4
texts = 3
measured = { e2e_mean_s = 1.0 }
"""
)


def test_figures_are_those_of_the_definitions() -> None:
    """TPOT divides by the tokens behind the first; an answer of one token has none."""
    found = validation.figures([0.1, 0.2, 0.3], [0.5, 1.2, 0.3], [5, 11, 1])
    assert found["ttft_mean_s"] == pytest.approx(0.2)
    assert found["ttft_p50_s"] == pytest.approx(0.2)
    assert found["tpot_mean_s"] == pytest.approx((0.1 + 0.1) / 2)
    assert found["e2e_mean_s"] == pytest.approx(2 / 3)
    assert set(found) == set(FIGURES)


def test_a_folder_describes_its_own_runs(tmp_path: Path) -> None:
    (tmp_path / "runs.toml").write_text(DESCRIBED)
    (tmp_path / "mine.csv").write_text(f"{HEADER}\n9.5,10,2,,0.1,0.2\n9.0,10,2,7,0.1,0.2\n")
    ((run, requests, described),) = validation.runs_of(tmp_path)
    assert (run.name, described) == ("mine", tmp_path)
    assert [(r.arrival_s, r.prompt_id) for r in validation.read_requests(requests)] == [
        (0.0, "7"),
        (0.5, ""),
    ]


def test_the_labs_own_descriptions_serve_a_folder_without_any(tmp_path: Path) -> None:
    file = tmp_path / "qwen3-14b-h100-2rps.csv.gz"
    file.write_bytes(gzip.compress(f"{HEADER}\n0.0,10,2,,0.1,0.2\n".encode()))
    ((run, _, _),) = validation.runs_of(file)
    assert run.model_name == "Qwen/Qwen3-14B"
    whole_folder = validation.runs_of(tmp_path)
    assert [run.name for run, _, _ in whole_folder if not run.stage] == [run.name]
    assert len(validation.read_requests(file)) == 1


def read_all(folder: Path) -> None:
    for _, file, _ in validation.runs_of(folder):
        validation.read_requests(file)


@pytest.mark.parametrize(
    ("described", "requests", "why"),
    [
        (DESCRIBED, None, r"runs\.toml, mine: requests: there is no .*mine\.csv$"),
        (DESCRIBED + "rpm = 1\n", HEADER, r"runs\.toml, run mine: rpm: Extra inputs"),
        (
            DESCRIBED.replace("kv_blocks = 1000\n", ""),
            HEADER,
            "run mine: kv_blocks: Field required",
        ),
        (
            DESCRIBED.replace('requests = "mine.csv"\n', ""),
            HEADER,
            "run mine: either requests or a st",
        ),
        (DESCRIBED + DESCRIBED, HEADER, "run 2: name: there is another mine"),
        (STAGE.replace("texts", "text"), HEADER, r"run a stage: stage\.texts: Field required"),
        (STAGE.replace("e2e_mean_s", "e2e"), HEADER, r"stage\.measured: .*has e2e; known are ttft"),
        (STAGE.replace("e2e_mean_s", "ttft_p50_s"), HEADER, r"stage\.measured: .*lacks e2e_mean_s"),
        (STAGE.replace("1.0", "-1.0"), HEADER, r"stage\.measured\.e2e_mean_s: Input should be gr"),
        ("run = 1", HEADER, r"has no \[\[run\]\]"),
        ("not TOML", HEADER, r"runs\.toml cannot be read"),
        (DESCRIBED, "arrival_s,prompt_tokens\n0.0,10\n", "line 2: output_tokens: Field required"),
        (DESCRIBED, f"{HEADER}\n0.0,1,2,,0.1,0.2\n0.0,-1,2,,0.1,0.2\n", "line 3: prompt_tokens: I"),
        (DESCRIBED, f"{HEADER}\nnan,1,2,,0.1,0.2\n", "line 2: arrival_s: "),
        (DESCRIBED, f"{HEADER}\n0.0,1,1,,0.1,0.1\n", "output_tokens: none is above 1"),
        (DESCRIBED, HEADER, "no requests"),
    ],
)
def test_what_cannot_be_read_is_named(
    tmp_path: Path, described: str, requests: str | None, why: str
) -> None:
    (tmp_path / "runs.toml").write_text(described)
    if requests is not None:
        (tmp_path / "mine.csv").write_text(requests)
    with pytest.raises(LabError, match=why):
        read_all(tmp_path)


def test_a_stage_is_drawn_at_its_rate() -> None:
    stage = Stage(
        rate_per_s=20, prompt_tokens=500, output_tokens=200, texts=100, measured={"e2e_mean_s": 1}
    )
    requests = validation.drawn(stage)
    assert len(requests) / requests[-1].arrival_s == pytest.approx(20, rel=0.1)
    assert len({request.prompt_id for request in requests}) == 100


def test_a_warm_engine_has_had_each_text(tmp_path: Path) -> None:
    """What is sent beforehand reaches to the last request that is the first with its text."""
    rows = "".join(f"{i}.0,40,2,{text},0.1,0.2\n" for i, text in enumerate("aabac"))
    (tmp_path / "mine.csv").write_text(f"{HEADER}\n{rows}")
    primed = []
    for warm in ("", "warm = true\n"):
        (tmp_path / "runs.toml").write_text(DESCRIBED + warm)
        (found,) = validation.runs_of(tmp_path)
        (plan, *_) = validation._plans(
            validation._Case.of(*found), tmp_path / f"{bool(warm)}.jsonl"
        )
        primed.append(plan.engines[0].trials[0].primed)
    assert primed == [0, 5]
    (tmp_path / "mine.csv").write_text(f"{HEADER}\n0.0,40,2,,0.1,0.2\n")
    with pytest.raises(LabError, match="prompt_id"):
        validation._Case.of(*validation.runs_of(tmp_path)[0])


def judged(run: PublishedRun, measured: float) -> Judged:
    """A run whose every figure is `measured`, where 1 to 1.2 was forecast, 1.1 expected."""
    band = Band(value=1.1, low=1.0, high=1.2)
    return Judged(
        run=run, sha256="", sent=2, rate_per_s=3.0, in_flight=4.0,
        measured=dict.fromkeys(FIGURES, measured), forecast=dict.fromkeys(FIGURES, band),
    )  # fmt: skip


RUN = PublishedRun(
    name="a", source="s", requests="a.csv", model="m", model_name="M", card="h100", vllm="0",
    kv_blocks=1, flags={},
)  # fmt: skip


def staged(**others: float) -> PublishedRun:
    """A stage of which others predicted the mean E2E."""
    stage = Stage(
        rate_per_s=1, prompt_tokens=1, output_tokens=2, texts=1, measured={"e2e_mean_s": 1},
        others=others,
    )  # fmt: skip
    return RUN.model_copy(update={"requests": "", "stage": stage})


def test_stages_may_name_other_predictors_and_figures() -> None:
    """Who predicted one of two stages is scored by that one, and its cell of the other is empty."""
    both, bare = judged(staged(x=1.65, y=1.32), 1.32), judged(staged(y=0.5, z=1.5), 1.0)
    bare = bare.model_copy(update={"measured": {"e2e_mean_s": 1.0}})
    page = published_gpu.page([both, bare])
    assert "| a | 3 | 1.20x | 1.20x | 0.80x | 1.00x | – |" in page
    assert "| a | 3 | – | 0.91x | – | 2.00x | 0.67x |" in page
    assert "| x | 1 | 25% | 25% | 25% |" in page
    assert "| y | 2 | 25% | 25% | 50% |" in page
    assert "| z | 1 | 50% | 50% | 50% |" in page


def test_a_field_that_a_readers_config_lacks_is_named(tmp_path: Path) -> None:
    (tmp_path / "runs.toml").write_text(DESCRIBED.replace("llama-8b", "own"))
    (tmp_path / "mine.csv").write_text(f"{HEADER}\n0.0,40,2,,0.1,0.2\n")
    for config, why in (('{"hidden_size": 8}', "own.json: num_"), ("{", "own.json cannot be read")):
        (tmp_path / "own.json").write_text(config)
        with pytest.raises(LabError, match=why):
            validation.judge(tmp_path, [], SILENT)


def test_scores_count_what_lies_in_its_band() -> None:
    of_a_stage = judged(staged(x=1.65), 1.32)
    runs = [judged(RUN, 1.1), judged(RUN, 1.32), judged(RUN, 1.155), of_a_stage]
    assert [run.ratio("e2e_mean_s") for run in runs] == pytest.approx([1, 1.2, 1.05, 1.2])
    scores = published_gpu.Scores.of(runs)
    assert (scores.runs, scores.ttft_in_band, scores.ttft_figures) == (3, 6, 9)
    assert scores.ttft_p99_in_band == 2
    assert scores.distance["tpot_mean_s"].value == pytest.approx(0.05)
    page = published_gpu.page(runs)
    assert "| x | 1 | 25% | 25% | 25% |" in page  # 1.65 for 1.32
    assert "| this lab | 1 | 16.7% | 16.7% | 16.7% |" in page  # 1.1 for 1.32


def test_misses_are_listed_with_their_cause_or_none() -> None:
    """A figure is one that lies outside of its band, or far off within a wide one."""
    known = RUN.model_copy(update={"causes": {"ttft_p99_s": "a storm"}})
    wide = judged(RUN, 1.5)
    wide = wide.model_copy(
        update={"forecast": dict.fromkeys(FIGURES, Band(value=1.1, low=0.5, high=2))}
    )
    assert not published_gpu.Miss.all_of([judged(known, 1.19)])
    outside = published_gpu.Miss.all_of([judged(known, 1.21)])
    assert {miss.figure: miss.cause for miss in outside} == {
        title: "a storm" if name == "ttft_p99_s" else ""
        for name, title in published_gpu.TITLES.items()
    }
    assert len(published_gpu.Miss.all_of([wide])) == len(FIGURES)
    page = published_gpu.page([judged(known, 1.21)])
    assert "| a | TTFT p99 | 1.10x | a storm |" in page
    assert "| a | TPOT | 1.10x | unknown |" in page


def test_a_picture_has_a_row_for_each_model_on_each_card() -> None:
    on_two = judged(staged(x=1.65).model_copy(update={"model_name": "them/N", "gpus": 2}), 1)
    bare = on_two.model_copy(update={"measured": {"e2e_mean_s": 1.0}})  # as of some stages
    drawn = published_gpu_plot.picture([judged(RUN, 1.1), judged(RUN, 1.2), bare])
    for text, times in ((">M on H100<", 1), (">N on 2 x H100<", 1), (">mean TTFT (ms)<", 1),
                        (">mean E2E (s)<", 2), (">x<", 1)):  # fmt: skip
        assert drawn.count(text) == times, text


def test_what_could_not_be_simulated_is_told_beside_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plan that fails, and one that no client had an answer of."""
    names = ["mine", "fails", "silent"]
    described = [DESCRIBED.replace('"mine"', f'"{name}"') for name in names]
    (tmp_path / "runs.toml").write_text("".join(described))
    (tmp_path / "mine.csv").write_text(f"{HEADER}\n60,10,2,,0.1,0.2\n61,10,2,,0.1,0.2\n")

    def play_all(_: Any, plans: Any, failed: dict[int, ForecastError]) -> Iterator[tuple[int, Any]]:
        for number, plan in enumerate(plans):
            if plan.engines[0].trials[0].key == "fails":
                failed[number] = ForecastError("no such flag")
            else:
                yield number, SimpleNamespace(play=plan.engines[0].trials[0].key)

    seen = SimpleNamespace(ttft_s=0.1, e2e_s=0.2, output_tokens=2)
    monkeypatch.setattr(validation, "play_all", play_all)
    monkeypatch.setattr(validation, "records", lambda key: [seen] if key == "mine" else [])
    judged, without = validation.judge(tmp_path, [], SILENT)
    assert [(run.run.name, run.rate_per_s) for run in judged] == [("mine", 1.0)]
    page = published_gpu.page(judged, without=without)
    assert "- fails could not be simulated: no such flag" in page
    assert "- silent could not be simulated: no request was answered" in page
    assert "| mine | " in page
    assert "fails could not" in published_gpu.page([], without=without)


def test_a_page_without_runs_says_so() -> None:
    assert "No published run" in published_gpu.page([])
