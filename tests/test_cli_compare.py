"""`moirai compare` measures each configuration alike, stops at failures, and leaves no child."""

import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from moirai.cli.allocators import Allocator, find_all
from moirai.cli.compare import choices, round_order
from moirai.cli.measure import ProgramFailed, measure
from moirai.cli.program import Program, interpreter_options, with_startup
from moirai.errors import InvalidArgument, Timeout, Unsupported

COMPARE = [sys.executable, "-m", "moirai", "compare"]
SHORT = ["--runs", "1", "--no-warm-up", "--quiet"]


def execute(arguments: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMPARE, *arguments], cwd=cwd, capture_output=True, text=True, timeout=120
    )


# One run.


def measured(code: str, tmp_path: Path, timeout_seconds: float | None = None):  # type: ignore[no-untyped-def]
    environment = {**os.environ, **with_startup(os.environ)}
    return measure(
        [sys.executable, "-c", code],
        environment,
        directory=tmp_path,
        timeout_seconds=timeout_seconds,
    )


def test_memory_is_the_programs_own_though_it_is_started_by_a_larger_one(tmp_path: Path) -> None:
    ballast = bytearray(64 << 20)
    ballast[::4096] = b"x" * len(ballast[::4096])
    small = measured("pass", tmp_path)
    assert small.peak_rss_bytes < 40 << 20
    assert 0 < small.end_rss_bytes <= small.peak_rss_bytes
    large = measured("b = bytearray(b'x') * (256 << 20); del b", tmp_path)
    assert large.peak_rss_bytes > 256 << 20
    assert large.end_rss_bytes < 100 << 20
    assert len(ballast) == 64 << 20


def test_work_of_children_counts_though_it_is_started_by_a_larger_one(tmp_path: Path) -> None:
    ballast = bytearray(192 << 20)
    ballast[::4096] = b"x" * len(ballast[::4096])
    child = "b = bytearray(b'x') * (128 << 20); sum(range(2_000_000))"
    alone = measured("pass", tmp_path)
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    both = measured(code, tmp_path)
    assert both.peak_rss_bytes > 128 << 20
    assert both.minor_faults > alone.minor_faults
    assert both.cpu_seconds > alone.cpu_seconds
    # The probe is the main process's: the child's memory is gone at its end.
    assert both.end_rss_bytes < 100 << 20
    assert len(ballast) == 192 << 20


def test_program_that_ends_by_os_exit_has_no_end(tmp_path: Path) -> None:
    assert measured("import os; os._exit(0)", tmp_path).end_rss_bytes is None


def test_failure_holds_status_and_output(tmp_path: Path) -> None:
    with pytest.raises(ProgramFailed) as caught:
        measured("import sys; print('out'); sys.exit('why')", tmp_path)
    assert (caught.value.status, caught.value.output, caught.value.errors) == (
        1,
        b"out\n",
        b"why\n",
    )
    with pytest.raises(ProgramFailed) as caught:
        measured("import os; os.kill(os.getpid(), 9)", tmp_path)
    assert caught.value.status == -signal.SIGKILL


def test_timeout_kills_the_whole_group(tmp_path: Path) -> None:
    code = (
        "import os, signal, subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import signal; signal.pause()'])\n"
        f"open({str(tmp_path / 'pids')!r}, 'w').write(f'{{os.getpid()}} {{child.pid}}')\n"
        "signal.pause()"
    )
    with pytest.raises(Timeout, match="--timeout: the program took longer than 3 s"):
        measured(code, tmp_path, timeout_seconds=3)
    for pid in (tmp_path / "pids").read_text().split():
        assert ends(int(pid))


def ends(pid: int) -> bool:
    """Wait for the end of a process that was killed, but is not ours to reap."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([descriptor], [], [], 30)[0])
    finally:
        os.close(descriptor)


# What is measured.

FOUND = {
    "system": Allocator("system", None),
    "tuned": Allocator("tuned", None),
    "mimalloc": Allocator("mimalloc", "/lib/libmimalloc.so"),
}
PROGRAM = Program(["-u"], ["app.py", "a b"])


def test_default_configurations_are_plain_all_that_was_found_and_moirai() -> None:
    picked = choices(None, PROGRAM, FOUND, {})
    assert [choice.name for choice in picked] == ["plain", "tuned", "mimalloc", "moirai"]
    assert picked[2].variables == {"LD_PRELOAD": "/lib/libmimalloc.so"}
    assert picked[2].command_line == "LD_PRELOAD=/lib/libmimalloc.so python -u app.py 'a b'"
    assert picked[3].command_line == "python -u -m moirai run app.py 'a b'"


def test_plain_is_always_measured_and_first() -> None:
    picked = choices(["moirai-cap32", "plain"], PROGRAM, FOUND, {})
    assert [choice.name for choice in picked] == ["plain", "moirai-cap32"]
    assert picked[1].command_line == "python -u -m moirai run --cache-cap 32MiB app.py 'a b'"
    assert list(picked[1].command[1:4]) == ["-u", "-m", "moirai"]


def test_unknown_repeated_and_absent_configurations_are_refused() -> None:
    with pytest.raises(InvalidArgument, match=r"--configs: expected names of plain, .* got 'fast'"):
        choices(["fast"], PROGRAM, FOUND, {})
    with pytest.raises(InvalidArgument, match="each name once, got 'tuned' twice"):
        choices(["tuned", "tuned"], PROGRAM, FOUND, {})
    with pytest.raises(Unsupported, match="jemalloc was not found"):
        choices(["jemalloc"], PROGRAM, FOUND, {})


def test_advised_command_keeps_the_options_of_the_interpreter() -> None:
    program = Program(["-O", "-X", "dev"], ["app.py"])
    moirai, slab = choices(["moirai", "moirai-slab"], program, {}, {})[1:]
    assert moirai.command_line == "python -O -X dev -m moirai run app.py"
    assert slab.command_line == "python -O -X dev -m moirai run --memory slab app.py"


def test_each_configuration_is_first_in_some_round() -> None:
    orders = [round_order(["a", "b", "c"], index) for index in range(4)]
    assert orders == [["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"], ["a", "b", "c"]]


@pytest.mark.parametrize(
    ("command_line", "options", "rest"),
    [
        (["python", "app.py", "-X"], [], ["app.py", "-X"]),
        (["python", "-X", "dev", "-W", "error", "-u", "-m", "m"], 5, ["-m", "m"]),
        (["python", "-Xdev", "-bb", "-c", "1"], 2, ["-c", "1"]),
        (["python", "-um", "m", "-v"], ["-u"], ["-m", "m", "-v"]),
        (["python", "-uX", "dev", "a"], 2, ["a"]),
        (["python", "--check-hash-based-pycs", "always", "a"], 2, ["a"]),
        (["python", "-u", "-"], 1, ["-"]),
        (["python", "-cprint()"], [], ["-cprint()"]),
        (["python"], [], []),
    ],
)
def test_interpreter_options_end_where_the_program_begins(
    command_line: list[str], options: int | list[str], rest: list[str]
) -> None:
    expected = command_line[1 : options + 1] if isinstance(options, int) else options
    assert interpreter_options(command_line) == (expected, rest)


# The command.


@pytest.fixture
def app(tmp_path: Path) -> Path:
    (tmp_path / "app.py").write_text(
        "import sys, numpy as np\n"
        "for _ in range(10): x = np.ones(10**6) * 2 + 1\n"
        "print('APP OUTPUT'); print('APP ERRORS', file=sys.stderr)\n"
    )
    return tmp_path


def test_table_and_json_hold_every_configuration(app: Path) -> None:
    arguments = ["--runs", "2", "--json", "out.json", "--configs", "plain,tuned,moirai"]
    result = execute([*arguments, "python", "-u", "app.py", "--runs", "x"], app)
    assert result.returncode == 0, result.stderr
    assert "APP " not in result.stdout + result.stderr
    for name in ("plain", "tuned", "moirai"):
        assert f"│ {name}" in result.stdout
    assert "Keep it with:" in result.stdout
    assert "app.py --runs x" in result.stdout
    steps = result.stderr.splitlines()
    assert steps[0] == "[1/9] plain, warm-up"
    assert steps[-1].startswith("[9/9] ")
    content = json.loads((app / "out.json").read_text())
    assert content["is_complete"] is True
    for configuration in content["configurations"]:
        assert len(configuration["runs"]) == 2
        for run in configuration["runs"]:
            assert 0 < run["end_rss_bytes"] <= run["peak_rss_bytes"]
            assert run["cpu_seconds"] > 0
    plain, _, moirai = content["configurations"]
    assert plain["cpu_ratio"] == {"median": 1.0, "lowest": 1.0, "highest": 1.0}
    assert moirai["command_line"] == "python -u -m moirai run app.py --runs x"


def test_json_to_standard_output_is_all_there_is(app: Path) -> None:
    result = execute([*SHORT, "--configs", "plain", "--json", "-", "app.py"], app)
    assert (result.returncode, result.stderr) == (0, "")
    assert json.loads(result.stdout)["best"] == "plain"


def test_arrays_are_moirais_under_moirai_only(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(
        "import os, numpy\n"
        "from moirai import memory\n"
        "with open('seen', 'a') as file: print(memory.installed() is not None, file=file)\n"
    )
    execute([*SHORT, "--configs", "plain,moirai", "app.py"], tmp_path)
    assert (tmp_path / "seen").read_text().split() == ["False", "True"]


def test_every_allocator_on_this_machine_is_measured(tmp_path: Path) -> None:
    result = execute([*SHORT, "--json", "-", "-c", "pass"], tmp_path)
    names = [each["name"] for each in json.loads(result.stdout)["configurations"]]
    peers = [name for name in find_all() if name not in ("system", "moirai")]
    assert names == ["plain", *peers, "moirai-malloc", "moirai"]


def test_failing_program_stops_and_shows_its_own_errors(tmp_path: Path) -> None:
    code = "import sys; print('reason', file=sys.stderr); sys.exit(3)"
    result = execute([*SHORT, "-c", code], tmp_path)
    assert result.returncode == 3
    assert result.stdout == ""
    assert result.stderr == (
        "reason\nmoirai compare: the program ended with exit status 3 under plain\n"
    )


def test_failure_under_one_configuration_only_is_said(tmp_path: Path) -> None:
    code = "import os, sys; sys.exit('GLIBC_TUNABLES' in os.environ)"
    result = execute([*SHORT, "--configs", "tuned", "-c", code], tmp_path)
    assert result.returncode == 1
    assert "exit status 1 under tuned, though not under plain" in result.stderr


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_leaves_no_child_and_shows_what_was_measured(
    number: int, status: int, tmp_path: Path
) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    # The first run passes, the second reports itself and its child, and waits.
    (tmp_path / "app.py").write_text(
        "import os, signal, subprocess, sys\n"
        "if not os.path.exists('ran'):\n    open('ran', 'w').close(); sys.exit()\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import signal; signal.pause()'])\n"
        "open('fifo', 'w').write(f'{os.getpid()} {child.pid}')\n"
        "signal.pause()\n"
    )
    with subprocess.Popen(
        [*COMPARE, "--runs", "2", "--no-warm-up", "--configs", "plain", "app.py"],
        cwd=tmp_path,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        with open(fifo) as reports:
            pids = reports.read().split()
        process.send_signal(number)
        output, errors = process.communicate(timeout=60)
    assert process.returncode == status, errors
    assert "Interrupted: between 1 and 1 of 2 rounds" in output
    assert "Traceback" not in errors
    assert all(ends(int(pid)) for pid in pids)
    assert not list(tmp_path.glob("moirai-*"))


def test_timeout_is_named_with_its_configuration(tmp_path: Path) -> None:
    result = execute([*SHORT, "--timeout", "0.5", "-c", "import signal; signal.pause()"], tmp_path)
    assert result.returncode == 124
    assert "--timeout: the program took longer than 0.5 s and was killed (under plain)" in (
        result.stderr
    )


MISTAKES = {
    "nothing": ([], "expected a script"),
    "no runs": (["--runs", "0", "x.py"], "--runs: must be a whole number >= 1, got '0'"),
    "bad timeout": (["--timeout", "nan", "x.py"], "--timeout: must be a number of seconds > 0"),
    "longer than any clock": (["--timeout", "1e10", "x.py"], "must be a number of seconds > 0"),
    "bad config": (["--configs", "plain,best", "x.py"], "got 'best'"),
    "standard input": (["-"], "can run again, got -"),
    "bad file": (["--json", "no/such", "x.py"], "--json: must be a file that can be written"),
    "other interpreter": (["/usr/bin/env/python3", "x.py"], "expected the interpreter"),
    "other version": (["python3.9", "x.py"], "expected the interpreter"),
    "only python": (["python"], "expected a script"),
    "isolated": (["python", "-I", "x.py"], "-I keeps Moirai out"),
}


@pytest.mark.parametrize(("arguments", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_mistake_is_named(arguments: list[str], message: str, tmp_path: Path) -> None:
    result = execute(arguments, tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert message in result.stderr
