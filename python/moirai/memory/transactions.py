"""Memory for transactions: an arena each, with a limit, that ends at once."""

from __future__ import annotations

import itertools
import time
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from moirai import _native
from moirai._native import Resource
from moirai.errors import Closed, InvalidArgument
from moirai.memory.resources import PoolResource
from moirai.memory.sizes import parse_bytes

__all__ = [
    "PROFILES",
    "Fragmentation",
    "Profile",
    "TransactionArena",
    "TransactionArenas",
    "TransactionStatistics",
]

#: Bytes of the first chunk, and most bytes used, of each profile; the smallest first.
PROFILES: Mapping[str, tuple[int | str, int | str]] = {
    "tiny": ("4 KiB", "64 KiB"),
    "small": ("32 KiB", "512 KiB"),
    "medium": ("256 KiB", "4 MiB"),
    "large": ("2 MiB", "32 MiB"),
    "huge": ("16 MiB", "256 MiB"),
}

# How many finished transactions a profile is learned from.
_OBSERVED_COUNT = 64
# Room in the limit: over the largest of those, for growth; over an estimate, for rounding.
_OBSERVED_ROOM = 2
_ESTIMATE_ROOM = 1.25
# What the first chunk has beyond an estimate: one byte in this many, for its table (one in 64) and
# for the rounding of blocks.
_CHUNK_SHARE = 40
_LARGEST_CHUNK_BYTES = 512 << 20


@dataclass(frozen=True)
class Profile:
    """How large a transaction is expected to be, and may be.

    Attributes:
        name: What `begin` and errors call it.
        initial_bytes: Bytes of the first chunk.
        limit_bytes: Most bytes in use, those of transactions inside included.
    """

    name: str
    initial_bytes: int
    limit_bytes: int


@dataclass(frozen=True)
class TransactionStatistics:
    """What happened to all transactions. `created == active + commits + rollbacks`.

    Attributes:
        created: Transactions begun.
        active: Transactions that have not ended.
        commits: Transactions committed.
        rollbacks: Transactions rolled back.
        outliving_blocks: Blocks that views kept alive when their transaction ended, in all.
        current_bytes: Bytes that active transactions use.
        peak_bytes: Most bytes that active transactions used at once.
        held_bytes: Bytes of chunks that transactions, or views of ended ones, hold.
        idle_bytes: Bytes of chunks kept for the next transaction.
    """

    created: int
    active: int
    commits: int
    rollbacks: int
    outliving_blocks: int
    current_bytes: int
    peak_bytes: int
    held_bytes: int
    idle_bytes: int


@dataclass(frozen=True)
class Fragmentation:
    """What one transaction's requests took from its arena, and what they take from malloc.

    Attributes:
        event_count: Requests and frees, replayed in order.
        asked_bytes: Most bytes asked for at once.
        held_bytes: Most bytes of chunks the transaction held.
        malloc_bytes: Most bytes of malloc's blocks, really allocated and measured by
            `malloc_usable_size`; malloc's own records come on top.
    """

    event_count: int
    asked_bytes: int
    held_bytes: int
    malloc_bytes: int

    @property
    def ratio(self) -> float:
        """Bytes held over bytes asked for."""
        return self.held_bytes / self.asked_bytes

    @property
    def malloc_ratio(self) -> float:
        """The same for malloc."""
        return self.malloc_bytes / self.asked_bytes


class TransactionArena(_native.TransactionArena):
    """The memory of one transaction: a resource until it is committed or rolled back.

    Made by `TransactionArenas.begin`, or by `begin` for one inside another. A context manager:
    commits on success, rolls back on an exception.

    What it uses counts until the chunk it lies in is empty, so that the limit bounds what is held.
    Arrays and buffers stay valid whatever becomes of the transaction: a chunk that a view shows is
    given back when the last view is gone.

    Attributes:
        transaction_id: As given to `begin`.
        profile: Its first chunk and its limit.
        parent: The transaction it lies in, or None.
    """

    __slots__ = ("_arenas", "_begun", "_children", "parent", "profile", "transaction_id")

    transaction_id: Hashable
    profile: Profile
    parent: TransactionArena | None
    _arenas: TransactionArenas
    _begun: float
    _children: dict[Hashable, TransactionArena]

    def __new__(
        cls,
        arenas: TransactionArenas,
        transaction_id: Hashable,
        profile: Profile,
        initial_bytes: int,
        parent: TransactionArena | None,
    ) -> TransactionArena:
        self = super().__new__(
            cls,
            arenas._store,
            initial_bytes=initial_bytes,
            limit_bytes=profile.limit_bytes,
            label=f"transaction {transaction_id!r} (profile {profile.name})",
            parent=parent,
        )
        self.transaction_id = transaction_id
        self.profile = profile
        self.parent = parent
        self._arenas = arenas
        self._begun = time.monotonic()
        self._children = {}
        return self

    @property
    def age_seconds(self) -> float:
        """Seconds since it was begun."""
        return time.monotonic() - self._begun

    def begin(
        self,
        transaction_id: Hashable,
        estimate_bytes: int | str | None = None,
        *,
        profile: str | None = None,
    ) -> TransactionArena:
        """Begin a transaction inside this one; see `TransactionArenas.begin`."""
        return self._arenas.begin(transaction_id, estimate_bytes, profile=profile, parent=self)

    def commit(self) -> int:
        """End it and keep what it made.

        Its memory lives as long as views show it; inside another transaction it counts for that
        one until then.

        Returns:
            Blocks that are alive.

        Raises:
            InvalidArgument: A transaction inside it has not ended.
            Closed: It was ended before.
        """
        if self._children:
            raise InvalidArgument(
                "commit: transactions inside must have ended, still active: "
                f"{', '.join(map(repr, self._children))}"
            )
        live_count = self._commit()
        self._forget()
        return live_count

    def rollback(self) -> int:
        """End it, the transactions inside it, and what they made.

        The work does not grow with what was allocated. Views that are alive keep their chunks,
        which count for no transaction any more.

        Returns:
            Blocks that are left to their views.

        Raises:
            Closed: It was ended before.
        """
        while self._children:
            self._roll_back_children()
        live_count = self._rollback()
        self._forget()
        return live_count

    def _roll_back_children(self) -> None:
        for child in list(self._children.values()):
            try:
                child.rollback()
            except Closed:  # another thread has ended it, and is about to take it off the list
                self._children.pop(child.transaction_id, None)

    def _forget(self) -> None:
        """Take an ended transaction off the lists."""
        arenas, transaction_id = self._arenas, self.transaction_id
        arenas._active.pop(transaction_id, None)
        arenas._observed[next(arenas._finished) % _OBSERVED_COUNT] = self.wanted_bytes
        if self.parent is not None:
            self.parent._children.pop(transaction_id, None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if not self.active:
            return
        if kind is not None:
            self.rollback()
            return
        try:
            self.commit()
        except InvalidArgument:
            self.rollback()
            raise

    def __repr__(self) -> str:
        state = "active" if self.active else "ended"
        return (
            f"TransactionArena({self.transaction_id!r}, profile={self.profile.name!r}, "
            f"used_bytes={self.used_bytes}, {state})"
        )


class TransactionArenas:
    """Begins transactions, each with an arena of its own, and knows those that have not ended.

    Transactions share chunks that none of them uses. Any thread may begin, use and end any of
    them.

    Args:
        upstream: Where chunks come from. None makes a `PoolResource`.
        profiles: Bytes of the first chunk and most bytes used, by name, the smallest first.
        keep_bytes: Most bytes of unused chunks to keep for the next transaction.
        record_every: One transaction of this many has its requests recorded for `fragmentation`;
            0 records none.

    Raises:
        InvalidArgument: A value above is outside its range.
    """

    def __init__(
        self,
        upstream: Resource | None = None,
        *,
        profiles: Mapping[str, tuple[int | str, int | str]] = PROFILES,
        keep_bytes: int | str = "16 MiB",
        record_every: int = 64,
    ) -> None:
        self.profiles = _parse_profiles(profiles)
        self._store = _native.TransactionStore(
            PoolResource() if upstream is None else upstream,
            keep_bytes=parse_bytes(keep_bytes, argument="keep_bytes"),
            record_every=record_every,
        )
        # Single operations on these are atomic; there is no lock that a fork could leave taken.
        self._active: dict[Hashable, object] = {}
        self._observed = [0] * _OBSERVED_COUNT
        self._finished = itertools.count()

    @property
    def upstream(self) -> Resource:
        """The resource chunks come from."""
        return self._store.upstream

    def begin(
        self,
        transaction_id: Hashable,
        estimate_bytes: int | str | None = None,
        *,
        profile: str | None = None,
        parent: TransactionArena | None = None,
    ) -> TransactionArena:
        """Begin a transaction.

        Args:
            transaction_id: A name that no active transaction has.
            estimate_bytes: How much it will use; chooses the smallest profile that allows a quarter
                more, since blocks are rounded up, and makes the first chunk as large. None learns
                the profile: twice the most that any of the last 64 finished transactions
                used or was refused, and the middle profile before there is one.
            profile: The profile's name, instead of an estimate.
            parent: The transaction it lies in: what it uses counts for that one too, a commit hands
                it over, a rollback leaves that one's memory alone.

        Raises:
            InvalidArgument: The id is in use, or the profile or the estimate is none.
            Closed: `parent` has ended.
        """
        chosen, initial_bytes = self._choose(estimate_bytes, profile)
        if parent is not None and parent._arenas is not self:
            raise InvalidArgument("parent: must be a transaction of these arenas, got another's")
        claim = object()
        if self._active.setdefault(transaction_id, claim) is not claim:
            raise InvalidArgument(
                f"transaction_id: must not be in use, got {transaction_id!r}: it is active"
            )
        try:
            begun = TransactionArena(self, transaction_id, chosen, initial_bytes, parent)
        except BaseException:
            self._active.pop(transaction_id, None)
            raise
        self._active[transaction_id] = begun
        if parent is not None:
            parent._children[transaction_id] = begun
        return begun

    def _choose(self, estimate_bytes: int | str | None, profile: str | None) -> tuple[Profile, int]:
        """The profile, and the bytes of the first chunk."""
        if profile is not None:
            if estimate_bytes is not None:
                raise InvalidArgument("profile: must be left out if estimate_bytes is given")
            for known in self.profiles:
                if known.name == profile:
                    return known, known.initial_bytes
            names = ", ".join(repr(known.name) for known in self.profiles)
            raise InvalidArgument(f"profile: must be one of {names}, got {profile!r}")
        if estimate_bytes is None:
            learned = self.learned_profile()
            return learned, learned.initial_bytes
        estimate = parse_bytes(estimate_bytes, argument="estimate_bytes")
        largest = self.profiles[-1]
        if estimate > largest.limit_bytes:
            raise InvalidArgument(
                f"estimate_bytes: must be at most {largest.limit_bytes} (the limit of profile "
                f"{largest.name!r}), got {estimate}"
            )
        needed_bytes = estimate * _ESTIMATE_ROOM
        chosen = largest
        for known in self.profiles:
            if needed_bytes <= known.limit_bytes:
                chosen = known
                break
        chunk_bytes = estimate + estimate // _CHUNK_SHARE + 2 * 64
        return chosen, max(chosen.initial_bytes, min(chunk_bytes, _LARGEST_CHUNK_BYTES))

    def learned_profile(self) -> Profile:
        """The profile that `begin` gives a transaction without an estimate now."""
        observed = max(self._observed)
        if observed == 0:
            return self.profiles[len(self.profiles) // 2]
        for known in self.profiles:
            if observed * _OBSERVED_ROOM <= known.limit_bytes:
                return known
        return self.profiles[-1]

    def get(self, transaction_id: Hashable) -> TransactionArena:
        """The active transaction of this id.

        Raises:
            InvalidArgument: There is none.
        """
        found = self._active.get(transaction_id)
        if not isinstance(found, TransactionArena):
            raise InvalidArgument(
                f"transaction_id: must be that of an active transaction, got {transaction_id!r}"
            )
        return found

    def commit(self, transaction_id: Hashable) -> int:
        """`TransactionArena.commit` for the active transaction of this id."""
        return self.get(transaction_id).commit()

    def rollback(self, transaction_id: Hashable) -> int:
        """`TransactionArena.rollback` for the active transaction of this id."""
        return self.get(transaction_id).rollback()

    def active(self) -> list[TransactionArena]:
        """The transactions that have not ended, oldest first."""
        known = list(self._active.copy().values())
        return [found for found in known if isinstance(found, TransactionArena)]

    def release_stale(self, max_age_seconds: float) -> list[Hashable]:
        """Roll back every transaction that was begun longer ago than this.

        Transactions inside a stale one go with it, however young.

        Returns:
            The ids of those rolled back for their age, oldest first.

        Raises:
            InvalidArgument: `max_age_seconds` is negative.
        """
        if not max_age_seconds >= 0:
            raise InvalidArgument(f"max_age_seconds: must be at least 0, got {max_age_seconds}")
        released: list[Hashable] = []
        for transaction in self.active():
            if transaction.age_seconds > max_age_seconds and transaction.active:
                try:
                    transaction.rollback()
                except Closed:  # it ended meanwhile
                    continue
                released.append(transaction.transaction_id)
        return released

    def statistics(self) -> TransactionStatistics:
        """What happened so far."""
        counts = self._store.counts()
        ended = counts["commits"] + counts["rollbacks"]
        return TransactionStatistics(active=counts["created"] - ended, **counts)

    def fragmentation(self) -> Fragmentation | None:
        """What the last recorded transaction took, and what malloc takes for the same, measured.

        The requests are replayed: malloc really allocates and frees as much. None before a recorded
        transaction has ended; one with more than 65 536 requests and frees is not kept.
        """
        found = self._store.compare_with_malloc()
        return None if found is None else Fragmentation(*found)

    def trim(self, target_bytes: int = 0) -> int:
        """Give unused chunks and upstream's kept memory back until `target_bytes` are kept.

        Returns:
            Bytes given back to the system.
        """
        return self._store.trim(target_bytes)

    def __repr__(self) -> str:
        counts = self.statistics()
        return f"TransactionArenas(active={counts.active}, current_bytes={counts.current_bytes})"


def _parse_profiles(profiles: Mapping[str, tuple[int | str, int | str]]) -> tuple[Profile, ...]:
    parsed = tuple(
        Profile(
            name,
            parse_bytes(initial, argument=f"profiles[{name!r}]"),
            parse_bytes(limit, argument=f"profiles[{name!r}]"),
        )
        for name, (initial, limit) in profiles.items()
    )
    if not parsed:
        raise InvalidArgument("profiles: must have at least one, got none")
    before = 0
    for profile in parsed:
        most = min(profile.limit_bytes, _LARGEST_CHUNK_BYTES)
        if not 0 < profile.initial_bytes <= most:
            raise InvalidArgument(
                f"profiles[{profile.name!r}]: must begin with 1 to {most} bytes (its limit, or the "
                f"largest chunk), got {profile.initial_bytes}"
            )
        if profile.limit_bytes <= before:
            raise InvalidArgument(
                f"profiles[{profile.name!r}]: must have a larger limit than the one before it "
                f"({before}), got {profile.limit_bytes}"
            )
        before = profile.limit_bytes
    return parsed
