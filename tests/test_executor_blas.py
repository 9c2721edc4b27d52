"""BLAS within calls that run side by side: how many threads it may use, and when it has its own."""

import ctypes.util
import os
import sys
import threading
import time

import numpy as np
import pytest
from running import in_forked_child

from moirai import errors
from moirai.executor import Executor, ProcessExecutor, blas, processes, threads
from moirai.memory import NumaNode, Topology

threadpoolctl = pytest.importorskip("threadpoolctl", reason="threadpoolctl is not installed")

# From 3.12 on forking is warned of where there are threads, as there are in every executor.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")

WAIT_SECONDS = 60
# What NumPy's BLAS uses when nobody limits it, on any machine: see `unlimited`.
OWN = 4
CPUS = tuple(range(6))
SIX_CPUS = Topology((NumaNode(0, CPUS, 1 << 30, {}),), CPUS, (), CPUS, (0,))


def numbers():
    """Threads of each BLAS that is loaded."""
    libraries = threadpoolctl.threadpool_info()
    return {it["num_threads"] for it in libraries if it["user_api"] == "blas"}


@pytest.fixture(autouse=True)
def unlimited():
    with threadpoolctl.threadpool_limits(OWN):
        if numbers() != {OWN}:
            pytest.skip("NumPy's BLAS is none that threadpoolctl knows")
        yield


def wait_until(condition):
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        os.sched_yield()


# === threads ====================================================================================


def test_calls_in_workers_use_no_more_threads_than_they_may_until_the_executor_ends():
    with Executor(2, initializer=int, blas_threads=1) as executor:
        assert executor.submit(numbers).result() == {1}
        assert [it.result() for it in executor.submit_many(lambda _: numbers(), "ab")] == [{1}] * 2
        assert executor.submit(np.dot, np.eye(200), np.eye(200)).result().sum() == 200
    assert numbers() == {OWN}


def test_nothing_is_limited_unless_asked_for_and_before_workers_begin():
    with Executor(1, initializer=int) as executor:
        assert executor.submit(numbers).result() == {OWN}
    with Executor(1, blas_threads=1):
        assert numbers() == {OWN}


def test_a_limit_does_not_raise_the_number():
    with Executor(1, initializer=int, blas_threads=OWN + 5) as executor:
        assert executor.submit(numbers).result() == {OWN}


def test_auto_divides_the_cpus_by_the_workers(monkeypatch):
    monkeypatch.setattr(threads, "cpu_quota", lambda: None)
    options = {"initializer": int, "topology": SIX_CPUS, "affinity": None, "blas_threads": "auto"}
    for workers, expected in ((2, 3), (4, 1), (9, 1), (1, OWN)):
        with Executor(workers, **options) as executor:
            assert executor.submit(numbers).result() == {expected}
    monkeypatch.setattr(threads, "cpu_quota", lambda: 4.0)
    with Executor(2, **options) as executor:
        assert executor.submit(numbers).result() == {2}


def test_of_two_executors_the_lower_limit_counts_while_both_run():
    with Executor(1, initializer=int, blas_threads=3) as outer:
        assert outer.submit(numbers).result() == {3}
        with Executor(2, initializer=int, blas_threads=2) as inner:
            assert inner.submit(numbers).result() == {2}
            assert outer.submit(numbers).result() == {2}
            with Executor(1, initializer=int, blas_threads=3) as third:
                assert third.submit(numbers).result() == {2}
        assert outer.submit(numbers).result() == {3}
    assert numbers() == {OWN}


def test_number_that_somebody_sets_meanwhile_stays():
    with Executor(1, initializer=int, blas_threads=3) as executor:
        assert executor.submit(numbers).result() == {3}
        with threadpoolctl.threadpool_limits(1):  # as a library does around its own calls
            assert executor.submit(numbers).result() == {1}
        assert numbers() == {3}
        limits = threadpoolctl.threadpool_limits(2)
    assert numbers() == {2}
    limits.restore_original_limits()
    assert numbers() == {3}


def test_executor_that_is_dropped_lets_go_of_its_limit():
    executor = Executor(1, initializer=int, blas_threads=1)
    assert executor.submit(numbers).result() == {1}
    del executor
    wait_until(lambda: numbers() == {OWN})


def test_forked_child_has_no_limit_until_its_own_workers_begin():
    with Executor(1, initializer=int, blas_threads=1) as executor:
        assert executor.submit(numbers).result() == {1}

        def use():
            assert numbers() == {OWN}
            assert executor.submit(numbers).result() == {1}
            assert executor.submit(np.dot, np.eye(200), np.eye(200)).result().sum() == 200
            executor.shutdown()
            assert numbers() == {OWN}

        in_forked_child(use)
        assert numbers() == {1}


def test_task_arena_and_limit_go_together():
    with Executor(1, initializer=int, blas_threads=1, task_arena=True) as executor:
        assert executor.submit(numbers).result() == {1}
        assert list(executor.map(np.sum, np.ones((8, 10)))) == [10.0] * 8


def test_library_that_a_task_loads_is_limited_from_the_next_task_on(run_python):
    run_python("""
        from moirai.executor import Executor

        def numbers():
            import threadpoolctl
            libraries = threadpoolctl.threadpool_info()
            return {it["num_threads"] for it in libraries if it["user_api"] == "blas"}

        def load():
            import numpy, threadpoolctl
            threadpoolctl.threadpool_limits(4)  # what it finds, on any machine
            return numbers()

        with Executor(1, initializer=int, backend="threads", blas_threads=1) as executor:
            assert executor.submit(numbers).result() == set()
            assert executor.submit(load).result() == {4}
            assert executor.submit(numbers).result() == {1}
        assert numbers() == {4}
    """)


def test_openmp_is_limited_in_the_workers_alone(run_python):
    library = ctypes.util.find_library("gomp")
    if library is None:
        pytest.skip("libgomp is not installed")
    program = """
        import ctypes, os
        os.environ["OMP_NUM_THREADS"] = "4"
        ctypes.CDLL("LIBRARY")
        import threadpoolctl
        from moirai.executor import Executor

        def numbers():
            libraries = threadpoolctl.threadpool_info()
            return {it["num_threads"] for it in libraries if it["user_api"] == "openmp"}

        with Executor(2, initializer=int, backend="threads", blas_threads=1) as executor:
            futures = executor.submit_many(lambda _: numbers(), range(50))
            assert all(future.result() == {1} for future in futures)
            assert numbers() == {4}
        assert numbers() == {4}
    """
    run_python(program.replace("LIBRARY", library))


def test_joblib_says_how_many():
    joblib = pytest.importorskip("joblib", reason="joblib is not installed")
    from moirai.integrations import joblib_backend

    barrier = threading.Barrier(2)

    def meet():
        barrier.wait(WAIT_SECONDS)  # so that one of them is a worker
        found = numbers()
        barrier.wait(WAIT_SECONDS)
        return found

    joblib_backend.register()
    with joblib.parallel_config(backend="moirai", n_jobs=2, inner_max_num_threads=1):
        found = joblib.Parallel(batch_size=1)(joblib.delayed(meet)() for _ in range(2))
    assert found == [{1}] * 2
    wait_until(lambda: numbers() == {OWN})


def test_interpreter_ends_while_a_limit_is_in_force(run_python):
    assert run_python("""
        import numpy
        from moirai.executor import Executor
        executor = Executor(2, backend="threads", blas_threads=1)
        executor.submit(print, "ran")
    """).split() == ["ran"]


# === processes ==================================================================================


@pytest.mark.parametrize("context", ["fork", "spawn", "forkserver"])
def test_calls_in_other_processes_use_no_more_threads_than_they_may(context):
    with ProcessExecutor(1, context, blas_threads=1) as executor:
        assert executor.submit(numbers).result(WAIT_SECONDS) == {1}
        assert executor.submit(np.dot, np.eye(200), np.eye(200)).result(WAIT_SECONDS).sum() == 200
        # For what they load later.
        assert executor.submit(os.getenv, "MKL_NUM_THREADS").result(WAIT_SECONDS) == "1"
    assert numbers() == {OWN}


def test_processes_share_the_cpus_unless_told_otherwise(monkeypatch):
    monkeypatch.setattr(Topology, "read", lambda: SIX_CPUS)
    monkeypatch.setattr(processes, "cpu_quota", lambda: None)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    with ProcessExecutor(2, "fork") as executor:
        assert executor.submit(numbers).result(WAIT_SECONDS) == {3}
        assert executor.submit(os.getenv, "OMP_NUM_THREADS").result(WAIT_SECONDS) == "3"
    with ProcessExecutor(2, "fork", blas_threads=None) as executor:
        assert executor.submit(numbers).result(WAIT_SECONDS) == {OWN}
        assert executor.submit(os.getenv, "OMP_NUM_THREADS").result(WAIT_SECONDS) is None
    assert "OMP_NUM_THREADS" not in os.environ


def test_initializer_has_the_last_word():
    initializer = threadpoolctl.threadpool_limits
    with ProcessExecutor(1, "fork", initializer, (2,), blas_threads=1) as executor:
        assert executor.submit(numbers).result(WAIT_SECONDS) == {2}


def test_forked_worker_has_its_own_limit_and_not_that_of_an_executor_of_threads():
    with Executor(1, initializer=int, blas_threads=1) as outer:
        assert outer.submit(numbers).result() == {1}
        with ProcessExecutor(1, "fork", blas_threads=3) as executor:
            assert executor.submit(numbers).result(WAIT_SECONDS) == {3}


@pytest.mark.parametrize(
    ("given", "left"),
    [
        ({}, {"OMP": "3", "OPENBLAS": "3", "MKL": "3", "BLIS": "3"}),
        ({"OMP": "2"}, {"OMP": "2", "OPENBLAS": "2", "MKL": "2", "BLIS": "2"}),
        ({"MKL": "1", "BLIS": "8"}, {"OMP": "3", "OPENBLAS": "3", "MKL": "1", "BLIS": "3"}),
        ({"OMP": "4,2", "MKL": "8"}, {"OMP": "4,2", "MKL": "3"}),
    ],
)
def test_environment_says_at_most_what_it_said(given, left):
    environment = {f"{name}_NUM_THREADS": value for name, value in given.items()}
    blas.limit_process(3, environment)
    try:
        assert environment == {f"{name}_NUM_THREADS": value for name, value in left.items()}
    finally:
        threadpoolctl.threadpool_limits(OWN)


# === arguments ==================================================================================


@pytest.mark.parametrize("kind", [Executor, ProcessExecutor])
@pytest.mark.parametrize("value", [0, -1, True, 1.5, "all"])
def test_what_is_no_number_of_threads_is_refused(kind, value):
    with pytest.raises(errors.InvalidArgument, match=f'blas_threads: must be "auto".* {value!r}'):
        kind(1, blas_threads=value)


def test_without_threadpoolctl_what_cannot_be_done_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "threadpoolctl", None)
    message = "needs the package threadpoolctl, which is not installed"
    for kind, value in ((Executor, "auto"), (Executor, 1), (ProcessExecutor, 1)):
        with pytest.raises(errors.Unsupported, match=message):
            kind(1, blas_threads=value)
    with ProcessExecutor(1, "fork") as executor:
        assert executor.submit(threading.active_count).result(WAIT_SECONDS) >= 1
