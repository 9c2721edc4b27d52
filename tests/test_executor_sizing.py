"""How many workers there are, on which nodes, and whom they steal from first."""

import dataclasses
import os
import threading
from pathlib import Path
from types import MappingProxyType

import pytest

from moirai.executor import Executor, NodeStatistics
from moirai.executor.sizing import (
    cpu_of_workers,
    cpu_quota,
    default_worker_count,
    node_of_cpu,
    steal_order,
    working_nodes,
)
from moirai.memory import NumaNode, Priority, Topology

NUMA = Path(__file__).parent / "fixtures" / "numa"


def machine(*cpus_by_node, allowed=None, distances=None):
    count = len(cpus_by_node)
    table = distances or [[10 if a == b else 20 for b in range(count)] for a in range(count)]
    nodes = tuple(
        NumaNode(index, cpus, 1 << 30, MappingProxyType(dict(enumerate(table[index]))))
        for index, cpus in enumerate(cpus_by_node)
    )
    online = tuple(sorted(cpu for cpus in cpus_by_node for cpu in cpus))
    return Topology(nodes, online, (), online if allowed is None else allowed, tuple(range(count)))


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"proc/self/cgroup": "0::/a/b\n"}, None),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/cpu.max": "max 100000\n"}, None),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/cpu.max": "150000 100000\n"}, 1.5),
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/b/cpu.max": "400000 100000\n",
                "sys/fs/cgroup/a/cpu.max": "200000 100000\n",
            },
            2.0,
        ),
        (
            {
                "proc/self/cgroup": "4:cpu,cpuacct:/x\n3:memory:/y\n",
                "sys/fs/cgroup/cpu/x/cpu.cfs_quota_us": "50000\n",
                "sys/fs/cgroup/cpu/x/cpu.cfs_period_us": "100000\n",
            },
            0.5,
        ),
        ({"proc/self/cgroup": "4:cpu:/x\n", "sys/fs/cgroup/cpu/x/cpu.cfs_quota_us": "-1\n"}, None),
        ({}, None),
    ],
)
def test_quota_is_the_least_along_the_groups(tmp_path, files, quota):
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert cpu_quota(tmp_path) == quota


@pytest.mark.parametrize(("quota", "count"), [(None, 3), (0.2, 1), (1.5, 2), (9.0, 3)])
def test_workers_are_as_many_as_cpus_and_quota_allow(quota, count):
    topology = machine((0, 1), (2, 3), allowed=(0, 2, 3))
    assert default_worker_count(topology, quota) == count


def test_workers_are_spread_over_the_nodes_and_then_over_their_cpus():
    topology = machine((0, 1), (2,), (3,), allowed=(0, 1, 2))
    assert [node.id for node in working_nodes(topology)] == [0, 1]
    assert cpu_of_workers(topology, 4) == [
        (0, 0, (0, 1)),
        (1, 2, (2,)),
        (0, 1, (0, 1)),
        (0, 0, (0, 1)),
    ]


def test_the_nearest_node_is_stolen_from_first():
    distances = [[10, 30, 20], [30, 10, 20], [20, 30, 10]]
    topology = machine((0,), (1,), (2,), distances=distances)
    assert steal_order(topology) == [[0, 2, 1], [1, 2, 0], [2, 0, 1]]


def test_executor_of_a_machine_with_nodes_takes_tasks_for_one_of_them():
    # CPUs that are not there: nobody is kept on them.
    topology = machine((0,), (1,))
    with Executor(2, affinity=None, topology=topology) as executor:
        assert executor.submit(pow, 2, 3, node=1).result(60) == 8
        assert [it.result(60) for it in executor.submit_many(abs, [-1], node=0)] == [1]
        assert sum(executor.map(abs, range(-9, 0), node=1)) == 45
    assert {worker.node for worker in executor.statistics().workers} == {0, 1}


@pytest.mark.parametrize("name", ["two-nodes", "four-nodes", "eight-nodes", "sparse-ids"])
def test_each_cpu_has_its_own_node_or_the_nearest_with_workers(name):
    topology = Topology.read(NUMA / name)
    nodes = working_nodes(topology)
    of_cpu = node_of_cpu(topology, len(nodes))
    assert all(cpu in nodes[of_cpu[cpu]].cpus for node in nodes for cpu in node.cpus)
    assert node_of_cpu(topology, 1) == []
    few = node_of_cpu(topology, 2) if len(nodes) > 2 else of_cpu
    for node in nodes[2:]:
        nearest = min((0, 1), key=lambda place, node=node: node.distances[nodes[place].id])
        assert {few[cpu] for cpu in node.cpus} == {nearest}


@pytest.fixture
def one_cpu():
    """The one CPU that this thread stays on."""
    before = os.sched_getaffinity(0)
    cpu = max(before)
    os.sched_setaffinity(0, {cpu})
    yield cpu
    os.sched_setaffinity(0, before)


def test_a_task_goes_to_the_node_that_its_submitter_is_at(one_cpu):
    topology = machine((one_cpu + 1,), (one_cpu,))
    opened, begun = threading.Event(), threading.Barrier(3)

    def wait(_):
        begun.wait(60)
        opened.wait(60)

    with Executor(2, affinity=None, topology=topology) as executor:

        def queued():
            return [sum(lanes) for lanes in executor.statistics().queued_by_node]

        executor.submit_many(wait, range(2))
        begun.wait(60)
        try:
            executor.submit(abs, 1)
            executor.submit(abs, 1, priority=Priority.HIGH)
            assert queued() == [0, 2]
            executor.submit_many(abs, range(3))
            executor.map(abs, range(5), chunksize=1)
            assert queued() == [0, 10]
            executor.submit(abs, 1, node=0)
            assert queued() == [1, 10]
        finally:
            opened.set()


def test_what_a_worker_queues_for_others_goes_to_its_own_node(one_cpu):
    topology = machine((one_cpu + 1,), (one_cpu,))
    begun = threading.Barrier(2)

    def parent(_):
        begun.wait(60)  # both workers are at one: nobody takes what is queued
        future = executor.submit(abs, 1, priority=Priority.BACKGROUND)
        begun.wait(60)
        who = int(threading.current_thread().name.rpartition("_")[2])
        return who, executor.statistics(), begun.wait(60), future

    with Executor(2, initializer=int, affinity=None, topology=topology) as executor:
        for who, counts, *_ in [it.result(60) for it in executor.submit_many(parent, range(2))]:
            assert [sum(lanes) for lanes in counts.queued_by_node] == [1, 1]
            assert counts.workers[who].node == who


SUMMED = (
    "executed", "from_lanes", "from_own", "stolen_same_node", "stolen_cross_node",
    "failed_steals", "parks", "wakes",
)  # fmt: skip


def test_counts_of_a_node_are_those_of_its_workers():
    # With an initializer nobody but workers runs tasks.
    topology = machine((0, 1), (2,))
    with Executor(3, initializer=int, affinity=None, topology=topology) as executor:

        def parent():
            return sum(future.result() for future in executor.submit_many(abs, range(-20, 0)))

        assert [executor.submit(parent, node=node).result(60) for node in (0, 1, 0)] == [210] * 3
    counts = executor.statistics()
    assert [node.id for node in counts.nodes] == [0, 1]
    assert [node.worker_count for node in counts.nodes] == [2, 1]
    for place, node in enumerate(counts.nodes):
        own = [worker for worker in counts.workers if worker.node == place]
        for name in SUMMED:
            assert getattr(node, name) == sum(getattr(worker, name) for worker in own), name
    assert sum(node.executed for node in counts.nodes) == counts.succeeded == 63


def test_what_waits_is_counted_at_the_node_that_it_waits_at():
    topology = machine((0,), (1,))
    opened, begun = threading.Event(), threading.Barrier(3)

    def wait():
        begun.wait(60)
        opened.wait(60)

    with Executor(2, affinity=None, topology=topology) as executor:
        executor.submit_many(lambda _: wait(), range(2))
        begun.wait(60)
        executor.submit_many(abs, range(3), node=1)
        executor.submit(abs, 1, node=0)
        assert [node.queued for node in executor.statistics().nodes] == [1, 3]
        opened.set()
    counts = executor.statistics()
    assert [node.queued for node in counts.nodes] == [0, 0]
    assert sum(node.executed for node in counts.nodes) == 6


def test_locality_of_a_node_is_the_share_of_what_its_workers_stole_from_each_other():
    node = NodeStatistics(0, 2, 9, 0, 5, 3, 1, 7, 0, 0, 0)
    assert node.locality_ratio == 0.75
    assert dataclasses.replace(node, stolen_same_node=0, stolen_cross_node=0).locality_ratio == 1.0
