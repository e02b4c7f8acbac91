"""vLLM's own engine core, whose model takes virtual time instead of computing.

`EngineCore` is built from the arguments that an engine would be started with: its scheduler, its KV
cache manager, its prefix cache, its preemptions and its bookkeeping of drafts are those that will
serve. Only the executor is the lab's: instead of a forward pass it advances a virtual clock by the
time that the step would take (`serving/simulator/step.py`) and returns tokens.

This module imports vLLM, so it runs in the engine's environment only. Tested with vLLM 0.26 (its
CUDA build, without a GPU) to 0.32 (on a CPU); tests/golden/ holds what each version plays.
"""

from __future__ import annotations

import contextlib
import math
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from vllm.engine.arg_utils import EngineArgs
from vllm.lora.request import LoRARequest
from vllm.platforms import current_platform
from vllm.sampling_params import SamplingParams
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine.core import EngineCore
from vllm.v1.executor.abstract import Executor
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
from vllm.v1.request import Request

from serving.metrics import KvUse
from serving.simulator.ngram_acceptance import Copied
from serving.simulator.step import Masking, Piece, Step, StepTimes, mask_threads
from serving.simulator.traffic import Prompt

TOKEN = 1  # the token that every answer is made of


@dataclass
class Clock:
    """Virtual seconds since the engine began, and what its steps take and bring."""

    step_times: StepTimes
    draft_times: StepTimes | None = None  # of the draft model; None where there is none
    now_s: float = 0.0
    device_free_s: float = 0.0  # when the last step that was handed to the device ends
    preemptions: int = 0
    acceptance: float = 0.0  # probability that a draft token is accepted, each by itself
    guessed: float = 1.0  # probability that a step has drafts at all, each request by itself
    copied: dict[str, Copied] = field(default_factory=dict)  # by request, in place of both chances
    pace: float = 1.0  # a step takes so many times as long
    masking: Masking | None = None  # of every answer, where they have a structure
    rng: random.Random = field(default_factory=lambda: random.Random(0))


class UnderWay(Future[Any]):
    """The output of a step that the device is still at: whoever waits for it waits until its end.

    An engine that schedules asynchronously, as on CUDA by default, plans the next step meanwhile.
    """

    def __init__(self, output: ModelRunnerOutput, clock: Clock) -> None:
        super().__init__()
        self.clock, self.ends_s = clock, clock.device_free_s
        self.set_result(output)

    def result(self, timeout: float | None = None) -> Any:
        """Let the clock move on to the step's end, and return its output."""
        self.clock.now_s = max(self.clock.now_s, self.ends_s)
        return super().result()


class VirtualExecutor(Executor):  # type: ignore[misc]
    """Stands in for the engine's workers: a forward pass takes virtual time and no computing.

    vLLM calls a worker's method by name (`collective_rpc`); each that it calls is here under that
    name with an underscore, and all others return None.
    """

    clock: Clock

    def _init_executor(self) -> None:
        self.drafts: DraftTokenIds | None = None
        self.context_tokens: dict[str, int] = {}
        self.prompt_tokens: dict[str, int] = {}
        self.written: Counter[str] = Counter()  # tokens of each answer

    def check_health(self) -> None:
        """Do nothing: there is no worker that could fail."""

    def collective_rpc(
        self,
        method: Any,
        timeout: float | None = None,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        non_block: bool = False,
    ) -> Any:
        """Call a method of the only worker; return its result in a list, or in a future."""
        result = getattr(self, f"_{method}", lambda *_: None)(*args)
        if non_block:
            future: Future[Any] = Future()
            future.set_result([result])
            return future
        return [result]

    # what vLLM calls as the engine starts

    def _get_kv_cache_spec(self) -> dict[str, Any]:
        config, parallel = self.model_config, self.parallel_config
        sizes = {
            "block_size": self.cache_config.block_size,
            "num_kv_heads": config.get_num_kv_heads(parallel),
            "head_size": config.get_head_size(),
            "dtype": _cache_dtype(self.cache_config.cache_dtype, config.dtype),
        }
        window = self.cache_config.sliding_window
        spec = (
            SlidingWindowSpec(**sizes, sliding_window=window)
            if window
            else FullAttentionSpec(**sizes)
        )
        return {f"layers.{i}.attn": spec for i in range(config.get_num_layers(parallel))}

    def _get_supported_kv_cache_layouts(self) -> list[str]:
        return ["LBHNC"]

    def _set_kv_cache_layout(self, name: str) -> None:
        self.cache_config.kv_cache_layout = name

    def _determine_available_memory(self) -> int:
        return int(self.cache_config.kv_cache_memory_bytes or 4 * 2**30)

    def initialize_from_config(self, kv_cache_configs: Any) -> None:
        """Do nothing: there is no cache to fill, nor, as in vLLM 0.26, a kernel to compile."""

    def compile_or_warm_up_model(self) -> None:
        """Do nothing: no kernel is compiled."""

    def _get_supported_tasks(self) -> tuple[str, ...]:
        return ("generate",)

    def _add_lora(self, *_: Any) -> bool:
        return True

    # a step

    def execute_model(self, scheduler_output: Any, non_block: bool = False) -> Any:
        """Begin a step in virtual time; return its output, or what waits for it."""
        self.under_way = UnderWay(self._forward(scheduler_output), self.clock)
        return self.under_way if non_block else self.under_way.result()

    def sample_tokens(self, grammar_output: Any, non_block: bool = False) -> Any:
        """Return what `execute_model` did, where an engine asks for the tokens by themselves."""
        return self.under_way if non_block else self.under_way.result()

    def _forward(self, scheduled: Any) -> ModelRunnerOutput:
        for request_id in scheduled.finished_req_ids:
            self.context_tokens.pop(request_id, None)
            self.prompt_tokens.pop(request_id, None)
            self.written.pop(request_id, None)
            self.clock.copied.pop(request_id, None)
        for new in scheduled.scheduled_new_reqs:
            self.context_tokens[new.req_id] = new.num_computed_tokens
            self.prompt_tokens[new.req_id] = len(new.prompt_token_ids)
        cached = scheduled.scheduled_cached_reqs
        for request_id, computed in zip(cached.req_ids, cached.num_computed_tokens, strict=True):
            self.context_tokens[request_id] = computed
        pieces: list[Piece] = []
        sampled: dict[str, list[int]] = {}
        drafts, window = scheduled.scheduled_spec_decode_tokens, self.cache_config.sliding_window
        for request_id, tokens in scheduled.num_scheduled_tokens.items():
            before = self.context_tokens[request_id]
            pieces.append(Piece(tokens, min(before, window) if window else before))
            known = self.prompt_tokens[request_id] + self.written[request_id]
            if before + tokens < known:  # more of what is to be computed comes in a later step
                sampled[request_id] = []
                continue
            guesses = len(drafts[request_id]) if request_id in drafts else 0
            accepted = self._accepted(request_id, guesses) if guesses else 0
            sampled[request_id] = [TOKEN] * (1 + accepted)
            self.written[request_id] += 1 + accepted
        self.clock.preemptions += len(scheduled.preempted_req_ids or ())
        sampling = [request_id for request_id, tokens in sampled.items() if tokens]
        verified = sum(len(drafts.get(request_id, ())) for request_id in sampling) if drafts else 0
        drafting_s = self._drafting_s(Step(pieces, len(sampling)))
        step = Step(pieces, len(sampling) + verified)
        forward_s = self.clock.step_times.seconds(step) + drafting_s
        takes_s = self.clock.pace * max(forward_s, self._masking_s(len(sampling)))
        self.clock.device_free_s = max(self.clock.now_s, self.clock.device_free_s) + takes_s
        self.drafts = self._draft(sampled)
        ids = list(sampled)
        return ModelRunnerOutput(
            req_ids=ids,
            req_id_to_index={request_id: i for i, request_id in enumerate(ids)},
            sampled_token_ids=[sampled[request_id] for request_id in ids],
        )

    def _masking_s(self, sequences: int) -> float:
        """Add up the seconds of filling masks, which the engine core does during the step."""
        masking = self.clock.masking
        if masking is None or not sequences:
            return 0.0
        return sequences * masking.mask_s / mask_threads(sequences, masking.processors)

    def _accepted(self, request_id: str, guesses: int) -> int:
        """Say how many guesses are accepted before the first that is rejected.

        It is known of an answer that was read beforehand, and drawn by chance for any other.
        """
        if copied := self._copied(request_id):
            return min(guesses, copied[1])
        accepted = 0
        while accepted < guesses and self.clock.rng.random() < self.clock.acceptance:
            accepted += 1
        return accepted

    def _copied(self, request_id: str) -> tuple[int, int] | None:
        """Return (guesses, accepted) after what is written of an answer; None where unknown."""
        copied, written = self.clock.copied.get(request_id), self.written[request_id]
        return copied[min(written, len(copied)) - 1] if copied and written else None

    def _drafting_s(self, step: Step) -> float:
        """Add up the draft model's seconds: one pass over the step's tokens, then one a guess."""
        draft_times = self.clock.draft_times
        if draft_times is None or self.speculative_config is None or not step.rows:
            return 0.0
        alone = Step([Piece(1, p.context_tokens + p.tokens) for p in step.pieces], step.rows)
        more = int(self.speculative_config.num_speculative_tokens) - 1
        return draft_times.seconds(step) + more * draft_times.seconds(alone)

    def _draft(self, sampled: dict[str, list[int]]) -> DraftTokenIds | None:
        if self.speculative_config is None:
            return None
        ids = [request_id for request_id, tokens in sampled.items() if tokens]
        return DraftTokenIds(ids, [[TOKEN] * self._guesses(request_id) for request_id in ids])

    def _guesses(self, request_id: str) -> int:
        """Say how many tokens are guessed for a request's next step; maybe by chance."""
        if copied := self._copied(request_id):
            return copied[0]
        found = self.clock.guessed >= 1 or self.clock.rng.random() < self.clock.guessed
        return int(self.speculative_config.num_speculative_tokens) if found else 0

    def take_draft_token_ids(self) -> DraftTokenIds | None:
        """Return the guesses of the last step, as the engine core asks after it."""
        return self.drafts

    def shutdown(self) -> None:
        """Do nothing: there are no workers to end."""


@contextlib.contextmanager
def _scheduling_as_on_cuda() -> Iterator[None]:
    """Leave it to vLLM's flags whether it schedules asynchronously: it never does on a CPU."""
    platform = type(current_platform)
    check = platform.check_and_update_config

    def checked(config: Any) -> None:
        scheduler = config.scheduler_config
        chosen = scheduler.async_scheduling
        check(config)
        scheduler.async_scheduling = chosen

    platform.check_and_update_config = staticmethod(checked)
    try:
        yield
    finally:
        platform.check_and_update_config = check


class VirtualEngine:
    """An engine that schedules as vLLM would with these arguments, and serves in virtual time.

    Raises what vLLM raises for arguments that it does not accept, or memory that is too small.
    """

    def __init__(
        self,
        argv: Sequence[str],
        step_times: StepTimes,
        draft_times: StepTimes | None = None,
        on_cuda: bool = False,
    ) -> None:
        """Build the engine core; `draft_times` are the draft model's, None for n-grams.

        With `on_cuda` it schedules as vLLM does on CUDA, also where this vLLM is for a CPU.
        """
        parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
        given = EngineArgs.from_cli_args(parser.parse_known_args(list(argv))[0])
        given.skip_tokenizer_init = True  # requests come as tokens
        with _scheduling_as_on_cuda() if on_cuda else contextlib.nullcontext():
            config = given.create_engine_config()
        self.clock = Clock(step_times, draft_times)
        executor = type("Executor", (VirtualExecutor,), {"clock": self.clock})
        self.core = EngineCore(config, executor_class=executor, log_stats=True)
        limits = config.scheduler_config  # which an older vLLM has no limits of the queue in
        self.most_requests = getattr(limits, "max_num_queued_reqs", None)
        self.most_prompt_tokens = getattr(limits, "max_num_queued_tokens", None)
        self.prefilling: dict[str, int] = {}  # request -> its prompt's tokens, before its first
        self.unfinished: set[str] = set()
        self.counters: Counter[str] = Counter()
        self.kv_shares: list[tuple[float, float]] = []  # (when a step ended, in use from then on)
        self.found_tokens: list[int] = []  # in the prefix cache, after each request so far
        self.adapters: dict[str, int] = {}

    def begin_anew(self, step_times: StepTimes, draft_times: StepTimes | None = None) -> None:
        """Let an idle engine be as one that was just built with such steps, which takes longer."""
        self.clock = self.core.model_executor.clock = Clock(step_times, draft_times)
        self.read_counters()
        self.reset_prefix_cache()

    def add(self, request_id: str, prompt: Prompt) -> bool:
        """Hand a request to the scheduler; it ends at its number of output tokens.

        Returns False where a limit on the queue turns it away. vLLM's API server checks these
        limits, which is not here, so this repeats its rule (`AsyncLLM.check_admission`).
        """
        most, most_tokens = self.most_requests, self.most_prompt_tokens
        if (most is not None and len(self.unfinished) + 1 > most) or (
            most_tokens is not None and sum(self.prefilling.values()) >= most_tokens
        ):
            self.counters["turned_away"] += 1
            return False
        self.unfinished.add(request_id)
        self.prefilling[request_id] = len(prompt.token_ids)
        lora = None
        if prompt.adapter:
            number = self.adapters.setdefault(prompt.adapter, len(self.adapters) + 1)
            lora = LoRARequest(prompt.adapter, number, "no path: the adapter is never loaded")
        request = Request(
            request_id=request_id,
            prompt_token_ids=list(prompt.token_ids),
            sampling_params=SamplingParams(
                max_tokens=prompt.output_tokens, ignore_eos=True, temperature=0
            ),
            lora_request=lora,
            pooling_params=None,
            arrival_time=self.clock.now_s,
            priority=prompt.priority,
            cache_salt=prompt.salt,
            block_hasher=self.core.request_block_hasher,
        )
        if prompt.copied:
            self.clock.copied[request_id] = prompt.copied
        self.core.add_request(request)
        return True

    def step(self, before_s: float = math.inf) -> dict[str, tuple[int, bool]]:
        """Run one step; return request -> (new tokens, whether they were its last).

        A step that has begun goes on to its end, whatever comes at `before_s`.
        """
        outputs, executed = self.core.step_fn()
        self.core.post_step(executed)
        for client in (outputs or {}).values():
            self._count(client.scheduler_stats)
        received = {
            output.request_id: (len(output.new_token_ids), output.finish_reason is not None)
            for client in (outputs or {}).values()
            for output in client.outputs
        }
        for request_id, (tokens, last) in received.items():
            if tokens:
                self.prefilling.pop(request_id, None)
            if last:
                self.unfinished.discard(request_id)
        return received

    def _count(self, stats: Any) -> None:
        """Add what vLLM's `/metrics` would have counted in this step."""
        if stats is None:
            return
        self.kv_shares.append((self.clock.now_s, stats.kv_cache_usage))
        if prefix := stats.prefix_cache_stats:
            # as in vLLM's own metrics, without those of requests that were preempted before
            self.counters["prefix_queries"] += prefix.queries
            before = self.counters["prefix_hits"]
            self.counters["prefix_hits"] += prefix.hits
            # those that begin in one step have found a like share each, as far as is counted
            shares = (prefix.hits * i // prefix.requests for i in range(1, prefix.requests + 1))
            self.found_tokens += [before + share for share in shares]
        if drafts := stats.spec_decoding_stats:
            self.counters["drafts"] += drafts.num_drafts
            self.counters["draft_tokens"] += drafts.num_draft_tokens
            self.counters["accepted_tokens"] += drafts.num_accepted_tokens

    def read_counters(self) -> dict[str, int]:
        """Return the counts since this was last called, and start them at 0 again."""
        counts = {**self.counters, "preemptions": self.clock.preemptions}
        self.counters.clear()
        self.clock.preemptions = 0
        self.kv_shares.clear()
        self.found_tokens = []
        return counts

    def kv_use(self, start_s: float, end_s: float) -> KvUse | None:
        """Tell which share of the KV cache was in use between two times of the engine's clock.

        As in vLLM's gauge, what a step leaves holds until the next one has ended. Counted since
        `read_counters` was last called; None where no time lies between the two.
        """
        return KvUse.over_time(self.kv_shares, start_s, end_s)

    @property
    def kv_share(self) -> float:
        """The share of the KV cache that the last step left in use; 0 of an idle engine."""
        return self.kv_shares[-1][1] if self.busy and self.kv_shares else 0.0

    @property
    def kv_capacity_tokens(self) -> int:
        """The tokens of all blocks of the KV cache, with the one that vLLM keeps for itself."""
        config = self.core.scheduler.kv_cache_config
        return int(config.num_blocks * self.core.scheduler.block_size)

    @property
    def now_s(self) -> float:
        """Virtual seconds since the engine was built, or began anew."""
        return self.clock.now_s

    def wait_until(self, at_s: float) -> None:
        """Advance an idle engine's clock to `at_s`, if that is later."""
        self.clock.now_s = max(self.clock.now_s, at_s)

    @property
    def busy(self) -> bool:
        """Whether any request is running or waiting, or a step is under way."""
        return bool(self.core.scheduler.has_requests() or self.core.batch_queue)

    def reset_prefix_cache(self) -> None:
        """Forget all cached prefixes, as before a trial on a real engine."""
        self.core.reset_prefix_cache()


def _cache_dtype(name: str, model_dtype: Any) -> Any:
    import torch

    return torch.uint8 if name.startswith("fp8") else model_dtype
