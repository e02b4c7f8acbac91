"""A command that is forked from a process that is ready, beside one that starts afresh."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from serving.models.catalog import ROOT
from tests.fake import forked

ABOUT = """
import gc, json, os, signal, sys
print(json.dumps({
    "arguments": sys.argv,
    "set": os.environ.get("LABS_SEED"),
    "variables": sorted(os.environ),
    "folder": os.getcwd(),
    "leads its session": os.getsid(0) == os.getpid() == os.getpgrp(),
    "interrupted": signal.getsignal(signal.SIGINT) is signal.default_int_handler,
    "child ended": signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL,
    "terminals": [stream.isatty() for stream in (sys.stdin, sys.stdout, sys.stderr)],
    "asked": sys.stdin.read(),
    "encodings": [sys.stdout.encoding, sys.stderr.encoding],
    "of the lab": sorted({m.split(".")[0] for m in sys.modules}
                         & {"labs", "serving", "loadtests", "dashboards"}),
    "open": len(os.listdir("/proc/self/fd")),
    "garbage": gc.get_threshold(),
}), flush=True)
print("and this", file=sys.stderr)
"""


def _env() -> dict[str, str]:
    return {**os.environ, "LABS_SEED": "7"}


def _said(out: Path) -> tuple[dict[str, object], str]:
    about, then = out.read_text().splitlines()
    return json.loads(about), then


def test_it_begins_as_a_fresh_process_does(tmp_path: Path) -> None:
    argv, here, there = ("-c", ABOUT, "a", "b"), tmp_path / "forked", tmp_path / "fresh"
    assert forked.start(argv, _env(), here).wait(60) == 0, here.read_text()
    with there.open("wb") as sink:
        subprocess.run(
            [sys.executable, *argv], cwd=ROOT, env=_env(), check=True, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=sink, stderr=subprocess.STDOUT,
            # where the tests run in a shell's background, it would ignore SIGINT
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )  # fmt: skip
    (forked_one, then), (fresh_one, and_then) = _said(here), _said(there)
    assert forked_one == fresh_one
    assert then == and_then == "and this"


def test_a_command_is_run_by_its_modules_name(tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ("-m", "labs.harness.cli", "run", "no-such-lab")
    child = forked.start(words, _env(), out)
    assert child.wait(60) == 1
    assert "no-such-lab" in out.read_text()


@pytest.mark.parametrize(
    ("script", "code"),
    [
        ("pass", 0),
        ("import sys; sys.exit(3)", 3),
        ("raise ValueError", 1),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
    ],
)
def test_it_ends_as_a_fresh_process_does(script: str, code: int, tmp_path: Path) -> None:
    out = tmp_path / "out"
    script = f"import atexit; atexit.register(print, 'at its exit')\n{script}"
    child = forked.start(("-c", script), _env(), out)
    assert child.wait(60) == child.poll() == child.returncode == code
    assert ("at its exit" in out.read_text()) == (code >= 0)


def test_it_can_be_signalled_and_waited_for(tmp_path: Path) -> None:
    child = forked.start(("-c", "import time; time.sleep(60)"), _env(), tmp_path / "out")
    assert child.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        child.wait(0.1)
    child.terminate()
    assert child.wait(60) == -signal.SIGTERM
    child.kill()  # nothing is there, which is no error


def test_it_is_the_childs_parent_that_started_it(tmp_path: Path) -> None:
    """So that its exit code is known here, and what it leaves behind is no child of the tests."""
    out = tmp_path / "out"
    script = "import os, time; print(os.getppid(), flush=True); time.sleep(60)"
    child = forked.start(("-c", script), _env(), out)
    try:
        while not out.read_text():
            assert child.poll() is None
            time.sleep(0.02)
        assert int(out.read_text()) == os.getpid()
    finally:
        child.kill()
        child.wait()
