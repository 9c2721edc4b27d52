"""Fitting a slab to what is asked of it: which extra classes it has, and how large magazines are.

The rules of thumb are here; the slab only does as told. Everything is decided from counts of
requests by size, so that the same counts always lead to the same slab.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

from moirai import _native
from moirai.errors import InvalidArgument

__all__ = [
    "SLAB_PRESETS",
    "ClassChange",
    "MagazineChange",
    "SizeClass",
    "SizeCounts",
    "SlabPreset",
    "Tuning",
]

_LINE_BYTES = 64
_RUN_BYTES = 64 << 10
_LARGEST_BYTES = 16 << 10
# Extra classes a slab has over its life: a class that has a size keeps it.
_EXTRA_COUNT = 16

# An extra class must save this share of the bytes that are asked for between its two standard
# neighbours, and this share of all. Each class costs a run that is partly free, half of 64 KiB on
# average, and magazines; and once given a size it has it for the slab's life.
_SAVED_SHARE = 0.05
_SAVED_SHARE_OF_ALL = 0.005
# What the magazines of all counted classes hold together, one of each. An untuned slab's hold up to
# 915 KiB, so that tuning moves room to where it is used and adds none.
_MAGAZINES_BYTES = 512 << 10
# Bounds of one magazine, as in the core.
_LEAST_ROUNDS = 2
_MOST_ROUNDS = 512
_MAGAZINE_BYTES = 128 << 10
# A magazine changes if the new capacity differs by more than this share: counts that grow evenly
# change nothing.
_ROUNDS_SHARE = 0.25


class SizeCounts(Protocol):
    """A record of what was asked for: a tracker, a preset, or your own."""

    def sizes(self) -> Iterable[tuple[int, int]]:
        """(bytes, number of requests) of each size, in any order; above 16 KiB is ignored."""


@dataclass(frozen=True)
class SlabPreset:
    """Sizes that a kind of program asks for, each as often as the others.

    Attributes:
        block_sizes: The sizes in bytes.
    """

    block_sizes: tuple[int, ...]

    def sizes(self) -> list[tuple[int, int]]:
        """Each size, once."""
        return [(size, 1) for size in self.block_sizes]


#: What `SlabResource(preset=...)` knows by name.
SLAB_PRESETS: Mapping[str, SlabPreset] = MappingProxyType(
    {
        "page_headers": SlabPreset((128,)),
        "rows": SlabPreset((256, 512, 1024)),
        "index_nodes": SlabPreset((512, 2048, 4096)),
        "transaction_metadata": SlabPreset((384,)),
        "lock_entries": SlabPreset((64,)),
        "version_records": SlabPreset((192,)),
    }
)


@dataclass(frozen=True)
class SizeClass:
    """One size class of a slab.

    Attributes:
        block_bytes: Bytes of a block.
        is_standard: Whether every slab has it.
        request_bytes: Smallest and largest request that go to it by their size; None if none do.
        magazine_rounds: Blocks that a new magazine holds.
        run_count: Runs of 64 KiB that it has.
        total_count: Blocks handed out so far.
        current_count: Blocks out now.
    """

    block_bytes: int
    is_standard: bool
    request_bytes: tuple[int, int] | None
    magazine_rounds: int
    run_count: int
    total_count: int
    current_count: int


@dataclass(frozen=True)
class ClassChange:
    """An extra class that serves requests from now on, or no longer does, and why.

    Attributes:
        block_bytes: Bytes of its blocks.
        serves: Whether it does from now on.
        request_count: Counted requests whose class this change decides.
        asked_bytes: Bytes that those asked for.
        before_bytes: What blocks for them took of their runs before.
        after_bytes: What they take now.
    """

    block_bytes: int
    serves: bool
    request_count: int
    asked_bytes: int
    before_bytes: int
    after_bytes: int

    def __str__(self) -> str:
        return (
            f"class {self.block_bytes}: {'serves' if self.serves else 'no longer serves'} "
            f"{self.request_count} requests for {self.asked_bytes} bytes, which took "
            f"{self.before_bytes} bytes of runs and take {self.after_bytes}"
        )


@dataclass(frozen=True)
class MagazineChange:
    """A class whose magazines have another capacity from now on.

    Attributes:
        block_bytes: Bytes of its blocks.
        request_count: Counted requests that it serves.
        before_rounds: Blocks that a magazine held.
        after_rounds: Blocks that a new one holds.
    """

    block_bytes: int
    request_count: int
    before_rounds: int
    after_rounds: int

    def __str__(self) -> str:
        return (
            f"magazines of {self.block_bytes}: {self.before_rounds} -> {self.after_rounds} blocks, "
            f"for {self.request_count} requests"
        )


@dataclass(frozen=True)
class Tuning:
    """What `tune` changed, and the counts that it went by.

    Attributes:
        request_count: Requests of up to 16 KiB that were counted.
        asked_bytes: Bytes that they asked for.
        before_bytes: What a block for each of them took of its run, with the classes as they were.
        after_bytes: The same with the classes as they are now.
        classes: Extra classes that came into use or went out of it.
        magazines: Capacities that changed.
        refused_sizes: Sizes worth a class for which the slab has none left.
        classes_left: Extra classes that can still be given a size.
    """

    request_count: int
    asked_bytes: int
    before_bytes: int
    after_bytes: int
    classes: tuple[ClassChange, ...]
    magazines: tuple[MagazineChange, ...]
    refused_sizes: tuple[int, ...]
    classes_left: int

    @property
    def changed(self) -> bool:
        """Whether anything is different from before."""
        return bool(self.classes or self.magazines)

    def __str__(self) -> str:
        lines = [
            f"{self.request_count} requests asked for {self.asked_bytes} bytes: "
            f"{self.before_bytes} bytes of runs before, {self.after_bytes} after"
        ]
        lines += map(str, self.classes)
        lines += map(str, self.magazines)
        if not self.changed:
            lines.append("nothing changed")
        if self.refused_sizes:
            sizes = ", ".join(map(str, self.refused_sizes))
            lines.append(
                f"worth a class, but none of {_EXTRA_COUNT} is left for the slab's life: {sizes}"
            )
        return "\n".join(lines)


# === what is there ==============================================================================


def classes_of(slab: _native.Slab) -> list[SizeClass]:
    """The classes of a slab, the smallest first."""
    return [SizeClass(*record) for record in slab.class_tuples()]


def _checked(counts: SizeCounts) -> dict[int, int]:
    """Requests by size in whole lines; what goes upstream is left out."""
    found: dict[int, int] = {}
    for size, count in counts.sizes():
        if size < 0 or count < 0:
            raise InvalidArgument(
                f"tracker: sizes() must give bytes >= 0 and counts >= 0, got {(size, count)}"
            )
        lines = max(1, -(-size // _LINE_BYTES)) * _LINE_BYTES
        if count and lines <= _LARGEST_BYTES:
            found[lines] = found.get(lines, 0) + count
    return dict(sorted(found.items()))


def _bytes(counts: Mapping[int, int]) -> int:
    return sum(size * count for size, count in counts.items())


def run_share(block_bytes: int) -> float:
    """Bytes of a run for each of its blocks: the block, and its part of what is left over."""
    return _RUN_BYTES / (_RUN_BYTES // block_bytes)


# === which classes ==============================================================================


@dataclass(frozen=True, order=True)
class _Choice:
    """Classes chosen, by what they cost; the smaller is the better. Ties go to fewer classes."""

    cost: float = 0.0
    new_count: int = 0
    class_count: int = 0
    sizes: tuple[int, ...] = ()

    def __add__(self, other: _Choice) -> _Choice:
        return _Choice(
            self.cost + other.cost,
            self.new_count + other.new_count,
            self.class_count + other.class_count,
            self.sizes + other.sizes,
        )


_NEVER = _Choice(cost=math.inf)


def choose_classes(
    counts: Mapping[int, int],
    standard: Sequence[int],
    serving: Iterable[int],
    given: Iterable[int],
    new_count: int,
) -> tuple[int, ...]:
    """The extra classes that cost least: bytes of runs for all requests, and a price a class.

    The price is `_SAVED_SHARE` of the bytes asked for between the class's standard neighbours, and
    no less than `_SAVED_SHARE_OF_ALL` of all, so that each class of the best choice saves that.
    What is chosen between two standard classes does not matter to the others; so a dynamic
    programme finds the best choice for each number of new classes there, and another divides the
    new ones that are left among them. Both weigh every possibility: there is no better choice.

    Args:
        counts: Requests by size, multiples of 64 up to 16 KiB.
        standard: Sizes of the standard classes, ascending.
        serving: Extra classes that serve now. Where nothing was counted, they stay.
        given: Extra classes that have a size; using them again costs none of the new ones.
        new_count: How many classes may be given a size.
    """
    given = sorted(given)
    floor = _SAVED_SHARE_OF_ALL * _bytes(counts)
    best = [_Choice()] * (new_count + 1)
    kept: list[int] = []
    for low, high in zip((0, *standard), standard, strict=False):
        asked = {size: count for size, count in counts.items() if low < size <= high}
        inside = [size for size in given if low < size < high]
        if not asked:
            kept += [size for size in serving if low < size < high]
            continue
        if high - low <= _LINE_BYTES:
            continue
        price = max(floor, _SAVED_SHARE * _bytes(asked))
        table = _between(asked, high, inside, new_count, price)
        best = [
            min(best[first] + table[total - first] for first in range(total + 1))
            for total in range(new_count + 1)
        ]
    return tuple(sorted((*kept, *best[new_count].sizes)))


def _between(
    asked: Mapping[int, int], high: int, given: Sequence[int], new_count: int, price: float
) -> list[_Choice]:
    """The best classes below the standard one of `high` bytes, by how many may be new.

    A class is best as large as the largest request in it: any larger one costs no less.
    """
    ends = sorted({*asked, *given, high})
    # rows[i][k]: the best for the requests up to ends[i], which is a class, with k new ones.
    rows: list[list[_Choice]] = []
    for index, end in enumerate(ends):
        is_extra = end != high
        is_new = is_extra and end not in given
        row = [_NEVER] * (new_count + 1)
        below = 0  # requests above the class before, up to this one
        for before in range(index - 1, -2, -1):
            below += asked.get(ends[before + 1], 0)
            step = _Choice(
                below * run_share(end) + price * is_extra,
                int(is_new),
                int(is_extra),
                (end,) if is_extra else (),
            )
            for count in range(is_new, new_count + 1):
                lower = rows[before][count - is_new] if before >= 0 else _Choice()
                row[count] = min(row[count], lower + step)
        rows.append(row)
    return rows[-1]


# === how large magazines ========================================================================


def choose_rounds(requests: Mapping[int, int]) -> dict[int, int]:
    """Blocks of a magazine for each class, so that threads go to the depot least often.

    A class of n requests with magazines of r blocks goes there up to n / r times. The sum of that
    over the classes, with r blocks of b bytes of each within a budget, is least where r is
    proportional to sqrt(n / b) (Lagrange's multiplier). A class whose share exceeds its bound gets
    the bound, and the others share the rest.

    Args:
        requests: Requests by block size, each > 0.
    """
    rounds: dict[int, int] = {}
    left_bytes = _MAGAZINES_BYTES
    open_sizes = dict(requests)
    while open_sizes:
        weight = sum(math.sqrt(count * size) for size, count in open_sizes.items())
        wish = {
            size: left_bytes * math.sqrt(count / size) / weight
            for size, count in open_sizes.items()
        }
        full = [size for size in open_sizes if wish[size] >= _most_rounds(size)]
        for size in full or open_sizes:
            rounds[size] = min(_most_rounds(size), max(_LEAST_ROUNDS, int(wish[size])))
        for size in full:
            left_bytes -= rounds[size] * size
            del open_sizes[size]
        if not full:
            break
    return rounds


def _most_rounds(block_bytes: int) -> int:
    return min(_MOST_ROUNDS, _MAGAZINE_BYTES // block_bytes)


# === tuning =====================================================================================


@dataclass(frozen=True)
class _Routing:
    """Which class serves a size: the smallest that holds it."""

    classes: list[int]

    def of(self, size: int) -> int:
        return self.classes[bisect.bisect_left(self.classes, size)]

    def cost(self, counts: Mapping[int, int]) -> int:
        return round(sum(count * run_share(self.of(size)) for size, count in counts.items()))


def tune(slab: _native.Slab, tracker: SizeCounts) -> Tuning:
    """Fit a slab to the counts; the core of `SlabResource.tune`, which says what it does."""
    counts = _checked(tracker)
    while True:
        now = classes_of(slab)
        try:
            return _tune_from(slab, counts, now)
        except InvalidArgument:
            # Another thread gave sizes to the classes that were left: choose among what is there.
            if len(classes_of(slab)) == len(now):
                raise


def _tune_from(slab: _native.Slab, counts: Mapping[int, int], now: Sequence[SizeClass]) -> Tuning:
    standard = [one.block_bytes for one in now if one.is_standard]
    given = [one.block_bytes for one in now if not one.is_standard]
    serving = [one.block_bytes for one in now if not one.is_standard and one.request_bytes]
    left = _EXTRA_COUNT - len(given)
    chosen = choose_classes(counts, standard, serving, given, left)
    ideal = choose_classes(counts, standard, serving, given, _EXTRA_COUNT)
    before = _Routing(sorted((*standard, *serving)))
    after = _Routing(sorted((*standard, *chosen)))
    if set(chosen) != set(serving):
        slab.set_extra_classes(chosen)
    return Tuning(
        request_count=sum(counts.values()),
        asked_bytes=_bytes(counts),
        before_bytes=before.cost(counts),
        after_bytes=after.cost(counts),
        classes=_class_changes(counts, before, after, set(serving), set(chosen)),
        magazines=_resize_magazines(slab, counts, after),
        refused_sizes=tuple(size for size in ideal if size not in chosen),
        classes_left=left - len(set(chosen) - set(given)),
    )


def _class_changes(
    counts: Mapping[int, int],
    before: _Routing,
    after: _Routing,
    serving: set[int],
    chosen: set[int],
) -> tuple[ClassChange, ...]:
    changes = []
    for block in sorted(serving ^ chosen):
        serves = block in chosen
        routing = after if serves else before
        mine = {size: count for size, count in counts.items() if routing.of(size) == block}
        changes.append(
            ClassChange(
                block_bytes=block,
                serves=serves,
                request_count=sum(mine.values()),
                asked_bytes=_bytes(mine),
                before_bytes=before.cost(mine),
                after_bytes=after.cost(mine),
            )
        )
    return tuple(changes)


def _resize_magazines(
    slab: _native.Slab, counts: Mapping[int, int], routing: _Routing
) -> tuple[MagazineChange, ...]:
    requests: dict[int, int] = {}
    for size, count in counts.items():
        block = routing.of(size)
        requests[block] = requests.get(block, 0) + count
    rounds_now = {one.block_bytes: one.magazine_rounds for one in classes_of(slab)}
    changes = []
    for block, rounds in choose_rounds(requests).items():
        rounds_before = rounds_now[block]
        if abs(rounds - rounds_before) > _ROUNDS_SHARE * rounds_before:
            slab.set_magazine(block, rounds=rounds)
            changes.append(MagazineChange(block, requests[block], rounds_before, rounds))
    return tuple(sorted(changes, key=lambda change: change.block_bytes))


def prepare(slab: _native.Slab, preset: str | Iterable[str]) -> None:
    """Tune a new slab to presets by name, and have their first blocks in memory."""
    names = [preset] if isinstance(preset, str) else list(preset)
    if not names:
        return
    sizes: set[int] = set()
    for name in names:
        if name not in SLAB_PRESETS:
            known = ", ".join(map(repr, SLAB_PRESETS))
            raise InvalidArgument(f"preset: must be of {known}, got {name!r}")
        sizes.update(SLAB_PRESETS[name].block_sizes)
    tune(slab, SlabPreset(tuple(sorted(sizes))))
    for size in sorted(sizes):
        slab.draw_ahead(size)
