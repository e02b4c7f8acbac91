"""Other tools' definitions, by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from labs.harness.derived import score
from labs.harness.storage.results import RunFolder
from tests.unit.builders import make_point, make_record, make_trial, write_run

TOOLS = [tool.name for tool in (score.THIS_LAB, *score.OTHER_TOOLS)]
# sent at 10.5 when it was due at 10; 2 tokens at 11, 1 at 11.2, 4 at 12
STREAM = [(11.0, 2), (11.2, 1), (12.0, 4)]


def scored() -> dict[str, list[float | None]]:
    late = make_record(STREAM, scheduled_s=10.0, sent_s=10.5)
    early = make_record([(3.0, 1), (4.0, 1)], sent_s=2.0, in_window=False)
    return score.score(make_trial([late, early], point=make_point(load="poisson:1")))


def test_ours_counts_from_the_schedule_and_within_the_window() -> None:
    ttft, tpot, itl, _ = scored()["this lab"]
    assert ttft == pytest.approx(1.0)
    assert tpot == pytest.approx(1.0 / 5)
    assert itl == pytest.approx((0.2 + 4 * 0.2) / 5)


@pytest.mark.parametrize(
    ("tool", "tpot_s", "itl_s"),
    [
        # the late one, and (1 / 1) of the early one
        ("vllm bench serve", (1.0 / 6 + 1) / 2, (0.2 + 0.8 + 1.0) / 3),
        ("GuideLLM", (1.5 / 7 + 2.0 / 2) / 2, (1.0 / 6 + 1) / 2),
        ("AIPerf", None, (1.0 / 5 + 1) / 2),
        ("inference-perf", (1.0 / 6 + 1) / 2, (0.2 + 0.8 + 1.0) / 7),
    ],
)
def test_theirs_count_from_the_send_and_every_request(
    tool: str, tpot_s: float | None, itl_s: float
) -> None:
    ttft, tpot, itl, throughput = scored()[tool]
    assert ttft == pytest.approx((0.5 + 1.0) / 2)
    assert tpot == (None if tpot_s is None else pytest.approx(tpot_s))
    assert itl == pytest.approx(itl_s)
    assert throughput == pytest.approx(9 / (12.0 - 2.0))


def test_one_token_has_no_interval() -> None:
    for tool, figures in score.score(make_trial([make_record([(11.0, 1)])])).items():
        assert figures[2] is None, tool


def test_a_table_has_every_point_under_every_tool(tmp_path: Path) -> None:
    folder: RunFolder = write_run(tmp_path)
    lab = folder.run().rebuilt_lab()
    figures = score.scores(folder)
    assert set(figures) == {p.key for p in folder.run().points()}
    rows = score.table(figures, lab)
    assert len(rows) == 1 + len(figures) * (1 + len(score.OTHER_TOOLS))
    assert [row[1] for row in rows[1:6]] == ["this lab", *(t.name for t in score.OTHER_TOOLS)]
