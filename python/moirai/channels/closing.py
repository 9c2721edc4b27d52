"""What is closed at the end of its `with` block."""

from __future__ import annotations

from abc import abstractmethod
from types import TracebackType
from typing import Self

__all__ = ["ClosesAtExit"]


class ClosesAtExit:
    """A context manager that is itself, and is closed at the end, whatever the block raised."""

    __slots__ = ()

    @abstractmethod
    def close(self) -> None:
        """End it; a second time does nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
