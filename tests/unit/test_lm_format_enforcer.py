"""What lets lm-format-enforcer work: classes where they were before, and settings of its own."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path
from types import ModuleType

import pytest

from labs import LABS
from serving.engines.vllm import PLUGINS, Vllm
from serving.models.catalog import Model
from serving.plugins import lm_format_enforcer
from serving.plugins.lm_format_enforcer import AS_OTHERS, NAME, offer_moved_classes
from tests.unit.builders import SHAPE


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> Iterator[type]:
    """A class that has moved, from a module that is no more to one that is imported when asked."""
    present = ModuleType("moved_here")
    vars(present)["Tokenizer"] = tokenizer = type("Tokenizer", (), {})
    monkeypatch.setitem(sys.modules, "moved_here", present)
    monkeypatch.setattr(lm_format_enforcer, "MOVED", {"Tokenizer": ("json.gone", "moved_here")})
    yield tokenizer
    sys.modules.pop("json.gone", None)


def test_a_class_that_has_moved_is_found_in_a_module_that_is_no_more(moved: type) -> None:
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("json.gone")
    offer_moved_classes()
    offer_moved_classes()  # as vLLM may load a plugin twice
    module = importlib.import_module("json.gone")
    assert module.Tokenizer is moved
    assert not hasattr(module, "Another")


def test_where_its_module_lacks_what_it_imports_the_class_is_one_of_which_nothing_is(
    moved: type, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delitem(sys.modules, "moved_here")
    (tmp_path / "moved_here.py").write_text("import mistral_common_that_is_left_out\n")
    monkeypatch.syspath_prepend(tmp_path)
    offer_moved_classes()
    module = importlib.import_module("json.gone")
    assert module.Tokenizer is module.Tokenizer is not moved
    assert not isinstance(moved(), module.Tokenizer)


def test_a_module_that_lacks_the_class_alone_gets_it_and_one_that_has_it_stays(
    moved: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    lacks, has = ModuleType("lacks"), ModuleType("has")
    vars(has)["Tokenizer"] = own = type("Tokenizer", (), {})
    for module in (lacks, has):
        monkeypatch.setitem(sys.modules, module.__name__, module)
        of = {"Tokenizer": (module.__name__, "moved_here")}
        monkeypatch.setattr(lm_format_enforcer, "MOVED", of)
        offer_moved_classes()
    assert (vars(lacks)["Tokenizer"], vars(has)["Tokenizer"]) == (moved, own)


def test_each_process_of_vllm_calls_it() -> None:
    (plugins,) = distributions(path=[str(PLUGINS)])
    named = {point.name: point.value for point in plugins.entry_points}
    assert named["lm_format_enforcer"] == "serving.plugins.lm_format_enforcer:offer_moved_classes"


def test_only_an_engine_that_is_to_use_it_gets_its_settings() -> None:
    model = Model("lab/base", Path("base"), SHAPE)
    lab = LABS["structured-output"]
    by_name = {v.name: Vllm.environment("cpu", model, [lab.flags_of(v)]) for v in lab.variants}
    assert by_name[NAME].items() >= AS_OTHERS.items()
    assert not AS_OTHERS.keys() & by_name["xgrammar"].keys()
