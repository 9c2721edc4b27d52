"""What goes wrong where nobody waits for it: logged as concurrent.futures does."""

from __future__ import annotations

import logging

_LOG = logging.getLogger("concurrent.futures")


def callback_failed(future: object, error: BaseException) -> None:
    """Log that a function given to `add_done_callback` raised."""
    _LOG.error("exception calling callback for %r", future, exc_info=error)


def initializer_failed(error: BaseException) -> None:
    """Log that a worker's initializer raised."""
    _LOG.critical("Exception in initializer:", exc_info=error)
