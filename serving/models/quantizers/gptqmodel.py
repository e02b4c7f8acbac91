"""Quantize with GPTQModel, the maintained heir of AutoGPTQ, into the GPTQ format.

It packs the weights in its plainest way: the other ways compile C++ first.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

BATCH = 8


def main(job: dict[str, Any]) -> None:
    os.environ["GPTQMODEL_CPU_WORKERS"] = str(os.cpu_count())  # else more than there are cores
    os.chdir(Path(job["out"]).parent)  # it writes logs/ wherever it stands
    import torch
    from gptqmodel import GPTQModel, QuantizeConfig

    config = QuantizeConfig(
        bits=4,
        group_size=job["group_size"],
        sym=True,
        desc_act=False,
        offload_to_disk=False,
        pack_impl="original",
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = GPTQModel.load(job["base"], config, device=device, dtype=torch.bfloat16)
    samples = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in job["samples"]]
    model.quantize(samples, batch_size=BATCH)
    model.save(job["out"])


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
