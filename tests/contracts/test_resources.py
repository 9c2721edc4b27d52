"""What every resource and every adaptor promises, whatever it is made of.

A new resource joins with a line in RESOURCES, and with one in CACHING if it keeps freed blocks.
"""

import gc
import itertools
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from running import in_forked_child

from moirai import memory
from moirai.errors import InvalidArgument, OutOfMemory

KIB = 1 << 10
MIB = 1 << 20

Make = Callable[[], memory.Resource]

# A machine of two nodes, wherever the tests run: half of the CPUs, and the one node that is there.
HERE = memory.Topology.read()
TWO_NODES = memory.Topology(
    nodes=tuple(
        memory.NumaNode(node, HERE.online_cpus[node::2], HERE.nodes[0].memory_bytes, {node: 10})
        for node in (0, 1)
    ),
    online_cpus=HERE.online_cpus,
    offline_cpus=(),
    allowed_cpus=HERE.allowed_cpus,
    allowed_nodes=(0, 1),
)


class Awkward:
    """Counts of sizes between the standard classes; a slab that is tuned to them has extra ones."""

    def sizes(self) -> list[tuple[int, int]]:
        return [(1088, 9), (2112, 3), (4672, 2), (9344, 1)]


def tuned(slab: memory.SlabResource | memory.PoolResource) -> memory.Resource:
    assert slab.tune(Awkward()).classes
    return slab


# decay_seconds=None where a test reads what is cached: no tick comes in between.
CACHING: dict[str, Make] = {
    "large, best fit": lambda: memory.LargeObjectResource(fit="best", decay_seconds=None),
    "large, first fit": lambda: memory.LargeObjectResource(fit="first", decay_seconds=None),
    "large, worst fit": lambda: memory.LargeObjectResource(fit="worst", decay_seconds=None),
    "large, huge pages always": lambda: memory.LargeObjectResource(
        huge_pages="always", decay_seconds=None
    ),
    "large, huge pages never": lambda: memory.LargeObjectResource(
        huge_pages="never", decay_seconds=None
    ),
    "slab": lambda: memory.SlabResource(memory.LargeObjectResource(decay_seconds=None)),
    "pool": lambda: memory.PoolResource(decay_seconds=None),
    "pool, tuned": lambda: tuned(memory.PoolResource(decay_seconds=None)),
    "statistics over pool": lambda: memory.StatisticsAdaptor(
        memory.PoolResource(decay_seconds=None)
    ),
    "numa, one node": lambda: memory.NumaResource(0, topology=TWO_NODES, decay_seconds=None),
    "limit over pool": lambda: memory.LimitAdaptor(
        memory.PoolResource(decay_seconds=None), limit_bytes="1 GiB"
    ),
    "shared memory": lambda: memory.SharedMemoryResource("256 MiB"),
    "statistics over limit over shared memory": lambda: memory.StatisticsAdaptor(
        memory.LimitAdaptor(memory.SharedMemoryResource("256 MiB"), limit_bytes="1 GiB")
    ),
    "arena": lambda: memory.ArenaResource(memory.PoolResource(decay_seconds=None)),
    "thread-local arena": lambda: memory.ThreadLocalArena(memory.PoolResource(decay_seconds=None)),
    "limit over statistics over arena": lambda: memory.LimitAdaptor(
        memory.StatisticsAdaptor(memory.ArenaResource(memory.PoolResource(decay_seconds=None))),
        limit_bytes="1 GiB",
    ),
}
RESOURCES: dict[str, Make] = {
    **CACHING,
    "system": memory.SystemResource,
    "slab over system": lambda: memory.SlabResource(memory.SystemResource()),
    "slab, defaults": memory.SlabResource,
    "slab, tuned, over system": lambda: tuned(memory.SlabResource(memory.SystemResource())),
    "slab, presets": lambda: memory.SlabResource(preset=["rows", "index_nodes"]),
    "large, defaults": memory.LargeObjectResource,
    "large, no cache": lambda: memory.LargeObjectResource(cache_cap_bytes=0),
    "pool, defaults": memory.PoolResource,
    "pool, capped": lambda: memory.PoolResource(cache_cap_bytes="1 MiB", decay_seconds=0.01),
    "numa, local": lambda: memory.NumaResource("local", topology=TWO_NODES),
    "numa, interleaved": lambda: memory.NumaResource("interleave", topology=TWO_NODES),
    "realtime": lambda: memory.RealtimeResource("192 MiB", allow_unlocked=True),
    "priority": lambda: memory.PriorityResource(realtime_bytes="1 MiB", allow_unlocked=True),
    "priority, high lane": lambda: memory.PriorityResource(
        realtime_bytes="1 MiB", allow_unlocked=True
    ).lane(memory.Priority.HIGH),
    "limit over priority of slabs over libc": lambda: memory.LimitAdaptor(
        memory.PriorityResource(
            realtime_bytes="1 MiB",
            high=memory.SlabResource(memory.SystemResource()),
            normal=memory.SlabResource(memory.SystemResource()),
            allow_unlocked=True,
        ),
        limit_bytes="1 GiB",
    ),
    "pattern over system": lambda: memory.PatternAdaptor(memory.SystemResource()),
    "adaptive": memory.AdaptiveResource,
    "adaptive, over system, restless": lambda: memory.AdaptiveResource(
        {memory.Workload.LOW_LATENCY: memory.SlabResource(memory.SystemResource())},
        long_seconds=0.001,
        high_rate=100,
    ),
    "adaptive, counterfactual": lambda: memory.AdaptiveResource(counterfactual=True),
    "arena, small chunks": lambda: memory.ArenaResource(chunk_bytes="4 KiB"),
    "arena, odd chunks": lambda: memory.ArenaResource(chunk_bytes=300_001),
    "arena, large chunks": lambda: memory.ArenaResource(chunk_bytes="64 MiB"),
    "arena over system": lambda: memory.ArenaResource(memory.SystemResource()),
    "arena over limit over arena": lambda: memory.ArenaResource(
        memory.LimitAdaptor(memory.ArenaResource(chunk_bytes="256 KiB"), limit_bytes="1 GiB"),
        chunk_bytes="32 KiB",
    ),
    "slab over arena": lambda: memory.SlabResource(memory.ArenaResource()),
    "transaction": lambda: memory.TransactionArenas(
        profiles={"one": ("64 KiB", "1 GiB")}, record_every=1
    ).begin("contract"),
    "statistics over thread-local arena": lambda: memory.StatisticsAdaptor(
        memory.ThreadLocalArena()
    ),
    "slab over limit over large": lambda: memory.SlabResource(
        memory.LimitAdaptor(memory.LargeObjectResource(), limit_bytes="1 GiB")
    ),
    "limit over statistics over slab": lambda: memory.LimitAdaptor(
        memory.StatisticsAdaptor(memory.SlabResource()), limit_bytes=1 << 30
    ),
    "statistics over statistics over system": lambda: memory.StatisticsAdaptor(
        memory.StatisticsAdaptor(memory.SystemResource())
    ),
}

every_resource = pytest.mark.parametrize("make", RESOURCES.values(), ids=RESOURCES.keys())
every_caching_resource = pytest.mark.parametrize("make", CACHING.values(), ids=CACHING.keys())

# Slab classes and their borders, the step to upstream, units, pages, lazily zeroed sizes.
SIZES = [0, 1, 63, 64, 65, 1024, 1025, 4096, 16 * KIB, 32 * KIB, 32 * KIB + 1, 64 * KIB + 1,
         300 * KIB, 2 * MIB, 4 * MIB, 5 * MIB + 3]  # fmt: skip
sizes = st.one_of(
    st.integers(0, 4 * KIB),
    st.integers(0, 96 * KIB),
    st.integers(0, 2 * MIB),
    st.sampled_from(SIZES),
)
alignments = st.sampled_from([64, 64, 64, 128, 4096, 64 * KIB, 2 * MIB])


def address(buffer: memory.Buffer) -> int:
    return int(np.frombuffer(buffer, dtype="uint8").ctypes.data)


def assert_adds_up(resource: memory.Resource, live: list[memory.Buffer]) -> None:
    now = resource.statistics()
    assert now.current_count == len(live)
    assert now.current_bytes == sum(buffer.block_bytes for buffer in live)
    assert all(buffer.block_bytes >= max(buffer.size_bytes, 1) for buffer in live)
    assert now.cached_bytes <= now.resident_bytes
    assert now.hits + now.misses == now.total_count
    assert now.peak_bytes >= now.current_bytes
    assert now.peak_count >= now.current_count
    assert now.invalid_frees == 0


@contextmanager
def checked(make: Make) -> Iterator[memory.Resource]:
    """Give a fresh resource; when the caller has dropped its blocks, its books must balance."""
    resource = make()
    yield resource
    gc.collect()
    assert_adds_up(resource, live=[])
    assert resource.statistics().current_bytes == 0
    health = resource.check()
    assert health.ok, str(health)


# --- blocks -------------------------------------------------------------------------------------


class Model:
    """What a resource must look like from outside: live blocks, each with its own byte in it."""

    def __init__(self, resource: memory.Resource) -> None:
        self.resource = resource
        self.live: list[tuple[memory.Buffer, int]] = []
        self.filled_count = 0

    def allocate(self, size_bytes: int, alignment_bytes: int, zeroed: bool) -> None:
        buffer = self.resource.allocate(size_bytes, alignment_bytes=alignment_bytes, zeroed=zeroed)
        content = np.frombuffer(buffer, dtype="uint8")
        assert len(buffer) == size_bytes == content.size
        if size_bytes:
            assert content.ctypes.data % alignment_bytes == 0
        if zeroed:
            assert not content.any()
        self.filled_count += 1
        fill = self.filled_count % 255 + 1
        content[:] = fill
        self.live.append((buffer, fill))

    def drop(self, index: int) -> None:
        if self.live:
            buffer, fill = self.live.pop(index % len(self.live))
            assert (np.frombuffer(buffer, dtype="uint8") == fill).all()

    def assert_holds(self) -> None:
        spans = sorted((address(buffer), buffer.size_bytes) for buffer, _ in self.live)
        for (start, size), (following, _) in itertools.pairwise(spans):
            assert start + size <= following, "two live blocks overlap"
        assert_adds_up(self.resource, [buffer for buffer, _ in self.live])


steps = st.one_of(
    st.tuples(st.just("allocate"), sizes, alignments, st.booleans()),
    st.tuples(st.just("drop"), st.integers(0, 63)),
    st.tuples(st.just("trim"), st.integers(0, 4 * MIB)),
)


@every_resource
@settings(max_examples=25)
@given(steps=st.lists(steps, max_size=40))
def test_live_blocks_never_overlap_and_keep_their_content(
    make: Make, steps: list[tuple[str, ...]]
) -> None:
    with checked(make) as resource:
        model = Model(resource)
        for step in steps:
            match step:
                case ("allocate", size_bytes, alignment_bytes, zeroed):
                    model.allocate(size_bytes, alignment_bytes, zeroed)
                case ("drop", index):
                    model.drop(index)
                case ("trim", target_bytes):
                    assert resource.trim(target_bytes) >= 0
            model.assert_holds()
        while model.live:
            model.drop(0)


@every_resource
@pytest.mark.parametrize("alignment_bytes", [1 << power for power in range(6, 22)])
def test_alignment_is_honoured(make: Make, alignment_bytes: int) -> None:
    with checked(make) as resource:
        buffers = [
            resource.allocate(size_bytes, alignment_bytes=alignment_bytes)
            for size_bytes in (1, 100, 5000, 70 * KIB)
        ]
        assert [address(buffer) % alignment_bytes for buffer in buffers] == [0, 0, 0, 0]
        del buffers


@every_resource
@pytest.mark.parametrize("size_bytes", SIZES)
def test_zeroed_block_is_zero_also_where_a_dirty_one_lay(make: Make, size_bytes: int) -> None:
    with checked(make) as resource:
        for _ in range(3):
            dirty = [resource.allocate(size_bytes) for _ in range(3)]
            for buffer in dirty:
                np.frombuffer(buffer, dtype="uint8")[:] = 0xAB
            del dirty, buffer
            clean = [resource.allocate(size_bytes, zeroed=True) for _ in range(4)]
            assert not any(np.frombuffer(buffer, dtype="uint8").any() for buffer in clean)
            del clean


@every_resource
def test_size_zero_is_a_block_with_nothing_in_it(make: Make) -> None:
    with checked(make) as resource:
        first, second = resource.allocate(0), resource.allocate(0, zeroed=True)
        assert (first.size_bytes, len(first), bytes(first)) == (0, 0, b"")
        assert_adds_up(resource, [first, second])
        assert resource.statistics().current_bytes > 0
        del first, second


@every_caching_resource
@pytest.mark.parametrize("size_bytes", [64, 1000, 20 * KIB, 100 * KIB, 1 * MIB, 8 * MIB])
def test_block_is_reused_after_the_last_view_dies(make: Make, size_bytes: int) -> None:
    with checked(make) as resource:
        view = resource.allocate(size_bytes).numpy()
        view[:] = 1
        tail = view[-1:]
        del view
        before = resource.statistics()
        other = resource.allocate(size_bytes).numpy()
        assert not np.shares_memory(tail, other)
        del tail, other

        again = resource.allocate(size_bytes)
        after = resource.statistics()
        del again

        assert after.hits > before.hits
        assert after.current_count == 1


@every_caching_resource
def test_reuse_is_counted_in_bytes(make: Make) -> None:
    with checked(make) as resource:
        resource.allocate(8 * MIB).numpy()[:] = 1
        before = resource.statistics().reused_bytes
        buffer = resource.allocate(8 * MIB)
        assert resource.statistics().reused_bytes - before >= 8 * MIB
        del buffer


# --- groups -------------------------------------------------------------------------------------


@every_resource
def test_group_is_a_block_for_each_size_in_their_order(make: Make) -> None:
    with checked(make) as resource:
        group = resource.allocate_group(SIZES, alignment_bytes=128, zeroed=True)
        assert [buffer.size_bytes for buffer in group] == SIZES
        assert all(address(buffer) % 128 == 0 for buffer in group if buffer.size_bytes)
        assert not any(np.frombuffer(buffer, dtype="uint8").any() for buffer in group)
        assert all(buffer.resource is resource for buffer in group)
        for index, buffer in enumerate(group):
            np.frombuffer(buffer, dtype="uint8")[:] = index
        for index, buffer in enumerate(group):
            assert (np.frombuffer(buffer, dtype="uint8") == index).all()
        assert_adds_up(resource, group)
        del group[::2]
        assert_adds_up(resource, group)
        del group, buffer


@every_resource
def test_group_of_nothing_is_empty(make: Make) -> None:
    with checked(make) as resource:
        assert resource.allocate_group([]) == []
        assert resource.statistics().total_count == 0


@every_resource
@pytest.mark.parametrize("small", [[], [100, 5000], [100, 40 * KIB, 3 * MIB]])
def test_group_that_cannot_be_met_takes_nothing(make: Make, small: list[int]) -> None:
    with checked(make) as resource:
        kept = resource.allocate(1000)
        too_much = [1 << 46] * 3  # each may be asked for, but there are no addresses for all
        with pytest.raises(OutOfMemory):
            resource.allocate_group(small + too_much + small)
        assert_adds_up(resource, [kept])
        np.frombuffer(resource.allocate(100 * KIB), dtype="uint8")[:] = 1
        del kept


@every_resource
@pytest.mark.parametrize(
    ("sizes", "error", "named"),
    [
        ([64, -1], InvalidArgument, r"sizes\[1\]: must be at least 0, got -1"),
        ([64, 5000, "64"], TypeError, r"sizes\[2\]: must be an int, got str"),
        ([True], TypeError, r"sizes\[0\]"),
        (64, TypeError, "sizes: must be an iterable of int, got int"),
        ([64, 1 << 47], OutOfMemory, str(1 << 47)),
        ([64, 1 << 80], OutOfMemory, str(1 << 80)),
    ],
)
def test_group_with_an_impossible_size_is_refused_before_anything_is_taken(
    make: Make, sizes: list[int], error: type[Exception], named: str
) -> None:
    with checked(make) as resource:
        with pytest.raises(error, match=named):
            resource.allocate_group(sizes)
        with pytest.raises(InvalidArgument, match="alignment_bytes"):
            resource.allocate_group([64], alignment_bytes=3)
        assert resource.statistics().total_count == 0


# --- what cannot be met -------------------------------------------------------------------------


@every_resource
@pytest.mark.parametrize("size_bytes", [1 << 47, 1 << 62, (1 << 63) - 1, 1 << 63, 1 << 100])
@pytest.mark.parametrize("zeroed", [False, True])
def test_huge_request_is_out_of_memory_and_leaves_nothing_behind(
    make: Make, size_bytes: int, zeroed: bool
) -> None:
    with checked(make) as resource:
        kept = resource.allocate(1000)
        with pytest.raises(OutOfMemory, match=str(size_bytes)):
            resource.allocate(size_bytes, zeroed=zeroed)
        assert_adds_up(resource, [kept])
        np.frombuffer(resource.allocate(100 * KIB), dtype="uint8")[:] = 1
        del kept


@every_resource
@pytest.mark.parametrize("size_bytes", [1 << 47, 1 << 62, (1 << 63) - 1])
@pytest.mark.parametrize("make_array", [np.empty, np.zeros], ids=["empty", "zeros"])
def test_huge_array_is_a_memory_error_and_leaves_nothing_behind(
    make: Make, size_bytes: int, make_array: Callable[..., object]
) -> None:
    with checked(make) as resource, memory.use(resource):
        for _ in range(3):
            with pytest.raises(MemoryError):
                make_array(size_bytes, dtype="uint8")
        assert resource.statistics().current_count == 0
        np.empty(0).resize(0, refcheck=False)
        assert memory.handler_of(np.ones(1000)) is resource


def test_out_of_memory_is_a_memory_error() -> None:
    with pytest.raises(MemoryError):
        memory.PoolResource().allocate(1 << 62)


@every_resource
@pytest.mark.parametrize("size_bytes", [-1, -(1 << 63), -(1 << 80)])
def test_negative_size_is_refused_by_name(make: Make, size_bytes: int) -> None:
    with checked(make) as resource, pytest.raises(InvalidArgument, match="size_bytes"):
        resource.allocate(size_bytes)


@every_resource
@pytest.mark.parametrize("size_bytes", ["64", 64.0, None, b"64", [64]])
def test_size_of_another_type_is_refused_by_name(make: Make, size_bytes: object) -> None:
    with (
        checked(make) as resource,
        pytest.raises((InvalidArgument, TypeError), match="size_bytes"),
    ):
        resource.allocate(size_bytes)  # type: ignore[arg-type]


@every_resource
@pytest.mark.parametrize("alignment_bytes", [0, 3, -64, 96, 1 << 40, 1 << 70])
def test_impossible_alignment_is_refused_by_name(make: Make, alignment_bytes: int) -> None:
    with checked(make) as resource, pytest.raises(InvalidArgument, match="alignment_bytes"):
        resource.allocate(64, alignment_bytes=alignment_bytes)


@every_resource
@pytest.mark.parametrize("alignment_bytes", ["64", 64.5, None])
def test_alignment_of_another_type_is_refused_by_name(make: Make, alignment_bytes: object) -> None:
    with (
        checked(make) as resource,
        pytest.raises((InvalidArgument, TypeError), match="alignment_bytes"),
    ):
        resource.allocate(64, alignment_bytes=alignment_bytes)  # type: ignore[arg-type]


@every_resource
def test_options_are_keyword_only(make: Make) -> None:
    with checked(make) as resource, pytest.raises(TypeError):
        resource.allocate(64, 64)  # type: ignore[misc]


@every_resource
def test_negative_trim_target_is_refused_by_name(make: Make) -> None:
    with checked(make) as resource, pytest.raises(InvalidArgument, match="target_bytes"):
        resource.trim(-1)


# --- lifetimes ----------------------------------------------------------------------------------


@every_resource
@pytest.mark.parametrize("size_bytes", [100, 20 * KIB, 3 * MIB])
@pytest.mark.parametrize(
    "view_of",
    [
        lambda buffer: buffer.numpy(),
        lambda buffer: buffer.numpy()[1:][::2],
        lambda buffer: np.frombuffer(memoryview(buffer), dtype="uint8"),
        np.from_dlpack,
    ],
    ids=["numpy", "slice", "memoryview", "dlpack"],
)
def test_view_outlives_its_buffer_and_its_resource(
    make: Make, size_bytes: int, view_of: Callable[[memory.Buffer], np.ndarray]
) -> None:
    resource = make()
    buffer = resource.allocate(size_bytes, zeroed=True)
    view = view_of(buffer)
    np.frombuffer(buffer, dtype="uint8")[:] = 7
    del resource, buffer
    gc.collect()
    other = make()
    neighbours = [other.allocate(size_bytes, zeroed=True) for _ in range(8)]
    assert (view == 7).all()
    view_sum = int(view.astype("uint64").sum())
    assert view_sum == 7 * view.size
    del neighbours


@every_resource
def test_buffer_may_be_dropped_in_another_thread(make: Make) -> None:
    with checked(make) as resource:
        handed: list[memory.Buffer] = [
            resource.allocate(size) for size in (0, 64, 5000, 40 * KIB, 1 * MIB) for _ in range(20)
        ]
        thread = threading.Thread(target=handed.clear)
        thread.start()
        thread.join()
        assert resource.statistics().current_bytes == 0


@every_resource
def test_blocks_of_a_thread_that_ended_are_given_back(make: Make) -> None:
    with checked(make) as resource:
        kept: list[memory.Buffer] = []

        def work() -> None:
            kept.extend(resource.allocate(size) for size in (64, 5000, 40 * KIB))
            for _ in range(50):
                resource.allocate(256)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert_adds_up(resource, kept)
        kept.clear()


@every_resource
def test_threads_may_share_a_resource(make: Make) -> None:
    with checked(make) as resource:
        handed: queue.SimpleQueue[tuple[memory.Buffer, int]] = queue.SimpleQueue()
        failures: list[str] = []

        def verify(buffer: memory.Buffer, fill: int) -> None:
            if not (np.frombuffer(buffer, dtype="uint8") == fill).all():
                failures.append(f"a block of {buffer.size_bytes} bytes was overwritten")

        def hammer(seed: int) -> None:
            random = np.random.default_rng(seed)
            kept: list[tuple[memory.Buffer, int]] = []
            for turn in range(300):
                size = int(random.choice([32, 700, 9000, 33 * KIB, 200 * KIB]))
                fill = (seed * 100 + turn) % 255 + 1
                buffer = resource.allocate(size)
                np.frombuffer(buffer, dtype="uint8")[:] = fill
                (handed.put if turn % 3 == 0 else kept.append)((buffer, fill))
                if turn % 3 == 1:
                    with suppress(queue.Empty):
                        verify(*handed.get_nowait())
                if len(kept) > 20:
                    verify(*kept.pop(int(random.integers(len(kept)))))
                if turn % 100 == 99:
                    resource.trim()
            for pair in kept:
                verify(*pair)

        threads = [threading.Thread(target=hammer, args=(seed,)) for seed in (1, 2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        while not handed.empty():
            verify(*handed.get())
        assert failures == []


@every_resource
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_forked_child_allocates_and_frees_its_parents_blocks(make: Make) -> None:
    with checked(make) as resource:
        sizes = (64, 5000, 40 * KIB, 3 * MIB)
        buffers = [resource.allocate(size, zeroed=True) for size in sizes]
        np.frombuffer(buffers[0], dtype="uint8")[:] = 3

        def child(buffers: list[memory.Buffer] = buffers) -> None:
            assert bytes(buffers[0]) == b"\3" * 64
            buffers.clear()
            fresh = [resource.allocate(size, zeroed=True) for size in sizes]
            assert not any(np.frombuffer(buffer, dtype="uint8").any() for buffer in fresh)
            fresh.clear()
            resource.trim()
            assert resource.check().ok

        in_forked_child(child)
        assert bytes(buffers[0]) == b"\3" * 64
        del buffers, child


# --- memory given back --------------------------------------------------------------------------


@every_caching_resource
@pytest.mark.parametrize("size_bytes", [2000, 20 * KIB, 200 * KIB, 5 * MIB])
def test_trim_gives_cached_memory_back(make: Make, size_bytes: int) -> None:
    with checked(make) as resource:
        buffers = [resource.allocate(size_bytes) for _ in range(20 * MIB // size_bytes)]
        for buffer in buffers:
            np.frombuffer(buffer, dtype="uint8")[:] = 1
        buffers.clear()
        del buffer
        before = resource.statistics()
        assert before.cached_bytes >= 4 * MIB

        returned_bytes = resource.trim()

        after = resource.statistics()
        assert returned_bytes >= 4 * MIB
        assert before.resident_bytes - after.resident_bytes == returned_bytes
        assert after.cached_bytes == before.cached_bytes - returned_bytes
        assert resource.trim() <= after.cached_bytes


@every_caching_resource
def test_trim_keeps_at_most_its_target(make: Make) -> None:
    with checked(make) as resource:
        buffers = [resource.allocate(1 * MIB) for _ in range(16)]
        for buffer in buffers:
            np.frombuffer(buffer, dtype="uint8")[:] = 1
        buffers.clear()
        del buffer

        resource.trim(8 * MIB)

        assert resource.statistics().cached_bytes <= 8 * MIB


@every_resource
def test_trim_never_touches_live_blocks(make: Make) -> None:
    with checked(make) as resource:
        buffers = [resource.allocate(size) for size in SIZES]
        for index, buffer in enumerate(buffers):
            np.frombuffer(buffer, dtype="uint8")[:] = index
        resource.trim()
        for index, buffer in enumerate(buffers):
            assert (np.frombuffer(buffer, dtype="uint8") == index).all()
        del buffers, buffer


# --- reports ------------------------------------------------------------------------------------


@every_resource
def test_statistics_are_a_frozen_snapshot(make: Make) -> None:
    with checked(make) as resource:
        before = resource.statistics()
        buffer = resource.allocate(1000)
        assert before.current_bytes == 0
        assert resource.statistics().current_bytes >= 1000
        with pytest.raises((AttributeError, TypeError)):
            before.current_bytes = 1  # type: ignore[misc]
        fields = before.as_dict()
        assert {name: getattr(before, name) for name in fields} == fields
        assert fields.keys() >= {
            "current_bytes", "current_count", "peak_bytes", "peak_count", "total_bytes",
            "total_count", "hits", "misses", "resident_bytes", "cached_bytes", "reused_bytes",
            "reused_pages", "decommitted_bytes", "invalid_frees",
        }  # fmt: skip
        assert all(type(value) is int and value >= 0 for value in fields.values())
        del buffer


@every_resource
def test_peak_outlives_the_blocks_that_made_it(make: Make) -> None:
    with checked(make) as resource:
        buffers = [resource.allocate(100 * KIB) for _ in range(10)]
        buffers.clear()
        now = resource.statistics()
        assert now.peak_bytes >= 1000 * KIB
        assert now.peak_count == now.total_count == 10


@every_resource
def test_peak_is_at_most_what_was_ever_handed_out(make: Make) -> None:
    with checked(make) as resource:
        resource.allocate(100)
        now = resource.statistics()
        assert now.peak_count <= now.total_count
        assert now.peak_bytes <= now.total_bytes


@every_resource
def test_check_of_a_resource_in_use_reports_health(make: Make) -> None:
    with checked(make) as resource:
        buffers = [resource.allocate(size) for size in SIZES]
        health = resource.check()
        assert health.ok, str(health)
        assert health.findings == []
        assert all(isinstance(count, int) for count in health.counts.values())
        assert str(health)
        del buffers


@every_resource
def test_repr_names_class_and_use(make: Make) -> None:
    with checked(make) as resource:
        assert type(resource).__name__ in repr(resource)
        buffer = resource.allocate(4321)
        assert "Buffer" in repr(buffer)
        assert "4321" in repr(buffer)
        del buffer


# --- buffers ------------------------------------------------------------------------------------


@every_resource
def test_buffer_exports_its_bytes(make: Make) -> None:
    with checked(make) as resource:
        buffer = resource.allocate(1000, zeroed=True)
        with memoryview(buffer) as view:
            assert (view.nbytes, view.format, view.ndim, view.itemsize) == (1000, "B", 1, 1)
            assert view.c_contiguous
            assert not view.readonly
            view[:3] = b"abc"
        assert bytes(buffer)[:4] == b"abc\0"
        assert np.frombuffer(buffer, dtype="uint8", count=3).tobytes() == b"abc"
        assert buffer.resource is not None
        del buffer, view


@every_resource
def test_numpy_array_of_a_buffer_shares_its_memory(make: Make) -> None:
    with checked(make) as resource:
        buffer = resource.allocate(96, zeroed=True)
        assert buffer.numpy().shape == (96,)
        assert buffer.numpy("float64").shape == (12,)
        matrix = buffer.numpy(np.dtype("int32"), shape=(4, 6))
        matrix[3, 5] = -1
        assert bytes(buffer)[-4:] == b"\xff" * 4
        assert matrix.flags.writeable
        assert matrix.flags.c_contiguous
        del buffer, matrix


@every_resource
@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"dtype": "float64"}, "dtype|shape|size_bytes"),  # 100 is no multiple of 8
        ({"dtype": "uint8", "shape": (101,)}, "shape"),
        ({"dtype": "uint8", "shape": (-1, 5)}, "shape"),
        ({"dtype": "uint8", "shape": (2**33, 2**33)}, "shape"),
        ({"dtype": "object"}, "dtype"),
        ({"dtype": "no such type"}, "no such type|dtype"),
    ],
)
def test_numpy_array_that_does_not_fit_is_refused_by_name(
    make: Make, arguments: dict[str, object], named: str
) -> None:
    with checked(make) as resource:
        buffer = resource.allocate(100)
        with pytest.raises((InvalidArgument, TypeError), match=named):
            buffer.numpy(**arguments)  # type: ignore[arg-type]
        del buffer


@every_resource
def test_dlpack_round_trip_shares_the_memory(make: Make) -> None:
    with checked(make) as resource:
        buffer = resource.allocate(1000, zeroed=True)
        assert tuple(buffer.__dlpack_device__()) == (1, 0)  # kDLCPU
        tensor = np.from_dlpack(buffer)
        assert (tensor.dtype, tensor.shape) == (np.dtype("uint8"), (1000,))
        np.frombuffer(buffer, dtype="uint8")[10] = 5
        assert tensor[10] == 5
        del buffer, tensor


def test_unused_dlpack_capsule_gives_its_block_back() -> None:
    with checked(memory.PoolResource) as resource:
        buffer = resource.allocate(1000)
        capsule = buffer.__dlpack__()
        del buffer
        assert resource.statistics().current_count == 1
        del capsule


# --- composition --------------------------------------------------------------------------------


def test_base_class_cannot_be_constructed() -> None:
    with pytest.raises(TypeError):
        memory.Resource()


@pytest.mark.parametrize(
    "wrap",
    [
        memory.SlabResource,
        memory.StatisticsAdaptor,
        lambda upstream: memory.LimitAdaptor(upstream, limit_bytes="1 MiB"),
        memory.ArenaResource,
        memory.ThreadLocalArena,
        lambda upstream: memory.TransactionArenas(upstream).begin("contract"),
    ],
    ids=["slab", "statistics", "limit", "arena", "thread-local arena", "transaction"],
)
def test_upstream_is_what_was_given_and_nothing_else(
    wrap: Callable[[object], memory.Resource],
) -> None:
    upstream = memory.SystemResource()
    assert wrap(upstream).upstream is upstream  # type: ignore[attr-defined]
    with pytest.raises((InvalidArgument, TypeError), match="upstream"):
        wrap("system")


def test_upstream_outlives_its_last_name() -> None:
    stack = memory.LimitAdaptor(
        memory.StatisticsAdaptor(memory.SlabResource(memory.LargeObjectResource())),
        limit_bytes="1 MiB",
    )
    view = stack.allocate(500).numpy()
    del stack
    gc.collect()
    view[:] = 1
    assert view.sum() == 500
