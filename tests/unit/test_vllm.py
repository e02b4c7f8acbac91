"""vLLM's flags, checks and log, as its module reads them."""

import pytest

from serving.engines.base import FlagValue
from serving.engines.vllm import VllmFlags, resolved

SAID = (  # by vLLM 0.32, cut
    "(EngineCore pid=7) INFO 11-25 20:56:03 [core.py:133] Initializing a V1 LLM engine (v0.32.0)"
    " with config: model='here', tokenizer_mode=auto, enforce_eager=True, kv_cache_dtype=auto,"
    " observability_config=ObservabilityConfig(cudagraph_metrics=False, jit_monitor_mode='warn'),"
    " compilation_config={'mode': <CompilationMode.NONE: 0>, 'cudagraph_mm_encoder': False,"
    " 'cudagraph_mode': <CUDAGraphMode.FULL_DECODE_ONLY: (2, 0)>, 'cudagraph_num_of_warmups': 0}"
)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (SAID, {"enforce_eager": "True", "compilation_mode": "NONE",
                "cudagraph_mode": "FULL_DECODE_ONLY"}),
        ("a V1 LLM engine with config: enforce_eager=False", {"enforce_eager": "False"}),
        ("", {}),
    ],
)  # fmt: skip
def test_how_a_model_is_run_is_what_the_engine_says(said: str, expected: dict[str, str]) -> None:
    assert resolved(said) == expected


def test_flags_are_read_by_their_types_and_vllms_defaults() -> None:
    flags = VllmFlags({"block-size": 16, "max-model-len": "512", "kv-cache-dtype": "fp8_e4m3"})
    assert (flags.block_size, flags.max_model_len, flags.kv_value_bytes) == (16, 512, 1)
    assert VllmFlags().kv_value_bytes == 2
    assert (flags.max_loras, flags.max_lora_rank, flags.lora_modules) == (1, 16, [])
    assert flags.enable_prefix_caching
    assert flags.enable_chunked_prefill
    assert not VllmFlags({"enable-prefix-caching": False}).enable_prefix_caching
    assert not flags.enforce_eager
    with pytest.raises(KeyError, match="kv-cache-memory-bytes"):
        _ = flags.kv_cache_memory_bytes


def test_flags_say_how_many_devices_share_the_work() -> None:
    flags = VllmFlags({"tensor-parallel-size": 2, "data-parallel-size": 3})
    assert (flags.devices, flags.weight_parts, flags.is_parallel) == (6, 2, True)
    assert (VllmFlags().devices, VllmFlags().is_parallel) == (1, False)


@pytest.mark.parametrize("given", [{"method": "ngram"}, '{"method": "ngram"}'])
def test_how_it_guesses_ahead_may_come_as_json(given: FlagValue) -> None:
    assert VllmFlags({"speculative-config": given}).speculative_config == {"method": "ngram"}
    assert VllmFlags().speculative_config == {}
