"""The forecast's step on a CUDA device."""

from __future__ import annotations

import pytest

from serving.hardware import machine
from serving.simulator import profiled_step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(machine.detect().kind != "gpu", reason="no CUDA device here"),
]


def test_a_recorded_work_computes_when_it_is_replayed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    torch = pytest.importorskip("torch")
    count = torch.zeros(1, device="cuda")

    def adding() -> profiled_step.Work:
        one = torch.ones(1, device="cuda")  # held by the work alone

        def work() -> None:
            count.add_(one)

        return work

    replay = profiled_step.recorded(adding())
    others = [torch.full((1,), 7.0, device="cuda") for _ in range(100)]  # where it was, if it went
    before = count.item()
    for _ in range(3):
        replay()
    torch.cuda.synchronize()
    assert count.item() == before + 3
    assert others
    assert not capsys.readouterr().err
