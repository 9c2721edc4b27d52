"""CPython's own tests of ProcessPoolExecutor, with Moirai's executor in its place.

They come with CPython's test package, which some distributions leave out.
"""

import concurrent.futures
import multiprocessing
import sys
import unittest
from types import SimpleNamespace

import pytest

from moirai.executor import ProcessExecutor

suite = pytest.importorskip("test.test_concurrent_futures")
PARTS = ["test_as_completed", "test_deadlock", "test_init", "test_process_pool", "test_shutdown"]
PARTS = [f"test.test_concurrent_futures.{name}" for name in [*PARTS, "test_wait"]]
modules = [suite] if hasattr(suite, "ExecutorMixin") else list(map(pytest.importorskip, PARTS))

# What asks for another default, or for parts of that executor's inside; what runs
# `from concurrent.futures import ...` in another process; and what one dead worker does there.
NOT_OURS = {
    "test_gh105829_should_not_deadlock_if_wakeup_pipe_full",
    "test_hang_gh83386",
    "test_interpreter_shutdown",
    "test_killed_child",
    "test_python_finalization_error",
    "test_submit_after_interpreter_shutdown",
    # They count the processes that are started for calls that cannot be pickled.
    "test_processes_terminate",
    "test_saturation",
    # It asks that some calls have begun when the shutdown at once after them cancels the rest.
    "test_cancel_futures",
}
# Forked workers may be replaced here.
NOT_OURS_IF_FORKED = {"test_max_tasks_per_child"}


class ProcessPoolExecutor(ProcessExecutor):
    """With the names by which the tests look inside."""

    # It has no thread of its own.
    _call_queue = SimpleNamespace(join_thread=lambda: None)

    @property
    def _max_workers(self):
        return self.max_workers

    @property
    def _mp_context(self):
        return self._pool.settings.context

    @property
    def _processes(self):
        return {it.process.pid: it.process for it in list(self._pool.workers.values())}

    @property
    def _executor_manager_thread(self):
        return self._pool.manager

    @property
    def _broken(self):
        return self._pool.broken


def with_ours(kind: type[unittest.TestCase]) -> type[unittest.TestCase]:
    def set_up(self: unittest.TestCase) -> None:
        patch = pytest.MonkeyPatch()
        patch.setattr(concurrent.futures, "ProcessPoolExecutor", ProcessPoolExecutor)
        self.addCleanup(patch.undo)
        kind.setUp(self)

    left_out = NOT_OURS | (NOT_OURS_IF_FORKED if kind.ctx == "fork" else set())
    names = {name: None for name in left_out if hasattr(kind, name)}
    return type(
        kind.__name__, (kind,), {**names, "setUp": set_up, "executor_type": ProcessPoolExecutor}
    )


OF_PROCESSES = {
    name: kind
    for module in modules
    for name, kind in vars(module).items()
    if isinstance(kind, type)
    and issubclass(kind, unittest.TestCase)
    and getattr(kind, "executor_type", None) is concurrent.futures.ProcessPoolExecutor
}
globals().update({name: with_ours(kind) for name, kind in OF_PROCESSES.items()})

# From 3.12 on forking is warned of where there are threads, as there are in every executor.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
]


def teardown_module() -> None:
    """End what multiprocessing keeps for itself."""
    if sys.version_info >= (3, 12):
        multiprocessing.util._cleanup_tests()


def test_they_are_found() -> None:
    assert len(OF_PROCESSES) >= 15
