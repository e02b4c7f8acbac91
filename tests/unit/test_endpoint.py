"""An endpoint that the labs cannot use is told at once, in one sentence."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from serving.engines import endpoint
from serving.engines.base import EngineError, metrics_text
from serving.engines.endpoint import Endpoint
from tests.unit import hostile
from tests.unit.hostile import Send, says, whole

MODELS = says(whole('{"data": [{"id": "abacus-1"}]}'))
STREAMS = says(hostile.STREAM + hostile.EVENT + b"data: [DONE]\n\n")


def told(models: Callable[[Send], object], completion: Callable[[Send], object] = STREAMS) -> str:
    """What is said of a server with these answers; empty where nothing is wrong."""
    with hostile.serving({"/v1/models": models, "/v1/chat/completions": completion}) as url:
        try:
            Endpoint(url).require_stream()
        except EngineError as error:
            return str(error).replace(url, "<url>")
    return ""


def test_a_server_that_streams_is_driven() -> None:
    assert told(MODELS) == ""


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (whole("", "302 Found", more="Location: https://x\r\n"), "redirects /v1/models to https:"),
        (whole("", "401 Unauthorized"), "answers /v1/models with HTTP 401"),
        (whole("<html>", kind="text/html"), "names no model at /v1/models, but answers '<html>'"),
        (whole("[" * 100_000), "names no model at /v1/models"),
        (whole('["a", "b"]'), "names no model at /v1/models"),
        (whole('{"data": []}'), "names no model at /v1/models"),
        (whole('{"data": [{"id": null}]}'), "names no model at /v1/models"),
        (whole('{"data": {"0": 1}}'), "names no model at /v1/models"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_an_odd_list_of_models_is_told(answer: bytes, words: str) -> None:
    sentence = told(says(answer))
    assert sentence.startswith("ENDPOINT=<url> ")
    assert words in sentence


@pytest.mark.parametrize(
    ("completion", "words"),
    [
        (says(whole("", "308 Moved", more="Location: /v2\r\n")), "redirects /v1/chat/completions"),
        (says(whole("no such path", "404 Not Found")), "with HTTP 404: no such path; correct"),
        (says(whole('{"choices": [{"message": {}}]}')), "does not stream: its answer to the first"),
        (says(hostile.STREAM + b"data: 5\n\ndata: [[\n\ndata: {}\n\n"), "does not stream"),
        (hostile.drips, "/v1/chat/completions (EndlessAnswer: the answer has no end within"),
        (hostile.repeats(b"data: x\n"), "(EndlessAnswer: the answer has more than 1048576 bytes)"),
    ],
    ids=["redirect", "404", "whole", "no events", "drips", "endless"],
)  # fmt: skip
def test_what_is_no_stream_of_tokens_is_told_at_the_first_request(
    monkeypatch: pytest.MonkeyPatch, completion: Callable[[Send], object], words: str
) -> None:
    monkeypatch.setattr(endpoint, "FIRST_ANSWER_TIMEOUT_S", 0.5)
    sentence = told(MODELS, completion)
    assert sentence.startswith("ENDPOINT=<url> ")
    assert words in sentence


def test_endless_metrics_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.engines.base.METRICS_TIMEOUT_S", 0.3)
    with hostile.serving({"/metrics": hostile.drips}) as url:
        assert metrics_text(url) is None
