"""What the load generator writes down, held against what the engine really sent.

Both clocks are CLOCK_MONOTONIC of one machine. A record counts from its trial's start, so it is
durations that are compared; each prompt has a length of its own, by which a record finds its line
in the engine's log. What must be exact is. Other work on the machine delays a stamp, by as much as
it likes, and never hastens one: none may be early, and the least delayed tenth must be right.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import psutil
import pytest

from loadtests import generator, plan, records
from loadtests.arrivals import Arrival, Concurrent, Contended, Poisson, Replay, Sessions, Waves
from loadtests.plan import TrialPlan, TrialSummary
from loadtests.records import RequestRecord
from loadtests.workload import Request
from serving.hardware.machine import split_cores
from serving.processes.ports import free_port
from serving.processes.process import Process
from tests.fake.conftest import Json, fake_engine

RIGHT_S = 0.005  # the client's error where no more than a turn of another process kept it waiting
ROUNDING_S = 2e-6
TEMPLATE = 10  # tokens that the fake counts for a message beside its words
FAST = ("--step-s", ".01", "--step-per-seq-s", ".0001", "--prefill-per-token-s", "0")
MOST_USERS = 480  # of the Poisson load below: a minute's worth


@dataclass(frozen=True)
class Played:
    """One trial: the client's records and the engine's lines, in the order of the requests."""

    summary: TrialSummary
    records: list[RequestRecord]
    log: list[Json]

    @property
    def pairs(self) -> list[tuple[RequestRecord, Json]]:
        lines = {line["n_in"] - TEMPLATE: line for line in self.log}
        return [(r, lines[r.index + 1]) for r in self.records]


Play = Callable[..., Played]


@pytest.fixture(scope="module")
def play(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Play]:
    with playing_trials(tmp_path_factory.mktemp("fidelity")) as (play, _):
        yield play


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Play]:
    """As `play`, by two load processes."""
    with playing_trials(tmp_path_factory.mktemp("shared"), processes=2) as (play, _):
        yield play


@contextmanager
def playing_trials(
    home: Path, processes: int = 1, users: int = MOST_USERS
) -> Iterator[tuple[Play, Process]]:
    """Plays one trial after another on one Locust, each on an engine of its own."""
    argv = generator.argv(users, free_port(), free_port(), processes)
    cores = split_cores()[1]
    with Process("locust", argv, log=home / "locust.log", cores=cores, talk=True) as child:
        playing = generator.Generator(child)

        def play(
            arrival: Arrival,
            *flags: str,
            law: Sequence[str] = FAST,
            window_s: float = 0.6,
            tokens: Sequence[int] = tuple(range(5, 30, 3)),
            keep_text: bool = False,
            due_s: Sequence[float] = (),
            turns: int = 1,
            meanwhile: Callable[[], None] = lambda: None,
        ) -> Played:
            path = Path(home / str(len(list(home.iterdir()))))
            path.mkdir()
            asked = [tokens[i % len(tokens)] for i in range(400)]
            intruders = range(3, 400, 4) if isinstance(arrival, Contended) else ()
            plan.write_requests(
                path / "requests.jsonl",
                [
                    Request(
                        i,
                        _prompt(i + 1),
                        0,
                        n,
                        intruder=i in intruders,
                        due_s=due_s[i] if i < len(due_s) else None,
                    )
                    for i, n in enumerate(asked)
                ],
                "fake",
            )
            with fake_engine(path / "log.jsonl", *law, *flags) as url:
                trial = TrialPlan(
                    url=url,
                    arrival=arrival,
                    requests=path / "requests.jsonl",
                    records=path / "records.jsonl.gz",
                    warmup_s=0.2,
                    window_s=window_s,
                    timeout_s=10,
                    seed=7,
                    lab="none",
                    variant="none",
                    run_id="none",
                    workload="none",
                    keep_text=keep_text,
                    turns=turns,
                )
                summary = playing.play(trial, meanwhile)
            found = sorted(records.read(trial.records), key=lambda r: r.index)
            return Played(summary, found, _lines(path / "log.jsonl"))

        yield play, child


@pytest.mark.parametrize("processes", [1, 2])
def test_plans_beside_each_other_take_turns_request_by_request(
    processes: int, tmp_path: Path
) -> None:
    """Each engine is sent the same requests, and as many of each count."""
    requests = tmp_path / "requests.jsonl"
    asked = [Request(i, _prompt(i + 1), 0, 5 + i % 7) for i in range(200)]
    plan.write_requests(requests, asked, "fake")
    argv = generator.argv(1, free_port(), free_port(), processes)
    log, cores = tmp_path / "locust.log", split_cores()[1]
    names = ("first", "second", "third")
    with ExitStack() as exits:
        child = exits.enter_context(Process("locust", argv, log=log, cores=cores, talk=True))
        urls = [exits.enter_context(fake_engine(tmp_path / f"{n}.jsonl", *FAST)) for n in names]
        first, *beside = (
            TrialPlan(
                url=url, arrival=Concurrent(users=1), requests=requests,
                records=tmp_path / name / "records.jsonl.gz", warmup_s=0.4, window_s=1.8,
                timeout_s=10, seed=7, lab="none", variant=name, run_id="none", workload="none",
            )
            for name, url in zip(names, urls, strict=True)
        )  # fmt: skip
        together = first.model_copy(update={"beside": tuple(beside)})
        summaries = generator.Generator(child).play_together(together)
    found = [[*records.read(each.records)] for each in together.all_plans]
    logs = [_lines(tmp_path / f"{name}.jsonl") for name in names]
    for summary, of_plan, log_lines in zip(summaries, found, logs, strict=True):
        _sound(Played(summary, of_plan, log_lines))
        assert summary.answered_under_load
        assert summary.window_s[0] == 0.4
    last_s = max(r.sent_s for of_plan in found for r in of_plan if r.in_window)
    # with two processes, one may be told in the middle of a later round that all are answered
    found = [[r for r in of_plan if r.sent_s <= last_s] for of_plan in found]
    sends = sorted((r.sent_s, number) for number, of in enumerate(found) for r in of)
    turns = [number for _, number in sends]
    assert turns == [i % 3 for i in range(len(turns))]
    sent = {tuple((r.index, r.in_window) for r in of_plan) for of_plan in found}
    assert len(sent) == 1  # a round counts for all, or for none
    assert sum(counts for _, counts in sent.pop()) >= 5
    ends = sorted((r.end_s or 0, r.sent_s) for of_plan in found for r in of_plan)
    assert all(end <= sent + RIGHT_S for (end, _), (_, sent) in pairwise(ends))


def _prompt(words: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": " ".join(["word"] * words)}]


def _lines(log: Path) -> list[Json]:
    return [json.loads(line) for line in log.read_text().splitlines()]


def _sound(played: Played) -> None:
    """Nothing lost, nothing made up: each request, each chunk, each token."""
    assert len(played.records) == len(played.log) == played.summary.sent > 4
    for record, line in played.pairs:
        assert record.ok, record.error
        assert record.output_tokens == record.asked_tokens == line["n_out"]
        assert record.prompt_tokens == line["n_in"]
        assert [k for _, k in record.chunks] == [k for _, k in line["chunks"]]


def _right_unless_kept_waiting(delays_s: Sequence[float], within_s: float = RIGHT_S) -> None:
    """The least tenth of them is within the bound: what is late always is late even then."""
    ordered = sorted(map(abs, delays_s))
    assert len(ordered) > 4
    assert ordered[len(ordered) // 10] < within_s


def _ttft_errors(played: Played) -> list[float]:
    return [
        (record.chunks[0][0] - record.sent_s) - (line["chunks"][0][0] - line["received"])
        for record, line in played.pairs
    ]


def _gap_errors(played: Played) -> list[float]:
    return [
        ours - (after - before)
        for record, line in played.pairs
        for ours, ((before, _), (after, _)) in zip(
            record.chunk_gaps_s, pairwise(line["chunks"]), strict=True
        )
    ]


def _true_to_the_clock(played: Played) -> None:
    """Durations agree, and one start of the trial makes every stamp follow its cause."""
    ttft = _ttft_errors(played)
    assert min(ttft) > -ROUNDING_S  # sent before it was received, read after it was written
    _right_unless_kept_waiting(ttft)
    _right_unless_kept_waiting(_gap_errors(played))
    latest = min(line["received"] - record.sent_s for record, line in played.pairs)
    earliest = max(
        written - read
        for record, line in played.pairs
        for (read, _), (written, _) in zip(record.chunks, line["chunks"], strict=True)
    )
    assert earliest - ROUNDING_S <= latest


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--sse-comments",),
        ("--max-num-seqs", "4", "--jitter", "0.3"),
    ],
    ids=lambda flags: flags[0] if flags else "plain",
)
def test_times_and_counts_are_the_engines(flags: tuple[str, ...], play: Play) -> None:
    played = play(Concurrent(users=8), *flags)
    _sound(played)
    _true_to_the_clock(played)


def test_chunks_of_many_tokens_are_not_taken_for_one(play: Play) -> None:
    """ITL counts tokens, not chunks: four in a chunk after 10 ms are four samples of 2.5 ms."""
    played = play(Concurrent(users=4), "--tokens-per-chunk", "4", tokens=(13,))
    _sound(played)
    _true_to_the_clock(played)
    for record in played.records:
        assert [k for _, k in record.chunks] == [1, 4, 4, 4]
        assert len(record.itl_s) == 12
        assert record.tpot_s == pytest.approx(sum(record.itl_s) / 12)


def test_a_role_is_no_token(play: Play) -> None:
    """vLLM's first chunk may hold a role alone: something arrives at once, the token later."""
    slow_prefill = ("--step-s", ".1", "--step-per-seq-s", "0", "--prefill-per-token-s", "0")
    early = play(Concurrent(users=2), "--early-role-chunk", law=slow_prefill, tokens=(2, 3))
    _sound(early)
    _right_unless_kept_waiting(_ttft_errors(early))
    for record, line in early.pairs:
        assert record.ttft_s
        assert record.ttft_s >= line["chunks"][0][0] - line["received"] > 0.09
        assert record.first_byte_s is not None
    waits = [(r.first_byte_s or 0) - r.sent_s for r in early.records]
    _right_unless_kept_waiting(waits, 0.03)


def test_the_text_is_kept_where_it_is_asked_for(play: Play) -> None:
    chunky = ("--tokens-per-chunk", "3", "--early-role-chunk", "--sse-comments")
    kept = play(Concurrent(users=2), *chunky, tokens=(2, 12), keep_text=True)
    _sound(kept)
    words = "the quick brown fox jumps over a lazy dog.".replace(".", " .").split()
    for record in kept.records:
        said = (record.text or "").replace(".", " .").split()
        assert said == [words[i % len(words)] for i in range(record.asked_tokens)]
    assert all(r.text is None for r in play(Concurrent(users=2), tokens=(2,)).records)


def test_a_stall_is_one_long_gap_and_no_error(play: Play) -> None:
    played = play(
        Concurrent(users=4), "--stall-after", "100", "--stall-s", "3", tokens=(30,), window_s=3.4
    )
    _sound(played)
    _true_to_the_clock(played)
    worst = [max(record.chunk_gaps_s) for record in played.records]
    assert sum(gap >= 2.9 for gap in worst) >= 3  # all that were under way, once each
    for record in played.records:
        assert sum(gap > 1 for gap in record.chunk_gaps_s) <= 1


# ----------------------------------------------------------------------------------- when to send


def _most_in_flight(found: Sequence[RequestRecord]) -> int:
    events = [(r.sent_s, 1) for r in found] + [(r.chunks[-1][0], -1) for r in found]
    now = most = 0
    for _, change in sorted(events):
        now += change
        most = max(most, now)
    return most


def test_concurrent_keeps_so_many_in_flight_and_no_more(play: Play) -> None:
    played = play(Concurrent(users=5))
    _sound(played)
    assert _most_in_flight(played.records) == 5
    assert max(batch for line in played.log for batch in line["batch"]) == 5


def test_a_wave_waits_for_all_of_the_last(play: Play) -> None:
    size = 8
    played = play(Waves(size=size), window_s=1.0)
    _sound(played)
    order = sorted(played.records, key=lambda r: r.sent_s)
    waves = [order[i : i + size] for i in range(0, len(order), size)]
    assert len(waves) >= 3
    assert all(len(wave) == size for wave in waves)
    for before, after in pairwise(waves):
        ended = max(max(r.chunks[-1][0], r.end_s or 0) for r in before)
        assert min(r.sent_s for r in after) >= ended
        assert {r.in_window for r in after} in ({True}, {False})
    for i in range(0, len(order), size):  # as the engine saw it
        lines = sorted(played.log, key=lambda line: float(line["received"]))
        done = max(line["chunks"][-1][0] for line in lines[i : i + size])
        assert all(line["received"] > done for line in lines[i + size : i + 2 * size])
    start, end = played.summary.window_s
    counted = [r for r in order if r.in_window]
    assert start <= min(r.sent_s for r in counted)
    assert max(r.chunks[-1][0] for r in counted) <= end  # whole waves: nobody's tail is cut off


def test_a_session_rests_after_each_answer_and_its_turns_keep_their_order(play: Play) -> None:
    """And sessions begin one after another."""
    arrival, turns = Sessions(users=3, gap_s=0.3), 4
    played = play(arrival, window_s=2.6, tokens=(10,), turns=turns)
    _sound(played)
    sent = {r.index: r for r in played.records}
    rests = [r.sent_s - (sent[i - 1].end_s or 0.0) for i, r in sent.items() if i % turns]
    assert min(rests) >= arrival.gap_s
    _right_unless_kept_waiting([rest - arrival.gap_s for rest in rests], 0.03)
    first = [arrival.begins_s(user) for user in range(arrival.users)]
    assert all(sent[turns * user].sent_s >= begins_s for user, begins_s in enumerate(first))
    assert len(sent) > turns * arrival.users  # so that a user goes on to its next
    assert _most_in_flight(played.records) <= arrival.users


def test_an_intruder_comes_by_its_own_clock_beside_a_full_house(play: Play) -> None:
    """It takes nobody's turn, and its first visit is one period after the start."""
    played = play(Contended(users=3, every_s=0.25), window_s=1.2)
    _sound(played)
    visits = [r for r in played.records if r.index % 4 == 3]
    others = [r for r in played.records if r.index % 4 != 3]
    due = [0.25 * (n + 1) for n in range(len(visits))]  # until the users stop, after the window
    assert [r.index for r in visits[:5]] == [3, 7, 11, 15, 19]
    assert all(r.sent_s >= at for r, at in zip(visits, due, strict=True))
    _right_unless_kept_waiting([r.sent_s - at for r, at in zip(visits, due, strict=True)], 0.03)
    assert [r.index for r in visits if r.in_window] == [3, 7, 11, 15, 19]  # from 0.2 to 1.4 s
    assert _most_in_flight(others) == 3
    assert _most_in_flight(played.records) == 4
    turns = [i for i in range(400) if i % 4 != 3]
    assert [r.index for r in others] == turns[: len(others)]
    assert not played.summary.exhausted


def test_an_open_loop_keeps_its_schedule_whatever_is_outstanding(play: Play) -> None:
    """Each answer takes a second, so that many are outstanding when the next is due."""
    played = play(Poisson(rate_per_s=8), window_s=2.0, tokens=(50,), law=("--step-s", ".02"))
    _sound(played)
    due = [r.scheduled_s for r in played.records if r.scheduled_s is not None]
    assert len(due) == len(played.records) == played.summary.planned
    assert due == sorted(due)
    assert _most_in_flight(played.records) >= 4
    lags = [lag for r in played.records if (lag := r.send_lag_s) is not None]
    assert min(lags) > -0.001
    _right_unless_kept_waiting(lags, 0.005)
    assert all(r.in_window == ((r.scheduled_s or 0) >= 0.2) for r in played.records)
    _true_to_the_clock(played)


@pytest.mark.parametrize(
    ("due_s", "ran_out"),
    [([0.05 * i for i in range(20)], False), ([0.004 * i for i in range(400)], True)],
    ids=["the trace", "what was prepared"],
)
def test_a_window_ends_with_what_is_replayed(play: Play, due_s: list[float], ran_out: bool) -> None:
    """Else an idle engine would be measured, and throughput be too low."""
    played = play(Replay(speed=1), window_s=8.0, tokens=(2,), due_s=due_s)
    _sound(played)
    assert len(played.records) == len(due_s)
    assert played.summary.window_s == pytest.approx((0.2, due_s[-1]))
    assert played.summary.exhausted == ran_out


def test_a_replay_sends_at_its_traces_times(play: Play) -> None:
    """Twice as fast as it was, with a burst in it; what lies beyond the window is not sent."""
    at_s = [0.0, 0.3, 0.5, 0.5, 0.5, 0.5, 1.1, 1.5, 40.0]
    played = play(Replay(speed=2), window_s=0.8, tokens=(20,), due_s=at_s)
    _sound(played)
    assert [r.scheduled_s for r in played.records] == [at / 2 for at in at_s[:-1]]
    assert played.summary.planned == 8
    assert not played.summary.exhausted
    _right_unless_kept_waiting([r.send_lag_s or 0.0 for r in played.records], 0.005)


@pytest.mark.parametrize("by", ["play", "shared"])  # by one load process, and by two
@pytest.mark.parametrize(("users", "least"), [(2, 5), (6, 6)])
def test_a_window_is_held_open_for_five_requests_and_for_each_user(
    by: str, users: int, least: int, request: pytest.FixtureRequest
) -> None:
    """Answers of 0.8 s in a window of 0.5: the first ones began before it."""
    play: Play = request.getfixturevalue(by)
    played = play(Concurrent(users=users), window_s=0.5, tokens=(40,), law=("--step-s", ".02"))
    _sound(played)
    start, end = played.summary.window_s
    counted = [r for r in played.records if r.in_window]
    assert len(counted) == least
    assert start == 0.2
    assert end == pytest.approx(max(r.end_s or 0.0 for r in counted), abs=0.05)


@pytest.mark.parametrize(
    "arrival", [Concurrent(users=6), Contended(users=3, every_s=0.25)], ids=str
)
def test_users_go_on_until_every_request_that_counts_has_been_answered(
    play: Play, arrival: Arrival
) -> None:
    """As long as an answer that counts is awaited, every user has a request in flight."""
    played, users = play(arrival), arrival.users
    _sound(played)
    assert played.summary.answered_under_load
    last_s = max(r.end_s or 0.0 for r in played.records if r.in_window)
    uncounted = [r for r in played.records if r.sent_s >= played.summary.window_s[1]]
    assert not any(r.in_window for r in uncounted)
    ended = sum((r.end_s or 0.0) < last_s for r in played.records)
    assert sum(r.sent_s <= last_s + 0.05 for r in played.records) - ended >= users


# -------------------------------------------------------------------------- several load processes


@pytest.mark.parametrize(
    "arrival",
    [Concurrent(users=5), Concurrent(users=1), Waves(size=4), Contended(users=3, every_s=0.1)],
    ids=str,
)
def test_two_processes_send_together_what_one_would(shared: Play, arrival: Arrival) -> None:
    played = shared(arrival)
    _sound(played)
    assert len({r.index for r in played.records}) == len(played.records)  # none twice
    others = [r for r in played.records if r.index % 4 != 3 or not isinstance(arrival, Contended)]
    assert _most_in_flight(others) == arrival.users
    assert played.summary.lost_share == 0
    if not isinstance(arrival, Waves):
        assert played.summary.answered_under_load


@pytest.mark.parametrize("arrival", [Poisson(rate_per_s=8), Replay(speed=1)], ids=str)
def test_a_schedule_is_divided_among_processes(play: Play, shared: Play, arrival: Arrival) -> None:
    """The same requests at the same times as one process sends."""
    due_s = [0.05 * i for i in range(40)]
    one, two = (of(arrival, tokens=(10,), window_s=1.5, due_s=due_s) for of in (play, shared))
    _sound(two)
    assert one.summary.planned == two.summary.planned == len(two.records)
    assert [(r.index, r.scheduled_s) for r in one.records] == [
        (r.index, r.scheduled_s) for r in two.records
    ]
    _right_unless_kept_waiting([r.send_lag_s or 0.0 for r in two.records], 0.005)


def test_a_process_that_dies_takes_its_share_and_the_trial_says_so(tmp_path: Path) -> None:
    with playing_trials(tmp_path, processes=2, users=4) as (play, locust):
        began = time.monotonic()

        def kill_one() -> None:
            (master,) = psutil.Process(locust.pid).children()
            workers = master.children()
            if time.monotonic() - began > 2 and len(workers) == 2:
                workers[0].kill()

        played = play(Concurrent(users=4), window_s=6.0, tokens=(20,), meanwhile=kill_one)
        assert played.summary.lost_share == 0.5
        assert 4 < len(played.records) < len(played.log)
        again = play(Concurrent(users=4))  # by the one that is left
        assert again.summary.lost_share == 0
        assert _most_in_flight(again.records) == 4


# ------------------------------------------------------------------------------ broken connections


def test_an_answer_that_breaks_off_is_an_error(play: Play) -> None:
    """An engine that dies in mid-answer: what had come is kept, and nothing of it counts as ok."""
    played = play(Concurrent(users=4), "--die-after", "200", tokens=(40,))
    assert played.summary.aborted
    assert "connections failed in a row" in played.summary.aborted
    finished = [line for line in played.log if line["finish"] == "length"]
    assert sum(r.ok for r in played.records) == len(finished)
    cut = [r for r in played.records if r.chunks and r.error]
    assert len(cut) == len(played.log) - len(finished) > 0
    for record in cut:
        assert sum(k for _, k in record.chunks) < 40


def test_an_error_answer_is_no_answer_and_no_end(play: Play) -> None:
    played = play(Concurrent(users=4), "--error-every", "5")
    failed = [r for r in played.records if r.error]
    assert len(failed) == sum(line["finish"] == "error" for line in played.log) > 0
    assert all("HTTP 500" in (r.error or "") and "told to" in (r.error or "") for r in failed)
    assert all(not r.ok and r.ttft_s is None and not r.chunks for r in failed)
    assert played.summary.aborted is None
