"""What a guard can do of itself, and how an action that frees nothing comes to rest."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from moirai import _native
from moirai._arguments import check_bool, check_callable, check_instance
from moirai.pressure.own import trim_idle_pools, trim_pools
from moirai.pressure.registry import Registration, Registry
from moirai.pressure.stages import Stage

__all__ = ["Action", "ActionRecord", "Backoff", "actions_for", "built_in_actions"]

# The heap of libc is worth trimming from so many bytes on, or from this share of the limit.
TRIM_BYTES = 16 << 20
TRIM_RATIO = 0.01


@dataclass(frozen=True)
class ActionRecord:
    """One action that a guard took, or would have taken.

    Attributes:
        time_seconds: When, by the clock of the samples.
        stage: The stage that asked for it.
        name: What was asked.
        wanted_bytes: How much was to be freed.
        freed_bytes: What came of it, as the action or its size says; if neither does, by how much
            the resident set fell; None if that is not known either.
        duration_seconds: How long it took.
        outcome: "done", "failed", "timed out" or "dry run".
        error: What a failed action raised.
    """

    time_seconds: float
    stage: Stage
    name: str
    wanted_bytes: int
    freed_bytes: int | None
    duration_seconds: float
    outcome: str
    error: str | None = None


@dataclass
class Backoff:
    """How long an action rests: twice as long each time that it frees little for its time."""

    FIRST_SECONDS = 1.0
    LONGEST_SECONDS = 60.0
    LEAST_BYTES = 64 << 10
    LEAST_BYTES_PER_MILLISECOND = 16 << 10

    rest_seconds: float = 0.0
    until_seconds: float = float("-inf")

    def judge(self, time_seconds: float, freed_bytes: int | None, duration_seconds: float) -> None:
        """Note what an action freed and how long it took."""
        least = max(self.LEAST_BYTES, self.LEAST_BYTES_PER_MILLISECOND * duration_seconds * 1e3)
        if freed_bytes is not None and freed_bytes >= least:
            self.rest_seconds = 0.0
        else:
            longer = max(self.FIRST_SECONDS, 2 * self.rest_seconds)
            self.rest_seconds = min(longer, self.LONGEST_SECONDS)
        self.until_seconds = time_seconds + self.rest_seconds

    def rests(self, time_seconds: float, stage: Stage) -> bool:
        """Whether it is to be left alone; near the limit it rests no longer than a second."""
        if stage is Stage.EMERGENCY:
            longest = time_seconds + self.FIRST_SECONDS
            self.until_seconds = min(self.until_seconds, longest)
        return time_seconds < self.until_seconds


@dataclass
class Action:
    """Something that frees memory.

    Attributes:
        name: What logs call it.
        stage: The lowest stage at which it is taken.
        run: Called with the bytes wanted; gives the bytes freed, or None.
        is_irreversible: It is taken only near the limit.
        size: Bytes there are to free, or None if nobody can say.
        ready: Whether it is worth its while now.
    """

    name: str
    stage: Stage
    run: Callable[[int], int | None]
    is_irreversible: bool = False
    size: Callable[[], int | None] = lambda: None
    ready: Callable[[int], bool] = lambda limit_bytes: True
    backoff: Backoff = field(default_factory=Backoff)

    def __post_init__(self) -> None:
        check_instance("name", self.name, str)
        check_instance("stage", self.stage, Stage)
        check_callable("run", self.run)
        check_bool("is_irreversible", self.is_irreversible)
        check_callable("size", self.size)
        check_callable("ready", self.ready)


class _CollectionBudget:
    """Keeps the collector's share of the time small; each full collection is counted."""

    SHARE = 0.05
    BURST_SECONDS = 0.25

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._start = clock()
        self._spent = 0.0
        self._last = 0.0

    def allows(self, limit_bytes: int) -> bool:
        """Whether one more collection, as long as the last, is within the budget."""
        earned = self.BURST_SECONDS + self.SHARE * (self._clock() - self._start)
        return self._spent + self._last <= earned

    def collect(self, wanted_bytes: int) -> int | None:
        """Collect everything; objects found, not bytes, are what Python counts: so None."""
        start = self._clock()
        gc.collect()
        self._last = self._clock() - start
        self._spent += self._last
        return None


def _heap_is_worth_trimming(limit_bytes: int) -> bool:
    retained = _native.retained_heap_bytes()
    return retained is not None and retained >= max(TRIM_BYTES, int(TRIM_RATIO * limit_bytes))


def _trim_heap(wanted_bytes: int) -> None:
    _native.trim_libc_heap()


def _trim_resources(wanted_bytes: int) -> int:
    return _native.trim_resources()


def _trim_channels(wanted_bytes: int) -> int:
    return _native.trim_channels()


def built_in_actions(clock: Callable[[], float] = time.perf_counter) -> tuple[Action, ...]:
    """Give the actions that need no registration, in the order in which they are taken.

    What pools let go of lands in Moirai's resources, and what these and the program's caches let go
    of may only then be given back to the system: so libc's heap is trimmed last.
    """
    collection = _CollectionBudget(clock)
    return (
        Action("idle pools", Stage.GENTLE, trim_idle_pools),
        Action("pools", Stage.AGGRESSIVE, trim_pools),
        Action("moirai resources", Stage.GENTLE, _trim_resources),
        Action("channels", Stage.GENTLE, _trim_channels, size=_native.idle_channel_bytes),
        Action("gc", Stage.AGGRESSIVE, collection.collect, ready=collection.allows),
        Action("libc heap", Stage.GENTLE, _trim_heap, ready=_heap_is_worth_trimming),
    )


def actions_for(registry: Registry, known: dict[Registration, Action]) -> Sequence[Action]:
    """Give the actions of what is registered, the cheapest first; `known` keeps their back-offs."""
    live = registry.live()
    for gone in set(known) - set(live):
        del known[gone]
    for registration in live:
        if registration not in known:
            known[registration] = _registered(registration)
    return [known[registration] for registration in live]


def _registered(registration: Registration) -> Action:
    def run(wanted_bytes: int) -> int | None:
        shrink = registration.shrink()
        if shrink is None:
            return 0
        before = registration.size_bytes()
        freed = shrink(wanted_bytes)
        if freed is not None:
            return max(0, int(freed))
        after = registration.size_bytes()
        return None if before is None or after is None else max(0, before - after)

    return Action(
        registration.name,
        Stage.AGGRESSIVE if registration.is_irreversible else Stage.GENTLE,
        run,
        is_irreversible=registration.is_irreversible,
        size=registration.size_bytes,
    )
