"""The same model with other KV heads: what stays the same, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from serving.models import catalog, prune
from serving.models.kv_heads import converted, make
from serving.models.making import MakerError
from tests.unit.builders import write_tiny_llama
from tests.weights import made, needs_torch, torch

pytestmark = needs_torch


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Four query heads of eight numbers, two KV heads."""
    folder = tmp_path / "base"
    return write_tiny_llama(
        folder, 2, num_attention_heads=4, num_key_value_heads=2, attention_bias=True
    )


def logits(folder: Path) -> object:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.tensor([[5, 7, 11, 13, 17]])).logits


def test_copied_heads_answer_as_before(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "mha"
    about = made(make, base, out, method="mha")
    before, after = (catalog.load(folder, "tiny").shape for folder in (base, out))
    assert (before.kv_heads, after.kv_heads) == (2, 4)
    assert after.kv_bytes_per_token() == 2 * before.kv_bytes_per_token()
    # in each layer K and V, of two heads more: 8 rows of 32 weights and a bias
    assert after.params - before.params == 2 * 2 * 2 * 8 * (32 + 1)
    assert torch.allclose(logits(base), logits(out), atol=1e-5)
    assert about["kv_heads"] == 4
    assert (out / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()


def test_one_head_for_all_is_the_mean_of_the_others(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "mqa"
    made(make, base, out, method="mqa")
    assert catalog.load(out, "tiny").shape.kv_heads == 1
    assert not torch.allclose(logits(base), logits(out), atol=1e-3)
    rows = torch.tensor([[1.0, 2.0], [3.0, 4.0]])  # two heads of one row
    assert converted(rows, "mqa", 4, 2).tolist() == [[2.0, 3.0]]
    assert converted(rows, "mha", 4, 2).tolist() == [[1, 2], [1, 2], [3, 4], [3, 4]]


def test_an_index_of_several_files_tells_their_new_size(base: Path, tmp_path: Path) -> None:
    index = {"metadata": {"total_size": 1}, "weight_map": {"a": "model.safetensors"}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    made(make, base, tmp_path / "out", method="mha")
    told = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert told["weight_map"] == index["weight_map"]
    assert told["metadata"]["total_size"] > 10_000


def test_mistrals_own_copy_of_the_weights_is_left_out(base: Path, tmp_path: Path) -> None:
    (base / "consolidated.safetensors").write_bytes((base / "model.safetensors").read_bytes())
    (base / "params.json").write_text("{}")
    made(make, base, tmp_path / "out", method="mha")
    source = base / "config.json"
    made(prune.make, base, tmp_path / "pruned", method="magnitude-50", source=source)
    for folder in ("out", "pruned"):
        names = {path.name for path in (tmp_path / folder).iterdir()}
        assert {"model.safetensors", "config.json", "tokenizer.json"} <= names
        assert not names & {"consolidated.safetensors", "params.json"}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"quantization_config": {"quant_method": "awq"}}, "has quantized weights"),
        ({"num_attention_heads": None}, "whose heads are not known"),
        ({"num_key_value_heads": 3}, "whose heads are not known"),
    ],
)
def test_what_cannot_be_converted_is_refused(
    base: Path, tmp_path: Path, changed: dict[str, object], message: str
) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | changed))
    with pytest.raises(MakerError, match=message):
        make(base, tmp_path, "mha")


def test_a_model_without_such_projections_is_refused(base: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"model.layers.0.qkv_proj.weight": torch.zeros(2)}, base / "model.safetensors")
    with pytest.raises(MakerError, match="stores no k_proj and v_proj"):
        make(base, tmp_path, "mha")
