"""CPython's own tests of ThreadPoolExecutor, with Moirai's executor in its place.

They come with CPython's test package, which some distributions leave out.
"""

import concurrent.futures
import unittest

import pytest

from moirai.executor import Executor

suite = pytest.importorskip("test.test_concurrent_futures")
PARTS = ["executor", "test_as_completed", "test_init", "test_shutdown", "test_thread_pool"]
PARTS = [f"test.test_concurrent_futures.{name}" for name in [*PARTS, "test_wait"]]
modules = [suite] if hasattr(suite, "ExecutorMixin") else list(map(pytest.importorskip, PARTS))

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


def with_ours(kind: type[unittest.TestCase]) -> type[unittest.TestCase]:
    def set_up(self: unittest.TestCase) -> None:
        patch = pytest.MonkeyPatch()
        patch.setattr(concurrent.futures, "ThreadPoolExecutor", ThreadPoolExecutor)
        self.addCleanup(patch.undo)
        kind.setUp(self)

    names = {name: None for name in NOT_OURS if hasattr(kind, name)}
    return type(
        kind.__name__, (kind,), {**names, "setUp": set_up, "executor_type": ThreadPoolExecutor}
    )


OF_THREADS = {
    name: kind
    for module in modules
    for name, kind in vars(module).items()
    if isinstance(kind, type)
    and issubclass(kind, unittest.TestCase)
    and getattr(kind, "executor_type", None) is concurrent.futures.ThreadPoolExecutor
}
globals().update({name: with_ours(kind) for name, kind in OF_THREADS.items()})


def test_they_are_found() -> None:
    assert len(OF_THREADS) >= 6
