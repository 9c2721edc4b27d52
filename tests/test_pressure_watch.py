"""The threads that have a guard decide: what they outlast, and when they end."""

from __future__ import annotations

import threading

import pytest

from moirai.errors import Closed, OutOfMemory, Timeout
from moirai.pressure import Sample, Sampler
from moirai.pressure.watch import Watch

WAIT_SECONDS = 60

ERRORS = [
    ZeroDivisionError(),
    Closed("a channel of the program's own"),
    Timeout("somebody else's time"),
    OutOfMemory("nothing left"),
    SystemExit(1),
]


@pytest.mark.parametrize("error", ERRORS, ids=[type(each).__name__ for each in ERRORS])
@pytest.mark.parametrize("where", ["decide", "rest"])
def test_it_goes_on_whatever_is_raised(
    error: BaseException, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[str] = []
    again = threading.Event()

    def called(what: str) -> None:
        calls.append(what)
        if calls.count(where) == 2:
            again.set()
        if what == where:
            raise error

    def decide(sample: Sample) -> None:
        called("decide")

    def rest_seconds(elapsed_seconds: float) -> float:
        called("rest")
        return 0.0

    sampler = Sampler(longest_seconds=0.005)
    watch = Watch(sampler, decide=decide, rest_seconds=rest_seconds)
    watch.start()
    assert again.wait(WAIT_SECONDS)
    assert watch.is_running
    watch.end()
    sampler.stop()
    watch.join()
    assert not watch.is_running
    assert isinstance(error, MemoryError) == ("a decision failed" not in caplog.text)


def test_it_ends_with_its_sampler() -> None:
    sampler = Sampler(longest_seconds=0.005)
    decided = threading.Event()
    watch = Watch(sampler, decide=lambda sample: decided.set(), rest_seconds=lambda elapsed: 0.0)
    watch.start()
    assert decided.wait(WAIT_SECONDS)
    sampler.stop()
    watch.join()
    assert not watch.is_running
