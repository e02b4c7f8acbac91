"""vLLM's answers to a completion: the events of a stream, the whole answer, and errors.

What is streamed is put together as text, because building and dumping objects for every chunk
would hold the loop ten times as long; it is all ASCII, so characters are bytes.
"""

from __future__ import annotations

import json
import math
import time
from http import HTTPStatus
from typing import Any
from zlib import crc32

from orjson import dumps

from tests.fake.engine.request import Request

VERSION = "0.32.0"
FINGERPRINT = f'"system_fingerprint":"vllm-{VERSION}-fake"'
WORDS = " the", " quick", " brown", " fox", " jumps", " over", " a", " lazy", " dog", "."
PING = "8\r\n: ping\n\n\r\n"
DONE = "e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"


class Refused(Exception):
    """An error to answer with, in OpenAI's shape."""

    def __init__(self, status: HTTPStatus, kind: str, message: str, param: str | None = None):
        self.status = status
        error = {"message": message, "type": kind, "param": param, "code": int(status)}
        self.answer = {"error": error}


def head(index: str, model: str, chat: bool, stream: bool) -> str:
    """The JSON that every answer to a request starts with, up to its first choice."""
    kind = ("chat.completion" + ".chunk" * stream) if chat else "text_completion"
    name = ("chatcmpl-" if chat else "cmpl-") + index
    fields = {"id": name, "object": kind, "created": int(time.time()), "model": model}
    return json.dumps(fields, separators=(",", ":"))[:-1] + ',"choices":['


def role_frame(request: Request) -> str:
    """Chat's first chunk: a role and no token."""
    delta = '"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null'
    rest = f'{_usage_so_far(request)},"prompt_token_ids":null,"prompt_text":null'
    return _frame(request, f'{{"index":{request.choice},{delta}}}', rest)


def content_frame(request: Request, tokens: int, reason: str) -> str:
    """A chunk of the last `tokens` tokens of what was sent; `reason` is why it is the last one."""
    if request.chat and request.continuous and not reason and request.sent > tokens:
        return _middle_frame(request, tokens)
    finish = f'"finish_reason":"{reason}"' if reason else '"finish_reason":null'
    if request.chat:
        delta = f'"delta":{{"content":"{_text(request, tokens)}"}}'
        ids = '"stop_reason":null,"token_ids":null' if reason else '"token_ids":null'
    else:
        delta = f'"text":"{_text(request, tokens)}"'
        ids = '"stop_reason":null,"prompt_token_ids":null,"token_ids":null'
    rest = f",{FINGERPRINT}" if reason and not request.usage else _usage_so_far(request)
    choice = f'"index":{request.choice},{delta},"logprobs":null,{finish},{ids}'
    return _frame(request, f"{{{choice}}}", rest)


def _middle_frame(request: Request, tokens: int) -> str:
    """The same as the general way, in less time, for the chunks between first and last."""
    if not request.middle:
        prompt = len(request.prompt)
        request.middle = (
            f'data: {request.head}{{"index":{request.choice},"delta":{{"content":"',
            '"},"logprobs":null,"finish_reason":null,"token_ids":null}],'
            f'"usage":{{"prompt_tokens":{prompt},"total_tokens":',
        )
    before, after = request.middle
    sent = request.sent
    event = (
        f"{before}{_text(request, tokens)}{after}{len(request.prompt) + sent},"
        f'"completion_tokens":{sent},"completion_tokens_details":null}}}}\n\n'
    )
    return f"{len(event):x}\r\n{event}\r\n"


def closing_frames(request: Request) -> str:
    """What follows the last chunk: the usage where it was asked for, and the stream's end."""
    usage = _frame(request, "", f"{_usage_of_all(request)},{FINGERPRINT}") if request.usage else ""
    return usage + DONE


def whole(request: Request) -> bytes:
    """The answers to a request that does not stream."""
    choices = ",".join(_whole_choice(member) for member in request.family or [request])
    details = ',"prompt_tokens_details":null,"completion_tokens_details":null'
    rest = f'"service_tier":null,{FINGERPRINT}{_usage_of_all(request, details)}'
    return f"{request.head}{choices}],{rest}}}".encode()


def _whole_choice(request: Request) -> str:
    text = _text(request, request.sent)
    if request.chat:
        answer = f'"message":{{"role":"assistant","content":"{text}","refusal":null}}'
    else:
        answer = f'"text":"{text}"'
    own = dumps(_logprobs(request)).decode() if request.logprobs else "null"
    choice = f'{answer},"logprobs":{own},"finish_reason":"{request.finish}","stop_reason":null'
    if request.top is not None:
        ids = [crc32(str(token).encode()) % 50_000 for token in request.prompt]
        known = dumps([None, *(_prompt_logprobs(token, request.top) for token in ids[1:])])
        choice += f',"prompt_logprobs":{known.decode()},"prompt_token_ids":{dumps(ids).decode()}'
    return f'{{"index":{request.choice},{choice}}}'


def _frame(request: Request, choice: str, rest: str) -> str:
    """One server-sent event as one HTTP chunk."""
    event = f"data: {request.head}{choice}]{rest}}}\n\n"
    return f"{len(event):x}\r\n{event}\r\n"


def _usage(request: Request, details: str = "", sent: int | None = None) -> str:
    sent = request.sent if sent is None else sent
    counts = (
        f'"prompt_tokens":{len(request.prompt)},"total_tokens":{len(request.prompt) + sent},'
        f'"completion_tokens":{sent}'
    )
    return f',"usage":{{{counts}{details}}}'


def _usage_of_all(request: Request, details: str = "") -> str:
    """The usage of all answers to one HTTP request together."""
    return _usage(request, details, sum(member.sent for member in request.family or [request]))


def _usage_so_far(request: Request) -> str:
    details = ',"completion_tokens_details":null' if request.chat else ""
    return _usage(request, details) if request.continuous else ""


def _text(request: Request, tokens: int) -> str:
    """The last `tokens` tokens of what was sent."""
    if tokens == 1 and request.sent > 1:
        return WORDS[(request.sent - 1) % len(WORDS)]
    words = [WORDS[i % len(WORDS)] for i in range(request.sent - tokens, request.sent)]
    if request.sent == tokens and request.mark:
        words[0] = json.dumps(request.mark)[1:-1]
    return "".join(words)


def _logprobs(request: Request) -> dict[str, Any]:
    """Those of an answer's tokens, told by their ids: one has 0.5, the next best 0.4.

    Each third is tied, and another of the two is taken where the answer ever shared a step.
    """
    shared = any(step.batch > 1 for step in request.steps)
    taken, known = [], []
    for at in range(request.sent):
        tie = at % 3 == 2
        order = (2 * at + 1, 2 * at) if tie and shared else (2 * at, 2 * at + 1)
        shares = (0.45, 0.45) if tie else (0.5, 0.4)
        taken.append(f"token_id:{order[0]}")
        known.append({f"token_id:{i}": math.log(s) for i, s in zip(order, shares, strict=True)})
    logprobs = [of[token] for token, of in zip(taken, known, strict=True)]
    return {"tokens": taken, "token_logprobs": logprobs, "top_logprobs": known}


def _prompt_logprobs(token: int, top: int) -> dict[str, dict[str, Any]]:
    """The top of a position: the token itself has a probability of a half, others share."""
    ids = [token, *(50_000 + i for i in range((top or 1) - 1))]
    shares = [0.5, *(0.4 / 2**i for i in range(1, len(ids)))]
    return {
        str(i): {"logprob": math.log(share), "rank": rank, "decoded_token": "w"}
        for rank, (i, share) in enumerate(zip(ids, shares, strict=True), start=1)
    }
