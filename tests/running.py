"""Running a part of a test in threads or in a forked child, waiting for it, and its accounts."""

import os
import select
import signal
import threading
import time
from collections.abc import Callable
from typing import Any


def in_forked_child(body: Callable[[], None]) -> None:
    """Run `body` in a forked child; fails with what it raised, or if it hangs."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        verdict = b"the child failed"
        try:
            body()
            verdict = b"ok"
        except BaseException as error:
            verdict = repr(error).encode()
        finally:
            os.write(writer, verdict)
            os._exit(0)
    os.close(writer)
    answered, _, _ = select.select([reader], [], [], 60)
    if not answered:
        os.kill(child, signal.SIGKILL)
    verdict = os.read(reader, 1000) if answered else b"the child hangs"
    os.close(reader)
    _, status = os.waitpid(child, 0)
    assert (verdict, status) == (b"ok", 0), (verdict, status)


def wait_until(
    holds: Callable[[], bool], *, what: str = "what is waited for", within_seconds: float = 60
) -> None:
    """Poll a statistic until it says what a test waits for; the deadline is for a defect only."""
    deadline = time.monotonic() + within_seconds
    pause = threading.Event()
    while not holds():
        assert time.monotonic() < deadline, f"{what}: not within {within_seconds} s"
        pause.wait(0.001)


def wait_until_gone(thread: threading.Thread) -> None:
    """Wait for the end of the system's thread, which comes after `join`."""
    deadline = time.monotonic() + 60
    while os.path.exists(f"/proc/self/task/{thread.native_id}"):
        assert time.monotonic() < deadline, "the thread does not end"
        os.sched_yield()


def run_threads(*bodies: Callable[[], None]) -> None:
    """Run each of `bodies` in a thread of its own, to its end; fails with what they raised."""
    failures: list[BaseException] = []

    def guarded(body: Callable[[], None]) -> None:
        try:
            body()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(body,)) for body in bodies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
        wait_until_gone(thread)
    assert failures == []


def assert_counts_add_up(executor: Any) -> Any:
    """Check that each task of an executor at rest ended in one way; gives its statistics."""
    counts = executor.statistics()
    assert counts.submitted == counts.succeeded + counts.failed + counts.cancelled
    return counts
