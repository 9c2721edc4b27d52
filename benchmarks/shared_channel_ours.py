"""Moirai's rows of bench_shared_channels.py, each a way to pass bytes or objects."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from moirai.channels import SharedChannel, processes
from moirai.errors import Timeout
from shared_channel_peers import FORK, MIB, Link, Receive, Send


class Moirai(Link):
    label = "Moirai, bytes"

    def __init__(self, size_bytes: int, count: int) -> None:
        super().__init__(size_bytes, count)
        self.channel = SharedChannel.create(capacity_bytes=max(8 * MIB, 4 * size_bytes))

    def sender(self) -> Send:
        self.end = self.channel.sender()
        return self.end.send_bytes

    def receiver(self) -> Receive:
        self.other_end = self.channel.receiver()
        return self.other_end.receive_bytes

    def waiter(self) -> Callable[[float], None]:
        end = self.channel.receiver()

        def wait(seconds: float) -> None:
            with contextlib.suppress(Timeout):
                end.receive_bytes(seconds)

        return wait

    def close(self) -> None:
        self.channel.close()


class MoiraiObjects(Moirai):
    label = "Moirai, objects"

    def sender(self) -> Send:
        return self.channel.sender().send

    def receiver(self) -> Receive:
        return self.channel.receiver().receive


class MoiraiPipe(Link):
    label = "Moirai, processes.Pipe"

    def __init__(self, size_bytes: int, count: int) -> None:
        super().__init__(size_bytes, count)
        capacity = max(8 * MIB, 4 * size_bytes)
        self.ends = processes.Pipe(duplex=False, capacity_bytes=capacity)

    def sender(self) -> Send:
        return self.ends[1].send_bytes

    def receiver(self) -> Receive:
        return self.ends[0].recv_bytes

    def close(self) -> None:
        for end in self.ends:
            end.close()


class MoiraiPipeOfObjects(MoiraiPipe):
    def sender(self) -> Send:
        return self.ends[1].send

    def receiver(self) -> Receive:
        return self.ends[0].recv


class MoiraiQueue(Link):
    label = "Moirai, processes.Queue"

    def __init__(self, size_bytes: int, count: int) -> None:
        super().__init__(size_bytes, count)
        capacity = max(8 * MIB, 4 * size_bytes)
        self.queue: Any = processes.Queue(64, ctx=FORK, capacity_bytes=capacity)

    def sender(self) -> Send:
        return self.queue.put  # type: ignore[no-any-return]

    def receiver(self) -> Receive:
        return self.queue.get  # type: ignore[no-any-return]

    def close(self) -> None:
        self.queue.close()
        self.queue.join_thread()


class MoiraiCopied(Moirai):
    label = "Moirai, copied in, received as a view"

    def receiver(self) -> Receive:
        return self.channel.receiver().receive_view


class MoiraiInPlace(Moirai):
    label = "Moirai, in place"

    def sender(self) -> Send:
        sender, size = self.channel.sender(), self.size_bytes

        def send(data: Any) -> None:
            with sender.reserve(size, np.uint8) as slot:
                slot[:8] = 1

        return send

    def receiver(self) -> Receive:
        receiver = self.channel.receiver()

        def receive() -> Any:
            with receiver.receive_view() as array:
                return array

        return receive


class MoiraiBatches(Moirai):
    label = "Moirai, batches of 256"

    def sender(self) -> Send:
        return self.channel.sender().send_many

    def receiver(self) -> Receive:
        receiver = self.channel.receiver()
        return lambda: receiver.receive_many(256)


class MoiraiRecords(Moirai):
    label = "Moirai, arrays of 256 records"

    def sender(self) -> Send:
        sender = self.channel.sender()
        return lambda batch: sender.send_batch(np.frombuffer(b"".join(batch), "S64"))

    def receiver(self) -> Receive:
        receiver = self.channel.receiver()
        return lambda: receiver.receive_batch(256, "S64")


class MoiraiLent(Moirai):
    label = "Moirai, a new array in a SharedMemoryResource"
    same = False

    def __init__(self, size_bytes: int, count: int) -> None:
        Link.__init__(self, size_bytes, count)
        self.channel = SharedChannel.create(capacity_bytes=MIB)

    def sender(self) -> Send:
        from moirai import memory

        sender, size = self.channel.sender(), self.size_bytes
        shared = memory.SharedMemoryResource(max(64 * MIB, 64 * size))
        memory.use(shared).__enter__()
        np.zeros(shared.capacity_bytes // 2, np.uint8)  # its pages are there before it is measured
        kept = np.zeros(size, np.uint8) if self.same else None

        def send(data: Any) -> None:
            while True:
                try:
                    array = np.empty(size, np.uint8) if kept is None else kept
                    array[:8] = 1
                    break
                except MemoryError:  # all of it is on its way: the receiver is behind
                    os.sched_yield()
            sender.send(array)

        return send

    def receiver(self) -> Receive:
        return self.channel.receiver().receive


class MoiraiLentAgain(MoiraiLent):
    label = "Moirai, the same array again"
    same = True
