"""What is exported and what is looked up, held against vLLM's own code, which is imported here."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import numpy as np
import pytest

from labs.harness.filing import export
from labs.harness.filing.results import RunFolder
from serving.weights.lookup import looked_up
from tests.unit.builders import make_record, make_trial, write_run

pytestmark = pytest.mark.cpu

RECORDS = [
    make_record([(10.4, 1), (10.9, 2), (12.2, 2)], sent_s=10.0),
    make_record([(11.1, 1), (11.9, 1)], index=1, sent_s=10.7),
    make_record([(13.5, 1)], index=2, sent_s=12.1),
    make_record([], index=3, sent_s=12.2),
]


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return write_run(tmp_path)


def test_it_agrees_with_vllms_own_arithmetic(folder: RunFolder) -> None:
    from vllm.benchmarks import serve
    from vllm.benchmarks.lib.endpoint_request_func import RequestFuncOutput

    ours = export.vllm_result(folder, make_trial(RECORDS))
    outputs = []
    for i, r in enumerate(RECORDS):
        output = RequestFuncOutput(success=r.ok, error=r.error or "", start_time=r.sent_s)
        if r.ok:
            output.prompt_len, output.output_tokens = r.prompt_tokens, r.output_tokens
            output.ttft, output.itl = ours["ttfts"][i], ours["itls"][i]
            output.latency = ours["latencies"][i]
        outputs.append(output)
    theirs, lengths = serve.calculate_metrics([], outputs, ours["duration"], None, [50, 90, 99], {})
    assert lengths == [n or 0 for n in ours["output_lens"]]
    compared = 0
    for name, value in dataclasses.asdict(theirs).items():
        if name.startswith("percentiles_"):
            figure = name.removeprefix("percentiles_")
            for q, at in value:
                assert ours[f"p{q}_{figure}"] == pytest.approx(at), name
                compared += 1
        elif (key := {"total_input": "total_input_tokens", "total_output": "total_output_tokens"}
              .get(name, name)) in ours and ours[key] is not None:  # fmt: skip
            assert ours[key] == pytest.approx(value), name
            compared += 1
    assert compared > 25


def test_what_is_looked_up_is_what_the_engine_would_propose() -> None:
    proposer = pytest.importorskip("vllm.v1.spec_decode.ngram_proposer")
    rng = random.Random(0)
    for least, most, guesses in ((1, 1, 16), (2, 4, 3), (3, 3, 2)):
        for _ in range(200):
            text = rng.choices(range(4), k=rng.randint(1, 30))
            proposed = proposer._find_longest_matched_ngram_and_propose_tokens(
                np.array(text, dtype=np.int32), least, most, 1000, guesses
            )
            assert list(looked_up(text, guesses, least, most)) == proposed.tolist(), text
