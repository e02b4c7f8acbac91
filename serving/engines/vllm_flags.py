"""vLLM's flags: what the labs read of them, and which are harmless, by vLLM's own names."""

from __future__ import annotations

import json
import math
from typing import Any, Literal

from pydantic import BaseModel, Field

from serving.engines.flags import (
    Adapter,
    Blocks,
    Bytes,
    Count,
    Derived,
    FlagValue,
    Harmless,
    Seed,
    Servers,
    Sizes,
    Switch,
    Tokens,
    TypedFlags,
    WholeNumber,
    Word,
)
from serving.models.catalog import Shape

PARALLEL = ("tensor-parallel-size", "pipeline-parallel-size", "data-parallel-size")
QUEUE_LIMITS = ("max-num-queued-reqs", "max-num-queued-tokens")
ROUTER_FLAGS = (
    "replicas",
    "router-policy",
    "router-cache-threshold",
    "router-balance-abs-threshold",
    "router-balance-rel-threshold",
)
"""The lab's own: how many such engines stand behind a router (`serving/engines/routed.py`), and the
router's flags by its names, with `router-` before them."""
LEAST_BLOCK_TOKENS = 16  # counted where no size of a block is given


class VllmFlags(TypedFlags):
    """An engine's flags by vLLM's names, with typed access to those that the labs use.

    Defaults are those of vLLM 0.32's configuration classes (vllm/config/*.py). A flag whose default
    vLLM takes from the model or the device has none here: reading it unset is a KeyError.
    """

    max_model_len = WholeNumber()  # the most tokens of a prompt and its answer together
    max_num_batched_tokens = WholeNumber()  # the most that a step computes
    max_num_seqs = WholeNumber()  # the most requests in a step; others wait
    kv_cache_memory_bytes = WholeNumber()
    block_size = WholeNumber()  # tokens in a block of the KV cache
    num_gpu_blocks_override = WholeNumber(0)  # whatever its memory; 0: the memory decides
    enable_prefix_caching = Switch(True)
    enable_chunked_prefill = Switch(True)
    enforce_eager = Switch(False)
    max_loras = WholeNumber(1)  # the most adapters in one batch
    max_lora_rank = WholeNumber(16)
    tensor_parallel_size = WholeNumber(1)  # devices that share each layer
    api_server_count = WholeNumber(1)  # processes that answer, in front of all engine cores
    replicas = WholeNumber(1)  # engines behind a router

    def at_once(self, requests: int) -> int:
        """Return how many of so many requests are in a step: all, or as many as its limit says."""
        return min(requests, self.integer("max-num-seqs", requests))

    @property
    def turns_away(self) -> bool:
        """Whether it refuses requests, with HTTP 503, once too many are waiting."""
        return any(self.get(flag) is not None for flag in QUEUE_LIMITS)

    @property
    def max_num_queued_reqs(self) -> int | None:
        """The most requests that wait or run; one beyond them is turned away. None: any number."""
        return None if self.get(QUEUE_LIMITS[0]) is None else self.integer(QUEUE_LIMITS[0])

    @property
    def max_num_queued_tokens(self) -> int | None:
        """The tokens of prompts without a first token from which on requests are turned away."""
        return None if self.get(QUEUE_LIMITS[1]) is None else self.integer(QUEUE_LIMITS[1])

    def without_queue_limits(self) -> VllmFlags:
        """Return these flags without those that limit the queue."""
        return VllmFlags({flag: at for flag, at in self.items() if flag not in QUEUE_LIMITS})

    @property
    def router(self) -> dict[str, FlagValue]:
        """The router's flags by its own names; empty where requests go to the engine itself."""
        named = {flag.removeprefix("router-"): self.get(flag) for flag in ROUTER_FLAGS[1:]}
        return {flag: value for flag, value in named.items() if value is not None}

    def without_router(self) -> VllmFlags:
        """Return the flags of each engine behind the router."""
        return VllmFlags({flag: at for flag, at in self.items() if flag not in ROUTER_FLAGS})

    @property
    def sliding_window(self) -> int | None:
        """The tokens to which each layer attends; None where it attends to as many as its model."""
        overrides = self.get("hf-overrides")
        window = overrides.get("sliding_window") if isinstance(overrides, dict) else None
        return window if isinstance(window, int) else None

    def held_kv_bytes(self, shape: Shape, default_bytes: int = 0) -> float:
        """Return the bytes of the KV cache on each device: as given, or of its blocks if more."""
        given_bytes = self.integer("kv-cache-memory-bytes", default_bytes)
        block_tokens = self.integer("block-size", LEAST_BLOCK_TOKENS)
        token_bytes = shape.kv_bytes_per_token(self.kv_value_bytes) / self.kv_parts(shape.kv_heads)
        return max(given_bytes, self.num_gpu_blocks_override * block_tokens * token_bytes)

    @property
    def watermark(self) -> float:
        """The share of all blocks that stays free where a request is admitted beside others."""
        return float(str(self.get("watermark", 0)))

    @property
    def kv_cache_dtype(self) -> str:
        """The type in which keys and values are cached; `auto`: in that of the model."""
        return str(self.get("kv-cache-dtype", "auto"))

    @property
    def quantizes_cache(self) -> bool:
        """Whether keys and values are cached in another type than that of the model, or BF16."""
        return self.kv_cache_dtype not in ("auto", "bfloat16")

    @property
    def kv_value_bytes(self) -> int:
        """The bytes of a cached number, without the few scales of a quantized cache."""
        if self.kv_cache_dtype == "auto":
            return self.value_bytes
        return 1 if self.kv_cache_dtype.startswith(("fp8", "int8")) else 2

    @property
    def in_float32(self) -> bool:
        """Whether the engine holds weights that have 16 bits in their file in float32."""
        return self.get("dtype") in ("float32", "float")

    @property
    def value_bytes(self) -> int:
        """The bytes of a weight that has 16 bits in its file, as the engine holds it."""
        return 4 if self.in_float32 else 2

    @property
    def kv_offloading_bytes(self) -> int:
        """The host's memory for blocks that the KV cache has evicted; 0 where there is none."""
        return int(float(str(self.get("kv-offloading-size", 0))) * 2**30)  # it is in GiB

    @property
    def speculative_config(self) -> dict[str, Any]:
        """The settings of speculative decoding; empty without it."""
        value = self.get("speculative-config", {})
        return dict(value) if isinstance(value, dict) else dict(json.loads(str(value)))

    @property
    def structured_outputs_backend(self) -> str:
        """The backend that compiles structures; vLLM chooses one for each where it is `auto`."""
        config = self.get("structured-outputs-config", {})
        return str(config.get("backend", "auto")) if isinstance(config, dict) else "auto"

    @property
    def lora_modules(self) -> list[str]:
        """The adapters that it serves from its start, each as `name=folder`."""
        value = self.get("lora-modules", [])
        return list(value) if isinstance(value, list) else [str(value)]

    @property
    def is_parallel(self) -> bool:
        """Whether any flag says how many devices share the work, even if that is one."""
        return any(flag in self for flag in PARALLEL)

    @property
    def devices(self) -> int:
        """The devices that it needs: tensor x pipeline x data parallelism."""
        return math.prod(self.integer(flag, 1) for flag in PARALLEL)

    @property
    def weight_parts(self) -> int:
        """The devices that share one copy of the weights: tensor x pipeline parallelism."""
        return math.prod(self.integer(flag, 1) for flag in PARALLEL[:2])

    def kv_parts(self, kv_heads: int) -> int:
        """The devices that share the keys and values of a token: no head is divided."""
        return min(self.tensor_parallel_size, kv_heads) * self.integer(PARALLEL[1], 1)

    @property
    def copies(self) -> int:
        """The copies of the model that share the requests: data parallelism, replicas, or both."""
        return self.replicas * self.integer("data-parallel-size", 1)

    @property
    def uses_ray(self) -> bool:
        return self.get("distributed-executor-backend") == "ray"


class Speculation(BaseModel, frozen=True, extra="forbid", strict=True):
    """Lists what may be set of speculative decoding: a draft model is one that the lab makes."""

    method: Word | None = None
    model: Derived | None = None
    num_speculative_tokens: Count | None = None
    prompt_lookup_min: Count | None = None
    prompt_lookup_max: Count | None = None
    draft_tensor_parallel_size: Count | None = None
    rejection_sample_method: Word | None = None
    synthetic_acceptance_rates: list[float] | None = None


class Compilation(BaseModel, frozen=True, extra="forbid", strict=True):
    """Lists what may be set of compilation: no pass, backend or folder of one's own."""

    mode: Count | Word | None = None
    cudagraph_mode: Word | None = None
    cudagraph_capture_sizes: Sizes | None = None
    max_cudagraph_capture_size: Count | None = None


class Attention(BaseModel, frozen=True, extra="forbid", strict=True):
    """Lists what may be set of attention: which kernels, and how far they split the keys."""

    backend: Word | None = None
    flash_attn_version: Count | None = None
    flash_attn_max_num_splits_for_cuda_graph: Count | None = None


class ModelOverrides(BaseModel, frozen=True, extra="forbid", strict=True):
    """Lists what may be set of a model's configuration: how far its layers attend, and no class."""

    sliding_window: Tokens | None = None
    layer_types: list[Word] | None = None


class StructuredOutputs(BaseModel, frozen=True, extra="forbid", strict=True):
    """Lists what may be set of structured outputs: no plug-in of one's own."""

    backend: Word | None = None
    disable_any_whitespace: bool | None = None


Policy = Literal["round_robin", "power_of_two", "cache_aware", "random"]


class VllmHarmless(Harmless, frozen=True):
    """Lists vLLM's flags that load no code, open no address and name no path, with their types."""

    # lengths and batches
    max_model_len: Tokens = 0
    max_num_seqs: Count = 0
    max_num_batched_tokens: Tokens = 0
    max_num_scheduled_tokens: Tokens = 0
    max_num_queued_reqs: Count = 0
    max_num_queued_tokens: Tokens = 0
    long_prefill_token_threshold: Tokens = 0
    enable_chunked_prefill: bool = False
    scheduling_policy: Word = ""
    async_scheduling: bool = False
    stream_interval: Count = 0
    api_server_count: Servers = 1
    seed: Seed = 0
    max_logprobs: Count = 0
    # the KV cache
    block_size: Count = 0
    kv_cache_dtype: Word = ""
    kv_cache_memory_bytes: Bytes = 0
    num_gpu_blocks_override: Blocks = 0
    watermark: float = 0
    gpu_memory_utilization: float = 0
    cpu_offload_gb: float = 0
    kv_offloading_size: float = 0
    enable_prefix_caching: bool = False
    prefix_caching_hash_algo: Word = ""
    # the model and how it is computed
    dtype: Word = ""
    hf_overrides: ModelOverrides = ModelOverrides()
    quantization: Word = ""
    enforce_eager: bool = False
    attention_backend: Word = ""
    attention_config: Attention = Attention()
    moe_backend: Word = ""
    linear_backend: Word = ""
    optimization_level: Count = 0
    performance_mode: Word = ""
    compilation_config: Compilation = Compilation()
    cudagraph_capture_sizes: Sizes = Field(default_factory=list)
    max_cudagraph_capture_size: Count = 0
    disable_cascade_attn: bool = False
    disable_sliding_window: bool = False
    generation_config: Literal["auto", "vllm"] = "auto"
    structured_outputs_config: StructuredOutputs = StructuredOutputs()
    # speculative decoding and adapters
    speculative_config: Speculation = Speculation()
    enable_lora: bool = False
    max_loras: Count = 0
    max_lora_rank: Count = 0
    max_cpu_loras: Count = 0
    lora_dtype: Word = ""
    fully_sharded_loras: bool = False
    lora_modules: list[Adapter] | Adapter = Field(default_factory=list)
    # several devices
    tensor_parallel_size: Count = 0
    pipeline_parallel_size: Count = 0
    data_parallel_size: Count = 0
    decode_context_parallel_size: Count = 0
    enable_expert_parallel: bool = False
    enable_eplb: bool = False
    enable_dbo: bool = False
    all2all_backend: Word = ""
    disable_custom_all_reduce: bool = False
    distributed_executor_backend: Literal["mp", "ray", "uni"] = "mp"
    data_parallel_backend: Literal["mp", "ray"] = "mp"
    # engines behind a router
    replicas: Servers = 1
    router_policy: Policy = "round_robin"
    router_cache_threshold: float = 0
    router_balance_abs_threshold: Count = 0
    router_balance_rel_threshold: float = 0
