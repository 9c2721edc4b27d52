"""What every test shares: fixed seeds, and a fresh interpreter for what would spoil this one."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, settings

# Derandomised: the same examples on every machine. To explore, run pytest with
# --hypothesis-profile=explore; its failures print the blob that reproduces them.
settings.register_profile(
    "fixed",
    derandomize=True,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("explore", deadline=None, print_blob=True, max_examples=1000)
settings.load_profile("fixed")

# A shell that starts a session in the background has it ignore Ctrl-C, which tests send.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

RunPython = Callable[..., str]


@pytest.fixture
def run_python() -> RunPython:
    """Run a program in a fresh interpreter and give its standard output; it must end with 0."""

    def run(source: str, *, shell_prefix: str = "", timeout_seconds: float = 120) -> str:
        command = [sys.executable, "-W", "error", "-c", textwrap.dedent(source)]
        if shell_prefix:
            command = ["sh", "-c", f'{shell_prefix} exec "$@"', "sh", *command]
        # For fences in a free-threaded interpreter, which maps 1 GiB ahead otherwise.
        environment = {**os.environ, "MIMALLOC_ARENA_RESERVE": "0"}
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=timeout_seconds,
            check=False,
            env=environment,
        )
        assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    return run


@pytest.fixture
def gate():
    """Call it with an executor to make its workers busy; gives the event that lets them go."""
    opened = threading.Event()

    def shut(executor):
        barrier = threading.Barrier(executor.max_workers + 1)

        def hold():
            barrier.wait(60)
            opened.wait(60)

        for _ in range(executor.max_workers):
            executor.submit(hold)
        barrier.wait(60)
        return opened

    yield shut
    opened.set()
