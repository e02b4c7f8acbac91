"""What a run was made of, as one flat list, and what of it differs between two runs.

The differences come with the likeliest cause of other figures first: the lab's own knobs, the
engine's command line and environment, what else the machine was doing, the hardware, the engine's
packages, the model's files, and only then the rest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

from pydantic import BaseModel

from labs import LABS
from labs.filing.results import Run, RunFolder, fresh_knobs
from labs.lab import Lab, LabError

NOTHING = "not recorded"
LIKELIEST = (  # causes of other figures; what is not named comes last
    "lab.workloads", "lab.", "engine.", "load.", "endpoint", "machine.model", "machine.",
    "ceilings.",
    "environment.packages.vllm", "environment.packages.torch", "environment.cuda",
    "environment.driver", "model.", "prompts_sha256", "environment.engine_cores",
    "environment.client_cores", "environment.numa", "environment.clocks", "environment.kernel",
    "environment.packages.triton", "environment.packages.transformers", "environment.python",
    "environment.packages.locust", "environment.packages.gevent", "environment.git",
)  # fmt: skip
PACKAGES = "environment.packages."
MOST_OTHERS = 12  # differences of no likely effect that are shown one by one


class Fact(BaseModel, frozen=True, extra="forbid"):
    """What two manifests say of one thing."""

    what: str
    a: str
    b: str

    @property
    def differs(self) -> bool:
        """What one side never recorded differs in nothing."""
        return self.a != self.b and NOTHING not in (self.a, self.b)

    def __str__(self) -> str:
        return f"{self.what}: {self.a} / {self.b}"


def facts(run: Run, load: Mapping[str, str] | None = None) -> dict[str, str]:
    """Everything of a manifest that may matter, by dotted path, as text."""
    environment = run.environment.model_dump(exclude={"variables", "load_average"})
    return dict(
        _flat(
            {
                "lab": fresh_knobs(run.lab),
                "engine": {
                    "argv": {name: " ".join(argv) for name, argv in run.argv.items()},
                    "variables": run.environment.variables,
                },
                "load": load or {},
                "endpoint": run.endpoint,
                "machine": {
                    **run.machine.model_dump(exclude={"memory_bytes"}),
                    "memory": f"{run.machine.memory_bytes / 2**30:.0f} GiB",
                },
                # measured, so that only two digits can be told apart
                "ceilings": {
                    "memory_bandwidth": f"{run.ceilings.memory_bandwidth_bytes_per_s:.1e} B/s",
                    "bf16_rate": f"{run.ceilings.bf16_flops_per_s:.1e} FLOP/s",
                    "threads": run.ceilings.threads,
                },
                "environment": environment,
                "model": {
                    "name": run.model,
                    "revision": run.model_revision,
                    "files": run.model_files,
                    "derived": run.derived_sha256,
                },
                "prompts_sha256": run.prompts_sha256 if run.format_version > 1 else None,
            }
        )
    )


def current_lab(run: Run) -> Lab:
    """What the run's lab is now, resolved as the run's was; raises LabError where it is no more."""
    name = run.lab["name"]
    if name not in LABS:
        raise LabError(f"there is no lab {name} any more")
    lab = LABS[name].at(run.scale, run.quick, run.changes, run.dummy)
    return lab.against_itself() if run.aa else lab


def is_stale(run: Run) -> bool:
    """The lab has other knobs now; a field that was added since, at its default, is none."""
    try:
        return fresh_knobs(run.lab) != fresh_knobs(current_lab(run).resolved())
    except LabError:
        return True


def cpu_taken_by_others(folder: RunFolder) -> dict[str, str]:
    """What other guests and other processes took of the CPU during the trials, to 5 %."""
    run = folder.run()
    results = [
        result
        for point in run.points()
        for repeat in range(1, run.rebuilt_lab().rounds + 1)
        if (result := folder.trial_result(point, repeat))
    ]
    taken = {
        "other_guests": [r.cpu_steal for r in results if r.cpu_steal is not None],
        "other_processes": [r.cpu_others for r in results if r.cpu_others is not None],
    }
    return {
        name: f"about {5 * round(20 * fmean(shares))} % of the CPU"
        for name, shares in taken.items()
        if shares
    }


def fact_pairs(a: Mapping[str, str], b: Mapping[str, str]) -> list[Fact]:
    """Every fact of either, the likeliest cause of other figures first."""
    found = [Fact(what=path, a=_said(path, a), b=_said(path, b)) for path in {**a, **b}]
    return sorted(found, key=lambda fact: (_rank(fact.what), fact.what))


def differences(a: Mapping[str, str], b: Mapping[str, str]) -> list[Fact]:
    """The likeliest cause first."""
    return [fact for fact in fact_pairs(a, b) if fact.differs]


def unrecorded(a: Mapping[str, str], b: Mapping[str, str]) -> list[str]:
    """What only one of the two manifests has."""
    tops = {_known_by(path) for path in {**a, **b}}
    return sorted(
        top
        for top in tops
        if any(s.get(top) == NOTHING for s in (a, b))
        and not all(s.get(top) == NOTHING for s in (a, b))
    )


def table(found: Sequence[Fact], names: tuple[str, str]) -> list[list[str]]:
    """Side by side; packages by their number when there are many of no likely effect."""
    likely = [d for d in found if _rank(d.what) < len(LIKELIEST)]
    others = [d for d in found if _rank(d.what) == len(LIKELIEST)]
    rows = [["What", *names], *([d.what, _short(d.a), _short(d.b)] for d in likely)]
    if len(others) > MOST_OTHERS:
        packages = [d.what.removeprefix(PACKAGES) for d in others]
        rows.append([f"and {len(others)} more", ", ".join(packages[:MOST_OTHERS]) + " ..", ""])
    else:
        rows += [[d.what, _short(d.a), _short(d.b)] for d in others]
    return rows


def likeliest_cause(found: Sequence[Fact], sides: tuple[str, str] = ("there", "here")) -> str:
    """One sentence: the first difference that can change a figure."""
    if not found:
        return "nothing recorded differs: the machine itself, or what else ran beside it"
    first, *rest = found
    more = f" (and {len(rest)} more)" if rest else ""
    a, b = sides
    return f"{first.what}: {_short(first.a)} {a}, {_short(first.b)} {b}{more}"


def _short(text: str, most: int = 60) -> str:
    return text if len(text) <= most else f"{text[: most - 12]}..{text[-10:]}"


def _rank(path: str) -> int:
    return next((i for i, p in enumerate(LIKELIEST) if path.startswith(p)), len(LIKELIEST))


def _known_by(path: str) -> str:
    """The part of the manifest a fact belongs to: one that a side may not have recorded at all."""
    parts = path.split(".")
    return ".".join(parts[:2]) if len(parts) > 1 else path


def _said(path: str, side: Mapping[str, str]) -> str:
    if path in side:
        return side[path]
    if path.startswith("lab."):
        return "none"
    unknown = path.startswith("load.") or side.get(_known_by(path)) == NOTHING
    return NOTHING if unknown else "absent"


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Leaves by dotted path; items of a list by their name, where they have one."""
    if isinstance(value, dict):
        steps = list(value.items())
    elif isinstance(value, list | tuple) and value and isinstance(value[0], dict):
        steps = [(item.get("name", str(i)), item) for i, item in enumerate(value)]
    else:
        steps = []
        if value is not None and value not in ((), []):
            many = isinstance(value, list | tuple)
            yield path, ", ".join(map(str, value)) if many else str(value)
            return
    if not steps:
        yield path, "none" if path.startswith("lab.") else NOTHING
    for name, inner in steps:
        yield from _flat(inner, f"{path}.{name}" if path else str(name))
