"""The future of a queued call."""

from __future__ import annotations

import concurrent.futures
from typing import TypeVar

from moirai import _native

__all__ = ["Future"]

_Result = TypeVar("_Result")


class Future(_native.Future, concurrent.futures.Future[_Result]):  # type: ignore[misc, override]
    """A `concurrent.futures.Future`, whose state is native and whose locks are made when asked for.

    Any thread may use it. With an executor of threads, `result()` without a timeout runs the call
    in the thread that waits, if no worker has begun it. In a forked child, waiting for a call that
    the parent queued and that had not ended raises Disconnected.
    """

    __slots__ = ()
    # The state is made by `__new__`: concurrent.futures' own would be made a second time.
    __init__ = object.__init__
