"""vLLM's flags, checks and log, as its module reads them."""

import pytest

from serving.engines.vllm import resolved

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
