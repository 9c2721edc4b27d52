"""What does tuning a slab to the sizes it serves save in memory, and what in time?

A slab that was tuned to the counts of a workload, against an untuned one, glibc, and the system
resource. Each sample is a process of its own, subjects in turn. Arrays of sizes drawn from the
counts are made and kept; then random ones are replaced by new ones. Two workloads: awkward sizes
that lie just above a standard class, and the sizes up to 16 KiB of two real programs (scikit-image
and pandas on data from their own wheels), recorded by a counting handler. Lifetimes are random in
both: only the sizes are the programs'.

- held: resident memory that the arrays brought, over the bytes they asked for; NumPy's own object
  for each array is in it, for all subjects alike;
- runs: the slab's runs over the bytes asked for, touched or not;
- replace: CPU time to drop an array and make another;
- burst: CPU time to make and drop an array, 100 made and then dropped together;
- preset: what the first blocks cost with and without one, and what making the slab costs.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import contextlib
import ctypes
import multiprocessing
import random
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

import harness
from harness import BASELINE, MOIRAI, Goal
from moirai import memory

QUESTION = __doc__.partition("\n")[0]
NAME = "bench_slab_tuning"

KIB = 1 << 10
LARGEST = 16 * KIB
SEED = 7
BURST = 100
PRESET = ("rows", "index_nodes")

SUBJECTS = {
    BASELINE: "glibc (NumPy's own)",
    "system": "Moirai, `SystemResource`",
    "slab": "Moirai, `SlabResource`, untuned",
    MOIRAI: "Moirai, `SlabResource`, tuned",
}
AWKWARD = {1088: 40, 2112: 30, 4672: 20, 5056: 10, 9024: 10, 13_056: 5}

Counts = Mapping[int, int]


class Recorded:
    """Counts as `tune` takes them."""

    def __init__(self, counts: Counts) -> None:
        self.counts = counts

    def sizes(self) -> list[tuple[int, int]]:
        return list(self.counts.items())


# === what real programs ask for =================================================================


def recorded(program: Callable[[], object]) -> dict[int, int]:
    """Requests of NumPy by size while `program` runs, up to 16 KiB."""
    import numpy_allocator

    libc = ctypes.CDLL(None)
    for name, arguments in (
        ("malloc", [ctypes.c_size_t]),
        ("calloc", [ctypes.c_size_t, ctypes.c_size_t]),
        ("realloc", [ctypes.c_void_p, ctypes.c_size_t]),
    ):
        getattr(libc, name).argtypes = arguments
        getattr(libc, name).restype = ctypes.c_void_p
    found: collections.Counter[int] = collections.Counter()

    def malloc(size: int) -> Any:
        found[size] += 1
        return libc.malloc(size)

    def calloc(count: int, size: int) -> Any:
        found[count * size] += 1
        return libc.calloc(count, size)

    def realloc(address: int | None, size: int) -> Any:
        found[size] += 1
        return libc.realloc(address, size)

    size_t, pointer = ctypes.c_size_t, ctypes.c_void_p
    functions = {
        "_malloc_": ctypes.CFUNCTYPE(pointer, size_t)(malloc),
        "_calloc_": ctypes.CFUNCTYPE(pointer, size_t, size_t)(calloc),
        "_realloc_": ctypes.CFUNCTYPE(pointer, pointer, size_t)(realloc),
    }
    fields = {name: ctypes.addressof(function) for name, function in functions.items()}
    with numpy_allocator.type("recorder", (), fields):
        program()
    return {size: count for size, count in sorted(found.items()) if 0 < size <= LARGEST}


def image_program() -> None:
    """Segment a photograph of coins, and measure each segment."""
    from skimage import data, filters, measure, segmentation

    image = data.coins()
    labels = segmentation.slic(image, n_segments=300, channel_axis=None)
    for region in measure.regionprops(labels, intensity_image=image):
        smooth = filters.gaussian(region.image_intensity, sigma=1.0)
        smooth[region.image].mean()
        np.percentile(smooth, [10, 50, 90])


def table_program() -> None:
    """Group a table of patients by age, and summarise each group."""
    from sklearn import datasets

    table = datasets.load_diabetes(as_frame=True).frame
    for _, group in table.groupby(table["age"].round(2)):
        group.describe()
        group.rolling(3).mean().cumsum()
        group.sort_values("target").corr()


def _record(name: str) -> dict[int, int]:
    return recorded({"image": image_program, "table": table_program}[name])


# === one sample =================================================================================


def _resource(subject: str, counts: Counts) -> memory.Resource | None:
    if subject == BASELINE:
        return None
    if subject == "system":
        return memory.SystemResource()
    slab = memory.SlabResource()
    if subject == MOIRAI:
        slab.tune(Recorded(counts))
    return slab


def _resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        _, resident, shared, *_ = map(int, file.read().split())
    return (resident - shared) * 4096


def sample(subject: str, counts: Counts, live_count: int, turns: int) -> dict[str, float]:
    """What one subject holds and takes; runs in a process of its own."""
    chance = random.Random(SEED)
    sizes = chance.choices(list(counts), list(counts.values()), k=live_count + turns)
    places = [chance.randrange(live_count) for _ in range(turns)]
    resource = _resource(subject, counts)
    with contextlib.nullcontext() if resource is None else memory.use(resource):
        live: list[Any] = [np.empty(0, np.uint8) for _ in range(live_count)]
        before = _resident_bytes()
        for index in range(live_count):
            live[index] = np.empty(sizes[index], np.uint8)
            live[index].fill(1)
        replaced = list(zip(places, sizes[live_count:], strict=True))
        empty, kind = np.empty, np.uint8
        started = time.thread_time_ns()
        for place, size in replaced:
            live[place] = empty(size, kind)
        replace_ns = (time.thread_time_ns() - started) / turns
        for array in live:
            array.fill(1)
        held = _resident_bytes() - before
        asked = sum(array.nbytes for array in live)
        found = {"held": held / asked, "replace_ns": replace_ns}
        if isinstance(resource, memory.SlabResource):
            runs = sum(one.run_count for one in resource.classes())
            found["runs"] = runs * 64 * KIB / asked
        bursts = [sizes[start : start + BURST] for start in range(0, live_count, BURST)]
        started = time.thread_time_ns()
        for burst in bursts:
            together = [empty(size, kind) for size in burst]
            del together
        found["burst_ns"] = (time.thread_time_ns() - started) / live_count
    return found


def first_blocks(preset: bool) -> dict[str, float]:
    """Microseconds to make a slab, and nanoseconds of each first block, written to."""
    sizes = sorted({size for name in PRESET for size in memory.SLAB_PRESETS[name].block_sizes})
    wanted = [size for size in sizes for _ in range(64 * KIB // size)]
    upstream = memory.LargeObjectResource()
    started = time.thread_time_ns()
    slab = memory.SlabResource(upstream, preset=PRESET if preset else ())
    made = time.thread_time_ns()
    live = []
    for size in wanted:
        block = memoryview(slab.allocate(size))
        block[0] = 1
        live.append(block)
    done = time.thread_time_ns()
    return {
        "make_us": (made - started) / 1e3,
        "block_ns": (done - made) / len(wanted),
        "misses": float(slab.statistics().misses),
    }


# === report =====================================================================================

Samples = Mapping[str, Mapping[str, Sequence[float]]]


def _fresh(function: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a function in a new process."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def _collect(
    names: Iterable[str], rounds: int, one: Callable[[str], Mapping[str, float]]
) -> dict[str, dict[str, list[float]]]:
    found: dict[str, dict[str, list[float]]] = {}
    for _, name in harness.interleaved(names, rounds):
        for key, value in one(name).items():
            found.setdefault(name, defaultdict(list))[key].append(value)
    return found


def _cell(samples: Samples, name: str, key: str, digits: int) -> str:
    if key not in samples[name]:
        return ""
    cell = f"{harness.median(samples[name][key]):.{digits}f}"
    if BASELINE in samples and key in samples[BASELINE]:
        ratio = harness.median(samples[name][key]) / harness.median(samples[BASELINE][key])
        cell += f" ({ratio:.2f})"
    return cell


def _summary(lines: Sequence[str]) -> str:
    """What was said of the classes in full, and how many magazines changed."""
    magazines = [line for line in lines if line.startswith("magazines")]
    others = [line for line in lines if line not in magazines]
    return "; ".join([*others, f"{len(magazines)} magazines have another capacity."])


def render(results: Mapping[str, Any]) -> str:
    """The tables, as Markdown."""
    parts = []
    header = ["", "held", "runs", "replace, ns", "burst, ns"]
    for name, workload in results["workloads"].items():
        samples = workload["samples"]
        rows = [
            [
                SUBJECTS[subject],
                _cell(samples, subject, "held", 3),
                _cell(samples, subject, "runs", 3),
                _cell(samples, subject, "replace_ns", 0),
                _cell(samples, subject, "burst_ns", 0),
            ]
            for subject in SUBJECTS
            if subject in samples
        ]
        parts += [
            f"**{name}** (held and runs over the bytes asked for; ratio to glibc in brackets)",
            harness.markdown_table(header, rows),
            "What `tune` said: " + _summary(workload["tuning"]),
        ]
    first = results["preset"]
    rows = [
        [
            label,
            _cell(first, key, "make_us", 0),
            _cell(first, key, "block_ns", 0),
            _cell(first, key, "misses", 0),
        ]
        for key, label in (("plain", "no preset"), ("preset", f"preset={list(PRESET)}"))
    ]
    parts += [
        "**First blocks of a new slab**, CPU time",
        harness.markdown_table(["", "make, us", "each block, ns", "misses"], rows),
    ]
    return "\n\n".join(parts)


def goals(results: Mapping[str, Any]) -> list[Goal]:
    """Tuning must not cost: memory or time over the untuned slab."""
    found = []
    for name, workload in results["workloads"].items():
        samples = workload["samples"]
        if not {MOIRAI, "slab"} <= samples.keys():
            continue
        for key, text in (
            ("held", "memory held"),
            ("replace_ns", "a replacement"),
            ("burst_ns", "a pair in bursts"),
        ):
            pairs = zip(samples[MOIRAI][key], samples["slab"][key], strict=True)
            ratio = harness.median(ours / theirs for ours, theirs in pairs)
            found.append(Goal(f"{name}: {text}, tuned over untuned", ratio, 1.0))
            if BASELINE in samples:
                pairs = zip(samples[MOIRAI][key], samples[BASELINE][key], strict=True)
                ratio = harness.median(ours / theirs for ours, theirs in pairs)
                found.append(Goal(f"{name}: {text}, tuned over glibc", ratio, 1.0))
    first = results["preset"]
    ratio = harness.median(first["preset"]["block_ns"]) / harness.median(first["plain"]["block_ns"])
    found.append(Goal("first blocks, with a preset over without", ratio, 1.0))
    return found


def measure(arguments: argparse.Namespace) -> harness.Report:
    """All tables."""
    names = [name for name in SUBJECTS if name in (arguments.configurations or SUBJECTS)]
    live_count, turns = (2_000, 2_000) if arguments.quick else (20_000, 100_000)
    harness.progress("recording the programs")
    workloads = {
        "awkward sizes": AWKWARD,
        "scikit-image: regions of a photograph": _fresh(_record, "image"),
        "pandas: groups of a table": _fresh(_record, "table"),
    }
    results: dict[str, Any] = {"workloads": {}}
    for label, counts in workloads.items():
        harness.progress(label)
        results["workloads"][label] = {
            "counts": {str(size): count for size, count in counts.items()},
            "tuning": str(memory.SlabResource().tune(Recorded(counts))).split("\n"),
            "samples": _collect(
                names,
                arguments.rounds,
                lambda name, counts=counts: _fresh(  # type: ignore[misc]
                    sample, name, counts, live_count, turns
                ),
            ),
        }
    harness.progress("presets")
    results["preset"] = _collect(
        ["plain", "preset"], arguments.rounds, lambda name: _fresh(first_blocks, name == "preset")
    )
    parameters = {
        "rounds": arguments.rounds,
        "live_count": live_count,
        "turns": turns,
        "burst": BURST,
        "seed": SEED,
        "quick": arguments.quick,
    }
    return harness.Report(NAME, QUESTION, parameters, results, render(results), goals(results))


if __name__ == "__main__":
    sys.exit(harness.main_of_rounds(QUESTION, measure, 7, 2))
