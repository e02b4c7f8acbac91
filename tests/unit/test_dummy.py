"""Folders without weights: what vLLM reads of a model that it fills with random numbers."""

from __future__ import annotations

import errno
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from labs import LABS
from labs.harness.plan.derived_models import about, make, with_weights
from labs.harness.spec import theory
from labs.harness.spec.lab import NotApplicable
from serving import metrics
from serving.engines.vllm import Vllm, resolved
from serving.hardware.machine import Machine
from serving.models import catalog, dummy
from serving.models.catalog import Model
from serving.plugins import random_weights

GPU = Machine(kind="gpu", model="Abacus", count=1, memory_bytes=80 * 10**9)
CPU = Machine(kind="cpu", model="Abacus", count=2, memory_bytes=16 * 10**9)


@pytest.fixture(autouse=True)
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that has nothing but a tokenizer."""
    bundled = tmp_path / "bundled"
    bundled.mkdir()
    for part in catalog.TOKENIZER:
        (bundled / part).write_text(part)
    monkeypatch.setattr(catalog, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(catalog, "bundled", lambda: bundled)


def made(model: Model, name: str) -> Path:
    return make(model, name, pytest.fail)  # in silence: it takes no time


@pytest.mark.parametrize("name", dummy.SHAPES)
def test_a_shape_is_a_folder_with_the_bundled_tokenizer_and_no_weights(name: str) -> None:
    model = dummy.resolve(GPU, name)
    assert model.name == f"{name}-dummy"
    files = {path.name for path in model.path.iterdir()}
    assert files == {"config.json", catalog.RANDOM, *catalog.TOKENIZER}
    config = json.loads((model.path / "config.json").read_text())
    assert config == json.loads((dummy.HOME / f"{name}.json").read_text())
    assert config["vocab_size"] >= 49_152  # the tokenizer's
    assert catalog.load(model.path, model.name) == model
    assert dummy.resolve(GPU, name) == model


def test_the_default_is_the_classs_on_a_gpu_and_tiny_on_a_cpu() -> None:
    assert dummy.resolve(GPU).name == "llama-8b-dummy"
    assert dummy.resolve(CPU).name == "llama-tiny-dummy"


def test_any_config_of_a_known_kind_is_a_model(tmp_path: Path) -> None:
    """By its path or its folder's; two of one name are two, and what is none is named."""
    config = json.loads((dummy.HOME / "llama-1b.json").read_text())
    places = [tmp_path / place / "mine" for place in ("a", "b")]
    for layers, place in enumerate(places, start=3):
        place.mkdir(parents=True)
        (place / "config.json").write_text(json.dumps({**config, "num_hidden_layers": layers}))
    found = [dummy.resolve(GPU, str(place)) for place in (*places, places[0] / "config.json")]
    assert [model.shape.layers for model in found] == [3, 4, 3]
    assert {model.name for model in found} == {"mine-dummy"}
    assert [catalog.load(model.path, "").shape.layers for model in found] == [3, 4, 3]
    for content in ("{", "[]", "{}"):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(catalog.ModelError, match=re.escape(str(tmp_path / "config.json"))):
            dummy.resolve(GPU, str(tmp_path))


def test_vllm_is_told_to_draw_the_weights_itself() -> None:
    model = dummy.resolve(CPU)
    argv = Vllm.server_argv(model, {}, 1)
    assert argv[argv.index("--load-format") + 1] == "dummy"
    assert argv[argv.index("--worker-extension-cls") + 1] == random_weights.EXTENSION
    routed = [Vllm.environment(kind, model)[random_weights.ROUTING] for kind in ("gpu", "cpu")]
    assert routed == [metrics.EVEN_ROUTING, metrics.EVEN_ROUTING]
    log = f"(Worker pid=1) WARNING {random_weights.ROUTED.format(metrics.EVEN_ROUTING)} This\n"
    assert resolved(log)["routing"] == metrics.EVEN_ROUTING
    real = Model("real", model.path, model.shape)
    assert "--load-format" not in Vllm.server_argv(real, {}, 1)
    assert "VLLM_MOE_ROUTING_SIMULATION_STRATEGY" not in Vllm.environment("gpu", real)


def test_engines_of_a_lab_that_guesses_ahead_share_a_model_runner() -> None:
    model = dummy.resolve(GPU)
    guessing, plain = (LABS[n].all_flags for n in ("speculative-decoding", "prefix-caching"))
    assert Vllm.environment("gpu", model, guessing)["VLLM_USE_V2_MODEL_RUNNER"] == "0"
    assert "VLLM_USE_V2_MODEL_RUNNER" not in Vllm.environment("gpu", model, plain)
    assert "VLLM_USE_V2_MODEL_RUNNER" not in Vllm.environment("cpu", model, guessing)


def test_a_draft_is_the_same_architecture_with_an_eighth_of_the_layers() -> None:
    model = dummy.resolve(GPU)
    draft = with_weights(model, "draft", made(model, "draft"))
    assert (draft.shape.layers, draft.shape.vocab) == (4, model.shape.vocab)
    assert draft.dummy
    layers_bytes = 4 * (15_009_849_344 - 2 * 4096 * 128_257) // 32
    assert about(draft.path) == {"weight_bytes": layers_bytes + 2 * 4096 * 128_257}


@pytest.mark.parametrize(
    ("name", "weight_bytes"),
    [  # of 6,979,321,856 weights in linear layers, and 525,602,816 beside them in 16 bits
        ("w8a8", 8_030_527_488), ("fp8", 8_030_527_488), ("w4a16-gptq", 4_649_918_464),
    ],
)  # fmt: skip
def test_fewer_bits_a_weight_are_a_config_that_says_so(name: str, weight_bytes: int) -> None:
    model = dummy.resolve(GPU)
    served = with_weights(model, name, made(model, name))
    assert (served.name, served.dummy) == (model.name, True)
    assert served.shape.weight_bytes == weight_bytes
    assert served.shape.params == model.shape.params


@pytest.mark.parametrize(("name", "kv_heads"), [("mha", 32), ("mqa", 1)])
def test_other_kv_heads_are_a_config_that_says_so(name: str, kv_heads: int) -> None:
    model = dummy.resolve(GPU)
    served = with_weights(model, name, made(model, name))
    assert (served.dummy, served.shape.heads, served.shape.kv_heads) == (True, 32, kv_heads)
    # two projections a layer have more rows or fewer, of 4,096 weights in 16 bits
    rows = (kv_heads - 8) * 128
    assert served.shape.weight_bytes - model.shape.weight_bytes == 32 * 2 * rows * 4096 * 2


@pytest.mark.parametrize(("name", "width"), [("dense-total", 32 * 512), ("dense-active", 4 * 512)])
def test_a_dense_model_in_the_place_of_experts_is_a_config_that_says_so(
    name: str, width: int
) -> None:
    model = dummy.resolve(CPU, "moe-tiny")
    folder = made(model, name)
    config = json.loads((folder / "config.json").read_text())
    assert (config["model_type"], config["intermediate_size"]) == ("qwen3", width)
    assert not [field for field in config if "expert" in field or "moe" in field]
    served = with_weights(model, name, folder)
    assert (served.name, served.dummy, served.shape.experts) == (model.name, True, 0)
    assert served.shape == catalog.shape_of(config)


def test_adapters_have_the_true_shape_at_both_ranks() -> None:
    from safetensors import safe_open

    model = dummy.resolve(CPU)
    folder = made(model, "adapters")
    names = {path.name for path in folder.iterdir() if path.is_dir()}
    assert names == {f"tenant-{i}{suffix}" for i in range(8) for suffix in ("", "-rank-64")}
    found = {}
    with safe_open(folder / "tenant-7-rank-64/adapter_model.safetensors", "np") as tensors:
        found = {key: tensors.get_slice(key).get_shape() for key in tensors.keys()}  # noqa: SIM118
    assert len(found) == 16 * 4 * 2
    at = "base_model.model.model.layers.3.self_attn"
    assert found[f"{at}.k_proj.lora_A.weight"] == [64, 512]
    assert found[f"{at}.k_proj.lora_B.weight"] == [256, 64]
    assert about(folder)["params_per_adapter"] == 16 * 8 * (2 * (512 + 512) + 2 * (512 + 256))
    assert made(model, "adapters") == folder


def test_adapters_are_copied_where_a_file_system_has_no_hard_links(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    folder = made(dummy.resolve(CPU), "adapters")
    first, last = (folder / f"tenant-{n}" / "adapter_model.safetensors" for n in (0, 7))
    assert first.read_bytes() == last.read_bytes()
    assert not first.samefile(last)


def test_what_is_made_of_real_weights_is_refused() -> None:
    with pytest.raises(NotApplicable, match=r"outliers .* WEIGHTS=dummy"):
        made(dummy.resolve(CPU), "outliers")
    with pytest.raises(NotApplicable, match="quantized experts"):
        made(dummy.resolve(GPU, "moe-30b"), "w8a8")
    with pytest.raises(NotApplicable, match=r"dense-total .* experts"):
        made(dummy.resolve(CPU), "dense-total")


def test_chosen_acceptance_is_the_formulas_at_every_position() -> None:
    lab = LABS["speculative-decoding"].at("gpu-80", quick=False, dummy=True)
    told: list[Any] = [v.flags.get("speculative-config", {}) for v in lab.variants]
    rates = [r for config in told if (r := config.get("synthetic_acceptance_rates"))]
    assert [r[0] for r in rates] == [0.3, 0.6, 0.8, 0.95]
    for r in rates:
        assert 1 + sum(r) == pytest.approx(theory.accepted_length(r[0], 3), abs=1e-3)
