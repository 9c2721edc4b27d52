"""The executor as Dask's scheduler of threads: Dask's own tests, and a graph."""

import operator

import pytest
from foreign_suite import passed_count

from moirai.executor import Executor

dask = pytest.importorskip("dask")

PLUGIN = """
import dask
from moirai.executor import Executor
dask.config.set(scheduler=Executor(4))
"""
MODULES = ["dask.tests.test_delayed", "dask.tests.test_threaded", "dask.tests.test_local"]


@pytest.mark.slow
def test_dasks_own_tests_pass_with_this_scheduler(tmp_path):
    assert passed_count(tmp_path, PLUGIN, MODULES, "test") > 60


def test_graph_is_computed_by_the_executor():
    with Executor(2) as executor, dask.config.set(scheduler=executor):
        squares = [dask.delayed(operator.mul)(item, item) for item in range(50)]
        assert dask.delayed(sum)(squares).compute() == sum(item * item for item in range(50))
    assert executor.statistics().succeeded > 10


def test_failure_of_a_graph_is_raised():
    def fail():
        raise LookupError("asked to fail")

    with Executor(2) as executor, dask.config.set(scheduler=executor):
        with pytest.raises(LookupError, match="asked to fail"):
            dask.delayed(fail)().compute()
        assert dask.delayed(abs)(-1).compute() == 1
