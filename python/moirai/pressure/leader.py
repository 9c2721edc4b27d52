"""Which of the processes under one limit acts first: the one that holds a lock on a file."""

from __future__ import annotations

import contextlib
import fcntl
import os
import weakref

from moirai.pressure.fence import all_shared_files, shared_file

__all__ = ["Leader", "sweep_leaders"]

_leaders: weakref.WeakSet[Leader] = weakref.WeakSet()


class Leader:
    """Says whether this process leads those that ask for the same name; give it to a `Guard`.

    The first that asks leads until it ends or calls `release`, then the next that asks. Without a
    place for the file everybody leads. One thread at a time may ask. A forked child is another
    process: it does not lead while its parent does.
    """

    def __init__(self, limit_name: str) -> None:
        """Prepare to ask; processes of one user that name the same limit have one leader."""
        self.path = shared_file("leader", limit_name)
        self._file: int | None = None
        _leaders.add(self)

    def __call__(self) -> bool:
        """Whether this process is to act at once."""
        if self._file is None:
            try:
                self._file = self._locked_file()
            except BlockingIOError:
                return False
            except OSError:
                return True
        return True

    def _locked_file(self) -> int:
        """Open and lock the file of that name; raises BlockingIOError if another process did."""
        while True:
            file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(file), os.stat(self.path)):
                    return file
            except FileNotFoundError:  # The one that led until now has taken it away.
                pass
            except BaseException:
                os.close(file)
                raise
            os.close(file)

    def release(self) -> None:
        """Lead no more; the next that asks does."""
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path)
            os.close(file)

    def _after_fork(self) -> None:
        # The lock is the open file's, which the child shares with its parent as long as it has it.
        if self._file is not None:
            os.close(self._file)
            self._file = None


def sweep_leaders() -> int:
    """Take the files away of leaders that were killed, where no other leads; how many."""
    return sum(_sweep(path) for path in all_shared_files("leader"))


def _sweep(path: str) -> bool:
    try:
        file = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Who opened it meanwhile looks, once it has the lock, whether it is still there.
        if os.path.samestat(os.fstat(file), os.stat(path)):
            os.unlink(path)
            return True
    except OSError:
        pass
    finally:
        os.close(file)
    return False


def _after_fork_in_child() -> None:
    for leader in list(_leaders):
        leader._after_fork()


os.register_at_fork(after_in_child=_after_fork_in_child)
