"""What the lab predicts of replicas behind a router, by hand; and what each replica gets."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest
from pydantic import ValidationError

from labs import LABS
from labs.harness.analysis.measure import busiest_share, kv_capacity_tokens
from labs.harness.analysis.quantity import Quantity
from labs.harness.forecast.simulated_trials import routing_of
from labs.harness.spec.lab import Point
from labs.prefix_routing import facts, lab
from loadtests.workload import Prefix
from serving import metrics
from serving.engines import engine_of
from serving.engines.flags import Flags
from serving.engines.routed import Routed, policy_of, router_argv
from serving.engines.vllm import Vllm
from serving.engines.vllm_flags import VllmFlags
from serving.metrics import Snapshot, across
from serving.plugins.replicas import environment_of
from serving.simulator.fleet import Routing
from tests.unit.builders import CEILINGS, SHAPE, make_trial

BLOCKS = {"flags.kv-cache-memory-bytes": 44 * 32 * int(SHAPE.kv_bytes_per_token())}
LAB = LABS["prefix-routing"].at("cpu", False, BLOCKS)
POINTS = {p.key: p for p in LAB.points(SHAPE, CEILINGS)}


def point(variant: str, workload: str = "documents") -> Point:
    return POINTS[f"{variant}/{workload}/concurrent-4"]


def test_caches_add_up_only_where_requests_are_kept_together() -> None:
    aware, blind = point("cache-aware"), point("round-robin")
    assert (lab.documents_seen(aware), lab.documents_seen(blind)) == (4, 8)
    # of 44 blocks one is reserved and 2 answers hold 2 each; 4 documents of 7 blocks, of 8 drawn
    # evenly, come with 8 (1/8 + 1/7 + 1/6 + 1/5) questions of a block, a fifth with 2 more
    four = 4 * 7 + 8 * (1 / 8 + 1 / 7 + 1 / 6 + 1 / 5)
    held = 4 + (39 - four) / (7 + 8 / 4)
    assert lab.documents_held(blind) == pytest.approx(held)
    assert lab.found_share(blind) == pytest.approx(held / 8 * 224 / 256)
    assert lab.documents_held(aware) == 4  # all that it is asked about
    assert lab.found_share(aware) == pytest.approx(224 / 256)
    assert lab.hits_ratio(point("power-of-two"), blind).value == 1


def test_the_favourites_replica_is_the_busiest_unless_the_imbalance_is_limited() -> None:
    assert lab.busiest(point("round-robin", "favourite")) == 0.5
    # the favourite's 0.7, and 3 of the 7 others
    assert lab.busiest(point("cache-aware", "favourite")) == pytest.approx(0.7 + 3 * 0.3 / 7)
    assert lab.busiest(point("balanced", "favourite")) == 0.5


def test_more_replicas_find_less_unless_requests_are_kept_together() -> None:
    rows = facts.of_many(held=6, documents=12)
    assert [(m.replicas, m.documents) for m in rows[:2]] == [(2, 12), (4, 24)]
    assert [m.blind.value for m in rows[:3]] == [0.5, 0.25, 0.125]
    assert {m.together for m in rows} == {Quantity(1.0, "share")}


def test_groups_are_drawn_by_the_favourites_share() -> None:
    drawn = Counter(Prefix(tokens=8, groups=5, favourite=0.6).drawn(10_000, Random(1)))
    assert drawn[0] == pytest.approx(6_000, rel=0.05)
    assert [drawn[i] for i in range(1, 5)] == pytest.approx([1_000] * 4, rel=0.15)
    assert Prefix(tokens=8, groups=3).drawn(5, Random(1)) == [0, 1, 2, 0, 1]
    with pytest.raises(ValidationError, match="groups=2"):
        Prefix(tokens=8, favourite=0.5)


def test_each_replica_is_counted_by_itself_and_with_the_others() -> None:
    readings = [
        Snapshot({metrics.REQUESTS: done, metrics.PREFIX_HITS: hits})
        for done, hits in ((30.0, 5.0), (10.0, 0.0))
    ]
    whole = across(readings)
    assert whole.values[metrics.REQUESTS] == 40
    assert whole.values[metrics.of_replica(metrics.PREFIX_HITS, 0)] == 5
    assert busiest_share(make_trial([], engine=whole)) == 0.75
    later = across([Snapshot({metrics.REQUESTS: 31.0}), Snapshot({metrics.REQUESTS: 13.0})])
    assert busiest_share(make_trial([], engine=later.since(whole))) == 0.75
    assert busiest_share(make_trial([], engine=readings[0])) is None


def test_the_caches_of_all_replicas_count() -> None:
    engine = Snapshot(info={metrics.CACHE_CONFIG: {"num_gpu_blocks": "44", "block_size": "32"}})
    alone = POINTS["direct/alone/concurrent-1"]
    assert kv_capacity_tokens(make_trial([], point=alone, engine=engine)) == 44 * 32
    assert (
        kv_capacity_tokens(make_trial([], point=point("round-robin"), engine=engine)) == 2 * 44 * 32
    )


def test_a_router_stands_before_vllm_where_a_policy_is_given() -> None:
    flags: Flags = {"replicas": 2, "router-policy": "cache_aware", "block-size": 32}
    assert engine_of("vllm", flags) is Routed
    assert engine_of("vllm", {"block-size": 32}) is Vllm
    assert Vllm.flag_argv(flags) == ["--block-size", "32"]
    assert VllmFlags(flags).copies == 2
    assert router_argv({"policy": "random", "disable-retries": True, "urls": ["a", "b"]}) == [
        *("--policy", "random", "--disable-retries", "--urls", "a", "b"),
    ]


def test_the_routers_rule_is_played_with_its_limits() -> None:
    limited = VllmFlags({"router-policy": "cache_aware", "router-balance-abs-threshold": 1})
    assert routing_of(limited) == Routing(
        rule="prefix-aware", imbalance_requests=1, imbalance_ratio=1.5
    )
    assert routing_of(VllmFlags({"block-size": 32})) is None
    with pytest.raises(KeyError):
        routing_of(VllmFlags({"router-policy": "random"}))


def test_replicas_have_cores_and_gpus_of_their_own_or_share_the_only_gpu() -> None:
    inherited = {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "HOME": "/home"}
    assert environment_of(1, 2, 0, inherited) == {**inherited, "VLLM_CPU_OMP_THREADS_BIND": "1"}
    devices = [environment_of(i, 2, 4, {})["CUDA_VISIBLE_DEVICES"] for i in range(2)]
    assert devices == ["0,2", "1,3"]
    named = {"CUDA_VISIBLE_DEVICES": "5"}
    assert {environment_of(i, 2, 1, named)["CUDA_VISIBLE_DEVICES"] for i in range(2)} == {"5"}


def test_a_routers_log_says_its_policy_and_limits() -> None:
    line = 'Regular { worker_urls: ["http://a:1", "http://a:2"] } | policy: '
    assert policy_of(f"{line}RoundRobin | max") == {"replicas": "2", "policy": "round_robin"}
    aware = policy_of(
        f"{line}CacheAware {{ cache_threshold: 0.3, balance_abs_threshold: 1 }} | max"
    )
    assert aware["policy"] == "cache_aware"
    assert aware["balance_abs_threshold"] == "1"
    assert policy_of("nothing of a router") == {}
