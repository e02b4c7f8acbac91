"""The step of a GPU that is not here, put together from its kernels' times, which others measured.

A step is what the kernels of its layers and of the output head take, one after another, as a CUDA
graph replays them, and the host's share that none of them hides (`HOST_S`). `kernel_times/` holds
the times of matrix products, attention, exchanges between GPUs and routed experts, for each card
that has them. What lies between their sizes is interpolated by work. A product of more rows takes
no less time: where a table says otherwise, those that contradict share their geometric mean (the
isotonic regression of the logarithms), so that no single outlier decides. Norms, activations and
the rotary embedding have no table: they take the time of their bytes at the bandwidth that the
card's own products reach, and at least that of its shortest kernel.

What is not covered: adapters, eager launches, weights of 4 bits, experts of a shape that no table
has, in 8 bits or spread over GPUs, and sliding windows. Where no table has a request's KV heads, it
is taken for several requests, or a part of one, with those of the nearest row: the kernel divides
its work by both alike.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serving.simulator.step import AttentionTimes, StepTimes

TABLES = Path(__file__).parent / "kernel_times"
HOST_S = 0.19e-3
"""What the host adds to a step, seconds.

vLLM decodes one stream of an 8B model in BF16 on an H100 at 155 tokens/s, 6.45 ms a token, of which
its kernels take 6.26 by the tables at a context of some hundred tokens
(`labs/single_stream/published.toml`).
"""
SMALL_KERNELS = 5  # of a layer: two norms, rotary embedding, writing the cache, activation
MOST_KV_HEADS = 8  # in the tables of decoding
UNLIKE = ("n_routed_experts", "shared_expert_intermediate_size", "kv_lora_rank")
"""Fields of a config whose models have other layers than those that are put together here."""
LARGE_PRODUCT = 2**26  # weights that no cache holds: their time is the memory's
Floats = NDArray[np.float64]


class KernelsError(Exception):
    """The tables do not hold what a step needs; the message names it."""


def cards() -> list[str]:
    """Name the cards whose kernels' times are on file, by their datasheets' short names."""
    return sorted(path.parent.name for path in TABLES.glob("*/products.csv"))


@dataclass(frozen=True)
class Decoder:
    """The sizes of a decoder that a step's kernels depend on."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int  # of the gated MLP, or of each routed expert
    vocab: int
    experts: int = 0
    experts_per_token: int = 0

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Decoder:
        """Read a `config.json` in Hugging Face's names.

        Raises KernelsError for layers that no table describes.
        """
        unlike = [name for name in UNLIKE if config.get(name)]
        unlike += sorted({*(config.get("layer_types") or ())} - {"full_attention"})
        if unlike:
            raise KernelsError(f"no times of layers with {unlike[0]} were published")
        heads = config["num_attention_heads"]
        experts = config.get("num_experts") or config.get("num_local_experts") or 0
        return cls(
            layers=config["num_hidden_layers"],
            hidden=config["hidden_size"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            inner=(experts and config.get("moe_intermediate_size")) or config["intermediate_size"],
            vocab=config["vocab_size"],
            experts=experts,
            experts_per_token=config.get("num_experts_per_tok") or 0 if experts else 0,
        )


def step_times(
    decoder: Decoder,
    card: str,
    gpus: int = 1,
    eight_bit_weights: bool = False,
    eight_bit_cache: bool = False,
) -> StepTimes:
    """Compute the parts of a step on `gpus` of these cards, which share each layer.

    Raises KernelsError where a table lacks what it takes.
    """
    if decoder.heads % gpus or decoder.kv_heads % gpus:
        raise KernelsError(f"{gpus} GPUs cannot share {decoder.heads} and {decoder.kv_heads} heads")
    heads, kv_heads = decoder.heads // gpus, decoder.kv_heads // gpus
    hidden, head_dim = decoder.hidden, decoder.head_dim
    products = _products(card, "fp8" if eight_bit_weights else "bfloat16")
    plain = _products(card, "bfloat16")
    tokens = plain.m
    layer_s = products.seconds(n=(heads + 2 * kv_heads) * head_dim, k=hidden)
    layer_s = layer_s + products.seconds(n=hidden, k=heads * head_dim)
    values = 8 * hidden + 2 * heads * head_dim + 6 * kv_heads * head_dim  # read or written a token
    if decoder.experts:
        layer_s = layer_s + plain.seconds(n=decoder.experts, k=hidden)
        layer_s = layer_s + _experts_s(decoder, card, gpus, eight_bit_weights, tokens)
    else:
        inner = decoder.inner // gpus
        layer_s = layer_s + products.seconds(n=2 * inner, k=hidden)
        layer_s = layer_s + products.seconds(n=hidden, k=inner)
        values += 3 * inner
    layer_s = layer_s + SMALL_KERNELS * plain.shortest_s + 2 * values * tokens / plain.bandwidth
    linear_s = decoder.layers * layer_s + plain.shortest_s  # the embedding
    head_s = plain.seconds(n=decoder.vocab // gpus, k=hidden) + 2 * plain.shortest_s  # sampling
    if gpus > 1:
        linear_s = linear_s + (2 * decoder.layers + 1) * _exchange_s(
            card, gpus, 2 * hidden * tokens
        )
        head_s = head_s + _exchange_s(card, gpus, 2 * decoder.vocab * tokens)
    sizes = tuple(int(m) for m in tokens)
    return StepTimes(
        tokens=sizes,
        linear_s=tuple(linear_s.tolist()),
        rows=sizes,
        head_s=tuple(head_s.tolist()),
        attention=_attention(decoder, card, heads, kv_heads, eight_bit_cache),
        scheduling_s=HOST_S,
    )


# ------------------------------------------------------------------------------ reading the tables


@cache
def _table(
    card: str, name: str, keys: int, *, new_tokens: int = 0, power: int = 1
) -> tuple[Floats, dict[tuple[str, ...], Floats]]:
    """Read a table: the sizes of its columns, and each row's seconds by its first cells.

    A size is what its column says and `new_tokens`, and the work grows with this power of it.
    Raises ValueError, which names the table, for what is no time.
    """
    path = TABLES / card / f"{name}.csv"
    if not path.exists():
        raise KernelsError(f"no times of {name.replace('_', ' ')} were published for the {card}")
    with path.open(newline="") as lines:
        head, *rows = csv.reader(lines)
    sizes = np.array(head[keys:], dtype=float) + new_tokens
    times = {}
    for row in rows:
        try:
            times[tuple(row[:keys])] = _row(row[keys:], sizes**power)
        except ValueError as error:
            raise ValueError(f"{path}, row {','.join(row[:keys])}: {error}") from error
    return sizes, times


def _row(cells: Sequence[str], work: Floats) -> Floats:
    """Read a row's seconds; what was not timed follows by work from what was.

    Between sizes that were timed it is interpolated, behind the last it grows with the work, before
    the first it takes as long as that. Raises ValueError for what is no time.
    """
    known = [place for place, cell in enumerate(cells) if cell]
    timed_us = np.array([cells[place] for place in known], dtype=float)
    if not known or len(cells) != len(work) or not ((timed_us > 0) & (timed_us < np.inf)).all():
        raise ValueError("each size needs a time above 0 or an empty cell, and one of them a time")
    times: Floats = 1e-6 * np.interp(work, work[known], timed_us)
    last = known[-1]
    times[last:] *= work[last:] / work[last]
    return times


@dataclass(frozen=True)
class _Products:
    """Times of matrix products of one type: `all_s[i, j]` of n[i] and k[j] at every m."""

    n: Floats
    k: Floats
    m: Floats
    all_s: Floats

    def seconds(self, n: float, k: float) -> Floats:
        """Return the seconds of (m x k) by (k x n) at every m of the table.

        The work grows with n and k, so that seconds for each of both are interpolated over the
        logarithms of n and k; outside of the table they stay those at its end.
        """
        per_work = self.all_s / np.multiply.outer(self.n, self.k)[:, :, None]
        per_work = _interpolated(per_work, self.n, n)
        return np.maximum(n * k * _interpolated(per_work, self.k, k), self.shortest_s)

    @property
    def shortest_s(self) -> float:
        """The time of the shortest kernel."""
        return float(self.all_s.min())

    @property
    def bandwidth(self) -> float:
        """The bytes/s at which a product with one row reads weights that no cache holds."""
        weights = np.multiply.outer(self.n, self.k)
        large = weights >= LARGE_PRODUCT
        return float((2 * weights[large] / self.all_s[large][:, 0]).max())


def _interpolated(table: Floats, sizes: Floats, size: float) -> Floats:
    """Interpolate along the first axis, over the logarithm of its sizes, within their ends."""
    at = min(max(size, sizes[0]), sizes[-1])
    above = max(1, int(np.searchsorted(sizes, at)))
    share = math.log(at / sizes[above - 1]) / math.log(sizes[above] / sizes[above - 1])
    result: Floats = (1 - share) * table[above - 1] + share * table[above]
    return result


@cache
def _products(card: str, kind: str) -> _Products:
    m, rows = _table(card, "products", 3)
    of_kind = {(int(n), int(k)): times for (type_, n, k), times in rows.items() if type_ == kind}
    if not of_kind:
        raise KernelsError(f"no times of {kind} products were published for the {card}")
    n, k = (sorted({key[axis] for key in of_kind}) for axis in (0, 1))
    missing = np.full(len(m), np.nan)
    all_s = np.array([[of_kind.get((i, j), missing) for j in k] for i in n])
    return _Products(np.array(n, float), np.array(k, float), m, _filled(all_s, np.array(k)))


def _filled(all_s: Floats, k: Floats) -> Floats:
    """Fill what was not timed by work from the neighbour in k.

    Then let no product take less time than one of fewer rows.
    """
    for times in all_s:
        for j, row in enumerate(times):
            if np.isnan(row).all():
                times[j] = times[j - 1] * k[j] / k[j - 1]
            times[j] = _ascending(times[j])
    return all_s


def _ascending(times: Floats) -> Floats:
    """Let neighbours that descend share their geometric mean, until none does."""
    pools = list[tuple[float, int]]()  # (logarithm, how many share it)
    for logarithm in np.log(times).tolist():
        pools.append((logarithm, 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (below, n), (above, m) = pools[-2:]
            pools[-2:] = [((n * below + m * above) / (n + m), n + m)]
    logarithms, counts = zip(*pools, strict=True)
    ascending: Floats = np.exp(np.repeat(logarithms, counts))
    return ascending


def _exchange_s(card: str, gpus: int, sent_bytes: Floats) -> Floats:
    sizes, rows = _table(card, "exchanges", 1)
    if (str(gpus),) not in rows:
        raise KernelsError(f"no times of exchanges between {gpus} GPUs were published")
    result: Floats = np.interp(sent_bytes, sizes, rows[str(gpus),])
    return result


def _experts_s(decoder: Decoder, card: str, gpus: int, eight_bit: bool, tokens: Floats) -> Floats:
    """Return the seconds of a layer's routed experts, to which tokens spread evenly.

    The tables' kernels of 8-bit experts are slower than those of 16 bits, which read twice as much:
    no engine that is tuned would run them.
    """
    if eight_bit:
        raise KernelsError("no times of tuned kernels for 8-bit experts were published")
    sizes, rows = _table(card, "experts", 6)
    shape = (decoder.hidden, decoder.inner, decoder.experts_per_token, decoder.experts, gpus)
    row = rows.get(("bfloat16", *map(str, shape)))
    if row is None:
        raise KernelsError("no times of routed experts of this shape were published")
    result: Floats = np.interp(tokens, sizes, row)
    more = tokens > sizes[-1]
    result[more] = row[-1] * tokens[more] / sizes[-1]
    return result


def _attention(
    decoder: Decoder, card: str, heads: int, kv_heads: int, eight_bit_cache: bool
) -> AttentionTimes:
    """Gather the attention of all layers, by the tables of the heads that are nearest to these."""
    wanted = ("fp8" if eight_bit_cache else "bfloat16", str(decoder.head_dim))
    contexts, decoding = _table(card, "decode_attention", 5, new_tokens=1)
    share = max(1.0, kv_heads / MOST_KV_HEADS)
    own = _nearest(decoding, wanted, heads / share, kv_heads / share)
    batches = sorted(int(key[4]) for key in decoding if key[:4] == own)
    by_batch = [decoding[(*own, str(batch))] for batch in batches]
    lengths, prefilling = _table(card, "prefill_attention", 4, power=2)
    alike = _nearest(prefilling, wanted, heads, kv_heads)
    prompt_s = prefilling[alike] * heads / int(alike[1])
    layers = decoder.layers
    return AttentionTimes(
        batches=tuple(batches),
        contexts=tuple(int(tokens) for tokens in contexts),
        decode_s=tuple(tuple((layers * times).tolist()) for times in by_batch),
        requests_each=kv_heads / int(own[2]),
        lengths=tuple(int(tokens) for tokens in lengths),
        prefill_s=tuple((layers * prompt_s).tolist()),
    )


def _nearest(
    rows: Mapping[tuple[str, ...], Floats], wanted: tuple[str, str], heads: float, kv_heads: float
) -> tuple[str, ...]:
    """Find the row with these heads, or else with those whose numbers are nearest."""
    kinds = {key[:4] for key in rows if (key[0], key[3]) == wanted}
    if not kinds:
        raise KernelsError(f"no times of attention with heads of {wanted[1]} were published")
    return min(
        sorted(kinds),
        key=lambda kind: (
            abs(math.log(int(kind[2]) / kv_heads)),
            abs(math.log(int(kind[1]) / heads)),
        ),
    )
