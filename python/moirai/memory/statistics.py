"""What passes through a resource, counted: in all, by scope, by decorated function."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar, cast

from moirai import _native
from moirai._native import Resource
from moirai.errors import InvalidArgument

__all__ = ["Scope", "ScopeRecord", "StatisticsAdaptor"]

_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class ScopeRecord:
    """What all scopes of one name saw together.

    Attributes:
        name: The name given to `StatisticsAdaptor.scope` or `profile`.
        call_count: How often a scope of this name was closed.
        peak_bytes: Most bytes in use at once inside one of them, beyond what was in use before.
        total_bytes: Bytes handed out inside them.
        total_count: Blocks handed out inside them.
    """

    name: str
    call_count: int
    peak_bytes: int
    total_bytes: int
    total_count: int


class Scope:
    """Counts what passes through a `StatisticsAdaptor` while it is open, on every thread.

    Made by `StatisticsAdaptor.scope`; a context manager. Its figures may be read at any time;
    after it closed they stay as they were. Scopes may nest and overlap.
    """

    def __init__(self, adaptor: StatisticsAdaptor, name: str) -> None:
        self.name = name
        self._adaptor = adaptor
        self._id: int | None = None
        self._final: tuple[int, int, int, int, int] | None = None

    def __enter__(self) -> Scope:
        if self._id is not None:
            raise InvalidArgument(f"scope: {self.name!r} was entered before; make a new one")
        self._id = self._adaptor.open_scope()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._id is not None and self._final is None:
            self._final = self._adaptor.close_scope(self._id)
            self._adaptor._record(self)

    def _counts(self) -> tuple[int, int, int, int, int]:
        if self._final is not None:
            return self._final
        counts = None if self._id is None else self._adaptor.scope_counts(self._id)
        return counts or (0, 0, 0, 0, 0)

    @property
    def peak_bytes(self) -> int:
        """Most bytes in use at once inside, beyond what was in use when it opened."""
        start, peak, *_ = self._counts()
        return peak - start

    @property
    def total_bytes(self) -> int:
        """Bytes handed out inside."""
        return self._counts()[2]

    @property
    def total_count(self) -> int:
        """Blocks handed out inside."""
        return self._counts()[3]

    @property
    def current_bytes(self) -> int:
        """Bytes in use at its end (or now) less bytes in use at its start; may be negative."""
        return self._counts()[4]

    def __repr__(self) -> str:
        return f"Scope({self.name!r}, peak_bytes={self.peak_bytes}, total_bytes={self.total_bytes})"


class StatisticsAdaptor(_native.StatisticsAdaptor):
    """Counts exactly what passes through it: current, peak and total, bytes and blocks.

    Args:
        upstream: The resource to draw from.

    Source:
        The counters and the profiler follow RMM's statistics resource adaptor.
    """

    _records: dict[str, ScopeRecord]
    _lock: threading.Lock

    def __new__(cls, upstream: Resource) -> StatisticsAdaptor:
        self = super().__new__(cls, upstream)
        self._records = {}
        self._lock = threading.Lock()
        return self

    def scope(self, name: str) -> Scope:
        """A context manager that counts what passes while it is open, under `name`."""
        return Scope(self, name)

    def profile(self, function: Callable[_Parameters, _Result]) -> Callable[_Parameters, _Result]:
        """Decorate a function so that each call is a scope named after it.

        Coroutine functions are counted until they return; generator functions are not supported.

        Raises:
            InvalidArgument: `function` is a generator function.
        """
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            raise InvalidArgument(
                f"function: must not be a generator function, got {function.__qualname__}: "
                "open a scope() around the loop that consumes it"
            )
        name = f"{function.__module__}.{function.__qualname__}"
        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def run(*args: Any, **kwargs: Any) -> Any:
                with self.scope(name):
                    return await function(*args, **kwargs)

            return cast("Callable[_Parameters, _Result]", run)

        @functools.wraps(function)
        def call(*args: _Parameters.args, **kwargs: _Parameters.kwargs) -> _Result:
            with self.scope(name):
                return function(*args, **kwargs)

        return call

    def _record(self, scope: Scope) -> None:
        with self._lock:
            old = self._records.get(scope.name, ScopeRecord(scope.name, 0, 0, 0, 0))
            self._records[scope.name] = ScopeRecord(
                name=scope.name,
                call_count=old.call_count + 1,
                peak_bytes=max(old.peak_bytes, scope.peak_bytes),
                total_bytes=old.total_bytes + scope.total_bytes,
                total_count=old.total_count + scope.total_count,
            )

    def records(self) -> list[ScopeRecord]:
        """What the closed scopes saw, by name, the largest peak first."""
        with self._lock:
            found = list(self._records.values())
        return sorted(found, key=lambda record: (-record.peak_bytes, record.name))

    def report(self) -> str:
        """`records` as a table."""
        lines = [f"{'calls':>8} {'peak MiB':>12} {'total MiB':>12} {'blocks':>10}  name"]
        lines += [
            f"{record.call_count:>8} {record.peak_bytes / 2**20:>12.3f} "
            f"{record.total_bytes / 2**20:>12.3f} {record.total_count:>10}  {record.name}"
            for record in self.records()
        ]
        return "\n".join(lines)
