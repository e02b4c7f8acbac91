"""`make judge` on vLLM's own scheduler: requests that come alone take what their steps take."""

from __future__ import annotations

from pathlib import Path

import pytest

from labs.harness.forecast import validation
from labs.harness.forecast.forecaster import side_by_side
from serving.models import dummy
from serving.simulator import cards, kernels
from serving.simulator.kernels import Decoder
from serving.simulator.step import Piece, Step
from tests import with_vllm
from tests.unit.test_referee import DESCRIBED, HEADER, SILENT

pytestmark = pytest.mark.cpu
PROMPT, OUTPUT = 1000, 11


@pytest.fixture
def _forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forecasters are forked from a process that has imported vLLM."""
    forked = with_vllm.python("serving.simulator")
    monkeypatch.setattr("labs.harness.forecast.forecaster.FORECASTER_ARGV", forked)


@pytest.mark.usefixtures("_forked")
def test_a_run_that_cannot_be_simulated_takes_no_other_with_it(tmp_path: Path) -> None:
    other = DESCRIBED.replace('"mine"', '"other"').replace("seqs = 8", "seqs = 'a few'")
    (tmp_path / "runs.toml").write_text(other + DESCRIBED)
    (tmp_path / "mine.csv").write_text(f"{HEADER}\n0.0,{PROMPT},{OUTPUT},,0.02,0.09\n")
    with side_by_side(1) as forecasters:
        judged, without = validation.judge(tmp_path, forecasters, SILENT)
    assert [run.run.name for run in judged] == ["mine"]
    assert list(without) == ["other"]
    assert "a few" in without["other"]


@pytest.mark.usefixtures("_forked")
def test_a_request_alone_takes_what_its_steps_take(tmp_path: Path) -> None:
    """Three requests ten seconds apart, of which the last finds the first one's prompt cached."""
    rows = [f"{10 * i}.0,{PROMPT},{OUTPUT},{i % 2},0.02,0.09" for i in range(3)]
    (tmp_path / "runs.toml").write_text(DESCRIBED)
    (tmp_path / "mine.csv").write_text("\n".join([HEADER, *rows]))
    with side_by_side(1) as forecasters:
        (judged,), _ = validation.judge(tmp_path, forecasters, SILENT)
    step = kernels.step_times(Decoder.of(dummy.config_of("llama-8b")), "h100")
    outside_s = cards.DELAYS.request_s + cards.DELAYS.response_s
    prefill_s = step.seconds(Step([Piece(PROMPT, 0)], 1))
    cached = (PROMPT - 1) // 16 * 16
    warm_s = step.seconds(Step([Piece(PROMPT - cached, cached)], 1))
    decode_s = step.seconds(Step([Piece(1, PROMPT + OUTPUT // 2)], 1))
    forecast = {name: band.value for name, band in judged.forecast.items()}
    assert forecast["ttft_p50_s"] == pytest.approx(outside_s + prefill_s, rel=0.02)
    assert forecast["ttft_mean_s"] == pytest.approx(
        outside_s + (2 * prefill_s + warm_s) / 3, rel=0.02
    )
    assert forecast["tpot_mean_s"] == pytest.approx(decode_s, rel=0.02)
    band = judged.forecast["tpot_mean_s"]
    assert (band.low / band.value, band.high / band.value) == pytest.approx(
        (cards.FASTER, cards.SLOWER), rel=0.01
    )
