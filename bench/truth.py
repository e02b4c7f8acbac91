"""A server that sends streams as it is programmed to, and records when it sent each chunk."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests

from bench import BenchError
from loadtests import plan
from loadtests.workload import Request
from serving.hardware import machine as machines
from serving.processes.ports import LOOPBACK, free_port
from serving.processes.process import Process

SERVER = "tests.fake.engine"  # the module that is run; each request tells it when to send what
TTFT_S, CHUNKS, LONG, STALL_S = 0.05, 50, 1000, 0.3
MARK_S = 1e-7  # request i asks for TTFT_S + i * MARK_S: so the server's record tells which it was
WARMUP_S, WINDOW_S = 1.0, 6.0

Truth = Mapping[str, Any]  # one line of the server's log


@dataclass(frozen=True)
class Program:
    """Describes what the server is to send: streams of one shape, each user's one after another."""

    streams: int
    gap_s: float = 0.01
    tokens_per_chunk: int = 1
    early_role: bool = False
    sse_comments: bool = False
    stall_s: float = 0.0
    chunks: int = CHUNKS

    @property
    def shape(self) -> str:
        """Return what is unusual about the streams, in words; empty for plain ones."""
        odd = {
            "role chunk early": self.early_role,
            "SSE comments": self.sse_comments,
            f"a stall of {self.stall_s:g} s": self.stall_s,
            f"{self.chunks} chunks": self.chunks != CHUNKS,
        }
        return ", ".join(name for name, is_set in odd.items() if is_set)

    @property
    def title(self) -> str:
        tokens = f" × {self.tokens_per_chunk}" if self.tokens_per_chunk > 1 else ""
        shape = f", {self.shape}" if self.shape else ""
        return f"{self.streams}{tokens}, {1000 * self.gap_s:g} ms{shape}"

    @property
    def request_s(self) -> float:
        return TTFT_S + (self.chunks - 1) * self.gap_s + self.stall_s

    @property
    def ideal_chunks_per_s(self) -> float:
        return self.streams * self.chunks / self.request_s


PLAIN = (Program(1), Program(16), Program(64), Program(256))
PROGRAMS = (
    *PLAIN,
    Program(64, gap_s=0.003),
    Program(64, tokens_per_chunk=4, early_role=True),
    Program(64, sse_comments=True),
    Program(64, stall_s=STALL_S),
    Program(64, chunks=300),  # three seconds, as answers of an engine take
    Program(64, gap_s=0.001, chunks=LONG),
    Program(256, gap_s=0.001, chunks=LONG),
)
SHARED = PLAIN[1:]  # what several load processes send too


def write_requests(path: Path, program: Program, lasts_s: float = WARMUP_S + WINDOW_S) -> None:
    """Write requests that say when to send what; half as many again as such a trial can send."""
    each = math.ceil(1.5 * lasts_s / program.request_s)
    with path.open("w") as file:
        for i in range(program.streams * each):
            truth = {
                "ttft_s": TTFT_S + i * MARK_S,
                "gap_s": program.gap_s,
                "stall_s": program.stall_s,
            }
            request = Request(i, [{"role": "user", "content": "Say it."}], 12, program.chunks)
            body = plan.body(request, "fake") | {
                "max_tokens": program.chunks * program.tokens_per_chunk,
                "truth": truth | {"tokens_per_chunk": program.tokens_per_chunk},
            }
            planned = plan.PlannedRequest(
                index=i, output_tokens=body["max_tokens"], body=json.dumps(body)
            )
            file.write(planned.model_dump_json() + "\n")


def read(log: Path) -> dict[int, Truth]:
    """Read the server's log: the index of the request -> its line."""
    lines = [json.loads(line) for line in log.read_bytes().splitlines()]
    return {
        round((line["due"][0] - line["received"] - TTFT_S) / MARK_S): line
        for line in lines
        if line["due"]
    }


@contextlib.contextmanager
def serving(program: Program, work: Path) -> Iterator[tuple[str, Path]]:
    """Start the server on the engine's cores; yield (its URL, its log).

    The log is complete when the block has ended. Raises BenchError when it does not start.
    """
    port, log = free_port(), work / "truth.jsonl"
    flags = ["--programmed", *(["--early-role-chunk"] if program.early_role else [])]
    flags += ["--sse-comments"] if program.sse_comments else []
    argv = [sys.executable, "-m", SERVER, "--port", str(port), "--log", str(log), *flags]
    cores = machines.split_cores()[0]
    with Process("truth server", argv, log=work / "truth.log", cores=cores) as process:
        url = f"http://{LOOPBACK}:{port}"
        _wait(url, process)
        yield url, log


def _wait(url: str, process: Process) -> None:
    """Wait until the server answers. Raises BenchError after 15 s, or when it has ended."""
    deadline = time.monotonic() + 15
    while time.monotonic() < deadline and process.returncode is None:
        with contextlib.suppress(requests.RequestException):
            if requests.get(f"{url}/health", timeout=1).ok:
                return
        time.sleep(0.05)
    raise BenchError(f"the {process.name} does not answer; its last lines:\n{process.tail()}")
