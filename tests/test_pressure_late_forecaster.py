"""The guard's own forecaster: when it is loaded, and what becomes of a guard that has none."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator

import pytest
from pressure_trees import MIB

from moirai.errors import InvalidArgument
from moirai.pressure import Forecast, Guard, Registry, Sample, Stage, TraceSource
from moirai.pressure.late_forecaster import LateForecaster

LIMIT = 4096 * MIB
Runner = Callable[..., str]


def guard_of_trace() -> Guard:
    """A guard in virtual time."""
    return Guard(TraceSource("/dev/null"), registry=Registry(), built_in=())


def leak(mib_per_second: float) -> Iterator[Sample]:
    """A program that grows until it is at 79 % of the limit."""
    second, used = 0.0, 0.1 * LIMIT
    while used < 0.79 * LIMIT:
        yield Sample(second, int(used), LIMIT)
        second += 1
        used += mib_per_second * MIB


def test_a_leak_is_answered_before_the_level_calls_for_it() -> None:
    guard = guard_of_trace()
    stages = [(guard.step(sample), sample.used_ratio) for sample in leak(20)]
    first = next(level for stage, level in stages if stage >= Stage.GENTLE)
    assert 0.5 <= first < 0.8
    assert isinstance(guard.outlook, Forecast)
    assert guard.status().p_critical == guard.outlook.p_critical


class Certain:
    """Is sure of a crossing, always."""

    p_critical = dict.fromkeys((30, 60, 120), 1.0)

    def observe(self, time_seconds: float, used_bytes: float, limit_bytes: float | None) -> None:
        """Forget it."""

    def forecast(self) -> Certain:
        return self


def test_below_half_of_the_limit_a_forecast_is_no_reason() -> None:
    guard = Guard(TraceSource("/dev/null"), registry=Registry(), built_in=(), forecaster=Certain())
    for sample in leak(60):
        stage = guard.step(sample)
        if sample.used_ratio < 0.5:
            assert stage is Stage.CALM
    assert stage >= Stage.GENTLE


def test_it_is_loaded_at_a_quarter_of_the_limit_and_told_what_came_before() -> None:
    late = LateForecaster(in_background=False)
    for second in range(20):
        late.observe(float(second), LIMIT // 5, LIMIT)
    assert (late.loaded, late.forecast()) == (None, None)
    late.observe(20.0, LIMIT // 4, LIMIT)
    assert late.loaded is not None
    forecast = late.forecast()
    assert forecast is not None
    assert (forecast.time_seconds, forecast.confidence > 0) == (20.0, True)


def test_numpy_is_not_imported_where_there_is_little_room(run_python: Runner) -> None:
    run_python("""
        import sys
        from moirai.pressure.late_forecaster import LateForecaster

        late = LateForecaster(in_background=False)
        late.observe(0.0, 150 << 20, 400 << 20)
        assert late.loaded is None and "numpy" not in sys.modules
        late.observe(0.0, 150 << 20, 600 << 20)
        assert late.loaded is not None
    """)


def test_numpy_is_not_imported_where_a_fence_leaves_little_room(run_python: Runner) -> None:
    run_python("""
        import sys
        from moirai.pressure.late_forecaster import LateForecaster

        room = 64 << 20
        late = LateForecaster(in_background=False, fence_room=lambda: room)
        late.observe(0.0, 150 << 20, 600 << 20)
        assert late.loaded is None and "numpy" not in sys.modules
        room = None
        late.observe(0.0, 150 << 20, 600 << 20)
        assert late.loaded is not None
    """)


def test_a_thread_that_cannot_be_started_is_tried_again(run_python: Runner) -> None:
    run_python("""
        import os, threading
        from moirai.pressure.late_forecaster import LateForecaster

        late, start = LateForecaster(in_background=True), threading.Thread.start
        def refuse(thread):
            raise RuntimeError("can't start new thread")
        threading.Thread.start = refuse
        try:
            late.observe(0.0, 600 << 20, 1 << 30)
        except RuntimeError:
            pass
        threading.Thread.start = start
        child = os.fork()  # which waits for loaders
        if child == 0:
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        late.observe(1.0, 600 << 20, 1 << 30)
        late._loader.join(60)
        assert late.loaded is not None
    """)


def test_a_guard_whose_numpy_is_broken_goes_by_the_level(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken:
        def __getattr__(self, name: str) -> object:
            raise KeyError(name)

    caplog.set_level("INFO", "moirai.pressure")
    monkeypatch.setitem(sys.modules, "moirai.pressure.forecaster", Broken())  # type: ignore[arg-type]
    guard = guard_of_trace()
    assert guard.step(Sample(0.0, LIMIT * 96 // 100, LIMIT)) is Stage.EMERGENCY
    assert caplog.text.count("the level alone decides") == 1


def test_a_guard_without_numpy_goes_by_the_level(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "moirai.pressure")
    monkeypatch.setitem(sys.modules, "moirai.pressure.forecaster", None)
    guard = guard_of_trace()
    assert guard.step(Sample(0.0, LIMIT // 2, LIMIT)) is Stage.CALM
    assert guard.step(Sample(1.0, LIMIT * 85 // 100, LIMIT)) is Stage.GENTLE
    assert guard.step(Sample(2.0, LIMIT * 96 // 100, LIMIT)) is Stage.EMERGENCY
    assert caplog.text.count("the level alone decides") == 1


def test_it_is_loaded_on_a_thread_of_its_own() -> None:
    late = LateForecaster(in_background=True)
    late.observe(0.0, LIMIT // 2, LIMIT)
    loader = late._loader
    assert loader is not None
    assert loader is not threading.main_thread()
    loader.join(60)
    assert late.forecast() is not None


def test_after_failures_a_forecaster_is_asked_less_and_less() -> None:
    class Broken:
        asked = 0

        def observe(self, time_seconds: float, used_bytes: int, limit_bytes: int) -> None:
            self.asked += 1
            raise MemoryError

        def forecast(self) -> None:
            raise AssertionError

    broken = Broken()
    guard = Guard(TraceSource("/dev/null"), registry=Registry(), forecaster=broken)
    for second in range(31):
        guard.step(Sample(float(second), LIMIT // 2, LIMIT))
    assert broken.asked == 5  # at 0, 2, 6, 14 and 30 s


def test_another_word_is_refused() -> None:
    with pytest.raises(InvalidArgument, match='must be "default", a forecaster or None'):
        Guard(TraceSource("/dev/null"), forecaster="best")  # type: ignore[arg-type]


def test_a_child_forked_while_it_is_asked_can_ask_too(run_python: Runner) -> None:
    run_python("""
        import os, threading
        from moirai.pressure import Forecaster

        forecaster = Forecaster()
        stopping = threading.Event()

        def ask():
            second = 0
            while not stopping.is_set():
                forecaster.observe(second, 1e6 * second, 1e12)
                forecaster.forecast()
                second += 1

        thread = threading.Thread(target=ask)
        thread.start()
        for _ in range(50):
            child = os.fork()
            if child == 0:
                forecaster.forecast()
                os._exit(0)
            assert os.waitpid(child, 0)[1] == 0
        stopping.set()
        thread.join()
    """)
