"""Long mixed use of the resources from several threads; bounded by count, never by time."""

import gc
import os
import signal
import threading
from collections.abc import Callable

import numpy as np
import pytest

from moirai import memory
from moirai.errors import OutOfMemory

pytestmark = pytest.mark.slow

KIB = 1 << 10
MIB = 1 << 20
STEPS_PER_THREAD = 6_000
SEED = 20260101


def make_stack() -> memory.Resource:
    return memory.LimitAdaptor(
        memory.StatisticsAdaptor(memory.SlabResource(memory.LargeObjectResource())),
        limit_bytes="96 MiB",
    )


class Churn:
    """One thread's life: allocate, verify, hand over to the others, drop, trim."""

    def __init__(self, resource: memory.Resource, shared: list[object], seed: int) -> None:
        self.resource = resource
        self.shared = shared
        self.random = np.random.default_rng(seed)
        self.live: list[tuple[memory.Buffer, int]] = []
        self.failures: list[str] = []

    def run(self) -> None:
        try:
            for step in range(STEPS_PER_THREAD):
                self.step(step)
            while self.live:
                self.verify(*self.live.pop())
        except BaseException as error:
            self.failures.append(repr(error))

    def step(self, step: int) -> None:
        choice = self.random.random()
        if choice < 0.55:
            self.allocate(step)
        elif choice < 0.95:
            self.drop()
        elif choice < 0.99:
            # A list's append and pop are atomic; the other threads drop what they find here.
            if self.live:
                self.shared.append(self.live.pop())
        elif choice < 0.995:
            self.resource.trim(int(self.random.integers(0, 8 * MIB)))
        else:
            self.resource.statistics()

    def allocate(self, step: int) -> None:
        size = min(int(self.random.lognormal(8.5, 2.2)), 6 * MIB)
        zeroed = bool(self.random.random() < 0.2)
        try:
            buffer = self.resource.allocate(size, zeroed=zeroed)
        except OutOfMemory:
            del self.live[: len(self.live) // 2]
            return
        content = np.frombuffer(buffer, dtype="uint8")
        if zeroed and content.any():
            self.failures.append(f"zeroed block of {size} bytes is dirty")
        fill = step % 255 + 1
        content[:] = fill
        self.live.append((buffer, fill))

    def drop(self) -> None:
        if self.random.random() < 0.2 and self.shared:
            try:
                self.verify(*self.shared.pop())  # type: ignore[misc]
            except IndexError:  # another thread took the last one
                return
        elif self.live:
            index = int(self.random.integers(len(self.live)))
            self.live[index], self.live[-1] = self.live[-1], self.live[index]
            self.verify(*self.live.pop())

    def verify(self, buffer: memory.Buffer, fill: int) -> None:
        content = np.frombuffer(buffer, dtype="uint8")
        if not (content == fill).all():
            self.failures.append(f"block of {buffer.size_bytes} bytes was overwritten")


@pytest.mark.parametrize(
    "make",
    [
        memory.PoolResource,
        lambda: memory.PoolResource(cache_cap_bytes="2 MiB", decay_seconds=0.01),
        lambda: memory.LargeObjectResource(fit="first", decay_seconds=0.01),
        lambda: memory.LargeObjectResource(fit="worst", cache_cap_bytes=0),
        memory.SlabResource,
        memory.SystemResource,
        make_stack,
    ],
    ids=["pool", "pool, eager decay", "first fit", "worst fit", "slab", "system", "stack"],
)
def test_churn_by_several_threads_leaves_consistent_books(
    make: Callable[[], memory.Resource],
) -> None:
    print("seed", SEED)
    resource = make()
    shared: list[object] = []
    lives = [Churn(resource, shared, SEED + index) for index in range(4)]
    threads = [threading.Thread(target=life.run) for life in lives]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    failures = [failure for life in lives for failure in life.failures]
    assert failures == []

    shared.clear()
    del lives
    gc.collect()
    now = resource.statistics()
    assert (now.current_bytes, now.current_count, now.invalid_frees) == (0, 0, 0)
    assert now.hits + now.misses == now.total_count
    health = resource.check()
    assert health.ok, str(health)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_forks_amid_churn_leave_working_children() -> None:
    resource = memory.PoolResource(decay_seconds=0.01)
    lives = [Churn(resource, [], SEED + index) for index in range(2)]
    threads = [threading.Thread(target=life.run) for life in lives]
    for thread in threads:
        thread.start()
    statuses = []
    for _ in range(20):
        child = os.fork()
        if child == 0:
            try:
                buffers = [resource.allocate(size) for size in (64, 5000, 100 * KIB, 2 * MIB)] * 10
                buffers.clear()
                resource.trim()
                os._exit(0 if resource.check().ok else 4)
            except BaseException:
                os._exit(5)
        statuses.append(os.waitpid(child, 0)[1])
    for thread in threads:
        thread.join()
    assert statuses == [0] * 20
    assert [failure for life in lives for failure in life.failures] == []


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_forks_amid_reports_leave_adaptors_that_answer() -> None:
    adaptor = memory.StatisticsAdaptor(memory.SystemResource())
    stop = threading.Event()

    def report() -> None:
        while not stop.is_set():
            adaptor.statistics()

    threads = [threading.Thread(target=report) for _ in range(2)]
    for thread in threads:
        thread.start()
    statuses = []
    for _ in range(200):
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(20)  # ends a child that waits for a thread it does not have
            adaptor.statistics()
            os._exit(0)
        statuses.append(os.waitpid(child, 0)[1])
        if statuses[-1]:
            break
    stop.set()
    for thread in threads:
        thread.join()
    assert set(statuses) == {0}
