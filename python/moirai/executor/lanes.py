"""Tasks that wait, by priority, none of them for ever."""

from __future__ import annotations

import collections
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar

from moirai.errors import InvalidArgument
from moirai.memory import Priority

__all__ = ["Lanes", "NodeLanes", "lane_of"]

_Item = TypeVar("_Item")

_PATIENCE_SECONDS = {Priority.HIGH: 0.05, Priority.NORMAL: 0.05, Priority.BACKGROUND: 0.1}
"""How long a lane is passed over before it gets a turn; as in the executor of threads."""


def lane_of(priority: Priority | None) -> Priority:
    """The priority of a task that was submitted with `priority`.

    Raises:
        InvalidArgument: It is neither a Priority nor None.
    """
    lane = Priority.NORMAL if priority is None else priority
    if not isinstance(lane, Priority):
        raise InvalidArgument(f"priority: must be a Priority or None, got {priority!r}")
    return lane


class Lanes(Generic[_Item]):
    """A queue for each priority. For one thread at a time."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._queues: dict[Priority, collections.deque[_Item]] = {
            priority: collections.deque() for priority in sorted(Priority)
        }
        self._served_at: dict[Priority, float] = {}
        self._count = 0  # asked for with every message of a worker

    def append(self, item: _Item, priority: Priority) -> None:
        """Queue an item."""
        queue = self._queues[priority]
        if not queue:
            self._served_at[priority] = self._clock()
        queue.append(item)
        self._count += 1

    def put_back(self, item: _Item, priority: Priority) -> None:
        """Queue an item before all others of its priority."""
        self.append(item, priority)
        self._queues[priority].rotate(1)

    def pop(self) -> _Item:
        """Take the next item.

        Raises:
            IndexError: There is none.
        """
        if not self._count:
            raise IndexError("no task waits")
        waiting = [priority for priority, queue in self._queues.items() if queue]
        self._count -= 1
        chosen = waiting[0]
        if len(waiting) > 1:
            now = self._clock()
            for priority in waiting[1:]:
                if now - self._served_at[priority] >= _PATIENCE_SECONDS[priority]:
                    chosen = priority
                    break
            self._served_at[chosen] = now
        return self._queues[chosen].popleft()

    def clear(self) -> list[_Item]:
        """Take all of them."""
        items = list(self)
        for queue in self._queues.values():
            queue.clear()
        self._count = 0
        return items

    def __iter__(self) -> Iterator[_Item]:
        for queue in self._queues.values():
            yield from queue

    def __len__(self) -> int:
        return self._count


class NodeLanes(Generic[_Item]):
    """Lanes for each node that has workers. For one thread at a time.

    Args:
        steal_order: For each node, by its place, the places of all of them by distance, itself
            first.
        usual: The places that items without a node go to.
    """

    def __init__(self, steal_order: Sequence[Sequence[int]], usual: Sequence[int]) -> None:
        self._order, self._usual = steal_order, usual
        self.by_place: list[Lanes[_Item]] = [Lanes() for _ in steal_order]
        self._count = 0

    def append(self, item: _Item, priority: Priority, place: int | None) -> int:
        """Queue an item at a node; None: where the fewest wait. Gives the node's place."""
        if place is None:
            place = self._usual[0]
            if len(self._usual) > 1:
                place = min(self._usual, key=lambda each: len(self.by_place[each]))
        self.by_place[place].append(item, priority)
        self._count += 1
        return place

    def put_back(self, item: _Item, priority: Priority, place: int) -> None:
        """Queue an item before all others of its node and priority."""
        self.by_place[place].put_back(item, priority)
        self._count += 1

    def pop(self, place: int, *, from_others: bool) -> _Item | None:
        """Take the next item of a node, or the nearest other one that has any; None: there is none.

        Args:
            place: The node's.
            from_others: Whether to look at the others.
        """
        for each in self._order[place] if from_others else (place,):
            if len(self.by_place[each]):
                self._count -= 1
                return self.by_place[each].pop()
        return None

    def clear(self) -> list[_Item]:
        """Take all of them."""
        self._count = 0
        return [item for lanes in self.by_place for item in lanes.clear()]

    def __iter__(self) -> Iterator[_Item]:
        for lanes in self.by_place:
            yield from lanes

    def __len__(self) -> int:
        return self._count
