"""Time attention with and without tiling, and count its memory, on the served model's heads.

Without tiling the scores of every query with every key are written to memory, and so are the
weights that their softmax makes of them: both are `heads x N x N` numbers. With tiling
(FlashAttention, Dao et al. 2022) a tile of scores at a time is made, used and thrown away in the
caches. Both are PyTorch's own kernels, `MATH` and `FLASH_ATTENTION` of `torch.nn.attention`, over
the same random inputs. Every query attends to every key: with a causal mask a tiled kernel skips
half of its tiles, which is another saving and would be counted as one of tiling. Every query head
has keys and values of its own, so that copying shared ones is not timed either.

On a CPU a step of decode over a long context is timed as well, with each KV head's keys in one
piece and cut into as many as there are processors (Flash-Decoding, Dao et al. 2023): a piece is
work for one processor, and the parts are put together by their softmax's denominators. It runs on
every processor of the process, not on the engine's alone. On a GPU PyTorch's kernel may choose
splits by itself, so that it has no side without them; there the engine is asked.

Memory is the most that PyTorch holds at once beyond the inputs, as its own allocator records it.
Time is taken several times, kernels and lengths in turn. What does not fit the memory that is set
aside, or is refused by the kernel, is named with the reason and has no figures.

Run as `python -m serving.hardware.attention` with an `AttentionPlan` as JSON on standard input; it
prints its progress, then an `AttentionTimes` as the last line. It counts no traffic: that takes
hardware counters, which few machines let a program read.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, FiniteFloat, NonNegativeInt, PositiveInt

from serving.hardware import gpus
from serving.hardware.host_memory import available_bytes

Kernel = Literal["untiled", "tiled"]
BACKENDS: dict[Kernel, str] = {"untiled": "MATH", "tiled": "FLASH_ATTENTION"}
"""The names in `torch.nn.attention.SDPBackend`."""
SCORE_BYTES = 4  # scores of BF16 inputs are computed in float32
SCORES_HELD = 2.5  # copies of the scores to reckon with: scores, weights, and a mask of them
MOST_HOST_BYTES = 6 * 2**30  # set aside on a CPU, or half of what is free
ENOUGH_S, LEAST_TIMES = 4.0, 2  # a kernel that has taken so long altogether is not timed again
BRIEF_S = 0.02  # what is briefer is timed several times in a row
LONG_S = 1.0  # what takes longer counts from its first time on: warming up is a small part of it


class AttentionPlan(BaseModel, frozen=True, extra="forbid"):
    """What to time: the heads of a model, the device, and the lengths of the context."""

    config: Path  # the model's config.json
    device: Literal["cpu", "cuda"]
    cores: tuple[int, ...] = ()  # a CPU engine's cores: one thread on each
    cache_bytes: NonNegativeInt | None = None  # next to a CPU's arithmetic; a GPU is asked
    lengths_tokens: tuple[PositiveInt, ...]
    passes: PositiveInt = 5
    most_bytes: NonNegativeInt | None = None  # None: what this machine can set aside


class KernelTimes(BaseModel, frozen=True, extra="forbid"):
    """One kernel at one length."""

    kernel: Kernel
    tokens: PositiveInt
    peak_bytes: NonNegativeInt  # beyond the inputs
    times_s: tuple[FiniteFloat, ...]  # in the order of the passes


class SplitTimes(BaseModel, frozen=True, extra="forbid"):
    """Attention of one decode step, the keys of each KV head in one piece and in several."""

    kv_heads: PositiveInt  # of all requests of the batch
    tokens: PositiveInt  # of context
    whole_s: tuple[FiniteFloat, ...]  # in the order of the passes
    split_s: tuple[FiniteFloat, ...]  # in as many pieces as there are processors


class AttentionTimes(BaseModel, frozen=True, extra="forbid"):
    """What was timed, and what was left out with the reason (`untiled/16384` -> why)."""

    heads: PositiveInt
    head_dim: PositiveInt
    device: str
    threads: PositiveInt
    cache_bytes: NonNegativeInt | None  # that one processor's arithmetic has for itself
    most_bytes: NonNegativeInt
    timed: tuple[KernelTimes, ...]
    left_out: dict[str, str]
    processors: PositiveInt = 1  # among which keys were split
    splits: tuple[SplitTimes, ...] = ()
    took_s: FiniteFloat

    def at(self, kernel: Kernel) -> dict[int, KernelTimes]:
        """Return length -> what was measured of a kernel, in ascending order of length."""
        of_kernel = {t.tokens: t for t in self.timed if t.kernel == kernel}
        return dict(sorted(of_kernel.items()))


def scores_bytes(heads: int, tokens: int) -> int:
    """Return the bytes of one copy of the scores, (heads, tokens, tokens) in float32."""
    return heads * tokens**2 * SCORE_BYTES


def memory_set_aside(device: str) -> int:
    """Return the bytes that untiled attention may take: half of what is free, at most."""
    if device == "cuda":
        import torch

        return int(torch.cuda.mem_get_info()[0]) // 2
    return int(min(MOST_HOST_BYTES, available_bytes() // 2))


def _shared_memory_bytes() -> int | None:
    """Return the memory on chip that a GPU's processor shares among its threads, if it says so."""
    import torch

    properties = torch.cuda.get_device_properties(0)
    size_bytes = getattr(properties, "shared_memory_per_multiprocessor", None)
    return None if size_bytes is None else int(size_bytes)


def _no_wait() -> None:
    """A CPU's work is done when its call returns."""


def seconds_of(work: Callable[[], object], wait: Callable[[], None]) -> float:
    """Time a work, several times in a row where it is brief; return the seconds of one."""
    times = 1
    while True:
        wait()
        began = time.perf_counter()
        for _ in range(times):
            work()
        wait()
        took_s = time.perf_counter() - began
        if took_s >= BRIEF_S:
            return took_s / times
        times *= 4


def peak_bytes(work: Callable[[], object], device: str) -> tuple[int, float]:
    """Run a work once.

    Returns the most bytes that PyTorch held at once beyond what it had, and the seconds it took.
    """
    import torch

    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        work()
        torch.cuda.synchronize()
        took_s = time.perf_counter() - began
        return int(torch.cuda.max_memory_allocated()) - before, took_s
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as recorded:
        began = time.perf_counter()
        work()
        took_s = time.perf_counter() - began
    held = most = 0
    for event in sorted(_allocations(recorded), key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most, took_s


def _allocations(recorded: Any) -> Iterator[Any]:
    """Yield the records of memory taken (positive bytes) and given back (negative)."""
    events = recorded.profiler.kineto_results.events()
    return (event for event in events if event.name() == "[memory]")


def measure(plan: AttentionPlan) -> AttentionTimes:
    """Count and time both kernels at each length.

    Raises KeyError where the configuration lacks a size of a Llama-like decoder.
    """
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    config = json.loads(plan.config.read_text())
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    began = time.monotonic()
    most = memory_set_aside(plan.device) if plan.most_bytes is None else plan.most_bytes
    of_16_bits = gpus.type_of_16_bits(torch, plan.device)
    wait = torch.cuda.synchronize if plan.device == "cuda" else _no_wait

    def attention(kernel: Kernel, tokens: int) -> Callable[[], Any]:
        q, k, v = (
            torch.randn(1, heads, tokens, head_dim, device=plan.device).to(of_16_bits)
            for _ in range(3)
        )
        backend = getattr(SDPBackend, BACKENDS[kernel])

        def work() -> Any:
            with sdpa_kernel(backend):
                return torch.nn.functional.scaled_dot_product_attention(q, k, v)

        return work

    works: dict[tuple[Kernel, int], Callable[[], Any]] = {}
    peaks: dict[tuple[Kernel, int], int] = {}
    times_s: dict[tuple[Kernel, int], list[float]] = {}
    left_out: dict[str, str] = {}
    with torch.inference_mode():
        for tokens in sorted(set(plan.lengths_tokens)):
            for kernel in BACKENDS:
                needed = SCORES_HELD * scores_bytes(heads, tokens)
                if kernel == "untiled" and needed > most:
                    left_out[f"{kernel}/{tokens}"] = (
                        f"its scores, their softmax and a mask would take about"
                        f" {needed / 1e9:.1f} GB, more than the"
                        f" {most / 1e9:.1f} GB that are set aside"
                    )
                    continue
                work = attention(kernel, tokens)
                try:
                    peaks[kernel, tokens], took_s = peak_bytes(work, plan.device)
                except RuntimeError as error:  # no such kernel here, or out of memory
                    left_out[f"{kernel}/{tokens}"] = str(error).strip().partition("\n")[0][:200]
                    continue
                works[kernel, tokens] = work
                times_s[kernel, tokens] = [took_s] if took_s > LONG_S else []
            print(f"counted the memory of {tokens:,} tokens", flush=True)
        for number in range(plan.passes):
            for key, work in works.items():
                if len(times_s[key]) < LEAST_TIMES or sum(times_s[key]) < ENOUGH_S:
                    times_s[key].append(seconds_of(work, wait))
            print(f"timed pass {number + 1} of {plan.passes}", flush=True)
    return AttentionTimes(
        heads=heads,
        head_dim=head_dim,
        device=plan.device,
        threads=1 if plan.device == "cuda" else torch.get_num_threads(),
        cache_bytes=_shared_memory_bytes() if plan.device == "cuda" else plan.cache_bytes,
        most_bytes=most,
        timed=tuple(
            KernelTimes(
                kernel=kernel,
                tokens=tokens,
                peak_bytes=peaks[kernel, tokens],
                times_s=tuple(times_s[kernel, tokens]),
            )
            for kernel, tokens in works
        ),
        left_out=left_out,
        took_s=round(time.monotonic() - began, 1),
    )


SPLIT_TOKENS, SPLIT_PASSES = 16384, 15  # of context, and how often a batch is timed both ways


def attend_split(q: Any, k: Any, v: Any, pieces: int) -> Any:
    """Attend over the keys of each KV head in so many pieces: on a CPU, one processor's work each.

    `q` is (KV heads, query heads of each, head dim), `k` and `v` are (KV heads, tokens, head dim).
    """
    import torch

    heads, queries, dim = q.shape

    def cut(x: Any) -> Any:
        return x.view(heads * pieces, 1, -1, dim)

    parts, log_sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q.repeat_interleave(pieces, 0).unsqueeze(1), cut(k), cut(v)
    )
    weights = log_sums.reshape(heads, pieces, queries, 1).softmax(1)
    return (parts.view(heads, pieces, queries, dim) * weights).sum(1)


def measure_splits(plan: AttentionPlan, processors: int) -> tuple[SplitTimes, ...]:
    """Time one step's attention whole and split, in turn, on all processors of a CPU.

    The batches have one KV head, those of one request, and two for each processor.
    """
    import torch

    config = json.loads(plan.config.read_text())
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    dim = config.get("head_dim") or config["hidden_size"] // heads
    tokens = SPLIT_TOKENS // processors * processors
    timed = []
    with torch.inference_mode():
        for batch in sorted({1, kv_heads, 2 * processors}):
            q, k, v = (
                torch.randn(batch, n, dim).bfloat16() for n in (heads // kv_heads, tokens, tokens)
            )
            whole, split = (partial(attend_split, q, k, v, n) for n in (1, processors))
            times_s = [
                (seconds_of(whole, _no_wait), seconds_of(split, _no_wait))
                for _ in range(SPLIT_PASSES)
            ]
            whole_s, split_s = zip(*times_s, strict=True)
            timed.append(
                SplitTimes(kv_heads=batch, tokens=tokens, whole_s=whole_s, split_s=split_s)
            )
    return tuple(timed)


def main() -> None:
    """Read the plan, keep to the engine's cores, and print the figures as the last line."""
    logging.disable(logging.WARNING)
    plan = AttentionPlan.model_validate_json(sys.stdin.readline())
    import torch

    torch.manual_seed(0)
    processors, splits = sorted(os.sched_getaffinity(0)), tuple[SplitTimes, ...]()
    if plan.device == "cpu" and len(processors) > 1:
        torch.set_num_threads(len(processors))
        splits = measure_splits(plan, len(processors))
        print(f"timed a step's attention split among {len(processors)} processors", flush=True)
    if plan.cores:
        os.sched_setaffinity(0, plan.cores)
        torch.set_num_threads(len(plan.cores))
    times = measure(plan)
    timed = {"processors": len(processors), "splits": splits} if splits else {}
    print(times.model_copy(update=timed).model_dump_json(), flush=True)


if __name__ == "__main__":
    main()
