"""Numbers that a process and those that it starts have in common."""

from __future__ import annotations

import mmap
import os
import weakref
from typing import Any

__all__ = ["SharedNumbers"]

_NUMBER_BYTES = 8


class SharedNumbers:
    """Numbers from 0 to 2^64 - 1 in memory that has no name; all 0 at first.

    Whoever reads one while another process writes it gets what it was before or is after. To be
    given to processes as an argument when they are started.

    Args:
        count: How many; at least 1.
        fd: The memory, which belongs to the object then; None makes it.
    """

    def __init__(self, count: int, fd: int | None = None) -> None:
        if fd is None:
            fd = os.memfd_create("moirai-numbers")
            os.ftruncate(fd, count * _NUMBER_BYTES)
        self._count, self._fd = count, fd
        weakref.finalize(self, os.close, fd).atexit = False
        self._numbers = memoryview(mmap.mmap(fd, count * _NUMBER_BYTES)).cast("Q")

    def __getitem__(self, index: int) -> int:
        """The number at a place."""
        return self._numbers[index]

    def __setitem__(self, index: int, number: int) -> None:
        """Set the number at a place."""
        self._numbers[index] = number

    def __reduce__(self) -> tuple[Any, ...]:
        from multiprocessing.reduction import DupFd

        return _adopt, (self._count, DupFd(self._fd))


def _adopt(count: int, descriptor: Any) -> SharedNumbers:
    return SharedNumbers(count, descriptor.detach())
