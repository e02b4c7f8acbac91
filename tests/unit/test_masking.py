"""Secrets in settings, variables and addresses."""

from __future__ import annotations

import pwd
import re

import pytest
from typer.testing import CliRunner

from labs import LABS
from labs.harness.cli.cli import app
from serving.engines.base import EngineError
from serving.engines.endpoint import Endpoint
from serving.hardware.machine import engine_variables
from serving.plugins import guard
from serving.processes.masking import MARKS, PATTERN, holds_secret, masked, recordable, tellable

TOKEN = "hf_" + "a1B2" * 8
LAB = next(iter(LABS))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"x {TOKEN} y", "x *** y"),
        ("http://me:pass@host:1/v1", "http://***@host:1/v1"),
        ("http://host/?api_key=abc&x=1", "http://host/?api_key=***&x=1"),
        ("--api-key abc --port 1", "--api-key *** --port 1"),
        ("--hf-token=abc", "--hf-token=***"),
        ("Authorization: Bearer 0123456789012345678901", "Authorization: ***"),
        ("env AWS_SECRET_ACCESS_KEY=abc vllm", "env AWS_SECRET_ACCESS_KEY=*** vllm"),
        ("OPENAI_KEY=abc", "OPENAI_KEY=***"),
        ("HF_TOKEN='a b' vllm", "HF_TOKEN='***' vllm"),
        ('{"api_key": "a, b"}', '{"api_key": "***"}'),
        (r"{\"token\": \"abc\"}", r'{\"token\": \"***"}'),
        ("{'api_key': ['abc', 'd']}", "{'api_key': ['***', 'd']}"),
        ("http://host/v1?key=abc&x=1", "http://host/v1?key=***&x=1"),
        ("--hf-token\nabc\n--port\n1", "--hf-token\n***\n--port\n1"),
        ("password=1234", "password=***"),
        ("passwd: abc", "passwd: ***"),
        ("token: abc", "token: ***"),
    ],
)
def test_a_secret_is_masked_and_the_rest_is_not(text: str, shown: str) -> None:
    assert masked(text) == shown
    assert holds_secret(text)


LONG = "a1B2" * 8
OF_EACH_KIND = [
    f"hf_{LONG}", *(f"gh{kind}_{LONG}" for kind in "pousr"), f"github_pat_{LONG}", f"glsa_{LONG}",
    f"sk-{LONG}", f"AKIA{LONG[:16].upper()}", f"Bearer {LONG}", "-----BEGIN RSA PRIVATE KEY-----",
]  # fmt: skip


@pytest.mark.parametrize("secret", OF_EACH_KIND)
def test_each_kind_of_secret_has_a_mark(secret: str) -> None:
    assert re.search(PATTERN, secret)
    assert any(mark in secret for mark in MARKS)
    assert PATTERN.count("|") + 1 + len("pousr") - 1 == len(OF_EACH_KIND)  # none is left out here


@pytest.mark.parametrize(
    ("home", "shown"),
    [
        ("/home/me", "-o=~/x http://h//y ***"),
        ("/home/me/", "-o=~/x http://h//y ***"),
        ("/", "-o=/home/me/x http://h//y ***"),
        ("", "-o=/home/me/x http://h//y ***"),
        ("/nonexistent", "-o=/home/me/x http://h//y ***"),
    ],
)
def test_the_home_folder_is_not_recorded(
    home: str, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", home)
    assert recordable(f"-o=/home/me/x http://h//y {TOKEN}") == shown


def test_a_user_without_a_home_folder_has_nothing_to_shorten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As in a container whose user has no entry in /etc/passwd."""

    def unknown(_: int) -> object:
        raise KeyError

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    assert recordable("/home/me/x") == "/home/me/x"
    assert engine_variables({"VLLM_X": "/home/me/x"}) == {"VLLM_X": "/home/me/x"}


@pytest.mark.parametrize(
    "text",
    ["max_tokens=64 workloads.fixed.output_tokens.tokens=16", "nsys profile python -m vllm", "0,1",
     "workloads.exponential.output_tokens.mean_tokens=6", "http://127.0.0.1:8000/v1", "",
     "--max-num-batched-tokens 8 --kv-cache-dtype fp8 --tokenizer-mode hf --api-key --port 1",
     "{'max_num_batched_tokens': 8, 'token': 5, \"eos_token\": \"</s>\"}", "monkey=1 keys=a",
     "--return-token-ids --sort-key 3 token=16 key=-1.5, no key: set one, a token that ended",
     "BASELINE: /etc/passwd: no JSON, -v /etc/passwd:/etc/passwd",
     "--key-value x --kv-transfer-config {\"kv_connector\": \"x\"} KeyError: 'a'"],
)  # fmt: skip
def test_what_is_none_stays(text: str) -> None:
    assert masked(text) == text
    assert not holds_secret(text)


def test_a_variables_value_is_masked_whatever_its_name() -> None:
    found = engine_variables(
        {"VLLM_NOTE": f"use {TOKEN}", "VLLM_API_KEY": "x", "OMP_NUM_THREADS": "2"}
    )
    assert found == {"VLLM_NOTE": "use ***", "OMP_NUM_THREADS": "2"}


def test_the_key_is_replaced_wherever_a_server_repeats_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(guard.KEY, "my-key")
    assert tellable("provided: my-key, token=abc") == "provided: ***, token=***"
    monkeypatch.setenv(guard.KEY, "EMPTY")  # as servers without a key are given
    assert tellable("EMPTY or not") == "EMPTY or not"
    monkeypatch.delenv(guard.KEY)
    assert guard.key() not in tellable(f"the engine printed {guard.key()}")


def test_a_setting_with_a_secret_is_refused_and_not_repeated() -> None:
    for option in (("--set", f"title={TOKEN}"), ("--endpoint", "http://me:pass@127.0.0.1:1")):
        result = CliRunner().invoke(app, ["run", LAB, *option])
        assert result.exit_code == 1
        assert TOKEN not in result.output
        assert "me:pass" not in result.output
    with pytest.raises(EngineError, match=r"ENDPOINT=http://\*\*\*@h .* VLLM_API_KEY"):
        Endpoint("http://me:pass@h")
    for address in ("me:pass@h:8000", "http://me:p/pass@h:8000"):
        with pytest.raises(EngineError, match=r"ENDPOINT=\*\*\*@h:8000 ") as refused:
            Endpoint(address)
        assert "pass@" not in str(refused.value)
