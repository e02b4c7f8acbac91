"""What theory says, before anything is measured. Pure functions; every one names its source.

Units: seconds, bytes, tokens, FLOP (one multiply-add counts as two).
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from serving.machine import Ceilings
from serving.models import Shape


def prefill_s(shape: Shape, ceilings: Ceilings, tokens: float) -> float:
    """Seconds of compute to prefill one prompt: 2 FLOP a parameter and token, plus attention.

    2 P N + 2 L d N^2 (causal: half of 4 L d N^2), d = heads x head dim.
    Kaplan et al. 2020, table 1. Assumes full use of the measured BF16 rate.
    """
    attention = 2 * shape.layers * shape.heads * shape.head_dim * tokens**2
    return (2 * shape.matmul_params * tokens + attention) / ceilings.bf16_flops_per_s


def prefill_left_s(shape: Shape, ceilings: Ceilings, tokens: float, cached_tokens: float) -> float:
    """Seconds to prefill the rest of a prompt whose first `cached_tokens` have their KV cached.

    FLOP left: 2 P N (1 - h) + 2 L d N^2 (1 - h^2), h = cached / tokens: the rest still attends to
    all that is cached. Never less than one read of the weights, which any forward pass takes.
    """
    whole, cached = (prefill_s(shape, ceilings, n) for n in (tokens, cached_tokens))
    return max(whole - cached, shape.weight_bytes / ceilings.memory_bandwidth_bytes_per_s)


def decode_bytes(shape: Shape, batch: float, context_tokens: float) -> float:
    """Bytes one decode step reads: the weights once, and every sequence's keys and values."""
    return shape.weight_bytes + batch * context_tokens * shape.kv_bytes_per_token()


def decode_flops(shape: Shape, batch: float, context_tokens: float) -> float:
    """FLOP of one decode step: 2 a parameter and sequence, plus 4 L d a token of context."""
    attention = 4 * shape.layers * shape.heads * shape.head_dim * context_tokens
    return batch * (2 * shape.matmul_params + attention)


def decode_step_s(shape: Shape, ceilings: Ceilings, batch: float, context_tokens: float) -> float:
    """Seconds of one decode step on the roofline: the slower of memory and compute.

    Williams, Waterman, Patterson 2009. Assumes perfect overlap and no cost of launching kernels,
    scheduling, sampling or detokenizing: a lower bound on time, not an estimate of it.
    """
    memory_s = decode_bytes(shape, batch, context_tokens) / ceilings.memory_bandwidth_bytes_per_s
    compute_s = decode_flops(shape, batch, context_tokens) / ceilings.bf16_flops_per_s
    return max(memory_s, compute_s)


def batch_throughput(
    shape: Shape,
    ceilings: Ceilings,
    batch: float,
    prompt_tokens: float,
    output_tokens: float,
) -> float:
    """Output tokens/s with `batch` requests always in flight, each with its own prefill.

    A request of L output tokens takes L steps shared by `batch` requests, and its prefill takes
    the device for itself: L / (L t(B) / B + t_prefill). The context counts as the prompt and half
    the output, its mean over a request's life.
    """
    step_s = decode_step_s(shape, ceilings, batch, prompt_tokens + output_tokens / 2)
    return output_tokens / (
        output_tokens * step_s / batch + prefill_s(shape, ceilings, prompt_tokens)
    )


def ridge_batch(shape: Shape, ceilings: Ceilings) -> float:
    """The batch at which a decode step's compute takes as long as reading the weights.

    Below it decode is bound by memory and a larger batch is nearly free; short contexts assumed.
    """
    read_s = shape.weight_bytes / ceilings.memory_bandwidth_bytes_per_s
    return read_s * ceilings.bf16_flops_per_s / (2 * shape.matmul_params)


def static_batching_penalty(output_tokens: Sequence[int], batch: int) -> float:
    """E[max L] / E[L] over consecutive batches of a real sequence of output lengths.

    A static batch lasts as long as its longest answer while the places of shorter ones stay empty.
    For exponential lengths the expectation is the harmonic number H_B (2.72 at B = 8); the step
    time is taken as independent of how many places are filled (true while memory-bound).
    Argument of Orca (Yu et al., OSDI 2022), section 3.
    """
    whole = len(output_tokens) // batch * batch
    batches = [output_tokens[i : i + batch] for i in range(0, whole, batch)]
    return fmean(max(b) for b in batches) / fmean(output_tokens[:whole])
