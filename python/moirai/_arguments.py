"""What is said of an argument of the wrong kind, by all who check one where it enters."""

from __future__ import annotations

import os
import sys
from numbers import Real
from typing import Any

from moirai.errors import InvalidArgument, WrongType

__all__ = [
    "LARGEST_FLOAT",
    "LONGEST_SECONDS",
    "check_bool",
    "check_callable",
    "check_instance",
    "check_int",
    "check_number",
    "check_seconds",
    "check_timeout",
    "path_text",
    "wrong_type",
]

# What is not between this and its opposite is not finite as a float, be it an int.
LARGEST_FLOAT = sys.float_info.max
# Nobody is asked to wait longer: some thirty years.
LONGEST_SECONDS = 1e9


def wrong_type(name: str, expected: str, value: object) -> WrongType:
    """Make the exception, for who decides in another way."""
    return WrongType(f"{name}: must be {expected}, got {type(value).__name__}")


def check_instance(name: str, value: object, kind: type, *, or_none: bool = False) -> None:
    """Refuse what is no instance of a class.

    Raises:
        WrongType: It is none.
    """
    if not (isinstance(value, kind) or (or_none and value is None)):
        what = kind.__name__
        raise wrong_type(name, _phrase(f"a {what}" if what.islower() else what, or_none), value)


def check_bool(name: str, value: object) -> None:
    """Refuse what is neither True nor False: a text, say, which would count as true.

    Raises:
        WrongType: It is neither.
    """
    if not isinstance(value, bool):
        raise wrong_type(name, "a bool", value)


def check_callable(name: str, value: object, *, or_none: bool = False) -> None:
    """Refuse what cannot be called.

    Raises:
        WrongType: It cannot.
    """
    if not (callable(value) or (or_none and value is None)):
        raise wrong_type(name, _phrase("callable", or_none), value)


def check_int(name: str, value: object, *, or_none: bool = False) -> None:
    """Refuse what is no int, a bool included.

    Raises:
        WrongType: It is none.
    """
    if value is None and or_none:
        return
    if not isinstance(value, int) or isinstance(value, bool):
        raise wrong_type(name, _phrase("an int", or_none), value)


def check_number(name: str, value: object, *, or_none: bool = False) -> None:
    """Refuse what is no real number; its range is for who asks.

    Raises:
        WrongType: It is none.
    """
    # Named first, as asking an abstract class takes five times as long.
    if not (isinstance(value, (float, int, Real)) or (or_none and value is None)):
        raise wrong_type(name, _phrase("a number", or_none), value)


def check_timeout(name: str, value: Any) -> None:
    """Refuse what is neither None nor seconds that can be waited; less than 0 is for 0.

    Raises:
        WrongType: It is no number.
        InvalidArgument: It is NaN or above 1e9.
    """
    if value is None:
        return
    check_number(name, value, or_none=True)
    if not value <= LONGEST_SECONDS:
        raise InvalidArgument(f"{name}: must be None or a number up to 1e9, got {value}")


def check_seconds(name: str, value: Any) -> None:
    """Refuse what is neither None nor seconds from 0 to 1e9.

    Raises:
        WrongType: It is no number.
        InvalidArgument: It is outside that range.
    """
    check_number(name, value, or_none=True)
    if value is not None and not 0 <= value <= LONGEST_SECONDS:
        raise InvalidArgument(f"{name}: must be None or a number from 0 to 1e9, got {value}")


def path_text(name: str, value: str | os.PathLike[str]) -> str:
    """Give a path as a str.

    Raises:
        WrongType: It is none.
    """
    try:
        return os.fsdecode(value)
    except TypeError:
        raise wrong_type(name, "a str or a path", value) from None


def _phrase(what: str, or_none: bool) -> str:
    return f"{what} or None" if or_none else what
