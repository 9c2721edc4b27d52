"""The options that several commands share: which memory NumPy gets, and sizes on a command line."""

from __future__ import annotations

import argparse

from moirai.errors import InvalidArgument

__all__ = [
    "ALLOCATORS",
    "HUGE_PAGES",
    "MEMORIES",
    "add_memory_options",
    "byte_count",
    "check_memory_options",
]

MEMORIES = ("pool", "slab", "large", "system", "none")
# What can serve malloc; `allocators` finds them.
ALLOCATORS = ("system", "tuned", "jemalloc", "mimalloc", "tcmalloc", "moirai")
HUGE_PAGES = ("auto", "always", "never")

# What a memory has no use for: the system's keeps no cache, and none at all takes nothing.
_USELESS = {
    "system": ("--cache-cap", "--huge-pages"),
    "none": ("--limit", "--cache-cap", "--huge-pages"),
}


def add_memory_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say where NumPy's arrays come from."""
    parser.add_argument(
        "--memory",
        choices=MEMORIES,
        help="resource that NumPy draws from; none: only measure (default: pool)",
    )
    parser.add_argument(
        "--limit",
        type=byte_count,
        metavar="BYTES",
        help="arrays beyond, e.g. 2GiB, raise MemoryError (default: no limit)",
    )
    parser.add_argument(
        "--cache-cap",
        type=byte_count,
        metavar="BYTES",
        help="freed memory to keep at most, e.g. 64MiB (default: the resource's own)",
    )
    parser.add_argument(
        "--huge-pages", choices=HUGE_PAGES, help="when to ask for huge pages (default: auto)"
    )


def check_memory_options(options: argparse.Namespace) -> None:
    """Settle the default of --memory and refuse options that the chosen memory would ignore.

    Raises:
        InvalidArgument: An option contradicts --memory or --allocator.
    """
    if options.memory is None:
        options.memory = "pool" if options.allocator in ("auto", "system") else "none"
    given = {
        "--limit": options.limit,
        "--cache-cap": options.cache_cap,
        "--huge-pages": options.huge_pages,
    }
    for name in _USELESS.get(options.memory, ()):
        if given[name] is not None:
            fitting = [memory for memory in MEMORIES if name not in _USELESS.get(memory, ())]
            came = f"--memory {options.memory}"
            if options.allocator != "auto":
                came += f" --allocator {options.allocator}"
            raise InvalidArgument(f"{name}: needs --memory {', '.join(fitting)}; got {came}")


def byte_count(text: str) -> int:
    """Read a size such as 64MiB; for argparse.

    Raises:
        argparse.ArgumentTypeError: It is none; the message says what was expected.
    """
    from moirai import memory

    try:
        return memory.parse_bytes(text)
    except InvalidArgument as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("size: ")) from None
