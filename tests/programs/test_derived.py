"""Models made from the served one, by a maker that is a process of its own."""

from __future__ import annotations

import fcntl
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from labs import LABS
from labs.harness.analysis.evaluation import TEXTS
from labs.harness.plan import derived_models
from labs.harness.plan.derived_models import RECIPES, about, make, place, with_weights
from labs.harness.spec.lab import LabError
from loadtests.prompts import Writer
from serving.engines.flags import with_places
from serving.models import catalog, dummy
from serving.models.catalog import Model, ModelError
from tests.shards import write_shard
from tests.unit.builders import SHAPE
from tests.unit.test_prompts import words

MAKER = """
import pathlib, sys
maker, base, out, *options = sys.argv[1:]
given = dict(zip(options[::2], options[1::2]))
print("reading", base, flush=True)
if "fails" in base:
    print("first this", file=sys.stderr)
    sys.exit("the base takes no adapter")
pathlib.Path(out).mkdir(parents=True)
if "--source" in given:
    pathlib.Path(out, "given").write_text(pathlib.Path(given["--source"]).read_text())
pathlib.Path(out, "maker").write_text(f"{maker} {given.get('--method', '')}")
"""


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Model:
    """A base whose makers are all the one above, in a checkout that has made nothing yet."""
    (tmp_path / "a_maker.py").write_text(MAKER)
    monkeypatch.setattr(derived_models, "MAKING", (sys.executable, tmp_path / "a_maker.py"))
    monkeypatch.setattr(catalog, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(derived_models, "writer_of", lambda model: Writer(words))
    return Model("lab/base-1B", tmp_path / "base", SHAPE)


def test_it_is_made_once_and_then_found(model: Model) -> None:
    said: list[str] = []
    folder = make(model, "draft", said.append)
    assert folder == place(model, "draft") == catalog.CACHE / "models" / "lab--base-1B-draft"
    assert "about" in said[0]
    assert said[1] == f"  reading {model.path}"
    assert make(model, "draft", pytest.fail) == folder  # in silence


@pytest.mark.parametrize("quick", [False, True])
def test_another_model_of_the_same_name_gets_its_own(
    model: Model, tmp_path: Path, quick: bool
) -> None:
    one, other = (replace(model, name="step-10", path=tmp_path / run) for run in "ab")
    for base in (one, other):
        base.path.mkdir()
        (base.path / "config.json").write_text(f'{{"of": "{base.path.name}"}}')
    said: list[str] = []
    folder = make(one, "draft", said.append, quick)
    assert make(one, "draft", pytest.fail, quick) == folder
    (folder / "of-one").touch()
    said.clear()
    assert make(other, "draft", said.append, quick) == folder
    assert "another model" in said[0]
    assert not (folder / "of-one").exists()
    assert make(other, "draft", pytest.fail, quick) == folder


def test_a_study_that_lacks_a_backend_is_made_again(model: Model) -> None:
    """It may work by now, with another version of its package or of what imports it."""
    folder = make(model, "masks", lambda _: None)
    backends: dict[str, dict[str, str | None]] = {"one": {"error": None}, "two": {"error": None}}
    (folder / catalog.RECORD).write_text(json.dumps({"backends": backends}))
    assert make(model, "masks", pytest.fail) == folder
    backends["two"]["error"] = "ImportError: no"
    (folder / catalog.RECORD).write_text(json.dumps({"backends": backends}))
    said: list[str] = []
    assert make(model, "masks", said.append) == folder
    assert "lacks a backend" in said[0]
    assert not (folder / catalog.RECORD).exists()


def test_a_quick_run_makes_a_lesser_draft_unless_the_whole_one_is_there(model: Model) -> None:
    def taught(folder: Path) -> int:
        return len((folder / "given").read_text().splitlines())

    said: list[str] = []
    lesser = make(model, "draft", said.append, quick=True)
    assert lesser.name == "lab--base-1B-draft-quick"
    assert "15%" in said[0]
    assert make(model, "draft", pytest.fail, quick=True) == lesser  # in silence
    whole = make(model, "draft", said.append)
    assert taught(lesser) == pytest.approx(0.15 * taught(whole))
    assert make(model, "draft", pytest.fail, quick=True) == whole
    assert make(model, "adapters", said.append, quick=True) == place(model, "adapters")
    inputs = {
        path.name.removesuffix("-input.jsonl") for path in catalog.CACHE.glob("*-input.jsonl")
    }
    assert inputs == {lesser.name, whole.name, place(model, "adapters").name}  # none is shared


def test_a_quick_study_scores_fewer_texts_and_calibrates_on_as_many(model: Model) -> None:
    def given(quick: bool) -> dict[str, list[Any]]:
        folder = make(model, "sparsity", said.append, quick=quick)
        found: dict[str, list[Any]] = json.loads((folder / "given").read_text())
        return found

    said: list[str] = []
    lesser, whole = given(quick=True), given(quick=False)
    assert "25%" in said[0]
    assert lesser["calibration"] == whole["calibration"]
    for part in ("held_out", "tasks"):
        assert lesser[part] == whole[part][: len(whole[part]) // 4]


def test_what_another_process_is_making_is_waited_for_and_not_made_again(model: Model) -> None:
    folder = place(model, "draft")
    folder.parent.mkdir(parents=True)
    shown: list[str] = []
    with (folder.parent / f".{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)

        def other_process_finishes(line: str) -> None:
            shown.append(line)
            folder.mkdir()
            (folder / derived_models.MADE_FROM).write_text(catalog.files_sha256(model.path))
            fcntl.flock(lock, fcntl.LOCK_UN)

        assert make(model, "draft", other_process_finishes) == folder
    assert len(shown) == 1
    assert folder.name in shown[0]
    assert [path.name for path in folder.iterdir()] == [derived_models.MADE_FROM]


def test_prompts_are_of_every_kind_and_the_same_wherever_made(model: Model) -> None:
    given = (make(model, "adapters", list[str]().append) / "given").read_text()
    prompts = [json.loads(line)["messages"] for line in given.splitlines()]
    kinds, lengths = (48, 96), [words(p) for p in prompts]
    assert {n: lengths.count(n) for n in kinds} == dict.fromkeys(kinds, derived_models.PROMPTS_EACH)
    assert (
        lengths[: derived_models.PROMPTS_EACH] != sorted(lengths)[: derived_models.PROMPTS_EACH]
    )  # mixed
    place(model, "adapters").rename(catalog.CACHE / "moved")
    assert (make(model, "adapters", list[str]().append) / "given").read_text() == given


def test_a_quantizer_gets_its_method_and_a_text(model: Model) -> None:
    folder = make(model, "w4a16-gptq-code", list[str]().append)
    assert (folder / "maker").read_text() == "quantize w4a16-gptq"
    text = (TEXTS / "calibration_code.txt").read_text()
    assert (folder / "given").read_text() == text


def test_a_maker_that_fails_has_the_last_word(model: Model, tmp_path: Path) -> None:
    failing = replace(model, path=tmp_path / "fails")
    with pytest.raises(LabError, match=r"draft .*: the base takes no adapter") as e:
        make(failing, "draft", list[str]().append)
    log = catalog.CACHE / f"{place(failing, 'draft').name}.log"
    assert str(log) in str(e.value)
    assert "first this" in log.read_text()
    assert not place(model, "draft").exists()


def test_an_unknown_name_is_answered_with_the_known_ones(model: Model) -> None:
    with pytest.raises(LabError, match=r"'w2' .* draft, "):
        make(model, "w2", pytest.fail)


def test_a_published_model_stands_in_for_a_made_one(
    model: Model, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(catalog.SIBLINGS, model.name, {"draft": "lab/base-0.1B"})
    monkeypatch.setattr(catalog, "_download", lambda name: tmp_path / name)
    (tmp_path / "lab/base-0.1B").mkdir(parents=True)
    said: list[str] = []
    assert make(model, "draft", said.append) == tmp_path / "lab/base-0.1B"
    assert ["lab/base-0.1B" in line for line in said] == [True]
    assert place(model, "adapters").parent == catalog.CACHE / "models"


def test_a_lab_that_compares_tools_makes_what_others_publish(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(catalog.SIBLINGS, model.name, {"w4a16-gptq": "lab/base-GPTQ"})
    monkeypatch.setattr(catalog, "_download", pytest.fail)
    folder = make(model, "w4a16-gptq", lambda _: None, made_here=True)
    assert folder == place(model, "w4a16-gptq")
    assert [name for name, lab in LABS.items() if lab.made_here] == ["quantization-tools"]


def test_what_is_published_and_cannot_be_had_is_made(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(name: str) -> Path:
        raise ModelError(f"no model {name}")

    monkeypatch.setattr(catalog, "_download", gone)
    published = {"draft": "lab/base-0.1B", "eagle3": "lab/base-head"}
    monkeypatch.setitem(catalog.SIBLINGS, model.name, published)
    said: list[str] = []
    assert make(model, "draft", said.append) == place(model, "draft")
    assert "no model lab/base-0.1B" in said[0]
    with pytest.raises(ModelError, match="lab/base-head"):  # of which there is no maker
        make(model, "eagle3", pytest.fail)


@pytest.mark.parametrize("lab", LABS)
def test_what_a_lab_needs_can_be_made(lab: str) -> None:
    for kind in ("cpu", "gpu"):
        resolved = LABS[lab].at(kind, quick=False)
        known = {*dummy.DERIVED} if resolved.shape else {*RECIPES}
        assert set(resolved.derived()) <= known


def write_model(folder: Path, layers: int, *, packed: bool = False) -> Path:
    """A folder with the config and one tensor of 64 numbers, or of 32 packed ones."""
    folder.mkdir()
    config = {"num_hidden_layers": layers, "hidden_size": 8, "num_attention_heads": 2,
              "num_key_value_heads": 1, "vocab_size": 16, "max_position_embeddings": 4096,
              "tie_word_embeddings": True}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    size = 32 if packed else 64
    tensor = {"dtype": "I8" if packed else "BF16", "shape": [size],
              "data_offsets": [0, size if packed else 2 * size]}  # fmt: skip
    write_shard(folder / "model.safetensors", {"model.x": tensor})
    return folder


def test_packed_weights_change_the_bytes_and_nothing_else(model: Model, tmp_path: Path) -> None:
    served = with_weights(model, "w4", write_model(tmp_path / "w4", 2, packed=True))
    assert served.name == model.name  # what requests ask for
    assert served.path == tmp_path / "w4"
    assert served.shape == replace(model.shape, weight_bytes=32)


def test_of_a_gguf_file_its_maker_counted_the_bytes(model: Model, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    assert with_weights(model, "gguf", tmp_path).shape == model.shape  # from before they were
    (tmp_path / "about.json").write_text('{"weight_bytes": 40}')
    served = with_weights(model, "gguf-q4", tmp_path)
    assert served == replace(model, path=tmp_path, shape=replace(model.shape, weight_bytes=40))


def test_a_draft_has_a_shape_of_its_own(model: Model, tmp_path: Path) -> None:
    shape = with_weights(model, "draft", write_model(tmp_path / "draft", 1)).shape
    assert (shape.layers, shape.params, shape.weight_bytes) == (1, 64, 128)


def test_what_is_known_of_it_is_what_its_maker_wrote_and_its_bytes(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "draft", 1)
    assert about(folder) == {"weight_bytes": 128}
    (folder / "about.json").write_text('{"acceptance": 0.7}')
    assert about(folder) == {"acceptance": 0.7, "weight_bytes": 128}
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no \*\.safetensors"):
        about(folder)
    adapters = tmp_path / "adapters"
    adapters.mkdir()
    (adapters / "about.json").write_text('{"rank": 8}')
    assert about(adapters) == {"rank": 8}


@pytest.mark.parametrize("home", ["/m", '/a "quoted" name', "/back\\slash", "/Straße"])
def test_flags_name_a_place_that_only_this_machine_knows(home: str) -> None:
    flags: dict[str, Any] = {
        "speculative-config": {"model": "<draft>", "num_speculative_tokens": 2},
        "lora-modules": ["tenant-0=<adapters>/tenant-0"],
        "block-size": 16,
    }
    places = {name: Path(home) / name for name in ("draft", "adapters")}
    assert with_places(flags, places) == {
        "speculative-config": {"model": f"{home}/draft", "num_speculative_tokens": 2},
        "lora-modules": [f"tenant-0={home}/adapters/tenant-0"],
        "block-size": 16,
    }
    assert flags["speculative-config"] == {"model": "<draft>", "num_speculative_tokens": 2}
