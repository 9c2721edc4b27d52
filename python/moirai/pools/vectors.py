"""Pools of typed vectors that grow."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from moirai import _native
from moirai.errors import InvalidArgument
from moirai.memory import PoolResource, Resource, parse_bytes
from moirai.pools.buffers import Overflow
from moirai.pools.live import known

__all__ = ["VectorPool"]


def _format_of(dtype: np.dtype[Any]) -> str | None:
    """The format of an item as the buffer protocol writes it; None if it has none."""
    try:
        return np.empty(0, dtype).data.format
    except (ValueError, NotImplementedError):  # dates, for one
        return None


def _converter(dtype: np.dtype[Any]) -> Callable[[Iterable[Any]], NDArray[np.uint8]]:
    """What turns values into the bytes of contiguous items of `dtype`."""

    def convert(values: Iterable[Any]) -> NDArray[np.uint8]:
        sequence = _sequence(values)
        try:
            if isinstance(sequence, np.ndarray | memoryview) or dtype.kind not in "iu":
                _check_kind(sequence, dtype)
            else:
                sequence = _integers(sequence, dtype)
            array = np.ascontiguousarray(sequence, dtype)
        except InvalidArgument:
            raise
        except (OverflowError, ValueError) as error:
            raise InvalidArgument(f"values: must fit {dtype}: {error}") from error
        if array.ndim != 1:
            raise InvalidArgument(_dimensions(array))
        return array.view(np.uint8)

    return convert


def _sequence(values: Iterable[Any]) -> Any:
    """What NumPy reads item by item: bytes as their numbers, a generator as a list."""
    if isinstance(values, np.ndarray | list | tuple | range):
        return values
    if hasattr(values, "__array__"):
        return np.asarray(values)
    try:
        return memoryview(values)  # type: ignore[arg-type]
    except TypeError:
        pass
    try:
        return list(values)
    except TypeError:
        raise TypeError(f"values: must be iterable, got {type(values).__name__}") from None


def _kind(dtype: np.dtype[Any], got: NDArray[Any]) -> str:
    return f"values: must be of the kind of {dtype}, got {got.dtype}"


def _dimensions(got: NDArray[Any]) -> str:
    return f"values: must have one dimension, got {got.ndim}"


def _check_kind(values: Any, dtype: np.dtype[Any]) -> None:
    """Refuse what NumPy would quietly cut down: fractions, signs, imaginary parts."""
    if dtype.names is not None:
        return
    natural = np.asarray(values)
    if natural.size and not np.can_cast(natural.dtype, dtype, "same_kind"):
        raise InvalidArgument(_kind(dtype, natural))


def _integers(values: Sequence[Any], dtype: np.dtype[Any]) -> list[int]:
    """Python's integers, which have no kind of their own, if all of them fit."""
    try:
        found = [operator.index(value) for value in values]
    except TypeError:
        natural = np.asarray(values)
        if natural.ndim != 1:
            raise InvalidArgument(_dimensions(natural)) from None
        raise InvalidArgument(_kind(dtype, natural)) from None
    low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
    for value in (min(found, default=0), max(found, default=0)):
        if not low <= value <= high:
            raise InvalidArgument(f"values: must be from {low} to {high}, got {value}")
    return found


class VectorPool(_native.VectorPool):
    """Typed vectors that grow: for collecting values before their count is known.

    A vector grows like a list, by `growth`, and gives its values as an array without a copy. It
    comes back empty and keeps its memory for the next user, unless it grew past `cap_bytes`. Its
    length cannot change while a view of it (an array, a memoryview) is alive, and one that comes
    back viewed is not handed out again. Threads and fork: as for `ObjectPool`.

    Args:
        dtype: Any dtype without object references.
        capacity: Values a new vector has room for; >= 1.
        cap_bytes: Most bytes of a vector that is kept, as an int or such as "1 MiB".
        growth: How many times larger the next block is; from 1.5 to 2.
        max_count: Permits; >= 1.
        resource: Where blocks come from; None makes a `moirai.memory.PoolResource`.
        overflow: As for `ObjectPool`.
        idle_seconds: As for `ObjectPool`; what is given up goes back to the resource.
        track_sites: As for `ObjectPool`.

    Raises:
        InvalidArgument: An argument is outside its range, or the dtype holds objects.
    """

    __slots__ = ()

    def __new__(
        cls,
        dtype: DTypeLike = np.float64,
        *,
        capacity: int = 1024,
        cap_bytes: int | str = "1 MiB",
        growth: float = 2.0,
        max_count: int = 64,
        resource: Resource | None = None,
        overflow: Overflow = "block",
        idle_seconds: float | None = None,
        track_sites: bool = False,
    ) -> VectorPool:
        item = np.dtype(dtype)
        if item.hasobject or item.itemsize == 0:
            raise InvalidArgument(f"dtype: must hold plain values of a size, got {item}")
        made = super().__new__(
            cls,
            PoolResource() if resource is None else resource,
            item,
            format=_format_of(item),
            convert=_converter(item),
            capacity=capacity,
            cap_bytes=parse_bytes(cap_bytes, argument="cap_bytes"),
            growth=growth,
            max_count=max_count,
            overflow=overflow,
            idle_seconds=idle_seconds,
            track_sites=track_sites,
        )
        return known(made)

    lease = _native.VectorPool.acquire
