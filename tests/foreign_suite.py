"""Another package's own tests, run in an interpreter that a plugin has prepared."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def passed_count(folder: Path, plugin: str, modules: Sequence[str], chosen: str) -> int:
    """How many tests passed; none may fail.

    Args:
        folder: Empty, for the plugin and for what the tests leave behind.
        plugin: Python source that is run before the tests are collected.
        modules: Where the tests are.
        chosen: Which of them, as of pytest's ``-k``.
    """
    (folder / "prepared.py").write_text(plugin)
    (folder / "pytest.ini").write_text("[pytest]\n")
    command = [sys.executable, "-m", "pytest", "-q", "-c", "pytest.ini", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "-p", "prepared", "-k", chosen, "--pyargs", *modules],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return int(done.stdout.rpartition(" passed")[0].split()[-1])
