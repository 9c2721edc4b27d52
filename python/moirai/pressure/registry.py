"""What can be made smaller: registered by name, held weakly, asked in order of cost."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import Any

from moirai._arguments import check_bool, check_callable, check_instance
from moirai.errors import InvalidArgument, WrongType

__all__ = ["Registration", "Registry", "register"]

Shrink = Callable[[int], "int | None"]
Size = Callable[[], int]


class Registration:
    """One thing that can be made smaller. `unregister` ends it; so does the end of its owner."""

    def __init__(
        self,
        registry: Registry,
        name: str,
        shrink: Callable[[], Shrink | None],
        size: Callable[[], Size | None] | None,
        cost: float,
        is_irreversible: bool,
    ) -> None:
        self.name = name
        self.cost = cost
        self.is_irreversible = is_irreversible
        self._registry = registry
        self._shrink = shrink
        self._size = size

    def shrink(self) -> Shrink | None:
        """Give the function that shrinks; None once its owner is gone."""
        return self._shrink()

    def size_bytes(self) -> int | None:
        """Ask how large it is; None if nobody can say."""
        size = None if self._size is None else self._size()
        return None if size is None else int(size())

    def unregister(self) -> None:
        """Ask it no more; does nothing the second time."""
        self._registry.remove(self)


class Registry:
    """Registrations, the cheapest first. Any number of threads may use it at once."""

    def __init__(self) -> None:
        # Each step on it is atomic, so no lock: a finalizer that unregisters may run at any time.
        self._all: dict[Registration, None] = {}

    def register(
        self,
        name: str,
        shrink: Shrink,
        *,
        size: Size | None = None,
        cost: float = 1.0,
        irreversible: bool = False,
        owner: object | None = None,
    ) -> Registration:
        """See `moirai.pressure.register`."""
        check_callable("shrink", shrink)
        check_callable("size", size, or_none=True)
        check_instance("name", name, str)
        check_bool("irreversible", irreversible)
        if not (isinstance(cost, (int, float)) and 0 <= cost < math.inf):
            raise InvalidArgument(f"cost: must be a number of at least 0, got {cost!r}")
        kept_size = None if size is None else _weakly(size, owner)
        made = Registration(self, name, _weakly(shrink, owner), kept_size, cost, irreversible)
        self._all[made] = None
        return made

    def remove(self, registration: Registration) -> None:
        """Take a registration out, if it is in.

        Raises:
            WrongType: It is none.
        """
        check_instance("registration", registration, Registration)
        self._all.pop(registration, None)

    def live(self) -> list[Registration]:
        """Give those whose owners live, the cheapest first."""
        every = list(self._all)
        alive = [registration for registration in every if registration.shrink() is not None]
        for gone in set(every) - set(alive):
            self.remove(gone)
        return sorted(alive, key=lambda registration: registration.cost)


def _weakly(function: Callable[..., Any], owner: object | None) -> Callable[[], Any]:
    """Hold a bound method, or a function of an owner, only as long as the object lives."""
    if owner is not None:
        owner_reference = _reference("owner: must be one", owner)
        return lambda: function if owner_reference() is not None else None
    if hasattr(function, "__func__"):
        _reference("shrink, size: must be methods of an object", function.__self__)  # type: ignore[attr-defined]
        return weakref.WeakMethod(function)
    try:  # A method of a compiled class: made anew from its object each time.
        reference = weakref.ref(function.__self__)  # type: ignore[attr-defined]
        name = function.__name__
    except (AttributeError, TypeError):
        return lambda: function
    return lambda: getattr(reference(), name, None)


def _reference(what: str, target: object) -> weakref.ref[object]:
    try:
        return weakref.ref(target)
    except TypeError:
        kind = type(target).__name__
        raise WrongType(f"{what} that can be held weakly, got {kind}") from None


REGISTRY = Registry()


def register(
    name: str,
    shrink: Shrink,
    *,
    size: Size | None = None,
    cost: float = 1.0,
    irreversible: bool = False,
    owner: object | None = None,
) -> Registration:
    """Have every guard of this process ask something to become smaller under pressure.

    A bound method is held weakly: the registration ends with its object. Any other function is held
    until `unregister`, or as long as `owner` lives (it must not refer to the owner itself).

    Args:
        name: What logs call it.
        shrink: Called with the bytes wanted, on a thread of the guard; frees what it can and
            returns the bytes freed, or None if it cannot say. It must not wait long for the
            program's own threads, nor reserve.
        size: Says how many bytes there are to free, called on the same thread; what says 0 is not
            asked.
        cost: What it costs to get a byte back later, compared with others; low goes first. Caches
            of what can be read again are about 1, of what is computed again about 10.
        irreversible: It cannot be undone: asked only near the limit.
        owner: The object whose end ends the registration.

    Raises:
        InvalidArgument: `cost` is negative or no number.
        WrongType: `shrink` or `size` cannot be called, or an argument is of another kind.
    """
    return REGISTRY.register(
        name, shrink, size=size, cost=cost, irreversible=irreversible, owner=owner
    )
