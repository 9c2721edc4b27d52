"""Where blocks come from: resources, adaptors over them, and NumPy drawing from them.

Every object here may be used by any number of threads at once, with or without the GIL. A forked
child may go on using what it inherited; the parent's other threads' cached blocks stay unused
there. Blocks and arrays keep their resource alive, so objects may be dropped in any order.
"""

from __future__ import annotations

import functools
import inspect
import re
import threading
import warnings
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, Literal, ParamSpec, TypeVar, cast

from moirai import _native
from moirai._native import (
    Buffer,
    HealthReport,
    Resource,
    Statistics,
    SystemResource,
    handler_of,
    installed,
    stop_background,
    uninstall,
)
from moirai.errors import InvalidArgument

__all__ = [
    "Buffer",
    "HealthReport",
    "LargeArray",
    "LargeObjectResource",
    "LimitAdaptor",
    "PoolResource",
    "Resource",
    "Scope",
    "ScopeRecord",
    "SlabResource",
    "Statistics",
    "StatisticsAdaptor",
    "SystemResource",
    "handler_of",
    "install",
    "installed",
    "largest_arrays",
    "parse_bytes",
    "stop_background",
    "uninstall",
    "use",
]

if _native.build_profile() != "release":
    warnings.warn(
        "moirai._native is an unoptimised build: correct, but many times slower than a release "
        "build; build it with `maturin develop --release`",
        RuntimeWarning,
        stacklevel=2,
    )

_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")

HugePages = Literal["auto", "always", "never"]
Fit = Literal["best", "first", "worst"]

_UNITS = {
    "": 1,
    "B": 1,
    "K": 1024,
    "KIB": 1024,
    "KB": 1000,
    "M": 1024**2,
    "MIB": 1024**2,
    "MB": 1000**2,
    "G": 1024**3,
    "GIB": 1024**3,
    "GB": 1000**3,
    "T": 1024**4,
    "TIB": 1024**4,
    "TB": 1000**4,
}
_LONGEST_SIZE = 64  # characters; no machine has more bytes than fit them
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


def parse_bytes(size: int | str, *, argument: str = "size") -> int:
    """Read a size such as ``"2 GiB"``.

    Args:
        size: A count of bytes >= 0, or a number and a unit: B, KiB, MiB, GiB, TiB (powers of 1024),
            KB, MB, GB, TB (powers of 1000), or K, M, G, T (powers of 1024). Case is ignored.
        argument: The name errors give it.

    Returns:
        The size in bytes, fractions rounded down.

    Raises:
        InvalidArgument: It is negative or no such text.
        TypeError: It is neither an int nor a str.
    """
    if isinstance(size, int) and not isinstance(size, bool):
        if size < 0:
            raise InvalidArgument(f"{argument}: must be at least 0, got {size}")
        return size
    if not isinstance(size, str):
        raise TypeError(f"{argument}: must be an int or a str, got {type(size).__name__}")
    match = _SIZE.fullmatch(size)
    factor = _UNITS.get(match[2].upper()) if match else None
    if match is None or factor is None or len(size) > _LONGEST_SIZE:
        raise InvalidArgument(
            f"{argument}: must be a number of bytes, with a unit such as KiB, MiB or GiB if it has "
            f"one, got {size!r}"
        )
    if "." not in match[1]:
        return int(match[1]) * factor
    return int(float(match[1]) * factor)


def _optional_bytes(size: int | str | None, argument: str) -> int | None:
    return None if size is None else parse_bytes(size, argument=argument)


class LargeObjectResource(_native.LargeObjectResource):
    """Spans of pages for large blocks, kept while they are needed, given back by size and age.

    Args:
        fit: Which free span serves a request: the smallest that fits ("best"), the lowest address
            ("first", looks at free spans one by one), or the largest ("worst").
        huge_pages: "auto" asks for huge pages for blocks from 1 MiB, "always" everywhere, "never"
            refuses them even where the system gives them unasked.
        cache_cap_bytes: Most bytes of free memory to keep, as an int or such as "64 MiB". None
            keeps 32 MiB, or more while reuse shows that it is needed, near the recent peak of use.
        decay_seconds: Free memory older than this goes back to the kernel, without traffic too;
            >= 0. None keeps it until the cap or `trim`.

    Raises:
        InvalidArgument: An argument is outside its range.
    """

    def __new__(
        cls,
        *,
        fit: Fit = "best",
        huge_pages: HugePages = "auto",
        cache_cap_bytes: int | str | None = None,
        decay_seconds: float | None = 0.5,
    ) -> LargeObjectResource:
        return super().__new__(
            cls,
            fit=fit,
            huge_pages=huge_pages,
            cache_cap_bytes=_optional_bytes(cache_cap_bytes, "cache_cap_bytes"),
            decay_seconds=decay_seconds,
        )


class PoolResource(_native.PoolResource):
    """The general-purpose resource: a slab for blocks to 16 KiB, a large-object heap above.

    Args:
        huge_pages: As for `LargeObjectResource`.
        cache_cap_bytes: As for `LargeObjectResource`.
        decay_seconds: As for `LargeObjectResource`.

    Raises:
        InvalidArgument: An argument is outside its range.
    """

    def __new__(
        cls,
        *,
        huge_pages: HugePages = "auto",
        cache_cap_bytes: int | str | None = None,
        decay_seconds: float | None = 0.5,
    ) -> PoolResource:
        return super().__new__(
            cls,
            huge_pages=huge_pages,
            cache_cap_bytes=_optional_bytes(cache_cap_bytes, "cache_cap_bytes"),
            decay_seconds=decay_seconds,
        )


class SlabResource(_native.SlabResource):
    """Equal blocks by size class: steps of 64 bytes to 1 KiB, then 4 to a doubling, to 16 KiB.

    Args:
        upstream: Where runs of 64 KiB, and requests above 16 KiB, come from. None makes a
            `LargeObjectResource`.
    """

    def __new__(cls, upstream: Resource | None = None) -> SlabResource:
        return super().__new__(cls, LargeObjectResource() if upstream is None else upstream)


class LimitAdaptor(_native.LimitAdaptor):
    """Refuses what would take the bytes drawn through it above a limit.

    Before it refuses, it trims upstream's cache, then runs `gc.collect()`, then tries once more.
    Upstream's cache is trimmed as well when it and the blocks in use would exceed the limit.

    Args:
        upstream: The resource to draw from.
        limit_bytes: Most block bytes in use, as an int or such as "2 GiB".

    Raises:
        InvalidArgument: `limit_bytes` is negative or unreadable.
    """

    def __new__(cls, upstream: Resource, *, limit_bytes: int | str) -> LimitAdaptor:
        limit = parse_bytes(limit_bytes, argument="limit_bytes")
        return super().__new__(cls, upstream, limit_bytes=limit)


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


class use(_native.use):  # noqa: N801  reads as a verb: with use(pool)
    """Make NumPy draw from `resource` in this context: ``with use(pool):`` or ``@use(pool)``.

    The handler is a context variable (NEP 49): other threads do not see it, asyncio tasks made
    inside inherit it. Arrays made inside stay valid after it and keep the resource alive.

    A generator suspended inside ``with use(...)`` leaves the handler set for whoever called
    it: generators have no context of their own. The decorator form handles that: it sets the
    handler whenever the generator runs and restores it whenever it yields.

    Args:
        resource: Any resource or adaptor.
    """

    def __call__(self, function: Callable[_Parameters, _Result]) -> Callable[_Parameters, _Result]:
        """Run `function` inside: a plain, a generator or a coroutine function."""
        resource = self.resource
        wrapped: Any
        if inspect.isasyncgenfunction(function):
            raise InvalidArgument(
                f"function: must not be an async generator function, got {function.__qualname__}: "
                "use `with use(...)` around the parts between its yields"
            )
        if inspect.isgeneratorfunction(function):

            @functools.wraps(function)
            def wrapped(*args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
                return (yield from _Resumed(function(*args, **kwargs), resource))

        elif inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def wrapped(*args: Any, **kwargs: Any) -> Any:
                with use(resource):
                    return await function(*args, **kwargs)

        else:

            @functools.wraps(function)
            def wrapped(*args: Any, **kwargs: Any) -> Any:
                with use(resource):
                    return function(*args, **kwargs)

        return cast("Callable[_Parameters, _Result]", wrapped)


class _Resumed(Generator[Any, Any, Any]):
    """A generator that runs inside `use(resource)` and is suspended outside of it."""

    def __init__(self, generator: Generator[Any, Any, Any], resource: Resource) -> None:
        self._generator = generator
        self._resource = resource

    def send(self, value: Any) -> Any:
        with use(self._resource):
            return self._generator.send(value)

    def throw(self, *exception: Any) -> Any:
        with use(self._resource):
            return self._generator.throw(*exception)

    def close(self) -> None:
        with use(self._resource):
            self._generator.close()


def install(resource: Resource | None = None, *, replace: bool = False) -> Resource:
    """Make every array of the process draw from a resource, in new threads too.

    What stands behind NumPy's default memory handler is exchanged, so code inside `use` keeps its
    own resource. Arrays made before stay NumPy's; arrays made after stay ours, also after
    `uninstall`. Works the same on NumPy 1.26 to 2.5. A forked child inherits it; a spawned one does
    not (under `moirai run` it does).

    Args:
        resource: Any resource or adaptor; None makes a `PoolResource`.
        replace: Whether another installed resource may be replaced.

    Returns:
        The resource.

    Raises:
        InvalidArgument: A resource is installed already and `replace` is false.
        Unsupported: NumPy is older than memory handlers.
    """
    chosen = PoolResource() if resource is None else resource
    _native.install(chosen, replace=replace)
    return chosen


@dataclass(frozen=True)
class LargeArray:
    """One of the largest arrays made while a resource was installed.

    Attributes:
        size_bytes: Bytes of its data.
        seen_count: How often an array of exactly this size was made since it is on the list.
        site: "file:line" that asked for it first, outside installed packages where there is such a
            line; None if no Python code was running.
    """

    size_bytes: int
    seen_count: int
    site: str | None


def largest_arrays() -> list[LargeArray]:
    """The five largest distinct array sizes from 1 MiB made while installed, largest first."""
    return [LargeArray(*record) for record in _native.largest_arrays()]
