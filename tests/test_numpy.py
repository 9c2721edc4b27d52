"""NumPy draws from a resource: in a context, in the process, and whatever happens to both."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import multiprocessing
import subprocess
import sys
import textwrap
import threading
import weakref
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from moirai import errors, memory


@pytest.fixture
def pool() -> memory.PoolResource:
    return memory.PoolResource()


@pytest.fixture
def installed(pool: memory.PoolResource) -> Iterator[memory.PoolResource]:
    memory.install(pool)
    yield pool
    memory.uninstall()


RESOURCES = {
    "pool": memory.PoolResource,
    "slab": memory.SlabResource,
    "large": memory.LargeObjectResource,
    "system": memory.SystemResource,
    "slab over system": lambda: memory.SlabResource(memory.SystemResource()),
    "statistics": lambda: memory.StatisticsAdaptor(memory.PoolResource()),
    "limit": lambda: memory.LimitAdaptor(memory.PoolResource(), limit_bytes="1 GiB"),
    "limit over system": lambda: memory.LimitAdaptor(memory.SystemResource(), limit_bytes="1 GiB"),
}


# ---- use ----


def test_arrays_made_inside_draw_from_the_resource(pool: memory.PoolResource) -> None:
    with memory.use(pool):
        inside = np.arange(100.0)
    outside = np.arange(100.0)
    assert memory.handler_of(inside) is pool
    assert memory.handler_of(inside[3:].reshape(-1, 1)) is pool
    assert memory.handler_of(outside) is None
    assert pool.statistics().current_count == 1


def test_an_array_outlives_its_block_and_its_resource() -> None:
    pool = memory.PoolResource()
    with memory.use(pool):
        array = np.arange(10_000)
    resource_is_alive = memory.handler_of(array)
    del pool, resource_is_alive
    gc.collect()
    assert int(array.sum()) == 49_995_000
    assert isinstance(memory.handler_of(array), memory.PoolResource)


def test_a_resource_goes_with_its_last_array() -> None:
    pool = memory.PoolResource()
    gone = weakref.ref(pool)
    with memory.use(pool):
        array = np.ones(10)
    del pool
    gc.collect()
    assert gone() is not None
    del array  # and nothing of this package is called
    assert gone() is None


def test_blocks_nest_and_restore(pool: memory.PoolResource) -> None:
    other = memory.SystemResource()
    with memory.use(pool):
        with memory.use(other):
            assert memory.handler_of(np.empty(3)) is other
        assert memory.handler_of(np.empty(3)) is pool
    assert memory.handler_of(np.empty(3)) is None


def test_one_object_may_be_entered_again(pool: memory.PoolResource) -> None:
    scope = memory.use(pool)
    with scope, scope:
        assert memory.handler_of(np.empty(3)) is pool
    assert memory.handler_of(np.empty(3)) is None
    with pytest.raises(RuntimeError, match="left more often than entered"):
        scope.__exit__(None, None, None)


def test_leaving_in_another_context_is_refused_and_loses_nothing(
    pool: memory.PoolResource,
) -> None:
    scope = memory.use(pool)
    with scope:
        with pytest.raises(RuntimeError, match="in the context"):
            contextvars.Context().run(scope.__exit__, None, None, None)
        assert memory.handler_of(np.empty(3)) is pool
    assert memory.handler_of(np.empty(3)) is None


def test_other_threads_do_not_see_it(pool: memory.PoolResource) -> None:
    found: list[memory.Resource | None] = []
    with memory.use(pool):
        thread = threading.Thread(target=lambda: found.append(memory.handler_of(np.empty(3))))
        thread.start()
        thread.join()
    assert found == [None]


def test_one_object_serves_many_threads_at_once(pool: memory.PoolResource) -> None:
    scope = memory.use(pool)
    barrier = threading.Barrier(4)
    wrong: list[object] = []

    def work() -> None:
        barrier.wait()
        for _ in range(200):
            with scope:
                if memory.handler_of(np.empty(3)) is not pool:
                    wrong.append("inside")
            if memory.handler_of(np.empty(3)) is not None:
                wrong.append("outside")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_tasks_inherit_it_and_keep_their_own(pool: memory.PoolResource) -> None:
    other = memory.SystemResource()

    async def own() -> memory.Resource | None:
        with memory.use(other):
            await asyncio.sleep(0)
            return memory.handler_of(np.empty(3))

    async def inherited() -> memory.Resource | None:
        await asyncio.sleep(0)
        return memory.handler_of(np.empty(3))

    async def main() -> list[memory.Resource | None]:
        with memory.use(pool):
            return list(await asyncio.gather(own(), inherited()))

    assert asyncio.run(main()) == [other, pool]


def test_decorated_functions_run_inside(pool: memory.PoolResource) -> None:
    @memory.use(pool)
    def plain(size: int) -> np.ndarray:
        """Make one."""
        return np.empty(size)

    @memory.use(pool)
    async def coroutine() -> np.ndarray:
        await asyncio.sleep(0)
        return np.empty(3)

    assert plain.__name__ == "plain"
    assert plain.__doc__ == "Make one."
    assert memory.handler_of(plain(3)) is pool
    assert memory.handler_of(asyncio.run(coroutine())) is pool
    assert memory.handler_of(np.empty(3)) is None


def test_a_suspended_generator_leaks_the_handler_as_documented(
    pool: memory.PoolResource,
) -> None:
    def numbers() -> Iterator[np.ndarray]:
        with memory.use(pool):
            yield np.empty(3)

    generator = numbers()
    next(generator)
    leaked = memory.handler_of(np.empty(3))
    generator.close()
    assert leaked is pool
    assert memory.handler_of(np.empty(3)) is None


def test_a_decorated_generator_does_not_leak(pool: memory.PoolResource) -> None:
    @memory.use(pool)
    def numbers() -> Iterator[np.ndarray]:
        received = yield np.empty(3)
        assert received == "sent"
        try:
            yield np.empty(3)
        except KeyError:
            yield np.empty(3)

    generator = numbers()
    made = [next(generator)]
    assert memory.handler_of(np.empty(3)) is None
    made.append(generator.send("sent"))  # type: ignore[attr-defined]
    assert memory.handler_of(np.empty(3)) is None
    made.append(generator.throw(KeyError()))  # type: ignore[attr-defined]
    assert memory.handler_of(np.empty(3)) is None
    assert [memory.handler_of(array) for array in made] == [pool] * 3
    assert list(generator) == []


def test_async_generators_are_refused_by_name(pool: memory.PoolResource) -> None:
    with pytest.raises(errors.InvalidArgument, match="async generator function"):

        @memory.use(pool)
        async def stream():  # type: ignore[no-untyped-def]
            yield 1


@pytest.mark.parametrize("wrong", [None, 3, "pool", memory.PoolResource])
def test_use_takes_a_resource_only(wrong: object) -> None:
    with pytest.raises(TypeError, match="Resource"):
        memory.use(wrong)  # type: ignore[arg-type]


def test_handler_of_takes_an_array_only() -> None:
    with pytest.raises(TypeError, match=r"array: must be a numpy\.ndarray, got list"):
        memory.handler_of([1, 2])  # type: ignore[arg-type]


@pytest.mark.parametrize("make", RESOURCES.values(), ids=RESOURCES.keys())
def test_every_resource_serves_numpy(make: type[memory.Resource]) -> None:
    resource = make()
    with memory.use(resource):
        arrays = [np.full(size, size % 251, dtype="u1") for size in range(0, 300_000, 7919)]
        zeros = [np.zeros(size, dtype="u1") for size in (0, 1, 1000, 100_000, 5_000_000)]
        text = np.array(["memory", "is", "shared"] * 100)
        objects = np.array([object() for _ in range(100)])
    assert all((array == array.size % 251).all() for array in arrays)
    assert all(not array.any() for array in zeros)
    assert text[299] == "shared"
    assert resource.statistics().current_count == len(arrays) + len(zeros) + 2
    del arrays, zeros, text, objects
    assert resource.statistics().current_bytes == 0
    assert resource.check().ok, resource.check()


@pytest.mark.parametrize("make", RESOURCES.values(), ids=RESOURCES.keys())
def test_resizing_keeps_the_contents(make: type[memory.Resource]) -> None:
    resource = make()
    with memory.use(resource):
        array = np.arange(10)
        for size in (1000, 100_000, 2_000_000, 50_000, 5):
            array.resize(size, refcheck=False)
            kept = min(size, 5)
            assert array[:kept].tolist() == list(range(kept))
        many = np.fromiter(iter(range(30_000)), dtype=np.int64)
    assert int(many.sum()) == 30_000 * 29_999 // 2
    del array, many
    assert resource.statistics().current_bytes == 0


def test_too_much_is_a_memory_error(pool: memory.PoolResource) -> None:
    with memory.use(pool), pytest.raises(MemoryError):
        np.empty(2**62, dtype="u1")
    assert pool.statistics().current_bytes == 0
    limited = memory.LimitAdaptor(pool, limit_bytes="1 MiB")
    with memory.use(limited), pytest.raises(MemoryError):
        np.ones(2**20)
    assert limited.statistics().current_bytes == 0


def test_untouched_zeros_take_no_memory(pool: memory.PoolResource) -> None:
    def resident() -> int:
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * 4096

    with memory.use(pool):
        before = resident()
        zeros = np.zeros(2**28, dtype="u1")
        after = resident()
        assert after - before < 2**24
        del zeros
        filled = np.ones(2**28, dtype="u1")
        del filled
        again = np.zeros(2**28, dtype="u1")
        assert resident() - before < 2**24, "a hot block is given back, not kept and zeroed"
        assert not again[:: 2**20].any()


def test_zeros_that_were_filled_come_from_warm_memory(pool: memory.PoolResource) -> None:
    with memory.use(pool):
        for _ in range(4):
            zeros = np.zeros(2**24, dtype="u1")
            assert not zeros.any()
            zeros.fill(1)
            del zeros
    statistics = pool.statistics()
    assert statistics.reused_bytes >= 3 * 2**24
    assert statistics.decommitted_bytes == 0


# ---- install ----


def test_install_reaches_new_threads(installed: memory.PoolResource) -> None:
    found: list[memory.Resource | None] = []
    thread = threading.Thread(target=lambda: found.append(memory.handler_of(np.empty(3))))
    thread.start()
    thread.join()
    assert found == [installed]
    assert memory.installed() is installed


def test_use_goes_before_install(installed: memory.PoolResource) -> None:
    other = memory.PoolResource()
    with memory.use(other):
        assert memory.handler_of(np.empty(3)) is other
    assert memory.handler_of(np.empty(3)) is installed


def test_arrays_of_before_and_after_are_freed_by_whoever_made_them() -> None:
    before = [np.full(size, 1.0) for size in (3, 100, 10_000, 1_000_000)]
    first = memory.install(memory.PoolResource())
    during = [np.full(size, 2.0) for size in (3, 100, 10_000, 1_000_000)]
    before[0].resize(1000, refcheck=False)
    del before
    memory.uninstall()
    assert memory.installed() is None
    after = [np.full(size, 3.0) for size in (3, 100, 10_000, 1_000_000)]
    assert [memory.handler_of(array) for array in during] == [first] * 4
    assert [memory.handler_of(array) for array in after] == [None] * 4
    assert all((array == 2.0).all() for array in during)
    during[1].resize(5000, refcheck=False)
    second = memory.install(memory.PoolResource())
    del during
    assert first.statistics().current_bytes == 0
    assert second.statistics().current_bytes == 0
    del after
    memory.uninstall()


ADAPTORS: dict[str, Callable[[memory.Resource], memory.Resource]] = {
    "statistics": memory.StatisticsAdaptor,
    "limit": lambda pool: memory.LimitAdaptor(pool, limit_bytes="64 MiB"),
    "slab": memory.SlabResource,
    "arena": memory.ArenaResource,
}


@pytest.mark.parametrize("adapt", ADAPTORS.values(), ids=ADAPTORS.keys())
@pytest.mark.parametrize("pool_first", [True, False])
def test_resources_over_one_pool_are_installed_one_after_the_other(
    adapt: Callable[[memory.Resource], memory.Resource], pool_first: bool
) -> None:
    pool = memory.LargeObjectResource()
    adaptor, other = adapt(pool), memory.StatisticsAdaptor(pool)
    first, second = (pool, adaptor) if pool_first else (adaptor, pool)
    made: list[tuple[memory.Resource, np.ndarray]] = []
    try:
        for resource in (first, second, first, other, second):
            memory.install(resource, replace=True)
            made += [(resource, np.full(size, 7.0)) for size in (3, 100, 10_000, 300_000)]
    finally:
        memory.uninstall()
    for resource, array in made:
        assert memory.handler_of(array) is resource
        array.resize(array.size * 3, refcheck=False)
        assert memory.handler_of(array) is resource
    for resource in (adaptor, other):
        mine = [array for maker, array in made if maker is resource]
        assert resource.statistics().current_count == len(mine)
    del mine, array
    memory.install(first)
    try:
        del made[::2]
    finally:
        memory.uninstall()
    made.clear()
    for resource in (adaptor, other, pool):
        resource.trim()
        assert resource.statistics().current_count == 0
    assert memory.health().ok, memory.health()


def test_a_second_install_is_refused_unless_it_replaces(installed: memory.PoolResource) -> None:
    other = memory.SystemResource()
    with pytest.raises(errors.InvalidArgument, match=r"PoolResource is installed already"):
        memory.install(other)
    assert memory.installed() is installed
    assert memory.install(other, replace=True) is other
    assert memory.handler_of(np.empty(3)) is other


@pytest.mark.parametrize("make", RESOURCES.values(), ids=RESOURCES.keys())
def test_every_resource_can_be_installed(make: type[memory.Resource]) -> None:
    before = np.ones(5000)
    resource = memory.install(make())
    try:
        array = np.ones(5000)
        array.resize(700_000, refcheck=False)
        assert memory.handler_of(array) is resource
        del before
        assert resource.statistics().current_count >= 1
        del array
        gc.collect()
    finally:
        memory.uninstall()
    assert resource.statistics().current_bytes == 0
    assert resource.check().ok, resource.check()


def test_installing_twice_leaves_uninstall_harmless() -> None:
    memory.uninstall()
    memory.uninstall()
    assert memory.installed() is None


def test_largest_arrays_name_their_site() -> None:
    code = """
        import numpy as np
        from moirai import memory
        memory.install()
        small = np.ones(100)
        big = np.ones(10_000_000)  # line 6
        for _ in range(3):
            bigger = np.empty(20_000_000)
        print(memory.largest_arrays())
    """
    shown = _python(code)
    assert "size_bytes=160000000, seen_count=3, site='<string>:8'" in shown
    assert shown.index("160000000") < shown.index("80000000")
    assert "size_bytes=800," not in shown


def test_largest_arrays_lists_no_array_that_was_refused() -> None:
    shown = _python(
        """
        import numpy as np
        from moirai import memory
        memory.install()
        for make in (np.empty, np.zeros):
            try:
                make(1 << 62, dtype="uint8")
            except MemoryError:
                pass
        kept = np.empty(2 << 20, dtype="uint8")
        print([array.size_bytes for array in memory.largest_arrays()])
        """
    )
    assert shown.strip() == "[2097152]"


def _python(code: str, *options: str) -> str:
    done = subprocess.run(
        [sys.executable, *options, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_arrays_may_be_freed_at_interpreter_exit() -> None:
    _python(
        """
        import atexit, sys
        import numpy as np
        from moirai import memory
        memory.install(memory.LimitAdaptor(memory.PoolResource(), limit_bytes="1 GiB"))
        class Late:
            def __init__(self): self.array = np.ones(100_000)
            def __del__(self): self.array = self.array + 1
        sys.late = Late()
        with memory.use(memory.PoolResource()):
            kept = Late()
        atexit.register(lambda: np.ones(1000))
        """
    )


def test_finalisers_may_make_large_arrays_while_the_interpreter_ends() -> None:
    done = _python(
        """
        import builtins
        import numpy as np
        from moirai import memory
        memory.install()
        class Late:
            empty, write = np.empty, print
            def __del__(self):
                for size in (1 << 20, 5 << 20, 3 << 20):
                    self.empty(size, dtype="uint8")
                self.write("made")
        builtins.late = Late()
        """
    )
    assert done.strip() == "made"


def _child(array: np.ndarray) -> tuple[float, bool]:
    made = np.ones(300_000)
    return float(array.sum() + made.sum()), memory.installed() is not None


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_allocates_and_frees(installed: memory.PoolResource) -> None:
    arrays = [np.ones(50_000), np.ones(10)]
    context = multiprocessing.get_context("fork")
    with context.Pool(2) as workers:
        assert workers.map(_child, arrays) == [(350_000.0, True), (300_010.0, True)]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_forking_while_threads_allocate_never_hangs(installed: memory.PoolResource) -> None:
    stop = threading.Event()

    def churn() -> None:
        while not stop.is_set():
            buffers = [installed.allocate(size) for size in (100, 5000, 100_000, 2_000_000)]
            del buffers

    threads = [threading.Thread(target=churn) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        context = multiprocessing.get_context("fork")
        for _ in range(20):
            process = context.Process(target=_child, args=(np.ones(10),))
            process.start()
            process.join(60)
            assert process.exitcode == 0
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert installed.check().ok


def test_importing_the_package_imports_no_numpy() -> None:
    assert _python("import moirai, sys; print('numpy' in sys.modules)").strip() == "False"
    assert _python("import moirai.memory, sys; print('numpy' in sys.modules)").strip() == "False"
