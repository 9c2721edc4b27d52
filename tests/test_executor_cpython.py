"""CPython's own tests of ThreadPoolExecutor, with Moirai's executor in its place."""

from cpython_suite import suite_with

from moirai.executor import Executor

PARTS = [
    "executor",
    "test_as_completed",
    "test_init",
    "test_shutdown",
    "test_thread_pool",
    "test_wait",
]

# What runs `from concurrent.futures import ...` in another process, or asks for another default.
NOT_OURS = {
    "test_cancel_futures_wait_false",
    "test_default_workers",
    "test_hang_gh83386",
    "test_hang_gh94440",
    "test_interpreter_shutdown",
    "test_shutdown_no_wait_interpreter",
    "test_submit_after_interpreter_shutdown",
}


class ThreadPoolExecutor(Executor):
    """The name that a test looks for in the names of threads."""


OF_THREADS = suite_with(ThreadPoolExecutor, PARTS, lambda kind: NOT_OURS)
globals().update(OF_THREADS)


def test_they_are_found() -> None:
    assert len(OF_THREADS) >= 6
