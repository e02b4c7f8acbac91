"""Another tool's benchmark, played on the fake engine."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from labs.harness.plan.benchmarks import translate
from labs.harness.storage.results import RunFolder
from tests.fake.conftest import LABS_WITHOUT_PROMETHEUS, Reader

COMMAND = (
    "vllm bench serve --model org/model --dataset-name random --random-input-len 60"
    " --random-output-len 5 --random-range-ratio 0.2 --num-prompts 24 --seed 3 --save-result"
)
SERVE = "vllm serve org/model --max-num-seqs 3 --max-model-len 512 --port 8000"
ENGINE = ("--step-s", ".02")
HERE = "SmolLM2-135M-Instruct"


def played(reader: Reader, tmp_path: Path, load: str) -> tuple[RunFolder, str]:
    theirs = tmp_path / "theirs.json"
    theirs.write_text(json.dumps({"mean_ttft_ms": 777.0, "output_throughput": 9.0}))
    command = reader.types(
        "reproduce", engine=ENGINE, program=LABS_WITHOUT_PROMETHEUS, COMMAND=f"{COMMAND} {load}",
        SERVE=SERVE, MODEL=HERE, THEIRS=str(theirs), SET="repeats=1",
    )  # fmt: skip
    assert command.wait() == 0, command.said
    return command.folder, command.said


@pytest.mark.parametrize(("load", "most"), [("--request-rate 30 --max-concurrency 4", 4), ("", 24)])
def test_the_engine_is_sent_what_the_command_says(
    reader: Reader, tmp_path: Path, load: str, most: int
) -> None:
    folder, said = played(reader, tmp_path, load)
    (workload,) = translate(f"{COMMAND} {load}").lab.workloads
    log = [line for line in reader.engine_log() if line["stream"]]
    sent = Counter((line["n_in"], sum(int(k) for _, k in line["chunks"])) for line in log)
    assert sent == Counter(row[1:] for row in workload.trace)
    begun_s = sorted(line["received"] for line in log)
    ended_s = sorted(line["chunks"][-1][0] for line in log)
    at_once = max(sum(b <= at for b in begun_s) - sum(e < at for e in ended_s) for at in begun_s)
    assert at_once <= most
    if "rate" not in load:
        assert at_once == most
    run = folder.run()
    assert folder.complete
    assert run.ad_hoc
    assert run.changes["SERVE"] == SERVE
    assert "--max-num-seqs" in reader.engine_starts()[0][1]
    assert not [c for c in folder.summary().caveats if c.name == "ran out of requests"]
    assert "777" in said  # their figure, beside this run's
    assert reader.types("check").wait() == 0


def test_such_a_run_is_repeated_as_any_other(reader: Reader, tmp_path: Path) -> None:
    folder, _ = played(reader, tmp_path, "--max-concurrency 8")
    reader.types(
        "reproduce", engine=ENGINE, program=LABS_WITHOUT_PROMETHEUS,
        RUN=str(folder.path), MODEL=HERE,
    ).wait()  # fmt: skip
    runs = [RunFolder(path.parent).run() for path in reader.results.glob("*/*/*/run.json")]
    assert {run.digest for run in runs} == {folder.run().digest}
    assert {run.reproduces for run in runs} == {"", folder.run().run_id}


def test_a_load_that_cannot_be_translated_starts_nothing(reader: Reader) -> None:
    refused = reader.types("reproduce", COMMAND="vllm bench serve --dataset-name sharegpt")
    assert refused.wait() == 2
    assert "sharegpt" in refused.said
    assert not refused.folders
    assert not reader.engine_starts()
