"""How much memory stays resident for the arrays that live, while their sizes change over time?

256 MiB of arrays live, of lognormal sizes (sigma 0.7) whose median goes through six phases: 1 KiB,
8 KiB, 32 KiB, 128 KiB, 512 KiB, 2 MiB. A phase fills to the target while the survivors of the phase
before are freed in proportion, then replaces arrays at random until three times the target has been
allocated anew, then frees at random down to an eighth, then idles 1.1 s. At the end everything is
freed. Every array is `np.empty`, then filled. Each seed of each configuration is its own process.

RSS is counted from a baseline taken when all bookkeeping exists: the lists and one
array object for each slot. A free slot holds an empty view, not nothing, so that the number of
array objects never changes and only their data is in the figures.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import sys
import time
from array import array
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import harness
from harness import MOIRAI, Goal

QUESTION = __doc__.partition("\n")[0]
NAME = "bench_fragmentation"

KIB, MIB = 1 << 10, 1 << 20
MEDIANS = (KIB, 8 * KIB, 32 * KIB, 128 * KIB, 512 * KIB, 2 * MIB)
REPORTED_ALONE = 128 * KIB
SIGMA = 0.7
CHURN = 3
SHRINK_TO = 8
IDLE_SECONDS = 1.1


# === in the worker ==============================================================================


class Churn:
    """Live arrays in slots 0 to live_count - 1, empty views in the others.

    While a phase fills, the first survivor_count slots hold arrays of the phase before.
    """

    def __init__(self, seed: int, live_bytes: int, medians: Sequence[int]) -> None:
        import numpy as np

        self._numpy = np
        self._target = live_bytes
        self._random = random.Random(seed)
        self._medians = medians
        slot_count = int(max(_mean_count(median, live_bytes) for median in medians) * 1.2) + 1000
        self._nothing = np.zeros(1, np.uint8)
        self._slots = [self._nothing[:0] for _ in range(slot_count)]
        self._slot_bytes = array("q", bytes(8 * slot_count))
        self._logarithm = 0.0
        self._live_count = 0
        self._live_bytes = 0
        self._statm = os.open("/proc/self/statm", os.O_RDONLY)
        self._page_bytes = os.sysconf("SC_PAGESIZE")
        self._baseline = self._resident_bytes()

    def run(self) -> dict[str, Any]:
        """All phases: bytes above the baseline and bytes live at each point."""
        phases = []
        for median in self._medians:
            self._logarithm = math.log(median)
            self._fill()
            self._churn()
            end = self._point()
            self._shrink(self._target // SHRINK_TO)
            shrunk = self._point()
            time.sleep(IDLE_SECONDS)
            phases.append({"end": end, "shrunk": shrunk, "idle": self._point()})
        self._shrink(0)
        freed = self._point()
        time.sleep(IDLE_SECONDS)
        return {"phases": phases, "freed": freed, "freed_idle": self._point()}

    def _resident_bytes(self) -> int:
        return int(os.pread(self._statm, 128, 0).split()[1]) * self._page_bytes

    def _point(self) -> dict[str, int]:
        above = self._resident_bytes() - self._baseline
        return {"above_bytes": above, "live_bytes": self._live_bytes}

    def _fill(self) -> None:
        """Allocate up to the target while the survivors are freed in proportion."""
        survivor_count, survivor_bytes = self._live_count, self._live_bytes
        initial_bytes, new_bytes = survivor_bytes, 0
        while new_bytes < self._target:
            new_bytes += self._allocate()
            share_left = 1 - min(1.0, new_bytes / self._target)
            while survivor_count and survivor_bytes > initial_bytes * share_left:
                slot = self._random.randrange(survivor_count)
                survivor_count -= 1
                survivor_bytes -= self._slot_bytes[slot]
                self._move(survivor_count, slot)
                self._free(survivor_count)

    def _churn(self) -> None:
        """Replace arrays at random until CHURN times the target has been allocated."""
        allocated_bytes = 0
        while allocated_bytes < CHURN * self._target:
            self._free(self._random.randrange(self._live_count))
            while self._live_bytes < self._target:
                allocated_bytes += self._allocate()

    def _shrink(self, target_bytes: int) -> None:
        """Free arrays at random down to the target."""
        while self._live_bytes > target_bytes:
            self._free(self._random.randrange(self._live_count))

    def _allocate(self) -> int:
        # Drawn one by one: arrays of sizes would leave freed memory in the baseline.
        size_bytes = max(16, int(self._random.lognormvariate(self._logarithm, SIGMA)))
        block = self._numpy.empty(size_bytes, self._numpy.uint8)
        block.fill(1)
        self._slots[self._live_count] = block
        self._slot_bytes[self._live_count] = size_bytes
        self._live_count += 1
        self._live_bytes += size_bytes
        return size_bytes

    def _free(self, slot: int) -> None:
        """Free one array; the last live one moves into its slot."""
        self._live_count -= 1
        self._move(self._live_count, slot)
        self._live_bytes -= self._slot_bytes[self._live_count]
        self._slots[self._live_count] = self._nothing[:0]

    def _move(self, source: int, slot: int) -> None:
        """Swap two slots."""
        slots, sizes = self._slots, self._slot_bytes
        slots[source], slots[slot] = slots[slot], slots[source]
        sizes[source], sizes[slot] = sizes[slot], sizes[source]


def _mean_count(median: int, live_bytes: int) -> float:
    return live_bytes / (median * math.exp(SIGMA**2 / 2))


def answer(request: Mapping[str, Any]) -> dict[str, Any]:
    """One whole run: the only question a worker is asked."""
    return Churn(request["seed"], request["live_bytes"], request["medians"]).run()


# === in the driver ==============================================================================


def summarise(run: Mapping[str, Any], medians: Sequence[int]) -> dict[str, float]:
    """The figures of one seed: resident over live by point, bytes left at the end."""
    ratios = {
        point: [phase[point]["above_bytes"] / phase[point]["live_bytes"] for phase in run["phases"]]
        for point in ("end", "shrunk", "idle")
    }
    figures = {
        "end_mean": sum(ratios["end"]) / len(medians),
        "end_worst": max(ratios["end"]),
        "shrunk_mean": sum(ratios["shrunk"]) / len(medians),
        "idle_mean": sum(ratios["idle"]) / len(medians),
        "left_bytes": run["freed"]["above_bytes"],
        "left_idle_bytes": run["freed_idle"]["above_bytes"],
    }
    for index, median in enumerate(medians):
        for point, values in ratios.items():
            figures[f"{point}_{median}"] = values[index]
    return figures


def mean_of_seeds(seeds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean of each figure over the seeds."""
    return {key: sum(seed[key] for seed in seeds) / len(seeds) for key in seeds[0]}


def render(results: Mapping[str, Any], labels: Mapping[str, str], medians: Sequence[int]) -> str:
    """The tables, as Markdown."""
    alone = REPORTED_ALONE
    header = [
        "RSS / live",
        "end of phase, mean / worst",
        "after shrink",
        "+ 1.1 s idle",
        f"{harness.size_label(alone)} phase: end / shrunk + idle",
        "left after freeing all, MB: at once / + 1.1 s",
    ]
    rows = [
        [
            labels[name],
            f"{row['end_mean']:.2f} / {row['end_worst']:.2f}",
            f"{row['shrunk_mean']:.1f}",
            f"{row['idle_mean']:.1f}",
            f"{row[f'end_{alone}']:.2f} / {row[f'idle_{alone}']:.1f}",
            f"{row['left_bytes'] / 1e6:.0f} / {row['left_idle_bytes'] / 1e6:.0f}",
        ]
        for name, row in results.items()
    ]
    phases = [
        [labels[name], *(f"{row[f'end_{m}']:.2f} / {row[f'idle_{m}']:.1f}" for m in medians)]
        for name, row in results.items()
    ]
    return "\n\n".join(
        [
            harness.markdown_table(header, rows),
            "**Phase by phase: end / shrunk + idle**, by the median size",
            harness.markdown_table(["", *map(harness.size_label, medians)], phases),
        ]
    )


def goals(results: Mapping[str, Any]) -> list[Goal]:
    """The project's goals; empty without a Moirai row."""
    if MOIRAI not in results:
        return []
    row = results[MOIRAI]
    return [
        Goal("RSS / live at the end of a phase, mean", row["end_mean"], 1.25),
        Goal("RSS / live after shrink and 1.1 s, mean", row["idle_mean"], 3.0),
        Goal("RSS / live at the end of the 128 KiB phase", row[f"end_{REPORTED_ALONE}"], 1.10),
        Goal("RSS / live, 128 KiB, shrunk and 1.1 s", row[f"idle_{REPORTED_ALONE}"], 1.5),
        Goal("left 1.1 s after freeing all, MB", row["left_idle_bytes"] / 1e6, 16),
    ]


def measure(arguments: argparse.Namespace) -> harness.Report:
    """Run each seed of each configuration in a fresh process, configurations in turn."""
    available = harness.with_jemalloc_background(harness.find_configurations())
    chosen = harness.select_configurations(available, arguments.configurations)
    medians = (KIB, REPORTED_ALONE) if arguments.quick else MEDIANS
    raw: dict[str, list[Any]] = defaultdict(list)
    for seed, name in harness.interleaved(chosen, arguments.seeds):
        harness.progress(f"seed {seed}, {name}")
        request = {"seed": seed, "live_bytes": arguments.live_mib * MIB, "medians": medians}
        with harness.workers({name: chosen[name]}, __file__) as pool:
            raw[name].append(pool[name].ask(request))
    results = {
        name: mean_of_seeds([summarise(run, medians) for run in raw[name]]) for name in chosen
    }
    labels = {name: configuration.label for name, configuration in chosen.items()}
    parameters = {
        "seeds": arguments.seeds,
        "live_mib": arguments.live_mib,
        "medians": list(medians),
        "sigma": SIGMA,
        "churn": CHURN,
        "quick": arguments.quick,
        "labels": labels,
    }
    document = {"summary": results, "runs": dict(raw)}
    return harness.Report(
        NAME, QUESTION, parameters, document, render(results, labels, medians), goals(results)
    )


def main() -> int:
    parser = harness.argument_parser(QUESTION)
    parser.add_argument("--seeds", type=int, help="runs with seeds 0, 1, … (5; 1 when quick)")
    parser.add_argument("--live-mib", type=int, help="MiB that live (256; 8 when quick)")
    arguments = parser.parse_args()
    if arguments.worker is not None:
        harness.enter_handler(arguments.worker)
        harness.serve(answer)
        return 0
    arguments.seeds = arguments.seeds or (1 if arguments.quick else 5)
    arguments.live_mib = arguments.live_mib or (8 if arguments.quick else 256)
    harness.publish(measure(arguments), arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
