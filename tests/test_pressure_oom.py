"""The kernel's own verdict, in a control group with a limit; needs the right to make one."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

MIB = 1 << 20
LIMIT = 192 * MIB


def own_group() -> Path | None:
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            return Path("/sys/fs/cgroup/memory") / path.lstrip("/")
    return None


@pytest.fixture
def group() -> Iterator[Path]:
    """A group below the own one, of version 1, with a limit."""
    own = own_group()
    if own is None:
        pytest.skip("no control group of version 1 counts memory here")
    folder = own / f"moirai-test-{os.getpid()}"
    try:
        folder.mkdir()
        (folder / "memory.limit_in_bytes").write_text(str(LIMIT))
    except OSError as error:
        with contextlib.suppress(OSError):
            folder.rmdir()
        pytest.skip(f"no limited control group can be made: {error}")
    yield folder
    for _ in range(200):
        try:
            folder.rmdir()
            return
        except OSError:  # A process that has ended may still be on its way out of the group.
            time.sleep(0.02)
    pytest.fail(f"processes are left in {folder}")


def run_in(group: Path, source: str, **paths: Path) -> subprocess.CompletedProcess[str]:
    join = f"import os\nopen({str(group / 'cgroup.procs')!r}, 'w').write(str(os.getpid()))\n"
    names = "".join(f"{name} = {str(path)!r}\n" for name, path in paths.items())
    return subprocess.run(
        [sys.executable, "-c", join + names + textwrap.dedent(source)],
        capture_output=True,
        text=True,
        timeout=120,
    )


GROW = """
    kept = []
    try:
        while len(kept) < 1024:
            kept.append(bytearray(b"x" * (1 << 20)))
    except MemoryError:
        reached = len(kept)
        del kept
        print("reached", reached)
"""


def test_unguarded_the_kernel_kills(group: Path) -> None:
    assert run_in(group, GROW).returncode == -signal.SIGKILL


def test_behind_the_fence_the_program_gets_memory_error(group: Path) -> None:
    done = run_in(
        group, "from moirai import pressure\npressure.start(fence=True)\n" + textwrap.dedent(GROW)
    )
    assert done.returncode == 0, done.stderr
    assert 100 <= int(done.stdout.split()[1]) < LIMIT // MIB


def test_several_processes_of_a_group_stay_within_it_together(group: Path) -> None:
    source = """
        import os
        from moirai import pressure

        guard = pressure.start(fence=True)
        children = []
        for _ in range(4):
            child = os.fork()
            if child == 0:
                kept = []
                try:
                    while len(kept) < 1024:
                        kept.append(bytearray(b"x" * (1 << 19)))
                except MemoryError:
                    os._exit(0)
                os._exit(1)
            children.append(child)
        print([os.waitpid(child, 0)[1] for child in children])
    """
    done = run_in(group, source)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[0, 0, 0, 0]"


def test_streaming_a_file_is_no_pressure(group: Path, tmp_path: Path) -> None:
    source = """
        from moirai import pressure

        guard = pressure.start(fence=True)
        block = bytes(1 << 20)
        with open(file, "wb") as out:
            for _ in range(400):
                out.write(block)
        for _ in range(2):
            with open(file, "rb") as stream:
                while stream.read(1 << 20):
                    pass
        pressure.stop()
        assert guard.status().highest_stage < pressure.Stage.AGGRESSIVE, guard.status()
    """
    done = run_in(group, source, file=tmp_path / "stream")
    assert done.returncode == 0, done.stderr


def test_the_group_is_what_a_source_measures_against(group: Path) -> None:
    source = """
        from moirai import pressure

        source = pressure.Source()
        block = bytearray(b"x") * (64 << 20)
        sample = source.read()
        print(sample.bound, sample.limit_bytes, sample.used_bytes >= 64 << 20)
    """
    done = run_in(group, source)
    assert done.stdout.split() == ["cgroup", str(LIMIT), "True"], done.stderr
