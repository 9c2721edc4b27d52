"""What the source reads from fake trees and from this machine, and how the sampler keeps it."""

from __future__ import annotations

import gc
import os
import pickle
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from pressure_trees import MIB, Tree

from moirai import pressure
from moirai.errors import Closed, InvalidArgument, Timeout, Unsupported
from moirai.pressure import Sample, Sampler, Source, TraceSource


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


def read(tree: Tree, **options: object) -> Sample:
    return Source(root=tree.root, **options).read()  # type: ignore[arg-type]


# Control groups.


def test_version_2_counts_the_working_set_against_the_own_group(tree: Tree) -> None:
    tree.join_v2("/app")
    tree.v2("app", current_mib=400, maximum_mib=512, inactive_mib=100, active_mib=50)

    sample = read(tree)

    assert (sample.used_bytes, sample.limit_bytes) == (300 * MIB, 512 * MIB)
    assert sample.without_cache_bytes == 250 * MIB
    assert sample.bound == "cgroup"
    assert sample.room_bytes == 212 * MIB
    assert (sample.total_limit_hits, sample.total_kills) == (3, 2)
    assert sample.stalled_ratio == pytest.approx(0.125)


def test_version_1_is_read_where_it_has_the_controller(tree: Tree) -> None:
    tree.join_v1("/app")
    tree.v1("app", usage_mib=400, limit_mib=512, inactive_mib=100, active_mib=30)

    sample = read(tree)

    assert (sample.used_bytes, sample.limit_bytes) == (300 * MIB, 512 * MIB)
    assert sample.without_cache_bytes == 270 * MIB
    assert (sample.total_limit_hits, sample.total_kills) == (5, 4)


def test_a_limit_above_that_is_not_mounted_is_known_from_the_hierarchical_one(tree: Tree) -> None:
    tree.join_v1("/docker/a", mount_root="/docker/a")
    tree.v1("", usage_mib=100, hierarchical_mib=256)

    sample = read(tree)

    assert (sample.used_bytes, sample.limit_bytes) == (100 * MIB, 256 * MIB)


@pytest.mark.parametrize("version", [1, 2])
def test_a_nested_group_is_held_by_the_lowest_limit_above_it(tree: Tree, version: int) -> None:
    groups = {"a": (600, 1024), "a/b": (500, None), "a/b/c": (450, 4096)}
    if version == 1:
        tree.join_v1("/a/b/c")
        for name, (used, limit) in groups.items():
            tree.v1(name, usage_mib=used, limit_mib=limit)
    else:
        tree.join_v2("/a/b/c")
        for name, (used, limit) in groups.items():
            tree.v2(name, current_mib=used, maximum_mib=limit)

    source = Source(root=tree.root)
    sample = source.read()

    assert (sample.used_bytes, sample.limit_bytes) == (600 * MIB, 1024 * MIB)
    (own, above, *_) = source.bounds()
    assert own.folder is not None
    assert own.folder.name == "c"
    assert (own.used_bytes, own.limit_bytes) == (450 * MIB, 4096 * MIB)
    assert above.folder == own.folder.parent.parent


def test_neighbours_that_fill_a_wider_group_leave_the_least_room(tree: Tree) -> None:
    tree.join_v2("/a/b")
    tree.v2("a", current_mib=4000, maximum_mib=4096)
    tree.v2("a/b", current_mib=100, maximum_mib=1024)

    sample = read(tree)

    assert (sample.used_bytes, sample.limit_bytes) == (4000 * MIB, 4096 * MIB)


def test_where_the_kernel_slows_down_is_a_limit_too(tree: Tree) -> None:
    tree.join_v2("/a")
    tree.v2("a", current_mib=100, maximum_mib=1024, high_mib=512)

    sample = read(tree)

    assert (sample.bound, sample.limit_bytes) == ("cgroup high", 512 * MIB)


def test_a_fork_waits_for_a_reading_that_is_under_way(run_python: Callable[..., str]) -> None:
    run_python(
        """
import os, signal, threading
from moirai.pressure import Source

source, stopping = Source(), []

def read():
    while not stopping:
        source.read()

threads = [threading.Thread(target=read) for _ in range(2)]
for thread in threads: thread.start()
ends = []
for _ in range(30):
    child = os.fork()
    if child == 0:
        signal.alarm(30)
        source.read()
        os._exit(0)
    ends.append(os.waitpid(child, 0)[1])
    if ends[-1]: break
stopping.append(1)
for thread in threads: thread.join()
assert set(ends) == {0}, ends
"""
    )


def test_where_the_kernel_kills_is_a_limit_besides_where_it_slows_down(tree: Tree) -> None:
    tree.join_v2("/a")
    tree.v2("a", current_mib=100, maximum_mib=1024, high_mib=512)
    source = Source(root=tree.root)
    source.read()

    limits = [(bound.kind, bound.limit_bytes) for bound in source.bounds()]
    assert limits[:2] == [("cgroup high", 512 * MIB), ("cgroup", 1024 * MIB)]
    # A fence stands before the one that kills, whatever the machine has.
    tree.v2("a", current_mib=100, maximum_mib=512, high_mib=1024)
    source.read()
    assert [bound.kind for bound in source.bounds()] == ["cgroup", "host"]


@pytest.mark.parametrize("version", [1, 2])
def test_without_a_limit_of_its_group_the_machine_is_the_limit(tree: Tree, version: int) -> None:
    if version == 1:
        tree.join_v1("/a")
        tree.v1("a", usage_mib=100)
    else:
        tree.join_v2("/a")
        tree.v2("a", current_mib=100)

    sample = read(tree)

    assert (sample.bound, sample.limit_bytes) == ("host", 16384 * MIB)
    assert sample.used_bytes == 4096 * MIB


def test_a_limit_that_changes_in_place_is_seen(tree: Tree) -> None:
    tree.join_v2("/a")
    tree.v2("a", current_mib=100, maximum_mib=1024)
    source = Source(root=tree.root)
    limits = [source.read().limit_bytes]

    for limit in (512, None, 256):
        tree.v2("a", current_mib=100, maximum_mib=limit)
        limits.append(source.read().limit_bytes)

    assert limits == [1024 * MIB, 512 * MIB, 16384 * MIB, 256 * MIB]


def test_a_process_that_is_moved_is_followed(tree: Tree) -> None:
    tree.join_v2("/a")
    tree.v2("a", current_mib=100, maximum_mib=1024)
    tree.v2("b", current_mib=50, maximum_mib=512)
    source = Source(root=tree.root)
    source.read()
    tree.join_v2("/b")

    assert source.read().limit_bytes == 512 * MIB


def test_a_group_outside_of_what_is_mounted_falls_back_to_the_top(tree: Tree) -> None:
    tree.join_v2("/../../other")
    tree.v2("", current_mib=100, maximum_mib=300)

    assert read(tree).limit_bytes == 300 * MIB


def test_no_control_group_at_all_leaves_the_machine(tree: Tree) -> None:
    assert read(tree).bound == "host"


# The process, the machine, the user.


def test_limits_of_the_process_count(tree: Tree) -> None:
    tree.limits(address_space=str(1000 * MIB))
    sample = read(tree)
    assert (sample.bound, sample.used_bytes) == ("address space", 900 * MIB)

    tree.limits(data=str(310 * MIB))
    sample = read(tree)
    assert (sample.bound, sample.used_bytes) == ("data", 300 * MIB)


def test_the_figures_of_the_process_are_its_own(tree: Tree) -> None:
    sample = read(tree)

    assert sample.resident_bytes == 100 * MIB
    assert sample.anonymous_bytes == 80 * MIB
    assert sample.data_bytes == 300 * MIB
    assert sample.total_faults == 4321


def test_a_budget_counts_children_once(tree: Tree) -> None:
    tree.family({"self": ["11", "12"], "11": ["13"]})
    for name in ("11", "12", "13"):
        tree.process(resident_mib=90, name=name)
        tree.proportional(name, 30)
    tree.proportional("self", 40)
    source = Source(root=tree.root, budget_bytes="1 GiB")

    # As they appear they count by their growth; once they are all there, by their shares.
    first = source.read()
    assert first.children_bytes == 0
    assert first.used_bytes == 100 * MIB
    second = source.read()
    assert second.children_bytes == 90 * MIB
    assert second.used_bytes == 130 * MIB

    tree.process(resident_mib=95, name="12")
    tree.process(resident_mib=107)
    third = source.read()
    assert third.children_bytes == 95 * MIB
    assert third.used_bytes == 40 * MIB + 7 * MIB + 95 * MIB

    tree.family({"self": []})
    assert source.read().used_bytes == 107 * MIB


def test_a_child_counts_the_whole_family_against_the_budget(tree: Tree) -> None:
    tree.family({"50": ["51", "52"]})
    for name, resident in (("50", 200), ("51", 60), ("52", 70)):
        tree.process(resident_mib=resident, name=name)
        tree.proportional(name, resident - 10)
    source = Source(root=tree.root, process_id=51, budget_process_id=50, budget_bytes="1 GiB")
    source.read()
    assert source.read().used_bytes == 300 * MIB

    (tree.root / "proc/50/statm").unlink()
    assert (
        Source(root=tree.root, process_id=51, budget_process_id=50, budget_bytes="1 GiB")
        .read()
        .used_bytes
        == 60 * MIB
    )


def test_another_process_is_read_by_its_number(tree: Tree) -> None:
    tree.process(resident_mib=17, name="99")
    assert read(tree, process_id=99).resident_bytes == 17 * MIB


def test_this_machine_can_be_read() -> None:
    sample = Source().read()

    assert 0 < sample.resident_bytes < (sample.limit_bytes or 0)
    assert sample.total_faults > 0


def test_a_process_that_is_gone_is_said_to_be(tree: Tree) -> None:
    with pytest.raises(Closed, match="process 12345 is gone"):
        read(tree, process_id=12345)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"process_id": 0}, "process_id: must be from 1 to 2147483647, got 0"),
        ({"budget_bytes": -1}, "budget_bytes: must be at least 0, got -1"),
        ({"budget_bytes": "much"}, "budget_bytes: must be a number of bytes"),
    ],
)
def test_wrong_arguments_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        Source(**options)  # type: ignore[arg-type]


# Recordings.


def test_a_recording_is_read_sample_by_sample(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("t_seconds,rss_bytes,limit_bytes\n0.0,10,100\n0.1,20,100\n")
    trace = TraceSource(path)

    assert [sample.used_ratio for sample in trace] == [0.1, 0.2]
    assert (trace.read().time_seconds, trace.read().time_seconds) == (0.0, 0.1)
    with pytest.raises(Closed, match="all 2 samples"):
        trace.read()


def test_a_recording_that_is_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("t_seconds,rss_bytes,limit_bytes\n0.0,inf,10\n")
    with pytest.raises(InvalidArgument, match=r"line 2 of .* must have numbers"):
        TraceSource(path)
    path.write_text("t_seconds,rss_bytes\n0.0,10\n")
    with pytest.raises(InvalidArgument, match=r"line 2 of .* must have numbers"):
        TraceSource(path)


# The sampler.


def test_a_sampler_that_was_not_started_reads_about_a_forked_child_itself(
    run_python: Callable[..., str],
) -> None:
    run_python("""
        import os
        from moirai.pressure import Sampler

        sampler = Sampler()
        before = sampler.read_now().resident_bytes
        child = os.fork()
        if child == 0:
            block = bytearray(os.urandom(1 << 20) * 200)
            os._exit(0 if sampler.read_now().resident_bytes > before + (150 << 20) else 1)
        assert os.waitpid(child, 0)[1] == 0
    """)


def test_samples_come_by_themselves_and_are_kept(tree: Tree) -> None:
    with Sampler(root=tree.root, longest_seconds=0.005, capacity=5) as sampler:
        times = [sampler.next(timeout_seconds=60).time_seconds for _ in range(8)]
        history = sampler.history()
    assert times == sorted(set(times))
    assert len(history) == 5
    assert sampler.statistics().sample_count >= 9
    assert sampler.statistics().reading_seconds > 0
    assert not sampler.is_running


def test_the_sampler_sees_what_changes(tree: Tree) -> None:
    tree.join_v2("/a")
    tree.v2("a", current_mib=100, maximum_mib=128)
    with Sampler(root=tree.root, longest_seconds=0.005) as sampler:
        tree.v2("a", current_mib=120, maximum_mib=128)
        while sampler.next(timeout_seconds=60).used_bytes != 120 * MIB:
            pass
        tree.v2("a", current_mib=120, maximum_mib=256)
        while sampler.next(timeout_seconds=60).limit_bytes != 256 * MIB:
            pass


def test_the_sampler_sees_in_calm_what_changes(tree: Tree) -> None:
    tree.join_v2("/a")
    tree.v2("a", current_mib=100, maximum_mib=1024)
    with Sampler(root=tree.root, longest_seconds=0.02) as sampler:
        while sampler.statistics().sample_count < 60:  # more than a second: it is calm
            sampler.next(timeout_seconds=60)
        tree.v2("a", current_mib=100, maximum_mib=512)
        while sampler.next(timeout_seconds=60).limit_bytes != 512 * MIB:
            pass
        tree.v2("b", current_mib=50, maximum_mib=256)
        tree.join_v2("/b")
        while sampler.next(timeout_seconds=60).limit_bytes != 256 * MIB:
            pass
        tree.v2("b", current_mib=200, maximum_mib=256)
        while sampler.next(timeout_seconds=60).used_bytes != 200 * MIB:
            pass


def test_python_code_that_keeps_the_interpreter_does_not_hold_it_up() -> None:
    with Sampler(longest_seconds=0.01) as sampler:
        before = sampler.statistics().sample_count
        reached = threading.Event()
        # One call into C that never lets go of the interpreter, until samples came meanwhile.
        data = [list(range(1000)) for _ in range(300)]
        for _ in range(1000):
            pickle.dumps(data)
            if sampler.statistics().sample_count > before + 20:
                reached.set()
                break
    assert reached.is_set()


def test_a_sampler_that_was_not_started_has_nothing(tree: Tree) -> None:
    sampler = Sampler(root=tree.root)
    with pytest.raises(Closed, match="not started"):
        sampler.read()
    with pytest.raises(Closed, match="not started"):
        sampler.next()
    sampler.stop()


def test_waiting_ends_with_its_time_and_with_the_sampler(tree: Tree) -> None:
    with Sampler(root=tree.root, shortest_seconds=3600, longest_seconds=3600) as sampler:
        with pytest.raises(Timeout, match=r"no sample within 0\.01 seconds"):
            sampler.next(timeout_seconds=0.01)
        ended = threading.Event()

        def wait() -> None:
            with pytest.raises(Closed, match="stopped"):
                sampler.next()
            ended.set()

        thread = threading.Thread(target=wait)
        thread.start()
        sampler.stop()
        thread.join(60)
        assert ended.is_set()


def test_who_samples_nobody_is_told() -> None:
    with pytest.raises(Unsupported, match="no such process"):
        Sampler(process_id=2**22 + 1).start()


def test_arguments_of_the_sampler_are_checked() -> None:
    with pytest.raises(InvalidArgument, match="0 < shortest <= longest"):
        Sampler(shortest_seconds=2, longest_seconds=1)
    with pytest.raises(InvalidArgument, match="capacity: must be from 1"):
        Sampler(capacity=0)
    with pytest.raises(InvalidArgument, match="fence: only this process"):
        Sampler(process_id=os.getpid(), fence=pressure.Fence())


def test_a_sampler_ends_with_its_last_reference(tree: Tree) -> None:
    before = set(os.listdir("/proc/self/task"))
    sampler = Sampler(root=tree.root)
    sampler.start()
    (thread,) = set(os.listdir("/proc/self/task")) - before
    task = Path("/proc/self/task", thread)
    deadline = time.monotonic() + 60
    while (task / "comm").read_text() != "moirai-sampler\n":  # it names itself
        assert time.monotonic() < deadline, "the thread does not name itself"
        os.sched_yield()
    del sampler
    gc.collect()
    # It has left the sampler; the system's thread is gone a moment later.
    while task.exists():
        assert time.monotonic() < deadline, "the thread does not end"
        os.sched_yield()


def test_a_forked_child_goes_on_with_samples_of_its_own(run_python) -> None:  # type: ignore[no-untyped-def]
    run_python("""
        import os
        from moirai.pressure import Sampler

        with Sampler(longest_seconds=0.005) as sampler:
            sampler.next(timeout_seconds=60)
            child = os.fork()
            if child == 0:
                block = bytearray(64 << 20)
                while sampler.next(timeout_seconds=60).anonymous_bytes < 64 << 20:
                    pass
                os._exit(0 if sampler.statistics().sample_count else 1)
            assert os.waitpid(child, 0)[1] == 0
            assert sampler.next(timeout_seconds=60).anonymous_bytes < 64 << 20
    """)
