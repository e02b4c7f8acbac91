"""The stand-in step: the model's own shape in plain torch, timed on the serving device.

No engine exists yet, and no weights are needed: matrices of the model's sizes hold random numbers.
A layer is what a decoder's layer is (two norms, the projections, rotary embedding, attention over
a cache, a gated MLP), launched operation by operation, so that the cost of launching is in the
figures. All layers have weights of their own, so that no cache holds them. Each size is timed
several times, in turn with the others, and the least is kept: other work can only add time.

Adapters (LoRA) are applied as vLLM's CPU backend applies them: each token gathers the two thin
matrices of its adapter, for each of the seven projections of a layer.

Run as `python -m serving.forecasting.timing` with `TimingPlan`s as JSON lines on standard input;
for each it prints a line of `StepTimes`. It does not cover the engine's own kernels where they
differ from torch's, quantized weights, experts, compiled steps, and the scheduler's own time.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel

from serving.forecasting.step import StepTimes

CONTEXT_TOKENS = 32  # the timed layers attend to so many; longer contexts are timed separately
LONG_CONTEXT_TOKENS = 2048
PREFILL_TOKENS = 512
LONG_S = 0.5


class TimingPlan(BaseModel, frozen=True, extra="forbid"):
    """What to time: a model's shape, the device, and the sizes of steps."""

    config: Path  # the model's config.json
    device: str  # `cpu` or `cuda`
    cores: tuple[int, ...] = ()  # a CPU engine's cores: one thread on each
    tokens: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
    rows: tuple[int, ...] = (1, 4, 16, 64)
    adapters: int = 0  # slots for LoRA adapters; 0: none are applied
    adapter_rank: int = 0
    passes: int = 3


class Decoder:
    """The layers of a model's shape, with random weights.

    Raises KeyError where `config` lacks a size of a Llama-like decoder.
    """

    def __init__(
        self, config: dict[str, Any], device: str, adapters: int = 0, adapter_rank: int = 0
    ) -> None:
        import torch

        self.torch, self.device, self.slots = torch, device, adapters
        self.layers, hidden = config["num_hidden_layers"], config["hidden_size"]
        self.heads = config["num_attention_heads"]
        self.kv_heads = config.get("num_key_value_heads") or self.heads
        self.head_dim = config.get("head_dim") or hidden // self.heads
        self.hidden, self.inner = hidden, config["intermediate_size"]
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        self.sizes = [q, kv, kv]

        def matrix(rows: int, columns: int) -> Any:
            return torch.randn(rows, columns, device=device, dtype=torch.bfloat16) * 0.02

        self.weights = [
            (
                matrix(q + 2 * kv, hidden),
                matrix(hidden, q),
                matrix(2 * self.inner, hidden),
                matrix(hidden, self.inner),
                torch.ones(hidden, device=device, dtype=torch.bfloat16),
            )
            for _ in range(self.layers)
        ]
        self.head_weights = matrix(config["vocab_size"], hidden)
        projections = [  # (inputs, outputs) of those that an adapter is added to
            (hidden, q), (hidden, kv), (hidden, kv), (q, hidden),
            (hidden, self.inner), (hidden, self.inner), (self.inner, hidden),
        ]  # fmt: skip
        self.adapters = [
            [
                (
                    torch.zeros(adapters, 1, adapter_rank, inputs, device=device).bfloat16(),
                    torch.zeros(adapters, 1, outputs, adapter_rank, device=device).bfloat16(),
                )
                for inputs, outputs in projections
            ]
            for _ in range(self.layers if adapters else 0)
        ]

    def rotated(self, x: Any, cos: Any, sin: Any) -> Any:
        """Apply rotary embedding to x, of shape (tokens, heads, head dimension)."""
        first, second = x.chunk(2, dim=-1)
        return self.torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

    def adapted(self, x: Any, weights: tuple[Any, Any], slots: Any, y: Any) -> None:
        """Add an adapter's product to y, as vLLM's `bgmv_shrink` and `bgmv_expand_slice` do."""
        torch = self.torch
        shrink, expand = (w[slots].float().squeeze(dim=1) for w in weights)
        thin = torch.empty(x.shape[0], shrink.shape[1], device=self.device)
        thin[:] = 1.0 * torch.einsum("bi,boi->bo", x.float(), shrink)
        y += torch.einsum("bi,boi->bo", thin.to(y.dtype), expand.to(y.dtype))

    def linear(self, tokens: int) -> Callable[[], None]:
        """Return the work of all layers over `tokens`, each with CONTEXT_TOKENS of context."""
        torch, f = self.torch, self.torch.nn.functional
        x = torch.randn(tokens, self.hidden, device=self.device, dtype=torch.bfloat16)
        angle = torch.rand(tokens, 1, self.head_dim // 2, device=self.device).bfloat16()
        keys, values = (
            torch.randn(
                1, self.kv_heads, CONTEXT_TOKENS, self.head_dim, device=self.device
            ).bfloat16()
            for _ in range(2)
        )
        size, none = [self.hidden], [()] * self.layers
        slots = torch.arange(tokens, device=self.device) % max(1, self.slots)

        def adapt(x: Any, weights: Sequence[tuple[Any, Any]], *outputs: Any) -> None:
            for pair, y in zip(weights, outputs, strict=False):
                self.adapted(x, pair, slots, y)

        def run() -> None:
            h = x
            for (qkv_w, out_w, up_w, down_w, norm_w), adapters in zip(
                self.weights, self.adapters or none, strict=True
            ):
                normed = f.rms_norm(h, size, norm_w)
                q, k, v = f.linear(normed, qkv_w).split(self.sizes, dim=-1)
                adapt(normed, adapters[:3], q, k, v)
                q = self.rotated(q.view(tokens, self.heads, -1), angle, angle)
                k = self.rotated(k.view(tokens, self.kv_heads, -1), angle, angle)
                keys[0, :, 0] = k[0]
                values[0, :, 0] = v[0].view(self.kv_heads, -1)
                attended = f.scaled_dot_product_attention(
                    q.transpose(0, 1).unsqueeze(0), keys, values, enable_gqa=True
                )
                flat = attended[0].transpose(0, 1).reshape(tokens, -1)
                out = f.linear(flat, out_w)
                adapt(flat, adapters[3:4], out)
                h = h + out
                normed = f.rms_norm(h, size, norm_w)
                gate, up = f.linear(normed, up_w).chunk(2, dim=-1)
                adapt(normed, adapters[4:6], gate, up)
                inner = f.silu(gate) * up
                down = f.linear(inner, down_w)
                adapt(inner, adapters[6:], down)
                h = h + down

        return run

    def head(self, rows: int) -> Callable[[], None]:
        """Return the work of the output head and greedy sampling over `rows` positions."""
        x = self.torch.randn(rows, self.hidden, device=self.device, dtype=self.torch.bfloat16)
        return lambda: self.torch.nn.functional.linear(x, self.head_weights).argmax(dim=-1)

    def attention(self, tokens: int, context_tokens: int) -> Callable[[], None]:
        """Return the work of attention alone, in all layers: `tokens` after `context_tokens`.

        Without a context the tokens attend to one another causally.
        """
        torch = self.torch
        queries = torch.randn(1, self.heads, tokens, self.head_dim, device=self.device).bfloat16()
        caches = [
            torch.randn(
                2, 1, self.kv_heads, context_tokens + tokens, self.head_dim, device=self.device
            ).bfloat16()
            for _ in range(self.layers)
        ]

        def run() -> None:
            for keys, values in caches:
                torch.nn.functional.scaled_dot_product_attention(
                    queries, keys, values, is_causal=not context_tokens, enable_gqa=True
                )

        return run


def timed(
    works: Sequence[Callable[[], None]], passes: int, wait: Callable[[], None]
) -> list[float]:
    """Return the least seconds of each work, over `passes` in turn after one that warms up.

    A work that takes longer than `LONG_S` is timed once, without a warm-up, which is a small part
    of it. The works ascend in size: after two that take longer than `LONG_S` no larger one is
    timed, and the list is as much shorter. `wait` returns when the device has finished all that it
    was given.
    """
    least = [float("inf")] * len(works)
    for number in range(passes + 1):
        for place, work in enumerate(works):
            if place > 1 and LONG_S < least[place - 2] < float("inf"):
                del least[place:]
                break
            if LONG_S < least[place] < float("inf"):
                continue
            wait()
            start = time.perf_counter()
            work()
            wait()
            seconds = time.perf_counter() - start
            if number or seconds > LONG_S:
                least[place] = min(least[place], seconds)
    return least


def measure(plan: TimingPlan) -> StepTimes:
    """Measure the parts of a step. Raises KeyError where the configuration is of another kind."""
    if plan.cores:
        os.sched_setaffinity(0, plan.cores)
    import torch

    if plan.cores:
        torch.set_num_threads(len(plan.cores))
    torch.manual_seed(0)
    config = json.loads(plan.config.read_text())
    decoder = Decoder(config, plan.device, plan.adapters, plan.adapter_rank)
    wait = torch.cuda.synchronize if plan.device == "cuda" else lambda: None
    with torch.inference_mode():
        linear_s = timed([decoder.linear(n) for n in plan.tokens], plan.passes, wait)
        head_s = timed([decoder.head(n) for n in plan.rows], plan.passes, wait)
        short_s, long_s = timed(
            [decoder.attention(1, n) for n in (CONTEXT_TOKENS, LONG_CONTEXT_TOKENS)],
            plan.passes,
            wait,
        )
        part_s, whole_s = timed(
            [decoder.attention(n, 0) for n in (PREFILL_TOKENS // 4, PREFILL_TOKENS)],
            plan.passes,
            wait,
        )
    pairs = [n * (n + 1) / 2 for n in (PREFILL_TOKENS, PREFILL_TOKENS // 4)]
    return StepTimes(
        tokens=plan.tokens[: len(linear_s)],
        # a larger step cannot take less: where it seems to, the machine was disturbed
        linear_s=tuple(np.maximum.accumulate(linear_s).tolist()),
        rows=plan.rows[: len(head_s)],
        head_s=tuple(np.maximum.accumulate(head_s).tolist()),
        attention_pair_s=max(0.0, (whole_s - part_s) / (pairs[0] - pairs[1])),
        attention_read_s=max(0.0, (long_s - short_s) / (LONG_CONTEXT_TOKENS - CONTEXT_TOKENS)),
    )


if __name__ == "__main__":
    for line in sys.stdin:
        print(measure(TimingPlan.model_validate_json(line)).model_dump_json(), flush=True)
