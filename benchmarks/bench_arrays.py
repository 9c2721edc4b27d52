"""How much does it cost NumPy to get memory for temporaries, under each allocator?

The main number is the CPU time of `np.add(np.multiply(a, b), c)` over the same with preallocated,
64-byte aligned `out=` in the same process (the floor, 1.00). The floor's arrays are private
anonymous mappings with huge pages from 4 MiB on, as NumPy's own arrays have: the same in every
configuration. Inputs are measured twice: aligned (the floor's) and natural (the configuration's).
Both are measured alternately, A B C A B C, in one worker process of each configuration; workers
take turns. Times are thread CPU times, so that other processes on the machine matter less. An
operation that lasts longer than a sample is run once untimed before it, after the floor.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import harness
from arrays_worker import KIB, MIB, SMALL_SIZES
from harness import BASELINE, MOIRAI, Goal

QUESTION = __doc__.partition("\n")[0]
NAME = "bench_arrays"
WORKER = Path(__file__).with_name("arrays_worker.py")

SIZES = (64, 512, 4 * KIB, 16 * KIB, 64 * KIB, 256 * KIB, MIB, 4 * MIB, 8 * MIB, 16 * MIB, 64 * MIB,
         256 * MIB)  # fmt: skip
ZEROS_SIZES = (256 * KIB, MIB, 4 * MIB, 16 * MIB, 64 * MIB, 256 * MIB)
THREAD_SIZES = (4 * KIB, 64 * KIB, MIB, 8 * MIB)
SECTIONS = ("expression", "zeros", "threads", "tail", "small")

PAIRS_PER_VISIT = 3
# From this size on a worker keeps its arrays for one visit only: eight workers share the memory.
TRANSIENT_FROM = 64 * MIB


Workers = Mapping[str, harness.Worker]


def measure_expression(pool: Workers, sizes: Sequence[int], rounds: int) -> dict[str, Any]:
    """Ratios to the floor and faults, by size and configuration."""
    measured = {}
    for size in sizes:
        harness.progress(f"expression, {harness.size_label(size)}")
        transient = size >= TRANSIENT_FROM
        pairs = 2 if transient else PAIRS_PER_VISIT
        visits = max(1, math.ceil(rounds / 2)) if transient else rounds
        samples: dict[str, list[dict[str, float]]] = defaultdict(list)
        request = {
            "do": "expression",
            "size_bytes": size,
            "pair_count": pairs,
            "transient": transient,
        }
        for _, name in harness.interleaved(pool, visits):
            samples[name] += pool[name].ask(request)
        for worker in pool.values():
            worker.ask({"do": "forget"})
        measured[str(size)] = {name: _expression_summary(rows) for name, rows in samples.items()}
    return measured


def _expression_summary(samples: Sequence[Mapping[str, float]]) -> dict[str, float]:
    natural = [sample["natural"] / sample["floor"] for sample in samples]
    return {
        "natural": harness.median(natural),
        "natural_spread": harness.spread(natural),
        "aligned": harness.median(sample["aligned"] / sample["floor"] for sample in samples),
        "floor_ns": harness.median(sample["floor"] for sample in samples),
        "faults": harness.median(sample["faults"] for sample in samples),
        "sample_count": len(samples),
    }


def measure_zeros(pool: Workers, sizes: Sequence[int], rounds: int) -> dict[str, Any]:
    """µs of np.zeros, untouched and filled, and ratios to glibc."""
    measured: dict[str, Any] = {}
    for size in sizes:
        harness.progress(f"np.zeros, {harness.size_label(size)}")
        samples = _ask_rounds(pool, {"do": "zeros", "size_bytes": size}, rounds)
        measured[str(size)] = {
            kind: _against_baseline(
                {name: [s[kind] for s in rows] for name, rows in samples.items()}
            )
            for kind in ("untouched", "touched")
        }
    return measured


def measure_small(pool: Workers, sizes: Sequence[int], rounds: int) -> dict[str, Any]:
    """ns of np.empty, one at a time and a thousand held, and ratios to glibc."""
    measured: dict[str, Any] = {}
    for size in sizes:
        harness.progress(f"np.empty, {harness.size_label(size)}")
        samples = _ask_rounds(pool, {"do": "small", "size_bytes": size}, rounds)
        measured[str(size)] = {
            kind: _against_baseline(
                {name: [s[kind] for s in rows] for name, rows in samples.items()}
            )
            for kind in ("single", "held")
        }
    return measured


def _ask_rounds(pool: Workers, request: Mapping[str, Any], rounds: int) -> dict[str, list[Any]]:
    samples: dict[str, list[Any]] = defaultdict(list)
    for _, name in harness.interleaved(pool, rounds):
        samples[name].append(pool[name].ask(request))
    return samples


def _against_baseline(samples: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float]]:
    ratios = harness.round_ratios(samples) if BASELINE in samples else {}
    return {
        name: {
            "ns": harness.median(values),
            "spread": harness.spread(values),
            "ratio": harness.median(ratios.get(name, ())),
        }
        for name, values in samples.items()
    }


def measure_threads(pool: Workers, sizes: Sequence[int], rounds: int) -> dict[str, Any]:
    """CPU time per operation of two threads over that of one; the floor's own beside it."""
    measured: dict[str, Any] = {}
    for size in sizes:
        harness.progress(f"two threads, {harness.size_label(size)}")
        samples = _ask_rounds(pool, {"do": "threads", "size_bytes": size}, rounds)
        measured[str(size)] = {
            name: {
                "ratio": harness.median(s["operation both"] / s["operation alone"] for s in rows),
                "floor_ratio": harness.median(s["floor both"] / s["floor alone"] for s in rows),
                "wall_ratio": harness.median(
                    s["operation both wall"] / s["operation alone wall"] for s in rows
                ),
                "both_ns": harness.median(s["operation both"] for s in rows),
            }
            for name, rows in samples.items()
        }
    return measured


def measure_tail(pool: Workers, operations: int, rounds: int) -> dict[str, Any]:
    """Percentiles in µs of one operation at 1 MiB."""
    harness.progress("tail latency")
    samples = _ask_rounds(pool, {"do": "tail", "operations": operations}, rounds)
    measured = {}
    for name, rows in samples.items():
        measured[name] = {
            f"{clock}_{label}": harness.percentile(
                [value for row in rows for value in row[clock]], share
            )
            for clock in ("wall", "cpu")
            for label, share in (("p50", 0.5), ("p99", 0.99), ("p99.9", 0.999))
        }
    return measured


def measure_use(worker: harness.Worker, rounds: int) -> dict[str, Any]:
    """np.empty inside `use` over outside, in one process; ns to enter `use`."""
    harness.progress("moirai.memory.use")
    samples = [worker.ask({"do": "use"}) for _ in range(rounds)]
    ratios = {
        f"{kind} {size}": harness.median(
            s[f"{kind} {size} use"] / s[f"{kind} {size} plain"] for s in samples
        )
        for kind in ("single", "held")
        for size in SMALL_SIZES
    }
    return {
        "enter_ns": harness.median(s["enter"] for s in samples),
        "leave_ns": harness.median(s["leave"] for s in samples),
        "ratios": ratios,
    }


# --- tables -------------------------------------------------------------------------------------


def _sizes(measured: Mapping[str, Any]) -> list[str]:
    return [harness.size_label(int(size)) for size in measured]


def _table_of_sizes(measured: Mapping[str, Any], labels: Mapping[str, str], cell: Any) -> str:
    rows = [
        [label, *(cell(row, name) for row in measured.values())] for name, label in labels.items()
    ]
    return harness.markdown_table(["", *_sizes(measured)], rows)


def _expression_cell(kind: str) -> Callable[[Mapping[str, Any], str], str]:
    def cell(row: Mapping[str, Any], name: str) -> str:
        faults = row[name]["faults"]
        shown = f" [{faults:.0f}]" if kind == "natural" and faults >= 0.5 else ""
        return f"{row[name][kind]:.2f}{shown}"

    return cell


def _nested_cell(kind: str, unit_ns: float) -> Callable[[Mapping[str, Any], str], str]:
    def cell(row: Mapping[str, Any], name: str) -> str:
        entry = row[kind][name]
        return f"{entry['ns'] / unit_ns:.3g} ({entry['ratio']:.2f})"

    return cell


def _tail_table(tail: Mapping[str, Any], labels: Mapping[str, str]) -> str:
    rows = [
        [
            labels[name],
            *(" / ".join(f"{row[f'{clock}_{p}']:.0f}" for p in ("p50", "p99", "p99.9"))
              for clock in ("wall", "cpu")),
        ]
        for name, row in tail.items()
    ]  # fmt: skip
    header = ["", "wall, µs: p50 / p99 / p99.9", "CPU, µs: p50 / p99 / p99.9"]
    return harness.markdown_table(header, rows)


def _threads_cell(row: Mapping[str, Any], name: str) -> str:
    entry = row[name]
    return (
        f"{entry['ratio']:.2f} (floor {entry['floor_ratio']:.2f}), wall {entry['wall_ratio']:.2f}"
    )


def render(results: Mapping[str, Any], labels: Mapping[str, str]) -> str:
    """The sections that were measured, as Markdown."""
    parts = []
    if "expression" in results:
        parts += [
            "**`np.add(np.multiply(a, b), c)`, CPU time over the floor** (natural inputs; page "
            "faults per operation in brackets)",
            _table_of_sizes(results["expression"], labels, _expression_cell("natural")),
            "**The same with aligned inputs**",
            _table_of_sizes(results["expression"], labels, _expression_cell("aligned")),
        ]
    if "zeros" in results:
        for kind, title in (("untouched", "not touched"), ("touched", "then filled")):
            parts += [
                f"**`np.zeros`, {title}**: µs (ratio to glibc)",
                _table_of_sizes(results["zeros"], labels, _nested_cell(kind, 1000)),
            ]
    if "threads" in results:
        parts += [
            "**Two threads, each with its own arrays**: CPU time per operation over one thread's "
            "(in brackets that of the floor: shared caches and memory), wall likewise",
            _table_of_sizes(results["threads"], labels, _threads_cell),
        ]
    if "tail" in results:
        parts += [
            "**Tail latency at 1 MiB, one of 64 neighbours changing size before each operation**",
            _tail_table(results["tail"], labels),
        ]
    if "small" in results:
        for kind, title in (("single", "one at a time"), ("held", "a thousand held")):
            parts += [
                f"**`np.empty`, {title}**: ns (ratio to NumPy's own handler on glibc)",
                _table_of_sizes(results["small"], labels, _nested_cell(kind, 1)),
            ]
    if "use" in results:
        parts += [_use_text(results["use"])]
    return "\n\n".join(parts)


def _use_text(use: Mapping[str, Any]) -> str:
    rows = [
        [
            f"`np.empty`, {title}",
            *(f"{use['ratios'][f'{kind} {size}']:.2f}" for size in SMALL_SIZES),
        ]
        for kind, title in (("single", "one at a time"), ("held", "a thousand held"))
    ]
    table = harness.markdown_table(["", *map(harness.size_label, SMALL_SIZES)], rows)
    return (
        "**Inside `moirai.memory.use(pool)` over outside, in one process** "
        f"(entering costs {use['enter_ns']:.0f} ns, leaving {use['leave_ns']:.0f} ns)\n\n{table}"
    )


def goals(results: Mapping[str, Any]) -> list[Goal]:
    """The goals of the project for this benchmark; empty without a Moirai row."""
    found: list[Goal] = []
    for size, row in results.get("expression", {}).items():
        if MOIRAI in row:
            limit = 0.95 if int(size) >= 8 * MIB else 1.05
            label = harness.size_label(int(size))
            found.append(
                Goal(f"temporaries at {label}, over the floor", row[MOIRAI]["natural"], limit)
            )
            found.append(
                Goal(f"temporaries at {label}, faults per operation", row[MOIRAI]["faults"], 0)
            )
    for size, row in results.get("zeros", {}).items():
        label = harness.size_label(int(size))
        untouched = {name: entry["ratio"] for name, entry in row["untouched"].items()}
        touched = {name: entry["ratio"] for name, entry in row["touched"].items()}
        if MOIRAI in untouched:
            found.append(Goal(f"np.zeros untouched, {label}, over glibc", untouched[MOIRAI], 1.2))
            peer, value = harness.best_peer(touched)
            text = f"np.zeros touched, {label}, over the best peer ({peer})"
            found.append(Goal(text, touched[MOIRAI] / value, 1.0))
    for size, row in results.get("threads", {}).items():
        if MOIRAI in row:
            floor = f"(the floor's own: {row[MOIRAI]['floor_ratio']:.2f})"
            text = f"two threads at {harness.size_label(int(size))}, CPU over one thread's {floor}"
            found.append(Goal(text, row[MOIRAI]["ratio"], 1.05))
    if MOIRAI in results.get("tail", {}):
        for clock in ("wall", "cpu"):
            tails = {name: row[f"{clock}_p99.9"] for name, row in results["tail"].items()}
            peer, value = harness.best_peer(tails)
            text = f"tail p99.9, {clock}, over the best peer ({peer})"
            found.append(Goal(text, tails[MOIRAI] / value, 0.6))
    for size, row in results.get("small", {}).items():
        for kind in ("single", "held"):
            if MOIRAI in row[kind]:
                label = f"np.empty of {harness.size_label(int(size))}, {kind}, installed"
                found.append(Goal(f"{label}, over NumPy's own", row[kind][MOIRAI]["ratio"], 1.1))
    if "use" in results:
        found.append(Goal("entering use, ns", results["use"]["enter_ns"], 300))
        for key, ratio in results["use"]["ratios"].items():
            found.append(Goal(f"np.empty {key} B in use, over outside", ratio, 1.1))
    return found


def measure(arguments: argparse.Namespace) -> harness.Report:
    """Run the sections asked for and put them together."""
    chosen = harness.select_configurations(harness.find_configurations(), arguments.configurations)
    rounds = arguments.rounds
    quick = arguments.quick
    results: dict[str, Any] = {}
    with harness.workers(chosen, WORKER) as pool:
        if "expression" in arguments.sections:
            sizes = (4 * KIB, MIB) if quick else SIZES
            results["expression"] = measure_expression(pool, sizes, rounds)
        if "zeros" in arguments.sections:
            sizes = (MIB, 4 * MIB) if quick else ZEROS_SIZES
            results["zeros"] = measure_zeros(pool, sizes, rounds)
        if "threads" in arguments.sections:
            sizes = (64 * KIB,) if quick else THREAD_SIZES
            results["threads"] = measure_threads(pool, sizes, rounds)
        if "tail" in arguments.sections:
            results["tail"] = measure_tail(pool, 50 if quick else 1000, rounds)
        if "small" in arguments.sections:
            results["small"] = measure_small(
                pool, SMALL_SIZES[1:2] if quick else SMALL_SIZES, rounds
            )
    if "small" in arguments.sections and MOIRAI in chosen:
        plain = harness.Configuration("use", "moirai.memory.use")
        with harness.workers({"use": plain}, WORKER) as single:
            results["use"] = measure_use(single["use"], rounds)
    labels = {name: configuration.label for name, configuration in chosen.items()}
    parameters = {
        "rounds": rounds,
        "sections": list(arguments.sections),
        "quick": quick,
        "labels": labels,
    }
    return harness.Report(
        NAME, QUESTION, parameters, results, render(results, labels), goals(results)
    )


def main() -> int:
    parser = harness.argument_parser(QUESTION)
    parser.add_argument("--rounds", type=int, help="visits to each worker (10; 2 when quick)")
    parser.add_argument(
        "--sections", type=lambda names: names.split(","), default=SECTIONS, help=",".join(SECTIONS)
    )
    arguments = parser.parse_args()
    arguments.rounds = arguments.rounds or (2 if arguments.quick else 10)
    unknown = set(arguments.sections) - set(SECTIONS)
    if unknown:
        parser.error(f"--sections: expected some of {','.join(SECTIONS)}, got {','.join(unknown)}")
    harness.publish(measure(arguments), arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
