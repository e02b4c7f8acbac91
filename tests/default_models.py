"""What the default models' own config.json say, biases and the like left out."""

from __future__ import annotations

from typing import Any

FIELDS = (
    "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads",
    "intermediate_size", "vocab_size", "max_position_embeddings", "tie_word_embeddings",
)  # fmt: skip
DEFAULTS = {
    "Qwen/Qwen2.5-1.5B-Instruct": (28, 1536, 12, 2, 8960, 151_936, 32_768, True),
    "Qwen/Qwen2.5-3B-Instruct": (36, 2048, 16, 2, 11_008, 151_936, 32_768, True),
    "Qwen/Qwen2.5-7B-Instruct": (28, 3584, 28, 4, 18_944, 152_064, 32_768, False),
    "NousResearch/Meta-Llama-3.1-8B-Instruct": (
        32, 4096, 32, 8, 14_336, 128_256, 131_072, False,
    ),
    "Qwen/Qwen2.5-32B-Instruct": (64, 5120, 40, 8, 27_648, 152_064, 32_768, False),
}  # fmt: skip
QWEN = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
}
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
}


def config_of(name: str) -> dict[str, Any]:
    """Return a default model's configuration, by its Hugging Face id."""
    family = QWEN if name.startswith("Qwen/") else LLAMA
    sizes = dict(zip(FIELDS, DEFAULTS[name], strict=True))
    return {**family, "dtype": "bfloat16", **sizes}
