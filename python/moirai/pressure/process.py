"""The guard of this process: one for all of it, as `moirai run --guard` starts one."""

from __future__ import annotations

import atexit
import logging
import os
import threading
from contextlib import AbstractContextManager
from typing import Any

from moirai import _native
from moirai._arguments import wrong_type
from moirai.errors import Closed, InvalidArgument, OutOfMemory, WrongType
from moirai.pressure.fence import Fence, sweep_ledgers
from moirai.pressure.guard import Guard
from moirai.pressure.leader import Leader, sweep_leaders
from moirai.pressure.sampler import Sampler
from moirai.pressure.service_manager import PressureNotices
from moirai.pressure.source import Source, optional_limit, optional_process

__all__ = ["check_options", "current", "reserve", "start", "stop"]

log = logging.getLogger("moirai.pressure")

# What `Guard` takes by name alone: all but its source.
_GUARD_OPTIONS = tuple(Guard.__init__.__kwdefaults__ or ())

_current: Guard | None = None
_notices: PressureNotices | None = None
_leader: Leader | None = None
_lock = threading.Lock()


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
        Unsupported: A sampler of this process keeps a fence already.
    """
    budget = _checked_limit(limit, fence, main_process_id, options)
    with _lock:
        if _current is not None:
            raise InvalidArgument("start: this process has a guard already: stop it first")
        return _start(budget, fence, root, main_process_id, options)


def check_options(
    *,
    limit: int | str | None = None,
    fence: bool | Fence = False,
    root: str | os.PathLike[str] = "/",
    main_process_id: int | None = None,
    **options: Any,
) -> None:
    """Refuse what `start` would refuse in any process; for who calls it later, in others.

    Raises:
        InvalidArgument: An argument is outside its range.
    """
    budget = _checked_limit(limit, fence, main_process_id, options)
    Guard(Sampler(root=root, budget_bytes=budget), **options)


def _checked_limit(
    limit: int | str | None, fence: object, main_process_id: int | None, options: dict[str, Any]
) -> int | None:
    """Give the limit in bytes, once nothing is wrong with what came with it."""
    if not isinstance(fence, bool | Fence):
        raise wrong_type("fence", "a bool or a Fence", fence)
    optional_process(main_process_id, "main_process_id")
    for name, value in options.items():
        if name not in _GUARD_OPTIONS:
            known = ", ".join(_GUARD_OPTIONS)
            raise WrongType(f"{name}: must be an option of a guard ({known}), got {value!r}")
    return optional_limit(limit, "limit")


def _start(
    budget: int | None,
    fence: bool | Fence,
    root: str | os.PathLike[str],
    main_process_id: int | None,
    options: dict[str, Any],
) -> Guard:
    global _current, _leader, _notices
    name, limit_bytes = _nearest_limit(root, budget, main_process_id)
    standing = _default_fence(name, limit_bytes) if fence is True else fence or None
    leader = None
    if (standing is None or standing.ledger is None) and not name.startswith("host"):
        # Else the ledger says who leads. What all programs of a machine share, nobody leads.
        leader = Leader(name)
        options.setdefault("leads", leader)
    sampler = Sampler(
        root=root, budget_bytes=budget, budget_process_id=main_process_id, fence=standing
    )
    guard = Guard(sampler, **options)
    sweep_ledgers()
    sweep_leaders()
    try:
        guard.start()
    except OutOfMemory:
        if standing is None:
            raise
        sample = Source(root=root, budget_bytes=budget, budget_process_id=main_process_id).read()
        raise InvalidArgument(
            f"limit: must leave room behind the fence, got {sample.limit_bytes} bytes, of which "
            f"{sample.without_cache_bytes} are in use, and {standing.margin_bytes} to stay free"
        ) from None
    _current = guard
    _notices = _listen(guard)
    _leader = leader
    atexit.register(stop)
    return guard


def _listen(guard: Guard) -> PressureNotices | None:
    """Have what systemd says of memory pressure ask for a round, where it says something."""
    notices = PressureNotices.asked_for(os.environ, guard.relieve)
    if notices is not None:
        try:
            notices.start()
        except (OSError, RuntimeError, MemoryError) as error:
            log.warning("MEMORY_PRESSURE_WATCH: nothing is heard of it: %s", error)
            return None
    return notices


def _nearest_limit(
    root: str | os.PathLike[str], budget: int | None, main_process_id: int | None
) -> tuple[str, int]:
    """Name the limit that kills first, alike in all processes under it, and give its bytes."""
    source = Source(root=root, budget_bytes=budget)
    source.read()
    deadly = [bound for bound in source.bounds() if bound.kind in ("cgroup", "budget", "host")]
    if not deadly:
        return "host", 0
    nearest = min(deadly, key=lambda bound: bound.limit_bytes - bound.without_cache_bytes)
    if nearest.kind == "budget":
        name = f"budget {nearest.limit_bytes} of process {main_process_id or os.getpid()}"
    else:
        name = f"{nearest.kind} {nearest.folder}"
    return name, nearest.limit_bytes


def _default_fence(limit_name: str, limit_bytes: int) -> Fence:
    margin = min(max(limit_bytes // 50, 8 << 20), 64 << 20)
    return Fence(margin_bytes=margin, ledger=Fence.default_ledger(limit_name))


def stop() -> None:
    """End this process's guard, if it has one."""
    global _current, _leader, _notices
    with _lock:
        guard, _current = _current, None
        notices, _notices = _notices, None
        leader, _leader = _leader, None
    if guard is None:
        return
    atexit.unregister(stop)
    if notices is not None:
        notices.stop()
    guard.stop()
    if leader is not None:
        leader.release()
    fence = guard.source.fence if isinstance(guard.source, Sampler) else None
    if fence is not None and fence.ledger is not None:
        _native.sweep_fence_ledger(fence.ledger)


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


def _after_fork_in_child() -> None:
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_after_fork_in_child)
