"""The engine: hands requests to the scheduler, and sends, counts and records what that emits."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from http import HTTPStatus
from pathlib import Path

from tokenizers import Tokenizer

from serving.plugins import random_weights
from tests.fake.engine import answers
from tests.fake.engine.alarm import Alarm
from tests.fake.engine.kv_cache import KVCache
from tests.fake.engine.metrics import Metrics
from tests.fake.engine.request import Request, Step
from tests.fake.engine.request_log import RequestLog
from tests.fake.engine.scheduler import Batching, Programmed


class Engine:
    def __init__(self, options: argparse.Namespace, alarm: Alarm, log: RequestLog) -> None:
        self.options = options
        self.names: list[str] = options.served_model_name or [options.model]
        self.adapters = {  # name -> folder
            name: Path(folder)
            for name, _, folder in (m.partition("=") for m in options.lora_modules)
        }
        self.tokenizer = _tokenizer_of(Path(options.model))
        self.metrics = Metrics(options.guesses)
        self.cache = KVCache(options, self.metrics)
        self.scheduler = (
            Programmed(options, alarm, self.metrics, self.emit)
            if options.programmed
            else Batching(options, alarm, self.cache, self.metrics, self.emit)
        )
        self.routing = ""  # the strategy by which tokens go to experts, until the log names it
        self._log = log
        self._active: set[Request] = set()

    @property
    def models(self) -> list[str]:
        """Every name that a client may ask for."""
        return [*self.names, *self.adapters]

    def is_full(self) -> bool:
        """Whether a limit on the queue turns the next request away, which is counted then."""
        most, most_tokens = self.options.max_num_queued_reqs, self.options.max_num_queued_tokens
        full = most is not None and len(self._active) >= most
        if not full and most_tokens is not None:
            full = sum(len(r.prompt) for r in self._active if not r.times) >= most_tokens
        self.metrics.counters["admission_rejections_total"] += full
        return full

    def start(self, family: Sequence[Request]) -> None:
        """Serve the answers to one HTTP request; a stream's headers go out at once."""
        first = family[0]
        if self.routing:
            print(random_weights.ROUTED.format(self.routing), file=sys.stderr, flush=True)
            self.routing = ""
        self._active.update(family)
        first.connection.if_lost = lambda: self._abort(family)
        if first.stream:
            first.connection.start_stream()
            if first.chat and self.options.early_role_chunk:
                for request in family:
                    first.connection.write(answers.role_frame(request))
        for request in family:
            self.scheduler.arrive(request)

    def emit(self, request: Request, size: int, step: Step) -> int:
        """Sends a chunk of `size` tokens, or of what is left; returns how many."""
        metrics, counters = self.metrics, self.metrics.counters
        tokens = min(size, request.n_out - request.sent)
        last = request.sent + tokens == request.n_out
        reason = ("stop" if request.stops else "length") if last else ""
        text = ""
        if request.stream and request.chat and not (request.times or self.options.early_role_chunk):
            text = answers.role_frame(request)
        request.sent += tokens
        if request.stream:
            text += answers.content_frame(request, tokens, reason)
            if self.options.sse_comments and not last:
                text += answers.PING
        payload = text.encode()
        now = time.monotonic()
        if payload:
            request.connection.send(payload)
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
            self.close(request, reason)
        return tokens

    def _abort(self, family: Sequence[Request]) -> None:
        """The client has gone."""
        for request in family:
            if not request.finish:
                self.scheduler.drop(request)
                self.close(request, "abort")

    def close(self, request: Request, reason: str) -> None:
        """The request has ended for this reason: complete its answer, count and record it.

        The last of a family ends the HTTP response.
        """
        request.finish = reason
        if request.all_ended:
            request.connection.if_lost = None
        self._active.discard(request)
        self.metrics.finished[reason] += 1
        if reason in ("stop", "length"):
            self._observe(request)
        if reason in ("stop", "length") and request.all_ended:
            if request.stream:
                request.connection.write(answers.closing_frames(request))
                request.connection.done()
            else:
                request.connection.respond(HTTPStatus.OK, answers.whole(request))
        self._log.add(request)

    def _observe(self, request: Request) -> None:
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

    def metrics_text(self) -> str:
        """What /metrics shows now."""
        options, cache = self.options, self.cache
        running, waiting = self.scheduler.running, self.scheduler.waiting
        gauges = {
            "num_requests_running": len(running),
            "num_requests_waiting": len(waiting),
            "kv_cache_usage_perc": min(1.0, cache.filled(running) / cache.blocks),
        }
        config = {
            "block_size": str(options.block_size),
            "kv_cache_memory_bytes": str(options.kv_cache_memory_bytes),
            "cache_dtype": options.kv_cache_dtype,
            "enable_prefix_caching": str(options.enable_prefix_caching),
            "num_gpu_blocks": str(cache.blocks),
            "sliding_window": str(options.hf_overrides.get("sliding_window")),
        }
        lora = {
            "max_lora": str(options.max_loras),
            "running_lora_adapters": ",".join({r.adapter for r in running if r.adapter}),
            "waiting_lora_adapters": ",".join({r.adapter for r in waiting if r.adapter}),
        }
        return self.metrics.render(
            self.names[0], gauges, config, lora if options.enable_lora else None
        )

    def shut_down(self) -> None:
        """Records what is under way as aborted, and all that is still to record."""
        for request in list(self._active):
            self.close(request, "abort")
        self._log.write_all()


def _tokenizer_of(folder: Path) -> Tokenizer | None:
    """The tokenizer of the model that is served; a model without a folder has none."""
    path = folder / "tokenizer.json"
    return Tokenizer.from_file(str(path)) if path.exists() else None
