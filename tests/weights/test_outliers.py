"""8-bit rounding simulated on a tiny random Llama, one of whose channels is made an outlier."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from serving.models import making, outliers
from tests.unit.builders import write_tiny_llama
from tests.weights import needs_torch, torch

pytestmark = needs_torch

TEXT = "\n\n".join(f"the {n} quick brown foxes jump over {n + 1} lazy dogs" for n in range(9))


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """The first channel of what enters every attention is 200 times as large as it would be."""
    from transformers import AutoModelForCausalLM

    folder = write_tiny_llama(tmp_path / "tiny", layers=2, initializer_range=0.3)
    model = AutoModelForCausalLM.from_pretrained(folder)
    for layer in model.model.layers:
        layer.input_layernorm.weight.data[0] = 200.0
        for part in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
            part.weight.data[:, 0] /= 200.0
    model.save_pretrained(folder)
    return folder


def study(model: Path, out: Path) -> dict[str, Any]:
    text = out.with_suffix(".txt")
    text.write_text(TEXT)
    return outliers.make(model, out, text)


def test_rounding_keeps_255_levels() -> None:
    values = torch.tensor([-2.0, -1.0, 0.0, 0.004, 0.3, 1.0])
    found = outliers.rounded(values, torch.tensor(1.0 / 127))
    wanted = torch.tensor([-1.0, -1.0, 0.0, 1.0 / 127, 38.0 / 127, 1.0])
    torch.testing.assert_close(found, wanted)


def test_an_outlier_is_seen_and_what_it_costs(tiny: Path, tmp_path: Path) -> None:
    found = study(tiny, tmp_path / "study")
    assert found["inputs"].keys() == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    entering, within = (found["inputs"][kind] for kind in ("q_proj", "up_proj"))
    assert entering["largest_over_median_max"] > 100 > 10 > within["largest_over_median_max"]
    assert entering["kurtosis_mean"] > 20 > 6 > within["kurtosis_mean"]
    assert found["loss_nats"].keys() == {"none", *outliers.SCHEMES}
    assert len(found["passages_tokens"]) == 6  # of nine, three gave the scales

    def moved(name: str) -> float:
        """How far a scheme moves the losses of the passages."""
        pairs = zip(found["loss_nats"][name], found["loss_nats"]["none"], strict=True)
        return math.fsum(abs(a - b) for a, b in pairs)

    by_tensor = moved("activations by tensor, weights by channel")
    smoothed = moved("activations by tensor, smoothed, weights by channel")
    assert by_tensor > 3 * smoothed > 0
    # a weight that meets an outlier is small, and by itself rounds to nothing
    assert moved("weights by channel") > smoothed


def test_the_model_is_as_it_was_after_each_scheme(tiny: Path) -> None:
    tokenizer, model = making.load(tiny)
    original = outliers.on_host(model)
    model = outliers.in_float32(model)
    weights = outliers.linears(model).values()
    places = [m.weight.data_ptr() for m in weights]
    passage = list(tokenizer("the quick brown fox")["input_ids"])
    before = outliers.losses(model, passage)
    seen = outliers.observe(model, [passage])
    for name in outliers.SCHEMES:
        with outliers.scheme(model, seen, original, name):
            assert outliers.losses(model, passage) != before
            assert [m.weight.data_ptr() for m in weights] == places  # there are no others beside
        assert outliers.losses(model, passage) == before


@pytest.mark.parametrize(("free_gb", "device"), [(31.0, "cuda"), (11.0, "cpu")])
def test_a_model_without_room_on_the_gpu_is_studied_on_the_cpu(
    free_gb: float, device: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Seven layers of 10^9 weights each: 14 GB more in float32, and 16 GB while one is rounded."""

    class OnGpu:
        device = torch.device("cuda")

        def parameters(self) -> list[Any]:
            return [torch.empty(10**9, device="meta") for _ in range(7)]

        def to(self, device: str) -> OnGpu:
            self.device = torch.device(device)
            return self

        def float(self) -> OnGpu:
            return self

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (int(free_gb * 1e9), 48 * 10**9))
    assert outliers.in_float32(OnGpu()).device.type == device
    assert ("11.0 GB free, and float32 takes 30.0 GB more" in capsys.readouterr().out) == (
        device == "cpu"
    )
