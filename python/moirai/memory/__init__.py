"""Where blocks come from: resources, adaptors over them, and NumPy drawing from them.

Every object here may be used by any number of threads at once, with or without the GIL. A forked
child may go on using what it inherited; the parent's other threads' cached blocks stay unused
there. Blocks and arrays keep their resource alive, so objects may be dropped in any order.
"""

from __future__ import annotations

import warnings

from moirai import _native
from moirai._native import (
    Arena,
    Batch,
    Buffer,
    HealthReport,
    Resource,
    Savepoint,
    Statistics,
    SystemResource,
    handler_of,
    installed,
    stop_background,
    uninstall,
)
from moirai.memory.adaptive import (
    AdaptiveResource,
    Decision,
    Effect,
    Evidence,
    Explanation,
    Standing,
    Workload,
)
from moirai.memory.arenas import ArenaResource, ThreadLocalArena
from moirai.memory.arrays import LargeArray, install, largest_arrays, use
from moirai.memory.health import Finding, Health, ResourceHealth, health
from moirai.memory.libc_heap import keep_libc_heap
from moirai.memory.numa import NumaNode, NumaResource, Topology, pages_by_node
from moirai.memory.patterns import ClassPattern, PatternAdaptor
from moirai.memory.priority import (
    Priority,
    PriorityResource,
    RealtimeResource,
    current_priority,
    priority,
)
from moirai.memory.resources import LargeObjectResource, LimitAdaptor, PoolResource, SlabResource
from moirai.memory.shared_memory import SharedMemoryResource
from moirai.memory.sizes import parse_bytes
from moirai.memory.slabs import (
    SLAB_PRESETS,
    ClassChange,
    MagazineChange,
    SizeClass,
    SizeCounts,
    SlabPreset,
    Tuning,
)
from moirai.memory.statistics import Scope, ScopeRecord, StatisticsAdaptor
from moirai.memory.transactions import (
    PROFILES,
    Fragmentation,
    Profile,
    TransactionArena,
    TransactionArenas,
    TransactionStatistics,
)

__all__ = [
    "PROFILES",
    "SLAB_PRESETS",
    "AdaptiveResource",
    "Arena",
    "ArenaResource",
    "Batch",
    "Buffer",
    "ClassChange",
    "ClassPattern",
    "Decision",
    "Effect",
    "Evidence",
    "Explanation",
    "Finding",
    "Fragmentation",
    "Health",
    "HealthReport",
    "LargeArray",
    "LargeObjectResource",
    "LimitAdaptor",
    "MagazineChange",
    "NumaNode",
    "NumaResource",
    "PatternAdaptor",
    "PoolResource",
    "Priority",
    "PriorityResource",
    "Profile",
    "RealtimeResource",
    "Resource",
    "ResourceHealth",
    "Savepoint",
    "Scope",
    "ScopeRecord",
    "SharedMemoryResource",
    "SizeClass",
    "SizeCounts",
    "SlabPreset",
    "SlabResource",
    "Standing",
    "Statistics",
    "StatisticsAdaptor",
    "SystemResource",
    "ThreadLocalArena",
    "Topology",
    "TransactionArena",
    "TransactionArenas",
    "TransactionStatistics",
    "Tuning",
    "Workload",
    "current_priority",
    "handler_of",
    "health",
    "install",
    "installed",
    "keep_libc_heap",
    "largest_arrays",
    "pages_by_node",
    "parse_bytes",
    "priority",
    "stop_background",
    "uninstall",
    "use",
]

if _native.build_profile() != "release":
    warnings.warn(
        "moirai._native is an unoptimised build: correct, but many times slower than a release "
        "build; build it with `maturin develop --release`",
        RuntimeWarning,
        stacklevel=2,
    )
