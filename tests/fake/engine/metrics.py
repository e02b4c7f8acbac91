"""What /metrics shows: vLLM's names, labels and buckets, in the format that Prometheus reads."""

from __future__ import annotations

import itertools
import json
import time
from bisect import bisect_left
from collections.abc import Sequence

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
            "prefix_cache_hits_total", "num_preemptions_total",
            "admission_rejections_total")  # fmt: skip
SPECULATION = ("spec_decode_num_drafts_total", "spec_decode_num_draft_tokens_total",
               "spec_decode_num_accepted_tokens_total")  # fmt: skip
ACCEPTED_AT = "spec_decode_num_accepted_tokens_per_pos_total"


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
