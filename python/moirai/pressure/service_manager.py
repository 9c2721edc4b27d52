"""Listens to the service manager: systemd tells a service of memory pressure through a file.

PSI stands behind it as a rule, which says too little and too much (see the docs): what is said here
asks for one gentle round, and never for more.

Source:
    systemd.io/MEMORY_PRESSURE: MEMORY_PRESSURE_WATCH and MEMORY_PRESSURE_WRITE.
"""

from __future__ import annotations

import base64
import binascii
import logging
import os
import select
import socket
import stat
import threading
import weakref
from collections.abc import Callable, Mapping

__all__ = ["PressureNotices"]

log = logging.getLogger("moirai.pressure")

_listening: weakref.WeakSet[PressureNotices] = weakref.WeakSet()


class PressureNotices:
    """Calls a function, on a thread of its own, each time that the service manager speaks up.

    A forked child listens by itself. `stop` may be called from any thread.
    """

    def __init__(self, path: str, greeting: bytes, tell: Callable[[], object]) -> None:
        """Prepare.

        Args:
            path: A file of PSI, a FIFO or a socket.
            greeting: What to write to it first.
            tell: Called at each notice; it must not wait.
        """
        self._path = path
        self._greeting = greeting
        self._tell = tell
        self._thread: threading.Thread | None = None
        # What is watched, and both ends of the pipe by which `stop` says so. Whoever takes them
        # away, under the lock, closes the pipe's writing end.
        self._files: tuple[int, int, int] | None = None
        self._lock = threading.Lock()

    @classmethod
    def asked_for(
        cls, environment: Mapping[str, str], tell: Callable[[], object]
    ) -> PressureNotices | None:
        """Make what the variables ask for; None if they do not, or make no sense."""
        path = environment.get("MEMORY_PRESSURE_WATCH", "")
        if not path.startswith("/") or path == "/dev/null":
            return None
        try:
            text = environment.get("MEMORY_PRESSURE_WRITE", "")
            return cls(path, base64.b64decode(text, validate=True), tell)
        except binascii.Error as error:
            log.warning("MEMORY_PRESSURE_WRITE is not base64: %s", error)
            return None

    def start(self) -> None:
        """Open the file and listen.

        Raises:
            OSError: It cannot be opened, or written to.
            RuntimeError, MemoryError: No thread can be started.
        """
        descriptor, events = self._open()
        try:
            reader, writer = os.pipe2(os.O_CLOEXEC)
        except OSError:
            os.close(descriptor)
            raise
        thread = threading.Thread(
            target=self._listen,
            args=(descriptor, events, reader),
            name="moirai-notices",
            daemon=True,
        )
        self._files = (descriptor, reader, writer)
        try:
            thread.start()
        except (RuntimeError, MemoryError):
            for file in self._take_files() or ():
                os.close(file)
            raise
        self._thread = thread
        _listening.add(self)

    def _open(self) -> tuple[int, int]:
        """Give a descriptor and the events that are notices."""
        mode = os.stat(self._path).st_mode
        if stat.S_ISSOCK(mode):
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link:
                link.connect(self._path)
                link.sendall(self._greeting)
                link.setblocking(False)
                return link.detach(), select.POLLIN
        # A FIFO that is opened for both has no end when its writer leaves.
        both = bool(self._greeting) or stat.S_ISFIFO(mode)
        flags = (os.O_RDWR if both else os.O_RDONLY) | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
        descriptor = os.open(self._path, flags)
        try:
            if self._greeting and not stat.S_ISFIFO(mode):
                os.write(descriptor, self._greeting)
        except OSError:
            os.close(descriptor)
            raise
        return descriptor, select.POLLPRI if stat.S_ISREG(mode) else select.POLLIN

    def _listen(self, descriptor: int, events: int, stopping: int) -> None:
        poll = select.poll()
        poll.register(descriptor, events)
        poll.register(stopping, select.POLLIN)
        try:
            while True:
                found = dict(poll.poll())
                if stopping in found:
                    return
                said = found.get(descriptor, 0)
                if said & select.POLLIN and not os.read(descriptor, 4096):
                    return
                if said & events:
                    self._tell()
                if said & (select.POLLERR | select.POLLHUP | select.POLLNVAL):
                    return
        except OSError as error:
            log.warning("%s: no more notices: %s", self._path, error)
        finally:
            files = self._take_files()
            if files is not None:
                os.close(files[2])
            os.close(descriptor)
            os.close(stopping)

    def _take_files(self) -> tuple[int, int, int] | None:
        with self._lock:
            files, self._files = self._files, None
            return files

    def stop(self) -> None:
        """Listen no more; does nothing if it does not."""
        _listening.discard(self)
        files = self._take_files()
        thread, self._thread = self._thread, None
        if files is not None:
            os.close(files[2])  # The other end is at its end then, and readable.
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _after_fork(self) -> None:
        self._lock = threading.Lock()
        for file in self._files or ():
            os.close(file)
        self._files = self._thread = None
        self.start()


def _after_fork_in_child() -> None:
    for notices in list(_listening):
        try:
            notices._after_fork()
        except (OSError, RuntimeError, MemoryError) as error:
            log.warning("no notices in this child: %s", error)


os.register_at_fork(after_in_child=_after_fork_in_child)
