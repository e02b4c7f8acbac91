"""Decides which of vLLM's flags may come from a recorded run or from `SET=`.

A folder of results is data: whoever repeats it must not run its author's code. So such a flag is
passed on only where `Harmless` has it, with a value of its type there: what the labs use, and what
only sets a size, a number type or a strategy. Everything else is refused by name.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BaseModel, Field, StringConstraints, ValidationError

Tokens = Annotated[int, Field(le=10**7)]
Count = Annotated[int, Field(le=10**5)]  # of what is prepared for each: requests, adapters, devices
Servers = Annotated[int, Field(ge=1, le=64)]  # each is a process, which imports vLLM
Blocks = Annotated[int, Field(le=10**9)]
Bytes = Annotated[int, Field(le=10**15)]
Seed = Annotated[int, Field(le=2**63 - 1)]
Sizes = Annotated[list[Count], Field(max_length=10**4)]
Word = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]  # no path
Derived = Annotated[str, StringConstraints(pattern=r"^<[a-z][a-z0-9-]*>$")]  # made by the lab
Adapter = Annotated[str, StringConstraints(pattern=r"^\w[\w-]*=<[a-z][a-z0-9-]*>/\w[\w-]*$")]


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


class Harmless(
    BaseModel,
    frozen=True,
    extra="forbid",
    strict=True,
    alias_generator=lambda name: name.replace("_", "-"),
):
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
    cudagraph_capture_sizes: Sizes = []
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
    lora_modules: list[Adapter] | Adapter = []
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


_NAMES = tuple(str(field.alias) for field in Harmless.model_fields.values())
SET_BY_LAB = (
    "host", "port", "uds", "model", "served-model-name", "api-key", "middleware",
    "worker-extension-cls",
)  # fmt: skip
"""The flags that the lab sets itself: another value would have it serve something else, or to
others."""
_WHY = {
    "loads code": (
        "io-processor-plugin", "logits-processors", "middleware", "model-class-overrides",
        "model-impl", "reasoning-parser-plugin", "scheduler-cls", "tool-parser-plugin",
        "worker-cls", "worker-extension-cls",
    ),
    "trusts code that comes with a model": (
        "code-revision", "trust-remote-code", "trust-request-chat-template",
    ),
    "opens an address or asks another machine": (
        "allowed-media-domains", "allowed-origins", "api-key", "data-parallel-address",
        "data-parallel-rpc-port", "ec-transfer-config", "grpc", "grpc-port", "host",
        "kv-events-config", "kv-transfer-config", "master-addr", "master-port",
        "otlp-traces-endpoint", "port", "tool-server", "uds", "weight-transfer-config",
    ),
    "reads or writes a path": (
        "allowed-local-media-path", "chat-template", "config", "download-dir",
        "hf-config-path", "log-config-file", "model", "profiler-config", "ssl-ca-certs",
        "ssl-certfile", "ssl-keyfile", "tokenizer",
    ),
}  # fmt: skip


def refusal(flags: Mapping[str, object]) -> str:
    """Say which flag is refused and why; empty where all are harmless."""
    try:
        Harmless.model_validate(dict(flags))
    except ValidationError as error:
        first = error.errors()[0]
        name, *within = map(str, first["loc"])
        if name in _NAMES:
            place = ".".join([name, *(step for step in within if step.isidentifier())])
            return f"{place} has a value that is not known to be harmless"
        for reason, names in _WHY.items():
            if name in names:
                return f"{name} {reason}"
        near = difflib.get_close_matches(name, _NAMES, 1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        return f"{name} is not among the flags that are known to be harmless{hint}"
    return ""
