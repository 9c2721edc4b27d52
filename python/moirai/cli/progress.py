"""Progress on standard error: a bar on a terminal, a plain line for each step elsewhere."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

__all__ = ["Progress"]


class Progress:
    """Counts the runs of a comparison. A context manager, for one thread."""

    def __init__(self, total_count: int, *, is_quiet: bool = False) -> None:
        self._total_count = total_count
        self._done_count = 0
        self._is_quiet = is_quiet or sys.stderr is None
        self._bar = None if self._is_quiet or not sys.stderr.isatty() else _bar()
        self._task = None if self._bar is None else self._bar.add_task("", total=total_count)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def announce(self, name: str, stage: str) -> None:
        """Say what runs now."""
        text = f"{name}, {stage}"
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, description=f"{text:<28}")
        elif not self._is_quiet:
            print(
                f"[{self._done_count + 1}/{self._total_count}] {text}", file=sys.stderr, flush=True
            )

    def advance(self) -> None:
        """Count one step as done."""
        self._done_count += 1
        if self._bar is not None and self._task is not None:
            self._bar.advance(self._task)


def _bar() -> Bar:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    return Bar(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
