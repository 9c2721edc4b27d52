"""What a worker process does: takes calls from its channel, and sends what came of them."""

from __future__ import annotations

import contextlib
import copyreg
import io
import os
import pickle
import signal
import time
import traceback
from collections.abc import Callable, Iterable
from concurrent.futures import CancelledError
from concurrent.futures.process import _ExceptionWithTraceback
from dataclasses import dataclass
from types import FrameType
from typing import Any

from moirai import _native
from moirai.channels import SharedChannel, SharedReceiver, SharedSender
from moirai.errors import Disconnected, OutOfMemory, Unsupported
from moirai.executor import blas
from moirai.executor import process_messages as messages
from moirai.executor.process_messages import Content, Head, Placer
from moirai.executor.process_numbers import SharedNumbers
from moirai.executor.reporting import initializer_failed
from moirai.executor.time_limits import TimeLimits
from moirai.executor.token import CancelToken, call_token

__all__ = [
    "ASKS",
    "BEGAN",
    "CALL",
    "CANCELLED",
    "DIED",
    "FAILED",
    "LATE",
    "NOT_BEGUN",
    "READY",
    "RETURNED",
    "UNFIT",
    "UNREADABLE",
    "WAKE",
    "Start",
    "run_chunk",
    "work",
]

# What a message is: to a worker; from a worker; from within the process that has the executor.
CALL = 0
READY, BEGAN, ASKS, RETURNED, FAILED, UNREADABLE, CANCELLED, LATE, NOT_BEGUN, UNFIT = range(1, 11)
WAKE, DIED = 11, 12

_NOTHING = Content(b"", [], [])

_SHORTEST_TIMER, _LONGEST_TIMER = 1e-6, 1e9


@dataclass(frozen=True)
class Start:
    """What a worker process is given.

    Attributes:
        worker: Its number.
        calls: Where it takes calls from.
        results: Where it sends to.
        memory_bytes: How much shared memory its results may take.
        call_count: Calls after which it ends; None: it does not.
        cpus: The CPUs that it stays on; empty: where the kernel puts it.
        node: The node that they are at.
        blas_threads: How many threads calls of BLAS and OpenMP may use; None: as many as they like.
        asked: Numbers that the executor sets: calls that are asked to end.
        seat: Which of them is for this worker.
        kill_after_seconds: How long a call may run after its time is over, until the process is
            killed; None: as long as it likes.
        initializer: Called before the first of them.
        initargs: Its arguments.
    """

    worker: int
    calls: SharedChannel
    results: SharedChannel
    memory_bytes: int
    call_count: int | None
    cpus: tuple[int, ...]
    node: int
    blas_threads: int | None
    asked: SharedNumbers
    seat: int
    kill_after_seconds: float | None
    initializer: Callable[..., object] | None
    initargs: tuple[Any, ...]


def run_chunk(
    fn: Callable[..., Any], items: Iterable[Any], star: bool, is_sent: bool = True
) -> tuple[list[Any], BaseException | None]:
    """Call a function for each item: the results up to the first failure, and that or None.

    The failure is such that it keeps its traceback if it `is_sent` to another process.
    """
    results: list[Any] = []
    try:
        for item in items:
            results.append(fn(*item) if star else fn(item))
    except BaseException as error:
        return results, with_traceback(error) if is_sent else error
    return results, None


def with_traceback(error: BaseException) -> Any:
    """What is unpickled as the exception, with its traceback as the text of its cause."""
    told = _ExceptionWithTraceback(error, error.__traceback__)  # type: ignore[arg-type]
    try:
        return _Pickled(told)
    except Exception:  # a class that only cloudpickle can send, for instance
        return told


class _Pickled:
    """A failure, pickled as exceptions pickle themselves.

    Packages such as tblib, which comes with Dask, register functions for all classes of exceptions,
    some of which they cannot make again.
    """

    def __init__(self, told: _ExceptionWithTraceback) -> None:
        file = io.BytesIO()
        pickler = pickle.Pickler(file, 5)
        pickler.dispatch_table = {
            kind: reduce
            for kind, reduce in copyreg.dispatch_table.items()
            if not issubclass(kind, BaseException)
        }
        pickler.dump(told)
        self._data = file.getvalue()

    def __reduce__(self) -> tuple[Any, ...]:
        return pickle.loads, (self._data,)


class _Interrupts:
    """Ctrl-C reaches every process of a terminal: it ends the call that runs, nothing else."""

    def __init__(self) -> None:
        self.is_calling = False
        with contextlib.suppress(ValueError):  # not in the main thread
            signal.signal(signal.SIGINT, self._interrupt)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if self.is_calling:
            raise KeyboardInterrupt


class _Results:
    """What a worker sends."""

    def __init__(self, start: Start, sender: SharedSender) -> None:
        self._worker = start.worker
        self._sender = sender
        self._placer = Placer(start.memory_bytes)
        self._inline_bytes = start.results.inline_bytes

    def send(self, kind: int, call: int, content: Content) -> None:
        head = Head(kind, self._worker, call)
        messages.send(self._sender, head, content, self._placer, self._inline_bytes, None)

    def say(self, kind: int, call: int = 0) -> None:
        messages.send_head(self._sender, Head(kind, self._worker, call))


class _Running:
    """The call that runs: its time limits, and its token."""

    def __init__(self, start: Start, results: _Results) -> None:
        self._results = results
        self._asked, self._seat = start.asked, start.seat
        self._kill_after_seconds = start.kill_after_seconds
        self._call = 0
        self._due: float | None = None
        self._has_token = False

    def begin(self, call: int, limits: TimeLimits | None) -> bool:
        """Begin a call; false if its deadline has passed."""
        self._call, self._due, self._has_token = call, None, False
        if limits is None:
            return True
        if limits.has_passed:
            return False
        begun = time.monotonic()
        self._due = limits.due(begun)
        self._results.send(BEGAN, call, messages.dump(begun))
        if self._kill_after_seconds is not None:
            _kill_at(self._due + self._kill_after_seconds)
        return True

    def end(self) -> None:
        """The call has returned, or raised, and what it gave is pickled."""
        if self._due is not None and self._kill_after_seconds is not None:
            signal.setitimer(signal.ITIMER_REAL, 0)

    @property
    def is_late(self) -> bool:
        """Whether its time is over."""
        return self._due is not None and self._due <= time.monotonic()

    @property
    def is_asked(self) -> bool:
        """Whether somebody cancelled it; known once there is a token."""
        return self._has_token and self._asked[self._seat] == self._call

    def token(self) -> CancelToken:
        """For the function that runs. Whoever cancels the call is heard from the first one on."""
        if not self._call:
            return CancelToken()  # of the initializer
        if not self._has_token:
            self._results.say(ASKS, self._call)
            self._has_token = True
        asked, seat, call = self._asked, self._seat, self._call
        return CancelToken(lambda: asked[seat] == call, self._due)


def _kill_at(moment: float) -> None:
    """Have the kernel kill this process, unless that is called off, whatever it does then."""
    # A timer of the process's own, as nobody else knows in time that the call has ended.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
    left = moment - time.monotonic()
    signal.setitimer(signal.ITIMER_REAL, min(max(left, _SHORTEST_TIMER), _LONGEST_TIMER))


def work(start: Start) -> None:
    """Run calls until the executor closes the channel, or is gone."""
    interrupts = _Interrupts()
    with start.results.sender() as sender, start.calls.receiver() as receiver:
        results = _Results(start, sender)
        running = _Running(start, results)
        call_token.set(running.token)
        # The executor is gone: nobody waits for what is left.
        with contextlib.suppress(Disconnected):
            if not _initialize(start, interrupts):
                results.say(UNFIT)
                return
            results.say(READY)
            left = start.call_count
            while left is None or left > 0:
                _run(receiver, results, running, interrupts)
                if left is not None:
                    left -= 1


def _initialize(start: Start, interrupts: _Interrupts) -> bool:
    try:
        if start.cpus:
            _stay(start.cpus, start.node)
        if start.blas_threads is not None:
            blas.limit_process(start.blas_threads)
        interrupts.is_calling = True
        if start.initializer is not None:
            start.initializer(*start.initargs)
    except BaseException as error:
        initializer_failed(error)
        return False
    finally:
        interrupts.is_calling = False
    return True


def _stay(cpus: tuple[int, ...], node: int) -> None:
    os.sched_setaffinity(0, cpus)
    # Where policies are not allowed, as in some containers, memory comes from there nevertheless,
    # unless whoever started the program said otherwise.
    with contextlib.suppress(Unsupported):
        _native.prefer_node(node)


def _run(
    receiver: SharedReceiver, results: _Results, running: _Running, interrupts: _Interrupts
) -> None:
    """One call. What it had is let go before its result is sent: the next may need the room."""
    kind, call, content = _outcome(receiver, running, interrupts)
    try:
        results.send(kind, call, content)
    except OutOfMemory as error:
        results.send(FAILED, call, _dump_failure(error))


def _outcome(
    receiver: SharedReceiver, running: _Running, interrupts: _Interrupts
) -> tuple[int, int, Content]:
    head, packed = messages.receive(receiver, None)
    try:
        fn, args, kwargs, *limits = messages.load(packed)
    except BaseException as error:
        return UNREADABLE, head.call, _dump_failure(error)
    try:
        if not running.begin(head.call, limits[0] if limits else None):
            return NOT_BEGUN, head.call, _NOTHING
        try:
            interrupts.is_calling = True
            value = fn(*args, **kwargs)
        finally:
            interrupts.is_calling = False
        outcome = RETURNED, head.call, messages.dump(value)
    except BaseException as error:
        if isinstance(error, CancelledError) and running.is_asked:
            return CANCELLED, head.call, _NOTHING
        outcome = FAILED, head.call, _dump_failure(error)
    finally:
        running.end()
    return (LATE, head.call, _NOTHING) if running.is_late else outcome


def _dump_failure(error: BaseException) -> Content:
    try:
        return messages.dump(with_traceback(error))
    except Exception as unpicklable:
        text = f"{_words_of(error)}: cannot be pickled: {_words_of(unpicklable)}"
        return messages.dump(RuntimeError(text))


def _words_of(error: BaseException) -> str:
    # Not by `str`, which may fail as well.
    return "".join(traceback.format_exception_only(error)).strip()
