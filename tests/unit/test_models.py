"""Shapes from numbers alone, the table of GPUs by memory, and what is said of a missing model."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors
from huggingface_hub.utils._paths import filter_repo_objects

from labs import LABS
from labs.harness.plan.derived_models import NEED_NO_WEIGHTS, RECIPES
from labs.harness.plan.resolve import (
    model_for,
    model_of,
    require_devices,
    require_host_memory,
    require_memory,
    require_sizes,
)
from labs.harness.plan.session_plan import plan
from labs.harness.spec.lab import Lab, LabError, NotApplicable
from labs.harness.spec.overrides import parse_changes
from serving.engines import vllm
from serving.engines.base import EngineError
from serving.engines.vllm import Vllm
from serving.engines.vllm_flags import VllmFlags
from serving.hardware import host_memory
from serving.hardware import machine as machines
from serving.hardware.gpus import CLASSES, MemoryClass, class_of
from serving.hardware.machine import Machine
from serving.models import catalog, dummy
from serving.models.catalog import SIBLINGS, Model, ModelError, shape_of
from tests import default_models
from tests.cases import each
from tests.gpu import test_labs as on_gpu
from tests.shards import write_shard
from tests.sizes import sizes_of
from tests.unit.builders import changes_next


def config_of(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((dummy.HOME / f"{name}.json").read_text())
    return found


def gpu(mib: int, count: int = 1) -> Machine:
    return Machine(kind="gpu", model="Abacus", count=count, memory_bytes=mib * 2**20)


# ----------------------------------------------------------------------------------------- shapes


@pytest.mark.parametrize(
    ("name", "params", "kv_bytes"),
    [
        ("llama-8b", 8_030_261_248, 131_072),
        ("llama-1b", 1_235_814_400, 32_768),
        ("moe-30b", 30_532_122_624, 98_304),
    ],
)
def test_shapes_have_the_published_parameters(name: str, params: int, kv_bytes: int) -> None:
    shape = shape_of(config_of(name))
    assert shape.params == params
    assert shape.kv_bytes_per_token() == kv_bytes


def test_every_shape_that_ships_is_listed() -> None:
    assert {path.stem for path in dummy.HOME.glob("*.json")} == dummy.SHAPES.keys()


def test_an_untied_embedding_is_not_read_and_a_tied_one_is() -> None:
    untied, tied = (shape_of(config_of(name)) for name in ("llama-8b", "llama-1b"))
    assert untied.params - untied.matmul_params == 128_256 * 4096
    assert tied.matmul_params == tied.params
    assert (untied.weight_bytes, tied.weight_bytes) == (15_009_849_344, 2_471_628_800)
    assert (untied.held_bytes, tied.held_bytes) == (16_060_522_496, 2_471_628_800)


def test_a_token_alone_reads_its_own_experts_and_a_large_batch_all() -> None:
    shape = shape_of(config_of("moe-30b"))
    assert shape.matmul_params + 151_936 * 2048 == pytest.approx(3.35e9, rel=0.01)  # 3.3 B active
    assert shape.step_bytes(1) == 2 * shape.matmul_params
    assert shape.step_bytes(1000) == pytest.approx(shape.weight_bytes)
    two = shape.weight_bytes - (15 / 16) ** 2 * shape.expert_bytes  # each misses 15 of 16 experts
    assert shape.step_bytes(2) == pytest.approx(two)
    assert shape_of(config_of("llama-8b")).step_bytes(1) == 15_009_849_344


def test_weights_with_experts_are_read_alike(tmp_path: Path) -> None:
    """From the headers of safetensors: 6 experts, 2 for each token, and a shared one for all."""
    names = {
        "model.embed_tokens.weight": 100, "lm_head.weight": 100, "model.norm.weight": 8,
        "layers.0.mlp.experts.0.up_proj": 600, "layers.0.mlp.shared_experts.up_proj": 30,
    }  # fmt: skip
    at, header = 0, dict[str, Any]()
    for name, size in names.items():
        header[name] = {"dtype": "BF16", "shape": [size], "data_offsets": [at, at := at + 2 * size]}
    write_shard(tmp_path / "model.safetensors", header)
    config = {"num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "vocab_size": 9,
              "max_position_embeddings": 64, "num_local_experts": 6,
              "num_experts_per_tok": 2}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    shape = catalog.load(tmp_path, "mixture").shape
    assert (shape.params, shape.matmul_params) == (838, 100 + 8 + 200 + 30)
    assert (shape.weight_bytes, shape.expert_bytes) == (1476, 1200)
    assert shape.step_bytes(1) == pytest.approx(2 * shape.matmul_params)
    wide = catalog.as_served(catalog.load(tmp_path, "mixture"), 4)
    assert wide.shape == replace(
        shape, weight_bytes=2952, expert_bytes=2400, embedding_bytes=400, value_bytes=4
    )
    assert catalog.as_served(wide, 2).shape == shape
    assert wide.shape.kv_bytes_per_token() == 2 * shape.kv_bytes_per_token()


def test_in_float32_what_is_not_quantized_is_twice_as_large(tmp_path: Path) -> None:
    header = {
        "model.embed_tokens.weight": {"dtype": "BF16", "shape": [100], "data_offsets": [0, 200]},
        "layers.0.up_proj.weight": {"dtype": "I8", "shape": [60], "data_offsets": [200, 260]},
        "layers.0.up_proj.scale": {"dtype": "F32", "shape": [5], "data_offsets": [260, 280]},
    }
    write_shard(tmp_path / "model.safetensors", header)
    config = {"num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "vocab_size": 9,
              "max_position_embeddings": 64, "tie_word_embeddings": True}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert catalog.load(tmp_path, "w8").shape.weight_bytes == 280
    assert catalog.load(tmp_path, "w8", value_bytes=4).shape.weight_bytes == 480
    plain = config_of("llama-1b")
    assert shape_of(plain, 4).held_bytes == 2 * shape_of(plain).held_bytes
    quantized = dummy.quantized(plain, "w4a16-gptq")
    grown = shape_of(quantized, 4).held_bytes - shape_of(quantized).held_bytes
    assert grown == 2 * (shape_of(plain).params - shape_of(plain).layers * 60_817_408)


@pytest.mark.parametrize(
    ("flags", "scale"), [((), "cpu"), (("avx2",), catalog.CPU_FP32), (("avx2", "amx_bf16"), "cpu")]
)
def test_a_cpu_without_bf16_has_sizes_of_its_own(flags: tuple[str, ...], scale: str) -> None:
    here = Machine(kind="cpu", model="Abacus", count=2, memory_bytes=2**34, cpu_flags=flags)
    assert catalog.scale_of(here) == scale


def write_halves(path: Path, *names: str) -> None:
    """A file of weights with tensors of 64 numbers in 16 bits."""
    tensor = {"dtype": "BF16", "shape": [64], "data_offsets": [0, 128]}
    write_shard(path, dict.fromkeys(names, tensor))


@pytest.mark.parametrize("indexed", [False, True])
def test_weights_that_are_there_twice_are_counted_once(tmp_path: Path, indexed: bool) -> None:
    config = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1,
              "vocab_size": 16, "max_position_embeddings": 64}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    first, second = (f"model-0000{n}-of-00002.safetensors" for n in (1, 2))
    write_halves(tmp_path / first, "model.a")
    write_halves(tmp_path / second, "model.b")
    assert not catalog.has_both_formats(tmp_path)
    write_halves(tmp_path / "consolidated.safetensors", "layers.a", "layers.b")
    if indexed:
        write_halves(tmp_path / "left-over.safetensors", "model.a")
        index = {"weight_map": {"model.a": first, "model.b": second}}
        (tmp_path / catalog.INDEX).write_text(json.dumps(index))
    model = catalog.load(tmp_path, "mistral")
    assert model.shape.params == 128
    assert catalog.has_both_formats(tmp_path)
    argv = Vllm.server_argv(model, {"load-format": "mistral"}, 9)
    for flag in ("--load-format", "--config-format", "--tokenizer-mode"):
        assert argv[argv.index(flag) + 1] == "hf"
    assert argv[-2:] == ["--load-format", "mistral"]  # what a reader sets comes last
    (tmp_path / second).unlink()
    if indexed:
        with pytest.raises(ModelError, match="FileNotFoundError"):
            catalog.load(tmp_path, "mistral")


def test_weights_in_mistrals_own_format_are_not_downloaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    repository = [
        "config.json", "consolidated.safetensors", "consolidated.safetensors.index.json",
        "model-00001-of-00002.safetensors", "model.safetensors.index.json", "params.json",
    ]  # fmt: skip
    taken = list[str]()

    def download(_: str, **patterns: Any) -> str:
        taken.extend(filter_repo_objects(repository, **patterns))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(ModelError):
        catalog.resolve(gpu(81_559), "mistralai/any")
    assert taken == [repository[0], *repository[3:5]]


def test_packed_weights_have_the_parameters_of_those_that_were_quantized(tmp_path: Path) -> None:
    config = config_of("llama-tiny")
    whole = shape_of(config)
    header = {"layers.0.weight_packed": {"dtype": "I32", "shape": [9], "data_offsets": [0, 36]}}
    write_shard(tmp_path / "model.safetensors", header)
    for method in ({"quant_method": "gptq", "bits": 4}, {"quant_method": "compressed-tensors"}):
        quantized = config | {"quantization_config": method}
        (tmp_path / "config.json").write_text(json.dumps(quantized))
        shape = catalog.load(tmp_path, "packed").shape
        assert (shape.params, shape.matmul_params) == (whole.params, whole.matmul_params)
        assert shape.weight_bytes == 36


# ---------------------------------------------------------------------------------- GPUs by memory


@pytest.mark.parametrize(
    ("mib", "gb"),
    [  # as drivers report them: T4, L4, A100 of 40 GB, L40S, H100, H200; and less than any class
        (15_360, 16), (23_034, 24), (40_960, 24), (46_068, 48), (81_559, 80), (143_771, 141),
        (8_192, 16),
    ],
)  # fmt: skip
def test_a_gpu_is_of_the_largest_class_that_it_fills(mib: int, gb: int) -> None:
    assert class_of(gpu(mib).memory_bytes).gb == gb
    assert catalog.scale_of(gpu(mib)) == f"gpu-{gb}"


NEED_REAL_WEIGHTS = {"quantization-tools": "w4a16-gptq-code", "weight-pruning": "wanda-50"}
"""Lab that compares what is made of real weights -> one of those that it needs."""


def default(name: str) -> Model:
    return Model(name, Path(), shape_of(default_models.config_of(name)))


@functools.cache
def of_the_class(lab: str, c: MemoryClass, random: bool) -> tuple[Lab, Machine, Model]:
    machine = gpu(round(0.96 * c.gb * 10**9 / 2**20))
    lab_ = LABS[lab].at(catalog.scale_of(machine), quick=False, dummy=random)
    name = lab_.shape or c.dummy
    shape = Model(name, Path(), shape_of(config_of(name)), dummy=True)
    return lab_, machine, shape if random or lab_.shape else default(c.model)


@pytest.mark.parametrize("lab", LABS)
@each("random", [False, True])
@each("c", CLASSES)
def test_every_lab_fits_every_class_of_gpu(lab: str, c: MemoryClass, random: bool) -> None:
    """Its lengths the model, its weights and KV cache the memory; what it derives can be had."""
    resolved, machine, model = of_the_class(lab, c, random)
    require_devices(resolved, machine)
    require_sizes(resolved, model)
    require_memory(resolved, machine, model)
    of_random = {*dummy.DERIVED, *NEED_NO_WEIGHTS}
    known = of_random if model.dummy else {*SIBLINGS[model.name], *RECIPES}
    if lab in NEED_REAL_WEIGHTS and random:
        derived = NEED_REAL_WEIGHTS[lab]
        with pytest.raises(ModelError, match=f"{derived} .*real"):
            dummy.derive(model, derived)
    else:
        assert set(resolved.derived()) <= known


def test_the_plan_of_a_rehearsal_leaves_out_what_needs_real_weights() -> None:
    planned = plan(LABS, "gpu-80", start_s=45.0)
    assert [of.lab for of in planned] == [name for name in LABS if name not in NEED_REAL_WEIGHTS]


@pytest.mark.parametrize("lab", LABS)
@each("random", [False, True])
@each("c", CLASSES)
def test_what_to_turn_next_can_be_turned_on_every_gpu(
    lab: str, c: MemoryClass, random: bool
) -> None:
    resolved, machine, model = of_the_class(lab, c, random)
    digest = resolved.digest()
    for knob, changes in changes_next(resolved):
        turned = LABS[lab].at(catalog.scale_of(machine), False, changes, random)
        assert turned.digest() != digest, knob
        require_sizes(turned, model)
        require_memory(turned, machine, model)
        if random and lab not in NEED_REAL_WEIGHTS:
            assert set(turned.derived()) <= {*dummy.DERIVED} | NEED_NO_WEIGHTS


def test_the_bundled_model_is_served_on_a_gpu_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "bundled", lambda: Path("carried"))
    monkeypatch.setattr(catalog, "load", lambda path, name: (path, name))
    found: object = catalog.resolve(gpu(81559), catalog.BUNDLED)
    assert found == (Path("carried"), catalog.BUNDLED)


@pytest.mark.parametrize("lab", LABS)
@each("quick", [False, True])
def test_every_lab_that_applies_to_random_weights_fits_them_on_a_cpu(lab: str, quick: bool) -> None:
    resolved = LABS[lab].at("cpu", quick, dummy=True)
    name = resolved.shape or "llama-tiny"
    require_sizes(resolved, Model(name, Path(), shape_of(config_of(name)), dummy=True))


@pytest.mark.parametrize("lab", on_gpu.REAL)
@each("c", CLASSES)
def test_what_the_tests_on_a_gpu_send_fits_the_bundled_model(lab: str, c: MemoryClass) -> None:
    machine = of_the_class(lab, c, random=False)[1]
    smollm = (30, 576, 9, 3, 1536, 49152, 8192, True)
    shape = shape_of(dict(zip(default_models.FIELDS, smollm, strict=True)))
    assert shape.params == 134_515_008
    changes = parse_changes(f"{sizes_of(lab).real} {sizes_of(lab).gpu}")
    resolved = LABS[lab].at(catalog.scale_of(machine), True, changes)
    require_sizes(resolved, Model(catalog.BUNDLED, Path(), shape))


def test_siblings_are_of_the_default_models_and_known_kinds() -> None:
    assert {c.model for c in CLASSES} == SIBLINGS.keys() == default_models.DEFAULTS.keys()
    assert all(named.keys() <= {*RECIPES, "eagle3"} for named in SIBLINGS.values())


@pytest.mark.parametrize("c", CLASSES, ids=lambda c: f"{c.gb}")
def test_memory_is_exercised_where_a_lab_is_about_it(c: MemoryClass) -> None:
    """On each class some prefixes fit the cache and some do not, and a tight cache overflows."""
    lab, _, model = of_the_class("prefix-caching", c, random=False)
    workloads = {w.name: w for w in lab.workloads}
    memory = VllmFlags(lab.flags).kv_cache_memory_bytes
    longest = workloads["few"].longest_tokens * model.shape.kv_bytes_per_token()
    few, many = (w.prefix.groups for n in ("few", "many") if (w := workloads[n]).prefix)
    assert few <= memory / longest < many
    lab, _, model = of_the_class("kv-quantization", c, random=False)
    (growing,) = (w for w in lab.workloads if w.name == "growing")
    tight = next(v for v in lab.variants if v.name == "bf16-tight")
    longest = growing.longest_tokens * model.shape.kv_bytes_per_token()
    held = VllmFlags(tight.flags).kv_cache_memory_bytes / longest
    assert 4 < held < max(load.seats for load in growing.loads)


# ------------------------------------------------------------------------- what cannot be is said


def test_too_little_memory_is_said_before_anything_starts() -> None:
    lab, machine, model = of_the_class("kv-quantization", CLASSES[0], random=False)
    large = default("Qwen/Qwen2.5-7B-Instruct")
    require_memory(lab, machine, model)
    with pytest.raises(EngineError, match=r"15\.2 GB .*MODEL=.*TP="):
        require_memory(lab, machine, large)
    parts = {"flags.tensor-parallel-size": 2}
    scale = catalog.scale_of(machine)
    require_memory(LABS["kv-quantization"].at(scale, False, parts), machine, large)


def test_what_the_host_cannot_hold_is_said_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lab = LABS["kv-quantization"].at("gpu-80", quick=False)
    gib = max(flags.kv_offloading_bytes for flags in lab.all_flags) // 2**30
    free = {"host": (gib + 1) * 2**30, "shared": (gib + 1) * 2**30}
    version = ["0.32.0"]
    monkeypatch.setattr(host_memory, "available_bytes", lambda: free["host"])
    monkeypatch.setattr(host_memory, "shared_bytes", lambda: free["shared"])
    monkeypatch.setattr(Vllm, "version", lambda: version[0])
    require_host_memory(lab)
    free["shared"] = 64 * 2**20
    with pytest.raises(EngineError, match=rf"{gib} GiB .* 0.0625 GiB .* --shm-size={gib + 1}g"):
        require_host_memory(lab)
    require_host_memory(lab.without({"offload": "it is left out"}))
    version[0] = "0.26.0"  # which has the blocks in memory of its own
    require_host_memory(lab)
    free["host"] = 2**30
    with pytest.raises(EngineError, match=r"1 GiB .*: lower kv-offloading-size"):
        require_host_memory(lab)


def test_a_cpu_has_no_memory_beside_its_own_to_offload_to() -> None:
    lab = LABS["kv-quantization"].at("gpu-80", quick=False)
    require_devices(lab, gpu(81_559))
    cpu = Machine(kind="cpu", model="Abacus", count=2, memory_bytes=2**30)
    require_devices(lab.without({"offload": "it needs a GPU"}), cpu)
    with pytest.raises(NotApplicable, match=r"offload .* GPU"):
        require_devices(lab, cpu)


def test_each_copy_of_a_model_holds_weights_and_a_kv_cache() -> None:
    """On a CPU all copies share the host's memory; on GPUs each has a GPU of its own."""
    _, _, model = of_the_class("kv-quantization", CLASSES[0], random=False)
    flags = {"kv-cache-memory-bytes": 4 * 10**9}
    copies = {**flags, "data-parallel-size": 2}
    alone = Vllm.host_memory_bytes(flags, model.shape)
    assert Vllm.host_memory_bytes(copies, model.shape) == 2 * alone
    cpu = Machine(kind="cpu", model="Abacus", count=2, memory_bytes=2 * alone - 1)
    Vllm.require_memory("large", flags, cpu, model.shape)
    with pytest.raises(EngineError, match=r"2 copies .* data-parallel-size"):
        Vllm.require_memory("large", copies, cpu, model.shape)
    one = gpu(round(alone / 2**20))
    Vllm.require_memory("large", copies, one, model.shape)


def test_the_blocks_of_a_kv_cache_are_counted_as_memory() -> None:
    """They are made however little memory was given for them."""
    _, _, model = of_the_class("kv-quantization", CLASSES[0], random=False)
    cpu = Machine(kind="cpu", model="Abacus", count=2, memory_bytes=64 * 2**30)
    blocks = {"kv-cache-memory-bytes": 2**30, "block-size": 128, "num-gpu-blocks-override": 64}
    many = {**blocks, "num-gpu-blocks-override": 10**6}
    for machine in (cpu, gpu(81_559)):
        Vllm.require_memory("paged", blocks, machine, model.shape)
        with pytest.raises(EngineError, match=r"paged: .*num-gpu-blocks"):
            Vllm.require_memory("paged", many, machine, model.shape)
    few, none = ({"block-size": 128, "num-gpu-blocks-override": n} for n in (1, 0))
    assert Vllm.host_memory_bytes(few, model.shape) == Vllm.host_memory_bytes(none, model.shape)
    assert Vllm.host_memory_bytes(many, model.shape) > 10**6 * 128 * 1000


def test_more_gpus_than_there_are_is_said_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    changes = {"flags.tensor-parallel-size": 2, "flags.pipeline-parallel-size": 2}
    lab = LABS["chunked-prefill"].at("gpu", quick=False, changes=changes)
    require_devices(lab, gpu(81_559, count=4))
    with pytest.raises(EngineError, match="TP x PP x DP = 4 "):
        require_devices(lab, gpu(81_559, count=2))
    across = {**changes, "flags.distributed-executor-backend": "ray"}
    lab = LABS["chunked-prefill"].at("gpu", False, across)
    monkeypatch.setattr("serving.engines.vllm.importlib.util.find_spec", lambda name: None)
    with pytest.raises(EngineError, match=r"Ray, .* not installed"):
        require_devices(lab, gpu(81_559, count=2))
    monkeypatch.setattr("serving.engines.vllm.importlib.util.find_spec", lambda name: name)
    require_devices(lab, gpu(81_559, count=2))


def test_on_a_cpu_copies_of_a_model_need_a_core_each() -> None:
    cpu = Machine(kind="cpu", model="Abacus", count=2, memory_bytes=2**34)
    lab = LABS["continuous-batching"]
    require_devices(lab.at("cpu", quick=False, changes={"flags.data-parallel-size": 2}), cpu)
    for flag, size in (("data", 3), ("tensor", 2), ("pipeline", 2)):
        asked = lab.at("cpu", quick=False, changes={f"flags.{flag}-parallel-size": size})
        with pytest.raises(EngineError, match=r"has 0: .* cores, here 2\)"):
            require_devices(asked, cpu)
    over_ray = lab.at("cpu", False, {"flags.distributed-executor-backend": "ray"})
    with pytest.raises(EngineError, match="not support Ray"):
        require_devices(over_ray, cpu)


@pytest.mark.parametrize(
    ("copies", "bound"), [(1, "0,1,2"), (2, "0,2|1"), (3, "0|1|2"), (4, "0|1|2|3")]
)
def test_copies_of_a_model_have_cores_of_their_own(
    monkeypatch: pytest.MonkeyPatch, copies: int, bound: str
) -> None:
    monkeypatch.setattr(machines, "split_cores", lambda: ((0, 1, 2), (3,)))
    assert vllm.cores_of(copies) == bound


def test_a_rate_of_acceptance_is_set_on_a_gpu_only() -> None:
    lab = LABS["speculative-decoding"]
    require_devices(lab.at("gpu", quick=False, dummy=True), gpu(81_559))
    cpu = Machine(kind="cpu", model="Abacus", count=2, memory_bytes=2**34)
    require_devices(lab.at("cpu", quick=False), cpu)
    with pytest.raises(NotApplicable, match=r"accepts-30 .* Triton.* GPU"):
        require_devices(lab.at("cpu", quick=False, dummy=True), cpu)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (errors.GatedRepoError, "licence at .*/a/b .* HF_TOKEN"),
        (errors.RepositoryNotFoundError, "a/b, or it is private: .* HF_TOKEN"),
        (errors.LocalEntryNotFoundError, "MODEL=.* WEIGHTS=dummy"),
    ],
)
def test_a_model_that_cannot_be_had_says_what_to_give(
    kind: type[Exception], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> str:
        raise kind.__new__(kind)  # without the response that belongs to it

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ModelError, match=said):
        catalog.resolve(gpu(81_559), "a/b")


def test_a_model_folder_that_is_not_one_is_told_why(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"MODEL=.*/none .*: give"):
        catalog.resolve(gpu(81_559), str(tmp_path / "none"))
    with pytest.raises(ModelError, match=r"has no config\.json"):
        catalog.resolve(gpu(81_559), str(tmp_path))


def test_settings_that_do_not_fit_are_named() -> None:
    with pytest.raises(LabError, match=r"WEIGHTS=real .* use WEIGHTS=dummy"):
        model_of(gpu(81_559), "", "real")
    with pytest.raises(LabError, match=r"llama-8b .* give WEIGHTS=dummy"):
        model_of(gpu(81_559), "llama-8b", "")
    with pytest.raises(ModelError, match=r"llama-9b.*llama-8b"):
        model_of(gpu(81_559), "llama-9b", "dummy")


@pytest.mark.parametrize("weights", ["", "dummy"])
def test_a_lab_with_a_shape_of_its_own_serves_it_whatever_the_machine_serves(
    weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalog, "bundled_tokenizer", lambda: Path("carried"))
    shape = shape_of(config_of("moe-3b"))
    monkeypatch.setattr(dummy, "resolve", lambda machine, name: Model(name, Path(), shape))
    large, small = gpu(81_559), gpu(16_384)
    for machine, name in ((large, "moe-30b"), (small, "moe-3b")):
        lab = LABS["mixture-of-experts"].at(catalog.scale_of(machine), quick=False)
        assert model_for(lab, machine, "", weights).name == name
        assert model_for(lab, machine, "moe-tiny", weights).name == "moe-tiny"
        with pytest.raises(NotApplicable, match=r"MODEL=a/b .* leave MODEL out"):
            model_for(lab, machine, "a/b", weights)
