"""A thread that waits for the ends of processes."""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable
from multiprocessing.process import BaseProcess

__all__ = ["Watch"]


class Watch:
    """Tells when processes have ended, in a thread of its own. Any thread may use it.

    A forked child has no such thread, and must not use it.

    Args:
        tell: Called in the thread, with the number that the process was added with.
        name: The thread's name.
    """

    def __init__(self, tell: Callable[[int], None], name: str) -> None:
        self._tell = tell
        self._poll = select.poll()
        self._changed = os.eventfd(0, os.EFD_CLOEXEC)
        self._poll.register(self._changed, select.POLLIN)
        self._lock = threading.Lock()
        self._numbers: dict[int, int] = {}
        self._is_over = False
        self._thread = threading.Thread(target=self._run, name=name)
        self._thread.start()

    def add(self, number: int, process: BaseProcess) -> None:
        """Watch a process that was started."""
        descriptor = _descriptor(process)
        with self._lock:
            self._numbers[descriptor] = number
        os.eventfd_write(self._changed, 1)

    def stop(self) -> None:
        """End the thread."""
        self._is_over = True
        os.eventfd_write(self._changed, 1)
        self._thread.join()
        # Not by the thread, which may end before it is told.
        os.close(self._changed)

    def _run(self) -> None:
        while not self._is_over:
            for descriptor, _ in self._poll.poll():
                if descriptor == self._changed:
                    os.eventfd_read(descriptor)
                    with self._lock:
                        for each in self._numbers:
                            self._poll.register(each, select.POLLIN)
                    continue
                self._poll.unregister(descriptor)
                with self._lock:
                    number = self._numbers.pop(descriptor)
                os.close(descriptor)
                self._tell(number)
        for descriptor in self._numbers:
            os.close(descriptor)


def _descriptor(process: BaseProcess) -> int:
    """A descriptor that is readable once the process has ended, whatever its children do."""
    assert process.pid is not None
    try:
        return os.pidfd_open(process.pid)
    except OSError:  # ended already, or an old kernel
        return os.dup(process.sentinel)
