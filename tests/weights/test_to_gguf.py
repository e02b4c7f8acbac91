"""One file for llama.cpp, written from a tiny random Llama."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serving.models import to_gguf
from tests.unit.builders import write_tiny_llama
from tests.weights import made

gguf = pytest.importorskip("gguf")


def read(out: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read a file back: its fields, and its tensors by name."""
    reader = gguf.GGUFReader(out / to_gguf.FILE)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {t.name: t for t in reader.tensors}


def values(tensor: Any) -> Any:
    return gguf.quants.dequantize(tensor.data, tensor.tensor_type)


# of each head of 16 rows: 0, 8, 1, 9, .. where the checkpoint has its halves apart
ORDER = [16 * head + half + at for head in (0, 1) for at in range(8) for half in (0, 8)]


def test_a_gguf_file_has_the_same_weights_in_the_order_that_llama_cpp_expects(
    tmp_path: Path,
) -> None:
    base = write_tiny_llama(tmp_path / "abacus", 1)  # skips the test without torch
    from safetensors.torch import load_file

    about = made(to_gguf.make, base, out := tmp_path / "out")
    fields, tensors = read(out)
    assert fields["general.architecture"] == "llama"
    assert fields["llama.attention.head_count_kv"] == 1
    assert fields["tokenizer.ggml.pre"] == "gpt-2"
    assert len(fields["tokenizer.ggml.tokens"]) == 256
    original = load_file(base / "model.safetensors")
    query = original["model.layers.0.self_attn.q_proj.weight"].bfloat16().float().numpy()
    np.testing.assert_array_equal(values(tensors["blk.0.attn_q.weight"]), query[ORDER])
    value = original["model.layers.0.self_attn.v_proj.weight"].bfloat16().float().numpy()
    np.testing.assert_array_equal(values(tensors["blk.0.attn_v.weight"]), value)
    norm = original["model.norm.weight"].float().numpy()
    np.testing.assert_array_equal(values(tensors["output_norm.weight"]), norm)
    assert about["dtype"] == "bfloat16"
    assert about["weight_bytes"] == sum(t.n_bytes for t in tensors.values())
    assert "loss_nats" not in about


def test_in_four_bits_the_layers_are_rounded_and_what_that_costs_is_scored(tmp_path: Path) -> None:
    base = write_tiny_llama(tmp_path / "abacus", 1, tie_word_embeddings=False)
    from safetensors.torch import load_file

    (text := tmp_path / "text").write_text("The abacus counts.\n\nSo do we.")
    about = made(to_gguf.make, base, out := tmp_path / "out", method="q4", source=text)
    fields, tensors = read(out)
    assert fields["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q4_0
    kinds = {name: t.tensor_type.name for name, t in tensors.items()}
    assert {k for n, k in kinds.items() if n.startswith("blk.") and "norm" not in n} == {"Q4_0"}
    assert kinds["token_embd.weight"] == kinds["output.weight"] == "BF16"
    assert kinds["output_norm.weight"] == kinds["blk.0.attn_norm.weight"] == "F32"

    original = load_file(base / "model.safetensors")
    query = original["model.layers.0.self_attn.q_proj.weight"].float().numpy()[ORDER]
    lost = np.abs(values(tensors["blk.0.attn_q.weight"]) - query)
    step = np.abs(query).max(axis=1, keepdims=True) / 8  # 32 wide: a row shares a scale
    assert (lost <= 1.01 * step).all()
    assert lost.max() > 0.2 * step.min()

    # an untied input embedding is looked up, and not read
    read_bytes = sum(t.n_bytes for name, t in tensors.items() if name != "token_embd.weight")
    assert about["weight_bytes"] == read_bytes
    assert about["passages_tokens"] == [17, 8]
    before, after = about["loss_nats"]["bf16"], about["loss_nats"]["q4"]
    assert len(before) == len(after) == 2
    assert before != after


def test_weights_that_q4_0_holds_already_lose_nothing(tmp_path: Path) -> None:
    base = write_tiny_llama(tmp_path / "abacus", 1)
    from safetensors.torch import load_file, save_file

    from tests.weights import torch

    weights = load_file(base / "model.safetensors")
    for name, weight in weights.items():
        if ".layers." in name and weight.ndim == 2:
            levels = torch.arange(weight.numel()).reshape(weight.shape) % 16 - 8
            weights[name] = levels.float() / 64
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    (text := tmp_path / "text").write_text("The abacus counts.")
    about = made(to_gguf.make, base, out := tmp_path / "out", method="q4", source=text)
    _, tensors = read(out)
    query = weights["model.layers.0.self_attn.q_proj.weight"].numpy()
    np.testing.assert_array_equal(values(tensors["blk.0.attn_q.weight"]), query[ORDER])
    assert about["loss_nats"]["bf16"] == about["loss_nats"]["q4"]
