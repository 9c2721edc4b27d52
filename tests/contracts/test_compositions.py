"""What stacks of resources and adaptors promise, however they are put together.

A new source of memory joins with a line in SOURCES, a new adaptor with one in LAYERS.
"""

import gc
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from running import in_forked_child, wait_until_gone

from moirai import memory
from moirai.errors import OutOfMemory

KIB = 1 << 10
MIB = 1 << 20

Source = Callable[[], memory.Resource]
Layer = Callable[[memory.Resource], memory.Resource]


def with_lanes(normal: memory.Resource) -> memory.Resource:
    return memory.PriorityResource(realtime_bytes=4096, normal=normal, allow_unlocked=True)


def with_strategies(low_latency: memory.Resource) -> memory.Resource:
    return memory.AdaptiveResource(
        {memory.Workload.LOW_LATENCY: low_latency}, long_seconds=0.001, high_rate=1000
    )


class Awkward:
    """Counts of sizes between the standard classes; a slab that is tuned to them has extra ones."""

    def sizes(self) -> list[tuple[int, int]]:
        return [(1088, 9), (2112, 3), (4672, 2), (9344, 1)]


class TuningSlab(memory.SlabResource):
    """Tunes itself whenever it is trimmed, to and fro, with blocks out."""

    def trim(self, target_bytes: int = 0) -> int:
        given = super().trim(target_bytes)
        self.set_extra_classes([] if target_bytes % 2 else [1152, 2112, 4672])
        self.set_magazine(1152 if target_bytes % 3 else 1024, rounds=2 + target_bytes % 60)
        self.tune(Awkward())
        return given


def tuned(upstream: memory.Resource) -> memory.Resource:
    slab = TuningSlab(upstream)
    slab.set_extra_classes([1152])
    slab.tune(Awkward())
    return slab


SOURCES: dict[str, Source] = {
    "system": memory.SystemResource,
    "large, best fit": memory.LargeObjectResource,
    "large, first fit": lambda: memory.LargeObjectResource(fit="first"),
    "large, worst fit": lambda: memory.LargeObjectResource(fit="worst", decay_seconds=0.01),
    "large, no cache": lambda: memory.LargeObjectResource(cache_cap_bytes=0),
    "pool": memory.PoolResource,
    "slab, tuned": lambda: tuned(memory.LargeObjectResource()),
    "pool, small cache": lambda: memory.PoolResource(cache_cap_bytes="1 MiB"),
    "numa": lambda: memory.NumaResource("local"),
    "realtime": lambda: memory.RealtimeResource("64 MiB", allow_unlocked=True),
    "priority": lambda: memory.PriorityResource(realtime_bytes=4096, allow_unlocked=True),
}
LAYERS: dict[str, Layer] = {
    "slab": memory.SlabResource,
    "tuned slab": tuned,
    "statistics": memory.StatisticsAdaptor,
    "limit": lambda upstream: memory.LimitAdaptor(upstream, limit_bytes="1 GiB"),
    "normal lane": with_lanes,
    "pattern": memory.PatternAdaptor,
    "adaptive": with_strategies,
}


@dataclass(frozen=True)
class Stack:
    """A source and the layers over it, by name; the lowest first."""

    source: str
    layers: tuple[str, ...]

    def build(self, limit_bytes: int | None = None) -> list[memory.Resource]:
        """Every resource of the stack, the lowest first; a limit stands right over the source."""
        made = [SOURCES[self.source]()]
        if limit_bytes is not None:
            made.append(memory.LimitAdaptor(made[-1], limit_bytes=limit_bytes))
        for layer in self.layers:
            made.append(LAYERS[layer](made[-1]))
        return made


stacks = st.builds(
    Stack,
    st.sampled_from(sorted(SOURCES)),
    st.lists(st.sampled_from(sorted(LAYERS)), max_size=4).map(tuple),
)
sizes = st.one_of(st.integers(0, 4 * KIB), st.integers(0, 96 * KIB), st.integers(0, MIB))
steps = st.lists(
    st.one_of(
        st.tuples(st.just("allocate"), sizes, st.booleans()),
        st.tuples(st.just("group"), st.lists(st.integers(0, 64 * KIB), max_size=4)),
        st.tuples(st.just("array"), st.integers(0, 100 * KIB)),
        st.tuples(st.just("drop"), st.integers(0, 63)),
        st.tuples(st.just("trim"), st.integers(0, MIB)),
    ),
    max_size=30,
)


class Life:
    """Blocks and arrays that live between steps, each with its own byte in it."""

    def __init__(self, resource: memory.Resource) -> None:
        self.resource = resource
        self.live: list[tuple[object, np.ndarray, int]] = []
        self.refused_count = 0
        self._turn = 0

    def take(self, step: tuple) -> None:
        try:
            match step:
                case ("allocate", size, zeroed):
                    buffer = self.resource.allocate(size, zeroed=zeroed)
                    view = np.frombuffer(buffer, dtype="uint8")
                    assert not (zeroed and view.any())
                    self._keep(buffer, view)
                case ("group", group):
                    for buffer in self.resource.allocate_group(group):
                        self._keep(buffer, np.frombuffer(buffer, dtype="uint8"))
                case ("array", size):
                    with memory.use(self.resource):
                        made = np.empty(size, dtype="uint8")
                    assert memory.handler_of(made) is self.resource
                    self._keep(made, made)
                case ("drop", index) if self.live:
                    self.verify(self.live.pop(index % len(self.live)))
                case ("trim", target):
                    assert self.resource.trim(target) >= 0
        except MemoryError:
            self.refused_count += 1

    def _keep(self, owner: object, view: np.ndarray) -> None:
        self._turn += 1
        fill = self._turn % 251 + 1
        view[:] = fill
        self.live.append((owner, view, fill))

    @staticmethod
    def verify(entry: tuple[object, np.ndarray, int]) -> None:
        _, view, fill = entry
        assert (view == fill).all(), "a live block was overwritten"

    def assert_adds_up(self) -> None:
        now = self.resource.statistics()
        assert now.current_count == len(self.live)
        assert now.current_bytes >= sum(view.nbytes for _, view, _ in self.live)
        assert now.hits + now.misses == now.total_count
        assert now.cached_bytes <= now.resident_bytes
        assert now.invalid_frees == 0

    def end(self) -> None:
        while self.live:
            self.verify(self.live.pop())


def assert_sound(*made: memory.Resource) -> None:
    for resource in made:
        health = resource.check()
        assert health.ok, str(health)
    together = memory.health()
    assert together.ok, str(together)


@contextmanager
def built(stack: Stack, limit_bytes: int | None = None) -> Iterator[list[memory.Resource]]:
    """Give a fresh stack, the lowest first. When its blocks are gone, all of it must be at rest."""
    made = stack.build(limit_bytes)
    yield made
    assert made[-1].statistics().current_bytes == 0
    assert_sound(*made)
    # What is above goes first, and gives back what it drew.
    while len(made) > 1:
        made.pop()
        assert made[-1].statistics().current_count == 0, "a layer kept blocks of its upstream"
    assert_sound(*made)


@settings(max_examples=200)
@given(stack=stacks, steps=steps)
def test_every_stack_keeps_the_contract(stack: Stack, steps: list[tuple]) -> None:
    with built(stack) as made:
        life = Life(made[-1])
        for step in steps:
            life.take(step)
            life.assert_adds_up()
        assert life.refused_count == 0
        life.end()
        del life


@settings(max_examples=40)
@given(stack=stacks, steps=steps)
def test_wherever_memory_runs_out_the_stack_stays_sound(stack: Stack, steps: list[tuple]) -> None:
    """A limit right over the source, raised step by step: each run fails at another request."""
    for limit_bytes in [0, 64, 4096, *range(64 * KIB, 640 * KIB, 64 * KIB), 2 * MIB]:
        with built(stack, limit_bytes) as made:
            life = Life(made[-1])
            for step in steps:
                life.take(step)
                life.assert_adds_up()
            refused_count = life.refused_count
            life.end()
            del life
        wanted_count = sum(step[0] in ("allocate", "array") for step in steps)
        assert limit_bytes > 0 or refused_count >= wanted_count


@settings(max_examples=100)
@given(stack=stacks, seed=st.integers(0, 2**32), in_thread=st.booleans())
def test_a_stack_may_be_dropped_in_any_order_in_any_thread(
    stack: Stack, seed: int, in_thread: bool
) -> None:
    made = stack.build()
    names: list[object] = [*made]
    for size in (0, 100, 5000, 40 * KIB, 300 * KIB):
        buffer = made[-1].allocate(size, zeroed=True)
        names += [buffer, np.frombuffer(buffer, dtype="uint8"), memoryview(buffer)]
        with memory.use(made[-1]):
            names += [np.zeros(size + 1, dtype="uint8"), np.ones(size + 8)[1::2]]
    del made, buffer
    random.Random(seed).shuffle(names)

    def drop() -> None:
        while names:
            name = names.pop()
            if isinstance(name, np.ndarray) and name.size and name.flags.writeable:
                name[...] = 1
                assert name.sum() == name.size

    if in_thread:
        thread = threading.Thread(target=drop)
        thread.start()
        thread.join()
    else:
        drop()
    assert names == []
    gc.collect()
    assert_sound()


@settings(max_examples=30)
@given(stack=stacks, limited=st.booleans())
def test_threads_may_share_any_stack(stack: Stack, limited: bool) -> None:
    with built(stack, 4 * MIB if limited else None) as made:
        failures: list[BaseException] = []
        start = threading.Barrier(3)

        def work(seed: int) -> None:
            chance = random.Random(seed)
            life = Life(made[-1])
            start.wait()
            try:
                for _ in range(120):
                    choice = chance.randrange(6)
                    size = chance.choice([50, 700, 9_000, 40_000, 300_000])
                    life.take(
                        ("drop", chance.randrange(64))
                        if choice < 2
                        else ("array", size)
                        if choice == 2
                        else ("group", [size, 64, size // 2])
                        if choice == 3
                        else ("allocate", size, choice == 5)
                    )
                life.end()
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
            wait_until_gone(thread)
        assert failures == []
        now = made[-1].statistics()
        assert (now.current_count, now.invalid_frees) == (0, 0)
        assert now.hits + now.misses == now.total_count


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
@settings(max_examples=25)
@given(stack=stacks, steps=steps)
def test_a_forked_child_goes_on_with_any_stack(stack: Stack, steps: list[tuple]) -> None:
    with built(stack) as made:
        stop = threading.Event()

        def churn() -> None:
            while not stop.is_set():
                with suppress(OutOfMemory):
                    made[-1].allocate_group([100, 9_000, 100_000])
                made[-1].statistics()

        life = Life(made[-1])
        for step in steps:
            life.take(step)
        thread = threading.Thread(target=churn)
        thread.start()

        def child(life: Life = life) -> None:
            for step in steps:
                life.take(step)
            life.end()

        def healthy_child(child: Callable[[], None] = child) -> None:
            child()
            report = made[-1].check()
            assert report.ok, report
            report = memory.health()
            assert report.ok, report

        # The thread may stand between a block and its count: that stays so in a child without it.
        in_forked_child(child)
        stop.set()
        thread.join()
        in_forked_child(healthy_child)
        life.end()
        del life, child, healthy_child


@pytest.mark.parametrize(
    "layer",
    [
        "memory.SlabResource(limit)",
        "memory.SlabResource(memory.StatisticsAdaptor(limit))",
        "memory.StatisticsAdaptor(limit)",
        "memory.ArenaResource(limit, chunk_bytes='64 KiB')",
        "memory.ThreadLocalArena(limit, chunk_bytes='64 KiB')",
    ],
)
def test_a_limits_collection_may_free_blocks_of_the_layer_that_asks(
    layer: str, run_python: Callable[..., str]
) -> None:
    # In a process of its own: what this guards against is a thread that waits for its own lock.
    run_python(
        f"""
        import gc
        import threading
        from moirai import memory
        from moirai.errors import OutOfMemory

        def fill(held):
            try:
                while True:
                    held.append(layer.allocate(512))
            except OutOfMemory:
                pass

        class Node:
            pass

        gc.disable()
        limit = memory.LimitAdaptor(memory.LargeObjectResource(), limit_bytes="1 MiB")
        layer = {layer}
        collected = []
        gc.callbacks.append(lambda phase, _: collected.append(phase))
        for _ in range(1500):
            node = Node()
            node.itself, node.array = node, layer.allocate(512).numpy()
        del node
        held = [[], []]
        threads = [threading.Thread(target=fill, args=(mine,)) for mine in held]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert "stop" in collected
        assert layer.statistics().current_count == sum(map(len, held))
        assert layer.check().ok
        """,
        timeout_seconds=60,
    )
