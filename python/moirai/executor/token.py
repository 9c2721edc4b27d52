"""The token by which a running task learns that it is to end."""

from __future__ import annotations

import contextvars
from collections.abc import Callable

from moirai._native import CancelToken, task_token

__all__ = ["CancelToken", "call_token", "current_token"]

call_token: contextvars.ContextVar[Callable[[], CancelToken] | None] = contextvars.ContextVar(
    "call_token", default=None
)
"""What gives the token of a call that is no task of threads."""


def current_token() -> CancelToken:
    """The token of the task that this thread is running, the innermost one.

    Outside of a task, one that is never cancelled.
    """
    token = task_token()
    if token is not None:
        return token
    give = call_token.get()
    return CancelToken() if give is None else give()
