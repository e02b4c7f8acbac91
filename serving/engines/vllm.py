"""vLLM: its flags and their defaults, how it is started and checked, and what the lab reads of it.

Flags have vLLM's own names, so a reader can copy them from vLLM's documentation. The installed
vLLM's own parser checks them before anything starts. The lab's names of metrics are vLLM's
(`serving/metrics.py`), so none is translated.
Source: vLLM documentation, "Engine Arguments" and "Production metrics"; observed on vLLM 0.32 (CPU)
and read in the source of 0.26.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import psutil
import requests

from serving import atomic, metrics
from serving.engines.base import (
    Engine,
    EngineError,
    Unsupported,
    exceptions,
)
from serving.engines.flags import Flags, FlagValue
from serving.engines.vllm_flags import QUEUE_LIMITS, VllmFlags, VllmHarmless
from serving.hardware import host_memory
from serving.hardware import machine as machines
from serving.hardware.machine import Machine
from serving.models.catalog import CACHE, Model, Shape, files_sha256, has_both_formats
from serving.places import PROGRAM
from serving.plugins import guard, lm_format_enforcer, random_weights
from serving.processes.ports import LOOPBACK

PLUGINS = PROGRAM / "serving" / "plugins" / "metadata"
"""Described as an installed package is: an entry point there is called by each process of vLLM."""
GUARD = "serving.plugins.guard.Guard"  # known to --middleware of vLLM 0.26 and 0.32
KV_MEMORY = "kv-cache-memory-bytes"
SEVERAL_SERVERS = (sys.executable, "-m", "serving.plugins.api_servers")
"""Starts as many API servers as `api-server-count` says, which the usual command ignores."""
API_SERVER, ENGINE_CORE = "VLLM::APIServer", "VLLM::EngineCor"
"""What vLLM calls its processes, to the 15 characters that Linux keeps."""
GENERATION = "generation-config"
"""By default vLLM takes from the model's generation_config.json what a request leaves open, such as
a penalty for repetition, under which temperature 0 is not greedy decoding."""
HF_FORMAT: dict[str, FlagValue] = {
    "load-format": "hf",
    "config-format": "hf",
    "tokenizer-mode": "hf",
}
SINCE = dict.fromkeys(QUEUE_LIMITS, "0.32")
"""Flag -> the first vLLM known to have it, where not every one that the labs support has it."""
MEMORY_SHARE = 0.92  # of a GPU's memory, which vLLM 0.32 takes by default
ACTIVATION_BYTES = 10**9  # at least, beside weights and KV cache on a GPU
PROCESS_BYTES = 2 * 2**30  # on the host, beside its weights and KV cache
CPU_KV_BYTES = 4 * 2**30  # counted where no size is given
ADMIN_TIMEOUT_S = 30.0
ADAPTER_TIMEOUT_S = 120.0

METRICS = (*metrics.HISTOGRAMS, *metrics.COUNTERS, *metrics.GAUGES)
"""The metrics that the lab needs with any settings, from vLLM 0.26 to 0.32. vLLM renames metrics
between versions; a test compares these with those of the installed one."""


def usable_bytes(memory_bytes: float) -> float:
    """Return a GPU's memory for weights, keys and values, as vLLM takes it by default."""
    return MEMORY_SHARE * memory_bytes - ACTIVATION_BYTES


PARSING: Sequence[str] = (sys.executable, "-m", "serving.plugins.parsing")


class Vllm(Engine):
    """A vLLM server, or a stand-in that accepts its arguments."""

    title = "vLLM"
    says_what_it_serves = True
    command: ClassVar[Sequence[str]] = (
        sys.executable,
        "-m",
        "vllm.entrypoints.openai.api_server",
    )
    distributions = machines.VLLM
    sockets_variable = "VLLM_RPC_BASE_PATH"
    start_s = 35.0
    in_float32: ClassVar[Flags] = {"dtype": "float32"}
    harmless = VllmHarmless
    set_by_lab = (
        "host",
        "port",
        "uds",
        "model",
        "served-model-name",
        "api-key",
        "middleware",
        "worker-extension-cls",
    )

    @classmethod
    def flag_argv(cls, flags: Flags) -> list[str]:
        return super().flag_argv(VllmFlags(flags).without_router())

    @classmethod
    def server_command(cls, flags: Flags) -> Sequence[str]:
        return SEVERAL_SERVERS if VllmFlags(flags).api_server_count > 1 else cls.command

    @classmethod
    def server_argv(cls, model: Model, flags: Flags, port: int) -> list[str]:
        own = [*cls.model_argv(model.path), "--served-model-name", model.name]
        if model.dummy:
            own += ["--load-format", "dummy", "--worker-extension-cls", random_weights.EXTENSION]
        own += ["--host", LOOPBACK, "--port", str(port), "--middleware", GUARD]
        if GENERATION not in flags:  # vLLM still ends answers where the model's file says
            own += [f"--{GENERATION}", "vllm"]
        if importlib.util.find_spec("flashinfer") and shutil.which("nvcc"):
            own.append("--no-enable-flashinfer-autotune")  # of kernels that it would compile first
        return [*own, *cls.flag_argv(flags)]

    @classmethod
    def model_argv(cls, folder: Path) -> list[str]:
        """Return the arguments that name a model's folder, to be read in Hugging Face's format.

        Where Mistral's own format lies beside it, vLLM would take that, whatever the labs read.
        """
        given = ["--model", str(folder)]
        return [*given, *cls.flag_argv(HF_FORMAT)] if has_both_formats(folder) else given

    @classmethod
    def environment(cls, kind: str, model: Model, beside: Sequence[Flags] = ()) -> dict[str, str]:
        env = {
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "3600",  # connections opened before the load stay open
            # where it finds its middleware and its plugin
            "PYTHONPATH": os.pathsep.join(
                [str(PROGRAM), str(PLUGINS), *filter(None, [os.environ.get("PYTHONPATH")])]
            ),
        }
        over_ray = any(flags.get("distributed-executor-backend") == "ray" for flags in beside)
        if "GLOO_SOCKET_IFNAME" not in os.environ and not over_ray:
            # its workers listen for one another where the host's name leads, else
            env["GLOO_SOCKET_IFNAME"] = "lo"
        if model.path.exists():
            env["HF_HUB_OFFLINE"] = "1"
        if model.dummy:  # trained routers spread tokens evenly; a random one prefers a few experts
            env[random_weights.ROUTING] = metrics.EVEN_ROUTING
        backends = {VllmFlags(flags).structured_outputs_backend for flags in beside}
        if lm_format_enforcer.NAME in backends:
            env |= lm_format_enforcer.AS_OTHERS
        if kind == "gpu":
            # FlashInfer's sampler is for top-k and top-p, and all requests are greedy. It is
            # compiled as the engine starts, which needs a CUDA toolkit that few machines have.
            env["VLLM_USE_FLASHINFER_SAMPLER"] = "0"
            # kernels for block-wise FP8, which no lab serves, would be compiled as it starts, too
            env |= {"VLLM_USE_DEEP_GEMM": "0", "VLLM_DEEP_GEMM_WARMUP": "skip"}
            if any(VllmFlags(flags).speculative_config for flags in beside):
                # vLLM's second model runner, the default, supports neither n-grams nor draft
                # models. So all engines that are compared with a speculating one use the first:
                # otherwise they would differ from it in more than speculation.
                env["VLLM_USE_V2_MODEL_RUNNER"] = "0"
        if kind == "cpu":
            copies = max((VllmFlags(flags).copies for flags in beside), default=1)
            env["VLLM_CPU_OMP_THREADS_BIND"] = cores_of(copies)
        return env

    @classmethod
    def controls(cls, flags: Flags) -> dict[str, str]:
        env = {}
        if VllmFlags(flags).enable_prefix_caching:  # /reset_prefix_cache is there in this mode only
            env["VLLM_SERVER_DEV_MODE"] = "1"
        if flags.get("enable-lora"):  # adapters come and go
            env["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
        return env

    @classmethod
    def adapter_folders(cls, flags: Flags) -> list[str]:
        adapters = [module.partition("=")[2] for module in VllmFlags(flags).lora_modules]
        return sorted({str(Path(adapter).parent) for adapter in adapters if adapter})

    # before it is started

    @classmethod
    def check_flags(cls, flag_sets: Sequence[Flags]) -> None:
        """Let the installed vLLM's parser read every flag set; remember those it accepts.

        Raises EngineError with the nearest known name for a misspelled flag, or the parser's own
        words for a value out of range. The parser does not check what is known only when the engine
        starts, such as whether a length fits memory.
        """
        cls.require_not_set_by_lab(flag_sets)
        if any(VllmFlags(f).replicas > 1 and not VllmFlags(f).router for f in flag_sets):
            raise EngineError("replicas stand behind a router: give a router-policy, too")
        if any(VllmFlags(f).api_server_count > 1 and f.get("enable-lora") for f in flag_sets):
            raise EngineError(
                "vLLM has one API server where adapters come and go: leave api-server-count out"
            )
        argvs = {_digest(argv): argv for argv in map(cls.flag_argv, flag_sets)}
        memory = CACHE / f"vllm-{cls.version()}-flags.json"
        remembered = _remembered(memory)
        if remembered["options"]:
            _check_names(argvs.values(), remembered["options"])
        unknown = {d: argv for d, argv in argvs.items() if d not in remembered["accepted"]}
        if not unknown:
            return
        parsed = _parsed([*unknown.values()])
        accepted = {d for d, e in zip(unknown, parsed["errors"], strict=True) if not e}
        accepted |= {*_remembered(memory)["accepted"]}  # by another process meanwhile, too
        known = {"options": parsed["options"], "accepted": sorted(accepted)}
        atomic.write(memory, json.dumps(known))
        _check_names(argvs.values(), parsed["options"])
        for error in filter(None, parsed["errors"]):
            raise EngineError(f"vLLM refuses a flag: {error}")

    @classmethod
    def gpus_used(cls, flags: Flags) -> int | None:
        vllm_flags = VllmFlags(flags)
        return None if vllm_flags.uses_ray else vllm_flags.devices  # Ray places its workers itself

    @classmethod
    def servers(cls, flags: Flags) -> int:
        return VllmFlags(flags).api_server_count

    @classmethod
    def require_devices(cls, variant: str, flags: Flags, machine: Machine) -> None:
        vllm_flags, gpus = VllmFlags(flags), machine.count if machine.kind == "gpu" else 0
        if vllm_flags.uses_ray and machine.kind == "cpu":
            raise EngineError(
                "distributed-executor-backend=ray needs GPUs: vLLM's CPU build does not support Ray"
                " (data-parallel-size=2 serves two copies of the model on cores of their own)"
            )
        if vllm_flags.uses_ray and not importlib.util.find_spec("ray"):
            raise EngineError(
                "distributed-executor-backend=ray needs Ray, which is not installed here: run"
                " `.venv/bin/pip install 'ray[default]'` on every machine, then `ray start --head`"
                " on this one and `ray start --address=<this one>:6379` on the others"
            )
        cores = machine.count if machine.kind == "cpu" else 0
        if vllm_flags.weight_parts == 1 and 1 < vllm_flags.copies <= cores:
            return  # each copy computes on cores of its own
        if vllm_flags.devices > max(1, gpus) and not vllm_flags.uses_ray:
            instead = (
                ", or span machines with SET=flags.distributed-executor-backend=ray"
                if machine.kind == "gpu"
                else f" (data-parallel-size alone: as many copies as cores, here {cores})"
            )
            raise EngineError(
                f"TP x PP x DP = {vllm_flags.devices} needs as many GPUs, and this machine has"
                f" {gpus}: lower them{instead}"
            )
        if machine.kind == "cpu" and vllm_flags.kv_offloading_bytes:
            raise Unsupported(
                f"{variant} offloads its KV cache from a GPU to the host's memory, and vLLM refuses"
                " that on a CPU, where both are the same memory: this needs a GPU"
            )
        if machine.kind == "cpu" and "synthetic" in json.dumps(vllm_flags.speculative_config):
            raise Unsupported(
                f"{variant} accepts guesses at a fixed rate, and the sampler that does so is"
                " written in Triton, which vLLM's CPU engine lacks: this needs a GPU"
            )

    @classmethod
    def require_compiler(cls, variant: str, flags: Flags, machine: Machine) -> None:
        """Check for a C++ compiler on a CPU, where all but eager models are compiled at the start.

        Raises EngineError.
        """
        _, mend = machines.compiler(machine.kind)
        if mend and machine.kind == "cpu" and not VllmFlags(flags).enforce_eager:
            raise EngineError(f"{variant} is compiled as its engine starts: {mend}")

    @classmethod
    def require_sizes(cls, variant: str, flags: Flags, model: Model, longest_tokens: int) -> None:
        positions = model.shape.max_positions
        limit, memory = flags.get("max-model-len"), flags.get("kv-cache-memory-bytes")
        if not isinstance(limit, int) or limit < 1:  # -1: vLLM fits it to the memory
            return
        if limit > positions:
            raise EngineError(
                f"{variant}'s max-model-len={limit} exceeds {model.name}'s {positions}"
                " positions: lower it and the lengths with SET="
            )
        if longest_tokens > limit:
            raise EngineError(
                f"requests of up to {longest_tokens} tokens exceed {variant}'s"
                f" max-model-len={limit}: lower the lengths or raise flags.max-model-len with SET="
            )
        needed = limit * model.shape.kv_bytes_per_token(VllmFlags(flags).kv_value_bytes)
        needed /= VllmFlags(flags).kv_parts(model.shape.kv_heads)  # on each device
        if isinstance(memory, int) and memory < needed:
            raise EngineError(
                f"{variant}'s kv-cache-memory-bytes={memory} cannot hold one request of"
                f" max-model-len={limit}, which takes {needed:.0f} bytes: raise the one or"
                " lower the other with SET="
            )

    @classmethod
    def cannot_serve(
        cls, model: Model, flags: Flags, machine: Machine, weight_bits: int = 16
    ) -> str:
        """Say what vLLM 0.32 has no kernels for on this CPU; whatever else is known at the start.

        Sources: `_get_attn_isa` of vllm/v1/attention/backends/cpu_attn.py, and `cpu_gemm_wna16`,
        which its build for AVX2 lacks. A model in float32 was tried with a cache in BF16: vLLM
        starts, and writes empty text.
        """
        dtype = VllmFlags(flags).kv_cache_dtype
        if dtype.startswith("fp8") and machine.lacks_avx512:
            return "vLLM has no kernel for keys and values in FP8 on a CPU without AVX-512"
        in_float32 = machine.kind == "cpu" and VllmFlags(flags).in_float32
        if in_float32 and dtype in ("bfloat16", "float16"):
            return (
                f"vLLM writes no text on a CPU from a model in float32 and a cache in {dtype}:"
                " leave kv-cache-dtype out"
            )
        if weight_bits == 4 and machine.lacks_avx512:
            return "vLLM has no kernel for weights of 4 bits on a CPU without AVX-512"
        return ""

    @classmethod
    def require_memory(cls, variant: str, flags: Flags, machine: Machine, shape: Shape) -> None:
        """Check that weights and KV cache fit: a GPU beside activations, the host beside processes.

        Each copy of the model has both of its own: on a CPU in the memory that all share, elsewhere
        on GPUs of its own. Raises EngineError.
        """
        vllm_flags = VllmFlags(flags)
        kv_bytes = vllm_flags.held_kv_bytes(shape)
        copies, weight_bytes = 1, shape.held_bytes / vllm_flags.weight_parts
        beside, what, where, more = ACTIVATION_BYTES, "activations", "GPU", "more GPUs with TP=, "
        if machine.kind == "cpu":
            copies, beside, what, where = vllm_flags.copies, PROCESS_BYTES, "processes", "machine"
            more = "fewer copies by data-parallel-size, " if copies > 1 else ""
        if copies * (weight_bytes + kv_bytes + beside) > machine.memory_bytes:
            each = f"{copies} copies of the model, each with " if copies > 1 else ""
            raise EngineError(
                f"{variant}: {each}{weight_bytes / 1e9:.1f} GB of weights, {kv_bytes / 1e9:.1f} GB"
                f" of KV cache and about {beside / 1e9:.0f} GB for {what} do not fit the {where}'s"
                f" {machine.memory_bytes / 1e9:.1f} GB: give a smaller model with MODEL=, {more}"
                "or less with SET=flags.kv-cache-memory-bytes="
                f"{' or num-gpu-blocks-override' if vllm_flags.num_gpu_blocks_override else ''}"
            )

    @classmethod
    def require_host_memory(cls, variant: str, flags: Flags) -> None:
        """Check that this host has room for the blocks that are offloaded from the KV cache.

        vLLM 0.32 maps them in /dev/shm, where Docker allows 64 MiB unless told otherwise, and does
        not start where they do not fit; 0.26 has them in memory of its own. Raises EngineError.
        """
        vllm_flags = VllmFlags(flags)
        needed = vllm_flags.copies * vllm_flags.kv_offloading_bytes
        if not needed:
            return
        what = f"{variant} offloads {needed / 2**30:.3g} GiB of its KV cache to the host's memory"
        less = (
            "lower kv-offloading-size with SET=, or leave the variant out with SET='variants=[..]'"
        )
        if needed > (left := host_memory.available_bytes()):
            raise EngineError(f"{what}, and {left / 2**30:.3g} GiB are available: {less}")
        shared = host_memory.shared_bytes()
        if shared is not None and needed > shared and not cls.version().startswith("0.26."):
            raise EngineError(
                f"{what}, in /dev/shm, where {shared / 2**30:.3g} GiB are free: start the container"
                f" with --shm-size={math.ceil(needed / 2**30) + 1}g, {less}"
            )

    @classmethod
    def host_memory_bytes(cls, flags: Flags, shape: Shape) -> int:
        vllm_flags = VllmFlags(flags)
        kv_bytes = vllm_flags.held_kv_bytes(shape, CPU_KV_BYTES)
        further_servers = vllm_flags.api_server_count - 1
        copies_bytes = vllm_flags.copies * (kv_bytes + PROCESS_BYTES + shape.held_bytes)
        return round(copies_bytes + further_servers * cls.server_bytes)

    # while it runs

    @classmethod
    def shown_metrics(cls) -> frozenset[str]:
        return frozenset(METRICS)

    @classmethod
    def read_log(cls, log: Path) -> dict[str, dict[str, str]]:
        """Read how it runs the model, which vLLM's metrics do not show."""
        text = log.read_text(errors="replace")
        found = re.search(r"^.*Initializing a V1 LLM engine.*$", text, re.MULTILINE)
        given = re.search(r"^.*non-default args: .*$", text, re.MULTILINE)
        kernel = re.search(r"^.*Using FlashAttention version.*$", text, re.MULTILINE)
        built = re.search(r"^.*Resolved architecture: .*$", text, re.MULTILINE)
        routed = re.search(r"^.*Simulating MoE routing using.*$", text, re.MULTILINE)
        settings = [match[0] if match else "" for match in (found, given, kernel, built, routed)]
        read = {
            metrics.ENGINE_CONFIG: resolved("\n".join(settings)),
            metrics.ZEROS: random_weights.read(text),
        }
        read = {name: values for name, values in read.items() if values}
        return {**read, metrics.ENGINE_ARGUMENTS: arguments(settings[1])}

    @classmethod
    def cause(cls, log: Path) -> str:
        """Find the last exception in the log that is not vLLM's summary of an earlier one."""
        named = [line for line in exceptions(log) if "See root cause above" not in line]
        return named[-1] if named else "its log names no exception"

    def served(self) -> dict[str, str]:
        """Ask from which folder it serves the model, and hash the files there.

        A file is read again only where its size or time of change is another than before.
        """
        try:
            url = f"{self.engine_urls[0]}/v1/models"
            answer = requests.get(url, headers=guard.headers(), timeout=ADMIN_TIMEOUT_S)
            roots = {card["id"]: str(card["root"]) for card in answer.json()["data"]}
        except (requests.RequestException, KeyError, TypeError, ValueError):
            return {}
        if self.model not in roots:
            return {}
        folder = Path(roots[self.model])
        if not folder.is_dir():
            return {"folder": folder.name}
        return {"folder": folder.name, "files_sha256": files_sha256(folder)}

    def api_servers(self) -> list[int]:
        """List the pids of its API servers, by the titles that vLLM gives its processes.

        A single one has no title: it is the parent of the engine cores.
        """
        titles, parents = dict[int, str](), dict[int, int]()
        with contextlib.suppress(psutil.Error):
            for process in psutil.Process(self.pid).children(recursive=True):
                with contextlib.suppress(psutil.Error):  # it ended meanwhile
                    parents[process.pid] = process.ppid()
                    titles[process.pid] = process.name()
        several = [pid for pid, title in titles.items() if title.startswith(API_SERVER)]
        cores = [pid for pid, title in titles.items() if title.startswith(ENGINE_CORE)]
        return sorted(several or {parents[pid] for pid in cores})

    def reset_prefix_cache(self) -> None:
        """Have it forget all cached prefixes. Raises EngineError where it says it did not."""
        if not VllmFlags(self.flags).enable_prefix_caching:
            return  # there is nothing to forget
        for each in self.engine_urls:
            url = f"{each}/reset_prefix_cache"
            answer = requests.post(url, headers=guard.headers(), timeout=ADMIN_TIMEOUT_S)
            answer.raise_for_status()
            # versions before 0.31 answer with nothing
            if answer.content and not answer.json().get("success", True):
                raise EngineError(f"the engine {self.name} did not reset its prefix cache")

    def load_adapter(self, name: str, folder: Path) -> None:
        self._adapter("load", {"lora_name": name, "lora_path": str(folder)})

    def unload_adapter(self, name: str) -> None:
        self._adapter("unload", {"lora_name": name})

    def _adapter(self, action: str, body: dict[str, str]) -> None:
        url = f"{self.url}/v1/{action}_lora_adapter"
        try:
            answer = requests.post(
                url, json=body, headers=guard.headers(), timeout=ADAPTER_TIMEOUT_S
            )
            answer.raise_for_status()
        except requests.RequestException as error:
            name = body["lora_name"]
            raise EngineError(
                f"{self.name} did not {action} the adapter {name}: {error}"
            ) from error


def cores_of(copies: int) -> str:
    """Bind the compute threads: copies that share the requests have cores of their own, by `|`.

    Where the engine's cores are too few, copies also compute on those of the clients.
    """
    engine, clients = machines.split_cores()
    cores = engine if copies <= len(engine) else sorted({*engine, *clients})
    return "|".join(",".join(map(str, cores[copy::copies])) for copy in range(copies))


def _digest(argv: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(argv).encode()).hexdigest()[:16]


def _remembered(memory: Path) -> dict[str, list[str]]:
    """Read the parser's options, and the digests of the flag sets that it has accepted."""
    if not memory.exists():
        return {"options": [], "accepted": []}
    known: dict[str, list[str]] = json.loads(memory.read_text())
    return known


def _parsed(argvs: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Let vLLM's parser read these; its options, and an error or None for each."""
    return _of_parser(argvs)


def as_written(words: Sequence[str], older: Sequence[str]) -> dict[str, Any]:
    """Let vLLM's parser split the words of a line; return each option's texts by its name.

    `older` are options that it had before, `--name V` where one takes a value. Raises EngineError.
    """
    parsed = _of_parser({"words": words, "older": older}, "as-written")
    if parsed["error"]:
        raise EngineError(f"vLLM refuses it: {parsed['error']}")
    given: dict[str, Any] = parsed["given"]
    return given


def _of_parser(said: object, *mode: str) -> dict[str, Any]:
    """Ask vLLM's parser (`serving/plugins/parsing.py`). Raises EngineError."""
    out = subprocess.run(
        [*PARSING, *mode],
        input=json.dumps(said),
        capture_output=True,
        text=True,
        env={**os.environ, "VLLM_LOGGING_LEVEL": "ERROR"},
    )
    if out.returncode:
        silent = f"exit code {out.returncode}, without a word: was memory short?"
        *_, last = ["", *out.stderr.strip().splitlines()]
        raise EngineError(f"vLLM does not import here: {last or silent}")
    parsed: dict[str, Any] = json.loads(out.stdout.splitlines()[-1])
    return parsed


def _check_names(argvs: Iterable[Sequence[str]], options: Sequence[str]) -> None:
    for argument in (a for argv in argvs for a in argv if a.startswith("--")):
        if argument not in options:
            if (newer := SINCE.get(argument.removeprefix("--"))) is not None:
                raise Unsupported(
                    f"vLLM {Vllm.version()} has no flag {argument}, which came with {newer}:"
                    " choose a variant that does not set it, or name another VLLM="
                )
            near = difflib.get_close_matches(argument, options, 1, 0.5)
            hint = f"did you mean {near[0]}?" if near else "see vLLM's engine arguments"
            raise EngineError(f"vLLM {Vllm.version()} has no flag {argument}: {hint}")


_ARGUMENT = re.compile(r"'(\w+)': (?:'([\w.-]*)'|(True|False|-?[\d.]+(?:e-?\d+)?))(?=[,}])")


def arguments(line: str) -> dict[str, str]:
    """Read name -> value from the line in which a server logs what it was given.

    It leaves out what is vLLM's default; here are numbers, words, and True or False, without the
    address, which differs from start to start, and without paths.
    """
    read = {name: word or number for name, word, number in _ARGUMENT.findall(line)}
    return {name: value for name, value in read.items() if name not in ("host", "port")}


_RESOLVED = {  # in vLLM 0.31 and 0.32
    "structured_outputs_backend": re.compile(r"StructuredOutputsConfig\(backend='([\w-]+)'"),
    "quantization": re.compile(r"\bquantization=([^,\s]+)"),
    "enforce_eager": re.compile(r"\benforce_eager=(\w+)"),
    "compilation_mode": re.compile(r"'mode': <CompilationMode\.(\w+)"),
    "cudagraph_mode": re.compile(r"'cudagraph_mode': <CUDAGraphMode\.(\w+)"),
    # of what was given beside the defaults
    "max_num_splits": re.compile(r"flash_attn_max_num_splits_for_cuda_graph'?[=:]\s*(\d+)"),
    "watermark": re.compile(r"'watermark': ([\d.]+)"),
    "architecture": re.compile(r"Resolved architecture: (\w+)"),  # of the first model it loads
    "routing": re.compile(r"Simulating MoE routing using a (\w+) strategy"),  # once one is used
    "flash_attention": re.compile(r"Using FlashAttention version (\d+)"),
}


def resolved(lines: str) -> dict[str, str]:
    """Read setting -> value from the lines in which an engine logs its configuration."""
    matches = {name: pattern.search(lines) for name, pattern in _RESOLVED.items()}
    return {name: match[1] for name, match in matches.items() if match}


ENGINE = Vllm
