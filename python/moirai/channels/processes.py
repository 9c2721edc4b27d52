"""multiprocessing with other pipes and queues: `from moirai.channels import processes as mp`.

`Pipe`, `Queue`, `JoinableQueue` and `SimpleQueue` are over shared memory; every other name is
multiprocessing's own.
"""

from __future__ import annotations

import multiprocessing
from typing import Any

from moirai.channels.pipes import Connection, Pipe, wait
from moirai.channels.process_queues import Empty, Full, JoinableQueue, Queue, SimpleQueue

__all__ = [
    "Connection",
    "Empty",
    "Full",
    "JoinableQueue",
    "Pipe",
    "Queue",
    "SimpleQueue",
    "wait",
]


def __getattr__(name: str) -> Any:
    return getattr(multiprocessing, name)
