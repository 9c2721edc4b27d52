"""Who takes which task, asked of the executor's own workers without their threads."""

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moirai.errors import InvalidArgument
from moirai.executor.rehearsal import Rehearsal, rehearse
from moirai.executor.sizing import cpu_of_workers, working_nodes
from moirai.memory import Topology

NUMA = Path(__file__).parent / "fixtures" / "numa"
PATIENCE_SECONDS = 200e-6
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
    for who in data.draw(st.lists(st.integers(0, count - 1), max_size=40)):
        owner[task := 1000 + len(owner)] = who
        rehearsal.push(who, task)
    same = 0

    def is_left(node):
        queued = sum(node_of[who] is node for who in owner.values())
        return queued <= 1 + sum(each is node for each in node_of)

    for thief in data.draw(st.lists(st.integers(0, count - 1), max_size=25)):
        task, brought, _ = rehearsal.take(thief)
        if task is None:
            assert all(node_of[who] is not node_of[thief] for who in owner.values())
            assert all(is_left(node_of[who]) for who in owner.values())
            seconds, _ = rehearsal.rest(thief)
            assert seconds == (PATIENCE_SECONDS if owner else math.inf)
            if not owner:
                return
            assert rehearsal.stop_waiting(thief)
            task, brought, _ = rehearsal.take(thief)
            was_left = True
        else:
            was_left = False
        held = [each for each, who in owner.items() if who == owner[task]]  # the oldest first
        if thief in owner.values():
            assert owner.pop(task) == thief
            assert task == held[-1]
            continue
        distance = node_of[thief].distances
        victim = owner[task]
        taken = node_of[victim]
        is_far = taken is not node_of[thief]
        nearest = min(
            (node_of[who] is not node_of[thief], distance[node_of[who].id])
            for who in owner.values()
            if was_left or node_of[who] is node_of[thief] or not is_left(node_of[who])
        )
        assert (is_far, distance[taken.id]) == nearest
        del owner[task]
        same += not is_far
        # From another node half of each deque comes along, the oldest, to be stolen by the thief's
        # neighbours.
        come = held[: (len(held) - 1) // 2] if is_far else []
        assert task == held[len(come)]
        for other in range(count) if is_far else ():
            if other != victim and node_of[other] is taken:
                each = [each for each, who in owner.items() if who == other]
                come += each[: (len(each) + 1) // 2] if len(each) > 1 else []
        assert brought == len(come)
        for each in come:
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
        assert rehearsal.rest(worker) == (math.inf, [])
    assert rehearsal.push(0, 10) == [2]
    assert rehearsal.push(0, 11) == []  # who was woken looks already
    assert rehearsal.take(2) == (10, 0, [1])
    counts = rehearsal.counts()
    assert [worker["parks"] for worker in counts] == [0, 1, 1]
    assert [worker["wakes"] for worker in counts] == [0, 1, 1]


def test_who_is_to_rest_looks_again_when_there_is_something():
    rehearsal = Rehearsal(node_of_worker=[0], order=[[0]])
    assert rehearsal.queue(0, 1) == [0]
    assert rehearsal.rest(0) == (0, [])
    assert rehearsal.take(0) == (1, 0, [])


def two_nodes(count):
    """Workers of which every second is at the second node; each has had a task, and sleeps."""
    rehearsal = Rehearsal(node_of_worker=[0, 1] * (count // 2), order=[[0, 1], [1, 0]])
    for task in range(count):
        assert rehearsal.queue(task % 2, task) == [task]
    for who in range(count):
        assert rehearsal.take(who)[0] is not None
    for who in range(count):
        assert rehearsal.take(who)[0] is None
        assert rehearsal.rest(who) == (math.inf, [])
    return rehearsal


def test_who_is_at_the_node_of_a_task_is_woken_first():
    rehearsal = two_nodes(4)
    assert rehearsal.queue(0, 10) == [2]
    assert rehearsal.take(2) == (10, 0, [])
    assert rehearsal.push(2, 11) == [0]
    assert rehearsal.take(0) == (11, 0, [])
    # Both are busy: one of the others waits, and the next is not woken to do the same.
    assert rehearsal.push(0, 12) == [3]
    assert rehearsal.take(3) == (None, 0, [])
    assert rehearsal.rest(3) == (PATIENCE_SECONDS, [])
    assert rehearsal.push(0, 13) == []
    assert rehearsal.stop_waiting(3)
    assert rehearsal.take(3) == (12, 0, [1]), "the next one waits for the other task"
    assert rehearsal.take(1) == (None, 0, [])
    assert rehearsal.rest(1) == (PATIENCE_SECONDS, [])
    # More than those at home take at once, and one, is worth being called for.
    assert [rehearsal.push(0, task) for task in (14, 15)] == [[], []]
    assert rehearsal.push(0, 16) == [1]
    assert not rehearsal.stop_waiting(1)
    assert rehearsal.take(1) == (14, 1, [])


def test_a_wait_ends_with_a_task_of_the_own_node():
    rehearsal = two_nodes(2)
    assert rehearsal.queue(0, 10) == [0]
    assert rehearsal.take(0) == (10, 0, [])
    assert rehearsal.push(0, 11) == [1]
    assert rehearsal.rest(1) == (PATIENCE_SECONDS, [])
    assert rehearsal.queue(1, 12) == [1]
    assert not rehearsal.stop_waiting(1)
    assert rehearsal.take(1) == (12, 0, [])
    assert rehearsal.take(1) == (None, 0, []), "the rest of its patience begins anew"


def test_a_task_that_nobody_comes_back_for_is_taken_by_another_node():
    rehearsal = two_nodes(4)
    assert rehearsal.queue(0, 10) == [2]
    assert rehearsal.take(2)[0] == 10
    assert rehearsal.push(2, 11) == [0]
    assert rehearsal.take(0)[0] == 11
    waiting = [who for task in (12, 13, 14) for who in rehearsal.push(2, task)]
    taken = []
    while waiting:  # the workers of the first node are at tasks that do not end
        thief = waiting.pop()
        assert rehearsal.rest(thief) == (PATIENCE_SECONDS, [])
        assert rehearsal.stop_waiting(thief)
        while (found := rehearsal.take(thief))[0] is not None:
            taken.append(found[0])
            waiting += found[2]
    assert sorted(taken) == [12, 13, 14]


def test_wrong_places_are_named():
    with pytest.raises(InvalidArgument, match="among 1 nodes, got"):
        Rehearsal(node_of_worker=[1], order=[[0]])
    rehearsal = Rehearsal(node_of_worker=[0], order=[[0]])
    with pytest.raises(InvalidArgument, match="node: must be below 1, got 1"):
        rehearsal.queue(1, 0)
    steps = (
        rehearsal.take,
        rehearsal.rest,
        rehearsal.stop_waiting,
        lambda worker: rehearsal.push(worker, 0),
    )
    for step in steps:
        with pytest.raises(InvalidArgument, match="worker: must be one that was started, got 0"):
            step(0)
