"""How many calls may wait for worker processes, and at which nodes of a machine these are."""

import contextvars
import os
import queue
import threading
from pathlib import Path
from types import MappingProxyType

import pytest
from hypothesis import given
from hypothesis import strategies as st
from running import assert_counts_add_up, in_forked_child, run_threads, wait_until, wait_until_gone
from worker_gate import CALLS_AT_WORKER, Gate, hold

from moirai import errors
from moirai.executor import Executor, ProcessExecutor, process_pool
from moirai.executor.lanes import NodeLanes
from moirai.executor.sizing import seats_of
from moirai.memory import NumaNode, Priority, Topology

# From 3.12 on forking is warned of where there are threads, as there are in every executor.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")

WAIT_SECONDS = 60
MACHINES = Path(__file__).parent / "fixtures" / "numa"


@pytest.fixture
def gate():
    made = Gate()
    yield made
    made.close()


def same(item):
    return item


# === how many wait ==============================================================================


def test_who_submits_one_more_is_refused(gate):
    with ProcessExecutor(1, "fork", max_pending=3, when_full="raise") as executor:
        gate.fill(executor)
        waiting = executor.submit_many(same, [1, 2])
        with pytest.raises(
            queue.Full, match="max_pending: 2 of 3 tasks wait already, no room for 2"
        ):
            executor.submit_many(same, [3, 4])
        third = executor.submit(same, 3)
        with pytest.raises(queue.Full, match="no room for 1"):
            executor.submit(same, 4)
        assert third.cancel()
        waiting.append(executor.submit(same, 5))
        gate.open()
        assert [future.result(WAIT_SECONDS) for future in waiting] == [1, 2, 5]
    counts = assert_counts_add_up(executor)
    assert (counts.submitted, counts.refused, counts.cancelled) == (CALLS_AT_WORKER + 4, 3, 1)


def test_who_submits_one_more_waits_for_room_in_line(gate):
    with ProcessExecutor(1, "fork", max_pending=1) as executor:
        gate.fill(executor)
        first = executor.submit(same, 1)
        blocked, began = [], []

        def submit(number):
            began.append(number)
            blocked.append((number, executor.submit(same, number)))

        threads = []
        for number in range(2):
            threads.append(threading.Thread(target=submit, args=(number,)))
            threads[-1].start()
            wait_until(lambda: len(executor._pool.backlog.room._line) == len(threads))
        assert first.cancel()  # makes room for one
        wait_until_gone(threads[0])
        assert [number for number, _ in blocked] == [0]
        gate.open()
        wait_until_gone(threads[1])
        assert [future.result(WAIT_SECONDS) for _, future in blocked] == [0, 1]
    assert_counts_add_up(executor)


def end_while_many_wait_for_room(executor, gate):
    """Shut an executor down while a thread waits for room; that must be refused."""
    raised = []

    def submit():
        try:
            executor.submit_many(same, range(5))
        except errors.Closed as error:
            raised.append(error)

    thread = threading.Thread(target=submit)
    thread.start()
    wait_until(lambda: len(executor._pool.backlog.room._line) == 1)
    executor.shutdown(wait=False)
    wait_until_gone(thread)
    assert len(raised) == 1
    gate.open()
    executor.shutdown()


def test_waiting_for_room_ends_with_the_executor(gate):
    executor = ProcessExecutor(1, "fork", max_pending=1)
    gate.fill(executor)
    future = executor.submit(same, 1)
    end_while_many_wait_for_room(executor, gate)
    assert future.result() == 1
    assert assert_counts_add_up(executor).succeeded == CALLS_AT_WORKER + 1


def test_many_that_cannot_all_be_queued_are_cancelled(gate):
    executor = ProcessExecutor(1, "fork", max_pending=2)
    gate.fill(executor)
    end_while_many_wait_for_room(executor, gate)
    counts = assert_counts_add_up(executor)
    assert (counts.submitted, counts.cancelled) == (CALLS_AT_WORKER + 2, 2)


variable = contextvars.ContextVar("variable", default="outside")


def set_variable():
    before = variable.get()
    variable.set("inside")
    return before, os.getpid()


def test_submitter_runs_what_finds_no_room(gate):
    with ProcessExecutor(1, "fork", max_pending=1, when_full="caller_runs") as executor:
        gate.fill(executor)
        queued = executor.submit(os.getpid)
        assert executor.submit(set_variable).result(0) == ("outside", os.getpid())
        assert variable.get() == "outside"
        assert [it.result(0) for it in executor.submit_many(same, [1, 2])] == [1, 2]
        results = executor.map(divmod, [7, 8, 9], [2, 0, 1], chunksize=3)
        assert next(results) == (3, 1)
        with pytest.raises(ZeroDivisionError):
            next(results)
        failed = executor.submit(int, "x")
        assert isinstance(failed.exception(0), ValueError)
        assert [it.result(0) for it in executor.submit_group([(abs, -1), (pow, 2, 3)])] == [1, 8]
        assert not queued.done()
        gate.open()
        assert queued.result(WAIT_SECONDS) != os.getpid()
    counts = assert_counts_add_up(executor)
    assert counts.ran_by_submitter == 7
    assert [(now.completed, now.total) for now in executor.progress()] == [
        (CALLS_AT_WORKER + 10,) * 2
    ]


def test_ctrl_c_ends_the_call_of_a_submitter(gate):
    def interrupt():
        raise KeyboardInterrupt

    with ProcessExecutor(1, "fork", max_pending=1, when_full="caller_runs") as executor:
        gate.fill(executor)
        executor.submit(abs, 1)
        with pytest.raises(KeyboardInterrupt):
            executor.submit(interrupt)
        gate.open()
    assert assert_counts_add_up(executor).failed == 1


@pytest.mark.parametrize("when_full", ["block", "caller_runs"])
def test_callback_that_submits_does_not_wait_for_what_it_holds_up(when_full):
    with ProcessExecutor(1, "fork", max_pending=1, when_full=when_full) as executor:
        found = queue.SimpleQueue()

        def submit_more(_):
            for _ in range(CALLS_AT_WORKER + 5):
                executor.submit(os.getpid).add_done_callback(lambda it: found.put(it.result()))

        executor.submit(abs, 1).add_done_callback(submit_more)
        pids = {found.get(timeout=WAIT_SECONDS) for _ in range(CALLS_AT_WORKER + 5)}
        assert os.getpid() not in pids


def test_map_is_fed_as_there_is_room():
    with ProcessExecutor(2, "fork", max_pending=2) as executor:
        assert list(executor.map(same, range(100), chunksize=1)) == list(range(100))
        assert sorted(executor.map_unordered(same, range(50), chunksize=3)) == list(range(50))
        futures = executor.submit_many(same, range(100))
        assert [future.result(WAIT_SECONDS) for future in futures] == list(range(100))
        unpicklable = executor.submit_many(same, [threading.Lock() for _ in range(5)])
        assert all(future.exception(WAIT_SECONDS) for future in unpicklable)
        assert executor.submit_group([(same, number) for number in range(2)])
    assert assert_counts_add_up(executor).failed == 5


def test_group_of_calls_gets_room_for_all_or_none(gate):
    with ProcessExecutor(1, "fork", max_pending=3) as executor:
        gate.fill(executor)
        first = executor.submit(same, 1)
        groups = []
        calls = [(abs, -1), (pow, 2, 3), (max, [4, 5])]
        thread = threading.Thread(target=lambda: groups.extend(executor.submit_group(calls)))
        thread.start()
        wait_until(lambda: len(executor._pool.backlog.room._line) == 1)
        assert first.cancel()  # makes room for the third
        wait_until_gone(thread)
        assert len(groups) == 3
        gate.open()
        assert [future.result(WAIT_SECONDS) for future in groups] == [1, 8, 5]
        held = gate.fill(executor)
        executor.submit(same, 1)
        with pytest.raises(errors.InvalidArgument, match=r"calls: must be at most 3 .*got 4"):
            executor.submit_group([(abs, 1)] * 4)
        assert executor.submit_group([]) == []
        gate.open()
        assert held[0].result(WAIT_SECONDS) == b"x"


def test_group_without_a_limit_is_queued_at_once():
    with ProcessExecutor(2, "fork") as executor:
        futures = executor.submit_group([(abs, -1), (pow, 2, 3)], priority=Priority.HIGH, node=None)
        assert [future.result(WAIT_SECONDS) for future in futures] == [1, 8]


@pytest.mark.parametrize("calls", [[abs], [()], [(3, 4)], [(abs, 1), "x"]])
def test_call_that_is_no_tuple_of_a_function_is_named(calls):
    with ProcessExecutor(1, "fork") as executor:
        with pytest.raises(errors.InvalidArgument, match="calls: must be tuples of a function"):
            executor.submit_group(calls)
        assert executor.statistics().submitted == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_pending": 0}, "max_pending: must be .*, got 0"),
        ({"max_pending": True}, "max_pending"),
        ({"max_pending": "3"}, "max_pending"),
        (
            {"when_full": "drop"},
            'when_full: must be "block" or "raise" or "caller_runs", got \'drop\'',
        ),
        (
            {"max_pending": 1, "when_full": "caller_runs", "initializer": print},
            "with an initializer",
        ),
        ({"affinity": "socket"}, "affinity: must be .*, got 'socket'"),
    ],
)
def test_wrong_argument_is_named(options, message):
    with pytest.raises(errors.InvalidArgument, match=message):
        ProcessExecutor(1, **options)


def test_room_of_a_forked_child_is_its_own(gate):
    with ProcessExecutor(1, "fork", max_pending=1, when_full="raise") as executor:
        gate.fill(executor)
        executor.submit(abs, 1)

        def child():
            assert executor.submit(abs, -2).result(WAIT_SECONDS) == 2
            executor.shutdown()

        in_forked_child(child)
        gate.open()


def test_cancelled_calls_do_not_pile_up_behind_a_busy_worker(gate):
    with ProcessExecutor(1, "fork", max_pending=1) as executor:
        gate.fill(executor)
        for _ in range(1000):
            assert executor.submit(abs, 1).cancel()
        wait_until(lambda: executor.statistics().queued < 300)
        gate.open()
    assert assert_counts_add_up(executor).cancelled == 1000


def test_broken_executor_lets_nobody_wait():
    def submit():
        with pytest.raises(process_pool.BrokenProcessPool):
            executor.submit_many(abs, range(10))

    with ProcessExecutor(1, "fork", initializer=os._exit, initargs=(3,), max_pending=1) as executor:
        run_threads(submit, submit)


def test_ctrl_c_ends_the_wait_for_room(run_python):
    told = run_python("""
        import os, signal, threading
        from moirai.executor import ProcessExecutor
        told, tell = os.pipe()
        held, release = os.pipe()
        executor = ProcessExecutor(1, "fork", max_pending=1)
        executor.submit(os.read, held, 1)
        queued = 0
        main = threading.main_thread().ident
        room = executor._pool.backlog.room
        def interrupt():
            while not room._line:
                os.sched_yield()
            signal.pthread_kill(main, signal.SIGINT)
        threading.Thread(target=interrupt).start()
        try:
            while True:
                executor.submit(abs, 1)
        except KeyboardInterrupt:
            print("interrupted", len(room._line))
        os.write(release, b"x")
        executor.shutdown()
        print(executor.submit_group.__name__, room._taken)
    """)
    assert told.split() == ["interrupted", "0", "submit_group", "0"]


# === nodes ======================================================================================


def machine(*cpus_by_node):
    nodes = tuple(
        NumaNode(index, cpus, 1 << 30, MappingProxyType({}))
        for index, cpus in enumerate(cpus_by_node)
    )
    online = tuple(sorted(cpu for cpus in cpus_by_node for cpu in cpus))
    return Topology(nodes, online, (), online, tuple(range(len(cpus_by_node))))


def test_workers_of_a_recorded_machine_have_seats_at_its_nodes():
    seats = seats_of(Topology.read(MACHINES / "four-nodes"), 5, "auto")
    assert len(seats.node_ids) == 4
    assert [seat.place for seat in seats.workers] == [0, 1, 2, 3, 0]
    assert all(seat.cpus for seat in seats.workers)
    assert not any(seat.cpus for seat in seats_of(machine((0, 1)), 3, "auto").workers)
    assert {len(seat.cpus) for seat in seats_of(machine((0, 1)), 3, "core").workers} == {1}
    assert seats_of(machine((0, 1), (2,)), 2, "node").workers[0].cpus == (0, 1)


def test_call_for_a_node_without_a_worker_goes_to_the_nearest_that_has_one():
    seats = seats_of(Topology.read(MACHINES / "eight-nodes"), 2, None)
    assert seats.places == [0, 1]
    for node in seats.node_ids:
        assert seats.place_of(node) in (0, 1)
    assert seats.place_of(seats.node_ids[1]) == 1
    assert seats.place_of(None) is None


@pytest.mark.parametrize("node", [7, -1, True, "0"])
def test_node_without_workers_is_refused(node):
    with ProcessExecutor(2, "fork", topology=machine((0,), (1,)), affinity=None) as executor:
        message = r"node: must be one that has workers, of \[0, 1\], got"
        for call in (executor.submit, executor.submit_many, executor.map):
            with pytest.raises(errors.InvalidArgument, match=message):
                call(abs, [1], node=node)
        assert executor.statistics().submitted == 0


def start(executor):
    """Have all workers ready, so that none takes what another has not begun."""
    assert executor.submit(same, 1).result(WAIT_SECONDS) == 1
    workers = executor._pool.workers
    wait_until(lambda: all(worker.is_ready for worker in workers.values()))
    return {worker.place: worker.process.pid for worker in workers.values()}


def test_calls_for_a_node_are_run_by_its_worker_first(gate):
    # CPUs that are not there: nobody is kept on them.
    with ProcessExecutor(2, "fork", topology=machine((0,), (1,)), affinity=None) as executor:
        pids = start(executor)
        held = [gate.shut(executor, node=node) for node in (0, 1)]
        far = [executor.submit(os.getpid, node=1) for _ in range(CALLS_AT_WORKER + 2)]
        wait_until(far[CALLS_AT_WORKER - 2].running)
        # The worker of node 0 is not sent ahead what is for node 1.
        assert not any(future.running() for future in far[CALLS_AT_WORKER - 1 :])
        assert [worker.place for worker in executor._pool.workers.values() if worker.tasks] == [
            0,
            1,
        ]
        near = [executor.submit(os.getpid, node=0) for _ in range(CALLS_AT_WORKER - 1)]
        wait_until(near[-1].running)
        gate.open(2)
        assert [future.result(WAIT_SECONDS) for future in held] == [b"x"] * 2
        assert {future.result(WAIT_SECONDS) for future in far + near} <= set(pids.values())
    assert_counts_add_up(executor)


def test_idle_worker_takes_what_is_for_another_node(gate):
    with ProcessExecutor(2, "fork", topology=machine((0,), (1,)), affinity=None) as executor:
        pids = start(executor)
        held = gate.shut(executor, node=1)
        found = {executor.submit(os.getpid, node=1).result(WAIT_SECONDS) for _ in range(5)}
        assert found == {pids[0]}
        assert list(executor.map(same, range(20), node=1)) == list(range(20))
        gate.open()
        assert held.result(WAIT_SECONDS) == b"x"


def test_worker_is_started_at_the_node_that_a_call_is_for():
    with ProcessExecutor(3, "spawn", topology=machine((0,), (1,), (2,)), affinity=None) as executor:
        assert executor.submit(same, 1, node=2).result(WAIT_SECONDS) == 1
        assert [worker.place for worker in executor._pool.workers.values()] == [2]


def policy():
    """The policy of this process, where the kernel tells."""
    with open("/proc/self/numa_maps") as maps:
        return {line.split()[1] for line in maps}


def test_worker_stays_on_the_cpus_of_its_node_and_prefers_its_memory():
    node = Topology.read().nodes[0]
    with ProcessExecutor(1, "fork", affinity="node") as executor:
        cpus = executor.submit(os.sched_getaffinity, 0).result(WAIT_SECONDS)
        assert cpus == set(node.cpus) & os.sched_getaffinity(0)
        if os.path.exists("/proc/self/numa_maps"):
            assert f"prefer:{node.id}" in executor.submit(policy).result(WAIT_SECONDS)
            assert f"prefer:{node.id}" not in policy()
    with ProcessExecutor(1, "fork", affinity="core") as executor:
        assert len(executor.submit(os.sched_getaffinity, 0).result(WAIT_SECONDS)) == 1


def test_worker_that_cannot_stay_breaks_the_executor():
    with ProcessExecutor(1, "fork", topology=machine((4000,)), affinity="node") as executor:
        future = executor.submit(abs, 1)
        with pytest.raises(process_pool.BrokenProcessPool, match="initializer"):
            future.result(WAIT_SECONDS)


@given(
    st.lists(
        st.one_of(
            st.tuples(st.sampled_from(Priority), st.sampled_from([None, 0, 1, 2])),
            st.tuples(st.just("pop"), st.integers(0, 2), st.booleans()),
        )
    )
)
def test_lanes_of_nodes_lose_nothing_and_prefer_the_own_node(steps):
    order = [[0, 2, 1], [1, 2, 0], [2, 0, 1]]
    lanes, there = NodeLanes(order, [0, 1, 2]), {}
    for number, (what, where, *far) in enumerate(steps):
        if what == "pop":
            found = lanes.pop(where, from_others=far[0])
            have = [place for place in order[where] if place in there.values()]
            if not have or (have[0] != where and not far[0]):
                assert found is None
            else:
                assert there.pop(found) == have[0]
        else:
            there[number] = lanes.append(number, what, where)
            assert where in (None, there[number])
        assert len(lanes) == len(there) == sum(map(len, lanes.by_place))
    assert sorted(lanes) == sorted(there)
    assert sorted(lanes.clear()) == sorted(there)
    assert len(lanes) == 0


# === chosen by name =============================================================================


def test_program_with_limits_moves_to_processes_unchanged(monkeypatch):
    monkeypatch.setenv("MOIRAI_EXECUTOR", "processes")
    options = {"max_pending": 2, "when_full": "raise", "blas_threads": "auto", "affinity": "core"}
    with Executor(1, **options) as executor:
        assert isinstance(executor, ProcessExecutor)
        assert executor._pool.settings.max_pending == 2
        assert executor._pool.settings.when_full == "raise"
        assert len(executor.submit(os.sched_getaffinity, 0).result(WAIT_SECONDS)) == 1


# --- how many may run ---------------------------------------------------------------------------


def test_as_many_calls_run_as_are_allowed(gate):
    with ProcessExecutor(2) as executor:
        executor.allow(1)
        assert executor.allowed_count == 1
        first = gate.shut(executor)
        second = executor.submit(hold, gate._tell, gate._hold)
        wait_until(second.running)  # behind the first one
        assert executor.running_count == 1
        executor.allow(2)
        wait_until(lambda: executor.running_count == 2)
        gate.open(2)
        assert [first.result(WAIT_SECONDS), second.result(WAIT_SECONDS)] == [b"x", b"x"]


def test_what_a_worker_has_not_begun_when_fewer_are_allowed_another_one_runs(gate):
    with ProcessExecutor(2) as executor:
        held = [gate.shut(executor), gate.shut(executor)]
        rest = [executor.submit(abs, number) for number in range(4)]  # two behind each
        wait_until(lambda: all(future.running() for future in rest))
        executor.allow(1)
        gate.open(2)
        assert [future.result(WAIT_SECONDS) for future in rest] == [0, 1, 2, 3]
        assert [future.result(WAIT_SECONDS) for future in held] == [b"x", b"x"]
        assert_counts_add_up(executor)


@pytest.mark.parametrize("count", [0, 3, -1])
def test_at_least_one_call_may_run_and_at_most_one_a_worker(count):
    with (
        ProcessExecutor(2) as executor,
        pytest.raises(
            errors.InvalidArgument, match=f"task_count: must be from 1 to 2, got {count}"
        ),
    ):
        executor.allow(count)
