"""CPython's own tests of ProcessPoolExecutor, with Moirai's executor in its place."""

import multiprocessing
import sys
from types import SimpleNamespace

import pytest
from cpython_suite import suite_with

from moirai.executor import ProcessExecutor

PARTS = [
    "test_as_completed",
    "test_deadlock",
    "test_init",
    "test_process_pool",
    "test_shutdown",
    "test_wait",
]

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


def left_out(kind):
    return NOT_OURS | (NOT_OURS_IF_FORKED if kind.ctx == "fork" else set())


OF_PROCESSES = suite_with(ProcessPoolExecutor, PARTS, left_out)
globals().update(OF_PROCESSES)

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
