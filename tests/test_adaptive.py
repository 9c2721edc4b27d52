"""The pattern of requests, and the resource that follows it."""

import gc
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest

from moirai import memory
from moirai.errors import InvalidArgument, OutOfMemory
from moirai.memory import Workload


def ask_until(holds: Callable[[], bool], ask: Callable[[], object], *, what: str) -> None:
    """Ask for memory until it is so; the deadline is for a defect only."""
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline, f"{what}: not within 60 s"
        for _ in range(50):
            ask()


def strategy_of(resource: memory.AdaptiveResource, size_bytes: int) -> Workload | None:
    for standing in resource.explain().standings:
        if standing.max_bytes // 2 < size_bytes <= standing.max_bytes:
            return standing.strategy
    return None


# --- the pattern --------------------------------------------------------------------------------


def test_every_request_is_counted_by_its_size() -> None:
    tracker = memory.PatternAdaptor(memory.PoolResource())
    asked = {1: 3, 64: 2, 65: 5, 1088: 7, 16384: 1, 16385: 2, 100_000: 4}
    for size, count in asked.items():
        for _ in range(count):
            tracker.allocate(size)
    assert tracker.sizes() == [(64, 5), (128, 5), (1088, 7), (16384, 1)]
    by_class = {entry.max_bytes: (entry.requests, entry.bytes) for entry in tracker.classes()}
    assert by_class == {
        64: (5, 5 * 64),
        128: (5, 5 * 128),
        2048: (7, 7 * 1088),
        16384: (1, 16384),
        32768: (2, 2 * 16385),
        131072: (4, 400_000),
    }
    assert tracker.check().ok


def test_lifetimes_are_those_of_the_sampled_blocks() -> None:
    tracker = memory.PatternAdaptor(memory.PoolResource())
    for _ in range(1000):
        tracker.allocate(500)
    kept = [tracker.allocate(5000) for _ in range(1000)]
    short, long = tracker.classes()
    assert short.ended > 0
    assert short.open == 0
    assert short.ended_elsewhere == 0
    assert sum(count for _, count in short.spans) == short.ended
    assert short.median_lifetime_seconds is not None
    assert short.median_lifetime_seconds > 0
    assert long.ended == 0
    assert long.open > 0
    assert long.median_lifetime_seconds is None
    thread = threading.Thread(target=kept.clear)
    thread.start()
    thread.join()
    _, long = tracker.classes()
    assert long.open == 0
    assert long.ended == long.ended_elsewhere > 0
    assert long.threads == 1


def test_threads_are_counted_where_they_ask_at_once() -> None:
    tracker = memory.PatternAdaptor(memory.PoolResource())
    barrier = threading.Barrier(4)

    def ask() -> None:
        tracker.allocate(100)
        barrier.wait()
        for _ in range(999):
            tracker.allocate(100)
        barrier.wait()

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (entry,) = tracker.classes()
    assert (entry.requests, entry.threads) == (4000, 4)


def test_numpy_arrays_are_noted_resized_ones_too() -> None:
    tracker = memory.PatternAdaptor(memory.PoolResource())
    with memory.use(tracker):
        arrays = [np.zeros(200) for _ in range(100)]
        for array in arrays:
            array.resize(2000, refcheck=False)
            assert not array.any()
    arrays.clear()
    assert dict(tracker.sizes())[1600] == 100
    del array
    gc.collect()
    assert tracker.statistics().current_count == 0
    assert tracker.check().ok


# --- adapting -----------------------------------------------------------------------------------


def test_classes_are_switched_by_what_is_done_with_them() -> None:
    resource = memory.AdaptiveResource()
    ask_until(
        lambda: strategy_of(resource, 1000) == Workload.HIGH_THROUGHPUT,
        lambda: resource.allocate(1000),
        what="small blocks that die young",
    )
    kept: list[memory.Buffer] = []
    serves_what_stays = resource.strategies[Workload.LONG_RUNNING]
    # A class is switched by one of its requests, for the requests after it.
    ask_until(
        lambda: (
            strategy_of(resource, 5000) == Workload.LONG_RUNNING
            and serves_what_stays.statistics().current_count > 0
        ),
        lambda: kept.append(resource.allocate(5000)),
        what="blocks that stay",
    )
    assert strategy_of(resource, 1000) == Workload.HIGH_THROUGHPUT, "no other class is touched"
    explanation = resource.explain()
    assert explanation.decision_count == len(explanation.decisions) >= 2
    first = explanation.decisions[0]
    assert (first.max_bytes, first.chosen) == (1024, Workload.HIGH_THROUGHPUT)
    assert first.outcome in ("switched", "taken back")
    assert first.evidence.rate > 20_000
    assert first.evidence.long == 0
    assert first.expected is None, "it never served this class"
    text = str(explanation)
    for word in (
        "low_latency -> high_throughput",
        "requests/s",
        "evidence",
        "expected",
        "observed",
    ):
        assert word in text


def test_blocks_stay_valid_and_go_back_where_they_came_from_across_switches() -> None:
    resource = memory.AdaptiveResource(long_seconds=0.005)
    alive: dict[int, np.ndarray] = {}
    turn = 0

    def ask() -> None:
        nonlocal turn
        turn += 1
        number = turn % 3000
        fresh = resource.allocate(2000).numpy()
        fresh[:] = number % 251
        alive[number] = fresh

    ask_until(
        lambda: strategy_of(resource, 2000) == Workload.LONG_RUNNING, ask, what="blocks that stay"
    )
    for number, array in alive.items():
        assert (array == number % 251).all()
    assert resource.check().ok
    del array
    alive.clear()
    assert resource.statistics().current_count == 0
    assert all(part.statistics().current_count == 0 for part in resource.strategies.values())


def test_counterfactual_says_what_it_would_do_and_does_nothing() -> None:
    resource = memory.AdaptiveResource(counterfactual=True)
    assert resource.is_counterfactual
    ask_until(
        lambda: resource.explain().decision_count > 0,
        lambda: resource.allocate(1000),
        what="a decision",
    )
    decision = resource.explain().decisions[0]
    assert decision.outcome == "counterfactual"
    assert decision.chosen == Workload.HIGH_THROUGHPUT
    assert decision.observed is None
    assert "would switch" in str(decision)
    for workload, part in resource.strategies.items():
        served = part.statistics().total_count
        assert (served > 0) == (workload == Workload.LOW_LATENCY)


def test_a_switch_for_the_worse_is_taken_back() -> None:
    # Blocks of a megabyte from a heap that keeps nothing: each request goes to the kernel.
    worse = memory.LargeObjectResource(cache_cap_bytes=0)
    resource = memory.AdaptiveResource({Workload.HIGH_THROUGHPUT: worse}, high_rate=1000)

    def ask() -> None:
        memoryview(resource.allocate(1 << 20))[::4096] = bytes(256)

    ask_until(
        lambda: any(d.outcome == "taken back" for d in resource.explain().decisions),
        ask,
        what="a switch taken back",
    )
    taken_back = next(d for d in resource.explain().decisions if d.outcome == "taken back")
    assert taken_back.before is not None
    assert taken_back.observed is not None
    assert taken_back.observed.median_nanoseconds > taken_back.before.median_nanoseconds
    assert strategy_of(resource, 1 << 20) == Workload.LOW_LATENCY


def test_a_group_over_several_strategies_comes_whole_or_not_at_all() -> None:
    small = memory.LimitAdaptor(memory.PoolResource(), limit_bytes="1 MiB")
    resource = memory.AdaptiveResource({Workload.LOW_LATENCY: small}, long_seconds=0.0005)
    kept: list[memory.Buffer] = []
    ask_until(
        lambda: strategy_of(resource, 100) == Workload.LONG_RUNNING,
        lambda: kept.append(resource.allocate(100)) if len(kept) < 5000 else kept.clear(),
        what="blocks that stay",
    )
    kept.clear()
    blocks = resource.allocate_group([100, 4000, 100, 50_000])
    assert len(blocks) == 4
    counts = {w: part.statistics().current_count for w, part in resource.strategies.items()}
    assert counts[Workload.LOW_LATENCY] == 2
    with pytest.raises(OutOfMemory):
        resource.allocate_group([100, 2 << 20, 100])
    after = {w: part.statistics().current_count for w, part in resource.strategies.items()}
    assert after == counts


def test_threads_may_ask_while_classes_are_switched() -> None:
    resource = memory.AdaptiveResource(long_seconds=0.002, high_rate=5000)
    stop = threading.Event()
    wrong: list[int] = []

    def work(number: int) -> None:
        held: list[np.ndarray] = []
        while not stop.is_set():
            for size in (64, 500, 3000, 70_000):
                array = resource.allocate(size).numpy()
                array[:] = number
                held.append(array)
            if len(held) > 40 * number:
                wrong.extend(number for array in held if (array != number).any())
                held.clear()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(1, 5)]
    for thread in threads:
        thread.start()
    try:
        ask_until(lambda: resource.explain().decision_count >= 4, lambda: None, what="decisions")
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not wrong
    assert resource.check().ok
    assert resource.statistics().current_count == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strategies": {"fast": memory.SystemResource()}}, "strategies: must be one of"),
        ({"strategies": {Workload.LOW_LATENCY: 7}}, "strategies: low_latency must be a Resource"),
        ({"initial": "fast"}, "initial: must be one of"),
        ({"long_seconds": 0}, "long_seconds: must be a number above 0"),
        ({"long_seconds": float("nan")}, "long_seconds: must be a number above 0"),
        ({"high_rate": -1}, "high_rate: must be a number above 0"),
    ],
)
def test_bad_input_is_named(arguments: dict, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        memory.AdaptiveResource(**arguments)


def test_strategies_that_share_a_resource_are_refused() -> None:
    shared = memory.PoolResource()
    with pytest.raises(InvalidArgument, match="low_latency: must draw from a resource of its own"):
        memory.AdaptiveResource(
            {Workload.HIGH_THROUGHPUT: shared, Workload.LOW_LATENCY: memory.SlabResource(shared)}
        )


def test_an_explanation_of_nothing_is_empty() -> None:
    explanation = memory.AdaptiveResource().explain()
    assert (explanation.standings, explanation.decisions) == ([], [])
    assert "decisions (0 of 0)" in str(explanation)
