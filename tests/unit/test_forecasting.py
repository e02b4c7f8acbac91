"""The forecaster's own parts by hand-worked numbers: a step's time, clients in virtual time."""

from __future__ import annotations

import contextlib
import itertools
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest

from labs.harness.forecast.step_timing import LEAST_OF_STAND_IN, MOST_OF_STAND_IN, ends_of_band
from loadtests.load import AFTER_ERROR_S
from serving.hardware.reference_step import ReferenceStep
from serving.simulator import profiled_step
from serving.simulator.step import Piece, Step, StepTimes
from serving.simulator.traffic import Delays, Play, Prompt, Traffic, play

TIMES = StepTimes(
    tokens=(1, 2, 4), linear_s=(1.0, 1.5, 2.5), rows=(1, 4), head_s=(0.1, 0.4),
    attention_pair_s=0.01, attention_read_s=0.001,
)  # fmt: skip
NONE = Delays(request_s=0, serial_s=0, response_s=0, client_s=0)


@pytest.mark.parametrize(
    ("pieces", "rows", "seconds"),
    [
        ([], 0, 0.0),
        ([Piece(1, 100)], 1, 1.0 + 0.1 + 0.1),
        ([Piece(1, 100), Piece(1, 50)], 2, 1.5 + 0.2 + 0.15),
        ([Piece(3, 0)], 0, 2.0 + 0.1 + 3 * 2 * 0.01),  # three tokens attend to 1, 2 and 3
        ([Piece(2, 10)], 1, 1.5 + 0.1 + 2 * 11.5 * 0.01),
        ([Piece(8, 0)], 1, 4.5 + 0.1 + 8 * 4.5 * 0.01),  # beyond what was timed: the last slope
    ],
)
def test_a_step_takes_what_its_parts_take(pieces: list[Piece], rows: int, seconds: float) -> None:
    assert TIMES.seconds(Step(pieces, rows)) == pytest.approx(seconds)
    assert TIMES.times(2).seconds(Step(pieces, rows)) == pytest.approx(2 * seconds)


def test_a_few_tokens_read_as_much_of_the_cache_as_one() -> None:
    """As on a GPU, where reading a cached token takes as long as computing many pairs."""
    gpu = TIMES.model_copy(update={"attention_read_s": 0.1})
    one, few, many = (gpu.seconds(Step([Piece(n, 100)], 1)) for n in (1, 2, 20))
    assert one == pytest.approx(1.0 + 0.1 + 100 * 0.1)
    assert few == pytest.approx(1.5 + 0.1 + 100 * 0.1)
    assert many == pytest.approx(10.5 + 0.1 + 20 * 110.5 * 0.01)  # there the arithmetic is longer


class Server:
    """Every step takes so long and gives each request in it a token; a prompt takes one step."""

    def __init__(self, step_s: float = 1.0) -> None:
        self.now_s, self.step_s = 0.0, step_s
        self.left: dict[str, int] = {}
        self.served: list[str] = []

    @property
    def busy(self) -> bool:
        return bool(self.left)

    def add(self, request_id: str, prompt: Prompt) -> bool:
        self.left[request_id] = prompt.output_tokens
        self.served.append(request_id)
        return True

    def step(self, before_s: float = math.inf) -> dict[str, tuple[int, bool]]:
        self.now_s += self.step_s
        got = {name: (1, left == 1) for name, left in self.left.items()}
        self.left = {name: left - 1 for name, left in self.left.items() if left > 1}
        return got

    def wait_until(self, at_s: float) -> None:
        self.now_s = max(self.now_s, at_s)


def prompts(*output_tokens: int) -> list[Prompt]:
    return [
        Prompt(index=i, token_ids=(1, 2, 3), output_tokens=n) for i, n in enumerate(output_tokens)
    ]


def played_by(
    output_tokens: list[int], *intruders: Prompt, delays: Delays = NONE, **traffic: Any
) -> Play:
    return play(Server(), Traffic(**traffic), prompts(*output_tokens), intruders, delays)


def test_a_closed_loop_keeps_its_users_busy_until_the_window_is_over() -> None:
    played = played_by([2] * 20, kind="closed", users=2, warmup_s=2, window_s=4)
    assert [a.sent_s for a in played.answers] == [0, 0, 2, 2, 4, 4]
    assert [a.in_window for a in played.answers] == [False, False, True, True, True, True]
    assert all([at for at, _ in a.chunks] == [a.sent_s + 1, a.sent_s + 2] for a in played.answers)
    assert played.window_s == (2, 6)


def test_the_window_is_held_open_until_each_user_has_an_answer() -> None:
    assert played_by([3] * 20, kind="closed", users=2, warmup_s=1, window_s=1).window_s == (1, 6)


def test_a_wave_waits_for_all_of_it() -> None:
    played = played_by([1, 4, 2, 3], kind="waves", users=2, warmup_s=0, window_s=5)
    assert [a.sent_s for a in played.answers] == [0, 0, 4, 4]
    assert played.window_s == (0, 7)


def test_what_is_due_waits_while_as_many_are_in_flight_as_may_be() -> None:
    due_s = (0.0, 0.0, 1.0, 2.0, 9.0)
    played = played_by(
        [3] * 5, kind="open", schedule_s=due_s, most_in_flight=2, warmup_s=0, window_s=20
    )
    assert [a.sent_s for a in played.answers] == [0, 0, 3, 3, 9]
    assert [a.scheduled_s for a in played.answers] == [*due_s]


@pytest.mark.parametrize(("warmup_s", "window"), [(0, (0.0, 6.0)), (20, (6.0, 6.0))])
def test_no_wave_is_sent_that_the_prompts_do_not_fill(
    warmup_s: float, window: tuple[float, float]
) -> None:
    """As by the load generator. Where even the warm-up has too few, the window is empty."""
    played = played_by([3] * 5, kind="waves", users=2, warmup_s=warmup_s, window_s=100)
    assert len(played.answers) == 4
    assert played.window_s == window


def test_an_open_loop_keeps_its_schedule_whatever_is_outstanding() -> None:
    played = played_by([5] * 3, kind="open", schedule_s=(0.5, 0.6, 9.0), warmup_s=0.55, window_s=9)
    assert [(a.scheduled_s, a.in_window) for a in played.answers] == [
        (0.5, False), (0.6, True), (9.0, True)
    ]  # fmt: skip
    assert played.answers[0].chunks[0][0] == 1.5
    assert played.answers[1].chunks[0][0] == 2.5  # it came while a step was under way


@pytest.mark.parametrize("start_s", [0.0, 15_687.1, 1e7 / 3, 1e9 / 7])
def test_a_trial_ends_however_late_its_server_began(start_s: float) -> None:
    """Sums and differences of times so large do not agree to the last digit."""
    server = Server()
    server.now_s = start_s
    times = tuple(i * math.pi / 7 for i in range(200))
    traffic = Traffic(kind="open", schedule_s=times, warmup_s=0, window_s=90)
    waits = itertools.count()
    on = server.wait_until

    def wait_until(at_s: float) -> None:
        assert next(waits) < 1000, "it waits forever"
        on(at_s)

    server.wait_until = wait_until  # type: ignore[method-assign]
    played = play(server, traffic, prompts(*[1] * 200), (), NONE)
    assert len(played.answers) == 200


class Full(Server):
    """Takes one request at a time, and turns the others away."""

    def add(self, request_id: str, prompt: Prompt) -> bool:
        return not self.left and super().add(request_id, prompt)


def test_a_request_that_is_turned_away_has_ended() -> None:
    traffic = Traffic(kind="open", schedule_s=(0.0, 0.5, 3.5), warmup_s=0, window_s=9)
    played = play(Full(), traffic, prompts(2, 2, 2), (), NONE)
    assert [(a.turned_away_s, len(a.chunks)) for a in played.answers] == [
        (None, 2), (1.0, 0), (None, 2)  # it is refused between two steps
    ]  # fmt: skip


def test_a_user_of_a_closed_loop_that_is_turned_away_sends_again() -> None:
    delays = NONE.model_copy(update={"client_s": 0.5})
    traffic = Traffic(kind="closed", users=2, warmup_s=0, window_s=4)
    played = play(Full(), traffic, prompts(*[2] * 40), (), delays)
    refused_s = next(a.turned_away_s for a in played.answers if a.turned_away_s is not None)
    again_s = refused_s + delays.client_s + AFTER_ERROR_S  # as the load generator's users wait
    assert again_s in [pytest.approx(a.sent_s) for a in played.answers]
    assert sum(bool(a.chunks) for a in played.answers) >= 2


def test_an_intruder_comes_every_so_often_beside_the_users() -> None:
    intruders = [Prompt(index=100 + i, token_ids=(1,) * 9, output_tokens=1) for i in range(9)]
    played = played_by(
        [2] * 20, *intruders, kind="closed", intruder_every_s=3, warmup_s=0, window_s=8
    )
    assert [a.sent_s for a in played.answers if a.index >= 100] == [3, 6]


def test_between_client_and_engine_lies_what_is_stated() -> None:
    delays = Delays(request_s=0.3, serial_s=0.2, response_s=0.1, client_s=0.05)
    played = played_by([1] * 3, delays=delays, kind="closed", users=3, warmup_s=0, window_s=1)
    # ready for the engine at 0.3, 0.4 and 0.6; the first step begins with the first alone
    assert [a.chunks[0][0] for a in played.answers] == pytest.approx([1.4, 2.4, 2.4])


def test_a_structure_is_compiled_before_its_request_is_scheduled() -> None:
    waiting = [p.model_copy(update={"compile_s": 2.0}) for p in prompts(*[1] * 9)]
    traffic = Traffic(kind="closed", users=1, warmup_s=0, window_s=5)
    played = play(Server(), traffic, waiting, (), NONE)
    assert [a.chunks[0][0] - a.sent_s for a in played.answers] == [3.0, 3.0]


def test_what_takes_long_is_timed_less_often_and_what_is_larger_not_at_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = [0.0]
    monkeypatch.setattr(profiled_step, "perf_counter", lambda: clock[0])

    def taking(*seconds: float) -> profiled_step.Work:
        left = itertools.chain(seconds, itertools.repeat(seconds[-1]))

        def work() -> None:
            clock[0] += next(left)

        return work

    works = [taking(0.1), taking(0.8), taking(1.1), taking(1.2)]
    many, other = profiled_step.timed([works, [taking(0.9, 0.1), taking(3.0)]], 6, lambda: None)
    # a quick work's warm-up does not count; 2 s are enough for one work; the fourth is too large
    assert [len(seconds) for seconds in many] == [6, 3, 2]
    assert [pytest.approx(seconds) for seconds in other] == [[0.1] * 6, [3.0]]


def test_a_slow_moment_at_first_leaves_nothing_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first work takes 0.9 s once, as where memory is touched for the first time."""
    times = iter([0.9, *[0.1] * 21])
    clock = [0.0]
    monkeypatch.setattr(profiled_step, "perf_counter", lambda: clock[0])

    def work() -> None:
        clock[0] += next(times)

    (works,) = profiled_step.timed([[work] * 3], 6, lambda: None)
    assert [len(seconds) for seconds in works] == [6, 6, 6]


class Cuda:
    """The part of `torch.cuda` that records a graph: what is launched meanwhile is not run."""

    def __init__(self, refuses: bool) -> None:
        self.refuses = refuses
        self.noted: list[str] = []

    def CUDAGraph(self) -> Any:
        return SimpleNamespace(replay=lambda: self.noted.append("replayed"))

    def Stream(self) -> Any:
        return SimpleNamespace(wait_stream=lambda other: None)

    current_stream = Stream

    def set_stream(self, which: object) -> None:
        self.noted.append("set back")

    def stream(self, which: object) -> Any:
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def graph(self, which: object) -> Iterator[None]:
        yield
        if self.refuses:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.noted.append("recorded")


@pytest.mark.parametrize("refuses", [False, True])
def test_on_a_gpu_a_work_is_recorded_once_and_replayed(
    refuses: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cuda = Cuda(refuses)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    replay = profiled_step.recorded(lambda: cuda.noted.append("launched"))
    told = capsys.readouterr().err
    replay()
    if refuses:
        assert cuda.noted == ["launched", "launched", "set back", "launched"]
        assert ": operation not permitted" in told
    else:
        assert cuda.noted == ["launched", "launched", "recorded", "replayed"]
        assert not told


def test_all_works_take_turns_so_that_a_slow_moment_meets_none_in_all_its_passes() -> None:
    order: list[str] = []
    works = [[lambda: order.append("a")], [lambda: order.append("b")]]
    profiled_step.timed(works, 2, lambda: None, lambda: order.append("the machine"))
    assert order == ["the machine", "a", "b"] * 3


def test_the_middle_of_several_times_counts_since_an_engine_cannot_choose_its_moments(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    torch = SimpleNamespace(inference_mode=contextlib.nullcontext)
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setattr(profiled_step, "Decoder", Mock())
    config = tmp_path / "config.json"
    config.write_text("{}")
    series_s = [  # of layers, head, reading and prefill, two sizes each
        [[4.0, 1.0, 5.0], [9.0, 8.0, 3.0]],
        [[1.0, 2.0, 3.0], [1.0, 2.0, 9.0]],
        [[1.0, 0.5, 9.0], [2.0, 2.0, 2.0]],
        [[1.0, 1.0, 1.0], [3.0, 3.0, 3.0]],
    ]
    slow, *others = (ReferenceStep(reading_s=n, computing_s=2 * n) for n in (9.0, 1.0, 2.0))
    left = iter([slow, *others])

    def timed(*given: Any) -> list[list[list[float]]]:
        for _ in range(3):
            given[-1]()
        return series_s

    monkeypatch.setattr(profiled_step, "timed", timed)
    monkeypatch.setattr("serving.hardware.reference_step.on_cpu", lambda: lambda: next(left))
    plan = profiled_step.TimingPlan(config=config, device="cpu", tokens=(1, 2), rows=(1, 4))
    (times,) = profiled_step.measure([plan])
    assert times.reference == ReferenceStep(reading_s=2.0, computing_s=4.0)
    assert times.times(3.0).reference == times.reference  # what was timed, whatever it is used for
    assert times.linear_s == (4.0, 8.0)
    assert times.head_s == (2.0, 2.0)
    contexts = profiled_step.LONG_CONTEXT_TOKENS - profiled_step.CONTEXT_TOKENS
    assert times.attention_read_s == pytest.approx(1.0 / contexts)


def test_a_machine_whose_speed_wanders_widens_the_band() -> None:
    assert profiled_step.wander_of([[1.0, 1.0, 1.0], [2.0, 2.0, 2.0], [1.0, 9.0]]) == 1.0
    assert profiled_step.wander_of([[1.0]]) == 1.0
    wander = profiled_step.wander_of([[1.0, 1.5, 2.0], [2.0, 3.0, 3.0]])
    assert wander == 1.5
    steady, unsteady = TIMES, TIMES.model_copy(update={"wander": wander})
    for times, spread, apart in (
        (steady, 1.0, 1.0),
        (unsteady, 1.0, 1.5),
        (unsteady, 1.7, 1.7),  # more than within the timing
        (unsteady, 1.2, 1.5),
    ):
        expected, faster, slower = ends_of_band(times, spread)
        assert expected.linear_s == TIMES.linear_s
        assert faster.linear_s[0] == pytest.approx(LEAST_OF_STAND_IN / apart * TIMES.linear_s[0])
        assert slower.linear_s[0] == pytest.approx(MOST_OF_STAND_IN * apart * TIMES.linear_s[0])


def test_plans_that_differ_in_the_cache_alone_share_the_timing_of_their_layers() -> None:
    def plan(*kernels: str, tokens: tuple[int, ...] = (1, 2)) -> profiled_step.TimingPlan:
        return profiled_step.TimingPlan(
            config=Path("config.json"), device="cpu", tokens=tokens, engine_argv=kernels
        )

    bf16, w8a8 = ("--model", "a", "--kv-cache-dtype", "auto"), ("--model", "b")
    fp8 = ("--model", "a", "--kv-cache-dtype=fp8")
    blocks = ("--model", "a", "--block-size", "128")
    assert profiled_step.weights_of(plan(*bf16)) == profiled_step.weights_of(plan(*fp8))
    assert profiled_step.weights_of(plan(*bf16)) == profiled_step.weights_of(plan("--model", "a"))
    assert profiled_step.weights_of(plan(*bf16)) == profiled_step.weights_of(plan(*blocks))
    assert profiled_step.weights_of(plan(*bf16)) != profiled_step.weights_of(plan(*w8a8))
    assert profiled_step.weights_of(plan(*bf16)) != profiled_step.weights_of(
        plan(*bf16, tokens=(1,))
    )
