"""One file for llama.cpp, written from a tiny random Llama."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serving.weights import to_gguf
from tests.unit.builders import write_tiny_llama
from tests.weights import made

gguf = pytest.importorskip("gguf")


def test_a_gguf_file_has_the_same_weights_in_the_order_that_llama_cpp_expects(
    tmp_path: Path,
) -> None:
    base = write_tiny_llama(tmp_path / "abacus", 1)  # skips the test without torch
    from safetensors.torch import load_file

    about = made(to_gguf.make, base, out := tmp_path / "out")
    reader = gguf.GGUFReader(out / to_gguf.FILE)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "llama"
    assert fields["llama.attention.head_count_kv"] == 1
    assert fields["tokenizer.ggml.pre"] == "gpt-2"
    assert len(fields["tokenizer.ggml.tokens"]) == 256
    tensors = {t.name: t for t in reader.tensors}
    original = load_file(base / "model.safetensors")

    def values(name: str) -> Any:
        found = tensors[name]
        return gguf.quants.dequantize(found.data, found.tensor_type)

    query = original["model.layers.0.self_attn.q_proj.weight"].bfloat16().float().numpy()
    # of each head of 16 rows: 0, 8, 1, 9, .. where the checkpoint has its halves apart
    order = [16 * head + half + at for head in (0, 1) for at in range(8) for half in (0, 8)]
    np.testing.assert_array_equal(values("blk.0.attn_q.weight"), query[order])
    value = original["model.layers.0.self_attn.v_proj.weight"].bfloat16().float().numpy()
    np.testing.assert_array_equal(values("blk.0.attn_v.weight"), value)
    norm = original["model.norm.weight"].float().numpy()
    np.testing.assert_array_equal(values("output_norm.weight"), norm)
    assert about["dtype"] == "bfloat16"
