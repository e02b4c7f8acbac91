"""How a trial is divided among load processes, and put together again."""

from __future__ import annotations

from pathlib import Path

import pytest

from loadtests import plan
from loadtests.generator import argv
from loadtests.plan import TrialPlan, merged_summary
from tests.unit.builders import make_summary, parse


def make_plan(arrival: str, number: int = 0, of: int = 1, turns: int = 1) -> TrialPlan:
    return TrialPlan(
        url="http://127.0.0.1:1", arrival=parse(arrival), requests=Path("r"), records=Path("o"),
        warmup_s=1, window_s=2, timeout_s=3, seed=0, lab="l", variant="v", run_id="r",
        workload="w", share=(number, of), turns=turns,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("arrival", "seats"),
    [
        ("concurrent:8", [3, 3, 2]),
        ("concurrent:1", [1, 0, 0]),
        ("contended:4/2", [3, 1, 1]),  # the intruder is the first one's
        ("waves:8", [8, 0, 0]),  # one process can have all leave together
        ("poisson:1", [20, 20, 20]),
    ],
)
def test_users_are_divided(arrival: str, seats: list[int]) -> None:
    assert [make_plan(arrival, number, 3).seats for number in range(3)] == seats
    assert make_plan(arrival).seats == sum(seats) == parse(arrival).seats


def test_what_is_sent_is_divided_and_nothing_twice() -> None:
    shares = [make_plan("poisson:1", number, 3).own_share(range(8)) for number in range(3)]
    assert [list(share) for share in shares] == [[0, 3, 6], [1, 4, 7], [2, 5]]
    assert list(make_plan("waves:4", 0, 3).own_share(range(4))) == [0, 1, 2, 3]
    sessions = [make_plan("sessions:4/1", i, 2, turns=3).own_share(range(8)) for i in range(2)]
    assert sessions == [[0, 1, 2, 6, 7], [3, 4, 5]]  # a conversation has one user


def test_summaries_are_put_together() -> None:
    one = make_summary(planned=5, sent=5, loop_lag_p99_s=0.001, cpu_s=1.0, started_unix_s=20.0)
    two = make_summary(planned=4, sent=3, loop_lag_p99_s=0.003, cpu_s=2.0, started_unix_s=19.0,
                       exhausted=True, window_s=(10.0, 15.0), aborted="gone")  # fmt: skip
    both = merged_summary([one, two], 0.25)
    assert (both.planned, both.sent, both.cpu_s) == (9, 8, 3.0)
    assert (both.loop_lag_p99_s, both.started_unix_s) == (0.003, 19.0)
    assert (both.exhausted, both.aborted, both.lost_share) == (True, "gone", 0.25)
    assert both.window_s == (one.window_s[0], 15.0)
    held_open = make_summary(planned=4, window_s=(10.0, 27.0))
    assert merged_summary([one, held_open], 0).window_s == (one.window_s[0], 27.0)
    assert merged_summary([held_open, two], 0).window_s == (10.0, 15.0)
    closed = make_summary(planned=None)
    assert merged_summary([closed, closed], 0).planned is None


def test_each_process_has_users_for_all_of_the_load() -> None:
    asked = argv(5, 1, 2, processes=2)
    assert asked[asked.index("--processes") + 1] == "2"
    assert asked[asked.index("-u") + 1] == asked[asked.index("-r") + 1] == "10"


def test_what_is_sent_has_one_hash_whatever_stands_beside_it(tmp_path: Path) -> None:
    """A field that says how it is sent changes nothing; a word, or when it is due, does."""

    def of(**fields: object) -> str:
        plain: dict[str, object] = {"index": 0, "output_tokens": 4, "body": "hello"}
        planned = plan.PlannedRequest.model_validate({**plain, **fields})
        path = tmp_path / "requests.jsonl"
        path.write_text(planned.model_dump_json() + "\n")
        return plan.sent_sha256([path])

    assert of() == of(intruder=True)
    assert len({of(), of(body="hallo"), of(due_s=1.5)}) == 3
