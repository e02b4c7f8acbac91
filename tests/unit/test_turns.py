"""Engines that take turns, as on a GPU: one that does not start costs its own trials alone."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from labs.results import TrialResult, write_json
from labs.stage import Stage, resident_groups
from serving.engine import EngineError
from tests.unit.builders import make_lab, write_run


@pytest.fixture
def session(tmp_path: Path) -> Any:
    folder = write_run(tmp_path)
    for point in folder.run().points():
        for repeat in range(1, folder.run().rebuilt_lab().repeats + 1):
            (folder.trial_folder(point, repeat) / "trial.json").unlink()
    said: list[str] = []
    setup = SimpleNamespace(lab=folder.run().rebuilt_lab(), points=folder.run().points())
    fake = SimpleNamespace(
        setup=setup, folder=folder, left=100, teller=SimpleNamespace(step=said.append), said=said
    )
    fake.measured = lambda: Stage.measured.__get__(fake)
    return fake


def test_the_trials_of_an_engine_that_does_not_start_fail_with_its_reason(session: Any) -> None:
    on = next(v for v in session.setup.lab.variants if v.name == "on")
    lab, folder = session.setup.lab, session.folder
    Stage.give_up(session, [on], EngineError("no kernel for this type"))
    for point in session.setup.points:
        for repeat in range(1, lab.repeats + 1):
            found = folder.trial_result(point, repeat)
            assert (found.failed if found else None) == (
                "no kernel for this type" if point.variant.name == "on" else None
            )
    theirs = sum(point.variant.name == "on" for point in session.setup.points)
    assert session.left == 100 - theirs * lab.repeats
    assert session.said == ["no kernel for this type"]
    assert not session.measured()


def test_what_was_measured_before_is_kept(session: Any) -> None:
    point = session.setup.points[0]
    done = TrialResult(point=point.key, repeat=1)
    write_json(session.folder.trial_folder(point, 1) / "trial.json", done)
    Stage.give_up(session, [point.variant], EngineError("died"))
    assert session.folder.trial_result(point, 1) == done
    assert session.measured()


def test_the_order_of_turns_is_drawn_from_the_seed() -> None:
    lab = make_lab()

    def order(seed: int) -> list[str]:
        setup: Any = SimpleNamespace(
            lab=lab.model_copy(update={"seed": seed}),
            endpoint=None,
            machine=SimpleNamespace(kind="gpu"),
            model=SimpleNamespace(shape=SimpleNamespace(weight_bytes=1)),
        )
        return [variant.name for (variant,) in resident_groups(setup)]

    orders = [order(seed) for seed in range(20)]
    assert orders == [order(seed) for seed in range(20)]
    assert {frozenset(o) for o in orders} == {frozenset(v.name for v in lab.variants)}
    firsts = [o[0] for o in orders]
    assert all(firsts.count(v.name) >= 3 for v in lab.variants)
