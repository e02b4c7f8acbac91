"""The KV cache: how many blocks it has, and the prefixes that stay in them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

from tests.fake.engine.metrics import Metrics
from tests.fake.engine.request import Request

BLOCKS = 8192  # where neither their number nor a model's memory is given


class KVCache:
    def __init__(self, options: argparse.Namespace, metrics: Metrics) -> None:
        self.blocks = _blocks_in(options)
        self.kept_free = int(options.watermark * self.blocks)
        self._options, self._metrics = options, metrics
        self._prefixes: dict[int, None] = {}  # hashes of the cached blocks, the oldest use first

    def filled(self, requests: Iterable[Request]) -> int:
        """How many blocks these requests fill with what they have and their next token."""
        size = self._options.block_size
        window = self._options.hf_overrides.get("sliding_window")
        most = -(-(window - 1) // size) + 1 if window else self.blocks
        return sum(min(most, -(-request.length // size)) for request in requests)

    def look_up(self, request: Request) -> int:
        """How many of the prompt's tokens the prefix cache holds; holds all full blocks after.

        As in vLLM: whole blocks, each known by all that precedes it, and at least one token is
        left to compute. A prompt whose logprobs are wanted is computed whole.
        """
        if not self._options.enable_prefix_caching or request.top is not None:
            return 0
        prompt, size = request.prompt, self._options.block_size
        key, hits, unbroken = hash((request.adapter, request.salt)), 0, True
        for i in range(0, len(prompt) - size + 1, size):
            key = hash((key, *prompt[i : i + size]))
            unbroken = unbroken and key in self._prefixes and i + size < len(prompt)
            hits += size * unbroken
            self._prefixes.pop(key, None)
            self._prefixes[key] = None
        while len(self._prefixes) > self.blocks:
            del self._prefixes[next(iter(self._prefixes))]
        self._metrics.counters["prefix_cache_queries_total"] += len(prompt)
        self._metrics.counters["prefix_cache_hits_total"] += hits
        return hits

    def reset_prefixes(self) -> None:
        """Forget every prefix."""
        self._prefixes.clear()


def _blocks_in(options: argparse.Namespace) -> int:
    """The number of blocks: as given, or as the memory holds of this model's in this type."""
    path = Path(options.model) / "config.json"
    if options.num_gpu_blocks_override is not None:
        return int(options.num_gpu_blocks_override)
    if options.kv_cache_memory_bytes is None or not path.exists():
        return BLOCKS
    config = json.loads(path.read_text())
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    values = 2 * config["num_hidden_layers"] * (config.get("num_key_value_heads") or heads)
    wide = 4 if options.dtype == "float32" else 2
    each = 1 if options.kv_cache_dtype.startswith("fp8") else wide
    return int(options.kv_cache_memory_bytes // (options.block_size * values * head_dim * each))
