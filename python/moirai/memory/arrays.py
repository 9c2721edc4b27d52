"""NumPy drawing from a resource: in this context, or in the whole process."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar, cast

from moirai import _native
from moirai._native import Resource, installed
from moirai.errors import InvalidArgument
from moirai.memory.resources import PoolResource

__all__ = ["LargeArray", "install", "install_for_program", "largest_arrays", "use"]

_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")


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
        replace: Whether another installed resource may be replaced; that of `moirai run` is in
            any case.

    Returns:
        The resource.

    Raises:
        InvalidArgument: A resource is installed already and `replace` is false.
        Unsupported: NumPy is older than memory handlers.
    """
    chosen = PoolResource() if resource is None else resource
    importlib.import_module("numpy")  # Under `moirai run` that installs a resource.
    is_given = _given is not None and installed() is _given
    _native.install(chosen, replace=replace or is_given)
    return chosen


# What `moirai run` installed for a program that may install a resource of its own.
_given: Resource | None = None


def install_for_program(resource: Resource) -> Resource:
    """Install a resource that the program's own `install` replaces; for `moirai run`."""
    global _given
    _native.install(resource, replace=False)
    _given = resource
    return resource


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
