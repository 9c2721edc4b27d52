"""The resources, and the adaptor that limits them: defaults and sizes in words."""

from __future__ import annotations

from typing import Literal

from moirai import _native
from moirai._native import Resource
from moirai.memory.sizes import optional_bytes, parse_bytes

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


class PoolResource(_native.PoolResource):
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


class SlabResource(_native.SlabResource):
    """Equal blocks by size class: steps of 64 bytes to 1 KiB, then 4 to a doubling, to 16 KiB.

    Args:
        upstream: Where runs of 64 KiB, and requests above 16 KiB, come from. None makes a
            `LargeObjectResource`.
    """

    def __new__(cls, upstream: Resource | None = None) -> SlabResource:
        return super().__new__(cls, LargeObjectResource() if upstream is None else upstream)


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
