"""The executor as a backend of joblib: joblib's own tests, and what they do not ask."""

import threading
import time

import pytest
from foreign_suite import passed_count

from moirai.executor import Executor, Priority

joblib = pytest.importorskip("joblib")

from joblib.parallel import BACKENDS  # noqa: E402

from moirai.integrations.joblib_backend import MoiraiBackend, register  # noqa: E402

# What asks for the very class of joblib's own backend, or for its default of one job.
NOT_OURS = [
    "test_backend_context_manager",
    "test_nested_backend_in_sequential",
    "test_nested_parallelism_limit",
]

PLUGIN = """
import joblib.parallel
from moirai.integrations.joblib_backend import MoiraiBackend
joblib.parallel.BACKENDS["threading"] = MoiraiBackend
"""


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setattr(joblib.parallel, "BACKENDS", BACKENDS)
    monkeypatch.delitem(BACKENDS, "moirai", raising=False)
    register()
    yield "moirai"
    BACKENDS.pop("moirai", None)


def calls(function, items):
    return [joblib.delayed(function)(item) for item in items]


@pytest.mark.slow
def test_joblibs_own_tests_pass_with_this_backend_in_place_of_its_threads(tmp_path):
    refused = ["loky", "multiprocessing", "back_compat", *NOT_OURS]
    chosen = " and not ".join(["threading", *refused])
    assert passed_count(tmp_path, PLUGIN, ["joblib.test.test_parallel"], chosen) > 60


def test_backend_is_found_by_its_name(registered):
    with joblib.parallel_config(backend=registered, n_jobs=2):
        assert joblib.Parallel()(calls(abs, range(-50, 0))) == list(range(50, 0, -1))
    names = joblib.Parallel(2, backend=registered)(
        joblib.delayed(lambda: threading.current_thread().name)() for _ in range(50)
    )
    assert all(name.startswith("joblib") or name == "MainThread" for name in names)


@pytest.mark.parametrize("return_as", ["generator", "generator_unordered"])
def test_results_come_as_a_generator(registered, return_as):
    parallel = joblib.Parallel(2, backend=registered, return_as=return_as)
    assert sorted(parallel(calls(abs, range(50)))) == list(range(50))


def test_executor_of_ones_own_is_used_and_stays():
    with Executor(3) as executor:
        backend = MoiraiBackend(executor=executor, priority=Priority.HIGH)
        with joblib.parallel_config(backend=backend):
            assert joblib.Parallel()._effective_n_jobs() == 3
            assert joblib.Parallel()(calls(abs, range(20))) == list(range(20))
            assert joblib.Parallel(n_jobs=8)._effective_n_jobs() == 3
        before = executor.statistics().submitted
        assert before >= 20
        assert executor.submit(abs, -1).result() == 1


@pytest.mark.parametrize("return_as", ["list", "generator"])
def test_failure_cancels_what_has_not_begun(registered, return_as):
    ran = []

    def work(item):
        if item == 0:
            raise LookupError("first")
        ran.append(item)

    parallel = joblib.Parallel(2, backend=registered, pre_dispatch="all", return_as=return_as)
    with pytest.raises(LookupError, match="first"):
        list(parallel(calls(work, range(5000))))
    assert len(ran) < 4999


def test_task_that_takes_too_long_is_told_apart_from_one_that_raises(registered):
    opened = threading.Event()
    with pytest.raises(joblib.parallel.TimeoutError):
        joblib.Parallel(2, backend=registered, timeout=0.01)(
            joblib.delayed(opened.wait)(60) for _ in range(2)
        )
    opened.set()

    def fail():
        raise TimeoutError("its own")

    with pytest.raises(TimeoutError, match="its own"):
        joblib.Parallel(2, backend=registered, timeout=60)(joblib.delayed(fail)() for _ in range(2))


def test_nested_parallel_calls_end(registered):
    def inner(item):
        return sum(joblib.Parallel(2, backend=registered)(calls(abs, range(item))))

    found = joblib.Parallel(2, backend=registered)(calls(inner, range(10)))
    assert found == [sum(range(item)) for item in range(10)]


def test_workers_go_with_the_call(registered):
    joblib.Parallel(2, backend=registered)(calls(abs, range(20)))
    until = time.monotonic() + 60
    while any(thread.name.startswith("joblib") for thread in threading.enumerate()):
        assert time.monotonic() < until
        time.sleep(0.001)
