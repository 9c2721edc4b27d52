"""Slab tuning: which classes and magazines counts lead to, and that a tuned slab is a slab."""

import itertools
import os
import threading
from collections.abc import Callable, Iterable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moirai import memory
from moirai.errors import InvalidArgument, OutOfMemory
from moirai.memory.slabs import choose_classes, choose_rounds, run_share

STANDARD = tuple(one.block_bytes for one in memory.SlabResource().classes())
EXTRA = [size for size in range(1088, 16 << 10, 64) if size not in STANDARD]


class Counts:
    """What a user's own record may look like."""

    def __init__(self, counts: Iterable[tuple[int, int]]) -> None:
        self.counts = list(counts)

    def sizes(self) -> list[tuple[int, int]]:
        return self.counts


def serving(slab: memory.SlabResource | memory.PoolResource) -> list[int]:
    return [one.block_bytes for one in slab.classes() if not one.is_standard and one.request_bytes]


def rounds(slab: memory.SlabResource, block_bytes: int) -> int:
    (found,) = (one for one in slab.classes() if one.block_bytes == block_bytes)
    return found.magazine_rounds


def block_bytes(slab: memory.Resource, size_bytes: int) -> int:
    return slab.allocate(size_bytes).block_bytes


# --- which classes ------------------------------------------------------------------------------


def cost(counts: dict[int, int], extra: Iterable[int]) -> float:
    """What `choose_classes` is to make least, written down the long way."""
    classes = sorted((*STANDARD, *extra))
    total = sum(
        count * run_share(min(one for one in classes if one >= size))
        for size, count in counts.items()
    )
    for block in extra:
        low = max(one for one in STANDARD if one < block)
        high = min(one for one in STANDARD if one > block)
        asked = sum(size * count for size, count in counts.items() if low < size <= high)
        everything = sum(size * count for size, count in counts.items())
        total += max(0.05 * asked, 0.005 * everything)
    return total


few_counts = st.dictionaries(
    st.sampled_from([1088, 1152, 1280, 2112, 2176, 4160, 4672, 9024, 10_048, 13_056, 64, 640]),
    st.integers(1, 1000),
    max_size=9,
)


@settings(max_examples=60)
@given(
    counts=few_counts,
    given=st.sets(st.sampled_from([1088, 1216, 4672, 5056, 9024]), max_size=2),
    new_count=st.integers(0, 3),
)
def test_chosen_classes_are_the_best_of_all_that_are_possible(
    counts: dict[int, int], given: set[int], new_count: int
) -> None:
    chosen = choose_classes(counts, STANDARD, [], given, new_count)
    assert len(set(chosen) - given) <= new_count
    possible = [size for size in {*counts, *given} if size not in STANDARD]
    best = min(
        cost(counts, subset)
        for length in range(len(possible) + 1)
        for subset in itertools.combinations(possible, length)
        if len(set(subset) - given) <= new_count
    )
    assert cost(counts, chosen) == pytest.approx(best)


@given(counts=few_counts)
def test_every_chosen_class_saves_a_twentieth_of_what_is_asked_for_around_it(
    counts: dict[int, int],
) -> None:
    chosen = choose_classes(counts, STANDARD, [], [], 16)
    for block in chosen:
        without = [size for size in chosen if size != block]
        assert cost(counts, without) >= cost(counts, chosen)


def test_a_size_gets_no_class_where_a_run_would_hold_no_more_blocks() -> None:
    # 12 blocks of 5056 or of 5120 bytes fit 64 KiB; 14 of 4672.
    assert choose_classes({5056: 100}, STANDARD, [], [], 16) == ()
    assert choose_classes({4672: 100}, STANDARD, [], [], 16) == (4672,)


def test_a_size_that_is_rare_among_its_neighbours_gets_no_class() -> None:
    assert choose_classes({1088: 10, 1280: 1000}, STANDARD, [], [], 16) == ()
    assert choose_classes({1088: 1000, 1280: 10}, STANDARD, [], [], 16) == (1088,)


def test_a_size_that_is_rare_among_all_gets_no_class() -> None:
    assert choose_classes({1088: 1, 4096: 100}, STANDARD, [], [], 16) == ()
    assert choose_classes({1088: 100, 4096: 100}, STANDARD, [], [], 16) == (1088,)


def test_classes_stay_where_nothing_was_counted() -> None:
    assert choose_classes({2112: 5}, STANDARD, [1088], [1088, 4672], 4) == (1088, 2112)
    assert choose_classes({1280: 5}, STANDARD, [1088], [1088], 4) == ()


# --- how large magazines ------------------------------------------------------------------------


@given(requests=st.dictionaries(st.sampled_from(STANDARD), st.integers(1, 10**9), min_size=1))
def test_magazines_stay_within_their_bounds_and_together_within_the_budget(
    requests: dict[int, int],
) -> None:
    chosen = choose_rounds(requests)
    assert chosen.keys() == requests.keys()
    assert all(2 <= count <= 512 and size * count <= 128 << 10 for size, count in chosen.items())
    least = sum(2 * size for size in requests)
    assert sum(size * count for size, count in chosen.items()) <= (512 << 10) + least


def test_the_more_a_class_is_asked_for_the_more_its_magazines_hold() -> None:
    chosen = choose_rounds(dict.fromkeys(STANDARD, 1) | {2048: 10_000})
    assert chosen[2048] == 64
    assert chosen[1792] < chosen[2048]
    assert choose_rounds({16_384: 1}) == {16_384: 8}


# --- tuning -------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [memory.SlabResource, memory.PoolResource])
def test_tuning_gives_awkward_sizes_blocks_of_their_own_and_says_why(
    make: type[memory.SlabResource] | type[memory.PoolResource],
) -> None:
    slab = make()
    old = slab.allocate(1088)
    assert (old.block_bytes, block_bytes(slab, 2112)) == (1280, 2560)
    tuning = slab.tune(Counts([(1088, 3000), (2112, 1000), (20_000, 50)]))
    assert (block_bytes(slab, 1088), block_bytes(slab, 1089)) == (1088, 1280)
    assert block_bytes(slab, 2112) == 2112
    assert old.block_bytes == 1280
    assert tuning.request_count == 4000
    assert tuning.asked_bytes == 3000 * 1088 + 1000 * 2112
    assert tuning.before_bytes > tuning.after_bytes >= tuning.asked_bytes
    first, second = tuning.classes
    assert (first.block_bytes, first.serves, first.request_count) == (1088, True, 3000)
    assert first.asked_bytes == 3000 * 1088
    assert first.before_bytes == round(3000 * 65536 / 51)
    assert first.after_bytes == round(3000 * 65536 / 60)
    assert second.block_bytes == 2112
    text = str(tuning)
    assert "class 1088: serves 3000 requests for 3264000 bytes" in text
    assert "magazines of 1088:" in text
    assert tuning.classes_left == 14
    assert tuning.refused_sizes == ()
    assert slab.check().ok


@settings(max_examples=50)
@given(
    first=st.dictionaries(st.sampled_from(EXTRA), st.integers(1, 9), max_size=30),
    then=st.dictionaries(st.sampled_from(EXTRA), st.integers(1, 9), max_size=30),
)
def test_the_same_counts_a_second_time_change_nothing(
    first: dict[int, int], then: dict[int, int]
) -> None:
    slab = memory.SlabResource()
    for counts in (first, then):
        tuning = slab.tune(Counts(counts.items()))
        again = slab.tune(Counts(counts.items()))
        assert not again.changed
        assert "nothing changed" in str(again)
        assert again.before_bytes == again.after_bytes == tuning.after_bytes
        assert again.refused_sizes == tuning.refused_sizes
    assert slab.check().ok


def test_counts_that_grow_evenly_change_nothing() -> None:
    slab = memory.SlabResource()
    assert slab.tune(Counts([(1088, 100), (300, 70)])).changed
    assert not slab.tune(Counts([(1088, 1010), (300, 690)])).changed


def test_a_class_goes_out_of_use_when_requests_no_longer_want_it() -> None:
    slab = memory.SlabResource()
    slab.tune(Counts([(1088, 100)]))
    live = slab.allocate(1088)
    tuning = slab.tune(Counts([(1088, 1), (1280, 1000)]))
    (change,) = tuning.classes
    assert (change.block_bytes, change.serves, change.request_count) == (1088, False, 1)
    assert "no longer serves" in str(tuning)
    assert serving(slab) == []
    assert (live.block_bytes, block_bytes(slab, 1088)) == (1088, 1280)
    (kept,) = (one for one in slab.classes() if one.block_bytes == 1088)
    assert (kept.request_bytes, kept.current_count) == (None, 1)
    assert slab.tune(Counts([(1088, 100)])).classes_left == 15, "it is used again, not made again"


def test_more_sizes_than_a_slab_has_classes_for_are_said_and_raise_nothing() -> None:
    slab = memory.SlabResource()
    for size in EXTRA[:60]:
        tuning = slab.tune(Counts([(size, 100)]))
        assert tuning.after_bytes <= tuning.before_bytes
        assert tuning.classes_left > 0 or len(slab.classes()) == len(STANDARD) + 16
    assert tuning.classes_left == 0
    last = slab.tune(Counts([(9024, 100), (1088, 100)]))
    assert (serving(slab), last.refused_sizes) == ([1088], (9024,))
    assert "is left for the slab's life: 9024" in str(last)
    assert slab.check().ok


def test_sizes_need_not_be_rounded_and_small_ones_stay_with_the_standard_classes() -> None:
    slab = memory.SlabResource()
    slab.tune(Counts([(1030, 10), (1, 5), (0, 5), (65, 7)]))
    assert serving(slab) == [1088]
    assert rounds(slab, 64) > 64


@pytest.mark.parametrize("entry", [(-1, 5), (100, -1)])
def test_counts_below_zero_are_refused_by_name(entry: tuple[int, int]) -> None:
    slab = memory.SlabResource()
    with pytest.raises(InvalidArgument, match=r"tracker: sizes\(\) must give .* got \(.*-1"):
        slab.tune(Counts([entry]))
    assert serving(slab) == []


def test_nothing_counted_changes_nothing() -> None:
    assert not memory.SlabResource().tune(Counts([])).changed


def test_aligned_requests_stay_with_the_standard_classes() -> None:
    slab = memory.SlabResource()
    slab.tune(Counts([(1088, 10), (2112, 10)]))
    for alignment in (128, 256, 4096):
        buffer = slab.allocate(1088, alignment_bytes=alignment)
        assert np.frombuffer(buffer, dtype="uint8").ctypes.data % alignment == 0
        assert buffer.block_bytes in STANDARD


def test_threads_may_use_a_slab_while_it_is_tuned() -> None:
    slab = memory.SlabResource()
    stop = threading.Event()
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            live: list[tuple[np.ndarray, int]] = []
            for turn in range(1500):
                size = (1088, 1500, 2112, 4672, 300, 9024)[(turn * 7 + seed) % 6]
                array = slab.allocate(size).numpy()
                array[:] = turn % 251
                live.append((array, turn % 251))
                if turn % 3 == 0 or len(live) > 200:
                    old, fill = live.pop(turn % len(live))
                    assert (old == fill).all()
            assert all((old == fill).all() for old, fill in live)
        except BaseException as error:
            failures.append(error)

    def keep_tuning() -> None:
        tables = itertools.cycle([[(1088, 5)], [(2112, 5), (4672, 9)], [(1280, 5), (2560, 1)]])
        while not stop.is_set():
            slab.tune(Counts(next(tables)))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    tuner = threading.Thread(target=keep_tuning)
    for thread in (*threads, tuner):
        thread.start()
    for thread in threads:
        thread.join()
    stop.set()
    tuner.join()
    assert failures == []
    now = slab.statistics()
    assert (now.current_count, now.invalid_frees) == (0, 0)
    assert now.hits + now.misses == now.total_count
    assert slab.check().ok


def test_threads_that_tune_at_once_share_the_classes_that_are_left() -> None:
    for _ in range(20):
        slab = memory.SlabResource()
        failures: list[BaseException] = []
        start = threading.Barrier(4)

        def work(
            sizes: list[int],
            slab: memory.SlabResource = slab,
            failures: list[BaseException] = failures,
            start: threading.Barrier = start,
        ) -> None:
            start.wait()
            try:
                for size in sizes:
                    slab.tune(Counts([(size, 100)]))
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(EXTRA[seed:40:4],)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        assert len(slab.classes()) == len(STANDARD) + 16
        assert slab.check().ok


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_forked_child_keeps_the_classes_and_may_tune_on() -> None:
    slab = memory.SlabResource()
    slab.tune(Counts([(1088, 10)]))
    stop = threading.Event()

    def keep_tuning() -> None:
        while not stop.is_set():
            slab.tune(Counts([(2112, 10)]))
            slab.tune(Counts([(2560, 10)]))

    tuner = threading.Thread(target=keep_tuning)
    tuner.start()
    live = slab.allocate(1088)
    statuses = []
    for _ in range(20):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                assert block_bytes(slab, 1088) == live.block_bytes == 1088
                slab.tune(Counts([(4672, 10)]))
                assert block_bytes(slab, 4672) == 4672
                assert slab.check().ok
                status = 0
            finally:
                os._exit(status)
        statuses.append(os.waitpid(child, 0)[1])
    stop.set()
    tuner.join()
    assert statuses == [0] * 20
    assert slab.check().ok


# --- by hand ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ([1100], "sizes: must be multiples of 64 .* got 1100"),
        ([1280], "sizes: must be .* no standard class, got 1280"),
        ([1088, 16 << 10], "sizes: .* got 16384"),
        (EXTRA[:17], "sizes: must need at most 16 new classes"),
    ],
)
def test_classes_that_cannot_be_are_refused_and_none_is_made(
    sizes: list[int], message: str
) -> None:
    slab = memory.SlabResource()
    with pytest.raises(InvalidArgument, match=message):
        slab.set_extra_classes(sizes)
    assert all(one.is_standard for one in slab.classes())


def test_capacity_out_of_range_is_refused_by_name() -> None:
    slab = memory.SlabResource()
    with pytest.raises(InvalidArgument, match="rounds: must be from 2 to 8 for blocks of 16384"):
        slab.set_magazine(16 << 10, rounds=9)
    with pytest.raises(InvalidArgument, match=r"block_bytes: must be .* one of the slab's classes"):
        slab.set_magazine(1088, rounds=4)
    with pytest.raises(InvalidArgument, match="block_bytes"):
        slab.draw_ahead(1088)


# --- presets ------------------------------------------------------------------------------------


def test_presets_have_the_sizes_of_their_names() -> None:
    found = {name: preset.block_sizes for name, preset in memory.SLAB_PRESETS.items()}
    assert found == {
        "page_headers": (128,),
        "rows": (256, 512, 1024),
        "index_nodes": (512, 2048, 4096),
        "transaction_metadata": (384,),
        "lock_entries": (64,),
        "version_records": (192,),
    }
    assert all(size in STANDARD for sizes in found.values() for size in sizes)


@pytest.mark.parametrize("name", memory.SLAB_PRESETS)
def test_the_first_blocks_of_a_preset_are_in_memory(name: str) -> None:
    slab = memory.SlabResource(preset=name)
    live = []
    for size in memory.SLAB_PRESETS[name].block_sizes:
        assert rounds(slab, size) > rounds(memory.SlabResource(), size)
        live += [slab.allocate(size) for _ in range((64 << 10) // size)]
    assert slab.statistics().misses == 0
    assert {buffer.block_bytes for buffer in live} == {*memory.SLAB_PRESETS[name].block_sizes}
    assert slab.check().ok


def test_presets_go_together_and_with_tuning() -> None:
    slab = memory.SlabResource(preset=["rows", "index_nodes"])
    kept = {one.block_bytes for one in slab.classes() if one.run_count}
    assert kept == {256, 512, 1024, 2048, 4096}
    assert not slab.tune(Counts([(256, 1), (512, 1), (1024, 1), (2048, 1), (4096, 1)])).changed
    other = memory.SlabResource()
    assert other.tune(memory.SLAB_PRESETS["rows"]).magazines
    slab.trim()
    assert not any(one.run_count for one in slab.classes())


def test_an_unknown_preset_is_refused_with_the_choices() -> None:
    with pytest.raises(InvalidArgument, match=r"preset: must be of 'page_headers', .* got 'row'"):
        memory.SlabResource(preset=["rows", "row"])


def test_a_preset_that_upstream_has_no_room_for_leaves_nothing() -> None:
    limit = memory.LimitAdaptor(memory.LargeObjectResource(), limit_bytes=100 << 10)
    with pytest.raises(OutOfMemory):
        memory.SlabResource(limit, preset="rows")
    assert limit.statistics().current_bytes == 0


@pytest.mark.parametrize("make", [memory.PatternAdaptor, memory.AdaptiveResource])
def test_what_a_tracker_saw_tunes_a_slab(make: Callable[..., memory.Resource]) -> None:
    slab = memory.SlabResource()
    tracker = (
        make(slab)
        if make is memory.PatternAdaptor
        else make({memory.Workload.LOW_LATENCY: slab}, counterfactual=True)
    )
    for _ in range(500):
        tracker.allocate(1050)
    tuning = slab.tune(tracker)
    assert [change.block_bytes for change in tuning.classes] == [1088]
    assert tuning.changed
    blocks = [tracker.allocate(1050) for _ in range(100)]
    assert {block.size_bytes for block in blocks} <= {1050, 1088}
    assert {entry.block_bytes: entry.current_count for entry in slab.classes()}[1088] == 100
    assert not slab.tune(tracker).changed
    assert tracker.check().ok
