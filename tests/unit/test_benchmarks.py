"""Other tools' command lines, and the labs that play them."""

from __future__ import annotations

import ast
import importlib.util
import json
import random
import subprocess
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from labs.harness.cli.cli import app
from labs.harness.plan import benchmarks
from labs.harness.plan.benchmarks import Translated, translate
from labs.harness.plan.command_lines import TABLE, NotTranslatedError, note, serve_flags
from labs.harness.spec.lab import LabError
from loadtests.trace import TraceRow
from serving.engines import vllm
from serving.hardware.gpus import short_names
from serving.models.dummy import SHAPES
from tests import with_vllm
from tests.cases import each

VLLM, GUIDE, AIPERF = "vllm bench serve", "guidellm benchmark", "aiperf profile"
PARSERS = ("serve.py", "datasets/datasets.py", "datasets/utils.py")


def loads(translated: Translated) -> list[str]:
    return [str(load) for w in translated.lab.workloads for load in w.loads]


def trace(translated: Translated) -> Sequence[TraceRow]:
    return translated.lab.workloads[0].trace


@pytest.mark.parametrize(
    ("command", "sent", "requests", "lengths"),
    [
        # from vLLM's documentation of its benchmarks
        (f"{VLLM} --backend vllm --model NousResearch/Hermes-3-Llama-3.1-8B --endpoint"
         " /v1/completions --dataset-name random --num-prompts 10", ["waves:10"], 10, (1024, 128)),
        (f"{VLLM} --model m --dataset-name random --random-input-len=1024 --random-output-len 16"
         " --max-concurrency 4 --num_prompts 80 --request-rate inf --ignore-eos --save-result",
         ["concurrent:4"], 80, (1024, 16)),
        (f"{VLLM} --model m --input-len 64 --output-len 8 --num-prompts 30 --request-rate 2"
         " --max-concurrency 6 --metadata v=1 gpu=x", ["capped:1/6"], 30, (64, 8)),
        (f"{VLLM} --model m --dataset-name prefix_repetition --num-prompts 25"
         " --prefix-repetition-prefix-len 512 --prefix-repetition-suffix-len 128"
         " --prefix-repetition-num-prefixes 5 --prefix-repetition-output-len 32",
         ["waves:25"], 25, (640, 32)),
        (f"{VLLM} --model m --num-prompts 3 --max-concurrency 8", ["concurrent:3"], 3, (1024, 128)),
        # from GuideLLM's, before 0.7 and since
        (f'{GUIDE} --target "http://localhost:8000" --profile constant --rate 10 --max-seconds 20'
         ' --data "prompt_tokens=128,output_tokens=256"', ["capped:1/200"], 200, (128, 256)),
        (f"{GUIDE} run --rate-type concurrent --rate 1,4 --rate 8 --max-requests 12 --data"
         " '{\"prompt_tokens\": 64, \"output_tokens\": 16}'",
         ["concurrent:1", "concurrent:4", "concurrent:8"], 12, (64, 16)),
        ("guidellm run --backend kind=openai_http,target=http://localhost:8000,model=m --data"
         " kind=synthetic_text,prompt_tokens=256,output_tokens=128 --profile"
         " kind=poisson,rate=16,max_concurrency=32 --constraint kind=max_requests,count=40"
         " --seed kind=static,value=7", ["capped:1/32"], 40, (256, 128)),
        (f"{GUIDE} --profile synchronous --max-requests 4 --data prompt_tokens=9,output_tokens=2",
         ["concurrent:1"], 4, (9, 2)),
        # from AIPerf's
        (f"{AIPERF} --model m --url localhost:8000 --endpoint-type chat --streaming --concurrency"
         " 10 --request-count 100 --synthetic-input-tokens-mean 300 --output-tokens-mean 50",
         ["concurrent:10"], 100, (300, 50)),
        (f"{AIPERF} -m m --request-rate 5.0 --arrival-pattern constant --benchmark-duration 6"
         " --osl 7", ["capped:1/30"], 30, (550, 7)),
        (f"{AIPERF} --model m --concurrency 3 --osl 7 --shared-system-prompt-length 50",
         ["concurrent:3"], 10, (600, 7)),
    ],
)  # fmt: skip
def test_a_command_becomes_its_load(
    command: str, sent: list[str], requests: int, lengths: tuple[int, int]
) -> None:
    translated = translate(command)
    assert loads(translated) == sent
    assert [len(w.trace) for w in translated.lab.workloads] == [requests] * len(sent)
    assert all(row[1:] == lengths for w in translated.lab.workloads for row in w.trace)
    assert translated.lab.requests == requests
    assert translated.lab.warmup_s == 0
    assert translated.lab.timeout_s == 6 * 3600  # as vLLM's benchmark waits


def test_a_shared_prefix_is_shared_here_too() -> None:
    first = translate(f"{VLLM} --num-prompts 4 --random-input-len 10 --random-prefix-len 90")
    prefix = first.lab.workloads[0].prefix
    assert prefix
    assert (prefix.tokens, prefix.groups) == (90, 1)
    assert trace(first)[0][1:] == (100, 128)
    pool = translate(f"{AIPERF} --osl 3 --num-prefix-prompts 6 --prefix-prompt-length 40")
    prefix = pool.lab.workloads[0].prefix
    assert prefix
    assert (prefix.tokens, prefix.groups) == (40, 6)


def test_other_tools_lengths_and_times_have_their_distributions() -> None:
    around = trace(translate(f"{AIPERF} --osl 200 --osl-stddev 20 --concurrency 9"
                             " --request-count 4000"))  # fmt: skip
    outputs = [row[2] for row in around]
    assert (fmean(outputs), stdev(outputs)) == pytest.approx((200, 20), rel=0.05)
    data = "prompt_tokens=50,prompt_tokens_min=40,prompt_tokens_max=60,output_tokens=5"
    even = trace(translate(f"{GUIDE} --profile poisson --rate 8 --max-requests 4000 --data {data}"))
    assert {row[1] for row in even} == {*range(40, 61)}
    gaps_s = np.diff([row[0] for row in even])
    assert (gaps_s.mean(), gaps_s.std()) == pytest.approx((1 / 8, 1 / 8), rel=0.06)


def test_users_go_on_for_a_time_where_no_number_is_given() -> None:
    timed = translate(f"{GUIDE} --rate-type concurrent --rate 2 --max-seconds 30 --data"
                      " prompt_tokens=8,output_tokens=2").lab  # fmt: skip
    assert timed.window_s == 30
    counted = translate(f"{GUIDE} --rate-type concurrent --rate 2 --max-requests 5 --data"
                        " prompt_tokens=8,output_tokens=2").lab  # fmt: skip
    assert counted.window_s > 1000  # it ends with its requests


@each(("command", "named"), [
    (f"{VLLM} --num-promts 3", "--num-prompts"),
    (f"{GUIDE} --profil constant", "--profile"),
    (f"{AIPERF} --concurency 3", "--concurrency"),
    (f"{GUIDE} --max-requests 3 --data prompt_tokens=3,output_token=4", "output_tokens"),
    (f"{VLLM} --num-prompts 0", "--num-prompts 0"),
    (f"{VLLM} --request-rate -1", "--request-rate -1"),
    (f"{VLLM} --request-rate nan", "--request-rate nan"),
    (f"{VLLM} --max-concurrency 2.5", "--max-concurrency 2.5"),
    (f"{VLLM} --random-range-ratio 1", "--random-range-ratio 1"),
    (f"{VLLM} --num-prompts", "--num-prompts"),
    (f"{VLLM} --max-concurrency $C", r"\$C"),
    (f"{VLLM} --model m; rm -rf x", "m;"),
    (f"{VLLM} 'open", "quot"),
    (f"{AIPERF} --osl 4 --request-rate 2 --arrival-pattern burst", "gamma"),
])  # fmt: skip
def test_what_is_unknown_or_impossible_is_an_error(command: str, named: str) -> None:
    with pytest.raises(LabError, match=named) as refused:
        translate(command)
    assert refused.value.exit_code == 1


@each(("command", "named"), [
    (f"{VLLM} --dataset-name sharegpt --dataset-path x.json", "sharegpt"),
    (f"{VLLM} --dataset-name mine", "mine"),
    (f"{VLLM} --num-prompts 2000", "--max-concurrency 1024"),
    (f"{VLLM} --ramp-up-strategy linear --ramp-up-start-rps 1 --ramp-up-end-rps 2", "--ramp-up"),
    (f"{GUIDE} --data prompt_tokens=1,output_tokens=2 --max-requests 3", "sweep"),
    (f"{GUIDE} --profile synchronous --max-requests 3 --data org/dataset", "org/dataset"),
    (f"{GUIDE} --profile synchronous --data prompt_tokens=1,output_tokens=2", "--max-requests"),
    (f"{GUIDE} --profile constant --max-requests 3 --data prompt_tokens=1,output_tokens=2",
     "--rate"),
    (f"{GUIDE} --profile constant --rate 9 --max-seconds 1e9"
     " --data prompt_tokens=1,output_tokens=2", "9,000,000,000"),
    (f"{VLLM} --num-prompts 9000000 --request-rate 1", "9,000,000 requests"),
    (f"{AIPERF} --concurrency 2", "--output-tokens-mean"),
    (f"{AIPERF} --osl 3 --input-file trace.jsonl", "trace.jsonl"),
    (f"{AIPERF} --osl 3 --endpoint-type embeddings", "embeddings"),
    ("genai-bench benchmark", "genai-bench"),
])  # fmt: skip
def test_a_load_that_cannot_be_played_here_is_refused(command: str, named: str) -> None:
    with pytest.raises(NotTranslatedError, match=named) as refused:
        translate(command)
    assert refused.value.exit_code == 2


def test_what_is_left_out_is_named_once_and_what_is_off_is_not() -> None:
    notes = translate(f"{VLLM} --num-warmups 5 --temperature 0 --top-p 0.9 --host h").notes
    begun = [line.partition(":")[0] for line in notes]
    assert begun.count("--num-warmups") == begun.count("--top-p") == 1
    assert "--temperature" not in begun
    assert any(line.endswith("--host.") for line in notes)


@pytest.mark.usefixtures("_vllm_is_there")
def test_a_secret_of_the_command_is_not_recorded() -> None:
    secret = "hf_" + "a1B2" * 8
    translated = translate(
        f"{AIPERF} --osl 3 --api-key {secret}", f"vllm serve m --api-key {secret}"
    )
    assert secret not in json.dumps([*translated.recorded.values(), *translated.notes])


# ------------------------------------------------------------------------------ the engine's line


@pytest.fixture
def _vllm_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """What reads an engine's line is forked from a process that has imported vLLM."""
    vllm_source()
    monkeypatch.setattr(vllm, "PARSING", with_vllm.python("serving.plugins.parsing"))


@pytest.mark.usefixtures("_vllm_is_there")
def test_the_engines_flags_are_the_variants() -> None:
    model, flags, notes = serve_flags(
        "vllm serve --enforce-eager org/model -tp 2 --max-model-len 8k --max_num_seqs=16"
        " --no-enable-prefix-caching --port 1 --trust-remote-code --compilation-config"
        " '{\"mode\": 0}'"
    )
    assert model == "org/model"
    assert flags == {
        "enforce-eager": True, "tensor-parallel-size": 2, "max-model-len": 8000, "max-num-seqs": 16,
        "enable-prefix-caching": False, "compilation-config": {"mode": 0},
    }  # fmt: skip
    assert any(line.startswith("--trust-remote-code") for line in notes)
    variant = translate(f"{VLLM} --model other", "vllm serve org/model -tp 2")
    assert variant.model == "org/model"
    assert variant.lab.variants[0].flags == {"tensor-parallel-size": 2}


@each(("line", "flags"), [
    ("--trust-remote-code org/model", {}),
    ("--enable-auto-tool-choice --swap-space 4 --disable-log-requests org/model", {}),
    ("org/model --max-model-len -1", {"max-model-len": -1}),
    ("--max-model-len auto --model org/model", {"max-model-len": -1}),
    ("--async-scheduling org/model --max-num-batched-tokens=1K",
     {"async-scheduling": True, "max-num-batched-tokens": 1024}),
    ("--compilation-config.mode 0 -O2 org/model",
     {"optimization-level": 2, "compilation-config": {"mode": 0}}),
    ("--cudagraph-capture-sizes 1 2 4 --model org/model", {"cudagraph-capture-sizes": [1, 2, 4]}),
    # not imported, and not read
    ("org/model --compilation-config '{\"pass_config\": {\"fuse\": \"os.abort\"}}'",
     {"compilation-config": {"pass_config": {"fuse": "os.abort"}}}),
    ("org/model --config /dev/zero", {"config": "/dev/zero"}),
])  # fmt: skip
@pytest.mark.usefixtures("_vllm_is_there")
def test_a_line_is_read_as_vllm_reads_it(line: str, flags: dict[str, Any]) -> None:
    model, found, _ = serve_flags(f"vllm serve {line}")
    assert (model, found) == ("org/model", flags)


@each("serve", [
    "vllm run m", "sglang serve m", "vllm serve a b", "vllm serve $MODEL", "vllm serve m --help",
    "vllm serve m --max-num-sequences 3", "vllm serve m --max-model-len",
])  # fmt: skip
@pytest.mark.usefixtures("_vllm_is_there")
def test_another_line_is_refused(serve: str) -> None:
    with pytest.raises(LabError, match=r"SERVE|begins"):
        serve_flags(serve)


# ------------------------------------------------------------ against the vLLM that is installed


def vllm_source() -> Path:
    found = importlib.util.find_spec("vllm")
    if found is None or found.origin is None:
        pytest.skip("vLLM is not installed")
    return Path(found.origin).parent / "benchmarks"


def parsed_sources() -> Iterable[ast.AST]:
    for name in PARSERS:
        yield from ast.walk(ast.parse((vllm_source() / name).read_text()))


def test_every_option_of_vllms_parser_is_known() -> None:
    calls = [n for n in parsed_sources() if isinstance(n, ast.Call)]
    options = {
        arg.value
        for call in calls
        if getattr(call.func, "attr", "") == "add_argument"
        for arg in call.args
        if isinstance(arg, ast.Constant) and str(arg.value).startswith("--")
    }
    table = TABLE["vllm bench serve"]
    known = " ".join([*table["used"].values(), *table["untranslated"], table["unused"]["options"]])
    assert options - {*known.replace(",", " ").split()} == set()
    assert len(options) > 80


RUN_BY_VLLM = """
import asyncio, contextlib, json, shlex, sys, types
from vllm.benchmarks import serve
from vllm.utils.argparse_utils import FlexibleArgumentParser

class Words:  # a tokenizer by which each token is a word
    vocab_size, all_special_ids = 5000, [0, 1]
    def num_special_tokens_to_add(self): return 0
    def decode(self, tokens): return " ".join(map(str, tokens))
    def encode(self, text, add_special_tokens=False): return [*map(int, text.split())]

class Listed(Exception): pass

async def as_they_are(base_url, model, requests, ssl_context): return requests

async def listed(*, input_requests, request_rate, burstiness, ignore_eos, **others):
    slept, sent = [0.0], []
    async def sleep(seconds): slept.append(seconds)
    serve.asyncio = types.SimpleNamespace(sleep=sleep)
    serve.time = types.SimpleNamespace(time=float)
    async for request, _ in serve.get_request(input_requests, request_rate, burstiness):
        lengths = request.prompt_len, request.expected_output_len
        sent.append([slept[-1], *lengths, request.prompt])
    raise Listed(sent, bool(ignore_eos))

serve._align_prompts_to_server_tokenizer, serve.benchmark = as_they_are, listed
serve.get_tokenizer = lambda *_, **__: Words()
parser, found = FlexibleArgumentParser(), []
serve.add_cli_args(parser)
for command in json.load(sys.stdin):
    with contextlib.redirect_stdout(sys.stderr):
        try:
            asyncio.run(serve.main_async(parser.parse_args(shlex.split(command)[3:])))
        except Listed as ended:
            found.append(ended.args)
print(json.dumps(found))
"""
REPEATED = (
    f"{VLLM} --model m --dataset-name prefix_repetition --prefix-repetition-num-prefixes 7"
    " --prefix-repetition-prefix-len 12 --prefix-repetition-suffix-len 5 --num-prompts 50"
)
RUN_BY_BOTH = (
    f"{VLLM} --model m --num-prompts 50 --seed 11 --random-input-len 200 --random-output-len 40"
    " --random-range-ratio 0.4 --request-rate 4",
    f"{VLLM} --model m --num-prompts 40 --seed 5 --request-rate 4 --burstiness 0.3 --input-len 9"
    """ --output-len 30 --random-range-ratio '{"input": 0.3, "output": 0.5}'""",
    f"{VLLM} --model m --num-prompts 20 --request-rate 9 --burstiness inf --random-prefix-len 30",
    f"{VLLM} --model m --num-prompts 9 --random-prefix-len 30 --random-input-len 0",
    f"{VLLM} --model m --num-prompts 30 --random-prefix-len 30 --random-input-len 1"
    " --random-range-ratio 0.9 --random-output-len 0",
    REPEATED,
    f"{REPEATED} --seed 3 --output-len 9 --request-rate 5 --burstiness inf --ignore-eos",
    f"{REPEATED} --seed 3 --disable-shuffle --prefix-repetition-output-len 9",
    f"{REPEATED} --prefix-repetition-suffix-len 0",
)


@lru_cache
def run_by_vllm() -> dict[str, tuple[list[list[Any]], bool]]:
    """What vLLM sends for each command, and whether it has the end of a text ignored."""
    vllm_source()
    out = subprocess.run(
        with_vllm.python("-c", RUN_BY_VLLM), input=json.dumps(RUN_BY_BOTH),
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    found = json.loads(out.stdout.splitlines()[-1])
    return dict(zip(RUN_BY_BOTH, found, strict=True))


def in_order_of_appearance(groups: Iterable[object]) -> list[int]:
    """Number groups as they come."""
    numbers: dict[object, int] = {}
    return [numbers.setdefault(group, len(numbers)) for group in groups]


@each("command", RUN_BY_BOTH)
def test_requests_are_those_that_vllm_sends(command: str) -> None:
    sent, ends_ignored = run_by_vllm()[command]
    translated = translate(command)
    assert [row[1:] for row in trace(translated)] == [(row[1], row[2]) for row in sent]
    assert [row[0] for row in trace(translated)] == pytest.approx([r[0] for r in sent], abs=1e-5)
    (workload,) = translated.lab.workloads
    prefix_tokens = workload.prefix.tokens if workload.prefix else 0
    theirs = [row[3].split()[:prefix_tokens] for row in sent]
    mine = (
        workload.prefix.drawn(len(sent), random.Random(0)) if workload.prefix else [0] * len(sent)
    )
    assert in_order_of_appearance(mine) == in_order_of_appearance(map(tuple, theirs))
    assert (note("ends") in translated.notes) != ends_ignored


def test_times_that_depend_on_the_tokenizer_are_said_to_be_others() -> None:
    """As vLLM draws them after its prompts, from the same generator."""
    assert note("times") in translate(f"{REPEATED} --request-rate 5").notes
    for other in (REPEATED, RUN_BY_BOTH[0]):
        assert note("times") not in translate(other).notes


# ------------------------------------------------------------------------- figures, and claims

FIGURES = {
    "vllm bench serve": {"mean_ttft_ms": 120.0, "mean_tpot_ms": 20.0, "mean_itl_ms": 21.0,
                         "output_throughput": 300.0},
    "GuideLLM": {"benchmarks": [{"metrics": {
        "time_to_first_token_ms": {"successful": {"mean": 120.0}},
        "time_per_output_token_ms": {"successful": {"mean": 20.0}},
        "inter_token_latency_ms": {"successful": {"mean": 21.0}},
        "output_tokens_per_second": {"successful": {"mean": 300.0}}}}]},
    "AIPerf": {"time_to_first_token": {"unit": "ms", "avg": 120.0},
               "inter_token_latency": {"unit": "ms", "avg": 21.0},
               "output_token_throughput": {"unit": "tokens/sec", "avg": 300.0}},
}  # fmt: skip


@each("tool", [*FIGURES])
def test_each_tools_own_file_is_read(tool: str, tmp_path: Path) -> None:
    path = tmp_path / "theirs.json"
    path.write_text(json.dumps(FIGURES[tool]))
    tpot_s = None if tool == "AIPerf" else 0.02
    assert benchmarks.theirs(path) == [[0.12, tpot_s, 0.021, 300.0]]


def test_a_file_of_another_tool_or_of_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "theirs.json"
    for content in ("{}", "[]", "no JSON", json.dumps({"mean_ttft_ms": "fast"})):
        path.write_text(content)
        with pytest.raises(LabError, match="THEIRS"):
            benchmarks.theirs(path)
    path.write_text(json.dumps(FIGURES["GuideLLM"]))
    with pytest.raises(LabError, match="vllm bench serve"):
        benchmarks.theirs(path, translate(VLLM))
    with pytest.raises(LabError, match="1 loads, and the command 2"):
        benchmarks.theirs(path, translate(f"{GUIDE} --rate-type concurrent --rate 1,2"
                          " --max-requests 3 --data prompt_tokens=1,output_tokens=2"))  # fmt: skip


@each("name", [*benchmarks.published_claims()])
@pytest.mark.usefixtures("_vllm_is_there")
def test_a_published_claim_is_a_command_that_can_be_played(name: str) -> None:
    claim = benchmarks.published_claims()[name]
    translated = translate(claim.command, claim.serve)
    assert translated.model
    assert claim.card in short_names()
    assert claim.shape in SHAPES


def test_an_unknown_claim_lists_those_that_are_there() -> None:
    refused = CliRunner().invoke(app, ["reproduce", "--published", "", "--machine", "h100"])
    assert refused.exit_code == 1
    assert all(name in refused.output for name in benchmarks.published_claims())


@each("settings", [(), ("--command", VLLM, "--published", "x"), ("--run", "x", "--serve", "y")])
def test_one_thing_is_played_again(settings: tuple[str, ...]) -> None:
    assert CliRunner().invoke(app, ["reproduce", *settings]).exit_code == 1
