"""The ceilings on a GPU, on a stand-in for torch; and what the vendor states beside them."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from labs.harness.reports import tables
from serving.hardware import gpus, machine
from serving.hardware.machine import GIB, Ceilings, Machine

H100 = Machine(kind="gpu", model="NVIDIA H100 80GB HBM3", count=1, memory_bytes=80 * GIB)


class Tensor:
    """Stands for any tensor; the clock of the test moves on by its cost."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def to(self, dtype: str) -> Tensor:
        return self

    def t(self) -> Tensor:
        return self

    def copy_(self, source: Tensor, non_blocking: bool = False) -> None:
        self.clock.now_s += 2.0

    def __matmul__(self, other: Tensor) -> Tensor:
        self.clock.now_s += 1.0
        return self


class Clock:
    now_s = 0.0

    def read(self) -> float:
        return self.now_s


def make_torch(clock: Clock, capability: tuple[int, int], free_bytes: int) -> ModuleType:
    def scaled_mm(*_: object, **__: object) -> None:
        clock.now_s += 0.5

    torch = ModuleType("torch")
    names = ("ones", "randn", "empty", "empty_like")
    made = {name: lambda *_, **__: Tensor(clock) for name in names}
    cuda = SimpleNamespace(
        synchronize=lambda: None,
        get_device_capability=lambda: capability,
        mem_get_info=lambda: (free_bytes, 80 * GIB),
    )
    plain = {"uint8": "", "bfloat16": "", "float8_e4m3fn": "", "set_num_threads": lambda n: None}
    for name, value in {**made, **plain, "cuda": cuda, "_scaled_mm": scaled_mm}.items():
        setattr(torch, name, value)
    torch.__version__ = "2.11.0+cu130"  # type: ignore[attr-defined]
    return torch


def measured(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], free_bytes: int = 79 * GIB
) -> Ceilings:
    clock = Clock()
    monkeypatch.setitem(sys.modules, "torch", make_torch(clock, capability, free_bytes))
    monkeypatch.setattr("serving.hardware.machine.time.perf_counter", clock.read)
    return machine._measure("gpu")


def test_a_hopper_gpu_has_three_ceilings_and_a_link_and_an_older_one_no_fp8(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = measured(monkeypatch, (9, 0))
    assert found.host_bytes_per_s == found.link_bytes_per_s == GIB / 4 / 2.0
    assert found.times(4).host_bytes_per_s == 4 * GIB / 4 / 2.0
    assert found.memory_bandwidth_bytes_per_s == 2 * 4 * GIB / 2.0
    assert found.bf16_flops_per_s == 2 * 8192**3 / 1.0
    assert found.fp8_flops_per_s == 2 * 8192**3 / 0.5
    assert measured(monkeypatch, (8, 0)).fp8_flops_per_s is None
    unknown = found.model_copy(update={"host_bytes_per_s": None})
    assert unknown.times(2).link_bytes_per_s == 2 * gpus.PCIE_4_BYTES_PER_S
    assert not {"host_bytes_per_s", "devices"} & unknown.model_dump().keys()  # as in older files


def test_the_copy_fits_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    found = measured(monkeypatch, (8, 9), free_bytes=8 * GIB)
    assert found.memory_bandwidth_bytes_per_s == 2 * 2 * GIB / 2.0


def test_beside_a_gpu_the_load_may_use_every_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.hardware.machine.os.sched_getaffinity", lambda _: set(range(16)))
    everything = tuple(range(16))
    assert machine.split_cores("gpu") == (everything, everything)
    engine, others = machine.split_cores("cpu")
    assert not set(engine) & set(others)


def test_of_two_installed_versions_the_first_on_the_path_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place, version in (("first", "2.0"), ("second", "1.0")):
        about = tmp_path / place / "shadowed-1.dist-info" / "METADATA"
        about.parent.mkdir(parents=True)
        about.write_text(f"Metadata-Version: 2.1\nName: shadowed\nVersion: {version}\n")
    places = [str(tmp_path / "first"), str(tmp_path / "second")]
    monkeypatch.setattr(sys, "path", [*places, *sys.path])
    assert machine.environment(tmp_path, "cpu").packages["shadowed"] == "2.0"


def test_the_datasheet_stands_beside_the_measured() -> None:
    ours = Ceilings(
        memory_bandwidth_bytes_per_s=3.0e12, bf16_flops_per_s=8e14, fp8_flops_per_s=None,
        threads=1, torch="-", measured_at="-",
    )  # fmt: skip
    assert list(map(list, tables.ceilings(H100, ours).rows)) == [
        ["Memory bandwidth", "3,000 GB/s", "3,350 GB/s", "90%"],
        ["BF16", "800 TFLOP/s", "989 TFLOP/s", "81%"],
        ["FP8", "–", "1,979 TFLOP/s", "–"],
    ]
    unknown = H100.model_copy(update={"model": "NVIDIA H100 PCIe"})
    assert tables.ceilings(unknown, ours).rows == ()


@pytest.mark.parametrize(
    ("kind", "first", "variable"), [("gpu", "gcc", "CC"), ("cpu", "g++", "CXX")]
)
def test_a_compiler_needs_pythons_headers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str, first: str, variable: str
) -> None:
    monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("serving.hardware.machine.shutil.which", lambda name: None)
    missing, mend = machine.compiler(kind)
    assert missing == "missing"
    assert f"install {first}," in mend
    assert variable in mend
    monkeypatch.setattr("serving.hardware.machine.shutil.which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(
        "serving.hardware.machine.sysconfig.get_paths", lambda: {"include": str(tmp_path)}
    )
    found, mend = machine.compiler(kind)
    assert found.startswith(f"/usr/bin/{first}, without")
    assert f"python3.{sys.version_info[1]}-dev" in mend
    assert str(tmp_path / "Python.h") in mend
    (tmp_path / "Python.h").touch()
    assert machine.compiler(kind) == (f"/usr/bin/{first}", "")


def test_an_x86_cpu_without_instructions_for_bf16_is_known() -> None:
    plain = Machine(kind="cpu", model="Abacus", count=2, memory_bytes=2**34)
    assert not plain.lacks_bf16  # of another architecture, of which this list says nothing
    for flags, lacks in (
        (("avx2",), True),
        (("avx2", "avx512f"), True),
        (("avx2", "avx512f", "avx512_bf16"), False),
        (("avx2", "avx512f", "amx_bf16", "amx_int8"), False),
    ):
        named = plain.model_copy(update={"cpu_flags": flags})
        assert named.lacks_bf16 == lacks
        assert ("without BF16" in named.describe()) == lacks


def test_cpus_of_one_name_are_told_apart_by_the_caches_of_a_core() -> None:
    kib = 2**10
    caches = {"L1": 32 * kib, "L1i": 32 * kib, "L2": 2**20, "L3": 2**25}
    one = Machine(
        kind="cpu", model="Abacus", count=2, memory_bytes=2**34, caches_bytes=caches,
        cpu_flags=("avx2", "avx512f", "avx512_bf16"),
    )  # fmt: skip
    assert one.name == "Abacus (L1 32 + 32 KiB)"
    assert one.describe().startswith(f"{one.name}, 2 ")

    def other(**changed: int) -> Machine:
        return one.model_copy(update={"caches_bytes": caches | changed})

    assert other(L1=48 * kib).name == "Abacus (L1 48 + 32 KiB)"
    slugs = {m.slug for m in (one, other(L1=48 * kib), other(L1i=64 * kib), other(L2=2**19))}
    assert len(slugs) == 4
    assert other(L3=2**28).slug == one.slug  # shared: another part of it says nothing of the core
    reordered = one.model_copy(update={"caches_bytes": dict(reversed(caches.items()))})
    assert reordered.slug == one.slug
    assert H100.slug == "nvidia-h100-80gb-hbm3-1gpu-c673c6"  # of a GPU: its name, count, memory
    assert H100.name == H100.model


def test_without_instructions_for_bf16_the_rate_is_that_of_float32() -> None:
    with_both = Ceilings(
        memory_bandwidth_bytes_per_s=1e10, bf16_flops_per_s=1e9, fp32_flops_per_s=9e10,
        threads=1, torch="-", measured_at="-",
    )  # fmt: skip
    assert with_both.flops_per_s == 9e10
    assert with_both.ridge_flops_per_byte == 9
    assert with_both.times(2).flops_per_s == 2 * 9e10
    plain = with_both.model_copy(update={"fp32_flops_per_s": None})
    assert (plain.flops_per_s, plain.ridge_flops_per_byte) == (1e9, 0.1)
    assert "fp32_flops_per_s" not in plain.model_dump()  # as in all older files


@pytest.mark.parametrize("lacking", [True, False])
def test_float32_is_measured_where_the_cpu_lacks_bf16(
    lacking: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    torch = make_torch(clock, (0, 0), 0)
    torch.float32 = ""  # type: ignore[attr-defined]
    flags = ("avx2",) if lacking else ("avx2", "avx512_bf16")
    here = Machine(kind="cpu", model="Abacus", count=2, memory_bytes=2**34, cpu_flags=flags)
    monkeypatch.setattr(machine, "cpu", lambda: here)
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setattr("serving.hardware.machine.time.perf_counter", clock.read)
    found = machine._measure("cpu")
    assert (found.fp32_flops_per_s is not None) == lacking
    # in software only a small product ends soon
    assert found.bf16_flops_per_s == 2 * (256 if lacking else 2048) ** 3 / 1.0
