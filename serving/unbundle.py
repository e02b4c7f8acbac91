"""Put a bundle in place on a machine without internet: `python3 bundle/unbundle.py FOLDER`.

`make bundle` puts this file beside the parts of the bundle, and it needs nothing but that machine's
own Python. The parts may come one by one: those that are there are checked and kept in
FOLDER/.unbundled/parts, and once all are, they are unpacked. The packages go to
FOLDER/.unbundled/site, which precedes that Python's own packages (such as its torch) and leaves
them unchanged. FOLDER/.unbundled/bin has commands that use both; where that folder exists, `make`
uses it and sets nothing up.

Standard library only, and syntax that Python 3.7 can parse: a Python that is too old gets a
sentence, not a traceback.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shlex
import shutil
import sys
import tarfile
from pathlib import Path
from typing import Any

MANIFEST, SCRIPT = "manifest.json", "unbundle.py"
NOT_YET = 75  # exit code: parts are still to come
HOME = ".unbundled"
# Their compiled code works together in the versions that were built for one another, no others.
BUILT_AS_ONE = ("torch", "torchaudio", "torchvision", "triton")
COMMANDS = {"python": "", "labs": " -m labs.harness.cli", "pytest": " -m pytest"}
# PYTHONPATH alone does not read the .pth files by which some packages name further folders.
READ_PTH = "import os, site\n\nsite.addsitedir(os.path.dirname(__file__))\n"


class UnbundleError(Exception):
    """The bundle cannot be put in place; the message says why and how to mend it."""


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read what the bundle consists of and was made for. Raises UnbundleError."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text())
        beside = all(Path(p["name"]).name == p["name"] for p in manifest["parts"])
        if not (beside and {"python", "machine", "packages", "expected"} <= set(manifest)):
            raise ValueError("it is not what `make bundle` writes")
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise UnbundleError(f"{path} cannot be read ({error}): copy that file again") from error
    return manifest  # type: ignore[no-any-return]


def check_python(manifest: dict[str, Any]) -> None:
    """Check that this Python fits the bundle and has the packages that it leaves out.

    One in another version than expected is told, and refused where it is built as one with torch.
    Raises UnbundleError.
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

    refused: list[str] = []
    others: list[str] = []
    for name, version in manifest["expected"].items():
        if name in manifest["packages"]:
            continue
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            refused.append(f"{name} {version} is missing")
            continue
        if found.split("+")[0] != version.split("+")[0]:
            told = refused if name in BUILT_AS_ONE else others
            told.append(f"{name} {version} is {found}")
    if refused:
        raise UnbundleError(
            f"the bundle leaves out packages that {sys.executable} was said to have, but here"
            f" {', '.join(refused)}: make it again with this machine's `pip list` as HAVE="
        )
    if others:
        print(f"other versions than the bundle was made beside: {', '.join(others)}", flush=True)


def collect(folder: Path, kept: Path, parts: list[dict[str, Any]]) -> list[str]:
    """Keep the parts that have come to `folder`; return the names still to come.

    Each is copied under another name, checked, and renamed: whenever this is killed, what is there
    is whole. Raises UnbundleError for a damaged one.
    """
    kept.mkdir(parents=True, exist_ok=True)
    to_come = []
    for part in parts:
        place, source = kept / part["name"], folder / part["name"]
        if place.exists() and sha256(place) == part["sha256"]:
            continue
        if not source.exists():
            to_come.append(part["name"])
            continue
        half = place.with_suffix(".half")
        shutil.copyfile(str(source), str(half))
        if sha256(half) != part["sha256"]:
            half.unlink()
            raise UnbundleError(f"{source} is damaged: copy it again")
        half.replace(place)
    return to_come


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for chunk in iter(lambda: file.read(1 << 20), b""):
            digest.update(chunk)
    return digest.hexdigest()


class Joined:
    """The parts as one file, read from front to back."""

    def __init__(self, paths: list[Path]) -> None:
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


def unpack(parts: list[Path], target: Path) -> None:
    """Write the lab's files over those of an earlier bundle, and its packages in their place."""
    site = target / HOME / "site"
    shutil.rmtree(str(site), ignore_errors=True)
    stream: Any = Joined(parts)
    with tarfile.open(fileobj=stream, mode="r|xz") as archive:
        archive.extraction_filter = getattr(tarfile, "data_filter", None)
        archive.extractall(str(target))
    if any(site.glob("*.pth")):
        (site / "sitecustomize.py").write_text(READ_PTH)


def write_commands(target: Path) -> None:
    """Write the commands that find this bundle's packages before those of this Python."""
    programs = target / HOME / "bin"
    programs.mkdir(exist_ok=True)
    places = f"{shlex.quote(str(target / HOME / 'site'))}:{shlex.quote(str(target))}"
    for name, arguments in COMMANDS.items():
        command = programs / name
        command.write_text(
            f'#!/bin/sh\nPYTHONUTF8=1 PYTHONPATH={places}"${{PYTHONPATH:+:$PYTHONPATH}}" exec'
            f' {shlex.quote(sys.executable)}{arguments} "$@"\n'
        )
        command.chmod(0o755)


def unbundle(folder: Path, target: Path) -> int:
    """Put the bundle in `folder` in place in `target`; return the exit code.

    Raises UnbundleError.
    """
    manifest = read_manifest(folder)
    in_place = target / HOME / MANIFEST
    if in_place.exists() and json.loads(in_place.read_text()) == manifest:
        return 0
    if (target / ".git").exists():
        raise UnbundleError(
            f"{target} is a Git checkout, whose files the bundle's would replace: give another"
            " folder"
        )
    check_python(manifest)
    parts, kept = manifest["parts"], target / HOME / "parts"
    to_come = collect(folder, kept, parts)
    if to_come:
        print(f"of {len(parts)} parts are still to come: {', '.join(to_come)}")
        return NOT_YET
    print(f"unpacking {len(parts)} parts into {target}", flush=True)
    if in_place.exists():  # of an earlier bundle, which is no longer whole from here on
        in_place.unlink()
    unpack([kept / part["name"] for part in parts], target)
    write_commands(target)
    shutil.copyfile(str(folder / MANIFEST), str(in_place))  # last: all is in place
    shutil.rmtree(str(kept))
    print(
        f"ready: cd {shlex.quote(str(target))} && make doctor"
        f"\n(without make: {HOME}/bin/labs doctor, {HOME}/bin/labs run <lab>)"
    )
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Check the parts of a bundle that have come and keep them, and once all have,"
        f" unpack them: until then the exit code is {NOT_YET}. Nothing is fetched. A bundle that is"
        " in place is left as it is.",
    )
    parser.add_argument("target", help="the folder to put the lab in")
    parser.add_argument(
        "--from",
        dest="folder",
        default=os.path.dirname(os.path.abspath(__file__)),
        help="the folder with the parts (default: where this file lies)",
    )
    options = parser.parse_args(arguments)
    try:
        return unbundle(Path(options.folder).resolve(), Path(options.target).resolve())
    except (UnbundleError, OSError, EOFError, tarfile.TarError) as error:
        print(f"unbundle stopped: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
