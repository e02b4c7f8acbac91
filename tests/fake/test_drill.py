"""A drill on the fake engine: one engine after another, an answer, and nothing that is left."""

from __future__ import annotations

import random
import signal

import pytest

from labs.harness.runner import drill
from serving.hardware import machine
from serving.models import catalog
from tests.fake.conftest import LABS_WITH_FAKE_MODELS, Command, Reader, still_alive
from tests.sizes import sizes_of

SIZES = f"{sizes_of(drill.drilled_lab().name).fake} repeats=1"
PLACES = drill.causes(drill.drilled_lab().at(catalog.scale_of(machine.cpu()), False))


def seed_of(cause: str) -> str:
    """A seed with which this cause comes first."""
    return next(
        seed
        for seed in map(str, range(1000))
        if PLACES[random.Random(seed).sample([*PLACES], len(PLACES))[0]] == cause
    )


def begin(reader: Reader, cause: str, answer: str = "", sizes: str = SIZES) -> Command:
    return reader.types(
        "drill", program=LABS_WITH_FAKE_MODELS, SEED=seed_of(cause), SET=sizes, ANSWER=answer
    )


@pytest.mark.parametrize(
    ("cause", "answer", "shows"),
    [("preemption", "", "Preemptions a request"), ("cold cache", "burst", "Prefix hit rate")],
)
def test_the_cause_is_in_force_and_told_at_the_end_alone(
    reader: Reader, cause: str, answer: str, shows: str
) -> None:
    command = begin(reader, cause, answer)
    assert command.wait() == 0, command.said
    before, _, told = command.said.partition(cause)
    assert all(word in told for word in (shows, answer))
    (variant, workload), *_ = [place for place, of in PLACES.items() if of == cause]
    assert workload not in before
    assert variant == "healthy" or variant not in before
    lab = drill.drilled_lab()
    flags = next(v for v in lab.variants if v.name == variant).flags
    _, argv = zip(*reader.engine_starts(), strict=True)
    assert len(argv) == 2  # the healthy one, and in its place the other
    assert all(f"--{flag}" in argv[1] for flag in flags)
    assert command.folders == []
    assert still_alive(reader.processes()) == []


def test_a_cause_that_is_not_there_is_named_before_anything_starts(reader: Reader) -> None:
    command = begin(reader, "burst", "cold cash")
    assert command.wait() == 1
    (sentence,) = (line for line in command.said.splitlines() if line.startswith("error:"))
    assert "cold cache?" in sentence
    assert not reader.engine_starts()


def test_an_engine_that_dies_is_one_sentence(reader: Reader) -> None:
    command = reader.types(
        "drill", program=LABS_WITH_FAKE_MODELS, SET=SIZES, first_engine=("--die-after", "3")
    )
    assert command.wait() == 1
    assert len([line for line in command.said.splitlines() if line.startswith("error:")]) == 1
    assert "Traceback" not in command.said
    assert still_alive(reader.processes()) == []


def test_ctrl_c_leaves_no_process(reader: Reader) -> None:
    command = begin(reader, "burst", sizes=f"{SIZES} window_s=30 requests=4096")
    command.until(r"serves at")
    family = command.family()
    command.process.send_signal(signal.SIGINT)
    assert command.wait() == 130
    assert still_alive(family) == []
    assert command.folders == []
