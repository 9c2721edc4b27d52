"""How close a process is to its limits, as text for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moirai.reports.quantities import bytes_text

__all__ = ["BoundRow", "Watched", "to_text"]

_WIDTH = 40
_BLOCKS = " ▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class BoundRow:
    """A limit, what sets it, and what is used of it."""

    kind: str
    folder: str
    used_bytes: int
    without_cache_bytes: int
    limit_bytes: int


@dataclass(frozen=True)
class Watched:
    """One look at a process; `history` holds shares of the limit, oldest first."""

    name: str
    stage: str
    used_bytes: int
    limit_bytes: int | None
    bound: str | None
    resident_bytes: int
    growth_bytes_per_second: float
    stalled_ratio: float | None
    total_kills: int | None
    history: Sequence[float]
    bounds: Sequence[BoundRow]


def to_text(watched: Watched) -> str:
    """Write one look: the level, its history, and each limit."""
    limit = watched.limit_bytes
    share = watched.used_bytes / limit if limit else 0.0
    of = "no limit" if limit is None else f"{bytes_text(limit)} ({watched.bound})"
    lines = [
        f"{watched.name}: {watched.stage}",
        f"  {_bar(share)} {share:6.1%}  {bytes_text(watched.used_bytes)} of {of}",
        f"  {_curve(watched.history)}",
        f"  resident {bytes_text(watched.resident_bytes)}, {_growth(watched)}",
    ]
    if watched.stalled_ratio is not None:
        lines.append(f"  stalled {watched.stalled_ratio:.1%} of the last 10 s")
    if watched.total_kills:
        lines.append(f"  the kernel killed {watched.total_kills} times in the group")
    for row in watched.bounds:
        used = bytes_text(row.used_bytes)
        without = bytes_text(row.without_cache_bytes)
        lines.append(
            f"  {row.kind:<13} {used:>10} of {bytes_text(row.limit_bytes):>10}, "
            f"{without} without file cache  {row.folder}".rstrip()
        )
    return "\n".join(lines)


def _bar(share: float) -> str:
    full = round(min(1.0, max(0.0, share)) * _WIDTH)
    return "█" * full + "░" * (_WIDTH - full)


def _curve(history: Sequence[float]) -> str:
    """Draw shares from 0 to 1, each as a column an eighth of a line high at least."""
    top = len(_BLOCKS) - 1
    columns = [_BLOCKS[round(min(1.0, max(0.0, share)) * top)] for share in history[-_WIDTH:]]
    return "".join(columns).rjust(_WIDTH)


def _growth(watched: Watched) -> str:
    pace = watched.growth_bytes_per_second
    if abs(pace) < 1024:
        return "steady"
    direction = "growing" if pace > 0 else "shrinking"
    return f"{direction} by {bytes_text(int(abs(pace)))} a second"
