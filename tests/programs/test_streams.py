"""A load worker's request to a server that never ends its answer, or answers no stream.

Locust patches the process it is in, so the worker's side runs in a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from serving.models.catalog import ROOT
from serving.plugins import guard
from tests.programs.beside_locust import said_by
from tests.unit import hostile

_WORKER = """
import json, sys
from loadtests import plan
from loadtests.arrivals import Concurrent
from loadtests.load import Load, Turn, now
from loadtests.streaming import connect, records_of, stream
from serving.processes.masking import SECRETS
url, requests = sys.argv[1:]
for line in sys.stdin:
    body, plan.TOKEN_AT_MOST_S, timeout_s = json.loads(line)
    trial = plan.TrialPlan(
        url=url, arrival=Concurrent(users=1), requests=requests, records=requests, warmup_s=0,
        window_s=1, timeout_s=timeout_s, seed=0, lab="tiny", variant="on", run_id="r",
        workload="short", keep_text=True, secrets=SECRETS,
    )
    load = Load(trial)
    load.t0 = now()
    request = load.requests[0].model_copy(update={"body": body})
    ended = stream(connect(load), Turn(request, None, True), load)
    (record,) = records_of(ended, load)
    print(json.dumps([record.fields, ended.connection_failed]), flush=True)
"""
Ask = Callable[[str], tuple[dict[str, Any], bool]]
KEY = "my-key-of-many-characters"
MODEL = f'{{"model": "a-{KEY}", '.encode()
PADDING = " " * 240  # so that the key would be cut, and not be found any more
ANSWERS = {
    "/health": hostile.says(hostile.whole("")),
    "drip": hostile.drips,
    "lines": hostile.repeats(b": ping\n", hostile.STREAM + hostile.EVENT),
    "one-line": hostile.repeats(b"x", hostile.STREAM + hostile.EVENT),
    "headers": hostile.repeats(b"X-More: 1\r\n", b"HTTP/1.1 200 OK\r\n"),
    "silence": hostile.says_nothing,
    "redirect": hostile.says(
        hostile.whole("", "307 Temporary Redirect", more="Location: http://127.0.0.1/\r\n")
    ),
    "refuses": hostile.says(
        hostile.whole(f"{PADDING}Incorrect API key provided: {KEY} token=a1", "401 Unauthorized")
    ),
    "complains": hostile.says(
        hostile.STREAM + f'data: {{"error": "{PADDING}provided: {KEY} HF_TOKEN=a1"}}\n\n'.encode()
    ),
    "strange": hostile.says(hostile.STREAM + f"data: {'x' * 60} {KEY}\n\n".encode()),
    "repeats": hostile.says(
        hostile.STREAM + hostile.EVENT.replace(b"and", KEY.encode()).replace(b"{", MODEL, 1)
    ),
    "closes": lambda _: None,
    "no-stream": hostile.says(hostile.whole('{"choices": [{"message": {"content": "and"}}]}')),
}


ENDED_BY_TIME = ("drip", "silence")  # all others end by themselves, however slow the machine is


@pytest.fixture(scope="module")
def ask(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ask]:
    """Send one request for one token whose body is this word; its record, and whether the
    connection failed."""
    requests = tmp_path_factory.mktemp("worker") / "requests.jsonl"
    requests.write_text('{"index": 0, "output_tokens": 1, "body": ""}\n')
    with (
        hostile.serving(ANSWERS) as url,
        subprocess.Popen(
            [sys.executable, "-c", _WORKER, url, str(Path(requests))],
            cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env={**os.environ, guard.KEY: KEY},
        ) as child,
    ):  # fmt: skip
        assert child.stdin
        assert child.stdout
        talk = child.stdin, child.stdout

        def send(body: str) -> tuple[dict[str, Any], bool]:
            limits_s = (0.1, 0.4) if body in ENDED_BY_TIME else (30, 30)
            talk[0].write(json.dumps([body, *limits_s]) + "\n")
            talk[0].flush()
            record, connection_failed = json.loads(talk[1].readline())
            return record, connection_failed

        yield send
        child.stdin.close()


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ("drip", "no end"),
        ("lines", "69632 bytes"),
        ("one-line", "69632 bytes"),
        ("headers", "69632 bytes"),
    ],
)
def test_an_answer_without_an_end_fails_its_request_alone(ask: Ask, body: str, error: str) -> None:
    """The engine is there, so that the trial goes on: no connection failed."""
    record, connection_failed = ask(body)
    assert error in record["error"]
    assert not connection_failed
    assert len(record["chunks"]) == (body != "headers")  # what came is kept


def test_silence_is_a_timeout_and_no_failed_connection(ask: Ask) -> None:
    """A busy server is there, so that the trial goes on."""
    record, connection_failed = ask("silence")
    assert not connection_failed
    assert record["error"] == "TimeoutError: nothing came for 0.4 s"
    assert record["chunks"] == []


def test_a_connection_that_the_server_closes_has_failed(ask: Ask) -> None:
    record, connection_failed = ask("closes")
    assert connection_failed
    assert record["error"].startswith("Connection")


@pytest.mark.parametrize(
    ("body", "error"),
    [("redirect", "HTTP 307"), ("no-stream", "without a token")],
)
def test_what_is_no_stream_is_an_error(ask: Ask, body: str, error: str) -> None:
    record, connection_failed = ask(body)
    assert error in record["error"]
    assert not connection_failed
    assert record["output_tokens"] is None


@pytest.mark.parametrize("body", ["refuses", "complains", "strange"])
def test_what_a_server_repeats_of_the_key_is_not_recorded(ask: Ask, body: str) -> None:
    """Not even a part of it, where the error is cut short."""
    record, _ = ask(body)
    assert KEY[:4] not in json.dumps(record)
    assert "***" in record["error"]
    assert "a1" not in record["error"]


def test_a_key_in_an_answer_or_a_models_name_is_not_recorded(ask: Ask) -> None:
    record, _ = ask("repeats")
    assert (record["text"], record["model"], record["error"]) == ("***", "a-***", None)


_A_DAY_LATER = """
import time, types
import gevent, loadtests.locustfile
from locust.runners import WorkerRunner
said = ["stays"]
worker = types.SimpleNamespace(
    last_heartbeat_timestamp=time.time() - 86400, quit=lambda: said.append("leaves")
)
with gevent.Timeout(1.5, False):
    WorkerRunner.heartbeat_timeout_checker(worker)
print(*said)
"""


_GIVEN_UP = """
import sys
import gevent
from loadtests.arrivals import Constant
from loadtests.load import Load
from loadtests.plan import TrialPlan

load = Load(TrialPlan(
    url="", arrival=Constant(rate_per_s=4), requests=sys.argv[1], records=sys.argv[1], warmup_s=0,
    window_s=1, timeout_s=1, seed=0, lab="tiny", variant="on", run_id="r", workload="short",
))
load.start()
users = [gevent.spawn(load.next_turn, seat) for seat in range(3)]
users[0].join()  # it is due at once, the others wait until it is their turn
load.aborted = "the server is gone"
gevent.joinall(users)
print([user.value is not None for user in users], load.sent)
"""


_ORDER = """
import json, sys
from types import SimpleNamespace
import gevent
from loadtests import worker
from loadtests.arrivals import Concurrent
from loadtests.load import Ended, Load
from loadtests.plan import TrialPlan
from loadtests.worker import ChatUser, parse_in_turn, waiting_room

requests, line, times = sys.argv[1], sys.argv[2].encode(), int(sys.argv[3])
load = Load(TrialPlan(
    url="", arrival=Concurrent(users=1), requests=requests, records=requests, warmup_s=0,
    window_s=60, timeout_s=1, seed=0, lab="tiny", variant="on", run_id="r", workload="short",
))
load.start()
waiting_room.loads = (load,)
waiting_room.opened.set()
waiting_room.ready = waiting_room.leave = lambda: None
order = []

def stream(client, turn, load):
    order.append("sent")
    gevent.sleep(0.01)
    if order.count("sent") > 3:
        raise KeyboardInterrupt
    head = b"HTTP/1.1 200 OK\\r\\nConnection: close\\r\\n\\r\\n"
    pieces = [(0.0, head), *[(0.0, line + b"\\n")] * times]
    return Ended(turn, pieces, 0.0, 1.0, None, False)

def told(**_):
    order.append("parsed")

worker.stream, worker.connect = stream, lambda load: SimpleNamespace(close=lambda: None)
environment = SimpleNamespace(events=SimpleNamespace(request=SimpleNamespace(fire=told)))
user = ChatUser.__new__(ChatUser)
user.environment, user.seat = environment, 0
gevent.spawn(parse_in_turn, load, environment)
try:
    user.take_part()
except KeyboardInterrupt:
    json.dump([order, [record.error for record in load.fresh]], sys.stdout)
"""


LONG, REFUSED = (
    ('data: {"choices": [{"delta": {"content": "a"}}]}', "20"),
    ('{"object": "error"}', "1"),
)


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the programs above have said; the last leaves Locust patched."""
    requests = tmp_path_factory.mktemp("load") / "requests.jsonl"
    requests.write_text('{"index": 0, "output_tokens": 20, "body": ""}\n' * 4)
    programs = {
        "given up": (_GIVEN_UP, str(requests)),
        "long": (_ORDER, str(requests), *LONG),
        "refused": (_ORDER, str(requests), *REFUSED),
        "a day later": (_A_DAY_LATER,),
    }
    return dict(zip(programs, said_by(*programs.values()), strict=True))


def test_a_load_process_stays_when_the_wall_clock_jumps(said: dict[str, str]) -> None:
    """A day after the master was last heard of, by that clock."""
    assert said["a day later"].strip() == "stays"


def test_in_an_open_loop_no_user_sends_once_the_trial_is_given_up(said: dict[str, str]) -> None:
    assert said["given up"] == "[True, False, False] 1\n"


@pytest.mark.parametrize(
    ("answer", "before_the_next", "error"),
    [
        ("long", ["sent", "sent", "parsed"], None),
        ("refused", ["sent", "parsed", "sent"], "the stream ended without a token"),
    ],
)
def test_the_next_request_does_not_wait_until_a_long_answer_has_been_parsed(
    said: dict[str, str], answer: str, before_the_next: list[str], error: str | None
) -> None:
    order, errors = json.loads(said[answer])
    assert order[:3] == before_the_next
    assert errors == [error] * 3
