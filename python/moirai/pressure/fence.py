"""A fence before the limit: an allocation that would cross it raises MemoryError."""

from __future__ import annotations

import hashlib
import os
import tempfile

from moirai import _native
from moirai._arguments import check_instance, path_text, wrong_type
from moirai.errors import InvalidArgument
from moirai.pressure.source import optional_bytes

__all__ = ["Fence"]


class Fence:
    """Where a sampler's fence stands.

    The sampler keeps the soft `RLIMIT_DATA` of its process at what is mapped plus what is left, so
    that libc and the kernel refuse what would cross the limit: Python raises MemoryError, in the
    program, where it can be caught, instead of the kernel killing the process.
    """

    def __init__(
        self,
        *,
        margin_bytes: int | str = "16 MiB",
        ledger: str | os.PathLike[str] | None = None,
    ) -> None:
        """Describe a fence.

        Args:
            margin_bytes: What to leave between the fence and the limit, for the kernel's own needs
                and for what grows between two samples; as an int or such as "16 MiB".
            ledger: A file by which processes under the same limit find each other, made if it is
                not there; each gets an equal share of what is left. None: this process is alone.

        Raises:
            InvalidArgument: An argument is outside its range.
        """
        margin = optional_bytes(margin_bytes, "margin_bytes")
        if margin is None:
            raise wrong_type("margin_bytes", "an int or a str", None)
        if margin >= 1 << 63:
            raise InvalidArgument(f"margin_bytes: must be below 2**63, got {margin}")
        self.margin_bytes = margin
        self.ledger = None if ledger is None else path_text("ledger", ledger)

    @staticmethod
    def default_ledger(limit_name: str) -> str:
        """Name the file by which this user's processes under the limit of that name meet."""
        check_instance("limit_name", limit_name, str)
        return shared_file("fence", limit_name)

    def __repr__(self) -> str:
        return f"Fence(margin_bytes={self.margin_bytes}, ledger={self.ledger!r})"


def shared_file(what: str, limit_name: str) -> str:
    """Name a file in memory that this user's processes under a limit have in common."""
    digest = hashlib.sha256(limit_name.encode()).hexdigest()[:16]
    folder, prefix = _shared_files(what)
    return os.path.join(folder, prefix + digest)


def all_shared_files(what: str) -> list[str]:
    """Give those that there are, of this user's programs under any limit."""
    folder, prefix = _shared_files(what)
    try:
        names = os.listdir(folder)
    except OSError:
        return []
    return [os.path.join(folder, name) for name in names if name.startswith(prefix)]


def _shared_files(what: str) -> tuple[str, str]:
    folder = "/dev/shm" if os.path.isdir("/dev/shm") else tempfile.gettempdir()
    return folder, f"moirai-{what}-{os.getuid()}-"


def sweep_ledgers() -> int:
    """Take the ledgers away that killed programs left, where no live one is in them; how many."""
    return sum(_native.sweep_fence_ledger(path) for path in all_shared_files("fence"))
