"""What a guard makes of file streaming and of forked workers, and what it costs a calm program.

`python pressure_groups.py PROGRAM [FILE]` is one of the programs, which prints a JSON object.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import harness
from bench_oom import limited_group

MIB = 1 << 20
STREAM_LIMIT = 128 * MIB
WORKERS_LIMIT = 512 * MIB
STREAM_RUNS = 24


# --- the programs -------------------------------------------------------------------------------


def stream(path: str) -> dict[str, Any]:
    """Write twice the limit to a file and read it twice; what the guard thought of that."""
    from moirai import pressure
    from oom_scenarios import Hastened

    forecaster = Hastened()
    guard = pressure.start(forecaster=forecaster, forecast_seconds=0.1)
    block = bytes(MIB)
    with open(path, "wb") as file:
        for _ in range(2 * STREAM_LIMIT // MIB):
            file.write(block)
    for _ in range(2):
        with open(path, "rb") as file:
            while file.read(MIB):
                pass
    pressure.stop()
    return {
        "alarms": forecaster.score().alarm_count,
        "stage": guard.status().highest_stage.name.lower(),
    }


def workers() -> dict[str, Any]:
    """Fork eight that share 100 MiB and have 10 of their own each; what is counted for them all."""
    from moirai.pressure import Source

    shared = bytearray(os.urandom(1)) * (100 * MIB)
    children = []
    go_reader, go_writer = os.pipe()
    reader, writer = os.pipe()
    for _ in range(8):
        child = os.fork()
        if child == 0:
            os.close(go_writer)
            own = bytearray(b"x") * (10 * MIB)
            os.write(writer, b"r")
            os.read(go_reader, 1)
            os._exit(len(own) == 0)
        children.append(child)
    ready = 0
    while ready < len(children):
        ready += len(os.read(reader, 8))
    source = Source(budget_bytes=WORKERS_LIMIT)
    for _ in range(2):  # Shares are read when the children are the same as at the look before.
        source.read()
    used = {bound.kind: bound.without_cache_bytes for bound in source.bounds()}
    resident = 0
    for process in [os.getpid(), *children]:
        resident += int(Path(f"/proc/{process}/statm").read_text().split()[1]) * 4096
    os.close(go_writer)
    for child in children:
        os.waitpid(child, 0)
    assert len(shared) == 100 * MIB
    return {"counted": used["budget"], "group": used["cgroup"], "summed": resident}


def calm(duration: str) -> dict[str, Any]:
    """Do nothing at 45 % of a limit, guarded; what the guard's threads take of a processor."""
    from moirai import pressure

    held = bytearray(b"x") * (450 * MIB)
    seconds = float(duration)
    before = set(os.listdir("/proc/self/task"))
    guard = pressure.start(limit=1000 * MIB)
    while guard.forecaster is None:
        time.sleep(0.1)
    threads = set(os.listdir("/proc/self/task")) - before

    def spent() -> float:
        found = 0
        for thread in threads:
            try:
                found += int(Path(f"/proc/self/task/{thread}/schedstat").read_text().split()[0])
            except FileNotFoundError:  # The one that loaded the forecaster.
                continue
        return found / 1e9

    start = spent()
    time.sleep(seconds)
    percent = 100 * (spent() - start) / seconds
    pressure.stop()
    assert len(held) > 0
    return {"processor_percent": percent}


# --- their runs ---------------------------------------------------------------------------------


def run(group: Path | None, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, __file__, *arguments]
    if group is not None:
        command = ["sh", "-c", f"echo $$ > '{group}/cgroup.procs' && exec \"$@\"", "sh", *command]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def measure(*, quick: bool) -> dict[str, Any]:
    """Run the programs; where no limited control group can be made, the last alone."""
    found: dict[str, Any] = {"calm": run(None, "calm", "1" if quick else "10")}
    with limited_group(STREAM_LIMIT) as group:
        if group is None:
            return found
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "stream")
            found["streams"] = [
                run(group, "stream", path) for _ in range(2 if quick else STREAM_RUNS)
            ]
    with limited_group(WORKERS_LIMIT) as group:
        found["workers"] = run(group, "workers")
    return found


def false_alarms(found: dict[str, Any]) -> int:
    """Streams that made the forecaster alarm, or the guard do more than trim."""
    return sum(
        each["alarms"] > 0 or each["stage"] in ("aggressive", "emergency")
        for each in found["streams"]
    )


def errors(found: dict[str, Any]) -> tuple[float, float]:
    """By how much our count of forked workers, and summed resident sets, are off the group's."""
    each = found["workers"]
    return tuple(abs(each[name] / each["group"] - 1) for name in ("counted", "summed"))  # type: ignore[return-value]


def render(found: dict[str, Any]) -> str:
    """The table, as Markdown."""
    rows = [["a guard's share of a processor in a calm program, %", cost_text(found)]]
    if "streams" in found:
        streams = found["streams"]
        counted, summed = errors(found)
        rows += [
            [
                "file streaming within a control group: runs with a false alarm",
                f"{false_alarms(found)} of {len(streams)}",
            ],
            [
                "forked workers: our count off the control group's, %",
                f"{100 * counted:.1f}",
            ],
            ["forked workers: sum of resident sets off it, %", f"{100 * summed:.0f}"],
        ]
    return harness.markdown_table(["", "Moirai"], rows)


def cost_text(found: dict[str, Any]) -> str:
    return f"{found['calm']['processor_percent']:.2f}"


def goals(found: dict[str, Any]) -> list[harness.Goal]:
    """The project's goals."""
    made = [harness.Goal("a guard's share of a processor, %", found["calm"]["processor_percent"],
                         0.5)]  # fmt: skip
    if "streams" in found:
        made += [
            harness.Goal("false alarms in streams", false_alarms(found), 0),
            harness.Goal("forked workers: count off the group's", errors(found)[0], 0.05),
        ]
    return made


PROGRAMS = {"stream": stream, "workers": workers, "calm": calm}

if __name__ == "__main__":
    print(json.dumps(PROGRAMS[sys.argv[1]](*sys.argv[2:])))
