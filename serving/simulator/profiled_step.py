"""The stand-in step: the model's own shape with random weights, timed on the serving device.

No engine exists yet, and no weights are needed: matrices of the model's sizes hold random numbers.
A layer is what a decoder's layer is (two norms, the projections, rotary embedding, attention over
a cache, a gated MLP), launched operation by operation on a CPU, so that the cost of launching is in
the figures. On a GPU the operations are recorded as a CUDA graph and replayed, as vLLM replays its
steps; its compiled kernels do several of these operations at once, so that a small step of it may
take less. All layers have weights of their own, so that no cache holds them. Each size is timed
several times, in turn with all others. The middle time is kept: the machine's speed wanders, and
an engine cannot choose its moments. How far it lies above the least widens the forecast.

On a CPU vLLM's own model is timed (`serving/simulator/engine_model.py`): torch's operators take
another time, and it has none for quantized weights and caches. On a GPU all is plain torch.

Adapters (LoRA) are applied by vLLM's own operators on a CPU: each token gathers the two thin
matrices of its adapter, for each of the seven projections of a layer. An engine that is ready for
adapters prepares for them at every projection, and adds to every row of logits, asked for or not.
On a GPU vLLM has operators of its own within CUDA graphs, and adapters are not timed.

It does not cover compiled steps, the scheduler's own time, and on a GPU experts and whatever
operators of the engine's own differ from torch's.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import BaseModel

from serving.hardware import gpus, reference_step
from serving.hardware.reference_step import ReferenceStep
from serving.models.catalog import shape_of
from serving.simulator.step import StepTimes

if TYPE_CHECKING:
    from serving.simulator.engine_model import EngineModel

CONTEXT_TOKENS = 32  # the timed layers attend to so many; longer contexts are timed separately
LONG_CONTEXT_TOKENS = 2048
PREFILL_TOKENS = 512
LONG_S = 0.5  # the longest work that is warmed up
ENOUGH_S = 2.0  # a work on which so much time has been spent is not timed again
PASSES, QUICK_PASSES = 6, 3  # of three the middle still tells how the machine's speed wanders
CACHE_FLAGS = ("--kv-cache-dtype", "--block-size")

Work = Callable[[], None]


class TimingPlan(BaseModel, frozen=True, extra="forbid"):
    """Describes what to time: a model's shape, the device, and the sizes of steps."""

    config: Path  # the model's config.json
    device: str  # `cpu` or `cuda`
    cores: tuple[int, ...] = ()  # a CPU engine's cores: one thread on each
    tokens: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
    rows: tuple[int, ...] = (1, 4, 16, 64)
    # slots for LoRA adapters, on a CPU; 0: the engine is not ready for any
    adapters: int = 0
    adapter_rank: int = 0
    adapters_asked_for: bool = True  # by the requests
    engine_argv: tuple[str, ...] = ()  # where the engine's own model is to be timed
    passes: int = PASSES


class Decoder:
    """The layers of a model's shape in plain torch, with random weights.

    Raises KeyError where `config` lacks a size of a Llama-like decoder.
    """

    def __init__(self, config: dict[str, Any], device: str) -> None:
        import torch

        self.torch, self.device = torch, device
        self.dtype = gpus.type_of_16_bits(torch, device)
        self.layers, hidden = config["num_hidden_layers"], config["hidden_size"]
        self.heads = config["num_attention_heads"]
        self.kv_heads = config.get("num_key_value_heads") or self.heads
        self.head_dim = config.get("head_dim") or hidden // self.heads
        self.hidden, self.inner = hidden, config["intermediate_size"]
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        self.sizes = [q, kv, kv]

        def matrix(rows: int, columns: int) -> Any:
            return torch.randn(rows, columns, device=device, dtype=self.dtype) * 0.02

        self.weights = [
            (
                matrix(q + 2 * kv, hidden),
                matrix(hidden, q),
                matrix(2 * self.inner, hidden),
                matrix(hidden, self.inner),
                torch.ones(hidden, device=device, dtype=self.dtype),
            )
            for _ in range(self.layers)
        ]
        self.head_weights = matrix(config["vocab_size"], hidden)

    def rotated(self, x: Any, cos: Any, sin: Any) -> Any:
        """Apply rotary embedding to x, of shape (tokens, heads, head dimension)."""
        first, second = x.chunk(2, dim=-1)
        return self.torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

    def linear(self, tokens: int) -> Callable[[], None]:
        """Return the work of all layers over `tokens`, each with CONTEXT_TOKENS of context."""
        torch, f = self.torch, self.torch.nn.functional
        x = torch.randn(tokens, self.hidden, device=self.device, dtype=self.dtype)
        angle = torch.rand(tokens, 1, self.head_dim // 2, device=self.device).to(self.dtype)
        keys, values = (
            torch.randn(1, self.kv_heads, CONTEXT_TOKENS, self.head_dim, device=self.device).to(
                self.dtype
            )
            for _ in range(2)
        )
        size = [self.hidden]

        def run() -> None:
            h = x
            for qkv_w, out_w, up_w, down_w, norm_w in self.weights:
                projected = f.linear(f.rms_norm(h, size, norm_w), qkv_w)
                q, k, v = projected.split(self.sizes, dim=-1)
                q = self.rotated(q.view(tokens, self.heads, -1), angle, angle)
                k = self.rotated(k.view(tokens, self.kv_heads, -1), angle, angle)
                keys[0, :, 0] = k[0]
                values[0, :, 0] = v[0].view(self.kv_heads, -1)
                attended = f.scaled_dot_product_attention(
                    q.transpose(0, 1).unsqueeze(0), keys, values, enable_gqa=True
                )
                h = h + f.linear(attended[0].transpose(0, 1).reshape(tokens, -1), out_w)
                gate, up = f.linear(f.rms_norm(h, size, norm_w), up_w).chunk(2, dim=-1)
                h = h + f.linear(f.silu(gate) * up, down_w)

        return run

    def head(self, rows: int) -> Callable[[], None]:
        """Return the work of the output head and greedy sampling over `rows` positions."""
        torch = self.torch
        x = torch.randn(rows, self.hidden, device=self.device, dtype=self.dtype)
        return lambda: torch.nn.functional.linear(x, self.head_weights).argmax(dim=-1)

    def attention(self, tokens: int, context_tokens: int) -> Callable[[], None]:
        """Return the work of attention alone, in all layers: `tokens` after `context_tokens`.

        Without a context the tokens attend to one another causally.
        """
        torch = self.torch
        sizes = (1, self.heads, tokens, self.head_dim)
        queries = torch.randn(*sizes, device=self.device, dtype=self.dtype)
        caches = [
            torch.randn(
                2, 1, self.kv_heads, context_tokens + tokens, self.head_dim, device=self.device
            ).to(self.dtype)
            for _ in range(self.layers)
        ]

        def run() -> None:
            for keys, values in caches:
                torch.nn.functional.scaled_dot_product_attention(
                    queries, keys, values, is_causal=not context_tokens, enable_gqa=True
                )

        return run


def model_of(plan: TimingPlan) -> Decoder | EngineModel:
    """Make what is timed: the engine's own model where the plan has its arguments."""
    if not plan.engine_argv:
        return Decoder(json.loads(plan.config.read_text()), plan.device)
    from serving.simulator.engine_model import EngineModel

    return EngineModel(plan.engine_argv, plan.adapters, plan.adapter_rank, plan.adapters_asked_for)


def recorded(work: Work) -> Work:
    """Record what a work launches on a GPU, and return what replays it in one launch.

    What is returned holds the work, whose tensors the graph reads and does not keep alive. A work
    that cannot be recorded is returned as it is, and the reason is printed to stderr.
    Source: PyTorch's notes on CUDA graphs (a warm-up on another stream, then the recording).
    """
    import torch

    graph, beside, usual = torch.cuda.CUDAGraph(), torch.cuda.Stream(), torch.cuda.current_stream()
    try:
        beside.wait_stream(usual)
        with torch.cuda.stream(beside):
            work()
        usual.wait_stream(beside)
        with torch.cuda.graph(graph):
            work()
    except RuntimeError as error:
        torch.cuda.set_stream(usual)  # a recording that failed leaves its own in place
        print(f"A step is timed without a CUDA graph: {error}", file=sys.stderr)
        return work

    def replay(holding: Work = work) -> None:
        graph.replay()

    return replay


def timed(
    series: Sequence[Sequence[Work]],
    passes: int,
    wait: Callable[[], None],
    between: Work = lambda: None,
) -> list[list[list[float]]]:
    """Return the seconds that each work took, over up to `passes` in turn after one that warms up.

    All works of all series take turns, so that what is compared was timed in the same minutes, and
    a slow moment of the machine meets no work in all its passes. A work that takes longer than
    `LONG_S` even when it is done again at once counts from then on, since warming up is a small
    part of it, and one that has taken `ENOUGH_S` altogether is not timed again. The works of a
    series ascend in size: after two that take longer than `LONG_S` no larger one is timed, and its
    list is as much shorter. `wait` returns when the device has finished all that it was given, and
    `between` is done before each pass.
    """

    def seconds_of(work: Work) -> float:
        wait()
        start = perf_counter()
        work()
        wait()
        return perf_counter() - start

    times_s: list[list[list[float]]] = [[[] for _ in works] for works in series]
    for number in range(passes + 1):
        between()
        for works, mine in zip(series, times_s, strict=True):
            for place, work in enumerate(works[: len(mine)]):
                if place > 1 and min(mine[place - 2], default=0.0) > LONG_S:
                    del mine[place:]
                    break
                if sum(mine[place]) > ENOUGH_S:
                    continue
                seconds = seconds_of(work)
                if not number and seconds > LONG_S:
                    seconds = min(seconds, seconds_of(work))
                if number or seconds > LONG_S:
                    mine[place].append(seconds)
    return times_s


def wander_of(times_s: Iterable[Sequence[float]]) -> float:
    """Tell how many times as long as its least time a work took in the middle, over all works.

    1 on a machine of steady speed. A work that was timed fewer than three times tells nothing.
    """
    ratios = [median(seconds) / min(seconds) for seconds in times_s if len(seconds) > 2]
    return median(ratios) if ratios else 1.0


def weights_of(plan: TimingPlan) -> TimingPlan:
    """Return what decides the time of the layers and the head: all but the cache's type and blocks.

    Plans that agree in it share one timing: two timings of the same work would differ by chance,
    and a forecast would tell it as an effect of the cache.
    """
    kept = [
        argument
        for before, argument in zip(("", *plan.engine_argv), plan.engine_argv, strict=False)
        if not {before, argument} & {*CACHE_FLAGS}
        and not argument.startswith(tuple(f"{flag}=" for flag in CACHE_FLAGS))
    ]
    return plan.model_copy(update={"engine_argv": tuple(kept), "passes": 0})


def measure(plans: Sequence[TimingPlan]) -> list[StepTimes]:
    """Measure the parts of a step for each plan, in turn with one another.

    The plans are for one device. Raises KeyError where a configuration is of another kind.
    """
    import torch

    wait = torch.cuda.synchronize if plans[0].device == "cuda" else lambda: None
    passes = max(plan.passes for plan in plans)
    timed_models = [model_of(plan) for plan in plans]
    first_of = {weights_of(plan): number for number, plan in reversed([*enumerate(plans)])}
    timed_once = [(plans[number], timed_models[number]) for number in first_of.values()]
    place = {key: at for at, key in enumerate(first_of)}
    places = [place[weights_of(plan)] for plan in plans]
    references = list[ReferenceStep]()
    reference = reference_step.on_cpu() if plans[0].device == "cpu" else None
    contexts = (CONTEXT_TOKENS, LONG_CONTEXT_TOKENS)
    prompts = (PREFILL_TOKENS // 4, PREFILL_TOKENS)
    with torch.inference_mode():
        series = [
            *([m.linear(n) for n in p.tokens] for p, m in timed_once),
            *([m.head(n) for n in p.rows] for p, m in timed_once),
            *([m.attention(1, n) for n in contexts] for m in timed_models),
            *([m.attention(n, 0) for n in prompts] for m in timed_models),
        ]
        if plans[0].device == "cuda":
            series = [[recorded(work) for work in works] for works in series]
        between = (lambda: references.append(reference())) if reference else (lambda: None)
        times_s = timed(series, passes, wait, between)
    usual = iter([[median(seconds) for seconds in works] for works in times_s])
    linear_s = list(itertools.islice(usual, len(timed_once)))
    head_s = list(itertools.islice(usual, len(timed_once)))
    read_s = list(itertools.islice(usual, len(plans)))
    pair_s = list(usual)
    wander = wander_of(itertools.chain(*times_s))
    part, whole = (n * (n + 1) / 2 for n in prompts)
    return [
        StepTimes(
            tokens=plan.tokens[: len(linear)],
            # a larger step cannot take less: where it seems to, the machine was disturbed
            linear_s=tuple(np.maximum.accumulate(linear).tolist()),
            rows=plan.rows[: len(head)],
            head_s=tuple(np.maximum.accumulate(head).tolist()),
            attention_pair_s=max(0.0, (whole_s - part_s) / (whole - part)),
            attention_read_s=max(0.0, (long_s - short_s) / (contexts[1] - contexts[0])),
            wander=wander,
            reference=reference_step.middle(references),
        )
        for plan, linear, head, (short_s, long_s), (part_s, whole_s) in zip(
            plans,
            [linear_s[at] for at in places],
            [head_s[at] for at in places],
            read_s,
            pair_s,
            strict=True,
        )
    ]


def in_groups(plans: Sequence[TimingPlan]) -> list[list[TimingPlan]]:
    """Group what is timed in turn: on a CPU all, if half of the free memory holds the weights."""
    if any(plan.device != "cpu" for plan in plans):
        return [[plan] for plan in plans]
    needed_bytes = sum(shape_of(json.loads(p.config.read_text())).held_bytes for p in plans)
    free_bytes = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return [list(plans)] if needed_bytes < free_bytes / 2 else [[plan] for plan in plans]


def step_times(plans: Sequence[TimingPlan]) -> Iterator[StepTimes]:
    """Yield the step times in the plans' order, measured on the engine's cores alone.

    Raises KeyError where a configuration is of another kind, and what vLLM raises for arguments
    that it does not accept.
    """
    import torch

    everywhere = os.sched_getaffinity(0)
    cores = {core for plan in plans for core in plan.cores}
    if cores:
        os.sched_setaffinity(0, cores)
        torch.set_num_threads(len(cores))
    torch.manual_seed(0)
    try:
        for group in in_groups(plans):
            yield from measure(group)
    finally:
        os.sched_setaffinity(0, everywhere)
