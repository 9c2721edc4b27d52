"""What tasks draw their memory from, and that it goes when they end."""

import threading

import numpy as np
import pytest

from moirai import memory
from moirai.executor import Executor, Priority
from moirai.executor.arenas import TaskArenas

WAIT_SECONDS = 60
BIG = 1 << 20


def counted(upstream=None):
    return memory.StatisticsAdaptor(upstream or memory.SystemResource())


def test_tasks_of_every_kind_draw_from_the_resource():
    source = counted()
    other = counted()
    with Executor(2, memory=source) as executor, memory.use(other):
        arrays = [
            executor.submit(np.zeros, BIG).result(),
            *(future.result() for future in executor.submit_many(np.zeros, [BIG])),
            *(future.result() for future in executor.submit_group([(np.zeros, BIG)])),
            *executor.map(np.zeros, [BIG, BIG]),
        ]
        mine = np.zeros(BIG)
    assert all(memory.handler_of(array) is source for array in arrays)
    assert memory.handler_of(mine) is other
    del arrays, mine
    assert source.statistics().current_bytes == 0


def test_without_a_resource_tasks_draw_from_their_submitters():
    source = counted()
    with Executor(2) as executor:
        with memory.use(source):
            future = executor.submit(np.zeros, BIG)
        assert memory.handler_of(future.result()) is source
        assert memory.handler_of(executor.submit(np.zeros, BIG).result()) is not source


def test_nested_task_draws_from_the_resource_of_its_executor():
    source, inner_source = counted(), counted()
    inner = Executor(1, memory=inner_source)

    def outer():
        return np.zeros(BIG), inner.submit(np.zeros, BIG).result(), np.zeros(BIG)

    with inner, Executor(1, memory=source) as executor:
        arrays = executor.submit(outer).result()
    expected = [source, inner_source, source]
    assert all(memory.handler_of(array) is it for array, it in zip(arrays, expected, strict=True))


def test_priority_of_a_task_is_the_lane_of_its_memory():
    source = memory.PriorityResource(realtime_bytes="1 MiB")

    def lane():
        return memory.current_priority()

    with Executor(1, memory=source) as executor:
        asked = [None, Priority.HIGH, Priority.BACKGROUND]
        found = [executor.submit(lane, priority=priority).result() for priority in asked]
        assert found == [Priority.NORMAL, Priority.HIGH, Priority.BACKGROUND]
        with memory.priority(Priority.BACKGROUND):
            assert executor.submit(lane).result() == Priority.BACKGROUND
            many = executor.submit_many(lambda _: lane(), [0], priority=Priority.HIGH)
            assert many[0].result() == Priority.HIGH


def test_memory_of_a_task_dies_with_it_unless_it_is_the_result():
    source = counted()
    seen = []

    def work(keep):
        scratch = [np.full(10_000, keep) for _ in range(100)]
        seen.append(source.statistics().current_bytes)
        return scratch[keep][:10]

    with Executor(1, memory=source, task_arena=True) as executor:
        first = executor.submit(work, 3).result()
        results = list(executor.map(work, range(20)))
        assert first.tolist() == [3] * 10
        assert [result[0] for result in results] == list(range(20))
        kept = source.statistics().current_bytes
        del results, first
        # Without the GIL, the thread that made an object frees it, when it runs next.
        executor.submit(int).result(60)
        assert source.statistics().current_bytes < kept
    # Scratch of 8 MB each: later tasks used the room of earlier ones.
    assert max(seen) < 50 * BIG
    del executor


def test_arena_of_a_task_that_fails_is_used_again():
    def fail():
        np.ones(1000)
        raise LookupError("asked to fail")

    with Executor(1, task_arena=True) as executor:
        assert isinstance(executor.submit(fail).exception(), LookupError)
        assert executor.submit(lambda: np.ones(1000).sum()).result() == 1000


def test_tasks_within_each_other_have_an_arena_each():
    def total(depth):
        mine = np.full(1000, depth)
        if depth == 0:
            return mine
        inner = executor.submit(total, depth - 1).result()
        assert (inner == depth - 1).all()
        assert (mine == depth).all()
        return mine

    with Executor(2, task_arena=True) as executor:
        assert (executor.submit(total, 8).result() == 8).all()


def test_arenas_are_as_many_as_calls_run_at_once():
    arenas = TaskArenas(None)
    barrier = threading.Barrier(2)
    call = arenas.wrap(lambda: barrier.wait(WAIT_SECONDS) and None)
    with Executor(2) as executor:
        for _ in range(5):
            for future in [executor.submit(call) for _ in range(2)]:
                future.result(WAIT_SECONDS)
    assert len(arenas._free) == 2


def test_what_is_no_resource_is_refused():
    with pytest.raises(TypeError):
        Executor(1, memory="slab")
