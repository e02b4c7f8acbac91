"""A machine that is not here but on file: what a run measured on it stands for it in a forecast.

Of such a machine are on file its memory and ceilings, how far its speed varied, and the stand-in
step that a run timed there before its engine started. A step is one model's, so only that model can
be forecast. Steps of quantized weights, adapters and draft models are on file without a name, so
that only runs count whose engines all had one step, the model's own.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from labs.filing import results
from labs.filing.results import RunFolder, readable
from labs.lab import Lab, LabError
from serving import dummy, models
from serving.engines import DEFAULT_ENGINE
from serving.forecasting.step import StepTimes
from serving.machine import Ceilings, Machine
from serving.models import Model, Shape


@dataclass(frozen=True)
class MachineOnFile:
    """Holds what one run measured of its machine before its engines started."""

    run: str  # machine/lab/run
    machine: Machine
    ceilings: Ceilings
    model: str  # whose step was timed, as MODEL= names it
    dummy: bool  # its weights were random
    shape: Shape
    step: StepTimes
    spread: float  # the usual one of the machine's speed, a factor of 1 or more

    @property
    def weights(self) -> str:
        """Return what WEIGHTS= was, which the same model needs again."""
        return "dummy" if self.dummy else ""

    def require_name(self, model: str) -> None:
        """Check that MODEL= names the model that was timed, or a folder. Raises LabError."""
        if model not in ("", self.model) and not Path(model).is_dir():
            raise self._refusal(model)

    def require(self, model: Model) -> None:
        """Check that it is this model's step that was timed. Raises LabError."""
        if model.shape != self.shape:
            raise self._refusal(model.name.removesuffix(dummy.SUFFIX))

    def _refusal(self, model: str) -> LabError:
        return LabError(
            f"on {self.machine.slug} the step of {self.model} was timed, which tells nothing of"
            f" {model}: leave MODEL out, or name a GPU by its datasheet with MACHINE="
        )


def on_file(name: str) -> MachineOnFile | None:
    """Find the machine whose folder among the results, or one of whose runs, is named.

    Of a machine's runs the one counts that timed the largest step, and of these the newest. Returns
    None where nothing on file has this name; raises LabError where no run there can stand for it.
    """
    places = (Path(name), models.ROOT / name, results.RESULTS / name)
    found = ((place, _runs_in(place)) for place in places if name and place.is_dir())
    home, runs = next(((place, runs) for place, runs in found if runs), (None, []))
    if home is None:
        return None
    timed, reasons = list[MachineOnFile](), list[str]()
    for folder in runs:
        try:
            with readable(folder):
                timed.append(_of(folder))
        except LabError as reason:
            reasons.append(str(reason))
    if not timed:
        raise LabError(f"nothing on file tells how long a step takes on {home.name}: {reasons[-1]}")
    return max(timed, key=lambda found: (found.step.tokens[-1], Path(found.run).name))


def named() -> list[str]:
    """List the machines on file, as MACHINE= takes them."""
    return sorted({manifest.parts[-4] for manifest in results.RESULTS.glob("*/*/*/run.json")})


def _runs_in(folder: Path) -> list[RunFolder]:
    """Return a machine's runs, the newest last, or the only run where the folder is one."""
    if (folder / "run.json").is_file():
        return [RunFolder(folder.resolve())]
    manifests = sorted(folder.glob("*/*/run.json"), key=lambda path: path.parent.name)
    return [RunFolder(manifest.parent.resolve()) for manifest in manifests]


def _of(folder: RunFolder) -> MachineOnFile:
    """Read what a run measured of its machine; raises LabError where that is not one step."""
    run, forecasts = folder.run(), folder.predictions().in_virtual_time
    steps = forecasts.step_times if forecasts else []
    if not forecasts or not folder.complete or len(steps) != 1:
        several = f"{len(steps)} steps, and which is the model's own is not told"
        timed = several if len(steps) > 1 else "no step"
        raise LabError(f"the run {folder.path.name} timed {timed}")
    variants_forecast = {key.partition("/")[0] for key in forecasts.points}
    if not _serves_the_model_alone(run.rebuilt_lab(), variants_forecast):
        raise LabError(f"the run {folder.path.name} timed no step of the model as it is")
    return MachineOnFile(
        run="/".join(folder.path.parts[-3:]),
        machine=run.machine,
        ceilings=run.ceilings,
        model=run.model.removesuffix(dummy.SUFFIX) if run.dummy else run.model,
        dummy=run.dummy,
        shape=Shape(**run.model_shape),
        step=StepTimes.model_validate(steps[0]),
        spread=forecasts.machine_spread,
    )


def _serves_the_model_alone(lab: Lab, forecast: Collection[str]) -> bool:
    """Tell whether one of these variants serves the model as it is, from one device."""
    return any(
        v.name in forecast
        and v.engine == DEFAULT_ENGINE
        and not v.weights
        and str(flags.get("kv-cache-dtype", "auto")) in ("auto", "bfloat16")
        and flags.devices == 1
        and not flags.get("enable-lora")
        for v, flags in zip(lab.variants, lab.all_flags, strict=True)
    )
