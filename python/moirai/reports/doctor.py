"""What `moirai doctor` says of a machine: the facts, and what follows from them for memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass

from moirai.reports.quantities import bytes_text, count_text

__all__ = ["SCHEMA", "FoundAllocator", "Machine", "findings", "to_json", "to_text"]

SCHEMA = "moirai.doctor/1"
# A preloaded malloc and the reservations of the large-object resource want this much to be usual.
_ROOMY_ADDRESS_SPACE_BYTES = 64 << 30


@dataclass(frozen=True)
class FoundAllocator:
    """An allocator: the library's path ("" if it needs none), or how to get it if it is absent."""

    name: str
    path: str | None
    how_to_get: str


@dataclass(frozen=True)
class Machine:
    """What was read. None stands for what the kernel does not tell, or for no limit.

    `cgroup_limit_bytes` is the smallest limit among this process's group and its ancestors,
    `cgroup_limit_path` the group that sets it. `install` says how `memory.install` reaches NumPy.
    """

    kernel: str
    libc: str
    cpu_count: int
    usable_cpu_count: int
    memory_bytes: int | None
    available_bytes: int | None
    swap_bytes: int | None
    page_bytes: int
    thp_mode: str | None
    thp_defrag: str | None
    hugetlb_total: int | None
    hugetlb_free: int | None
    hugetlb_bytes: int | None
    cgroup_version: int | None
    cgroup_limit_bytes: int | None
    cgroup_limit_path: str | None
    cgroup_used_bytes: int | None
    numa_node_count: int
    address_space_limit_bytes: int | None
    locked_limit_bytes: int | None
    data_limit_bytes: int | None
    overcommit_mode: int | None
    allocators: tuple[FoundAllocator, ...]
    python: str
    is_free_threaded: bool
    numpy: str | None
    moirai: str
    native_problem: str | None
    install: str


def to_json(machine: Machine) -> str:
    """Write facts and findings as one JSON object of the schema `SCHEMA`."""
    return json.dumps(
        {"schema": SCHEMA, **asdict(machine), "findings": findings(machine)}, indent=1
    )


def to_text(machine: Machine) -> str:
    """Write facts and findings for a terminal."""
    sections = (
        ("machine", _machine_rows(machine)),
        ("limits", _limit_rows(machine)),
        ("allocators", _allocator_rows(machine)),
        ("python", _python_rows(machine)),
    )
    width = max(len(name) for _, rows in sections for name, _ in rows)
    lines = []
    for title, rows in sections:
        lines.append(title)
        lines += [f"  {name:<{width}}  {value}" for name, value in rows]
    lines.append("findings")
    lines += [f"  * {finding}" for finding in findings(machine)] or ["  nothing stands in the way"]
    return "\n".join(lines)


def findings(machine: Machine) -> list[str]:
    """Return what stands in the way, or is good to know; may be empty."""
    return [sentence for rule in RULES if (sentence := rule(machine)) is not None]


def _machine_rows(machine: Machine) -> list[tuple[str, str]]:
    cpus = f"{machine.usable_cpu_count} usable of {machine.cpu_count}"
    memory = f"{_size(machine.memory_bytes)}, {_size(machine.available_bytes)} available"
    thp = "not in this kernel"
    if machine.thp_mode is not None:
        thp = f"{machine.thp_mode} (defrag {machine.thp_defrag or 'unknown'})"
    hugetlb = "none reserved"
    if machine.hugetlb_total:
        hugetlb = (
            f"{count_text(machine.hugetlb_total)} of {_size(machine.hugetlb_bytes)}, "
            f"{count_text(machine.hugetlb_free or 0)} free (Moirai does not use these)"
        )
    return [
        ("kernel", f"{machine.kernel}, {machine.libc}"),
        ("CPUs", cpus),
        ("memory", memory),
        ("swap", _size(machine.swap_bytes) if machine.swap_bytes else "none"),
        ("page size", bytes_text(machine.page_bytes)),
        ("transparent huge pages", thp),
        ("hugetlb pages", hugetlb),
        ("NUMA nodes", str(machine.numa_node_count)),
    ]


def _limit_rows(machine: Machine) -> list[tuple[str, str]]:
    cgroup = "none"
    if machine.cgroup_limit_bytes is not None:
        cgroup = (
            f"{bytes_text(machine.cgroup_limit_bytes)}, {_size(machine.cgroup_used_bytes)} used "
            f"(cgroup v{machine.cgroup_version}, {machine.cgroup_limit_path})"
        )
    elif machine.cgroup_version is not None:
        cgroup = f"none (cgroup v{machine.cgroup_version})"
    modes = {0: "heuristic", 1: "always", 2: "never beyond the commit limit"}
    overcommit = "unknown"
    if machine.overcommit_mode is not None:
        overcommit = f"{machine.overcommit_mode} ({modes.get(machine.overcommit_mode, 'unknown')})"
    return [
        ("cgroup memory", cgroup),
        ("address space (ulimit -v)", _limit(machine.address_space_limit_bytes)),
        ("data (ulimit -d)", _limit(machine.data_limit_bytes)),
        ("locked (ulimit -l)", _limit(machine.locked_limit_bytes)),
        ("overcommit", overcommit),
    ]


def _allocator_rows(machine: Machine) -> list[tuple[str, str]]:
    return [
        (each.name, f"not found: {each.how_to_get}" if each.path is None else each.path or "there")
        for each in machine.allocators
    ]


def _python_rows(machine: Machine) -> list[tuple[str, str]]:
    build = "free-threaded" if machine.is_free_threaded else "with the GIL"
    return [
        ("Python", f"{machine.python}, {build}"),
        ("NumPy", machine.numpy or "not installed"),
        ("Moirai", machine.moirai),
        ("install()", machine.install),
    ]


def _size(size_bytes: int | None) -> str:
    return "unknown" if size_bytes is None else bytes_text(size_bytes)


def _limit(limit_bytes: int | None) -> str:
    return "unlimited" if limit_bytes is None else bytes_text(limit_bytes)


# Findings: one rule, one function.


def _native_missing(machine: Machine) -> str | None:
    if machine.native_problem is None:
        return None
    return f"Moirai's native module cannot be loaded: {machine.native_problem}"


def _numpy_missing(machine: Machine) -> str | None:
    return None if machine.numpy else "NumPy is not installed: there are no arrays to serve."


def _huge_pages_off(machine: Machine) -> str | None:
    if machine.thp_mode == "never":
        return (
            "Transparent huge pages are `never`: huge pages cannot help, whatever --huge-pages "
            "says. As root: echo madvise > /sys/kernel/mm/transparent_hugepage/enabled"
        )
    if machine.thp_mode is None:
        return "This kernel has no transparent huge pages: --huge-pages has no effect."
    return None


def _huge_pages_always(machine: Machine) -> str | None:
    if machine.thp_mode != "always":
        return None
    return (
        "Transparent huge pages are `always`: every allocator gets them, so expect less difference "
        "between allocators, and a higher RSS of all."
    )


def _tight_cgroup(machine: Machine) -> str | None:
    """A quarter or less of the group's limit is left."""
    limit, used = machine.cgroup_limit_bytes, machine.cgroup_used_bytes
    if limit is None or used is None or used < 0.75 * limit:
        return None
    return (
        f"The cgroup {machine.cgroup_limit_path} uses {bytes_text(used)} of its "
        f"{bytes_text(limit)} (page cache included): consider --limit and a small --cache-cap."
    )


def _cgroup_below_memory(machine: Machine) -> str | None:
    limit, memory = machine.cgroup_limit_bytes, machine.memory_bytes
    if limit is None or memory is None or limit >= memory:
        return None
    return (
        f"The limit that counts is the cgroup's {bytes_text(limit)}, not the machine's "
        f"{bytes_text(memory)}: beyond it the kernel kills. `--limit` fails before that."
    )


def _address_space(machine: Machine) -> str | None:
    limit = machine.address_space_limit_bytes
    if limit is None or limit >= _ROOMY_ADDRESS_SPACE_BYTES:
        return None
    return (
        f"The address space is limited to {bytes_text(limit)}: reserving large regions will fail "
        "and Moirai falls back to smaller ones."
    )


def _strict_overcommit(machine: Machine) -> str | None:
    if machine.overcommit_mode != 2:
        return None
    return "Overcommit is `never` (2): allocations fail at the commit limit, before memory is full."


def _several_nodes(machine: Machine) -> str | None:
    if machine.numa_node_count < 2:
        return None
    return (
        f"{machine.numa_node_count} NUMA nodes: a cached page stays on the node that touched it "
        "first; compare with `numactl` set as in production."
    )


def _few_cpus(machine: Machine) -> str | None:
    if machine.usable_cpu_count >= machine.cpu_count:
        return None
    return (
        f"Only {machine.usable_cpu_count} of {machine.cpu_count} CPUs may be used: thread pools "
        "that count CPUs themselves may start too many threads."
    )


def _large_pages(machine: Machine) -> str | None:
    if machine.page_bytes == 4096:
        return None
    return (
        f"Pages are {bytes_text(machine.page_bytes)}: counts of faults do not compare with 4 KiB."
    )


RULES: tuple[Callable[[Machine], str | None], ...] = (
    _native_missing,
    _numpy_missing,
    _huge_pages_off,
    _huge_pages_always,
    _tight_cgroup,
    _cgroup_below_memory,
    _address_space,
    _strict_overcommit,
    _several_nodes,
    _few_cpus,
    _large_pages,
)
