"""Every exception Moirai raises, as one tree.

::

    MoiraiError
    ├── InvalidArgument (ValueError)         fix the call
    │   └── WrongType (TypeError)            it is of another kind, or no such argument
    ├── OutOfMemory (MemoryError)            free something, then retry
    ├── Closed (RuntimeError)                you closed it
    ├── Disconnected (ConnectionError)       the other side closed it
    │   └── WorkerFailed                     the process that had a task died, or cannot read it
    ├── Timeout (TimeoutError)               it took longer than you allowed
    ├── Corrupted (RuntimeError)             the bytes are not what was written
    └── Unsupported (NotImplementedError)    this machine or build cannot do it

The class says who can act. Each also extends the builtin that a caller would guess.
"""

__all__ = [
    "Closed",
    "Corrupted",
    "Disconnected",
    "InvalidArgument",
    "MoiraiError",
    "OutOfMemory",
    "Timeout",
    "Unsupported",
    "WorkerFailed",
    "WrongType",
]


class MoiraiError(Exception):
    """Base of every exception that Moirai raises on purpose."""


class InvalidArgument(MoiraiError, ValueError):
    """An argument is outside its range; the message names it, what was expected and what came."""


class WrongType(InvalidArgument, TypeError):
    """An argument is of another kind than it must be, or there is none of that name."""


class OutOfMemory(MoiraiError, MemoryError):
    """A request cannot be met; the message names the request, the use and the limit."""


class Closed(MoiraiError, RuntimeError):
    """The object was closed by its owner."""


class Disconnected(MoiraiError, ConnectionError):
    """The other side is gone."""


class WorkerFailed(Disconnected):
    """The process that had a task died, or one of the two sides cannot read what the other sent."""


class Timeout(MoiraiError, TimeoutError):
    """The time allowed has passed; the message says what is left behind."""


class Corrupted(MoiraiError, RuntimeError):
    """Stored bytes or internal structures are not what was written."""


class Unsupported(MoiraiError, NotImplementedError):
    """This machine, interpreter or build cannot do what was asked."""
