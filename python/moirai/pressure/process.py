"""The guard of this process: one for all of it, as `moirai run --guard` starts one."""

from __future__ import annotations

import atexit
import contextlib
import os
from contextlib import AbstractContextManager
from typing import Any

from moirai.errors import Closed, InvalidArgument
from moirai.pressure.fence import Fence
from moirai.pressure.guard import Guard
from moirai.pressure.sampler import Sampler
from moirai.pressure.source import Source, optional_bytes

__all__ = ["current", "reserve", "start", "stop"]

_current: Guard | None = None


def start(
    *,
    limit: int | str | None = None,
    fence: bool | Fence = False,
    root: str | os.PathLike[str] = "/",
    main_process_id: int | None = None,
    **options: Any,
) -> Guard:
    """Guard this process from now on; its guard is what `reserve` and `current` are about.

    Args:
        limit: A limit of your own for the process and its children, as an int or such as "2 GiB";
            those of the control groups and the machine count in any case.
        fence: Whether an allocation that would cross the limit is to raise MemoryError. True puts
            a fence as far before the limit as fits it (a fiftieth, 8 MiB at least, 64 MiB at most)
            and shares what is left with the other fenced processes of the same control group, or
            of the same `limit`.
        main_process_id: The process that `limit` is for, with its children; default: this one.
        root: Folder that `proc` and `sys` are in.
        options: As those of `Guard`, but for `source`.

    Raises:
        InvalidArgument: This process has a guard already, or an argument is outside its range.
    """
    global _current
    if _current is not None:
        raise InvalidArgument("start: this process has a guard already: stop it first")
    budget = optional_bytes(limit, "limit")
    standing = _default_fence(root, budget, main_process_id) if fence is True else fence or None
    sampler = Sampler(
        root=root, budget_bytes=budget, budget_process_id=main_process_id, fence=standing
    )
    guard = Guard(sampler, **options)
    guard.start()
    _current = guard
    atexit.register(stop)
    return guard


def _default_fence(
    root: str | os.PathLike[str], budget: int | None, main_process_id: int | None
) -> Fence:
    source = Source(root=root, budget_bytes=budget)
    source.read()
    deadly = [bound for bound in source.bounds() if bound.kind in ("cgroup", "budget", "host")]
    nearest = min(deadly, key=lambda bound: bound.limit_bytes - bound.without_cache_bytes)
    margin = min(max(nearest.limit_bytes // 50, 8 << 20), 64 << 20)
    if nearest.kind == "budget":
        name = f"budget {nearest.limit_bytes} of process {main_process_id or os.getpid()}"
    else:
        name = f"{nearest.kind} {nearest.folder}"
    return Fence(margin_bytes=margin, ledger=Fence.default_ledger(name))


def stop() -> None:
    """End this process's guard, if it has one."""
    global _current
    guard, _current = _current, None
    if guard is None:
        return
    atexit.unregister(stop)
    sampler = guard.source
    assert isinstance(sampler, Sampler)
    is_last = sampler.statistics().sharer_count == 1
    guard.stop()
    if is_last and sampler.fence is not None and sampler.fence.ledger is not None:
        with contextlib.suppress(OSError):
            os.unlink(sampler.fence.ledger)


def current() -> Guard:
    """Give this process's guard.

    Raises:
        Closed: It has none.
    """
    if _current is None:
        raise Closed("this process has no guard: call moirai.pressure.start")
    return _current


def reserve(
    size: int | str, *, timeout_seconds: float = 0.0, margin: int | str = "8 MiB"
) -> AbstractContextManager[int]:
    """Ask this process's guard before a large allocation; see `Guard.reserve`.

    Raises:
        Closed: This process has no guard.
        OutOfMemory: There is no room; nothing is promised.
    """
    return current().reserve(size, timeout_seconds=timeout_seconds, margin=margin)
