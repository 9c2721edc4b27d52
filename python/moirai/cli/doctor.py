"""`moirai doctor`: say what this machine offers, and what stands in the way."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import os
import platform
import resource
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from moirai.cli import allocators, machine
from moirai.cli.options import ALLOCATORS
from moirai.reports import doctor as report

__all__ = ["SUMMARY", "examine", "how_install_works", "main"]

SUMMARY = "say what this machine offers and how NumPy will be served"


def main(arguments: Sequence[str]) -> int:
    """Print the facts and findings; a finding is no failure."""
    parser = argparse.ArgumentParser(
        prog="moirai doctor",
        description="Says what this machine offers: huge pages, limits, NUMA nodes, allocators, "
        "and how NumPy will be served.",
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="write JSON")
    options = parser.parse_args(arguments)
    examined = examine(Path("/"))
    print(report.to_json(examined) if options.json else report.to_text(examined), flush=True)
    return 0


def examine(root: Path) -> report.Machine:
    """Read everything; what lies in /proc and /sys below the root given."""
    memory = machine.meminfo(root)
    hugetlb = machine.hugetlb_pages(root) or (None, None, None)
    cgroup = machine.cgroup_memory(root)
    numpy = _numpy_version()
    thp = root / "sys/kernel/mm/transparent_hugepage"
    return report.Machine(
        kernel=f"{platform.system()} {platform.release()} {platform.machine()}",
        libc=machine.libc_name(),
        cpu_count=os.cpu_count() or 1,
        usable_cpu_count=machine.usable_cpu_count(),
        memory_bytes=memory.get("MemTotal"),
        available_bytes=memory.get("MemAvailable"),
        swap_bytes=memory.get("SwapTotal"),
        page_bytes=resource.getpagesize(),
        thp_mode=machine.selected(thp / "enabled"),
        thp_defrag=machine.selected(thp / "defrag"),
        hugetlb_total=hugetlb[0],
        hugetlb_free=hugetlb[1],
        hugetlb_bytes=hugetlb[2],
        cgroup_version=cgroup.version if cgroup else None,
        cgroup_limit_bytes=cgroup.limit_bytes if cgroup else None,
        cgroup_limit_path=cgroup.path if cgroup else None,
        cgroup_used_bytes=cgroup.used_bytes if cgroup else None,
        numa_node_count=machine.numa_node_count(root),
        address_space_limit_bytes=_soft_limit(resource.RLIMIT_AS),
        locked_limit_bytes=_soft_limit(resource.RLIMIT_MEMLOCK),
        data_limit_bytes=_soft_limit(resource.RLIMIT_DATA),
        overcommit_mode=machine.number(root / "proc/sys/vm/overcommit_memory"),
        allocators=_allocators(),
        python=platform.python_version(),
        is_free_threaded=bool(sysconfig.get_config_var("Py_GIL_DISABLED")),
        numpy=numpy,
        moirai=importlib.import_module("moirai").__version__,
        native_problem=_native_problem(),
        install=how_install_works(numpy),
    )


def how_install_works(numpy: str | None) -> str:
    """Say how `memory.install` reaches the arrays of a NumPy version; None: not installed."""
    if numpy is None:
        return "nothing to install into"
    major, minor = (int(part) for part in numpy.split(".")[:2])
    if (major, minor) < (1, 22):
        return "not possible: NumPy has data handlers from 1.22 on"
    return "replaces the functions of NumPy's default data handler; all threads"


def _allocators() -> tuple[report.FoundAllocator, ...]:
    found = allocators.find_all()
    return tuple(
        report.FoundAllocator(
            name,
            (found[name].library or "") if name in found else None,
            allocators.how_to_get(name),
        )
        for name in ALLOCATORS
    )


def _numpy_version() -> str | None:
    try:
        return importlib.metadata.version("numpy")
    except importlib.metadata.PackageNotFoundError:
        return None


def _native_problem() -> str | None:
    try:
        importlib.import_module("moirai.memory")
    except ImportError as error:
        return str(error)
    return None


def _soft_limit(kind: int) -> int | None:
    soft, _ = resource.getrlimit(kind)
    return None if soft == resource.RLIM_INFINITY else soft
