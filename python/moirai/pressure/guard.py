"""Responds to memory pressure: stages, actions, a cap on work, reservations, a last resort.

Here is what a guard decides at a sample; `watch` has it decide at each, on threads of its own.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Literal

from moirai._arguments import (
    check_bool,
    check_callable,
    check_instance,
    check_number,
    wrong_type,
)
from moirai.errors import InvalidArgument
from moirai.pressure.actions import Action, ActionRecord
from moirai.pressure.concurrency import ConcurrencyCap
from moirai.pressure.foresight import Foresight
from moirai.pressure.late_forecaster import LateForecaster
from moirai.pressure.own import ExecutorCaps
from moirai.pressure.promises import Promises
from moirai.pressure.registry import REGISTRY, Registry
from moirai.pressure.rounds import Round, Rounds
from moirai.pressure.sampler import Sampler
from moirai.pressure.samples import ReadsSamples, Sample
from moirai.pressure.source import optional_bytes
from moirai.pressure.stages import Forecasts, Outlook, Stage, StageClock, Thresholds
from moirai.pressure.stall import StallClock
from moirai.pressure.watch import Watch
from moirai.pressure.worker import Call

__all__ = ["Guard", "GuardStatus"]

log = logging.getLogger("moirai.pressure")

# Time between two rounds of actions, by stage.
_ROUND_SECONDS = {Stage.GENTLE: 0.5, Stage.AGGRESSIVE: 0.2, Stage.EMERGENCY: 0.05}
# Those that share a limit leave the first rounds to one of them, for so long.
_FOLLOW_SECONDS = 1.0
# A round wants to free down to this share of the limit less than where gentle begins.
_BELOW_GENTLE = 0.05
# Time between two decisions; while it is calm, until the next stage could be reached at this pace.
_DECISION_SECONDS = 0.005
_CALM_SECONDS = 0.25
_READY_BYTES_PER_SECOND = 1 << 30

_guards: weakref.WeakSet[Guard] = weakref.WeakSet()


@dataclass(frozen=True)
class GuardStatus:
    """What a guard sees and did.

    Attributes:
        stage: How hard it responds now.
        highest_stage: How hard it ever did.
        sample: The newest sample it saw, or None.
        p_critical: Probabilities of the last forecast by horizon in seconds; empty without one.
        reserved_bytes: What is promised to reservations.
        action_count: Actions taken so far.
        freed_bytes: What they freed, as far as they could tell.
        stall_count: Times that the last resort was called.
        ledger_error: Why the fence does not know of the other processes under its limit; None if it
            does, or stands for one process alone.
    """

    stage: Stage
    highest_stage: Stage
    sample: Sample | None
    p_critical: Mapping[int, float]
    reserved_bytes: int
    action_count: int
    freed_bytes: int
    stall_count: int
    ledger_error: str | None = None


class Guard:
    """Watches memory use and has what is registered made smaller before the limit is reached.

    `start` runs it on threads of its own. Without that, `step` runs one decision and its actions in
    the caller's thread, on any sample: so recordings and tests run in virtual time. Any number of
    threads may use it at once. A guard that runs goes on in a forked child, by itself.
    """

    def __init__(
        self,
        source: ReadsSamples | None = None,
        *,
        forecaster: Forecasts | Literal["default"] | None = "default",
        thresholds: Thresholds | None = None,
        registry: Registry = REGISTRY,
        built_in: Sequence[Action] | None = None,
        dry_run: bool = False,
        on_stage: Callable[[Stage, Sample], object] | None = None,
        on_action: Callable[[ActionRecord], object] | None = None,
        on_stall: Callable[[Guard], object] | None = None,
        stall_seconds: float = 30.0,
        action_timeout_seconds: float = 10.0,
        forecast_seconds: float = 1.0,
        leads: Callable[[], bool] | None = None,
    ) -> None:
        """Prepare a guard.

        Args:
            source: Where samples come from; default: a `Sampler` of this process. A sampler is
                started and stopped with the guard: give each guard its own.
            forecaster: Something with `observe` and `forecast`; default: a `Forecaster`, loaded
                when a quarter of the limit is used; None: respond to the level alone.
            thresholds: Where the stages begin.
            registry: What may be made smaller; default: what `moirai.pressure.register` was given.
            built_in: Actions besides; default: trim Moirai's pools, resources and channels, collect
                cycles within a budget of CPU time, give libc's free heap back.
            dry_run: Log what would be done, and do nothing.
            on_stage: Called with each new stage and its sample, on the guard's thread.
            on_action: Called with the record of each action, on the guard's thread.
            on_stall: Called with the guard when it was at emergency for `stall_seconds` and nothing
                it did helped: the place for a graceful end. Once for each such time. `sys.exit`
                ends no program from a thread: `os.kill(os.getpid(), signal.SIGTERM)` does.
            stall_seconds: See `on_stall`; >= 0.
            action_timeout_seconds: An action that takes longer, with the question for its size, is
                left to itself, and not asked again before it came back; > 0, at most 1e9.
            forecast_seconds: Time between two observations for the forecaster; > 0.
            leads: Whether this process acts at once. The others under the same limit follow after a
                second, or at emergency. Default: what the sampler's fence says; without one, yes.

        Raises:
            InvalidArgument: A number is outside its range.
            WrongType: What is to be called cannot be, or an argument is of another kind.
        """
        listeners = {
            "on_stage": on_stage, "on_action": on_action, "on_stall": on_stall, "leads": leads
        }  # fmt: skip
        for name, listener in listeners.items():
            check_callable(name, listener, or_none=True)
        check_instance("thresholds", thresholds, Thresholds, or_none=True)
        check_instance("registry", registry, Registry)
        if source is not None and not callable(getattr(source, "read", None)):
            raise wrong_type("source", "something that reads samples, or None", source)
        check_bool("dry_run", dry_run)
        check_number("stall_seconds", stall_seconds)
        check_number("action_timeout_seconds", action_timeout_seconds)
        check_number("forecast_seconds", forecast_seconds)
        if not (stall_seconds >= 0 and 0 < action_timeout_seconds <= 1e9 and forecast_seconds > 0):
            raise InvalidArgument(
                "stall_seconds, action_timeout_seconds, forecast_seconds: must be >= 0, > 0 and at "
                f"most 1e9, and > 0, got {stall_seconds}, {action_timeout_seconds} and "
                f"{forecast_seconds}"
            )
        self.source = Sampler() if source is None else source
        self.thresholds = Thresholds() if thresholds is None else thresholds
        self.registry = registry
        self.dry_run = dry_run
        if isinstance(forecaster, str) and forecaster == "default":
            forecaster = LateForecaster(
                in_background=isinstance(self.source, Sampler), fence_room=self._fence_room
            )
        elif forecaster is not None and not _forecasts(forecaster):
            raise InvalidArgument(
                f'forecaster: must be "default", a forecaster or None, got {forecaster!r}'
            )
        self._foresight = Foresight(forecaster, forecast_seconds)
        self._rounds = Rounds(
            registry,
            built_in,
            call=self._call,
            is_ending=self._is_ending,
            resident_bytes=self._resident_bytes,
            on_record=lambda record: self._tell(on_action, record),
        )
        self._on_stage = on_stage
        self._on_stall = on_stall
        self._action_timeout_seconds = action_timeout_seconds
        self._leads = leads
        self._clock = StageClock(self.thresholds)
        self._stall = StallClock(stall_seconds)
        self._caps: list[ConcurrencyCap] = []
        self._executors = ExecutorCaps()
        self._pressed_since: float | None = None
        self._round_seconds = float("-inf")
        self._sample: Sample | None = None
        self._highest = Stage.CALM
        self._is_wanted = False
        self._is_relief_asked = False
        self._renew()
        _guards.add(self)

    def _renew(self) -> None:
        """Make what a forked child does not share with its parent."""
        self._lock = threading.RLock()  # Held while it decides and acts.
        self._run_lock = threading.RLock()  # Held by who starts or stops.
        self._promises = Promises()
        self._watch: Watch | None = None  # The newest, also once it is to end.

    # What a program calls.

    def start(self) -> Guard:
        """Watch on threads of its own; does nothing if it does already.

        Raises:
            InvalidArgument: The source is no `Sampler`: such a one is stepped through.
            Unsupported, OutOfMemory: As `Sampler.start`; nothing runs.
            RuntimeError, MemoryError: No thread can be started; nothing runs.
        """
        if not isinstance(self.source, Sampler):
            raise InvalidArgument(
                f"source: must be a Sampler to be watched, got {type(self.source).__name__}: call "
                "step with its samples"
            )
        with self._run_lock:
            if self._watch is not None and self._watch.is_running:
                self.source.start()
                return self
            self._watch = Watch(self.source, decide=self.step, rest_seconds=self._rest_seconds)
            self._watch.start()
            self._is_wanted = True
        return self

    def stop(self) -> None:
        """End the threads, take the fence down and lift the caps; does nothing if it does not run.

        An action that is under way is left to itself.
        """
        with self._run_lock:
            self._is_wanted = False
            watch = self._watch
            if watch is not None:
                watch.end()
            if isinstance(self.source, Sampler):
                self.source.stop()
        if watch is not None:
            watch.join()
        self._executors.lift()
        for cap in self._caps:
            cap.lift()

    def __enter__(self) -> Guard:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def cap(self, maximum: int) -> ConcurrencyCap:
        """Make a cap on work in flight that this guard lowers under pressure.

        Raises:
            InvalidArgument: `maximum` is below 1.
            WrongType: It is no int.
        """
        made = ConcurrencyCap(maximum)
        self._caps.append(made)
        return made

    @contextmanager
    def reserve(
        self, size: int | str, *, timeout_seconds: float = 0.0, margin: int | str = "8 MiB"
    ) -> Iterator[int]:
        """Ask before a large allocation, and hold the promise for the `with` block.

        What does not fit at first is made room for: everything registered is asked, at once. Make
        the allocation inside the block and touch it there: what is promised is taken off what
        others are promised until the block ends.

        Args:
            size: Bytes, as an int or such as "1.2 GiB".
            timeout_seconds: How long to go on making room; >= 0; at least one round is made.
            margin: Bytes to leave below the limit.

        Raises:
            InvalidArgument: A number is outside its range.
            OutOfMemory: There is no room; nothing is promised.
        """
        wanted = optional_bytes(size, "size")
        spare = optional_bytes(margin, "margin")
        if wanted is None or spare is None:
            name = "size" if wanted is None else "margin"
            raise wrong_type(name, "an int or a str", None)
        check_number("timeout_seconds", timeout_seconds)
        if not timeout_seconds >= 0:
            raise InvalidArgument(f"timeout_seconds: must be at least 0, got {timeout_seconds}")
        promises = self._promises
        promises.make(wanted, spare, timeout_seconds, read_now=self._read_now, free=self._free_now)
        try:
            yield wanted
        finally:
            promises.give_back(wanted)

    def relieve(self) -> None:
        """Ask for one round of what gentle does, at the next sample, whatever the stage is.

        For whoever hears of pressure elsewhere: a scheduler, an operator, the service manager.
        """
        self._is_relief_asked = True

    def records(self) -> tuple[ActionRecord, ...]:
        """Give the last thousand actions, oldest first."""
        return self._rounds.records()

    def status(self) -> GuardStatus:
        """Say what it sees and did."""
        return GuardStatus(
            self._clock.stage,
            self._highest,
            self._sample,
            dict(self._foresight.p_critical),
            self._promises.total_bytes,
            self._rounds.action_count,
            self._rounds.freed_bytes,
            self._stall.count,
            self.source.statistics().ledger_error if isinstance(self.source, Sampler) else None,
        )

    @property
    def outlook(self) -> Outlook | None:
        """What the forecaster said last: of the default one a `Forecast`; None without one."""
        return self._foresight.outlook

    @property
    def forecaster(self) -> Forecasts | None:
        """What forecasts for it; the default one is a `Forecaster`, or None until it is loaded."""
        asked = self._foresight.forecaster
        return asked.loaded if isinstance(asked, LateForecaster) else asked

    @property
    def stage(self) -> Stage:
        """How hard it responds now."""
        return self._clock.stage

    # One decision.

    def step(self, sample: Sample) -> Stage:
        """Take one sample into account: decide, act, and give the stage.

        Samples must come in the order of their times.

        Raises:
            InvalidArgument: It is of before the last one; nothing is decided.
            WrongType: It is none.
        """
        check_instance("sample", sample, Sample)
        with self._lock:
            last = self._sample
            if last is not None and sample.time_seconds < last.time_seconds:
                raise InvalidArgument(
                    "sample: must not be of before the last one, at "
                    f"{last.time_seconds} s, got {sample.time_seconds} s"
                )
            self._sample = sample
            self._foresight.look(sample)
            before = self._clock.stage
            stage = self._clock.update(sample, self._foresight.p_critical)
            self._highest = max(self._highest, stage)
            if stage is not before:
                level = logging.WARNING if stage >= Stage.AGGRESSIVE else logging.INFO
                log.log(level, "%s: %s", stage.name.lower(), _describe(sample))
                self._tell(self._on_stage, stage, sample)
            if not self._is_ending():  # What a listener has stopped has lifted its caps.
                self._adapt_caps(sample, is_pressed=stage >= Stage.GENTLE)
            asked, self._is_relief_asked = self._is_relief_asked, False
            if stage < Stage.GENTLE:
                self._pressed_since = None
                if asked:
                    self._round(sample, Stage.GENTLE, self._excess(sample))
            elif self._is_turn(sample, stage):
                since = sample.time_seconds - self._round_seconds
                if since >= _ROUND_SECONDS[stage] or stage > before:
                    self._round(sample, stage, self._excess(sample))
            if self._stall.update(sample, stage):
                log.warning("nothing helps: %s", _describe(sample))
                if not self.dry_run:
                    self._tell(self._on_stall, self)
            return stage

    def _adapt_caps(self, sample: Sample, *, is_pressed: bool) -> None:
        for cap in self._caps:
            cap.adapt(sample.time_seconds, under_pressure=is_pressed)
        if not self.dry_run:
            self._executors.adapt(sample.time_seconds, under_pressure=is_pressed)

    def _is_turn(self, sample: Sample, stage: Stage) -> bool:
        """Whether to act now, or to leave it to the one that leads."""
        if self._pressed_since is None:
            self._pressed_since = sample.time_seconds
        if stage is Stage.EMERGENCY or sample.time_seconds - self._pressed_since >= _FOLLOW_SECONDS:
            return True
        if self._leads is None:
            return not isinstance(self.source, Sampler) or self.source.statistics().is_leader
        try:
            return self._leads()
        except Exception:
            log.exception("%r failed: acting at once", self._leads)
            return True

    def _fence_room(self) -> int | None:
        """What a fence lets the process map now; None without one."""
        if not isinstance(self.source, Sampler):
            return None
        return self.source.statistics().fence_room_bytes

    def _excess(self, sample: Sample) -> int:
        """Bytes above what a round is to come down to; at least a hundredth of the limit."""
        limit = sample.limit_bytes or 0
        goal = (self.thresholds.gentle - _BELOW_GENTLE) * limit
        return int(max(sample.used_bytes - goal, limit / 100))

    def _round(self, sample: Sample, stage: Stage, wanted: int) -> int:
        """Take the actions of a stage until enough is freed; give the bytes known to be freed."""
        self._round_seconds = sample.time_seconds
        may_be_irreversible = self.thresholds.allows_irreversible(
            sample, self._foresight.p_critical
        )
        return self._rounds.take(Round(sample, stage, wanted, may_be_irreversible, self.dry_run))

    def _resident_bytes(self) -> int | None:
        """What the process has in memory, or None where samples are not of this process now."""
        return self._read_now().resident_bytes if isinstance(self.source, Sampler) else None

    def _call(self, function: Callable[[], int | None]) -> Call:
        """Run an action: for the watch's thread on the worker's, and not for ever; else here."""
        if self._watch is not None and self._watch.is_here:
            seconds = self._action_timeout_seconds
            return self._watch.worker.call(function, timeout_seconds=seconds)
        call = Call(function)
        call.run()
        if call.error is not None and not isinstance(call.error, Exception):
            raise call.error  # Ctrl-C, say: it is for who called.
        return call

    def _is_ending(self) -> bool:
        """Whether this is the watch's thread, and somebody stops it."""
        return self._watch is not None and self._watch.is_ending

    def _tell(self, listener: Callable[..., object] | None, *arguments: object) -> None:
        if listener is None:
            return
        try:
            listener(*arguments)
        except Exception:
            log.exception("%r failed", listener)
        except SystemExit:
            if self._watch is None or not self._watch.is_here:
                raise
            log.error("%r: sys.exit ends no program from a thread: send a signal", listener)

    # Reservations.

    def _free_now(self, sample: Sample, missing: int) -> int:
        with self._lock:
            return self._round(sample, Stage.EMERGENCY, missing)

    def _read_now(self) -> Sample:
        if isinstance(self.source, Sampler):
            return self.source.read_now()
        return self.source.read()

    # When to decide, and after a fork.

    def _rest_seconds(self, elapsed_seconds: float) -> float:
        """How long no decision is needed, when the last one was begun so long ago."""
        sample = self._sample
        rest = _DECISION_SECONDS - elapsed_seconds
        if sample is None or self.stage is not Stage.CALM:
            return rest
        if self._is_relief_asked or self._is_capping():
            return rest
        pause = _CALM_SECONDS
        if self._foresight.forecaster is not None:
            pause = min(pause, self._foresight.interval_seconds)
        if sample.limit_bytes is not None:
            room = self.thresholds.gentle * sample.limit_bytes - sample.used_bytes
            pause = min(pause, room / _READY_BYTES_PER_SECOND)
        return max(rest, pause)

    def _is_capping(self) -> bool:
        return self._executors.is_capping or any(cap.is_capped for cap in self._caps)

    def _after_fork(self) -> None:
        self._renew()
        self._rounds.after_fork()
        self._executors.after_fork()
        if isinstance(self._foresight.forecaster, LateForecaster):
            self._foresight.forecaster.after_fork()
        if self._is_wanted:
            self.start()


def _forecasts(forecaster: object) -> bool:
    return all(callable(getattr(forecaster, name, None)) for name in ("observe", "forecast"))


def _describe(sample: Sample) -> str:
    return (
        f"{sample.used_bytes} of {sample.limit_bytes} bytes in use "
        f"({sample.used_ratio:.0%}, {sample.bound})"
    )


def _after_fork_in_child() -> None:
    for guard in list(_guards):
        try:
            guard._after_fork()
        except Exception:  # The child must come up, guarded or not.
            log.exception("the guard does not run in this child")


def _stop_all() -> None:
    """Before the interpreter goes: no thread may come back to it from a wait afterwards."""
    for guard in list(_guards):
        guard.stop()


os.register_at_fork(after_in_child=_after_fork_in_child)
atexit.register(_stop_all)
