"""A run in other tools' formats, each loaded back."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from labs.harness.filing import export
from labs.harness.filing.results import RunFolder
from loadtests import records
from loadtests.arrivals import Offered
from tests.unit.builders import make_point, make_record, make_trial, write_run

VLLM_KEYS = {  # of vLLM 0.32, --save-result --save-detailed
    "date", "endpoint_type", "backend", "label", "model_id", "tokenizer_id", "num_prompts",
    "request_rate", "burstiness", "max_concurrency", "duration", "completed", "failed",
    "total_input_tokens", "total_output_tokens", "request_throughput", "request_goodput",
    "output_throughput", "total_token_throughput", "input_lens", "output_lens", "ttfts", "itls",
    "latencies", "start_times", "queue_times", "generated_texts", "errors",
    "max_output_tokens_per_s", "max_concurrent_requests", "rtfx",
} | {
    f"{statistic}_{figure}_ms"
    for figure in ("ttft", "tpot", "itl", "e2el")
    for statistic in ("mean", "median", "std", "p50", "p90", "p99")
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """One of its 8 trials holds a request that failed, beside one by hand."""
    folder = write_run(tmp_path)
    sent = [make_record([(11.0, 1), (11.5, 2), (12.0, 2)]), make_record([], index=1, sent_s=10.5)]
    point = folder.run().points()[0]
    records.write(folder.trial_folder(point, 1) / "requests.jsonl.gz", sent)
    return folder


def read(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_tables_read_back(folder: RunFolder, tmp_path: Path) -> None:
    written = export.export(folder, "csv", tmp_path / "out")
    assert [p.name for p in written] == ["requests.csv", "measurements.csv"]
    requests, measurements = map(read, written)
    assert len(requests) == 7 * 5 + 2
    first, failed = requests[:2]
    keys = ("variant", "workload", "load", "output_tokens", "ttft_s", "tpot_s", "error")
    assert [str(first[k]) for k in keys] == [
        "off", "short", "concurrent:1", "5", "1.0", "0.25", "",
    ]  # fmt: skip
    assert failed["ttft_s"] == failed["output_tokens"] == ""
    assert failed["error"] == "ConnectionError: refused"
    assert first["choice"] == ""
    (rate,) = [
        m for m in measurements
        if (m["variant"], m["load"], str(m["repeat"]), m["metric"])
        == ("on", "concurrent:2", "2", "output_tokens_per_s")
    ]  # fmt: skip
    assert float(str(rate["value"])) == pytest.approx(2 * 302 / 10)  # users, tokens, cycles
    assert rate["unit"] == "tok/s"


def test_each_answer_of_a_request_is_named_by_its_choice(folder: RunFolder) -> None:
    point = folder.run().points()[0]
    answers = [make_record([(11.0, 1)], choice=choice) for choice in range(3)]
    records.write(folder.trial_folder(point, 1) / "requests.jsonl.gz", answers)
    rows = [row for row in export.requests(folder) if row["repeat"] == 1]
    assert [row["choice"] for row in rows[:3]] == [0, 1, 2]


def test_a_schedule_without_a_stated_rate_has_the_one_it_came_at(folder: RunFolder) -> None:
    """As vLLM has it, "inf" says that everything was sent at once."""
    paced = [make_record([(11.0, 1)], scheduled_s=s) for s in (1.0, 2.0, 4.0)]
    point = make_point(load=str(Offered(times=2)))
    exported = export.vllm_result(folder, make_trial(paced, point=point))
    assert exported["request_rate"] == pytest.approx(2 / 3)


def test_vllms_format_has_its_keys_and_its_definitions(folder: RunFolder, tmp_path: Path) -> None:
    written = export.export(folder, "vllm", tmp_path / "out")
    assert len(written) == 8
    exported = json.loads((tmp_path / "out" / "off-short-concurrent-1-1.json").read_text())
    assert exported.keys() == VLLM_KEYS
    assert (exported["num_prompts"], exported["completed"], exported["failed"]) == (2, 1, 1)
    assert exported["duration"] == 2.0
    assert exported["output_throughput"] == 2.5
    assert exported["mean_ttft_ms"] == 1000
    assert exported["mean_tpot_ms"] == 250  # 1 s for all but one of 5 tokens, however they came
    assert exported["itls"] == [[0.5, 0.5], []]
    assert exported["ttfts"] == [1.0, None]  # vLLM would say 0
    assert exported["max_concurrency"] == 1
    assert exported["request_rate"] == "inf"
    # 12.0 falls into the third second after 10.0
    assert (exported["max_output_tokens_per_s"], exported["max_concurrent_requests"]) == (2.0, 1)
    assert exported["errors"] == ["", "ConnectionError: refused"]
