"""Hand-made shapes, records, trials, labs and runs, small enough to compute with by hand."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from labs.harness.analysis.computed import Predictions
from labs.harness.analysis.measure import Trial
from labs.harness.comparison import reproduction
from labs.harness.derived.summarize import summarise
from labs.harness.spec.lab import (
    SLO,
    Arm,
    Claim,
    Evidence,
    Lab,
    Point,
    Prediction,
    RequestLengths,
    Variant,
)
from labs.harness.spec.overrides import parse_changes
from labs.harness.storage.recorded import Run, TrialResult, snapshot_json
from labs.harness.storage.results import RunFolder
from labs.harness.storage.writing import write_json
from loadtests import records
from loadtests.arrivals import AnyArrival, Arrival
from loadtests.plan import TrialSummary
from loadtests.prompts import Messages
from loadtests.records import Chunks, RequestRecord
from loadtests.workload import Fixed, Workload
from serving import metrics
from serving.hardware.machine import Ceilings, Environment, Machine
from serving.hardware.telemetry import Sample
from serving.metrics import PREFIX_HITS, Histogram, Snapshot
from serving.models.catalog import Shape

SHAPE = Shape(
    layers=2, hidden=8, heads=2, kv_heads=1, head_dim=4, vocab=16, max_positions=4096,
    params=1000, matmul_params=1000, weight_bytes=2000,
)  # fmt: skip
CEILINGS = Ceilings(
    memory_bandwidth_bytes_per_s=1e6, bf16_flops_per_s=1e7, threads=1, torch="-", measured_at="-"
)
MACHINE = Machine(kind="cpu", model="Abacus", count=2, memory_bytes=2**30)
PREDICTION = Prediction(value=2.0, formula="by hand")
DAY = "20260101"
_ARRIVAL: TypeAdapter[AnyArrival] = TypeAdapter(Arrival)


def parse(text: str) -> AnyArrival:
    """Read an arrival's text form, as a lab reads it."""
    return _ARRIVAL.validate_python(text)


def words(messages: Messages) -> int:
    """Tokens of messages by a tokenizer of words, under a template that adds none."""
    return sum(len(m["content"].split()) for m in messages)


def make_record(
    chunks: list[tuple[float, int]], *, sent_s: float = 10.0, **fields: Any
) -> RequestRecord:
    """A request under closed loop; it failed if there are no chunks."""
    tokens = sum(k for _, k in chunks)
    plain: dict[str, Any] = {
        "index": 0,
        "asked_tokens": tokens,
        "scheduled_s": None,
        "sent_s": sent_s,
        "chunks": chunks,
        "end_s": chunks[-1][0] if chunks else None,
        "prompt_tokens": 4 if chunks else None,
        "output_tokens": tokens if chunks else None,
        "in_window": True,
        "error": None if chunks else "ConnectionError: refused",
    }
    return RequestRecord.of({**plain, **fields})


def make_engine(found: Sequence[RequestRecord], caching: bool = False, hits: float = 0) -> Snapshot:
    """What an engine shows that served these requests and nothing else, a millisecond faster."""
    served = [r for r in found if r.ok]
    ttfts_s = [r.chunks[0][0] - r.sent_s - 0.001 for r in served]
    bounds = (0.05, 0.1, 0.2, 0.4, 1.0, 2.0, float("inf"))
    counts = tuple(float(sum(ttft_s <= le for ttft_s in ttfts_s)) for le in bounds)
    counted = {
        metrics.REQUESTS: float(len(served)),
        metrics.PROMPT_TOKENS: float(sum(r.prompt_tokens or 0 for r in served)),
        metrics.GENERATION_TOKENS: float(sum(r.output_tokens or 0 for r in served)),
        metrics.PREEMPTIONS: 0.0,
        PREFIX_HITS: hits,
        metrics.PREFIX_QUERIES: float(sum(r.prompt_tokens or 0 for r in served)),
    }
    return Snapshot(
        counted,
        {metrics.TTFT: Histogram(bounds, counts, sum(ttfts_s), len(served))},
        {
            metrics.CACHE_CONFIG: {
                "block_size": "2",
                "num_gpu_blocks": "1000",
                "enable_prefix_caching": str(caching),
            }
        },
    )


def make_summary(**fields: Any) -> TrialSummary:
    plain: dict[str, Any] = {
        "started_unix_s": 0.0,
        "window_s": (10.0, 20.0),
        "planned": None,
        "sent": 1,
        "exhausted": False,
        "loop_lag_p99_s": 0.001,
        "loop_lag_max_s": 0.002,
        "cpu_s": 0.1,
    }
    return TrialSummary(**{**plain, **fields})


def make_workload(*loads: str, **fields: Any) -> Workload:
    """Prompts of 6 tokens and answers of 4, so that the mean context is 8."""
    plain: dict[str, Any] = {
        "name": "short",
        "prompt_tokens": Fixed(tokens=6),
        "output_tokens": Fixed(tokens=4),
        "loads": loads or ("concurrent:1",),
    }
    return Workload(**{**plain, **fields})


def make_point(
    variant: str = "off",
    load: str = "concurrent:1",
    shape: Shape = SHAPE,
    flags: Mapping[str, Any] | None = None,
    **fields: Any,
) -> Point:
    """`fields` are of its workload."""
    workload = make_workload(load, **fields)
    lengths = RequestLengths(workload.lengths(8, seed=0))
    varied = Variant(name=variant, flags=dict(flags or {}))
    return Point(varied, workload, parse(load), lengths, shape, CEILINGS)


def make_trial(
    found: list[RequestRecord],
    *,
    engine: Snapshot | None = None,
    point: Point | None = None,
    telemetry: Sequence[Sample] = (),
    **summary: Any,
) -> Trial:
    slo = SLO(ttft_s=0.2005, tpot_s=0.15)
    ended = make_summary(**summary)
    return Trial(point or make_point(), 1, slo, found, ended, engine, list(telemetry))


def twice(treatment: Point, baseline: Point) -> Prediction:
    return PREDICTION


def make_claim(**fields: Any) -> Claim:
    plain: dict[str, Any] = {
        "name": "faster",
        "title": "On is faster",
        "metric": "output_tokens_per_s",
        "treatment": Arm(variant="on"),
        "baseline": Arm(variant="off"),
        "expect": "rises",
        "predict": twice,
    }
    return Claim(**{**plain, **fields})


def make_lab(**fields: Any) -> Lab:
    off = Variant(name="off", flags={"enable-prefix-caching": False})
    plain: dict[str, Any] = {
        "name": "tiny",
        "title": "Tiny",
        "question": "Is on faster?",
        "answers": ("SO-4",),
        "variants": (off, off.but("on", {"enable-prefix-caching": True})),
        "flags": {"max-model-len": 128},
        "workloads": (make_workload("concurrent:1", "concurrent:2"),),
        "claims": (make_claim(),),
        "evidence": (Evidence(arm=Arm(variant="on"), kind="rises", metric=PREFIX_HITS),),
        "slo": SLO(ttft_s=1, tpot_s=0.1),
        "requests": 8,
        "warmup_s": 1,
        "window_s": 4,
        "repeats": 2,
        "most_repeats": 0,
    }
    return Lab(**{**plain, **fields})


def changes_next(lab: Lab) -> Iterator[tuple[str, dict[str, Any]]]:
    """What the lab says may be turned next, each with the changes that it names."""
    for knob in lab.next_knobs:
        setting = re.match(r"""SET=(?:(["'])(.+?)\1|(\S+)) """, knob)
        assert setting, knob
        yield knob, parse_changes(setting[2] or setting[3])


def write_run(results: Path, day: str = DAY, **fields: Any) -> RunFolder:
    """A complete run on disk in which `on` is three times as fast as `off`; fields of its lab.

    The plain one is computed once a process, before any test, and copied.
    """
    if fields:
        return _written(results, day, **fields)
    plain = plain_run()
    if day != DAY:
        return _changed(plain, day, results)
    folder = results.joinpath(*plain.path.parts[-3:])
    return RunFolder(shutil.copytree(plain.path, folder, dirs_exist_ok=True))


@functools.cache
def plain_run() -> RunFolder:
    """The run that `write_run` copies, to be read alone."""
    return _written(Path(os.environ["LABS_SCRATCH"]) / "plain", DAY)


@functools.cache
def plain_manifest() -> Run:
    """What `plain_run` says of itself."""
    return plain_run().run()


def _written(results: Path, day: str, **fields: Any) -> RunFolder:
    lab = make_lab(**fields).at("cpu", quick=False)
    run = Run(
        run_id=f"{day}T000000Z-{lab.digest()}",
        lab=lab.resolved(),
        digest=lab.digest(),
        scale="cpu",
        quick=False,
        changes={},
        endpoint=None,
        model="abacus-1",
        model_shape=vars(SHAPE),
        machine=MACHINE,
        ceilings=CEILINGS,
        environment=Environment(python="3", packages={}, kernel="6"),
        argv={v.name: [] for v in lab.variants},
        prompts_sha256="0" * 64,
        started_at="2026-01-01T00:00:00+00:00",
    )
    folder = RunFolder(results / MACHINE.slug / lab.name / run.run_id)
    write_json(folder.path / "run.json", run)
    points = run.points()
    pairs = lab.pairs(lab.claims[0], points)
    write_json(
        folder.path / "predictions.json",
        Predictions(effects={"faster": {f"{t.key}|{b.key}": twice(t, b) for t, b in pairs}},
                    forecasts={}),
    )  # fmt: skip
    for point in points:
        for repeat in range(1, lab.repeats_of(point) + 1):
            on = point.variant.name == "on"
            tokens = (300 if on else 100) + repeat
            found = [
                make_record([(11.0, 1), (12.0, k - 1)], index=i, prompt_tokens=6)
                for i, k in enumerate((20, 20, 20, 20, tokens - 80))
            ]
            home = folder.trial_folder(point, repeat)
            records.write(home / "requests.jsonl.gz", found)
            engine = snapshot_json(make_engine(found, on, hits=8.0 if on else 0.0))
            result = TrialResult(
                point=point.key, repeat=repeat, summary=make_summary(), engine=engine
            )
            write_json(home / "trial.json", result)
    summarise(folder)
    (folder.path / "COMPLETE").write_text("2026-01-01\n")
    return folder


def write_slowed(folder: RunFolder, factor: float, variant: str = "") -> RunFolder:
    """A copy of the run, a day later, in which everything (of a variant) took `factor` longer.

    That of a plain run is computed once a process, and copied.
    """
    later = _day_later(folder)
    if _files(folder) == _files(plain_run()):
        shutil.copytree(_plain_slowed(factor, variant).path, later.path)
        return later
    return _slowed(folder, later, factor, variant)


def _day_later(folder: RunFolder) -> RunFolder:
    return RunFolder(folder.path.with_name(folder.path.name.replace("20260101", "20260102")))


def _files(folder: RunFolder) -> dict[Path, bytes]:
    """What a run has on disk, by the path within its folder."""
    paths = (path for path in folder.path.rglob("*") if path.is_file())
    return {path.relative_to(folder.path): path.read_bytes() for path in paths}


@functools.cache
def _plain_slowed(factor: float, variant: str) -> RunFolder:
    """What `write_slowed` makes of the plain run, to be copied."""
    home = Path(os.environ["LABS_SCRATCH"]) / f"plain-{factor:g}-{variant}"
    return _slowed(plain_run(), _day_later(write_run(home)), factor, variant)


def _slowed(folder: RunFolder, later: RunFolder, factor: float, variant: str) -> RunFolder:
    shutil.copytree(folder.path, later.path)
    run = later.run().model_copy(update={"run_id": later.path.name})
    write_json(later.path / "run.json", run)
    for point in run.points():
        for repeat in range(1, run.rebuilt_lab().repeats_of(point) + 1):
            if variant not in ("", point.variant.name):
                continue
            home = later.trial_folder(point, repeat)
            slow = [
                dataclasses.replace(
                    r,
                    sent_s=factor * r.sent_s,
                    chunks=Chunks((factor * at, k) for at, k in r.chunks),
                    end_s=None if r.end_s is None else factor * r.end_s,
                )
                for r in records.read(home / "requests.jsonl.gz")
            ]
            records.write(home / "requests.jsonl.gz", slow)
            result = later.trial_result(point, repeat)
            assert result
            assert result.summary
            start, end = result.summary.window_s
            window = {"window_s": (factor * start, factor * end)}
            summary = result.summary.model_copy(update=window)
            on = point.variant.name == "on"
            engine = snapshot_json(make_engine(slow, on, hits=8.0 if on else 0.0))
            changed = {"summary": summary, "engine": engine}
            write_json(home / "trial.json", result.model_copy(update=changed))
    summarise(later)
    return later


def write_runs_of_others(published: RunFolder) -> list[RunFolder]:
    """What readers leave beside a published run, newer than it; nothing of it is in a table.

    An ordinary run, a repetition that is filed with the published one, a quick run, another
    machine's with a damaged bench of its instruments, one with a trace, an unfinished and a damaged
    run.
    """
    ordinary = write_slowed(published, 2)
    repetition = _changed(ordinary, "20260103", reproduces=published.path.name)
    reproduction.file_with_original(
        reproduction.compare_with_original(published, repetition), published
    )
    quick = _changed(ordinary, "20260104", quick=True)
    elsewhere = _changed(ordinary, "20260105", machine=MACHINE.model_copy(update={"count": 64}))
    (elsewhere.path.parents[1] / "bench.json").write_text("{")
    trace = ((0.0, 6, 4), (0.5, 6, 4))
    traced = write_run(
        published.path.parents[2],
        "20260106",
        workloads=(make_workload("replay:1", trace=trace),),
    )
    changes = {"workloads.short.trace": "trace.csv", "workloads.short.loads": ["replay:1"]}
    write_json(traced.path / "run.json", traced.run().model_copy(update={"changes": changes}))
    unfinished = _changed(ordinary, "20260107")
    for name in ("COMPLETE", "summary.json"):
        (unfinished.path / name).unlink()
    shutil.rmtree(unfinished.path / "trials" / "on")
    damaged = _changed(ordinary, "20260108")
    (damaged.path / "run.json").write_text('{"run_id": "20260108')
    return [ordinary, repetition, quick, elsewhere, traced, unfinished, damaged]


def _changed(folder: RunFolder, day: str, results: Path | None = None, **fields: Any) -> RunFolder:
    """A copy of another day, with other fields of its manifest, under its machine's name."""
    home = results or folder.path.parents[2]
    run_id = day + folder.path.name[len(day) :]
    run = folder.run().model_copy(update={"run_id": run_id, **fields})
    copied = RunFolder(home / run.machine.slug / run.lab["name"] / run_id)
    shutil.copytree(folder.path, copied.path)
    write_json(copied.path / "run.json", run)
    return copied


def write_tiny_llama(folder: Path, layers: int, **more: Any) -> Path:
    """A random Llama, with a tokenizer of single bytes; skips the test where there is no torch."""
    torch = pytest.importorskip("torch")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.set_num_threads(1)  # several spin while they wait: on a busy machine that takes minutes
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    torch.manual_seed(0)
    shape = {
        "vocab_size": 256, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": layers,
        "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True, **more,
    }  # fmt: skip
    LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
