"""Random quantized weights have the distribution that quantizing gives, and hardly any zeros."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from labs.harness.spec.theory import experts_needed
from serving.engines.vllm import Vllm
from serving.plugins import random_weights
from tests.weights import needs_torch, torch

pytestmark = needs_torch


def model_of(**tensors: object) -> object:
    """A model with one layer for each tensor, and its scale."""
    model = torch.nn.Module()
    for name, tensor in tensors.items():
        layer = torch.nn.Module()
        weight = "weight_packed" if tensor.dtype == torch.int32 else "weight"  # type: ignore[attr-defined]
        layer.register_parameter(weight, torch.nn.Parameter(tensor, requires_grad=False))
        scale = torch.nn.Parameter(torch.full((256, 1), -1e-3), requires_grad=False)
        layer.register_parameter("weight_scale", scale)
        model.add_module(name, layer)
    return model


def test_each_type_is_filled_as_quantizing_fills_it() -> None:
    model = model_of(
        bf16=torch.full((256, 128), 1e-3, dtype=torch.bfloat16),
        int8=torch.zeros((256, 512), dtype=torch.int8),
        fp8=torch.zeros((256, 512)).to(torch.float8_e4m3fn),
        int4=torch.zeros((256, 512), dtype=torch.int32),
    )
    zeros = random_weights.fill(model)
    layers = dict(model.named_children())  # type: ignore[attr-defined]
    assert zeros.keys() == {4, 8, 16}
    assert zeros[16] == 0
    assert 0.005 < zeros[8] < 0.02  # of the integers; FP8 has hardly any
    assert 0.10 < zeros[4] < 0.20
    for name, sigma in (("int8", 35.3), ("fp8", 124.4)):
        weight = layers[name].weight.float()
        assert float(weight.std()) == pytest.approx(sigma, rel=0.05)
        # the weights that they stand for are as large as those of 16 bits
        scale = float(layers[name].weight_scale.unique())
        assert scale * float(weight.std()) == pytest.approx(random_weights.STD, rel=0.05)
    packed = layers["int4"].weight_packed
    numbers = torch.stack([packed >> place & 15 for place in range(0, 32, 4)]).float() - 8
    assert float(numbers.std()) == pytest.approx(2.7, rel=0.05)
    assert abs(float(numbers.mean())) < 0.05
    assert float(layers["bf16"].weight.unique()) == pytest.approx(1e-3, rel=0.01)  # vLLM's own
    assert float(layers["bf16"].weight_scale.unique()) == pytest.approx(-1e-3)


def test_what_vllm_left_empty_is_noticed_from_the_log() -> None:
    lines = "\n".join(random_weights.line(z) for z in ({16: 0.0, 8: 0.977}, {8: 0.0}))
    assert random_weights.read(lines) == {"16": "0.0000", "8": "0.9770"}
    assert "97.7% of the random 8-bit weights are zero" in random_weights.fault({"8": "0.977"})
    assert random_weights.fault({"16": "0.0000", "8": "0.0113", "4": "0.1480"}) == ""
    assert "does not say" in random_weights.fault(random_weights.read("another line"))


def test_the_dummy_loader_is_wrapped_and_says_what_it_drew(
    capsys: pytest.CaptureFixture[str],
) -> None:
    loaded = []
    load = random_weights.filled(lambda self, model, config: loaded.append(model))
    model = model_of(int8=torch.zeros((256, 512), dtype=torch.int8))
    load(None, model, None)
    assert loaded == [model]
    found = random_weights.read("(Worker pid=1) " + capsys.readouterr().out)
    assert re.fullmatch(r"0\.01\d\d", found["8"])


def test_experts_have_ids_that_the_cpu_kernel_takes() -> None:
    even = random_weights.EvenRouting()
    states, logits = torch.zeros(4, 8), torch.zeros(4, 32)
    weights, ids = even.route_tokens(states, logits, 3)
    assert (weights.shape, ids.shape, ids.dtype) == ((4, 3), (4, 3), torch.int32)
    _, asked = even.route_tokens(states, logits, 3, torch.int64)
    assert asked.dtype == torch.int64


def test_a_token_goes_to_different_experts_and_a_batch_needs_as_many_as_predicted() -> None:
    torch.manual_seed(1)
    even, drawn, batch = random_weights.EvenRouting(), 500, 16
    needed = 0
    for _ in range(drawn):
        _, ids = even.route_tokens(torch.zeros(batch, 8), torch.zeros(batch, 32), 4)
        assert all(len(set(of_token)) == 4 for of_token in ids.tolist())
        needed += len(ids.unique())
    assert needed / drawn == pytest.approx(experts_needed(32, 4, batch), rel=0.01)


def test_vllm_says_in_the_lines_that_are_read_which_strategy_routes() -> None:
    found = importlib.util.find_spec("vllm")
    if found is None or not found.submodule_search_locations:
        pytest.skip("vLLM is not installed")
    router = "model_executor/layers/fused_moe/router/routing_simulator_router.py"
    source = Path(found.submodule_search_locations[0], router).read_text()
    assert random_weights.ROUTED.format("%s") in source


def test_the_lab_alone_names_what_a_worker_imports() -> None:
    assert "worker-extension-cls is not among" in Vllm.refusal({"worker-extension-cls": "x.y"})
