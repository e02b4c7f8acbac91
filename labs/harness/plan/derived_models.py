"""Make models from the served one: a draft, tenants' adapters, quantized weights, studies of it.

Each is made once in a checkout, by a module of `serving` that runs as a process of its own (it
needs torch, or an environment of its own), and is found again by name. It is made again where the
model of that name has other files by then.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import orjson

from labs.harness.analysis.evaluation import SHOTS, TEXTS, read_passages, task_blocks
from labs.harness.plan.chat_writer import writer_of
from labs.harness.spec.lab import LabError, NotApplicable
from loadtests.arrivals import Concurrent
from loadtests.structures import FORMS, example, spec
from loadtests.workload import Fixed, Workload
from serving import atomic
from serving.models import catalog, dummy, prune, quantize, to_gguf
from serving.models.catalog import Model, ModelError, Shape
from serving.processes.process import Process

SEED = 2**31 - 1  # of the prompts that models are trained on: no trial draws from it
PROMPTS_EACH = 200
STRUCTURES_EACH = 4
MAKING = (sys.executable, "-m", "serving.models")
MINUTES = "about {:g} min with the bundled model, and longer with a larger one"


Source = Callable[[Path, Model, float], Path]
"""Writes what a maker reads to a path, for a model and a share of it; returns where it is."""


@dataclass(frozen=True)
class Recipe:
    """Says how a derived model, or a study of the served one, is made.

    `maker` is a module of `serving/models`, `method` its `--method`. `minutes` is about how long
    it takes with the bundled model. A quick run makes do with `quick_share` of the source.
    """

    what: str
    maker: str
    minutes: float
    method: str = ""
    source: Source | None = None
    quick_share: float = 1.0


def text(name: str) -> Source:
    """Return the source that is a text which comes with the lab."""
    return lambda path, model, share: TEXTS / name


def kind_of_prompt(name: str, tokens: int, **fields: Any) -> Workload:
    """Return a workload of prompts of one length, of which the answers do not matter."""
    return Workload(
        name=name,
        prompt_tokens=Fixed(tokens=tokens),
        output_tokens=Fixed(tokens=1),
        loads=(Concurrent(users=1),),
        **fields,
    )


def prompts(*kinds: Workload) -> Source:
    """Return the source of prompts of several kinds, shuffled, as JSON lines."""

    def write(path: Path, model: Model, share: float) -> Path:
        writer, rng = writer_of(model), random.Random(SEED)
        drawn = [
            {"messages": request.messages, "kind": kind.name}
            for kind in kinds
            for request in kind.requests(round(share * PROMPTS_EACH), SEED, writer)
        ]
        rng.shuffle(drawn)
        return atomic.write(path, b"".join(orjson.dumps(line) + b"\n" for line in drawn))

    return write


def structures(path: Path, model: Model, share: float) -> Path:
    """Write structures of each form that no trial asks for, each with a valid answer."""
    marks = [f"t{i:02}" for i in range(STRUCTURES_EACH)]  # as long as those of trials
    lines = [
        {"form": form, "structure": spec(form, mark), "answer": example(form, mark)}
        for form in FORMS
        for mark in marks
    ]
    return atomic.write(path, b"".join(orjson.dumps(line) + b"\n" for line in lines))


def scored_texts(path: Path, model: Model, share: float) -> Path:
    """Write the texts that a study calibrates on and scores, and the tasks, as one JSON object.

    Of what is scored it writes this share, from the beginning, and the share.
    """
    held_out, tasks = read_passages("held_out.txt"), task_blocks()
    texts = {
        "calibration": read_passages("calibration.txt"),
        "held_out": held_out[: math.ceil(share * len(held_out))],
        "tasks": tasks[: math.ceil(share * len(tasks))],
        "examples": SHOTS,
        "share": share,
    }
    return atomic.write(path, orjson.dumps(texts))


def _pruned(method: prune.Method) -> Recipe:
    percent = f"{method.share:.0%} of the weights"
    zeros = "two of each four weights" if method.pattern == "2-4" else percent
    what = f"the served model with {zeros} set to zero, chosen by {method.by}"
    return Recipe(what, "prune", 0.3, str(method), text("calibration.txt"))


def _quantized(
    method: str, minutes: float, calibration: str = "calibration.txt", note: str = ""
) -> Recipe:
    what = f"{quantize.METHODS[method].what}{note}"
    return Recipe(what, "quantize", minutes, method, text(calibration))


TO_GUESS = prompts(
    kind_of_prompt("story", 64, task="story"), kind_of_prompt("quote", 128, task="quote")
)
RECIPES: dict[str, Recipe] = {
    "draft": Recipe(
        "a small draft model, distilled from the served one",
        "draft",
        4,
        source=TO_GUESS,
        quick_share=0.15,
    ),
    "eagle": Recipe(
        "an EAGLE head, trained on the served model's hidden states",
        "eagle",
        6,
        source=TO_GUESS,
        quick_share=0.15,
    ),
    "adapters": Recipe(
        "a LoRA adapter for each of eight tenants, each with its own mark",
        "adapters",
        3,
        source=prompts(kind_of_prompt("short", 48), kind_of_prompt("long", 96)),
    ),
    "outliers": Recipe(
        "a study of outlying activations under 8-bit rounding",
        "outliers",
        1,
        source=text("held_out.txt"),
    ),
    "masks": Recipe(
        "a study of how long the backends of structured outputs take",
        "grammar_masks",
        1,
        source=structures,
    ),
    "sparsity": Recipe(
        "a study of what zeros in the weights cost, at every sparsity",
        "sparsity",
        2,
        source=scored_texts,
        quick_share=0.25,
    ),
    "training": Recipe(
        "the served model with half of its layers, distilled, and a study of training around"
        " rounding",
        "training",
        9,
        source=scored_texts,
        quick_share=0.2,
    ),
    "mha": Recipe(
        "the served model with a KV head for each query head, copied", "kv_heads", 1, "mha"
    ),
    "mqa": Recipe(
        "the served model with one KV head for all query heads, their mean", "kv_heads", 1, "mqa"
    ),
    "gguf": Recipe("the served model as a GGUF file, for llama.cpp", "to_gguf", 0.5),
    "gguf-q4": Recipe(
        "the served model as a GGUF file with layers in 4 bits (Q4_0), scored on held-out text",
        "to_gguf",
        1,
        to_gguf.Q4,
        text("held_out.txt"),
    ),
    **{name: _pruned(prune.Method.parse(name)) for name in prune.METHODS},
    "w8a8-rtn": _quantized("w8a8-rtn", 1),
    "w8a8": _quantized("w8a8", 2),
    "w4a16-rtn": _quantized("w4a16-rtn", 1),
    "w4a16-gptq": _quantized("w4a16-gptq", 2),
    "w4a16-gptq-code": _quantized("w4a16-gptq", 2, "calibration_code.txt", ", calibrated on code"),
    "w4a16-awq": _quantized("w4a16-awq", 3),
    "fp8": _quantized("fp8", 1),
    "gptqmodel": _quantized("gptqmodel", 4),
    "auto-gptq": _quantized("auto-gptq", 4),
    "autoawq": _quantized("autoawq", 6),
}
NEED_NO_WEIGHTS = frozenset(["masks"])
"""Recipes that read the tokenizer alone, so that random weights serve as well."""
MADE_FROM = "made-from.sha256"
"""A file in a derived model's folder: `models.files_sha256` of the model that it was made from."""


def place(model: Model, name: str) -> Path:
    """Return the folder of a derived model that is made here, whether it exists yet or not."""
    return catalog.CACHE / "models" / f"{model.name.replace('/', '--')}-{name}"


def make(
    model: Model,
    name: str,
    report: Callable[[str], None],
    quick: bool = False,
    made_here: bool = False,
) -> Path:
    """Return the folder of a derived model; download it where it is published, else make it here.

    With `made_here` it is not downloaded. What was made here once is used in any case. A quick run
    uses the full model where it exists; else it may make a smaller one beside it.
    Raises LabError with the last line of the program that makes it, NotApplicable for what
    cannot be made of random weights, ModelError where there is no way to have it.
    """
    if model.dummy and name not in NEED_NO_WEIGHTS:
        try:
            with _folder_lock(place(model, name), report):
                return dummy.derive(model, name)
        except ModelError as reason:
            raise NotApplicable(str(reason)) from reason
    folder = place(model, name)
    if is_made(folder, model) and not _lacks_a_backend(folder):
        return folder
    if not (made_here or folder.exists()) and (published := _published(model, name, report)):
        return published
    if name not in RECIPES:
        raise LabError(
            f"no {name!r} is published for {model.name}, and this lab cannot make it; it makes"
            f" {', '.join(RECIPES)}"
        )
    return _make_here(model, name, folder, report, quick)


def _published(model: Model, name: str, report: Callable[[str], None]) -> Path | None:
    """Download a derived model that is published; None for one that is to be made here.

    Raises ModelError where it can be had in neither way.
    """
    try:
        downloaded = catalog.sibling(model, name)
    except ModelError as error:
        if name not in RECIPES:
            raise
        report(f"{name} is made here, because {error}")
        return None
    if downloaded:
        report(f"{name} is served as published: {catalog.SIBLINGS[model.name][name]}")
    return downloaded


def _make_here(
    model: Model, name: str, folder: Path, report: Callable[[str], None], quick: bool
) -> Path:
    """Make a derived model in this folder, or for a quick run a smaller one in a folder beside it.

    Return the folder that was made, by this process or by another. Raises LabError.
    """
    recipe = RECIPES[name]
    share, minutes, lesser = 1.0, recipe.minutes, ""
    if quick and recipe.quick_share < 1:
        share, minutes = recipe.quick_share, 1
        lesser = f" on {share:.0%} of its texts, as QUICK is set"
        folder = folder.with_name(f"{folder.name}-quick")
        if is_made(folder, model):
            return folder
    with _folder_lock(folder, report):
        if not is_made(folder, model) or _lacks_a_backend(folder):
            if folder.exists():
                why = (
                    "lacks a backend that could not be used"
                    if is_made(folder, model)
                    else "was made from another model of this name"
                )
                report(f"{folder.name} {why}: it is made again")
                shutil.rmtree(folder)
            report(f"Making {recipe.what}{lesser} (once, {MINUTES.format(minutes)})")
            _make(recipe, name, model, folder, share, report)
    return folder


def is_made(folder: Path, model: Model) -> bool:
    """Tell whether a derived model exists and was made from this very model."""
    record = folder / MADE_FROM
    return record.exists() and record.read_text() == catalog.files_sha256(model.path)


def _lacks_a_backend(folder: Path) -> bool:
    """Tell whether a study could not use a backend; with other packages it may by now."""
    record = folder / catalog.RECORD
    backends = json.loads(record.read_text()).get("backends", {}) if record.exists() else {}
    return any(timed["error"] for timed in backends.values())


@contextlib.contextmanager
def _folder_lock(folder: Path, report: Callable[[str], None]) -> Iterator[None]:
    """Keep other processes from making the same folder while the block lasts; wait for them."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f".{folder.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report(f"Another process is making {folder.name}: waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _make(
    recipe: Recipe,
    name: str,
    model: Model,
    folder: Path,
    share: float,
    report: Callable[[str], None],
) -> None:
    """Run the recipe's maker, with this share of its source. Raises LabError."""
    made_from = catalog.files_sha256(model.path)
    began, log = time.monotonic(), catalog.CACHE / f"{folder.name}.log"
    log.unlink(missing_ok=True)
    argv = [*MAKING, recipe.maker, str(model.path), str(folder)]
    argv += ["--method", recipe.method] if recipe.method else []
    if recipe.source:
        source = recipe.source(catalog.CACHE / f"{folder.name}-input.jsonl", model, share)
        argv += ["--source", str(source)]
    # threads that spin while they wait take twenty times as long on a shared machine
    patient = {"OMP_WAIT_POLICY": "PASSIVE"}
    with Process(name, argv, log=log, env=patient, talk=True) as maker:
        for line in maker.stdout:
            report(f"  {line.rstrip()}")
        if maker.wait():
            raise LabError(f"{name} could not be made: {maker.tail(1)} (the whole log: {log})")
    (folder / MADE_FROM).write_text(made_from)
    report(f"Made in {time.monotonic() - began:.0f} s: {folder.name}")


def bits_of(name: str) -> int:
    """Tell how many bits a weight has in what is derived by this name, most of its weights."""
    method = RECIPES[name].method if name in RECIPES else ""
    if method == to_gguf.Q4:
        return 4
    return quantize.METHODS[method].bits if method in quantize.METHODS else 16


def about(folder: Path, value_bytes: int = 2) -> dict[str, Any]:
    """Read what its maker recorded, and its weights' bytes; a published model has only those.

    `value_bytes` are those of a served weight that has 16 bits in its file.
    """
    path = folder / catalog.RECORD
    facts: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    config = folder / "config.json"
    if config.exists() and "hidden_size" in json.loads(config.read_text()):  # a head has none
        facts["weight_bytes"] = catalog.load(folder, folder.name, value_bytes).shape.weight_bytes
    return facts


def with_weights(model: Model, name: str, folder: Path) -> Model:
    """Return the model that a variant serves in place of the served one, under the same name.

    Quantized weights are stored packed: they keep the parameters of the model and change the bytes.
    A model with other layers, KV heads or experts has a shape of its own. Of a GGUF file its maker
    counted the bytes; one from before that did has 16 bits.
    """
    if (folder / to_gguf.FILE).exists():
        weight_bytes = about(folder).get("weight_bytes", model.shape.weight_bytes)
        return replace(model, path=folder, shape=replace(model.shape, weight_bytes=weight_bytes))
    shape = catalog.load(folder, name, model.shape.value_bytes).shape
    if _build(shape) == _build(model.shape):
        read = {"weight_bytes": shape.weight_bytes, "expert_bytes": shape.expert_bytes}
        shape = replace(model.shape, **read)
    return replace(model, path=folder, shape=shape)


def _build(shape: Shape) -> tuple[int, int, int]:
    return shape.layers, shape.kv_heads, shape.experts
