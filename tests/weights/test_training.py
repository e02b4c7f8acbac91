"""Training a tiny random Llama around its rounding, and at half of its depth."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from serving.models import training
from serving.models.making import MakerError
from serving.models.outliers import linears
from tests.unit.builders import write_tiny_llama
from tests.weights import made, needs_torch, torch

pytestmark = needs_torch

TEXT = [f"the {n} quick brown foxes jump over {n + 1} lazy dogs" for n in range(12)]
GROUP = 64


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    wide = {"hidden_size": GROUP, "intermediate_size": GROUP}
    return write_tiny_llama(tmp_path / "tiny", layers=4, initializer_range=0.3, **wide)


def model_of(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def source(folder: Path, share: float = 1) -> Path:
    path = folder / "texts.json"
    given = {"calibration": TEXT[:8], "held_out": TEXT[8:], "share": share}
    path.write_text(json.dumps(given))
    return path


def test_each_group_has_its_own_levels() -> None:
    torch.manual_seed(0)
    weight = torch.randn(3, 2 * GROUP)
    rounded = training.rounded_to_nearest(weight, 4, GROUP)
    for row, exact in zip(rounded.reshape(-1, GROUP), weight.reshape(-1, GROUP), strict=True):
        scale = exact.abs().max() / 7.5
        assert (row / scale - (row / scale).round()).abs().max() < 1e-4
        assert (row - exact).abs().max() <= 0.5001 * scale
        assert len(row.unique()) <= 16


def test_weights_of_a_4_bit_file_are_spread_over_its_steps() -> None:
    torch.manual_seed(0)
    levels = torch.cat([torch.tensor([0, 15]), torch.randint(16, (1, 30)).flatten()]).float()
    moved = training.spread((0.2 * levels - 1).repeat(100, 2)) - (0.2 * levels - 1).repeat(100, 2)
    assert moved.abs().max() <= 0.1001
    assert moved.std() == pytest.approx(0.2 / 12**0.5, rel=0.05)


def test_gptq_errs_less_in_the_output_where_inputs_go_together() -> None:
    torch.manual_seed(0)
    weight = torch.randn(8, 2 * GROUP)
    apart = torch.eye(2 * GROUP)
    nearest = training.rounded_to_nearest(weight, 3, GROUP)
    assert torch.allclose(training.rounded_by_gptq(weight, apart, 3, GROUP), nearest)
    inputs = torch.randn(400, 20) @ torch.randn(20, 2 * GROUP) + 0.3 * torch.randn(400, 2 * GROUP)
    moved = training.rounded_by_gptq(weight, inputs.T @ inputs, 3, GROUP)
    lost, by_nearest = ((inputs @ (of - weight).T).pow(2).sum() for of in (moved, nearest))
    assert lost < 0.5 * by_nearest


def test_a_gradient_passes_through_the_rounding_to_the_weights(tiny: Path) -> None:
    model = model_of(tiny)
    module = linears(model)["model.layers.0.mlp.up_proj"]
    before = module.weight.detach().clone()
    x = torch.randn(5, GROUP)
    with training.replaced(model, training.all_to_nearest(model, 4, GROUP)):
        out = module(x)
        out.sum().backward()
    assert torch.equal(module.weight, before)
    assert not torch.allclose(out, x @ before.T)
    assert torch.allclose(module.weight.grad, x.sum(0).expand_as(before), atol=1e-5)


def test_what_is_trained_is_scored_and_half_of_the_layers_stay(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "LEARNING_RATE", 3e-3)
    monkeypatch.setattr(training, "DISTIL_LEARNING_RATE", 1e-2)
    monkeypatch.setattr(training, "EPOCHS", 8)
    about = made(training.make, tiny, tmp_path / "out", source=source(tmp_path))
    lost = {name: sum(nats) for name, nats in about["loss_nats"].items()}
    assert {len(nats) for nats in about["loss_nats"].values()} == {len(TEXT) - 8}
    assert lost["plain"] < lost["file"]
    qat = f"tuned-qat-{training.BITS[0]}"
    assert lost[qat] < lost[f"file-nearest-{training.BITS[0]}"]
    assert lost["distilled"] < lost["kept"]
    efforts = about["efforts"]
    assert efforts["plain"]["tokens"] == 9 * efforts[qat]["tokens"]
    assert efforts["untaught"]["tokens"] == efforts["distilled"]["tokens"]
    assert [n for n in lost if n.startswith("untaught")] == [f"untaught-{n}" for n in range(1, 9)]
    assert lost["untaught-8"] < lost["kept"] != lost["distilled"]
    written = model_of(tmp_path / "out")
    assert written.config.num_hidden_layers == about["layers"] == 2
    assert written.num_parameters() == about["params"]
    quick = made(training.make, tiny, tmp_path / "quick", source=source(tmp_path, 0.5))
    assert quick["efforts"]["plain"]["tokens"] * 2 == about["efforts"]["plain"]["tokens"]


def test_a_large_model_is_cut_and_not_trained(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "MOST_PARAMS", 1)
    about = made(training.make, tiny, tmp_path / "out", source=source(tmp_path))
    assert "loss_nats" not in about
    assert model_of(tmp_path / "out").config.num_hidden_layers == about["layers"] == 2


def test_widths_that_no_group_divides_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MakerError, match="multiple of 64"):
        training.make(write_tiny_llama(tmp_path / "t", layers=4), tmp_path, source(tmp_path))
