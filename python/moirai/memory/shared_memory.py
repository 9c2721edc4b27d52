"""Memory that other processes can be given without a copy."""

from __future__ import annotations

from moirai import _native
from moirai.memory.sizes import parse_bytes

__all__ = ["SharedMemoryResource"]


class SharedMemoryResource(_native.SharedMemoryResource):
    """Blocks that a `SharedChannel` sends by reference: an array under it is never copied.

    The memory is a file without a name, so nothing is left of it when the last process that has it
    ends, however it ends. A block that is freed here is used again when every process that was sent
    it has let go of it too, or has died. Blocks are whole pages of 4 KiB.

    A forked child shares its parent's blocks, as both see what the other writes, and holds them;
    what it draws itself comes from a file of its own. A resource does not pickle: arrays travel,
    and whoever receives one is attached by that.

    Args:
        capacity_bytes: Bytes that blocks may take together, as an int or such as "1 GiB"; rounded
            up to 2 MiB. Memory is taken as it is needed, 2 MiB at a time, and kept until `trim`.

    Raises:
        InvalidArgument: `capacity_bytes` is out of its range.
        OutOfMemory: The system has not so much address space, or no memory for the tables.
    """

    def __new__(cls, capacity_bytes: int | str = "1 GiB") -> SharedMemoryResource:
        return super().__new__(cls, parse_bytes(capacity_bytes, argument="capacity_bytes"))
