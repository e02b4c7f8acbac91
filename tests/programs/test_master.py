"""Load processes and their master: late messages, lost ones, a full disk, who ends with whom."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from loadtests import records
from loadtests.arrivals import Concurrent
from loadtests.plan import TrialPlan
from serving.models.catalog import ROOT
from tests.processes import lives
from tests.programs.beside_locust import said_by
from tests.unit.builders import make_summary

# Two load processes of a master, whose runner is a stand-in that hears what is sent; `there` says
# which are connected.
DIRECTED = """
import json, sys
from pathlib import Path
from types import SimpleNamespace
from loadtests.master import Director
from loadtests.plan import TrialPlan

plan, summary = TrialPlan.model_validate_json(sys.argv[1]), json.loads(sys.argv[2])
sent, there = [], {"one": "running", "other": "running"}
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
records("one", first, 1, 2)
for worker in sorted(there):
    says(worker, "ready", trial=first)
there["other"] = "missing"
director.go_on()
done("one", first, 3)
there["other"] = "running"  # it comes back, and goes on with what is over
director.begin(plan)
second = director.plan.trial
says("other", "ready", trial=first)
done("other", first, 100)
records("one", second, 3)
records("other", first, 4)
records("one", second, 5, 6)
says("one", "ready", trial=second)
done("one", second, 5)
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
    assert ["quit", "other"] in told["sent"]
    assert [record.index for record in records.read(home / "records.gz")] == [3, 5, 6]
    assert sorted(os.listdir(home)) == ["records.gz", "requests.jsonl"]


def test_a_full_disk_at_the_first_trial_is_told_at_once(said: dict[str, str]) -> None:
    """Nothing was begun that could be ended, and the run waited for its longest time."""
    event = json.loads(said["full disk"])
    assert event["event"] == "failed"
    assert "No space left" in event["reason"]


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
