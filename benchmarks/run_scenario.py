"""Runs a program as `python` would and writes what it cost to a file, for `bench_programs.py`.

    python run_scenario.py REPORT.json HANDLER PROGRAM [ARGUMENTS...]

The probe reads at the end of the program's own code, before the interpreter goes away: what is
resident then is what a longer program would go on with. It reads once more a while later, when what
goes back to the kernel by age has gone.
"""

import json
import resource
import runpy
import sys
import time
from pathlib import Path

IDLE_SECONDS = 1.1


def resident_kib() -> dict[str, int]:
    """VmRSS (now) and VmHWM (the most so far) of this process in KiB."""
    fields = {}
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if name in ("VmRSS", "VmHWM"):
            fields[name] = int(value.split()[0])
    return fields


def main() -> None:
    report, handler, program, *arguments = sys.argv[1:]
    if handler:
        from harness import enter_handler

        enter_handler(handler)
    sys.argv = [program, *arguments]
    sys.path[0] = str(Path(program).resolve().parent)
    runpy.run_path(program, run_name="__main__")
    resident = resident_kib()
    usage = resource.getrusage(resource.RUSAGE_SELF)
    time.sleep(IDLE_SECONDS)
    Path(report).write_text(
        json.dumps(
            {
                "end_rss_bytes": resident["VmRSS"] << 10,
                "peak_rss_bytes": resident["VmHWM"] << 10,
                "idle_rss_bytes": resident_kib()["VmRSS"] << 10,
                "faults": usage.ru_minflt,
            }
        ),
        encoding="utf-8",
    )


if __name__ == "__main__":
    main()
