"""What waiting costs between processes: a wake-up there and back, and the CPU of silence."""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from collections.abc import Callable

from forked import in_child
from shared_channel_peers import Link

BUSY_NS = 200_000
"""Longer than anybody spins: whoever waits for the other has gone to sleep by then."""


def be_busy() -> None:
    """Keep the core for a while, so that the other process sleeps and this core does not."""
    until = time.perf_counter_ns() + BUSY_NS
    while time.perf_counter_ns() < until:
        pass


def parked_round_trips(send: Callable[[], None], receive: Callable[[], None], rounds: int) -> float:
    """Microseconds there and back, by the median; the other's being busy taken off."""
    found = []
    for _ in range(rounds):
        be_busy()
        started = time.perf_counter_ns()
        send()
        receive()
        found.append(time.perf_counter_ns() - started - BUSY_NS)
    return sorted(found)[rounds // 2] / 1e3


def parked(kind: type[Link], rounds: int) -> float:
    """Microseconds for 64 bytes to go and come back between two that sleep until they are woken."""
    request, reply = kind(64, rounds + 1), kind(64, rounds + 1)
    data = bytes(64)
    go, ready = os.pipe(), os.pipe()

    def child() -> None:
        receive = request.receiver()
        os.write(ready[1], b"x")
        os.read(go[0], 1)
        send = reply.sender()
        os.write(ready[1], b"x")
        for _ in range(rounds + 1):
            receive()
            be_busy()
            send(data)
        os.read(go[0], 1)

    process = in_child(child, core=1)
    os.read(ready[0], 1)
    receive = reply.receiver()
    os.write(go[1], b"1")
    os.read(ready[0], 1)
    send = request.sender()
    send(data)
    receive()
    elapsed = parked_round_trips(lambda: send(data), receive, rounds)
    os.write(go[1], b"2")
    os.waitpid(process, 0)
    request.close()
    reply.close()
    for fd in (*go, *ready):
        os.close(fd)
    return elapsed


class Futexes:
    """Two words of two processes that sleep on them and wake each other: the limit of blocking."""

    WAIT, WAKE, NUMBER = 0, 1, 202

    def __init__(self) -> None:
        self.place = mmap.mmap(-1, mmap.PAGESIZE)
        self.words = (ctypes.c_uint32 * 64).from_buffer(self.place)
        self.call = ctypes.CDLL(None).syscall
        base = ctypes.addressof(self.words)
        self.addresses = [ctypes.c_void_p(base + 128 * side) for side in range(2)]

    def give(self, side: int) -> None:
        self.words[32 * side] += 1
        self.call(self.NUMBER, self.addresses[side], self.WAKE, 1, None)

    def take(self, side: int, value: int) -> None:
        while self.words[32 * side] < value:
            self.call(self.NUMBER, self.addresses[side], self.WAIT, value - 1, None)


def parked_futexes(rounds: int) -> float:
    """Microseconds there and back over two futexes, and nothing else."""
    futexes = Futexes()

    def child() -> None:
        for value in range(1, rounds + 1):
            futexes.take(0, value)
            be_busy()
            futexes.give(1)

    process = in_child(child, core=1)
    taken = iter(range(1, rounds + 1))
    elapsed = parked_round_trips(
        lambda: futexes.give(0), lambda: futexes.take(1, next(taken)), rounds
    )
    os.waitpid(process, 0)
    return elapsed


def silence(kind: type[Link], seconds: float) -> float:
    """Share of a core, in percent, that a process takes while nothing comes for it to receive."""
    link = kind(64, 16)
    wait = link.waiter()
    wait(0.01)  # past whatever it does at first
    cpu, wall = time.process_time(), time.perf_counter()
    wait(seconds)
    share = 100 * (time.process_time() - cpu) / (time.perf_counter() - wall)
    link.close()
    return share
