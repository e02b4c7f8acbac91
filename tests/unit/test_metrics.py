"""The engine's /metrics, on hand-written exposition text."""

import pytest

from serving import metrics
from serving.engines.vllm import METRICS, Vllm
from serving.metrics import Histogram, Snapshot, parse

BEFORE = """\
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0"} 3.0
# TYPE vllm:request_success_total counter
vllm:request_success_total{engine="0",finished_reason="length"} 5.0
vllm:request_success_total{engine="0",finished_reason="stop"} 2.0
# TYPE vllm:time_to_first_token_seconds histogram
vllm:time_to_first_token_seconds_bucket{engine="0",le="0.1"} 1.0
vllm:time_to_first_token_seconds_bucket{engine="0",le="0.5"} 4.0
vllm:time_to_first_token_seconds_bucket{engine="0",le="+Inf"} 5.0
vllm:time_to_first_token_seconds_count{engine="0"} 5.0
vllm:time_to_first_token_seconds_sum{engine="0"} 2.5
# TYPE vllm:cache_config_info gauge
vllm:cache_config_info{block_size="16",enable_prefix_caching="False"} 1.0
# TYPE somebody_elses gauge
somebody_elses 7.0
"""
AFTER = (
    BEFORE.replace('running{engine="0"} 3.0', 'running{engine="0"} 1.0')
    .replace('"length"} 5.0', '"length"} 9.0')
    .replace('le="0.1"} 1.0', 'le="0.1"} 2.0')
    .replace('le="0.5"} 4.0', 'le="0.5"} 8.0')
    .replace('le="+Inf"} 5.0', 'le="+Inf"} 9.0')
    .replace('count{engine="0"} 5.0', 'count{engine="0"} 9.0')
    .replace('sum{engine="0"} 2.5', 'sum{engine="0"} 3.75')
)
TWO_ENGINES = "".join(
    line + (line.replace('engine="0"', 'engine="1"') if "engine" in line else "")
    for line in BEFORE.splitlines(keepends=True)
)
INF = float("inf")
NEW = Histogram((0.1, 0.5, INF), (1, 4, 4), 1.25, 4)


def test_values_are_summed_over_labels_and_histograms_are_cumulative() -> None:
    found = parse(BEFORE)
    assert found.values[metrics.REQUESTS] == 7
    assert found.values[metrics.RUNNING] == 3
    assert found.values["somebody_elses"] == 7
    assert found.histograms == {metrics.TTFT: Histogram((0.1, 0.5, INF), (1, 4, 5), 2.5, 5)}
    assert found.info[metrics.CACHE_CONFIG]["enable_prefix_caching"] == "False"
    assert found.since(Snapshot()) == found


def test_engines_of_one_server_are_added() -> None:
    found = parse(TWO_ENGINES)
    assert found.values[metrics.REQUESTS] == 14
    assert found.histograms[metrics.TTFT] == Histogram((0.1, 0.5, INF), (2, 8, 10), 5, 10)


def test_since_takes_counters_and_histograms_as_differences_and_gauges_as_they_are() -> None:
    found = parse(AFTER).since(parse(BEFORE))
    assert found.values[metrics.REQUESTS] == 4
    assert found.values[metrics.RUNNING] == 1
    assert found.histograms[metrics.TTFT] == NEW
    assert found.info == parse(AFTER).info


@pytest.mark.parametrize(
    ("quantile", "bucket"),
    [(0.25, (0.0, 0.1)), (0.26, (0.1, 0.5)), (0.5, (0.1, 0.5)), (1.0, (0.1, 0.5))],
)
def test_bucket_holds_the_quantile(quantile: float, bucket: tuple[float, float]) -> None:
    assert NEW.bucket_of(quantile) == bucket
    assert Histogram((0.1, INF), (1, 4), 9, 4).bucket_of(0.5) == (0.1, INF)


def test_empty_histogram_has_neither_mean_nor_bucket() -> None:
    assert (Histogram().mean(), Histogram().bucket_of(0.5)) == (None, None)
    assert NEW.mean() == 1.25 / 4


def test_every_name_the_lab_knows_is_golden_or_comes_with_a_setting() -> None:
    known = {v for v in vars(metrics).values() if isinstance(v, str) and v.startswith("vllm:")}
    with_a_setting = {
        *metrics.SPECULATION, metrics.LORA, metrics.TURNED_AWAY, metrics.KV_LOADED_BYTES,
    }  # fmt: skip
    assert known > with_a_setting
    assert sorted(METRICS) == sorted(known - with_a_setting)
    assert all(metrics.is_known(name) for name in known - set(metrics.HISTOGRAMS))


def test_acceptance_is_counted_by_position_too() -> None:
    labels = 'engine="0",position="{}"'
    lines = [f"{metrics.SPEC_ACCEPTED_AT}{{{labels.format(at)}}} {n}" for at, n in ((0, 9), (1, 4))]
    family = metrics.SPEC_ACCEPTED_AT.removesuffix("_total")
    found = parse("\n".join([f"# TYPE {family} counter", *lines, ""]))
    assert (found.values[metrics.position(0)], found.values[metrics.position(1)]) == (9, 4)
    before = Snapshot({metrics.position(0): 5.0})
    assert found.since(before).values[metrics.position(0)] == 4
    assert metrics.is_known(metrics.position(1))


@pytest.mark.parametrize(
    "text",
    [
        '# TYPE foo histogram\nfoo_bucket{le="+Inf"} 1\n',
        "# TYPE foo histogram\nfoo_bucket 1\nfoo_sum 1\nfoo_count 1\n",
        "# TYPE vllm:spec_decode_num_accepted_tokens_per_pos_total counter\n"
        "vllm:spec_decode_num_accepted_tokens_per_pos_total 5\n",
    ],
)
def test_what_lacks_a_part_is_no_metrics(text: str) -> None:
    with pytest.raises(ValueError, match="has no"):
        Vllm.read_metrics(text)


NO_NUMBERS = ["9" * 400, "NaN", "-9.0", "+Inf", "-Inf", "1e19"]


@pytest.mark.parametrize("number", NO_NUMBERS)
def test_a_page_with_a_number_that_is_none_is_unreadable(number: str) -> None:
    known = [line for line in BEFORE.splitlines() if line.startswith("vllm:")]
    assert len(known) == 9
    for line in known:
        series = line.rpartition(" ")[0]
        with pytest.raises(ValueError, match=r"no number|digits|add up"):
            parse(BEFORE.replace(line, f"{series} {number}"))


def test_others_may_show_what_they_like() -> None:
    """A summary without observations shows NaN, and a limit that there is not shows -1."""
    assert parse(BEFORE.replace("elses 7.0", "elses -1")).values["somebody_elses"] == -1
    assert parse(BEFORE.replace("elses 7.0", "elses NaN")).values[metrics.REQUESTS] == 7


@pytest.mark.parametrize("changed", [("0.1", "9"), ("+Inf", "4"), ("+Inf", "6")])
def test_buckets_that_do_not_add_up_are_unreadable(changed: tuple[str, str]) -> None:
    le, count = changed
    line = next(line for line in BEFORE.splitlines() if f'le="{le}"' in line)
    with pytest.raises(ValueError, match="add up"):
        parse(BEFORE.replace(line, f"{line.rpartition(' ')[0]} {count}"))
