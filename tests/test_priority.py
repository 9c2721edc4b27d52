"""Real-time memory, lanes, and the context that chooses among them."""

import asyncio
import contextvars
import gc
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from moirai import memory
from moirai.errors import InvalidArgument, OutOfMemory
from moirai.memory import Priority, priority

KIB = 1 << 10
MIB = 1 << 20

RunPython = Callable[..., str]
LANES = list(Priority)


@pytest.fixture
def lanes() -> memory.PriorityResource:
    return memory.PriorityResource(realtime_bytes="4 MiB", allow_unlocked=True)


def in_use(resource: memory.PriorityResource) -> list[int]:
    return [resource.lane(lane).statistics().current_count for lane in LANES]


def lane_of(resource: memory.PriorityResource, make: Callable[[], object]) -> Priority:
    """The lane that what `make` makes came from."""
    before = in_use(resource)
    made = make()
    (index,) = [i for i, count in enumerate(in_use(resource)) if count != before[i]]
    del made
    return Priority(index)


# --- real-time memory ---------------------------------------------------------------------------


def test_realtime_memory_is_used_up_and_then_refused() -> None:
    resource = memory.RealtimeResource("1 MiB", allow_unlocked=True)
    assert resource.capacity_bytes == MIB
    buffers = [resource.allocate(256 * KIB) for _ in range(4)]
    with pytest.raises(OutOfMemory, match=rf"64 bytes: 0 of {MIB} bytes are free.*none come from"):
        resource.allocate(64)
    with pytest.raises(OutOfMemory):
        resource.allocate(2 * MIB)
    del buffers[1:3]
    buffers.append(resource.allocate(512 * KIB))  # neighbours merged
    now = resource.statistics()
    assert (now.current_bytes, now.peak_bytes, now.misses) == (MIB, MIB, 0)
    assert now.resident_bytes >= MIB * 19 // 16  # with its tables
    assert (now.cached_bytes, resource.trim()) == (0, 0)
    assert resource.check().ok


def test_a_block_may_be_aligned_and_fill_all_of_it() -> None:
    resource = memory.RealtimeResource(2 * MIB, allow_unlocked=True)
    buffer = resource.allocate(2 * MIB, alignment_bytes=2 * MIB, zeroed=True)
    assert not buffer.numpy().any()


@pytest.mark.parametrize("size", [0, -1, "none", 1 << 40, None, 1.5])
def test_a_realtime_size_that_cannot_be_is_refused_by_name(size: object) -> None:
    with pytest.raises((InvalidArgument, TypeError), match="realtime_bytes"):
        memory.RealtimeResource(size, allow_unlocked=True)  # type: ignore[arg-type]
    with pytest.raises((InvalidArgument, TypeError), match="realtime_bytes"):
        memory.PriorityResource(realtime_bytes=size, allow_unlocked=True)  # type: ignore[arg-type]


def test_realtime_work_takes_no_page_fault(run_python: RunPython) -> None:
    """Counted, not timed: 10^5 blocks of 64 B to 300 KB, each filled, and not one minor fault.

    In a process of its own, because pages of Python's heap that a fork has shared fault when they
    are next written to. Python's own objects may fault all the same, so one of three tries counts.
    """
    run_python("""
        import gc, resource as limits
        from moirai import memory

        KIB = 1024
        resource = memory.RealtimeResource("16 MiB", allow_unlocked=True)
        sizes = [1 * KIB, 2 * KIB, 4 * KIB, 20 * KIB, 100 * KIB, 300 * KIB]
        kept = [None] * 32
        source = memoryview(bytes(300 * KIB))

        def faults(turns):
            before = limits.getrusage(limits.RUSAGE_THREAD).ru_minflt
            for turn in range(turns):
                size = 64 if turn % 2 else sizes[turn * 7 % 6]
                buffer = resource.allocate(size)
                with memoryview(buffer) as view:
                    view[:] = source[:size]
                kept[turn % 32] = buffer
            return limits.getrusage(limits.RUSAGE_THREAD).ru_minflt - before

        gc.disable()
        faults(5_000)  # Python's own objects have their places from here on
        counts = []
        while 0 not in counts and len(counts) < 3:
            counts.append(faults(100_000))
        assert 0 in counts, counts
        assert resource.statistics().misses == 0
        kept.clear()
    """)


WITHOUT_THE_RIGHT_TO_LOCK = """
    import ctypes, os, resource, struct
    from moirai import errors, memory

    # Privileged processes may lock any amount: give the privilege (CAP_IPC_LOCK) up.
    libc = ctypes.CDLL(None, use_errno=True)
    header = struct.pack("Ii", 0x20080522, 0)
    data = ctypes.create_string_buffer(24)
    assert libc.capget(header, data) == 0
    words = list(struct.unpack("6I", data.raw))
    words[0] &= ~(1 << 14)
    assert libc.capset(header, struct.pack("6I", *words)) == 0
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, 65536))
"""


def test_without_the_right_to_lock_it_says_how_to_get_it(run_python: RunPython) -> None:
    out = run_python(
        WITHOUT_THE_RIGHT_TO_LOCK
        + """
    try:
        memory.PriorityResource(realtime_bytes="8 MiB")
    except errors.Unsupported as error:
        print(error)
    unlocked = memory.PriorityResource(realtime_bytes="8 MiB", allow_unlocked=True)
    assert not unlocked.is_locked
    buffer = unlocked.allocate(1 << 20, priority=memory.Priority.REALTIME)
    assert None not in memory.pages_by_node(buffer), "it is prefaulted all the same"
    small = memory.RealtimeResource(16384)
    assert small.is_locked, "what the limit allows is locked"
    """
    )
    assert "realtime_bytes: locking 99" in out  # 8 MiB and tables of 1.5
    assert "this process may lock 65536 bytes (RLIMIT_MEMLOCK)" in out
    assert "`ulimit -l 97" in out
    assert "allow_unlocked=True" in out


def test_locked_memory_is_counted_by_the_kernel_and_a_child_has_it_unlocked(
    run_python: RunPython,
) -> None:
    out = run_python("""
        import os
        from moirai import errors, memory

        def locked_kib():
            with open("/proc/self/status") as status:
                return next(int(line.split()[1]) for line in status if line.startswith("VmLck"))

        before = locked_kib()
        try:
            resource = memory.RealtimeResource("2 MiB")
        except errors.Unsupported:
            print("not allowed")
            raise SystemExit
        assert resource.is_locked
        assert locked_kib() - before >= 2048
        buffer = resource.allocate(100)
        memoryview(buffer)[:] = b"x" * 100
        child = os.fork()
        if child == 0:
            good = not resource.is_locked and bytes(buffer) == b"x" * 100
            del buffer
            good = good and resource.allocate(1 << 20) and resource.check().ok
            os._exit(0 if good else 3)
        assert os.waitpid(child, 0)[1] == 0
        assert resource.is_locked
        del buffer, resource
        assert locked_kib() == before
        print("locked")
    """)
    if out.strip() == "not allowed":
        pytest.skip("this process must not lock 2 MiB")


# --- lanes --------------------------------------------------------------------------------------


def test_a_request_goes_to_the_lane_it_names(lanes: memory.PriorityResource) -> None:
    for lane in LANES:
        assert lane_of(lanes, lambda lane=lane: lanes.allocate(1000, priority=lane)) is lane  # type: ignore[misc]
        assert lane_of(lanes, lambda lane=lane: lanes.allocate_group([64], priority=lane)) is lane  # type: ignore[misc]
    assert lane_of(lanes, lambda: lanes.allocate(1000)) is Priority.NORMAL
    assert in_use(lanes) == [0, 0, 0, 0]
    assert lanes.statistics().total_count == 9


def test_the_context_chooses_where_the_request_does_not(lanes: memory.PriorityResource) -> None:
    def draw() -> memory.Buffer:
        return lanes.allocate(1000)

    with priority(Priority.HIGH):
        assert memory.current_priority() is Priority.HIGH
        assert lane_of(lanes, draw) is Priority.HIGH
        with priority(Priority.BACKGROUND):
            assert lane_of(lanes, draw) is Priority.BACKGROUND
            named = lane_of(lanes, lambda: lanes.allocate(10, priority=Priority.REALTIME))
            assert named is Priority.REALTIME
        assert lane_of(lanes, draw) is Priority.HIGH
    assert memory.current_priority() is Priority.NORMAL
    assert lane_of(lanes, draw) is Priority.NORMAL


def test_the_realtime_lane_never_falls_back(lanes: memory.PriorityResource) -> None:
    with priority(Priority.REALTIME), pytest.raises(OutOfMemory, match="none come from elsewhere"):
        lanes.allocate(5 * MIB)
    assert lanes.statistics().total_count == 0


def test_lanes_are_what_was_given() -> None:
    high, normal = memory.LargeObjectResource(), memory.PoolResource()
    background = memory.LimitAdaptor(memory.SystemResource(), limit_bytes="1 MiB")
    resource = memory.PriorityResource(
        realtime_bytes=4096, high=high, normal=normal, background=background, allow_unlocked=True
    )
    assert resource.lane(Priority.HIGH) is high
    assert resource.lane(Priority.NORMAL) is normal
    assert resource.lane(Priority.BACKGROUND) is background
    realtime = resource.lane(Priority.REALTIME)
    assert isinstance(realtime, memory.RealtimeResource)
    assert realtime.is_locked is resource.is_locked
    with pytest.raises(OutOfMemory):
        resource.allocate(2 * MIB, priority=Priority.BACKGROUND)
    del resource
    assert high.allocate(MIB).size_bytes == MIB


def test_statistics_are_the_sum_of_the_lanes(lanes: memory.PriorityResource) -> None:
    buffers = [
        lanes.allocate(size, priority=lane) for lane in LANES for size in (100, 5000, 300 * KIB)
    ]
    total = lanes.statistics().as_dict()
    parts = [lanes.lane(lane).statistics().as_dict() for lane in LANES]
    assert total == {name: sum(part[name] for part in parts) for name in total}
    assert total["current_count"] == 12
    assert total["current_bytes"] == sum(buffer.block_bytes for buffer in buffers)
    del buffers
    assert in_use(lanes) == [0, 0, 0, 0]
    assert lanes.check().ok


def test_lanes_that_share_a_resource_are_refused_by_name() -> None:
    pool = memory.PoolResource()
    with pytest.raises(InvalidArgument, match="normal: must draw from a resource of its own, got "):
        memory.PriorityResource(
            realtime_bytes=4096,
            high=pool,
            normal=memory.StatisticsAdaptor(pool),
            allow_unlocked=True,
        )


@pytest.mark.parametrize("wrong", [7, -1, None, "HIGH", 1.0, 1])
def test_what_is_no_priority_is_refused_by_name(
    wrong: object, lanes: memory.PriorityResource
) -> None:
    with pytest.raises(InvalidArgument, match=f"priority: must be a Priority, got {wrong!r}"):
        priority(wrong)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="priority: must be a Priority"):
        lanes.lane(wrong)  # type: ignore[arg-type]
    if wrong not in (None, 1):
        with pytest.raises(InvalidArgument, match="priority: must be a Priority, got"):
            lanes.allocate(64, priority=wrong)  # type: ignore[arg-type]
    assert lanes.statistics().total_count == 0


def test_a_resource_without_lanes_has_no_use_for_a_priority() -> None:
    pool = memory.PoolResource()
    with pytest.raises(InvalidArgument, match="priority: must be left out, got one for a Pool"):
        pool.allocate(64, priority=Priority.HIGH)
    with priority(Priority.HIGH):
        assert pool.allocate(64).size_bytes == 64


# --- through adaptors ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrap",
    [
        memory.StatisticsAdaptor,
        lambda upstream: memory.LimitAdaptor(upstream, limit_bytes="1 GiB"),
        lambda upstream: memory.StatisticsAdaptor(
            memory.LimitAdaptor(upstream, limit_bytes="1 GiB")
        ),
    ],
    ids=["statistics", "limit", "statistics over limit"],
)
def test_adaptors_pass_the_choice_on(
    wrap: Callable[[memory.Resource], memory.Resource], lanes: memory.PriorityResource
) -> None:
    stack = wrap(lanes)
    for lane in LANES:
        assert lane_of(lanes, lambda lane=lane: stack.allocate(64, priority=lane)) is lane  # type: ignore[misc]
        with priority(lane):
            assert lane_of(lanes, lambda: stack.allocate(64)) is lane
            with memory.use(stack):
                assert lane_of(lanes, lambda: np.ones(100)) is lane
    assert stack.statistics().current_count == 0


# --- NumPy --------------------------------------------------------------------------------------


def array() -> np.ndarray:
    return np.ones(2000)


def test_arrays_follow_the_lane_whichever_is_entered_first(
    lanes: memory.PriorityResource,
) -> None:
    with memory.use(lanes):
        assert lane_of(lanes, array) is Priority.NORMAL
        with priority(Priority.REALTIME):
            assert lane_of(lanes, array) is Priority.REALTIME
            assert memory.handler_of(array()) is lanes
            with priority(Priority.HIGH):
                assert lane_of(lanes, array) is Priority.HIGH
            assert lane_of(lanes, array) is Priority.REALTIME
        assert lane_of(lanes, array) is Priority.NORMAL
    with priority(Priority.BACKGROUND), memory.use(lanes):
        assert lane_of(lanes, array) is Priority.BACKGROUND
        assert lane_of(lanes, lambda: np.zeros(2000)) is Priority.BACKGROUND
    assert memory.handler_of(array()) is None


def test_a_use_object_serves_every_lane_and_may_be_entered_again(
    lanes: memory.PriorityResource,
) -> None:
    scope = memory.use(lanes)
    for lane in [*LANES, *LANES]:
        with priority(lane), scope:
            assert lane_of(lanes, array) is lane


def test_an_array_stays_in_its_lane_when_it_is_resized_and_outlives_the_scope(
    lanes: memory.PriorityResource,
) -> None:
    with memory.use(lanes), priority(Priority.REALTIME):
        grown = np.arange(1000)
        kept = np.full(100, 7)
    grown.resize(50_000, refcheck=False)
    assert in_use(lanes) == [2, 0, 0, 0]
    assert grown[:1000].tolist() == list(range(1000))
    del grown
    handle = lanes.lane(Priority.REALTIME)
    del lanes
    gc.collect()
    assert kept.sum() == 700
    assert handle.statistics().current_count == 1
    del kept
    assert handle.statistics().current_count == 0


def test_a_lane_changes_nothing_for_arrays_of_others(lanes: memory.PriorityResource) -> None:
    pool = memory.PoolResource()
    with priority(Priority.HIGH):
        assert memory.handler_of(array()) is None
        with memory.use(pool), priority(Priority.REALTIME):
            assert memory.handler_of(array()) is pool
    assert lanes.statistics().total_count == 0


def test_running_out_of_realtime_memory_is_numpys_memory_error(
    lanes: memory.PriorityResource,
) -> None:
    with memory.use(lanes), priority(Priority.REALTIME), pytest.raises(MemoryError):
        np.empty(5 * MIB, dtype="uint8")


def test_an_installed_resource_is_steered_too(run_python: RunPython) -> None:
    run_python("""
        import threading
        import numpy as np
        from moirai import memory
        from moirai.memory import Priority, priority

        lanes = memory.PriorityResource(realtime_bytes="4 MiB", allow_unlocked=True)
        memory.install(lanes)

        def lane_of_array():
            before = [lanes.lane(lane).statistics().total_count for lane in Priority]
            made = np.ones(2000)
            assert memory.handler_of(made) is lanes
            after = [lanes.lane(lane).statistics().total_count for lane in Priority]
            (index,) = [i for i in range(4) if after[i] != before[i]]
            return Priority(index)

        assert lane_of_array() is Priority.NORMAL
        with priority(Priority.REALTIME):
            assert lane_of_array() is Priority.REALTIME
            found = []
            thread = threading.Thread(target=lambda: found.append(lane_of_array()))
            thread.start()
            thread.join()
            kept = np.ones(2000)
        assert found in ([Priority.NORMAL], [Priority.REALTIME]), found  # as threads inherit or not
        assert lane_of_array() is Priority.NORMAL
        memory.uninstall()
        kept += 1
        del kept
        assert lanes.lane(Priority.REALTIME).statistics().current_count == 0
        assert memory.health().ok
    """)


# --- contexts -----------------------------------------------------------------------------------


def test_tasks_that_take_turns_on_a_thread_keep_their_lanes(
    lanes: memory.PriorityResource,
) -> None:
    async def work(lane: Priority, turns: int) -> list[Priority]:
        seen = []
        with priority(lane):
            for _ in range(turns):
                await asyncio.sleep(0)  # the other tasks run here, in their lanes
                seen += [lane_of(lanes, array), lane_of(lanes, lambda: lanes.allocate(64))]
                seen.append(memory.current_priority())
        await asyncio.sleep(0)
        assert memory.current_priority() is Priority.NORMAL
        assert lane_of(lanes, array) is Priority.NORMAL
        return seen

    async def main() -> None:
        with memory.use(lanes):
            tasks = [asyncio.create_task(work(lane, 20)) for lane in LANES]
            for lane, seen in zip(LANES, await asyncio.gather(*tasks), strict=True):
                assert set(seen) == {lane}

    asyncio.run(main())
    assert in_use(lanes) == [0, 0, 0, 0]


def test_a_task_and_a_thread_of_a_task_inherit_the_lane(lanes: memory.PriorityResource) -> None:
    async def child() -> Priority:
        return lane_of(lanes, array)

    async def main() -> None:
        with memory.use(lanes), priority(Priority.HIGH):
            task = asyncio.create_task(child())
            in_thread = await asyncio.to_thread(lane_of, lanes, array)
        assert await task is Priority.HIGH
        assert in_thread is Priority.HIGH
        assert memory.current_priority() is Priority.NORMAL

    asyncio.run(main())


def test_threads_have_lanes_of_their_own(lanes: memory.PriorityResource) -> None:
    """Counted by lane, since the threads draw at once."""
    turns = 500
    start = threading.Barrier(len(LANES))

    def work(lane: Priority) -> None:
        with priority(lane), memory.use(lanes):
            start.wait()
            for _ in range(turns):
                np.empty(1000)
                lanes.allocate(64)

    with ThreadPoolExecutor(len(LANES)) as pool:
        list(pool.map(work, LANES))
    totals = [lanes.lane(lane).statistics().total_count for lane in LANES]
    assert totals == [2 * turns] * 4
    assert memory.current_priority() is Priority.NORMAL


def test_a_scope_is_left_in_the_context_that_entered_it() -> None:
    scope = priority(Priority.HIGH)
    with scope, scope:
        assert memory.current_priority() is Priority.HIGH
    other = contextvars.Context()
    other.run(scope.__enter__)
    with pytest.raises(RuntimeError, match="priority: must be left in the context"):
        scope.__exit__(None, None, None)
    assert other.run(memory.current_priority) is Priority.HIGH
    other.run(scope.__exit__, None, None, None)
    with pytest.raises(RuntimeError, match="priority: left more often than entered"):
        scope.__exit__(None, None, None)


def test_threads_may_share_a_scope_and_leave_it_at_the_same_time(
    lanes: memory.PriorityResource,
) -> None:
    scope, serve = priority(Priority.HIGH), memory.use(lanes)

    def work() -> None:
        for _ in range(300):
            with serve, scope:
                np.empty(100)
            assert memory.current_priority() is Priority.NORMAL

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(work) for _ in range(4)]:
            done.result()
    assert lanes.lane(Priority.HIGH).statistics().total_count == 1200


def test_a_lane_ends_with_its_scope_also_by_an_exception() -> None:
    with pytest.raises(KeyError), priority(Priority.REALTIME):
        raise KeyError
    assert memory.current_priority() is Priority.NORMAL


def test_priority_needs_no_numpy(run_python: RunPython) -> None:
    run_python("""
        import sys
        from moirai import memory
        from moirai.memory import Priority, priority

        lanes = memory.PriorityResource(realtime_bytes=4096, allow_unlocked=True)
        with priority(Priority.REALTIME):
            lanes.allocate(64)
            assert lanes.lane(Priority.REALTIME).statistics().total_count == 1
        assert "numpy" not in sys.modules
    """)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_forked_child_goes_on_in_its_lane(lanes: memory.PriorityResource) -> None:
    with memory.use(lanes), priority(Priority.REALTIME):
        kept = np.full(1000, 3.0)
        child = os.fork()
        if child == 0:
            good = False
            try:
                made = array()
                good = kept.sum() == 3000 and in_use(lanes) == [2, 0, 0, 0] and made.sum() == 2000
                del kept, made
                good = good and in_use(lanes) == [0, 0, 0, 0] and lanes.check().ok
            finally:
                os._exit(0 if good else 3)
        assert os.waitpid(child, 0)[1] == 0
    assert in_use(lanes) == [1, 0, 0, 0]
