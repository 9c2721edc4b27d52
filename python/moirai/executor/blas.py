"""How many threads BLAS and OpenMP use in calls that run side by side: at most the CPUs together.

A library without limits starts a thread for each CPU in every call, so as many calls as there are
CPUs start the square of that. What is loaded is found, read and set by threadpoolctl, if that is
installed.

Most builds of BLAS have one number for the whole process, OpenMP one for each thread. A number
here is set where it is greater than it may be, read in the thread that it is for, and put back
where it is still what was set; so it makes no difference which of the two a library has.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any, Literal

from moirai.errors import InvalidArgument, Unsupported

__all__ = ["BlasThreads", "checked", "held", "limit_process", "share_of_cpus", "wrapper"]

BlasThreads = int | Literal["auto"] | None
_Function = Callable[..., Any]

# Read when a library is loaded; the first is the others' where they are not set.
_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS")


def checked(blas_threads: BlasThreads, *, needs_package: bool) -> BlasThreads:
    """Refuse what is no such argument.

    Args:
        blas_threads: The argument.
        needs_package: Whether "auto" is refused too where threadpoolctl is not installed.

    Raises:
        InvalidArgument: It is neither "auto", None nor an int of at least 1.
        Unsupported: It needs threadpoolctl, which is not installed.
    """
    if blas_threads is None:
        return None
    if isinstance(blas_threads, int) and not isinstance(blas_threads, bool) and blas_threads >= 1:
        needs_package = True
    elif blas_threads != "auto":
        raise InvalidArgument(
            f'blas_threads: must be "auto", None or an int of at least 1, got {blas_threads!r}'
        )
    # Here and not only in workers: those that are forked then have it.
    if _package() is None and needs_package:
        raise Unsupported(
            f"blas_threads: {blas_threads!r} needs the package threadpoolctl, "
            "which is not installed"
        )
    return blas_threads


def share_of_cpus(blas_threads: BlasThreads, cpu_count: int, worker_count: int) -> int | None:
    """How many threads a call may use at most; None: as many as it likes."""
    return max(1, cpu_count // worker_count) if blas_threads == "auto" else blas_threads


def _package() -> Any:
    try:
        import threadpoolctl
    except ImportError:
        return None
    return threadpoolctl


def _libraries() -> list[Any]:
    package = _package()
    if package is None:
        return []
    libraries: list[Any] = package.ThreadpoolController().lib_controllers
    return libraries


def _set(library: Any, number: int) -> None:
    # From 3.8 on, threadpoolctl ignores without a word what any other thread sets than the first
    # that did, while that one lives. Here any worker may be the first, and any the last.
    forget = getattr(library, "clear_controlling_thread", None)
    if forget is not None:
        forget(force=True)
    library.set_num_threads(number)
    if forget is not None:
        forget()


# === processes of our own =======================================================================


def limit_process(most: int, environment: MutableMapping[str, str] = os.environ) -> None:
    """Limit this process until it ends: what is loaded, in this thread, and what will be."""
    said = environment.get(_VARIABLES[0], str(most))
    for name in _VARIABLES:
        try:
            environment[name] = str(min(most, int(environment.get(name, said))))
        except ValueError:  # OMP_NUM_THREADS may be a list: whoever wrote it knows more
            continue
    for library in _libraries():
        if (library.num_threads or 1) > most:
            _set(library, most)


# === this process, while workers run ============================================================


class _Limits:
    """What is in force in this process. Any thread may use it; a forked child has none."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._held: Counter[int] = Counter()
        # By path: the library, its number before, and what was set here last.
        self._changed: dict[str, tuple[Any, int, int]] = {}

    def hold(self, most: int) -> None:
        with self._lock:
            self._held[most] += 1
            self.apply()

    def release(self, most: int) -> None:
        with self._lock:
            self._held[most] -= 1
            self._held += Counter()  # drops what nobody holds
            self._loosen()

    def apply(self) -> None:
        """Limit what is loaded by now, in this thread."""
        with self._lock:
            if not self._held:
                return
            most = min(self._held)
            for library in _libraries():
                now = library.num_threads
                if now is not None and now > most:
                    _, before, _ = self._changed.get(library.filepath, (library, now, most))
                    _set(library, most)
                    self._changed[library.filepath] = library, before, most

    def _loosen(self) -> None:
        most = min(self._held, default=sys.maxsize)
        for path, (library, before, ours) in list(self._changed.items()):
            allowed = min(before, most)
            # Other numbers are those of somebody else, who has the last word.
            if allowed != ours and library.num_threads == ours:
                _set(library, allowed)
            if self._held:
                self._changed[path] = library, before, allowed
            else:
                del self._changed[path]

    def before_fork(self) -> None:
        self._lock.acquire()

    def after_fork(self) -> None:
        self._lock.release()

    def after_fork_in_child(self) -> None:
        self._held.clear()
        self._loosen()
        self._lock.release()


_limits = _Limits()
_here = threading.local()
os.register_at_fork(
    before=_limits.before_fork,
    after_in_parent=_limits.after_fork,
    after_in_child=_limits.after_fork_in_child,
)


@contextlib.contextmanager
def held(most: int) -> Iterator[None]:
    """Limit this process to the least that any worker of it asks for, while this one runs."""
    _here.module_count = len(sys.modules)
    _limits.hold(most)
    try:
        yield
    finally:
        del _here.module_count
        _limits.release(most)


def wrapper(wrap: Callable[[_Function], _Function] | None) -> Callable[[_Function], _Function]:
    """What wraps as `wrap` does, and limits before a call what its thread loaded since the last."""
    if wrap is None:
        return functools.partial(functools.partial, _run)
    return lambda function: functools.partial(_run, wrap(function))


def _run(function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    # Libraries come with modules. A thread that runs what it waits for is no worker.
    if getattr(_here, "module_count", None) not in (None, len(sys.modules)):
        _here.module_count = len(sys.modules)
        _limits.apply()
    return function(*args, **kwargs)
