"""The peers of bench_shared_channels.py: each sends bytes from one process to another.

A link is made in the parent, then the process forks; the child calls `sender()`, the parent
`receiver()`. Each is used as its page shows, with the options that do least.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import queue
import tempfile
import time
import uuid
from collections.abc import Callable
from multiprocessing import shared_memory
from typing import Any

import numpy as np

MIB = 1 << 20
FORK = multiprocessing.get_context("fork")

Send = Callable[[Any], None]
Receive = Callable[[], Any]


def void(_: object) -> None:
    """What was given back is not needed."""


class Link:
    """One way from a process to another for messages of up to `size_bytes`, `count` of them."""

    label = ""
    max_bytes = 1 << 40

    def __init__(self, size_bytes: int, count: int) -> None:
        self.size_bytes = size_bytes
        self.count = count

    def sender(self) -> Send:
        """In the child."""
        raise NotImplementedError

    def receiver(self) -> Receive:
        """In the parent."""
        raise NotImplementedError

    def waiter(self) -> Callable[[float], None]:
        """Waits for as many seconds, in vain."""
        raise NotImplementedError

    def close(self) -> None:
        """In both."""


class Queue(Link):
    label = "multiprocessing.Queue"

    def __init__(self, size_bytes: int, count: int) -> None:
        super().__init__(size_bytes, count)
        self.queue: Any = FORK.Queue(64)

    def sender(self) -> Send:
        return self.queue.put  # type: ignore[no-any-return]

    def receiver(self) -> Receive:
        return self.queue.get  # type: ignore[no-any-return]

    def waiter(self) -> Callable[[float], None]:
        def wait(seconds: float) -> None:
            with contextlib.suppress(queue.Empty):
                self.queue.get(timeout=seconds)

        return wait

    def close(self) -> None:
        self.queue.close()
        self.queue.join_thread()


class SimpleQueue(Link):
    label = "multiprocessing.SimpleQueue"

    def __init__(self, size_bytes: int, count: int) -> None:
        super().__init__(size_bytes, count)
        self.queue: Any = FORK.SimpleQueue()

    def sender(self) -> Send:
        return self.queue.put  # type: ignore[no-any-return]

    def receiver(self) -> Receive:
        return self.queue.get  # type: ignore[no-any-return]

    def close(self) -> None:
        self.queue.close()


class Pipe(Link):
    label = "multiprocessing.Pipe"

    def __init__(self, size_bytes: int, count: int) -> None:
        super().__init__(size_bytes, count)
        self.ends = FORK.Pipe(duplex=False)

    def sender(self) -> Send:
        return self.ends[1].send_bytes

    def receiver(self) -> Receive:
        return self.ends[0].recv_bytes

    def waiter(self) -> Callable[[float], None]:
        return lambda seconds: void(self.ends[0].poll(seconds))


class PipeOfObjects(Pipe):
    def sender(self) -> Send:
        return self.ends[1].send

    def receiver(self) -> Receive:
        return self.ends[0].recv


class FasterFifo(Link):
    label = "faster-fifo"

    def __init__(self, size_bytes: int, count: int) -> None:
        import faster_fifo

        super().__init__(size_bytes, count)
        self.queue = faster_fifo.Queue(max(4 * size_bytes, 4 * MIB))

    def sender(self) -> Send:
        return self.queue.put  # type: ignore[no-any-return]

    def receiver(self) -> Receive:
        return self.queue.get  # type: ignore[no-any-return]

    def waiter(self) -> Callable[[float], None]:
        def wait(seconds: float) -> None:
            with contextlib.suppress(queue.Empty):
                self.queue.get(timeout=seconds)

        return wait


class FasterFifoBatches(FasterFifo):
    label = "faster-fifo, batches of 256"

    def sender(self) -> Send:
        return self.queue.put_many  # type: ignore[no-any-return]

    def receiver(self) -> Receive:
        return lambda: self.queue.get_many(max_messages_to_get=256)


class HandMade(Link):
    """What people write over multiprocessing.shared_memory: two counters, slots, polling."""

    label = "hand-made ring in shared_memory"
    slots = 8

    def __init__(self, size_bytes: int, count: int) -> None:
        super().__init__(size_bytes, count)
        self.memory = shared_memory.SharedMemory(create=True, size=128 + self.slots * size_bytes)
        self.owner = os.getpid()

    def parts(self) -> tuple[Any, list[Any]]:
        counters = self.memory.buf[:128].cast("Q")
        ends = range(128, 129 + self.slots * self.size_bytes, self.size_bytes)
        return counters, [self.memory.buf[it : it + self.size_bytes] for it in ends[:-1]]

    def sender(self) -> Send:
        (counters, places), slots, sent = self.parts(), self.slots, 0

        def send(data: Any) -> None:
            nonlocal sent
            while sent - counters[8] >= slots:
                pass
            places[sent % slots][:] = data
            sent += 1
            counters[0] = sent

        return send

    def receiver(self) -> Receive:
        (counters, places), slots, received = self.parts(), self.slots, 0

        def receive() -> Any:
            nonlocal received
            while counters[0] == received:
                pass
            data = bytes(places[received % slots])
            received += 1
            counters[8] = received
            return data

        return receive

    def close(self) -> None:
        if os.getpid() == self.owner:
            self.memory.unlink()
            # Its views are the closures'; the kernel takes the memory when they are gone.
            self.memory._buf = None  # type: ignore[attr-defined]
            self.memory._mmap = None  # type: ignore[attr-defined]
            self.memory.close()


class Zmq(Link):
    label = "pyzmq ipc, copy=False"

    def __init__(self, size_bytes: int, count: int) -> None:
        super().__init__(size_bytes, count)
        self.address = f"ipc://{tempfile.gettempdir()}/moirai-bench-{uuid.uuid4().hex}"

    def socket(self, kind: str) -> Any:
        import zmq

        self.context = zmq.Context()
        socket = self.context.socket(getattr(zmq, kind))
        socket.linger = 10_000
        if kind == "PULL":
            socket.bind(self.address)
        else:
            socket.connect(self.address)
        return socket

    def sender(self) -> Send:
        socket = self.socket("PUSH")
        return lambda data: socket.send(data, copy=False)

    def receiver(self) -> Receive:
        socket = self.socket("PULL")
        return lambda: socket.recv(copy=False)

    def waiter(self) -> Callable[[float], None]:
        socket = self.socket("PULL")
        return lambda seconds: void(socket.poll(1000 * seconds))

    def close(self) -> None:
        self.context.destroy(linger=10_000)


class ZmqObjects(Zmq):
    def sender(self) -> Send:
        socket = self.socket("PUSH")
        return lambda item: socket.send_pyobj(item, protocol=5, copy=False)

    def receiver(self) -> Receive:
        return self.socket("PULL").recv_pyobj  # type: ignore[no-any-return]


class Iceoryx(Link):
    label = "iceoryx2, copied in"
    in_place = False

    def __init__(self, size_bytes: int, count: int) -> None:
        super().__init__(size_bytes, count)
        self.name = f"moirai-bench-{uuid.uuid4().hex}"

    def service(self) -> Any:
        import iceoryx2

        iceoryx2.set_log_level(iceoryx2.LogLevel.Fatal)
        self.node = iceoryx2.NodeBuilder.new().create(iceoryx2.ServiceType.Ipc)
        builder = self.node.service_builder(iceoryx2.ServiceName.new(self.name))
        builder = builder.publish_subscribe(iceoryx2.Slice[ctypes.c_uint8])
        depth = 256 if self.size_bytes < MIB else 8
        builder = builder.enable_safe_overflow(False).subscriber_max_buffer_size(depth)
        return builder.open_or_create()

    def sender(self) -> Send:
        import iceoryx2

        builder = self.service().publisher_builder().initial_max_slice_len(self.size_bytes)
        publisher = builder.backpressure_strategy(
            iceoryx2.BackpressureStrategy.RetryUntilDelivered
        ).create()
        size, in_place = self.size_bytes, self.in_place

        def send(data: Any) -> None:
            sample = publisher.loan_slice_uninit(size)
            if in_place:
                ctypes.memset(sample.payload_ptr, 1, 8)
            else:
                ctypes.memmove(sample.payload_ptr, data, size)
            sample.assume_init().send()

        return send

    def receiver(self) -> Receive:
        subscriber = self.service().subscriber_builder().create()

        def receive() -> Any:
            while (sample := subscriber.receive()) is None:
                pass
            sample.delete()
            return None

        return receive

    def waiter(self) -> Callable[[float], None]:
        subscriber = self.service().subscriber_builder().create()

        def wait(seconds: float) -> None:
            until = time.perf_counter() + seconds
            while subscriber.receive() is None and time.perf_counter() < until:
                pass

        return wait


class IceoryxInPlace(Iceoryx):
    label = "iceoryx2, in place"
    in_place = True


class Subetha(Link):
    label = "subetha-ipc, SpscRing"
    max_bytes = 64

    def __init__(self, size_bytes: int, count: int) -> None:
        import subetha

        super().__init__(size_bytes, count)
        self.path = f"/dev/shm/moirai-bench-{uuid.uuid4().hex}"
        self.ring = subetha.SpscRing(self.path, 1024)

    def _open(self) -> Any:
        import subetha

        return subetha.SpscRing.open(self.path, 1024)

    def sender(self) -> Send:
        push = self._open().push

        def send(data: Any) -> None:
            while not push(data):
                pass

        return send

    def receiver(self) -> Receive:
        pop = self._open().pop

        def receive() -> Any:
            while (data := pop()) is None:
                pass
            return data

        return receive

    def close(self) -> None:
        if os.path.exists(self.path):
            os.unlink(self.path)


class SubethaBatches(Subetha):
    label = "subetha-ipc, batches of 256"

    def sender(self) -> Send:
        push = self._open().push_many

        def send(batch: Any) -> None:
            while batch:
                batch = batch[push(batch) :]

        return send

    def receiver(self) -> Receive:
        pop = self._open().pop_many
        return lambda: pop(256)


class HyperQ(Link):
    label = "hyperq"
    max_bytes = 64 * 1024

    def __init__(self, size_bytes: int, count: int) -> None:
        import hyperq

        super().__init__(size_bytes, count)
        self.queue = hyperq.BytesHyperQ(4 * MIB, f"moirai-{uuid.uuid4().hex[:12]}")

    def sender(self) -> Send:
        return self.queue.put  # type: ignore[no-any-return]

    def receiver(self) -> Receive:
        return self.queue.get  # type: ignore[no-any-return]


class Cloudtoid(Link):
    label = "cloudtoid-interprocess"

    def __init__(self, size_bytes: int, count: int) -> None:
        super().__init__(size_bytes, count)
        self.folder = tempfile.mkdtemp(dir="/dev/shm")
        self.capacity = max(4 * MIB, 4 * size_bytes)

    def sender(self) -> Send:
        import cloudtoid_interprocess

        publisher = cloudtoid_interprocess.Publisher("bench", self.capacity, self.folder)

        def send(data: Any) -> None:
            while not publisher.try_send(data):
                pass

        return send

    def receiver(self) -> Receive:
        import cloudtoid_interprocess

        subscriber = cloudtoid_interprocess.Subscriber("bench", self.capacity, self.folder)
        return lambda: subscriber.receive(30)

    def waiter(self) -> Callable[[float], None]:
        import cloudtoid_interprocess

        subscriber = cloudtoid_interprocess.Subscriber("bench", self.capacity, self.folder)

        def wait(seconds: float) -> None:
            with contextlib.suppress(TimeoutError):
                subscriber.receive(seconds)

        return wait

    def close(self) -> None:
        import shutil

        shutil.rmtree(self.folder, ignore_errors=True)


class Kickmsg(Link):
    """Drops what a subscriber is late for: its ring has room for the whole run."""

    label = "kickmsg, copied in"
    max_bytes = MIB
    in_place = False

    def __init__(self, size_bytes: int, count: int) -> None:
        import kickmsg

        super().__init__(size_bytes, count)
        config = kickmsg.Config()
        config.max_subscribers = 1
        config.sub_ring_capacity = 1 << (count + 1).bit_length()
        config.pool_size = count + 8
        config.max_payload_size = size_bytes
        self.name = f"/moirai-bench-{uuid.uuid4().hex}"
        self.region = kickmsg.SharedRegion.create(self.name, kickmsg.ChannelType.PubSub, config)

    def sender(self) -> Send:
        import kickmsg

        publisher = kickmsg.Publisher(kickmsg.SharedRegion.open(self.name))
        if not self.in_place:
            return publisher.send  # type: ignore[no-any-return]
        size = self.size_bytes

        def send(data: Any) -> None:
            slot = publisher.allocate()
            memoryview(slot)[:8] = b"12345678"
            slot.publish(size)

        return send

    def receiver(self) -> Receive:
        import kickmsg

        subscriber = kickmsg.Subscriber(self.region)
        if not self.in_place:
            return lambda: subscriber.receive(30.0)
        return lambda: subscriber.receive_view(30.0)

    def waiter(self) -> Callable[[float], None]:
        import kickmsg

        subscriber = kickmsg.Subscriber(self.region)
        return lambda seconds: void(subscriber.receive(seconds))

    def close(self) -> None:
        import kickmsg

        kickmsg.unlink_shm(self.name)


class KickmsgInPlace(Kickmsg):
    label = "kickmsg, in place"
    in_place = True


class QueueOfArrays(Queue):
    label = "multiprocessing.Queue, arrays"

    def sender(self) -> Send:
        put, size = self.queue.put, self.size_bytes

        def send(data: Any) -> None:
            array = np.empty(size, np.uint8)
            array[:8] = 1
            put(array)

        return send


class SharedMemoryByHand(Link):
    """Eight places in one block, each with a byte that says whose turn it is; both sides poll."""

    label = "multiprocessing.shared_memory by hand, polled"
    places = 8

    def __init__(self, size_bytes: int, count: int) -> None:
        from multiprocessing.shared_memory import SharedMemory

        super().__init__(size_bytes, count)
        self.memory = SharedMemory(create=True, size=self.places * (64 + size_bytes))
        self.maker = os.getpid()
        whole = np.frombuffer(self.memory.buf, np.uint8)
        whole[:] = 0  # its pages are there before it is measured
        self.turns = whole[: 64 * self.places : 64]
        self.arrays = whole[64 * self.places :].reshape(self.places, size_bytes)

    def sender(self) -> Send:
        turns, arrays, place = self.turns, self.arrays, 0

        def send(data: Any) -> None:
            nonlocal place
            while turns[place]:
                os.sched_yield()
            arrays[place][:8] = 1
            turns[place] = 1
            place = (place + 1) % self.places

        return send

    def receiver(self) -> Receive:
        turns, arrays, place = self.turns, self.arrays, 0

        def receive() -> Any:
            nonlocal place
            turns[place - 1] = 0  # done with the last one
            while not turns[place]:
                os.sched_yield()
            array = arrays[place]
            place = (place + 1) % self.places
            return array

        return receive

    def close(self) -> None:
        del self.turns, self.arrays
        if os.getpid() == self.maker:
            self.memory.unlink()
