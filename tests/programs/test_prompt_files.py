"""The files of what trials send, written here or side by side in processes."""

import contextlib
import math
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from labs import LABS
from labs.harness.running import prompt_files
from labs.harness.running.prompt_files import lab_takes_s, processes_for, takes_s, write_files
from labs.harness.spec import LabError
from loadtests.arrivals import Concurrent
from loadtests.prompts import Messages, Writer
from loadtests.workload import Fixed, Prefix, Samples, Workload
from loadtests.writing import Order
from serving.weights.models import BUNDLED, CACHE, ROOT

MODEL = CACHE / "models" / BUNDLED


def test_processes_are_started_where_the_time_is_made_up_for() -> None:
    start_s = prompt_files.START_S
    assert processes_for([], cores=16) == 1
    assert processes_for([100 * start_s], cores=16) == 1  # a file is written by one process
    assert processes_for([start_s] * 3, cores=1) == 1
    assert processes_for([start_s] * 2, cores=2) == 1
    assert processes_for([0.01 * start_s] * 60, cores=2) == 1
    assert processes_for([start_s] * 6, cores=2) == 2
    assert processes_for([start_s] * 6, cores=16) == 6
    assert processes_for([start_s] * 60, cores=16) == 16
    assert takes_s([start_s] * 2, cores=2) == 2 * start_s
    assert takes_s([start_s] * 6, cores=2) == 4 * start_s
    assert takes_s([9 * start_s, *[start_s] * 7], cores=16) == 10 * start_s


@pytest.fixture(scope="module")
def writer() -> Writer:
    if not (MODEL / "config.json").exists():
        pytest.skip("the bundled model is not converted yet (`make setup` does it)")
    return Writer.of(str(MODEL))


@pytest.mark.usefixtures("writer")
def test_counting_tokens_imports_no_torch() -> None:
    """Every run counts tokens, and importing torch takes seconds."""
    program = (
        "import sys; from loadtests.prompts import counter;"
        f" counter({str(MODEL)!r}); sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


@pytest.fixture
def side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have two processes write, however little it is."""
    monkeypatch.setattr(prompt_files, "START_S", -math.inf)
    monkeypatch.setattr(prompt_files, "usable_cores", lambda: 2)


def workload(name: str, tokens: int, **fields: object) -> Workload:
    made = {"prompt_tokens": Fixed(tokens=tokens), "output_tokens": Fixed(tokens=4), **fields}
    return Workload.model_validate({"name": name, "loads": (Concurrent(users=1),), **made})


def order(of: Workload, seed: int, folder: Path) -> Order:
    path = folder / f"{of.name}-{seed}.jsonl"
    return Order(workload=of, requests=6, seed=seed, model="m", path=path)


def test_an_orders_time_is_that_of_its_prompts(tmp_path: Path) -> None:
    apart = order(workload("once", 750), 1, tmp_path)
    assert apart.takes_s == pytest.approx(6 * 1000 / 2e6)
    sampled = order(workload("many", 750, samples=Samples(count=3)), 1, tmp_path)
    assert sampled.takes_s == pytest.approx(2 * 1000 / 2e6)


def test_a_labs_prompts_take_their_time_by_the_cores() -> None:
    lab = LABS["weight-quantization"].at("gpu-80", quick=False, dummy=True)
    prompts = lab.repeats * 4096 * (128 + 250 + 2048 + 250)  # two workloads
    assert lab_takes_s(lab, cores=1) == pytest.approx(prompts / 2e6)
    longest_s = 4096 * (2048 + 250) / 2e6
    assert lab_takes_s(lab, cores=16) == pytest.approx(prompt_files.START_S + longest_s)


def written(writer: Writer, folder: Path) -> dict[str, bytes]:
    works = (workload("short", 60), workload("shared", 300, prefix=Prefix(tokens=200, groups=2)))
    orders = [order(of, seed, folder) for of in works for seed in (1, 2)]
    there: list[str] = []
    write_files(orders, writer, MODEL, lambda o: there.append(o.path.name))
    assert sorted(there) == sorted(o.path.name for o in orders)
    return {o.path.name: o.path.read_bytes() for o in orders}


def test_files_are_the_same_side_by_side(
    writer: Writer, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    here = written(writer, tmp_path / "here")
    request.getfixturevalue("side_by_side")
    assert written(writer, tmp_path / "there") == here
    assert len(set(here.values())) == 4


def refusals(writer: Writer, folder: Path) -> tuple[str, int | None]:
    """Return how a workload that cannot be written, and a folder that cannot be made, are told."""
    folder.mkdir()
    orders = [order(workload("short", 3), seed, folder) for seed in (1, 2)]
    with pytest.raises(LabError) as refused:
        write_files(orders, writer, MODEL, lambda _: None)
    (folder / "file").write_text("")
    orders = [order(workload("long", 60), seed, folder / "file") for seed in (1, 2)]
    with pytest.raises(OSError, match="file") as failed:
        write_files(orders, writer, MODEL, lambda _: None)
    return str(refused.value), failed.value.errno


def words(messages: Messages) -> int:
    return 5 + sum(len(m["content"].split()) for m in messages)


PYTHON = f"""#!{sys.executable}
import sys
sys.path.insert(0, {str(ROOT)!r})
from loadtests.prompts import Writer
from loadtests.writing import take_orders

def words(messages):
    return 5 + sum(len(m["content"].split()) for m in messages)

for done in take_orders(sys.stdin, Writer(words)):
    print(done.model_dump_json(), flush=True)
"""
"""Stands in for Python, whatever module it is to run: it takes orders and counts words."""


def test_errors_are_told_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Whatever the tokenizer, which takes each process seconds to load."""
    here = refusals(Writer(words), tmp_path / "here")
    assert here[0].startswith("workload short: prompt_tokens=3 ")
    request.getfixturevalue("side_by_side")
    (python := tmp_path / "python").write_text(PYTHON)
    python.chmod(0o755)
    monkeypatch.setattr(prompt_files, "sys", SimpleNamespace(executable=str(python)))
    assert refusals(Writer(words), tmp_path / "there") == here


@pytest.mark.usefixtures("side_by_side")
def test_a_process_that_ends_is_told_with_its_last_line(writer: Writer, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    orders = [order(workload("long", 60), seed, tmp_path) for seed in (1, 2)]
    with pytest.raises(LabError, match="char 1"):
        write_files(orders, writer, tmp_path, lambda _: None)


PROGRAM = """
import sys
from pathlib import Path
from labs.harness.running import prompt_files
from tests.programs.test_prompt_files import MODEL, order, workload
prompt_files.START_S, prompt_files.usable_cores = -1e9, lambda: 2
long = workload("long", 20_000)
orders = [order(long, n, Path(sys.argv[1])).model_copy(update={"requests": 9999}) for n in (1, 2)]
prompt_files.write_files(orders, None, MODEL, lambda _: None)
"""
"""It writes nothing itself, and so needs no writer."""


@pytest.mark.usefixtures("writer")
@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGKILL])
def test_the_processes_end_with_the_one_that_started_them(
    sign: signal.Signals, tmp_path: Path
) -> None:
    argv = [sys.executable, "-c", PROGRAM, str(tmp_path)]

    def as_at_a_terminal() -> None:
        """A shell's background job ignores SIGINT, and its children inherit that."""
        signal.signal(signal.SIGINT, signal.default_int_handler)

    with subprocess.Popen(
        argv, cwd=ROOT, stderr=subprocess.DEVNULL, preexec_fn=as_at_a_terminal
    ) as parent:
        family: list[psutil.Process] = []
        deadline = time.monotonic() + 60
        while len(family) < 4 and time.monotonic() < deadline:  # two, each under its guard
            time.sleep(0.1)
            with contextlib.suppress(psutil.NoSuchProcess):
                family = psutil.Process(parent.pid).children(recursive=True)
        parent.send_signal(sign)
        parent.wait(30)
    assert len(family) >= 4
    gone, alive = psutil.wait_procs(family, timeout=30)
    assert not alive, gone
