"""What the lab's own instruments cost: figures beside their aims, from one run on this machine.

    python -m tests.bench --help

Nothing here fails because of a time: a bench shows where the lab stands, `make test` says whether
it is right. The server of the first part records what it handed to the socket, and when. What a
part found goes to `results/<machine>/bench.json` as soon as it is there; README.md shows it.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Annotated, Any

import numpy as np
import psutil
import requests
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from scipy import stats

from labs.commands.terminal import minutes
from labs.filing import results
from labs.judging.judge import CONFIDENCE, Effect, Interval, Judgement, effect, mean_interval
from labs.running.machine_load import Others
from labs.telling import instruments
from loadtests import generator, plan, records
from loadtests.arrivals import Concurrent
from loadtests.prompts import Writer, counter
from loadtests.records import RequestRecord
from loadtests.workload import Request
from serving import machine as machines
from serving import metrics, models
from serving.engine import LOOPBACK, EngineError, VllmEngine, free_port
from serving.process import Process
from tests.fake import conftest as fake
from tests.fake import engine as truth_server

MAIN = ("streams", "engine", "neighbour", "recording", "overhead")
PARTS = (*MAIN, "aa")
REPEATS, PROCESSES, PAIRS, RUNS = 2, (1, 2), 4, 20
TRIAL_S = 9.0  # a truth server's start, warm-up, window and drain
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


def percentile_s(values: Sequence[float], q: float) -> float | None:
    """By linear interpolation; None of nothing."""
    return float(np.percentile(values, q)) if len(values) else None


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


def alarms_of(runs: Sequence[Sequence[Judgement]], lab: str) -> instruments.Alarms:
    """Of runs of a lab against itself: any claim with a direction is a false alarm."""
    every = [j for run in runs for j in run]
    judged = [j for j in every if j.outcome != "not valid"]
    alarms = sum(j.outcome in ("helps", "hurts") for j in judged)
    exact = stats.binomtest(alarms, len(judged)).proportion_ci(CONFIDENCE, method="exact")
    spreads = [j.effect.spread for j in judged if j.effect and j.effect.spread is not None]
    return instruments.Alarms(
        lab=lab,
        runs=len(runs),
        alarms=alarms,
        judged=len(judged),
        not_judged=len(every) - len(judged),
        low=exact.low,
        high=exact.high,
        spread=median(spreads),
    )


# ------------------------------------------------------------------------------------ time to come


class Clock:
    """Tells what is being measured, and about how long all that was asked for will still take."""

    def __init__(self, expected_s: Mapping[str, float]) -> None:
        self._left_s = dict(expected_s)  # of the parts that have not ended
        self._part, self._began = "", time.monotonic()

    @contextlib.contextmanager
    def during(self, part: str) -> Iterator[None]:
        self._part, self._began = part, time.monotonic()
        try:
            yield
        finally:
            del self._left_s[part]

    def tell(self, text: str, done: float) -> None:
        """`done` is the share of the part that is over."""
        left = minutes(self.left_s(done, time.monotonic() - self._began))
        line = f"{self._part}: {text} (about {left} left)"
        if sys.stderr.isatty():
            print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)

    def left_s(self, done: float, spent_s: float) -> float:
        """At the pace so far once a fifth of the part is over, as expected until then."""
        later_s = sum(s for part, s in self._left_s.items() if part != self._part)
        expected_s = max(0.0, self._left_s[self._part] - spent_s)
        return later_s + (spent_s * (1 - done) / done if done >= 0.2 else expected_s)


# ---------------------------------------------------------------------- the generator, as it runs


@contextlib.contextmanager
def locust(
    users: int, work: Path, locustfile: Path = generator.LOCUSTFILE, processes: int = 1
) -> Iterator[Played]:
    """Our Locust as `labs/running/stage.py` starts it, with its exporter."""
    argv = generator.argv(users, exporter_port := free_port(), free_port(), processes)
    argv[argv.index(str(generator.LOCUSTFILE))] = str(locustfile)
    log, cores = work / f"locust-{users}.log", machines.split_cores()[1]
    with Process("locust", argv, log=log, cores=cores, talk=True) as child:
        yield Played(generator.Generator(child), child, exporter_port)


@dataclass(frozen=True)
class Played:
    generator: generator.Generator
    child: Process
    exporter_port: int

    def cpu_s(self) -> tuple[float, float]:
        """CPU time so far of Locust's master, which records, and of it and its load workers."""
        (master,) = psutil.Process(self.child.pid).children()
        family = (master, *master.children(recursive=True))
        used = [sum(p.cpu_times()[:2]) for p in family]
        return used[0], sum(used)


def trial(
    url: str, users: int, requests_file: Path, warmup_s: float, window_s: float, records_file: Path
) -> plan.TrialPlan:
    return plan.TrialPlan(
        url=url, arrival=Concurrent(users=users), requests=requests_file, records=records_file,
        warmup_s=warmup_s, window_s=window_s, timeout_s=60, seed=0, lab="bench", variant="bench",
        run_id="bench", workload="bench",
    )  # fmt: skip


# -------------------------------------------------------------------------- 1: against the truth

TTFT_S, CHUNKS, STALL_S = 0.05, 50, 0.3
MARK_S = 1e-7  # request i asks for TTFT_S + i * MARK_S: so the server's record tells which it was
WARMUP_S, WINDOW_S = 1.0, 6.0


@dataclass(frozen=True)
class Row:
    streams: int
    gap_s: float = 0.01
    tokens_per_chunk: int = 1
    early_role: bool = False
    sse_comments: bool = False
    stall_s: float = 0.0

    @property
    def shape(self) -> str:
        odd = {
            "role chunk early": self.early_role,
            "SSE comments": self.sse_comments,
            f"a stall of {self.stall_s:g} s": self.stall_s,
        }
        return ", ".join(name for name, there in odd.items() if there)

    @property
    def title(self) -> str:
        tokens = f" × {self.tokens_per_chunk}" if self.tokens_per_chunk > 1 else ""
        shape = f", {self.shape}" if self.shape else ""
        return f"{self.streams}{tokens}, {1000 * self.gap_s:g} ms{shape}"

    @property
    def request_s(self) -> float:
        return TTFT_S + (CHUNKS - 1) * self.gap_s + self.stall_s

    @property
    def ideal_chunks_per_s(self) -> float:
        return self.streams * CHUNKS / self.request_s


PLAIN = (Row(1), Row(16), Row(64), Row(256))
ROWS = (
    *PLAIN,
    Row(64, gap_s=0.003),
    Row(64, tokens_per_chunk=4, early_role=True),
    Row(64, sse_comments=True),
    Row(64, stall_s=STALL_S),
)
SHARED = PLAIN[1:]  # what several load processes send too


@dataclass
class Cost:
    """A row's trials together."""

    errors: Errors = field(default_factory=Errors)
    delivered: list[float] = field(default_factory=list)
    chunks: int = 0
    tokens: int = 0
    worker_cpu_s: float = 0.0
    master_cpu_s: float = 0.0
    all_cpu_s: float = 0.0

    def sent(self, row: Row, processes: int) -> instruments.Sent:
        errors, share = self.errors, mean(self.delivered)
        return instruments.Sent(
            load_processes=processes,
            streams=row.streams,
            gap_s=row.gap_s,
            tokens_per_chunk=row.tokens_per_chunk,
            shape=row.shape,
            chunks_per_s=share * row.ideal_chunks_per_s,
            delivered=share,
            lost=errors.lost,
            ttft_added_p50_s=percentile_s(errors.ttft_s, 50),
            ttft_added_p99_s=percentile_s(errors.ttft_s, 99),
            read_late_p50_s=percentile_s(errors.read_s, 50),
            read_late_p99_s=percentile_s(errors.read_s, 99),
            gap_error_p50_s=percentile_s(errors.gap_s, 50),
            gap_error_p99_s=percentile_s(errors.gap_s, 99),
            server_late_p99_s=percentile_s(errors.server_late_s, 99),
            cpu_s_per_chunk=self.worker_cpu_s / self.chunks if self.chunks else None,
            all_cpu_s_per_chunk=self.all_cpu_s / self.chunks if self.chunks else None,
        )


def write_programmed(path: Path, row: Row) -> None:
    """Bodies that tell the truth server when to send what; half as many again as can be sent."""
    each = math.ceil(1.5 * (WARMUP_S + WINDOW_S) / row.request_s)
    with path.open("w") as file:
        for i in range(row.streams * each):
            truth = {"ttft_s": TTFT_S + i * MARK_S, "gap_s": row.gap_s, "stall_s": row.stall_s}
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
    flags += ["--sse-comments"] if row.sse_comments else []
    argv = [sys.executable, "-m", truth_server.__name__, "--port", str(port)]
    argv += ["--log", str(log), *flags]
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
    write_programmed(work / "requests.jsonl", row)
    with truth(row, work) as (url, log):
        before_s = load.cpu_s()
        summary = load.generator.play(
            trial(url, row.streams, work / "requests.jsonl", WARMUP_S, WINDOW_S, work / "records")
        )
        master_s, all_s = (b - a for a, b in zip(before_s, load.cpu_s(), strict=True))
    cost.master_cpu_s += master_s
    cost.all_cpu_s += all_s
    # CLOCK_MONOTONIC is one clock for both processes; the summary's wall clock leads to it
    t0 = summary.started_unix_s - (time.time() - time.monotonic())
    client = list(records.read(work / "records"))
    cost.errors += compare(client, read_truth(log), t0)
    cost.delivered.append(delivered(client, summary.window_s, row.ideal_chunks_per_s))
    cost.chunks += sum(len(r.chunks) for r in client)
    cost.tokens += sum(r.output_tokens or 0 for r in client)
    cost.worker_cpu_s += summary.cpu_s


Sender = tuple[Path, int]  # a locustfile, and how many load processes run it


def streams(
    clock: Clock, work: Path, repeats: int, rows: Sequence[Row], senders: Sequence[Sender]
) -> instruments.Streams:
    """Every row once, then all again; with several senders each row goes to all in turn.

    Returns what our own Locust did.
    """
    cases = cases_of(rows, senders)
    costs = {case: Cost() for case in cases}
    users = max(row.streams for row in rows)
    with contextlib.ExitStack() as exits:
        clock.tell("starting Locust", 0)
        loads = {
            (file, processes): exits.enter_context(locust(users, work / str(i), file, processes))
            for i, (file, processes) in enumerate(senders)
        }
        for repeat in range(repeats):
            for i, (row, sender) in enumerate(cases):
                done = (repeat + i / len(cases)) / repeats
                clock.tell(f"{row.title}, {many(sender[1])}, {repeat + 1} of {repeats}", done)
                folder = work / f"{repeat}-{i}"
                measure_row(row, loads[sender], folder, costs[row, sender])
    for file in dict.fromkeys(file for file, _ in senders):
        if len(senders) > 1:
            console.print(f"\n[bold]{escape(file.name)}[/]")
        found = {c: cost for c, cost in costs.items() if c[1][0] == file}
        show_streams([cost.sent(row, sender[1]) for (row, sender), cost in found.items()])
    ours = [(c, cost) for c, cost in costs.items() if c[1][0] == generator.LOCUSTFILE]
    return instruments.Streams(rows=[cost.sent(row, n) for (row, (_, n)), cost in ours])


def cases_of(rows: Sequence[Row], senders: Sequence[Sender]) -> list[tuple[Row, Sender]]:
    """What is measured, in turn: the odd shapes by one load process alone."""
    return [(row, s) for row in rows for s in senders if s[1] == 1 or row in SHARED]


def many(processes: int) -> str:
    return f"{processes} load process{'es' if processes > 1 else ''}"


def show_streams(found: Sequence[instruments.Sent]) -> None:
    times = table(
        "What the load generator adds, against a server that records what it sent (ms)",
        *("streams, gap", "load processes", "TTFT added p50", "p99", "read late p50", "p99"),
        *("gap error p50", "p99", "server late p99"),
    )
    spent = table(
        "What it delivers, and the CPU of what sends",
        *("streams, gap", "load processes", "chunks/s", "lost", "delivered", "µs a chunk"),
        *("with the master", "s per 1,000 tokens"),
    )
    for sent in found:
        tokens = f" × {sent.tokens_per_chunk}" if sent.tokens_per_chunk > 1 else ""
        shape = f", {sent.shape}" if sent.shape else ""
        name = f"{sent.streams}{tokens}, {1000 * sent.gap_s:g} ms{shape}"
        times.add_row(
            name,
            f"{sent.load_processes}",
            *(scaled(t, 1000, 2) for t in (
                sent.ttft_added_p50_s, sent.ttft_added_p99_s, sent.read_late_p50_s,
                sent.read_late_p99_s, sent.gap_error_p50_s, sent.gap_error_p99_s,
                sent.server_late_p99_s,
            )),
        )  # fmt: skip
        spent.add_row(
            name,
            f"{sent.load_processes}",
            f"{sent.chunks_per_s:,.0f}",
            f"{sent.lost}",
            f"{sent.delivered:.1%}",
            scaled(sent.cpu_s_per_chunk, 1e6, 1),
            scaled(sent.all_cpu_s_per_chunk, 1e6, 1),
            scaled(sent.cpu_s_per_chunk, 1000 / sent.tokens_per_chunk, 4),
        )
    console.print(times)
    console.print(
        f"[dim]A stream: {CHUNKS} chunks, the first after {1000 * TTFT_S:.0f} ms; a user sends"
        " again at once. × 4: so many tokens a chunk. TTFT added: the"
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
    for sent in (s for s in found if s.gap_s == 0.01 and not s.shape):
        most_s = {16: 0.001, 256: 0.010}.get(sent.streams)
        p99_s, late_s = sent.ttft_added_p99_s, sent.server_late_p99_s
        name = f"{sent.streams} streams, {many(sent.load_processes)}"
        if most_s and p99_s is not None and late_s is not None:
            disturbed = p99_s > most_s and late_s > most_s
            doubt = f"the server itself ran {1000 * late_s:.1f} ms late" if disturbed else ""
            aim(f"TTFT added at {name}, p99", 1000 * p99_s, 1000 * most_s, "ms", doubt=doubt)
        if sent.streams == 64 and sent.load_processes == 1 and sent.cpu_s_per_chunk:
            aim(f"CPU of what sends at {name}", 1e6 * sent.cpu_s_per_chunk, 10.0, "µs a chunk")
    aim("chunks lost", sum(sent.lost for sent in found), 0)


def scaled(value: float | None, by: float, digits: int) -> str:
    return "–" if value is None else f"{by * value:.{digits}f}"


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


def engine(
    clock: Clock, work: Path, pairs: int, unpinned: bool, locustfiles: Sequence[Path]
) -> instruments.Engine:
    """The same requests under our Locust and under vLLM's own tool."""
    machine = machines.detect()
    model = models.resolve(machine)
    write_work(work, model)
    clock.tell("starting vLLM", 0)
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
        clock.tell("warming up", 0)
        arms[OURS](work / "warm-up")
        found: dict[str, list[list[Answered]]] = {name: [] for name in arms}
        counted: dict[str, set[tuple[float, float]]] = {name: set() for name in arms}
        for pair in range(pairs):  # A B, B A, ...: what drifts hits both alike
            for i, name in list(enumerate(arms))[:: -1 if pair % 2 else 1]:
                clock.tell(f"{name}, {pair + 1} of {pairs}", (pair + 0.5) / (pairs + 1))
                before = served.snapshot()
                found[name].append(arms[name](work / f"{pair}-{i}"))
                time.sleep(0.3)  # the engine counts a request a moment after its last chunk
                if before and (after := served.snapshot()):
                    delta = after.since(before).values
                    counted[name].add(
                        (delta[metrics.PROMPT_TOKENS], delta[metrics.GENERATION_TOKENS])
                    )
    show_engine(found, counted)
    figures = (ratio_of(found, OURS, of) for of in (rate, ttft_ms, tpot_ms))
    throughput, ttft, tpot = (figure.ratio for figure in figures)
    return instruments.Engine(throughput=throughput, ttft=ttft, tpot=tpot)


def ratio_of(
    found: Mapping[str, Sequence[Sequence[Answered]]],
    name: str,
    of: Callable[[Sequence[Answered]], float],
) -> Effect:
    """A figure under one tool / under vLLM's."""
    ratio = effect(*(dict(enumerate(map(of, found[tool]))) for tool in (name, THEIRS)))
    assert ratio
    return ratio


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
    for name in (name for name in found if name not in (THEIRS, FREE)):
        ratio = ratio_of(found, name, rate).ratio
        wide = ratio.low is not None and ratio.low < 0.97 < ratio.value
        doubt = "the interval reaches below: more --pairs" if wide else ""
        what = f"throughput under {name} / {THEIRS}{within(ratio)}"
        aim(what, ratio.value, 0.97, at_least=True, doubt=doubt)
    for what, of in (("TTFT", ttft_ms), ("TPOT", tpot_ms)):
        ratio = ratio_of(found, OURS, of).ratio
        if ratio.low and ratio.high:
            agree = "they agree" if ratio.low <= 1 <= ratio.high else "they differ"
            text = f"Mean {what}, {OURS} / {THEIRS}: {ratio.value:.3f}{within(ratio)}: {agree}"
            console.print(text)
    if len(set().union(*counted.values())) > 1:
        console.print("[red]The tools did not send the same work: see the engine's counts.[/]")


# -------------------------------------------------------------- 3: an idle engine beside the loaded


def neighbour(clock: Clock, work: Path, pairs: int) -> instruments.Neighbour:
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
        clock.tell("starting two engines", 0)
        for started in engines:
            started.wait()
        family = psutil.Process(engines[1].pid).children(recursive=True)
        for process in family:
            exits.callback(process.resume)  # what is held still cannot end
        play = partial(ours, load, engines[0].url, work / "requests.jsonl")
        clock.tell("warming up", 0)
        play(work / "warm-up")
        rates: dict[str, dict[int, float]] = {"idle": {}, "held": {}}
        for pair in range(pairs):
            for arm in list(rates)[:: -1 if pair % 2 else 1]:
                clock.tell(f"{arm}, {pair + 1} of {pairs}", (pair + 0.5) / (pairs + 1))
                for process in family:
                    process.suspend() if arm == "held" else process.resume()
                rates[arm][pair] = rate(play(work / f"{pair}-{arm}"))
    found = effect(rates["idle"], rates["held"])
    assert found
    wide = found.ratio.low is not None and found.ratio.low < 0.97 < found.ratio.value
    doubt = "the interval reaches below: more --pairs" if wide else ""
    what = f"throughput beside an idle engine / beside one held still{within(found.ratio)}"
    aim(what, found.ratio.value, 0.97, at_least=True, doubt=doubt)
    return instruments.Neighbour(throughput=found.ratio)


# ---------------------------------------------------------------------- 4: what recording costs

UNRECORDED = Path(__file__).with_name("unrecorded.py")
RECORDED = Row(108)  # streams of a token every 10 ms: 10,000 tokens/s


def recording(clock: Clock, work: Path, pairs: int) -> instruments.Recording:
    """The same streams into a Locust that records and into one that does not, in turn.

    Its master records; what its load workers do is the same in both, so only the master's CPU time
    is compared, and then taken as a share of all.
    """
    shares, rates = [], []
    with contextlib.ExitStack() as exits:
        clock.tell("starting Locust", 0)
        loads = {
            file: exits.enter_context(locust(RECORDED.streams, work / file.stem, file))
            for file in (generator.LOCUSTFILE, UNRECORDED)
        }
        for pair in range(pairs):
            costs = {file: Cost() for file in loads}
            for i, (file, load) in enumerate(list(loads.items())[:: -1 if pair % 2 else 1]):
                clock.tell(f"{file.stem}, {pair + 1} of {pairs}", (pair + i / 2) / pairs)
                scraped = file == generator.LOCUSTFILE
                with scraping(load.exporter_port) if scraped else contextlib.nullcontext():
                    measure_row(RECORDED, load, work / f"{pair}-{i}", costs[file])
            recorded, bare = costs.values()
            shares.append(recording_share(recorded, bare))
            tokens_per_chunk = recorded.tokens / recorded.chunks
            rates.append(mean(recorded.delivered) * RECORDED.ideal_chunks_per_s * tokens_per_chunk)
    share = mean_interval(shares)
    wide = share.high is not None and share.value < 0.03 < share.high
    doubt = "the interval reaches above: more --pairs" if wide else ""
    interval = (
        f" (95 % interval {share.low:.1%} to {share.high:.1%})" if share.low is not None else ""
    )
    what = f"recording's share of the generator's CPU at {mean(rates):,.0f} tokens/s{interval}"
    aim(what, 100 * share.value, 3.0, "%", doubt=doubt)
    return instruments.Recording(tokens_per_s=mean(rates), share=share)


def recording_share(recorded: Cost, bare: Cost) -> float:
    """Of the generator's CPU time a token: what the master spends more, of all that is spent."""
    more_s = recorded.master_cpu_s / recorded.tokens - bare.master_cpu_s / bare.tokens
    return more_s / (recorded.all_cpu_s / recorded.tokens)


@contextlib.contextmanager
def scraping(port: int) -> Iterator[None]:
    """Read the exporter once a second, as Prometheus does."""
    ended = threading.Event()

    def scrape() -> None:
        while not ended.wait(1.0):
            requests.get(f"http://{LOOPBACK}:{port}/metrics", timeout=5).raise_for_status()

    scraper = threading.Thread(target=scrape)
    scraper.start()
    try:
        yield
    finally:
        ended.set()
        scraper.join()


# ------------------------------------------------------------------------------- 5: the lab's own


def overhead() -> instruments.Overhead | None:
    """Of the newest whole run here that asks for nothing beside its load: answers take time too."""
    here = machines.detect().slug
    for folder in (f for f in reversed(results.all_runs()) if f.path.parent.parent.name == here):
        session = folder.session()
        if folder.complete and session and not (folder.run().quick or folder.run().lab["probes"]):
            break
    else:
        console.print(
            "Lab overhead: no complete run of this machine on file (a lab without probes, not"
            " QUICK=1)."
        )
        return None
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
    return instruments.Overhead(lab=folder.path.parent.name, share=share)


# ------------------------------------------------------------------------------- 6: false alarms

AA_LAB = "continuous-batching"
AA_SET = (
    "warmup_s=0.1 window_s=0.4 repeats=3 requests=128"
    " workloads.exponential.output_tokens.mean_tokens=8"
    " workloads.exponential.output_tokens.max_tokens=16"
)
# a step varies by a tenth, the machine's speed by 3 % over seconds, two starts by half a percent
NOISE = ("--seed", "any", "--jitter", ".1", "--drift", ".03", "--start-spread", ".005")


def false_alarms(clock: Clock, work: Path, runs: int) -> instruments.Alarms:
    """A lab's baseline against itself, on fake engines whose speed varies."""
    found: list[list[Judgement]] = []
    for i in range(runs):
        clock.tell(f"run {i + 1} of {runs}", i / runs)
        with fake.reading(work / str(i)) as reader:
            command = reader.types("run", AA_LAB, AA="1", SET=AA_SET, SEED=str(i), engine=NOISE)
            if command.wait() != 0:
                raise BenchError(f"the lab failed; it said:\n{command.said}")
            found.append(command.folder.summary().judgements)
    if all(j.outcome == "not valid" for run in found for j in run):
        raise BenchError("not one claim could be judged: this machine is too busy")
    alarms = alarms_of(found, AA_LAB)
    console.print(
        f"False alarms: {alarms.alarms} of {alarms.judged} claims judged ({alarms.low:.1%} to"
        f" {alarms.high:.1%}, exact 95 % interval), {alarms.not_judged} not judged; the ratio"
        f" varies by {alarms.spread:.1%} between repeats"
    )
    console.print(
        "[dim]Two claims of a run that look at one trial are not independent, so the interval is"
        " somewhat too narrow.[/]"
    )
    doubt = "the interval admits it: more --runs" if alarms.low <= 0.05 < alarms.rate else ""
    aim("false alarms", 100 * alarms.rate, 5.0, "% of the claims judged", doubt=doubt)
    return alarms


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


def within(ratio: Interval) -> str:
    if ratio.low is None or ratio.high is None:
        return ""
    return f" (95 % interval {ratio.low:.3f} to {ratio.high:.3f})"


def main(
    part: Annotated[
        list[str],
        typer.Option(
            envvar="LABS_PART", help=f"Only this part, again for another: {', '.join(PARTS)}."
        ),
    ] = list(MAIN),  # noqa: B006
    repeats: Annotated[
        int, typer.Option(min=1, help="streams: how often each row is measured, interleaved.")
    ] = REPEATS,
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
        typer.Option(
            min=1, help="streams: by so many load processes, in turn; the odd shapes by one alone."
        ),
    ] = list(PROCESSES),  # noqa: B006
    pairs: Annotated[
        int, typer.Option(min=1, help="engine, neighbour, recording: runs of each side, in turn.")
    ] = PAIRS,
    runs: Annotated[
        int, typer.Option(min=1, help="aa: how often a lab runs against itself.")
    ] = RUNS,
    unpinned: Annotated[
        bool,
        typer.Option(help="engine: also run vLLM's tool free to use the engine's cores."),
    ] = False,
    keep: Annotated[
        Path | None, typer.Option(help="Keep records, truth and logs in this new folder.")
    ] = None,
) -> None:
    """Measure the lab's own instruments and print each figure beside its aim.

    [bold]streams[/] (4 min): what our Locust adds to TTFT and to chunk gaps,
    and the CPU it costs, against a server that records what it really sent.

    [bold]engine[/] (3 min): vLLM's throughput under our Locust and under
    `vllm bench serve`: the same requests, in turns on one engine.

    [bold]neighbour[/] (3 min): an engine's throughput beside another that is
    loaded and idle, as variants of a lab are, and beside one held still.

    [bold]recording[/] (2 min): the share of our Locust's CPU time that goes
    into recording for Prometheus at 10,000 tokens/s.

    [bold]overhead[/] (at once): the lab's own share of the newest full run
    in results/.

    [bold]aa[/] (8 min, only when asked for): twenty runs of a lab against
    itself on a fake engine whose speed varies; the false alarms among them.

    The figures are this machine's, now: close what else runs on it. What a
    part finds is kept in results/ as soon as it is there, unless fewer repeats,
    pairs or runs, or not all rows, were asked for. The exit code is 0 unless
    something broke, whatever the figures.
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
    files = [generator.LOCUSTFILE, *against]
    senders = [(file, n) for file in files for n in processes]
    expected_s = {
        "streams": 10 + TRIAL_S * repeats * len(cases_of(rows, senders)),
        "engine": 60 + 30 * pairs,
        "neighbour": 60 + 30 * pairs,
        "recording": 10 + 2 * TRIAL_S * pairs,
        "overhead": 1,
        "aa": 22 * runs,
    }
    clock = Clock({name: expected_s[name] for name in PARTS if name in part})
    ordinary = {
        "streams": rows == list(ROWS) and processes == list(PROCESSES) and repeats >= REPEATS,
        "engine": pairs >= PAIRS,
        "neighbour": pairs >= PAIRS,
        "recording": pairs >= PAIRS,
        "overhead": True,
        "aa": runs >= RUNS,
    }
    failed = False
    with contextlib.ExitStack() as exits:
        if keep:
            keep.mkdir(parents=True)
        work = keep or Path(exits.enter_context(tempfile.TemporaryDirectory(prefix="lab-bench-")))
        measure: dict[str, Callable[[], instruments.Part | None]] = {
            "streams": lambda: streams(clock, work / "streams", repeats, rows, senders),
            "engine": lambda: engine(clock, work / "engine", pairs, unpinned, files),
            "neighbour": lambda: neighbour(clock, work / "neighbour", pairs),
            "recording": lambda: recording(clock, work / "recording", pairs),
            "overhead": overhead,
            "aa": lambda: false_alarms(clock, work / "aa", runs),
        }
        for name in (name for name in PARTS if name in part):
            others = Others()
            try:
                with clock.during(name):
                    found = measure[name]()
            except (BenchError, EngineError, generator.GeneratorError, models.ModelError) as error:
                console.print(f"[red]{name}: {escape(str(error))}[/]")  # the other parts go on
                failed = True
                continue
            if found and ordinary[name] and not against:
                kept = instruments.keep(machines.detect(), name, dated(found, others))
                console.print(f"[dim]{name}: kept in {os.path.relpath(kept)}[/]")
    if failed:
        raise typer.Exit(1)


def dated(part: instruments.Part, others: Others) -> instruments.Part:
    """With the day, and what others took of the CPU, except where it was read from a file."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    taken = 0.0 if isinstance(part, instruments.Overhead) else sum(others.shares())
    return part.model_copy(update={"measured_at": now, "cpu_others": taken})


def _cores(cores: Sequence[int]) -> str:
    return ",".join(map(str, cores))


if __name__ == "__main__":
    app = typer.Typer(rich_markup_mode="rich", pretty_exceptions_enable=False, add_completion=False)
    app.command()(main)
    app()
