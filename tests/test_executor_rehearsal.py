"""Who takes which task, asked of the executor's own workers without their threads."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moirai.errors import InvalidArgument
from moirai.executor.rehearsal import Rehearsal, rehearse
from moirai.executor.sizing import cpu_of_workers, working_nodes
from moirai.memory import Topology

NUMA = Path(__file__).parent / "fixtures" / "numa"
MACHINES = ("two-nodes", "four-nodes", "eight-nodes", "sparse-ids", "cpus-without-memory")


def all_started(topology, count):
    """Workers that sleep, each after it took one task from outside."""
    rehearsal = rehearse(topology, count)
    started = [who for task in range(count) for who in rehearsal.queue(0, task)]
    assert sorted(started) == list(range(count))
    for who in started:
        assert rehearsal.take(who)[0] is not None
    return rehearsal


@given(st.data())
def test_a_thief_takes_from_the_nearest_node_that_has_tasks(data):
    topology = Topology.read(NUMA / data.draw(st.sampled_from(MACHINES)))
    nodes = working_nodes(topology)
    count = data.draw(st.integers(2, 2 * len(nodes)))
    node_of = [nodes[place] for place, _, _ in cpu_of_workers(topology, count)]
    rehearsal = all_started(topology, count)
    owner = {}
    for who in data.draw(st.lists(st.integers(0, count - 1), max_size=20)):
        owner[task := 1000 + len(owner)] = who
        rehearsal.push(who, task)
    same = 0
    for thief in data.draw(st.lists(st.integers(0, count - 1), max_size=25)):
        task, brought, _ = rehearsal.take(thief)
        if task is None:
            assert not owner
            continue
        held = [each for each, who in owner.items() if who == owner[task]]  # the oldest first
        if thief in owner.values():
            assert owner.pop(task) == thief
            assert task == held[-1]
            continue
        distance = node_of[thief].distances
        nearest = min(
            (node_of[who] is not node_of[thief], distance[node_of[who].id])
            for who in owner.values()
        )
        taken = node_of[owner.pop(task)]
        assert (taken is not node_of[thief], distance[taken.id]) == nearest
        same += taken is node_of[thief]
        # From another node half comes along, the oldest, to be stolen by the thief's neighbours.
        assert brought == (0 if taken is node_of[thief] else (len(held) - 1) // 2)
        assert task == held[brought]
        for each in held[:brought]:
            del owner[each]
            owner[each] = thief
    assert sum(worker["stolen_same_node"] for worker in rehearsal.counts()) == same


def test_one_sleeper_is_woken_for_a_task_and_the_next_when_there_is_more():
    rehearsal = Rehearsal(node_of_worker=[0, 0, 0], order=[[0]])
    for task in range(3):
        assert rehearsal.queue(0, task) == [task]
    for worker in range(3):
        assert rehearsal.take(worker) == (worker, 0, [])
    for worker in (1, 2):
        assert rehearsal.take(worker) == (None, 0, [])
        assert rehearsal.rest(worker)
    assert rehearsal.push(0, 10) == [2]
    assert rehearsal.push(0, 11) == []  # who was woken looks already
    assert rehearsal.take(2) == (10, 0, [1])
    counts = rehearsal.counts()
    assert [worker["parks"] for worker in counts] == [0, 1, 1]
    assert [worker["wakes"] for worker in counts] == [0, 1, 1]


def test_who_is_to_rest_looks_again_when_there_is_something():
    rehearsal = Rehearsal(node_of_worker=[0], order=[[0]])
    assert rehearsal.queue(0, 1) == [0]
    assert not rehearsal.rest(0)
    assert rehearsal.take(0) == (1, 0, [])


def test_wrong_places_are_named():
    with pytest.raises(InvalidArgument, match="among 1 nodes, got"):
        Rehearsal(node_of_worker=[1], order=[[0]])
    rehearsal = Rehearsal(node_of_worker=[0], order=[[0]])
    with pytest.raises(InvalidArgument, match="node: must be below 1, got 1"):
        rehearsal.queue(1, 0)
    for step in (rehearsal.take, rehearsal.rest, lambda worker: rehearsal.push(worker, 0)):
        with pytest.raises(InvalidArgument, match="worker: must be one that was started, got 0"):
            step(0)
