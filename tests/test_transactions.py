"""Transactions: limits, nesting, ends, learned profiles, and what outlives them."""

import gc
import random
import threading
from collections.abc import Callable
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from running import in_forked_child, run_threads

from moirai import memory
from moirai.errors import Closed, InvalidArgument, MoiraiError, OutOfMemory

KIB = 1 << 10
MIB = 1 << 20

SMALL_PROFILES = {"a": ("4 KiB", "16 KiB"), "b": ("8 KiB", "64 KiB"), "c": ("16 KiB", "256 KiB")}

RunPython = Callable[..., str]


def rounded(size_bytes: int) -> int:
    return max(64, -(-size_bytes // 64) * 64)


# --- begin and end ------------------------------------------------------------------------------


def test_transaction_commits_on_success_and_rolls_back_on_an_exception() -> None:
    arenas = memory.TransactionArenas()
    with arenas.begin("good") as good:
        kept = good.array(100)
        kept[:] = 1
    with suppress(KeyError), arenas.begin("bad") as bad:
        bad.array(100)
        raise KeyError("x")
    assert not bad.active
    statistics = arenas.statistics()
    assert (statistics.created, statistics.active) == (2, 0)
    assert (statistics.commits, statistics.rollbacks) == (1, 1)
    assert (kept == 1).all()


def test_transaction_ended_inside_its_block_stays_as_it_is() -> None:
    arenas = memory.TransactionArenas()
    with arenas.begin(1) as transaction:
        transaction.rollback()
    with suppress(KeyError), arenas.begin(2) as transaction:
        transaction.commit()
        raise KeyError("x")
    assert (arenas.statistics().commits, arenas.statistics().rollbacks) == (1, 1)


def test_every_use_after_the_end_says_how_it_ended() -> None:
    arenas = memory.TransactionArenas()
    committed, dropped = arenas.begin("x"), arenas.begin(("y", 2))
    committed.commit()
    dropped.rollback()
    for transaction, message in (
        (committed, r"transaction 'x' \(profile medium\) was committed"),
        (dropped, r"transaction \('y', 2\) \(profile medium\) was rolled back"),
    ):
        assert not transaction.active
        for use in (
            lambda it: it.allocate(10),
            lambda it: it.array(10),
            lambda it: it.allocate_batch(2, 10),
            lambda it: it.begin("inside"),
            lambda it: it.commit(),
            lambda it: it.rollback(),
        ):
            with pytest.raises(Closed, match=message):
                use(transaction)
        with memory.use(transaction), pytest.raises(MemoryError):
            np.empty(1000)
        assert "ended" in repr(transaction)


def test_id_in_use_is_refused_and_free_again_after_the_end() -> None:
    arenas = memory.TransactionArenas()
    first = arenas.begin("id")
    with pytest.raises(InvalidArgument, match="transaction_id: must not be in use, got 'id'"):
        arenas.begin("id")
    with pytest.raises(InvalidArgument, match="transaction_id: "):
        first.begin("id")
    first.commit()
    assert arenas.begin("id").rollback() == 0
    assert arenas.statistics().created == 2


def test_unknown_id_is_refused_by_name() -> None:
    arenas = memory.TransactionArenas()
    arenas.begin("known").commit()
    for ask in (arenas.get, arenas.commit, arenas.rollback):
        for unknown in ("known", "never", 7):
            with pytest.raises(InvalidArgument, match=f"transaction_id: .* got {unknown!r}"):
                ask(unknown)
    with pytest.raises(TypeError, match="unhashable"):
        arenas.begin([])


def test_transactions_are_found_and_ended_by_their_id() -> None:
    arenas = memory.TransactionArenas()
    first, second = arenas.begin(1), arenas.begin(2)
    assert arenas.get(1) is first
    assert arenas.active() == [first, second]
    assert arenas.commit(1) == 0
    assert arenas.active() == [second]
    assert arenas.rollback(2) == 0
    assert arenas.active() == []


# --- what outlives ------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["commit", "rollback"])
def test_views_outlive_their_transaction_and_keep_their_chunks(end: str) -> None:
    arenas = memory.TransactionArenas(memory.PoolResource(), keep_bytes=0)
    transaction = arenas.begin("t")
    views = [transaction.array(100, "uint8") for _ in range(10)]
    batch = transaction.allocate_batch(10, 100)
    for index, view in enumerate(views):
        view[:] = index
    dropped = transaction.array(1000)
    del dropped

    assert getattr(transaction, end)() == 11
    assert arenas.statistics().outliving_blocks == 11
    del transaction
    gc.collect()

    with arenas.begin("next") as other:
        other.array(10_000, "uint8")[:] = 255
    assert all((view == index).all() for index, view in enumerate(views))
    statistics = arenas.statistics()
    assert statistics.current_bytes == 0
    assert statistics.held_bytes > 0
    del views, view, batch
    assert arenas.statistics().held_bytes == 0
    assert arenas.upstream.statistics().current_count == 0


def test_numpy_draws_from_a_transaction_until_it_ends() -> None:
    arenas = memory.TransactionArenas()
    with arenas.begin("t") as transaction, memory.use(transaction):
        total = np.ones(1000) * 3
        assert memory.handler_of(total) is transaction
        assert transaction.used_bytes >= 8000
    assert total.sum() == 3000


def test_chunks_serve_the_next_transaction() -> None:
    upstream = memory.StatisticsAdaptor(memory.PoolResource())
    arenas = memory.TransactionArenas(upstream)
    for turn in range(100):
        with arenas.begin(turn, profile="small") as transaction:
            transaction.array(1000)
    assert upstream.statistics().total_count == 1
    assert arenas.statistics().idle_bytes == 32 * KIB
    assert arenas.trim() >= 0
    assert upstream.statistics().current_count == 0
    assert arenas.statistics().idle_bytes == 0


# --- limits -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("profile", "initial_bytes", "limit_bytes"),
    [
        ("tiny", 4 * KIB, 64 * KIB),
        ("small", 32 * KIB, 512 * KIB),
        ("medium", 256 * KIB, 4 * MIB),
        ("large", 2 * MIB, 32 * MIB),
        ("huge", 16 * MIB, 256 * MIB),
    ],
)
def test_profile_bounds_what_a_transaction_uses(profile, initial_bytes, limit_bytes) -> None:
    arenas = memory.TransactionArenas()
    transaction = arenas.begin("t", profile=profile)
    assert transaction.profile == memory.Profile(profile, initial_bytes, limit_bytes)
    first = transaction.allocate(64)
    assert transaction.held_bytes == initial_bytes
    block_bytes = limit_bytes // 16
    blocks = [transaction.allocate(block_bytes) for _ in range(15)]
    assert transaction.used_bytes == 15 * block_bytes + 64
    with pytest.raises(OutOfMemory) as caught:
        transaction.allocate(block_bytes)
    assert str(caught.value) == (
        f"cannot allocate {block_bytes} bytes: transaction 't' (profile {profile}) uses "
        f"{15 * block_bytes + 64} bytes of a limit of {limit_bytes}"
    )
    last = transaction.allocate(block_bytes - 64)
    assert transaction.used_bytes == limit_bytes
    del first, blocks, last
    assert transaction.used_bytes == 0
    assert transaction.wanted_bytes == 16 * block_bytes + 64
    transaction.rollback()


def test_limit_bounds_what_is_held_whatever_is_freed_in_between() -> None:
    arenas = memory.TransactionArenas(profiles={"only": ("4 KiB", "64 KiB")})
    transaction = arenas.begin("t")
    survivors = []
    with suppress(OutOfMemory):
        for turn in range(10_000):
            block = transaction.allocate(500)
            if turn % 7 == 0:
                survivors.append(block)
    assert transaction.used_bytes <= 64 * KIB
    assert transaction.held_bytes <= 3 * 64 * KIB
    transaction.rollback()


def test_estimate_chooses_the_smallest_profile_that_allows_a_quarter_more() -> None:
    arenas = memory.TransactionArenas()
    for estimate, name in [
        (0, "tiny"),
        (64 * KIB * 4 // 5, "tiny"),
        (64 * KIB * 4 // 5 + 1, "small"),
        ("400 KiB", "small"),
        ("512 KiB", "medium"),
        ("20 MiB", "large"),
        ("30 MiB", "huge"),
        ("256 MiB", "huge"),
    ]:
        with arenas.begin("t", estimate) as transaction:
            assert transaction.profile.name == name
    with pytest.raises(InvalidArgument, match=r"estimate_bytes: must be at most 268435456"):
        arenas.begin("t", "257 MiB")
    with pytest.raises(InvalidArgument, match="estimate_bytes: must be at least 0"):
        arenas.begin("t", -1)
    with pytest.raises(InvalidArgument, match=r"profile: must be one of 'tiny', .* got 'vast'"):
        arenas.begin("t", profile="vast")
    with pytest.raises(InvalidArgument, match="profile: must be left out"):
        arenas.begin("t", 100, profile="tiny")
    assert arenas.statistics().active == 0


def test_estimate_is_the_size_of_the_first_chunk() -> None:
    arenas = memory.TransactionArenas()
    with arenas.begin("t", 500_000) as transaction:
        blocks = [transaction.allocate(1000) for _ in range(480)]
        assert transaction.held_bytes == 4096 * 126
    with arenas.begin("t", 1000) as transaction:
        blocks = [transaction.allocate(1000)]
        assert transaction.held_bytes == 4096
    del blocks


def test_profile_is_learned_from_finished_transactions() -> None:
    arenas = memory.TransactionArenas(profiles=SMALL_PROFILES)
    assert arenas.learned_profile().name == "b", "the middle, before anything is known"

    def run(size_bytes: int) -> None:
        with suppress(OutOfMemory), arenas.begin("t") as transaction:
            transaction.allocate(size_bytes)

    run(3000)
    assert arenas.learned_profile().name == "a"
    run(15_000)
    assert arenas.learned_profile().name == "b", "twice the largest"
    run(200_000)
    assert arenas.learned_profile().name == "c", "what was refused counts"
    for _ in range(64):
        run(1000)
    assert arenas.learned_profile().name == "a", "the last 64 count"


@pytest.mark.parametrize(
    ("profiles", "message"),
    [
        ({}, "profiles: must have at least one"),
        ({"a": (0, 100)}, r"profiles\['a'\]: must begin with 1 to 100 bytes .* got 0"),
        ({"a": (200, 100)}, r"profiles\['a'\]: must begin with 1 to 100 bytes .* got 200"),
        ({"a": ("1 GiB", "2 GiB")}, r"profiles\['a'\]: must begin with 1 to 536870912 bytes"),
        ({"a": (1, 100), "b": (1, 100)}, r"profiles\['b'\]: must have a larger limit"),
        ({"a": (1, "much")}, r"profiles\['a'\]: must be a number of bytes"),
    ],
)
def test_profiles_that_cannot_be_are_refused_by_name(profiles, message) -> None:
    with pytest.raises(InvalidArgument, match=message):
        memory.TransactionArenas(profiles=profiles)


def test_options_are_checked_by_name() -> None:
    with pytest.raises(InvalidArgument, match="keep_bytes: "):
        memory.TransactionArenas(keep_bytes=-1)
    with pytest.raises(InvalidArgument, match="record_every: "):
        memory.TransactionArenas(record_every=-1)
    with pytest.raises(TypeError, match="upstream"):
        memory.TransactionArenas("system")


# --- transactions inside ------------------------------------------------------------------------


def test_commit_inside_hands_over_and_rollback_inside_leaves_alone() -> None:
    arenas = memory.TransactionArenas()
    parent = arenas.begin("parent")
    own = parent.array(1000, "uint8")
    own[:] = 1
    with parent.begin("kept", "64 KiB") as child:
        assert child.parent is parent
        given = child.array(2000, "uint8")
        given[:] = 2
    used_bytes = parent.used_bytes
    assert used_bytes == rounded(1000) + rounded(2000)
    with suppress(KeyError), parent.begin("dropped") as child:
        lost = child.array(5000, "uint8")
        lost[:] = 3
        assert parent.used_bytes == used_bytes + rounded(5000)
        raise KeyError
    assert parent.used_bytes == used_bytes
    assert (own == 1).all()
    assert (given == 2).all()
    assert (lost == 3).all()
    del given
    assert parent.used_bytes == rounded(1000)
    assert parent.commit() == 1
    assert arenas.statistics().current_bytes == 0


def test_limits_above_hold_for_transactions_inside() -> None:
    arenas = memory.TransactionArenas(profiles=SMALL_PROFILES)
    parent = arenas.begin("p", profile="a")
    child = parent.begin("c", profile="c")
    grandchild = child.begin("g", profile="c")
    block = grandchild.allocate(10_000)
    with pytest.raises(OutOfMemory, match=r"transaction 'p' \(profile a\) uses 10048 bytes"):
        grandchild.allocate(10_000)
    assert [it.used_bytes for it in (parent, child, grandchild)] == [10048] * 3
    del block
    assert parent.used_bytes == 0


def test_parent_cannot_commit_over_active_children_but_rolls_them_back() -> None:
    arenas = memory.TransactionArenas()
    parent = arenas.begin("p")
    child = parent.begin("c1")
    grandchild = child.begin("g")
    other = parent.begin("c2")
    view = grandchild.array(100)
    with pytest.raises(InvalidArgument, match="still active: 'c1', 'c2'"):
        parent.commit()
    assert parent.active
    assert parent.rollback() == 0
    assert not any(it.active for it in (parent, child, grandchild, other))
    statistics = arenas.statistics()
    assert (statistics.active, statistics.rollbacks, statistics.outliving_blocks) == (0, 4, 1)
    del view


def test_block_that_leaves_a_child_open_is_rolled_back_and_says_so() -> None:
    arenas = memory.TransactionArenas()
    with pytest.raises(InvalidArgument, match="still active: 'c'"), arenas.begin("p") as parent:
        parent.begin("c")
    assert arenas.statistics().active == 0


def test_parent_of_other_arenas_is_refused_by_name() -> None:
    arenas, other = memory.TransactionArenas(), memory.TransactionArenas()
    with pytest.raises(InvalidArgument, match="parent: "):
        arenas.begin("t", parent=other.begin("p"))
    assert arenas.statistics().created == 0
    assert arenas.active() == []


# --- stale transactions -------------------------------------------------------------------------


def test_stale_transactions_are_rolled_back_with_what_is_inside() -> None:
    arenas = memory.TransactionArenas()
    old = arenas.begin("old")
    view = old.array(100)
    young_inside = old.begin("inside")
    fresh = arenas.begin("fresh")
    old._begun -= 100
    young_inside._begun = fresh._begun
    assert arenas.release_stale(50) == ["old"]
    assert not old.active
    assert not young_inside.active
    assert fresh.active
    assert arenas.release_stale(50) == []
    assert arenas.statistics().rollbacks == 2
    view[:] = 1
    for wrong in (-1, float("nan")):
        with pytest.raises(InvalidArgument, match="max_age_seconds: must be at least 0"):
            arenas.release_stale(wrong)
    assert fresh.age_seconds >= 0


# --- reports ------------------------------------------------------------------------------------


def test_statistics_follow_what_happens() -> None:
    arenas = memory.TransactionArenas()
    first, second = arenas.begin(1), arenas.begin(2)
    blocks = [first.allocate(1000), second.allocate(3000)]
    during = arenas.statistics()
    assert (during.active, during.current_bytes) == (2, 1024 + 3008)
    assert during.held_bytes == first.held_bytes + second.held_bytes
    first.commit()
    second.rollback()
    after = arenas.statistics()
    assert (after.current_bytes, after.peak_bytes) == (0, 1024 + 3008)
    assert (after.outliving_blocks, after.held_bytes) == (2, during.held_bytes)
    blocks.clear()
    assert arenas.statistics().held_bytes == 0
    assert "active=0" in repr(arenas)


def test_fragmentation_is_measured_against_malloc() -> None:
    arenas = memory.TransactionArenas(record_every=1)
    assert arenas.fragmentation() is None
    with arenas.begin("t", "64 KiB") as transaction:
        blocks = [transaction.allocate(size) for size in range(100, 300)]
        del blocks[::2]
        blocks += [transaction.allocate(50) for _ in range(100)]
    found = arenas.fragmentation()
    assert found is not None
    assert found.event_count == 400
    assert found.asked_bytes == sum(range(100, 300))
    assert found.held_bytes % 4096 == 0
    assert 1 < found.ratio < 2
    assert 1 < found.malloc_ratio < 2
    arenas.begin("nothing").commit()
    again = arenas.fragmentation()
    assert again is not None
    assert (again.event_count, again.held_bytes) == (400, found.held_bytes), "no requests, no news"


def test_recordings_are_bounded_and_can_be_left_out() -> None:
    arenas = memory.TransactionArenas(record_every=1)
    with arenas.begin("long", "256 MiB") as transaction:
        for _ in range(40_000):
            transaction.allocate(1)
    assert arenas.fragmentation() is None
    silent = memory.TransactionArenas(record_every=0)
    with silent.begin("t") as transaction:
        transaction.allocate(1)
    assert silent.fragmentation() is None


# --- a model ------------------------------------------------------------------------------------


class Nested:
    """A transaction as a plain model has it."""

    def __init__(self, arena: memory.TransactionArena, parent: "Nested | None") -> None:
        self.arena = arena
        self.parent = parent
        self.children: list[Nested] = []
        self.blocks: list[int] = []  # bytes each, of blocks that are alive and counted here

    def used_bytes(self) -> int:
        return sum(self.blocks) + sum(child.used_bytes() for child in self.children)


class TransactionsAgainstTrees(RuleBasedStateMachine):
    """Transactions as trees of byte counts. Blocks stay alive, so that what is used is exact."""

    @initialize()
    def start(self) -> None:
        self.arenas = memory.TransactionArenas(profiles=SMALL_PROFILES, record_every=3)
        self.roots: list[Nested] = []
        self.kept: list[tuple[np.ndarray, int]] = []
        self.next_id = 0
        self.created = self.commits = self.rollbacks = 0

    def everyone(self) -> list[Nested]:
        def walk(nodes: list[Nested]) -> list[Nested]:
            return [one for node in nodes for one in (node, *walk(node.children))]

        return walk(self.roots)

    def pick(self, index: int) -> Nested:
        everyone = self.everyone()
        return everyone[index % len(everyone)]

    @rule(profile=st.sampled_from("abc"))
    def begin(self, profile: str) -> None:
        self.next_id += 1
        self.roots.append(Nested(self.arenas.begin(self.next_id, profile=profile), None))
        self.created += 1

    @precondition(lambda self: self.roots)
    @rule(index=st.integers(0, 100), profile=st.sampled_from("abc"))
    def begin_inside(self, index: int, profile: str) -> None:
        self.next_id += 1
        parent = self.pick(index)
        arena = parent.arena.begin(self.next_id, profile=profile)
        parent.children.append(Nested(arena, parent))
        self.created += 1

    @precondition(lambda self: self.roots)
    @rule(index=st.integers(0, 100), size=st.integers(1, 12_000))
    def allocate(self, index: int, size: int) -> None:
        node = self.pick(index)
        needed, above, fits = rounded(size), node, True
        while above is not None:
            fits &= above.used_bytes() + needed <= above.arena.profile.limit_bytes
            above = above.parent
        if not fits:
            with pytest.raises(OutOfMemory, match=f"cannot allocate {size} bytes: transaction"):
                node.arena.array(size, "uint8")
            return
        view = node.arena.array(size, "uint8")
        fill = len(self.kept) % 255 + 1
        view[:] = fill
        self.kept.append((view, fill))
        node.blocks.append(needed)

    @precondition(lambda self: self.roots)
    @rule(index=st.integers(0, 100))
    def commit(self, index: int) -> None:
        node = self.pick(index)
        if node.children:
            with pytest.raises(InvalidArgument, match="still active"):
                node.arena.commit()
            return
        node.arena.commit()
        self.commits += 1
        self.take_off(node)
        if node.parent is not None:
            node.parent.blocks += node.blocks

    @precondition(lambda self: self.roots)
    @rule(index=st.integers(0, 100))
    def roll_back(self, index: int) -> None:
        node = self.pick(index)
        before = len(self.everyone())
        node.arena.rollback()
        self.take_off(node)
        self.rollbacks += before - len(self.everyone())

    def take_off(self, node: Nested) -> None:
        siblings = self.roots if node.parent is None else node.parent.children
        siblings.remove(node)

    @invariant()
    def holds(self) -> None:
        if not hasattr(self, "arenas"):
            return
        everyone = self.everyone()
        for node in everyone:
            assert node.arena.used_bytes == node.used_bytes()
        statistics = self.arenas.statistics()
        assert statistics.current_bytes == sum(root.used_bytes() for root in self.roots)
        assert (statistics.created, statistics.active) == (self.created, len(everyone))
        assert (statistics.commits, statistics.rollbacks) == (self.commits, self.rollbacks)
        assert {it.transaction_id for it in self.arenas.active()} == {
            node.arena.transaction_id for node in everyone
        }

    def teardown(self) -> None:
        if not hasattr(self, "arenas"):
            return
        assert all((view == fill).all() for view, fill in self.kept)
        self.kept.clear()
        for node in self.everyone():
            assert node.arena.used_bytes == 0, "every chunk is empty"
            assert node.arena.check().ok
        for root in self.roots:
            root.arena.rollback()
        assert self.arenas.statistics().current_bytes == 0
        assert self.arenas.statistics().held_bytes == 0


TestTransactionsAgainstTrees = TransactionsAgainstTrees.TestCase
TestTransactionsAgainstTrees.settings = settings(max_examples=40, stateful_step_count=40)


# --- exhaustion ---------------------------------------------------------------------------------


def test_refusal_of_upstream_changes_nothing_wherever_it_comes() -> None:
    random_sizes = random.Random(5)
    held_counts = set()
    sizes = [random_sizes.choice([100, 1000, 5000, 30_000]) for _ in range(10)]
    for limit_bytes in range(0, 200_000, 24_000):
        upstream = memory.LimitAdaptor(memory.LargeObjectResource(), limit_bytes=limit_bytes)
        arenas = memory.TransactionArenas(upstream, keep_bytes="64 KiB")
        with arenas.begin("t", "512 KiB") as transaction:
            held = []
            for size in sizes:
                used_bytes = transaction.used_bytes
                try:
                    held.append(transaction.array(size, "uint8"))
                except OutOfMemory:
                    assert transaction.used_bytes == used_bytes
            assert transaction.used_bytes == sum(rounded(view.size) for view in held)
            assert transaction.check().ok
        held_counts.add(len(held))
        held.clear()
        assert arenas.statistics().held_bytes == 0
        arenas.trim()
        assert upstream.statistics().current_bytes == 0
    assert len(held_counts) > 3, "the limits make a difference"


def test_dropping_everything_in_any_order_gives_everything_back() -> None:
    names = ["arenas", "parent", "child", "view", "given"]
    for seed in range(20):
        upstream = memory.StatisticsAdaptor(memory.LargeObjectResource())
        arenas = memory.TransactionArenas(upstream, keep_bytes=0)
        parent = arenas.begin("p")
        child = parent.begin("c")
        things = {
            "arenas": arenas,
            "parent": parent,
            "child": child,
            "view": parent.array(100),
            "given": child.array(100),
        }
        if seed % 2:
            child.commit()
        if seed % 4 > 1:
            with suppress(MoiraiError):
                parent.commit()
        del arenas, parent, child
        random.Random(seed).shuffle(names)
        for name in names:
            del things[name]
        gc.collect()
        assert upstream.statistics().current_count == 0, (seed, names)


def test_views_outlive_active_transactions_at_interpreter_exit(run_python: RunPython) -> None:
    printed = run_python(
        """
        import numpy as np
        from moirai import memory

        arenas = memory.TransactionArenas()
        open_one = arenas.begin("open")
        memory.kept = [open_one.array(100), open_one.begin("inside").array(10)]
        with arenas.begin("done") as done, memory.use(done):
            memory.more = np.ones(100)
        print(memory.more.sum())
        """
    )
    assert printed == "100.0\n"


# --- threads and fork ---------------------------------------------------------------------------


def test_threads_begin_and_end_their_own_transactions_at_once() -> None:
    arenas = memory.TransactionArenas(profiles=SMALL_PROFILES, record_every=5)

    def work(name: str) -> Callable[[], None]:
        def body() -> None:
            for turn in range(300):
                with suppress(KeyError), arenas.begin((name, turn)) as transaction:
                    view = transaction.array(turn % 500 + 1, "uint8")
                    view[:] = turn % 256
                    with transaction.begin((name, turn, "inside")) as inside:
                        inside.array(10)
                    assert (view == turn % 256).all()
                    if turn % 3 == 0:
                        raise KeyError

        return body

    run_threads(work("a"), work("b"), work("c"))
    statistics = arenas.statistics()
    assert (statistics.created, statistics.active) == (1800, 0)
    assert (statistics.commits, statistics.rollbacks) == (1500, 300)
    assert (statistics.current_bytes, statistics.held_bytes) == (0, 0)


def test_one_id_is_given_to_one_thread_only() -> None:
    arenas = memory.TransactionArenas()
    winners: list[memory.TransactionArena] = []
    barrier = threading.Barrier(4)

    def claim() -> None:
        barrier.wait()
        with suppress(InvalidArgument):
            winners.append(arenas.begin("id"))

    run_threads(*[claim] * 4)
    assert len(winners) == 1
    assert arenas.statistics().created == 1


def test_transaction_may_end_while_other_threads_allocate_from_it() -> None:
    arenas = memory.TransactionArenas()
    for turn in range(30):
        transaction = arenas.begin(turn, profile="large")
        started = threading.Barrier(3)

        def allocate(transaction=transaction, started=started) -> None:
            held = []
            started.wait()
            try:
                while True:
                    held.append(transaction.array(100, "uint8"))
                    held[-1][:] = 7
                    if len(held) > 1000:
                        held.clear()
            except Closed:
                assert all((view == 7).all() for view in held)

        def end(transaction=transaction, started=started, turn=turn) -> None:
            started.wait()
            (transaction.commit if turn % 2 else transaction.rollback)()

        run_threads(allocate, allocate, end)
        assert transaction.check().ok
    statistics = arenas.statistics()
    assert (statistics.active, statistics.current_bytes, statistics.held_bytes) == (0, 0, 0)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_forked_child_ends_what_it_inherited() -> None:
    arenas = memory.TransactionArenas(record_every=1)
    transaction = arenas.begin("t")
    view = transaction.array(1000, "uint8")
    view[:] = 4
    stop, started = threading.Event(), threading.Event()

    def churn() -> None:
        turn = 0
        while not stop.is_set():
            turn += 1
            with arenas.begin(("churn", turn)) as other:
                other.array(100)
            started.set()

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        assert started.wait(60)
        for _ in range(20):

            def child() -> None:
                assert transaction.rollback() == 1
                with arenas.begin("child's") as own:
                    assert own.array(100, zeroed=True).sum() == 0
                assert (view == 4).all()
                with suppress(InvalidArgument):
                    arenas.begin("child's").commit()

            in_forked_child(child)
    finally:
        stop.set()
        thread.join()
    assert transaction.active
    assert transaction.commit() == 1
    assert (view == 4).all()
