"""The default models and what the labs derive from them, as folders with a configuration alone.

From GPTQ's files vLLM also reads which layers are quantized: there, the weights' names are listed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from serving.models import catalog, dummy
from serving.models.catalog import Model, shape_of
from serving.models.kv_heads import kv_heads_of
from tests.default_models import config_of

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}
AWQ = {
    "quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm",
}  # fmt: skip
PUBLISHED: Mapping[str, Mapping[str, Any]] = {
    # derived model -> how its published or foreign tool's files describe their quantization
    "w4a16-awq": AWQ,
    "autoawq": AWQ,
    "auto-gptq": GPTQ,
    "gptqmodel": GPTQ,
}
LIKE = {"w8a8-rtn": "w8a8", "w4a16-rtn": "w4a16-gptq", "w4a16-gptq-code": "w4a16-gptq"}


PROJECTIONS = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)  # of each layer of a dense model, as Llama and Qwen name them


def derived_config(config: dict[str, Any], name: str) -> dict[str, Any]:
    """Return the configuration of what a lab derives from a model by this name."""
    if name in PUBLISHED:
        return {**config, "quantization_config": dict(PUBLISHED[name])}
    precision = LIKE.get(name, name)
    if precision in dummy.QUANTIZATIONS:
        return dummy.quantized(config, precision)
    if name in ("mha", "mqa"):
        return {**config, "num_key_value_heads": kv_heads_of(name, config)}
    if name == "training":
        return {**config, "num_hidden_layers": config["num_hidden_layers"] // 2}
    if name == "draft":
        layers = max(1, config["num_hidden_layers"] // dummy.DRAFT_LAYERS)
        return {**config, "num_hidden_layers": layers}
    return config  # pruned: zeros in the same matrices


def folder(home: Path, name: str, config: dict[str, Any]) -> Path:
    """Write a model's folder without weights: its configuration, and the bundled tokenizer."""
    made = home / name.replace("/", "--")
    made.mkdir(parents=True, exist_ok=True)
    for part in catalog.TOKENIZER:
        shutil.copyfile(catalog.bundled_tokenizer() / part, made / part)
    (made / "config.json").write_text(json.dumps(config, indent=1))
    return made


def list_quantized(file: Path, layers: int) -> None:
    """Write a file of weights that names the quantized ones of each layer, and holds nothing."""
    names = (f"model.layers.{i}.{name}.qweight" for i in range(layers) for name in PROJECTIONS)
    save_file({name: np.empty(0, np.int32) for name in names}, file)


def model(home: Path, name: str, derived: str = "") -> Model:
    """Return a default model by its Hugging Face id, or what is derived from it."""
    config = config_of(name)
    if derived:
        config = derived_config(config, derived)
    made = folder(home, f"{name}-{derived}" if derived else name, config)
    if PUBLISHED.get(derived) is GPTQ:
        list_quantized(made / "model.safetensors", config["num_hidden_layers"])
    return Model(name, made, shape_of(config_of(name)))
