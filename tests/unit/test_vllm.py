"""vLLM's flags, checks and log, as its module reads them, and what it says that it serves."""

import json
import subprocess
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from serving.engines.base import EngineError
from serving.engines.flags import FlagValue
from serving.engines.vllm import SEVERAL_SERVERS, Vllm, arguments, resolved
from serving.engines.vllm_flags import VllmFlags
from serving.hardware.machine import Machine
from serving.models.catalog import Model, files_sha256
from tests.unit import hostile
from tests.unit.builders import SHAPE

SAID = (  # by vLLM 0.32, cut
    "(EngineCore pid=7) INFO 11-25 20:56:03 [core.py:133] Initializing a V1 LLM engine (v0.32.0)"
    " with config: model='here', quantization=None, enforce_eager=True, kv_cache_dtype=auto,"
    " observability_config=ObservabilityConfig(cudagraph_metrics=False, jit_monitor_mode='warn'),"
    " compilation_config={'mode': <CompilationMode.NONE: 0>, 'cudagraph_mm_encoder': False,"
    " 'cudagraph_mode': <CUDAGraphMode.FULL_DECODE_ONLY: (2, 0)>, 'cudagraph_num_of_warmups': 0}"
)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (SAID, {"quantization": "None", "enforce_eager": "True", "compilation_mode": "NONE",
                "cudagraph_mode": "FULL_DECODE_ONLY"}),
        ("non-default args: {'attention_config': AttentionConfig(flash_attn_version=None,"
         " flash_attn_max_num_splits_for_cuda_graph=1)}", {"max_num_splits": "1"}),
        ("non-default args: {'block_size': 32, 'watermark': 0.05}", {"watermark": "0.05"}),
        ("a V1 LLM engine with config: enforce_eager=False", {"enforce_eager": "False"}),
        ("INFO [flash_attn.py:776] Using FlashAttention version 3", {"flash_attention": "3"}),
        ("", {}),
    ],
)  # fmt: skip
def test_how_a_model_is_run_is_what_the_engine_says(said: str, expected: dict[str, str]) -> None:
    assert resolved(said) == expected


def test_what_a_server_was_given_is_read_without_addresses_and_paths() -> None:
    line = (
        "(APIServer pid=7) INFO [utils.py:286] non-default args: {'lora_modules':"
        " [LoRAModulePath(name='tenant-0', path='/a/b', base_model_name=None)], 'host':"
        " '127.0.0.1', 'port': 45505, 'middleware': ['serving.plugins.guard.Guard'],"
        " 'model': '/a/b',"
        " 'enforce_eager': True, 'max_num_seqs': 16, 'scheduling_policy': 'priority',"
        " 'watermark': 0.05, 'async_scheduling': False, 'attention_backend': 'TRITON_ATTN',"
        " 'speculative_config': {'method': 'ngram'}}"
    )
    assert arguments(line) == {
        "enforce_eager": "True", "max_num_seqs": "16", "scheduling_policy": "priority",
        "watermark": "0.05", "async_scheduling": "False", "attention_backend": "TRITON_ATTN",
        "method": "ngram",
    }  # fmt: skip
    assert arguments("") == {}


def test_flags_are_read_by_their_types_and_vllms_defaults() -> None:
    flags = VllmFlags({"block-size": 16, "max-model-len": "512", "kv-cache-dtype": "fp8_e4m3"})
    assert (flags.block_size, flags.max_model_len, flags.kv_value_bytes) == (16, 512, 1)
    assert VllmFlags().kv_value_bytes == 2
    assert (flags.max_loras, flags.max_lora_rank, flags.lora_modules) == (1, 16, [])
    assert flags.enable_prefix_caching
    assert flags.enable_chunked_prefill
    assert not VllmFlags({"enable-prefix-caching": False}).enable_prefix_caching
    assert not flags.enforce_eager
    with pytest.raises(KeyError, match="kv-cache-memory-bytes"):
        _ = flags.kv_cache_memory_bytes
    assert (flags.at_once(300), VllmFlags({"max-num-seqs": "8"}).at_once(300)) == (300, 8)
    assert VllmFlags({"max-num-seqs": 8}).at_once(4) == 4
    with pytest.raises(ValueError, match="many"):
        VllmFlags({"max-num-seqs": "many"}).at_once(4)


def test_flags_say_how_many_devices_share_the_work() -> None:
    flags = VllmFlags({"tensor-parallel-size": 2, "data-parallel-size": 3})
    assert flags.copies == 3
    assert (flags.devices, flags.weight_parts, flags.is_parallel) == (6, 2, True)
    assert (VllmFlags().devices, VllmFlags().is_parallel) == (1, False)


@pytest.mark.parametrize("given", [{"method": "ngram"}, '{"method": "ngram"}'])
def test_how_it_guesses_ahead_may_come_as_json(given: FlagValue) -> None:
    assert VllmFlags({"speculative-config": given}).speculative_config == {"method": "ngram"}
    assert VllmFlags().speculative_config == {}


class Answering(Vllm):
    """A server that is already there, whatever it answers to."""

    def __init__(self, url: str) -> None:
        self.name, self.model, self.url, self.flags = "w8a8", "tiny", url, {}


def answering(path: str, content: object) -> AbstractContextManager[str]:
    return hostile.serving({path: hostile.says(hostile.whole(json.dumps(content)))})


def test_the_weights_that_it_serves_are_those_in_the_folder_that_it_names(tmp_path: Path) -> None:
    def served(id: str, root: str) -> dict[str, str]:
        with answering("/v1/models", {"data": [{"id": id, "root": root}]}) as url:
            return Answering(url).served()

    folder = tmp_path / "tiny-w8a8"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    first = served("tiny", str(folder))
    assert first == {"folder": "tiny-w8a8", "files_sha256": files_sha256(folder)}
    (folder / "model.safetensors").write_bytes(b"others!")
    assert served("tiny", str(folder))["files_sha256"] != first["files_sha256"]
    assert served("tiny", "nowhere") == {"folder": "nowhere"}
    assert served("another", str(folder)) == {}


def test_a_cache_that_it_says_it_did_not_reset_is_an_error() -> None:
    with answering("/reset_prefix_cache", {"success": True}) as url:
        Answering(url).reset_prefix_cache()
    with (
        answering("/reset_prefix_cache", {"success": False}) as url,
        pytest.raises(EngineError, match=r"w8a8 .* prefix cache"),
    ):
        Answering(url).reset_prefix_cache()


def test_workers_listen_to_one_another_on_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    model = Model("a", Path("/none"), SHAPE)
    assert Vllm.environment("cpu", model)["GLOO_SOCKET_IFNAME"] == "lo"
    over_ray: dict[str, FlagValue] = {"distributed-executor-backend": "ray"}
    assert "GLOO_SOCKET_IFNAME" not in Vllm.environment("gpu", model, [over_ray])
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")  # the reader's own
    assert "GLOO_SOCKET_IFNAME" not in Vllm.environment("cpu", model)


def test_greedy_text_is_not_changed_by_what_a_model_recommends() -> None:
    model = Model("m", Path("m"), SHAPE)
    argv = Vllm.server_argv(model, {"block-size": 16}, 9)
    assert argv[argv.index("--generation-config") + 1] == "vllm"
    chosen = Vllm.server_argv(model, {"generation-config": "auto"}, 9)
    assert chosen.count("--generation-config") == 1
    assert chosen[-2:] == ["--generation-config", "auto"]


TITLED = """
import ctypes, json, subprocess, sys
title, below = json.loads(sys.argv[1])
if title:
    ctypes.CDLL(None).prctl(15, title.encode(), 0, 0, 0)
children = [
    subprocess.Popen([sys.executable, "-c", sys.argv[2], json.dumps(child), sys.argv[2]],
                     stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    for child in below
]
pids = [json.loads(child.stdout.readline()) for child in children]
import os
print(json.dumps([os.getpid(), title, pids]), flush=True)
input()
"""
"""A process with this title, above others; it prints what they are, with their pids."""
CORE = ["VLLM::EngineCore", [["VLLM::Worker", []]]]


def named(tree: list[Any]) -> dict[str, int]:
    pid, title, below = tree
    return {title: pid} | {name: at for child in below for name, at in named(child).items()}


@pytest.mark.parametrize(
    ("server", "answering"),
    [
        (["", [CORE]], [""]),  # vLLM's usual processes
        (["", [["VLLM::EngineCore", []]]], [""]),  # the worker in the engine core, as in our tests
        (["nsys", [["", [CORE]]]], [""]),  # wrapped by ENGINE_COMMAND
        (["", [["VLLM::EngineCore_DP0", []], ["VLLM::EngineCore_DP1", []]]], [""]),
        (
            ["", [CORE, ["VLLM::APIServer_0", []], ["VLLM::APIServer_1", []]]],
            ["VLLM::APIServer_0", "VLLM::APIServer_1"],
        ),
        (["fake", []], []),  # a stand-in, which answers and computes in one process
    ],
)
def test_api_servers_are_told_from_what_computes(server: list[Any], answering: list[str]) -> None:
    guard = subprocess.Popen(
        [sys.executable, "-c", TITLED, json.dumps(["guard", [server]]), TITLED],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert guard.stdout
    try:
        pids = named(json.loads(guard.stdout.readline()))

        class Started(Answering):
            pid = guard.pid
            _process: Any = SimpleNamespace(
                family=lambda: psutil.Process(guard.pid).children(recursive=True)
            )

        apart = sorted(pids[name] for name in answering)
        assert Started("").api_servers() == apart
        assert sorted(Started("").computing()) == sorted({*pids.values()} - {guard.pid, *apart})
    finally:
        guard.communicate("\n")


def test_more_api_servers_take_another_command_and_no_adapters() -> None:
    """The command of one parses the flag, and starts one whatever it says."""
    assert Vllm.server_command({"api-server-count": 1}) == Vllm.server_command({}) == Vllm.command
    assert Vllm.server_command({"api-server-count": 4}) == SEVERAL_SERVERS
    with pytest.raises(EngineError, match="leave api-server-count out"):
        Vllm.check_flags([{}, {"enable-lora": True, "api-server-count": 2}])
    assert not Vllm.refusal({"api-server-count": 4})
    for count in (0, 65, 100_000):  # each is a process
        assert "not known to be harmless" in Vllm.refusal({"api-server-count": count})


def test_in_float32_a_cached_number_has_four_bytes_unless_the_cache_has_a_type() -> None:
    assert VllmFlags({"dtype": "float32"}).kv_value_bytes == 4
    assert VllmFlags({"dtype": "float32", "kv-cache-dtype": "fp8_e4m3"}).kv_value_bytes == 1
    assert VllmFlags({"dtype": "bfloat16"}).kv_value_bytes == 2


def test_keys_and_values_in_8_bits_are_refused_where_the_cpu_has_no_kernel_for_them() -> None:
    model = Model("abacus", Path(), SHAPE)
    old, new = (
        Machine(kind="cpu", model="Abacus", count=2, memory_bytes=2**34, cpu_flags=flags)
        for flags in (("avx2",), ("avx2", "avx512f"))
    )
    flags, plain = {"kv-cache-dtype": "fp8_e5m2"}, {"kv-cache-dtype": "auto"}
    assert "without AVX-512" in Vllm.cannot_serve(model, flags, old)
    assert not Vllm.cannot_serve(model, plain, old)
    assert not Vllm.cannot_serve(model, flags, new)
    mixed = {"dtype": "float32", "kv-cache-dtype": "bfloat16"}
    assert "writes no text" in Vllm.cannot_serve(model, mixed, new)
    assert not Vllm.cannot_serve(model, {"kv-cache-dtype": "bfloat16"}, new)
    assert "weights of 4 bits" in Vllm.cannot_serve(model, plain, old, 4)
    assert not Vllm.cannot_serve(model, plain, old, 8)
    assert not Vllm.cannot_serve(model, plain, new, 4)
