"""How a model's configuration says that its weights are held, and what vLLM then computes with."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

PLAIN = "BF16"
EXPECTED: Mapping[str, tuple[str, ...]] = {
    # kind -> how the names of vLLM's schemes and methods for it begin
    PLAIN: ("Unquantized",),
    "W8A8": ("CompressedTensorsW8A8Int8",),
    "FP8": ("CompressedTensorsW8A8Fp8", "CompressedTensorsW8A16Fp8"),  # before Ada: weights alone
    "W4A16": ("CompressedTensorsWNA16",),
    "W4A16 AWQ": ("AutoAWQMarlinLinearMethod",),
    "W4A16 GPTQ": ("AutoGPTQLinearMethod",),
}


def kind_of(config: Mapping[str, Any]) -> str:
    """Name how a model's `config.json` says that its linear layers are held: a kind of EXPECTED."""
    quantization = config.get("quantization_config")
    if not quantization:
        return PLAIN
    if "config_groups" not in quantization:  # AutoAWQ's and AutoGPTQ's formats
        return f"W{quantization['bits']}A16 {quantization['quant_method'].upper()}"
    (group,) = quantization["config_groups"].values()
    weights, inputs = group["weights"], group["input_activations"]
    if weights["type"] == "float":
        return "FP8"
    return f"W{weights['num_bits']}A{inputs['num_bits'] if inputs else 16}"


def unexpected(kind: str, layers: Collection[str]) -> str:
    """Say which layers of a model of this kind are computed in another way; "": none is."""
    if not layers:
        return "it has no linear layer"
    others = [name for name in layers if not name.startswith(EXPECTED[kind])]
    return f"{kind} is computed by {', '.join(others)}" if others else ""
