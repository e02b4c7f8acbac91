"""An endpoint that the labs cannot use is told at once, in one sentence."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dashboards import prometheus
from labs import LABS
from labs.harness.cli.cli import app
from labs.harness.cli.terminal import ConsoleProgress
from labs.harness.plan.resolve import RunRequest, measured_ceilings, resolve, scale_of
from labs.harness.spec.lab import LabError
from labs.harness.storage.recorded import MachineFile
from labs.harness.storage.writing import write_json
from serving import metrics
from serving.engines import endpoint
from serving.engines.base import EngineError, metrics_text
from serving.engines.endpoint import Endpoint
from serving.hardware.machine import Ceilings, Machine
from serving.models import catalog
from serving.plugins import guard
from tests.cases import each
from tests.unit import hostile
from tests.unit.hostile import Send, says, whole
from tests.unit.test_other_engines import Told

MODELS = says(whole('{"data": [{"id": "abacus-1"}]}'))
STREAMS = says(hostile.STREAM + hostile.EVENT + b"data: [DONE]\n\n")


def told(listing: Callable[[Send], object], completion: Callable[[Send], object] = STREAMS) -> str:
    """What is said of a server with these answers; empty where nothing is wrong."""
    with hostile.serving({"/v1/models": listing, "/v1/chat/completions": completion}) as url:
        try:
            Endpoint(url).require_stream()
        except EngineError as error:
            return str(error).replace(url, "<url>")
    return ""


def test_a_server_that_streams_is_driven() -> None:
    assert told(MODELS) == ""


@each(
    ("answer", "words"),
    [
        (whole("", "302 Found", more="Location: https://x\r\n"), "redirects"),
        (whole("", "401 Unauthorized"), "HTTP 401"),
        (whole("<html>", kind="text/html"), "'<html>'"),
        (whole("[" * 100_000), "no model"),
        (whole('["a", "b"]'), "no model"),
        (whole('{"data": []}'), "no model"),
        (whole('{"data": [{"id": null}]}'), "no model"),
        (whole('{"data": {"0": 1}}'), "no model"),
    ],
)
def test_an_odd_list_of_models_is_told(answer: bytes, words: str) -> None:
    sentence = told(says(answer))
    assert sentence.startswith("ENDPOINT=<url> ")
    assert "/v1/models" in sentence
    assert words in sentence


@each(
    ("address", "words"),
    [
        ("http://127.0.0.1:{unused}", "nothing listens there"),
        ("https://127.0.0.1:{unused}/v1", "nothing listens there"),
        ("http://nowhere.invalid", "no machine of that name"),
        ("127.0.0.1:8000", "it is no address such as http://"),
        ("http://127.0.0.1:99999", "it is no address such as http://"),
        ("nowhere", "it is no address such as http://"),
    ],
)
def test_why_nothing_answers_at_an_address_is_told_in_words(address: str, words: str) -> None:
    times = ["--from", "2026-11-28T10:15", "--to", "2026-11-28T10:25"]
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        given = address.format(unused=silent.getsockname()[1])
        for call in (["--endpoint", given], ["--prometheus-url", given, *times]):
            done = CliRunner().invoke(app, ["diagnose", *call])
            assert done.exit_code == 1
            assert words in done.stderr
            assert "correct the address" in done.stderr
            assert "Error" not in done.stderr
            assert len(done.stderr.splitlines()) == 1


def test_what_a_server_repeats_of_the_key_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(guard.KEY, "my-key")
    refusal = whole("Incorrect API key provided: my-key", "401 Unauthorized")
    moved = whole("", "302 Found", more="Location: http://x/?of=my-key\r\n")
    for sentence in (told(says(refusal)), told(MODELS, says(refusal)), told(says(moved))):
        assert "***" in sentence
        assert "my-key" not in sentence


@pytest.mark.parametrize("name", ["my-key", "a/my-key-b", "hf_" + "a1B2" * 8])
def test_a_model_whose_name_would_put_the_key_on_file_is_refused(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(guard.KEY, "my-key")
    sentence = told(says(whole(f'{{"data": [{{"id": "{name}"}}]}}')))
    assert "a key" in sentence
    assert name not in sentence


def test_metrics_are_read_without_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(guard.KEY, "my-key")
    with hostile.serving({**replica(block="my-key"), "/v1/models": MODELS}) as url:
        snapshot = Endpoint(url).snapshot()
    assert snapshot
    assert snapshot.info[metrics.CACHE_CONFIG] == {"block_size": "***"}


@pytest.mark.parametrize(
    ("completion", "words"),
    [
        (says(whole("", "308 Moved", more="Location: /v2\r\n")), "redirects /v1/chat/completions"),
        (says(whole("no such path", "404 Not Found")), "HTTP 404: no such path"),
        (says(whole('{"choices": [{"message": {}}]}')), "not stream"),
        (says(hostile.STREAM + b"data: 5\n\ndata: [[\n\ndata: {}\n\n"), "not stream"),
        (hostile.drips, "the answer has no end"),
        (hostile.repeats(b"data: x\n"), "1048576 bytes"),
    ],
    ids=["redirect", "404", "whole", "no events", "drips", "endless"],
)
def test_what_is_no_stream_of_tokens_is_told_at_the_first_request(
    monkeypatch: pytest.MonkeyPatch, completion: Callable[[Send], object], words: str
) -> None:
    if completion is hostile.drips:
        monkeypatch.setattr(endpoint, "FIRST_ANSWER_TIMEOUT_S", 0.5)
    sentence = told(MODELS, completion)
    assert sentence.startswith("ENDPOINT=<url> ")
    assert words in sentence


def test_endless_metrics_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.engines.base.METRICS_TIMEOUT_S", 0.3)
    with hostile.serving({"/metrics": hostile.drips}) as url:
        assert metrics_text(url) is None


@each(
    ("url", "host", "scheme", "path"),
    [
        ("127.0.0.1:9111", "127.0.0.1:9111", "http", "/metrics"),
        ("http://a:8000/openai", "a:8000", "http", "/openai/metrics"),
        ("https://a/openai/", "a", "https", "/openai/metrics"),
    ],
)
def test_prometheus_scrapes_where_metrics_are_read(
    url: str, host: str, scheme: str, path: str
) -> None:
    assert prometheus.target(url, {"lab": "l"}) == {
        "targets": [host],
        "labels": {"lab": "l", "__scheme__": scheme, "__metrics_path__": path},
    }


# ------------------------------------------------------------------------- replicas behind a router


def replica(
    requests: int = 1, *, model: str = "abacus-1", version: str = "1", block: int | str = 16,
    bound: str = "0.1", usage: float = 0.5,
) -> dict[str, Callable[[Send], object]]:  # fmt: skip
    """An engine that has answered so many requests, with one more that runs."""
    shown = f"""\
# TYPE vllm:request_success counter
vllm:request_success_total{{engine="0"}} {requests}
# TYPE vllm:generation_tokens counter
vllm:generation_tokens_total {10 * requests}
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running 1
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{{engine="0"}} {usage}
vllm:kv_cache_usage_perc{{engine="1"}} 0.25
# TYPE vllm:cache_config_info gauge
vllm:cache_config_info{{block_size="{block}"}} 1
# TYPE vllm:time_to_first_token_seconds histogram
vllm:time_to_first_token_seconds_bucket{{le="{bound}"}} {requests}
vllm:time_to_first_token_seconds_bucket{{le="+Inf"}} {requests}
vllm:time_to_first_token_seconds_sum {0.05 * requests}
vllm:time_to_first_token_seconds_count {requests}
"""
    return {
        "/v1/models": says(whole(f'{{"data": [{{"id": "other"}}, {{"id": "{model}"}}]}}')),
        "/metrics": says(whole(shown, kind="text/plain")),
        "/version": says(whole(f'{{"version": "{version}"}}')),
        "/reset_prefix_cache": says(whole("")),
    }


@contextmanager
def routed(*replicas: dict[str, Callable[[Send], object]]) -> Iterator[tuple[str, list[str]]]:
    """A router that shows no metrics of its own, and the replicas behind it."""
    with ExitStack() as servers:
        router = servers.enter_context(hostile.serving({"/v1/models": MODELS}))
        yield router, [servers.enter_context(hostile.serving(each)) for each in replicas]


def test_what_replicas_count_is_added_up() -> None:
    with routed(replica(3), replica(4, usage=0.75)) as (router, addresses):
        first, second = addresses
        server = Endpoint(router, [f"{first}/metrics", f"{second}/v1/"])
        assert server.replicas == addresses
        reading = server.snapshot()
    assert reading
    assert reading.values[metrics.REQUESTS] == 7
    assert reading.values[metrics.GENERATION_TOKENS] == 70
    assert reading.values[metrics.RUNNING] == 2
    assert reading.values[metrics.KV_USAGE] == 0.75
    assert reading.histograms[metrics.TTFT].counts == (7, 7)
    assert reading.histograms[metrics.TTFT].mean() == pytest.approx(0.05)


def test_of_replicas_one_of_which_is_gone_nothing_is_counted() -> None:
    with routed(replica()) as (router, [first]):
        with hostile.serving(replica()) as second:
            server = Endpoint(router, [first, second])
            assert server.snapshot()
        assert server.snapshot() is None


def test_prefixes_are_forgotten_by_each_replica(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    with routed(replica(), replica()) as (router, addresses):
        server = Endpoint(router, addresses)
        monkeypatch.setattr(endpoint, "ask", lambda _, url, **rest: asked.append(url))
        server.reset_prefix_cache()
    assert asked == [f"{each}/reset_prefix_cache" for each in addresses]


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (replica(model="counting"), "other, counting,.* ENDPOINT=<router>"),
        (replica(version="2"), "<first> .* version 1, .*<second> has 2"),
        (replica(block=32), "<first> .* block_size 16, .*<second> has 32"),
        (replica(bound="0.2"), "buckets "),
        ({"/v1/models": MODELS}, "ENDPOINT_METRICS=<second> .* metrics"),
        ({}, "ENDPOINT_METRICS=<second> .*/v1/models"),
        (None, "ENDPOINT_METRICS .*twice"),
    ],
    ids=["model", "version", "block", "buckets", "no metrics", "unreachable", "twice"],
)
def test_replicas_that_do_not_agree_are_told(
    other: dict[str, Callable[[Send], object]] | None, words: str
) -> None:
    with routed(replica(), other or {}) as (router, [first, second]):
        named = [first, second if other is not None else f"{first}/"]
        with pytest.raises(EngineError) as told:
            Endpoint(router, named)
    sentence = str(told.value)
    for address, name in ((router, "<router>"), (first, "<first>"), (second, "<second>")):
        sentence = sentence.replace(address, name)
    assert re.search(words, sentence)


def test_a_key_in_the_address_of_a_replica_is_not_repeated() -> None:
    with routed() as (router, _), pytest.raises(EngineError, match="ENDPOINT_METRICS=") as told:
        Endpoint(router, ["http://me:secret@replica"])
    assert "secret" not in str(told.value)


def test_replicas_without_an_endpoint_are_told() -> None:
    request = RunRequest(LABS["continuous-batching"], replicas=("http://a",))
    with pytest.raises(LabError, match=r"ENDPOINT_METRICS .* ENDPOINT"):
        resolve(request, ConsoleProgress())


def test_an_endpoint_is_taken_for_bf16_whatever_this_cpu_has() -> None:
    old = Machine(kind="cpu", model="Abacus", count=2, memory_bytes=2**34, cpu_flags=("avx2",))
    lab = LABS["continuous-batching"]
    assert scale_of(RunRequest(lab), old) == catalog.CPU_FP32
    assert scale_of(RunRequest(lab, endpoint="http://127.0.0.1:8000"), old) == "cpu"
    assert scale_of(RunRequest(lab, scale="gpu-80"), old) == "gpu-80"


def test_predictions_take_the_rate_of_what_is_served(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    old = Machine(kind="cpu", model="Abacus", count=2, memory_bytes=2**34, cpu_flags=("avx2",))
    both = Ceilings(
        memory_bandwidth_bytes_per_s=1e10, bf16_flops_per_s=1e9, fp32_flops_per_s=9e10,
        threads=1, torch="-", measured_at="-",
    )  # fmt: skip
    monkeypatch.setattr("labs.harness.plan.resolve.machines.detect", lambda: old)
    monkeypatch.setattr("labs.harness.plan.resolve.RESULTS", tmp_path)
    write_json(tmp_path / old.slug / "machine.json", MachineFile(machine=old, ceilings=both))
    lab, told = LABS["continuous-batching"], Told()
    assert measured_ceilings(old, True, told).flops_per_s == 9e10
    with hostile.serving({"/v1/models": MODELS, "/v1/chat/completions": STREAMS}) as url:
        setup = resolve(RunRequest(lab, quick=True, endpoint=url), told)
    assert {point.ceilings.flops_per_s for point in setup.points} == {1e9}
    # an endpoint may compute in any type, and on another machine
    assert not any(message.startswith("Note: ") for message in told.messages)
