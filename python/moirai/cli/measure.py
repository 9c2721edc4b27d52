"""Runs one program once and measures it: for `moirai compare`.

CPU time, faults and wall time are the kernel's own (`wait4`). The peak of resident memory is not:
`ru_maxrss` starts at the size of the process that started the program (exec keeps the maximum), so
a small program would be given ours. The probe in the program reports VmHWM, which starts anew with
each exec, and the `ru_maxrss` of the children it waited for, which inherit no more than that.
`wait4`'s own is used where it exceeds what was inherited: of a program that left no probe, and of
children that ended after the probe was written.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from moirai.errors import MoiraiError, Timeout

__all__ = ["Measurement", "ProgramFailed", "measure"]


@dataclass(frozen=True)
class Measurement:
    """One run. `end_rss_bytes` is None if the program left no trace (it ended by os._exit)."""

    wall_seconds: float
    user_seconds: float
    system_seconds: float
    peak_rss_bytes: int
    end_rss_bytes: int | None
    minor_faults: int
    major_faults: int

    @property
    def cpu_seconds(self) -> float:
        return self.user_seconds + self.system_seconds


class ProgramFailed(MoiraiError):
    """The program ended with an exit status other than 0; below 0 it is a signal's number."""

    def __init__(self, status: int, output: bytes, errors: bytes) -> None:
        super().__init__(f"program: ended with exit status {status}")
        self.status = status
        self.output = output
        self.errors = errors


def measure(
    command: Sequence[str],
    environment: Mapping[str, str],
    *,
    directory: Path,
    timeout_seconds: float | None = None,
) -> Measurement:
    """Run a command in a process group of its own and wait for it.

    Whatever ends the waiting (Ctrl-C, the timeout, an error) ends the whole process group too.

    Args:
        command: Program and arguments.
        environment: Its whole environment; MOIRAI_PROBE is added.
        directory: Where its output and the probe go; nothing in it is kept.
        timeout_seconds: How long it may take; None: as long as it likes.

    Raises:
        ProgramFailed: Its exit status is not 0; holds its output.
        Timeout: It took longer; it was killed.
    """
    probe = directory / "probe"
    probe.unlink(missing_ok=True)
    inherited_bytes = _own_peak_bytes()
    with (
        open(directory / "output", "w+b") as output,
        open(directory / "errors", "w+b") as errors,
    ):
        started_seconds = time.monotonic()
        process = subprocess.Popen(
            command,
            env={**environment, "MOIRAI_PROBE": str(probe)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=errors,
            start_new_session=True,
        )
        try:
            _wait(process.pid, timeout_seconds)
            wall_seconds = time.monotonic() - started_seconds
        except BaseException:
            _kill_group(process)
            raise
        _, wait_status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(wait_status)
        if process.returncode != 0:
            output.seek(0)
            errors.seek(0)
            raise ProgramFailed(process.returncode, output.read(), errors.read())
    end_bytes, peak_bytes = _read_probe(probe)
    return Measurement(
        wall_seconds=wall_seconds,
        user_seconds=used.ru_utime,
        system_seconds=used.ru_stime,
        peak_rss_bytes=_true_peak(used.ru_maxrss * 1024, inherited_bytes, peak_bytes),
        end_rss_bytes=end_bytes,
        minor_faults=used.ru_minflt,
        major_faults=used.ru_majflt,
    )


def _true_peak(maximum_bytes: int, inherited_bytes: int, probed_bytes: int | None) -> int:
    if probed_bytes is None:
        return maximum_bytes
    # The two count in batches of their own, so that either may be a few pages behind.
    return max(probed_bytes, maximum_bytes if maximum_bytes > inherited_bytes else 0)


def _wait(pid: int, timeout_seconds: float | None) -> None:
    """Wait for the end of a process without reaping it, interruptibly."""
    descriptor = os.pidfd_open(pid)
    try:
        ready, _, _ = select.select([descriptor], [], [], timeout_seconds)
    finally:
        os.close(descriptor)
    if not ready:
        raise Timeout(
            f"--timeout: the program took longer than {timeout_seconds:g} s and was killed"
        )


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kill the program and what it started; its group is its own (start_new_session)."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _own_peak_bytes() -> int:
    with open("/proc/self/status", encoding="ascii", errors="replace") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM:"))


def _read_probe(probe: Path) -> tuple[int | None, int | None]:
    """Return VmRSS at the end and the peak in bytes; None where the program wrote none."""
    try:
        numbers = [int(number) for number in probe.read_text("ascii").split()]
    except (OSError, ValueError):
        return None, None
    # A single number is the process id of a program that did not get to its exit handlers.
    return (numbers[0], numbers[1]) if len(numbers) == 2 else (None, None)
