"""One request: sent over a connection, and its stream of answers parsed into records.

An answer is kept as it came, with the time of each piece, and parsed when the load leaves time.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping
from http.client import HTTPException
from typing import Any

import orjson

from loadtests import records
from loadtests.connection import Connection, EndlessAnswer, Lines, Pieces, lines_of
from loadtests.load import Ended, Load, Turn, now
from loadtests.plan import TrialPlan
from loadtests.records import RequestRecord

PATH = "/v1/chat/completions"
HEADERS = {"Content-Type": "application/json", "Accept": "text/event-stream"}
KEY = os.environ.get("VLLM_API_KEY", "")
"""That the engine, or an endpoint, asks for; it may send it back."""
if KEY:
    HEADERS["Authorization"] = f"Bearer {KEY}"
REASONING = ("reasoning", "reasoning_content")
"""What servers call the text of a delta that comes before the answer; vLLM's name is the first."""
LEAST_KEY = 6  # characters; a shorter key, such as EMPTY, is a word that texts may hold
CONNECTION_TIMEOUT_S = 10.0
MOST_ERROR = 300  # characters that are recorded of an error
SEARCHED = 4096  # characters of an error that are searched for other secrets than the key


def without_key(text: str) -> str:
    """Replace the key by `***` in what a server has said."""
    return text.replace(KEY, "***") if len(KEY) >= LEAST_KEY else text


def recordable(error: str, plan: TrialPlan) -> str:
    """Return an error without secrets, and not too long."""
    searched = without_key(error)[:SEARCHED]
    if plan.secrets:
        searched = re.sub(plan.secrets, r"\g<name>***", searched)
    return searched[:MOST_ERROR]


def connect(load: Load) -> Connection:
    """Open a connection to the engine before the load, so that no request pays for it."""
    connection = Connection(load.plan.url, PATH, HEADERS, CONNECTION_TIMEOUT_S, load.plan.timeout_s)
    with contextlib.suppress(Exception):  # the first request will say what is wrong
        connection.open("/health")
    return connection


def stream(connection: Connection, turn: Turn, load: Load) -> Ended:
    """Send one request and read its answer, unless the client's own limits turn it away."""
    request, admission = turn.request, load.admission
    if admission and (refusal := admission.refusal(request)):
        at = now()
        return Ended(turn, [], at, at, refusal, False)
    admitted = admission.admit(request) if admission else None
    pieces: Pieces = [] if admitted is None else admitted
    error, connection_failed = None, False
    load.in_flight += 1
    if request.adapter:
        load.adapters[request.adapter] += 1
    most_s = load.plan.longest_s(request.output_tokens)
    sent = now()
    try:
        connection.ask(request.body.encode(), pieces, most_s, load.most_bytes)
    except EndlessAnswer as failure:
        error = recordable(str(failure), load.plan)
    except TimeoutError as failure:  # a busy server is silent, too
        error = recordable(f"TimeoutError: {failure}", load.plan)
    except Exception as failure:  # any failure of the network is recorded with the request
        error = recordable(f"{type(failure).__name__}: {failure}", load.plan)
        connection_failed = True
    end = now() if error or not pieces else pieces[-1][0]
    load.in_flight -= 1
    if admitted is not None:
        admitted.end()
    if request.adapter:
        load.adapters[request.adapter] -= 1
    return Ended(turn, pieces, sent, end, error, connection_failed)


def read(ended: Ended) -> tuple[Lines, str | None]:
    """Parse an answer as HTTP; return its lines, and an error or None."""
    try:
        status, lines = lines_of(ended.pieces)
    except HTTPException as failure:
        return [], ended.error or f"{type(failure).__name__}: {failure}"
    if ended.error or status == 200:
        return lines, ended.error
    text = b"\n".join(line for _, line in lines).decode(errors="replace")
    return lines, f"HTTP {status}: {text}"


def records_of(ended: Ended, load: Load) -> list[RequestRecord]:
    """Parse a request's answer; return a record for each answer that it asked for."""
    lines, error = read(ended)
    choices = ended.turn.request.choices
    several = choices > 1
    parts, odd = by_choice(lines, choices) if several else ([lines], None)
    times = (ended.sent_s, lines[0][0] if lines else None, ended.end_s)
    return [
        record_of(ended.turn, load, times, part, error or odd, choice)
        for part, choice in zip(parts, range(len(parts)) if several else [None], strict=True)
    ]


def record_of(
    turn: Turn,
    load: Load,
    times: tuple[float, float | None, float],
    lines: Lines,
    error: str | None,
    choice: int | None,
) -> RequestRecord:
    """Make the record of an answer from its lines; `times` are of the send, first byte and end."""
    t0 = load.t0
    sent, first_byte, end = times
    chunks, prompt_tokens, output_tokens, complaint = (
        tokens_of(lines, t0, turn.request.output_tokens) if lines else ([],) + (None,) * 3
    )
    keep = load.plan.keep_text and chunks and not complaint
    model = model_of(lines) if chunks and not complaint else None
    error = error or complaint
    if len(chunks) > (most := records.most_chunks(turn.request.output_tokens)):
        error = error or f"more than {most} chunks with tokens"
        del chunks[most:]
    if error is None and not chunks:
        error = "the stream ended without a token"
    return RequestRecord(
        index=turn.request.index,
        asked_tokens=turn.request.output_tokens,
        scheduled_s=turn.due_s,
        sent_s=round(sent - t0, 6),
        chunks=records.Chunks(chunks),
        end_s=round(end - t0, 6),
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        in_window=turn.counts,
        error=None if error is None else recordable(error, load.plan),
        first_byte_s=None if first_byte is None else round(first_byte - t0, 6),
        text=without_key(text_of(lines)) if keep else None,
        model=None if model is None else without_key(load.plan.model_names.get(model, model)),
        choice=choice,
        alike_tokens=turn.request.alike_tokens,
        first_answer_s=answer_begins_s(lines, t0) if chunks and not complaint else None,
    )


def by_choice(lines: Lines, choices: int) -> tuple[list[Lines], str | None]:
    """Part a stream of several answers by the index in each event; return a complaint or None.

    What names no answer, such as an error, is every answer's. The last usage counts the tokens of
    all of them together, and has to agree with theirs; it is left out of the parts.
    """
    parts: list[Lines] = [[] for _ in range(choices)]
    places = {index: index for index in range(choices)}
    newest = [0] * choices  # tokens of each answer, by its own usage
    total: int | None = None
    complaint: str | None = None
    for at, line in lines:
        index = None
        try:
            event = orjson.loads(line[5:]) if line.startswith(b"data:") else {}
            usage, event_choices = event.get("usage"), event.get("choices")
            if event_choices:
                (index,) = {places[choice["index"]] for choice in event_choices}
                count = usage["completion_tokens"] if usage else None
                newest[index] = count if type(count) is int else newest[index]
            elif usage:
                total = usage["completion_tokens"]
                continue
        except (ValueError, TypeError, KeyError, AttributeError):
            if line[5:].strip() != b"[DONE]":
                complaint = f"not an event of one of {choices} answers: {begin(line)}"
        for part in parts if index is None else [parts[index]]:
            part.append((at, line))
    if complaint is None and total is not None and total != sum(newest):
        complaint = f"the usage counts {total} tokens, and {sum(newest)} answer by answer"
    return parts, complaint


def tokens_of(
    lines: Lines, t0: float, asked_tokens: int
) -> tuple[list[tuple[float, int]], int | None, int | None, str | None]:
    """Parse server-sent events, each with the time at which it was read.

    Returns the chunks that carry tokens, the prompt tokens, the output tokens, and a complaint or
    None. A chunk's tokens are the increase of the usage in it. Where a server sends usage only at
    the end, each chunk with text, of reasoning too, counts as one token; the sums are compared
    later. A usage that is no count, falls, or is beyond twice what was asked for is a complaint.
    """
    chunks: list[tuple[float, int]] = []
    prompt_tokens = output_tokens = complaint = None
    counted = reported = 0
    most_tokens = 2 * asked_tokens
    for at, line in lines:
        data = line[5:]
        if not line.startswith(b"data:") or (len(data) < 20 and data.strip() == b"[DONE]"):
            continue
        try:
            event = orjson.loads(data)
            if (error := event.get("error")) is not None:
                complaint = complaint_of(error)
            if usage := event.get("usage"):
                prompt, output = usage["prompt_tokens"], usage["completion_tokens"]
                if type(output) is not int or not reported <= output <= most_tokens:
                    return chunks, None, None, f"not a usage: {without_key(str(usage))[:80]}"
                if prompt != prompt_tokens:
                    if type(prompt) is not int or prompt < 0:
                        return chunks, None, None, f"not a usage: {without_key(str(usage))[:80]}"
                    prompt_tokens = prompt
                output_tokens = reported = output
                tokens = output_tokens - counted if event.get("choices") else 0
            else:
                choices = event.get("choices") or [{}]
                delta = choices[0].get("delta") or {}
                tokens = 1 if delta.get("content") or reasoning_of(delta) else 0
        except (ValueError, TypeError, KeyError, AttributeError):
            return chunks, prompt_tokens, output_tokens, f"not a completion event: {begin(line)}"
        if tokens > 0:
            counted += tokens
            chunks.append((int((at - t0) * 1e6 + 0.5) / 1e6, tokens))  # as round(), in less time
    return chunks, prompt_tokens, output_tokens, complaint


def reasoning_of(delta: Mapping[str, Any]) -> Any:
    """Return the text of a delta that is reasoning; None or empty where there is none."""
    return next(filter(None, map(delta.get, REASONING)), None)


def answer_begins_s(lines: Lines, t0: float) -> float | None:
    """Return when the first text of the answer came, in an event stream without complaint.

    None where no reasoning was sent, or nothing after it.
    """
    if not any(b'"reasoning' in line for _, line in lines):  # as in nearly all streams
        return None
    reasons, begins_s = False, None
    for at, line in lines:
        for delta in deltas_of(line):
            reasons = reasons or bool(reasoning_of(delta))
            if begins_s is None and delta.get("content"):
                begins_s = round(at - t0, 6)
    return begins_s if reasons else None


def begin(line: bytes) -> str:
    """Return the beginning of a line for a complaint."""
    return repr(without_key(line.decode(errors="replace"))[:80])


def complaint_of(error: Any) -> str:
    """Word an error that came within a stream.

    vLLM checks the limits on its queue before it answers, and once more when its answer has begun:
    then what it turns away has a status of 200, and says its own in the stream.
    """
    code = error.get("code") if isinstance(error, dict) else None
    turned_away = next((name for name in records.TURNED_AWAY if name == f"HTTP {code}"), "")
    return f"{turned_away}{': ' * bool(turned_away)}{error}"


def text_of(lines: Lines) -> str:
    """Extract the answer from an event stream that `tokens_of` read without complaint."""
    return "".join(delta.get("content") or "" for _, line in lines for delta in deltas_of(line))


def deltas_of(line: bytes) -> list[Mapping[str, Any]]:
    """List what an event adds to each of its answers; nothing where the line is no event."""
    data = line[5:].strip()
    if not line.startswith(b"data:") or not data.startswith(b"{"):
        return []
    choices = orjson.loads(data).get("choices")
    found = choices if isinstance(choices, list) else []
    deltas = [choice.get("delta") for choice in found if isinstance(choice, dict)]
    return [delta for delta in deltas if isinstance(delta, dict)]


def model_of(lines: Lines) -> str | None:
    """Read the name of the model that answered, from the first event of a stream that was read."""
    first = next((e for _, line in lines if (e := line[5:].strip()).startswith(b"{")), b"{}")
    name = orjson.loads(first).get("model")
    return None if name is None else str(name)
