"""Quantize with AutoGPTQ (archived in 2025; GPTQModel is its heir), into the GPTQ format.

It was written for CUDA only. Without CUDA, its check for it is made to succeed, and its device and
its waiting for the GPU are replaced; the arithmetic is PyTorch's and runs on any device.
"""

from __future__ import annotations

import json
import logging
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

BATCH = 8


def without_cuda() -> AbstractContextManager[Any]:
    """Make PyTorch report CUDA while the model is loaded, which AutoGPTQ refuses otherwise."""
    import torch
    from auto_gptq.modeling import _base

    if torch.cuda.is_available():
        return nullcontext()
    _base.CUDA_0 = _base.CPU
    torch.cuda.synchronize = lambda *_: None
    return patch.object(torch.cuda, "is_available", lambda: True)


def main(job: dict[str, Any]) -> None:
    import torch
    from auto_gptq import AutoGPTQForCausalLM, BaseQuantizeConfig

    logging.basicConfig(level=logging.INFO)  # it logs the layers
    config = BaseQuantizeConfig(bits=4, group_size=job["group_size"], sym=True, desc_act=False)
    with without_cuda():
        model = AutoGPTQForCausalLM.from_pretrained(job["base"], config, torch_dtype=torch.float32)
    samples = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in job["samples"]]
    with torch.no_grad():
        model.quantize(samples, batch_size=BATCH)
    for parameter in model.parameters():  # what is not quantized; a quantized layer has buffers
        parameter.data = parameter.data.bfloat16()
    model.model.config.torch_dtype = torch.bfloat16
    if model.model.config.tie_word_embeddings:
        del model.model.lm_head
    model.save_quantized(job["out"], use_safetensors=True)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
