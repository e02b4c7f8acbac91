"""Read command lines of other tools: parsed by the options in `benchmarks.toml`, and never run."""

from __future__ import annotations

import argparse
import difflib
import json
import math
import re
import shlex
import tomllib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from labs.harness.spec.lab import LabError
from loadtests.records import MOST_TOKENS
from serving.engines.base import EngineError
from serving.engines.flags import FlagValue
from serving.engines.vllm import as_written
from serving.processes.masking import masked

TABLE = tomllib.loads(Path(__file__).with_name("benchmarks.toml").read_text())
SERVE = "vllm serve"
TOOLS = tuple(name for name, part in TABLE.items() if "used" in part)
SHELL = re.compile(r"[$`|;&<>]")
HUMAN = re.compile(r"(\d+(?:\.\d+)?)([kmgt])", re.I)  # 8k is 8,000 and 8K is 8,192, as in vLLM
OFF = ("0", "0.0")  # a value that turns an option off


class NotTranslatedError(LabError):
    """The load of a command cannot be played here; the message says why."""

    exit_code = 2


def impossible(why: str, **known: object) -> NoReturn:
    """Raise NotTranslatedError with a sentence of the table."""
    raise NotTranslatedError("COMMAND: " + TABLE["impossible"][why].format(**known))


def note(name: str, **known: object) -> str:
    """Fill a sentence of the table."""
    return str(TABLE["notes"][name].format(**known))


def nearest(name: str, known: Collection[str]) -> str:
    """Ask whether the nearest known name was meant; empty where none is near."""
    near = difflib.get_close_matches(name, known, 1)
    return f": did you mean {near[0]}?" if near else ""


def number(
    name: str, text: object, default: Any = None, least: float = 0, whole: bool = False
) -> Any:
    """Read a number that is at least `least`, and more than 0 where that is 0 and it is not whole.

    Returns the default where the text is empty. Raises LabError.
    """
    if text in (None, ""):
        return default
    try:
        value = int(str(text)) if whole else float(str(text))
    except ValueError:
        value = math.nan
    if not least <= value <= (MOST_TOKENS if whole else math.inf) or (value == 0 and not whole):
        kind = f"a whole number, {least:g} or more" if whole else "a number of more than 0"
        raise LabError(f"COMMAND: {name} {text} is not possible: give {kind}")
    return value


@dataclass(frozen=True)
class Options:
    """Those options of a command that say what its load is, by their names in the table."""

    tool: str
    given: Mapping[str, list[str]]
    notes: Sequence[str]  # of the other options

    def option(self, name: str) -> str:
        """How an option is typed."""
        return str(TABLE[self.tool]["used"][name].split()[0])

    def text(self, name: str, default: str = "") -> str:
        """The last value given, which is the one that counts on the tool's own command line."""
        return [default, *self.given.get(name, [])][-1]

    def number(self, name: str, default: float | None = None) -> Any:
        """Read a number of more than 0. Raises LabError."""
        return number(self.option(name), self.text(name), default)

    def whole(self, name: str, default: int | None = None, least: int = 1) -> Any:
        """Read a whole number from `least` on. Raises LabError."""
        return number(self.option(name), self.text(name), default, least, whole=True)


def tool_of(setting: str, text: str, tools: Sequence[str]) -> tuple[str, list[str]]:
    """Tell a command's tool by its first words, and return the others.

    Raises LabError for what only a shell could read, and NotTranslatedError for another tool.
    """
    try:
        words = shlex.split(text.replace("\\\n", " "))
    except ValueError as error:
        raise LabError(f"{setting}={masked(text)}: {error}") from error
    for word in words:
        if SHELL.search(word) and not word.startswith(("{", "[", "http")):
            raise LabError(
                f"{setting}: {masked(word)} is the shell's to read, and the command is not run:"
                " give one command, with values in the place of variables"
            )
    first = [Path(word).name for word in words[:1]] + words[1:]
    for tool in tools:
        for begin in (b.split() for b in TABLE[tool]["begins"]):
            if first[: len(begin)] == begin:
                return tool, first[len(begin) :]
    known = ", ".join(TABLE[tool]["begins"][0] for tool in tools)
    impossible("tool", given=masked(" ".join(words[:3])), known=known)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise LabError(f"COMMAND: {self.prog}: {masked(message)}")


def parsed(tool: str, words: Sequence[str]) -> Options:
    """Parse a command's options. Raises LabError for one that the tool does not have."""
    table, known = TABLE[tool], list[str]()
    parser = _Parser(prog=tool, add_help=False, allow_abbrev=False)
    used = {spec: name for name, spec in table["used"].items()}
    unused = [" ".join(spec.split()) for spec in table["unused"]["options"].split(",")]
    for spec in (*used, *table["untranslated"], *unused):
        names = [word for word in spec.split() if word.startswith("-")]
        known += names
        takes: dict[str, Any] = {"action": "append_const", "const": ""}
        if spec.endswith(" V"):
            takes = {"action": "append"}
        elif spec.endswith(" V.."):
            takes = {"action": "extend", "nargs": "+"}
        parser.add_argument(*names, dest=spec, **takes)
    options, others = parser.parse_known_args([_with_dashes(word) for word in words])
    if others:
        name = others[0].partition("=")[0]
        raise LabError(f"COMMAND: {tool} has no option {masked(name)}{nearest(name, known)}")
    given: dict[str, list[str]] = {k: v for k, v in vars(options).items() if v is not None}
    notes = [
        f"{spec.split()[0]}: {sentence}"
        for spec, sentence in table["untranslated"].items()
        if spec in given and given[spec][-1] not in OFF
    ]
    if left := [spec.split()[0] for spec in unused if spec in given]:
        notes.append(note("unused", options=", ".join(left)))
    return Options(tool, {name: given[s] for s, name in used.items() if s in given}, notes)


def _with_dashes(word: str) -> str:
    """Write an option's name with dashes: vLLM takes --num_prompts, too."""
    name, equals, value = word.partition("=")
    return f"{name.replace('_', '-')}{equals}{value}" if name.startswith("--") else word


def pairs(option: str, text: str) -> dict[str, Any]:
    """Read `a=1,b=2` or an object in JSON; what is neither is {}. Raises LabError."""
    if text.startswith("{"):
        try:
            return dict(json.loads(text))
        except ValueError as error:
            raise LabError(f"COMMAND: {option} is no JSON: {error}") from error
    parts = [part.partition("=") for part in text.split(",")]
    return {k.strip(): v.strip() for k, _, v in parts} if all(p[1] for p in parts) else {}


def serve_flags(serve: str) -> tuple[str, dict[str, FlagValue], list[str]]:
    """Read a `vllm serve` line: its model, its flags, and what is said of others. Raises LabError.

    The installed vLLM's parser splits it. Whether the flags are harmless and their values possible
    is checked as of any variant.
    """
    if not serve:
        return "", {}, [note("no_serve")]
    table, flags = TABLE[SERVE], dict[str, FlagValue]()
    notes, left = list[str](), list[str]()
    try:
        given = as_written(tool_of("SERVE", serve, (SERVE,))[1], table["older"])
    except EngineError as error:
        raise LabError(f"SERVE: {masked(str(error))}") from error
    models = [str(given.pop(name)) for name in ("model", "model_tag") if name in given]
    for name, texts in ((name.replace("_", "-"), texts) for name, texts in given.items()):
        if name in table["untranslated"]:
            notes.append(f"--{name}: {table['untranslated'][name]}")
        elif name in table["unused"]["flags"]:
            left.append(f"--{name}")
        elif (name, texts) == ("max-model-len", "auto"):
            flags[name] = -1
        else:
            flags[name] = _value(texts)
    notes += [note("unused", options=", ".join(left))] if left else []
    return (models or [""])[-1], flags, notes


def _value(texts: Any) -> Any:
    """Read a flag's value as vLLM does: JSON, a whole number such as 32k, or text."""
    if isinstance(texts, list):
        return [_value(text) for text in texts]
    if not isinstance(texts, str):  # of a flag that takes none
        return texts
    if human := HUMAN.fullmatch(texts):
        unit, base = human[2], 1000 if human[2].islower() else 1024
        return int(float(human[1]) * base ** (1 + "kmgt".index(unit.lower())))
    try:
        value = json.loads(texts)
    except ValueError:
        return texts
    return texts if value is None else value
