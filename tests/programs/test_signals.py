"""Signals that end the command line, and those that must not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from serving.models.catalog import ROOT

INTERRUPTS = "import os, signal, time\nos.kill(os.getpid(), signal.{})\ntime.sleep(60)\n"


@pytest.mark.parametrize(("sign", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_stop_while_the_program_is_loaded_is_one_line(
    sign: str, code: int, tmp_path: Path
) -> None:
    (tmp_path / "typer.py").write_text(INTERRUPTS.format(sign))  # imported in the place of Typer
    ended = subprocess.run(
        [sys.executable, "-m", "labs.harness.cli", "list"],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"},
        capture_output=True, text=True, check=False,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    assert (ended.returncode, ended.stdout, ended.stderr) == (code, "Stopped.\n", "")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [("list >&-", "is closed"), ("run --help 2>&-", "is closed"), ("list >/dev/full", "No space")],
)
def test_what_cannot_be_printed_is_one_sentence(arguments: str, said: str) -> None:
    typed = f"exec {sys.executable} -m labs.harness.cli {arguments}"
    ended = subprocess.run(
        ["/bin/sh", "-c", typed], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (ended.returncode, (ended.stdout + ended.stderr).count("\n")) == (1, 1)
    assert said in ended.stdout + ended.stderr


def test_an_output_that_nobody_reads_any_more_is_one_sentence() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    ended = subprocess.run(
        [sys.executable, "-m", "labs.harness.cli", "list"],
        cwd=ROOT, stdout=writing, stderr=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    os.close(writing)
    assert (ended.returncode, ended.stderr.count("\n")) == (1, 1)
    assert "RESUME=1" in ended.stderr


@pytest.mark.parametrize(
    ("handler", "said"), [(signal.SIG_IGN, "goes on\n"), (signal.SIG_DFL, "")], ids=("nohup", "")
)
def test_a_hangup_that_was_ignored_stays_ignored(handler: signal.Handlers, said: str) -> None:
    code = """
import os, signal
from labs.harness.cli.terminal import reported_errors
with reported_errors():
    os.kill(os.getpid(), signal.SIGHUP)
    print("goes on")
"""
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, handler),
    )  # fmt: skip
    assert ended.stdout == said, ended.stderr
