"""Flattens a run's manifest to a list of facts, and finds those that differ between two runs.

Differences are ordered by how likely they explain different figures: the lab's own settings, the
engine's command line and environment, what else the machine was doing, the hardware, the engine's
packages, the model's files, and only then the rest.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

from pydantic import BaseModel

from labs import LABS
from labs.harness.spec.lab import Lab, LabError
from labs.harness.storage.recorded import Run, fresh_knobs
from labs.harness.storage.results import RunFolder

NOTHING = "not recorded"
LIKELIEST = (  # causes of different figures, likeliest first; other facts come last
    "lab.workloads", "lab.", "engine.", "load.", "endpoint", "machine.model", "machine.",
    "ceilings.",
    "environment.packages.vllm", "environment.packages.torch", "environment.cuda",
    "environment.driver", "model.", "prompts_sha256", "environment.engine_cores",
    "environment.client_cores", "environment.numa", "environment.clocks", "environment.kernel",
    "environment.packages.triton", "environment.packages.transformers", "environment.python",
    "environment.packages.locust", "environment.packages.gevent", "environment.git",
)  # fmt: skip
PACKAGES = "environment.packages."
MOST_UNLIKELY = 12  # differences without a likely effect that are shown one by one


class Fact(BaseModel, frozen=True, extra="forbid"):
    """A fact is the value that each of two manifests has for one thing."""

    what: str
    a: str
    b: str

    @property
    def differs(self) -> bool:
        """Whether the values differ; a value that one side did not record is no difference."""
        return self.a != self.b and NOTHING not in (self.a, self.b)

    def __str__(self) -> str:
        return f"{self.what}: {self.a} / {self.b}"


def facts(run: Run, load: Mapping[str, str] | None = None) -> dict[str, str]:
    """Map the dotted path of everything in a manifest that may matter to its value as text.

    `load` is what others used of the machine (`cpu_share_of_other_work`).
    """
    environment = run.environment.model_dump(exclude={"variables", "load_average"})
    command = run.engine_command
    return dict(
        _flat(
            {
                "lab": fresh_knobs(run.lab),
                "engine": {
                    "command": None if command is None else " ".join(command) or "its own",
                    "argv": {name: " ".join(argv) for name, argv in run.argv.items()},
                    "variables": run.environment.variables,
                },
                "load": load or {},
                "endpoint": run.endpoint or "none, the lab starts its engines",
                "endpoint_metrics": ", ".join(run.replicas) or "none apart from the endpoint's",
                "machine": {
                    **run.machine.model_dump(exclude={"memory_bytes", "parts"}),
                    "memory": f"{run.machine.memory_bytes / 2**30:.0f} GiB",
                },
                # measured values, of which two digits are reproducible
                "ceilings": {
                    "memory_bandwidth": f"{run.ceilings.memory_bandwidth_bytes_per_s:.1e} B/s",
                    "bf16_rate": f"{run.ceilings.bf16_flops_per_s:.1e} FLOP/s",
                    **(
                        {"fp32_rate": f"{rate:.1e} FLOP/s"}
                        if (rate := run.ceilings.fp32_flops_per_s)
                        else {}
                    ),
                    "threads": run.ceilings.threads,
                },
                "environment": environment,
                "model": {
                    "name": run.model,
                    "random_weights": str(run.dummy),
                    "revision": run.model_revision,
                    "files": run.model_files,
                    "derived": run.derived_sha256,
                },
                "prompts_sha256": run.prompts_sha256 if run.format_version > 1 else None,
            }
        )
    )


def current_lab(run: Run) -> Lab:
    """Resolve the run's lab as it is now, as the run's was; raises LabError if it is gone."""
    name = run.lab["name"]
    if name not in LABS:
        raise LabError(f"there is no lab {name} any more")
    lab = LABS[name].at(run.scale, run.quick, _changes(run), run.dummy)
    lab = lab.without(dict.fromkeys(run.lab.get("absent", ()), "its engine was absent"))
    found_there = {"admission_by_client": bool(run.lab.get("admission_by_client"))}
    if run.lab.get("load_processes_chosen") and not lab.sets_load_processes:
        found_there |= {"load_processes": run.lab.get("load_processes", lab.load_processes)}
    lab = lab.model_copy(update=found_there)
    return lab.against_itself() if run.aa else lab


def _changes(run: Run) -> dict[str, Any]:
    """Return a run's changes with its recorded traces in the place of the files they came from."""
    traces = {f"workloads.{w['name']}.trace": w.get("trace", ()) for w in run.lab["workloads"]}
    changes = {path: traces.get(path, value) for path, value in run.changes.items()}
    if any("trace" in json.dumps(v) for path, v in changes.items() if path not in traces):
        raise LabError("a change names a file, which only whoever made the run has")
    return changes


def is_stale(run: Run) -> bool:
    """Whether the lab's settings have changed since the run.

    A field that was added since and has its default is no change.
    """
    try:
        return fresh_knobs(run.lab) != fresh_knobs(current_lab(run).resolved())
    except LabError:
        return True


def recorded(folder: RunFolder) -> dict[str, str]:
    """Map what a run's manifest says as `facts` does, with what others used of the machine."""
    return facts(folder.run(), cpu_share_of_other_work(folder))


def cpu_share_of_other_work(folder: RunFolder) -> dict[str, str]:
    """Describe the CPU share that other guests and processes used during trials, to 5%."""
    run = folder.run()
    results = folder.trial_results(run.points(), run.rebuilt_lab())
    shares = {
        "other_guests": [r.cpu_steal for r in results if r.cpu_steal is not None],
        "other_processes": [r.cpu_others for r in results if r.cpu_others is not None],
    }
    return {
        name: f"about {5 * round(20 * fmean(of_trials))}% of the CPU"
        for name, of_trials in shares.items()
        if of_trials
    }


def fact_pairs(a: Mapping[str, str], b: Mapping[str, str]) -> list[Fact]:
    """Pair the facts of two manifests, the likeliest cause of different figures first."""
    pairs = [Fact(what=path, a=_value(path, a), b=_value(path, b)) for path in {**a, **b}]
    return sorted(pairs, key=lambda fact: (_rank(fact.what), fact.what))


def differences(a: Mapping[str, str], b: Mapping[str, str]) -> list[Fact]:
    """List the facts that differ, the likeliest cause of different figures first."""
    return [fact for fact in fact_pairs(a, b) if fact.differs]


def unrecorded(a: Mapping[str, str], b: Mapping[str, str]) -> list[str]:
    """Name the parts that only one of the two manifests recorded."""
    parts = {_part(path) for path in {**a, **b}}
    return sorted(
        part
        for part in parts
        if any(side.get(part) == NOTHING for side in (a, b))
        and not all(side.get(part) == NOTHING for side in (a, b))
    )


def table(facts: Sequence[Fact], names: tuple[str, str]) -> list[list[str]]:
    """Make a table of two sides, under their names; the first row is the header.

    Many facts without a likely effect are summed up in one row.
    """
    unlikely = [fact for fact in facts if _rank(fact.what) == len(LIKELIEST)]
    summed_up = unlikely if len(unlikely) > MOST_UNLIKELY else []
    shown = [fact for fact in facts if fact not in summed_up]
    rows = [["What", *names], *([fact.what, _short(fact.a), _short(fact.b)] for fact in shown)]
    if summed_up:
        first = [fact.what.removeprefix(PACKAGES) for fact in summed_up[:MOST_UNLIKELY]]
        rows.append([f"and {len(summed_up)} more", ", ".join(first) + " ..", ""])
    return rows


def likeliest_cause(facts: Sequence[Fact], sides: tuple[str, str] = ("there", "here")) -> str:
    """Word the first of the differences, which may explain different figures, in one sentence."""
    if not facts:
        return "nothing recorded differs: the machine itself, or what else ran beside it"
    first, *rest = facts
    more = f" (and {len(rest)} more)" if rest else ""
    a, b = sides
    return f"{first.what}: {_short(first.a)} {a}, {_short(first.b)} {b}{more}"


def _short(text: str, most: int = 60) -> str:
    return text if len(text) <= most else f"{text[: most - 12]}..{text[-10:]}"


def _rank(path: str) -> int:
    return next((i for i, p in enumerate(LIKELIEST) if path.startswith(p)), len(LIKELIEST))


def _part(path: str) -> str:
    """Name the part of the manifest that a fact belongs to, which a side may not have recorded."""
    steps = path.split(".")
    return ".".join(steps[:2]) if len(steps) > 1 else path


def _value(path: str, side: Mapping[str, str]) -> str:
    if path in side:
        return side[path]
    if path.startswith("lab."):
        return "none"
    unknown = path.startswith("load.") or side.get(_part(path)) == NOTHING
    return NOTHING if unknown else "absent"


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield the leaves by dotted path; items of a list are named, where they have a name."""
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
