"""Run, repeat, compare, on an engine whose law is known."""

from __future__ import annotations

import json
import lzma
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from labs.harness.storage.results import RunFolder
from tests.fake.conftest import LABS_WITHOUT_PROMETHEUS, Command, Reader, reading

LAB = "continuous-batching"
SETTINGS = (
    "warmup_s=0.2 window_s=0.6 repeats=3 most_repeats=3 requests=128"
    " workloads.exponential.output_tokens.mean_tokens=6"
    " workloads.exponential.output_tokens.max_tokens=16"
    ' workloads=["exponential"]'
    ' workloads.exponential.loads=["concurrent:1","concurrent:8","waves:8"]'
    " claims.throughput.treatment.load=concurrent:8 claims.tpot.treatment.load=concurrent:8"
)
SLOWER = 3.0
STEP_S = 0.02  # long beside what a busy machine adds to it
ENGINE = ("--step-s", f"{STEP_S}")
SLOW = ("--step-s", f"{SLOWER * STEP_S}", "--step-per-seq-s", f"{SLOWER * 0.0001}")


class History:
    """A run, its repetition on the same engine, and one on an engine slower by a factor."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self.folders: set[Path] = set()
        bare = LABS_WITHOUT_PROMETHEUS
        run = self._folder(reader.types("run", LAB, engine=ENGINE, program=bare, SET=SETTINGS))
        self.original = run
        self.again = reader.types("reproduce", engine=ENGINE, program=bare, RUN=str(run.path))
        self.same = self._folder(self.again)
        self.late = reader.types("reproduce", engine=SLOW, program=bare, RUN=str(run.path))
        self.slow = self._folder(self.late)

    def _folder(self, command: Command) -> RunFolder:
        command.wait()
        before = self.folders
        self.folders = {p.parent for p in self.reader.results.glob("*/*/*/COMPLETE")}
        (new,) = self.folders - before
        return RunFolder(new)


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> Iterator[History]:
    with reading(tmp_path_factory.mktemp("history") / "reader") as someone:
        yield History(someone)


def held_against(reader: Reader, baseline: str, run: str, home: Path) -> Command:
    """`make compare FAIL_IF=worse`, with wide limits: machines that run tests are busy."""
    wide = home / "wide.toml"
    wide.write_text("[worse]\ndefault = 0.8\n")  # the factor is 3
    command = reader.types("compare", A=baseline, B=run, FAIL_IF="worse", THRESHOLDS=str(wide))
    command.wait()
    return command


def assert_nothing_is_worse(compared: Command) -> None:
    """It passed, but for verdicts that are left out since other tests disturbed a run."""
    complaints = [line for line in compared.said.splitlines() if "FAILED" in line]
    assert all("not valid now" in line for line in complaints), compared.said
    assert compared.process.returncode == (1 if complaints else 0), compared.said
    assert complaints or "Passed" in compared.said


def found(folder: RunFolder) -> dict[str, Any]:
    filed = folder.path.parent / folder.run().reproduces / "reproductions"
    plain: dict[str, Any] = json.loads(
        lzma.decompress((filed / f"{folder.path.name}.json.xz").read_bytes())
    )
    return plain


def test_the_same_lab_was_run_with_the_same_requests(history: History) -> None:
    first, second = history.original.run(), history.same.run()
    assert second.digest == first.digest
    assert second.prompts_sha256 == first.prompts_sha256
    assert second.changes == first.changes
    assert second.reproduces == first.run_id
    assert second.model_files
    assert "tokenizer.json" in second.model_files


def test_the_exit_code_is_that_of_the_verdicts(history: History) -> None:
    for command, folder in ((history.again, history.same), (history.late, history.slow)):
        code = {"reproduced": 0, "not reproduced": 1, "undecided": 2}[found(folder)["outcome"]]
        assert command.process.returncode == code, command.said
        assert "Reproduced?" in command.said


def tpots(folder: RunFolder) -> list[dict[str, Any]]:
    """The answers about TPOT, one a point."""
    return [a for a in found(folder)["answers"] if a["row"]["figure"] == "tpot_mean_s"]


@pytest.mark.parametrize(("repetition", "factor"), [("same", 1.0), ("slow", SLOWER)])
def test_an_engine_differs_by_its_factor(history: History, repetition: str, factor: float) -> None:
    ratios = [a["row"]["contrast"]["ratio"]["value"] for a in tpots(getattr(history, repetition))]
    assert len(ratios) == 3
    # one trial of a point may fall into a busy moment
    assert statistics.median(ratios) == pytest.approx(factor, rel=0.35)


def test_a_slower_engine_is_not_reproduced(history: History) -> None:
    reached = sorted(a["answer"] for a in tpots(history.slow))
    # one trial of a point may fall into a busy moment, which leaves that point undecided
    assert reached[:2] == ["not reproduced"] * 2
    assert reached[2] in {"not reproduced", "undecided"}


def test_the_same_is_not_worse_and_the_slower_is(history: History, tmp_path: Path) -> None:
    passed, caught = (
        held_against(history.reader, str(history.original.path), str(run.path), tmp_path)
        for run in (history.same, history.slow)
    )
    assert_nothing_is_worse(passed)
    assert caught.process.returncode == 1
    assert f"FAILED {LAB}: TPOT, mean at base/exponential/" in caught.said


def test_both_answers_are_filed_with_the_original(history: History) -> None:
    home = history.original.path / "reproductions"
    ids = {f.path.name for f in (history.same, history.slow)}
    assert {p.name.removesuffix(".json.xz") for p in home.glob("*.json.xz")} == ids
    said = (home / "README.md").read_text()
    assert all(id in said for id in ids)


def test_a_reproduction_is_no_result_of_its_own(history: History) -> None:
    command = history.reader.types("check")
    assert command.wait() == 0, command.said
    assert "Well-formed runs: 3." in command.said
