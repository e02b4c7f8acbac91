"""Plays the session: `make rehearse [SECONDS=530] [ONLY=single-stream,..]`."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from labs.harness.commands import all_labs
from labs.harness.filing.results import MachineFile, write_json
from labs.harness.running.prompt_files import usable_cores
from labs.harness.running.run import PROMPTS_TOOK
from labs.harness.running.sitting_plan import plan, table
from labs.harness.running.trials import MOST_AGAIN
from serving import bundle, lean, unbundle
from serving.hardware.gpus import DATASHEETS, Datasheet
from serving.hardware.machine import Ceilings, Machine
from serving.weights.models import CACHE

SESSION_S = 1800.0  # until the box goes back
BETWEEN_CALLS_S = 5.0
TRANSFER_BYTES_PER_S = 10e6
PARTS = 5
ENGINE_START_S = 45.0
# An H100 with 8 billion parameters in BF16, about: a step, each sequence more, each prompt token
LAW = ("--step-s", ".0075", "--step-per-seq-s", ".00001", "--prefill-per-token-s", ".00003")
KILLED_AT = 0.6  # of a call's time, where every second one is killed outright
CANNOT = """What this rehearsal cannot show:
- how fast vLLM is: every engine, quantized or a mixture too, follows one law, of 8 billion
  parameters in BF16, and starts in {start_s:.0f} s;
- trials that are played again: a disturbed one is kept here, as a client with few cores is late
  beside an H100, and played up to {times} times there ("latest" in the plan);
- the machine's own speed, which is timed beside each trial there: torch has no CUDA here;
- how long the bundle's packages take to install: in its parts is one empty wheel."""
STAND_IN = Path(__file__).parent / "stand_in"


@dataclass(frozen=True)
class Box:
    """The stand-in for the box: where the lab is, what comes back, how long a call may last."""

    home: Path
    call_s: float
    only: str

    def environment(self) -> dict[str, str]:
        delay = ("--start-delay", str(ENGINE_START_S))
        engine = shlex.join([sys.executable, "-m", "tests.fake.engine", *LAW, *delay])
        kept = {k: v for k, v in os.environ.items() if not k.startswith("LABS_")}
        return {
            **kept,
            "LAB_HOME": str(self.home / "lab"),
            "OUT": str(self.home / "out"),
            "LIMIT_S": f"{self.call_s:.0f}",
            "PYTHON": sys.executable,
            "PYTHONPATH": str(STAND_IN),
            "PYTHONUNBUFFERED": "1",
            "LABS_ENGINE_COMMAND": engine,
            "LABS_DISTURBED": "keep",  # a client with few cores is late beside an H100
            "LABS_ONLY": self.only,
        }

    def call(self, sent: Path, killed_after_s: float) -> int | None:
        """Call it once; return the exit code, or None where it was killed outright."""
        process = subprocess.Popen(
            ["bash", str(sent / "go.sh")], env=self.environment(), start_new_session=True
        )
        try:
            return process.wait(killed_after_s)
        except subprocess.TimeoutExpired:
            family = psutil.Process(process.pid).children(recursive=True)
            for member in [psutil.Process(process.pid), *family]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    member.kill()
            process.wait()
            return None


def make_bundle(out: Path) -> list[Path]:
    """Make a bundle of the committed lab, whose packages are those of this environment."""
    out.mkdir()
    stand_in = out.parent / "wheels"
    stand_in.mkdir()
    bundle.write_empty_wheel(stand_in, "stand-in", "1.0")
    files = lean.tokenizer_files()
    sizes = bundle.Parts(out, 10**12)
    bundle.write_tar(sizes, list(stand_in.glob("*.whl")), [], files)
    sizes.close()
    total = int(sizes.manifest[0]["bytes"])
    parts = bundle.Parts(out, total // PARTS + 1)
    bundle.write_tar(parts, list(stand_in.glob("*.whl")), [], files)
    parts.close()
    bundle.write_manifest(out, f"{sys.version_info[0]}.{sys.version_info[1]}", {}, {}, {}, parts)
    return sorted(out.glob("lab.tar.*"))


def unpacking(scratch: Path) -> str:
    """Install the wheels that `make bundle` has downloaded for this Python; say how long it took.

    Raises UnbundleError.
    """
    python = f"{sys.version_info[0]}.{sys.version_info[1]}"
    wheels = [*(CACHE / "bundle" / f"wheels-{python}").glob("*.whl")]
    if not wheels:
        return (
            f"`make bundle` has downloaded no wheels for Python {python} here: how long installing"
            " them takes is not shown."
        )
    folder = scratch / unbundle.HOME / "wheels"
    folder.mkdir(parents=True)
    for wheel in wheels:
        (folder / wheel.name).symlink_to(wheel)
    began = time.monotonic()
    unbundle.install(scratch)
    took_s = time.monotonic() - began
    shutil.rmtree(scratch)
    size = sum(wheel.stat().st_size for wheel in wheels)
    return (
        f"Installing the {len(wheels)} wheels ({size / 1e6:.0f} MB) that `make bundle` has"
        f" downloaded takes {took_s:.0f} s here; it is not part of the session below."
    )


def prompts_s(log: Path) -> list[float]:
    """Read from the session's log how long each lab wrote its prompts, in seconds."""
    text = log.read_text() if log.exists() else ""
    return [float(seconds) for seconds in re.findall(PROMPTS_TOOK.format(r"([\d.]+)"), text)]


def give_ceilings(home: Path, model: str, sheet: Datasheet) -> None:
    """File the datasheet's figures as measured: there is no GPU to measure."""
    machine = Machine(kind="gpu", model=model, count=1, memory_bytes=sheet.memory_bytes)
    ceilings = Ceilings(
        memory_bandwidth_bytes_per_s=sheet.memory_bandwidth_bytes_per_s,
        bf16_flops_per_s=sheet.bf16_flops_per_s,
        threads=1,
        torch="none",
        measured_at="not measured: a rehearsal",
    )
    file = home / "lab" / "results" / machine.slug / "machine.json"
    write_json(file, MachineFile(machine=machine, ceilings=ceilings))


def main() -> int:
    call_s = float(os.environ.get("LABS_SECONDS") or 530)
    only = os.environ.get("LABS_ONLY") or ""
    names = all_labs.chosen(only, by_value=True)
    model, sheet = next(iter(DATASHEETS.items()))
    planned = plan(names, "gpu-80", ENGINE_START_S, usable_cores())
    print(f"The plan, on {model}:\n{table(planned)}\n", flush=True)
    with tempfile.TemporaryDirectory(prefix="rehearsal-") as folder:
        home = Path(folder)
        print(f"{unpacking(home / 'unpacked')}\n", flush=True)
        began = time.monotonic()
        waiting = make_bundle(home / "bundle")
        sent = home / "sent"
        sent.mkdir()
        for name in (bundle.GO, "unbundle.py", "manifest.json"):
            shutil.copyfile(home / "bundle" / name, sent / name)
        give_ceilings(home, model, sheet)
        box, calls, code = Box(home, call_s, only), 0, None
        while (at_s := time.monotonic() - began) < SESSION_S and code not in (0, 1):
            if waiting:
                for old in sent.glob("lab.tar.*"):
                    old.unlink()
                part = waiting.pop(0)
                shutil.copyfile(part, sent / part.name)
                time.sleep(part.stat().st_size / TRANSFER_BYTES_PER_S)
            calls += 1
            amid = calls % 2 == 0 and not waiting
            code = box.call(sent, (KILLED_AT if amid else 1.0) * call_s)
            ended_s = time.monotonic() - began
            killed = "killed amid its work" if amid else "killed at its limit"
            how = killed if code is None else f"exit code {code}"
            print(f"== call {calls}: {at_s / 60:.1f} to {ended_s / 60:.1f} min, {how}", flush=True)
            time.sleep(BETWEEN_CALLS_S)
        done = sorted(p.parent.parent.name for p in home.glob("lab/results/*/*/*/COMPLETE"))
        archives = {p.name: p.stat().st_size for p in home.glob("out/*.tar.gz")}
        print(f"Whole after {calls} calls: {', '.join(done) or 'no lab'}; taken home: {archives}")
        took_s = prompts_s(home / "out" / "log.txt")
        print(f"Prompts were written {len(took_s)} times, in {sum(took_s):.0f} s altogether.")
        print(CANNOT.format(start_s=ENGINE_START_S, times=1 + MOST_AGAIN))
        return 0 if done and archives else 1


if __name__ == "__main__":
    sys.exit(main())
