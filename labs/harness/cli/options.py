"""Builds the options of commands from the settings' table, and reads values of several parts."""

from __future__ import annotations

import importlib.util
import inspect
import math
import os
import re
import shlex
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_origin, get_type_hints

import typer
from rich.markup import escape

from labs import LABS
from labs.harness.cli.settings import PREFIX, Setting, setting
from labs.harness.cli.terminal import reported_errors
from labs.harness.forecast.capacity_plan import MOST_REPLICAS
from labs.harness.plan.recorded_machines import MachineOnFile, find_machine
from labs.harness.spec.errors import did_you_mean
from labs.harness.spec.lab import SLO, Lab, LabError
from labs.harness.spec.overrides import parse_changes
from loadtests.records import LONGEST_S
from loadtests.trace import MOST_PLANNED_ROWS, Tell, TraceRow, read_trace
from serving.engines.base import EngineError
from serving.engines.vllm import Vllm
from serving.hardware.gpus import short_names
from serving.places import IN_CLONE, how_to_install
from serving.processes.masking import holds_secret, masked
from serving.simulator.fleet import ROUTERS

ALL = "all"  # routers, one after another
PORT = 8000  # of `make serve`, unless told otherwise
A_PORT = (1, 65535)
BOUNDS: dict[str, tuple[float, float | None]] = {  # least and most; None: no limit
    "API_PRICE": (0, None),
    "GRAFANA_PORT": A_PORT,
    "IN_FLIGHT": (0, None),
    "KV_BLOCKS": (0, None),
    "PORT": A_PORT,
    "PRICE_PER_HOUR": (0, None),
    "PROMETHEUS_PORT": A_PORT,
    "RATE": (0, None),
    "REPLICAS": (0, MOST_REPLICAS),
    "SECONDS": (1, None),
    "TP": (1, None),
}
# click's, which typer has within it and does not name
USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[1]
Command = TypeVar("Command", bound=Callable[..., None])


app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def command(
    name: str, target: str = "", panel: str = "Labs", behind: str = "", needs_vllm: bool = False
) -> Callable[[Command], Command]:
    """Register a function as the command `name`, which make calls for `target`.

    Each parameter is the setting of its name (`from_` is FROM), with its type and its default: the
    page of settings says what it does. One whose annotation says more is taken as it is, and the
    one that `behind` names stands behind the command without the name of an option. Expected
    failures end the command in a sentence, as does a vLLM that it needs and that is not there.
    """

    def register(function: Command) -> Command:
        hints = get_type_hints(function, include_extras=True)
        parameters = inspect.signature(function).parameters
        for parameter in parameters:
            if get_origin(hints[parameter]) is not Annotated:
                row = setting(parameter.strip("_").upper(), target or name)
                option = _argument(row) if parameter == behind else _option(row)
                hints[parameter] = Annotated[hints[parameter], option]

        def called(**given: Any) -> None:
            with reported_errors():
                if needs_vllm:
                    _require_installed(own_engine=not given.get("endpoint"))
                function(**given)

        called.__doc__, called.__annotations__ = function.__doc__, hints
        called.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [p.replace(annotation=hints[key]) for key, p in parameters.items()]
        )
        app.command(name, rich_help_panel=panel)(called)
        return function

    return register


def require_clone(name: str) -> None:
    """Check that this is no installed package; raises LabError."""
    if not IN_CLONE:
        raise LabError(f"`labs {name}` works on a clone of the repository, and in one alone")


def _require_installed(own_engine: bool) -> None:
    """Check for vLLM, or where an engine is there for the load generator. Raises EngineError."""
    if own_engine:
        Vllm.version()
    elif importlib.util.find_spec("locust") is None:
        raise EngineError(f"Locust is not installed here: {how_to_install('run')}")


def _option(row: Setting) -> Any:
    least, most = BOUNDS.get(row.name, (None, None))
    dashed = row.name.lower().replace("_", "-")
    return typer.Option(
        f"-{dashed}" if len(dashed) == 1 else f"--{dashed}",
        envvar=f"{PREFIX}{row.name}",
        show_envvar=False,
        min=least,
        max=most,
        help=_help(row),
    )


def _argument(row: Setting) -> Any:
    return typer.Argument(envvar=f"{PREFIX}{row.name}", show_envvar=False, help=_help(row))


def _help(row: Setting) -> str:
    """Say how a setting is typed behind make, and what it does; its links are left out."""
    return f"[cyan]{escape(row.typed)}[/]  {escape(row.words)}"


def as_typed(error: Any) -> str:
    """Say what is wrong with a call, a value by the name of its setting as it is typed."""
    variable = getattr(getattr(error, "param", None), "envvar", None)
    if not isinstance(variable, str):
        return str(error.format_message())
    name = variable.removeprefix(PREFIX)
    given = f"={os.environ[variable]}" if variable in os.environ else "="
    return f"{name}{given}: {error.message or 'it is needed here'}"


def price_of(usd_per_hour: float) -> float | None:
    """Return the price, None where it is not known; raises LabError for one that is no number."""
    if not math.isfinite(usd_per_hour):
        raise LabError(f"PRICE_PER_HOUR={usd_per_hour} is not a price: give US dollars, as 2.50")
    return usd_per_hour or None


def slo_of(text: str) -> SLO:
    """Read the longest TTFT and TPOT; raises LabError."""
    ttft_ms, tpot_ms = pair("SLO", text, "TTFT/TPOT in milliseconds, such as 1000/50")
    if max(ttft_ms, tpot_ms) > 1000 * LONGEST_S:
        raise LabError(f"SLO={text}: give at most {1000 * LONGEST_S:.0f} ms, which is 7 days")
    return SLO(ttft_s=ttft_ms / 1000, tpot_s=tpot_ms / 1000)


def trace_of(path: Path, tell: Tell) -> tuple[TraceRow, ...]:
    """Read a trace that is planned for or forecast, and not sent; raises LabError."""
    try:
        return read_trace(path, MOST_PLANNED_ROWS, tell)
    except ValueError as error:
        raise LabError(str(error)) from error


def recorded_machine(name: str, model: str) -> MachineOnFile | None:
    """Find the machine on file that MACHINE= names; None where a GPU has that name, or nothing.

    Raises LabError where no run of that machine timed the step of what MODEL= names.
    """
    return None if name in short_names() else find_machine(name, model)


def routers_of(name: str) -> tuple[str, ...]:
    """Return the router that ROUTER= names, or all of them; raises LabError."""
    require_known("ROUTER", name, (ALL, *ROUTERS))
    return tuple(ROUTERS) if name == ALL else (name,)


def require_known(setting: str, given: str, known: Sequence[str]) -> None:
    """Raise LabError where a setting names none of those that are known."""
    if given not in known:
        raise LabError(
            f"there is no {setting}={given}{did_you_mean(given, known)} ones are {', '.join(known)}"
        )


def pair(setting: str, text: str, meaning: str) -> tuple[float, float]:
    """Read two positive numbers with a slash between them; raises LabError."""
    parts = re.fullmatch(r"(\d+(?:\.\d+)?)/(\d+(?:\.\d+)?)", text.strip())
    if not parts or not (float(parts[1]) and float(parts[2])):
        raise LabError(f"{setting}={text} is not understood: give {meaning}")
    return float(parts[1]), float(parts[2])


def addresses(text: str) -> tuple[str, ...]:
    """Split `url,url`."""
    return tuple(filter(None, map(str.strip, text.split(","))))


def lab_named(name: str) -> Lab:
    """Find a lab by its name; raises LabError with the nearest where there is none."""
    if name not in LABS:
        raise LabError(f"there is no lab {name!r}{did_you_mean(name, LABS)} are {', '.join(LABS)}")
    return LABS[name]


def command_words(command: str) -> list[str]:
    """Split ENGINE_COMMAND into words; raises LabError where it names no program."""
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise LabError(f"ENGINE_COMMAND={masked(command)}: {error}") from error
    if words and shutil.which(words[0]) is None:
        raise LabError(
            f"ENGINE_COMMAND: there is no program {masked(words[0])}: install it, or correct the"
            " name"
        )
    return words


def changes_of(text: str, tp: int = 1, seed: str = "") -> dict[str, Any]:
    """Read SET, TP and SEED as changes of a lab, with which a run is marked.

    Raises LabError for a secret, which would be recorded with the run.
    """
    if holds_secret(text):
        raise LabError(
            f"SET={masked(text)} holds what looks like a secret, and a run's settings are recorded:"
            " pass it to the program that needs it in an environment variable instead"
        )
    parallel = {"flags.tensor-parallel-size": tp} if tp > 1 else {}
    return {**parallel, **parse_changes(f"{text} seed={seed}" if seed else text)}


def objective_changes(slo: str) -> dict[str, float]:
    """Write SLO as changes of a lab; raises LabError."""
    limits_s = slo_of(slo).by_name() if slo else {}
    return {f"slo.{name}_s": limit_s for name, limit_s in limits_s.items()}
