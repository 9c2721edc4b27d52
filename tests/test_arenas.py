"""What arenas add to the contract: savepoints, resets, typed arrays, batches, threads' own."""

import gc
import itertools
import threading
from collections.abc import Callable
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from running import in_forked_child, run_threads

from moirai import memory
from moirai.errors import InvalidArgument, OutOfMemory

KIB = 1 << 10
MIB = 1 << 20

RunPython = Callable[..., str]
ARENAS = {"arena": memory.ArenaResource, "thread-local arena": memory.ThreadLocalArena}
every_arena = pytest.mark.parametrize("make", ARENAS.values(), ids=ARENAS.keys())


def address(buffer: memory.Buffer) -> int:
    return int(np.frombuffer(buffer, dtype="uint8").ctypes.data)


def counted(resource: memory.Resource, name: str) -> int:
    health = resource.check()
    assert health.ok, str(health)
    return health.counts[name]


# --- reset --------------------------------------------------------------------------------------


@every_arena
def test_reset_names_how_many_views_are_in_the_way(make) -> None:
    arena = make()
    views = [arena.array(100) for _ in range(3)]
    with pytest.raises(InvalidArgument, match=r"retire: .* 3 blocks are alive"):
        arena.reset()
    del views[1:]
    with pytest.raises(InvalidArgument, match=r"retire: .* 1 block is alive"):
        arena.reset()
    views.clear()
    assert arena.reset() == 0


@every_arena
def test_retired_chunks_stay_with_their_views_and_are_never_cut_again(make) -> None:
    arena = make(chunk_bytes="16 KiB")
    old = [arena.array(300, "uint8") for _ in range(100)]
    for index, view in enumerate(old):
        view[:] = index
    assert arena.reset(retire=True) == 100
    assert counted(arena, "arena.retired_blocks") == 100

    new = [arena.array(300, "uint8", zeroed=True) for _ in range(200)]

    assert all((view == index).all() for index, view in enumerate(old))
    assert not any(np.shares_memory(view, other) for view in old[::10] for other in new[::10])
    assert counted(arena, "arena.retired_blocks") == 100
    old.clear()
    del view
    assert counted(arena, "arena.retired_blocks") == 0
    with pytest.raises(InvalidArgument, match="200 blocks"):
        arena.reset()


def test_retired_chunks_go_upstream_and_others_stay_warm() -> None:
    upstream = memory.StatisticsAdaptor(memory.SystemResource())
    arena = memory.ArenaResource(upstream, chunk_bytes="16 KiB")
    views = [arena.array(1000, "uint8") for _ in range(100)]
    chunk_count = upstream.statistics().current_count
    views.clear()
    assert arena.reset() == 0
    assert upstream.statistics().current_count == chunk_count, "warm"

    views = [arena.array(1000, "uint8") for _ in range(100)]
    assert upstream.statistics().total_count == chunk_count, "nothing new was drawn"
    assert arena.reset(retire=True) == 100
    views.clear()
    assert upstream.statistics().current_count == 0


# --- savepoints ---------------------------------------------------------------------------------


@every_arena
def test_rollback_cuts_the_same_memory_again(make) -> None:
    arena = make()
    before = arena.allocate(1000)
    savepoint = arena.savepoint()
    first = address(arena.allocate(5000))
    for _ in range(3):
        assert arena.rollback(savepoint) == 0
        assert address(arena.allocate(5000)) == first
    assert address(before) < first


@every_arena
def test_rollback_counts_only_what_came_after_the_savepoint(make) -> None:
    arena = make(chunk_bytes="8 KiB")
    before = [arena.allocate(500) for _ in range(50)]
    outer = arena.savepoint()
    between = [arena.allocate(500) for _ in range(20)]
    inner = arena.savepoint()
    after = [arena.allocate(size) for size in (64, 500, 20_000)]

    with pytest.raises(InvalidArgument, match="3 blocks are alive"):
        arena.rollback(inner)
    with pytest.raises(InvalidArgument, match="23 blocks are alive"):
        arena.rollback(outer)
    after.clear()
    assert arena.rollback(inner) == 0
    assert arena.rollback(outer, retire=True) == 20
    assert arena.rollback(outer) == 0
    with pytest.raises(InvalidArgument, match=r"savepoint: .* ended"):
        arena.rollback(inner)
    with pytest.raises(InvalidArgument, match="50 blocks are alive"):
        arena.reset()
    before.clear()
    assert arena.reset() == 0, "what was retired is its views' business"
    assert arena.statistics().current_count == len(between) == 20


@every_arena
def test_reset_ends_every_savepoint(make) -> None:
    arena = make()
    savepoint = arena.savepoint()
    arena.reset()
    with pytest.raises(InvalidArgument, match=r"savepoint: .* ended"):
        arena.rollback(savepoint)


@every_arena
def test_savepoint_is_forgotten_with_its_last_reference(make) -> None:
    arena = make()
    for _ in range(1000):
        kept = arena.savepoint()
        arena.allocate(64)
    assert counted(arena, "arena.savepoints") == 1
    del kept
    assert counted(arena, "arena.savepoints") == 0


@every_arena
def test_savepoint_of_another_arena_is_refused_by_name(make) -> None:
    arena, other = make(), make()
    with pytest.raises(InvalidArgument, match="savepoint: must be one of this arena"):
        arena.rollback(other.savepoint(), retire=True)
    with pytest.raises(TypeError, match="savepoint"):
        arena.rollback(1)


@every_arena
def test_retire_is_keyword_only(make) -> None:
    arena = make()
    with pytest.raises(TypeError):
        arena.reset(True)
    with pytest.raises(TypeError):
        arena.rollback(arena.savepoint(), True)


# --- a model ------------------------------------------------------------------------------------


class ArenaAgainstLists(RuleBasedStateMachine):
    """Blocks in lists, each with the time it was made: what is alive, and what it must hold."""

    @initialize(chunk_bytes=st.sampled_from([4 * KIB, 16 * KIB, 100_000]))
    def start(self, chunk_bytes: int) -> None:
        self.arena = memory.ArenaResource(chunk_bytes=chunk_bytes)
        self.time = 0
        self.live: list[tuple[object, np.ndarray, int, int]] = []
        self.retired: list[tuple[object, np.ndarray, int, int]] = []
        self.savepoints: list[tuple[memory.Savepoint, int]] = []

    def add(self, owner: object, content: np.ndarray) -> None:
        self.time += 1
        fill = self.time % 255 + 1
        content[...] = fill
        self.live.append((owner, content, fill, self.time))

    @rule(size=st.integers(1, 3000))
    def allocate(self, size: int) -> None:
        buffer = self.arena.allocate(size)
        self.add(buffer, np.frombuffer(buffer, dtype="uint8"))

    @rule(size=st.integers(4000, 200_000))
    def allocate_more_than_a_chunk(self, size: int) -> None:
        buffer = self.arena.allocate(size, zeroed=True)
        content = np.frombuffer(buffer, dtype="uint8")
        assert not content.any()
        self.add(buffer, content)

    @rule(shape=npst.array_shapes(max_dims=3, max_side=20))
    def array(self, shape: tuple[int, ...]) -> None:
        view = self.arena.array(shape, "uint8")
        assert view.shape == shape
        self.add(None, view)

    @rule(count=st.integers(1, 40), size=st.integers(1, 200))
    def batch(self, count: int, size: int) -> None:
        rows = self.arena.allocate_batch(count, size).numpy()
        assert rows.shape == (count, size)
        self.add(None, rows)

    @precondition(lambda self: self.live or self.retired)
    @rule(index=st.integers(0, 1000))
    def drop(self, index: int) -> None:
        blocks = self.live + self.retired
        dropped = blocks[index % len(blocks)]
        self.live = [block for block in self.live if block is not dropped]
        self.retired = [block for block in self.retired if block is not dropped]

    @rule()
    def save(self) -> None:
        self.savepoints.append((self.arena.savepoint(), self.time))

    @precondition(lambda self: self.savepoints)
    @rule(index=st.integers(0, 100))
    def forget(self, index: int) -> None:
        del self.savepoints[index % len(self.savepoints)]

    def go_back(self, time: int, go: Callable[[], int], *, retire: bool) -> bool:
        gone = [block for block in self.live if block[3] > time]
        if gone and not retire:
            with pytest.raises(InvalidArgument, match=f"retire: .* {len(gone)} block"):
                go()
            return False
        assert go() == len(gone)
        self.live = [block for block in self.live if block[3] <= time]
        self.retired += gone
        return True

    @precondition(lambda self: self.savepoints)
    @rule(index=st.integers(0, 100), retire=st.booleans())
    def roll_back(self, index: int, retire: bool) -> None:
        index %= len(self.savepoints)
        savepoint, time = self.savepoints[index]
        if self.go_back(time, lambda: self.arena.rollback(savepoint, retire=retire), retire=retire):
            del self.savepoints[index + 1 :]

    @rule(retire=st.booleans())
    def reset(self, retire: bool) -> None:
        if self.go_back(-1, lambda: self.arena.reset(retire=retire), retire=retire):
            self.savepoints.clear()

    @rule()
    def trim(self) -> None:
        assert self.arena.trim() >= 0

    @invariant()
    def holds(self) -> None:
        if not hasattr(self, "arena"):
            return
        for _, content, fill, _ in self.live + self.retired:
            assert (content == fill).all()
        statistics = self.arena.statistics()
        assert statistics.current_count == len(self.live) + len(self.retired)
        assert statistics.hits + statistics.misses == statistics.total_count
        assert counted(self.arena, "arena.retired_blocks") == len(self.retired)
        assert counted(self.arena, "arena.savepoints") == len(self.savepoints)


TestArenaAgainstLists = ArenaAgainstLists.TestCase
TestArenaAgainstLists.settings = settings(max_examples=60, stateful_step_count=40)


# --- typed arrays -------------------------------------------------------------------------------


@given(
    shape=npst.array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=6),
    dtype=st.one_of(
        npst.scalar_dtypes(),
        npst.array_dtypes(npst.scalar_dtypes(), max_size=3),
        npst.nested_dtypes(npst.scalar_dtypes(), max_leaves=3),
    ).filter(lambda dtype: dtype.itemsize > 0),
    zeroed=st.booleans(),
)
def test_array_is_what_numpy_would_make(shape, dtype, zeroed) -> None:
    arena = memory.ArenaResource()
    made, wanted = arena.array(shape, dtype, zeroed=zeroed), np.zeros(shape, dtype)
    assert (made.shape, made.dtype) == (wanted.shape, wanted.dtype)
    assert not made.size or made.strides == wanted.strides
    assert made.flags.c_contiguous
    assert made.flags.writeable
    assert made.flags.aligned
    assert made.ctypes.data % 64 == 0
    made[...] = wanted
    assert made.tobytes() == wanted.tobytes()
    del made
    assert arena.reset() == 0


def test_zeroed_array_is_zero_where_a_dirty_one_lay() -> None:
    arena = memory.ArenaResource()
    for _ in range(3):
        arena.array((100, 100))[:] = 7.0
        clean = arena.array((100, 100), zeroed=True)
        assert not clean.any()
        del clean


def test_array_defaults_to_float64_and_takes_an_int_or_a_list_as_shape() -> None:
    arena = memory.ArenaResource()
    assert arena.array(5).dtype == np.float64
    assert arena.array(np.int32(5)).shape == (5,)
    assert arena.array([2, 3], np.int16).shape == (2, 3)
    assert arena.array(()).shape == ()
    assert arena.array((2,), "(3,)f4").shape == (2, 3)


def test_array_keeps_its_block_and_any_view_of_it_does() -> None:
    arena = memory.ArenaResource()
    tail = arena.array((10, 10))[3:, ::2].T
    assert arena.statistics().current_count == 1
    with pytest.raises(InvalidArgument, match="1 block is alive"):
        arena.reset()
    del tail
    assert arena.statistics().current_count == 0


@pytest.mark.parametrize(
    ("shape", "dtype", "error", "named"),
    [
        ((-1,), "f8", InvalidArgument, "shape: .*negative"),
        ((2**40, 2**40), "f8", OutOfMemory, "shape: .*1099511627776"),
        ((2**62, 4), "u1", OutOfMemory, "shape: "),
        (2**61, "f8", OutOfMemory, "shape: "),
        (2**100, "f8", OutOfMemory, "shape: "),
        (1 << 50, "u1", OutOfMemory, "1125899906842624"),
        (2.5, "f8", TypeError, "shape: must be an int or ints"),
        ("ab", "f8", TypeError, "shape: must be an int or ints"),
        (None, "f8", TypeError, "shape: must be an int or ints"),
        ((True,), "f8", TypeError, "shape: must be an int or ints"),
        ((1,) * 65, "f8", InvalidArgument, "shape: .* 64 dimensions"),
        (3, "O", InvalidArgument, "dtype: must hold plain values"),
        (3, [("a", "O"), ("b", "f8")], InvalidArgument, "dtype: must hold plain values"),
        (3, "S0", InvalidArgument, "dtype: must say how large"),
        (3, "U", InvalidArgument, "dtype: must say how large"),
        (3, "nonsense", TypeError, "nonsense"),
    ],
)
def test_array_that_cannot_be_is_refused_by_name(shape, dtype, error, named) -> None:
    arena = memory.ArenaResource()
    with pytest.raises(error, match=named):
        arena.array(shape, dtype)
    assert arena.statistics().total_count == 0


def test_array_that_numpy_refuses_is_refused_by_name() -> None:
    arena = memory.ArenaResource()
    with pytest.raises(InvalidArgument, match="shape: "):
        arena.array((2**40, 0, 2**40))
    assert arena.array((1000, 0, 1000)).size == 0
    assert arena.statistics().current_count == 0


# --- batches ------------------------------------------------------------------------------------


def test_batch_is_a_sequence_of_equal_disjoint_buffers() -> None:
    arena = memory.ArenaResource()
    batch = arena.allocate_batch(100, 72, zeroed=True)
    assert (len(batch), batch.size_bytes, batch.stride_bytes) == (100, 72, 128)
    assert batch.resource is arena
    assert "count=100" in repr(batch)
    for index, buffer in enumerate(batch):
        assert (len(buffer), buffer.size_bytes, buffer.block_bytes) == (72, 72, 128)
        assert bytes(buffer) == bytes(72)
        np.frombuffer(buffer, dtype="uint8")[:] = index
    assert address(batch[1]) - address(batch[0]) == 128
    assert [bytes(buffer)[0] for buffer in batch] == list(range(100))
    assert bytes(batch[-1]) == bytes(batch[99])
    rows = batch.numpy("uint16")
    assert rows.shape == (100, 36)
    assert (rows[5] == 0x0505).all()


@pytest.mark.parametrize("index", [100, -101, 1 << 40])
def test_index_outside_a_batch_is_refused(index: int) -> None:
    batch = memory.ArenaResource().allocate_batch(100, 8)
    with pytest.raises(IndexError):
        batch[index]
    with pytest.raises(TypeError):
        batch["0"]


def test_view_of_one_item_keeps_the_batch() -> None:
    arena = memory.ArenaResource()
    item = arena.allocate_batch(1000, 64)[7].numpy("float64")
    item[:] = 7
    others = [arena.array(8) for _ in range(2000)]
    for other in others:
        other[:] = 1
    assert (item == 7).all()
    assert arena.statistics().current_count == 2001, "a batch is one block"
    del others, other, item
    assert arena.statistics().current_count == 0


@pytest.mark.parametrize(("count", "size_bytes"), [(0, 64), (5, 0), (0, 0)])
def test_batch_of_nothing_is_legal(count: int, size_bytes: int) -> None:
    batch = memory.ArenaResource().allocate_batch(count, size_bytes)
    assert [len(buffer) for buffer in batch] == [size_bytes] * count
    assert batch.numpy().shape == (count, size_bytes)


def test_batch_that_cannot_be_is_refused_by_name() -> None:
    arena = memory.ArenaResource()
    with pytest.raises(InvalidArgument, match="count: must be at least 0, got -1"):
        arena.allocate_batch(-1, 64)
    with pytest.raises(InvalidArgument, match="size_bytes: must be at least 0, got -5"):
        arena.allocate_batch(1, -5)
    with pytest.raises(OutOfMemory, match=f"{1 << 40} blocks of {1 << 40} bytes"):
        arena.allocate_batch(1 << 40, 1 << 40)
    with pytest.raises(OutOfMemory):
        arena.allocate_batch(1 << 30, 1 << 30)
    with pytest.raises(InvalidArgument, match="dtype: its items must divide"):
        arena.allocate_batch(2, 12).numpy("float64")
    with pytest.raises(InvalidArgument, match="dtype: must hold plain values"):
        arena.allocate_batch(2, 16).numpy("O")


# --- NumPy --------------------------------------------------------------------------------------


@every_arena
def test_temporaries_of_a_block_die_at_once(make) -> None:
    arena = make()
    start = np.arange(10_000.0)
    savepoint = arena.savepoint()
    for _ in range(5):
        with memory.use(arena):
            result = float(((start * 2 + 1) ** 2).sum())
            kept = start + 1
        assert memory.handler_of(kept) is arena
        with pytest.raises(InvalidArgument, match="1 block is alive"):
            arena.rollback(savepoint)
        del kept
        assert arena.rollback(savepoint) == 0
    assert result == float(((np.arange(10_000.0) * 2 + 1) ** 2).sum())
    assert arena.statistics().hits > 0


@every_arena
def test_arrays_resize_and_are_zeroed_inside_an_arena(make) -> None:
    arena = make(chunk_bytes="64 KiB")
    with memory.use(arena):
        growing = np.zeros(10)
        for size in (100, 5000, 100_000, 50):
            growing.resize(size, refcheck=False)
            assert growing[:10].tolist() == [0.0] * 10
            growing[10:] = 3
        assert not np.zeros(70_000).any()
    assert arena.check().ok


def test_arena_can_be_installed_for_the_whole_process(run_python: RunPython) -> None:
    printed = run_python(
        """
        import threading
        import numpy as np
        from moirai import memory

        before = [np.ones(size) for size in (10, 1000, 100_000)]
        arena = memory.ArenaResource()
        memory.install(arena)
        during = [np.ones(size) for size in (10, 1000, 100_000)]
        thread = threading.Thread(target=before.clear)
        thread.start()
        thread.join()
        grown = np.zeros(10)
        grown.resize(50_000, refcheck=False)
        memory.uninstall()
        assert all(memory.handler_of(array) is arena for array in during)
        assert sum(float(array.sum()) for array in during) == 101_010
        del during, grown
        assert arena.statistics().current_count == 0
        assert arena.statistics().invalid_frees == 0
        assert arena.check().ok
        print("ok")
        """
    )
    assert printed == "ok\n"


# --- stacks -------------------------------------------------------------------------------------

WRAPS: dict[str, Callable[[memory.Resource], memory.Resource]] = {
    "arena": lambda upstream: memory.ArenaResource(upstream, chunk_bytes="64 KiB"),
    "small arena": lambda upstream: memory.ArenaResource(upstream, chunk_bytes="4 KiB"),
    "local": lambda upstream: memory.ThreadLocalArena(upstream, chunk_bytes="128 KiB"),
    "slab": memory.SlabResource,
    "statistics": memory.StatisticsAdaptor,
    "limit": lambda upstream: memory.LimitAdaptor(upstream, limit_bytes="1 GiB"),
}


@settings(max_examples=40)
@given(
    wraps=st.lists(st.sampled_from(sorted(WRAPS)), min_size=1, max_size=4),
    sizes=st.lists(st.integers(0, 100 * KIB), max_size=30),
    order=st.randoms(use_true_random=False),
)
def test_arenas_stack_with_everything(wraps, sizes, order) -> None:
    bottom = memory.StatisticsAdaptor(memory.LargeObjectResource())
    stack: memory.Resource = bottom
    for name in wraps:
        stack = WRAPS[name](stack)
    live = []
    for index, size in enumerate(sizes):
        content = np.frombuffer(stack.allocate(size, zeroed=True), dtype="uint8")
        assert not content.any()
        content[:] = index
        live.append((index, content))
        if order.random() < 0.4:
            index, content = live.pop(order.randrange(len(live)))
            assert (content == index).all()
        del content
    assert all((content == index).all() for index, content in live)
    assert stack.statistics().current_count == len(live)
    assert stack.check().ok, str(stack.check())
    live.clear()
    stack.trim()
    assert stack.statistics().current_bytes == 0
    assert stack.check().ok, str(stack.check())
    del stack
    assert bottom.statistics().current_count == 0


# --- chunks -------------------------------------------------------------------------------------


def test_request_above_a_chunk_gets_one_of_its_own() -> None:
    upstream = memory.StatisticsAdaptor(memory.LargeObjectResource())
    arena = memory.ArenaResource(upstream, chunk_bytes="64 KiB")
    small = arena.allocate(64)
    large = arena.allocate(MIB)
    assert upstream.statistics().current_count == 2
    assert upstream.statistics().current_bytes < 64 * KIB + MIB + 64 * KIB
    del large
    assert upstream.statistics().current_count == 1
    del small


@pytest.mark.parametrize("chunk_bytes", [0, "0", (512 << 20) + 1, "1 GiB", 1 << 62])
@every_arena
def test_chunk_outside_its_range_is_refused_by_name(make, chunk_bytes) -> None:
    with pytest.raises(InvalidArgument, match="chunk_bytes: must be from 1 to 536870912"):
        make(chunk_bytes=chunk_bytes)


@every_arena
def test_chunk_of_another_type_is_refused_by_name(make) -> None:
    with pytest.raises(TypeError, match="chunk_bytes"):
        make(chunk_bytes=1.5)
    with pytest.raises(InvalidArgument, match="chunk_bytes"):
        make(chunk_bytes="many")
    with pytest.raises(TypeError):
        make(None, "1 MiB")


def test_chunks_are_rounded_up_to_pages() -> None:
    upstream = memory.StatisticsAdaptor(memory.LargeObjectResource())
    arena = memory.ArenaResource(upstream, chunk_bytes=5000)
    block = arena.allocate(1)
    assert upstream.statistics().current_bytes == 8192
    del block


def test_trim_gives_every_chunk_back_that_nothing_lives_in() -> None:
    upstream = memory.StatisticsAdaptor(memory.SystemResource())
    arena = memory.ArenaResource(upstream, chunk_bytes="64 KiB")
    savepoint = arena.savepoint()
    views = [arena.array(10 * KIB, "uint8") for _ in range(50)]
    views.clear()
    arena.trim()
    assert upstream.statistics().current_count == 0
    assert arena.statistics().cached_bytes == 0
    view = arena.array(10)
    assert arena.rollback(savepoint, retire=True) == 1
    del view


# --- what cannot be met -------------------------------------------------------------------------


def test_refused_request_changes_nothing_wherever_upstream_is_exhausted() -> None:
    sizes = [100, 3000, 3000, 20_000, 5000, 64, 9000, 2000, 4000, 300]
    for limit_bytes in range(0, 100_000, 11_000):
        upstream = memory.LimitAdaptor(memory.LargeObjectResource(), limit_bytes=limit_bytes)
        arena = memory.ArenaResource(upstream, chunk_bytes="8 KiB")
        held, refused_count = [], 0
        for size in sizes:
            before = arena.statistics()
            try:
                held.append(arena.allocate(size))
            except OutOfMemory:
                refused_count += 1
                assert arena.statistics() == before
        assert arena.check().ok
        assert arena.statistics().current_count == len(held) == len(sizes) - refused_count
        held.clear()
        assert arena.reset() == 0
        del arena
        assert upstream.statistics().current_bytes == 0
    assert refused_count == 0, "the last limit suffices"


def test_block_is_served_where_upstream_has_no_whole_chunk() -> None:
    upstream = memory.LimitAdaptor(memory.LargeObjectResource(), limit_bytes="16 KiB")
    arena = memory.ArenaResource(upstream, chunk_bytes="1 MiB")
    blocks = [arena.allocate(100) for _ in range(4)]
    with pytest.raises(OutOfMemory):
        arena.allocate(100)
    del blocks[0]
    blocks.append(arena.allocate(100))
    assert arena.check().ok


def test_limit_below_an_arena_may_collect_cycles_that_hold_its_blocks() -> None:
    upstream = memory.LimitAdaptor(memory.LargeObjectResource(), limit_bytes="64 KiB")
    arena = memory.ArenaResource(upstream, chunk_bytes="16 KiB")
    gc.collect()
    gc.disable()
    try:
        for _ in range(40):
            cycle: list[object] = [arena.array(4000, "uint8")]
            cycle.append(cycle)
    finally:
        gc.enable()
    del cycle
    gc.collect()
    assert arena.statistics().current_count == 0


# --- lifetimes ----------------------------------------------------------------------------------


@every_arena
def test_everything_may_be_dropped_in_any_order(make) -> None:
    names = ["arena", "savepoint", "view", "buffer", "item"]
    for order in itertools.permutations(names):
        upstream = memory.StatisticsAdaptor(memory.LargeObjectResource())
        arena = make(upstream, chunk_bytes="8 KiB")
        things = {
            "arena": arena,
            "savepoint": arena.savepoint(),
            "view": arena.array(100, "uint8", zeroed=True),
            "buffer": arena.allocate(20_000),
            "item": arena.allocate_batch(10, 100)[3],
        }
        del arena
        for name in order:
            if "view" in things:
                assert not things["view"].any()
            del things[name]
        assert upstream.statistics().current_count == 0, order


def test_views_outlive_their_arena_at_interpreter_exit(run_python: RunPython) -> None:
    printed = run_python(
        """
        import numpy as np
        from moirai import memory

        arena = memory.ArenaResource()
        local = memory.ThreadLocalArena()
        savepoint = arena.savepoint()
        kept = [arena.array(1000), local.array(1000), arena.allocate_batch(10, 10)[2]]
        with memory.use(arena):
            more = np.ones(100)
        arena.reset(retire=True)
        memory.kept = kept
        print(more.sum())
        """
    )
    assert printed == "100.0\n"


def test_buffer_may_refer_to_its_arena_in_a_cycle_of_attributes() -> None:
    class Owner(memory.ArenaResource):
        block: memory.Buffer

    arena = Owner()
    arena.block = arena.allocate(100)
    assert arena.block.resource is arena
    del arena.block
    assert arena.reset() == 0


# --- threads ------------------------------------------------------------------------------------


def test_rollback_while_other_threads_allocate() -> None:
    arena = memory.ArenaResource(chunk_bytes="32 KiB")
    done = threading.Event()

    def allocate(mark: int) -> Callable[[], None]:
        def body() -> None:
            held: list[np.ndarray] = []
            for turn in range(3000):
                view = arena.array(turn % 3000 + 1, "uint8")
                view[:] = mark
                held.append(view)
                if len(held) > 10:
                    assert (held.pop(turn % 10) == mark).all()
            done.set()

        return body

    def go_back() -> None:
        turn = 0
        while not done.is_set():
            turn += 1
            savepoint = arena.savepoint()
            if turn % 2:
                arena.rollback(savepoint, retire=True)
            else:
                with suppress(InvalidArgument):
                    arena.rollback(savepoint)
            if turn % 50 == 0:
                arena.reset(retire=True)
                assert arena.check().ok

    run_threads(allocate(1), allocate(2), go_back)
    assert arena.statistics().current_count == 0
    assert arena.reset() == 0


def test_each_thread_resets_its_own_arena_only() -> None:
    arenas = memory.ThreadLocalArena(chunk_bytes="16 KiB")
    mine = arenas.array(100, "uint8")
    mine[:] = 1
    savepoint = arenas.savepoint()
    theirs: list[np.ndarray] = []

    def other() -> None:
        assert arenas.reset() == 0, "it has made nothing"
        theirs.append(arenas.array(100, "uint8"))
        theirs[0][:] = 2
        with pytest.raises(InvalidArgument, match="1 block is alive"):
            arenas.reset()
        with pytest.raises(InvalidArgument, match=r"savepoint: .* of this thread"):
            arenas.rollback(savepoint)

    run_threads(other)
    assert arenas.arena_count == 2
    assert arenas.rollback(savepoint) == 0
    del mine
    assert arenas.reset() == 0, "what the other thread left is not this one's"
    assert (theirs[0] == 2).all()


def test_arena_of_a_thread_that_ended_serves_the_next() -> None:
    upstream = memory.StatisticsAdaptor(memory.LargeObjectResource())
    arenas = memory.ThreadLocalArena(upstream, chunk_bytes="64 KiB")
    kept: list[np.ndarray] = []
    for turn in range(20):

        def work(turn: int = turn) -> None:
            for _ in range(100):
                arenas.array(100)
            if turn % 5 == 0:
                kept.append(arenas.array(100))

        run_threads(work)
    assert arenas.arena_count == 1
    assert upstream.statistics().current_count <= len(kept) + 1
    kept.clear()
    assert arenas.statistics().current_count == 0
    arenas.trim()
    assert upstream.statistics().current_count == 0


@every_arena
def test_thread_frees_what_another_made_while_that_one_allocates(make) -> None:
    arena = make(chunk_bytes="16 KiB")
    handed: list[np.ndarray] = []
    ready = threading.Event()

    def make_some() -> None:
        for turn in range(5000):
            handed.append(arena.array(turn % 500 + 1, "uint8"))
            if turn == 100:
                ready.set()
        ready.set()

    def free_some() -> None:
        assert ready.wait(60)
        while handed:
            handed.pop()

    run_threads(make_some, free_some)
    handed.clear()
    assert arena.statistics().current_count == 0
    assert arena.check().ok


# --- fork ---------------------------------------------------------------------------------------


@every_arena
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_child_forked_while_a_thread_allocates_goes_on(make) -> None:
    arena = make(chunk_bytes="8 KiB")
    stop = threading.Event()
    started = threading.Event()

    def churn() -> None:
        held: list[np.ndarray] = []
        while not stop.is_set():
            held.append(arena.array(len(held) * 37 % 900 + 1, "uint8"))
            if len(held) > 50:
                held.clear()
                started.set()

    mine = arena.array(100, "uint8")
    mine[:] = 9
    savepoint = arena.savepoint()

    def child() -> None:
        assert (mine == 9).all()
        fresh = [arena.array(300, "uint8", zeroed=True) for _ in range(100)]
        assert not any(view.any() for view in fresh)
        assert arena.rollback(savepoint, retire=True) >= 100
        assert arena.array(10, zeroed=True).sum() == 0

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        assert started.wait(60)
        for _ in range(20):
            in_forked_child(child)
    finally:
        stop.set()
        thread.join()
    assert (mine == 9).all()
    assert arena.check().ok
