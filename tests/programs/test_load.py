"""The load generator of a run is started again where it fails, and its late answers are lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from labs.harness.runner import load
from labs.harness.runner.load import LoadGenerator
from loadtests import generator
from loadtests.arrivals import Concurrent
from loadtests.generator import GeneratorError
from loadtests.plan import TrialPlan
from serving.models.catalog import BUNDLED, CACHE, ROOT
from tests.unit.builders import make_summary

# The first one plays its trial for too long and then answers as if it were the next trial's; a
# second one dies with its trial; all others answer.
STAND_IN = """
import json, os, sys, time
from pathlib import Path
home = Path(sys.argv[1])
number = len(list(home.glob("start-*")))
(home / f"start-{number}").touch()
(home / "session").write_text(str(os.getsid(0)))
print(json.dumps({"event": "ready"}), flush=True)
for line in sys.stdin:
    if number == 0:
        time.sleep(5)
    if number == 1:
        os._exit(3)
    done = {"event": "done", "summaries": [{**json.loads(sys.argv[2]), "sent": number}]}
    print(json.dumps(done), flush=True)
"""


def test_a_trial_that_fails_is_followed_by_another_load_generator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    summary = json.dumps(make_summary().model_dump())
    argv = [sys.executable, "-c", STAND_IN, str(tmp_path), summary]
    monkeypatch.setattr(load, "argv", lambda *_: argv)
    monkeypatch.setattr("loadtests.plan.HELD_OPEN_AT_MOST_S", 0.1)
    requests = tmp_path / "requests.jsonl"
    requests.touch()
    plan = TrialPlan(
        url="", arrival=Concurrent(users=1), requests=requests, records=requests, warmup_s=0,
        window_s=0.01, timeout_s=0.1, seed=0, lab="tiny", variant="on", run_id="r", workload="w",
    )  # fmt: skip
    lab = SimpleNamespace(load_processes=1)
    setup: Any = SimpleNamespace(users=1, lab=lab, machine=SimpleNamespace(kind="gpu"))
    playing = LoadGenerator(setup, 1, tmp_path / "locust.log")
    try:
        with monkeypatch.context() as impatient:
            impatient.setattr(generator, "GRACE_S", 0.1)
            with pytest.raises(GeneratorError, match="said nothing for"):
                playing.play(plan, lambda: None)
        with pytest.raises(GeneratorError, match="exit code 3"):
            playing.play(plan, lambda: None)
        played = [playing.play(plan, lambda: None) for _ in range(2)]
        assert [summary.sent for (summary,) in played] == [2, 2]
    finally:
        playing.stop()
    assert len(list(tmp_path.glob("start-*"))) == 3
    # in the engines' session, so that their niceness counts beside its own
    assert (tmp_path / "session").read_text() == str(os.getsid(0))


MODEL = CACHE / "models" / BUNDLED


@pytest.mark.skipif(not MODEL.exists(), reason="no bundled model: `make setup` converts it")
def test_counting_tokens_imports_no_torch() -> None:
    """Every run counts tokens, and importing torch takes seconds."""
    program = (
        "import sys; from loadtests.prompts import counter;"
        f" counter({str(MODEL)!r}); sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
