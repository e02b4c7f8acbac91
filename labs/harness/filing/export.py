"""Exports a run for other tools: as CSV tables, or in the format of `vllm bench serve`.

The tables are long: one row for each request and one for each measurement, with its variant,
workload, load and repeat. vLLM's format has one file for each trial, with vLLM's keys (taken from
`vllm/benchmarks/serve.py`, version 0.32: `--save-result --save-detailed`), computed by vLLM's
definitions from our records: over every request of the trial, from the send. What has no value is
null, where vLLM would write 0.
"""

from __future__ import annotations

import csv
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np

from labs.harness.filing.results import RunFolder
from labs.harness.filing.score import after_first_token, from_send
from labs.harness.judging.measure import Trial
from labs.harness.judging.metrics import METRICS
from labs.harness.spec import Point
from loadtests.records import RequestRecord
from serving import whole

Format = Literal["csv", "vllm"]
TableRow = dict[str, Any]


def export(folder: RunFolder, kind: Format, out: Path) -> list[Path]:
    """Write the run's tables or files into `out`, and return their paths."""
    out.mkdir(parents=True, exist_ok=True)
    if kind == "vllm":
        return list(_vllm_files(folder, out))
    tables = {"requests": requests(folder), "measurements": measurements(folder)}
    written = []
    for name, rows in tables.items():
        path = out / f"{name}.csv"
        with whole.file(path) as half:
            _write_csv(half, rows)
        written.append(path)
    return written


# ------------------------------------------------------------------------------------- the tables


def requests(folder: RunFolder) -> Iterator[TableRow]:
    """Yield one row per request, read trial by trial.

    Times are seconds from the start of the trial, null where a request did not get that far.
    """
    return (
        {
            **about,
            "index": r.index,
            "choice": r.choice,  # which answer, where the request asked for several by `n`
            "in_window": r.in_window,
            "ok": r.ok,
            "error": r.error,
            "asked_tokens": r.asked_tokens,
            "prompt_tokens": r.prompt_tokens,
            "output_tokens": r.output_tokens,
            "chunks": len(r.chunks),
            "scheduled_s": r.scheduled_s,
            "sent_s": r.sent_s,
            "first_token_s": r.chunks[0][0] if r.chunks else None,
            "last_token_s": r.chunks[-1][0] if r.chunks else None,
            "end_s": r.end_s,
            "send_lag_s": r.send_lag_s,
            "ttft_s": r.ttft_s,
            "tpot_s": r.tpot_s,
            "e2e_s": r.e2e_s,
        }
        for about, trial in _trials(folder)
        for r in trial.records
    )


def measurements(folder: RunFolder) -> Iterator[TableRow]:
    """Yield one row per metric of a trial; its value is null where there were too few samples."""
    summary, run = folder.summary(), folder.run()
    return (
        {
            **_about(folder, point, repeat),
            "metric": metric,
            "unit": METRICS[metric].unit,
            "better": METRICS[metric].better,
            "value": value,
        }
        for point in run.points()
        for repeat, row in summary.measurements.get(point.key, {}).items()
        for metric, value in row.items()
    )


def _trials(folder: RunFolder) -> Iterator[tuple[TableRow, Trial]]:
    run = folder.run()
    for point, result, trial in folder.trials(run.points(), run.rebuilt_lab()):
        if trial is not None:
            yield _about(folder, point, result.repeat), trial


def _about(folder: RunFolder, point: Point, repeat: int) -> TableRow:
    return {
        "machine": folder.machine_slug,
        "lab": folder.lab_name,
        "run": folder.path.name,
        "variant": point.variant.name,
        "workload": point.workload.name,
        "load": str(point.load),
        "repeat": repeat,
    }


def _write_csv(path: Path, rows: Iterator[TableRow]) -> None:
    first = list(itertools.islice(rows, 1))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(first[0]) if first else [])
        writer.writeheader()
        writer.writerows(itertools.chain(first, rows))


# ---------------------------------------------------------------------------- as vllm bench serve

PERCENTILES = (50, 90, 99)


def _vllm_files(folder: RunFolder, out: Path) -> Iterator[Path]:
    for about, trial in _trials(folder):
        load = trial.point.load.name
        name = f"{about['variant']}-{about['workload']}-{load}-{about['repeat']}.json"
        yield whole.write(out / name, json.dumps(vllm_result(folder, trial)) + "\n")


def _scheduled_per_s(records: Sequence[RequestRecord]) -> float | None:
    """Compute the mean rate of a schedule; None where there was none."""
    due_s = [r.scheduled_s for r in records if r.scheduled_s is not None]
    over_s = max(due_s, default=0.0) - min(due_s, default=0.0)
    return (len(due_s) - 1) / over_s if over_s > 0 else None


def vllm_result(folder: RunFolder, trial: Trial) -> TableRow:
    """Describe one trial under the keys of vLLM's benchmark."""
    run, load = folder.run(), trial.point.load
    records = trial.records
    completed = [r for r in records if r.ok]
    duration_s = _duration_s(completed)
    input_tokens = sum(r.prompt_tokens or 0 for r in completed)
    output_tokens = sum(r.output_tokens or 0 for r in completed)

    def per_s(count: float) -> float | None:
        return count / duration_s if duration_s else None

    tokens_per_s, in_flight = _peaks(completed)
    return {
        "date": datetime.fromtimestamp(trial.summary.started_unix_s, UTC).strftime("%Y%m%d-%H%M%S"),
        "endpoint_type": "openai-chat",
        "backend": "openai-chat",
        "label": f"{run.lab['name']} {trial.point.key} {trial.repeat}",
        "model_id": run.model,
        "tokenizer_id": run.model,
        "num_prompts": len(records),
        "request_rate": getattr(load, "rate_per_s", _scheduled_per_s(records) or "inf"),
        "burstiness": getattr(load, "burstiness", 1.0),
        "max_concurrency": None if load.open_loop else load.seats,
        "duration": duration_s,
        "completed": len(completed),
        "failed": len(records) - len(completed),
        "total_input_tokens": input_tokens,
        "total_output_tokens": output_tokens,
        "request_throughput": per_s(len(completed)),
        "request_goodput": None,  # vLLM writes none either without --goodput
        "output_throughput": per_s(output_tokens),
        "total_token_throughput": per_s(input_tokens + output_tokens),
        "input_lens": [r.prompt_tokens for r in records],
        "output_lens": [r.output_tokens for r in records],
        "ttfts": [from_send(r)[0] if r.ok else None for r in records],
        "itls": [r.chunk_gaps_s for r in records],
        "latencies": [_latency_s(r) if r.ok else None for r in records],
        "start_times": [r.sent_s for r in records],
        "queue_times": [r.send_lag_s for r in records],
        "generated_texts": [r.text for r in records],
        "errors": [r.error or "" for r in records],
        "max_output_tokens_per_s": tokens_per_s,
        "max_concurrent_requests": in_flight,
        "rtfx": None,  # audio only
        **_statistics("ttft", [s for r in completed for s in from_send(r)]),
        **_statistics("tpot", [s for r in completed for s in after_first_token(r)]),
        **_statistics("itl", [s for r in completed for s in r.chunk_gaps_s]),
        **_statistics("e2el", [_latency_s(r) for r in completed]),
    }


def _latency_s(record: RequestRecord) -> float:
    return record.chunks[-1][0] - record.sent_s


def _duration_s(completed: Sequence[RequestRecord]) -> float | None:
    if not completed:
        return None
    return max(r.chunks[-1][0] for r in completed) - min(r.sent_s for r in completed)


def _statistics(name: str, samples: Sequence[float]) -> dict[str, float | None]:
    def ms(statistic: Any) -> float | None:
        return 1000 * float(statistic(samples)) if samples else None

    return {
        f"mean_{name}_ms": ms(np.mean),
        f"median_{name}_ms": ms(np.median),
        f"std_{name}_ms": ms(np.std),
        **{f"p{q}_{name}_ms": ms(lambda s, q=q: np.percentile(s, q)) for q in PERCENTILES},
    }


def _peaks(completed: Sequence[RequestRecord]) -> tuple[float | None, int | None]:
    """Count the most chunks in one second, and the most requests active in one.

    Seconds are counted from the first send.
    """
    if not completed:
        return None, None
    began = min(r.sent_s for r in completed)
    seconds = math.ceil(max(r.chunks[-1][0] for r in completed) - began) + 1
    chunks, active = np.zeros(seconds), np.zeros(seconds)
    for r in completed:
        for at, _ in r.chunks:
            chunks[int(at - began)] += 1
        active[int(r.sent_s - began) : int(r.chunks[-1][0] - began) + 1] += 1
    return float(chunks.max()), int(active.max())
