"""The rehearsal of vLLM's CUDA build, as far as it needs no such build."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors import safe_open

from labs import LABS
from serving.hardware.gpus import CLASSES, DATASHEETS, class_of
from serving.hardware.machine import Machine
from tests.default_models import config_of
from tests.rehearsal import quantizations, real, starts
from tests.rehearsal.cards import CARDS, VARIABLE, Card, rehearsed
from tests.rehearsal.starts import Refused, Start

LLAMA = "NousResearch/Meta-Llama-3.1-8B-Instruct"


def test_there_is_a_card_for_every_class_and_every_datasheet(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert {class_of(card.memory_bytes) for card in CARDS.values()} == {*CLASSES}
    assert {sheet.short_name for sheet in DATASHEETS.values()} <= CARDS.keys()
    assert rehearsed() == CARDS["h100"]
    monkeypatch.setenv(VARIABLE, "l4")
    assert rehearsed().capability == (8, 9)


def with_one(card: Card) -> Machine:
    return Machine(kind="gpu", model=card.name, count=1, memory_bytes=card.memory_bytes)


@pytest.mark.parametrize("card", CARDS.values(), ids=CARDS)
def test_every_lab_resolves_to_engines_of_the_default_model(card: Card, tmp_path: Path) -> None:
    machine = with_one(card)
    resolved = [
        start
        for name in LABS
        for start in starts.of_lab(name, "real", True, machine, tmp_path)
    ]  # fmt: skip
    assert {start.lab for start in resolved} == {*LABS}
    for start in resolved:
        folder = Path(start.argv[start.argv.index("--model") + 1])
        assert (folder / "config.json").exists()
        assert ("VLLM_USE_FLASHINFER_SAMPLER", "0") in start.variables


@pytest.mark.parametrize("limits_queues", [True, False])
def test_a_vllm_that_cannot_limit_its_queue_is_not_told_to(
    limits_queues: bool, tmp_path: Path
) -> None:
    machine = with_one(CARDS["h100"])
    found = [*starts.of_lab("overload", "real", True, machine, tmp_path, limits_queues)]
    argv = {start.variant: " ".join(start.argv) for start in found}
    assert len(argv) == 6
    assert ("--max-num-queued-reqs 320" in argv["capped"]) == limits_queues
    assert any("queued" in words for words in argv.values()) == limits_queues


def test_a_lab_that_needs_real_weights_is_left_out_with_random_ones(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(starts, "LABS", {"weight-pruning": LABS["weight-pruning"]})
    found = [*starts.starts(with_one(CARDS["h100"]), tmp_path)]
    assert {of.weights for of in found if isinstance(of, Start)} == {"real"}
    refused = [of for of in found if isinstance(of, Refused)]
    assert [(of.weights, of.applies) for of in refused] == [("random", False)] * 2


@pytest.mark.parametrize(
    ("derived", "method"),
    [("w8a8-rtn", "compressed-tensors"), ("autoawq", "awq"), ("gptqmodel", "gptq")],
)
def test_derived_models_say_how_they_are_quantized(derived: str, method: str) -> None:
    config = real.derived_config(config_of(LLAMA), derived)
    assert config["quantization_config"]["quant_method"] == method


def test_derived_models_have_their_own_layers_and_heads() -> None:
    config = config_of(LLAMA)
    assert real.derived_config(config, "mha")["num_key_value_heads"] == 32
    assert real.derived_config(config, "draft")["num_hidden_layers"] == 4
    assert real.derived_config(config, "wanda-50") == config


@pytest.mark.parametrize(
    ("derived", "kind", "computes"),
    [
        ("", "BF16", "UnquantizedLinearMethod"),
        ("wanda-50", "BF16", "UnquantizedFusedMoEMethod with TRITON"),
        ("w8a8-rtn", "W8A8", "CompressedTensorsW8A8Int8 with CutlassInt8ScaledMMLinearKernel"),
        ("fp8", "FP8", "CompressedTensorsW8A16Fp8 with MarlinFP8ScaledMMLinearKernel"),
        ("w4a16-gptq", "W4A16", "CompressedTensorsWNA16 with MacheteLinearKernel"),
        ("autoawq", "W4A16 AWQ", "AutoAWQMarlinLinearMethod with MacheteLinearKernel"),
        ("gptqmodel", "W4A16 GPTQ", "AutoGPTQLinearMethod with MarlinLinearKernel"),
    ],
)
def test_a_model_that_is_not_computed_as_its_configuration_says_is_a_failure(
    derived: str, kind: str, computes: str
) -> None:
    assert quantizations.kind_of(real.derived_config(config_of(LLAMA), derived)) == kind
    assert quantizations.unexpected(kind, [computes]) == ""
    other = "UnquantizedLinearMethod" if kind != "BF16" else "CompressedTensorsWNA16"
    assert quantizations.unexpected(kind, [computes, other]) == f"{kind} is computed by {other}"
    assert quantizations.unexpected(kind, [])


def test_the_files_of_gptq_name_the_layers_that_are_quantized(tmp_path: Path) -> None:
    made = real.model(tmp_path, LLAMA, "gptqmodel").path
    with safe_open(made / "model.safetensors", "np") as file:
        names = set(file.keys())
    assert len(names) == 32 * 7
    assert "model.layers.31.self_attn.o_proj.qweight" in names
    assert not (real.model(tmp_path, LLAMA, "autoawq").path / "model.safetensors").exists()
