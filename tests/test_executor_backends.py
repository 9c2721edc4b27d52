"""The same program on threads, on processes and on a cluster, chosen by one word."""

import os
import time

import pytest

from moirai import errors, memory
from moirai.executor import Executor, Priority, ProcessExecutor

# From 3.12 on forking is warned of where there are threads, as there are in every executor.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")

WAIT_SECONDS = 60


@pytest.fixture(autouse=True)
def no_choice(monkeypatch):
    monkeypatch.delenv("MOIRAI_EXECUTOR", raising=False)


def divide(number, by):
    return number // by


def program(executor):
    """What any of them runs; the identifier of a process that ran it."""
    with executor:
        assert executor.submit(divide, 7, by=2).result(WAIT_SECONDS) == 3
        futures = executor.submit_many(divide, [7, 8], [2, 2], priority=Priority.HIGH)
        assert [future.result(WAIT_SECONDS) for future in futures] == [3, 4]
        assert list(executor.map(abs, range(-50, 50))) == list(map(abs, range(-50, 50)))
        assert sorted(executor.map_unordered(abs, range(50), chunksize=3)) == list(range(50))
        with executor.group() as group:
            ended = [group.submit(abs, -number) for number in range(5)]
        assert [future.result() for future in ended] == list(range(5))
        with pytest.raises(ZeroDivisionError):
            executor.submit(divide, 1, by=0).result(WAIT_SECONDS)
        pid = executor.submit(os.getpid).result(WAIT_SECONDS)
    counts = executor.statistics()
    assert counts.submitted == counts.succeeded + counts.failed + counts.cancelled
    assert counts.failed == 1
    return pid


@pytest.fixture(params=["threads", "processes", "dask"])
def backend(request):
    if request.param != "dask":
        yield request.param
        return
    distributed = pytest.importorskip("distributed", reason="distributed is not installed")
    with (
        distributed.LocalCluster(
            n_workers=1, threads_per_worker=1, processes=True, dashboard_address=":0"
        ) as cluster,
        distributed.Client(cluster),
    ):
        yield request.param


def test_program_runs_unchanged_on_each(backend):
    assert (program(Executor(2, backend=backend)) == os.getpid()) == (backend == "threads")


def test_environment_chooses_where_nothing_is_said(monkeypatch):
    monkeypatch.setenv("MOIRAI_EXECUTOR", "processes")
    chosen = Executor(1)
    assert isinstance(chosen, ProcessExecutor)
    assert program(chosen) != os.getpid()
    assert isinstance(Executor(1, backend="threads"), Executor)

    class Threads(Executor):
        pass

    assert isinstance(Threads(1), Threads)


@pytest.mark.parametrize("name", ["MOIRAI_EXECUTOR", "backend"])
def test_unknown_backend_is_named(name, monkeypatch):
    monkeypatch.setenv("MOIRAI_EXECUTOR", "fibers")
    backend = "fibers" if name == "backend" else None
    with pytest.raises(errors.InvalidArgument, match=f"{name}: must be one of .*processes.*fibers"):
        Executor(backend=backend)


def test_dask_without_a_client_says_what_to_do():
    pytest.importorskip("distributed", reason="distributed is not installed")
    with pytest.raises(errors.InvalidArgument, match=r"make a distributed\.Client first"):
        Executor(backend="dask")


@pytest.mark.parametrize("name", ["memory", "task_arena"])
def test_what_only_threads_have_is_refused_elsewhere(name):
    given = {"memory": memory.PoolResource(), "task_arena": True}[name]
    with pytest.raises(errors.InvalidArgument, match=f"{name}: needs the backend threads"):
        Executor(2, backend="processes", **{name: given})


def test_time_limits_are_kept_on_each(backend):
    with Executor(1, backend=backend) as executor:
        late = executor.submit(abs, -1, deadline=time.monotonic() - 1)
        assert isinstance(late.exception(WAIT_SECONDS), errors.Timeout)
        assert executor.submit(abs, -1, timeout_seconds=WAIT_SECONDS).result(WAIT_SECONDS) == 1
        assert executor.statistics().timed_out == 1


@pytest.mark.parametrize("name", ["max_pending", "blas_threads"])
def test_what_a_cluster_does_not_have_is_refused_there(name):
    pytest.importorskip("distributed", reason="distributed is not installed")
    message = f"{name}: needs the backend threads or processes, got 3"
    with pytest.raises(errors.InvalidArgument, match=message):
        Executor(2, backend="dask", **{name: 3})


def test_executor_of_threads_needs_nothing_of_an_executor_of_processes(run_python):
    run_python("""
        import sys
        import moirai.executor

        others = {"numpy", "multiprocessing", "moirai.channels", "moirai.executor.processes"}
        with moirai.executor.Executor(1, backend="threads") as executor:
            assert executor.submit(abs, -1).result(60) == 1
        assert not others & sys.modules.keys(), others & sys.modules.keys()
        for found in (moirai.executor.ProcessStatistics, moirai.executor.ProcessExecutor):
            assert found.__name__ in moirai.executor.__all__
        assert others <= sys.modules.keys()
        try:
            moirai.executor.FiberExecutor
        except AttributeError as error:
            assert "'moirai.executor' has no attribute 'FiberExecutor'" in str(error)
    """)
