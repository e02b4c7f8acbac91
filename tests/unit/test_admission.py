"""The client's own limits on the queue, for an engine without: whom they turn away, and when."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from labs.harness.analysis.checks.expected import Expected
from labs.harness.analysis.validity import caveats_of
from labs.harness.plan.resolve import require_client_limits
from labs.harness.spec.lab import Arm, Evidence, LabError, Point
from loadtests import admission
from loadtests.admission import Admission, counts_file
from loadtests.arrivals import Concurrent
from loadtests.plan import PlannedRequest, QueueLimits, TrialPlan
from loadtests.records import BY_CLIENT
from loadtests.workload import Samples
from serving import metrics
from serving.metrics import Snapshot
from serving.models.catalog import ROOT
from serving.simulator.traffic import Delays, Traffic, VirtualAnswer, play
from tests.unit.builders import make_lab, make_point, make_record, make_trial, make_workload
from tests.unit.test_forecasting import NONE, Server, prompts

HEAD, EVENT = b"HTTP/1.1 200 OK\r\n\r\n", b'data: {"choices": []}\r\n'


def request(choices: int = 1, prompt_tokens: int = 10) -> PlannedRequest:
    return PlannedRequest(
        index=0, output_tokens=4, body="", prompt_tokens=prompt_tokens, choices=choices
    )


def test_load_processes_count_together_what_is_unfinished(tmp_path: Path) -> None:
    limits, counts = QueueLimits(requests=3), tmp_path / "counts"
    here, there = (Admission(limits, (number, 2), counts) for number in (0, 1))
    first, _ = here.admit(request()), there.admit(request())
    assert not there.refusal(request())
    assert here.refusal(request(choices=2)).startswith(BY_CLIENT)  # each answer counts
    there.admit(request())
    assert "unfinished" in here.refusal(request())
    first.append((1.0, HEAD + EVENT))
    assert here.refusal(request())  # it runs
    first.end()
    assert not there.refusal(request())


def test_a_prompt_waits_until_its_first_token(tmp_path: Path) -> None:
    """As by vLLM's rule: a request comes in as long as the others have fewer tokens than this."""
    limited = Admission(QueueLimits(prompt_tokens=20), (0, 1), tmp_path / "counts")
    assert not limited.refusal(request(prompt_tokens=999))
    first, second = limited.admit(request()), limited.admit(request())
    assert "prompts were waiting" in limited.refusal(request(prompt_tokens=1))
    first.append((1.0, HEAD))
    assert limited.refusal(request())
    first.append((1.1, EVENT))
    first.append((1.2, EVENT))
    assert not limited.refusal(request())
    limited.admit(request())
    second.end()  # it failed without a token
    assert not limited.refusal(request())


def test_the_counts_lie_in_memory_and_leave_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = tmp_path / "shm"
    monkeypatch.setattr(admission, "IN_MEMORY", memory)
    assert counts_file("t", tmp_path).parent == tmp_path  # there is none here
    memory.mkdir()
    counts = counts_file("t", tmp_path)
    assert counts.parent == memory
    here, there = (Admission(QueueLimits(requests=1), (number, 2), counts) for number in (0, 1))
    for process in (here, there):
        process.remove_file()
    assert not list(memory.iterdir())
    here.admit(request())
    assert there.refusal(request())


SENT_OR_NOT = """
import sys
from pathlib import Path
from loadtests import load as loads
from loadtests.admission import Admission
from loadtests.plan import TrialPlan
from loadtests.records import BY_CLIENT

load = loads.Load(TrialPlan.model_validate_json(sys.argv[1]))
names = lambda: {path.name for folder in map(Path, sys.argv[2:]) for path in folder.iterdir()}
assert any("in-flight-of-a-test" in name for name in names())
load.all_have_opened()
assert not any("in-flight-of-a-test" in name for name in names())
turn = loads.Turn(None, None, False)
for _ in range(loads.GIVE_UP_AFTER):
    load.end(loads.Ended(turn, [], 0, 1, "ConnectionError: reset", True))
    load.end(loads.Ended(turn, [], 0, 0, f"{BY_CLIENT}: as many", False))
print(load.aborted)
"""


def test_what_is_turned_away_does_not_hide_that_the_engine_is_gone(tmp_path: Path) -> None:
    """An engine that ends at the limit fails each request that is sent, and others are not."""
    requests = tmp_path / "r.jsonl"
    requests.touch()
    plan = TrialPlan(
        url="", arrival=Concurrent(users=2), requests=requests, records=tmp_path / "r.gz",
        warmup_s=0, window_s=1, timeout_s=1, seed=0, lab="tiny", variant="on", run_id="r",
        workload="w", admission=QueueLimits(requests=1), trial=f"of-a-test-{os.getpid()}",
    )  # fmt: skip
    folders = [str(path) for path in (tmp_path, admission.IN_MEMORY) if path.is_dir()]
    argv = [sys.executable, "-c", SENT_OR_NOT, plan.model_dump_json(), *folders]
    process = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert process.stdout.startswith("5 connections failed")


LIMITED = {"flags": {"max-num-queued-tokens": 9}, "admission_by_client": True}
SEVERAL = make_workload("concurrent:1", samples=Samples(count=2, together=True))


def test_limits_that_the_client_cannot_hold_are_refused() -> None:
    several = LIMITED | {"workloads": (SEVERAL,)}
    with pytest.raises(LabError, match="answers, as in short"):
        require_client_limits(make_lab(**several))
    require_client_limits(make_lab(**several | {"admission_by_client": False}))
    require_client_limits(make_lab(**LIMITED))


def turned_away_s(answers: list[VirtualAnswer]) -> list[float | None]:
    return [a.turned_away_s for a in answers]


def test_clients_in_virtual_time_hold_the_same_limits() -> None:
    """A step of a second: the client at 0.5 s does not know yet what the step will end at 1 s."""
    traffic = Traffic(kind="open", schedule_s=(0.0, 0.5, 1.5), warmup_s=0, window_s=9)
    limited = traffic.model_copy(update={"most_requests": 1})
    played = play(Server(), limited, prompts(1, 1, 1), (), NONE)
    assert turned_away_s(played.answers) == [None, 0.5, None]
    assert [len(a.chunks) for a in played.answers] == [1, 0, 1]
    by_tokens = traffic.model_copy(update={"most_prompt_tokens": 3})
    assert turned_away_s(play(Server(), by_tokens, prompts(9, 9, 9), (), NONE).answers) == [
        None, 0.5, None
    ]  # fmt: skip
    assert turned_away_s(play(Server(), traffic, prompts(1, 1, 1), (), NONE).answers) == [None] * 3


def test_the_client_knows_of_an_answer_once_it_has_it() -> None:
    traffic = Traffic(
        kind="open", schedule_s=(0.0, 1.1, 1.3), warmup_s=0, window_s=9, most_requests=1
    )
    delays = Delays(request_s=0, serial_s=0, response_s=0.2, client_s=0)
    played = play(Server(), traffic, prompts(1, 1, 1), (), delays)
    assert turned_away_s(played.answers) == [None, 1.1, None]


TURNED_AWAY = Evidence(arm=Arm(), kind="rises", metric=metrics.TURNED_AWAY)
NOBODY = TURNED_AWAY.model_copy(update={"kind": "stays"})


@pytest.mark.parametrize("by_client", [True, False])
def test_what_the_client_turned_away_is_its_own_evidence(by_client: bool) -> None:
    """An engine that cannot limit its queue has no counter of it."""
    point = make_point(load="poisson:1", flags={"max-num-queued-reqs": 4})
    limited = replace(point, admission_by_client=by_client)
    refused = make_record([], error=f"{BY_CLIENT}: as many")
    served = [make_record([(0.5, 1), (0.6, 1)]) for _ in range(9)]

    def is_missing(engine: Snapshot, evidence: Evidence, point: Point = limited) -> bool:
        found = [*served, refused] if point is limited else served
        trial = make_trial(found, engine=engine, point=point)
        caveats = caveats_of(trial, Expected(evidence=[evidence]))
        return "treatment not applied" in [caveat.name for caveat in caveats]

    older, newer = Snapshot(), Snapshot({metrics.TURNED_AWAY: 0})
    for engine in (older, newer):
        assert is_missing(engine, TURNED_AWAY) != by_client
        assert not is_missing(engine, NOBODY, make_point(load="poisson:1"))
    assert is_missing(newer, NOBODY) == by_client
