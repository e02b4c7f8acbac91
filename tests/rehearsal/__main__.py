"""Rehearses the CUDA build of vLLM: `make rehearse [MACHINE=h100|l4|..|all]`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from serving.engines.vllm import PLUGINS
from serving.packaging.install import ROOT, SetupError
from tests.golden.plays import figures
from tests.rehearsal import NVML, checks, environment
from tests.rehearsal.cards import CARDS, VARIABLE
from tests.rehearsal.checks import Check

STAND_INS = (NVML.with_name("device"), NVML, ROOT, PLUGINS)
GOLDEN = ROOT / "tests" / "golden"
VERSION = "from importlib.metadata import version; print(version('vllm'))"


@dataclass(frozen=True)
class Part:
    """What one process found, and how long it took."""

    card: str
    found: Sequence[Check]
    took_s: float


def run(card: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Run the environment's Python where every process has this GPU."""
    print(f"as on {card}: {words[1]} ...", flush=True)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("LABS_")}
    env = {
        **kept,
        VARIABLE: card,
        "PYTHONPATH": os.pathsep.join(map(str, STAND_INS)),
        "LD_LIBRARY_PATH": str(environment.HOME),
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    command = [str(environment.PYTHON), *words]
    return subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)


def run_checks(card: str, module: str, scratch: Path) -> Part:
    """Run a module of checks in the environment; that it ends early is a failure of its own."""
    began, file = time.monotonic(), scratch / f"{card}-{module}.jsonl"
    models = str(environment.HOME / "models")
    done = run(card, "-m", f"tests.rehearsal.{module}", str(file), models)
    found = checks.read(file) if file.exists() else []
    if done.returncode:
        ended = checks.last_line(done.stderr)
        found.append(Check(what=module, name="ended early", error=ended))
    return Part(card, found, time.monotonic() - began)


def play(card: str) -> Part:
    """Play the plan of tests/golden, and compare with what was recorded of this version."""
    began = time.monotonic()
    done = run(card, "-m", "tests.golden")
    if done.returncode:
        error = checks.last_line(done.stderr)
        return Part(card, [Check(what="plays", name="all", error=error)], time.monotonic() - began)
    played = json.loads(json.dumps(figures(done.stdout.splitlines()[1:])))
    version = run(card, "-c", VERSION).stdout
    minor = ".".join(version.split(".")[:2])
    expected = json.loads((GOLDEN / f"vllm-{minor}.json").read_text())
    found = []
    for key in played | expected:
        same = played.get(key) == expected.get(key)
        error = "" if same else "not what was recorded"
        found.append(Check(what="plays", name=key, error=error))
    return Part(card, found, time.monotonic() - began)


def table(parts: Iterable[Part]) -> str:
    """Tell by GPU and kind of check how many passed and failed; the seconds are the process's."""
    lines = [f"{'on':<11}{'checked':<38}{'passed':>7}{'failed':>7}{'left out':>9}{'seconds':>9}"]
    for part in parts:
        seconds = f"{part.took_s:.0f}"
        for what in dict.fromkeys(check.what for check in part.found):
            of = [check for check in part.found if check.what == what]
            left_out = sum(not check.applies for check in of)
            failed = sum(bool(check.error) and check.applies for check in of)
            passed = len(of) - failed - left_out
            lines.append(
                f"{part.card:<11}{what:<38}{passed:>7}{failed:>7}{left_out:>9}{seconds:>9}"
            )
            seconds = ""
    return "\n".join(lines)


def told(parts: Sequence[Part], about: Callable[[Check], str]) -> str:
    """List what there is to say about checks, once, each with the GPUs."""
    where: dict[str, list[str]] = {}
    for part in parts:
        for check in part.found:
            if says := about(check):
                where.setdefault(f"  {says}", []).append(part.card)
    return "\n".join(
        f"{line} (on {', '.join(dict.fromkeys(cards))})" for line, cards in where.items()
    )


def failures(parts: Sequence[Part], apply: bool = True) -> str:
    """List what failed, or what does not apply."""

    def about(check: Check) -> str:
        if not check.error or check.applies != apply:
            return ""
        return f"{check.what}, {check.name}: {check.error}"

    return told(parts, about)


def main() -> int:
    wanted = os.environ.get("LABS_MACHINE") or "h100"
    cards = [*CARDS] if wanted == "all" else [wanted]
    if not set(cards) <= CARDS.keys():
        print(f"MACHINE={wanted} is not known here: give {', '.join(CARDS)} or all")
        return 1
    try:
        environment.make()
    except (SetupError, OSError, subprocess.CalledProcessError) as error:
        print(f"the environment was not made: {error}", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory(prefix="rehearsal-") as folder:
        parts = [run_checks(cards[0], "names", Path(folder)), play(cards[0])]
        for card in cards:
            parts += [run_checks(card, name, Path(folder)) for name in ("configure", "build")]
    failed = failures(parts)
    for title, lines in (
        ("Left out", failures(parts, apply=False)),
        ("To be known", told(parts, lambda c: f"{c.name}: {c.note}" if c.note else "")),
        ("Computed by", told(parts, lambda c: f"{c.what}: {c.built}" if c.built else "")),
        ("Failed", failed or "  nothing"),
    ):
        if lines:
            print(f"\n{title}:\n{lines}")
    print(f"\n{table(parts)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
