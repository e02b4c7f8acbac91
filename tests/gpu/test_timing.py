"""The forecast's step on a CUDA device."""

from __future__ import annotations

import pytest

from serving import machine
from serving.forecasting import timing

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(machine.detect().kind != "gpu", reason="no CUDA device here"),
]


def test_a_recorded_work_computes_when_it_is_replayed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    torch = pytest.importorskip("torch")
    count, one = (torch.full((1,), value, device="cuda") for value in (0.0, 1.0))
    replay = timing.recorded(lambda: count.add_(one))
    before = count.item()
    for _ in range(3):
        replay()
    torch.cuda.synchronize()
    assert count.item() == before + 3
    assert not capsys.readouterr().err
