"""What the probes ask, and what they tell of an honest engine and of faulty ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import Any, Literal

import pytest
import requests

from labs.harness.analysis import probes
from labs.harness.analysis.evaluation import Evaluation, thread_pool
from labs.harness.analysis.probes import COMMON_PROBES, ProbedEngine
from labs.harness.spec.lab import Variant
from labs.multi_lora import probes as multi_lora
from labs.multi_lora.facts import Marks, marks
from labs.prefix_caching.probes import salt
from loadtests.prompts import Writer
from loadtests.workload import Fixed
from serving.engines.base import EngineError, Server
from serving.engines.vllm import Vllm
from serving.metrics import GENERATION_TOKENS, PREFIX_HITS, PREFIX_QUERIES, REQUESTS
from serving.models.adapters import mark_of, marks_in
from tests.unit.answering import Answering, answered_by
from tests.unit.builders import make_lab, make_workload
from tests.unit.test_prompts import words

TENANTS = 3
Fault = Literal["", "wrong adapter", "base for unknown", "old files", "broken"]


class Engine(Answering):
    """Answers as the asked adapter does: with the mark of the tenant whose files it was given."""

    fault: Fault
    owners: dict[str, int]
    bodies: list[dict[str, Any]]

    def do_POST(self) -> None:
        body = self.asked()
        self.bodies.append(body)
        if self.fault == "broken":
            return self.reply({}, 500)
        if self.path == "/v1/load_lora_adapter":
            owner = int(Path(body["lora_path"]).name.removeprefix("tenant-"))
            kept = self.owners if self.fault == "old files" else {}
            self.owners[body["lora_name"]] = kept.get(f"old {body['lora_name']}", owner)
            self.owners.setdefault(f"old {body['lora_name']}", owner)
            return self.reply({})
        if self.path == "/v1/unload_lora_adapter":
            del self.owners[body["lora_name"]]
            return self.reply({})
        assert self.path == "/v1/chat/completions"
        name = body["model"]
        if name not in {*self.owners, "base"} and self.fault != "base for unknown":
            return self.reply({"error": {"message": f"The model `{name}` does not exist."}}, 404)
        mark = mark_of(self.owners[name]) if name in self.owners else ""
        if self.fault == "wrong adapter" and mark == mark_of(1):
            mark = mark_of(2)
        text = f"{mark} so it goes"
        self.reply({"choices": [{"message": {"content": text}}]})

    def do_GET(self) -> None:
        """Each chat looks 40 tokens up and finds 30."""
        assert self.path == "/metrics"
        chats = sum("messages" in body for body in self.bodies)
        self.reply("".join(
            f"# TYPE {name.removesuffix('_total')} counter\n{name}{{model_name=\"base\"}} {n}\n"
            for name, n in (
                (REQUESTS, chats), (GENERATION_TOKENS, 4 * chats),
                (PREFIX_QUERIES, 40 * chats), (PREFIX_HITS, 30 * chats),
            )
        ).encode())  # fmt: skip


class Running(Vllm):
    """A vLLM that no test has started."""

    def __init__(self, url: str) -> None:
        Server.__init__(self, "on", "base", url)
        self.log = Path("/dev/null")
        self._log_bytes, self._log_read = -1, {}


@contextmanager
def serving(fault: Fault = "", max_model_len: int = 512) -> Iterator[ProbedEngine]:
    Engine.fault, Engine.bodies = fault, []
    Engine.owners = {f"tenant-{i}": i for i in range(TENANTS)}
    modules = [f"tenant-{i}=<adapters>/tenant-{i}" for i in range(TENANTS)]
    variant = Variant(name="on", flags={"lora-modules": modules})
    lab = make_lab(
        variants=(variant, Variant(name="off")),
        flags={"max-model-len": max_model_len},
        workloads=(make_workload(prompt_tokens=Fixed(tokens=40)),),
    )
    with answered_by(Engine) as url:
        places = {"adapters": Path("/adapters")}
        yield ProbedEngine(variant, lab, Running(url), places, Writer(words))


def tenants(fault: Fault = "") -> dict[str, Any]:
    with serving(fault) as served:
        return multi_lora.tenants(served, requests_sent=60, at_once=4)


def test_an_honest_engine_answers_each_tenant_as_its_own() -> None:
    found = tenants()
    assert len(found["answers"]) == 60 + found["visits"]
    assert (marks(found["answers"]).foreign, marks(found["answers"]).bare) == (0, 0)
    visits = found["answers"][60:]
    assert sorted({owner for owner, _ in visits}) == [0, 1, 2]
    assert found["refused"] == {"tenant-nobody": 404, "visitor, unloaded": 404}
    assert "does not exist" in found["refusal"]
    assert marks(found["misrouted"]) == Marks(4, 4, 4)  # the check notices what it must
    assert not any(marks_in(text) for text in found["base"])
    chats = [b for b in Engine.bodies if "messages" in b]
    asked = {b["model"] for b in chats}
    assert asked == {"tenant-0", "tenant-1", "tenant-2", "visitor", "tenant-nobody", "base"}
    assert len({str(b["messages"]) for b in chats}) == 16  # prefixes to be mixed up
    assert {b["temperature"] for b in chats} == {0}
    assert found["cached_share"] == 30 / 40


def test_an_answer_from_another_adapter_is_a_leak() -> None:
    found = tenants("wrong adapter")
    foreign, bare = marks(found["answers"]).foreign, marks(found["answers"]).bare
    assert foreign == bare == sum(tenant == 1 for tenant, _ in found["answers"]) > 0


def test_files_that_outlive_their_name_are_a_leak() -> None:
    found = tenants("old files")
    at = len(found["answers"]) - found["visits"]
    assert marks(found["answers"][:at]) == Marks(at, 0, 0)
    assert (
        marks(found["answers"][at:]).foreign == found["visits"] * 2 / 3
    )  # all but the first tenant's


def test_a_base_that_answers_for_an_unknown_adapter_is_told() -> None:
    assert tenants("base for unknown")["refused"] == {
        "tenant-nobody": 200, "visitor, unloaded": 200
    }  # fmt: skip


@pytest.mark.parametrize("probe", [multi_lora.PROBES["tenants-quick"].ask, salt])
def test_a_broken_engine_is_an_error_and_no_finding(probe: Callable[[ProbedEngine], Any]) -> None:
    with serving("broken") as served, pytest.raises((requests.HTTPError, EngineError)):
        probe(served)


def test_a_reader_who_interrupts_waits_for_no_answer() -> None:
    """A probe's hundreds of requests would hold up the end of the run for minutes, and one that the
    engine never answers, too."""
    begun, answered, asked = Event(), Event(), list[Future[bool]]()

    def ask() -> bool:
        begun.set()
        return answered.wait(5)

    def interrupt() -> None:
        with thread_pool(1) as pool:
            asked.extend(pool.submit(ask) for _ in range(2))
            begun.wait()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupt()
    under_way, waiting = asked
    assert not under_way.done()
    assert waiting.cancelled()
    answered.set()


def test_the_stranger_asks_what_the_victim_asked_and_as_much_that_nobody_did() -> None:
    with serving() as served:
        found = salt(served, rounds=3)
    assert {name: len(took) for name, took in found["took_s"].items()} == {
        f"{how}, {state}": 3 for how in ("shared", "salted") for state in ("known", "fresh")
    }
    assert found["prompt_tokens"] == 40
    assert {words(b["messages"]) for b in Engine.bodies} == {40}
    triples = [Engine.bodies[i : i + 3] for i in range(0, len(Engine.bodies), 3)]
    assert len(triples) == 6
    for i, triple in enumerate(triples):
        secret, copy, fresh = (str(b["messages"]) for b in triple)
        assert secret == copy != fresh
        salts = [b.get("cache_salt") for b in triple]
        assert salts == (["victim", "stranger", "stranger"] if i % 2 else [None] * 3)
    prompts = {str(b["messages"]) for b in Engine.bodies}
    assert len(prompts) == 12  # nothing of an earlier round is found by a later one


def test_quality_is_asked_twice_of_the_first_variant_and_of_lengths_that_fit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[dict[str, Any]] = []

    def evaluate(url: str, model: str, **settings: Any) -> Evaluation:
        asked.append(settings)
        return Evaluation(model=model, passages=(), needles=(), tasks=(), took_s=0)

    monkeypatch.setattr(probes, "evaluate", evaluate)
    with serving(max_model_len=700) as served:
        off = ProbedEngine(served.lab.variants[1], served.lab, served.engine, {}, served.writer)
        assert len(COMMON_PROBES["quality"].ask(served)["answers"]) == 2
        assert len(COMMON_PROBES["quality-quick"].ask(off)["answers"]) == 1
    assert [s["quick"] for s in asked] == [False, False, True]
    assert [s["lengths_tokens"] for s in asked] == [[256, 512]] * 3  # 1,024 and room do not fit
    assert {s["seeds"] for s in asked} == {6}  # twelve texts at any number of lengths
