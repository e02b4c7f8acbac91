"""Quantize with AutoAWQ (archived in 2025; llm-compressor took it in), into the AWQ format.

Without a GPU it writes useless weights without a warning: before it tries a scale it saves the
weights with `.cpu()`, which on a CPU is no copy, so that every attempt starts from the one before.
Here they are copied. The search for a clipping range is left out: it doubles the time.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main(job: dict[str, Any]) -> None:
    import torch
    from awq import AutoAWQForCausalLM
    from awq.quantize.quantizer import AwqQuantizer

    search = AwqQuantizer._compute_best_scale

    def with_copies(self: Any, x: Any, w_mean: Any, x_mean: Any, module: Any, *more: Any) -> Any:
        weights = module.state_dict
        module.state_dict = lambda: {name: w.clone() for name, w in weights().items()}
        try:
            return search(self, x, w_mean, x_mean, module, *more)
        finally:
            del module.state_dict

    AwqQuantizer._compute_best_scale = with_copies
    model = AutoAWQForCausalLM.from_pretrained(
        job["base"], torch_dtype=torch.float32, device_map=None, trust_remote_code=False
    )
    model.quantize(
        None,
        quant_config={
            "w_bit": 4,
            "q_group_size": job["group_size"],
            "zero_point": True,
            "version": "GEMM",
        },
        calib_data=job["samples"],
        max_calib_samples=len(job["samples"]),
        max_calib_seq_len=len(job["samples"][0]),
        apply_clip=False,
    )
    for parameter in model.parameters():  # what is not quantized; a quantized layer has buffers
        parameter.data = parameter.data.bfloat16()
    if model.model.config.tie_word_embeddings:
        del model.model.lm_head
    model.save_quantized(job["out"])


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
