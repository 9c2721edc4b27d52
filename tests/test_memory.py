"""What each kind of resource and adaptor adds to the contract that all share."""

import asyncio
import gc
import platform
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from textwrap import dedent

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from running import wait_until

from moirai import memory
from moirai.errors import InvalidArgument, OutOfMemory

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30

RunPython = Callable[..., str]


def touch(buffer: memory.Buffer) -> memory.Buffer:
    np.frombuffer(buffer, dtype="uint8")[:] = 1
    return buffer


@contextmanager
def collector_off() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


# --- sizes in words -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("0", 0),
        ("512", 512),
        ("512B", 512),
        ("1 KiB", KIB),
        ("64MiB", 64 * MIB),
        ("2 GiB", 2 * GIB),
        ("2 gib", 2 * GIB),
        (" 2  GiB ", 2 * GIB),
        ("1.5 GiB", 3 * GIB // 2),
        ("1 KB", 1000),
        ("1 MB", 10**6),
        ("1 GB", 10**9),
        (4096, 4096),
        (0, 0),
    ],
)
def test_size_in_words_is_bytes(text: str | int, size_bytes: int) -> None:
    assert memory.parse_bytes(text) == size_bytes


@given(count=st.integers(0, 1 << 20), unit=st.sampled_from([("KiB", 10), ("MiB", 20), ("GiB", 30)]))
def test_binary_units_are_powers_of_two(count: int, unit: tuple[str, int]) -> None:
    name, power = unit
    assert memory.parse_bytes(f"{count} {name}") == count << power


@pytest.mark.parametrize("letter", "KMG")
def test_single_letter_is_the_binary_unit_as_in_ulimit_and_cgroups(letter: str) -> None:
    assert memory.parse_bytes(f"3{letter}") == memory.parse_bytes(f"3{letter}iB")


@pytest.mark.parametrize(
    "text",
    [
        *["", " ", "GiB", "two GiB", "2 XiB", "-1", -1, "1 2 MiB", "nan", "inf", "1e400 GiB"],
        *["9" * 400 + ".5 GiB", "9" * 5000],
    ],
    ids=lambda text: repr(text)[:12],
)
def test_size_that_is_none_is_refused_with_what_came(text: str | int) -> None:
    with pytest.raises(InvalidArgument, match=r".") as caught:
        memory.parse_bytes(text)
    assert str(text) in str(caught.value)


@pytest.mark.parametrize("value", [None, 1.5, b"1 MiB", [1]])
def test_size_of_another_type_is_refused(value: object) -> None:
    with pytest.raises((InvalidArgument, TypeError)):
        memory.parse_bytes(value)  # type: ignore[arg-type]


# --- statistics by scope ------------------------------------------------------------------------


def test_scope_sees_only_what_happens_inside_it() -> None:
    stats = memory.StatisticsAdaptor(memory.LargeObjectResource())
    before = stats.allocate(64 * KIB)
    with stats.scope("load") as load:
        first = stats.allocate(256 * KIB)
        del first
        second = stats.allocate(128 * KIB)
    after = stats.allocate(512 * KIB)

    assert load.name == "load"
    assert load.total_count == 2
    assert load.total_bytes == 384 * KIB
    assert load.peak_bytes == 256 * KIB
    assert load.current_bytes == 128 * KIB
    del before, second, after


def test_outer_scope_includes_the_inner_one() -> None:
    stats = memory.StatisticsAdaptor(memory.LargeObjectResource())
    with stats.scope("outer") as outer:
        first = stats.allocate(64 * KIB)
        with stats.scope("inner") as inner:
            second = stats.allocate(128 * KIB)
    assert (inner.total_bytes, inner.peak_bytes) == (128 * KIB, 128 * KIB)
    assert (outer.total_bytes, outer.peak_bytes) == (192 * KIB, 192 * KIB)
    del first, second


def test_scopes_may_overlap_without_nesting() -> None:
    stats = memory.StatisticsAdaptor(memory.LargeObjectResource())
    early, late = stats.scope("early"), stats.scope("late")
    with_early = early.__enter__()
    first = stats.allocate(64 * KIB)
    with_late = late.__enter__()
    second = stats.allocate(128 * KIB)
    early.__exit__(None, None, None)
    third = stats.allocate(256 * KIB)
    late.__exit__(None, None, None)

    assert with_early.total_bytes == 192 * KIB
    assert with_late.total_bytes == 384 * KIB
    del first, second, third


def test_scope_closes_when_its_body_raises() -> None:
    stats = memory.StatisticsAdaptor(memory.LargeObjectResource())
    scope = stats.scope("load")

    def fail() -> None:
        with scope:
            stats.allocate(64 * KIB)
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        fail()
    stats.allocate(128 * KIB)
    assert scope.total_bytes == 64 * KIB


def test_scope_counts_what_every_thread_draws_while_it_is_open() -> None:
    stats = memory.StatisticsAdaptor(memory.PoolResource())
    barrier = threading.Barrier(3)
    seen: dict[int, memory.Scope] = {}

    def work(count: int) -> None:
        barrier.wait()
        with stats.scope(f"thread {count}") as scope:
            for _ in range(count):
                stats.allocate(64 * KIB)
        seen[count] = scope

    with stats.scope("all") as everything:
        threads = [threading.Thread(target=work, args=(count,)) for count in (100, 200, 300)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    assert everything.total_count == stats.statistics().total_count == 600
    assert everything.current_bytes == stats.statistics().current_bytes == 0
    # A thread's own scope sees its own blocks, and the others' that pass meanwhile.
    assert all(count <= scope.total_count <= 600 for count, scope in seen.items())


def test_scope_may_be_entered_once() -> None:
    scope = memory.StatisticsAdaptor(memory.SystemResource()).scope("load")
    with scope:
        pass
    with pytest.raises(InvalidArgument, match="load"), scope:
        pass


def test_report_lists_scopes_by_peak_largest_first() -> None:
    stats = memory.StatisticsAdaptor(memory.LargeObjectResource())
    for name, size in [("small", 64 * KIB), ("largest", 4 * MIB), ("middle", 1 * MIB)]:
        with stats.scope(name):
            stats.allocate(size)

    report = stats.report()

    assert report.index("largest") < report.index("middle") < report.index("small")
    assert [record.name for record in stats.records()] == ["largest", "middle", "small"]


def test_profile_records_each_function_under_its_name() -> None:
    stats = memory.StatisticsAdaptor(memory.LargeObjectResource())

    @stats.profile
    def load(count: int, *, size: int = 64 * KIB) -> int:
        """Load something."""
        buffers = [stats.allocate(size) for _ in range(count)]
        return len(buffers)

    @stats.profile
    def fail() -> None:
        stats.allocate(1 * MIB)
        raise KeyError("mine")

    assert [load(1), load(3), load(2, size=128 * KIB)] == [1, 3, 2]
    assert load.__name__ == "load"
    assert load.__doc__ == "Load something."
    with pytest.raises(KeyError, match="mine"):
        fail()

    records = {record.name.rpartition(".")[2]: record for record in stats.records()}
    assert records["load"].total_bytes == (1 + 3 + 4) * 64 * KIB
    assert records["load"].total_count == 6
    assert records["load"].peak_bytes == 4 * 64 * KIB
    assert records["fail"].peak_bytes == 1 * MIB
    report = stats.report()
    assert report.index("fail") < report.index("load")


def test_report_of_an_unused_adaptor_says_so_without_failing() -> None:
    stats = memory.StatisticsAdaptor(memory.LargeObjectResource())
    assert isinstance(stats.report(), str)
    assert list(stats.records()) == []


# --- limits -------------------------------------------------------------------------------------


def test_limit_is_met_exactly_and_never_exceeded() -> None:
    limited = memory.LimitAdaptor(memory.LargeObjectResource(), limit_bytes="1 MiB")
    buffers = [limited.allocate(64 * KIB) for _ in range(16)]
    assert limited.statistics().current_bytes == 1 * MIB
    with pytest.raises(OutOfMemory):
        limited.allocate(1)
    buffers.pop()
    buffers.append(limited.allocate(64 * KIB))
    assert limited.statistics().peak_bytes == 1 * MIB
    assert limited.check().ok


@pytest.mark.parametrize(
    "upstream",
    [memory.SystemResource, memory.SlabResource, memory.LargeObjectResource, memory.PoolResource],
)
def test_refusal_names_request_use_and_limit(upstream: Callable[[], memory.Resource]) -> None:
    limited = memory.LimitAdaptor(upstream(), limit_bytes=1 * MIB)
    kept = limited.allocate(512 * KIB)
    in_use = limited.statistics().current_bytes
    with pytest.raises(OutOfMemory) as caught:
        limited.allocate(800_000)
    message = str(caught.value)
    for number in (800_000, in_use, 1 * MIB):
        assert str(number) in message, message
    now = limited.statistics()
    assert (now.current_count, now.current_bytes) == (1, in_use)
    assert limited.upstream.statistics().current_count == 1
    del kept


def test_limit_trims_caches_before_it_refuses() -> None:
    pool = memory.PoolResource(decay_seconds=None)
    limited = memory.LimitAdaptor(pool, limit_bytes="32 MiB")
    kept = limited.allocate(16 * MIB)
    touch(limited.allocate(8 * MIB))
    assert pool.statistics().cached_bytes >= 8 * MIB
    with pytest.raises(OutOfMemory):
        limited.allocate(20 * MIB)
    assert pool.statistics().cached_bytes < 1 * MIB
    del kept


def test_limit_collects_cycles_before_it_refuses() -> None:
    class Node:
        def __init__(self, buffer: memory.Buffer) -> None:
            self.buffer = buffer
            self.me = self

    limited = memory.LimitAdaptor(memory.PoolResource(), limit_bytes="24 MiB")
    with collector_off():
        Node(limited.allocate(16 * MIB))
        assert limited.statistics().current_bytes >= 16 * MIB
        buffer = limited.allocate(20 * MIB)
    assert limited.statistics().current_count == 1
    del buffer


def test_limit_collects_cycles_for_numpy_too() -> None:
    limited = memory.LimitAdaptor(memory.PoolResource(), limit_bytes="24 MiB")
    with collector_off(), memory.use(limited):
        cycle: list[object] = [np.empty(16 * MIB, dtype="uint8")]
        cycle.append(cycle)
        del cycle
        array = np.empty(20 * MIB, dtype="uint8")
        with pytest.raises(MemoryError):
            np.empty(8 * MIB, dtype="uint8")
    assert array.nbytes == 20 * MIB


def test_threads_together_never_exceed_the_limit() -> None:
    limit_bytes = 1 * MIB
    limited = memory.LimitAdaptor(memory.PoolResource(), limit_bytes=limit_bytes)
    served, refused = [0] * 4, [0] * 4

    def work(index: int) -> None:
        kept: list[memory.Buffer] = []
        for turn in range(400):
            try:
                kept.append(limited.allocate(16 * KIB + turn))
                served[index] += 1
            except OutOfMemory:
                refused[index] += 1
                kept.clear()
            assert limited.statistics().current_bytes <= limit_bytes

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    now = limited.statistics()
    assert now.peak_bytes <= limit_bytes
    assert (now.current_bytes, now.current_count) == (0, 0)
    assert now.total_count == sum(served)
    assert sum(refused) > 0


@pytest.mark.parametrize("limit_bytes", [-1, "many", "-1 MiB", None, 1.5])
def test_limit_that_is_none_is_refused_by_name(limit_bytes: object) -> None:
    with pytest.raises((InvalidArgument, TypeError), match="limit_bytes"):
        memory.LimitAdaptor(memory.SystemResource(), limit_bytes=limit_bytes)  # type: ignore[arg-type]


def test_limit_admits_a_group_whole_or_refuses_it_whole() -> None:
    limited = memory.LimitAdaptor(memory.LargeObjectResource(), limit_bytes="1 MiB")
    group = limited.allocate_group([256 * KIB] * 4)
    assert limited.statistics().current_bytes == 1 * MIB
    del group[2:]
    with pytest.raises(OutOfMemory, match=rf"{768 * KIB} bytes.*{512 * KIB} bytes.*{1 * MIB}"):
        limited.allocate_group([256 * KIB] * 3)
    now = limited.statistics()
    assert (now.current_count, now.total_count, now.peak_bytes) == (2, 4, 1 * MIB)
    group += limited.allocate_group([256 * KIB] * 2)
    assert limited.check().ok


@pytest.mark.parametrize(
    "make",
    [
        lambda: memory.LimitAdaptor(memory.PoolResource(), limit_bytes=900 * KIB),
        lambda: memory.StatisticsAdaptor(
            memory.LimitAdaptor(memory.LargeObjectResource(), limit_bytes=900 * KIB)
        ),
        lambda: memory.SlabResource(
            memory.LimitAdaptor(memory.LargeObjectResource(), limit_bytes=900 * KIB)
        ),
    ],
    ids=["limit over pool", "statistics over limit", "slab over limit"],
)
def test_of_groups_that_do_not_all_fit_one_gets_its_memory(
    make: Callable[[], memory.Resource],
) -> None:
    resource = make()
    rounds = 30
    start, end = threading.Barrier(3), threading.Barrier(3)
    granted: list[int] = []

    def ask() -> None:
        for _ in range(rounds):
            start.wait()
            group = None
            with suppress(OutOfMemory):
                group = resource.allocate_group([24 * KIB] * 25)
                granted.append(len(group))
            end.wait()
            # By the thread that made them: without a GIL, another one's drop may take effect later.
            del group

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    counts = []
    for _ in range(rounds):
        start.wait()
        end.wait()
        counts.append(len(granted))
        granted.clear()
    for thread in threads:
        thread.join()
    # Taken one by one, each might hold a part that the other lacks.
    assert counts == [1] * rounds
    assert resource.statistics().current_count == 0
    assert resource.check().ok


# --- large objects ------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [memory.LargeObjectResource, memory.PoolResource])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("huge_pages", "sometimes"),
        ("huge_pages", 1),
        ("cache_cap_bytes", -1),
        ("cache_cap_bytes", "lots"),
        ("decay_seconds", -0.5),
        ("decay_seconds", float("nan")),
        ("decay_seconds", "soon"),
    ],
)
def test_option_out_of_range_is_refused_by_name(
    make: Callable[..., memory.Resource], name: str, value: object
) -> None:
    with pytest.raises((InvalidArgument, TypeError), match=name):
        make(**{name: value})


def test_unknown_fit_is_refused_with_the_choices() -> None:
    with pytest.raises(InvalidArgument, match=r"fit.*best.*first.*worst.*tight"):
        memory.LargeObjectResource(fit="tight")  # type: ignore[arg-type]


@pytest.mark.parametrize("fit", ["best", "first", "worst"])
def test_neighbours_coalesce_into_room_for_a_larger_block(fit: str) -> None:
    resource = memory.LargeObjectResource(fit=fit, decay_seconds=None)  # type: ignore[arg-type]
    buffers = [touch(resource.allocate(256 * KIB)) for _ in range(64)]
    resident_bytes = resource.statistics().resident_bytes
    for index in [*range(0, 64, 2), *range(1, 64, 2)]:
        buffers[index] = None  # type: ignore[call-overload]
    large = touch(resource.allocate(8 * MIB))
    assert resource.statistics().resident_bytes <= resident_bytes
    assert resource.check().ok
    del large


def test_best_fit_leaves_the_larger_hole_whole() -> None:
    resource = memory.LargeObjectResource(fit="best", decay_seconds=None)
    held = [touch(resource.allocate(size)) for size in (1 * MIB, 64 * KIB, 512 * KIB, 64 * KIB)]
    resident_bytes = resource.statistics().resident_bytes
    held[2] = held[0] = None  # type: ignore[call-overload]
    small = touch(resource.allocate(512 * KIB))
    large = touch(resource.allocate(1 * MIB))
    assert resource.statistics().resident_bytes <= resident_bytes
    del small, large


def test_a_refused_request_holds_no_address_space() -> None:
    import psutil

    resource = memory.LargeObjectResource()
    touch(resource.allocate(4 * MIB))
    before = psutil.Process().memory_info().vms
    for exponent in range(40, 47):
        try:
            resource.allocate(1 << exponent)
        except OutOfMemory:
            continue
        pytest.skip("this kernel refuses nothing")
    assert psutil.Process().memory_info().vms - before < 1 << 40
    touch(resource.allocate(4 * MIB))
    assert resource.check().ok


@pytest.mark.parametrize(
    "make", [memory.LargeObjectResource, memory.PoolResource], ids=["large", "pool"]
)
@pytest.mark.parametrize("cap", [0, 100_000, 8 * MIB, "8 MiB"])
@pytest.mark.parametrize("huge_pages", ["auto", "always", "never"])
def test_cache_never_exceeds_its_cap(
    make: Callable[..., memory.Resource], cap: int | str, huge_pages: str
) -> None:
    resource = make(cache_cap_bytes=cap, decay_seconds=None, huge_pages=huge_pages)
    cap_bytes = memory.parse_bytes(cap)
    for size in (20_000, 200_000, 1 * MIB, 3 * MIB, 20 * MIB):
        buffers = [touch(resource.allocate(size)) for _ in range(40 * MIB // size)]
        while buffers:
            buffers.pop()
            assert resource.statistics().cached_bytes <= cap_bytes
    assert resource.check().ok


def mapping_flags(address: int) -> set[str]:
    """Give the kernel's flags (VmFlags) of the mapping that holds an address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, _, rest = line.partition(" ")
        if "-" in first and not first.endswith(":"):
            start, end = (int(part, 16) for part in first.split("-"))
            inside = start <= address < end
        elif inside and first == "VmFlags:":
            return set(rest.split())
    raise AssertionError(f"no mapping holds {address:#x}")


def test_huge_pages_are_asked_for_or_not_as_told() -> None:
    if not Path("/sys/kernel/mm/transparent_hugepage/enabled").exists():
        pytest.skip("this kernel has no transparent huge pages")
    flags = {}
    for choice in ("auto", "always", "never"):
        resource = memory.LargeObjectResource(huge_pages=choice)  # type: ignore[arg-type]
        array = resource.allocate(32 * MIB).numpy()
        array[:] = 1
        flags[choice] = mapping_flags(array.ctypes.data + 16 * MIB)
    assert "hg" in flags["always"]
    assert "hg" not in flags["never"]


@pytest.mark.parametrize("make", [memory.LargeObjectResource, memory.PoolResource])
def test_cached_memory_returns_to_the_kernel_without_traffic(
    make: Callable[..., memory.Resource],
) -> None:
    resource = make(decay_seconds=0.05)
    kept = touch(resource.allocate(1 * MIB))
    buffers = [touch(resource.allocate(4 * MIB)) for _ in range(8)]
    buffers.clear()
    wait_until(
        lambda: resource.statistics().cached_bytes <= 1 * MIB, what="the cache decays while idle"
    )
    now = resource.statistics()
    assert now.decommitted_bytes >= 28 * MIB
    assert now.resident_bytes <= 3 * MIB
    assert (np.frombuffer(kept, dtype="uint8") == 1).all()
    assert resource.check().ok


def test_nothing_decays_where_decay_is_off() -> None:
    idle = memory.PoolResource(decay_seconds=None)
    witness = memory.PoolResource(decay_seconds=0.02)
    touch(idle.allocate(8 * MIB))
    touch(witness.allocate(8 * MIB))
    wait_until(lambda: witness.statistics().cached_bytes < 1 * MIB, what="the witness decays")
    assert idle.statistics().cached_bytes >= 8 * MIB


def test_background_tick_stops_on_demand_and_starts_again(run_python: RunPython) -> None:
    run_python("""
        import os, threading, time
        from moirai import memory

        def thread_count():
            return len(os.listdir("/proc/self/task"))

        def wait_until(holds):
            deadline = time.monotonic() + 60
            while not holds():
                assert time.monotonic() < deadline
                threading.Event().wait(0.005)

        memory.stop_background()
        alone = thread_count()
        pool = memory.PoolResource(decay_seconds=0.05)
        for turn in range(3):
            memoryview(pool.allocate(8 << 20))[:] = bytes(8 << 20)
            wait_until(lambda: pool.statistics().cached_bytes < 1 << 20)
            memory.stop_background()
            memory.stop_background()
            wait_until(lambda: thread_count() == alone)
        assert pool.check().ok
    """)


def test_decay_works_in_a_forked_child(run_python: RunPython) -> None:
    run_python("""
        import os, sys, threading, time, warnings
        warnings.simplefilter("ignore", DeprecationWarning)
        from moirai import memory

        def fill(pool):
            memoryview(pool.allocate(8 << 20))[:] = bytes(8 << 20)

        def decays(pool):
            deadline = time.monotonic() + 30
            while pool.statistics().cached_bytes >= 1 << 20:
                if time.monotonic() > deadline:
                    return False
                threading.Event().wait(0.005)
            return True

        pool = memory.PoolResource(decay_seconds=0.05)
        fill(pool)
        child = os.fork()
        fill(pool)
        ok = decays(pool) and pool.check().ok
        if child == 0:
            sys.exit(0 if ok else 3)
        _, status = os.waitpid(child, 0)
        assert (ok, status) == (True, 0), (ok, status)
    """)


def test_dropped_resource_gives_everything_back(run_python: RunPython) -> None:
    run_python("""
        import gc
        import psutil
        from moirai import memory

        me = psutil.Process()
        pool = memory.PoolResource(decay_seconds=None)
        before = me.memory_info().rss
        buffers = [pool.allocate(4 << 20) for _ in range(16)]
        for buffer in buffers:
            memoryview(buffer)[::4096] = bytes(1024)
        assert me.memory_info().rss > before + (48 << 20)
        del buffer, buffers, pool
        gc.collect()
        assert me.memory_info().rss < before + (16 << 20)
    """)


# --- hostile surroundings -----------------------------------------------------------------------

ALLOCATE_ALL_SIZES = dedent("""
    import numpy as np
    import moirai
    from moirai import memory
    from moirai.errors import OutOfMemory

    for make in (memory.PoolResource, memory.LargeObjectResource, memory.SlabResource):
        resource = make()
        kept = [resource.allocate(size) for size in (64, 5000, 100_000, 3 << 20, 40 << 20)]
        for buffer in kept:
            np.frombuffer(buffer, dtype="uint8")[:] = 1
        try:
            resource.allocate(1 << 45)
        except OutOfMemory as error:
            assert str(1 << 45) in str(error)
        else:
            raise AssertionError("32 TiB were handed out")
        assert resource.check().ok
""")


LOCK_FUTURE_MEMORY = dedent("""
    import ctypes, resource

    CAP_IPC_LOCK, MCL_FUTURE = 14, 2
    with open("/proc/self/oom_score_adj", "w") as score:
        score.write("1000")  # should a defect take all memory, this process is the one to go
    with open("/proc/self/status") as status:
        capabilities = int(status.read().split("CapEff:")[1].split()[0], 16)
    unlimited = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] == resource.RLIM_INFINITY
    if not (capabilities >> CAP_IPC_LOCK & 1 or unlimited):
        print("no right")
        raise SystemExit
    assert ctypes.CDLL(None).mlockall(MCL_FUTURE) == 0
""")

PRINT_RESIDENT = dedent("""
    with open("/proc/self/status") as status:
        print(status.read().split("VmRSS:")[1].split()[0])
""")


def test_pool_works_where_the_address_space_is_limited(run_python: RunPython) -> None:
    run_python(ALLOCATE_ALL_SIZES, shell_prefix="ulimit -v 4000000;")


def test_limited_address_space_runs_out_cleanly(run_python: RunPython) -> None:
    run_python(
        """
        from moirai import memory
        from moirai.errors import OutOfMemory

        pool = memory.PoolResource()
        kept = []
        try:
            while True:
                kept.append(pool.allocate(64 << 20))
        except OutOfMemory as error:
            assert str(64 << 20) in str(error), error
        assert len(kept) >= 8
        assert pool.check().ok
        assert pool.statistics().current_count == len(kept)
        kept.clear()
        kept.append(pool.allocate(64 << 20))
        """,
        shell_prefix="ulimit -v 4000000;",
    )


def test_locking_all_future_memory_does_not_populate_reservations(run_python: RunPython) -> None:
    out = run_python(LOCK_FUTURE_MEMORY + ALLOCATE_ALL_SIZES + PRINT_RESIDENT)
    if "no right" in out:
        pytest.skip("no right to lock memory (CAP_IPC_LOCK)")
    assert int(out) < 1 << 20, f"{out} KiB resident"


def test_refused_request_costs_no_memory(run_python: RunPython) -> None:
    run_python("""
        import psutil
        from moirai import memory
        from moirai.errors import OutOfMemory

        me = psutil.Process()
        resource = memory.LargeObjectResource()
        resource.allocate(1 << 20)
        before = me.memory_info().rss
        try:
            resource.allocate(1 << 45)
        except OutOfMemory:
            pass
        assert me.memory_info().rss < before + (8 << 20), me.memory_info().rss - before
    """)


def test_importing_moirai_does_not_import_numpy(run_python: RunPython) -> None:
    run_python("""
        import sys
        import moirai
        assert moirai.__version__
        assert "numpy" not in sys.modules
    """)


# --- zeros --------------------------------------------------------------------------------------


def test_zeros_of_many_pages_stay_unpopulated(run_python: RunPython) -> None:
    run_python("""
        import numpy as np
        import psutil
        from moirai import memory

        me = psutil.Process()
        with memory.use(memory.PoolResource()):
            dirty = np.empty(64 << 20, dtype="uint8")
            dirty[:] = 255
            del dirty
            before = me.memory_info().rss
            zeros = np.zeros(256 << 20, dtype="uint8")
            again = np.zeros(64 << 20, dtype="uint8")
            assert me.memory_info().rss < before + (32 << 20)
            for array in (zeros, again):
                assert not array[:: 1 << 12].any()
                array[-1] = 1
                assert array[-1] == 1
    """)


# --- use ----------------------------------------------------------------------------------------


def test_use_reaches_the_arrays_of_its_context_only() -> None:
    stats = memory.StatisticsAdaptor(memory.PoolResource())
    with memory.use(stats):
        inside = np.ones(100_000)
        seen: list[object] = []
        thread = threading.Thread(target=lambda: seen.append(memory.handler_of(np.ones(1000))))
        thread.start()
        thread.join()
    outside = np.ones(100_000)

    assert memory.handler_of(inside) is stats
    assert memory.handler_of(outside) is None
    assert seen == [None]
    assert stats.statistics().current_count == 1


def test_use_decorates_functions_generators_and_coroutines() -> None:
    pool = memory.PoolResource()

    @memory.use(pool)
    def function() -> object:
        return memory.handler_of(np.ones(1000))

    @memory.use(pool)
    def generator() -> Iterator[object]:
        yield memory.handler_of(np.ones(1000))
        yield memory.handler_of(np.ones(1000))

    @memory.use(pool)
    async def coroutine() -> object:
        await asyncio.sleep(0)
        return memory.handler_of(np.ones(1000))

    def handler_here() -> object:
        return memory.handler_of(np.ones(1000))

    assert function() is pool
    values = generator()
    for value in values:
        assert value is pool
        assert handler_here() is None, "a suspended generator leaks the handler to its caller"
    assert asyncio.run(coroutine()) is pool
    assert handler_here() is None


# libc's heap.

LIBC_HEAP = """
import ctypes, resource, sys, time
from moirai import memory

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
SIZE = 24 << 20

def touch(blocks):
    for block in blocks:
        ctypes.memset(block, 1, SIZE)

def rss():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

if sys.argv[1] == "kept":
    assert memory.keep_libc_heap(keep_bytes="512 MiB", decay_seconds=0.2)
    assert memory.keep_libc_heap(keep_bytes="512 MiB", decay_seconds=0.2)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    blocks = [ctypes.c_void_p(libc.malloc(SIZE)) for _ in range(4)]
    touch(blocks)
    for block in blocks:
        libc.free(block)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
heap = memory.LargeObjectResource()
deadline = time.monotonic() + 30
while sys.argv[1] == "kept" and rss() > 60 << 20:
    assert time.monotonic() < deadline, "nothing went back"
    heap.allocate(1 << 20)  # Traffic: the tick looks only while there is some.
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_the_libc_heap_is_kept_and_given_back_by_age() -> None:
    faults = {
        mode: int(
            subprocess.run(
                [sys.executable, "-c", LIBC_HEAP, mode],
                capture_output=True,
                text=True,
                check=True,
                timeout=60,
            ).stdout
        )
        for mode in ("plain", "kept")
    }
    # 96 MiB are 24576 pages: once, or in each of the 20 rounds.
    assert faults["kept"] < 2 * 24576 < faults["plain"]


def test_the_libc_heap_refuses_what_it_cannot_keep() -> None:
    with pytest.raises(InvalidArgument, match="keep_bytes: must be"):
        memory.keep_libc_heap(keep_bytes="much")
    with pytest.raises(InvalidArgument, match="decay_seconds: must be"):
        memory.keep_libc_heap(decay_seconds=-1)
