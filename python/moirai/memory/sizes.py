"""Sizes in words: "2 GiB"."""

from __future__ import annotations

import re

from moirai._arguments import wrong_type
from moirai.errors import InvalidArgument

__all__ = ["optional_bytes", "parse_bytes"]

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
        WrongType: It is neither an int nor a str.
    """
    if isinstance(size, int) and not isinstance(size, bool):
        if size < 0:
            raise InvalidArgument(f"{argument}: must be at least 0, got {size}")
        return size
    if not isinstance(size, str):
        raise wrong_type(argument, "an int or a str", size)
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


def optional_bytes(size: int | str | None, argument: str) -> int | None:
    """Read a size that may be left out."""
    return None if size is None else parse_bytes(size, argument=argument)
