"""Where the program lies, and where it keeps what is the reader's.

In a clone, and in a folder that came out of a bundle, all lies in that folder. Installed as a
package, the program writes nothing beside its own files: results, models and caches lie in a folder
of the user's, by the XDG Base Directory Specification, unless `--home` or its variable names one.

Standard library only, and syntax that Python 3.7 can parse: see serving/packaging/install.py.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

OWN_FOLDER = "inference-serving-lab"  # ours within a folder that holds several programs' things
PROGRAM = Path(__file__).resolve().parent.parent
IN_CLONE = (PROGRAM / "pyproject.toml").exists()
DOCS = PROGRAM / ("docs" if IN_CLONE else "labs/docs")  # the pages that the program reads
VARIABLE = "INFERENCE_SERVING_LAB_HOME"
"""It names the reader's folder to this process and to those that it starts."""


def named_or(variable: str, default: Path) -> Path:
    """Return our own subfolder of the folder that a variable names; else the default.

    What lies in it is ours to erase, and nothing else is.
    """
    named = os.environ.get(variable)
    return Path(named) / OWN_FOLDER if named else default


def home() -> Path:
    """Return the folder of results, models and caches."""
    if VARIABLE in os.environ:
        return Path(os.environ[VARIABLE]).expanduser().absolute()
    if IN_CLONE:
        return PROGRAM
    return named_or("XDG_DATA_HOME", Path.home() / ".local" / "share" / OWN_FOLDER)


def how_to_install(extra: str) -> str:
    """Name the command that brings what a package without its extras lacks.

    It names the wheel, or the address, that this one was installed from (as PEP 610 records it):
    no index has the package, so whoever took its name there could run what they like here.
    """
    if IN_CLONE:
        return "run `make setup`"
    source = _installed_from()
    if not source:
        return "run `make setup` in a clone"
    machine = " on a machine with an NVIDIA GPU" if extra == "cuda" else ""
    return (
        f"run `pip install '{OWN_FOLDER}[{extra}] @ {source}'`{machine}, or `make setup` in a clone"
    )


def _installed_from() -> str:
    """Return the URL of the file, folder or commit it was installed from; empty where unknown."""
    from importlib import metadata  # of Python 3.8

    for installed in metadata.distributions(name=OWN_FOLDER):
        origin = json.loads(installed.read_text("direct_url.json") or "{}")
        url, commit = str(origin.get("url", "")), origin.get("vcs_info")
        return f"{commit['vcs']}+{url}@{commit['commit_id']}" if commit else url
    return ""
