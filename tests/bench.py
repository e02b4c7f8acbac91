"""What the lab's own instruments cost: figures beside their aims, from one run on this machine.

    python -m tests.bench --help

Nothing here fails because of a time: a bench shows where the lab stands, `make test` says whether
it is right. The server of the first part records what it handed to the socket, and when.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import numpy as np
import psutil
import requests
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from labs import results
from labs.judge import effect
from loadtests import generator, plan, records
from loadtests.arrivals import Concurrent
from loadtests.prompts import Writer, counter
from loadtests.records import RequestRecord
from loadtests.workload import Request
from serving import machine as machines
from serving import metrics, models
from serving.engine import LOOPBACK, EngineError, VllmEngine, free_port
from serving.process import Process
from tests.fake import engine as truth_server

PARTS = ("streams", "engine", "neighbour", "overhead")
console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)


class BenchError(Exception):
    """A part could not be measured."""


# ------------------------------------------------------------------------------- pure statistics

Truth = Mapping[str, Any]  # one line of the truth server's log


@dataclass
class Errors:
    """What the client's record adds to the truth, in seconds; pooled over trials with `+=`."""

    ttft_s: list[float] = field(default_factory=list)  # sent to first chunk, less the server's
    read_s: list[float] = field(default_factory=list)  # each chunk: written to stamped
    gap_s: list[float] = field(default_factory=list)  # each gap: absolute difference
    server_late_s: list[float] = field(default_factory=list)  # each chunk: due to written
    lost: int = 0  # chunks or whole requests that the client does not have as they were sent

    def __iadd__(self, other: Errors) -> Errors:
        for name in ("ttft_s", "read_s", "gap_s", "server_late_s"):
            getattr(self, name).extend(getattr(other, name))
        self.lost += other.lost
        return self


def compare(client: Iterable[RequestRecord], server: Mapping[int, Truth], t0: float) -> Errors:
    """The client's records against the server's by request index; `t0` is the clients' time 0.

    Requests of the warm-up count for losses only.
    """
    found = Errors()
    for record in client:
        truth = server.get(record.index)
        sent = truth["chunks"] if truth else []
        if [k for _, k in record.chunks] != [k for _, k in sent] or not sent:
            found.lost += max(1, abs(len(sent) - len(record.chunks)))
            continue
        if not record.in_window or truth is None:
            continue
        written, read = [at for at, _ in sent], [at for at, _ in record.chunks]
        found.ttft_s.append(read[0] - record.sent_s - (written[0] - truth["received"]))
        found.read_s += [r + t0 - w for r, w in zip(read, written, strict=True)]
        found.gap_s += [
            abs((read[i] - read[i - 1]) - (written[i] - written[i - 1]))
            for i in range(1, len(sent))
        ]
        found.server_late_s += [w - due for w, due in zip(written, truth["due"], strict=True)]
    return found


def delivered(
    client: Iterable[RequestRecord], window_s: tuple[float, float], ideal_chunks_per_s: float
) -> float:
    """Chunks stamped in the window, as a share of what instant clients would have had."""
    start, end = window_s
    chunks = sum(start <= at < end for r in client for at, _ in r.chunks)
    return chunks / (end - start) / ideal_chunks_per_s


def ms(values: Sequence[float], q: float) -> float:
    """Percentile in milliseconds (linear interpolation), NaN of nothing."""
    return 1000 * float(np.percentile(values, q)) if len(values) else math.nan


@dataclass(frozen=True)
class Answered:
    """What one tool reports of one answer, on its own clock."""

    sent_s: float
    first_s: float
    last_s: float
    tokens: int


def rate(answers: Sequence[Answered]) -> float:
    """Output tokens / (last token - first send): the same for every tool."""
    span = max(a.last_s for a in answers) - min(a.sent_s for a in answers)
    return sum(a.tokens for a in answers) / span


def ttft_ms(answers: Sequence[Answered]) -> float:
    return 1000 * mean(a.first_s - a.sent_s for a in answers)


def tpot_ms(answers: Sequence[Answered]) -> float:
    return 1000 * mean((a.last_s - a.first_s) / (a.tokens - 1) for a in answers)


def overhead_share(wall_s: float, engine_start_s: float, load_s: float) -> float:
    return (wall_s - engine_start_s - load_s) / wall_s


# ---------------------------------------------------------------------- the generator, as it runs


@contextlib.contextmanager
def locust(
    users: int, work: Path, locustfile: Path = generator.LOCUSTFILE, processes: int = 1
) -> Iterator[Played]:
    """Our Locust as `labs/stage.py` starts it, with its exporter."""
    argv = generator.argv(users, free_port(), free_port(), processes)
    argv[argv.index(str(generator.LOCUSTFILE))] = str(locustfile)
    log, cores = work / f"locust-{users}.log", machines.split_cores()[1]
    with Process("locust", argv, log=log, cores=cores, talk=True) as child:
        yield Played(generator.Generator(child), child)


@dataclass(frozen=True)
class Played:
    generator: generator.Generator
    child: Process

    def cpu_s(self) -> float:
        """CPU time so far of Locust's master and load workers together."""
        family = psutil.Process(self.child.pid).children(recursive=True)
        return sum(sum(p.cpu_times()[:2]) for p in family)


def trial(
    url: str, users: int, requests_file: Path, warmup_s: float, window_s: float, records_file: Path
) -> plan.TrialPlan:
    return plan.TrialPlan(
        url=url, arrival=Concurrent(users=users), requests=requests_file, records=records_file,
        warmup_s=warmup_s, window_s=window_s, timeout_s=60, seed=0, lab="bench", variant="bench",
        run_id="bench", workload="bench",
    )  # fmt: skip


# -------------------------------------------------------------------------- 1: against the truth

TTFT_S, CHUNKS = 0.05, 50
MARK_S = 1e-7  # request i asks for TTFT_S + i * MARK_S: so the server's record tells which it was
WARMUP_S, WINDOW_S = 1.0, 6.0


@dataclass(frozen=True)
class Row:
    streams: int
    gap_s: float = 0.01
    tokens_per_chunk: int = 1
    early_role: bool = False

    @property
    def title(self) -> str:
        tokens = f" × {self.tokens_per_chunk}" if self.tokens_per_chunk > 1 else ""
        return f"{self.streams}{tokens}, {1000 * self.gap_s:g} ms"

    @property
    def ideal_chunks_per_s(self) -> float:
        return self.streams * CHUNKS / (TTFT_S + (CHUNKS - 1) * self.gap_s)


PLAIN = (Row(1), Row(16), Row(64), Row(256))
ROWS = (*PLAIN, Row(64, gap_s=0.003), Row(64, tokens_per_chunk=4, early_role=True))


@dataclass
class Cost:
    """A row's trials together."""

    errors: Errors = field(default_factory=Errors)
    delivered: list[float] = field(default_factory=list)
    chunks: int = 0
    tokens: int = 0
    worker_cpu_s: float = 0.0
    all_cpu_s: float = 0.0

    def us_per_chunk(self, cpu_s: float) -> float:
        return 1e6 * cpu_s / self.chunks if self.chunks else math.nan


def write_programmed(path: Path, row: Row, n: int) -> None:
    """Bodies that tell the truth server when to send what."""
    with path.open("w") as file:
        for i in range(n):
            truth = {"ttft_s": TTFT_S + i * MARK_S, "gap_s": row.gap_s}
            request = Request(i, [{"role": "user", "content": "Say it."}], 12, CHUNKS)
            body = plan.body(request, "fake") | {
                "max_tokens": CHUNKS * row.tokens_per_chunk,
                "truth": truth | {"tokens_per_chunk": row.tokens_per_chunk},
            }
            planned = plan.PlannedRequest(
                index=i, output_tokens=body["max_tokens"], body=json.dumps(body)
            )
            file.write(planned.model_dump_json() + "\n")


def read_truth(log: Path) -> dict[int, Truth]:
    lines = [json.loads(line) for line in log.read_bytes().splitlines()]
    return {
        round((line["due"][0] - line["received"] - TTFT_S) / MARK_S): line
        for line in lines
        if line["due"]
    }


@contextlib.contextmanager
def truth(row: Row, work: Path) -> Iterator[tuple[str, Path]]:
    """The truth server on the engine's cores: (its URL, its log, complete once it has ended)."""
    port, log = free_port(), work / "truth.jsonl"
    flags = ["--programmed", *(["--early-role-chunk"] if row.early_role else [])]
    argv = [sys.executable, truth_server.__file__, "--port", str(port), "--log", str(log), *flags]
    cores = machines.split_cores()[0]
    with Process("truth server", argv, log=work / "truth.log", cores=cores) as process:
        url = f"http://{LOOPBACK}:{port}"
        wait_for(lambda: requests.get(f"{url}/health", timeout=1).ok, process, 15)
        yield url, log


def wait_for(ready: Callable[[], bool], process: Process, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if process.returncode is not None:
            break
        with contextlib.suppress(requests.RequestException):
            if ready():
                return
        time.sleep(0.05)
    raise BenchError(f"the {process.name} does not answer; its last lines:\n{process.tail()}")


def measure_row(row: Row, load: Played, work: Path, cost: Cost) -> None:
    work.mkdir(parents=True)
    write_programmed(work / "requests.jsonl", row, row.streams * 60)
    with truth(row, work) as (url, log):
        cpu_s = load.cpu_s()
        summary = load.generator.play(
            trial(url, row.streams, work / "requests.jsonl", WARMUP_S, WINDOW_S, work / "records")
        )
        cost.all_cpu_s += load.cpu_s() - cpu_s
    # CLOCK_MONOTONIC is one clock for both processes; the summary's wall clock leads to it
    t0 = summary.started_unix_s - (time.time() - time.monotonic())
    client = list(records.read(work / "records"))
    cost.errors += compare(client, read_truth(log), t0)
    cost.delivered.append(delivered(client, summary.window_s, row.ideal_chunks_per_s))
    cost.chunks += sum(len(r.chunks) for r in client)
    cost.tokens += sum(r.output_tokens or 0 for r in client)
    cost.worker_cpu_s += summary.cpu_s


Sender = tuple[Path, int]  # a locustfile, and how many load processes run it


def streams(work: Path, repeats: int, rows: Sequence[Row], senders: Sequence[Sender]) -> None:
    """Every row once, then all again; with several senders each row goes to all in turn."""
    costs = {(row, sender): Cost() for row in rows for sender in senders}
    users = max(row.streams for row in rows)
    with contextlib.ExitStack() as exits:
        loads = {
            (file, processes): exits.enter_context(locust(users, work / str(i), file, processes))
            for i, (file, processes) in enumerate(senders)
        }
        for repeat in range(repeats):
            for row in rows:
                for i, (sender, load) in enumerate(loads.items()):
                    tell(f"streams: {row.title}, repeat {repeat + 1} of {repeats}")
                    folder = work / f"{row.title.replace(' ', '').replace(',', '-')}-{repeat}-{i}"
                    measure_row(row, load, folder, costs[row, sender])
    for sender in senders:
        if len(senders) > 1:
            file, processes = sender
            many = f"{processes} load process{'es' if processes > 1 else ''}"
            console.print(f"\n[bold]{escape(file.name)}, {many}[/]")
        show_streams({row: costs[row, sender] for row in rows})


def show_streams(costs: Mapping[Row, Cost]) -> None:
    times = table(
        "What the load generator adds, against a server that records what it sent (ms)",
        *("streams, gap", "requests", "TTFT added p50", "p99", "read late p50", "p99"),
        *("gap error p50", "p99", "server late p99"),
    )
    spent = table(
        "What it delivers, and the CPU of its load worker",
        *("streams, gap", "chunks", "lost", "delivered", "µs a chunk", "with the master"),
        *("s per 1,000 tokens",),
    )
    for row, cost in costs.items():
        e = cost.errors
        times.add_row(
            row.title,
            f"{len(e.ttft_s)}",
            *(f"{ms(v, q):.2f}" for v in (e.ttft_s, e.read_s, e.gap_s) for q in (50, 99)),
            f"{ms(e.server_late_s, 99):.2f}",
        )
        spent.add_row(
            row.title,
            f"{cost.chunks:,}",
            f"{e.lost}",
            f"{mean(cost.delivered):.1%}",
            f"{cost.us_per_chunk(cost.worker_cpu_s):.1f}",
            f"{cost.us_per_chunk(cost.all_cpu_s):.1f}",
            f"{1000 * cost.worker_cpu_s / max(1, cost.tokens):.4f}",
        )
    console.print(times)
    console.print(
        f"[dim]A stream: {CHUNKS} chunks, the first after {1000 * TTFT_S:.0f} ms; a user sends"
        " again at once. × 4: so many tokens a chunk, the role chunk early. TTFT added: the"
        " client's (first chunk - sent) less the server's (first chunk - received), so the"
        " request's way is in it. Read late: written to stamped. Server late: due to written;"
        " where it is large, other work disturbed the server, or it is past its limit.[/]"
    )
    console.print(spent)
    console.print(
        "[dim]Delivered: chunks in the window, of those an instant client and server would"
        " exchange. Waking up for one chunk costs more than reading it, so chunks that come"
        " together cost less each; a bare epoll loop took 14 to 18 µs at 64, 10 ms.[/]"
    )
    for row, most in ((Row(16), 1.0), (Row(256), 10.0)):
        if row in costs:
            p99 = ms(costs[row].errors.ttft_s, 99)
            late = ms(costs[row].errors.server_late_s, 99)
            disturbed = p99 > most and late > most
            doubt = f"the server itself ran {late:.1f} ms late" if disturbed else ""
            aim(f"TTFT added at {row.title}, p99", p99, most, "ms", doubt=doubt)
    if (row := Row(64)) in costs:
        cpu = costs[row].us_per_chunk(costs[row].worker_cpu_s)
        aim(f"CPU of the load worker at {row.title}", cpu, 10.0, "µs a chunk")
    aim("chunks lost", sum(c.errors.lost for c in costs.values()), 0)


# --------------------------------------------------------------- 2: against `vllm bench serve`

OURS, THEIRS, FREE = "our Locust", "vllm bench serve", "vllm bench serve, unpinned"
USERS, PROMPT_TOKENS, OUTPUT_TOKENS, REQUESTS = 8, 48, 48, 40
ENGINE_FLAGS: dict[str, str | int | float | bool | dict[str, object]] = {
    "max-model-len": 1024, "enable-prefix-caching": False, "enforce-eager": True,
    "kv-cache-memory-bytes": 2**30,
}  # fmt: skip
# The `vllm` command fails in the CPU build; a "custom" data set needs pandas, ShareGPT's does not.
VLLM_BENCH = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""


def ours(load: Played, url: str, requests_file: Path, work: Path) -> list[Answered]:
    window_s = 300.0  # never reached: the requests run out
    load.generator.play(trial(url, USERS, requests_file, 0, window_s, work / "records"))
    found = list(records.read(work / "records"))
    for record in found:
        if record.error or not record.chunks or record.output_tokens is None:
            raise BenchError(f"our Locust had a request fail: {record.error}")
    return [
        Answered(r.sent_s, r.chunks[0][0], r.chunks[-1][0], r.output_tokens or 0) for r in found
    ]


def theirs(
    engine: VllmEngine, model: models.Model, prompts: Path, cores: Sequence[int], work: Path
) -> list[Answered]:
    flags = {
        "backend": "openai-chat", "base-url": engine.url, "endpoint": "/v1/chat/completions",
        "model": model.path, "served-model-name": model.name, "dataset-name": "sharegpt",
        "dataset-path": prompts, "sharegpt-output-len": OUTPUT_TOKENS, "num-prompts": REQUESTS,
        "max-concurrency": USERS, "temperature": 0, "ready-check-timeout-sec": 0,
        "result-dir": work, "result-filename": "theirs.json",
    }  # fmt: skip
    bare = ("ignore-eos", "disable-shuffle", "disable-tqdm",
            "save-result", "save-detailed")  # fmt: skip
    argv = [sys.executable, "-c", VLLM_BENCH, *(f"--{flag}" for flag in bare)]
    for flag, value in flags.items():
        argv += [f"--{flag}", str(value)]
    env = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    with Process("vllm bench", argv, log=work / "vllm-bench.log", env=env, cores=cores) as process:
        deadline = time.monotonic() + 180
        while process.returncode is None and time.monotonic() < deadline:
            time.sleep(0.1)
        if process.returncode != 0:
            raise BenchError(f"vllm bench serve failed; its last lines:\n{process.tail()}")
    told = json.loads((work / "theirs.json").read_text())
    columns = zip(
        told["start_times"], told["ttfts"], told["itls"], told["output_lens"], strict=True
    )
    return [
        Answered(start, start + ttft, start + ttft + sum(itl), tokens)
        for start, ttft, itl, tokens in columns
    ]


def write_work(work: Path, model: models.Model) -> None:
    """The same requests twice: for our Locust, and for vLLM's tool."""
    work.mkdir(parents=True, exist_ok=True)
    writer, rng = Writer(counter(str(model.path))), random.Random("bench")
    texts = [writer.chat(PROMPT_TOKENS, rng)[-1]["content"] for _ in range(REQUESTS)]
    told = [{"conversations": [{"value": text}, {"value": ""}]} for text in texts]
    (work / "prompts.json").write_text(json.dumps(told))
    plan.write_requests(
        work / "requests.jsonl",
        [
            Request(i, [{"role": "user", "content": text}], PROMPT_TOKENS, OUTPUT_TOKENS)
            for i, text in enumerate(texts)
        ],
        model.name,
    )


def engine(work: Path, pairs: int, unpinned: bool, locustfiles: Sequence[Path]) -> None:
    machine = machines.detect()
    model = models.resolve(machine)
    write_work(work, model)
    tell("engine: starting vLLM")
    with contextlib.ExitStack() as exits:
        served = VllmEngine(
            "bench", model, ENGINE_FLAGS, kind=machine.kind, log=work / "engine.log"
        )
        exits.callback(served.stop)
        arms: dict[str, Callable[[Path], list[Answered]]] = {}
        for i, file in enumerate(locustfiles):
            load = exits.enter_context(locust(USERS, work / f"locust{i}", file))
            name = str(file) if i else OURS
            arms[name] = partial(ours, load, served.url, work / "requests.jsonl")
        pinned, everywhere = machines.split_cores()[1], sorted(os.sched_getaffinity(0))
        arms[THEIRS] = partial(theirs, served, model, work / "prompts.json", pinned)
        if unpinned:
            arms[FREE] = partial(theirs, served, model, work / "prompts.json", everywhere)
        served.wait()
        tell("engine: warming up")
        arms[OURS](work / "warm-up")
        found: dict[str, list[list[Answered]]] = {name: [] for name in arms}
        counted: dict[str, set[tuple[float, float]]] = {name: set() for name in arms}
        for pair in range(pairs):  # A B, B A, ...: what drifts hits both alike
            for i, name in list(enumerate(arms))[:: -1 if pair % 2 else 1]:
                tell(f"engine: {name}, {pair + 1} of {pairs}")
                before = served.snapshot()
                found[name].append(arms[name](work / f"{pair}-{i}"))
                time.sleep(0.3)  # the engine counts a request a moment after its last chunk
                if before and (after := served.snapshot()):
                    delta = after.since(before).values
                    counted[name].add(
                        (delta[metrics.PROMPT_TOKENS], delta[metrics.GENERATION_TOKENS])
                    )
    show_engine(found, counted)


def show_engine(
    found: Mapping[str, Sequence[Sequence[Answered]]],
    counted: Mapping[str, set[tuple[float, float]]],
) -> None:
    shown = table(
        f"The same {REQUESTS} requests on the same engine, {USERS} at a time",
        *("client", "output tok/s, each run", "mean", "TTFT mean (ms)", "TPOT mean (ms)"),
        *("engine's tokens, in + out",),
    )
    for name, runs in found.items():
        rates = [rate(run) for run in runs]
        shown.add_row(
            name,
            " ".join(f"{r:.0f}" for r in rates),
            f"{mean(rates):.1f}",
            f"{mean(ttft_ms(run) for run in runs):.1f}",
            f"{mean(tpot_ms(run) for run in runs):.2f}",
            ", ".join(f"{p:.0f} + {g:.0f}" for p, g in sorted(counted[name])),
        )
    console.print(shown)
    console.print(
        "[dim]Output tokens / (last token - first send), computed alike for both from each tool's"
        " own stamps. vllm bench's TTFT is to its first event, which may be the role chunk.[/]"
    )
    rates_of = {name: dict(enumerate(map(rate, runs))) for name, runs in found.items()}
    for name in (name for name in found if name not in (THEIRS, FREE)):
        ratio = effect(rates_of[name], rates_of[THEIRS])
        assert ratio
        value, low, high = ratio.ratio.value, ratio.ratio.low, ratio.ratio.high
        interval = f" (95 % interval {low:.3f} to {high:.3f})" if low and high else ""
        wide = low is not None and low < 0.97 < value
        doubt = "the interval reaches below: more --pairs" if wide else ""
        what = f"throughput under {name} / {THEIRS}{interval}"
        aim(what, value, 0.97, at_least=True, doubt=doubt)
    for what, of in (("TTFT", ttft_ms), ("TPOT", tpot_ms)):
        both = [dict(enumerate(map(of, found[name]))) for name in (OURS, THEIRS)]
        if (ratio := effect(*both)) and ratio.ratio.low and ratio.ratio.high:
            low, high = ratio.ratio.low, ratio.ratio.high
            agree = "they agree" if low <= 1 <= high else "they differ"
            console.print(
                f"Mean {what}, {OURS} / {THEIRS}: {ratio.ratio.value:.3f} (95 % interval"
                f" {low:.3f} to {high:.3f}): {agree}"
            )
    if len(set().union(*counted.values())) > 1:
        console.print("[red]The tools did not send the same work: see the engine's counts.[/]")


# -------------------------------------------------------------- 3: an idle engine beside the loaded


def neighbour(work: Path, pairs: int) -> None:
    """One engine under load, in turn beside an idle one and beside the same one held still."""
    machine = machines.detect()
    model = models.resolve(machine)
    write_work(work, model)
    with contextlib.ExitStack() as exits:
        engines = []
        for name in ("loaded", "idle"):
            started = VllmEngine(
                name, model, ENGINE_FLAGS, kind=machine.kind, log=work / f"{name}.log"
            )
            exits.callback(started.stop)
            engines.append(started)
        load = exits.enter_context(locust(USERS, work / "locust"))
        tell("neighbour: starting two engines")
        for started in engines:
            started.wait()
        family = psutil.Process(engines[1].pid).children(recursive=True)
        for process in family:
            exits.callback(process.resume)  # what is held still cannot end
        play = partial(ours, load, engines[0].url, work / "requests.jsonl")
        tell("neighbour: warming up")
        play(work / "warm-up")
        rates: dict[str, dict[int, float]] = {"idle": {}, "held": {}}
        for pair in range(pairs):
            for arm in list(rates)[:: -1 if pair % 2 else 1]:
                tell(f"neighbour: {arm}, {pair + 1} of {pairs}")
                for process in family:
                    process.suspend() if arm == "held" else process.resume()
                rates[arm][pair] = rate(play(work / f"{pair}-{arm}"))
    found = effect(rates["idle"], rates["held"])
    assert found
    low, high = found.ratio.low, found.ratio.high
    interval = f" (95 % interval {low:.3f} to {high:.3f})" if low and high else ""
    doubt = "the interval reaches below: more --pairs" if low and low < 0.97 else ""
    what = f"throughput beside an idle engine / beside one held still{interval}"
    aim(what, found.ratio.value, 0.97, at_least=True, doubt=doubt)


# ------------------------------------------------------------------------------- 4: the lab's own


def overhead() -> None:
    for folder in reversed(results.all_runs()):
        session = folder.session()
        if folder.complete and session and not folder.run().quick:
            break
    else:
        console.print("Lab overhead: no complete run on file (a full one, not QUICK=1).")
        return
    share = overhead_share(session.wall_s, session.engine_start_s, session.load_s)
    shown = table(
        f"Where a run's time goes: {folder.path.parent.name}, {folder.path.name}",
        *("whole", "engine start", "load", "the lab itself", "share"),
    )
    own_s = session.wall_s - session.engine_start_s - session.load_s
    times = (session.wall_s, session.engine_start_s, session.load_s, own_s)
    shown.add_row(*(f"{t:.1f} s" for t in times), f"{share:.1%}")
    console.print(shown)
    aim("the lab's own share of a run", 100 * share, 10.0, "%")


# --------------------------------------------------------------------------------- command line


def table(title: str, *columns: str) -> Table:
    made = Table(title=title, title_justify="left", title_style="bold")
    for i, name in enumerate(columns):
        made.add_column(name, justify="right" if i else "left")
    return made


def aim(
    what: str, value: float, bound: float, unit: str = "", at_least: bool = False, doubt: str = ""
) -> None:
    """Say whether an aim is met; `doubt` is why that may be other than it looks."""
    met = value >= bound if at_least else value <= bound
    colour, word = ("green", "met") if met else ("yellow", "not met")
    sign = "at least" if at_least else "at most"
    unit = f" {unit}" if unit else ""
    verdict = f"[{colour}]{word}[/]" + (f", in doubt: {doubt}" if doubt else "")
    console.print(f"Aim: {escape(what)} {sign} {bound:g}{unit}; it is {value:.3g}{unit}: {verdict}")


def tell(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
    else:
        print(text, file=sys.stderr, flush=True)


def main(
    part: Annotated[
        list[str], typer.Option(help=f"Only this part, again for another: {', '.join(PARTS)}.")
    ] = list(PARTS),  # noqa: B006
    repeats: Annotated[
        int, typer.Option(min=1, help="streams: how often each row is measured, interleaved.")
    ] = 2,
    stream_counts: Annotated[
        str, typer.Option("--streams", help="streams: only these rows, as in '16,256'.")
    ] = "",
    against: Annotated[
        list[Path],
        typer.Option(
            exists=True,
            help="Also measure this changed copy of loadtests/locustfile.py, in turn with it.",
        ),
    ] = [],  # noqa: B006
    processes: Annotated[
        list[int],
        typer.Option(min=1, help="streams: also by so many load processes, in turn."),
    ] = [1],  # noqa: B006
    pairs: Annotated[
        int, typer.Option(min=1, help="engine, neighbour: runs of each side, in turn.")
    ] = 4,
    unpinned: Annotated[
        bool,
        typer.Option(help="engine: also run vLLM's tool free to use the engine's cores."),
    ] = False,
    keep: Annotated[
        Path | None, typer.Option(help="Keep records, truth and logs in this new folder.")
    ] = None,
) -> None:
    """Measure the lab's own instruments and print each figure beside its aim.

    [bold]streams[/] (2 min): what our Locust adds to TTFT and to chunk gaps,
    and the CPU it costs, against a server that records what it really sent.

    [bold]engine[/] (3 min): vLLM's throughput under our Locust and under
    `vllm bench serve`: the same requests, in turns on one engine.

    [bold]neighbour[/] (3 min): an engine's throughput beside another that is
    loaded and idle, as variants of a lab are, and beside one held still.

    [bold]overhead[/] (at once): the lab's own share of the newest full run
    in results/.

    The figures are this machine's, now: close what else runs on it. The exit
    code is 0 unless something broke, whatever the figures.
    """
    if unknown := set(part) - set(PARTS):
        raise typer.BadParameter(f"{', '.join(sorted(unknown))}: choose from {', '.join(PARTS)}")
    wanted = {int(n) for n in stream_counts.split(",") if n}
    rows = [row for row in ROWS if not wanted or row.streams in wanted]
    if not rows:
        known = ", ".join(sorted({str(r.streams) for r in ROWS}, key=int))
        raise typer.BadParameter(f"no such row: choose from {known}", param_hint="--streams")
    engine_cores, client_cores = machines.split_cores()
    console.print(
        f"{machines.detect().describe()}; server on CPU {_cores(engine_cores)}, clients on CPU"
        f" {_cores(client_cores)}"
    )
    if (load := os.getloadavg()[0]) > 0.5:
        console.print(
            f"[yellow]Other work is running (load average {load:.1f}): it is in these figures.[/]"
        )
    with contextlib.ExitStack() as exits:
        if keep:
            keep.mkdir(parents=True)
        work = keep or Path(exits.enter_context(tempfile.TemporaryDirectory(prefix="lab-bench-")))
        try:
            if "streams" in part:
                files = [generator.LOCUSTFILE, *against]
                senders = [(file, n) for file in files for n in processes]
                streams(work / "streams", repeats, rows, senders)
            if "engine" in part:
                engine(work / "engine", pairs, unpinned, [generator.LOCUSTFILE, *against])
            if "neighbour" in part:
                neighbour(work / "neighbour", pairs)
            if "overhead" in part:
                overhead()
        except (BenchError, EngineError, generator.GeneratorError, models.ModelError) as error:
            console.print(f"[red]{escape(str(error))}[/]")
            raise typer.Exit(1) from None


def _cores(cores: Sequence[int]) -> str:
    return ",".join(map(str, cores))


if __name__ == "__main__":
    app = typer.Typer(rich_markup_mode="rich", pretty_exceptions_enable=False, add_completion=False)
    app.command()(main)
    app()
