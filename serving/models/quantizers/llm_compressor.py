"""Quantize with llm-compressor, vLLM's own tool, into the compressed-tensors format.

`lm_head` and the embeddings stay BF16: they affect every token, and errors there do not cancel.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

BATCH = 8  # samples: one at a time took six times as long


def recipe(method: str, group_size: int) -> list[Any]:
    """Return the modifiers that a method consists of, in their order."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform import AWQModifier, SmoothQuantModifier

    def int4(symmetric: bool) -> dict[str, Any]:
        weights = QuantizationArgs(
            num_bits=4, strategy="group", group_size=group_size, symmetric=symmetric
        )
        scheme = QuantizationScheme(targets=["Linear"], weights=weights)
        return {"config_groups": {"linear": scheme}}

    def with_preset(scheme: str) -> dict[str, str]:
        return {"targets": "Linear", "scheme": scheme}

    methods: dict[str, tuple[list[Any], Any, dict[str, Any]]] = {
        "fp8": ([], QuantizationModifier, with_preset("FP8_DYNAMIC")),
        "w8a8-rtn": ([], QuantizationModifier, with_preset("W8A8")),
        "w8a8": ([SmoothQuantModifier()], GPTQModifier, with_preset("W8A8")),
        "w4a16-rtn": ([], QuantizationModifier, int4(symmetric=True)),
        "w4a16-gptq": ([], GPTQModifier, int4(symmetric=True)),
        "w4a16-awq": ([AWQModifier()], QuantizationModifier, int4(symmetric=False)),
    }
    transform, modifier, scheme = methods[method]
    return [*transform, modifier(ignore=["lm_head"], **scheme)]


def main(job: dict[str, Any]) -> None:
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.pipelines.cache import IntermediatesCache
    from transformers import AutoModelForCausalLM

    if not torch.accelerator.is_available():  # AWQ pins memory, for copies to one
        IntermediatesCache.pin_memory = lambda *_: None
    device = "auto" if torch.cuda.is_available() else "cpu"
    in_float32 = job["in_float32"] and device == "cpu"
    dtype = torch.float32 if in_float32 else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(job["base"], dtype=dtype, device_map=device)
    samples = job["samples"]
    data = {"input_ids": samples, "attention_mask": [[1] * len(ids) for ids in samples]}
    calibration = {
        "dataset": Dataset.from_dict(data),
        "num_calibration_samples": len(samples),
        "max_seq_length": max(map(len, samples), default=0),
        "batch_size": BATCH,
        "shuffle_calibration_samples": False,  # it has no seed
    }
    modifiers = recipe(job["method"], job["group_size"])
    oneshot(model=model, recipe=modifiers, **(calibration if samples else {}))
    if in_float32:
        model = model.bfloat16()
    model.save_pretrained(job["out"], save_compressed=True)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
