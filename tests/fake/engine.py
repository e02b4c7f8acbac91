"""A fake vLLM: the same API and metric names, a known latency law, and a record of what it sent.

It stands in for the engine so that a lab runs end to end in seconds, and it is the truth that a
client's clock is held against: `time.monotonic()` is system-wide on Linux, so its stamps and those
of a client on the same machine can be subtracted. Linux only, 127.0.0.1 only.

The law is continuous batching, simulated. A step serves every running sequence, at most
`--max-num-seqs`; others wait, first come first served, for a step to end. A step lasts

    step_s + step_per_seq_s * batch + prefill_per_token_s * (prompt tokens it prefills)

times a factor that varies as a machine's speed does (`Noise`, off by default), and ends with one
chunk of `--tokens-per-chunk` tokens for each sequence, or with its first token
for one whose prompt is now prefilled. Steps follow each other on an absolute schedule, so lateness
never adds up. As in vLLM

- a step has a budget of `--max-num-batched-tokens`: running sequences take theirs first, a prompt
  that does not fit in what is left comes in pieces (`--no-enable-chunked-prefill`: it waits);
- a prompt's full blocks stay in a prefix cache, apart for every adapter and `cache_salt`, and are
  not prefilled again (`--no-enable-prefix-caching` turns that off);
- when the KV cache is full, the last sequence is preempted: it waits and is prefilled anew. The
  blocks of `--kv-cache-memory-bytes` follow from the model's config.json and the cache's type;
- with `--speculative-config` each sequence drafts in every step after its first, and each drafted
  token is accepted with `--acceptance`, as long as all before it were. Drafting takes no time;
- a batch holds at most `--max-loras` adapters, and others wait for a slot. An adapter's answers
  begin with what its folder's `mark.txt` says, as if it had been trained to.

With `--programmed` there is no scheduler: chunk i of a request is due `ttft_s + i * gap_s` after
its arrival, and `stall_s` later from the middle one on, from the body's own

    "truth": {"ttft_s": 0.1, "gap_s": 0.01, "tokens_per_chunk": 1, "stall_s": 0}

`--log` gets one JSON line a request: `index` (its X-Request-Id, else its number), `model`,
`received` (when it was parsed), `scheduled`, `n_in`, `n_cached`, `n_out`, `finish` (stop, length,
abort, error),
`stream`, `chunks` as [[time, tokens], ...] (stamped just before the write; of a request that does
not stream, when its tokens were ready), and beside each chunk `due` (when the law wanted it),
`batch` and `prefilled` (of its step). Lines appear as requests end and all are there once the
process has ended, except after SIGKILL; what was under way then ends as "abort". Shapes and
buckets are those of vLLM 0.32.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import email.utils
import gc
import heapq
import itertools
import json
import math
import os
import random
import signal
import sys
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import IO, Any, NamedTuple, NoReturn, cast
from zlib import crc32

from orjson import dumps  # json would hold the loop ten times as long

VERSION = "0.32.0"
WORDS = " the", " quick", " brown", " fox", " jumps", " over", " a", " lazy", " dog", "."
FINGERPRINT = f'"system_fingerprint":"vllm-{VERSION}-fake"'
PING = "8\r\n: ping\n\n\r\n"
DONE = "e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"

# Histograms and their bucket bounds in vLLM 0.32.
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000)
TTFT_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10,
          20, 40, 80, 160, 640, 2560)  # fmt: skip
GAP_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20,
         40, 80)  # fmt: skip
PHASE_S = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960,
           1920, 7680)  # fmt: skip
HISTOGRAMS: dict[str, Sequence[float]] = {
    "request_prompt_tokens": TOKENS,
    "request_generation_tokens": TOKENS,
    "iteration_tokens_total": (1, *(2**i for i in range(3, 15))),
    "time_to_first_token_seconds": TTFT_S,
    "inter_token_latency_seconds": GAP_S,
    "request_time_per_output_token_seconds": GAP_S,
    "e2e_request_latency_seconds": PHASE_S,
    "request_queue_time_seconds": PHASE_S,
    "request_inference_time_seconds": PHASE_S,
    "request_prefill_time_seconds": PHASE_S,
    "request_decode_time_seconds": PHASE_S,
}
COUNTERS = ("prompt_tokens_total", "generation_tokens_total", "prefix_cache_queries_total",
            "prefix_cache_hits_total", "num_preemptions_total")  # fmt: skip
SPECULATION = ("spec_decode_num_drafts_total", "spec_decode_num_draft_tokens_total",
               "spec_decode_num_accepted_tokens_total")  # fmt: skip
ACCEPTED_AT = "spec_decode_num_accepted_tokens_per_pos_total"


class Alarm:
    """Calls back at absolute monotonic times, a few tens of microseconds late on an idle core.

    A timerfd, because the event loops' own timers count in milliseconds.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._libc = ctypes.CDLL(None)
        self._fd: int = self._libc.timerfd_create(time.CLOCK_MONOTONIC, os.O_NONBLOCK)
        self._spec = (ctypes.c_long * 4)()  # interval s, ns; value s, ns
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._armed = math.inf
        loop.add_reader(self._fd, self._ring)

    def at(self, when: float, call: Callable[[], None]) -> None:
        heapq.heappush(self._heap, (when, next(self._order), call))
        if when < self._armed:
            self._arm(when)

    def _arm(self, when: float) -> None:
        self._armed = when
        self._spec[2], self._spec[3] = divmod(int(when * 1e9), 10**9)
        self._libc.timerfd_settime(self._fd, 1, self._spec, None)  # 1: TFD_TIMER_ABSTIME

    def _ring(self) -> None:
        with contextlib.suppress(BlockingIOError):  # armed anew since the loop saw it expire
            os.read(self._fd, 8)
        self._armed = -math.inf  # whatever the calls ask for is armed once, below
        now, due = time.monotonic(), []
        while self._heap and self._heap[0][0] <= now:
            due.append(heapq.heappop(self._heap)[2])
        for call in due:  # collected first: a server that is behind still gets to its sockets
            call()
        self._armed = math.inf
        if self._heap:
            self._arm(self._heap[0][0])


class Metrics:
    """What /metrics shows, each updated at the moment when vLLM updates it."""

    def __init__(self, guesses: int) -> None:
        self.counters = dict.fromkeys((*COUNTERS, *(SPECULATION if guesses else ())), 0)
        self.accepted_at = [0] * guesses
        self.finished = dict.fromkeys(("stop", "length", "abort", "error", "repetition"), 0)
        self._buckets = {name: [0] * (len(bounds) + 1) for name, bounds in HISTOGRAMS.items()}
        self._sums = dict.fromkeys(HISTOGRAMS, 0.0)

    def observe(self, histogram: str, value: float) -> None:
        self._buckets[histogram][bisect_left(HISTOGRAMS[histogram], value)] += 1
        self._sums[histogram] += value

    def drafted(self, accepted: int) -> None:
        drafts = (1, len(self.accepted_at), accepted)
        for name, more in zip(SPECULATION, drafts, strict=True):
            self.counters[name] += more
        for position in range(accepted):
            self.accepted_at[position] += 1

    def render(
        self,
        model: str,
        gauges: dict[str, float],
        cache_config: dict[str, str],
        lora: dict[str, str] | None,
    ) -> str:
        lines: list[str] = []
        common = {"engine": "0", "model_name": model}

        def family(kind: str, name: str) -> None:
            lines.append(f"# HELP vllm:{name} See vLLM.\n# TYPE vllm:{name} {kind}")

        def sample(name: str, value: float, labels: dict[str, str]) -> None:
            pairs = ",".join(f"{key}={json.dumps(labels[key])}" for key in sorted(labels))
            lines.append(f"vllm:{name}{{{pairs}}} {float(value)}")

        for kind, values in (("gauge", gauges), ("counter", self.counters)):
            for name, value in values.items():
                family(kind, name)
                sample(name, value, common)
        family("counter", "request_success_total")
        for reason, count in self.finished.items():
            sample("request_success_total", count, {**common, "finished_reason": reason})
        if self.accepted_at:
            family("counter", ACCEPTED_AT)
        for position, count in enumerate(self.accepted_at):
            sample(ACCEPTED_AT, count, {**common, "position": str(position)})
        for name, bounds in HISTOGRAMS.items():
            family("histogram", name)
            totals = list(itertools.accumulate(self._buckets[name]))
            for bound, total in zip((*map(float, bounds), "+Inf"), totals, strict=True):
                sample(f"{name}_bucket", total, {**common, "le": str(bound)})
            sample(f"{name}_count", totals[-1], common)
            sample(f"{name}_sum", self._sums[name], common)
        family("gauge", "cache_config_info")
        sample("cache_config_info", 1, {"engine": "0", **cache_config})
        if lora:
            family("gauge", "lora_requests_info")
            sample("lora_requests_info", time.time(), lora)
        return "\n".join(lines) + "\n"


class Refused(Exception):
    """An error to answer with, in OpenAI's shape."""

    def __init__(self, status: HTTPStatus, kind: str, message: str, param: str | None = None):
        self.status = status
        error = {"message": message, "type": kind, "param": param, "code": int(status)}
        self.answer = {"error": error}


class Step(NamedTuple):
    """What the law says of the step that a chunk comes from."""

    due: float
    batch: int
    prefilled: int


@dataclass(eq=False, slots=True)
class Request:
    connection: Connection
    received: float
    index: str
    head: str  # the JSON that every answer starts with
    model: str
    adapter: str | None  # its name, of a model that is one
    mark: str  # its first word
    salt: str
    top: int | None  # how many of the prompt's logprobs are wanted at each position
    chat: bool
    stream: bool
    usage: bool  # a last chunk with the usage
    continuous: bool  # the usage in every chunk
    prompt: Sequence[object]
    n_out: int
    stops: bool  # ends by itself, not by max_tokens
    truth: dict[str, float]
    scheduled: float = 0.0
    n_cached: int = 0
    computed: int = 0  # tokens whose keys and values are there
    sent: int = 0
    finish: str = ""
    times: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)

    @property
    def left(self) -> int:
        """Tokens to compute before the next one can be sampled: one, once it decodes."""
        return len(self.prompt) + self.sent - self.computed

    def frame(self, choice: str, rest: str) -> str:
        """One server-sent event as one HTTP chunk; all ASCII, so characters are bytes."""
        event = f"data: {self.head}{choice}]{rest}}}\n\n"
        return f"{len(event):x}\r\n{event}\r\n"

    def usage_json(self, details: str = "") -> str:
        n_in, n_out = len(self.prompt), self.sent
        counts = f'"prompt_tokens":{n_in},"total_tokens":{n_in + n_out},"completion_tokens":{n_out}'
        return f',"usage":{{{counts}{details}}}'

    def usage_so_far(self) -> str:
        details = ',"completion_tokens_details":null' if self.chat else ""
        return self.usage_json(details) if self.continuous else ""

    def text(self, tokens: int) -> str:
        """The last `tokens` tokens of what was sent."""
        words = [WORDS[i % len(WORDS)] for i in range(self.sent - tokens, self.sent)]
        if self.sent == tokens and self.mark:
            words[0] = self.mark
        return "".join(words)

    def role_frame(self) -> str:
        """Chat's first chunk: a role and no token."""
        delta = '"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null'
        rest = f'{self.usage_so_far()},"prompt_token_ids":null,"prompt_text":null'
        return self.frame(f'{{"index":0,{delta}}}', rest)

    def content_frame(self, tokens: int, reason: str) -> str:
        finish = f'"finish_reason":"{reason}"' if reason else '"finish_reason":null'
        if self.chat:
            delta = f'"delta":{{"content":"{self.text(tokens)}"}}'
            ids = '"stop_reason":null,"token_ids":null' if reason else '"token_ids":null'
        else:
            delta = f'"text":"{self.text(tokens)}"'
            ids = '"stop_reason":null,"prompt_token_ids":null,"token_ids":null'
        rest = f",{FINGERPRINT}" if reason and not self.usage else self.usage_so_far()
        return self.frame(f'{{"index":0,{delta},"logprobs":null,{finish},{ids}}}', rest)

    def closing_frames(self) -> str:
        return (self.frame("", f"{self.usage_json()},{FINGERPRINT}") if self.usage else "") + DONE

    def whole(self) -> bytes:
        """The answer to a request that does not stream."""
        text = self.text(self.sent)
        if self.chat:
            answer = f'"message":{{"role":"assistant","content":"{text}","refusal":null}}'
        else:
            answer = f'"text":"{text}"'
        choice = f'{answer},"logprobs":null,"finish_reason":"{self.finish}","stop_reason":null'
        if self.top is not None:
            ids = [crc32(str(token).encode()) % 50_000 for token in self.prompt]
            known = dumps([None, *map(self._known, ids[1:])]).decode()
            choice += f',"prompt_logprobs":{known},"prompt_token_ids":{dumps(ids).decode()}'
        details = ',"prompt_tokens_details":null,"completion_tokens_details":null'
        rest = f'"service_tier":null,{FINGERPRINT}{self.usage_json(details)}'
        return f'{self.head}{{"index":0,{choice}}}],{rest}}}'.encode()

    def _known(self, token: int) -> dict[str, dict[str, Any]]:
        """The top of a position: the token itself has a probability of a half, others share."""
        ids = [token, *(50_000 + i for i in range((self.top or 1) - 1))]
        shares = [0.5, *(0.4 / 2**i for i in range(1, len(ids)))]
        return {
            str(i): {"logprob": math.log(share), "rank": rank, "decoded_token": "w"}
            for rank, (i, share) in enumerate(zip(ids, shares, strict=True), start=1)
        }

    def record(self) -> dict[str, Any]:
        return {
            "index": self.index,
            "model": self.model,
            "received": self.received,
            "scheduled": self.scheduled or None,
            "n_in": len(self.prompt),
            "n_cached": self.n_cached,
            "n_out": self.sent,
            "finish": self.finish,
            "stream": self.stream,
            "chunks": list(zip(self.times, self.tokens, strict=True)),
            "due": [step.due for step in self.steps],
            "batch": [step.batch for step in self.steps],
            "prefilled": [step.prefilled for step in self.steps],
        }


class Noise:
    """A factor on the length of a step, of mean 1, as a machine's speed varies.

    `jitter` acts from step to step, `drift` over seconds (an Ornstein-Uhlenbeck process, so that
    what is measured soon after something else is like it), `spread` from one start to the next.
    Each is the standard deviation of a logarithm.
    """

    def __init__(
        self, seed: int | None, jitter: float, drift: float, drift_s: float, spread: float
    ) -> None:
        self._random = random.Random(seed)
        self._jitter, self._drift, self._drift_s = jitter, drift, drift_s
        self._start = self._random.gauss(0, spread) - (jitter**2 + drift**2 + spread**2) / 2
        self._at, self._drifted = -math.inf, 0.0

    def factor(self, at_s: float) -> float:
        """Of a step that begins at this time, no earlier than the last one asked for."""
        kept = math.exp((self._at - at_s) / self._drift_s)
        fresh = self._random.gauss(0, self._drift) * math.sqrt(1 - kept * kept)
        self._at, self._drifted = at_s, kept * self._drifted + fresh
        log = self._start + self._drifted + self._random.gauss(0, self._jitter)
        return math.exp(log)


class Batching:
    """Continuous batching: steps, one after another, as long as there is work."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.options = engine, engine.options
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self._stepping = False
        self._stall_s: float = self.options.stall_s
        self._random = random.Random(self.options.seed)
        self._noise = Noise(
            self.options.seed,
            self.options.jitter,
            self.options.drift,
            self.options.drift_s,
            self.options.start_spread,
        )

    def arrive(self, request: Request) -> None:
        self.waiting.append(request)
        if not self._stepping:
            self._begin(request.received)

    def drop(self, request: Request) -> None:
        (self.waiting if request in self.waiting else self.running).remove(request)

    def _begin(self, start: float) -> None:
        options = self.options
        preempted, work = self._preempt(), list[tuple[Request, int]]()
        budget: int = options.max_num_batched_tokens
        for request in self.running:
            if new := min(request.left, budget):
                work.append((request, new))
                budget = max(0, budget - new - self.engine.guesses * (request.left == 1))
        if not preempted:
            work += self._admit(start, budget)
        self._stepping = bool(work)
        if work:
            prefilled = sum(new for request, new in work if new > 1 or not request.times)
            length = options.step_s + options.step_per_seq_s * len(work)
            length += options.prefill_per_token_s * prefilled
            length *= self._noise.factor(start)
            step = Step(start + length, len(work), prefilled)
            self.engine.alarm.at(step.due, partial(self._end, step, work))

    def _preempt(self) -> bool:
        """Makes room for the next tokens of those that came first."""
        found = False
        while len(self.running) > 1 and self._blocks(self.running) > self.engine.blocks:
            request = self.running.pop()
            request.computed, found = 0, True
            self.waiting.appendleft(request)
            self.engine.metrics.counters["num_preemptions_total"] += 1
        return found

    def _blocks(self, requests: Sequence[Request]) -> int:
        """Of the KV cache, that they fill by the end of the next step."""
        size = self.options.block_size
        return sum(-(-(len(r.prompt) + r.sent) // size) for r in requests)

    def _admit(self, start: float, budget: int) -> list[tuple[Request, int]]:
        """The waiting ones that budget, memory and adapter slots have room for, and their tokens.

        One without a slot is passed over, as in vLLM; the others keep their order.
        """
        options, admitted, skipped = self.options, list[tuple[Request, int]](), deque[Request]()
        while self.waiting and len(self.running) < options.max_num_seqs and budget:
            request = self.waiting[0]
            whole = len(request.prompt) + request.sent
            if self.running and (
                self._blocks([*self.running, request]) > self.engine.blocks
                or (whole > budget and not options.enable_chunked_prefill)
            ):
                break
            self.waiting.popleft()
            adapters = {r.adapter for r in (*self.running, request)} - {None}
            if len(adapters) > options.max_loras:
                skipped.append(request)
                continue
            if not request.scheduled:
                request.scheduled = max(start, request.received)
                request.n_cached = request.computed = self.engine.look_up(request)
            new = min(request.left, budget)
            budget -= new
            admitted.append((request, new))
            self.running.append(request)
        self.waiting.extendleft(reversed(skipped))
        return admitted

    def _end(self, step: Step, work: Sequence[tuple[Request, int]]) -> None:
        generated = 0
        here = [(request, new) for request, new in work if not request.finish]
        for request, new in here:
            request.computed += new
            if request.left == 0:
                generated += self.engine.emit(request, self._size(request), step)
                request.computed = len(request.prompt) + request.sent - 1
        if here:  # else all of them have gone away meanwhile
            self.engine.metrics.observe("iteration_tokens_total", step.prefilled + generated)
        self.running = [request for request in self.running if not request.finish]
        sent = self.engine.metrics.counters["generation_tokens_total"]
        if self._stall_s and 0 < self.options.stall_after <= sent:
            resume, self._stall_s = step.due + self._stall_s, 0.0  # once
            self.engine.alarm.at(resume, partial(self._begin, resume))
        else:
            self._begin(step.due)

    def _size(self, request: Request) -> int:
        """Tokens of its next chunk; all that were accepted count, even past the answer's end."""
        if not request.times:
            return 1
        if not (guesses := self.engine.guesses):
            return int(self.options.tokens_per_chunk)
        accepted = 0
        while accepted < guesses and self._random.random() < self.options.acceptance:
            accepted += 1
        self.engine.metrics.drafted(accepted)
        return 1 + accepted


class Programmed:
    """No scheduler: every request keeps to the schedule that it brought."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.options = engine, engine.options
        self.waiting: Sequence[Request] = ()
        self.running: set[Request] = set()

    def arrive(self, request: Request) -> None:
        options, truth = self.options, request.truth
        request.scheduled = request.received
        self.running.add(request)
        first: float = request.received + truth.get("ttft_s", options.step_s) * options.slowdown
        gap_s: float = truth.get("gap_s", options.step_s) * options.slowdown
        stall_s: float = truth.get("stall_s", 0.0) * options.slowdown
        size = max(1, int(truth.get("tokens_per_chunk", options.tokens_per_chunk)))
        middle = -(-request.n_out // size) // 2

        def due(i: int) -> float:
            return first + i * gap_s + stall_s * (i >= middle)

        self.engine.alarm.at(due(0), partial(self._chunk, request, due, size))

    def drop(self, request: Request) -> None:
        self.running.remove(request)

    def _chunk(self, request: Request, due: Callable[[int], float], size: int) -> None:
        if request.finish:
            return  # it went away
        i = len(request.times)
        step = Step(due(i), len(self.running), 0 if i else len(request.prompt))
        sent = self.engine.emit(request, size, step)
        self.engine.metrics.observe("iteration_tokens_total", step.prefilled + sent)
        if request.sent == request.n_out:
            self.running.remove(request)
        else:
            self.engine.alarm.at(due(i + 1), partial(self._chunk, request, due, size))


class Engine:
    """Reads requests, hands them to the scheduler, sends, counts and logs what that emits."""

    def __init__(self, options: argparse.Namespace, log: IO[bytes] | None) -> None:
        self.options = options
        self.guesses = int(options.speculative_config.get("num_speculative_tokens", 0))
        self.blocks = _kv_blocks(options)
        self.metrics = Metrics(self.guesses)
        self.loop = asyncio.get_running_loop()
        self.alarm = Alarm(self.loop)
        self.scheduler = Programmed(self) if options.programmed else Batching(self)
        self.names: list[str] = options.served_model_name or [options.model]
        self.adapters = {  # name -> folder
            name: Path(folder)
            for name, _, folder in (m.partition("=") for m in options.lora_modules)
        }
        self._blocks: dict[int, None] = {}  # hashes of the cached blocks, the least recent first
        self._arrived = 0
        self._active: set[Request] = set()
        self._log = log
        self._to_log: deque[Request] = deque()
        self._routes: dict[str, tuple[str, Callable[[Connection, dict[str, str], bytes], None]]] = {
            "/health": ("GET", lambda to, *_: to.respond(HTTPStatus.OK, b"")),
            "/version": ("GET", lambda to, *_: to.respond_json({"version": VERSION})),
            "/v1/models": ("GET", self._list_models),
            "/metrics": ("GET", self._render_metrics),
            "/v1/chat/completions": ("POST", partial(self._complete, chat=True)),
            "/v1/completions": ("POST", partial(self._complete, chat=False)),
            "/reset_prefix_cache": ("POST", self._reset_prefix_cache),
        }
        if options.enable_lora and os.environ.get("VLLM_ALLOW_RUNTIME_LORA_UPDATING") == "1":
            self._routes["/v1/load_lora_adapter"] = ("POST", self._load_adapter)
            self._routes["/v1/unload_lora_adapter"] = ("POST", self._unload_adapter)

    @property
    def models(self) -> list[str]:
        return [*self.names, *self.adapters]

    def answer(
        self, connection: Connection, verb: str, path: str, headers: dict[str, str], body: bytes
    ) -> None:
        """Answers one HTTP request: at once or, a completion, as the scheduler lets it."""
        allowed, handle = self._routes.get(path, ("", None))
        if not handle:
            connection.respond_json({"detail": "Not Found"}, HTTPStatus.NOT_FOUND)
        elif verb != allowed:
            status = HTTPStatus.METHOD_NOT_ALLOWED
            connection.respond_json({"detail": "Method Not Allowed"}, status)
        else:
            try:
                handle(connection, headers, body)
            except Refused as refusal:
                connection.respond_json(refusal.answer, refusal.status)

    def _list_models(self, connection: Connection, *_: object) -> None:
        shared = {"object": "model", "created": int(time.time()), "owned_by": "vllm"}
        more = {"root": self.options.model, "max_model_len": self.options.max_model_len}
        data = [{"id": name, **shared, **more} for name in self.models]
        connection.respond_json({"object": "list", "data": data})

    def _render_metrics(self, connection: Connection, *_: object) -> None:
        options, running, waiting = self.options, self.scheduler.running, self.scheduler.waiting
        size, blocks = options.block_size, self.blocks
        used = sum(-(-(len(request.prompt) + request.sent) // size) for request in running)
        gauges = {
            "num_requests_running": len(running),
            "num_requests_waiting": len(waiting),
            "kv_cache_usage_perc": min(1.0, used / blocks),
        }
        config = {
            "block_size": str(size),
            "cache_dtype": options.kv_cache_dtype,
            "enable_prefix_caching": str(options.enable_prefix_caching),
            "num_gpu_blocks": str(blocks),
        }
        lora = {
            "max_lora": str(options.max_loras),
            "running_lora_adapters": ",".join({r.adapter for r in running if r.adapter}),
            "waiting_lora_adapters": ",".join({r.adapter for r in waiting if r.adapter}),
        }
        text = self.metrics.render(
            self.names[0], gauges, config, lora if options.enable_lora else None
        )
        kind = "text/plain; version=1.0.0; charset=utf-8"
        connection.respond(HTTPStatus.OK, text.encode(), kind)

    def _reset_prefix_cache(self, connection: Connection, *_: object) -> None:
        if not self.options.keep_prefix_cache:
            self._blocks.clear()
        connection.respond_json({"success": True})

    def _load_adapter(self, connection: Connection, _: dict[str, str], body: bytes) -> None:
        asked = json.loads(body)
        name, folder = asked["lora_name"], Path(asked["lora_path"])
        if name in self.adapters:
            message = f"The lora adapter '{name}' has already been loaded."
            raise Refused(HTTPStatus.BAD_REQUEST, "InvalidUserInput", message)
        if not folder.is_dir():
            message = f"Loading lora {name} failed: No adapter found for {folder}"
            raise Refused(HTTPStatus.NOT_FOUND, "NotFoundError", message)
        self.adapters[name] = folder
        text = f"Success: LoRA adapter '{name}' added successfully."
        connection.respond(HTTPStatus.OK, text.encode(), "text/plain")

    def _unload_adapter(self, connection: Connection, _: dict[str, str], body: bytes) -> None:
        name = json.loads(body)["lora_name"]
        if name not in self.adapters:
            message = f"The lora adapter '{name}' cannot be found."
            raise Refused(HTTPStatus.NOT_FOUND, "NotFoundError", message)
        del self.adapters[name]
        text = f"Success: LoRA adapter '{name}' removed successfully."
        connection.respond(HTTPStatus.OK, text.encode(), "text/plain")

    def _complete(
        self, connection: Connection, headers: dict[str, str], body: bytes, *, chat: bool
    ) -> None:
        request = self._read(connection, headers, body, chat)
        if self.options.error_every and self._arrived % self.options.error_every == 0:
            self._close(request, "error")
            status = HTTPStatus.INTERNAL_SERVER_ERROR
            raise Refused(status, "InternalServerError", "EngineCore failed, as it was told to")
        self._active.add(request)
        connection.request = request
        if request.stream:
            connection.start_stream()
            if chat and self.options.early_role_chunk:
                connection.write(request.role_frame())
        self.scheduler.arrive(request)

    def _read(
        self, connection: Connection, headers: dict[str, str], text: bytes, chat: bool
    ) -> Request:
        """The request in `text`. Raises Refused where vLLM would answer with an error."""

        def refuse(message: str, param: str | None = None) -> NoReturn:
            raise Refused(HTTPStatus.BAD_REQUEST, "BadRequestError", message, param)

        def count(name: str, default: int) -> int:
            value = body.get(name)
            if value is not None and (type(value) is not int or value < 0):
                refuse(f"{name} must be a whole number, got {value}.", name)
            return default if value is None else value

        try:
            body = json.loads(text)
            if not isinstance(body, dict):
                raise ValueError("not an object")
        except ValueError as error:
            refuse(f"JSON decode error: {error}", "body")
        model = body.get("model") or self.names[0]
        if model not in self.models:
            aliases = ", ".join(self.models)
            message = f"The model `{model}` does not exist. Valid aliases: {aliases}."
            raise Refused(HTTPStatus.NOT_FOUND, "NotFoundError", message, "model")
        try:
            prompt = _chat_tokens(body["messages"]) if chat else _tokens(body["prompt"])
        except (KeyError, TypeError, AttributeError):
            refuse("Field required", "messages" if chat else "prompt")
        longest = self.options.max_model_len
        rest = longest - len(prompt)
        most = count("max_tokens", rest if chat else min(rest, 16))
        most = count("max_completion_tokens", most) if chat else most
        least = count("min_tokens", 0)
        if most < 1 or len(prompt) + most > longest:
            refuse(f"{len(prompt)} + {most} tokens, of max_model_len={longest}.", "max_tokens")
        if least > most:
            refuse(f"min_tokens must be at most max_tokens={most}, got {least}.", "min_tokens")
        ends = self.options.eos_after if not body.get("ignore_eos") else 0
        n_out = min(most, max(least, ends)) if ends else most
        top = None if body.get("prompt_logprobs") is None else count("prompt_logprobs", 0)
        if top is not None and body.get("stream"):
            refuse("`prompt_logprobs` are not available when `stream=True`.", "prompt_logprobs")
        truth = body.get("truth") or {}
        if not (isinstance(truth, dict) and all(type(v) in (int, float) for v in truth.values())):
            refuse("truth must map ttft_s, gap_s, stall_s, tokens_per_chunk to numbers.", "truth")

        self._arrived += 1
        index = headers.get("x-request-id", str(self._arrived))
        stream = bool(body.get("stream"))
        wanted = body.get("stream_options") or {}
        usage = bool(stream and wanted.get("include_usage"))
        kind = ("chat.completion" + ".chunk" * stream) if chat else "text_completion"
        name = ("chatcmpl-" if chat else "cmpl-") + index
        head = {"id": name, "object": kind, "created": int(time.time()), "model": model}
        return Request(
            connection=connection,
            received=time.monotonic(),
            index=index,
            head=json.dumps(head, separators=(",", ":"))[:-1] + ',"choices":[',
            model=model,
            adapter=model if model in self.adapters else None,
            mark=_mark(self.adapters.get(model)),
            salt=str(body.get("cache_salt") or ""),
            top=top,
            chat=chat,
            stream=stream,
            usage=usage,
            continuous=bool(usage and wanted.get("continuous_usage_stats")),
            prompt=prompt,
            n_out=n_out,
            stops=n_out < most or n_out == ends,
            truth=truth,
        )

    def look_up(self, request: Request) -> int:
        """How many of the prompt's tokens the prefix cache holds; holds all full blocks after.

        As in vLLM: whole blocks, each known by all that precedes it, and at least one token is
        left to compute. A prompt whose logprobs are wanted is computed whole.
        """
        if not self.options.enable_prefix_caching or request.top is not None:
            return 0
        prompt, size = request.prompt, self.options.block_size
        key, found, unbroken = hash((request.adapter, request.salt)), 0, True
        for i in range(0, len(prompt) - size + 1, size):
            key = hash((key, *prompt[i : i + size]))
            unbroken = unbroken and key in self._blocks and i + size < len(prompt)
            found += size * unbroken
            self._blocks.pop(key, None)
            self._blocks[key] = None
        while len(self._blocks) > self.blocks:
            del self._blocks[next(iter(self._blocks))]
        self.metrics.counters["prefix_cache_queries_total"] += len(prompt)
        self.metrics.counters["prefix_cache_hits_total"] += found
        return found

    def emit(self, request: Request, size: int, step: Step) -> int:
        """Sends a chunk of `size` tokens, or of what is left; returns how many."""
        metrics, counters = self.metrics, self.metrics.counters
        tokens = min(size, request.n_out - request.sent)
        last = request.sent + tokens == request.n_out
        reason = ("stop" if request.stops else "length") if last else ""
        text = ""
        if request.stream and request.chat and not (request.times or self.options.early_role_chunk):
            text = request.role_frame()
        request.sent += tokens
        if request.stream:
            text += request.content_frame(tokens, reason)
            if self.options.sse_comments and not last:
                text += PING
        payload = text.encode()
        now = time.monotonic()
        if payload:
            request.connection.transport.write(payload)
        if request.times:
            metrics.observe("inter_token_latency_seconds", now - request.times[-1])
        else:
            counters["prompt_tokens_total"] += len(request.prompt)
            metrics.observe("time_to_first_token_seconds", now - request.received)
        request.times.append(now)
        request.tokens.append(tokens)
        request.steps.append(step)
        counters["generation_tokens_total"] += tokens
        if 0 < self.options.die_after <= counters["generation_tokens_total"]:
            self.shut_down()
            os._exit(1)
        if last:
            self._close(request, reason)
        return tokens

    def abort(self, request: Request) -> None:
        """The client has gone."""
        self.scheduler.drop(request)
        self._close(request, "abort")

    def _close(self, request: Request, reason: str) -> None:
        request.finish = reason
        request.connection.request = None
        self._active.discard(request)
        self.metrics.finished[reason] += 1
        if reason in ("stop", "length"):
            first, last = request.times[0], request.times[-1]
            for name, value in {
                "request_prompt_tokens": len(request.prompt),
                "request_generation_tokens": request.sent,
                "request_time_per_output_token_seconds": (last - first) / max(1, request.sent - 1),
                "e2e_request_latency_seconds": last - request.received,
                "request_queue_time_seconds": request.scheduled - request.received,
                "request_inference_time_seconds": last - request.scheduled,
                "request_prefill_time_seconds": first - request.scheduled,
                "request_decode_time_seconds": last - first,
            }.items():
                self.metrics.observe(name, value)
            if request.stream:
                request.connection.write(request.closing_frames())
                request.connection.done()
            else:
                request.connection.respond(HTTPStatus.OK, request.whole())
        if self._log:
            self._to_log.append(request)
            if len(self._to_log) == 1:
                self.loop.call_soon(self._write_line)

    def _write_line(self) -> None:
        """One line a turn of the loop: requests that end together do not hold up the others."""
        if self._log and self._to_log:
            self._log.write(dumps(self._to_log.popleft().record()) + b"\n")
            if self._to_log:
                self.loop.call_soon(self._write_line)
            else:
                self._log.flush()

    def shut_down(self) -> None:
        """Logs what is under way as aborted, and all that is still to log."""
        for request in list(self._active):
            self._close(request, "abort")
        while self._to_log:
            self._write_line()


def _kv_blocks(options: argparse.Namespace) -> int:
    """Of the KV cache: as given, or as many as the memory holds of this model's in this type."""
    path = Path(options.model) / "config.json"
    if options.kv_cache_memory_bytes is None or not path.exists():
        return int(options.num_gpu_blocks_override)
    config = json.loads(path.read_text())
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    values = 2 * config["num_hidden_layers"] * (config.get("num_key_value_heads") or heads)
    each = 1 if options.kv_cache_dtype.startswith("fp8") else 2
    return int(options.kv_cache_memory_bytes // (options.block_size * values * head_dim * each))


def _mark(adapter: Path | None) -> str:
    path = adapter and adapter / "mark.txt"
    return path.read_text().strip() if path and path.exists() else ""


def _tokens(text: object) -> Sequence[object]:
    """A token a word, of a prompt, or the prompt itself when it is a list of token ids."""
    if isinstance(text, list) and all(isinstance(token, int) for token in text):
        return text
    if not isinstance(text, str):
        raise TypeError
    return text.split()


def _chat_tokens(messages: list[dict[str, Any]]) -> list[object]:
    """The words of all messages, and ten tokens of template before each."""
    tokens: list[object] = []
    for message in messages:
        content = message["content"]
        if not isinstance(content, str):
            content = " ".join(part["text"] for part in content)
        tokens += [message["role"]] * 10 + content.split()
    return tokens


class Connection(asyncio.Protocol):
    """HTTP/1.1, as much as clients use: keep-alive, content-length in, chunked out."""

    transport: asyncio.Transport

    def __init__(self, engine: Engine) -> None:
        self.request: Request | None = None
        self._engine, self._buffer, self._busy, self._keep = engine, bytearray(), False, True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.request:
            self._engine.abort(self.request)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        self._next()

    def _next(self) -> None:
        end = self._buffer.find(b"\r\n\r\n")
        if self._busy or end < 0:
            return
        first, *lines = self._buffer[:end].decode("latin-1").split("\r\n")
        fields = (line.partition(":") for line in lines)
        headers = {name.strip().lower(): value.strip() for name, _, value in fields}
        try:
            verb, target, version = first.split()
            stop = end + 4 + int(headers.get("content-length", 0))
            if "transfer-encoding" in headers:
                raise ValueError
        except ValueError:
            self._keep = False
            return self.respond(HTTPStatus.BAD_REQUEST, b"Invalid HTTP request received.")
        if len(self._buffer) >= stop:
            body = bytes(self._buffer[end + 4 : stop])
            del self._buffer[:stop]
            self._busy = True
            self._keep = version == "HTTP/1.1" and headers.get("connection", "") != "close"
            self._engine.answer(self, verb, target.partition("?")[0], headers, body)

    def write(self, text: str) -> None:
        self.transport.write(text.encode())

    def _head(self, status: HTTPStatus, *fields: str) -> str:
        date = f"date: {email.utils.formatdate(usegmt=True)}"
        close = () if self._keep else ("connection: close",)
        first = f"HTTP/1.1 {status.value} {status.phrase}"
        return "\r\n".join((first, date, "server: fake-engine", *fields, *close)) + "\r\n\r\n"

    def start_stream(self) -> None:
        kind = "content-type: text/event-stream; charset=utf-8"
        self.write(self._head(HTTPStatus.OK, kind, "transfer-encoding: chunked"))

    def respond(self, status: HTTPStatus, body: bytes, kind: str = "application/json") -> None:
        head = self._head(status, f"content-length: {len(body)}", f"content-type: {kind}")
        self.transport.write(head.encode() + body)
        self.done()

    def respond_json(self, value: Any, status: HTTPStatus = HTTPStatus.OK) -> None:
        self.respond(status, dumps(value))

    def done(self) -> None:
        """The response is complete: the connection takes the next request."""
        self.request, self._busy = None, False
        if not self._keep:
            self.transport.close()
        elif self._buffer:
            self._engine.loop.call_soon(self._next)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options. Flags of vLLM that are not listed are named on stderr and ignored."""
    parser = argparse.ArgumentParser(
        prog="engine.py",
        description="A fake vLLM with a known latency law. It answers as vLLM 0.32 does, takes "
        "vLLM's flags (those it does not know it ignores) and records what it really sent.",
        epilog="Example: engine.py --port 8000 --model m --step-s .02 --log sent.jsonl",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument_group("as in vLLM").add_argument
    add("--port", type=int, default=8000, help="on 127.0.0.1; 0 takes a free one, see stderr")
    add("--model", default="fake", help="the model's name")
    add("--served-model-name", nargs="+", help="the names clients use instead of --model")
    add("--enable-lora", action="store_true", help="adapters can be loaded and are counted")
    add("--lora-modules", nargs="+", default=[], help="NAME=PATH: adapters, served by name")
    add("--max-loras", type=int, default=1, help="adapters in a batch")
    add("--max-model-len", type=int, default=8192, help="prompt and output together, in tokens")
    add("--max-num-seqs", type=int, default=256, help="the largest batch; other requests wait")
    add("--max-num-batched-tokens", type=int, default=8192, help="tokens computed in a step")
    add("--enable-chunked-prefill", action=argparse.BooleanOptionalAction, default=True,
        help="prefill a prompt in pieces where it exceeds what a step has left")  # fmt: skip
    add("--enable-prefix-caching", action=argparse.BooleanOptionalAction, default=True,
        help="keep prompts' full blocks and do not prefill them again")  # fmt: skip
    add("--block-size", type=int, default=16, help="tokens in a block of the KV cache")
    add("--num-gpu-blocks-override", type=int, default=8192, help="blocks in the KV cache")
    add("--kv-cache-memory-bytes", type=int, help="instead, where the model has a config.json")
    add("--kv-cache-dtype", default="auto", help="fp8 and its kin hold twice the tokens")
    add("--speculative-config", type=json.loads, default={}, help="num_speculative_tokens of it")
    add("--enforce-eager", action=argparse.BooleanOptionalAction, default=False,
        help="said in the log, and nothing else")  # fmt: skip
    add("--seed", type=_seed, default=0, help="of what is random; `any`: another at each start")
    add = parser.add_argument_group("the law").add_argument
    add("--step-s", type=float, default=0.02, help="length of a step, before what follows")
    add("--step-per-seq-s", type=float, default=0.0005, help="more for each running sequence")
    add("--prefill-per-token-s", type=float, default=0.0001,
        help="more for each prompt token that the step prefills")  # fmt: skip
    add("--tokens-per-chunk", type=int, default=1, metavar="K",
        help="tokens a sequence gets in a step, after its first, as with speculation")  # fmt: skip
    add("--acceptance", type=float, default=0.6, help="chance of each drafted token in turn")
    add("--jitter", type=float, default=0.0, help="sigma of a lognormal factor (mean 1) on steps")
    add("--drift", type=float, default=0.0, help="of another, which changes over --drift-s")
    add("--drift-s", type=float, default=3.0, metavar="S", help="its correlation time")
    add("--start-spread", type=float, default=0.0, help="of a third, drawn once at the start")
    add("--slowdown", type=float, default=1.0, help="multiplies every time of the law")
    add("--eos-after", type=int, default=128, metavar="N",
        help="a sequence stops by itself after N tokens (not before min_tokens) unless it asks "
        "for ignore_eos; 0: never")  # fmt: skip
    add("--programmed", action="store_true",
        help='no scheduler: each request is answered by its own "truth" (see the module), '
        "every chunk, the first too, of its tokens_per_chunk")  # fmt: skip
    add = parser.add_argument_group("odd, but allowed").add_argument
    add("--early-role-chunk", action="store_true",
        help="chat's role chunk goes out on arrival, not just before the first token")  # fmt: skip
    add("--sse-comments", action="store_true", help='": ping" lines between the chunks')
    add = parser.add_argument_group("faults").add_argument
    add("--start-delay", type=float, default=0.0, metavar="S", help="connections refused for S s")
    add("--fail-start", metavar="MESSAGE", help="a traceback that ends with MESSAGE, and exit 1")
    add("--error-every", type=int, default=0, metavar="N", help="each Nth completion gets a 500")
    add("--stall-after", type=int, default=0, metavar="N",
        help="the scheduler pauses once N tokens were sent in all")  # fmt: skip
    add("--stall-s", type=float, default=1.0, metavar="S", help="for so long")
    add("--keep-prefix-cache", action="store_true", help="it says it was reset, and was not")
    add("--drop", metavar="FLAG", type=lambda flag: flag.replace("-", "_"),
        help="one of vLLM's flags, as in max-num-seqs: it never gets here")  # fmt: skip
    add("--die-after", type=int, default=0, metavar="N",
        help="the process exits with 1, in mid-stream, once N tokens were sent in all")  # fmt: skip
    add = parser.add_argument_group("the record").add_argument
    add("--log", metavar="FILE", help="a JSON line a request: what was sent, and when")

    words = []
    for word in argv:  # vLLM takes --max_num_seqs for --max-num-seqs
        flag, equals, value = word.partition("=")
        words.append((flag.replace("_", "-") if flag[:2] == "--" else flag) + equals + value)
    options, others = parser.parse_known_args(words)
    if options.drop:
        setattr(options, options.drop, parser.get_default(options.drop))
    if others:
        if not others[0].startswith("-"):
            parser.error(f"not an option: {others[0]}")
        print("Ignored:", *others, file=sys.stderr)
    for name in ("step_s", "step_per_seq_s", "prefill_per_token_s"):
        if not options.programmed:  # there `slowdown` acts on each request's own times
            setattr(options, name, getattr(options, name) * options.slowdown)
    return options


def _seed(text: str) -> int | None:
    return None if text == "any" else int(text)


def fail(message: str) -> NoReturn:
    where = '  File "vllm/v1/engine/core.py", line 1, in run_engine_core\n    raise RuntimeError'
    print(f"Traceback (most recent call last):\n{where}\n{message}", file=sys.stderr)
    sys.exit(1)


async def serve(options: argparse.Namespace) -> None:
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(stop.wait(), options.start_delay)
    with open(options.log or os.devnull, "wb") as log:
        engine = Engine(options, log if options.log else None)
        make = partial(Connection, engine)
        server = await loop.create_server(make, "127.0.0.1", options.port, backlog=4096)
        port = server.sockets[0].getsockname()[1]
        print("Initializing a V1 LLM engine (a fake) with config:"
              f" enforce_eager={options.enforce_eager}", file=sys.stderr)  # fmt: skip
        print(f"Listening on http://127.0.0.1:{port}", file=sys.stderr, flush=True)
        gc.freeze()
        gc.disable()  # its pauses would show in the stamps; nothing here makes cycles that grow
        await stop.wait()
        server.close()
        engine.shut_down()


def main() -> None:
    options = parse(sys.argv[1:])
    if options.fail_start is not None:
        fail(options.fail_start)
    asyncio.run(serve(options))  # the standard loop, whose transports send within write()


if __name__ == "__main__":
    main()
