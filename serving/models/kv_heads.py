"""The same model with another number of KV heads.

`mha` copies each KV head for every query head that shares it (multi-head attention). A query then
meets the same keys and values as before, so the answers are the same, and only the cache, the
reading of it and two projections a layer are larger. `mqa` leaves one KV head for all query heads,
the mean of the others (multi-query attention): that is how such models begin their training
(Ainslie et al., "GQA", 2023), so without any its text is worth nothing, and its speed is real.

Weights are read and written shard by shard. Models whose projections of keys and values are stored
apart, as Llama's and Qwen's are, can be converted; quantized ones cannot.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from serving.models import catalog, making
from serving.models.catalog import INDEX
from serving.models.making import MakerError

PROJECTIONS = (".k_proj.", ".v_proj.")


def kv_heads_of(method: str, config: Mapping[str, Any]) -> int:
    """Return how many KV heads the converted model has."""
    return int(config["num_attention_heads"]) if method == "mha" else 1


def converted(tensor: Any, method: str, heads: int, kv_heads: int) -> Any:
    """Convert a weight or a bias whose rows are those of all KV heads, one head after another.

    Query head h attends to KV head h // (heads / kv_heads), so a head's copies are neighbours.
    """
    by_head = tensor.unflatten(0, (kv_heads, -1))
    if method == "mha":
        by_head = by_head.repeat_interleave(heads // kv_heads, dim=0)
    else:
        by_head = by_head.float().mean(dim=0, keepdim=True).to(tensor.dtype)
    return by_head.flatten(0, 1).contiguous()


def make(base: Path, out: Path, method: str) -> dict[str, Any]:
    """Write the converted model. Raises MakerError where it cannot be converted."""
    from safetensors.torch import load_file, save_file

    config = making.read_config(base)
    heads = int(config.get("num_attention_heads") or 0)
    kv_heads = int(config.get("num_key_value_heads") or heads)
    if not heads or heads % kv_heads:
        raise MakerError(f"{base} is of a kind whose heads are not known: {heads} and {kv_heads}")
    making.require_16_bits(base, config)
    shards, size_bytes, converted_count = catalog.shards(base), 0, 0
    for number, shard in enumerate(shards, 1):
        tensors = load_file(shard)
        for name in (n for n in tensors if any(p in n for p in PROJECTIONS)):
            tensors[name] = converted(tensors[name], method, heads, kv_heads)
            converted_count += 1
        size_bytes += sum(t.numel() * t.element_size() for t in tensors.values())
        save_file(tensors, out / shard.name, metadata={"format": "pt"})
        print(f"{number} of {len(shards)} files of weights", flush=True)
    if not converted_count:
        raise MakerError(f"{base} stores no k_proj and v_proj: its KV heads cannot be changed")
    making.copy_others(base, out)
    now = kv_heads_of(method, config)
    _write(out / "config.json", {**config, "num_key_value_heads": now})
    if (out / INDEX).exists():
        index = json.loads((out / INDEX).read_text())
        _write(out / INDEX, {**index, "metadata": {"total_size": size_bytes}})
    return {"method": method, "heads": heads, "kv_heads": now, "kv_heads_before": kv_heads}


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1))
