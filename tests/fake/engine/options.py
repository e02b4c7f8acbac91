"""The command line: vLLM's flags, the law's, and the faults that tests ask for."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence

Add = Callable[..., argparse.Action]  # `add_argument` of a group


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options. Flags of vLLM that are not listed are named on stderr and ignored."""
    parser = _parser()
    words = []
    for word in argv:  # vLLM takes --max_num_seqs for --max-num-seqs
        flag, equals, value = word.partition("=")
        words.append((flag.replace("_", "-") if flag[:2] == "--" else flag) + equals + value)
    options, unknown = parser.parse_known_args(words)
    if options.drop:
        setattr(options, options.drop, parser.get_default(options.drop))
    if unknown:
        if not unknown[0].startswith("-"):
            parser.error(f"not an option: {unknown[0]}")
        print("Ignored:", *unknown, file=sys.stderr)
    if options.acceptance is None:
        options.acceptance = 0.9 if options.speculative_config.get("method") == "ngram" else 0.6
    options.guesses = int(options.speculative_config.get("num_speculative_tokens", 0))
    for name in ("step_s", "step_per_seq_s", "prefill_per_token_s"):
        if not options.programmed:  # there `slowdown` acts on each request's own times
            setattr(options, name, getattr(options, name) * options.slowdown)
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.fake.engine",
        description="A fake vLLM with a known latency law. It answers as vLLM 0.32 does, takes "
        "vLLM's flags (those it does not know it ignores) and records what it really sent.",
        epilog="Example: python -m tests.fake.engine --port 8000 --step-s .02 --log sent.jsonl",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    _add_flags(parser.add_argument_group("as in vLLM").add_argument)
    _add_law(parser.add_argument_group("the law").add_argument)
    _add_oddities(parser.add_argument_group("odd, but allowed").add_argument)
    _add_faults(parser.add_argument_group("faults").add_argument)
    parser.add_argument_group("the record").add_argument(
        "--log", metavar="FILE", help="a JSON line a request: what was sent, and when"
    )
    return parser


def _add_flags(add: Add) -> None:
    add("--port", type=int, default=8000, help="on 127.0.0.1; 0 takes a free one, see stderr")
    add("--model", default="fake", help="the model's name")
    add("--served-model-name", "--alias", nargs="+",
        help="the names clients use instead of --model")  # fmt: skip
    add("--enable-lora", action="store_true", help="adapters can be loaded and are counted")
    add("--lora-modules", nargs="+", default=[], help="NAME=PATH: adapters, served by name")
    add("--max-loras", type=int, default=1, help="adapters in a batch")
    add("--max-model-len", type=int, default=8192, help="prompt and output together, in tokens")
    add("--max-num-seqs", type=int, default=256, help="the largest batch; other requests wait")
    add("--max-num-queued-reqs", type=int, help="requests that wait or run; more get a 503")
    add("--max-num-queued-tokens", type=int, help="of prompts without a first token; the same")
    add("--scheduling-policy", choices=("fcfs", "priority"), default="fcfs", help="who is next")
    add("--max-num-batched-tokens", type=int, default=8192, help="tokens computed in a step")
    add("--enable-chunked-prefill", action=argparse.BooleanOptionalAction, default=True,
        help="prefill a prompt in pieces where it exceeds what a step has left")  # fmt: skip
    add("--enable-prefix-caching", action=argparse.BooleanOptionalAction, default=True,
        help="keep prompts' full blocks and do not prefill them again")  # fmt: skip
    add("--block-size", type=int, default=16, help="tokens in a block of the KV cache")
    add("--num-gpu-blocks-override", type=int, help="blocks in the KV cache, whatever its memory")
    add("--watermark", type=float, default=0.0,
        help="share of the blocks that stays free where one is admitted beside others")  # fmt: skip
    add("--kv-cache-memory-bytes", type=int, help="where the model has a config.json")
    add("--dtype", default="auto", help="float32 halves the tokens that the KV cache holds")
    add("--kv-cache-dtype", default="auto", help="fp8 and its kin hold twice the tokens")
    add("--hf-overrides", type=json.loads, default={}, help="sliding_window of it: said in the"
        " metrics, and older tokens hold no blocks")  # fmt: skip
    add("--speculative-config", type=json.loads, default={}, help="num_speculative_tokens of it")
    add("--attention-config", type=json.loads, default={}, help="said in the log, and nothing else")
    add("--structured-outputs-config", type=json.loads, default={}, help="backend of it: said in"
        " the log; answers begin as their structure demands, and go on as all others")  # fmt: skip
    add("--async-scheduling", action=argparse.BooleanOptionalAction,
        help="said in the log, and nothing else")  # fmt: skip
    add("--enforce-eager", action=argparse.BooleanOptionalAction, default=False,
        help="said in the log, and nothing else")  # fmt: skip
    add("--load-format", default="auto", help="dummy: it says that it drew random weights")
    add("--seed", type=_seed, default=0, help="of what is random; `any`: another at each start")


def _add_law(add: Add) -> None:
    add("--step-s", type=float, default=0.02, help="length of a step, before what follows")
    add("--step-per-seq-s", type=float, default=0.0005, help="more for each running sequence")
    add("--prefill-per-token-s", type=float, default=0.0001,
        help="more for each prompt token that the step prefills")  # fmt: skip
    add("--tokens-per-chunk", type=int, default=1, metavar="K",
        help="tokens a sequence gets in a step, after its first, as with speculation")  # fmt: skip
    add("--acceptance", type=float, help="chance of each drafted token in turn; where it is not"
        " given, 0.9 of copies (ngram) and 0.6 of others")  # fmt: skip
    add("--jitter", type=float, default=0.0, help="sigma of a lognormal factor (mean 1) on steps")
    add("--drift", type=float, default=0.0, help="of another, which changes over --drift-s")
    add("--drift-s", type=float, default=3.0, metavar="S", help="its correlation time")
    add("--start-spread", type=float, default=0.0, help="of a third, drawn once at the start")
    add("--slowdown", type=float, default=1.0, help="multiplies every time of the law")
    add("--eos-after", type=int, default=128, metavar="N",
        help="a sequence stops by itself after N tokens (not before min_tokens) unless it asks "
        "for ignore_eos; 0: never")  # fmt: skip
    add("--programmed", action="store_true",
        help='no scheduler: each request is answered by its own "truth" (see the package), '
        "every chunk, the first too, of its tokens_per_chunk")  # fmt: skip


def _add_oddities(add: Add) -> None:
    add("--early-role-chunk", action="store_true",
        help="chat's role chunk goes out on arrival, not just before the first token")  # fmt: skip
    add("--sse-comments", action="store_true", help='": ping" lines between the chunks')


def _add_faults(add: Add) -> None:
    add("--fail-start", metavar="MESSAGE", help="a traceback that ends with MESSAGE, and exit 1")
    add("--error-every", type=int, default=0, metavar="N", help="each Nth completion gets a 500")
    add("--error-tokens", type=int, default=0, metavar="N",
        help="a completion that asks for N tokens gets a 500")  # fmt: skip
    add("--stall-after", type=int, default=0, metavar="N",
        help="the scheduler pauses once N tokens were sent in all")  # fmt: skip
    add("--stall-s", type=float, default=1.0, metavar="S", help="for so long")
    add("--silent-at", metavar="PATH", help="what is asked at this path gets no answer")
    add("--drop", metavar="FLAG", type=lambda flag: flag.replace("-", "_"),
        help="one of vLLM's flags, as in max-num-seqs: it never gets here")  # fmt: skip
    add("--die-after", type=int, default=0, metavar="N",
        help="the process exits with 1, in mid-stream, once N tokens were sent in all")  # fmt: skip


def _seed(text: str) -> int | None:
    return None if text == "any" else int(text)
