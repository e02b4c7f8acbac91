"""What is asked of a run that other machines send load for, before anything starts."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from labs import LABS
from labs.harness.running.resolve import RunRequest, load_workers_of
from labs.harness.spec import LabError
from loadtests import generator, load_workers, records
from loadtests.arrivals import Concurrent
from loadtests.load_workers import LoadWorkers
from loadtests.plan import TrialPlan
from serving.processes.ports import free_port
from serving.weights.models import ROOT
from tests.processes import lives
from tests.programs.beside_locust import said_by
from tests.unit.builders import make_summary

KEY = "k" * load_workers.LEAST_KEY_CHARACTERS
ASKED = RunRequest(LABS["continuous-batching"], endpoint="http://127.0.0.1:1", load_workers=2)
FAR = "http://10.0.0.9:8000"


def test_a_key_is_drawn_and_the_master_stays_on_loopback() -> None:
    one, another = load_workers_of(ASKED), load_workers_of(ASKED)
    assert one
    assert another
    assert one.host == "127.0.0.1"
    assert one.key != another.key
    assert len(one.key) >= load_workers.LEAST_KEY_CHARACTERS
    lines = one.invitation.splitlines()
    assert f"  make load-worker MASTER={one.address}" in lines  # by itself, to be copied
    assert lines[-1].endswith(one.key)
    assert "ssh -N -L" in one.invitation


def test_a_readers_key_is_not_shown() -> None:
    found = load_workers_of(replace(ASKED, key=KEY, listen=f"0.0.0.0:{free_port()}", endpoint=FAR))
    assert found
    assert found.key == KEY
    assert KEY not in found.invitation + repr(replace(ASKED, key=KEY))
    assert "<an address" in found.invitation


def test_a_run_by_itself_waits_for_nobody() -> None:
    assert load_workers_of(replace(ASKED, load_workers=0)) is None


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"load_workers": 0, "listen": "127.0.0.1:5557"}, "LOAD_WORKERS="),
        ({"endpoint": ""}, "ENDPOINT="),
        ({"listen": "5557"}, "'5557' is not an address"),
        ({"listen": "127.0.0.1:0"}, "is not an address"),
        ({"listen": "127.0.0.1:99999"}, "is not an address"),
        ({"listen": "[::1]:5557"}, "IPv4 address"),
        ({"listen": "10.0.0..5:5557"}, "is not an address"),
        ({"listen": "http://h:5557"}, "is not an address"),
        ({"listen": "0.0.0.0:5557"}, "this machine"),
        ({"listen": "192.0.2.1:5557", "endpoint": FAR}, "give LISTEN= an address"),
        ({"listen": "no.such.host.invalid:5557", "endpoint": FAR}, "at no.such.host.invalid"),
        ({"key": "short"}, "KEY has 5 .* 16 "),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, object], says: str) -> None:
    with pytest.raises(LabError, match=says):
        load_workers_of(replace(ASKED, **changes))  # type: ignore[arg-type]


def test_a_password_in_an_address_is_not_repeated() -> None:
    named = replace(ASKED, endpoint="http://me:secret@localhost:1", listen="0.0.0.0:5557")
    with pytest.raises(LabError) as refused:
        load_workers_of(named)
    assert "secret" not in str(refused.value)


def test_a_port_in_use_is_refused() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(LabError, match="a free port"):
            load_workers_of(replace(ASKED, listen=address))


def test_the_key_is_in_no_command_line() -> None:
    elsewhere = LoadWorkers(2, "10.0.0.5", 5557, KEY)
    command = generator.argv(4, 9111, 1, 1, elsewhere)
    assert KEY not in " ".join(command)
    assert command[command.index("--master-bind-host") + 1] == "10.0.0.5"
    assert command[command.index("--master-host") + 1] == "10.0.0.5"  # its own processes join there
    assert command[command.index("-u") + 1] == "12"  # each of three has all four users
    assert KEY not in " ".join(generator.worker_argv("10.0.0.5", 5557))


def test_without_load_workers_everything_stays_on_loopback() -> None:
    command = generator.argv(4, 9111, 5557)
    assert command[command.index("--master-bind-host") + 1] == "127.0.0.1"
    assert "--lab-load-workers" not in command


# Two load processes of a master, whose runner is a stand-in that hears what is sent; `there` says
# which are connected.
DIRECTED = """
import json, sys
from pathlib import Path
from types import SimpleNamespace
from loadtests.master import Director
from loadtests.plan import TrialPlan

plan, summary = TrialPlan.model_validate_json(sys.argv[1]), json.loads(sys.argv[2])
sent, there = [], {"here_1": "running", "there_2": "running"}
runner = SimpleNamespace(
    register_message=lambda *_: None,
    send_message=lambda name, data=None, client_id=None: sent.append((name, data, client_id)),
)
silent = lambda *_: None
exporter = SimpleNamespace(begin=silent, end=silent, progress=silent, observe=silent)
director = Director(runner, exporter)
director.alive = lambda: {name for name, state in there.items() if state == "running"}
director.team = set(there)

def says(worker, what, **fields):
    handler = getattr(director, f"on_{what}")
    data = fields["trial"] if [*fields] == ["trial"] else fields
    handler(SimpleNamespace(node_id=worker, data=data))

def done(worker, trial, number):
    says(worker, "done", trial=trial, summaries=[json.dumps({**summary, "sent": number})])

def records(worker, trial, *numbers):
    fields = {"asked_tokens": 1, "scheduled_s": None, "sent_s": 0.5, "chunks": [[0.6, 1]],
              "end_s": 0.7, "prompt_tokens": 1, "output_tokens": 1, "in_window": True}
    made = [{"index": number, **fields} for number in numbers]
    says(worker, "records", trial=trial, number=0, records=made, progress="{}")

director.begin(plan)
first = director.plan.trial
records("here_1", first, 1, 2)
for worker in sorted(there):
    says(worker, "ready", trial=first)
there["there_2"] = "missing"
director.go_on()
done("here_1", first, 3)
there["there_2"] = "running"  # it comes back, and goes on with what is over
director.begin(plan)
second = director.plan.trial
says("there_2", "ready", trial=first)
done("there_2", first, 100)
records("here_1", second, 3)
records("there_2", first, 4)
records("here_1", second, 5, 6)
says("here_1", "ready", trial=second)
done("here_1", second, 5)
print(json.dumps({"sent": [(name, client) for name, _, client in sent], "same": first == second}))
"""


FULL_DISK = """
import errno, os, sys
from types import SimpleNamespace
from loadtests import records
from loadtests.exporter import Exporter
from loadtests.master import Director
from loadtests.plan import TrialPlan

def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

records.tempfile.TemporaryFile = full
director = Director(SimpleNamespace(register_message=lambda *_: None), Exporter())
director.begin(TrialPlan.model_validate_json(sys.argv[1]))
"""


COLLECTING = """
import gc
from loadtests.worker import WaitingRoom

def meet():
    print(gc.isenabled())
    raise ValueError

try:
    WaitingRoom().play((type("NoUsers", (), {"users": 0}),), meet)
except ValueError:
    print(gc.isenabled())
"""


SILENT = """
from types import SimpleNamespace
import gevent
from loadtests import worker

worker.MASTER_TIMEOUT_S = 0.1
events = SimpleNamespace(heartbeat_received=SimpleNamespace(add_listener=lambda hear: None))
runner = SimpleNamespace(environment=SimpleNamespace(events=events), quit=lambda: print("left"))
worker.watch_master(runner)
gevent.sleep(0)
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("load")


@pytest.fixture(scope="module")
def said(home: Path) -> dict[str, str]:
    """What the programs above have said; the last leaves no disk to write to."""
    requests = home / "requests.jsonl"
    requests.touch()
    plan = TrialPlan(
        url="", arrival=Concurrent(users=2), requests=requests, records=home / "records.gz",
        warmup_s=0, window_s=1, timeout_s=1, seed=0, lab="tiny", variant="on", run_id="r",
        workload="w",
    )  # fmt: skip
    planned = plan.model_dump_json()
    programs = {
        "directed": (DIRECTED, planned, make_summary().model_dump_json()),
        "collecting": (COLLECTING,),
        "silent": (SILENT,),
        "full disk": (FULL_DISK, planned),
    }
    return dict(zip(programs, said_by(*programs.values()), strict=True))


def test_what_is_late_belongs_to_no_trial_and_who_was_lost_stays_lost(
    home: Path, said: dict[str, str]
) -> None:
    first, second, told = map(json.loads, said["directed"].splitlines())
    (one,), (other,) = first["summaries"], second["summaries"]
    assert (one["sent"], one["lost_share"]) == (3, 0.5)
    assert (other["sent"], other["lost_share"]) == (5, 0)
    assert not told["same"]
    trials = ["lab-trial", "lab-trial", "lab-go", "quit", "lab-trial", "lab-go"]
    assert [name for name, _ in told["sent"]] == trials
    assert ["quit", "there_2"] in told["sent"]
    assert [record.index for record in records.read(home / "records.gz")] == [3, 5, 6]
    assert sorted(os.listdir(home)) == ["records.gz", "requests.jsonl"]


def test_a_full_disk_at_the_first_trial_is_told_at_once(said: dict[str, str]) -> None:
    """Nothing was begun that could be ended, and the run waited for its longest time."""
    event = json.loads(said["full disk"])
    assert event["event"] == "failed"
    assert "No space left" in event["reason"]


def test_a_load_worker_leaves_a_run_that_it_hears_nothing_of(said: dict[str, str]) -> None:
    event, left = said["silent"].splitlines()
    assert json.loads(event)["event"] == "refused"
    assert left == "left"


def test_garbage_is_collected_again_after_a_trial_that_failed(said: dict[str, str]) -> None:
    assert said["collecting"].split() == ["False", "True"]


FORKED = """
import os, time
from loadtests import locustfile
if worker := os.fork():
    print(worker, flush=True)
time.sleep(600)
"""


def test_a_load_process_ends_with_its_master_from_the_moment_that_it_is_forked() -> None:
    """It may be killed before Locust has begun in any of them."""
    argv = [sys.executable, "-c", FORKED]
    with subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, text=True) as master:
        assert master.stdout
        worker = psutil.Process(int(master.stdout.readline()))
        master.kill()
    try:
        psutil.wait_procs([worker], timeout=15)
        assert not lives(worker)
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            worker.kill()


def test_each_key_has_a_secret_of_its_own() -> None:
    secrets = {load_workers.secret_of(key) for key in (KEY, f"{KEY}.")}
    assert {len(secret) for secret in secrets} == {32}
    assert len(secrets) == 2


FETCHING = """
import sys
from types import SimpleNamespace
from loadtests import worker
from loadtests.plan import TrialPlan
plan = TrialPlan.model_validate_json(sys.argv[1])
worker.requests_text.put({"trial": plan.trial, "text": ""})
loads = worker.fetched(plan, SimpleNamespace(send_message=lambda *_: None))
print(*(load.plan.pids for load in loads))
"""


def test_a_load_worker_suspends_no_process_of_its_own_machine(tmp_path: Path) -> None:
    """The pids in a plan are those of the machine that the run is on."""
    plan = TrialPlan(
        url="", arrival=Concurrent(users=1), requests=tmp_path, records=tmp_path, warmup_s=0,
        window_s=1, timeout_s=1, seed=0, lab="tiny", variant="on", run_id="r", workload="w",
        trial="t", pids=(os.getpid(),),
    )  # fmt: skip
    together = plan.model_copy(update={"beside": (plan,)})
    assert said_by((FETCHING, together.model_dump_json())) == ["() ()\n"]
