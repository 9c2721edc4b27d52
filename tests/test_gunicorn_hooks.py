"""gunicorn's workers: guarded by the hooks, and leaving when nothing helps."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from moirai import pressure
from moirai.integrations import gunicorn_hooks

CONFIGURATION = """
from moirai.integrations.gunicorn_hooks import guard_workers, worker_exit

bind = "unix:{socket}"
workers = 1
post_fork = guard_workers(limit="1 GiB")
"""
APPLICATION = """
import os
from moirai import pressure

cap = pressure.current().cap(4)


def plain(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain")])
    guard = pressure.current()
    return [f"{os.getpid()} {guard.stage.name} {guard.source.is_running}".encode()]


app = pressure.WsgiCap(plain, cap)
"""


class Connection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=60)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.connect(self._path)


def test_a_worker_guards_itself_and_its_application_is_capped(tmp_path: Path) -> None:
    pytest.importorskip("gunicorn")
    path = f"/tmp/moirai-gunicorn-{os.getpid()}.sock"  # Such a path has 107 characters at most.
    (tmp_path / "gunicorn.conf.py").write_text(CONFIGURATION.format(socket=path))
    (tmp_path / "application.py").write_text(textwrap.dedent(APPLICATION))
    command = [sys.executable, "-m", "gunicorn", "-c", "gunicorn.conf.py", "application:app"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if "Booting worker" in line:
                break
        connection = Connection(path)
        connection.request("GET", "/")
        answer = connection.getresponse().read().decode()
        worker, stage, is_running = answer.split()
        assert (stage, is_running) == ("CALM", "True")
        assert int(worker) != process.pid
        connection.close()
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    assert process.returncode == 0
    assert not os.path.exists(path)


def test_a_worker_at_which_nothing_helps_ends_as_after_its_last_request() -> None:
    worker = SimpleNamespace(pid=1, alive=True)
    gunicorn_hooks.guard_workers(limit="1 GiB", stall_seconds=0.0)(None, worker)
    try:
        guard = pressure.current()
        limit = 1 << 30
        guard.step(pressure.Sample(time.monotonic() + 1, limit, limit))
        assert worker.alive is False
    finally:
        gunicorn_hooks.worker_exit(None, worker)
    with pytest.raises(pressure.process.Closed):
        pressure.current()
