"""A lab on one made-up GPU, whose engines share it where that does no harm."""

from __future__ import annotations

import re

from labs.harness.filing.recorded import MachineFile
from labs.harness.filing.results import RunFolder
from labs.harness.filing.writing import write_json
from serving.hardware.gpus import DATASHEETS
from serving.hardware.machine import Machine
from tests.fake.conftest import CEILINGS, Command, Reader

GPU = "NVIDIA H100 80GB HBM3"
SETTINGS = (
    'workloads=["share-0"] workloads.share-0.loads=["concurrent:1"]'
    " workloads.share-0.prompt_tokens.tokens=64 repeats=2 most_repeats=0 starts=2"
    " warmup_s=.1 window_s=.3 probes=[] findings=[] plots=[]"
)


def run(reader: Reader, slower: float = 1.0, first: tuple[str, ...] = ()) -> Command:
    machine = Machine(kind="gpu", model=GPU, count=1, memory_bytes=DATASHEETS[GPU].memory_bytes)
    file = reader.results / machine.slug / "machine.json"
    of_a_gpu = CEILINGS.model_copy(update={"fp32_flops_per_s": None})
    write_json(file, MachineFile(machine=machine, ceilings=of_a_gpu))
    command = reader.types(
        "run", "prefix-caching", program=("-m", "tests.fake.one_gpu", f"{slower:g}"),
        first_engine=first, WEIGHTS="dummy", QUICK="1", SET=SETTINGS,
    )  # fmt: skip
    assert command.wait() == 0, command.said
    return command


def shares(reader: Reader) -> list[str]:
    """The share of the GPU's memory that each engine was started with; empty where it has all."""
    found = [
        re.search(r"--gpu-memory-utilization (\S+)", argv) for _, argv in reader.engine_starts()
    ]
    return [share[1] if share else "" for share in found]


def starts(folder: RunFolder) -> set[int | None]:
    points = folder.run().points()
    results = [folder.trial_result(point, repeat) for point in points for repeat in (1, 2)]
    assert all(result and result.failed is None for result in results)
    return {result.start for result in results if result}


def test_engines_share_a_gpu_and_are_started_once(reader: Reader) -> None:
    command = run(reader)
    folder = command.folder
    assert shares(reader) == ["0.37", "0.37"]
    assert starts(folder) == {None}
    session, residency = folder.session(), folder.residency()
    assert session
    assert session.resident
    assert residency
    assert residency.shares == {"off": 0.37, "on": 0.37}
    assert not residency.in_turn
    assert "off 0.37, on 0.37" in (folder.path / "report.md").read_text()
    run_file = folder.run()  # the flag is the harness's, not the lab's
    assert not any(
        "gpu-memory-utilization" in word for argv in run_file.argv.values() for word in argv
    )
    assert "gpu-memory-utilization" not in str(run_file.lab)
    assert not reader.processes()


def test_engines_whose_idle_neighbours_slow_the_gpu_down_take_turns(reader: Reader) -> None:
    command = run(reader, slower=1.3)
    folder = command.folder
    assert shares(reader) == ["0.37", "0.37", "", "", "", ""]
    assert starts(folder) == {2, 3}
    residency = folder.residency()
    assert residency
    assert "reading took 1.30 times" in residency.in_turn
    assert residency.in_turn in " ".join(command.said.split())  # in lines as wide as the terminal
    assert residency.in_turn in (folder.path / "report.md").read_text()


def test_where_an_engine_does_not_start_beside_another_they_take_turns(reader: Reader) -> None:
    folder = run(reader, first=("--fail-start", "ValueError: no room")).folder
    assert shares(reader) == ["0.37", "0.37", "", "", "", ""]
    assert starts(folder) == {2, 3}
    residency = folder.residency()
    assert residency
    assert "no room" in residency.in_turn
    assert not residency.beside
