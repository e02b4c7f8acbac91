"""Put a bundle in place on a machine without internet: `python3 bundle/unbundle.py FOLDER`.

`make bundle` puts this file beside the parts of the bundle, and it needs nothing but that machine's
own Python and its pip. Every part is checked before anything is written. The lab's files go to
FOLDER and the packages to FOLDER/.unbundled/site, which precedes that Python's own packages (such
as its torch) and leaves them unchanged. FOLDER/.unbundled/bin has commands that use both; where
that folder exists, `make` uses it and sets nothing up.

Standard library and pip only, and syntax that Python 3.6 can parse: a Python that is too old gets a
sentence, not a traceback.
"""

import argparse
import gzip
import hashlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

MANIFEST, SCRIPT = "manifest.json", "unbundle.py"
MOST_MANIFEST_BYTES = 16 * 2**20
PARTS = "parts"  # in HOME: those that have come so far, where they come one by one
FILES = "files.json"  # in HOME: the names of the lab's files, which the next bundle may not have
NOT_YET = 75  # exit code: parts are still to come
HOME, PROGRAMS_HOME = ".unbundled", ".tools/prometheus"
# Their compiled code works together in the versions that were built for one another, no others.
BUILT_AS_ONE = ("torch", "torchaudio", "torchvision", "triton")
COMMANDS = {"python": "", "labs": " -m labs.harness.commands.cli", "pytest": " -m pytest"}
# PYTHONPATH alone does not read the .pth files by which some packages name further folders.
READ_PTH = "import os, site\n\nsite.addsitedir(os.path.dirname(__file__))\n"


class UnbundleError(Exception):
    """The bundle cannot be put in place; the message says why and how to mend it."""


def sha256(path: Path) -> str:
    """Hash a file piece by piece: its parts may be larger than memory."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for chunk in iter(lambda: file.read(1 << 20), b""):
            digest.update(chunk)
    return digest.hexdigest()


def read_manifest(folder: Path) -> "dict[str, Any]":
    """Read what the bundle consists of and was made for. Raises UnbundleError."""
    path = folder / MANIFEST
    if path.exists() and not (path.is_file() and path.stat().st_size <= MOST_MANIFEST_BYTES):
        raise UnbundleError(
            f"{path} is not a regular file of at most {MOST_MANIFEST_BYTES >> 20} MiB, as"
            " `make bundle` writes it: copy that file again"
        )
    try:
        manifest = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UnbundleError(
            f"{folder} has no readable {MANIFEST}, which `make bundle` writes: give the folder with"
            " the parts, or copy that file again"
        ) from error
    if not _is_manifest(manifest):
        raise UnbundleError(f"{path} was not written by `make bundle`: copy that file again")
    return manifest  # type: ignore[no-any-return]


def _is_manifest(manifest: Any) -> bool:
    """Check the types of all that is read of a manifest; a part is a file beside it."""
    kinds = {
        **{"python": str, "machine": str, "parts": list},
        **{"expected": dict, "requires": dict, "packages": dict},
    }
    if not isinstance(manifest, dict):
        return False
    if not all(isinstance(manifest.get(name), kind) for name, kind in kinds.items()):
        return False
    versions = [*manifest["expected"].values(), *manifest["packages"].values()]
    if not all(isinstance(version, str) for version in versions):
        return False
    for required in manifest["requires"].values():
        if not (isinstance(required, list) and all(isinstance(r, str) for r in required)):
            return False
    return all(
        isinstance(part, dict)
        and isinstance(part.get("name"), str)
        and Path(part["name"]).name == part["name"]
        and type(part.get("bytes")) is int
        and isinstance(part.get("sha256"), str)
        for part in manifest["parts"]
    )


def check_python(manifest: "dict[str, Any]") -> None:
    """Check that this Python fits the bundle and has the packages that it leaves out.

    One in another version than expected is told, and refused where it is built as one with torch,
    or where the bundle's packages, or its own, require another version. Raises UnbundleError.
    """
    version, expected = ".".join(platform.python_version_tuple()[:2]), manifest["python"]
    if version != expected:
        raise UnbundleError(
            f"{sys.executable} is Python {version} and the bundle is for {expected}: run this with"
            f" that one, or make the bundle with PYTHON_VERSION={version}"
        )
    if platform.machine() != manifest["machine"]:
        raise UnbundleError(
            f"this machine is {platform.machine()} and the bundle is for {manifest['machine']}"
        )
    from importlib import metadata  # which an older Python lacks, that was told so above

    installed, differ, refused = {}, {}, []
    for name, version in manifest["expected"].items():
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            refused.append(f"{name} {version} is missing".replace("  ", " "))
            continue
        # a version that is not known is taken to fit
        if version and found.split("+")[0] != version.split("+")[0]:
            installed[name] = found
            differ[name] = f"{name} {version} is {found}"
    refused += [line for name, line in differ.items() if name in BUILT_AS_ONE]
    refused += unmet(manifest, installed)
    if refused:
        raise UnbundleError(
            f"the bundle leaves out packages that {sys.executable} was said to have, but here"
            f" {', '.join(refused)}: make it again with this machine's `pip list` as HAVE="
        )
    if differ:
        print(
            "not the versions that the bundle was made beside, but ones that its packages accept:"
            f" {', '.join(differ.values())}",
            flush=True,
        )


def unmet(manifest: "dict[str, Any]", installed: "dict[str, str]") -> "list[str]":
    """Name what the bundle requires of these installed packages, or they of it, and is not met.

    `installed` has name -> version. It is pip that reads the requirements: where it cannot, they
    are passed over.
    """
    from importlib import metadata

    try:
        from pip._vendor.packaging.requirements import InvalidRequirement, Requirement
        from pip._vendor.packaging.utils import canonicalize_name
    except ImportError:
        return []
    carried = manifest["packages"]
    asked = [(who, text, installed) for who, of in manifest["requires"].items() for text in of]
    for name, version in installed.items():
        asked += [(f"{name} {version}", text, carried) for text in metadata.requires(name) or []]
    lines = []
    for who, text, versions in asked:
        try:
            required = Requirement(text)
        except InvalidRequirement:
            continue
        version = versions.get(canonicalize_name(required.name), "")
        applies = required.marker is None or required.marker.evaluate({"extra": ""})
        if version and applies and not required.specifier.contains(version, prereleases=True):
            lines.append(f"{who} needs {required.name}{required.specifier}, not {version}")
    return lines


def check_parts(folder: Path, manifest: "dict[str, Any]") -> None:
    """Check that every part is there and whole. Raises UnbundleError, which names the others."""
    missing, damaged = [], []
    for part in manifest["parts"]:
        path = folder / part["name"]
        if not path.exists():
            missing.append(part["name"])
        elif not is_whole(path, part):
            damaged.append(part["name"])
    faults = [
        f"{fault}: {', '.join(names)}"
        for fault, names in (("missing", missing), ("damaged", damaged))
        if names
    ]
    if faults:
        raise UnbundleError(
            f"of {len(manifest['parts'])} parts in {folder} are {'; '.join(faults)}. Copy these"
            " again"
        )


def in_place(manifest: "dict[str, Any]", target: Path) -> bool:
    """Tell whether this very bundle has been put in place there."""
    try:
        return bool(read_manifest(target / HOME) == manifest)
    except UnbundleError:
        return False


def collect(folder: Path, target: Path, manifest: "dict[str, Any]") -> "list[str]":
    """Keep in `target` the parts that have come to `folder`; return the names still to come.

    Each is copied under another name, checked, and renamed: whenever this is killed, what is there
    is whole.
    """
    kept = target / HOME / PARTS
    kept.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(str(folder / MANIFEST), str(kept / MANIFEST))
    to_come = []
    for part in manifest["parts"]:
        place, source = kept / part["name"], folder / part["name"]
        if is_whole(place, part):
            continue
        if not source.exists():
            to_come.append(part["name"])
            continue
        if not source.is_file() or source.stat().st_size != part["bytes"]:
            raise UnbundleError(f"{source} is damaged: copy it again")
        half = place.with_suffix(".half")
        shutil.copyfile(str(source), str(half))
        if not is_whole(half, part):
            half.unlink()
            raise UnbundleError(f"{source} is damaged: copy it again")
        half.replace(place)
    return to_come


def is_whole(path: Path, part: "dict[str, Any]") -> bool:
    """Tell whether this file is that part of the bundle; a pipe is none."""
    if not path.is_file() or path.stat().st_size != part["bytes"]:
        return False
    return bool(sha256(path) == part["sha256"])


class Joined:
    """The parts as one file, read from front to back."""

    def __init__(self, paths: "list[Path]") -> None:
        self._files = [path.open("rb") for path in paths]

    def read(self, size: int) -> bytes:
        """Read the next `size` bytes, or what is left of all parts."""
        data = b""
        while self._files and len(data) < size:
            chunk = self._files[0].read(size - len(data))
            data += chunk
            if not chunk:
                self._files.pop(0).close()
        return data


def earlier_files(target: Path) -> "set[str]":
    """Read which files an earlier bundle wrote below `target`. Raises UnbundleError."""
    listed = target / HOME / FILES
    if not listed.exists():
        return set()
    try:
        names = json.loads(listed.read_text()) if listed.is_file() else None
        if isinstance(names, list) and all(_is_below(target, name) for name in names):
            return set(names)
    except (OSError, TypeError, ValueError, RecursionError):
        pass
    raise UnbundleError(
        f"{listed} is no list of files below {target}, as this program writes it: remove it (what"
        " only an earlier bundle had is then kept), or give another folder"
    )


def _is_below(target: Path, name: str) -> bool:
    return (target / name).parent.resolve().is_relative_to(target.resolve())


def unpack(folder: Path, manifest: "dict[str, Any]", target: Path) -> None:
    """Write the lab's files; remove those of an earlier bundle, and keep the reader's own.

    That bundle may have been unpacked and never installed: its packages must not come with these.
    """
    before = earlier_files(target)
    shutil.rmtree(str(target / HOME / "wheels"), ignore_errors=True)
    stream: Any = Joined([folder / part["name"] for part in manifest["parts"]])
    with tarfile.open(fileobj=stream, mode="r|") as archive:
        archive.extraction_filter = getattr(tarfile, "data_filter", None)
        archive.extractall(str(target))
        files = [m.name for m in archive.getmembers() if not m.isdir()]
    for name in before - set(files):
        if (target / name).is_file():
            (target / name).unlink()
    written = [name for name in files if not name.startswith(HOME)]
    (target / HOME / FILES).write_text(json.dumps(written))
    for packed in (target / PROGRAMS_HOME).glob("*.gz"):
        with gzip.open(str(packed)) as source, packed.with_suffix("").open("wb") as program:
            shutil.copyfileobj(source, program)
        packed.with_suffix("").chmod(0o755)
        packed.unlink()


def install(target: Path) -> None:
    """Install the wheels in .unbundled/site, all or none, and write the commands."""
    home = target / HOME
    site, half, wheels = home / "site", home / "site.half", home / "wheels"
    shutil.rmtree(str(half), ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    offline = ["--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--target", str(half)]
    files = sorted(str(path) for path in wheels.glob("*.whl"))
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "PYTHONPATH"))}
    if subprocess.call([*pip, *offline, *files], env=env):
        raise UnbundleError(f"pip could not install the packages into {half}: its lines say why")
    if any(half.glob("*.pth")):
        (half / "sitecustomize.py").write_text(READ_PTH)
    shutil.rmtree(str(site), ignore_errors=True)
    half.rename(site)
    shutil.rmtree(str(wheels))
    (home / "bin").mkdir(exist_ok=True)
    places = f"{shlex.quote(str(site))}:{shlex.quote(str(target))}"
    for name, arguments in COMMANDS.items():
        command = home / "bin" / name
        command.write_text(
            f'#!/bin/sh\nPYTHONUTF8=1 PYTHONPATH={places}"${{PYTHONPATH:+:$PYTHONPATH}}" exec'
            f' {shlex.quote(sys.executable)}{arguments} "$@"\n'
        )
        command.chmod(0o755)


def unbundle(folder: Path, target: Path) -> None:
    """Put the bundle in `folder` in place in `target`, for a Python that fits it.

    Raises UnbundleError.
    """
    manifest = read_manifest(folder)
    if (target / ".git").exists():
        raise UnbundleError(
            f"{target} is a Git checkout, whose files the bundle's would replace: give another"
            " folder"
        )
    print(f"checking {len(manifest['parts'])} parts", flush=True)
    check_parts(folder, manifest)
    print(f"unpacking into {target}", flush=True)
    target.mkdir(parents=True, exist_ok=True)
    unpack(folder, manifest, target)
    print(f"installing {len(manifest['packages'])} packages", flush=True)
    install(target)
    print("preparing the bundled model", flush=True)
    command = [str(target / HOME / "bin" / "python"), "-m", "serving.weights.models"]
    converted = subprocess.run(command, cwd=str(target), stderr=subprocess.PIPE)
    if converted.returncode:
        last = converted.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise UnbundleError(f"the bundled model could not be prepared ({' '.join(last)})")
    shutil.copyfile(str(folder / MANIFEST), str(target / HOME / MANIFEST))  # last: all is in place
    print(
        f"ready: cd {shlex.quote(str(target))} && make doctor"
        f"\n(without make: {HOME}/bin/labs doctor, {HOME}/bin/labs run <lab>)"
    )


def main(arguments: "list[str] | None" = None) -> int:
    parser = argparse.ArgumentParser(
        description="Check a bundle, unpack it, and install its packages beside what this Python"
        " holds, in a folder of their own. Nothing is fetched.",
    )
    parser.add_argument("target", help="the folder to put the lab in")
    parser.add_argument(
        "--from",
        dest="folder",
        default=str(Path(__file__).resolve().parent),
        help="the folder with the parts (default: where this file lies)",
    )
    parser.add_argument(
        "--collect",
        action="store_true",
        help=f"keep the parts that have come, and unpack once all have (until then: exit code"
        f" {NOT_YET}); a bundle that is in place is left as it is",
    )
    options = parser.parse_args(arguments)
    folder, target = Path(options.folder).resolve(), Path(options.target).resolve()
    try:
        manifest = read_manifest(folder)
        if options.collect and in_place(manifest, target):
            return 0
        check_python(manifest)
        if options.collect:
            to_come = collect(folder, target, manifest)
            if to_come:
                print(f"of {len(manifest['parts'])} parts are still to come: {', '.join(to_come)}")
                return NOT_YET
            folder = target / HOME / PARTS
        unbundle(folder, target)
    except (UnbundleError, OSError, tarfile.TarError) as error:
        print(f"unbundle stopped: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
