"""Every engine that the labs would start on this machine, with its arguments and variables."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from labs import LABS
from labs.harness.plan.derived_models import NEED_NO_WEIGHTS
from labs.harness.plan.resolve import (
    RunRequest,
    lab_of,
    require_devices,
    require_harmless,
    require_known_names,
    require_memory,
    require_no_reading,
    require_sizes,
)
from labs.harness.spec.lab import LabError
from serving.engines.base import EngineError
from serving.engines.flags import with_places
from serving.engines.vllm import Vllm
from serving.hardware.machine import Machine
from serving.models import catalog, dummy
from serving.models.catalog import Model, ModelError
from tests.rehearsal import real

PORT = 8000  # nothing listens
SERVING = "vllm"  # the engine that is rehearsed


@dataclass(frozen=True)
class Start:
    """An engine of a lab's variant, as a run would start it: alone, or sharing the GPU."""

    lab: str
    variant: str
    weights: str  # `real` or `random`
    quick: bool
    argv: tuple[str, ...]
    variables: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Refused:
    """A lab that does not resolve on this machine, and why."""

    lab: str
    weights: str
    quick: bool
    error: str
    applies: bool  # it should resolve


def starts(machine: Machine, home: Path, limits_queues: bool = True) -> Iterator[Start | Refused]:
    """Resolve every lab, full and quick, with the default model and with random weights.

    `limits_queues` says whether this vLLM can limit its queue, as the load generator does else.
    The default models are folders in `home` with a configuration alone.
    """
    for weights in ("real", "random"):
        for quick in (False, True):
            for name in LABS:
                try:
                    yield from of_lab(name, weights, quick, machine, home, limits_queues)
                except (LabError, ModelError, EngineError) as error:
                    needs_weights = isinstance(error, ModelError) and weights == "random"
                    yield Refused(name, weights, quick, str(error), not needs_weights)


def of_lab(
    name: str, weights: str, quick: bool, machine: Machine, home: Path, limits_queues: bool = True
) -> Iterator[Start]:
    """Check what `running.resolve.resolve` does before an engine starts, in its order."""
    setting = "dummy" if weights == "random" else ""
    lab = lab_of(RunRequest(LABS[name], quick=quick, weights=setting), catalog.scale_of(machine))
    others = {v.name: "another engine" for v in lab.variants if v.engine != SERVING}
    require_known_names(lab)
    require_harmless(lab)
    require_devices(lab, machine)
    if setting or lab.shape:
        require_no_reading(lab)
        model = dummy.resolve(machine, lab.shape)
    else:
        model = real.model(home, catalog.default_name(machine))
    lab = lab.without(others).model_copy(update={"admission_by_client": not limits_queues})
    require_sizes(lab, model)
    require_memory(lab, machine, model)
    serves = {name: _derived(model, name, home) for name in lab.derived()
              if name not in NEED_NO_WEIGHTS}  # fmt: skip
    places = {name: derived.path for name, derived in serves.items()}
    own = {v.name: serves[v.weights] for v in lab.variants if v.weights}
    for variant in lab.variants:
        flags = with_places(lab.engine_flags_of(variant), places)
        served = own.get(variant.name, model)
        variables = {
            **Vllm.environment("gpu", served, lab.all_flags), **Vllm.controls(flags),
        }  # fmt: skip
        argv = Vllm.server_argv(served, flags, PORT)
        yield Start(name, variant.name, weights, quick, tuple(argv), tuple(variables.items()))


def _derived(model: Model, name: str, home: Path) -> Model:
    """Return what a lab derives from a model. Raises ModelError where random weights do not do."""
    if not model.dummy:
        return real.model(home, model.name, name)
    return Model(model.name, dummy.derive(model, name), model.shape, dummy=True)
