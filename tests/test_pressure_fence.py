"""The fence: allocations that would cross the limit raise MemoryError; no root is needed."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from moirai.errors import InvalidArgument
from moirai.pressure import Fence

Runner = Callable[..., str]

# What each program below starts with: a budget a little above what the process has.
HEAD = """
import resource
from moirai import pressure
from moirai.pressure import Fence, Sampler, Source

MIB = 1 << 20
before = resource.getrlimit(resource.RLIMIT_DATA)
used = Source().read().resident_bytes

def fenced(spare_mib, **options):
    fence = Fence(margin_bytes="16 MiB", **options)
    return Sampler(budget_bytes=used + spare_mib * MIB, longest_seconds=0.01, fence=fence)

def refused(count):
    try:
        return not bytearray(count)
    except MemoryError:
        return True
"""


def test_what_would_cross_the_limit_raises_memory_error(run_python: Runner) -> None:
    run_python(
        HEAD
        + """
with fenced(256) as sampler:
    assert refused(300 * MIB)
    block = bytearray(100 * MIB)
    assert sampler.statistics().fence_room_bytes is not None
assert resource.getrlimit(resource.RLIMIT_DATA) == before
assert not refused(300 * MIB)
"""
    )


def test_growth_in_small_steps_ends_in_memory_error_below_the_limit(run_python: Runner) -> None:
    run_python(
        HEAD
        + """
kept = []
with fenced(256) as sampler:
    try:
        while len(kept) < 4096:
            kept.append(bytearray(b"x" * MIB))
    except MemoryError:
        reached = len(kept)
    grown = Source().read().resident_bytes - used
    del kept
assert 128 <= reached <= 256, reached
assert grown <= 256 * MIB, grown
"""
    )


def test_room_that_is_freed_can_be_had_again(run_python: Runner) -> None:
    run_python(
        HEAD
        + """
with fenced(256) as sampler:
    block = bytearray(b"x") * (180 * MIB)
    sampler.next(timeout_seconds=60)
    assert refused(150 * MIB)
    del block
    while sampler.next(timeout_seconds=60).resident_bytes > used + 100 * MIB:
        pass
    while sampler.statistics().fence_room_bytes < 200 * MIB:
        sampler.next(timeout_seconds=60)
    assert not refused(150 * MIB)
"""
    )


def test_a_limit_of_the_users_own_stays(run_python: Runner) -> None:
    run_python(
        HEAD
        + """
own = (900 * MIB, before[1])
resource.setrlimit(resource.RLIMIT_DATA, own)
with fenced(4096) as sampler:
    sampler.next(timeout_seconds=60)
    assert resource.getrlimit(resource.RLIMIT_DATA)[0] <= own[0]
    assert refused(1000 * MIB)
assert resource.getrlimit(resource.RLIMIT_DATA) == own
"""
    )


def test_a_limit_that_is_set_between_two_runs_stays_too(run_python: Runner) -> None:
    run_python(
        HEAD
        + """
sampler = fenced(4096)
with sampler:
    pass
own = (900 * MIB, before[1])
resource.setrlimit(resource.RLIMIT_DATA, own)
with sampler:
    assert resource.getrlimit(resource.RLIMIT_DATA)[0] <= own[0]
assert resource.getrlimit(resource.RLIMIT_DATA) == own
"""
    )


def test_a_process_has_one_fence_at_most(run_python: Runner) -> None:
    run_python(
        HEAD
        + """
import os
from moirai.errors import Unsupported

first, second = fenced(256), fenced(256)
with first:
    try:
        second.start()
    except Unsupported as refusal:
        assert str(refusal).startswith("fence: this process has one already"), refusal
    else:
        raise AssertionError("there are two")
    child = os.fork()
    if child == 0:  # where the first stands too, until it is stopped
        first.stop()
        with second:
            good = resource.getrlimit(resource.RLIMIT_DATA) != before
        good = good and resource.getrlimit(resource.RLIMIT_DATA) == before
        os._exit(0 if good else 1)
    assert os.waitpid(child, 0)[1] == 0
with second:
    assert resource.getrlimit(resource.RLIMIT_DATA) != before
assert resource.getrlimit(resource.RLIMIT_DATA) == before
"""
    )


def test_a_forked_child_has_a_fence_of_its_own(run_python: Runner) -> None:
    run_python(
        HEAD
        + """
import os

with fenced(256) as sampler:
    child = os.fork()
    if child == 0:
        sampler.next(timeout_seconds=60)
        limit = resource.getrlimit(resource.RLIMIT_DATA)[0]
        good = limit != resource.RLIM_INFINITY and refused(400 * MIB)
        sampler.stop()
        good = good and resource.getrlimit(resource.RLIMIT_DATA) == before
        os._exit(0 if good else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert resource.getrlimit(resource.RLIMIT_DATA)[0] != before[0]
"""
    )


def test_processes_that_share_a_limit_share_the_room(run_python: Runner, tmp_path) -> None:  # type: ignore[no-untyped-def]
    run_python(
        HEAD
        + f"""
import os

ledger = {str(tmp_path / "ledger")!r}
with fenced(512, ledger=ledger) as sampler:
    assert sampler.statistics().sharer_count == 1
    assert sampler.statistics().is_leader
    ready, done = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        sampler.next(timeout_seconds=60)
        counts = sampler.statistics()
        os.write(ready[1], b"x")
        os.read(done[0], 1)
        os._exit(0 if counts.sharer_count == 2 and not counts.is_leader else 1)
    os.read(ready[0], 1)
    while sampler.statistics().sharer_count != 2:
        sampler.next(timeout_seconds=60)
    assert refused(400 * MIB)
    os.write(done[1], b"x")
    assert os.waitpid(child, 0)[1] == 0
    while sampler.statistics().sharer_count != 1:
        sampler.next(timeout_seconds=60)
"""
    )


def test_a_ledger_that_cannot_be_opened_is_told_of_once(run_python: Runner, tmp_path: Path) -> None:
    run_python(
        HEAD
        + f"""
import logging, os

folder = {str(tmp_path / "later")!r}
told = []
handler = logging.Handler()
handler.emit = lambda record: told.append((record.levelname, record.getMessage()))
logging.getLogger("moirai.pressure").addHandler(handler)

sampler = fenced(512, ledger=os.path.join(folder, "ledger"))
guard = pressure.Guard(sampler, forecaster=None)
for _ in range(2):
    with guard:
        for _ in range(3):
            sampler.next(timeout_seconds=60)
        assert guard.status().ledger_error == "No such file or directory", guard.status()
        assert sampler.statistics().sharer_count == 1
        assert sampler.statistics().is_leader
        assert refused(600 * MIB)
assert [level for level, text in told if "ledger" in text] == ["WARNING"], told
assert folder in told[0][1] and "alone" in told[0][1], told

with guard:
    os.mkdir(folder)
    while sampler.statistics().ledger_error is not None:
        sampler.next(timeout_seconds=60)
    assert guard.status().ledger_error is None
    assert os.listdir(folder) == ["ledger"]
"""
    )


def test_a_fence_without_a_ledger_is_meant_to_be_alone(run_python: Runner) -> None:
    run_python(HEAD + "with fenced(512) as it: assert it.statistics().ledger_error is None")


def test_processes_that_grow_at_once_keep_to_their_budget_together(
    run_python: Runner, tmp_path: Path
) -> None:
    run_python(
        HEAD
        + f"""
import os

ledger = {str(tmp_path / "ledger")!r}
with fenced(256, ledger=ledger) as sampler:
    (go, begin), (full, said) = os.pipe(), os.pipe()
    for _ in range(3):
        if os.fork() == 0:
            os.write(said, b"x")
            os.read(go, 1)
            kept = []
            try:
                while len(kept) < 1024:
                    kept.append(bytearray(b"x" * MIB))
                    # What others have taken meanwhile is known with the next sample.
                    if len(kept) % 8 == 0: sampler.next(timeout_seconds=60)
            except MemoryError:
                os.write(said, b"x")
            os.read(go, 1)
            os._exit(0)
    for _ in range(3): os.read(full, 1)  # they are there
    os.write(begin, b"xxx")
    for _ in range(3): os.read(full, 1)  # each had all that it could
    pss = [
        int(line.split()[1])
        for name in [os.getpid(), *open("/proc/self/task/%d/children" % os.getpid()).read().split()]
        for line in open(f"/proc/{{name}}/smaps_rollup") if line.startswith("Pss:")
    ]
    os.write(begin, b"xxx")
    assert len(pss) == 4
    assert 64 * MIB <= 1024 * sum(pss) - used <= 400 * MIB, pss
    for _ in range(3): os.wait()
"""
    )


def test_threads_start_and_work_behind_the_fence(run_python: Runner) -> None:
    run_python(
        HEAD
        + """
import threading

with fenced(512) as sampler:
    refusals = []
    def work():
        refusals.append(refused(700 * MIB))
    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert refusals == [True] * 8
"""
    )


def test_numpy_and_moirai_memory_respect_the_fence(run_python: Runner) -> None:
    run_python(
        """
import numpy as np
from moirai import memory
"""
        + HEAD
        + """
memory.install(memory.PoolResource())
with fenced(256) as sampler:
    try:
        np.ones(300 * MIB, dtype=np.uint8)
    except MemoryError:
        pass
    else:
        raise AssertionError("it was granted")
    array = np.ones(64 * MIB, dtype=np.uint8)
"""
    )


def test_a_fence_is_checked_and_says_what_it_is() -> None:
    assert repr(Fence(margin_bytes="1 KiB")) == "Fence(margin_bytes=1024, ledger=None)"
    with pytest.raises(InvalidArgument, match="margin_bytes: must be at least 0, got -1"):
        Fence(margin_bytes=-1)
    assert Fence(ledger=b"/tmp/x").ledger == "/tmp/x"  # type: ignore[arg-type]
    assert Fence.default_ledger("a") != Fence.default_ledger("b")


GUARDED = """
import sys
from moirai import pressure

guard = pressure.start(limit=sys.argv[1], fence=sys.argv[2] == "fence", forecaster=None)
fence = guard.source.fence
print(fence.ledger if fence else pressure.process._leader.path, flush=True)
pressure.process._leader and pressure.process._leader()
print("stands", flush=True)
sys.stdin.read()
print(guard.source.statistics().sharer_count, flush=True)
"""


@contextlib.contextmanager
def guarded(limit: str, how: str) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A program with a guard; and the file by which those under its limit meet."""
    command = [sys.executable, "-c", GUARDED, limit, how]
    program = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with program:
        try:
            assert program.stdout is not None
            path = Path(program.stdout.readline().strip())
            assert program.stdout.readline() == "stands\n"
            yield program, path
        finally:
            program.kill()


@pytest.mark.parametrize("how", ["fence", "lead"])
def test_what_a_killed_program_leaves_the_next_start_takes_away(how: str) -> None:
    with guarded("8 GiB", how) as (living, kept):
        with guarded("7 GiB", how) as (killed, left):
            killed.send_signal(signal.SIGKILL)
            killed.wait()
            assert left.exists()
            with guarded("6 GiB", how) as (last, own):
                assert not left.exists()
                assert kept.exists()
                assert own.exists()
                output, _ = last.communicate()  # it ends in order
                assert output == "1\n"
                assert not own.exists()
        assert living.communicate()[0] == "1\n"
        assert not kept.exists()
