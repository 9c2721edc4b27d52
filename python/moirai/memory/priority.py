"""Work of different urgency: memory that is there, lanes, and whose lane a context draws from."""

from __future__ import annotations

import enum

from moirai import _native
from moirai._native import Resource
from moirai.errors import InvalidArgument
from moirai.memory.arenas import ArenaResource
from moirai.memory.resources import PoolResource
from moirai.memory.sizes import parse_bytes

__all__ = ["Priority", "PriorityResource", "RealtimeResource", "current_priority", "priority"]


class Priority(enum.IntEnum):
    """A lane of a `PriorityResource`, the most urgent first."""

    REALTIME = 0
    """Memory that is there; nothing is drawn from the system."""
    HIGH = 1
    """Served from what is kept, where anything is."""
    NORMAL = 2
    """Everything that says nothing."""
    BACKGROUND = 3
    """What may wait."""


class RealtimeResource(_native.RealtimeResource):
    """A fixed amount of memory that is there: prefaulted, locked, handed out without the kernel.

    Allocating and freeing take a bounded number of steps and no page fault. When it is used up,
    requests raise `OutOfMemory`; nothing is drawn from elsewhere. Threads wait for each other's
    steps; nothing else enters the kernel. After a fork neither side keeps the promise: the child's
    copy is not locked, and pages are copied when either side writes to them.

    Args:
        realtime_bytes: Bytes that blocks may take together, as an int or such as "64 MiB"; at most
            64 GiB. A fifth more is taken, and locked, for tables.
        allow_unlocked: Whether to go without a lock where the process may not lock so much. The
            memory is prefaulted all the same, but the kernel may take it away again.

    Raises:
        InvalidArgument: `realtime_bytes` is out of its range.
        OutOfMemory: The system has not so much memory or address space.
        Unsupported: The memory must not be locked; the message says how much may be, and how to
            allow more.

    Source:
        Masmano et al., "TLSF: a New Dynamic Memory Allocator for Real-Time Systems" (2004).
    """

    def __new__(
        cls, realtime_bytes: int | str, *, allow_unlocked: bool = False
    ) -> RealtimeResource:
        size = parse_bytes(realtime_bytes, argument="realtime_bytes")
        return super().__new__(cls, size, allow_unlocked=allow_unlocked)


def _default_background() -> Resource:
    """What the background lane draws from unless it is told: little is kept, and not for long."""
    return ArenaResource(PoolResource(cache_cap_bytes="1 MiB", decay_seconds=0.1))


class PriorityResource(_native.PriorityResource):
    """One resource with a lane for each `Priority`; a block goes back to the lane it came from.

    A request goes to the lane of its `priority` argument, or else to that of the context (see
    `priority`), or else to `Priority.NORMAL`. Adaptors over it pass the choice on.

    `statistics` has the lanes' counts added up, peaks too, also where the lanes had them at
    different times; a lane's own are ``lane(Priority.HIGH).statistics()``.

    Args:
        realtime_bytes: Size of the real-time lane; see `RealtimeResource`.
        high: Where `Priority.HIGH` draws from; None makes a `PoolResource`.
        normal: Where `Priority.NORMAL` draws from; None makes a `SystemResource`.
        background: Where `Priority.BACKGROUND` draws from; None makes an arena over a pool that
            keeps at most 1 MiB, for a tenth of a second.
        allow_unlocked: As for `RealtimeResource`.

    Raises:
        InvalidArgument: Two lanes draw from the same resource, which could then not tell whose
            block comes back; or as for `RealtimeResource`.
        OutOfMemory: As for `RealtimeResource`.
        Unsupported: As for `RealtimeResource`.
    """

    def __new__(
        cls,
        *,
        realtime_bytes: int | str,
        high: Resource | None = None,
        normal: Resource | None = None,
        background: Resource | None = None,
        allow_unlocked: bool = False,
    ) -> PriorityResource:
        return super().__new__(
            cls,
            RealtimeResource(realtime_bytes, allow_unlocked=allow_unlocked),
            PoolResource() if high is None else high,
            _native.SystemResource() if normal is None else normal,
            _default_background() if background is None else background,
        )

    def lane(self, priority: Priority) -> Resource:
        """The resource that serves a priority.

        Raises:
            InvalidArgument: `priority` is none.
        """
        if not isinstance(priority, Priority):
            raise InvalidArgument(f"priority: must be a Priority, got {priority!r}")
        return self.lanes[priority]

    @property
    def is_locked(self) -> bool:
        """Whether the real-time lane's memory is locked; not so in a forked child."""
        realtime = self.lanes[Priority.REALTIME]
        return isinstance(realtime, RealtimeResource) and realtime.is_locked


class priority(_native.priority):  # noqa: N801  reads as what it does: with priority(HIGH)
    """Send the requests of this context to one lane: ``with priority(Priority.REALTIME):``.

    Reaches every `PriorityResource`, also through adaptors: what `Resource.allocate` draws in this
    context, and NumPy's arrays if one serves them here (by `use`, entered outside or inside, or by
    `install`, called before). The lane is a context variable: other threads do not see it, asyncio
    tasks made inside inherit it, and it follows a task wherever and whenever it runs.

    May be nested, and entered in several threads and tasks at once. Like `use`, it leaks out of a
    generator that is suspended inside.

    Args:
        priority: The lane.

    Raises:
        InvalidArgument: `priority` is none.
    """

    def __new__(cls, priority: Priority) -> priority:
        if not isinstance(priority, Priority):
            raise InvalidArgument(f"priority: must be a Priority, got {priority!r}")
        return super().__new__(cls, priority)


def current_priority() -> Priority:
    """The lane of this context; `Priority.NORMAL` where none was chosen."""
    return Priority(_native.current_lane())
