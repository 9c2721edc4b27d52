"""Do programs that would be killed at their memory limit live, and finish, when they are guarded?

Ten programs (`oom_scenarios.py`), each in a process of its own under a limit: without a guard, with
one that goes by the level, with one that also goes by forecasts (one second of these programs
stands for ten), and with the fence as well. The unguarded program is also run with twice the limit.
Where a limited control group can be made (version 1 below the own group, which needs root), the
kernel kills. Elsewhere a stand-in does, which looks at the resident set every 2 ms, and the guard
gets the limit as a budget; the report says so.
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


def cell(runs: list[dict[str, Any]]) -> str:
    """Finished / left by itself / killed or otherwise lost."""
    finished = sum(each["outcome"] == "finished" for each in runs)
    left = sum(each["outcome"] == "left" for each in runs)
    return f"{finished} / {left} / {len(runs) - finished - left}"


def share(runs: list[dict[str, Any]], *outcomes: str) -> float:
    return sum(each["outcome"] in outcomes for each in runs) / len(runs) if runs else 0.0


def measure(arguments: argparse.Namespace) -> harness.Report:
    limit = arguments.limit_mib * MIB
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    with limited_group(limit, wanted=not arguments.stand_in) as group:
        by_kernel = group is not None
    columns = [*LABELS, DOUBLED]
    for scenario in arguments.scenarios:
        rows = found[scenario] = {column: [] for column in columns}
        for seed in range(arguments.seeds):
            for column in columns:
                mode, factor = ("none", 2) if column == DOUBLED else (column, 1)
                rows[column].append(
                    run(scenario, mode, seed, factor * limit, limit, in_group=by_kernel)
                )
        harness.progress(f"{scenario}: " + ", ".join(f"{c} {cell(r)}" for c, r in rows.items()))
    return report(found, columns, limit, by_kernel, arguments)


def report(
    found: dict[str, dict[str, list[dict[str, Any]]]],
    columns: list[str],
    limit: int,
    by_kernel: bool,
    arguments: argparse.Namespace,
) -> harness.Report:
    labels = [LABELS.get(column, column) for column in columns]
    rows = [
        [scenario.replace("_", " "), *(cell(runs[column]) for column in columns)]
        for scenario, runs in found.items()
    ]
    # Only those count that die without help.
    deadly = {
        column: [
            each
            for runs in found.values()
            for each, unguarded in zip(runs[column], runs["none"], strict=True)
            if unguarded["outcome"] == "killed"
        ]
        for column in columns
    }
    rows.append(["all that die unguarded", *(cell(deadly[column]) for column in columns)])
    work = {
        column: sum(each["done"] for each in runs) / max(1, len(runs))
        for column, runs in deadly.items()
    }
    rows.append(["work done, share", *(f"{work[column]:.2f}" for column in columns)])
    killer = (
        "The kernel killed, in a control group of version 1."
        if by_kernel
        else "A stand-in killed, by the resident set: no limited control group was made here."
    )
    finished = {
        column: [
            run["seconds"] / full["seconds"]
            for scenario, runs in found.items()
            for run, full in zip(runs[column], runs[DOUBLED], strict=True)
            if run["outcome"] == full["outcome"] == "finished"
        ]
        for column in columns
    }
    rows.append(
        [
            "time of those that finish, against twice the limit",
            *(f"{harness.median(finished[column]):.2f}" for column in columns),
        ]
    )
    markdown = (
        f"Runs that finished / left by themselves / were killed, of {arguments.seeds} each, with a "
        f"limit of {harness.size_label(limit)}. {killer}\n\n"
        + harness.markdown_table(["", *labels], rows)
    )
    best = "forecast-fence"
    kept = share(deadly[best], "finished", "left")
    done = share(deadly[best], "finished")
    ratio = work[best] / max(work[DOUBLED], 1e-9)
    goals = [
        harness.Goal(f"deadly runs killed, {LABELS[best]}", 1 - kept, 0.01),
        harness.Goal(f"deadly runs not finished, {LABELS[best]}", 1 - done, 0.10),
        harness.Goal("useful work lost against twice the limit", 1 - ratio, 0.05),
    ]
    parameters = {
        "limit_bytes": limit,
        "seeds": arguments.seeds,
        "killer": "kernel" if by_kernel else "stand-in",
    }
    return harness.Report(NAME, QUESTION, parameters, found, markdown, goals)


def main() -> int:
    parser = harness.argument_parser(QUESTION)
    parser.add_argument("--seeds", type=int, help="runs of each program (5; 1 when quick)")
    parser.add_argument("--limit-mib", type=int, default=256, help="the limit (256)")
    parser.add_argument("--scenarios", type=lambda names: names.split(","), help="comma separated")
    parser.add_argument(
        "--stand-in",
        action="store_true",
        help="kill without a control group, as where none can be made",
    )
    arguments = parser.parse_args()
    arguments.seeds = arguments.seeds or (1 if arguments.quick else 5)
    quick = ["huge_array", "huge_reserved"] if arguments.quick else list(SCENARIOS)
    arguments.scenarios = arguments.scenarios or quick
    harness.publish(measure(arguments), arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
