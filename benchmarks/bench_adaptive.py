"""Does an adaptive resource keep up with the best fixed strategy, whatever the program turns to?

A program goes through phases: small temporaries; large temporaries; arrays that stay; bursts of
arrays after pauses. Sources take turns, a whole run of all phases each, in one process: every fixed
strategy, and the adaptive resource, which has to find each phase out. An operation's time is the
thread's CPU time over chunks of operations; the chunks of the first 100 ms of a phase count apart,
since that is how long a switch may take. When it switched is what `explain` says.

A phase's figure is the lower quartile over the runs of the median over its chunks: on a shared
machine a core may be half as fast for whole phases, which hits one source and spares the next.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import harness
from harness import Goal

QUESTION = __doc__.partition("\n")[0]
NAME = "bench_adaptive"

KIB, MIB = 1 << 10, 1 << 20
SWITCH_SECONDS = 0.1
BASELINE, ADAPTIVE, COUNTERFACTUAL = "numpy", "adaptive", "counterfactual"


# --- phases -------------------------------------------------------------------------------------


def small_temporaries(keep: list[Any]) -> Iterator[int]:
    """np.add(np.multiply(a, b), c) of 512 doubles."""
    import numpy as np

    a, b, c = (np.full(512, 1.5) for _ in range(3))
    while True:
        for _ in range(200):
            np.add(np.multiply(a, b), c)
        yield 200


def large_temporaries(keep: list[Any]) -> Iterator[int]:
    """np.add(np.multiply(a, b), c) of 1 MiB each."""
    import numpy as np

    a, b, c = (np.full(MIB // 8, 1.5) for _ in range(3))
    while True:
        for _ in range(4):
            np.add(np.multiply(a, b), c)
        yield 4


def stay(keep: list[Any]) -> Iterator[int]:
    """Arrays of 24 KiB that are filled and stay until the phase ends."""
    import numpy as np

    while True:
        for _ in range(20):
            keep.append(np.full(3 * KIB, 1.5))
        yield 20


def bursts(keep: list[Any]) -> Iterator[int]:
    """32 arrays of 256 KiB, alive together, then a pause of 20 ms."""
    import numpy as np

    while True:
        held = [np.full(32 * KIB, 1.5) for _ in range(32)]
        held.clear()
        yield 32
        time.sleep(0.02)


# The largest size of the class that each phase is about.
CLASS_BYTES = {
    "small temporaries": 4 * KIB,
    "large temporaries": MIB,
    "arrays that stay": 32 * KIB,
    "bursts after pauses": 256 * KIB,
    "small again": 4 * KIB,
}
PHASES: dict[str, Callable[[list[Any]], Iterator[int]]] = {
    "small temporaries": small_temporaries,
    "large temporaries": large_temporaries,
    "arrays that stay": stay,
    "bursts after pauses": bursts,
    "small again": small_temporaries,
}


# --- sources ------------------------------------------------------------------------------------


@dataclass
class Source:
    """One resource, and what was measured with it: nanoseconds of an operation, by phase."""

    label: str
    make: Callable[[], Any]
    early: dict[str, list[float]] = field(default_factory=dict)
    late: dict[str, list[float]] = field(default_factory=dict)
    switches: dict[str, list[float]] = field(default_factory=dict)
    decisions: dict[str, list[str]] = field(default_factory=dict)


def sources() -> dict[str, Source]:
    """The strategies that an adaptive resource has, each for everything; then itself."""
    from moirai import memory

    return {
        BASELINE: Source("NumPy on glibc", lambda: None),
        "pool": Source("Moirai, `PoolResource`", memory.PoolResource),
        "warm": Source(
            "Moirai, `PoolResource`, keeps for 10 s",
            lambda: memory.PoolResource(decay_seconds=10),
        ),
        "system": Source("Moirai, `SystemResource`", memory.SystemResource),
        ADAPTIVE: Source("Moirai, `AdaptiveResource`", memory.AdaptiveResource),
        COUNTERFACTUAL: Source(
            "Moirai, `AdaptiveResource`, counterfactual",
            lambda: memory.AdaptiveResource(counterfactual=True),
        ),
    }


def run(source: Source, seconds: float) -> None:
    """One run of all phases on a fresh resource."""
    from moirai import memory

    resource = source.make()
    clock = time.thread_time_ns
    for phase, work in PHASES.items():
        known = resource.explain().decision_count if hasattr(resource, "explain") else 0
        keep: list[Any] = []
        early, late = [], []
        with memory.use(resource) if resource else contextlib.nullcontext():
            start = time.monotonic()
            chunks = work(keep)
            # On a busy machine a phase may be over before it ran: each part is measured once.
            while (elapsed := time.monotonic() - start) < seconds or not late:
                part = early if elapsed < SWITCH_SECONDS or not early else late
                before = clock()
                count = next(chunks)
                # A pause costs no CPU time.
                part.append((clock() - before) / count)
            del keep[:]
        source.early.setdefault(phase, []).append(statistics.median(early))
        source.late.setdefault(phase, []).append(statistics.median(late))
        if not hasattr(resource, "explain"):
            continue
        explanation = resource.explain()
        fresh = explanation.decision_count - known
        for decision in explanation.decisions[-fresh:] if fresh else []:
            after = decision.time_seconds - start
            if decision.max_bytes == CLASS_BYTES[phase]:
                source.switches.setdefault(phase, []).append(after)
            text = (
                f"{decision.max_bytes} bytes after {after:.3f} s: "
                f"{decision.previous} -> {decision.chosen} ({decision.outcome})"
            )
            source.decisions.setdefault(phase, []).append(text)


def measure_all(found: Mapping[str, Source], arguments: argparse.Namespace) -> None:
    for turn, name in harness.interleaved(found, arguments.rounds):
        harness.progress(f"round {turn}, {name}")
        run(found[name], arguments.seconds)
        gc.collect()


# --- results ------------------------------------------------------------------------------------


def typical(runs: list[float]) -> float:
    """What a run takes on an undisturbed core: see the top of this file."""
    return harness.percentile(runs, 0.25)


def summarise(found: Mapping[str, Source]) -> dict[str, Any]:
    """For each phase and source: its time, and the ratio to that of the best fixed strategy."""
    fixed = [name for name in found if name not in (BASELINE, ADAPTIVE, COUNTERFACTUAL)]
    results: dict[str, Any] = {}
    for phase in PHASES:
        best = min(fixed, key=lambda name: typical(found[name].late[phase]))
        rows: dict[str, Any] = {}
        for name, source in found.items():
            rows[name] = {
                "nanoseconds": typical(source.late[phase]),
                "early_nanoseconds": typical(source.early[phase]),
                "over_best": typical(source.late[phase]) / typical(found[best].late[phase]),
                "runs": source.late[phase],
                "switched_after_seconds": source.switches.get(phase, []),
                "decisions": source.decisions.get(phase, []),
            }
        results[phase] = {"best": best, "rows": rows}
    return results


def render(results: Mapping[str, Any], labels: Mapping[str, str]) -> str:
    header = ["CPU µs an operation after 100 ms (over the best fixed)", *PHASES]
    rows = []
    for name, label in labels.items():
        cells = []
        for phase in PHASES:
            row = results[phase]["rows"][name]
            cells.append(f"{row['nanoseconds'] / 1e3:.2f} ({row['over_best']:.2f})")
        rows.append([label, *cells])
    early = ["of it, in the first 100 ms"]
    for phase in PHASES:
        row = results[phase]["rows"][ADAPTIVE]
        early.append(f"{row['early_nanoseconds'] / 1e3:.2f}")
    rows.append(["`AdaptiveResource`: " + early[0], *early[1:]])
    latest = ["switched after, ms: median, latest"]
    for phase in PHASES:
        times = results[phase]["rows"][ADAPTIVE]["switched_after_seconds"]
        cell = f"{statistics.median(times) * 1e3:.0f}, {max(times) * 1e3:.0f}" if times else "-"
        latest.append(cell)
    rows.append(["`AdaptiveResource`: " + latest[0], *latest[1:]])
    return harness.markdown_table(header, rows)


def goals(results: Mapping[str, Any]) -> list[Goal]:
    found = []
    for phase, row in results.items():
        adaptive = row["rows"][ADAPTIVE]
        text = f"{phase}: adaptive over the best fixed strategy ({row['best']})"
        found.append(Goal(text, adaptive["over_best"], 1.05))
        if adaptive["switched_after_seconds"]:
            latest = max(adaptive["switched_after_seconds"])
            found.append(Goal(f"{phase}: latest switch, ms", latest * 1e3, 100))
    return found


def measure(arguments: argparse.Namespace) -> harness.Report:
    found = sources()
    measure_all(found, arguments)
    results = summarise(found)
    labels = {name: source.label for name, source in found.items()}
    parameters = {
        "rounds": arguments.rounds,
        "phase_seconds": arguments.seconds,
        "quick": arguments.quick,
        "labels": labels,
    }
    return harness.Report(
        NAME, QUESTION, parameters, results, render(results, labels), goals(results)
    )


def main() -> int:
    parser = harness.argument_parser(QUESTION)
    parser.add_argument("--rounds", type=int, help="runs of each source (15; 1 when quick)")
    parser.add_argument("--seconds", type=float, help="length of a phase (0.4; 0.2 when quick)")
    arguments = parser.parse_args()
    arguments.rounds = arguments.rounds or (1 if arguments.quick else 15)
    arguments.seconds = arguments.seconds or (0.2 if arguments.quick else 0.4)
    harness.publish(measure(arguments), arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
