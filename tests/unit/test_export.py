"""A run in other tools' formats, each loaded back."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from labs.harness.storage import export
from labs.harness.storage.results import RunFolder
from loadtests import records
from tests.unit.builders import make_record, write_run

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
    written = export.export(folder, tmp_path / "out")
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
