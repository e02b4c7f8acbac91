"""The client's own limits on the queue, for an engine without: whom they turn away, and when."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from labs.judging.validity import Expected, caveats_of
from labs.lab import Arm, Evidence, Point
from loadtests.admission import Admission, QueueLimits
from loadtests.plan import PlannedRequest
from loadtests.records import BY_CLIENT
from serving import metrics
from serving.forecasting.traffic import Delays, Traffic, VirtualAnswer, play
from serving.metrics import Snapshot
from tests.unit.builders import make_point, make_record, make_trial
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
    admission = Admission(QueueLimits(prompt_tokens=20), (0, 1), tmp_path / "counts")
    assert not admission.refusal(request(prompt_tokens=999))
    first, second = admission.admit(request()), admission.admit(request())
    assert "prompts were waiting" in admission.refusal(request(prompt_tokens=1))
    first.append((1.0, HEAD))
    assert admission.refusal(request())
    first.append((1.1, EVENT))
    first.append((1.2, EVENT))
    assert not admission.refusal(request())
    admission.admit(request())
    second.end()  # it failed without a token
    assert not admission.refusal(request())


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
        return any(metrics.TURNED_AWAY in caveat.text for caveat in caveats)

    older, newer = Snapshot(), Snapshot({metrics.TURNED_AWAY: 0})
    for engine in (older, newer):
        assert is_missing(engine, TURNED_AWAY) != by_client
        assert not is_missing(engine, NOBODY, make_point(load="poisson:1"))
    assert is_missing(newer, NOBODY) == by_client
