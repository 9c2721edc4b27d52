"""How much more than it asks for does a transaction hold, and what does it cost, beside malloc?

Transactions of 10 KB, 500 KB and 5 MB in blocks of three kinds: rows of 256, 512 or 1024 bytes;
small objects of lognormal size (median 200 bytes, sigma 0.8); arrays of 1 to 16 KB. The overhead is
what is held over what was asked for, less one: for a transaction the bytes of its chunks, used or
not; for malloc what `mallinfo2` counts as in use, headers included, in a process of its own without
a cache of freed blocks. Every block stays alive to the end. The mean over the seeds.

Times are those of begin, all blocks and rollback, beside making and dropping as many arrays of
NumPy's own on glibc, in turns; and of the rollback alone, with every block alive. Making the blocks
has emptied the caches, so the control, in every other round, is the rollback of a transaction with
one block in the same state of the caches.
"""

from __future__ import annotations

import argparse
import ctypes
import random
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import harness
from harness import BASELINE, MOIRAI, Goal

QUESTION = __doc__.partition("\n")[0]
NAME = "bench_transactions"

TOTALS = (10_000, 500_000, 5_000_000)
# The overhead that the design claims for each total.
CLAIMS = {10_000: 0.20, 500_000: 0.05, 5_000_000: 0.03}
KINDS = {
    "rows": "rows, 256 to 1024 B",
    "objects": "small objects, median 200 B",
    "arrays": "arrays, 1 to 16 KB",
}
LABELS = {BASELINE: "malloc", MOIRAI: "Moirai, a transaction"}
# So that what is freed is not counted as in use, and nothing freed before serves the blocks.
EXACT_MALLOC = {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0"}


def draw_sizes(kind: str, total_bytes: int, seed: int) -> list[int]:
    """Sizes of one kind until their sum reaches the total."""
    numbers = random.Random(f"{kind} {total_bytes} {seed}")
    draw: dict[str, Callable[[], int]] = {
        "rows": lambda: numbers.choice((256, 512, 1024)),
        "objects": lambda: max(16, int(numbers.lognormvariate(5.3, 0.8))),
        "arrays": lambda: numbers.randrange(1000, 16_000),
    }
    sizes: list[int] = []
    left = total_bytes
    while left > 0:
        sizes.append(min(draw[kind](), max(left, 16)))
        left -= sizes[-1]
    return sizes


# === in the worker ==============================================================================


class MallocInfo(ctypes.Structure):
    """`struct mallinfo2` of glibc."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks",
            "fordblks", "keepcost",
        )
    ]  # fmt: skip


def malloc_overhead(sizes: list[int]) -> float:
    """What malloc has in use for blocks of these sizes, over their sum, less one."""
    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype = MallocInfo
    libc.malloc.restype = ctypes.c_void_p
    libc.malloc.argtypes = [ctypes.c_size_t]

    def in_use() -> int:
        info = libc.mallinfo2()
        return int(info.uordblks) + int(info.hblkhd)

    blocks = [0] * len(sizes)
    before = in_use()
    for index, size in enumerate(sizes):
        blocks[index] = libc.malloc(size)
    return (in_use() - before) / sum(sizes) - 1


def answer(request: Mapping[str, Any]) -> float:
    """One transaction's worth of malloc."""
    return malloc_overhead(draw_sizes(request["kind"], request["total"], request["seed"]))


# === in the driver ==============================================================================


def transaction_overhead(sizes: list[int]) -> float:
    """The same for a transaction."""
    from moirai import memory

    arenas = memory.TransactionArenas()
    asked_bytes = sum(sizes)
    with arenas.begin("t", asked_bytes) as transaction:
        kept = [transaction.allocate(size) for size in sizes]
        held_bytes = transaction.held_bytes
    del kept
    return held_bytes / asked_bytes - 1


def measure_overheads(chosen: Mapping[str, Any], totals: list[int], seeds: int) -> dict[str, Any]:
    """Overheads by total, kind and way; one for each seed."""
    found: dict[str, Any] = {}
    for total in totals:
        for kind in KINDS:
            harness.progress(f"{total} bytes, {kind}")
            samples: dict[str, list[float]] = defaultdict(list)
            for seed in range(seeds):
                request = {"kind": kind, "total": total, "seed": seed}
                if BASELINE in chosen:
                    # A process for each, so that nothing freed before serves the blocks.
                    exact = harness.Configuration(BASELINE, "malloc", EXACT_MALLOC)
                    with harness.workers({BASELINE: exact}, __file__) as pool:
                        samples[BASELINE].append(pool[BASELINE].ask(request))
                if MOIRAI in chosen:
                    samples[MOIRAI].append(transaction_overhead(draw_sizes(kind, total, seed)))
            found[f"{total} {kind}"] = samples
    return found


def time_transaction(
    arenas: Any, sizes: list[int], name: int, *, control: bool
) -> tuple[float, float]:
    """Microseconds of a whole transaction, and of the first rollback after its blocks were made.

    The control rolls another transaction, of one block, back before it.
    """
    clock = time.perf_counter_ns
    single = arenas.begin("single", 64)
    other = single.array(1)
    start = clock()
    transaction = arenas.begin(name, sum(sizes))
    make = transaction.array
    kept = [make(size, "u1") for size in sizes]
    first, second = (single, transaction) if control else (transaction, single)
    before = clock()
    first.rollback()
    after = clock()
    second.rollback()
    kept.clear()
    end = clock()
    del other
    return (end - start) / 1000, (after - before) / 1000


def time_arrays(sizes: list[int]) -> float:
    """Microseconds of as many arrays of NumPy's own."""
    import numpy as np

    start = time.perf_counter_ns()
    kept = [np.empty(size, "u1") for size in sizes]
    kept.clear()
    return (time.perf_counter_ns() - start) / 1000


def measure_times(totals: list[int], rounds: int) -> dict[str, Any]:
    """Microseconds by total: whole transactions, NumPy's arrays, rollbacks."""
    from moirai import memory

    arenas = memory.TransactionArenas(record_every=0)
    found: dict[str, Any] = {}
    for total in totals:
        harness.progress(f"times at {total} bytes")
        sizes = draw_sizes("rows", total, 0)
        samples: dict[str, list[float]] = defaultdict(list)
        for round_index, name in harness.interleaved((BASELINE, MOIRAI), rounds):
            if name == BASELINE:
                samples[BASELINE].append(time_arrays(sizes))
            else:
                # Two rounds each: the order of the ways alternates too.
                control = round_index % 4 >= 2
                whole, first = time_transaction(arenas, sizes, round_index, control=control)
                samples[MOIRAI].append(whole)
                samples["control" if control else "rollback"].append(first)
        found[str(total)] = {"block_count": len(sizes), "samples": samples}
    return found


def mean(values: list[float]) -> float:
    """Mean of at least one value."""
    return sum(values) / len(values)


def bytes_label(total: int) -> str:
    """10 KB, 5 MB."""
    return f"{total // 1_000_000} MB" if total >= 1_000_000 else f"{total // 1000} KB"


def render(summary: Mapping[str, Any]) -> str:
    """The tables, as Markdown."""
    overheads, times = summary["overheads"], summary["times"]
    totals = sorted({int(key.split()[0]) for key in overheads})
    ways = list(next(iter(overheads.values())))
    rows = [
        [
            f"{KINDS[kind]}: {LABELS[way]}",
            *(f"{mean(overheads[f'{total} {kind}'][way]):+.1%}" for total in totals),
        ]
        for kind in KINDS
        for way in ways
    ]
    parts = [
        "**Held over asked for**, all blocks alive",
        harness.markdown_table(["", *map(bytes_label, totals)], rows),
    ]
    rows = [
        [
            bytes_label(int(total)),
            f"{found['block_count']:,}",
            f"{harness.median(found['samples'][BASELINE]):.3g}",
            f"{harness.median(found['samples'][MOIRAI]):.3g}",
            f"{median_ratio(found['samples']):.2f}",
            f"{harness.median(found['samples']['rollback']):.2f}",
            f"{harness.median(found['samples']['control']):.2f}",
        ]
        for total, found in times.items()
    ]
    header = ["", "blocks", "NumPy's arrays, µs", "a transaction, µs", "ratio", "its rollback, µs"]
    header.append("control, µs")
    parts += [
        "**Begin, all blocks as arrays, rollback, all dropped** (rows), beside `np.empty` on glibc",
        harness.markdown_table(header, rows),
    ]
    return "\n\n".join(parts)


def median_ratio(samples: Mapping[str, list[float]]) -> float:
    """A transaction's time over NumPy's in the same round."""
    both = {name: samples[name] for name in (BASELINE, MOIRAI)}
    return harness.median(harness.round_ratios(both)[MOIRAI])


def goals(summary: Mapping[str, Any]) -> list[Goal]:
    """What the design claims; empty without a row of Moirai's."""
    found = []
    for key, samples in summary["overheads"].items():
        if MOIRAI in samples:
            total, kind = key.split()
            text = f"overhead at {bytes_label(int(total))}, {KINDS[kind]}"
            found.append(Goal(text, mean(samples[MOIRAI]), CLAIMS[int(total)]))
    for total, times in summary["times"].items():
        text = f"rollback of {bytes_label(int(total))}, µs"
        rollback = harness.median(times["samples"]["rollback"])
        found.append(Goal(text, rollback, 1))
        control = harness.median(times["samples"]["control"])
        text = f"rollback of {bytes_label(int(total))}, over one of a single block"
        found.append(Goal(text, rollback / control, 1.2))
    return found


def measure(arguments: argparse.Namespace) -> harness.Report:
    """Overheads in processes of their own, times in this one."""
    known = {name: harness.Configuration(name, label) for name, label in LABELS.items()}
    chosen = harness.select_configurations(known, arguments.configurations)
    totals = list(TOTALS[:1] if arguments.quick else TOTALS)
    document = {
        "overheads": measure_overheads(chosen, totals, arguments.seeds),
        "times": measure_times(totals, arguments.rounds),
    }
    parameters = {
        "seeds": arguments.seeds,
        "rounds": arguments.rounds,
        "quick": arguments.quick,
        "labels": LABELS,
    }
    return harness.Report(NAME, QUESTION, parameters, document, render(document), goals(document))


def main() -> int:
    parser = harness.argument_parser(QUESTION)
    parser.add_argument("--seeds", type=int, help="transactions of each kind (7; 2 when quick)")
    parser.add_argument("--rounds", type=int, help="rounds of the times (81; 4 when quick)")
    arguments = parser.parse_args()
    if arguments.worker is not None:
        harness.serve(answer)
        return 0
    arguments.seeds = arguments.seeds or (2 if arguments.quick else 7)
    arguments.rounds = arguments.rounds or (4 if arguments.quick else 81)
    harness.publish(measure(arguments), arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
