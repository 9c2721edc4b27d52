"""What does a message from one process to another cost, and when is one told that the other died?

Two processes on their own cores; one sends as fast as it can, the other receives. In each round
every subject moves the same messages once, subjects in turn; each pair of processes is new. Peers
that poll take a core each while they wait; Moirai spins for at most 50 us and then sleeps.

- one way: wall time from the first message to the last, a message;
- arrays: each is new, eight bytes of it are written, and it is handed over as it is;
- there and back: one message at a time, 64 bytes; and the same where each is busy for 200 us first,
  so that the other sleeps and has to be woken, beside two futexes that do nothing else;
- silence: the share of a core that a receiver takes while nothing comes;
- death: the sender is killed with SIGKILL while the receiver waits; time until it is told.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

import harness
import shared_channel_ours as ours
import shared_channel_peers as peers
import shared_channel_waits as waits
from forked import LIMIT_SECONDS, end_children, in_child, pinned, unpinned
from harness import Goal
from moirai.channels import SharedChannel
from moirai.errors import Disconnected
from shared_channel_peers import Link

QUESTION = __doc__.partition("\n")[0]
NAME = "bench_shared_channels"

KIB, MIB = 1 << 10, 1 << 20
SIZES = {64: 20_000, 4 * KIB: 10_000, MIB: 200, 16 * MIB: 8}
WARM_UP = 16
BATCH = 256
BUSY_US = waits.BUSY_NS // 1000

ONE_WAY: dict[str, type[Link]] = {
    "mp-queue": peers.Queue,
    "mp-pipe": peers.Pipe,
    "hand-made": peers.HandMade,
    "faster-fifo": peers.FasterFifo,
    "zmq": peers.Zmq,
    "iceoryx2": peers.Iceoryx,
    "iceoryx2-in-place": peers.IceoryxInPlace,
    "subetha": peers.Subetha,
    "hyperq": peers.HyperQ,
    "cloudtoid": peers.Cloudtoid,
    "kickmsg": peers.Kickmsg,
    "kickmsg-in-place": peers.KickmsgInPlace,
    "moirai-queue": ours.MoiraiQueue,
    "moirai-pipe": ours.MoiraiPipe,
    "moirai": ours.Moirai,
    "moirai-copied": ours.MoiraiCopied,
    "moirai-in-place": ours.MoiraiInPlace,
}
BATCHED: dict[str, type[Link]] = {
    "faster-fifo": peers.FasterFifoBatches,
    "subetha": peers.SubethaBatches,
    "moirai": ours.MoiraiBatches,
    "moirai-records": ours.MoiraiRecords,
}
OBJECTS: dict[str, type[Link]] = {
    "mp-queue": peers.Queue,
    "mp-simple-queue": peers.SimpleQueue,
    "mp-pipe": peers.PipeOfObjects,
    "faster-fifo": peers.FasterFifo,
    "zmq": peers.ZmqObjects,
    "moirai-queue": ours.MoiraiQueue,
    "moirai-pipe": ours.MoiraiPipeOfObjects,
    "moirai": ours.MoiraiObjects,
}
ARRAY_SIZES = {64 * KIB: 2000, MIB: 2000, 16 * MIB: 500}
ARRAYS: dict[str, type[Link]] = {
    "mp-queue": peers.QueueOfArrays,
    "by-hand": peers.SharedMemoryByHand,
    "iceoryx2-in-place": peers.IceoryxInPlace,
    "moirai-lent": ours.MoiraiLent,
    "moirai-lent-again": ours.MoiraiLentAgain,
}
THERE_AND_BACK: dict[str, type[Link]] = {
    "mp-queue": peers.Queue,
    "mp-pipe": peers.Pipe,
    "zmq": peers.Zmq,
    "iceoryx2": peers.Iceoryx,
    "moirai-pipe": ours.MoiraiPipe,
    "moirai": ours.Moirai,
    "moirai-in-place": ours.MoiraiInPlace,
}
PARKED: dict[str, type[Link]] = {
    "mp-queue": peers.Queue,
    "mp-pipe": peers.Pipe,
    "faster-fifo": peers.FasterFifo,
    "zmq": peers.Zmq,
    "cloudtoid": peers.Cloudtoid,
    "kickmsg": peers.Kickmsg,
    "moirai-pipe": ours.MoiraiPipe,
    "moirai": ours.Moirai,
    "moirai-in-place": ours.MoiraiInPlace,
}
SILENT: dict[str, type[Link]] = {
    "mp-queue": peers.Queue,
    "mp-pipe": peers.Pipe,
    "faster-fifo": peers.FasterFifo,
    "zmq": peers.Zmq,
    "iceoryx2": peers.Iceoryx,
    "cloudtoid": peers.Cloudtoid,
    "kickmsg": peers.Kickmsg,
    "moirai": ours.Moirai,
}


def is_ours(name: str) -> bool:
    """Whether a row is Moirai's."""
    return name.startswith("moirai")


# === measuring ==================================================================================


def one_way(kind: type[Link], size: int, items: Sequence[Any], per_call: int) -> float:
    """Microseconds a message, of `per_call` in each item."""
    count = len(items) * per_call
    early = items[: min(len(items), WARM_UP)]
    link = kind(size, count + len(early) * per_call)
    go, ready = os.pipe(), os.pipe()

    def child() -> None:
        pinned(1)
        os.read(go[0], 1)
        send = link.sender()
        os.write(ready[1], b"x")
        for item in early:
            send(item)
        os.read(go[0], 1)
        for item in items:
            send(item)
        os.read(go[0], 1)
        link.close()

    process = in_child(child)
    receive = link.receiver()
    os.write(go[1], b"1")
    os.read(ready[0], 1)

    def drain(wanted: int) -> None:
        received = 0
        while received < wanted:
            found = receive()
            received += 1 if per_call == 1 else len(found)

    drain(len(early) * per_call)
    started = time.perf_counter_ns()
    os.write(go[1], b"2")
    drain(count)
    elapsed = time.perf_counter_ns() - started
    os.write(go[1], b"3")
    os.waitpid(process, 0)
    link.close()
    for fd in (*go, *ready):
        os.close(fd)
    return elapsed / count / 1e3


def there_and_back(kind: type[Link], rounds: int) -> float:
    """Microseconds for 64 bytes to go and come back."""
    request, reply = kind(64, rounds + 1), kind(64, rounds + 1)
    go, ready = os.pipe(), os.pipe()
    data = bytes(64)

    def child() -> None:
        pinned(1)
        receive = request.receiver()
        os.write(ready[1], b"x")
        os.read(go[0], 1)
        send = reply.sender()
        os.write(ready[1], b"x")
        for _ in range(rounds + 1):
            receive()
            send(data)
        os.read(go[0], 1)

    process = in_child(child)
    os.read(ready[0], 1)
    receive = reply.receiver()
    os.write(go[1], b"1")
    os.read(ready[0], 1)
    send = request.sender()
    send(data)
    receive()
    started = time.perf_counter_ns()
    for _ in range(rounds):
        send(data)
        receive()
    elapsed = time.perf_counter_ns() - started
    os.write(go[1], b"2")
    os.waitpid(process, 0)
    request.close()
    reply.close()
    for fd in (*go, *ready):
        os.close(fd)
    return elapsed / rounds / 1e3


def copy(size: int, count: int) -> float:
    """Microseconds to copy a message into the same place of this process, again and again."""
    source, place = np.ones(size, np.uint8), np.zeros(size, np.uint8)
    started = time.perf_counter_ns()
    for _ in range(count):
        np.copyto(place, source)
    return (time.perf_counter_ns() - started) / count / 1e3


def told_after() -> float:
    """Milliseconds from the death of the only sender to the exception of the waiting receiver."""
    ready = os.pipe()
    with SharedChannel.create(capacity_bytes=MIB) as channel:

        def child() -> None:
            sender = channel.sender()
            sender.send_bytes(b"here")
            os.write(ready[1], b"x")
            signal.pause()

        process = in_child(child)
        receiver = channel.receiver()
        receiver.receive_bytes(30)
        os.read(ready[0], 1)
        # A process of its own kills, so that this one is in its wait by then.
        killed = os.pipe()

        def killer() -> None:
            time.sleep(0.06)
            os.kill(process, signal.SIGKILL)
            os.write(killed[1], str(time.monotonic_ns()).encode())

        other = in_child(killer)
        try:
            receiver.receive_bytes(30)
        except Disconnected:
            told = time.monotonic_ns()
        at = int(os.read(killed[0], 40))
        os.waitpid(other, 0)
        os.waitpid(process, 0)
    for fd in (*ready, *killed):
        os.close(fd)
    return max(0.0, (told - at) / 1e6)


def _too_long(signum: int, frame: Any) -> None:
    raise TimeoutError(f"took longer than {LIMIT_SECONDS} s")


class LeftOut(dict[str, str]):
    """Why a peer has no number, by its label."""

    def note(self, kind: type[Link], where: str, error: BaseException) -> None:
        reason = " ".join(str(error).split())[:120]
        text = f"{where}: {type(error).__name__}{': ' if reason else ''}{reason}"
        self[kind.label] = text
        harness.progress(f"{kind.label}, {text}")


def table(
    subjects: Mapping[str, type[Link]],
    rounds: int,
    run: Callable[[type[Link]], float],
    left_out: LeftOut,
    where: str,
) -> dict[str, list[float]]:
    """Samples by subject, interleaved; a subject that fails is left out, and said so."""
    found: dict[str, list[float]] = defaultdict(list)
    failed: set[str] = set()
    for _, name in harness.interleaved(subjects, rounds):
        if name in failed:
            continue
        try:
            signal.signal(signal.SIGALRM, _too_long)
            signal.alarm(LIMIT_SECONDS)
            try:
                found[name].append(run(subjects[name]))
            finally:
                signal.alarm(0)
                end_children()
        except Exception as error:
            if is_ours(name):
                raise
            failed.add(name)
            found.pop(name, None)
            left_out.note(subjects[name], where, error)
    return dict(found)


# === report =====================================================================================


def middle(column: Mapping[str, Sequence[float]], name: str) -> float:
    """Median of a row; NaN if it is not there."""
    return harness.median(column.get(name, []))


def best(column: Mapping[str, Sequence[float]], *, without: str = " ") -> float:
    """The fastest peer's median."""
    values = [
        statistics.median(v) for k, v in column.items() if not is_ours(k) and without not in k
    ]
    return min(values, default=float("nan"))


def cell(value: float) -> str:
    """A number with what digits it deserves."""
    if value != value:
        return ""
    return f"{value:.2f}" if value < 10 else f"{value:,.0f}"


def rows(
    subjects: Mapping[str, type[Link]], columns: Sequence[Mapping[str, Sequence[float]]]
) -> list[list[str]]:
    """A line for each subject that has a number."""
    return [
        [kind.label, *(cell(middle(column, name)) for column in columns)]
        for name, kind in subjects.items()
        if any(name in column for column in columns)
    ]


def render(results: Mapping[str, Any]) -> str:
    """The tables, as Markdown."""
    sizes = [harness.size_label(int(size)) for size in results["one_way"]]
    floor = [
        "np.copyto within one process",
        *(cell(harness.median(v)) for v in results["copy"].values()),
    ]
    back = rows(THERE_AND_BACK, [results["there_and_back"]])
    parked = rows(PARKED, [results["parked"]])
    parked.append(["two futexes, nothing else", cell(harness.median(results["futex"]))])
    left_out = [f"{label} ({why})" for label, why in results["left_out"].items()]
    told = results["told_ms"]
    return "\n\n".join(
        [
            "**One way: us a message** (one message a call)",
            harness.markdown_table(
                ["", *sizes], [*rows(ONE_WAY, list(results["one_way"].values())), floor]
            ),
            "**64 B in batches: us a message**",
            harness.markdown_table(["", "us"], rows(BATCHED, [results["batched"]])),
            "**Objects: us a message**",
            harness.markdown_table(
                ["", "small dict", "array of 1 MiB"],
                rows(OBJECTS, [results["small_dict"], results["array"]]),
            ),
            "**Arrays, handed over as they are: us a message**",
            harness.markdown_table(
                ["", *(harness.size_label(int(size)) for size in results["arrays"])],
                rows(ARRAYS, list(results["arrays"].values())),
            ),
            "**There and back, 64 B: us**",
            harness.markdown_table(["", "us"], back),
            f"**There and back, both asleep until woken, 64 B: us** (less the {BUSY_US} us that the"
            " other is busy)",
            harness.markdown_table(["", "us"], parked),
            "**Silence: % of a core**",
            harness.markdown_table(["", "%"], rows(SILENT, [results["silence"]])),
            f"**A receiver is told of its sender's death** after {harness.median(told):.0f} ms"
            f" (median of {len(told)}; the longest {max(told):.0f} ms).",
            f"Left out: {'; '.join(left_out) or 'none'}.",
        ]
    )


def digest(results: Mapping[str, Any]) -> str:
    """One table: ours beside `multiprocessing.Queue` and the fastest peer."""
    one_way, usual = results["one_way"], peers.Queue.label
    batched = {"mp-queue": one_way["64"].get("mp-queue", []), **results["batched"]}
    arrays = results["arrays"][str(MIB)]
    rows = [
        ("64 B, one at a time", ONE_WAY, one_way["64"], ours.Moirai),
        ("64 B, in batches of 256", {"mp-queue": peers.Queue, **BATCHED}, batched,
         ours.MoiraiBatches),
        ("64 B, there and back", THERE_AND_BACK, results["there_and_back"], ours.Moirai),
        ("a small dict", OBJECTS, results["small_dict"], ours.MoiraiObjects),
        ("a small dict, through `processes.Queue`", OBJECTS, results["small_dict"],
         ours.MoiraiQueue),
        ("an array of 1 MiB, pickled", OBJECTS, results["array"], ours.MoiraiObjects),
        ("an array of 1 MiB, handed over", ARRAYS, arrays, ours.MoiraiLent),
    ]  # fmt: skip
    return harness.digest(
        [
            harness.Comparison(
                title,
                {kind.label: samples.get(name, []) for name, kind in subjects.items()},
                peers.QueueOfArrays.label if subjects is ARRAYS else usual,
                kind_of_ours.label,
            )
            for title, subjects, samples, kind_of_ours in rows
        ],
        f"time of a message over `{usual}`'s",
    )


def goals(results: Mapping[str, Any]) -> list[Goal]:
    """The project's goals."""
    columns = {int(size): column for size, column in results["one_way"].items()}
    copied = {int(size): harness.median(v) for size, v in results["copy"].items()}
    small, large, huge = columns[64], columns[MIB], columns[16 * MIB]
    batched, back = results["batched"], results["there_and_back"]
    small_dict, array = results["small_dict"], results["array"]
    in_place, view = middle(large, "moirai-in-place"), middle(large, "moirai-copied")

    other = middle(large, "iceoryx2-in-place")
    lent = {int(size): column for size, column in results["arrays"].items()}
    lent_huge = middle(lent[16 * MIB], "moirai-lent")

    def over(text: str, column: Mapping[str, Sequence[float]], peer: str, times: float) -> Goal:
        return Goal(text, middle(column, "moirai") / middle(column, peer), 1 / times)

    any_length = middle(small, "moirai") / best(small, without="subetha")
    return [
        Goal("64 B, us", middle(small, "moirai"), 0.5),
        over("64 B over subetha-ipc", small, "subetha", 1.5),
        Goal("64 B over the best peer of any length", any_length, 1 / 3),
        over("64 B in batches over subetha-ipc", batched, "subetha", 1.8),
        Goal("1 MiB in place, us", in_place, 1.5),
        Goal("16 MiB in place over 1 MiB", middle(huge, "moirai-in-place") / in_place, 1.5),
        Goal("1 MiB in place over iceoryx2", in_place / other, 1 / 2.5),
        Goal("1 MiB in place over mp.Queue", in_place / middle(large, "mp-queue"), 1 / 2000),
        Goal("1 MiB copied in over np.copyto", view / copied[MIB], 1 / 0.9),
        Goal("1 MiB copied in over iceoryx2", view / middle(large, "iceoryx2"), 1 / 1.3),
        over("small dict over Pipe", small_dict, "mp-pipe", 3),
        Goal(
            "small dict, processes.Queue over mp.Queue",
            middle(small_dict, "moirai-queue") / middle(small_dict, "mp-queue"),
            1.0,
        ),
        over("array of 1 MiB over mp.Queue", array, "mp-queue", 30),
        over("array of 1 MiB over zmq", array, "zmq", 2),
        Goal("1 MiB lent, us", middle(lent[MIB], "moirai-lent"), 1.5),
        Goal("16 MiB lent over 1 MiB", lent_huge / middle(lent[MIB], "moirai-lent"), 1.5),
        Goal("there and back, spinning, us", middle(back, "moirai"), 3.0),
        Goal("there and back with views, us", middle(back, "moirai-in-place"), 4.0),
        over("there and back over Pipe", back, "mp-pipe", 1.0),
        Goal(
            "there and back, processes.Pipe over Pipe",
            middle(back, "moirai-pipe") / middle(back, "mp-pipe"),
            1.0,
        ),
        Goal(
            "there and back, woken, over two futexes",
            middle(results["parked"], "moirai") / harness.median(results["futex"]),
            1.3,
        ),
        over("there and back, woken, over Pipe", results["parked"], "mp-pipe", 1.0),
        Goal("silence, % of a core", middle(results["silence"], "moirai"), 0.1),
        Goal("told of a death, longest, ms", max(results["told_ms"]), 100.0),
    ]


def measure(arguments: argparse.Namespace) -> harness.Report:
    """All tables."""
    pinned(0)
    rounds = arguments.rounds
    share = 50 if arguments.quick else 1
    names = arguments.configurations
    results: dict[str, Any] = {"one_way": {}, "copy": {}}
    left_out = LeftOut()

    def chosen(subjects: Mapping[str, type[Link]]) -> dict[str, type[Link]]:
        return {k: v for k, v in subjects.items() if names is None or k in names or is_ours(k)}

    def compared(
        where: str, subjects: Mapping[str, type[Link]], run: Callable[[type[Link]], float]
    ) -> dict[str, list[float]]:
        harness.progress(where)
        return table(chosen(subjects), rounds, run, left_out, where)

    for size, most in SIZES.items():
        count = max(4, most // share)
        items = [bytes(size)] * count
        results["one_way"][str(size)] = compared(
            f"one way, {harness.size_label(size)}",
            {k: v for k, v in ONE_WAY.items() if size <= v.max_bytes},
            lambda kind, size=size, items=items: one_way(kind, size, items, 1),
        )
        results["copy"][str(size)] = [copy(size, count) for _ in range(rounds)]
    batches = [[bytes(64)] * BATCH] * max(2, 400 // share)
    results["batched"] = compared(
        "batches", BATCHED, lambda kind: one_way(kind, 64, batches, BATCH)
    )
    small = [{"id": 7, "name": "frame", "shape": (480, 640)}] * max(4, 10_000 // share)
    arrays = [{"id": 7, "data": np.ones(MIB, np.uint8)}] * max(4, 60 // share)
    for name, items in (("small_dict", small), ("array", arrays)):
        results[name] = compared(
            f"objects, {name}", OBJECTS, lambda kind, items=items: one_way(kind, MIB, items, 1)
        )
    results["arrays"] = {}
    for size, most in ARRAY_SIZES.items():
        few = max(4, most // share)

        def hand_over(kind: type[Link], size: int = size, few: int = few) -> float:
            count = few // 20 if kind is peers.QueueOfArrays else few
            return one_way(kind, size, [b""] * max(4, count), 1)

        results["arrays"][str(size)] = compared(
            f"arrays, {harness.size_label(size)}", ARRAYS, hand_over
        )
    turns = max(20, 3000 // share)
    results["there_and_back"] = compared(
        "there and back", THERE_AND_BACK, lambda kind: there_and_back(kind, turns)
    )

    naps = max(10, turns // 6)
    results["parked"] = compared("woken", PARKED, lambda kind: waits.parked(kind, naps))
    results["futex"] = [waits.parked_futexes(naps) for _ in range(rounds)]
    results["silence"] = compared(
        "silence", SILENT, lambda kind: waits.silence(kind, 0.05 if arguments.quick else 1.0)
    )
    results["left_out"] = dict(left_out)
    harness.progress("deaths")
    results["told_ms"] = [told_after() for _ in range(2 if arguments.quick else 20)]
    unpinned()
    parameters = {"rounds": rounds, "sizes": SIZES, "batch": BATCH, "quick": arguments.quick}
    return harness.Report(
        NAME, QUESTION, parameters, results, render(results), goals(results), digest(results)
    )


if __name__ == "__main__":
    sys.exit(harness.main_of_rounds(QUESTION, measure, 5, 1))
