"""Gather what a GPU machine without internet needs, on a machine that has it: `make bundle`.

The packages are resolved for that machine's Python, not this one's: uv reads the requirements of
pyproject.toml and prefers the versions of serving/locks/cuda.txt, and pip downloads the wheels.
With that machine's `pip list` as HAVE=, the packages in it are used as they are and left out. Each
of them is given to the resolver as an empty wheel of that version: so the resolver needs neither an
index that has it nor its dependencies, and chooses the vLLM that fits its torch. That wheel is
tagged for the platform, since one for any platform would lose to the index's own.

Everything goes into one tar, cut into parts of equal size with their SHA-256 in manifest.json. The
same content makes the same parts, and a complete part is not written again: after an interruption
or a lost part, only the missing ones are made and copied again.
"""

from __future__ import annotations

import email
import gzip
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import unquote

from serving import whole
from serving.install import PROGRAMS, ROOT, entries, lock_of
from serving.lean import LEAN, lean_wheel, tokenizer_files, why
from serving.unbundle import BUILT_AS_ONE, HOME, MANIFEST, PROGRAMS_HOME, SCRIPT, sha256

GO = "go.sh"

LOCK, MODEL_LOCK = lock_of(ROOT, "cuda"), lock_of(ROOT, "model")
PLATFORMS = ("cuda",)
ARCH = "x86_64"
GLIBC_MINOR = 31  # Debian 11, Ubuntu 20.04 and newer; one of vLLM's needs has no older wheel
PLATFORM_TAGS = [
    *(f"manylinux_2_{minor}_{ARCH}" for minor in range(GLIBC_MINOR, 4, -1)),
    *(f"manylinux{year}_{ARCH}" for year in (2014, 2010, 1)),
]
# For sound and video, of which the labs send none. Each fits one build of torch and the system's
# FFmpeg, and where it does not, its import fails and takes transformers' with it.
NEVER = ("torchaudio", "torchcodec")
# Talks to a Grafana, of which there is none; what it needs puts itself in urllib3's place.
NOT_THERE = ("grafana-client",)
TESTS_NEED = "pytest\npytest-timeout\n"  # of the dev extra, what runs tests/gpu there
WITHOUT_RESULTS = "`git sparse-checkout set --no-cone '/*' '!/results/'`"

Packages = dict[str, str]  # normalized name -> version


class BundleError(Exception):
    """The bundle cannot be made; the message says why and what to give instead."""


@dataclass(frozen=True)
class BundleRequest:
    """The machine that a bundle is for, and the size of its parts."""

    python: str  # such as 3.12
    have: Packages  # installed there
    without: tuple[str, ...]  # packages to leave out
    vllm: str  # its version; empty: the one that fits
    part_bytes: int
    lean: str = ""  # a name in LEAN

    @property
    def left_out(self) -> tuple[str, ...]:
        """The packages that are not carried, whoever asked for that."""
        return (*self.without, *(LEAN[self.lean].packages if self.lean else ()))


def normal(name: str) -> str:
    """Normalize a package's name as indexes do (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def read_have(path: Path) -> Packages:
    """Read what `pip list` or `pip freeze` printed on the other machine.

    A line with a name alone says that the package is there in a version that is not known, and is
    taken to fit: "". Raises BundleError.
    """
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise BundleError(
            f"HAVE={path} cannot be read ({error.strerror}): give a file with that machine's"
            " `python3 -m pip list`"
        ) from error
    packages = {}
    for line in lines:
        if built := re.fullmatch(r"([A-Za-z0-9][\w.-]*) @ (\S+)", line.strip()):
            # `pip freeze` names the file that it was installed from, a wheel with its version
            wheel = re.search(r"/[\w.]+-(\d[^-/]*)-[^/]*\.whl", unquote(built[2]))
            packages[normal(built[1])] = wheel[1] if wheel else ""
            continue
        row = re.fullmatch(r"([A-Za-z0-9][\w.-]*)(?:(?:==|\s+)(\d\S*)(?:\s.*)?)?", line.strip())
        if row:
            packages[normal(row[1])] = row[2] or ""
    if not packages:
        raise BundleError(f"HAVE={path} names no package: give the output of `python3 -m pip list`")
    return packages


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
    sizes = {
        name: path.stat().st_size + 1024  # and its header
        for name in set(listed.stdout.split("\0"))
        if name and (path := ROOT / name).is_file()
    }
    tree = sum(sizes.values())
    left = (part_size(most) - tree) // 10**6 * 10**6
    if left <= 0:
        results = sum(size for name, size in sizes.items() if name.startswith("results/"))
        way_out = (
            f", of which results/ takes {results / 1e6:.0f} MB: {WITHOUT_RESULTS} leaves the"
            " committed ones out, and `git sparse-checkout disable` brings them back"
        )
        raise BundleError(
            f"WITH_TREE={most} leaves no room for a part: this checkout is {tree / 1e6:.0f} MB"
            + (way_out if results else "")
        )
    return left


def check(
    platform: str, python: str, lean: str = "", have: Mapping[str, str] | None = None
) -> None:
    """Check that a bundle can be made for this platform and Python. Raises BundleError."""
    if lean and lean not in LEAN:
        raise BundleError(f"LEAN={lean} is not known: give LEAN={', '.join(LEAN)}")
    if lean and not (have or {}).get("torch"):
        raise BundleError(f"LEAN={lean} needs HAVE= with that machine's torch, which it leaves out")
    if platform not in PLATFORMS:
        raise BundleError(f"FOR={platform} is not known: give FOR=cuda")
    if not re.fullmatch(r"3\.\d+", python) or int(python[2:]) < 11:
        raise BundleError(f"PYTHON_VERSION={python}: the lab needs 3.11 or newer, such as 3.12")


# ------------------------------------------------------------------------------------- the packages


def resolve(request: BundleRequest, work: Path, say: Callable[[str], None]) -> Packages:
    """Find every package that the labs need there, with those it has. Raises BundleError."""
    locked = dict(pins(LOCK))
    left_out = {
        **{name: locked[name] for name in (*NOT_THERE, *request.left_out) if name in locked},
        **{name: v or locked[name] for name, v in request.have.items() if v or name in locked},
    }
    if unknown := [n for n in request.without if n not in left_out]:
        raise BundleError(
            f"WITHOUT names {', '.join(unknown)}, which is not in the lock file: correct"
            " the name, or leave it out"
        )
    (work / "there").mkdir()
    python = "cp" + request.python.replace(".", "")
    tag = f"{python}-{python}-manylinux_2_{GLIBC_MINOR}_{ARCH}"
    for name, version in left_out.items():
        write_empty_wheel(work / "there", name, version, tag)
    fixed = {name: v for name in BUILT_AS_ONE if (v := request.have.get(name))}
    fixed |= {"vllm": request.vllm} if request.vllm else {}
    # uv prefers the versions that its output file already contains
    write_pins(work / "fixed.txt", fixed)
    write_pins(work / "pins.txt", {**locked, **left_out})
    (work / "tests.in").write_text(TESTS_NEED)
    command = [
        *(sys.executable, "-m", "uv", "pip", "compile", "pyproject.toml", "--extra", "cuda"),
        str(work / "tests.in"),
        *("--python-version", request.python, "--only-binary", ":all:"),
        *("--python-platform", f"{ARCH}-manylinux_2_{GLIBC_MINOR}", "--no-annotate", "--no-header"),
        "--no-python-downloads",
        *("--find-links", str(work / "there"), "--constraint", str(work / "fixed.txt")),
        *("--output-file", str(work / "pins.txt")),
    ]
    uv = subprocess.run(command, cwd=ROOT, env=for_uv(), capture_output=True, text=True)
    if "No module named uv" in uv.stderr:
        raise BundleError(
            "uv, which resolves packages for another machine, is not installed: run `make setup`"
        )
    if uv.returncode:
        output = "\n    ".join(uv.stderr.strip().splitlines()[-12:])
        raise BundleError(f"no set of packages fits that machine; uv says:\n    {output}")
    for line in uv.stderr.splitlines():
        if "does not have an extra" in line:  # what a package there was installed without
            say(f"uv: {line}")
    return dict(pins(work / "pins.txt"))


def for_uv() -> dict[str, str]:
    """Return the environment for uv, which does not read pip's settings."""
    index = os.environ.get("PIP_INDEX_URL")
    return {**os.environ, **({"UV_DEFAULT_INDEX": index} if index else {})}


def pins(path: Path) -> Iterator[tuple[str, str]]:
    """Read (normalized name, version) of each pinned package."""
    for line in path.read_text().splitlines():
        if match := re.match(r"([\w.-]+)==([^\s;]+)", line):
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


def download(packages: Packages, python: str, folder: Path) -> list[Path]:
    """Download the wheels that the folder lacks; return the wheels of all these packages.

    Where a package has the lock's version, its wheel must be one of the lock's files. Raises
    BundleError.
    """
    missing = {n: v for n, v in packages.items() if not wheel_of(folder, n, v)}
    if missing:
        tag = "cp" + python.replace(".", "")
        command = [
            *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary"),
            *(":all:", "--python-version", python, "--implementation", "cp", "--dest", str(folder)),
            *(a for abi in (tag, "abi3", "none") for a in ("--abi", abi)),
            *(a for name in PLATFORM_TAGS for a in ("--platform", name)),
            *(f"{name}=={version}" for name, version in missing.items()),
        ]
        pip = subprocess.run(command, capture_output=True, text=True)
        if pip.returncode:
            output = pip.stderr.strip().splitlines() or ["no reason given"]
            raise BundleError(f"pip could not download the packages; its last line: {output[-1]}")
    wheels = {name: wheel_of(folder, name, version) for name, version in packages.items()}
    if lost := [name for name, wheel in wheels.items() if wheel is None]:
        raise BundleError(f"pip downloaded no wheel of {', '.join(lost)}")
    for lock in (LOCK, MODEL_LOCK):
        versions, files = dict(pins(lock)), entries(lock)
        for name, wheel in wheels.items():
            locked = wheel and versions.get(name) == packages[name]
            if wheel and locked and sha256(wheel) not in files[name]:
                wheel.unlink()
                raise BundleError(
                    f"{wheel.name} was deleted: it is not the file that {lock.name} names, so pip's"
                    " index, a mirror or a cache serves another one; the same command tries again"
                )
    return sorted(wheel for wheel in wheels.values() if wheel)


def wheel_of(folder: Path, name: str, version: str) -> Path | None:
    """Find a package's wheel in a folder; None where there is none of this version."""
    for path in folder.glob("*.whl"):
        wheel_name, wheel_version = path.name.split("-")[:2]
        if normal(wheel_name) == name and wheel_version == version:
            return path
    return None


# ---------------------------------------------------------------------------------------- the parts


class Parts:
    """A file cut into parts; a part whose content is on disk already is left as it is."""

    def __init__(self, folder: Path, part_bytes: int) -> None:
        self._folder, self._part_bytes = folder, part_bytes
        self.manifest: list[dict[str, str | int]] = []  # of the complete parts
        self.unchanged = 0  # parts that were on disk already
        self._file: IO[bytes] | None = None

    def write(self, data: bytes) -> int:
        """Append to the file, as `tarfile` does; return the number of bytes."""
        view = memoryview(data)
        while view:
            if self._file is None:
                half = whole.half_name(self._folder / self._name)
                self._file, self._hash = half.open("wb"), hashlib.sha256()
            piece = view[: self._part_bytes - self._file.tell()]
            self._file.write(piece)
            self._hash.update(piece)
            view = view[len(piece) :]
            if self._file.tell() == self._part_bytes:
                self._end_part()
        return len(data)

    @property
    def _name(self) -> str:
        """The name of the part that is being written."""
        return f"lab.tar.{len(self.manifest):03}"

    def _end_part(self) -> None:
        assert self._file
        self._file.close()
        half, digest = Path(self._file.name), self._hash.hexdigest()
        path = self._folder / self._name
        if path.exists() and sha256(path) == digest:
            half.unlink()
            self.unchanged += 1
        else:
            half.rename(path)
        size = path.stat().st_size
        self.manifest.append({"name": path.name, "bytes": size, "sha256": digest})
        self._file = None

    def close(self) -> None:
        """Complete the last part, and remove the parts of an earlier, longer file."""
        if self._file:
            self._end_part()
        for path in self._folder.glob("lab.tar.*"):
            if path.name not in {part["name"] for part in self.manifest}:
                path.unlink()


def write_tar(
    parts: Parts, wheels: list[Path], programs: list[Path], files: Mapping[str, Path]
) -> None:
    """Write the committed repository without results/, wheels, Prometheus and further files.

    Raises BundleError where this is no Git checkout.
    """
    repository = subprocess.run(
        ["git", "-C", str(ROOT), "archive", "HEAD", ".", ":!results"], capture_output=True
    )
    if repository.returncode:
        raise BundleError(f"git cannot archive {ROOT}: a bundle is made from a Git checkout")
    stream: Any = parts  # tarfile needs its write() only
    with tarfile.open(fileobj=stream, mode="w|") as archive:
        with tarfile.open(fileobj=io.BytesIO(repository.stdout)) as committed:
            for member in committed:
                content = committed.extractfile(member) if member.isfile() else None
                archive.addfile(member, content)
        for name, path in [*((f"{HOME}/wheels/{w.name}", w) for w in wheels), *files.items()]:
            member = tarfile.TarInfo(name)  # dated 0, for equal tars
            member.size = path.stat().st_size
            with path.open("rb") as file:
                archive.addfile(member, file)
        for path in programs:
            packed = gzip.compress(path.read_bytes(), compresslevel=4, mtime=0)
            member = tarfile.TarInfo(f"{PROGRAMS_HOME}/{path.name}.gz")
            member.size = len(packed)
            archive.addfile(member, io.BytesIO(packed))


def requirements(wheels: list[Path], expected: Packages) -> dict[str, list[str]]:
    """Return what the lab and each wheel require of the packages that the other machine has.

    These are the requirements as they stand, with their conditions, which hold or not over there.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = {"the lab": project["dependencies"]}
    for path in wheels:
        with zipfile.ZipFile(path) as wheel:
            name = next(n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
            about = email.message_from_bytes(wheel.read(name))
        asked[" ".join(path.name.split("-")[:2])] = about.get_all("Requires-Dist") or []
    named = re.compile(r"[\w.-]+")
    of_expected = {
        who: [r for r in required if (m := named.match(r)) and normal(m[0]) in expected]
        for who, required in asked.items()
    }
    return {who: required for who, required in of_expected.items() if required}


def write_manifest(
    out: Path,
    python: str,
    packages: Packages,
    expected: Packages,
    requires: dict[str, list[str]],
    parts: Parts,
) -> None:
    """Write beside the parts what they are, and the scripts that the other machine runs."""
    manifest = {
        "python": python,
        "machine": ARCH,
        "commit": _commit(),
        "packages": packages,
        "expected": expected,
        "requires": requires,
        "parts": parts.manifest,
    }
    whole.write(out / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    for name in (SCRIPT, GO):
        shutil.copyfile(Path(__file__).with_name(name), out / name)


def bundle(
    request: BundleRequest, out: Path, cache: Path, programs: list[Path], say: Callable[[str], None]
) -> int:
    """Make the bundle in `out`; return its bytes. Raises BundleError."""
    out.mkdir(parents=True, exist_ok=True)
    folder = cache / f"wheels-{request.python}"
    folder.mkdir(parents=True, exist_ok=True)
    say(f"Resolving for Python {request.python}, CUDA, {ARCH}")
    with tempfile.TemporaryDirectory() as work:
        needed = resolve(request, Path(work), say)
    carried = {
        name: version
        for name, version in needed.items()
        if name not in (*NEVER, *NOT_THERE, *request.left_out)
        and request.have.get(name) not in (version, "")
    }
    left_out = {n: request.have[n] for n, v in needed.items() if request.have.get(n) in (v, "")}
    if not request.lean:
        carried |= dict(pins(MODEL_LOCK))
    say(
        f"vLLM {needed['vllm']}: {len(carried)} packages to carry, {len(left_out)} already there;"
        f" downloading into {os.path.relpath(folder)}"
    )
    wheels = download(carried, request.python, folder)
    files: dict[str, Path] = {}
    if request.lean:
        patterns = LEAN[request.lean].files
        names = {wheel: normal(wheel.name.split("-")[0]) for wheel in wheels}
        wheels = [lean_wheel(w, patterns[n]) if n in patterns else w for w, n in names.items()]
        files, programs = tokenizer_files(), []
        say(why(request.lean))
    needed_bytes = sum(path.stat().st_size for path in wheels)
    present_bytes = sum(path.stat().st_size for path in out.glob("lab.tar.*"))
    if needed_bytes > shutil.disk_usage(out).free + present_bytes:
        raise BundleError(
            f"{out} has no room for {needed_bytes / 1e9:.1f} GB: give another folder as OUT="
        )
    parts = Parts(out, request.part_bytes)
    write_tar(parts, wheels, programs, files)
    parts.close()
    requires = requirements(wheels, left_out)
    write_manifest(out, request.python, carried, left_out, requires, parts)
    total = sum(int(part["bytes"]) for part in parts.manifest)
    say(
        f"{total / 1e6:,.0f} MB in {len(parts.manifest)} parts, of which {parts.unchanged} were"
        f" there already. Copy {os.path.relpath(out)} to the other machine, and there:"
    )
    say(f"  python3 {out.name}/{SCRIPT} <folder for the lab>")
    say(f"or, part by part, at every call: bash {out.name}/{GO}")
    return total


def prometheus_programs() -> list[Path]:
    """Find the programs that the set-up has unpacked here.

    One that is installed on this machine does not count: it may need this machine's libraries.
    """
    folder = ROOT / ".tools" / "prometheus"
    return [folder / n for n in PROGRAMS if os.uname().machine == ARCH and (folder / n).exists()]


def _commit() -> str:
    command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()
