"""The heap of the C library, which serves what NumPy does not ask for."""

from __future__ import annotations

from moirai import _native
from moirai.memory.sizes import parse_bytes

__all__ = ["keep_libc_heap"]


def keep_libc_heap(*, keep_bytes: int | str = "64 MiB", decay_seconds: float = 0.5) -> bool:
    """Have glibc keep freed memory for reuse, and give it back once it lies idle.

    For memory that extensions allocate themselves, such as the hash tables of pandas and the work
    buffers of SciPy. glibc would unmap large blocks as they are freed and trim its heap again and
    again. `moirai run` calls this, unless `--allocator` says otherwise. It holds for the life of
    the process, since glibc cannot be told to go back; with another malloc preloaded it has no
    effect.

    Args:
        keep_bytes: Most free memory at the top of the heap, as an int or such as "64 MiB"; blocks
            of up to half of it, and of 32 MiB at most, are served from the heap.
        decay_seconds: Free memory is given back once the heap has not grown for so long, then every
            20 times as long (4 s at least), and once the process has hardly run for so long; from
            0 to 1e9.

    Returns:
        Whether it took effect: false if the C library is not glibc.

    Raises:
        InvalidArgument: An argument is outside its range.
    """
    keep = parse_bytes(keep_bytes, argument="keep_bytes")
    return _native.keep_libc_heap(keep, decay_seconds)
