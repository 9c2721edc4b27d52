"""Finds the allocators that can serve a program's malloc, and the environment that selects each."""

from __future__ import annotations

import os
import platform
import site
import sysconfig
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from moirai.cli.options import ALLOCATORS
from moirai.errors import InvalidArgument, Unsupported

__all__ = ["PRELOADED", "Allocator", "find_all", "how_to_get", "select", "with_allocator"]

PRELOADED = ("jemalloc", "mimalloc", "tcmalloc", "moirai")

_FILE_PATTERNS = {
    "jemalloc": ("libjemalloc.so.2", "libjemalloc.so"),
    "mimalloc": ("libmimalloc.so", "libmimalloc.so.[0-9]*"),
    "tcmalloc": ("libtcmalloc_minimal.so.4", "libtcmalloc_minimal.so", "libtcmalloc.so.4"),
    "moirai": ("libmoirai_malloc.so.1",),
}
_HOW_TO_GET = {
    "jemalloc": "install Debian's libjemalloc2 (Fedora: jemalloc)",
    "mimalloc": "pip install cmeel-mimalloc, or install Debian's libmimalloc2.0",
    "tcmalloc": "install Debian's libtcmalloc-minimal4 (Fedora: gperftools-libs)",
    "moirai": "pip builds it with Moirai; in a source tree, `make build` makes it",
}

# glibc maps blocks from mmap_threshold on one by one and unmaps them when freed, and trims the heap
# top from trim_threshold on; both cost page faults at each operation. 4 GiB is past what NumPy
# programs free and ask for again; hugetlb=1 is madvise(MADV_HUGEPAGE), from glibc 2.35.
_GLIBC_TUNABLES = ":".join(
    [
        "glibc.malloc.hugetlb=1",
        f"glibc.malloc.mmap_threshold={4 << 30}",
        f"glibc.malloc.trim_threshold={4 << 30}",
        f"glibc.malloc.top_pad={64 << 20}",
    ]
)

# By default jemalloc gives blocks over 8 MiB back as soon as they are freed (oversize arena), which
# makes 4-10 times more faults for NumPy than glibc does.
_MALLOC_CONF = "oversize_threshold:0,thp:always,dirty_decay_ms:10000,muzzy_decay_ms:10000"


@dataclass(frozen=True)
class Allocator:
    """A malloc that was found: its name and the library to preload, if it needs one."""

    name: str
    library: str | None


def find_all(
    *,
    library_directories: Iterable[Path] | None = None,
    libc: tuple[str, str] | None = None,
) -> dict[str, Allocator]:
    """Find what this machine offers.

    Args:
        library_directories: Where to look for libraries, best first; default: those of pip's
            packages, then those of the system.
        libc: Name and version of the C library; default: this process's.

    Returns:
        Each allocator by name, in the order of `ALLOCATORS`; "system" is always there.
    """
    directories = list(
        _library_directories() if library_directories is None else library_directories
    )
    libc_name, _ = platform.libc_ver() if libc is None else libc
    found = {"system": Allocator("system", None)}
    if libc_name == "glibc":
        found["tuned"] = Allocator("tuned", None)
    for name in PRELOADED:
        library = _find_library(name, directories)
        if library is not None:
            found[name] = Allocator(name, str(library))
    return found


def select(name: str, found: Mapping[str, Allocator]) -> Allocator:
    """Return the allocator asked for.

    Raises:
        InvalidArgument: There is no allocator of that name.
        Unsupported: It is not on this machine; the message says how to get it.
    """
    if name not in ALLOCATORS:
        raise InvalidArgument(f"allocator: expected one of {', '.join(ALLOCATORS)}, got {name!r}")
    if name not in found:
        raise Unsupported(f"allocator: {name} was not found on this machine: {how_to_get(name)}")
    return found[name]


def how_to_get(name: str) -> str:
    """Say in a few words how to get an allocator that was not found."""
    return _HOW_TO_GET.get(name, "it needs the GNU C library")


def with_allocator(allocator: Allocator, environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables to set so that a program started with them gets this malloc.

    What the environment already says is kept: the user's own tunables come after ours, so that they
    win; the user's own preloads come after our library, so that malloc is the one asked for.
    """
    if allocator.name == "tuned":
        return {"GLIBC_TUNABLES": _joined(_GLIBC_TUNABLES, environment.get("GLIBC_TUNABLES"), ":")}
    if allocator.library is None:
        return {}
    variables = {"LD_PRELOAD": _joined(allocator.library, environment.get("LD_PRELOAD"), ":")}
    if allocator.name == "jemalloc":
        variables["MALLOC_CONF"] = _joined(_MALLOC_CONF, environment.get("MALLOC_CONF"), ",")
    return variables


def _joined(ours: str, theirs: str | None, separator: str) -> str:
    if not theirs or theirs == ours or theirs.startswith(ours + separator):
        return theirs or ours
    return ours + separator + theirs


def _find_library(name: str, directories: Iterable[Path]) -> Path | None:
    for directory in directories:
        for pattern in _FILE_PATTERNS[name]:
            # A preload path cannot hold the characters that separate its entries.
            matches = [
                path for path in sorted(directory.glob(pattern)) if not set(" :") & set(str(path))
            ]
            if matches:
                return matches[-1]
    return None


def _library_directories() -> list[Path]:
    own = Path(__file__).resolve().parent.parent / "_preload"
    packages = [sysconfig.get_path("purelib"), *site.getsitepackages(), site.getusersitepackages()]
    multiarch = sysconfig.get_config_var("MULTIARCH") or f"{platform.machine()}-linux-gnu"
    directories = [own]
    directories += [Path(package) / "cmeel.prefix" / "lib" for package in packages]
    directories += [
        Path(entry) for entry in os.environ.get("LD_LIBRARY_PATH", "").split(":") if entry
    ]
    directories += [
        Path(prefix) / part
        for prefix in ("/usr/local", "/usr", "/")
        for part in (f"lib/{multiarch}", "lib64", "lib")
    ]
    return directories
