"""A guard's run on threads of its own: one decides at each sample, another takes the actions."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable

from moirai.errors import Closed, Timeout
from moirai.pressure.sampler import Sampler
from moirai.pressure.samples import Sample
from moirai.pressure.worker import Worker

__all__ = ["Watch"]

log = logging.getLogger("moirai.pressure")

# What somebody does who was told something on the deciding thread is waited for so long.
_JOIN_SECONDS = 5.0


class Watch:
    """One run, from `start` until `end`, or until there are no more samples.

    Any number of threads may use it at once. In a forked child its threads are not there: make
    another.

    Attributes:
        worker: Takes the actions that may not come back.

    Args:
        sampler: Whose samples are decided on.
        decide: Called with each sample, on a thread of its own.
        rest_seconds: Says how long no decision is needed, given how long the last one took.
    """

    def __init__(
        self,
        sampler: Sampler,
        *,
        decide: Callable[[Sample], object],
        rest_seconds: Callable[[float], float],
    ) -> None:
        self._sampler = sampler
        self._decide = decide
        self._rest_seconds = rest_seconds
        self._is_sampling = threading.Event()
        self._ending = threading.Event()
        self.worker = Worker()
        self._thread = threading.Thread(target=self._run, name="moirai-guard", daemon=True)

    def start(self) -> None:
        """Start the thread that decides, then the sampler; at most once.

        In this order: where the fence stands, a thread may find no memory for its first steps.
        """
        try:
            self._thread.start()
            self._sampler.start()
        except BaseException:
            self.end()
            raise
        finally:
            self._is_sampling.set()

    def end(self) -> None:
        """Have both threads end; waits for neither, and an action under way is left to itself."""
        self._ending.set()
        self.worker.stop()

    def join(self) -> None:
        """Wait until nothing is decided any more, for five seconds at most."""
        if self._thread.is_alive() and not self.is_here:
            self._thread.join(_JOIN_SECONDS)

    @property
    def is_running(self) -> bool:
        """Whether it was started, and nobody has it end."""
        return self._thread.is_alive() and not self._ending.is_set()

    @property
    def is_here(self) -> bool:
        """Whether the calling thread is the one that decides."""
        return threading.current_thread() is self._thread

    @property
    def is_ending(self) -> bool:
        """Whether the calling thread is the one that decides, and is to end."""
        return self._ending.is_set() and self.is_here

    def _run(self) -> None:
        self._is_sampling.wait()
        try:
            while not self._ending.is_set():
                try:
                    if not self._follow():
                        break
                except (Exception, SystemExit) as error:
                    # Whatever it was: the program must not be left alone.
                    with contextlib.suppress(MemoryError):
                        _tell_of(error)
        finally:
            self.worker.stop()

    def _follow(self) -> bool:
        """Decide on the next sample and rest; whether there may be another."""
        began = time.monotonic()
        try:
            sample = self._sampler.next(timeout_seconds=1.0)
        except Timeout:
            return True
        except Closed:
            return False
        self._decide(sample)
        self._sampler.look_at_ledger()
        rest = self._rest_seconds(time.monotonic() - began)
        if rest > 0.0:
            self._ending.wait(rest)
        return True


def _tell_of(error: BaseException) -> None:
    if isinstance(error, MemoryError):
        # The fence stands close: the next sample may find more room.
        log.warning("no memory for a decision")
    else:
        log.error("a decision failed", exc_info=error)
