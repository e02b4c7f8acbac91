"""Gather what a GPU machine without internet needs, on a machine that has it: `make bundle`.

uv resolves the packages for that machine's Python, prefers the versions of serving/locks/cuda.txt,
and installs them into a folder, each file of the lock by its SHA-256. With that machine's `pip
list` as HAVE=, the packages in it are used as they are and left out. Each of them is given to the
resolver as an empty wheel of that version: so it needs neither an index that has it nor its
dependencies, and chooses the vLLM that fits its torch. That wheel is tagged for the platform, since
one for any platform would lose to the index's own.

The packages, this repository as committed, without results, the bundled model and Prometheus go
into one compressed tar, cut into parts with their SHA-256 in manifest.json. serving/unbundle.py
travels with them and needs nothing but a Python.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from serving import atomic
from serving.models import catalog
from serving.packaging import install
from serving.packaging.install import ROOT, entries, lock_of
from serving.unbundle import BUILT_AS_ONE, HOME, MANIFEST, SCRIPT

LOCK = lock_of(ROOT, "cuda")
ARCH = "x86_64"
GLIBC = (
    "manylinux_2_31"  # Debian 11, Ubuntu 20.04 and newer; one of vLLM's needs has no older wheel
)
# For sound and video, of which the labs send none. Each fits one build of torch and the system's
# FFmpeg, and where it does not, its import fails and takes transformers' with it.
NEVER = ("torchaudio", "torchcodec")
TESTS_NEED = "pytest\npytest-timeout\npytest-xdist\n"  # of the dev extra, what runs tests/gpu there
WITHOUT_RESULTS = "`git sparse-checkout set --no-cone '/*' '!/results/'`"

# What a Hopper GPU (H100, H200) does not need to serve random weights with vLLM 0.26, in whose
# source each is imported only by what is named here, with all that only they need.
LEAN_PACKAGES = (
    # kernels of other models, and those that vLLM only uses when they are there
    *("flashinfer-python", "nvidia-cutlass-dsl", "quack-kernels", "tilelang", "tokenspeed-mla"),
    *("humming-kernels", "nvidia-cudnn-frontend", "cuda-tile"),
    # pictures and video; loading weights, of which there are none; traces
    *("opencv-python-headless", "pynvvideocodec", "fastsafetensors", "mistral-common"),
    *("opentelemetry-exporter-otlp", "opentelemetry-sdk"),
    "numba",  # n-grams alone are looked up with it
)
LEAN_FILES = (  # of the packages' folder; a folder goes with all that is in it
    *("vllm/vllm_flash_attn/_vllm_fa2_C.*", "vllm/vllm-rs", "vllm/_flashmla*", "vllm/_qutlass*"),
    *("vllm/third_party/deep_gemm", "vllm/third_party/fmha_sm100"),
    *("vllm/entrypoints/serve/instrumentator/static", "vllm/**/*.jpg", "vllm/**/*.png"),
)
LEAN_CANNOT = (
    "It serves random weights only (WEIGHTS=dummy), on an H100 or H200 alone, and no pictures;"
    " `make import` fills dashboards at home. Speculation by n-grams needs a numba that is there."
)

Packages = dict[str, str]  # normalized name -> version


class BundleError(Exception):
    """The bundle cannot be made; the message says why and what to give instead."""


@dataclass(frozen=True)
class BundleRequest:
    """The machine that a bundle is for, and the size of its parts."""

    python: str  # such as 3.12
    have: Packages  # installed there
    vllm: str  # its version; empty: the one that fits
    part_bytes: int
    lean: bool = False

    def check(self) -> None:
        """Check that it can be made. Raises BundleError."""
        if not re.fullmatch(r"3\.\d+", self.python) or int(self.python[2:]) < 11:
            raise BundleError(
                f"PYTHON_VERSION={self.python}: the lab needs 3.11 or newer, such as 3.12"
            )
        if self.lean and "torch" not in self.have:
            raise BundleError("LEAN= needs HAVE= with that machine's torch, which it leaves out")


def normal(name: str) -> str:
    """Normalize a package's name as indexes do (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def read_have(path: Path) -> Packages:
    """Read what `pip list` or `pip freeze` printed on the other machine. Raises BundleError."""
    try:
        text = path.read_text()
    except OSError as error:
        raise BundleError(
            f"HAVE={path} cannot be read ({error.strerror}): give a file with that machine's"
            " `python3 -m pip list`"
        ) from error
    rows = re.findall(r"(?m)^([A-Za-z0-9][\w.-]*?)(?:==|[ \t]+)(\d\S*)", text)
    if not rows:
        raise BundleError(f"HAVE={path} names no package: give the output of `python3 -m pip list`")
    return {normal(name): version for name, version in rows}


def part_size(text: str) -> int:
    """Read a size in bytes: `60M` -> 60,000,000. Raises BundleError."""
    size = re.fullmatch(r"(\d+)([KMG]?)", text)
    if size is None or int(size[1]) == 0:
        raise BundleError(f"PART={text} is not a size: give bytes, or a size such as 60M or 2G")
    return int(size[1]) * {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}[size[2]]


def fitting(most: str) -> int:
    """Return the size of a part that travels with this checkout: both within `most`.

    The checkout is what Git tracks and what it does not ignore, as far as it lies on disk: what a
    sparse checkout leaves out does not travel. Raises BundleError.
    """
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others"]
    listed = subprocess.run([*command, "--exclude-standard"], capture_output=True, text=True)
    files = [ROOT / name for name in set(listed.stdout.split("\0")) if name]
    tree = sum(path.stat().st_size + 1024 for path in files if path.is_file())  # and its header
    left = (part_size(most) - tree) // 10**6 * 10**6
    if left <= 0:
        raise BundleError(
            f"WITH_TREE={most} leaves no room for a part: this checkout is {tree / 1e6:.0f} MB."
            f" {WITHOUT_RESULTS} leaves the committed results out, and `git sparse-checkout"
            " disable` brings them back"
        )
    return left


# --- the packages -------------------------------------------------------------------------------


def resolve(request: BundleRequest, work: Path) -> Packages:
    """Find every package that the labs need there, with those it has. Raises BundleError."""
    locked = dict(pins(LOCK))
    lean = LEAN_PACKAGES if request.lean else ()
    there = {name: locked[name] for name in lean if name in locked} | request.have
    (work / "there").mkdir()
    python = "cp" + request.python.replace(".", "")
    for name, version in there.items():
        write_empty_wheel(work / "there", name, version, f"{python}-{python}-{GLIBC}_{ARCH}")
    fixed = {name: request.have[name] for name in BUILT_AS_ONE if name in request.have}
    fixed |= {"vllm": request.vllm} if request.vllm else {}
    write_pins(work / "fixed.txt", fixed)
    # uv prefers the versions that its output file already contains
    write_pins(work / "pins.txt", locked | there)
    (work / "tests.in").write_text(TESTS_NEED)
    uv(
        *("compile", "pyproject.toml", "--extra", "cuda", str(work / "tests.in")),
        *("--python-version", request.python, "--python-platform", f"{ARCH}-{GLIBC}"),
        *("--only-binary", ":all:", "--no-annotate", "--no-header", "--no-python-downloads"),
        *("--find-links", str(work / "there"), "--constraint", str(work / "fixed.txt")),
        *("--output-file", str(work / "pins.txt")),
    )
    return {
        name: version
        for name, version in pins(work / "pins.txt")
        if name not in NEVER and there.get(name) != version
    }


def install_there(packages: Packages, python: str, site: Path) -> None:
    """Install these packages for that Python. Raises BundleError.

    Where one has the lock's version, its file must be one of the lock's.
    """
    locked, files = dict(pins(LOCK)), entries(LOCK)
    lines = [
        files[name] if locked.get(name) == version else f"{name}=={version}"
        for name, version in sorted(packages.items())
    ]
    listed = site.with_suffix(".txt")
    listed.write_text("\n".join(lines) + "\n")
    uv(
        *("install", "--no-deps", "--only-binary", ":all:", "--no-python-downloads"),
        *("--python-version", python, "--python-platform", f"{ARCH}-{GLIBC}"),
        *("--target", str(site), "--requirement", str(listed)),
    )


def uv(*arguments: str) -> None:
    """Run `uv pip` with pip's settings. Raises BundleError with what it says."""
    command = [*install.uv_command(ROOT), *arguments]
    env = {**os.environ, **install.uv_environment(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode:
        said = "\n    ".join(done.stderr.strip().splitlines()[-12:])
        raise BundleError(
            f"uv could not gather the packages for that machine; it says:\n    {said}"
        )


def pins(path: Path) -> Iterator[tuple[str, str]]:
    """Read (normalized name, version) of each pinned package."""
    for match in re.finditer(r"(?m)^([\w.-]+)==([^\s;]+)", path.read_text()):
        yield normal(match[1]), match[2]


def write_pins(path: Path, packages: Mapping[str, str]) -> None:
    path.write_text("".join(f"{name}=={version}\n" for name, version in sorted(packages.items())))


def write_empty_wheel(folder: Path, name: str, version: str, tag: str = "py3-none-any") -> None:
    """Write a wheel with a name and a version only: no files and no dependencies."""
    stem = f"{name.replace('-', '_')}-{version}"
    about = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    with zipfile.ZipFile(folder / f"{stem}-{tag}.whl", "w") as wheel:
        wheel.writestr(f"{stem}.dist-info/METADATA", about)
        wheel.writestr(f"{stem}.dist-info/WHEEL", f"Wheel-Version: 1.0\nTag: {tag}\n")
        wheel.writestr(f"{stem}.dist-info/RECORD", "")


# --- the parts ----------------------------------------------------------------------------------


def pack(archive: Path, folders: Mapping[str, Path]) -> None:
    """Write the committed repository without results/, and folders under these names.

    Raises BundleError where this is no Git checkout.
    """
    command = ["git", "-C", str(ROOT), "archive", "HEAD", ".", ":!results"]
    with tempfile.TemporaryFile() as repository:
        if subprocess.run(command, stdout=repository).returncode:
            raise BundleError(f"git cannot archive {ROOT}: a bundle is made from a Git checkout")
        repository.seek(0)
        with (
            tarfile.open(archive, "w:xz", preset=2) as packed,
            tarfile.open(fileobj=repository) as committed,
        ):
            for member in committed:
                packed.addfile(member, committed.extractfile(member) if member.isfile() else None)
            for name, folder in folders.items():
                packed.add(folder, name)


def cut(archive: Path, part_bytes: int, out: Path) -> list[dict[str, str | int]]:
    """Cut a file into parts in `out`, in the place of earlier ones; return what they are."""
    for path in out.glob("lab.tar.*"):
        path.unlink()
    parts: list[dict[str, str | int]] = []
    with archive.open("rb") as source:
        while piece := source.read(part_bytes):
            name = f"lab.tar.{len(parts):03}"
            (out / name).write_bytes(piece)
            digest = hashlib.sha256(piece).hexdigest()
            parts.append({"name": name, "bytes": len(piece), "sha256": digest})
    return parts


def carried_folders(lean: bool, site: Path, work: Path) -> dict[str, Path]:
    """Return what a bundle carries beside the repository: its name there -> its folder here."""
    folders = {f"{HOME}/site": site}
    if lean:
        for pattern in LEAN_FILES:
            for path in site.glob(pattern):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        alone = work / "tokenizer"
        alone.mkdir()
        for name in catalog.TOKENIZER:
            shutil.copyfile(catalog.bundled() / name, alone / name)
        return folders | {f"{catalog.CACHE.name}/{catalog.TOKENIZER_ALONE}": alone}
    folders[f"{catalog.CACHE.name}/models/{catalog.BUNDLED}"] = catalog.bundled()
    programs = ROOT / ".tools" / "prometheus"
    # one that is installed on this machine may need this machine's libraries
    if programs.exists() and os.uname().machine == ARCH:
        folders[".tools/prometheus"] = programs
    return folders


def bundle(request: BundleRequest, out: Path, say: Callable[[str], None]) -> None:
    """Make the bundle in `out`. Raises BundleError."""
    request.check()
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out) as folder:
        work = Path(folder)
        say(f"Resolving for Python {request.python}, CUDA, {ARCH}")
        packages = resolve(request, work)
        say(f"vLLM {packages['vllm']}: downloading {len(packages)} packages")
        install_there(packages, request.python, work / "site")
        say("Packing")
        folders = carried_folders(request.lean, work / "site", work)
        pack(work / "lab.tar.xz", folders)
        parts = cut(work / "lab.tar.xz", request.part_bytes, out)
    head = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    manifest = {
        "python": request.python,
        "machine": ARCH,
        "commit": subprocess.run(head, capture_output=True, text=True).stdout.strip(),
        "packages": packages,
        "expected": request.have,
        "parts": parts,
    }
    atomic.write(out / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    shutil.copyfile(Path(__file__).with_name(SCRIPT), out / SCRIPT)
    total = sum(int(part["bytes"]) for part in parts)
    say(
        f"{total / 1e6:,.0f} MB in {len(parts)} parts. Copy {os.path.relpath(out)} to the other"
        f" machine, and there: python3 {out.name}/{SCRIPT} <folder for the lab>"
    )
    if request.lean:
        say(LEAN_CANNOT)
