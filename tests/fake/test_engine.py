"""The fake engine keeps to its law, counts exactly and speaks as vLLM does.

Counts and the law's own schedule are exact; what the wall clock adds is only bounded generously.
"""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import math
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serving.models.catalog import ROOT
from tests.fake.engine.law import Noise

ENGINE = (sys.executable, "-m", "tests.fake.engine")
FAST = ("--step-s", ".002", "--step-per-seq-s", ".0005", "--prefill-per-token-s", ".0001")
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
Json = dict[str, Any]


class Fake:
    """A running engine and its log."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self.process, self.log = process, log
        lines = iter(process.stderr or ())
        self.port = next(int(line.rsplit(":")[-1]) for line in lines if "Listening" in line)

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)

    def get(self, path: str) -> str:
        with contextlib.closing(self.connect()) as connection:
            connection.request("GET", path)
            return connection.getresponse().read().decode()

    def post(self, path: str, body: Json | str = "") -> tuple[int, Any]:
        """The status, and the answer: JSON, or text where it says that it is."""
        with contextlib.closing(self.connect()) as connection:
            connection.request("POST", path, body if isinstance(body, str) else json.dumps(body))
            answer = connection.getresponse()
            text = answer.read().decode()
            plain = answer.getheader("content-type") == "text/plain"
            return answer.status, text if plain else json.loads(text)

    def stream(self, path: str = CHAT, **body: Any) -> list[tuple[float, Json]]:
        """The events of one stream, each with the time when its line was read."""
        body = {"stream": True, "ignore_eos": True, **_body(path), **body}
        headers = {"X-Request-Id": body["id"]} if "id" in body else {}
        with contextlib.closing(self.connect()) as connection:
            connection.request("POST", path, json.dumps(body), headers)
            return list(_events(connection.getresponse()))

    def metric(self, name: str) -> float:
        pattern = rf"^vllm:{name}\{{.*\}} (.*)$" if "{" not in name else rf"^vllm:{name} (.*)$"
        return sum(float(value) for value in re.findall(pattern, self.get("/metrics"), re.M))

    def stop(self) -> list[Json]:
        """Ends the engine cleanly; its log."""
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(10) == 0
        return self.records()

    def records(self) -> list[Json]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]


def _body(path: str) -> Json:
    prompt: Json = {"messages": [{"role": "user", "content": "one two three"}]}
    usage = {"include_usage": True, "continuous_usage_stats": True}
    return {
        "max_tokens": 6,
        "stream_options": usage,
        **(prompt if path == CHAT else {"prompt": "a b"}),
    }


def _events(answer: http.client.HTTPResponse) -> Iterator[tuple[float, Json]]:
    assert answer.status == 200, answer.read()
    while (line := answer.readline()) != b"data: [DONE]\n":
        assert line, "the stream broke off"
        if line.startswith(b"data: "):
            yield time.monotonic(), json.loads(line[6:])
    assert answer.read() == b"\n"


Start = Callable[..., Fake]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    running: list[subprocess.Popen[str]] = []

    def start(*flags: str) -> Fake:
        log = tmp_path / f"{len(running)}.jsonl"
        command = [*ENGINE, "--port", "0", "--log", str(log), *FAST, *flags]
        running.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT))
        return Fake(running[-1], log)

    yield start
    for process in running:
        process.kill()
        process.communicate()


def _tokens(events: list[tuple[float, Json]]) -> list[int]:
    """Tokens of each content chunk, from the running usage."""
    totals = [event["usage"]["completion_tokens"] for _, event in events if event["choices"]]
    steps = [after - before for before, after in itertools.pairwise([0, *totals])]
    return [step for step in steps if step]


def test_a_stream_has_vllms_shape(start: Start) -> None:
    fake = start("--model", "path", "--served-model-name", "m")
    events = [event for _, event in fake.stream(model="m", id="seven")]
    role, *contents, usage = events
    assert list(role) == ["id", "object", "created", "model", "choices", "usage",
                          "prompt_token_ids", "prompt_text"]  # fmt: skip
    assert (role["id"], role["object"]) == ("chatcmpl-seven", "chat.completion.chunk")
    assert role["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    counts = {"prompt_tokens": 13, "total_tokens": 13, "completion_tokens": 0}
    assert role["usage"] == {**counts, "completion_tokens_details": None}
    assert [chunk["usage"]["completion_tokens"] for chunk in contents] == [1, 2, 3, 4, 5, 6]
    assert [chunk["choices"][0]["finish_reason"] for chunk in contents] == [None] * 5 + ["length"]
    assert usage["choices"] == []
    counts = {"prompt_tokens": 13, "total_tokens": 19, "completion_tokens": 6}
    assert usage["usage"] == counts

    plain = [event for _, event in fake.stream(stream_options=None)]
    assert not any("usage" in event for event in plain)
    assert len(plain) == 7
    text = [event for _, event in fake.stream(TEXT)]
    assert [len(event["choices"]) for event in text] == [1] * 6 + [0]
    assert text[-1]["usage"] == {"prompt_tokens": 2, "total_tokens": 8, "completion_tokens": 6}
    assert text[0]["choices"][0]["text"] == plain[1]["choices"][0]["delta"]["content"]

    status, whole = fake.post(CHAT, _body(CHAT))
    assert status == 200
    assert whole["usage"]["completion_tokens"] == 6
    words = "".join(chunk["choices"][0]["delta"]["content"] for chunk in contents)
    assert whole["choices"][0]["message"]["content"] == words
    assert [(record["index"], record["n_out"]) for record in fake.stop()] == [
        ("seven", 6), ("2", 6), ("3", 6), ("4", 6)]  # fmt: skip


def test_when_a_sequence_ends(start: Start) -> None:
    fake = start("--eos-after", "5")
    for asked, n_out, reason in (
        ({}, 5, "stop"),
        ({"max_tokens": 4}, 4, "length"),
        ({"min_tokens": 8}, 8, "stop"),
        ({"ignore_eos": True}, 20, "length"),
    ):
        _, answer = fake.post(TEXT, {"prompt": "a b c", "max_tokens": 20, **asked})
        assert answer["usage"]["completion_tokens"] == n_out
        assert answer["choices"][0]["finish_reason"] == reason


def test_the_law(start: Start) -> None:
    """Every step lasts what the law says, and chunks leave when they are due or just after."""
    fake = start("--max-num-seqs", "3", "--no-enable-prefix-caching")
    with ThreadPoolExecutor(6) as pool:
        seen = list(pool.map(lambda i: fake.stream(id=str(i), max_tokens=60 + i), range(6)))
    assert [len(_tokens(events)) for events in seen] == [60, 61, 62, 63, 64, 65]
    records = {record["index"]: record for record in fake.stop()}
    lateness = []
    for i, events in enumerate(seen):
        record = records[str(i)]
        assert sum(tokens for _, tokens in record["chunks"]) == record["n_out"] == 60 + i
        steps = list(zip(record["due"], record["batch"], record["prefilled"], strict=True))
        for (before, *_), (due, batch, prefilled) in itertools.pairwise(steps):
            law = 0.002 + 0.0005 * batch + 0.0001 * prefilled
            assert due - before == pytest.approx(law, abs=1e-8)
        assert record["received"] <= record["scheduled"] <= steps[0][0]
        assert steps[0][2] >= record["n_in"] == 13
        assert record["n_cached"] == 0
        lateness += [at - due for (at, _), due in zip(record["chunks"], record["due"], strict=True)]
        received = [at for at, event in events if event["choices"]][1:]
        for (sent, _), at in zip(record["chunks"], received, strict=True):
            assert sent <= at  # one clock: nothing is read before it is sent
    assert max(max(record["batch"]) for record in records.values()) == 3
    by_arrival = sorted(records.values(), key=lambda record: record["received"])
    first = [record["due"][0] for record in by_arrival]
    assert first == sorted(first)  # first come, first served
    assert 0 <= min(lateness) < 0.02  # not the median: beside other work most are late


def _logs(noise: Noise, at_s: Any) -> Any:
    return np.log([noise.factor(at) for at in at_s])


def test_the_machines_speed_varies_from_step_to_step_over_seconds_and_between_starts() -> None:
    steps = np.arange(0, 4000, 0.5)  # seconds
    jitter = _logs(Noise(1, 0.1, 0, 1, 0), steps)
    assert np.std(jitter) == pytest.approx(0.1, rel=0.1)
    assert abs(np.corrcoef(jitter[1:], jitter[:-1])[0, 1]) < 0.1
    drift = _logs(Noise(1, 0, 0.1, 3, 0), steps)
    assert np.std(drift) == pytest.approx(0.1, rel=0.2)
    assert np.corrcoef(drift[6:], drift[:-6])[0, 1] == pytest.approx(math.exp(-1), abs=0.1)
    starts = [_logs(Noise(seed, 0, 0, 1, 0.1), steps[:2]) for seed in range(400)]
    assert np.ptp(starts, axis=1).max() == 0
    assert np.std(starts) == pytest.approx(0.1, rel=0.1)
    for noise in (Noise(1, 0.3, 0, 1, 0), Noise(1, 0, 0.3, 0.5, 0)):
        assert np.mean(np.exp(_logs(noise, steps))) == pytest.approx(1, abs=0.03)
    assert Noise(1, 0, 0, 1, 0).factor(5.0) == 1


def test_metrics_equal_the_log(start: Start) -> None:
    fake = start()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: fake.stream(max_tokens=3 + i), range(8)))
    shown = fake.get("/metrics")
    value = {name: float(text) for name, text in re.findall(r"^vllm:(\S+) (\S+)$", shown, re.M)}
    records, common = fake.stop(), '{engine="0",model_name="fake"}'
    n_out, n_in = (sum(record[key] for record in records) for key in ("n_out", "n_in"))
    gaps = [b[0] - a[0] for record in records for a, b in itertools.pairwise(record["chunks"])]
    ttft = [record["chunks"][0][0] - record["received"] for record in records]
    assert (n_out, n_in) == (52, 104)
    for name, expected in {
        "generation_tokens_total": n_out,
        "prompt_tokens_total": n_in,
        "prefix_cache_queries_total": n_in,
        "prefix_cache_hits_total": 0,  # 13 tokens are less than a block
        "num_requests_running": 0,
        "request_generation_tokens_sum": n_out,
        "request_prompt_tokens_count": 8,
        "inter_token_latency_seconds_count": n_out - 8,
        "inter_token_latency_seconds_sum": sum(gaps),
        "time_to_first_token_seconds_sum": sum(ttft),
        "iteration_tokens_total_sum": n_in + n_out,
        "iteration_tokens_total_count": len({due for record in records for due in record["due"]}),
    }.items():
        assert value[name + common] == pytest.approx(expected), name
    finished = '{engine="0",finished_reason="length",model_name="fake"}'
    assert value["request_success_total" + finished] == 8
    below = '{engine="0",le="10.0",model_name="fake"}'
    assert value["request_generation_tokens_bucket" + below] == 8
    config = {"block_size": "16", "cache_dtype": "auto", "enable_prefix_caching": "True",
              "engine": "0", "kv_cache_memory_bytes": "None", "num_gpu_blocks": "8192",
              "sliding_window": "None"}  # fmt: skip
    labels = ",".join(f'{key}="{text}"' for key, text in config.items())
    assert value[f"cache_config_info{{{labels}}}"] == 1


def test_prefix_cache(start: Start) -> None:
    words = " ".join(str(i) for i in range(40))

    def ask(fake: Fake, text: str) -> None:
        assert fake.post(TEXT, {"prompt": text, "max_tokens": 1})[0] == 200

    fake = start("--enable-prefix-caching")
    for text in (words, words + " more", "other " + words):
        ask(fake, text)
    assert fake.post("/reset_prefix_cache") == (200, {"success": True})
    ask(fake, words)
    assert fake.metric("prefix_cache_hits_total") == 32
    records = fake.stop()
    assert [record["n_cached"] for record in records] == [0, 32, 0, 0]
    assert [record["prefilled"] for record in records] == [[40], [9], [41], [40]]
    off = start("--no-enable-prefix-caching")
    ask(off, words)
    ask(off, words)
    assert off.metric("prefix_cache_queries_total") == off.metric("prefix_cache_hits_total") == 0
    assert 'enable_prefix_caching="False"' in off.get("/metrics")


def test_the_prefix_cache_is_apart_for_each_salt_and_adapter(start: Start) -> None:
    fake = start("--enable-lora", "--lora-modules", "a=/x")
    words = " ".join(str(i) for i in range(40))
    asked: list[Json] = [{}, {}, {"cache_salt": "s"}, {"cache_salt": "s"}, {"model": "a"},
                         {"model": "a"}, {"prompt_logprobs": 2}]  # fmt: skip
    for more in asked:
        assert fake.post(TEXT, {"prompt": words, "max_tokens": 1, **more})[0] == 200
    assert [r["n_cached"] for r in fake.stop()] == [0, 32, 0, 32, 0, 32, 0]


def test_a_long_prompt_comes_in_pieces(start: Start) -> None:
    """100 tokens beside one stream: 7 steps of 15 and what is left; or one step of its own."""
    law = ("--no-enable-prefix-caching", "--step-s", ".02")

    def beside(fake: Fake) -> tuple[Json, Json]:
        with ThreadPoolExecutor(2) as pool:
            pool.submit(fake.stream, TEXT, id="stream", max_tokens=60)
            while not fake.metric("generation_tokens_total"):
                time.sleep(0.002)
            pool.submit(fake.stream, TEXT, id="long", prompt="w " * 100, max_tokens=2)
        found = {record["index"]: record for record in fake.stop()}
        return found["stream"], found["long"]

    stream, long = beside(start(*law, "--max-num-batched-tokens", "16"))
    meanwhile = [p for p in stream["prefilled"][1:] if p]
    assert meanwhile == [15] * 6 + [10]
    assert stream["prefilled"].index(10) == stream["due"].index(long["due"][0])  # its first token
    for flags in (("--no-enable-chunked-prefill",), ("--max-num-batched-tokens", "512")):
        stream, long = beside(start(*law, *flags))
        assert [p for p in stream["prefilled"][1:] if p] == [100]


def test_a_prompt_that_may_not_be_cut_waits_for_room(start: Start) -> None:
    fake = start("--max-num-batched-tokens", "10", "--no-enable-chunked-prefill")
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda i: fake.stream(TEXT, prompt="w " * 6, max_tokens=4), range(3)))
    records = fake.stop()
    assert all(p in (0, 6) for record in records for p in record["prefilled"])
    assert len({record["due"][0] for record in records}) == 3  # two would be 12


def test_a_full_cache_preempts_the_last(start: Start) -> None:
    """Four blocks of 16: two sequences of 20 tokens fit, until the first needs its third block."""
    fake = start(
        *("--num-gpu-blocks-override", "4", "--no-enable-prefix-caching"),
        *("--step-s", ".02"),  # so that the second comes before the first needs a third block
    )
    with ThreadPoolExecutor(2) as pool:
        seen = list(
            pool.map(lambda i: fake.stream(TEXT, prompt="w " * 20, max_tokens=24), range(2))
        )
    assert fake.metric("num_preemptions_total") == 1
    assert [len(_tokens(events)) for events in seen] == [24, 24]  # none is lost
    _, last = sorted(fake.stop(), key=lambda record: record["received"])
    again = [p for p in last["prefilled"][1:] if p > 20]
    assert len(again) == 1  # what it had written is computed with its prompt
    assert max(b - a for a, b in itertools.pairwise(last["due"])) > 5 * 0.02


def test_a_watermark_admits_none_that_would_leave_too_few_blocks_free(start: Start) -> None:
    """Of the same two sequences the second waits for the first: one block of four stays free."""
    fake = start(
        *("--num-gpu-blocks-override", "4", "--no-enable-prefix-caching", "--watermark", "0.25"),
        *("--step-s", ".02"),
    )
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda i: fake.stream(TEXT, prompt="w " * 20, max_tokens=24), range(2)))
    assert fake.metric("num_preemptions_total") == 0
    first, last = sorted(fake.stop(), key=lambda record: record["received"])
    assert last["due"][0] > first["due"][-1]


def test_speculation_counts_as_vllm_does(start: Start) -> None:
    """Every draft of three tokens is accepted up to the first that is not."""
    config = json.dumps({"method": "ngram", "num_speculative_tokens": 3})
    for chance, sizes in (("1", [1, 4, 4, 1]), ("0", [1] * 10)):
        fake = start("--speculative-config", config, "--acceptance", chance)
        assert _tokens(fake.stream(max_tokens=10)) == sizes
        drafts = len(sizes) - 1
        assert fake.metric("spec_decode_num_drafts_total") == drafts
        assert fake.metric("spec_decode_num_draft_tokens_total") == 3 * drafts
        accepted = 3 * drafts if chance == "1" else 0
        assert fake.metric("spec_decode_num_accepted_tokens_total") == accepted
        for position in range(3):
            name = f'spec_decode_num_accepted_tokens_per_pos_total{{.*position="{position}"}}'
            assert fake.metric(name) == accepted / 3
    assert "spec_decode" not in start().get("/metrics")


def test_adapters_wait_for_a_slot(start: Start) -> None:
    adapters = [f"t{i}=/x" for i in range(3)]
    fake = start("--enable-lora", "--lora-modules", *adapters, "--step-s", ".02")
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda i: fake.stream(TEXT, model=f"t{i % 3}", max_tokens=20), range(6)))
    records = fake.stop()
    assert {r["model"] for r in records} == {"t0", "t1", "t2"}
    # a request that comes late may find the slot taken by another adapter again
    for one, other in itertools.combinations(records, 2):
        if one["model"] != other["model"]:
            assert one["due"][-1] <= other["scheduled"] or other["due"][-1] <= one["scheduled"]


def test_programmed(start: Start) -> None:
    fake = start("--programmed", "--slowdown", "2")
    truth = {"ttft_s": 0.03, "gap_s": 0.005, "tokens_per_chunk": 3}
    with ThreadPoolExecutor(4) as pool:
        seen = list(pool.map(lambda _: fake.stream(max_tokens=8, truth=truth), range(4)))
    assert [_tokens(events) for events in seen] == [[3, 3, 2]] * 4
    for record in fake.stop():
        due = [at - record["received"] for at in record["due"]]
        assert due == pytest.approx([0.06, 0.07, 0.08], abs=1e-8)
        late = [at - due for (at, _), due in zip(record["chunks"], record["due"], strict=True)]
        assert min(late) >= 0


def test_a_programmed_stream_may_stand_still_in_the_middle(start: Start) -> None:
    fake = start("--programmed")
    fake.stream(max_tokens=4, truth={"ttft_s": 0.02, "gap_s": 0.01, "stall_s": 0.1})
    (record,) = fake.stop()
    due = [at - record["received"] for at in record["due"]]
    assert due == pytest.approx([0.02, 0.03, 0.14, 0.15], abs=1e-8)


def test_a_client_that_leaves(start: Start) -> None:
    fake = start("--step-s", ".02")
    connection = fake.connect()
    connection.request("POST", CHAT, json.dumps({**_body(CHAT), "stream": True, "max_tokens": 99}))
    answer = connection.getresponse()
    assert answer.readline()
    assert fake.metric("num_requests_running") == 1
    answer.close()
    connection.close()
    until = time.monotonic() + 5
    while fake.metric("num_requests_running") and time.monotonic() < until:
        time.sleep(0.01)
    generated = fake.metric("generation_tokens_total")
    (record,) = fake.stop()
    assert record["finish"] == "abort"
    assert record["n_out"] == generated < 99
