"""The compiled core. Import it through a facade such as `moirai.memory`, never directly."""

import sys
from collections.abc import Callable, Coroutine, Iterable, Sequence
from types import GenericAlias, TracebackType
from typing import Any, Generic, Literal, Self, SupportsIndex, TypeVar, final, overload

import numpy as np
from numpy.typing import DTypeLike, NDArray
from typing_extensions import disjoint_base

from moirai._waiting import AsyncLease

__all__ = [
    "Acquisition",
    "AdaptiveResource",
    "Arena",
    "ArenaResource",
    "BareExecutor",
    "BareQueue",
    "Batch",
    "Buffer",
    "BufferPool",
    "CancelToken",
    "Channel",
    "ChannelStatistics",
    "Future",
    "HealthReport",
    "LargeObjectResource",
    "Lease",
    "LentBlock",
    "LimitAdaptor",
    "LoopDoorbell",
    "NumaResource",
    "ObjectPool",
    "PatternAdaptor",
    "Pending",
    "PoolResource",
    "PoolStatistics",
    "PooledBuffer",
    "PressureSampler",
    "PressureSource",
    "PriorityResource",
    "RealtimeResource",
    "ReceivedView",
    "Receiver",
    "Rehearsal",
    "ReservedArray",
    "Resource",
    "Results",
    "Savepoint",
    "Sender",
    "SharedBlock",
    "SharedChannel",
    "SharedMemoryResource",
    "SharedReceiver",
    "SharedSender",
    "Slab",
    "SlabResource",
    "Statistics",
    "StatisticsAdaptor",
    "SystemResource",
    "ThreadLocalArena",
    "Ticket",
    "TimerHandle",
    "TransactionArena",
    "TransactionStore",
    "Vector",
    "VectorPool",
    "Waiting",
    "WorkerHandle",
    "build_profile",
    "call_outside_tasks",
    "current_lane",
    "handler_of",
    "idle_channel_bytes",
    "install",
    "installed",
    "keep_libc_heap",
    "largest_arrays",
    "lift_inherited_fence",
    "linger",
    "lost_blocks",
    "pages_by_node",
    "prefer_node",
    "priority",
    "retained_heap_bytes",
    "select_channels",
    "select_channels_async",
    "stop_background",
    "sweep_fence_ledger",
    "task_token",
    "trim_channels",
    "trim_libc_heap",
    "trim_resources",
    "uninstall",
    "use",
    "walk_resources",
]

@final
class Buffer:
    """One block of a resource; given back when the last view of it is gone.

    Exports the buffer protocol (writable bytes), `numpy()` and DLPack, all without a copy. May be
    dropped in any thread.
    """

    @property
    def size_bytes(self) -> int:
        """Bytes asked for."""
    @property
    def block_bytes(self) -> int:
        """Bytes of the block: the request rounded up to what the resource hands out."""
    @property
    def resource(self) -> Resource:
        """The resource it came from."""
    def numpy(
        self, dtype: DTypeLike | None = None, shape: int | tuple[int, ...] | None = None
    ) -> NDArray[Any]:
        """The block as an array that keeps it alive; shape defaults to all of it in one dimension.

        Args:
            dtype: Any dtype without object references; None is uint8.
            shape: A shape whose items fit the block.

        Raises:
            InvalidArgument: The dtype holds objects, or dtype and shape do not fit the block.
        """
    def __dlpack__(self, **options: Any) -> Any:
        """DLPack export of the block as bytes; the keyword arguments are NumPy's."""
    def __dlpack_device__(self) -> tuple[int, int]:
        """(1, 0): main memory."""
    def __len__(self) -> int: ...
    if sys.version_info >= (3, 12):
        def __buffer__(self, flags: int, /) -> memoryview: ...
        def __release_buffer__(self, buffer: memoryview, /) -> None: ...

@final
class Batch:
    """Equal blocks of an arena, cut in one step and given back together.

    A sequence of buffers, made when they are asked for; each keeps the whole batch. Counts as one
    block, which is given back when the batch and every view of it are gone.
    """

    @property
    def size_bytes(self) -> int:
        """Bytes of each block, as asked."""
    @property
    def stride_bytes(self) -> int:
        """Bytes from the start of one block to the next."""
    @property
    def resource(self) -> Arena:
        """The arena it came from."""
    def numpy(self, dtype: DTypeLike | None = None) -> NDArray[Any]:
        """All blocks as one array of shape (count, items of a block); rows may lie apart.

        Args:
            dtype: Any dtype without object references whose items divide a block; None is uint8.

        Raises:
            InvalidArgument: The dtype holds objects, or does not divide a block.
        """
    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Buffer: ...

@disjoint_base
class Resource:
    """A source of memory; the base of every resource and adaptor.

    Not made directly. Every method may be called by any number of threads at once.
    """

    @property
    def upstream(self) -> Resource | None:
        """The resource this one draws from, or None."""
    def allocate(
        self,
        size_bytes: int,
        *,
        alignment_bytes: int = 64,
        zeroed: bool = False,
        priority: int | None = None,
    ) -> Buffer:
        """A block of `size_bytes` as a Buffer, or OutOfMemory with nothing changed.

        Args:
            size_bytes: >= 0; a block of 0 bytes is legal.
            alignment_bytes: A power of two from 1 to 2 MiB; at least 64 is given.
            zeroed: Whether the block must read as zero. From 4 MiB the kernel zeroes pages as they
                are touched.
            priority: The `Priority` whose lane of a `PriorityResource` serves the request, also
                through adaptors; None: the context's.

        Raises:
            InvalidArgument: A value above is out of its range.
            OutOfMemory: The request cannot be met.
        """
    def allocate_group(
        self,
        sizes: Iterable[int],
        *,
        alignment_bytes: int = 64,
        zeroed: bool = False,
        priority: int | None = None,
    ) -> list[Buffer]:
        """A Buffer for each of `sizes`, or OutOfMemory with none taken.

        A `LimitAdaptor` admits the sum or refuses it, so that of two groups asked for at once that
        do not both fit one succeeds.

        Args:
            sizes: Bytes of each block, >= 0; none makes an empty list.
            alignment_bytes: As for `allocate`, for every block.
            zeroed: As for `allocate`, for every block.
            priority: As for `allocate`, for all blocks.

        Raises:
            InvalidArgument: A value above is out of its range; nothing was taken.
            OutOfMemory: The requests cannot all be met; nothing is kept.
        """
    def statistics(self) -> Statistics:
        """What happened so far."""
    def trim(self, target_bytes: int = 0) -> int:
        """Give kept memory back to the system until at most `target_bytes` are kept.

        Returns:
            Bytes given back. What other threads hold in their magazines stays.
        """
    def check(self) -> HealthReport:
        """Walk the resource's own structures; raises nothing, reports all."""

class SystemResource(Resource):
    """Draws every block from the C library, 64-byte aligned.

    libc does not say what it reuses, so every block counts as a miss.
    """

    def __new__(cls) -> Self: ...

class LargeObjectResource(Resource):
    """Spans of pages for large blocks."""

    def __new__(
        cls,
        *,
        fit: str = "best",
        huge_pages: str = "auto",
        cache_cap_bytes: int | None = None,
        decay_seconds: float | None = 0.5,
    ) -> Self: ...

@disjoint_base
class Slab(Resource):
    """A resource with size classes; the base of SlabResource and PoolResource.

    What these methods change holds for what is asked from now on; blocks that are out stay as
    they are.
    """

    def class_tuples(
        self,
    ) -> list[tuple[int, bool, tuple[int, int] | None, int, int, int, int]]:
        """Every class, the smallest first, as a tuple.

        Bytes of a block, whether the class is standard, smallest and largest request that go to it,
        rounds of a magazine, runs, blocks handed out so far, blocks out now.
        """
    def set_extra_classes(self, sizes: Iterable[int]) -> None:
        """Have extra classes of exactly these sizes serve requests from now on.

        Args:
            sizes: Multiples of 64 between 1 KiB and 16 KiB that are no standard class.

        Raises:
            InvalidArgument: A size is none of those, or there would be more than 16 extra classes
                over the slab's life; nothing was changed.
        """
    def set_magazine(self, block_bytes: int, *, rounds: int) -> None:
        """Have the magazines of a class hold `rounds` blocks.

        Each thread follows when it next exchanges a magazine.

        Args:
            block_bytes: The class, by the size of its blocks.
            rounds: From 2 to 512, and to 128 KiB of blocks.

        Raises:
            InvalidArgument: There is no such class, or `rounds` is out of range.
        """
    def draw_ahead(self, block_bytes: int) -> None:
        """Draw a run of a class before it is needed, with its pages in memory.

        It stays, also when no block of it is out, until the slab is trimmed.

        Args:
            block_bytes: The class, by the size of its blocks.

        Raises:
            InvalidArgument: There is no such class.
            OutOfMemory: Upstream has no run.
        """

class PoolResource(Slab):
    """A slab in front of a large-object heap: the general-purpose resource."""

    def __new__(
        cls,
        *,
        huge_pages: str = "auto",
        cache_cap_bytes: int | None = None,
        decay_seconds: float | None = 0.5,
    ) -> Self: ...

class SlabResource(Slab):
    """Equal blocks by size class; what is larger than 16 KiB goes upstream."""

    def __new__(cls, upstream: Resource) -> Self: ...

@final
class Savepoint:
    """A moment of an arena to go back to; forgotten when the last reference to it is gone."""

class Arena(Resource):
    """A resource that cuts blocks one after the other from chunks; the base of every arena."""

    def array(
        self,
        shape: SupportsIndex | Sequence[SupportsIndex],
        dtype: DTypeLike | None = None,
        *,
        zeroed: bool = False,
    ) -> NDArray[Any]:
        """An array of its own block, which lives as long as the array and its views.

        Args:
            shape: An int or ints, each >= 0.
            dtype: Any dtype without object references; None is float64.
            zeroed: Whether the array must be zero; otherwise its contents are undefined.

        Raises:
            InvalidArgument: The dtype holds objects, or a length is negative.
            OutOfMemory: The array is larger than can be had.
        """
    def allocate_batch(self, count: int, size_bytes: int, *, zeroed: bool = False) -> Batch:
        """`count` blocks of `size_bytes`, cut in one step and given back together.

        Args:
            count: >= 0.
            size_bytes: Bytes of each block; >= 0. Each starts at a multiple of 64 bytes.
            zeroed: Whether the blocks must read as zero.

        Raises:
            InvalidArgument: A value above is out of its range.
            OutOfMemory: The request cannot be met.
        """

@disjoint_base
class ArenaResource(Arena):
    """An arena: blocks are cut from chunks, and everything is given back by a reset or a rollback.

    What was given back is cut again. Nothing that a view shows is: with a live block in the way,
    `reset` and `rollback` refuse, or leave the chunks that hold live blocks to their views.
    """

    def __new__(cls, upstream: Resource, *, chunk_bytes: int) -> Self: ...
    def savepoint(self) -> Savepoint:
        """Remember this moment.

        What any thread allocates from now on comes after it. It ends with a reset, with a rollback
        to an earlier savepoint, or when the last reference to it is gone.
        """
    def rollback(self, savepoint: Savepoint, *, retire: bool = False) -> int:
        """Go back to a savepoint; the blocks that had to be left to their views.

        The savepoint stays, later ones end. The work does not grow with what was allocated.

        Args:
            savepoint: One of this arena that has not ended.
            retire: Whether chunks with live blocks are left to their views, until the last one
                dies, and go upstream then.

        Returns:
            Live blocks; 0 unless `retire`.

        Raises:
            InvalidArgument: Blocks made after the savepoint are alive and `retire` is false; the
                message says how many. Or the savepoint has ended or is another arena's.
        """
    def reset(self, *, retire: bool = False) -> int:
        """Start over, with the chunks warm; the blocks that had to be left to their views.

        As a rollback to the beginning; every savepoint ends.
        """

@disjoint_base
class ThreadLocalArena(Arena):
    """An arena for each thread, made on first use and given back when the thread ends."""

    def __new__(cls, upstream: Resource, *, chunk_bytes: int) -> Self: ...
    @property
    def arena_count(self) -> int:
        """Arenas made so far: the most threads that had one at once."""
    def savepoint(self) -> Savepoint:
        """Remember this moment of the calling thread's arena."""
    def rollback(self, savepoint: Savepoint, *, retire: bool = False) -> int:
        """Go back to a savepoint of the calling thread; the blocks left to their views."""
    def reset(self, *, retire: bool = False) -> int:
        """Start the calling thread's arena over; the blocks left to their views."""

@final
class TransactionStore:
    """What transactions have in common: chunks, counts, and the recorder."""

    def __new__(cls, upstream: Resource, *, keep_bytes: int, record_every: int) -> Self: ...
    @property
    def upstream(self) -> Resource:
        """The resource chunks come from."""
    def counts(self) -> dict[str, int]:
        """Every count by name."""
    def compare_with_malloc(self) -> tuple[int, int, int, int] | None:
        """(events, bytes asked for, held, given by malloc) of the last recording, or None."""
    def trim(self, target_bytes: int) -> int:
        """Give unused chunks back until at most `target_bytes` are kept, upstream's included."""

@disjoint_base
class TransactionArena(Arena):
    """The memory of one transaction."""

    def __new__(
        cls,
        store: TransactionStore,
        *,
        initial_bytes: int,
        limit_bytes: int,
        label: str,
        parent: TransactionArena | None = None,
    ) -> Self: ...
    @property
    def active(self) -> bool:
        """Whether it was neither committed nor rolled back."""
    @property
    def used_bytes(self) -> int:
        """Bytes it uses, those of transactions inside it included."""
    @property
    def wanted_bytes(self) -> int:
        """Most bytes it used, or would have used had nothing been refused."""
    @property
    def held_bytes(self) -> int:
        """Bytes of the chunks it holds."""
    def _commit(self) -> int:
        """End it and keep what it made; the blocks that are alive."""
    def _rollback(self) -> int:
        """End it and what it made; the blocks that are left to their views."""

@disjoint_base
class StatisticsAdaptor(Resource):
    """Counts what passes through it on the way to `upstream`."""

    def __new__(cls, upstream: Resource) -> Self: ...
    def open_scope(self) -> int:
        """Open a scope; the number names it."""
    def scope_counts(self, scope: int) -> tuple[int, int, int, int, int] | None:
        """(start, peak, total bytes; total count; current bytes) of an open scope, or None."""
    def close_scope(self, scope: int) -> tuple[int, int, int, int, int] | None:
        """Close a scope; its counts, or None if it is not open."""

@disjoint_base
class LimitAdaptor(Resource):
    """Refuses what would take the use of `upstream` above a limit."""

    def __new__(cls, upstream: Resource, *, limit_bytes: int) -> Self: ...
    @property
    def limit_bytes(self) -> int:
        """The limit in bytes."""

@disjoint_base
class NumaResource(Resource):
    """Pools whose pages come from chosen nodes."""

    def __new__(
        cls,
        *,
        policy: str,
        node_sets: Sequence[Sequence[int]],
        pool_of_cpu: Sequence[int],
        huge_pages: str = "auto",
        cache_cap_bytes: int | None = None,
        decay_seconds: float | None = 0.5,
    ) -> Self: ...
    @property
    def refusal(self) -> str | None:
        """What the kernel refused to place, and why; None if all of it lies as asked."""

@disjoint_base
class RealtimeResource(Resource):
    """A fixed amount of memory: prefaulted, locked, handed out without the kernel."""

    def __new__(cls, realtime_bytes: int, *, allow_unlocked: bool = False) -> Self: ...
    @property
    def capacity_bytes(self) -> int:
        """Bytes that blocks may take together."""
    @property
    def is_locked(self) -> bool:
        """Whether the kernel must leave the memory where it is; not so in a forked child."""

@disjoint_base
class SharedMemoryResource(Resource):
    """Blocks that a SharedChannel sends by reference."""

    def __new__(cls, capacity_bytes: int) -> Self: ...
    @property
    def capacity_bytes(self) -> int:
        """Bytes that blocks may take together."""
    @property
    def lingering_bytes(self) -> int:
        """Bytes that were freed here and are held by other processes, or on their way to them.

        They are used again when those have let go of them, or have died.
        """

@disjoint_base
class PriorityResource(Resource):
    """A resource for each lane; a block goes back to the lane it came from."""

    def __new__(
        cls, realtime: Resource, high: Resource, normal: Resource, background: Resource
    ) -> Self: ...
    @property
    def lanes(self) -> list[Resource]:
        """The resource of each lane, the most urgent first."""

@disjoint_base
class PatternAdaptor(Resource):
    """Notes the pattern of what passes through it on the way to `upstream`."""

    def __new__(cls, upstream: Resource) -> Self: ...
    def sizes(self) -> list[tuple[int, int]]:
        """(bytes rounded up to a multiple of 64, requests) of requests up to 16 KiB, by bytes."""
    def class_patterns(self) -> list[dict[str, Any]]:
        """What was noted of each size class."""

@disjoint_base
class AdaptiveResource(Resource):
    """Routes each size class to the part that suits its workload."""

    def __new__(
        cls,
        high_throughput: Resource,
        low_latency: Resource,
        long_running: Resource,
        *,
        initial: str,
        window_seconds: float,
        long_seconds: float,
        long_share: float,
        high_rate: float,
        hysteresis: float,
        confirmations: int,
        tolerance: float,
        avoid_seconds: float,
        is_counterfactual: bool,
    ) -> Self: ...
    @property
    def parts(self) -> list[Resource]:
        """The resource for each workload, in the order of the arguments."""
    @property
    def is_counterfactual(self) -> bool:
        """Whether it only says what it would do."""
    def sizes(self) -> list[tuple[int, int]]:
        """(bytes rounded up to a multiple of 64, requests) of requests up to 16 KiB, by bytes."""
    def class_patterns(self) -> list[dict[str, Any]]:
        """What was noted of each size class."""
    def decisions(self) -> tuple[list[dict[str, Any]], int]:
        """The latest decisions, the oldest first, and how many there were in all."""
    def standings(self) -> list[dict[str, Any]]:
        """What is known of each class now."""

@final
class Statistics:
    """Counts of a resource; bytes are block bytes, the request rounded up to its block.

    `hits + misses == total_count`, and `cached_bytes <= resident_bytes`.
    """

    @property
    def current_bytes(self) -> int:
        """Bytes in blocks that are handed out now."""
    @property
    def current_count(self) -> int:
        """Blocks that are handed out now."""
    @property
    def peak_bytes(self) -> int:
        """Most bytes handed out at once; a slab counts blocks resting in magazines too."""
    @property
    def peak_count(self) -> int:
        """Most blocks handed out at once, with the same remark."""
    @property
    def total_bytes(self) -> int:
        """Bytes handed out so far."""
    @property
    def total_count(self) -> int:
        """Blocks handed out so far."""
    @property
    def hits(self) -> int:
        """Blocks served from memory that was used before and kept."""
    @property
    def misses(self) -> int:
        """Blocks served from memory new from the kernel, or from libc, which does not say."""
    @property
    def resident_bytes(self) -> int:
        """Bytes held from the kernel, handed out or kept, whether touched or not."""
    @property
    def cached_bytes(self) -> int:
        """Bytes held from the kernel that are not handed out."""
    @property
    def reused_bytes(self) -> int:
        """Bytes of kept spans of pages that were handed out again."""
    @property
    def reused_pages(self) -> int:
        """Pages of kept spans that were handed out again without having been given back."""
    @property
    def decommitted_bytes(self) -> int:
        """Bytes given back to the kernel so far."""
    @property
    def invalid_frees(self) -> int:
        """Frees of an address that was no live block; they are ignored."""
    def as_dict(self) -> dict[str, int]:
        """Every count by name."""
    def __eq__(self, other: object, /) -> bool: ...
    def __ne__(self, other: object, /) -> bool: ...

@final
class HealthReport:
    """What a walk over a resource's structures found."""

    @property
    def ok(self) -> bool:
        """Whether every invariant held."""
    @property
    def findings(self) -> list[str]:
        """One sentence for each broken invariant."""
    @property
    def counts(self) -> dict[str, int]:
        """What was counted on the way, by name."""

@disjoint_base
class use:  # noqa: N801
    """Makes NumPy draw from `resource` in the current context between enter and exit.

    May be entered again, also in other threads and tasks, before it is left.
    """

    def __new__(cls, resource: Resource) -> Self: ...
    @property
    def resource(self) -> Resource:
        """The resource NumPy draws from inside."""
    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        *_exception: type[BaseException] | BaseException | TracebackType | None,
    ) -> None: ...

@disjoint_base
class priority:  # noqa: N801
    """Sends the requests of the current context to one lane between enter and exit.

    May be entered again, also in other threads and tasks, before it is left.
    """

    def __new__(cls, priority: int) -> Self: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        *_exception: type[BaseException] | BaseException | TracebackType | None,
    ) -> None: ...

def current_lane() -> int:
    """Number of the current context's lane."""

def handler_of(array: NDArray[Any] | np.ndarray[Any, Any]) -> Resource | None:
    """The resource that NumPy drew an array's memory from, or None if there is none.

    Views are followed to the array that owns the memory. What shows the memory of another object is
    None: of a `Buffer`, of another library's, of what `as_strided` puts in between.

    Raises:
        TypeError: `array` is no numpy.ndarray.
    """

def install(resource: Resource, *, replace: bool = False) -> None:
    """Draw every array of the process from `resource`, in new threads too."""

def uninstall() -> None:
    """Let NumPy serve new arrays itself again; arrays made meanwhile stay valid."""

def installed() -> Resource | None:
    """The resource that is installed, or None."""

def largest_arrays() -> list[tuple[int, int, str | None]]:
    """(bytes, times seen, "file:line" or None) of the largest arrays made while installed."""

def keep_libc_heap(keep_bytes: int, decay_seconds: float) -> bool:
    """Have libc's heap keep freed memory and give it back by age; false if libc is not glibc."""

def pages_by_node(buffer: Buffer | NDArray[Any] | memoryview | bytearray) -> dict[int | None, int]:
    """How many pages of a buffer lie on each node; None: not in memory.

    Pages that it shares with neighbours count too.

    Args:
        buffer: Any contiguous object with the buffer protocol.

    Raises:
        InvalidArgument: `buffer` has gaps.
        Unsupported: The kernel does not say.
    """

def prefer_node(node: int) -> None:
    """Have memory that this thread touches first come from a node, as long as that has any.

    So it is for the threads that it starts from now on.

    Args:
        node: The node's id.

    Raises:
        InvalidArgument: No node can have this id.
        Unsupported: The kernel does not take it: no such node, or policies are not allowed.
    """

def walk_resources() -> list[
    tuple[int, str, list[int], Statistics, HealthReport, tuple[int, int] | None, Statistics]
]:
    """Look at every resource that is alive, oldest first; nothing is stopped meanwhile.

    Returns:
        (number, name, numbers of its sources, counts before, report, (bytes, blocks) held from
        upstream if it counts them, counts after) of each.
    """

def linger(seconds: float) -> int:
    """Wait until others have received what was sent by reference; how many are left."""

def lost_blocks() -> list[tuple[int, str, int, int]]:
    """(number, name, blocks, bytes) of resources that went while blocks of theirs were out."""

_Item = TypeVar("_Item")

@disjoint_base
class ObjectPool(Generic[_Item]):
    """A bounded pool of objects that are worth keeping: connections, parsers, large structures.

    Idle objects are handed out last in, first out. Who finds none, and no permit to make one,
    waits in order of arrival. Any number of threads and event loops may use a pool at once; the
    four functions run in the thread that calls, with no lock held, and may use the pool
    themselves. In a forked child the pool is empty and has all its permits: inherited objects are
    dropped without `destroy`, and a release of one that was out does nothing.

    Args:
        factory: Makes an object, a new one at each call. What it raises reaches who acquires.
        reset: Makes an object ready for its next user, at its release. If it raises, the object is
            destroyed and counted, the error logged, and the release succeeds.
        destroy: Takes leave of an object that the pool gives up. What it raises is logged.
        validate: Says, before an idle object is handed out, whether it is fit. If it says no or
            raises, the object is destroyed and a new one made.
        min_size: Objects made at once, and left alive by age and by `trim`; >= 0.
        max_size: Permits: the most objects alive or being made; >= 1.
        overflow: What an acquire does when all permits are taken: wait ("block"), raise Timeout
            ("raise"), or make an object that is destroyed at its release ("create").
        idle_seconds: Objects idle for at least so long are destroyed at the next acquire or
            release, or by `trim`; None keeps them.
        track_sites: Whether to note which line acquires, for `leaks`; costs one to two
            microseconds.

    Raises:
        InvalidArgument: An argument is outside its range.
        TypeError: A function is not callable.
    """

    def __new__(
        cls,
        factory: Callable[[], _Item],
        reset: Callable[[_Item], Any] | None = None,
        destroy: Callable[[_Item], Any] | None = None,
        validate: Callable[[_Item], Any] | None = None,
        min_size: int = 0,
        max_size: int = 64,
        overflow: Literal["block", "raise", "create"] = "block",
        idle_seconds: float | None = None,
        *,
        track_sites: bool = False,
    ) -> Self: ...
    def __class_getitem__(cls, item: Any) -> GenericAlias:
        """For annotations: ObjectPool[Connection]."""
    def acquire(self, timeout_seconds: float | None = None) -> _Item:
        """An object of one's own until `release`.

        Waits in order of arrival, with the interpreter released; Ctrl-C ends the wait. An object
        that is collected without having been released is counted as leaked, and its permit comes
        back; objects that cannot have weak references (lists, bytearrays) are kept by the pool and
        so are never collected: `leaks` shows them.

        Args:
            timeout_seconds: How long to wait at most; >= 0. None waits for ever.

        Raises:
            Timeout: Nothing was released in time, or `overflow` is "raise"; nothing was acquired.
            Closed: The pool is closed, or was while this waited.
            InvalidArgument: `timeout_seconds` is negative, or `factory` made what is in the pool.
        """
    def release(self, item: _Item) -> None:
        """Give back what `acquire` gave.

        Raises:
            InvalidArgument: The object is not from this pool, was released before, or is leased.
        """
    def lease(self, timeout_seconds: float | None = None) -> Lease[_Item]:
        """A context manager that acquires on entry and releases on exit.

        Args:
            timeout_seconds: As for `acquire`, which is called on entry.
        """
    def _acquire_or_queue(
        self, wake: Callable[[], Any], timeout_seconds: float | None
    ) -> tuple[_Item | None, Ticket | None]:
        """(object, None), or (None, Ticket) with `wake` to be called once something was granted."""
    def prefill(self, count: int) -> int:
        """Make objects until `count` are idle, as far as `max_size` allows; returns how many.

        Raises:
            Closed: The pool is closed.
            InvalidArgument: `count` is negative or above `max_size`.
        """
    def clear(self) -> int:
        """Destroy every idle object; returns how many."""
    def trim(self, idle_seconds: float | None = None) -> int:
        """Destroy what was idle for at least `idle_seconds`, down to `min_size`; returns how many.

        Args:
            idle_seconds: None is the pool's own, or 0 if it has none.
        """
    def close(self) -> None:
        """Destroy what is idle, wake those who wait, hand nothing out any more.

        What is out may still be released, and is destroyed then.
        """
    @property
    def closed(self) -> bool:
        """Whether the pool was closed."""
    def acquire_async(self, timeout_seconds: float | None = None) -> Coroutine[Any, Any, _Item]:
        """As `acquire`, but wait without blocking the event loop.

        Works from any number of event loops. A cancelled wait gives its place, and what was granted
        to it, to the next one. `factory` and `validate` run in the event loop's thread.

        Args:
            timeout_seconds: As for `acquire`.

        Raises:
            Timeout, Closed: As for `acquire`.
        """
    def lease_async(self, timeout_seconds: float | None = None) -> AsyncLease[_Item]:
        """As `lease`, for `async with`."""
    def statistics(self) -> PoolStatistics:
        """What happened so far."""
    def leaks(self) -> list[Acquisition]:
        """Every object that is out, the longest held first.

        Called when nothing should be out, it names what was forgotten and, with
        ``track_sites=True``, where.
        """
    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        *_exception: type[BaseException] | BaseException | TracebackType | None,
    ) -> None: ...

@final
class Lease(Generic[_Item]):
    """An object of a pool for the length of a block; it goes back when the block is left.

    A lease that is collected before its block is left is counted as leaked, and its permit comes
    back; the object does not.
    """

    def __class_getitem__(cls, item: Any) -> GenericAlias:
        """For annotations: Lease[Connection]."""
    @property
    def value(self) -> _Item:
        """The object, while the lease runs.

        Raises:
            Closed: The lease was not entered, or is over.
        """
    def release(self) -> None:
        """Give the object back before the block is left.

        Raises:
            Closed: As for `value`.
        """
    def detach(self) -> _Item:
        """Take the object out of the pool for good; its permit goes back.

        Raises:
            Closed: As for `value`.
        """
    def __enter__(self) -> _Item: ...
    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _exception: BaseException | None,
        _traceback: TracebackType | None,
        /,
    ) -> None: ...

@final
class PoolStatistics:
    """A snapshot of a pool's counters, taken at one moment.

    ``acquires == hits + misses``, always. When nothing is being made, reset or handed over at the
    moment, ``created - destroyed - leaked - detached == idle + in_use == permits``.
    """

    @property
    def acquires(self) -> int:
        """Items handed out."""
    @property
    def hits(self) -> int:
        """Of those, items that were idle or came back just then."""
    @property
    def misses(self) -> int:
        """Of those, items made for the caller."""
    @property
    def created(self) -> int:
        """Items made, those of `prefill` included."""
    @property
    def destroyed(self) -> int:
        """Items the pool gave up: trimmed, too old, unfit, or in surplus."""
    @property
    def factory_failures(self) -> int:
        """Items that could not be made."""
    @property
    def reset_failures(self) -> int:
        """Items given up because they could not be reset."""
    @property
    def validation_failures(self) -> int:
        """Items given up because they were found unfit for another turn."""
    @property
    def destroy_failures(self) -> int:
        """Items given up whose destruction raised; they are gone all the same."""
    @property
    def leaked(self) -> int:
        """Items collected without having been released; their permits came back."""
    @property
    def detached(self) -> int:
        """Items taken out for good by their users."""
    @property
    def exported(self) -> int:
        """Buffers and vectors given up because they came back with views of them alive."""
    @property
    def oversize(self) -> int:
        """Vectors given up because they had grown beyond their cap."""
    @property
    def waits(self) -> int:
        """Acquires that had to wait."""
    @property
    def timeouts(self) -> int:
        """Acquires that gave up, after a wait or at once."""
    @property
    def idle(self) -> int:
        """Items at rest now."""
    @property
    def in_use(self) -> int:
        """Items out now."""
    @property
    def peak_in_use(self) -> int:
        """Most items out at once; of several size classes, the sum of their peaks."""
    @property
    def waiting(self) -> int:
        """Callers that wait now."""
    @property
    def permits(self) -> int:
        """Permits taken now."""
    def as_dict(self) -> dict[str, int]:
        """Every count by name."""
    def __eq__(self, other: object, /) -> bool: ...
    def __ne__(self, other: object, /) -> bool: ...

@final
class Acquisition:
    """One item that is out."""

    @property
    def kind(self) -> str:
        """Name of the object's type; for a buffer, its size class."""
    @property
    def site(self) -> str | None:
        """ "file:line" that acquired it; None unless the pool tracks sites.

        It is the innermost line outside installed packages, where there is such a line.
        """
    @property
    def held_seconds(self) -> float | None:
        """How long it is out; None as for `site`."""
    def __eq__(self, other: object, /) -> bool: ...
    def __ne__(self, other: object, /) -> bool: ...

@final
class Ticket:
    """A place in a pool's queue. Dropping it gives it, and what was granted, to the next one."""

    def take(self) -> Any:
        """The object that was granted; to be called after `wake` was."""
    def time_out(self, waited_seconds: float) -> Any:
        """What was granted in the last moment, or Timeout."""
    def cancel(self) -> None:
        """Leave the queue; does nothing the second time."""

@disjoint_base
class BufferPool:
    """Writable bytes by size class."""

    def __new__(
        cls,
        resource: Resource,
        *,
        size_classes: list[int],
        max_count: int,
        overflow: str,
        idle_seconds: float | None,
        track_sites: bool,
    ) -> Self: ...
    @property
    def resource(self) -> Resource:
        """The resource the blocks are drawn from."""
    @property
    def size_classes(self) -> tuple[int, ...]:
        """The size classes in bytes, smallest first."""
    def acquire(
        self, size_bytes: int, *, zeroed: bool = False, timeout_seconds: float | None = None
    ) -> PooledBuffer:
        """A buffer of `size_bytes` from the smallest class that has them, until it is released.

        Args:
            size_bytes: From 0 to the largest class.
            zeroed: Whether it must read as zero; otherwise it holds what its last user left.
            timeout_seconds: How long to wait at most; >= 0. None waits for ever.

        Raises:
            Timeout: Nothing was released in time, or `overflow` is "raise"; nothing was acquired.
            Closed: The pool is closed, or was while this waited.
            InvalidArgument: A value above is out of its range.
            OutOfMemory: The resource cannot give a block.
        """
    def _acquire_or_queue(
        self,
        wake: Callable[[], Any],
        timeout_seconds: float | None,
        size_bytes: int,
        zeroed: bool,
    ) -> tuple[PooledBuffer | None, Ticket | None]:
        """(buffer, None), or (None, Ticket) with `wake` to be called once something was granted."""
    def release(self, buffer: PooledBuffer) -> None:
        """Give back what `acquire` gave.

        Raises:
            InvalidArgument: It is not from this pool, or was released or detached before.
        """
    def prefill(self, size_bytes: int, count: int) -> int:
        """Draw blocks until `count` of the class for `size_bytes` are idle; returns how many."""
    def clear(self) -> int:
        """Give every idle block back to the resource; returns how many."""
    def trim(self, idle_seconds: float | None = None) -> int:
        """Give back what was idle for at least `idle_seconds`; returns how many.

        Args:
            idle_seconds: None is the pool's own, or 0 if it has none.
        """
    def close(self) -> None:
        """Give back what is idle, wake those who wait, hand nothing out any more.

        What is out may still be released, and goes back to the resource then.
        """
    @property
    def closed(self) -> bool:
        """Whether the pool was closed."""
    def acquire_async(
        self, size_bytes: int, *, zeroed: bool = False, timeout_seconds: float | None = None
    ) -> Coroutine[Any, Any, PooledBuffer]:
        """As `acquire`, but wait without blocking the event loop.

        Works from any number of event loops. A cancelled wait gives its place, and what was granted
        to it, to the next one.

        Args:
            size_bytes: As for `acquire`, as all others.

        Raises:
            Timeout, Closed, InvalidArgument, OutOfMemory: As for `acquire`.
        """
    def statistics(self) -> PoolStatistics:
        """What happened so far, in all classes."""
    def class_statistics(self) -> dict[int, PoolStatistics]:
        """What happened so far, by size class."""
    def leaks(self) -> list[Acquisition]:
        """Every buffer that is out; in each class the longest held first."""
    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        *_exception: type[BaseException] | BaseException | TracebackType | None,
    ) -> None: ...

@final
class PooledBuffer:
    """Bytes of a pool, writable, until they are released.

    Exports the buffer protocol, `numpy()` and indexing like a bytearray of fixed length; slices are
    read as bytes. Leaving its `with` block releases it. One that is collected without a release is
    counted as leaked, and its permit comes back. Views of it stay valid whatever happens to it.
    """

    @property
    def size_bytes(self) -> int:
        """Bytes asked for."""
    @property
    def block_bytes(self) -> int:
        """Bytes of the block: at least the size class."""
    def numpy(self, dtype: DTypeLike | None = None) -> NDArray[Any]:
        """The bytes as an array of this dtype, without a copy; the array is a view.

        Raises:
            InvalidArgument: The dtype holds objects, or its items do not divide the buffer.
            Closed: The buffer was released.
        """
    def release(self) -> None:
        """Give it back before the block is left.

        Raises:
            InvalidArgument: It was released or detached before.
        """
    def detach(self) -> Self:
        """Take it out of the pool for good; its permit goes back.

        Raises:
            Closed: The buffer was released.
        """
    def __len__(self) -> int: ...
    @overload
    def __getitem__(self, index: int, /) -> int: ...
    @overload
    def __getitem__(self, index: slice, /) -> bytes: ...
    def __setitem__(self, index: Any, value: Any, /) -> None: ...
    def __delitem__(self, index: Any, /) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        *_exception: type[BaseException] | BaseException | TracebackType | None,
    ) -> None: ...
    if sys.version_info >= (3, 12):
        def __buffer__(self, flags: int, /) -> memoryview: ...
        def __release_buffer__(self, buffer: memoryview, /) -> None: ...

@disjoint_base
class VectorPool:
    """Typed vectors that grow."""

    def __new__(
        cls,
        resource: Resource,
        dtype: np.dtype[Any],
        *,
        format: str | None,
        convert: Callable[[Iterable[Any]], NDArray[np.uint8]],
        capacity: int,
        cap_bytes: int,
        growth: float,
        max_count: int,
        overflow: str,
        idle_seconds: float | None,
        track_sites: bool,
    ) -> Self: ...
    @property
    def resource(self) -> Resource:
        """The resource the blocks are drawn from."""
    @property
    def dtype(self) -> np.dtype[Any]:
        """The type of the values."""
    def acquire(self, timeout_seconds: float | None = None) -> Vector:
        """An empty vector, until it is released.

        Args:
            timeout_seconds: How long to wait at most; >= 0. None waits for ever.

        Raises:
            Timeout: Nothing was released in time, or `overflow` is "raise"; nothing was acquired.
            Closed: The pool is closed, or was while this waited.
            OutOfMemory: The resource cannot give a block.
        """
    def _acquire_or_queue(
        self, wake: Callable[[], Any], timeout_seconds: float | None
    ) -> tuple[Vector | None, Ticket | None]:
        """(vector, None), or (None, Ticket) with `wake` to be called once something was granted."""
    def release(self, vector: Vector) -> None:
        """Give back what `acquire` gave.

        Raises:
            InvalidArgument: It is not from this pool, or was released or detached before.
        """
    def prefill(self, count: int) -> int:
        """Draw blocks until `count` are idle; returns how many."""
    def clear(self) -> int:
        """Give every idle block back to the resource; returns how many."""
    def trim(self, idle_seconds: float | None = None) -> int:
        """Give back what was idle for at least `idle_seconds`; returns how many.

        Args:
            idle_seconds: None is the pool's own, or 0 if it has none.
        """
    def close(self) -> None:
        """Give back what is idle, wake those who wait, hand nothing out any more.

        What is out may still be released, and goes back to the resource then.
        """
    @property
    def closed(self) -> bool:
        """Whether the pool was closed."""
    def acquire_async(self, timeout_seconds: float | None = None) -> Coroutine[Any, Any, Vector]:
        """As `acquire`, but wait without blocking the event loop.

        Works from any number of event loops. A cancelled wait gives its place, and what was granted
        to it, to the next one.

        Args:
            timeout_seconds: As for `acquire`.

        Raises:
            Timeout, Closed: As for `acquire`.
        """
    def statistics(self) -> PoolStatistics:
        """What happened so far."""
    def leaks(self) -> list[Acquisition]:
        """Every vector that is out, the longest held first."""
    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        *_exception: type[BaseException] | BaseException | TracebackType | None,
    ) -> None: ...

@final
class Vector:
    """A vector of a pool, until it is released.

    Exports the buffer protocol with its dtype. Its length cannot change while a view of it is
    alive. Leaving its `with` block releases it. One that is collected without a release is counted
    as leaked, and its permit comes back. Views of it stay valid whatever happens to it.
    """

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type of its values."""
    @property
    def capacity(self) -> int:
        """Values it may have before it moves to a larger block."""
    def append(self, value: Any) -> None:
        """Append one value.

        Raises:
            InvalidArgument: The value does not fit the dtype, or views of the vector are alive.
            TypeError: The value is of another type.
            Closed: The vector was released.
            OutOfMemory: The resource cannot give a larger block; nothing changed.
        """
    def extend(self, values: Iterable[Any]) -> None:
        """Append each value of an array or another iterable.

        Args:
            values: One dimension, of the dtype's kind: nothing is rounded or loses its sign.

        Raises:
            InvalidArgument, Closed, OutOfMemory: As for `append`; nothing changed.
        """
    def clear(self) -> None:
        """Forget all values; the memory stays.

        Raises:
            InvalidArgument: Views of the vector are alive.
            Closed: The vector was released.
        """
    def numpy(self) -> NDArray[Any]:
        """The values as an array, without a copy; the array is a view.

        Raises:
            Closed: The vector was released.
        """
    def release(self) -> None:
        """Give it back before the block is left.

        Raises:
            InvalidArgument: It was released or detached before.
        """
    def detach(self) -> Self:
        """Take it out of the pool for good; its permit goes back.

        Raises:
            Closed: The vector was released.
        """
    def __len__(self) -> int: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        *_exception: type[BaseException] | BaseException | TracebackType | None,
    ) -> None: ...
    if sys.version_info >= (3, 12):
        def __buffer__(self, flags: int, /) -> memoryview: ...
        def __release_buffer__(self, buffer: memoryview, /) -> None: ...

def stop_background() -> None:
    """End the background thread that lets kept memory age; it starts again when needed."""

def build_profile() -> Literal["release", "debug"]:
    """How this module was compiled: "release" or "debug"."""

_Default = TypeVar("_Default")

@disjoint_base
class Channel(Generic[_Item]):
    """Messages from any thread or task to any other: bounded, in order, without a copy.

    It acts as both sides; `sender()` and `receiver()` give handles of one side, which are counted.
    Any number of threads and event loops may use it at once. A forked child has a copy with the
    messages that were in it, and nobody waiting.

    Args:
        capacity: Messages it holds before a sender waits; from 1 to 2**30, 16 bytes each.

    Raises:
        InvalidArgument: `capacity` is outside its range.
    """

    def __new__(cls, capacity: int) -> Self: ...
    def __class_getitem__(cls, key: Any) -> GenericAlias: ...
    def send(self, item: _Item, timeout_seconds: float | None = None) -> None:
        """Put a message in, waiting while the channel is full.

        Args:
            item: The message; the receiver gets this very object.
            timeout_seconds: How long to wait at most; >= 0. None waits for ever, 0 not at all.

        Raises:
            Timeout: There was no room in time; nothing was sent.
            Closed: This channel is closed, or every sender of it.
            Disconnected: Every receiver is closed.
            InvalidArgument: `timeout_seconds` is negative.
        """
    def try_send(self, item: _Item) -> bool:
        """Put a message in if there is room; whether it was.

        Raises:
            Closed, Disconnected: As for `send`.
        """
    def send_many(self, items: Iterable[_Item], timeout_seconds: float | None = None) -> int:
        """Put messages in, in order, waiting until all are; returns how many.

        Others may send between them. `items` is read to its end first. Whatever is raised after
        that has `sent_count`: so many were sent, and stay sent.

        Args:
            items: The messages.
            timeout_seconds: How long to wait at most, for all of them; >= 0.

        Raises:
            Timeout, Closed, Disconnected, InvalidArgument: As for `send`.
        """
    def send_async(
        self, item: _Item, timeout_seconds: float | None = None
    ) -> Coroutine[Any, Any, None]:
        """As `send`, but wait without blocking the event loop."""
    def send_many_async(
        self, items: Iterable[_Item], timeout_seconds: float | None = None
    ) -> Coroutine[Any, Any, int]:
        """As `send_many`, but wait without blocking the event loop."""
    def receive(self, timeout_seconds: float | None = None) -> _Item:
        """Take the oldest message, waiting while there is none.

        Args:
            timeout_seconds: How long to wait at most; >= 0. None waits for ever, 0 not at all.

        Raises:
            Timeout: Nothing came in time; nothing was taken.
            Closed: This channel is closed, or every receiver of it, and it is empty.
            Disconnected: Every sender is closed, and what was sent has been received.
            InvalidArgument: `timeout_seconds` is negative.
        """
    @overload
    def try_receive(self) -> _Item | None:
        """Take the oldest message if there is one, else return `default`.

        Raises:
            Closed, Disconnected: As for `receive`.
        """
    @overload
    def try_receive(self, default: _Default) -> _Item | _Default: ...
    def receive_many(
        self, max_count: int | None = None, timeout_seconds: float | None = None
    ) -> list[_Item]:
        """Take what is there, at least one, waiting while there is none.

        Args:
            max_count: How many to take at most; >= 1. None takes all.
            timeout_seconds: How long to wait at most for the first; >= 0.

        Raises:
            Timeout, Closed, Disconnected, InvalidArgument: As for `receive`.
        """
    def receive_async(self, timeout_seconds: float | None = None) -> Coroutine[Any, Any, _Item]:
        """As `receive`, but wait without blocking the event loop."""
    def receive_many_async(
        self, max_count: int | None = None, timeout_seconds: float | None = None
    ) -> Coroutine[Any, Any, list[_Item]]:
        """As `receive_many`, but wait without blocking the event loop."""
    def sender(self) -> Sender[_Item]:
        """A handle that sends; when the last of them is closed, the senders' side ends.

        Raises:
            Closed: The channel is closed, or that side has ended.
        """
    def receiver(self) -> Receiver[_Item]:
        """A handle that receives; when the last of them is closed, the receivers' side ends.

        What is in the channel then is dropped.

        Raises:
            Closed: That side has ended.
        """
    def close(self) -> None:
        """Take no message any more; what is in it can be received. Whoever waits is woken."""
    @property
    def closed(self) -> bool:
        """Whether it takes no message any more, for whatever reason."""
    @property
    def capacity(self) -> int:
        """Messages it holds before a sender waits."""
    def statistics(self) -> ChannelStatistics:
        """What went through so far, and who waits now. Each number is of a moment of its own."""
    def __len__(self) -> int: ...
    def __bool__(self) -> bool:
        """An empty channel is a channel."""
    def __iter__(self) -> Self: ...
    def __next__(self) -> _Item: ...
    def __aiter__(self) -> Self: ...
    def __anext__(self) -> Coroutine[Any, Any, _Item]: ...

@final
class Sender(Generic[_Item]):
    """A handle that sends. Closed by `close`, at the end of its block, or when it is collected."""

    def __new__(cls, channel: Channel[_Item]) -> Self: ...
    def __class_getitem__(cls, key: Any) -> GenericAlias: ...
    def send(self, item: _Item, timeout_seconds: float | None = None) -> None:
        """Put a message in, waiting while the channel is full.

        Args:
            item: The message; the receiver gets this very object.
            timeout_seconds: How long to wait at most; >= 0. None waits for ever, 0 not at all.

        Raises:
            Timeout: There was no room in time; nothing was sent.
            Closed: This handle is closed, or the channel.
            Disconnected: Every receiver is closed.
            InvalidArgument: `timeout_seconds` is negative.
        """
    def try_send(self, item: _Item) -> bool:
        """Put a message in if there is room; whether it was.

        Raises:
            Closed, Disconnected: As for `send`.
        """
    def send_many(self, items: Iterable[_Item], timeout_seconds: float | None = None) -> int:
        """Put messages in, in order, waiting until all are; returns how many.

        Others may send between them. `items` is read to its end first. Whatever is raised after
        that has `sent_count`: so many were sent, and stay sent.

        Args:
            items: The messages.
            timeout_seconds: How long to wait at most, for all of them; >= 0.

        Raises:
            Timeout, Closed, Disconnected, InvalidArgument: As for `send`.
        """
    def send_async(
        self, item: _Item, timeout_seconds: float | None = None
    ) -> Coroutine[Any, Any, None]:
        """As `send`, but wait without blocking the event loop."""
    def send_many_async(
        self, items: Iterable[_Item], timeout_seconds: float | None = None
    ) -> Coroutine[Any, Any, int]:
        """As `send_many`, but wait without blocking the event loop."""
    def wait_for_room(self, timeout_seconds: float | None = None) -> None:
        """Wait until there is room for a message, which stays if nobody else sends.

        Raises:
            Timeout, Closed, Disconnected, InvalidArgument: As for `send`.
        """
    def close(self) -> None:
        """Count this handle out; the last one ends the senders' side."""
    @property
    def closed(self) -> bool:
        """Whether this handle was closed."""
    def __enter__(self) -> Self: ...
    def __exit__(self, *_exception: object) -> None: ...

@disjoint_base
class Receiver(Generic[_Item]):
    """A handle that receives. Closed by `close`, at its block's end, or when it is collected."""

    def __new__(cls, channel: Channel[_Item]) -> Self: ...
    def __class_getitem__(cls, key: Any) -> GenericAlias: ...
    def receive(self, timeout_seconds: float | None = None) -> _Item:
        """Take the oldest message, waiting while there is none.

        Args:
            timeout_seconds: How long to wait at most; >= 0. None waits for ever, 0 not at all.

        Raises:
            Timeout: Nothing came in time; nothing was taken.
            Closed: This handle is closed; or the channel, and it is empty.
            Disconnected: Every sender is closed, and what was sent has been received.
            InvalidArgument: `timeout_seconds` is negative.
        """
    @overload
    def try_receive(self) -> _Item | None:
        """Take the oldest message if there is one, else return `default`.

        Raises:
            Closed, Disconnected: As for `receive`.
        """
    @overload
    def try_receive(self, default: _Default) -> _Item | _Default: ...
    def receive_many(
        self, max_count: int | None = None, timeout_seconds: float | None = None
    ) -> list[_Item]:
        """Take what is there, at least one, waiting while there is none.

        Args:
            max_count: How many to take at most; >= 1. None takes all.
            timeout_seconds: How long to wait at most for the first; >= 0.

        Raises:
            Timeout, Closed, Disconnected, InvalidArgument: As for `receive`.
        """
    def receive_async(self, timeout_seconds: float | None = None) -> Coroutine[Any, Any, _Item]:
        """As `receive`, but wait without blocking the event loop."""
    def receive_many_async(
        self, max_count: int | None = None, timeout_seconds: float | None = None
    ) -> Coroutine[Any, Any, list[_Item]]:
        """As `receive_many`, but wait without blocking the event loop."""
    def close(self) -> None:
        """Count this handle out; the last one ends the receivers' side."""
    @property
    def closed(self) -> bool:
        """Whether this handle was closed."""
    def __enter__(self) -> Self: ...
    def __exit__(self, *_exception: object) -> None: ...
    def __iter__(self) -> Self: ...
    def __next__(self) -> _Item: ...
    def __aiter__(self) -> Self: ...
    def __anext__(self) -> Coroutine[Any, Any, _Item]: ...

@final
class ChannelStatistics:
    """What went through a channel, and who waits."""

    @property
    def capacity(self) -> int:
        """Messages it holds before a sender waits."""
    @property
    def current_count(self) -> int:
        """Messages in it."""
    @property
    def total_sent(self) -> int:
        """Messages put in since it was made."""
    @property
    def total_received(self) -> int:
        """Messages taken out since it was made."""
    @property
    def current_senders(self) -> int:
        """Open handles that send."""
    @property
    def current_receivers(self) -> int:
        """Open handles that receive."""
    @property
    def senders_waiting(self) -> int:
        """Threads and tasks that wait for room."""
    @property
    def receivers_waiting(self) -> int:
        """Threads and tasks that wait for a message."""
    def __eq__(self, other: object, /) -> bool: ...
    def __ne__(self, other: object, /) -> bool: ...

@final
class BareQueue(Generic[_Item]):
    """A queue whose limit may change; 0 or less is no limit."""

    def __new__(cls, maxsize: int) -> Self: ...
    def __class_getitem__(cls, key: Any) -> GenericAlias: ...
    def put(self, item: _Item, timeout_seconds: float | None) -> None:
        """Put an item in; Timeout if there is no room in time."""
    def get(self, timeout_seconds: float | None) -> _Item:
        """Take the oldest item; Timeout if there is none in time."""
    def set_maxsize(self, maxsize: int) -> None:
        """Have another limit from now on."""
    def shutdown(self, immediate: bool) -> None:
        """Refuse further items; `immediate` drops what is in it, and lets go whoever joins."""
    def task_done(self) -> bool:
        """An item was dealt with; false if none was left to be."""
    def join(self) -> None:
        """Wait until every item has been dealt with."""
    @property
    def unfinished_tasks(self) -> int:
        """Items that were not dealt with yet."""
    def __len__(self) -> int: ...

@disjoint_base
class Future:
    """The state of a call. Its Python class is a concurrent.futures.Future too."""

    def __new__(cls) -> Self: ...
    def cancel(self) -> bool:
        """Withdraw the task if nobody has begun it, or ask it to end; whether it is cancelled.

        A task that has begun learns of it by its token (`moirai.executor.current_token`).
        """
    def cancelled(self) -> bool:
        """Whether it was withdrawn."""
    def running(self) -> bool:
        """Whether somebody is at it."""
    def done(self) -> bool:
        """Whether it is over."""
    def result(self, timeout: float | None = None) -> Any:
        """What the task returned, or its exception raised; waits for the end.

        Without a timeout, the thread that waits runs the task if nobody has begun it.

        Args:
            timeout: Seconds to wait at most.

        Raises:
            Timeout: It has not ended in time; it goes on.
            CancelledError: It was cancelled.
            Disconnected: It was queued by the parent of this process and had not ended at the fork.
        """
    def exception(self, timeout: float | None = None) -> BaseException | None:
        """The exception that the task raised, or None; waits for the end.

        As `result`.
        """
    def add_done_callback(self, fn: Callable[[Any], object]) -> None:
        """Call a function with this future at the end, or now if it is over.

        It is called in the thread that ends the task. What it raises is logged.
        """
    def set_running_or_notify_cancel(self) -> bool:
        """For executors that run a future's task: whether to run it."""
    def disconnect(self, exception: BaseException) -> None:
        """In a forked child, of one that was made by hand: nobody here will end it.

        It gets this exception, if it has no end. No callback is called.
        """
    def set_result(self, result: Any) -> None:
        """Set the result of a future that was made by hand."""
    def set_exception(self, exception: BaseException) -> None:
        """Set the exception of a future that was made by hand."""
    def call_when_asked(self, fn: Callable[[Any], object]) -> None:
        """Of one made by hand, which somebody is at: call a function once it is asked to end.

        With this future; at once if it was asked. It is called in the thread that asks.
        """
    def set_cancelled(self) -> None:
        """Of one made by hand, which was asked to end: it ended for that, and is cancelled."""
    @property
    def _state(self) -> str: ...
    @property
    def _condition(self) -> Any: ...
    @property
    def _waiters(self) -> list[Any]: ...
    @property
    def _result(self) -> Any: ...
    @property
    def _exception(self) -> BaseException | None: ...

@disjoint_base
class BareExecutor:
    """The mechanism of an executor; the threads are started and joined by its Python class."""

    def __new__(
        cls,
        kind: type[Future],
        *,
        node_of_worker: Sequence[int],
        order: Sequence[Sequence[int]],
        node_of_cpu: Sequence[int],
        node_ids: Sequence[int],
        outsiders_help: bool,
        max_pending: int | None,
        when_full: str,
        memory: use | None,
        wrap: Callable[[Callable[..., Any]], Callable[..., Any]] | None,
        measure_latency: bool,
    ) -> Self: ...
    def submit(self, function: Callable[..., Any], /, *arguments: Any, **keywords: Any) -> Any:
        """Queue a call of a function; its future.

        Args:
            function: What is called, in a copy of this moment's context.
            arguments: Its arguments.
            keywords: Its keyword arguments, but for these, which are the executor's: `priority`,
                how urgent the task is (a Priority); `node`, the id of the node whose workers are to
                take it first; `timeout_seconds`, how long it may run, from its start; `deadline`,
                the moment of `time.monotonic()` by which it is to have ended. When its time is
                over the future raises Timeout; one that has not begun is not begun any more.

        Raises:
            Closed: After `shutdown`; a RuntimeError.
            InvalidArgument: `priority` is no Priority, or `node` has no workers, or a time is
                outside its range.
            Full: There is no room, and `when_full` is "raise".
            Timeout: The deadline passed while it waited for room.
        """
    def queue_calls(
        self,
        function: Callable[..., Any],
        items: Iterable[Any],
        /,
        *,
        star: bool,
        priority: Any = None,
        node: int | None = None,
        timeout_seconds: float | None = None,
        deadline: float | None = None,
    ) -> list[Any]:
        """Queue a call of a function for each of some arguments; their futures, in order."""
    def queue_group(
        self,
        calls: Iterable[tuple[Any, ...]],
        /,
        *,
        priority: Any = None,
        node: int | None = None,
        timeout_seconds: float | None = None,
        deadline: float | None = None,
    ) -> list[Any]:
        """Queue calls, each a tuple of a function and its arguments, all at once or none; their
        futures, in order."""
    def queue_chunks(
        self,
        function: Callable[..., Any],
        items: Iterable[Any],
        size: int,
        /,
        *,
        star: bool,
        priority: Any = None,
        node: int | None = None,
    ) -> list[Any]:
        """Queue calls of a function, `size` of them to a task; the tasks' futures, in order. Each
        gives a list of results up to the first failure, and that or None."""
    def close(self) -> None:
        """Take no more calls; workers end when nothing is queued."""
    @property
    def is_closed(self) -> bool:
        """Whether it was closed."""
    @property
    def is_broken(self) -> bool:
        """Whether a worker could not be set up."""
    def cancel_queued(self) -> None:
        """Cancel what is queued."""
    def renew(self) -> None:
        """In a forked child: workers and queues of its own, and none of the parent's tasks."""
    def allow(self, task_count: int) -> None:
        """Let so many tasks run at once from now on; from 1 to as many as there are workers.

        Those that run are not interrupted; what comes after them waits. A guard of
        `moirai.pressure` calls this.

        Raises:
            InvalidArgument: `task_count` is outside its range.
        """
    @property
    def allowed_count(self) -> int:
        """How many tasks may run at once."""
    @property
    def running_count(self) -> int:
        """How many workers run tasks, or look for the next one."""
    def latencies(self) -> list[tuple[list[int], list[int]]] | None:
        """How long tasks waited for their start and took then, in nanoseconds by powers of two: for
        each worker, and last for all other threads; None where that is not measured."""
    def counts(self) -> tuple[dict[str, Any], list[dict[str, int]]]:
        """What was done so far: counts for the executor, and for each worker."""

@final
class Rehearsal:
    """An executor's workers without threads, step by step; tasks are numbers."""

    def __new__(cls, *, node_of_worker: Sequence[int], order: Sequence[Sequence[int]]) -> Self: ...
    def queue(self, node: int, task: int) -> list[int]:
        """Queue a task from outside at a node; the workers that were started or woken for it.

        Raises:
            InvalidArgument: There is no such node.
        """
    def push(self, worker: int, task: int) -> list[int]:
        """A worker queues a task; the workers that were started or woken for it.

        Raises:
            InvalidArgument: The worker was not started.
        """
    def take(self, worker: int) -> tuple[int | None, int, list[int]]:
        """What a worker takes next, if anything, how many tasks come along, and who is woken then.

        What comes along into the worker's deque are those of the same deque that were older.

        Raises:
            InvalidArgument: The worker was not started.
        """
    def rest(self, worker: int) -> tuple[float, list[int]]:
        """A worker found nothing: for how many seconds it sleeps at most, and who is woken then.

        0 means that it is to look again, infinity that it sleeps until it is woken. A worker that
        sleeps for a time leaves what it has seen to others until then.

        Raises:
            InvalidArgument: The worker was not started.
        """
    def stop_waiting(self, worker: int) -> bool:
        """A worker slept for as long as it would; whether nobody woke it, so that it looks now.

        Raises:
            InvalidArgument: The worker was not started.
        """
    def counts(self) -> list[dict[str, int]]:
        """What each worker has done."""

@final
class Results:
    """An iterator that takes what is in a list out of it, and keeps nothing that it has given."""

    def __new__(cls, list: list[Any]) -> Self: ...
    def __iter__(self) -> Self: ...
    def __next__(self) -> Any: ...

@final
class WorkerHandle:
    """What a worker's thread has of an executor: not the object, which may go before it."""

    def work(self, who: int) -> None:
        """Be the worker `who` until the executor is closed and nothing is queued."""
    def close(self) -> None:
        """Take no more calls; as `BareExecutor.close`."""
    def give_up(self) -> None:
        """A worker cannot be set up: whatever is queued fails, and nothing more is taken."""

@final
class TimerHandle:
    """What the thread that waits for time limits has of an executor."""

    def work(self) -> None:
        """End tasks whose time is over, until the executor is closed and none has a time limit."""
    def close(self) -> None:
        """Take no more calls; as `BareExecutor.close`."""

@final
class CancelToken:
    """By which the function of a task learns that it is to end. Any thread may use it.

    Args:
        is_asked: What says whether a call that is no task of this process is asked to end; None:
            nobody asks it.
        deadline: The moment of `time.monotonic()` at which its time is over; None: none.
    """

    def __new__(
        cls, is_asked: Callable[[], bool] | None = None, deadline: float | None = None
    ) -> Self: ...
    @property
    def is_cancelled(self) -> bool:
        """Whether the task is asked to end, or its time is over."""
    @property
    def remaining_seconds(self) -> float | None:
        """Seconds until the task's time is over, or None if that is not limited."""
    def check(self) -> None:
        """Raise what ends the task, if it is to end.

        Raises:
            CancelledError: The task is asked to end; when its function lets this pass, the future
                is cancelled.
            Timeout: Its time is over.
        """

def call_outside_tasks(
    function: Callable[..., _Item], /, *arguments: Any, **keywords: Any
) -> _Item:
    """Call a function as if this thread ran no task: the token is not that of the task it runs."""

def task_token() -> CancelToken | None:
    """The token of the task that this thread is running, the innermost one; None: it runs none."""

@final
class LoopDoorbell:
    """The bell of one event loop."""

    def __new__(cls, is_closed: Callable[[], bool]) -> Self: ...
    def fileno(self) -> int:
        """The descriptor that is readable after a ring."""
    def answer(self) -> list[int]:
        """The numbers that were rung for since the last call."""

@final
class Pending:
    """A coroutine that does one operation."""

    def __await__(self) -> Self: ...
    def __iter__(self) -> Self: ...
    def __next__(self) -> Any: ...
    def send(self, value: Any) -> Any:
        """Go on, as a coroutine does."""
    def throw(self, *arguments: Any) -> Any:
        """Raise inside, as in a coroutine."""
    def close(self) -> None:
        """End it, as a coroutine."""

@final
class Waiting:
    """An operation that waits in an event loop; taken out while it is tried."""

    def join(self, bell: LoopDoorbell, who: int) -> tuple[Any] | None:
        """Join the line, as number `who` of the bell, and try: (item,), or None."""
    def attempt(self) -> tuple[Any] | None:
        """Try after a call: (item,), or None."""
    def time_out(self, waited_seconds: float) -> Any:
        """What can be had in the last moment, or Timeout."""
    def leave(self) -> None:
        """Leave the line; a call that was not used goes to the next one."""
    def tell(self, error: BaseException) -> None:
        """Note on an exception from outside what is left behind."""

def select_channels(
    operations: Iterable[Any], timeout_seconds: float | None = None
) -> tuple[int, Any]:
    """(index, item) of the first operation that can be done."""

def select_channels_async(
    operations: Iterable[Any], timeout_seconds: float | None = None
) -> Coroutine[Any, Any, tuple[int, Any]]:
    """As `select_channels`, but wait without blocking the event loop."""

@final
class ReceivedView:
    """An array that was received without a copy; borrowed from the channel while it lives."""

    def __enter__(self) -> NDArray[Any]: ...
    def __exit__(self, *_exception: object) -> None: ...

@final
class LentBlock:
    """Bytes that were received by reference; the block is held until the last view is gone.

    May be dropped in any thread.
    """

    def __len__(self) -> int: ...
    @property
    def is_given(self) -> bool:
        """Whether the sender gave the memory away."""
    if sys.version_info >= (3, 12):
        def __buffer__(self, flags: int, /) -> memoryview: ...
        def __release_buffer__(self, buffer: memoryview, /) -> None: ...

@final
class ReservedArray:
    """An array in shared memory that is sent when its `with` block ends."""

    def __enter__(self) -> NDArray[Any]: ...
    def __exit__(self, kind: Any, exception: Any, traceback: Any, /) -> None: ...

@final
class SharedBlock:
    """Bytes of a message in shared memory; the block is borrowed until the last view is gone.

    May be dropped in any thread.
    """

    def __len__(self) -> int: ...
    def discard(self) -> None:
        """Give a reserved block back without sending it; nothing happens if it was sent."""
    if sys.version_info >= (3, 12):
        def __buffer__(self, flags: int, /) -> memoryview: ...
        def __release_buffer__(self, buffer: memoryview, /) -> None: ...

@disjoint_base
class SharedChannel:
    """A channel between processes, in shared memory."""

    def __new__(
        cls,
        *,
        name: str | None = None,
        capacity_bytes: int | None = None,
        fd: int | None = None,
    ) -> Self:
        """Exactly one of: a capacity, to create; a name, to open; a descriptor, to take over."""
    @property
    def name(self) -> str | None:
        """Its name; None if it has none."""
    @property
    def capacity_bytes(self) -> int:
        """What it was created with."""
    @property
    def inline_bytes(self) -> int:
        """Longer messages lie in a block rather than in the ring."""
    @property
    def used_block_bytes(self) -> int:
        """Bytes of blocks that are out: being written, on their way, or viewed."""
    @property
    def sender_count(self) -> int:
        """Senders that are open, in all processes."""
    @property
    def receiver_count(self) -> int:
        """Receivers that are open, in all processes."""
    @property
    def closed(self) -> bool:
        """Whether this handle was closed."""
    def close(self) -> None:
        """Close what was opened with this handle, and leave the channel.

        Arrays that were received stay valid. The last handle of all processes takes the name away.
        """
    @staticmethod
    def reap() -> int:
        """Take the names of segments away whose owners all died; how many.

        `create` and `open` do so too.
        """
    def _probe(self) -> None:
        """Look at once whether the others are alive."""
    def _fileno(self) -> int:
        """The descriptor of the segment, for giving it to another process."""
    def _doorbell(self) -> int:
        """The descriptor that is readable when event loops are to look again."""
    def _drain_doorbell(self) -> None:
        """Silence the doorbell."""

@disjoint_base
class SharedReceiver:
    """The receiving end of a channel, open until it is closed."""

    def __new__(cls, channel: SharedChannel) -> Self: ...
    def receive_bytes(self, timeout_seconds: float | None = None) -> bytes:
        """Receive a message that was sent as bytes.

        Args:
            timeout_seconds: How long to wait at most; None waits for ever, 0 not at all.

        Raises:
            Timeout: No message came in time.
            Disconnected: No sender is left, and everything that was sent is received.
            InvalidArgument: The next message is an object or an array; it stays in the channel.
            Closed: This receiver is closed.
        """
    def receive_many(self, max_count: int, timeout_seconds: float | None = None) -> list[bytes]:
        """Wait for a message, then receive up to `max_count` that are there.

        Raises:
            Timeout, Disconnected, InvalidArgument, Closed: As for `receive_bytes`, of the first.
        """
    def _receive_records(self, place: Any, item_bytes: int, timeout_seconds: float | None) -> int:
        """Wait for a record of `item_bytes`, then receive as many as are there and fit."""
    def _receive_any(
        self, timeout_seconds: float | None, *, writable: bool = False
    ) -> tuple[int, Any, list[tuple[int, int]]]:
        """Receive any message: its kind, it, where its parts lie."""
    def receive_view(self, timeout_seconds: float | None = None) -> ReceivedView:
        """Receive an array without a copy: `with receiver.receive_view() as array:`.

        Bytes are received as an array of them. The block is borrowed as long as the array or a view
        of it lives, after the `with` block too.

        Raises:
            Timeout: No message came in time.
            Disconnected: No sender is left, and everything that was sent is received.
            InvalidArgument: The next message is an object; it stays in the channel.
        """
    def _wait(self, timeout_seconds: float | None) -> bool:
        """Wait until there is a message, without taking it; whether there is one."""
    def _arm(self) -> None:
        """Ask for the doorbell to ring when there is a message. Try once more afterwards."""
    @property
    def closed(self) -> bool:
        """Whether it was closed."""
    def close(self) -> None:
        """Close it. After the last receiver's close, senders are told."""

@disjoint_base
class SharedSender:
    """The sending end of a channel, open until it is closed."""

    def __new__(cls, channel: SharedChannel) -> Self: ...
    def send_bytes(self, data: Any, timeout_seconds: float | None = None) -> None:
        """Send the bytes of an object.

        Args:
            data: Anything that exports a contiguous buffer.
            timeout_seconds: How long to wait for room at most; None waits for ever, 0 not at all.

        Raises:
            Timeout: There was no room in time; nothing was sent.
            Disconnected: No receiver is left.
            InvalidArgument: It is longer than the channel's capacity.
            Closed: This sender is closed.
        """
    def send_many(self, messages: Iterable[Any], timeout_seconds: float | None = None) -> int:
        """Send the bytes of each object; how many.

        Raises:
            Timeout: There was no room in time.
            Disconnected, InvalidArgument, Closed: As for `send_bytes`.
            Whatever is raised half way, its `sent_count` says how many were sent.
        """
    def _send_records(self, data: Any, item_bytes: int, timeout_seconds: float | None) -> int:
        """Send each item of a contiguous buffer as a message of `item_bytes`; how many."""
    def _send_array(self, array: NDArray[Any], give: bool, timeout_seconds: float | None) -> bool:
        """Send an array by reference; false if it does not lie in shared memory."""
    @staticmethod
    def _lends(buffer: Any) -> bool:
        """Whether the bytes of an object lie in shared memory, and would be sent by reference."""
    def _send_object(
        self,
        pickle: Any,
        buffers: list[Any],
        timeout_seconds: float | None,
        *,
        give: bool = False,
        references: bool = True,
    ) -> None:
        """Send a pickle and its buffers; by reference what lies in shared memory, if allowed."""
    def reserve(
        self,
        shape: int | Sequence[int],
        dtype: DTypeLike | None = None,
        timeout_seconds: float | None = None,
    ) -> ReservedArray:
        """Make an array in shared memory, to be filled in a `with` block and sent at its end.

        The array holds whatever was there. An exception in the block sends nothing. After the
        block the memory is the receiver's: the array cannot be written to any more, and what it
        shows is no longer defined.

        Args:
            shape: Length of each dimension.
            dtype: Of the items, float64 by default; no references.
            timeout_seconds: How long to wait for room at most.

        Raises:
            Timeout: There was no room in time.
            Disconnected: No receiver is left.
            InvalidArgument: It is longer than the capacity, or the dtype holds references.
        """
    def _arm(self) -> None:
        """Ask for the doorbell to ring when there is room. Try once more afterwards."""
    @property
    def closed(self) -> bool:
        """Whether it was closed."""
    def close(self) -> None:
        """Close it. Receivers get what was sent; after the last sender's close they are told."""

_SampleTuple = tuple[
    float,
    int,
    int | None,
    str | None,
    int,
    int,
    int,
    int,
    int,
    int,
    tuple[float | None, int | None, int | None],
]

@final
class PressureSource:
    """Reads how much memory a process, its control groups and the machine use."""

    def __new__(
        cls,
        *,
        root: str,
        process: str,
        budget_bytes: int | None = None,
        eldest: int | None = None,
    ) -> PressureSource: ...
    def read(self) -> _SampleTuple | None:
        """Read everything now, as a tuple; None if the process is gone.

        Seconds, used, limit, bound, without cache, resident, anonymous, data, children, faults,
        (share of time stalled, limit hits, kills).
        """
    def bounds(self) -> list[tuple[str, Any, int, int, int]]:
        """Every limit as of the last reading, the own group's first, as tuples.

        Kind, folder, used, without cache, limit.
        """

@final
class PressureSampler:
    """Samples a source on a thread of its own."""

    def __new__(
        cls,
        *,
        root: str,
        process: str,
        budget_bytes: int | None,
        eldest: int | None,
        shortest_seconds: float,
        longest_seconds: float,
        capacity: int,
        fence_margin_bytes: int | None,
        fence_ledger: str | None,
    ) -> PressureSampler: ...
    def start(self) -> None:
        """Take a sample and start the thread; does nothing if it runs."""
    def stop(self) -> None:
        """End the thread and lift its fence; does nothing if it does not run."""
    @property
    def is_running(self) -> bool:
        """Whether the thread runs in this process."""
    def latest(self) -> tuple[int, _SampleTuple] | None:
        """Number and tuple of the newest sample; None before `start`."""
    def history(self, count: int) -> list[_SampleTuple]:
        """The newest `count` samples, oldest first."""
    def wait(self, seen: int, *, timeout_seconds: float | None = None) -> int | None:
        """Wait for a sample after number `seen`: its number, 0 when the time has passed, None once
        stopped."""
    def statistics(self) -> tuple[int, float, float, float, int | None, int, bool, int | None]:
        """(samples, seconds reading, largest delay, interval, fence room, sharers, leads,
        errno)."""

def retained_heap_bytes() -> int | None:
    """Free bytes that libc's heap keeps; None where it cannot tell."""

def trim_resources() -> int:
    """Have every live resource give the memory that it keeps back to the system; how much."""

def idle_channel_bytes() -> int:
    """Bytes of channels that no message needs, and that `trim_channels` would give back."""

def trim_channels() -> int:
    """Have every channel give memory that no message needs back to the system; how much."""

def trim_libc_heap() -> None:
    """Have libc give the free memory of its heap back to the kernel."""

def sweep_fence_ledger(path: str) -> bool:
    """Take the ledger of a fence away if no live process is in it; whether it was."""

def lift_inherited_fence() -> None:
    """Lift the soft limit on private memory that a parent's fence left in this forked child."""
