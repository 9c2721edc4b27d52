"""Rounds of actions: what is registered, then what is built in, until enough memory is freed."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from moirai._arguments import check_instance, wrong_type
from moirai.pressure.actions import Action, ActionRecord, actions_for, built_in_actions
from moirai.pressure.registry import Registration, Registry
from moirai.pressure.samples import Sample
from moirai.pressure.stages import Stage
from moirai.pressure.worker import Call

__all__ = ["Round", "Rounds"]

log = logging.getLogger("moirai.pressure")

_RECORDS_KEPT = 1000


@dataclass(frozen=True)
class Round:
    """What a round is for.

    Attributes:
        sample: What called for it.
        stage: Actions of this one and those below are taken.
        wanted_bytes: How much is to be freed.
        may_be_irreversible: Whether what cannot be undone may be done.
        is_dry: Whether only to say what would be done.
    """

    sample: Sample
    stage: Stage
    wanted_bytes: int
    may_be_irreversible: bool
    is_dry: bool


class Rounds:
    """Takes actions and keeps a record of what came of each. One thread at a time may take one.

    Args:
        registry: What may be made smaller.
        built_in: Actions besides, taken after those; None: the guard's own.
        call: Runs an action, and waits for it as long as one may.
        is_ending: Whether a round is to be broken off.
        resident_bytes: What the process has in memory now; None if nobody can say.
        on_record: Called with each record.
    """

    def __init__(
        self,
        registry: Registry,
        built_in: Sequence[Action] | None,
        *,
        call: Callable[[Callable[[], int | None]], Call],
        is_ending: Callable[[], bool],
        resident_bytes: Callable[[], int | None],
        on_record: Callable[[ActionRecord], None],
    ) -> None:
        self._registry = registry
        self._built_in = built_in_actions() if built_in is None else _checked(built_in)
        self._call = call
        self._is_ending = is_ending
        self._resident_bytes = resident_bytes
        self._on_record = on_record
        self._known: dict[Registration, Action] = {}
        self._busy: dict[int, Call] = {}
        self._records: deque[ActionRecord] = deque(maxlen=_RECORDS_KEPT)
        self.action_count = 0
        self.freed_bytes = 0

    def take(self, asked: Round) -> int:
        """Take actions until enough is freed; give the bytes known to be freed."""
        freed = 0
        registered = actions_for(self._registry, self._known)
        # What the registered ones let go of lands in the heaps that the built-in ones then trim.
        ordered = [(each, False) for each in registered] + [(each, True) for each in self._built_in]
        for action, is_ours in ordered:
            if self._is_ending():
                break
            if action.stage > asked.stage or (
                action.is_irreversible and not asked.may_be_irreversible
            ):
                continue
            if freed >= asked.wanted_bytes and not is_ours:
                continue
            if action.backoff.rests(asked.sample.time_seconds, asked.stage):
                continue
            if self._is_free(action):
                freed += self._take(action, asked, max(asked.wanted_bytes - freed, 1))
        return freed

    def records(self) -> tuple[ActionRecord, ...]:
        """Give the last thousand actions, oldest first."""
        return tuple(self._records.copy())

    def after_fork(self) -> None:
        """In a child: nothing is under way."""
        self._busy.clear()

    def _is_free(self, action: Action) -> bool:
        call = self._busy.get(id(action))
        if call is not None and not call.done.is_set():
            return False
        self._busy.pop(id(action), None)
        return True

    def _take(self, action: Action, asked: Round, wanted: int) -> int:
        """Take one action if there is something in it; give the bytes known to be freed."""
        now = asked.sample.time_seconds
        is_due = False
        before: int | None = None

        def run() -> int | None:
            nonlocal is_due, before
            if action.size() == 0 or not action.ready(asked.sample.limit_bytes or 0):
                return 0
            is_due = True
            if asked.is_dry:
                return None
            before = self._resident_bytes()
            return action.run(wanted)

        start = time.perf_counter()
        call = self._call(run)
        duration = time.perf_counter() - start
        freed = None
        if not call.done.is_set():
            self._busy[id(action)] = call
            outcome = "timed out"
        elif call.error is not None:
            outcome = "failed"
        elif not is_due:
            return 0
        elif asked.is_dry:
            outcome = "dry run"
        else:
            outcome, freed = "done", call.result
            if freed is None and before is not None:
                freed = max(0, before - (self._resident_bytes() or before))
        action.backoff.judge(now, freed, duration)
        self._record(action, asked, wanted, freed, duration, outcome, call.error)
        return freed or 0

    def _record(
        self,
        action: Action,
        asked: Round,
        wanted: int,
        freed: int | None,
        duration: float,
        outcome: str,
        error: BaseException | None,
    ) -> None:
        text = None if error is None else f"{type(error).__name__}: {error}"
        stage, now = asked.stage, asked.sample.time_seconds
        record = ActionRecord(now, stage, action.name, wanted, freed, duration, outcome, text)
        self._records.append(record)
        self.action_count += outcome != "dry run"
        self.freed_bytes += freed or 0
        if text is None:
            log.info("%s: %s %s, %s bytes freed", stage.name.lower(), action.name, outcome, freed)
        else:
            log.warning("%s: %s %s: %s", stage.name.lower(), action.name, outcome, text)
        self._on_record(record)


def _checked(built_in: Sequence[Action]) -> tuple[Action, ...]:
    if not isinstance(built_in, Iterable):
        raise wrong_type("built_in", "actions or None", built_in)
    actions = tuple(built_in)
    for number, action in enumerate(actions):
        check_instance(f"built_in[{number}]", action, Action)
    return actions
