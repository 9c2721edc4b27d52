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
            are_integers = dtype.kind in "iu" and not isinstance(sequence, np.ndarray | memoryview)
            sequence = (_integers if are_integers else _natural)(sequence, dtype)
            with np.errstate(over="ignore", invalid="ignore"):  # it is refused, not warned of
                array = np.ascontiguousarray(sequence, dtype)
            if array.ndim != 1:
                raise InvalidArgument(_dimensions(array))
            if not are_integers:
                _check_values(sequence, array)
        except InvalidArgument:
            raise
        except (OverflowError, ValueError) as error:
            raise InvalidArgument(f"values: must fit {dtype}: {error}") from error
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


def _natural(values: Any, dtype: np.dtype[Any]) -> Any:
    """Values as NumPy has them unasked; refuses another kind: fractions, signs, imaginary parts.

    Records, whose kinds are their fields', stay as they are.
    """
    if dtype.names is not None:
        return values
    natural = np.asarray(values)
    if natural.size and not np.can_cast(natural.dtype, dtype, "same_kind"):
        raise InvalidArgument(_kind(dtype, natural))
    return natural


def _check_values(values: Any, array: NDArray[Any]) -> None:
    """Refuse what NumPy has cut down to make `array` of `values`."""
    names = array.dtype.names
    if names is not None:
        records = np.asarray(values) if isinstance(values, memoryview) else values
        for index, name in enumerate(names):
            _check_values(_field(records, index), array[name])
        return
    try:
        natural = np.asarray(values)
    except ValueError:  # of records whose field is an array, some give one value for all of it
        for value, made in zip(values, array, strict=True):
            _check_values(np.asarray(value)[np.newaxis], made[np.newaxis])
        return
    if np.can_cast(natural.dtype, array.dtype, "safe"):
        return
    # In a record, one value may stand for all of a field that is an array.
    natural = natural.reshape(natural.shape + (1,) * (array.ndim - natural.ndim))
    lost = np.broadcast_to(_lost(natural, array), array.shape)
    if lost.any():
        got = np.broadcast_to(natural, array.shape)[lost][0]
        raise InvalidArgument(f"values: must fit {array.dtype}, got {got}")


def _field(records: Any, index: int) -> Any:
    """One field of records, which are an array, tuples, or values that stand for all fields."""
    if isinstance(records, np.ndarray) and records.dtype.names is not None:
        return records[records.dtype.names[index]]
    return [record[index] if isinstance(record, tuple | np.void) else record for record in records]


def _lost(natural: NDArray[Any], array: NDArray[Any]) -> Any:
    """Where a value is not what it was. Floats may be rounded, but not to infinity."""
    source, target = natural.dtype.kind, array.dtype.kind
    if (target in "fc" and source in "iuf") or target == source == "c":
        return np.isinf(array) & np.isfinite(natural)
    if target in "biufc" and source in "biufc":
        return natural != array
    if target in "mM" and source in "mM":
        return (natural != array) & ~np.isnat(natural)
    if target in "SU" and source != "O":
        return array.astype(natural.dtype) != natural
    return target == "V" and natural.dtype.itemsize > array.dtype.itemsize


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
        if item.hasobject or item.itemsize == 0 or item.subdtype is not None:
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
