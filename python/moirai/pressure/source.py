"""What the kernel says of a process's memory, of its control groups and of the machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moirai import _native
from moirai._arguments import check_int, path_text
from moirai.errors import Closed
from moirai.pressure.samples import Bound, Sample

if TYPE_CHECKING:
    import os
    from pathlib import Path
    from typing import Any

__all__ = ["Source"]


class Source:
    """Reads everything that may limit the memory of a process.

    Any number of threads may use it at once; they take turns. A forked child that reads one of its
    parent's reads about the parent: make another.
    """

    def __init__(
        self,
        *,
        root: str | os.PathLike[str] = "/",
        process_id: int | None = None,
        budget_bytes: int | str | None = None,
        budget_process_id: int | None = None,
    ) -> None:
        """Prepare to read; files are opened at the first reading and stay open.

        Args:
            root: Folder that `proc` and `sys` are in.
            process_id: The process to read about; default: this one.
            budget_bytes: A limit of your own for the process and its children, as an int or such
                as "2 GiB".
            budget_process_id: The process that the budget is for, with its children; default: the
                one that is read about.

        Raises:
            InvalidArgument: An argument is outside its range.
        """
        self._process = process_text(process_id)
        self._native = _native.PressureSource(
            root=path_text("root", root),
            process=self._process,
            budget_bytes=optional_limit(budget_bytes, "budget_bytes"),
            eldest=optional_process(budget_process_id, "budget_process_id"),
        )

    def read(self) -> Sample:
        """Read everything now.

        Raises:
            Closed: The process is gone.
        """
        found = self._native.read()
        if found is None:
            raise Closed(f"process {self._process} is gone, or there is no /proc")
        return sample_of(found)

    def bounds(self) -> tuple[Bound, ...]:
        """Give every limit as of the last reading, the process's own group first."""
        return tuple(
            Bound(kind, None if folder is None else _path(folder), used, without_cache, limit)
            for kind, folder, used, without_cache, limit in self._native.bounds()
        )


def sample_of(values: tuple[Any, ...]) -> Sample:
    """Name the values that the compiled core gives; the last are a tuple of their own."""
    *plain, confirmations = values
    return Sample(*plain, *confirmations)


def _path(folder: str | os.PathLike[str]) -> Path:
    from pathlib import Path

    return Path(folder)


def process_text(process_id: int | None) -> str:
    """Name a process as `/proc` does."""
    found = optional_process(process_id, "process_id")
    return "self" if found is None else str(found)


def optional_process(process_id: int | None, argument: str) -> int | None:
    """Check the number of a process, which may be left out."""
    from moirai.errors import InvalidArgument

    if process_id is None:
        return None
    check_int(argument, process_id, or_none=True)
    if not 1 <= process_id < 1 << 31:
        raise InvalidArgument(f"{argument}: must be from 1 to 2147483647, got {process_id}")
    return process_id


def optional_limit(size: int | str | None, argument: str) -> int | None:
    """Read a limit of the user's own, which may be left out."""
    from moirai.errors import InvalidArgument

    limit = optional_bytes(size, argument)
    if limit is not None and not 1 <= limit < 1 << 63:
        raise InvalidArgument(f"{argument}: must be from 1 to 2**63 - 1 bytes, got {limit}")
    return limit


def optional_bytes(size: int | str | None, argument: str) -> int | None:
    """Read a size that may be left out.

    `moirai.memory` is imported for a text alone: it imports NumPy, which a guard that starts before
    the program must not.
    """
    if size is None or (type(size) is int and size >= 0):
        return size
    from moirai.memory.sizes import parse_bytes

    return parse_bytes(size, argument=argument)
