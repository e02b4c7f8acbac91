"""The options that several commands take, with what each says of itself in `--help`."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from typer.models import ParameterInfo

from labs.harness.errors import did_you_mean
from labs.harness.running.capacity_plan import MOST_REPLICAS
from labs.harness.running.machines_on_file import MachineOnFile, find_machine
from labs.harness.spec import SLO, LabError
from loadtests.records import LONGEST_S
from loadtests.trace import MOST_PLANNED_ROWS, Tell, TraceRow, read_trace
from serving.forecasting.fleet import ROUTERS
from serving.hardware.gpus import short_names

ALL = "all"  # routers, one after another
LabName = Annotated[str, typer.Argument(help="A lab's name; `labs list` names them all.")]
SetOption = Annotated[
    str,
    typer.Option(
        "--set",
        envvar="LABS_SET",
        help="Change existing fields for this run: 'window_s=4 flags.max-num-seqs=8'."
        " The run is marked ad hoc.",
    ),
]
UnsafeOption = Annotated[
    bool,
    typer.Option(
        "--unsafe-flags",
        envvar="LABS_UNSAFE_FLAGS",
        help="Accept flags that may load code, open an address or name a path: only your own.",
    ),
]
QuickOption = Annotated[
    bool, typer.Option(envvar="LABS_QUICK", help="Short windows, few repeats: a smoke test.")
]
EngineOption = Annotated[
    str,
    typer.Option(
        envvar="LABS_ENGINE_COMMAND",
        help="The command that starts the engine, for example inside a profiler; the engine's"
        " flags follow.",
    ),
]
ModelOption = Annotated[
    str, typer.Option("--model", envvar="LABS_MODEL", help="A model folder or a Hugging Face id.")
]
WeightsOption = Annotated[
    str,
    typer.Option(
        "--weights",
        envvar="LABS_WEIGHTS",
        help="`dummy` serves random weights in an architecture that ships with the lab, named by"
        " MODEL: the speed is real, the text is not.",
    ),
]
TpOption = Annotated[
    int,
    typer.Option(
        "--tp", envvar="LABS_TP", min=1, help="GPUs that share each layer (tensor parallelism)."
    ),
]
DpOption = Annotated[
    int,
    typer.Option("--dp", envvar="LABS_DP", min=1, help="Copies of the model (data parallelism)."),
]
PpOption = Annotated[
    int,
    typer.Option(
        "--pp", envvar="LABS_PP", min=1, help="GPUs that divide the layers (pipeline parallelism)."
    ),
]
TraceOption = Annotated[
    Path | None,
    typer.Option(
        envvar="LABS_TRACE",
        help=f"Traffic to replay: its first {MOST_PLANNED_ROWS:,} requests (`docs/knobs.md` lists"
        " the formats).",
    ),
]
FleetOption = Annotated[
    int,
    typer.Option(
        "--replicas",
        envvar="LABS_REPLICAS",
        min=0,
        max=MOST_REPLICAS,
        help="The number of replicas; 0: one in a forecast, in a plan as many as the rate needs.",
    ),
]
RouterOption = Annotated[
    str,
    typer.Option(envvar="LABS_ROUTER", help=f"Between replicas: {ALL}, or {', '.join(ROUTERS)}."),
]
PriceOption = Annotated[
    float,
    typer.Option(
        "--price-per-hour",
        envvar="LABS_PRICE_PER_HOUR",
        min=0,
        help="US dollars for an hour of the machine, or of one GPU; 0: not known.",
    ),
]
SloOption = Annotated[
    str,
    typer.Option(envvar="LABS_SLO", help="The longest TTFT and TPOT, in milliseconds: 1000/50."),
]
ReplicasOption = Annotated[
    str,
    typer.Option(
        "--endpoint-metrics",
        envvar="LABS_ENDPOINT_METRICS",
        help="url,url: the engines behind an endpoint that is a router: their metrics add up.",
    ),
]
LoadWorkersOption = Annotated[
    int,
    typer.Option(
        "--load-workers",
        envvar="LABS_LOAD_WORKERS",
        min=0,
        max=256,
        help="Load processes on other machines that share the load of an ENDPOINT: the run waits"
        " for `make load-worker` there.",
    ),
]
ListenOption = Annotated[
    str,
    typer.Option(
        "--listen",
        envvar="LABS_LISTEN",
        help="host:port of this machine at which load workers join; default: on 127.0.0.1, which"
        " takes an SSH tunnel. Their messages are encrypted.",
    ),
]
KeyOption = Annotated[
    str,
    typer.Option(
        "--key",
        envvar="LABS_KEY",
        show_default=False,
        help="What load workers must know to join, 16 characters or more; default: drawn and shown"
        " by the run.",
    ),
]
SeedOption = Annotated[
    str,
    typer.Option(
        "--seed", envvar="LABS_SEED", help="Another number draws other lengths, prompts and order."
    ),
]
MarkdownOut = Annotated[
    Path | None,
    typer.Option("--out", envvar="LABS_OUT", help="Also write it to this Markdown file."),
]


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


def settings_of(command: Callable[..., Any]) -> set[str]:
    """Return the variables that a command's options and arguments may come in, as LABS_QUICK."""
    hints = get_type_hints(command, include_extras=True).values()
    parameters = [part for hint in hints for part in getattr(hint, "__metadata__", ())]
    return {str(p.envvar) for p in parameters if isinstance(p, ParameterInfo) and p.envvar}
