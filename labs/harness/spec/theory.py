"""What theory predicts before anything is measured: pure functions, each with its source.

Units: seconds, bytes, tokens, FLOP (one multiply-add counts as two). In a mixture of experts, a
step reads the experts that its tokens are expected to be routed to (`Shape.step_bytes`), and each
token is multiplied with its own experts' weights; the cost of routing is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from serving.hardware.machine import Ceilings
from serving.models.catalog import Shape

if TYPE_CHECKING:
    from labs.harness.spec.lab import Point

DAO = "Dao et al., FlashAttention, 2022"
KAPLAN = "Kaplan et al. 2020"
KWON = "Kwon et al., PagedAttention, SOSP 2023"
LEVIATHAN = "Leviathan, Kalman, Matias, ICML 2023"
PYTORCH_2 = "Ansel et al., PyTorch 2, ASPLOS 2024"
ROOFLINE = "Williams et al., Roofline, 2009"
SARATHI = "Agrawal et al., Sarathi-Serve, OSDI 2024"


def prefill_flops(shape: Shape, tokens: float, cached_tokens: float = 0) -> float:
    """FLOP to prefill a prompt whose first `cached_tokens` have their KV cached.

    2 P (N - c) + 2 L d (N^2 - c^2) (causal: half of 4 L d N^2), d = heads x head dim: the tokens
    that are computed still attend to the cached ones. P excludes the output head, with which only
    the last token of a prompt is multiplied. Source: Kaplan et al. 2020, table 1, where N excludes
    embeddings too.
    """
    body = 2 * (shape.matmul_params - shape.head_params) * (tokens - cached_tokens)
    attention = 2 * shape.layers * shape.heads * shape.head_dim * (tokens**2 - cached_tokens**2)
    return body + attention + 2 * shape.head_params


def prefill_s(shape: Shape, ceilings: Ceilings, tokens: float) -> float:
    """Seconds that prefilling one prompt takes at the measured rate of arithmetic alone."""
    return prefill_flops(shape, tokens) / ceilings.flops_per_s


def prefill_left_s(shape: Shape, ceilings: Ceilings, tokens: float, cached_tokens: float) -> float:
    """Seconds to prefill the rest of a prompt whose first `cached_tokens` have their KV cached.

    At least the time of reading the weights once, which every forward pass needs.
    """
    compute_s = prefill_flops(shape, tokens, cached_tokens) / ceilings.flops_per_s
    weights_s = shape.step_bytes(tokens - cached_tokens) / ceilings.memory_bandwidth_bytes_per_s
    return max(compute_s, weights_s)


def kv_copy_s(
    shape: Shape, tokens: float, link_bytes_per_s: float, kv_value_bytes: float | None = None
) -> float:
    """Seconds to copy the keys and values of `tokens` over a link, by its rate alone."""
    return tokens * shape.kv_bytes_per_token(kv_value_bytes) / link_bytes_per_s


def copying_pays_from_tokens(
    shape: Shape, flops_per_s: float, link_bytes_per_s: float, kv_value_bytes: float | None = None
) -> float:
    """Tokens of a prefix from which on copying its KV takes less time than computing it again.

    Copying N tokens takes k N / r, with k bytes a token and a link of r bytes/s; prefilling them
    2 (P N + L d N^2) / F (`prefill_flops`), with F FLOP/s. They are equal at N = (k F / r - 2 P) /
    (2 L d), and where that is below 0, copying is the faster at any length. What both need once, a
    step that reads the weights, is left out.
    """
    body_flops = 2 * (shape.matmul_params - shape.head_params)
    copied_flops = shape.kv_bytes_per_token(kv_value_bytes) * flops_per_s / link_bytes_per_s
    return max(0.0, (copied_flops - body_flops) / (2 * shape.layers * shape.heads * shape.head_dim))


def link_that_pays_bytes_per_s(
    shape: Shape, flops_per_s: float, kv_value_bytes: float | None = None
) -> float:
    """The rate of a link above which copying KV beats computing it again at any length.

    k F / 2 P: above it the bytes of a token are copied sooner than its weights are multiplied.
    """
    body_flops = 2 * (shape.matmul_params - shape.head_params)
    return shape.kv_bytes_per_token(kv_value_bytes) * flops_per_s / body_flops


def quadratic_share(shape: Shape, tokens: float) -> float:
    """The share of a prefill's FLOP that grows as N^2: 2 L d N^2 of `prefill_flops`."""
    squared = 2 * shape.layers * shape.heads * shape.head_dim * tokens**2
    return squared / prefill_flops(shape, tokens)


def attention_flops(shape: Shape, tokens: float) -> float:
    """FLOP of attention in one layer where every token attends to every token: 4 N^2 d heads."""
    return 4 * tokens**2 * shape.head_dim * shape.heads


def scores_bytes(shape: Shape, tokens: float) -> float:
    """Bytes of one layer's scores in float32: a number for each pair of tokens and each head."""
    return 4 * shape.heads * tokens**2


def attention_bytes(shape: Shape, tokens: float, cache_bytes: float | None) -> float:
    """Bytes that one layer's attention moves between memory and a cache, inputs in BF16.

    Written down as it stands (`cache_bytes` is None): queries and outputs of all heads once, keys
    and values of all KV heads once, the scores in float32 written and read, and their softmax
    written and read. In tiles: inputs and outputs once, and N^2 d^2 / M numbers of BF16 a head,
    with M the numbers that the cache holds. Source: FlashAttention (Dao et al. 2022), algorithm 0
    and theorem 2, whose constant is taken as 1.
    """
    once = 2 * (2 * shape.heads + 2 * shape.kv_heads) * tokens * shape.head_dim
    if cache_bytes is None:
        return once + 4 * scores_bytes(shape, tokens)
    return once + 2 * shape.heads * (tokens * shape.head_dim) ** 2 / (cache_bytes / 2)


def decode_bytes(
    shape: Shape, batch: float, context_tokens: float, kv_value_bytes: float | None = None
) -> float:
    """Bytes one decode step reads: the weights once, and every sequence's keys and values."""
    kv_bytes = batch * context_tokens * shape.kv_bytes_per_token(kv_value_bytes)
    return shape.step_bytes(batch) + kv_bytes


def decode_flops(shape: Shape, batch: float, context_tokens: float) -> float:
    """FLOP of one decode step: 2 for each parameter and sequence, 4 L d for each context token."""
    attention = 4 * shape.layers * shape.heads * shape.head_dim * context_tokens
    return batch * (2 * shape.matmul_params + attention)


def decode_step_s(shape: Shape, ceilings: Ceilings, batch: float, context_tokens: float) -> float:
    """Seconds of one decode step on the roofline: the slower of memory and compute.

    Williams, Waterman, Patterson 2009. Assumes perfect overlap and no cost of launching kernels,
    scheduling, sampling or detokenizing: a lower bound on time, not an estimate of it.
    """
    memory_s = decode_bytes(shape, batch, context_tokens) / ceilings.memory_bandwidth_bytes_per_s
    compute_s = decode_flops(shape, batch, context_tokens) / ceilings.flops_per_s
    return max(memory_s, compute_s)


def batch_throughput(
    shape: Shape,
    ceilings: Ceilings,
    batch: float,
    prompt_tokens: float,
    output_tokens: float,
) -> float:
    """Output tokens/s with `batch` requests always in flight, each with its own prefill.

    A request's prefill has the device to itself and yields its first token. Each of the other L - 1
    tokens takes a step, which `batch` requests share: L / ((L - 1) t(B) / B + t_prefill). The
    context is taken as the prompt and half of the output, its mean over a request's life.
    """
    step_s = decode_step_s(shape, ceilings, batch, prompt_tokens + output_tokens / 2)
    steps_s = (output_tokens - 1) * step_s / batch
    return output_tokens / (steps_s + prefill_s(shape, ceilings, prompt_tokens))


def ridge_batch(shape: Shape, ceilings: Ceilings) -> float:
    """The batch at which a decode step's compute takes as long as reading the weights.

    Below it decode is bound by memory, so that a larger batch is nearly free. Assumes short
    contexts.
    """
    read_s = shape.weight_bytes / ceilings.memory_bandwidth_bytes_per_s
    return read_s * ceilings.flops_per_s / (2 * shape.matmul_params)


def even_context_tokens(shape: Shape, batch: float, kv_value_bytes: float | None = None) -> float:
    """Tokens of context at which a decode step reads as many bytes of KV as of weights.

    Beyond it a longer context, and no longer the weights, sets the step's time.
    """
    return shape.step_bytes(batch) / (batch * shape.kv_bytes_per_token(kv_value_bytes))


def experts_needed(experts: int, per_token: int, tokens: float) -> float:
    """Expected experts of a layer that a step over so many tokens needs: E (1 - (1 - k/E)^B).

    An expert stays idle where none of the B tokens is sent to it. Routing is taken to be even, and
    each token's independent of the others' (Shazeer et al. 2017).
    """
    idle: float = (1 - per_token / experts) ** tokens
    return experts * (1 - idle)


def static_batching_penalty(output_tokens: Sequence[int], batch: int) -> float:
    """E[max L] / E[L] over consecutive batches of a real sequence of output lengths.

    A static batch lasts as long as its longest output, while the places of shorter ones stay empty.
    For exponential lengths the expectation is the harmonic number H_B (2.72 at B = 8). The step
    time is assumed not to depend on how many places are filled, which is true while memory-bound.
    The argument is that of Orca (Yu et al., OSDI 2022), section 3.
    """
    batched = len(output_tokens) // batch * batch
    batches = [output_tokens[i : i + batch] for i in range(0, batched, batch)]
    return fmean(max(b) for b in batches) / fmean(output_tokens[:batched])


def mixed_step_s(
    shape: Shape,
    ceilings: Ceilings,
    batch: float,
    context_tokens: float,
    done_tokens: int,
    piece_tokens: int,
) -> float:
    """Seconds of a step that decodes a batch and prefills a piece of a prompt behind `done_tokens`.

    The slower of memory and compute. The weights are read once for both parts, which is why the
    decodes in a step with a piece are nearly free (Sarathi-Serve, Agrawal et al., OSDI 2024).
    """
    kv_tokens = batch * context_tokens + done_tokens
    moved = shape.step_bytes(batch + piece_tokens) + kv_tokens * shape.kv_bytes_per_token()
    flop = decode_flops(shape, batch, context_tokens)
    flop += prefill_flops(shape, done_tokens + piece_tokens, done_tokens)
    return max(moved / ceilings.memory_bandwidth_bytes_per_s, flop / ceilings.flops_per_s)


def chunk_step_s(
    shape: Shape,
    ceilings: Ceilings,
    batch: float,
    context_tokens: float,
    prompt_tokens: int,
    chunk_tokens: int,
) -> float:
    """Seconds of the longest step with a chunk of a long prompt beside a decoding batch.

    It is the step with the prompt's last `chunk_tokens`, which attend to all tokens before them.
    """
    chunk = min(chunk_tokens, prompt_tokens)
    return mixed_step_s(shape, ceilings, batch, context_tokens, prompt_tokens - chunk, chunk)


def chunked_prefill_s(
    shape: Shape,
    ceilings: Ceilings,
    batch: float,
    context_tokens: float,
    prompt_tokens: int,
    chunk_tokens: int,
) -> float:
    """Seconds until a long prompt is prefilled in chunks, each in a step with a decoding batch."""
    return sum(
        mixed_step_s(
            shape, ceilings, batch, context_tokens, done, min(chunk_tokens, prompt_tokens - done)
        )
        for done in range(0, prompt_tokens, chunk_tokens)
    )


def accepted_length(acceptance: float, draft_tokens: int) -> float:
    """Expected tokens a verified draft yields: (1 - a^(g + 1)) / (1 - a), g + 1 at a = 1.

    Leviathan, Kalman, Matias 2023, equation 1, which assumes that each token is accepted
    independently with the same probability a.
    """
    if acceptance == 1:
        return draft_tokens + 1
    return (1 - acceptance ** (draft_tokens + 1)) / (1 - acceptance)


def forward_s(shape: Shape, ceilings: Ceilings, tokens: float, context_bytes: float) -> float:
    """Seconds of a forward pass over `tokens` that reads the weights and `context_bytes` of KV.

    Source: the roofline (Williams et al. 2009). The FLOP of attention are left out.
    """
    memory_s = (shape.step_bytes(tokens) + context_bytes) / ceilings.memory_bandwidth_bytes_per_s
    return max(memory_s, 2 * shape.matmul_params * tokens / ceilings.flops_per_s)


def kv_tokens(shape: Shape, memory_bytes: float, bytes_per_value: float, block: int) -> float:
    """Tokens that a KV cache of this size holds, in whole blocks of `block` tokens.

    Source: PagedAttention (Kwon et al., SOSP 2023).
    """
    return memory_bytes // (block * shape.kv_bytes_per_token(bytes_per_value)) * block


# what these say of a point, whose load is a number of requests that are always in flight


def first_token_of(point: Point, cached_tokens: float = 0) -> float:
    """Seconds to prefill what is not cached of a point's prompt, which is alone."""
    return prefill_left_s(point.shape, point.ceilings, point.prompt_tokens, cached_tokens)


def step_of(point: Point, context_tokens: float | None = None) -> float:
    """Seconds of a decode step of a point's requests, at their mean context or another."""
    context = point.context_tokens if context_tokens is None else context_tokens
    return decode_step_s(point.shape, point.ceilings, point.load.users, context)


def forward_of(point: Point, context_bytes: float) -> float:
    """Seconds of a forward pass over a token of each of a point's requests."""
    return forward_s(point.shape, point.ceilings, point.load.users, context_bytes)


def prefill_of(point: Point) -> float:
    """Seconds of a point's prompt at the measured rate of arithmetic alone."""
    return prefill_s(point.shape, point.ceilings, point.prompt_tokens)


def throughput_of(point: Point, batch: float | None = None) -> float:
    """Output tokens/s of a point's requests, all in flight at once or so many."""
    at_once = point.load.users if batch is None else batch
    return batch_throughput(
        point.shape, point.ceilings, at_once, point.prompt_tokens, point.output_tokens
    )


def weights_read_of(point: Point) -> float:
    """Seconds in which a step of a point's requests reads the weights, at the measured rate."""
    weight_bytes = point.shape.step_bytes(point.load.users)
    return weight_bytes / point.ceilings.memory_bandwidth_bytes_per_s


def kv_read_of(point: Point) -> float:
    """Seconds in which such a step reads the keys and values of all contexts."""
    kv_bytes = point.kv_bytes(point.flags.kv_value_bytes)
    return kv_bytes / point.ceilings.memory_bandwidth_bytes_per_s


def arithmetic_of(point: Point) -> float:
    """Seconds that the arithmetic of such a step takes at the measured rate."""
    flops = decode_flops(point.shape, point.load.users, point.context_tokens)
    return flops / point.ceilings.flops_per_s
