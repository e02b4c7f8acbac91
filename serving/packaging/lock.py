"""Write the locks of serving/locks/ anew, with the SHA-256 of every file: `make locks`.

uv resolves each platform's packages for Linux on x86-64 and aarch64 and for every Python that the
lab runs on, and keeps the versions that the lock has, as far as they still fit: to change one, edit
or delete its line first. The tools' locks, whose versions contradict what the tools require, and
those of torch's CPU build and of the bundled model, get new hashes alone. The comments at the head
of a lock stay.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from serving import atomic
from serving.bundle import BundleError, uv
from serving.packaging.install import BUILDERS, ROOT, TORCH_NEEDS, entries, lock_of, pin
from serving.platforms import PLATFORMS

# what intel-openmp's wheel for Linux alone says that it needs: uv reads another
UNSAID = ("intel-cmplr-lib-ur ; platform_machine == 'x86_64'",)


def compile_pins(lock: Path, *arguments: str, sources: Sequence[str]) -> None:
    """Have uv write a lock: its versions where they fit, and all hashes. Raises BundleError."""
    head = re.match(r"(?:#.*\n)*", lock.read_text())
    with tempfile.TemporaryDirectory() as work:
        needed, pins = Path(work, "needed.in"), Path(work, "pins.txt")
        needed.write_text("\n".join(sources) + "\n")
        pins.write_text("\n".join(map(pin, entries(lock).values())) + "\n")
        uv(
            *("compile", str(needed), *arguments, "--universal", "--python-version", "3.11"),
            *("--generate-hashes", "--quiet", "--no-annotate", "--no-header"),
            *("--output-file", str(pins)),
        )
        atomic.write(lock, (head[0] if head else "") + short(pins.read_text()))


def short(pins: str) -> str:
    """Leave out the marker that nearly every line has: that it is for the lab's machines."""
    markers = Counter(re.findall(r"(?m)^[\w.-]+==\S+( ; .*?) \\$", pins))
    return pins.replace(markers.most_common(1)[0][0] + " \\\n", " \\\n") if markers else pins


def write(name: str) -> None:
    """Write one lock, by its name without `.txt`. Raises BundleError."""
    lock = lock_of(ROOT, name)
    pinned = list(map(pin, entries(lock).values()))
    if name not in PLATFORMS:
        index = [PLATFORMS[n].torch_index for n in PLATFORMS if name == f"{n}-torch"]
        compile_pins(lock, "--no-deps", *(f"--index-url={i}" for i in index), sources=pinned)
        return
    about = PLATFORMS[name]
    vllm = next(line for line in pinned if line.startswith(f"{about.vllm}=="))
    arguments = ["pyproject.toml", "--extra", name, "--extra", "grafana", "--extra", "dev"]
    needed = [vllm.split(" ")[0], *BUILDERS]
    if not about.torch_index:
        compile_pins(lock, *arguments, sources=needed)
        return
    with tempfile.NamedTemporaryFile("w", suffix=".in") as excluded:
        torch = entries(lock_of(ROOT, f"{name}-torch"))
        excluded.write("\n".join([*torch, *about.unwanted]))
        excluded.flush()
        needed += [*TORCH_NEEDS, "numpy", "pillow", *UNSAID]
        compile_pins(lock, *arguments, "--excludes", excluded.name, sources=needed)


def main() -> int:
    """Write all locks; 1 where one could not be written."""
    failed = 0
    for lock in sorted(lock_of(ROOT, "x").parent.glob("*.txt")):
        try:
            write(lock.stem)
            print(f"{lock.name}: {len(entries(lock))} packages", flush=True)
        except BundleError as error:
            print(f"{lock.name} stays as it is: {error}", file=sys.stderr)
            failed = 1
    return failed


if __name__ == "__main__":
    sys.exit(main())
