from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Acquisition", "PoolStatistics"]


@dataclass(frozen=True)
class PoolStatistics:
    acquires: int
    hits: int
    misses: int
    created: int
    destroyed: int
    factory_failures: int
    reset_failures: int
    validation_failures: int
    destroy_failures: int
    leaked: int
    detached: int
    exported: int
    oversize: int
    waits: int
    timeouts: int
    idle: int
    in_use: int
    peak_in_use: int
    waiting: int
    permits: int


@dataclass(frozen=True)
class Acquisition:
    kind: str
    site: str | None
    held_seconds: float | None
