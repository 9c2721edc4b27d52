"""How a guard responds, in virtual time: samples go in, stages and actions come out."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import sys
import threading
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moirai.errors import Closed, InvalidArgument, OutOfMemory, Timeout
from moirai.pressure import (
    Action,
    ActionRecord,
    ConcurrencyCap,
    Guard,
    Registry,
    Sample,
    Sampler,
    Stage,
    Thresholds,
    start,
    stop,
)
from moirai.pressure.actions import Backoff, built_in_actions
from moirai.pressure.stages import StageClock

WAIT_SECONDS = 60
MIB = 1 << 20
LIMIT = 1000 * MIB


def sample(seconds: float, used_mib: float, *, cache_mib: float = 0) -> Sample:
    used = int(used_mib * MIB)
    return Sample(seconds, used, LIMIT, "test", without_cache_bytes=used - int(cache_mib * MIB))


@dataclass
class Program:
    """Memory that a test gives out: something grows, and caches can be shrunk."""

    used_mib: float = 0
    seconds: float = 0
    registry: Registry = field(default_factory=Registry)
    asked: list[tuple[str, int]] = field(default_factory=list)

    def read(self) -> Sample:
        return sample(self.seconds, self.used_mib)

    def cache(self, name: str, mib: float, **options: object) -> None:
        held = [mib]
        self.used_mib += mib

        def shrink(wanted_bytes: int) -> int:
            self.asked.append((name, wanted_bytes))
            freed = min(held[0], wanted_bytes / MIB)
            held[0] -= freed
            self.used_mib -= freed
            return int(freed * MIB)

        self.registry.register(name, shrink, size=lambda: int(held[0] * MIB), **options)  # type: ignore[arg-type]

    def guard(self, **options: object) -> Guard:
        made: dict[str, object] = {"forecaster": None, "built_in": (), **options}
        return Guard(self, registry=self.registry, **made)  # type: ignore[arg-type]

    def step(self, guard: Guard, seconds: float = 0.1) -> Stage:
        self.seconds += seconds
        return guard.step(self.read())


class Foretold:
    """A forecaster that says what a test wants."""

    def __init__(self, p_critical: Mapping[int, float]) -> None:
        self.p_critical = p_critical
        self.observed: list[tuple[float, int, int]] = []

    def observe(self, time_seconds: float, used_bytes: int, limit_bytes: int) -> None:
        self.observed.append((time_seconds, used_bytes, limit_bytes))

    def forecast(self) -> Foretold:
        return self


# Stages.


@pytest.mark.parametrize(
    ("used_mib", "stage"),
    [
        (699, Stage.CALM),
        (700, Stage.MONITOR),
        (800, Stage.GENTLE),
        (900, Stage.AGGRESSIVE),
        (950, Stage.EMERGENCY),
    ],
)
def test_the_level_chooses_the_stage(used_mib: float, stage: Stage) -> None:
    assert Program(used_mib).guard().step(sample(0, used_mib)) is stage


def test_file_cache_alone_is_no_reason_to_be_aggressive() -> None:
    guard = Program().guard()
    assert guard.step(sample(0, 990, cache_mib=300)) is Stage.GENTLE


@pytest.mark.parametrize(
    ("p_critical", "stage"),
    [
        ({30: 0.1, 60: 0.2, 120: 0.4}, Stage.CALM),
        ({30: 0.1, 60: 0.2, 120: 0.6}, Stage.MONITOR),
        ({30: 0.1, 60: 0.6, 120: 0.6}, Stage.GENTLE),
        ({30: 0.9, 60: 0.9, 120: 0.9}, Stage.AGGRESSIVE),
    ],
)
def test_a_forecast_chooses_the_stage_before_the_level_does(
    p_critical: Mapping[int, float], stage: Stage
) -> None:
    guard = Program().guard(forecaster=Foretold(p_critical))
    assert guard.step(sample(0, 500)) is stage
    assert guard.status().p_critical == p_critical


def test_the_forecaster_sees_a_sample_a_second() -> None:
    forecaster = Foretold({})
    guard = Program().guard(forecaster=forecaster)
    for tenth in range(31):
        guard.step(sample(tenth / 10, 100))
    assert [round(time) for time, *_ in forecaster.observed] == [0, 1, 2, 3]
    assert forecaster.observed[0][1:] == (100 * MIB, LIMIT)


class Raising(Foretold):
    def forecast(self) -> Foretold:
        raise RuntimeError("no idea")


@pytest.mark.parametrize("broken", [Raising({}), Foretold({60: "likely"})])  # type: ignore[dict-item]
def test_a_forecaster_that_fails_leaves_the_level(
    broken: Foretold, caplog: pytest.LogCaptureFixture
) -> None:
    guard = Program().guard(forecaster=broken)
    assert guard.step(sample(0, 850)) is Stage.GENTLE
    assert "responding to the level alone" in caplog.text


@pytest.mark.parametrize(
    ("used_mib", "cache_mib", "stage"),
    [
        (850, 0, Stage.AGGRESSIVE),
        (850, 100, Stage.GENTLE),
        (790, 0, Stage.MONITOR),
        (990, 800, Stage.GENTLE),
        (100, 0, Stage.CALM),
    ],
)
@pytest.mark.parametrize("sign", ["hits", "stalls"])
def test_the_kernel_confirms_pressure_and_never_makes_it(
    used_mib: int, cache_mib: int, stage: Stage, sign: str
) -> None:
    clock = StageClock(Thresholds())
    before = sample(0, 0)
    now = sample(1, used_mib, cache_mib=cache_mib)
    if sign == "hits":
        before = dataclasses.replace(before, total_limit_hits=7)
        now = dataclasses.replace(now, total_limit_hits=8)
    else:
        now = dataclasses.replace(now, stalled_ratio=0.2)
    assert clock.update(before, {}) is Stage.CALM
    assert clock.update(now, {}) is stage


def test_what_happened_before_the_first_sample_confirms_nothing() -> None:
    clock = StageClock(Thresholds())
    now = dataclasses.replace(sample(0, 850), total_limit_hits=100)
    assert clock.update(now, {}) is Stage.GENTLE
    later = dataclasses.replace(sample(1, 850), total_limit_hits=100)
    assert clock.update(later, {}) is Stage.GENTLE


def test_a_stage_ends_below_where_it_began_and_after_a_while() -> None:
    clock = StageClock(Thresholds())
    steps = [(0.0, 910), (0.1, 890), (5.0, 860), (5.1, 840), (5.5, 840), (6.2, 840), (7.5, 600)]
    stages = [clock.update(sample(time, used), {}) for time, used in steps]
    assert stages == [
        Stage.AGGRESSIVE,  # 91 %
        Stage.AGGRESSIVE,  # above 85 %
        Stage.AGGRESSIVE,
        Stage.AGGRESSIVE,  # below 85 %, for 0 s
        Stage.AGGRESSIVE,
        Stage.GENTLE,  # for 1.1 s
        Stage.GENTLE,  # below 75 %, for 0 s
    ]


@given(st.lists(st.integers(0, 1000), max_size=60))
def test_a_stage_is_never_below_what_the_level_asks_for(levels: list[int]) -> None:
    clock = StageClock(Thresholds())
    for index, level in enumerate(levels):
        now = sample(index / 10, level)
        assert clock.update(now, {}) >= Thresholds().stage(now, {})


def test_thresholds_are_checked() -> None:
    with pytest.raises(InvalidArgument, match="shares must grow"):
        Thresholds(monitor=0.9)
    with pytest.raises(InvalidArgument, match="probabilities"):
        Thresholds(gentle_p60=0)
    with pytest.raises(InvalidArgument, match="calm_below"):
        Thresholds(calm_below=0.8)


# Actions.


def test_the_cheapest_is_asked_first_and_only_for_what_is_missing() -> None:
    program = Program(used_mib=500)
    program.cache("dear", 200, cost=10)
    program.cache("cheap", 110, cost=1)
    guard = program.guard()

    assert program.step(guard) is Stage.GENTLE
    # From 810 down to 750 of 1000 MiB: the cheap one has all that.
    assert program.asked == [("cheap", 60 * MIB)]
    assert program.used_mib == 750
    (record,) = guard.records()
    assert (record.name, record.freed_bytes, record.outcome) == ("cheap", 60 * MIB, "done")
    assert guard.status().freed_bytes == 60 * MIB


def test_the_next_is_asked_for_what_the_first_has_not() -> None:
    program = Program(used_mib=620)
    program.cache("dear", 200, cost=10)
    program.cache("cheap", 30, cost=1)
    program.step(program.guard())
    assert program.asked == [("cheap", 100 * MIB), ("dear", 70 * MIB)]


def test_what_is_empty_is_not_asked() -> None:
    program = Program(used_mib=850)
    program.cache("empty", 0)
    program.step(program.guard())
    assert program.asked == []


def test_what_cannot_be_undone_waits_until_the_limit_is_near() -> None:
    program = Program(used_mib=50)
    program.cache("spill", 800, irreversible=True)
    guard = program.guard()
    assert program.step(guard) is Stage.GENTLE
    assert program.asked == []
    program.used_mib = 920
    assert program.step(guard) is Stage.AGGRESSIVE
    assert [name for name, _ in program.asked] == ["spill"]


def test_what_cannot_be_undone_is_done_when_the_forecast_is_certain() -> None:
    for p30, asked in ((0.8, False), (0.9, True)):
        program = Program(used_mib=50)
        program.cache("spill", 600, irreversible=True)
        program.step(program.guard(forecaster=Foretold({30: p30})))
        assert bool(program.asked) is asked


def test_while_there_is_pressure_it_goes_on_freeing() -> None:
    """No dead-lock of who pauses at one level and is only helped above another."""
    program = Program(used_mib=600)
    program.cache("cache", 300)
    guard = program.guard()
    program.step(guard)
    assert program.used_mib == 750
    # Within the hysteresis, below the threshold: somebody else grows again.
    program.used_mib = 790
    assert guard.stage is Stage.AGGRESSIVE
    program.step(guard, 0.5)
    assert program.used_mib == 750


def test_of_those_that_share_a_limit_one_acts_first() -> None:
    program = Program(used_mib=700)
    program.cache("cache", 150)
    guard = program.guard(leads=lambda: False)
    for _ in range(4):
        program.step(guard, 0.25)
    assert program.asked == []
    program.step(guard, 0.25)
    assert len(program.asked) == 1


def test_who_cannot_be_asked_whether_it_leads_acts(caplog: pytest.LogCaptureFixture) -> None:
    def leads() -> bool:
        raise ZeroDivisionError

    program = Program(used_mib=700)
    program.cache("cache", 150)
    program.step(program.guard(leads=leads))
    assert len(program.asked) == 1
    assert "failed: acting at once" in caplog.text


def test_in_an_emergency_all_act() -> None:
    program = Program(used_mib=800)
    program.cache("cache", 160)
    program.step(program.guard(leads=lambda: False))
    assert len(program.asked) == 1


def test_an_action_that_frees_nothing_rests_longer_each_time() -> None:
    registry = Registry()
    times: list[float] = []
    now = [0.0]

    def shrink(wanted_bytes: int) -> int:
        times.append(now[0])
        return 0

    registry.register("useless", shrink)
    guard = Guard(Program(), forecaster=None, registry=registry, built_in=())
    for tenth in range(400):
        now[0] = tenth / 10
        guard.step(sample(now[0], 850))
    gaps = [round(later - earlier, 1) for earlier, later in itertools.pairwise(times)]
    assert gaps == [1.0, 2.0, 4.0, 8.0, 16.0]


def test_near_the_limit_it_rests_a_second_at_most() -> None:
    backoff = Backoff()
    for _ in range(9):
        backoff.judge(0, 0, 0)
    assert backoff.rest_seconds == 60
    assert backoff.rests(30, Stage.AGGRESSIVE)
    assert backoff.rests(30, Stage.EMERGENCY)
    assert not backoff.rests(31, Stage.EMERGENCY)


def test_an_action_is_judged_by_bytes_for_its_time() -> None:
    backoff = Backoff()
    backoff.judge(0, MIB, 0.001)
    assert backoff.rest_seconds == 0
    backoff.judge(0, MIB, 1.0)
    assert backoff.rest_seconds == 1


def test_an_action_that_fails_is_recorded_and_the_others_are_taken(
    caplog: pytest.LogCaptureFixture,
) -> None:
    program = Program(used_mib=750)

    def fail(wanted_bytes: int) -> int:
        raise ValueError("no")

    program.registry.register("broken", fail, cost=0)
    program.cache("cache", 100)
    guard = program.guard()
    program.step(guard)
    broken, cache = guard.records()
    assert (broken.outcome, broken.error) == ("failed", "ValueError: no")
    assert "gentle: broken failed: ValueError: no" in caplog.text
    assert (cache.outcome, cache.freed_bytes) == ("done", 100 * MIB)


def test_a_dry_run_does_nothing_and_says_what_it_would() -> None:
    program = Program(used_mib=700)
    program.cache("cache", 200)
    records: list[ActionRecord] = []
    guard = program.guard(dry_run=True, on_action=records.append)
    program.step(guard)
    assert program.asked == []
    assert [record.outcome for record in records] == ["dry run"]
    assert guard.status().action_count == 0


def test_listeners_hear_of_stages_and_their_faults_are_kept_apart() -> None:
    program = Program(used_mib=710)
    heard: list[Stage] = []

    def listen(stage: Stage, now: Sample) -> None:
        heard.append(stage)
        raise RuntimeError("listener")

    guard = program.guard(on_stage=listen)
    program.step(guard)
    program.used_mib = 960
    assert program.step(guard) is Stage.EMERGENCY
    assert heard == [Stage.MONITOR, Stage.EMERGENCY]
    assert guard.status().highest_stage is Stage.EMERGENCY


def test_the_last_resort_is_called_when_nothing_helps() -> None:
    program = Program(used_mib=960)
    calls: list[float] = []
    guard = program.guard(stall_seconds=5, on_stall=lambda guard: calls.append(program.seconds))
    for _ in range(100):
        program.step(guard, 0.25)
    assert calls == [5.25]
    assert guard.status().stall_count == 1


def test_the_last_resort_waits_while_the_use_falls() -> None:
    program = Program(used_mib=1000)
    guard = program.guard(stall_seconds=5, on_stall=lambda guard: pytest.fail("it helped"))
    for _ in range(30):
        program.used_mib = max(955, program.used_mib * 0.985)
        program.step(guard, 0.3)
        if program.used_mib == 955:
            break


def test_collections_keep_to_their_budget() -> None:
    now = [0.0]

    def clock() -> float:
        now[0] += 0.1  # Each collection seems to take 0.1 s.
        return now[0]

    collection = {each.name: each for each in built_in_actions(clock)}["gc"]
    taken = 0
    for _ in range(10):
        if collection.ready(LIMIT):
            collection.run(1)
            taken += 1
    assert 1 <= taken < 5
    now[0] += 100
    assert collection.ready(LIMIT)


# Registration.


def test_a_method_is_held_weakly_and_a_function_until_unregistered() -> None:
    class Cache:
        def shrink(self, wanted_bytes: int) -> int:
            return 0

    registry = Registry()
    cache = Cache()
    registry.register("method", cache.shrink)
    registration = registry.register("function", lambda wanted: 0)
    owner = Cache()
    registry.register("owned", lambda wanted: 0, owner=owner)
    assert {each.name for each in registry.live()} == {"method", "function", "owned"}
    del cache, owner
    gc.collect()
    assert [each.name for each in registry.live()] == ["function"]
    registration.unregister()
    registration.unregister()
    assert registry.live() == []


def test_a_finalizer_may_unregister_at_any_time() -> None:
    registry = Registry()

    class Session:
        def __init__(self) -> None:
            self.itself = self  # for the collector alone
            self.registration = registry.register("session", self.shrink)

        def shrink(self, wanted_bytes: int) -> int:
            return 0

        def __del__(self) -> None:
            self.registration.unregister()

    threshold = gc.get_threshold()
    gc.set_threshold(1)
    try:
        for _ in range(300):
            Session()
            registry.live()
    finally:
        gc.set_threshold(*threshold)
    gc.collect()
    assert registry.live() == []


class Slotted:
    """What cannot be held weakly."""

    __slots__ = ()

    def shrink(self, wanted_bytes: int) -> int:
        return 0


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"shrink": 1}, TypeError, "shrink: must be callable, got int"),
        ({"size": 1}, TypeError, "size: must be callable or None, got int"),
        ({"cost": -1}, InvalidArgument, "cost: must be a number of at least 0, got -1"),
        ({"cost": "1"}, InvalidArgument, "cost: must be a number of at least 0, got '1'"),
        ({"name": 1}, TypeError, "name: must be a str, got int"),
        ({"owner": {}}, TypeError, "owner: must be one that can be held weakly, got dict"),
        (
            {"shrink": Slotted().shrink},
            TypeError,
            "methods of an object that can be held weakly, got Slotted",
        ),
    ],
)
def test_a_registration_is_checked(
    arguments: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Registry().register(**{"name": "x", "shrink": lambda wanted: 0, **arguments})  # type: ignore[arg-type]


# The cap.


def test_the_cap_falls_by_what_is_in_flight_and_rises_one_by_one() -> None:
    cap = ConcurrencyCap(10)
    for _ in range(8):
        assert cap.try_acquire()
    cap.adapt(0.0, under_pressure=True)
    assert cap.limit == 5
    cap.adapt(0.1, under_pressure=True)
    assert cap.limit == 5
    cap.adapt(0.6, under_pressure=True)
    assert cap.limit == 3
    assert not cap.try_acquire()
    limits = []
    for tenth in range(7, 50):
        cap.adapt(tenth / 10, under_pressure=False)
        limits.append(cap.limit)
    assert limits == sorted(limits)
    assert cap.limit == 10
    assert not cap.is_capped


def test_one_may_always_run() -> None:
    cap = ConcurrencyCap(4)
    for second in range(20):
        cap.adapt(second, under_pressure=True)
    assert cap.limit == 1
    with cap.slot(timeout_seconds=0), pytest.raises(Timeout, match="1 in flight, 1 of 4 allowed"):
        cap.acquire(timeout_seconds=0)
    assert cap.in_flight == 0
    with pytest.raises(InvalidArgument, match="nothing is in flight"):
        cap.release()


def test_who_waits_for_the_cap_is_let_in_when_it_rises() -> None:
    cap = ConcurrencyCap(2)
    cap.adapt(0, under_pressure=True)
    assert cap.limit == 1
    cap.acquire()
    waiting = threading.Thread(target=cap.acquire)
    waiting.start()
    cap.adapt(1, under_pressure=False)
    waiting.join(60)
    assert cap.in_flight == 2


def test_an_interrupt_of_who_is_let_in_lets_the_next_one_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cap = ConcurrencyCap(1)
    cap.acquire()
    is_waiting = threading.Event()
    begun = threading.Event()
    wait = cap._condition.wait

    def acquire() -> None:
        cap.acquire()
        begun.set()

    def wait_as_the_next(timeout: float | None) -> bool:
        is_waiting.set()  # Holds the lock until it waits.
        return wait(timeout)

    monkeypatch.setattr(cap._condition, "wait", wait_as_the_next)
    threading.Thread(target=acquire, daemon=True).start()
    assert is_waiting.wait(WAIT_SECONDS)

    def wait_until_interrupted(timeout: float | None) -> bool:
        cap._in_flight -= 1  # A release, which calls this one,
        raise KeyboardInterrupt  # and Ctrl-C before it could begin.

    with monkeypatch.context() as patch:
        patch.setattr(cap._condition, "wait", wait_until_interrupted)
        with pytest.raises(KeyboardInterrupt):
            cap.acquire()
    assert begun.wait(WAIT_SECONDS)


def test_a_forked_child_has_nothing_in_flight(run_python: Callable[..., str]) -> None:
    run_python(
        """
import os
from moirai.pressure import ConcurrencyCap

cap = ConcurrencyCap(1)
with cap.slot():
    child = os.fork()
    if child:
        assert os.waitpid(child, 0)[1] == 0
        assert cap.in_flight == 1
    else:
        assert cap.in_flight == 0
        assert cap.try_acquire()
if child == 0:
    os._exit(0 if cap.in_flight == 1 else 1)
"""
    )


def test_a_guard_moves_its_caps() -> None:
    program = Program(used_mib=850)
    guard = program.guard()
    cap = guard.cap(10)
    program.step(guard)
    assert cap.limit < 10


# Reservations.


def test_what_fits_is_promised_once() -> None:
    program = Program(used_mib=400)
    guard = program.guard()
    with guard.reserve("500 MiB") as size:
        assert size == 500 * MIB
        assert guard.status().reserved_bytes == size
        with pytest.raises(OutOfMemory, match="cannot reserve"), guard.reserve("200 MiB"):
            pass
    assert guard.status().reserved_bytes == 0
    with guard.reserve("500 MiB"):
        pass


def test_room_is_made_for_what_does_not_fit() -> None:
    program = Program(used_mib=400)
    program.cache("cache", 300)
    guard = program.guard()
    with guard.reserve("500 MiB", margin=0):
        assert program.asked == [("cache", 200 * MIB)]
    assert guard.records()[0].stage is Stage.EMERGENCY


def test_a_reservation_that_is_refused_names_what_is_in_the_way() -> None:
    program = Program(used_mib=900)
    with (
        pytest.raises(OutOfMemory, match=r"943718400 of 1048576000 are in use, 0 reserved"),
        program.guard().reserve("500 MiB"),
    ):
        pass


def test_a_reservation_ends_when_actions_only_say_that_they_free() -> None:
    program = Program(used_mib=900)
    asked: list[int] = []

    def shrink(wanted_bytes: int) -> int:
        asked.append(wanted_bytes)
        return wanted_bytes

    program.registry.register("braggart", shrink)
    with pytest.raises(OutOfMemory), program.guard().reserve("500 MiB"):
        pass
    assert len(asked) == 1


def test_an_interrupt_while_room_is_made_reaches_who_reserves() -> None:
    program = Program(used_mib=900)

    def shrink(wanted_bytes: int) -> int:
        raise KeyboardInterrupt

    program.registry.register("slow", shrink)
    guard = program.guard()
    with pytest.raises(KeyboardInterrupt), guard.reserve("500 MiB"):
        pass
    assert guard.status().reserved_bytes == 0


@pytest.mark.parametrize("seconds", [-1, float("nan")])
def test_the_time_of_a_reservation_is_checked(seconds: float) -> None:
    with (
        pytest.raises(InvalidArgument, match="timeout_seconds: must be at least 0, got"),
        Program().guard().reserve(1, timeout_seconds=seconds),
    ):
        pass


def test_what_is_reserved_during_a_fork_is_given_back_in_the_parent_alone(
    run_python: Callable[..., str],
) -> None:
    run_python(
        """
import os
from moirai import pressure

guard = pressure.Guard(pressure.Sampler(), forecaster=None).start()
with guard.reserve("1 MiB"):
    child = os.fork()
reserved = guard.status().reserved_bytes
if child == 0:
    os._exit(0 if reserved == 0 else 1)
assert os.waitpid(child, 0)[1] == 0
assert reserved == 0
guard.stop()
"""
    )


# Threads.


def test_only_a_sampler_can_be_watched() -> None:
    with pytest.raises(InvalidArgument, match="must be a Sampler to be watched, got Program"):
        Program().guard().start()


def test_numbers_are_checked() -> None:
    with pytest.raises(InvalidArgument, match="stall_seconds"):
        Guard(Program(), stall_seconds=-1)
    with pytest.raises(TypeError, match="on_stall: must be callable or None, got int"):
        Guard(Program(), on_stall=5)  # type: ignore[arg-type]
    for limit in (0, 1 << 63):
        with pytest.raises(
            InvalidArgument, match=r"limit: must be from 1 to 2\*\*63 - 1 bytes, got"
        ):
            start(limit=limit)
    with pytest.raises(TypeError, match="fence: must be a bool or a Fence, got str"):
        start(fence="yes")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="fence: must be Fence or None, got bool"):
        Sampler(fence=True)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="budget_process_id: must be from 1 to 2147483647"):
        Sampler(budget_process_id=-1)
    with pytest.raises(TypeError, match="maximum: must be an int, got float"):
        ConcurrencyCap(1.5)  # type: ignore[arg-type]
    for seconds in (-1, float("nan"), 1e300):
        with pytest.raises(InvalidArgument, match="timeout_seconds: must be None or a number from"):
            ConcurrencyCap(1).acquire(timeout_seconds=seconds)
    with pytest.raises(TypeError, match="thresholds: must be Thresholds or None, got int"):
        Guard(Program(), thresholds=5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="registry: must be Registry, got list"):
        Guard(Program(), registry=[])  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match='forecaster: must be "default", a forecaster'):
        Guard(Program(), forecaster=5)  # type: ignore[arg-type]


def watched(registry: Registry, tree_root: object, **options: object) -> Guard:
    sampler = Sampler(root=tree_root, longest_seconds=0.01)  # type: ignore[arg-type]
    made: dict[str, object] = {"forecaster": None, "built_in": (), **options}
    return Guard(sampler, registry=registry, **made)  # type: ignore[arg-type]


def thread_names() -> list[str]:
    return [thread.name for thread in threading.enumerate()]


@pytest.fixture
def full_tree(tmp_path) -> object:  # type: ignore[no-untyped-def]
    from pressure_trees import Tree

    tree = Tree(tmp_path)
    tree.join_v2("/a")
    tree.v2("a", current_mib=990, maximum_mib=1000)
    return tree.root


def test_a_watched_process_has_its_actions_taken_on_another_thread(full_tree: object) -> None:
    registry = Registry()
    called = threading.Event()
    threads: list[str] = []

    def shrink(wanted_bytes: int) -> int:
        threads.append(threading.current_thread().name)
        called.set()
        return 0

    registry.register("cache", shrink)
    with watched(registry, full_tree) as guard:
        assert called.wait(60)
        assert guard.stage is Stage.EMERGENCY
    assert threads[0] == "moirai-actions"
    assert "moirai-guard" not in thread_names()


def test_an_action_that_hangs_is_left_to_itself(full_tree: object) -> None:
    registry = Registry()
    release = threading.Event()
    other = threading.Event()
    hangs = [0]

    def hang(wanted_bytes: int) -> int:
        hangs[0] += 1
        release.wait(60)
        return 0

    registry.register("hangs", hang, cost=0)

    def helps(wanted_bytes: int) -> int:
        other.set()
        return MIB

    registry.register("helps", helps)
    with watched(registry, full_tree, action_timeout_seconds=0.01) as guard:
        assert other.wait(60)
        assert hangs == [1]
        release.set()
        first = guard.records()[0]
        assert (first.name, first.outcome) == ("hangs", "timed out")


def test_a_size_that_hangs_is_left_to_itself(full_tree: object) -> None:
    release = threading.Event()
    helped = threading.Event()

    def hang() -> int:
        release.wait(WAIT_SECONDS)
        return 1

    def help_out(wanted_bytes: int) -> int:
        helped.set()
        return MIB

    registry = Registry()
    registry.register("hangs", lambda wanted: 0, size=hang, cost=0)
    registry.register("helps", help_out)
    with watched(registry, full_tree, action_timeout_seconds=0.01) as guard:
        has_helped = helped.wait(WAIT_SECONDS / 2)
        release.set()
    assert has_helped
    first = guard.records()[0]
    assert (first.name, first.outcome) == ("hangs", "timed out")


def test_stopping_waits_for_no_action(full_tree: object) -> None:
    registry = Registry()
    release = threading.Event()
    asked = threading.Event()

    def hang(wanted_bytes: int) -> int:
        asked.set()
        release.wait(60)
        return 0

    registry.register("hangs", hang)
    registry.register("hangs too", hang)
    guard = watched(registry, full_tree, action_timeout_seconds=3600).start()
    assert asked.wait(60)
    assert "moirai-guard" in thread_names()
    guard.stop()
    assert "moirai-guard" not in thread_names()
    release.set()
    assert [record.name for record in guard.records()] == ["hangs"]


@pytest.mark.parametrize("error", [SystemExit, ZeroDivisionError])
def test_the_watch_goes_on_whatever_its_listeners_raise(
    full_tree: object, error: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    asked = threading.Event()
    told: list[object] = []

    def listener(*arguments: object) -> None:
        told.append(arguments)
        raise error

    def shrink(wanted_bytes: int) -> int:
        if told:
            asked.set()
        return 0

    registry = Registry()
    registry.register("cache", shrink)
    with watched(registry, full_tree, on_stage=listener):
        assert asked.wait(60)
    assert ("sys.exit ends no program" in caplog.text) == (error is SystemExit)


def test_a_guard_whose_thread_cannot_be_started_can_be_started_again(
    full_tree: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    guard = watched(Registry(), full_tree)

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            guard.start()
    guard.stop()
    with guard:
        assert "moirai-guard" in thread_names()


def test_a_guard_whose_sampler_was_stopped_can_be_started_again() -> None:
    sampler = Sampler(longest_seconds=0.01)
    with Guard(sampler, forecaster=None, registry=Registry(), built_in=()) as guard:
        (thread,) = (each for each in threading.enumerate() if each.name == "moirai-guard")
        sampler.stop()
        thread.join(60)
        assert "moirai-guard" not in thread_names()
        guard.start()
        assert "moirai-guard" in thread_names()
        assert sampler.is_running


def test_a_process_starts_one_guard_however_many_threads_ask() -> None:
    begin = threading.Barrier(8)
    made: list[Guard] = []
    refused: list[InvalidArgument] = []

    def ask() -> None:
        begin.wait()
        try:
            made.append(start(forecaster=None))
        except InvalidArgument as refusal:
            refused.append(refusal)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stop()
    assert (len(made), len(refused)) == (1, 7)


def test_a_source_that_ends_ends_the_watch() -> None:
    guard = Guard(Sampler(longest_seconds=0.01))
    with guard:
        pass
    with pytest.raises(Closed):
        guard.source.next()  # type: ignore[attr-defined]


def test_decisions_are_as_rare_as_calm_lets_them_be() -> None:
    program = Program()
    guard = Guard(program, registry=program.registry, forecaster=None, built_in=())
    cap = guard.cap(4)
    assert guard._rest_seconds(0.0) == 0.005  # nothing was seen yet
    guard.step(sample(0, 300))
    assert guard._rest_seconds(1.0) == 0.25
    guard.step(sample(1, 750))
    assert guard.stage is Stage.MONITOR
    assert guard._rest_seconds(0.001) == pytest.approx(0.004)
    guard.step(sample(2, 690))
    guard.step(sample(9, 640))
    guard.step(sample(20, 640))
    assert guard.stage is Stage.CALM
    # At a gibibyte a second, gentle is so far away.
    assert guard._rest_seconds(0.0) == pytest.approx((800 - 640) / 1024, rel=0.01)
    guard.relieve()
    assert guard._rest_seconds(0.0) == 0.005
    guard.step(sample(30, 990))
    guard.step(sample(31, 300))
    guard.step(sample(33, 300))
    assert (guard.stage, cap.is_capped) == (Stage.CALM, True)
    assert guard._rest_seconds(0.0) == 0.005  # it rises by one each half second


def test_what_is_built_in_gives_memory_back() -> None:
    import numpy as np

    from moirai import memory

    pool = memory.PoolResource()
    with memory.use(pool):
        array = np.ones(8 * MIB, dtype=np.uint8)
        del array
    assert pool.statistics().cached_bytes > 0
    resources: Action = {each.name: each for each in built_in_actions()}["moirai resources"]
    assert (resources.run(1) or 0) > 0
    assert pool.statistics().cached_bytes == 0


def test_pools_give_up_what_is_idle() -> None:
    from moirai import pools

    actions = {each.name: each for each in built_in_actions()}
    destroyed: list[object] = []
    pool = pools.ObjectPool(object, destroy=destroyed.append, min_size=1)
    buffers = pools.BufferPool()
    vectors = pools.VectorPool()
    held = [pool.acquire() for _ in range(4)]
    for each in held:
        pool.release(each)
    buffers.acquire(100).release()
    vectors.acquire().release()
    actions["idle pools"].run(1)
    assert destroyed == []  # what was used just now stays
    assert actions["pools"].run(1) is None
    assert len(destroyed) == 3
    assert (buffers.trim(0), vectors.trim(0)) == (0, 0)
    assert actions["pools"].stage is Stage.AGGRESSIVE


def test_a_pool_that_is_gone_is_not_asked() -> None:
    from moirai import pools
    from moirai.pools import live

    pool = pools.ObjectPool(object)
    before = len(live._pools)
    del pool
    gc.collect()
    assert len(live._pools) < before


def test_executors_run_fewer_tasks_under_pressure() -> None:
    from moirai.executor import Executor

    program = Program(used_mib=850)
    guard = program.guard()
    with Executor(8) as executor:
        program.step(guard)
        assert executor.allowed_count == 1  # nothing was running
        assert sum(executor.map(abs, range(100))) == sum(range(100))
        program.used_mib = 100
        allowed = []
        for _ in range(8):
            program.step(guard, 1.1)
            allowed.append(executor.allowed_count)
        assert allowed == [1, 2, 3, 4, 5, 6, 7, 8]


def test_modules_that_are_being_imported_hold_nothing_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("moirai.pools.live", "moirai.executor.threads", "moirai.executor.process_pool"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    program = Program(used_mib=850)
    program.cache("cache", 10)
    guard = program.guard(built_in=None)
    program.step(guard)
    assert [record.name for record in guard.records() if record.outcome == "failed"] == []
    assert len(program.asked) == 1


def test_executors_of_processes_run_fewer_tasks_under_pressure() -> None:
    from moirai.executor import ProcessExecutor

    program = Program(used_mib=850)
    guard = program.guard()
    with ProcessExecutor(3) as executor:
        program.step(guard)
        assert executor.allowed_count == 1
        program.used_mib = 100
        allowed = []
        for _ in range(3):
            program.step(guard, 1.1)
            allowed.append(executor.allowed_count)
        assert allowed == [1, 2, 3]


def test_a_guard_that_stops_lifts_its_caps(full_tree: object) -> None:
    from moirai.executor import Executor

    with Executor(4) as executor:
        with watched(Registry(), full_tree) as guard:
            cap = guard.cap(4)
            while executor.allowed_count == 4 or not cap.is_capped:
                guard.source.next(timeout_seconds=60)  # type: ignore[attr-defined]
        assert executor.allowed_count == 4
        assert not cap.is_capped


def test_a_listener_that_stops_its_guard_leaves_no_cap(full_tree: object) -> None:
    from moirai.executor import Executor

    guard: Guard
    stopped = threading.Event()

    def listen(stage: Stage, now: Sample) -> None:
        guard.stop()
        stopped.set()

    with Executor(4) as executor:
        guard = watched(Registry(), full_tree, on_stage=listen)
        cap = guard.cap(4)
        guard.start()
        assert stopped.wait(WAIT_SECONDS)
        guard.stop()  # Waits for the thread.
        assert "moirai-guard" not in thread_names()
        assert executor.allowed_count == 4
        assert not cap.is_capped


def test_who_waits_for_a_cap_is_let_in_when_its_guard_stops() -> None:
    program = Program(used_mib=850)
    guard = program.guard()
    cap = guard.cap(2)
    program.step(guard)
    cap.acquire()
    waiting = threading.Thread(target=cap.acquire, daemon=True)
    waiting.start()
    guard.stop()
    waiting.join(WAIT_SECONDS)
    assert cap.in_flight == 2


def test_no_guard_starts_while_it_stops(full_tree: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else its sampler would be stopped under the one that has just started."""
    guard = watched(Registry(), full_tree).start()
    stop_sampler = guard.source.stop  # type: ignore[attr-defined]
    could_start: list[bool] = []

    def ask_to_start() -> None:
        could_start.append(guard._run_lock.acquire(blocking=False))

    def stop_and_ask() -> None:
        other = threading.Thread(target=ask_to_start)
        other.start()
        other.join(WAIT_SECONDS)
        stop_sampler()

    monkeypatch.setattr(guard.source, "stop", stop_and_ask)
    guard.stop()
    assert could_start == [False]


Runner = Callable[..., str]


def test_a_guard_that_is_stepped_through_is_free_in_a_forked_child(run_python: Runner) -> None:
    run_python("""
        import os, signal, threading
        from moirai import pressure

        in_step, go_on = threading.Event(), threading.Event()

        def listen(stage, sample):
            in_step.set()
            go_on.wait(60)

        guard = pressure.Guard(
            pressure.Source(), registry=pressure.Registry(), built_in=(), on_stage=listen
        )
        sample = pressure.Sample(0.0, 99, 100)
        thread = threading.Thread(target=guard.step, args=(sample,))
        thread.start()
        assert in_step.wait(60)
        child = os.fork()
        if child == 0:
            signal.alarm(30)  # Who waits for the lock of a thread that is not there waits for ever.
            guard.step(sample)
            os._exit(0)
        go_on.set()
        thread.join()
        assert os.waitpid(child, 0)[1] == 0
    """)


def test_a_program_may_end_without_stopping_its_guard(run_python: Runner) -> None:
    for _ in range(5):
        run_python("""
            from moirai.pressure import Guard, Sampler

            guard = Guard(Sampler(longest_seconds=0.005)).start()
            guard.source.next(timeout_seconds=60)
        """)


def test_a_guard_goes_on_in_a_forked_child(run_python: Runner) -> None:
    run_python("""
        import os, threading
        from moirai import pressure

        guard = pressure.start(limit="1 GiB")
        cap = guard.cap(4)
        cap.acquire()
        child = os.fork()
        if child == 0:
            seen = threading.Event()
            block = bytearray(900 << 20)
            while guard.stage < pressure.Stage.GENTLE:
                pressure.current().source.next(timeout_seconds=60)
            ok = cap.in_flight == 0
            os._exit(0 if ok else 1)
        assert os.waitpid(child, 0)[1] == 0
        pressure.stop()
        try:
            pressure.current()
        except Exception as error:
            assert "no guard" in str(error)
    """)
