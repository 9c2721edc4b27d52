"""`Executor` as a backend of joblib, for `joblib.Parallel` and whatever is built on that."""

from __future__ import annotations

import concurrent.futures
import functools
import multiprocessing
from collections.abc import Callable
from typing import Any

import joblib  # type: ignore[import-untyped]
from joblib.parallel import (  # type: ignore[import-untyped]
    FallbackToBackend,
    ParallelBackendBase,
    SequentialBackend,
)

from moirai._arguments import check_bool, check_instance
from moirai.errors import Timeout
from moirai.executor import Executor, Priority
from moirai.executor.interface import BaseExecutor
from moirai.executor.lanes import lane_of

__all__ = ["MoiraiBackend", "register"]

_Future = concurrent.futures.Future[Any]


class MoiraiBackend(ParallelBackendBase):  # type: ignore[misc]
    """Batches of `joblib.Parallel` as tasks of an executor of threads.

    Used by the thread that calls `Parallel`, as joblib's own backends are. Whoever waits for a list
    runs batches that nobody has begun.

    Args:
        executor: Whose workers run the batches, and that stays as it is; None: one of the backend's
            own, for as long as `Parallel` needs it.
        priority: How urgent the batches are.
        kwargs: As of joblib's other backends; `inner_max_num_threads` is the `blas_threads` of an
            executor of the backend's own.

    Raises:
        InvalidArgument: An argument is outside its range.
    """

    supports_sharedmem = True
    uses_threads = True
    supports_timeout = True
    supports_return_generator = True
    supports_inner_max_num_threads = True
    default_n_jobs = -1

    def __init__(
        self,
        executor: Executor | None = None,
        priority: Priority | None = None,
        **kwargs: Any,
    ) -> None:
        check_instance("executor", executor, BaseExecutor, or_none=True)
        lane_of(priority)
        super().__init__(**kwargs)
        self._given, self._executor = executor, executor
        self._priority = priority
        self._pending: dict[_Future, None] = {}
        # As joblib asks: results are called back for generators only. A list is waited for result
        # by result, which is when the thread that waits can help.
        self.supports_retrieve_callback = False

    def effective_n_jobs(self, n_jobs: int | None) -> int:
        """How many batches run at once: as joblib counts CPUs, or as the executor has workers."""
        if n_jobs == 0:
            raise ValueError("n_jobs == 0 in Parallel has no meaning")
        if n_jobs is None:
            return 1
        if n_jobs < 0:
            most = joblib.cpu_count() if self._given is None else self._given.max_workers
            n_jobs = max(most + 1 + n_jobs, 1)
        return n_jobs if self._given is None else min(n_jobs, self._given.max_workers)

    def configure(
        self,
        n_jobs: int = 1,
        parallel: Any = None,
        prefer: Any = None,
        require: Any = None,
        **_: Any,
    ) -> int:
        """Before the first batch; one job is run by joblib itself."""
        n_jobs = self.effective_n_jobs(n_jobs)
        if n_jobs == 1:
            raise FallbackToBackend(SequentialBackend(nesting_level=self.nesting_level))
        self.parallel = parallel
        self.supports_retrieve_callback = bool(getattr(parallel, "return_generator", False))
        if self._executor is None:
            self._executor = Executor(n_jobs, "joblib", blas_threads=self.inner_max_num_threads)
        return n_jobs

    def submit(self, func: Callable[[], Any], callback: Callable[[Any], None] | None = None) -> Any:
        """Queue a batch."""
        assert self._executor is not None, "configure comes first"
        future: _Future = self._executor.submit(func, priority=self._priority)
        self._pending[future] = None
        future.add_done_callback(functools.partial(self._done, callback))
        return future

    def _done(self, callback: Callable[[Any], None] | None, future: _Future) -> None:
        self._pending.pop(future, None)
        # Nobody waits for what was cancelled.
        if callback is not None and not future.cancelled():
            callback(future)

    def retrieve_result_callback(self, out: _Future) -> Any:
        """What a batch that has ended gave."""
        return out.result()

    def retrieve_result(self, out: _Future, timeout: float | None = None) -> Any:
        """What a batch gives; or multiprocessing's TimeoutError, as of joblib's own backends."""
        try:
            return out.result(timeout)
        except Timeout:
            if out.done():  # its own failure
                return out.result()
            raise multiprocessing.TimeoutError from None

    def abort_everything(self, ensure_ready: bool = True) -> None:
        """Cancel the batches that have not begun."""
        for future in list(self._pending):
            future.cancel()

    def terminate(self) -> None:
        """After the last batch: let the workers go, if they are the backend's own."""
        self.abort_everything()
        if self._executor is not self._given and self._executor is not None:
            self._executor.shutdown(wait=False)
        self._executor = self._given


def register(name: str = "moirai", *, make_default: bool = False) -> None:
    """Let `joblib.Parallel(backend=name)` and `joblib.parallel_config(backend=name)` find it.

    Args:
        name: What the backend is called.
        make_default: Whether `Parallel` uses it unless told.
    """
    check_instance("name", name, str)
    check_bool("make_default", make_default)
    joblib.register_parallel_backend(name, MoiraiBackend, make_default=make_default)
