"""Engines beside vLLM: how they are started, asked and read, and a lab where one is not here."""

from __future__ import annotations

import importlib.util
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from labs import LABS
from labs.harness.analysis.checks.expected import Expected
from labs.harness.analysis.validity import caveats_of
from labs.harness.plan.resolve import with_engines_here
from labs.harness.spec.lab import NotApplicable, Point, Variant
from labs.harness.storage.manifest import is_stale
from labs.harness.storage.recorded import Run
from loadtests.plan import PlannedRequest, body, in_dialect
from loadtests.workload import Asked, Request
from serving import metrics
from serving.engines import ENGINES
from serving.engines.base import EngineError
from serving.engines.flags import FlagValue
from serving.engines.llama_cpp import LlamaCpp
from serving.engines.transformers import Transformers
from serving.engines.vllm import Vllm
from serving.hardware import gpus
from serving.hardware.machine import Machine
from serving.metrics import Snapshot
from serving.models import catalog, to_gguf
from serving.models.catalog import Model
from serving.models.making import MakerError
from serving.plugins import llama_server, transformers_server
from serving.plugins.guard import Guard
from tests.unit.builders import (
    SHAPE,
    make_engine,
    make_point,
    make_record,
    make_trial,
    write_run,
)
from tests.unit.test_capacity_plan import SilentProgress

CPU = Machine(kind="cpu", model="Abacus", count=2, memory_bytes=8 * 2**30)
GPU = Machine(kind="gpu", model="Soroban", count=1, memory_bytes=80 * 2**30)

LAB = LABS["serving-engines"]
SCALES = ["cpu", "gpu", *(f"gpu-{c.gb}" for c in gpus.CLASSES)]
LLAMA_METRICS = """
# HELP llamacpp:prompt_tokens_total Number of prompt tokens processed, excluding cached tokens
# TYPE llamacpp:prompt_tokens_total counter
llamacpp:prompt_tokens_total 846
# HELP llamacpp:tokens_predicted_total Number of generation tokens processed
# TYPE llamacpp:tokens_predicted_total counter
llamacpp:tokens_predicted_total 672
# HELP llamacpp:requests_processing Number of requests processing
# TYPE llamacpp:requests_processing gauge
llamacpp:requests_processing 3
# HELP llamacpp:requests_deferred Number of requests deferred
# TYPE llamacpp:requests_deferred gauge
llamacpp:requests_deferred 13
"""  # as its server of build 11549 writes them, with its other rows left out


CONFIG: dict[str, Any] = {"architectures": ["LlamaForCausalLM"]}


@pytest.fixture
def model(tmp_path: Path) -> Model:
    """What is read of a Llama before it is converted; its weights are in `tests/weights`."""
    folder = tmp_path / "abacus"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    cutter = {"type": "ByteLevel", "use_regex": True}
    tokenizer = {"model": {"type": "BPE"}, "pre_tokenizer": cutter}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return Model("abacus-1", folder, SHAPE)


def asked_of(engine: Transformers | LlamaCpp) -> dict[str, Any]:
    """What an engine gets for the request that vLLM would get."""
    messages = [{"role": "user", "content": "Count"}]
    request = Request(index=0, prompt_tokens=4, messages=messages, output_tokens=2)
    planned = PlannedRequest(index=0, output_tokens=2, body=json.dumps(body(request, "abacus-1")))
    changed: dict[str, Any] = json.loads(in_dialect(planned, engine.request_fields).body)
    return changed


def test_their_caches_count_as_memory_of_the_host() -> None:
    """A token's keys and values are 32 bytes; without a size only the rest is known."""
    blocks: dict[str, FlagValue] = {"cb-block-size": 16, "cb-num-blocks": "10"}
    held = Transformers.host_memory_bytes(blocks, SHAPE) - Transformers.host_memory_bytes({}, SHAPE)
    assert held == 160 * 32
    slots: dict[str, FlagValue] = {"ctx-size": 100}
    held = LlamaCpp.host_memory_bytes(slots, SHAPE) - LlamaCpp.host_memory_bytes({}, SHAPE)
    assert held == 100 * 32


def not_started(cls: type[Any], model: Model) -> Any:
    """An engine without its process."""
    engine: Any = object.__new__(cls)
    engine.model, engine._folder = model.name, str(model.path)
    return engine


def test_transformers_is_asked_for_the_folder_it_serves_and_for_an_end_that_never_comes(
    model: Model,
) -> None:
    engine = not_started(Transformers, model)
    asked = asked_of(engine)
    assert "ignore_eos" not in asked  # which it refuses
    assert asked["model"] == str(model.path)
    assert json.loads(asked["generation_config"]) == {"eos_token_id": -1, "do_sample": False}
    assert (asked["max_tokens"], asked["temperature"], asked["stream"]) == (2, 0, True)
    assert engine.model_names[f"{model.path}@main"] == "abacus-1"
    argv = Transformers.server_argv(model, {"continuous-batching": True, "cb-block-size": 32}, 9)
    assert argv == ["--model", str(model.path), "--host", "127.0.0.1", "--port", "9",
                    "--continuous-batching", "--cb-block-size", "32"]  # fmt: skip


def test_llama_cpp_forgets_the_last_prompt_and_is_asked_as_vllm_is_otherwise(model: Model) -> None:
    asked = asked_of(not_started(LlamaCpp, model))
    assert (asked["cache_prompt"], asked["ignore_eos"]) == (False, True)
    assert asked["model"] == "abacus-1"
    planned = PlannedRequest(index=0, output_tokens=2, body="{}")
    assert in_dialect(planned, {}) is planned  # vLLM's own words are sent as they were written


@pytest.mark.parametrize("scale", SCALES)
def test_the_package_of_llama_cpp_knows_every_argument_that_the_lab_gives(
    scale: str, model: Model
) -> None:
    lab = LAB.at(scale, quick=False)
    flags = next(lab.flags_of(v) for v in lab.variants if v.engine == "llama-cpp")
    given = llama_server.parser().parse_args(LlamaCpp.server_argv(model, flags, 9))
    assert given.model == str(model.path / "model.gguf")
    old = {**flags, "model": "x/model.gguf"}  # an older run named it
    assert LlamaCpp.server_argv(model, old, 9).count("--model") == 1
    assert (given.host, given.port, given.alias) == ("127.0.0.1", 9, "abacus-1")
    assert given.metrics
    assert given.no_webui
    assert given.ctx_size // given.parallel >= lab.workloads[0].longest_tokens
    LlamaCpp.require_sizes("llama", flags, model, lab.workloads[0].longest_tokens)
    with pytest.raises(EngineError, match="tokens a slot"):
        LlamaCpp.require_sizes("llama", flags, model, 10**6)


@pytest.mark.parametrize("scale", SCALES)
def test_every_engine_accepts_its_flags_and_they_are_harmless(scale: str) -> None:
    lab = LAB.at(scale, quick=False)
    for variant in lab.variants:
        flags, engine = lab.flags_of(variant), ENGINES[variant.engine]
        assert engine.refusal(flags) == ""
        if engine is not Vllm:
            assert not lab.flags.keys() & flags.keys()  # those are vLLM's words
            engine.check_flags([flags])


def test_what_an_engine_does_not_know_or_what_may_harm_is_refused_by_name() -> None:
    with pytest.raises(EngineError, match=r"--cb-blocksize: .*--cb-block-size"):
        Transformers.check_flags([{"cb-blocksize": 32}])
    with pytest.raises(EngineError, match="cb-block-size has a value"):
        Transformers.check_flags([{"cb-block-size": True}])
    with pytest.raises(EngineError, match="sets port itself"):
        LlamaCpp.check_flags([{"port": 1, "model": "<gguf>/model.gguf"}])
    assert "trust-remote-code" in Transformers.refusal({"trust-remote-code": True})
    assert "model" in LlamaCpp.refusal({"model": "/etc/passwd"})
    assert "lora" in LlamaCpp.refusal({"lora": "x.gguf"})


def test_llama_cpps_metrics_are_read_by_the_labs_names() -> None:
    reading = LlamaCpp.read_metrics(LLAMA_METRICS)
    assert reading.values == {
        metrics.PROMPT_TOKENS: 846, metrics.GENERATION_TOKENS: 672,
        metrics.RUNNING: 3, metrics.WAITING: 13,
    }  # fmt: skip
    assert LlamaCpp.has_shown(reading)
    assert not Vllm.has_shown(Vllm.read_metrics(LLAMA_METRICS))
    assert not Transformers.has_shown(Transformers.read_metrics(""))


# ---------------------------------------------------------------------- what a trial must show


def on(engine: str) -> Point:
    point = make_point("vllm")
    return replace(point, variant=Variant(name="other", engine=engine))


def named(engine: str, shown: Snapshot | None) -> dict[str, bool]:
    """The caveats of a good trial on this engine -> whether they block."""
    times = [10 + i for i in range(8)]
    found = [make_record([(t + 0.15 + 0.05 * k, 1) for k in range(4)], sent_s=t, index=i,
                         prompt_tokens=6) for i, t in enumerate(times)]  # fmt: skip
    trial = make_trial(found, engine=shown, point=on(engine))
    trial = replace(trial, asked=[Asked(6, 4)] * 8)
    if shown is not None:
        counted = {
            metrics.PROMPT_TOKENS: 6.0 * 8, metrics.GENERATION_TOKENS: 4.0 * 8,
            metrics.RUNNING: 0.0, metrics.WAITING: 0.0,
        }  # fmt: skip
        if not shown.values:
            trial = replace(trial, engine=Snapshot(counted))
    return {c.name: c.blocks for c in caveats_of(trial, Expected())}


def test_an_engine_without_metrics_is_proved_by_the_client_and_says_so() -> None:
    assert named("transformers", None) == {"engine shows no metrics": False}
    assert named("vllm", None) == {"engine's metrics unreadable": True}
    assert named("llama-cpp", None) == {"engine's metrics unreadable": True}


def test_an_engine_must_show_the_metrics_that_it_has_and_no_others() -> None:
    assert named("llama-cpp", Snapshot({})) == {}
    assert named("vllm", Snapshot({})) == {"engine's metrics incomplete": True}
    assert make_engine([]).values.keys() >= Vllm.shown_metrics() & {metrics.REQUESTS}


# ---------------------------------------------------------------------------- one is not here


class Told(SilentProgress):
    """Keeps what it was told."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def message(self, text: str) -> None:
        self.messages.append(text)


def without_llama(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(shutil, "which", lambda program: None)
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "xllamacpp" else found(name)
    )


def test_an_engine_that_is_not_installed_is_left_out_by_name_with_its_claims(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_llama(monkeypatch)
    lab, told = LAB.at("cpu", quick=False), Told()
    left = with_engines_here(lab, CPU, model, told)
    assert told.messages[0].startswith("Left out: llama-cpp,")
    there = ["vllm", "vllm-eager", "transformers", "transformers-cb"]
    assert [v.name for v in left.variants] == there
    assert left.absent == ("llama-cpp", "llama-cpp-q4")
    reason, *_ = left.left_out
    assert "pip install xllamacpp==" in reason
    assert "llama-server on PATH" in reason
    gone = {c.name for c in lab.claims} - {c.name for c in left.claims}
    assert gone == {"batches-llama-cpp", "alone-llama-cpp", "q4-one", "q4-many"}
    assert not left.derived()  # and no file is made for it


def test_without_any_engine_nothing_starts(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    without_llama(monkeypatch)
    alone = LAB.at("cpu", False, {"variants": ["llama-cpp"]})
    with pytest.raises(EngineError, match="not installed here"):
        with_engines_here(alone, CPU, model, Told())


def test_what_the_cpu_has_no_kernel_for_is_left_out_and_a_lab_about_it_alone_does_not_apply(
    model: Model,
) -> None:
    old, told = CPU.model_copy(update={"cpu_flags": ("avx2",)}), Told()
    scale = catalog.scale_of(old)
    left = with_engines_here(LABS["context-retrieval"].at(scale, False), old, model, told)
    assert left.absent == ("kv-fp8", "both")
    assert "without AVX-512" in told.messages[0]
    left = with_engines_here(LABS["weight-quantization"].at(scale, False), old, model, told)
    assert left.absent == ("w4a16-gptq", "w4a16-awq")
    for name in ("kv-quantization", "quantization-tools"):
        with pytest.raises(NotApplicable, match=f"{name} has nothing"):
            with_engines_here(LABS[name].at(scale, False), old, model, told)


def test_the_type_of_the_weights_is_set_by_the_lab_alone() -> None:
    assert not Transformers.refusal({"dtype": "float32", "continuous-batching": True})
    assert "dtype" in Transformers.refusal({"dtype": "os.system"})


def test_random_weights_are_vllms_alone(model: Model) -> None:
    random = replace(model, dummy=True)
    lab = with_engines_here(LAB.at("gpu-80", False, dummy=True), GPU, random, Told())
    assert [v.name for v in lab.variants] == ["vllm", "vllm-eager"]
    assert [c.name for c in lab.claims] == ["batches-vllm", "alone-vllm-eager"]
    assert lab.answers == ("SO-7",)


def test_a_run_without_an_engine_is_not_stale(tmp_path: Path) -> None:
    lab = LAB.at("cpu", quick=False)
    run: Run = write_run(tmp_path).run()
    whole = run.model_copy(update={"lab": lab.resolved(), "scale": "cpu"})
    part = whole.model_copy(update={"lab": lab.without({"llama-cpp": "not here"}).resolved()})
    assert part.lab["absent"] == ["llama-cpp"]
    assert "absent" not in whole.lab
    assert not is_stale(whole)
    assert not is_stale(part)
    assert is_stale(part.model_copy(update={"lab": {**part.lab, "absent": []}}))


# ------------------------------------------------------------------------------ their servers


def test_the_guard_stands_before_the_server_of_transformers() -> None:
    class Application:
        def __init__(self) -> None:
            self.added: list[object] = []

        def add_middleware(self, middleware: object) -> None:
            self.added.append(middleware)

    build = transformers_server.guarded(lambda *given, **named: Application())
    assert build("manager", enable_cors=False).added == [Guard]


def test_a_model_of_another_kind_is_refused_before_anything_is_written(
    tmp_path: Path, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda program: f"/usr/bin/{program}")
    assert LlamaCpp.cannot_serve(model, {}, CPU) == ""
    base = model.path
    for changes, why in (
        ({"architectures": ["BeadsForCausalLM"]}, "is BeadsForCausalLM"),
        ({"quantization_config": {}}, "quantized"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "scaled rotary"),
    ):
        (base / "config.json").write_text(json.dumps(CONFIG | changes))
        with pytest.raises(MakerError, match=why):
            to_gguf.make(base, tmp_path / "out")
        told = LlamaCpp.cannot_serve(Model("abacus", base, SHAPE), {}, CPU)
        assert "GGUF" in told
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("cutter", "name"),
    [
        ({"type": "ByteLevel", "use_regex": True}, "gpt-2"),
        (
            {"type": "Sequence", "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": r"\p{L}+|\p{N}{1,3}| ?"}}]},
            "llama-bpe",
        ),
        (
            {"type": "Sequence", "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?"}}]},
            "qwen2",
        ),
    ],
)  # fmt: skip
def test_how_text_is_cut_is_named_in_llama_cpps_words(cutter: dict[str, Any], name: str) -> None:
    assert to_gguf.pre_tokenizer_of({"pre_tokenizer": cutter}) == name


def test_a_way_of_cutting_that_is_not_known_is_refused() -> None:
    with pytest.raises(MakerError, match="convert_hf_to_gguf"):
        to_gguf.pre_tokenizer_of({"pre_tokenizer": {"type": "Whitespace"}})
