"""Starting threads where a fence stands: MemoryError instead of a wait without end.

`threading.Thread.start` waits until the new thread says that it runs. One that finds no memory for
its first frame ends before it can, and the wait never does. Where a fence stands that is likely, so
`start` is given an event that also looks whether the thread is still there.
"""

from __future__ import annotations

import functools
import threading
import weakref
from typing import Any

__all__ = ["guard_starts"]

_LOOK_SECONDS = 0.02
_start = threading.Thread.start


class _StartedOrEnded(threading.Event):
    """Set by a thread that runs; a wait for it ends as well if the thread ended before."""

    def __init__(self, thread: threading.Thread, first: functools.partial[Any]) -> None:
        super().__init__()
        self._thread: threading.Thread | None = thread
        # From the wait on, the new thread alone holds what it was started with.
        self._first = weakref.ref(first)
        self.has_ended = False

    def wait(self, timeout: float | None = None) -> bool:
        """Wait as an event does.

        Raises:
            MemoryError: The thread ended before it ran.
        """
        thread, self._thread = self._thread, None
        if thread is None or timeout is not None:
            return super().wait(timeout)
        thread.__dict__.pop("_bootstrap", None)
        del thread
        while not super().wait(_LOOK_SECONDS):
            if self._first() is None and not self.is_set():
                self.has_ended = True
                raise MemoryError("a thread found no memory to begin")
        return True


@functools.wraps(_start)
def _start_or_raise(self: Any) -> None:
    if not getattr(self, "_initialized", False) or self._started.is_set():
        return _start(self)  # which says what is wrong
    first = functools.partial(self._bootstrap)
    before, event = self._started, _StartedOrEnded(self, first)
    self._started, self._bootstrap = event, first
    del first
    try:
        _start(self)
    except BaseException:
        self.__dict__.pop("_bootstrap", None)
        if event.has_ended:  # as if it had never been started
            with threading._active_limbo_lock:  # type: ignore[attr-defined]
                threading._limbo.pop(self, None)  # type: ignore[attr-defined]
            self._started = before
        raise


def guard_starts() -> None:
    """Have `threading.Thread.start` raise MemoryError where it would wait for ever, from now on."""
    threading.Thread.start = _start_or_raise  # type: ignore[method-assign]
