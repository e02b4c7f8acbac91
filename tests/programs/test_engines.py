"""What an engine's module has to say: here a dummy engine is added, chosen, started and read.

Adding an engine takes one file, of which `Dummy` is an example, and one line in `ENGINES`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml
from pydantic import ValidationError

from dashboards import prometheus
from labs import LABS
from labs.harness.plan.resolve import check_flags, require_devices
from labs.harness.spec.lab import Lab, NotApplicable, Variant, factors
from loadtests.plan import QueueLimits
from serving import metrics
from serving.engines import ENGINES, vllm
from serving.engines.base import Engine, EngineError, Server, Unsupported
from serving.engines.endpoint import Endpoint
from serving.engines.flags import Flags
from serving.hardware.machine import Machine
from serving.models.catalog import Model
from tests.unit import hostile
from tests.unit.builders import CEILINGS, SHAPE, make_lab, make_point

CPU = Machine(kind="cpu", model="Abacus", count=2, memory_bytes=2**34)
PROGRAM = """
import http.server, sys
METRICS = (
    "# TYPE dummy:answers_total counter\\ndummy:answers_total 3.0\\n"
    "# TYPE dummy:first_token_s histogram\\n"
    'dummy:first_token_s_bucket{le="0.1"} 1.0\\ndummy:first_token_s_bucket{le="+Inf"} 3.0\\n'
    "dummy:first_token_s_sum 0.9\\ndummy:first_token_s_count 3.0\\n"
)
PAGES = {"/health": "", "/v1/models": '{"data": [{"id": "abacus"}]}', "/metrics": METRICS}

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(PAGES[self.path].encode())

print("dummy: batches of", sys.argv[3], file=sys.stderr, flush=True)
if sys.argv[3] == "0":
    raise ValueError("nothing to batch")
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


class Dummy(Engine):
    title = "Dummy"
    command = (sys.executable, "-c", PROGRAM)
    metric_names: ClassVar[Mapping[str, str]] = {
        "dummy:answers_total": metrics.REQUESTS,
        "dummy:first_token_s": metrics.TTFT,
    }

    @classmethod
    def server_argv(cls, model: Model, flags: Flags, port: int) -> list[str]:
        return [str(port), *cls.flag_argv(flags)]

    @classmethod
    def check_flags(cls, flag_sets: object) -> None:
        if any(set(flags) != {"batch"} for flags in flag_sets):  # type: ignore[attr-defined]
            raise EngineError("its one flag is --batch")

    @classmethod
    def require_devices(cls, variant: str, flags: Flags, machine: Machine) -> None:
        if machine.kind == "cpu" and flags["batch"] == 64:
            raise Unsupported(f"{variant} needs more beads than a CPU has")

    @classmethod
    def read_log(cls, log: Path) -> dict[str, dict[str, str]]:
        return {metrics.ENGINE_CONFIG: {"batch": log.read_text().split()[3]}}


@pytest.fixture(autouse=True)
def added(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ENGINES, "dummy", Dummy)


def start(log: Path, batch: int = 8) -> Engine:
    model = Model("abacus", log.parent, SHAPE)
    return ENGINES["dummy"]("on", model, {"batch": batch}, kind="cpu", log=log)


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    started = start(tmp_path / "engine.log")
    try:
        started.wait()
        yield started
    finally:
        started.stop()


def test_engines_that_start_together_have_the_same_time_for_it(
    tmp_path: Path, engine: Engine
) -> None:
    """Whichever is waited for first. One that serves by the end of that has not failed."""
    never = [sys.executable, "-c", "import time; time.sleep(60)"]
    model, waited_s = Model("abacus", tmp_path, SHAPE), list[float]()
    engines = [
        Dummy(name, model, {"batch": 8}, kind="cpu", log=tmp_path / name, command=never)
        for name in ("off", "on")
    ]
    try:
        for late in engines:
            waited_s.clear()
            with pytest.raises(EngineError, match=f"{late.name} .* within 1 s"):
                late.wait(waited_s.append, 1.0)
        assert min(waited_s, default=1.0) > 0.1  # seconds since its start, not since this wait
        engine.wait(waited_s.append, 1e-3)
    finally:
        for late in engines:
            late.stop()


def test_an_engine_whose_health_has_no_end_has_its_time_too(engine: Engine) -> None:
    """A limit on silence alone would be met by a byte now and then."""
    with hostile.serving({"/health": hostile.drips}) as url:
        engine.url = url
        with pytest.raises(EngineError, match="within 1 s"):
            engine.wait(timeout_s=1.0)


def test_a_parser_that_is_killed_is_told_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm, "CACHE", tmp_path)
    killed = (sys.executable, "-c", "import os; os.kill(os.getpid(), 9)")
    monkeypatch.setattr(vllm, "PARSING", killed)
    with pytest.raises(EngineError, match="exit code -9"):
        vllm.Vllm.check_flags([{"max-num-seqs": 8}])


def test_the_parser_reads_each_flag_set_once_until_it_has_accepted_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Sequence[Sequence[str]]] = []
    one, two, three, wrong = (vllm.Vllm.flag_argv({"max-num-seqs": n}) for n in (1, 2, 3, -1))

    def parsed(argvs: Sequence[Sequence[str]]) -> dict[str, Any]:
        asked.append(argvs)
        errors = ["no" if argv == wrong else None for argv in argvs]
        return {"options": ["--max-num-seqs"], "errors": errors}

    monkeypatch.setattr(vllm, "CACHE", tmp_path)
    monkeypatch.setattr(vllm, "_parsed", parsed)
    vllm.Vllm.check_flags([{"max-num-seqs": 1}, {"max-num-seqs": 1}])
    vllm.Vllm.check_flags([{"max-num-seqs": n} for n in (2, 1)])
    for _ in range(2):
        with pytest.raises(EngineError, match="a flag: no"):
            vllm.Vllm.check_flags([{"max-num-seqs": n} for n in (-1, 1, 3)])
    vllm.Vllm.check_flags([{"max-num-seqs": n} for n in (1, 2, 3)])
    assert asked == [[one], [two], [wrong, three], [wrong]]


def test_what_another_process_accepts_meanwhile_stays_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Sequence[Sequence[str]]] = []

    def parsed(argvs: Sequence[Sequence[str]]) -> dict[str, Any]:
        asked.append(argvs)
        if len(asked) == 1:
            vllm.Vllm.check_flags([{"max-num-seqs": 2}])
        return {"options": ["--max-num-seqs"], "errors": [None] * len(argvs)}

    monkeypatch.setattr(vllm, "CACHE", tmp_path)
    monkeypatch.setattr(vllm, "_parsed", parsed)
    vllm.Vllm.check_flags([{"max-num-seqs": 1}])
    vllm.Vllm.check_flags([{"max-num-seqs": n} for n in (1, 2)])
    assert len(asked) == 2


@pytest.mark.parametrize("whose", ["started", "endpoint"])
def test_a_new_engine_is_started_and_read_by_the_labs_names(engine: Engine, whose: str) -> None:
    server: Server = engine if whose == "started" else Endpoint(f"{engine.url}/v1")
    assert server.model == "abacus"
    snapshot = server.snapshot()
    assert snapshot
    assert snapshot.values[metrics.REQUESTS] == 3
    assert snapshot.histograms[metrics.TTFT].counts == (1, 3)
    assert snapshot.histograms[metrics.TTFT].sum == 0.9
    shown = {metrics.ENGINE_CONFIG: {"batch": "8"}} if whose == "started" else {}
    assert snapshot.info == shown
    server.reset_prefix_cache()  # which it cannot: nothing happens
    with pytest.raises(EngineError, match="adapters"):
        server.load_adapter("visitor", Path())
    assert server.died() is None


def test_what_its_log_says_after_the_start_is_read_too(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lines(cls: type[Engine], log: Path) -> dict[str, dict[str, str]]:
        return {metrics.ENGINE_CONFIG: {"lines": str(len(log.read_text().splitlines()))}}

    monkeypatch.setattr(Dummy, "read_log", classmethod(lines))
    before = engine.snapshot()
    with engine.log.open("a") as log:
        log.write("a router has asked a strategy\n")
    after = engine.snapshot()
    assert before
    assert after
    counted = [int(at.info[metrics.ENGINE_CONFIG]["lines"]) for at in (before, after)]
    assert counted[1] > counted[0]


def test_why_an_engine_died_is_read_off_its_log(tmp_path: Path) -> None:
    started = start(tmp_path / "engine.log", batch=0)
    with pytest.raises(EngineError, match=r"on .* exit code 1: ValueError"):
        started.wait()
    assert started.snapshot() is None


def test_limits_that_this_vllm_does_not_have_yet_are_the_clients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overload = LABS["overload"].at("cpu", quick=False)
    flags = [a for v in overload.variants for a in vllm.Vllm.flag_argv(overload.flags_of(v))]
    older = {f for f in flags if f.startswith("--") and "queued" not in f}  # before 0.32
    without = [overload.flags_of(v).without_queue_limits() for v in overload.variants]
    accepted = [vllm._digest(vllm.Vllm.flag_argv(flags)) for flags in without]
    known = {"options": sorted(older), "accepted": accepted}
    monkeypatch.setattr(vllm, "CACHE", tmp_path)
    (tmp_path / f"vllm-{vllm.Vllm.version()}-flags.json").write_text(json.dumps(known))
    held = check_flags(overload)
    assert held.digest() != overload.digest()
    points = {p.variant.name: p for p in held.points(SHAPE, CEILINGS)}
    assert points["capped"].client_limits == QueueLimits(requests=11)
    assert points["capped-tokens"].client_limits == QueueLimits(prompt_tokens=72)
    assert points["priority"].client_limits is None
    assert points["narrow"].flags.turns_away
    assert not any("queued" in flag for p in points.values() for flag in p.engine_flags)
    assert all(p.client_limits is None for p in overload.points(SHAPE, CEILINGS))
    with pytest.raises(EngineError, match=r"--max-num-queued-reqs, .*came with"):
        vllm.Vllm.check_flags([overload.flags_of(overload.variants[1])])
    misspelled = make_lab(flags={"max-num-sequences": 4})
    with pytest.raises(EngineError, match="--max-num-seqs"):
        check_flags(misspelled)


def on_dummy(batch: int) -> Lab:
    off = Variant(name="off", engine="dummy", flags={"batch": batch})
    return make_lab(variants=(off, off.but("on", {"batch": 16})), flags={})


def test_a_variant_chooses_its_engine_which_checks_its_flags() -> None:
    assert [v.engine for v in on_dummy(8).variants] == ["dummy", "dummy"]
    check_flags(on_dummy(8))
    require_devices(on_dummy(8), CPU)
    with pytest.raises(NotApplicable, match="beads"):
        require_devices(on_dummy(64), CPU)
    other = on_dummy(8).model_copy(update={"flags": {"max-model-len": 64}})
    check_flags(other)  # those of the lab are vLLM's
    off = Variant(name="off", engine="dummy", flags={"beads": 1})
    with pytest.raises(EngineError, match="its one flag"):
        check_flags(make_lab(variants=(off, off.but("on")), flags={}))
    dummy, vllm_off = on_dummy(8).variants[0], Variant(name="off")
    other_engine, plain = (replace(make_point("off"), variant=v) for v in (dummy, vllm_off))
    assert factors(other_engine, plain) == ["engine"]


def test_an_engine_that_is_not_known_is_refused_with_those_that_are() -> None:
    with pytest.raises(ValidationError, match=r"'dumy': .*dummy\?.* vllm"):
        Variant(name="off", engine="dumy")


def test_the_engine_is_in_a_digest_unless_it_is_the_default() -> None:
    variants = on_dummy(8).resolved()["variants"]
    assert [v["engine"] for v in variants] == ["dummy", "dummy"]
    assert Lab.model_validate({**on_dummy(8).model_dump()}).variants[0].engine == "dummy"
    assert all("engine" not in v for v in LABS["prefix-caching"].resolved()["variants"])


def test_prometheus_calls_its_metrics_by_the_labs_names() -> None:
    jobs = {job["job_name"]: job for job in yaml.safe_load(prometheus.config())["scrape_configs"]}
    drop, *renames = jobs["engine"]["metric_relabel_configs"]
    assert drop["action"] == "drop"
    assert [(r["regex"], r["replacement"]) for r in renames] == [
        (f"{own}(|_bucket|_sum|_count)", f"{name}${{1}}")
        for engine in ENGINES.values()
        for own, name in engine.metric_names.items()
    ]
    assert Dummy in ENGINES.values()
