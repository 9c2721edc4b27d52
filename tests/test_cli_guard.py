"""`moirai run --guard` and `moirai pressure watch`."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from pressure_trees import MIB

from moirai import pressure
from moirai.cli import pressure_watch
from moirai.reports import pressure as report

MOIRAI = [sys.executable, "-m", "moirai"]


def execute(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("MOIRAI_")
    }
    return subprocess.run(
        [*MOIRAI, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=60
    )


OVER = """
kept = []
try:
    while len(kept) < 2048:
        kept.append(bytearray(b"x" * (1 << 20)))
except MemoryError:
    reached = len(kept)
    del kept
    print("reached", reached)
"""


def test_a_guarded_program_gets_memory_error_before_the_limit(tmp_path: Path) -> None:
    done = execute("run", "--limit", "300MiB", "--guard", "-c", OVER, cwd=tmp_path)

    assert done.returncode == 0, done.stderr
    word, reached = done.stdout.split()
    assert word == "reached"
    assert 150 <= int(reached) <= 300
    assert "of 300 MiB (budget) used at the end; highest stage" in done.stderr


def test_the_summary_says_what_the_guard_did(tmp_path: Path) -> None:
    options = ["--limit", "300MiB", "--guard", "--summary", "json"]
    done = execute("run", *options, "-c", OVER, cwd=tmp_path)

    content = json.loads(done.stderr.splitlines()[-1])
    assert content["guarded"]["limit_bytes"] == 300 * MIB
    assert content["guarded"]["bound"] == "budget"
    assert content["limit_bytes"] is None
    assert content["guarded"]["alarms"] is None  # no room for NumPy, so no forecasts


def test_the_summary_of_a_short_program_says_its_limit(tmp_path: Path) -> None:
    options = ["--limit", "300MiB", "--guard", "--summary", "json"]
    done = execute("run", *options, "-c", "pass", cwd=tmp_path)

    guarded = json.loads(done.stderr.splitlines()[-1])["guarded"]
    assert (guarded["limit_bytes"], guarded["bound"]) == (300 * MIB, "budget")
    assert guarded["used_bytes"] > 0


@pytest.mark.parametrize("options", [[], ["--summary", "none"]])
def test_a_limit_without_room_is_named(options: list[str], tmp_path: Path) -> None:
    arguments = ["--limit", "9MiB", "--guard", *options, "-c", "print('ran')"]
    done = execute("run", *arguments, cwd=tmp_path)

    assert done.stdout == "ran\n"
    assert "nothing guards the limit: InvalidArgument: limit: must leave room" in done.stderr
    assert "got 9437184 bytes, of which" in done.stderr


def test_the_summary_says_what_became_of_forecasts(tmp_path: Path) -> None:
    code = """
import numpy
from moirai import pressure

guard = pressure.current()
block = b"x" * (300 << 20)
while guard.forecaster is None:
    guard.source.next(timeout_seconds=60)
"""
    done = execute("run", "--limit", "1GiB", "--guard", "-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "alarms 0: 0 true, 0 false" in done.stderr


@pytest.mark.parametrize(("given", "found"), [(None, "0"), ("64MiB", "64MiB")])
def test_no_memory_is_mapped_ahead_of_the_fence(
    given: str | None, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if given is not None:
        monkeypatch.setenv("MIMALLOC_ARENA_RESERVE", given)
    show = "import os; print(os.environ['MIMALLOC_ARENA_RESERVE'])"
    done = execute("run", "--guard", "--summary", "none", "-c", show, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, f"{found}\n")


def test_without_the_option_nothing_is_guarded(tmp_path: Path) -> None:
    done = execute("run", "--summary", "json", "-c", "import sys; print(sys.modules)", cwd=tmp_path)
    assert "moirai.pressure" not in done.stdout
    assert json.loads(done.stderr.splitlines()[-1])["guarded"] is None


def test_arrays_of_a_guarded_program_are_moirais(tmp_path: Path) -> None:
    code = "import numpy as np; x = np.ones(1 << 24)"
    done = execute(
        "run", "--limit", "1GiB", "--guard", "--summary", "json", "-c", code, cwd=tmp_path
    )
    content = json.loads(done.stderr.splitlines()[-1])
    assert content["install_problem"] is None
    assert content["served"]["total_bytes"] >= 1 << 27


def test_children_of_a_guarded_program_are_guarded_with_it(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(
        "import multiprocessing, resource\n"
        "from moirai import pressure\n"
        "def look():\n"
        "    guard = pressure.current()\n"
        "    limit = resource.getrlimit(resource.RLIMIT_DATA)[0]\n"
        "    sample = guard.source.read()\n"
        "    return sample.bound, sample.limit_bytes, limit != resource.RLIM_INFINITY\n"
        "if __name__ == '__main__':\n"
        "    for method in ('fork', 'spawn'):\n"
        "        with multiprocessing.get_context(method).Pool(1) as pool:\n"
        "            print(method, pool.apply(look))\n"
    )
    done = execute("run", "--limit", "700MiB", "--guard", "app.py", cwd=tmp_path)
    expected = f"('budget', {700 * MIB}, True)"
    assert done.stdout.splitlines() == [f"fork {expected}", f"spawn {expected}"], done.stderr


def test_a_program_without_numpy_is_guarded_without_it(tmp_path: Path) -> None:
    code = "import sys; print('numpy' in sys.modules)"
    done = execute("run", "--guard", "--summary", "none", "-c", code, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr


# Watching.


def test_a_process_can_be_watched(tmp_path: Path) -> None:
    done = execute("pressure", "watch", str(os.getpid()), "--count", "2", "--interval", "0.01",
                   cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"process {os.getpid()}: ") == 2
    assert "host" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--count", "0"], "--count: must be at least 1, got 0"),
        (["--interval", "0"], "--interval: must be > 0 and at most 3600, got 0.0"),
        (["--cgroup", "/nowhere"], "--cgroup: must be the folder of a control group, got /nowhere"),
        (["4194305"], "process 4194305 is gone"),
    ],
)
def test_mistakes_are_named(arguments: list[str], message: str, tmp_path: Path) -> None:
    done = execute("pressure", "watch", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr


def test_a_group_is_watched_by_one_of_its_processes(tmp_path: Path) -> None:
    (tmp_path / "cgroup.procs").write_text(f"{os.getpid()}\n1\n")
    done = execute("pressure", "watch", "--cgroup", str(tmp_path), "--count", "1", cwd=tmp_path)
    assert f"process {os.getpid()}: " in done.stdout


@pytest.mark.parametrize("content", ["", "no process\n"])
def test_a_folder_that_is_no_group_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "cgroup.procs").write_text(content)
    done = execute("pressure", "watch", "--cgroup", str(tmp_path), "--count", "1", cwd=tmp_path)
    assert done.returncode == 2
    assert f"must have a process of its own, got {content.strip()!r} in" in done.stderr


WATCHED = report.Watched(
    name="process 7",
    stage="gentle",
    used_bytes=850 * MIB,
    limit_bytes=1000 * MIB,
    bound="cgroup",
    resident_bytes=700 * MIB,
    growth_bytes_per_second=2.5 * MIB,
    stalled_ratio=0.125,
    total_kills=2,
    history=(0.0, 0.5, 1.0),
    bounds=(report.BoundRow("cgroup", "/g", 850 * MIB, 800 * MIB, 1000 * MIB),),
)


def test_the_forecast_is_shown_once_there_is_one() -> None:
    guard = pressure.Guard(pressure.TraceSource(os.devnull), forecaster=pressure.Forecaster())
    shown = []
    for second in range(10):
        guard.step(pressure.Sample(float(second), (100 + second) * MIB, 1000 * MIB))
        shown.append([row.horizon_seconds for row in pressure_watch._fan(guard)[0]])
    assert shown[0] == []
    assert shown[-1] == [30, 60, 120]


def test_a_fan_is_drawn_within_the_limit() -> None:
    row = report.FanRow(60, 0.5, 0.75, 1.4, 0.25)
    watched = dataclasses.replace(WATCHED, fan=(row,), trend="increasing")
    lines = report.to_text(watched).splitlines()
    assert lines[4:6] == [
        "  forecast (increasing), and the odds of reaching 90 %:",
        "  " + "·" * 20 + "▒" * 10 + "█" + "▒" * 9 + "  75.0%  in 60 s: 50.0% to 140.0%, odds 25%",
    ]


def test_a_look_is_written_as_text() -> None:
    assert report.to_text(WATCHED).splitlines() == [
        "process 7: gentle",
        "  " + "█" * 34 + "░" * 6 + "  85.0%  850 MiB of 1000 MiB (cgroup)",
        "  " + " " * 37 + " ▄█",
        "  resident 700 MiB, growing by 2.5 MiB a second",
        "  stalled 12.5% of the last 10 s",
        "  the kernel killed 2 times in the group",
        "  cgroup           850 MiB of   1000 MiB, 800 MiB without file cache  /g",
    ]
