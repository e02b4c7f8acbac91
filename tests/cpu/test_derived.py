"""The models that labs derive from the bundled one: made as a quick run makes them, and readable.

They take minutes, beside the labs on real engines, which find them made.
"""

from __future__ import annotations

import pytest

from labs import LABS
from labs.lab import parse_changes
from labs.running import derived_models
from serving import machine, models
from tests.sizes import sizes_of

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(
        machine.detect().kind != "cpu", reason="this machine has a GPU: see tests/gpu"
    ),
]


def derived_by_the_tests() -> list[str]:
    """List what the labs derive in `test_labs.py`, in its sizes."""
    labs = [
        lab.at("cpu", quick=True, changes=parse_changes(f"{sizes.real} {sizes.cpu}"))
        for name, lab in LABS.items()
        if not (sizes := sizes_of(name)).not_real
    ]
    return list(dict.fromkeys(name for lab in labs for name in lab.derived()))


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", derived_by_the_tests())
def test_a_derived_model_is_made(name: str) -> None:
    folder = derived_models.make(models.resolve(machine.detect()), name, print, quick=True)
    facts = derived_models.about(folder)
    assert facts, "its maker records what it made"
