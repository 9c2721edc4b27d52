"""The resources, and the adaptor that limits them: defaults and sizes in words."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from moirai import _native
from moirai._native import Resource
from moirai.memory.sizes import optional_bytes, parse_bytes
from moirai.memory.slabs import SizeClass, SizeCounts, Tuning, classes_of, prepare, tune

__all__ = ["LargeObjectResource", "LimitAdaptor", "PoolResource", "SlabResource"]

HugePages = Literal["auto", "always", "never"]
Fit = Literal["best", "first", "worst"]


class LargeObjectResource(_native.LargeObjectResource):
    """Spans of pages for large blocks, kept while they are needed, given back by size and age.

    Args:
        fit: Which free span serves a request: the smallest that fits ("best"), the lowest address
            ("first", looks at free spans one by one), or the largest ("worst").
        huge_pages: "auto" asks for huge pages for blocks from 2 MiB, "always" everywhere, "never"
            refuses them even where the system gives them unasked.
        cache_cap_bytes: Most bytes of free memory to keep, as an int or such as "64 MiB". None
            keeps what holds the whole, used and kept, near the recent peak of use.
        decay_seconds: Free memory older than this goes back to the kernel, without traffic too;
            >= 0. None keeps it until the cap or `trim`.

    Raises:
        InvalidArgument: An argument is outside its range.
    """

    def __new__(
        cls,
        *,
        fit: Fit = "best",
        huge_pages: HugePages = "auto",
        cache_cap_bytes: int | str | None = None,
        decay_seconds: float | None = 0.5,
    ) -> LargeObjectResource:
        return super().__new__(
            cls,
            fit=fit,
            huge_pages=huge_pages,
            cache_cap_bytes=optional_bytes(cache_cap_bytes, "cache_cap_bytes"),
            decay_seconds=decay_seconds,
        )


class _Tunable(_native.Slab):
    """What a resource that is a slab, or has one inside, offers over it."""

    __slots__ = ()

    def tune(self, tracker: SizeCounts) -> Tuning:
        """Fit classes and magazines to the sizes that were asked for.

        Sizes between the standard classes from 1 KiB to 16 KiB get classes of their own where that
        saves 5 % of the bytes asked for there and 0.5 % of all, and lose them where it no longer
        does. A slab gives sizes to 16 extra classes over its life. The more a class is asked for,
        the more blocks its magazines hold, within 512 KiB for all. Requests from now on are served
        so; blocks that are out stay as they are. The same counts a second time change nothing.

        Args:
            tracker: Whatever has `sizes()`, (bytes, number of requests) of each size: a tracker, a
                preset, or your own record.

        Returns:
            What changed, and by which counts; `refused_sizes` are those for which no class is left.

        Raises:
            InvalidArgument: A size or a count is negative.
        """
        return tune(self, tracker)

    def classes(self) -> list[SizeClass]:
        """The size classes, the smallest first."""
        return classes_of(self)


class PoolResource(_native.PoolResource, _Tunable):
    """The general-purpose resource: a slab for blocks to 16 KiB, a large-object heap above.

    Args:
        huge_pages: As for `LargeObjectResource`.
        cache_cap_bytes: As for `LargeObjectResource`.
        decay_seconds: As for `LargeObjectResource`.

    Raises:
        InvalidArgument: An argument is outside its range.
    """

    def __new__(
        cls,
        *,
        huge_pages: HugePages = "auto",
        cache_cap_bytes: int | str | None = None,
        decay_seconds: float | None = 0.5,
    ) -> PoolResource:
        return super().__new__(
            cls,
            huge_pages=huge_pages,
            cache_cap_bytes=optional_bytes(cache_cap_bytes, "cache_cap_bytes"),
            decay_seconds=decay_seconds,
        )


class SlabResource(_native.SlabResource, _Tunable):
    """Equal blocks by size class: steps of 64 bytes to 1 KiB, then 4 to a doubling, to 16 KiB.

    Args:
        upstream: Where runs of 64 KiB, and requests above 16 KiB, come from. None makes a
            `LargeObjectResource`.
        preset: A name of `SLAB_PRESETS`, or several: the slab is tuned to these sizes, and has the
            first 64 KiB of blocks of each in memory until it is trimmed.

    Raises:
        InvalidArgument: There is no such preset.
        OutOfMemory: Upstream has no room for the blocks of a preset.
    """

    def __new__(
        cls, upstream: Resource | None = None, *, preset: str | Iterable[str] = ()
    ) -> SlabResource:
        self = super().__new__(cls, LargeObjectResource() if upstream is None else upstream)
        prepare(self, preset)
        return self


class LimitAdaptor(_native.LimitAdaptor):
    """Refuses what would take the bytes drawn through it above a limit.

    Before it refuses, it trims upstream's cache, then runs `gc.collect()`, then tries once more.
    Upstream's cache is trimmed as well when it and the blocks in use would exceed the limit.

    Args:
        upstream: The resource to draw from.
        limit_bytes: Most block bytes in use, as an int or such as "2 GiB".

    Raises:
        InvalidArgument: `limit_bytes` is negative or unreadable.
    """

    def __new__(cls, upstream: Resource, *, limit_bytes: int | str) -> LimitAdaptor:
        limit = parse_bytes(limit_bytes, argument="limit_bytes")
        return super().__new__(cls, upstream, limit_bytes=limit)
