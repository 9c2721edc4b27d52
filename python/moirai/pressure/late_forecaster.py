"""The guard's own forecaster: loaded once use calls for it, so that calm programs do not pay.

The forecaster needs NumPy, which takes a tenth of a second and some 20 MiB where the program does
not use it. What is observed until then is kept and told to it in the end.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import weakref
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from moirai.pressure.forecaster import Forecast, Forecaster

__all__ = ["LateForecaster"]

log = logging.getLogger("moirai.pressure")

# It is loaded from this share of the limit on.
FROM_RATIO = 0.25
# NumPy is imported only with so much room left: an import that fails half-way cannot be repeated.
ROOM_BYTES = 256 << 20
_KEPT_COUNT = 300  # What a forecaster looks back on, at one observation a second.
_FORK_WAIT_SECONDS = 5.0

_loading: weakref.WeakSet[LateForecaster] = weakref.WeakSet()


class LateForecaster:
    """A `Forecaster` that is loaded when a quarter of the limit is used; None is its answer before.

    Where it cannot be loaded, for want of NumPy or of room, that is logged once and the answer
    stays None. Several threads may use one. A forked child has its own copy.
    """

    def __init__(
        self, *, in_background: bool, fence_room: Callable[[], int | None] = lambda: None
    ) -> None:
        """Prepare; with `in_background`, loading is left to a thread of its own.

        `fence_room` says what a fence lets the process map: behind it, an import that finds less
        than it needs ends the program (OpenBLAS does).
        """
        self._fence_room = fence_room
        self._in_background = in_background
        self._kept: deque[tuple[float, int, int]] = deque(maxlen=_KEPT_COUNT)
        self._forecaster: Forecaster | None = None
        self._loader: threading.Thread | None = None
        self._has_failed = False
        self._lock = threading.Lock()

    def observe(self, time_seconds: float, used_bytes: int, limit_bytes: int) -> None:
        """Take one observation."""
        with self._lock:
            forecaster = self._forecaster
            if forecaster is None:
                self._kept.append((time_seconds, used_bytes, limit_bytes))
        if forecaster is not None:
            forecaster.observe(time_seconds, used_bytes, limit_bytes)
        elif self._is_called_for(used_bytes, limit_bytes):
            self._load_somewhere()

    def forecast(self) -> Forecast | None:
        """Say what is to come; None as long as it is not loaded."""
        forecaster = self._forecaster
        return None if forecaster is None else forecaster.forecast()

    @property
    def loaded(self) -> Forecaster | None:
        """The forecaster, with its score; None as long as it is not loaded."""
        return self._forecaster

    def _is_called_for(self, used_bytes: int, limit_bytes: int) -> bool:
        if self._has_failed or used_bytes < FROM_RATIO * limit_bytes:
            return False
        if "numpy" in sys.modules:
            return True
        fenced = self._fence_room()
        room = limit_bytes - used_bytes
        return (room if fenced is None else min(room, fenced)) >= ROOM_BYTES

    def _load_somewhere(self) -> None:
        if not self._in_background:
            self._load()
        elif self._loader is None:
            _loading.add(self)
            # No daemon: the interpreter waits for an import before it ends.
            loader = threading.Thread(target=self._load, name="moirai-forecaster")
            try:
                loader.start()
            except (MemoryError, RuntimeError):  # No room for a thread: the next may find some.
                _loading.discard(self)
                raise
            self._loader = loader

    def _load(self) -> None:
        try:
            from moirai.pressure.forecaster import Forecaster

            made = Forecaster()
            with self._lock:
                for observation in self._kept:
                    made.observe(*observation)
                self._kept.clear()
                self._forecaster = made
        except Exception as error:  # A broken NumPy raises all sorts of things.
            self._has_failed = True
            log.info("no forecasts, the level alone decides: %s: %s", type(error).__name__, error)
        finally:
            _loading.discard(self)

    def after_fork(self) -> None:
        """Replace what a thread that a child does not have may hold."""
        self._lock = threading.Lock()
        self._loader = None


def _wait_for_loaders() -> None:
    """Before a fork: a child would find the locks of modules that were being imported held."""
    for late in list(_loading):
        loader = late._loader
        if loader is not None and loader is not threading.current_thread():
            loader.join(_FORK_WAIT_SECONDS)


os.register_at_fork(before=_wait_for_loaders)
