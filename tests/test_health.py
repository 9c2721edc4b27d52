"""`memory.health`: every live resource is walked, and compared with those above and below it."""

import gc
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from moirai import memory
from moirai.memory import health as facade

MIB = 1 << 20

RunPython = Callable[..., str]


def of(resources: tuple[memory.ResourceHealth, ...], name: str) -> list[memory.ResourceHealth]:
    return [resource for resource in resources if resource.name == name]


def test_live_resources_are_listed_with_their_upstream_and_their_counts(
    run_python: RunPython,
) -> None:
    out = run_python("""
        from moirai import memory

        assert memory.health().resources == ()
        assert str(memory.health()) == "0 resources: healthy"
        large = memory.LargeObjectResource()
        stack = memory.LimitAdaptor(memory.StatisticsAdaptor(large), limit_bytes="1 GiB")
        other = memory.SystemResource()
        buffer = stack.allocate(1 << 20)
        health = memory.health()
        print(*((seen.number, seen.name, *seen.sources) for seen in health.resources))
        assert health.ok and health.findings == (), str(health)
        assert [seen.statistics.current_count for seen in health.resources] == [1, 1, 1, 0]
        assert health.resources[0].counts["large.used_bytes"] >= 1 << 20
        text = str(health)
        assert text.startswith("4 resources: healthy"), text
        assert "LimitAdaptor #3 over #2: 1 blocks, 1048576 bytes in use" in text, text
        del buffer, stack
        assert [seen.number for seen in memory.health().resources] == [1, 4]
    """)
    names = ["(1, 'LargeObjectResource')", "(2, 'StatisticsAdaptor', 1)"]
    names += ["(3, 'LimitAdaptor', 2)", "(4, 'SystemResource')"]
    assert out.strip() == " ".join(names)


def test_health_of_resources_in_use_by_many_threads_is_good() -> None:
    slab = memory.SlabResource(memory.LargeObjectResource())
    stack = memory.StatisticsAdaptor(memory.LimitAdaptor(slab, limit_bytes="1 GiB"))
    stop = threading.Event()

    def work() -> None:
        kept: list[memory.Buffer] = []
        while not stop.is_set():
            kept += [stack.allocate(size) for size in (64, 3000, 40_000, 200_000, MIB)]
            if len(kept) > 100:
                kept.clear()

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    reports = [memory.health() for _ in range(200)]
    stop.set()
    for thread in threads:
        thread.join()
    bad = [str(report) for report in reports if not report.ok]
    assert bad == []
    del bad, reports
    assert memory.health().findings == ()


def test_health_may_be_asked_in_many_threads_while_resources_come_and_go() -> None:
    failures: list[str] = []

    def work() -> None:
        for _ in range(100):
            stack = memory.StatisticsAdaptor(memory.PoolResource())
            buffer = stack.allocate(100_000)
            report = memory.health()
            if not report.ok:
                failures.append(str(report))
            del buffer, stack

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_a_resource_whose_upstream_is_dropped_first_loses_nothing() -> None:
    before = memory.health().findings
    for _ in range(50):
        upstream = memory.LargeObjectResource()
        slab = memory.SlabResource(upstream)
        slab.allocate(100)
        del upstream, slab
    gc.collect()
    assert memory.health().findings == before == ()


# --- what is wrong is found ---------------------------------------------------------------------

Look = list[tuple[Any, ...]]


def counts(**changes: int) -> SimpleNamespace:
    """Good counts of a resource with two blocks of 64 bytes out, with some of them changed."""
    good = {
        "current_bytes": 128, "current_count": 2, "peak_bytes": 192, "peak_count": 3,
        "total_bytes": 640, "total_count": 10, "hits": 7, "misses": 3, "resident_bytes": 4096,
        "cached_bytes": 1024,
    }  # fmt: skip
    return SimpleNamespace(**good | changes)


def look(
    number: int,
    name: str,
    *,
    upstream: int | None = None,
    findings: tuple[str, ...] = (),
    held: tuple[int, int] | None = None,
    before: SimpleNamespace | None = None,
    after: SimpleNamespace | None = None,
) -> tuple[Any, ...]:
    report = SimpleNamespace(findings=list(findings), counts={})
    sources = [] if upstream is None else [upstream]
    return (number, name, sources, before or counts(), report, held, after or counts())


@pytest.fixture
def walks(monkeypatch: pytest.MonkeyPatch) -> Callable[..., memory.Health]:
    """Ask for the health of resources that look so, one list of resources for each look."""

    def ask(*looks: Look, lost: tuple[tuple[int, str, int, int], ...] = ()) -> memory.Health:
        left = list(looks)
        native = SimpleNamespace(
            walk_resources=lambda: left.pop(0) if len(left) > 1 else left[0],
            lost_blocks=lambda: list(lost),
        )
        monkeypatch.setitem(facade.__globals__, "_native", native)
        return memory.health()

    return ask


def texts(report: memory.Health) -> list[str]:
    return [str(finding) for finding in report.findings]


def test_sound_resources_have_no_finding(walks: Callable[..., memory.Health]) -> None:
    below, above = look(1, "Large"), look(2, "Slab", upstream=1, held=(128, 2))
    assert walks([below, above]).findings == ()


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"hits": 8}, "8 hits and 3 misses are not 10 blocks"),
        ({"cached_bytes": 5000}, "5000 bytes are kept of 4096 that are held"),
        ({"peak_bytes": 64}, "bytes: 128 now, 64 at most, 640 in all do not ascend"),
        ({"total_count": 1, "hits": 0, "misses": 1}, "count: 2 now, 3 at most, 1 in all"),
        ({"current_count": 0}, "128 bytes are in 0 blocks"),
    ],
)
def test_counts_that_do_not_add_up_are_found(
    changes: dict[str, int], text: str, walks: Callable[..., memory.Health]
) -> None:
    wrong = counts(**changes)
    report = walks([look(1, "Large", before=wrong, after=wrong)])
    (finding,) = report.findings
    assert str(finding).startswith(f"Large #1: {text}")
    assert finding.settled
    assert not report.ok
    assert str(report).startswith(f"1 resource: 1 finding\n- Large #1: {text}")


@pytest.mark.parametrize("held", [((192, 2),), ((64, 3),), ((128, 1), (64, 1)), ((64, 1), (0, 2))])
def test_an_upstream_that_knows_less_than_is_held_is_found(
    held: tuple[tuple[int, int], ...], walks: Callable[..., memory.Health]
) -> None:
    above = [
        look(number, "Slab", upstream=1, held=share) for number, share in enumerate(held, start=2)
    ]
    report = walks([look(1, "Large"), *above])
    (finding,) = report.findings
    assert "Large #1: 2 blocks of 128 bytes are out, but" in str(finding)
    assert not report.ok


def test_what_a_walk_finds_is_reported_once_and_where_it_is(
    walks: Callable[..., memory.Health],
) -> None:
    report = walks(
        [
            look(1, "Large", findings=("two spans overlap",)),
            look(2, "Slab", upstream=1, findings=("a block is on two lists", "two spans overlap")),
        ]
    )
    assert texts(report) == ["Large #1: two spans overlap", "Slab #2: a block is on two lists"]
    assert not report.ok


def test_what_is_seen_at_a_busy_resource_is_said_but_does_not_count(
    walks: Callable[..., memory.Health],
) -> None:
    busy = look(1, "Large", findings=("odd",), after=counts(total_count=11, misses=4))
    report = walks([busy])
    assert texts(report) == ["Large #1: odd (seen while in use)"]
    assert report.ok
    assert not report.resources[0].settled


def test_what_is_gone_at_the_next_look_was_nothing(walks: Callable[..., memory.Health]) -> None:
    odd, sound = look(1, "Large", findings=("odd",)), look(1, "Large")
    assert walks([odd], [sound]).findings == ()
    flicker = walks([odd], [odd, look(2, "Slab")], [sound])
    assert flicker.findings == ()


def test_a_thread_that_stopped_between_two_counts_may_go_on_before_they_are_judged(
    walks: Callable[..., memory.Health],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rested: list[float] = []
    monkeypatch.setattr(time, "sleep", rested.append)
    odd, sound = look(1, "Slab", findings=("odd",)), look(1, "Slab")
    assert walks([odd], [odd], [sound]).findings == ()
    assert sum(rested) > 0.1
    rested.clear()
    assert walks([sound]).ok
    assert rested == []


def test_blocks_that_nobody_can_free_are_found(walks: Callable[..., memory.Health]) -> None:
    report = walks([look(2, "Large")], lost=((1, "Slab", 3, 192),))
    assert texts(report) == [
        "Slab #1: 3 blocks of 192 bytes are out, and nobody is left who could free them"
    ]
    assert not report.ok
