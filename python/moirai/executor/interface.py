"""What every executor offers beyond concurrent.futures, in terms of queueing chunks of calls."""

from __future__ import annotations

import concurrent.futures
import itertools
import queue
import sys
import time
from abc import abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any, Literal, Self, TypeVar, cast

from moirai import _native
from moirai._arguments import check_timeout
from moirai.errors import InvalidArgument, Timeout
from moirai.executor.group import TaskGroup
from moirai.memory import Priority

__all__ = ["BaseExecutor", "in_chunks", "split_call"]

_Result = TypeVar("_Result")
# What a task of `map` gives: results up to the first failure, and that or None.
_Chunk = tuple[list[Any], BaseException | None]

_CHUNKS_PER_WORKER = 8
# Who waits in order is woken for each chunk, some 30 µs: less than 10 ns a call.
_LARGEST_CHUNK = 4096


def in_chunks(items: Sequence[_Result], size: int) -> list[Sequence[_Result]]:
    """The items in order, `size` to a chunk; the last may have fewer."""
    return [items[start : start + size] for start in range(0, len(items), size)]


def split_call(call: object) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The function and the arguments of a call of `submit_group`.

    Raises:
        InvalidArgument: It is no tuple of them.
    """
    if not isinstance(call, tuple) or not call or not callable(call[0]):
        raise InvalidArgument(
            f"calls: must be tuples of a function and its arguments, got {call!r}"
        )
    return call[0], call[1:]


class BaseExecutor(concurrent.futures.Executor):
    """`map`, `map_unordered` and `group` over any backend that can queue chunks of calls.

    A backend has `submit`, `submit_many`, `shutdown`, and the two below.
    """

    @property
    @abstractmethod
    def max_workers(self) -> int:
        """How many tasks run at once, at most."""

    @abstractmethod
    def _queue_chunks(
        self,
        fn: Callable[..., Any],
        items: Sequence[Any],
        size: int,
        *,
        star: bool,
        priority: Priority | None,
        node: int | None,
    ) -> Sequence[concurrent.futures.Future[_Chunk]]:
        """Queue ``fn(item)``, or ``fn(*item)`` if `star`, for each item, `size` to a task."""

    def map(
        self,
        fn: Callable[..., _Result],
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int | Literal["auto"] = "auto",
        priority: Priority | None = None,
        node: int | None = None,
    ) -> Iterator[_Result]:
        """Call a function for each item of the iterables, side by side; the results in order.

        The iterables are read to their end first. A failure is raised in its place; what has not
        begun by then is cancelled.

        Args:
            fn: The function.
            iterables: Where its arguments come from, one from each; the shortest ends it.
            timeout: Seconds from now after which waiting for a result raises Timeout; None: never.
            chunksize: Calls to a task; "auto": an eighth of each worker's share, at most 4096.
            priority: How urgent the tasks are.
            node: Id of the node whose workers are to take them first.

        Raises:
            InvalidArgument: An argument is outside its range.
        """
        check_timeout("timeout", timeout)
        futures = self._chunks(fn, iterables, chunksize, priority, node)
        deadline = None if timeout is None else time.monotonic() + timeout
        return _Flattened.of(_in_order(futures, deadline))

    def map_unordered(
        self,
        fn: Callable[..., _Result],
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int | Literal["auto"] = "auto",
        priority: Priority | None = None,
        node: int | None = None,
    ) -> Iterator[_Result]:
        """As `map`, but the results come as their tasks end."""
        check_timeout("timeout", timeout)
        futures = self._chunks(fn, iterables, chunksize, priority, node)
        deadline = None if timeout is None else time.monotonic() + timeout
        return _Flattened.of(_as_they_end(futures, deadline))

    def group(self) -> TaskGroup:
        """Tasks that end with a `with` block; the first failure cancels the rest."""
        return TaskGroup(self)

    def _chunks(
        self,
        fn: Callable[..., Any],
        iterables: Sequence[Iterable[Any]],
        chunksize: int | Literal["auto"],
        priority: Priority | None,
        node: int | None,
    ) -> list[concurrent.futures.Future[_Chunk]]:
        _check_chunksize(chunksize)
        star = len(iterables) != 1
        items = list(zip(*iterables, strict=False) if star else iterables[0])
        if chunksize == "auto":
            share = len(items) // (self.max_workers * _CHUNKS_PER_WORKER)
            size = max(1, min(share, _LARGEST_CHUNK))
        else:
            size = chunksize
        if not items:
            return []
        found = self._queue_chunks(fn, items, size, star=star, priority=priority, node=node)
        return list(found)


def _check_chunksize(chunksize: object) -> None:
    if isinstance(chunksize, int) and not isinstance(chunksize, bool):
        is_right = 1 <= chunksize <= sys.maxsize
    else:
        is_right = chunksize == "auto"
    if not is_right:
        raise InvalidArgument(
            f'chunksize: must be "auto" or an int from 1 to {sys.maxsize}, got {chunksize!r}'
        )


class _Flattened(itertools.chain[_Result]):
    """What the iterators of a generator give; closed as a generator is."""

    _source: Generator[Iterator[Any]]

    @classmethod
    def of(cls, source: Generator[Iterator[_Result]]) -> Self:
        found = cast("Self", cls.from_iterable(source))
        found._source = source
        return found

    def close(self) -> None:
        """Cancel what has not begun."""
        self._source.close()


def _left(deadline: float | None) -> float | None:
    return None if deadline is None else deadline - time.monotonic()


def _results(chunk: _Chunk) -> Generator[Iterator[Any]]:
    """An iterator over the results, which keeps none that it gave; then the failure is raised."""
    results, failure = chunk
    del chunk
    yield _native.Results(results)
    if failure is not None:
        try:
            raise failure
        finally:
            failure = None  # or the frame and the exception keep each other


def _in_order(
    futures: list[concurrent.futures.Future[_Chunk]], deadline: float | None
) -> Generator[Iterator[Any]]:
    futures.reverse()
    try:
        while futures:
            # The future goes before its results do, so that nothing keeps what was handed out.
            yield from _results(_result_or_cancel(futures.pop(), _left(deadline)))
    finally:
        for future in futures:
            future.cancel()


def _result_or_cancel(future: concurrent.futures.Future[_Chunk], timeout: float | None) -> _Chunk:
    try:
        return future.result(timeout)
    finally:
        future.cancel()
        del future


def _as_they_end(
    futures: list[concurrent.futures.Future[_Chunk]], deadline: float | None
) -> Generator[Iterator[Any]]:
    ended: queue.SimpleQueue[concurrent.futures.Future[_Chunk]] = queue.SimpleQueue()
    left = len(futures)
    try:
        for future in futures:
            future.add_done_callback(ended.put)
        while left:
            try:
                limit = _left(deadline)
                future = ended.get(timeout=None if limit is None else max(0.0, limit))
            except queue.Empty:
                message = f"timeout: {left} of {len(futures)} tasks have not ended in time"
                raise Timeout(message) from None
            left -= 1
            futures.remove(future)
            chunk = future.result()
            del future
            yield from _results(chunk)
    finally:
        for each in futures:
            each.cancel()
