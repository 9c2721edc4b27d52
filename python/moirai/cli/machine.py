"""Reads what the kernel says of this machine, below a root that tests can replace."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

__all__ = [
    "CgroupMemory",
    "cgroup_memory",
    "hugetlb_pages",
    "libc_name",
    "meminfo",
    "numa_node_count",
    "number",
    "selected",
    "usable_cpu_count",
]

# cgroup v1 writes "no limit" as the largest multiple of the page size; nothing real comes near.
_NO_LIMIT_BYTES = 1 << 60


@dataclass(frozen=True)
class CgroupMemory:
    """The memory limit that counts for a process: the smallest on the way up to the root.

    `limit_bytes` is None if no group on the way has one; then `path` and `used_bytes` are None.
    """

    version: int
    limit_bytes: int | None
    path: str | None
    used_bytes: int | None


def selected(path: Path) -> str | None:
    """Return the word in brackets of a file such as `always [madvise] never`; None if absent."""
    text = _read(path)
    return None if text is None else text.partition("[")[2].partition("]")[0] or None


def meminfo(root: Path) -> dict[str, int]:
    """Return /proc/meminfo by name; sizes in bytes, counts as they are."""
    values = {}
    for line in (_read(root / "proc/meminfo") or "").splitlines():
        name, _, rest = line.partition(":")
        words = rest.split()
        if words and words[0].isdigit():
            values[name] = int(words[0]) * (1024 if words[1:] == ["kB"] else 1)
    return values


def hugetlb_pages(root: Path) -> tuple[int, int, int] | None:
    """Return total, free and size in bytes of the default hugetlb pages; None if there are none."""
    values = meminfo(root)
    try:
        return values["HugePages_Total"], values["HugePages_Free"], values["Hugepagesize"]
    except KeyError:
        return None


def numa_node_count(root: Path) -> int:
    """Return how many NUMA nodes are online; 1 where the kernel does not say."""
    text = _read(root / "sys/devices/system/node/online")
    return sum(1 for _ in _ids(text)) if text else 1


def cgroup_memory(root: Path) -> CgroupMemory | None:
    """Find the memory limit of this process's control group and all groups above it.

    Reads /proc/self/cgroup for the group and /proc/self/mountinfo for where the hierarchy is
    mounted; inside a container the mount shows only the part from the container's group on.

    Returns:
        None if the process is in no memory control group.
    """
    groups = dict(_own_groups(root))
    for version, controller in ((1, "memory"), (2, "")):
        if controller not in groups:
            continue
        for mount, mount_root in _cgroup_mounts(root, version):
            directory = _below(root, mount, mount_root, groups[controller])
            if _has_memory(directory, version):
                return _smallest_limit(directory, root / mount.lstrip("/"), version)
    return None


def _own_groups(root: Path) -> Iterator[tuple[str, str]]:
    """Yield (controller, group); version 2 has the empty controller."""
    for line in (_read(root / "proc/self/cgroup") or "").splitlines():
        _, controllers, group = line.split(":", 2)
        for controller in controllers.split(","):
            yield controller, group


def _cgroup_mounts(root: Path, version: int) -> Iterator[tuple[str, str]]:
    """Yield (mount point, group it shows) of the hierarchies that may limit memory."""
    for line in (_read(root / "proc/self/mountinfo") or "").splitlines():
        before, _, after = line.partition(" - ")
        fields, (kind, _, options) = before.split(), after.split(" ", 2)
        is_memory = version == 2 or "memory" in options.split(",")
        if kind == ("cgroup2" if version == 2 else "cgroup") and is_memory:
            yield _unescaped(fields[4]), _unescaped(fields[3])


def _unescaped(field: str) -> str:
    return field.replace("\\040", " ").replace("\\134", "\\")


def _below(root: Path, mount: str, mount_root: str, group: str) -> Path:
    """Return the group's directory, or the mount point if the mount does not show that far up."""
    top = root / mount.lstrip("/")
    try:
        relative = PurePosixPath(group).relative_to(mount_root)
    except ValueError:
        return top
    directory = top / relative
    return directory if directory.is_dir() else top


def _has_memory(directory: Path, version: int) -> bool:
    """Whether memory is accounted here; the root of version 2 has no file for it."""
    name = "cgroup.controllers" if version == 2 else "memory.limit_in_bytes"
    text = _read(directory / name)
    return text is not None and (version == 1 or "memory" in text.split())


def _smallest_limit(directory: Path, top: Path, version: int) -> CgroupMemory:
    limit_name, used_name = (
        ("memory.max", "memory.current")
        if version == 2
        else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    )
    limits = {}
    for group in (directory, *directory.parents):
        limit = number(group / limit_name)
        if limit is not None and limit < _NO_LIMIT_BYTES:
            limits[group] = limit
        if group == top:
            break
    if not limits:
        return CgroupMemory(version, None, None, None)
    group = min(limits, key=lambda each: limits[each])
    path = "/" + str(group.relative_to(top)).removeprefix(".")
    return CgroupMemory(version, limits[group], path, number(group / used_name))


def libc_name() -> str:
    """Return the C library's name and version."""
    return " ".join(platform.libc_ver()).strip() or "unknown C library"


def number(path: Path) -> int | None:
    """Return the number a file holds; None if it holds none or cannot be read."""
    text = (_read(path) or "").strip()
    return int(text) if text.isdigit() else None


def usable_cpu_count() -> int:
    """Return how many CPUs the affinity of this process allows."""
    return len(os.sched_getaffinity(0))


def _ids(text: str) -> Iterator[int]:
    """Yield the numbers of a kernel list such as 0-3,8."""
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        yield from range(int(first), int(last or first) + 1)


def _read(path: Path) -> str | None:
    try:
        return path.read_text("utf-8", "surrogateescape")
    except OSError:
        return None
