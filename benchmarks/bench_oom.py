"""Do programs that would be killed at their memory limit live, and finish, when they are guarded?

Eleven programs (`oom_scenarios.py`), each in a process of its own under a limit: without a guard,
with one that goes by the level, with one that also goes by forecasts (one second of these programs
stands for ten), and with the fence as well. The unguarded program is also run with twice the limit.
Where a limited control group can be made (version 1 below the own group, which needs root), the
kernel kills. Elsewhere a stand-in does, which looks at the resident set every 2 ms, and the guard
gets the limit as a budget; the report says so.

`--modes none,forecast-fence --seeds 40` runs these two alone, many times: that the unguarded ones
die is measured in the same run. What comes of it stands beside the table, each as measured last.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import harness
from oom_scenarios import MIB, SCENARIOS

NAME = "bench_oom"
QUESTION = "do programs live, and finish, that would be killed at their memory limit?"
LABELS = {
    "none": "unguarded",
    "static": "Moirai, level",
    "forecast": "Moirai, forecast",
    "forecast-fence": "Moirai, forecast and fence",
}
DOUBLED = "twice the limit"
BEST = "forecast-fence"
TIMEOUT_SECONDS = 60


# --- the limit ----------------------------------------------------------------------------------


def own_group() -> Path | None:
    """The folder of this process's own group of version 1, if it counts memory."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            return Path("/sys/fs/cgroup/memory") / path.lstrip("/")
    return None


@contextlib.contextmanager
def limited_group(limit: int, *, wanted: bool = True) -> Iterator[Path | None]:
    """A group below the own one with a limit; None where none is wanted or can be made."""
    own = own_group() if wanted else None
    folder = None if own is None else own / f"moirai-bench-oom-{os.getpid()}"
    try:
        assert folder is not None
        folder.mkdir()
    except (OSError, AssertionError):
        yield None
        return
    try:
        (folder / "memory.limit_in_bytes").write_text(str(limit))
        yield folder
    finally:
        for _ in range(100):
            try:
                folder.rmdir()
                break
            except OSError:  # The last process is still on its way out.
                time.sleep(0.05)


def stand_in_killer(process: subprocess.Popen[str], limit: int) -> None:
    while process.poll() is None:
        with contextlib.suppress(OSError, ValueError, IndexError):
            pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
            if pages * 4096 > limit:
                process.kill()
        time.sleep(0.002)


def run(
    scenario: str, mode: str, seed: int, limit: int, sized_for: int, *, in_group: bool
) -> dict[str, Any]:
    """Run one program, which is too large for `sized_for`, to its end, whatever that is."""
    with limited_group(limit, wanted=in_group) as group:
        counted = "budget" if group is None else "group"
        script = Path(__file__).with_name("oom_scenarios.py")
        command = [sys.executable, str(script), scenario, mode, str(seed), str(sized_for), counted]
        if group is not None:
            join = f"echo $$ > '{group}/cgroup.procs' && exec \"$@\""
            command = ["sh", "-c", join, "sh", *command]
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        start = time.perf_counter()
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        if group is None:
            threading.Thread(target=stand_in_killer, args=(process, limit), daemon=True).start()
        try:
            output, errors = process.communicate(timeout=TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            return {"outcome": "hangs", "done": 0.0, "seconds": TIMEOUT_SECONDS}
    seconds = time.perf_counter() - start
    if process.returncode == -signal.SIGKILL:
        return {"outcome": "killed", "done": 0.0, "seconds": seconds}
    if process.returncode != 0:
        return {"outcome": "failed", "done": 0.0, "seconds": seconds, "error": errors[-500:]}
    return {**json.loads(output), "seconds": seconds}


# --- the report ---------------------------------------------------------------------------------


def counts(runs: list[dict[str, Any]]) -> list[str]:
    """How many finished, left by themselves, and were killed or otherwise lost."""
    finished = sum(each["outcome"] == "finished" for each in runs)
    left = sum(each["outcome"] == "left" for each in runs)
    return [str(count) for count in (finished, left, len(runs) - finished - left)]


def cell(runs: list[dict[str, Any]]) -> str:
    """The same, as one text."""
    return " / ".join(counts(runs))


def share(runs: list[dict[str, Any]], *outcomes: str) -> float:
    return sum(each["outcome"] in outcomes for each in runs) / len(runs) if runs else 0.0


Runs = dict[str, dict[str, list[dict[str, Any]]]]  # by program, by column


def run_all(columns: list[str], arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the programs in turns, one seed after the other."""
    limit = arguments.limit_mib * MIB
    runs: Runs = {}
    with limited_group(limit, wanted=not arguments.stand_in) as group:
        by_kernel = group is not None
    for scenario in arguments.scenarios:
        rows = runs[scenario] = {column: [] for column in columns}
        for seed in range(arguments.seeds):
            for column in columns:
                mode, factor = ("none", 2) if column == DOUBLED else (column, 1)
                rows[column].append(
                    run(scenario, mode, seed, factor * limit, limit, in_group=by_kernel)
                )
        harness.progress(f"{scenario}: " + ", ".join(f"{c} {cell(r)}" for c, r in rows.items()))
    about = harness.machine()
    return {
        "seeds": arguments.seeds,
        "limit_bytes": limit,
        "killer": "kernel" if by_kernel else "stand-in",
        "commit": about["commit"],
        "date": about["date"],
        "runs": runs,
    }


def measure(arguments: argparse.Namespace) -> harness.Report:
    """Run what is asked for; what is not stays as it was."""
    results: dict[str, Any] = {"table": None, "many": None}
    path = harness.output_path(arguments, NAME)
    if path.exists():
        stored = json.loads(path.read_text(encoding="utf-8"))["results"]
        results |= {name: stored.get(name) for name in results}
    if arguments.modes == list(LABELS):
        results["table"] = run_all([*LABELS, DOUBLED], arguments)
    else:
        results["many"] = run_all(arguments.modes, arguments)
    parameters = {
        name: {key: value for key, value in each.items() if key != "runs"}
        for name, each in results.items()
        if each is not None
    }
    markdown = "\n\n".join(
        render(each) for each in (results["table"], results["many"]) if each is not None
    )
    reached = goals(results)
    return harness.Report(NAME, QUESTION, parameters, results, markdown, reached, digest(results))


def deadly_runs(runs: Runs) -> dict[str, list[dict[str, Any]]]:
    """Only those that die without help, of all programs, by column."""
    columns = next(iter(runs.values())).keys()
    return {
        column: [
            each
            for rows in runs.values()
            for each, unguarded in zip(rows[column], rows.get("none", []), strict=True)
            if unguarded["outcome"] == "killed"
        ]
        for column in columns
    }


def work_done(runs: list[dict[str, Any]]) -> float:
    return sum(each["done"] for each in runs) / max(1, len(runs))


def render(measured: dict[str, Any]) -> str:
    """A table of what became of the runs, as Markdown."""
    runs: Runs = measured["runs"]
    columns = list(next(iter(runs.values())))
    labels = [LABELS.get(column, column) for column in columns]
    rows = [
        [scenario.replace("_", " "), *(cell(by_column[column]) for column in columns)]
        for scenario, by_column in runs.items()
    ]
    if "none" in columns:
        deadly = deadly_runs(runs)
        rows.append(["all that die unguarded", *(cell(deadly[column]) for column in columns)])
        done = [f"{work_done(deadly[column]):.2f}" for column in columns]
        rows.append(["work done, share", *done])
    if DOUBLED in columns:
        rows.append(
            [
                "time of those that finish, against twice the limit",
                *(f"{harness.median(slowdowns(runs, column)):.2f}" for column in columns),
            ]
        )
    killer = (
        "The kernel killed, in a control group of version 1."
        if measured["killer"] == "kernel"
        else "A stand-in killed, by the resident set: no limited control group was made here."
    )
    return (
        f"Runs that finished / left by themselves / were killed, of {measured['seeds']} each, with "
        f"a limit of {harness.size_label(measured['limit_bytes'])}; commit {measured['commit']}, "
        f"{measured['date']}. {killer}\n\n" + harness.markdown_table(["", *labels], rows)
    )


def digest(results: dict[str, Any]) -> str:
    """One table: what became of all runs that die unguarded, by how they were guarded."""
    rows = []
    for column, label in LABELS.items():
        for measured in (results["many"], results["table"]):
            if measured is None or not _has_unguarded(measured):
                continue
            runs = deadly_runs(measured["runs"]).get(column)
            if runs:
                rows.append([f"{label}, {len(runs)} runs", *counts(runs)])
                break
    if not rows:
        return ""
    header = ["Programs at their memory limit", "finish", "leave by themselves", "are killed"]
    return harness.markdown_table(header, rows)


def slowdowns(runs: Runs, column: str) -> list[float]:
    """Times of the runs that finish over those with twice the limit."""
    return [
        each["seconds"] / full["seconds"]
        for rows in runs.values()
        for each, full in zip(rows[column], rows[DOUBLED], strict=True)
        if each["outcome"] == full["outcome"] == "finished"
    ]


def goals(results: dict[str, Any]) -> list[harness.Goal]:
    """The project's goals: by the many runs if there are any, else by the table."""
    found = []
    table, many = results["table"], results["many"]
    for measured in (many, table):
        if measured is None:
            continue
        deadly = deadly_runs(measured["runs"]) if _has_unguarded(measured) else {}
        if BEST in deadly:
            count = len(deadly[BEST])
            kept = share(deadly[BEST], "finished", "left")
            finished = share(deadly[BEST], "finished")
            label = f"{LABELS[BEST]}, {count} runs"
            found += [
                harness.Goal(f"deadly runs killed, {label}", 1 - kept, 0.01),
                harness.Goal(f"deadly runs not finished, {label}", 1 - finished, 0.10),
            ]
            break
    if table is not None:
        deadly = deadly_runs(table["runs"])
        ratio = work_done(deadly[BEST]) / max(work_done(deadly[DOUBLED]), 1e-9)
        found.append(harness.Goal("useful work lost against twice the limit", 1 - ratio, 0.05))
    return found


def _has_unguarded(measured: dict[str, Any]) -> bool:
    return all("none" in rows for rows in measured["runs"].values())


def main() -> int:
    parser = harness.argument_parser(QUESTION)
    parser.add_argument("--seeds", type=int, help="runs of each program (5; 1 when quick)")
    parser.add_argument(
        "--modes",
        type=lambda names: names.split(","),
        default=list(LABELS),
        help=f"comma separated, of {', '.join(LABELS)} (all, and twice the limit besides)",
    )
    parser.add_argument("--limit-mib", type=int, default=256, help="the limit (256)")
    parser.add_argument("--scenarios", type=lambda names: names.split(","), help="comma separated")
    parser.add_argument(
        "--stand-in",
        action="store_true",
        help="kill without a control group, as where none can be made",
    )
    arguments = parser.parse_args()
    unknown = set(arguments.modes) - set(LABELS)
    if unknown:
        parser.error(f"--modes: expected some of {', '.join(LABELS)}, got {', '.join(unknown)}")
    arguments.seeds = arguments.seeds or (1 if arguments.quick else 5)
    quick = ["huge_array", "huge_reserved"] if arguments.quick else list(SCENARIOS)
    arguments.scenarios = arguments.scenarios or quick
    harness.publish(measure(arguments), arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
